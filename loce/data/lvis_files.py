"""Where LVIS's and COCO's files are on the network, how they are recognised, and putting them in place.

What is known of them: size and SHA-256 of COCO's archives, MD5 of LVIS v1's, size of its training archive, as
published by many users of them. No checksum of LVIS v0.5 is known: every member's CRC is checked, as in all archives
when they are unpacked. All annotation files must have the published numbers of images, annotations and categories (as
far as they are known) before they get their name, and image folders the published number of files.
"""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.download import RefusedError, check_file, download, require_space, safe_members, unpack_member
from loce.utils.errors import UserError
from loce.utils.files import atomic_write
from loce.utils.progress import progress, say


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


def _lvis(name: str) -> tuple[str, ...]:
    folder = "dl.fbaipublicfiles.com/LVIS"
    return f"https://{folder}/{name}.zip", f"https://s3-us-west-2.amazonaws.com/{folder}/{name}.zip"


def _coco(name: str) -> tuple[str, ...]:
    path = f"images.cocodataset.org/{name}.zip"
    # The first host has no valid certificate, so only the second is asked by https.
    return f"http://{path}", f"https://s3.amazonaws.com/{path}"


def _coco_instances(content: str, unpacked: int, images: int, annotations: int) -> Archive:
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


IMAGES = (
    Archive(
        urls=_coco("zips/val2017"),
        folder="coco",
        content="val2017",
        unpacked=830_000_000,
        size=815_585_330,
        checksum="sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        images=5000,
    ),
    Archive(
        urls=_coco("zips/train2017"),
        folder="coco",
        content="train2017",
        unpacked=19_700_000_000,
        size=19_336_861_798,
        checksum="sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        images=118_287,
    ),
)
ANNOTATIONS = {
    "1.0": (
        Archive(
            urls=_lvis("lvis_v1_val.json"),
            folder="lvis_v1/annotations",
            content="lvis_v1_val.json",
            unpacked=202_000_000,
            checksum="md5:87734a7f895990b9552075d7ce723e27",
            images=19_809,
            annotations=244_707,
            categories=1203,
        ),
        Archive(
            urls=_lvis("lvis_v1_train.json"),
            folder="lvis_v1/annotations",
            content="lvis_v1_train.json",
            unpacked=1_200_000_000,
            size=350_264_821,
            checksum="md5:4410d837f71203af226950447ef9d422",
            images=100_170,
            annotations=1_270_141,
            categories=1203,
        ),
    ),
    "0.5": (
        Archive(
            urls=_lvis("lvis_v0.5_val.json"),
            folder="lvis_v0.5/annotations",
            content="lvis_v0.5_val.json",
            unpacked=100_000_000,
            categories=1230,
        ),
        Archive(
            urls=_lvis("lvis_v0.5_train.json"),
            folder="lvis_v0.5/annotations",
            content="lvis_v0.5_train.json",
            unpacked=1_000_000_000,
            annotations=693_958,
            categories=1230,
        ),
    ),
    "coco": (
        _coco_instances("instances_val2017.json", 25_000_000, images=5000, annotations=36_781),
        _coco_instances("instances_train2017.json", 500_000_000, images=118_287, annotations=860_001),
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
            say(f"{Path(out, archive.folder, archive.content)}: is there")
        else:
            missing.append(archive)
    require_space(_needs(missing, out, keep))
    for number, archive in enumerate(missing):
        path = Path(out, archive.folder, archive.name)
        if path.exists():
            _recheck(archive, path)
        else:
            download(archive.urls, path, archive.size, archive.checksum, wait)
        _unpack(archive, path)
        if not keep and archive.urls not in [later.urls for later in missing[number + 1 :]]:
            path.unlink()
        say(f"{path.with_name(archive.content)}: done")


def is_finished(archive: Archive, out: Path) -> bool:
    """The annotation file is there, or the image folder has as many files as it must have."""
    target = Path(out, archive.folder, archive.content)
    if archive.is_annotations:
        return target.is_file()
    return target.is_dir() and len(_visible(target)) >= (archive.images or 1)


def _visible(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not name.startswith(".")]


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


def _recheck(archive: Archive, path: Path) -> None:
    """An archive from an earlier run, or put there by hand; not removed if it is wrong, since it may be the user's."""
    try:
        check_file(path, archive.size, archive.checksum)
    except RefusedError as error:
        raise UserError(f"{path}: {error}. Remove it and run the command again") from None


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
        say(f"{archive.content}: unpacking and counting")
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
