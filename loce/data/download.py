"""Download of LVIS and COCO: places and checksums of the files, resuming, unpacking.

A file grows as NAME.part beside its place; the next call asks the server for the rest only (HTTP Range), or starts over
where the server cannot do that. NAME itself appears when its size and checksum are right (where no checksum is known:
when every member's CRC is), so a file of that name is always whole.

What is known of them: size and SHA-256 of COCO's archives, MD5 of LVIS v1's, size of its training archive, as
published by many users of them. No checksum of LVIS v0.5 is known: every member's CRC is checked, as in all archives
when they are unpacked. All annotation files must have the published numbers of images, annotations and categories (as
far as they are known) before they get their name, and image folders the published number of files.
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from loce.data.annotations.lvis import LVISAnnotations
from loce.utils.errors import UserError
from loce.utils.files import atomic_write
from loce.utils.progress import Progress, print_line, progress

TRIES = 6  # in a row without a new byte, per place
TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RETRY = (408, 425, 429)  # and 500 and above: the server may answer later
_JUNK = "__MACOSX"  # what macOS adds to archives


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A ZIP file and what comes out of it: one annotation file, or a folder of images.

    urls: places of the file, in the order they are tried. folder: where it is unpacked, below the data folder. content:
    the annotation file's or image folder's name in it. size: bytes of the archive. checksum: see `download`. unpacked:
    bytes on disk afterwards, about; images, annotations, categories: how many there must be. None: not known.
    """

    urls: tuple[str, ...]
    folder: str
    content: str
    unpacked: int
    size: int | None = None
    checksum: str = ""
    images: int | None = None
    annotations: int | None = None
    categories: int | None = None

    @property
    def name(self) -> str:
        """The archive's own file name."""
        return self.urls[0].rpartition("/")[2]

    @property
    def is_annotations(self) -> bool:
        """One JSON file; else a folder of images."""
        return self.content.endswith(".json")


def _coco(name: str) -> tuple[str, ...]:
    path = f"images.cocodataset.org/{name}.zip"
    # The first host has no valid certificate, so only the second is asked by https.
    return f"http://{path}", f"https://s3.amazonaws.com/{path}"


def _coco_images(content: str, unpacked: int, size: int, sha256: str, images: int) -> Archive:
    return Archive(
        urls=_coco(f"zips/{content}"),
        folder="coco",
        content=content,
        unpacked=unpacked,
        size=size,
        checksum=f"sha256:{sha256}",
        images=images,
    )


def _coco_annotations(content: str, unpacked: int, images: int, annotations: int) -> Archive:
    """One of the two files that are wanted from COCO's archive of annotations."""
    return Archive(
        urls=_coco("annotations/annotations_trainval2017"),
        folder="coco/annotations",
        content=content,
        unpacked=unpacked,
        size=252_907_541,
        checksum="sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        images=images,
        annotations=annotations,
        categories=80,
    )


def _lvis(content: str, unpacked: int, categories: int, **known: Any) -> Archive:
    """lvis_v1_val.json and the like; known: what else is known of it."""
    place = f"dl.fbaipublicfiles.com/LVIS/{content}.zip"
    return Archive(
        urls=(f"https://{place}", f"https://s3-us-west-2.amazonaws.com/{place}"),
        folder=f"{content.rpartition('_')[0]}/annotations",
        content=content,
        unpacked=unpacked,
        categories=categories,
        **known,
    )


_VAL_IMAGES = "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"
_TRAIN_IMAGES = "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"
_V1_VAL = {"checksum": "md5:87734a7f895990b9552075d7ce723e27", "images": 19_809, "annotations": 244_707}
_V1_TRAIN = {"checksum": "md5:4410d837f71203af226950447ef9d422", "images": 100_170, "annotations": 1_270_141}
IMAGES = (
    _coco_images("val2017", 830_000_000, 815_585_330, _VAL_IMAGES, images=5000),
    _coco_images("train2017", 19_700_000_000, 19_336_861_798, _TRAIN_IMAGES, images=118_287),
)
ANNOTATIONS = {
    "1.0": (
        _lvis("lvis_v1_val.json", 202_000_000, 1203, **_V1_VAL),
        _lvis("lvis_v1_train.json", 1_200_000_000, 1203, size=350_264_821, **_V1_TRAIN),
    ),
    "0.5": (
        _lvis("lvis_v0.5_val.json", 100_000_000, 1230),
        _lvis("lvis_v0.5_train.json", 1_000_000_000, 1230, annotations=693_958),
    ),
    "coco": (
        _coco_annotations("instances_val2017.json", 25_000_000, images=5000, annotations=36_781),
        _coco_annotations("instances_train2017.json", 500_000_000, images=118_287, annotations=860_001),
    ),
}
_ARCHIVE_GUESS = 500_000_000  # bytes to allow for an archive whose size is not known


def from_mirror(archives: Sequence[Archive], mirror: str) -> list[Archive]:
    """The same archives, fetched from the folder `mirror` (a URL) and from nowhere else."""
    return [replace(archive, urls=(f"{mirror.rstrip('/')}/{archive.name}",)) for archive in archives]


def fetch_all(archives: Sequence[Archive], out: Path, keep: bool = False, wait: float = 1.0) -> None:
    """Fetch, check and unpack below `out` what is not there yet. keep: leave the archives beside what came out of them.

    UserError: too little disk (asked before anything is fetched), a file that no place gives, damaged or wrong content.
    """
    missing = []
    for archive in archives:
        if is_finished(archive, out):
            print_line(f"{Path(out, archive.folder, archive.content)}: is there")
        else:
            missing.append(archive)
    require_space(_needs(missing, out, keep))
    for number, archive in enumerate(missing):
        path = Path(out, archive.folder, archive.name)
        if path.exists():
            # From an earlier run, or put there by hand: it may be the user's, so a wrong one is not removed.
            try:
                check_file(path, archive.size, archive.checksum)
            except RefusedError as error:
                raise UserError(f"{path}: {error}. Remove it and run the command again") from None
        else:
            download(archive.urls, path, archive.size, archive.checksum, wait)
        _unpack(archive, path)
        if not keep and archive.urls not in [later.urls for later in missing[number + 1 :]]:
            path.unlink()
        print_line(f"{path.with_name(archive.content)}: done")


def is_finished(archive: Archive, out: Path) -> bool:
    """The annotation file is there, or the image folder has as many files as it must have."""
    target = Path(out, archive.folder, archive.content)
    if archive.is_annotations:
        return target.is_file()
    visible = [name for name in os.listdir(target) if not name.startswith(".")] if target.is_dir() else []
    return len(visible) >= (archive.images or 1)


def _needs(archives: Sequence[Archive], out: Path, keep: bool) -> list[tuple[Path, int]]:
    """(folder, bytes) still to be written; archives that are removed in between count only as the largest of them."""
    needs, downloads = [], []
    for archive in archives:
        folder = Path(out, archive.folder)
        here = (folder / archive.name, folder / f"{archive.name}.part")
        arrived = sum(path.stat().st_size for path in here if path.exists())
        target = folder / archive.content
        unpacked = sum(entry.stat().st_size for entry in os.scandir(target)) if target.is_dir() else 0
        needs.append((folder, max(0, archive.unpacked - unpacked)))
        downloads.append((folder, max(0, (archive.size or _ARCHIVE_GUESS) - arrived)))
    return needs + (list(set(downloads)) if keep else sorted(downloads, key=lambda need: need[1])[-1:])


def _unpack(archive: Archive, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as source:
            members = safe_members(source)
            if archive.is_annotations:
                _unpack_annotations(
                    archive, source, [m for m in members if m.filename.rpartition("/")[2] == archive.content]
                )
            else:
                _unpack_images(archive, source, members)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a ZIP file ({error}); remove it and run the command again") from None


def _unpack_annotations(archive: Archive, source: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    path = Path(str(source.filename))
    if len(members) != 1:
        raise UserError(f"{path}: has no {archive.content} in it; remove it and run the command again")
    require_space([(path.parent, members[0].file_size)])
    with atomic_write(path.with_name(archive.content)) as temporary:
        print_line(f"{archive.content}: unpacking and counting")
        unpack_member(source, members[0], temporary)
        _require_counts(archive, temporary, path)


def _require_counts(archive: Archive, file: Path, path: Path) -> None:
    """UserError unless an annotation file has the numbers of images, annotations and categories it must have."""
    try:
        found = LVISAnnotations.open(file)
    except UserError as error:
        message = str(error).replace(str(file), archive.content)
        raise UserError(f"{path}: {message}. Remove the archive and run the command again") from None
    counts = {"images": len(found), "annotations": len(found.annotation_ids), "categories": len(found.stats)}
    expected = {kind: getattr(archive, kind) for kind in counts}
    wrong = [
        f"{number} {kind}, {expected[kind]} expected"
        for kind, number in counts.items()
        if expected[kind] not in (None, number)
    ]
    if wrong:
        raise UserError(f"{path}: {archive.content} in it is another one: {'; '.join(wrong)}. Remove the archive")


def _unpack_images(archive: Archive, source: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    path = Path(str(source.filename))
    folder = path.with_name(archive.content)
    prefix = f"{archive.content}/"
    wanted = [m for m in members if m.filename.startswith(prefix) and "/" not in m.filename[len(prefix) :]]
    if len(wanted) != len(members) or archive.images not in (None, len(wanted)):
        raise UserError(f"{path}: {len(wanted)} images in {prefix}, {len(members)} files, {archive.images} expected")
    folder.mkdir(exist_ok=True)
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    names = [member.filename[len(prefix) :] for member in wanted]
    other = [name for name, m in zip(names, wanted, strict=True) if sizes.get(name, m.file_size) != m.file_size]
    if other:
        raise UserError(
            f"{folder}: {len(other)} files have another size than in {path.name} (the first: {other[0]}). "
            "Files that are there are never replaced: move them away and run the command again"
        )
    missing = [(name, m) for name, m in zip(names, wanted, strict=True) if name not in sizes]
    require_space([(folder, sum(member.file_size for _, member in missing))])
    for name, member in progress(missing, len(missing), f"unpacking {path.name}", "images"):
        temporary = folder / f".{name}.part"
        unpack_member(source, member, temporary)
        os.replace(temporary, folder / name)
    os.sync()  # before the archive goes


class RefusedError(Exception):
    """Why a place, or what it gave, is not taken; the next place is tried."""


def download(urls: Sequence[str], path: Path, size: int | None = None, checksum: str = "", wait: float = 1.0) -> None:
    """The ZIP file at the first of `urls` that gives a right one, as `path`.

    size: bytes, None where not known. checksum: "sha256:..." or "md5:...", "" where not known. wait: seconds before the
    second try; doubled for each further one. UserError: no place gives the file (with every place's reason), disk full.
    """
    part = path.with_name(f"{path.name}.part")
    reasons = []
    for url in urls:
        try:
            _fetch(url, part, size, wait)
        except RefusedError as error:
            reasons.append(f"{url}: {error}")
            print_line(reasons[-1])
            continue
        try:
            check_file(part, size, checksum)
        except RefusedError as error:
            part.unlink()
            reasons.append(f"{url}: {error}; removed")
            print_line(reasons[-1])
            continue
        os.replace(part, path)
        return
    if part.exists() and not part.stat().st_size:
        part.unlink()
    raise UserError(
        f"{path.name} could not be fetched:\n"
        + "\n".join(f"  {reason}" for reason in reasons)
        + f"\nRun the command again later (what has arrived is kept), or put the file there by hand: {path}"
    )


def check_file(path: Path, size: int | None, checksum: str) -> None:
    """RefusedError where its size, checksum or, without a checksum, the CRC of a member is wrong."""
    if size is not None and path.stat().st_size != size:
        raise RefusedError(f"{path.stat().st_size} bytes, {size} expected")
    if not checksum:
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise RefusedError(f"not a whole ZIP file ({error})") from None
        if bad:
            raise RefusedError(f"{bad} in it is damaged")
        return
    kind, wanted = checksum.split(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    display = Progress(f"{kind} of {path.name}", -(-path.stat().st_size // _BLOCK), unit="MiB")
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            display.advance()
    display.close()
    if digest.hexdigest() != wanted:
        raise RefusedError(f"wrong {kind}: {digest.hexdigest()}, {wanted} expected")


def safe_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive; UserError if one would be written outside the folder, or is a link."""
    members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith(_JUNK)]
    bad = []
    for info in members:
        path = PurePosixPath(info.filename)
        outside = path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", info.filename)
        if outside or stat.S_ISLNK(info.external_attr >> 16):
            bad.append(info.filename)
    if bad:
        raise UserError(
            f"{archive.filename}: {len(bad)} of its files would be written outside the folder, or are links "
            f"(the first: {bad[0]}); nothing was unpacked. This is not the original file: remove it"
        )
    return members


def unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one file of an archive to `path`. UserError: its CRC is wrong, or the disk is full."""
    try:
        with archive.open(member) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
    except zipfile.BadZipFile as error:
        path.unlink()
        raise UserError(f"{archive.filename}: damaged ({error}); remove it and run the command again") from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def require_space(needs: Sequence[tuple[Path, int]]) -> None:
    """UserError unless every disk has room for its (folder, bytes); folders need not exist yet."""
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, number in needs:
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        first, so_far = wanted.get(place.stat().st_dev, (place, 0))
        wanted[place.stat().st_dev] = first, so_far + number
    problems = []
    for place, number in wanted.values():
        free = shutil.disk_usage(place).free
        if free < number:
            problems.append(
                f"{place}: {number / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: free "
                f"{(number - free) / 1e9:.1f} GB, or choose a folder on another disk"
            )
    if problems:
        raise UserError("\n".join(problems))


def _fetch(url: str, part: Path, size: int | None, wait: float) -> None:
    """Complete `part` from one place. RefusedError when the place says no, or nothing new came in TRIES tries."""
    best, tries = -1, 0
    while True:
        try:
            problem = _stream(url, part, size)
        except HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in _RETRY:
                raise RefusedError(problem) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise UserError(f"{part}: {error.strerror}; free some space and run the command again") from None
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        if not problem:
            return
        now = part.stat().st_size
        tries = 1 if now > best else tries + 1
        best = max(best, now)
        if tries >= TRIES:
            raise RefusedError(f"given up after {TRIES} tries: {problem}")
        pause = wait * 2 ** (tries - 1)
        print_line(f"{url}: {problem}; trying again in {pause:g} s")
        time.sleep(pause)


def _stream(url: str, part: Path, size: int | None) -> str:
    """One request for the rest of `part`; "" when it is complete then, else what happened."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "ab")  # noqa: SIM115 (closed below; what cannot be opened is the user's to mend, not to retry)
    except OSError as error:
        raise UserError(f"{part}: cannot be written ({error.strerror}); choose another folder") from None
    with file:
        have = file.tell()
        if size is not None and have >= size:
            return ""  # the checksum decides
        # Ask for the rest. 416: the server has no bytes beyond those that are here.
        headers = {"User-Agent": "loce", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return ""
            file.truncate(0)  # longer than the file there: something else
            return "the part that was here does not belong to this file; starting over"
        # Append the answer, or start over where the server sends the whole file again.
        with answer:
            start, total = _range(answer, have)
            if total is not None and size is not None and total != size:
                raise RefusedError(f"holds another file: {total} bytes, {size} expected")
            if start != have:
                file.truncate(0)
            return _copy(answer, file, start, total, part.stem)


def _range(answer: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """First byte of what a server sends, and how long the whole file is (None: it does not say)."""
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            raise RefusedError(f"answers the request for the rest with {answer.headers.get('Content-Range')}")
        return have, int(match[2])
    length = answer.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, start: int, total: int | None, label: str) -> str:
    """Append an answer to a file from byte `start` on; gives "" or, where the connection was cut, a line about it."""
    done = start
    display = Progress(label, -(-(total or 0) // _BLOCK), done // _BLOCK, unit="MiB")
    try:
        while block := answer.read(_BLOCK):
            file.write(block)
            display.advance((done + len(block)) // _BLOCK - done // _BLOCK)
            done += len(block)
    finally:
        display.close()
    return "" if total is None or done == total else f"the connection was cut at {done} of {total} bytes"
