"""Fetching data from a server on this machine that can be told to misbehave."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loce.data.download import ANNOTATIONS, IMAGES, Archive, download, fetch_all, from_mirror, is_finished
from loce.utils.errors import UserError
from tests.data.made_annotations import as_format, content

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = 0.001  # seconds before the second try


class Server:
    """Files by name; every request is noted as (path, the Range it asked for).

    cuts: how many bytes of the next answers are sent before the connection is closed. statuses: codes of the next
    answers. ranges: whether it understands Range.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                ours.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        found = self.files.get(request.path.rpartition("/")[2])
        status = self.statuses.pop(0) if self.statuses else 200
        if found is None or request.path.startswith("/gone/") or status != 200:
            request.send_error(404 if status == 200 else status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(found):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(found)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(found) - 1}/{len(found)}")
        request.send_header("Content-Length", str(len(found) - start))
        request.end_headers()
        end = start + self.cuts.pop(0) if self.cuts else len(found)
        request.wfile.write(found[start:end])
        request.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def zipped(files: dict[str, bytes]) -> bytes:
    """A ZIP file, its members stored as they are."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


PICTURES = {f"train2017/{number:012}.jpg": bytes([number]) * (5000 + number) for number in range(4)}


@pytest.fixture
def images(server: Server) -> Archive:
    """The image archive train2017.zip of four files, on the server."""
    data = server.files["train2017.zip"] = zipped({"train2017/": b"", **PICTURES})
    urls = (f"{server.url}/train2017.zip",)
    known = {"size": len(data), "checksum": sha256(data)}
    return Archive(urls=urls, folder="coco", content="train2017", unpacked=20_000, images=4, **known)  # type: ignore[arg-type]


@pytest.fixture
def annotations(server: Server) -> Archive:
    """An archive of an annotation file about which only the counts are known, as of LVIS v0.5."""
    made = as_format(content(6), "lvis_v0.5")
    server.files["a.json.zip"] = zipped({"a.json": json.dumps(made).encode(), "__MACOSX/._a.json": b"junk"})
    counts = {"images": 6, "annotations": len(made["annotations"]), "categories": 4}
    urls = (f"{server.url}/a.json.zip",)
    return Archive(urls=urls, folder="lvis/annotations", content="a.json", unpacked=10_000, **counts)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UNPACKED = {f"coco/{name}": data for name, data in PICTURES.items()}


def test_everything_is_fetched_and_unpacked_and_a_second_run_does_nothing(
    server, images, annotations, tmp_path, capsys
):
    fetch_all([annotations, images], tmp_path)
    found = tree(tmp_path)
    assert len(json.loads(found.pop("lvis/annotations/a.json"))["images"]) == 6
    assert found == UNPACKED
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    asked = len(server.requests)
    capsys.readouterr()
    fetch_all([annotations, images], tmp_path)
    assert len(server.requests) == asked == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert capsys.readouterr().out.count("is there") == 2


def test_two_files_of_one_archive_are_one_download(server, annotations, tmp_path):
    made = json.dumps(as_format(content(6), "coco")).encode()
    server.files["a.json.zip"] = zipped({"annotations/a.json": made, "annotations/b.json": made, "annotations/c": b"c"})
    fetch_all([annotations, replace(annotations, content="b.json")], tmp_path)
    assert tree(tmp_path) == {"lvis/annotations/a.json": made, "lvis/annotations/b.json": made}
    assert len(server.requests) == 1


def test_archives_may_be_kept_and_are_used_again(server, images, tmp_path):
    fetch_all([images], tmp_path, keep=True)
    (tmp_path / "coco/train2017/000000000002.jpg").unlink()
    fetch_all([images], tmp_path, keep=True)
    assert tree(tmp_path) == {**UNPACKED, "coco/train2017.zip": server.files["train2017.zip"]}
    assert len(server.requests) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_cut_connection_goes_on_by_range(known, server, images, tmp_path, capsys):
    data = server.files["train2017.zip"]
    server.cuts = [7000, 100, len(data)]
    download(images.urls, tmp_path / "x.zip", images.size if known else None, images.checksum if known else "", QUICK)
    assert (tmp_path / "x.zip").read_bytes() == data
    assert [wanted for _, wanted in server.requests] == [None, "bytes=7000-", "bytes=7100-"]
    assert f"the connection was cut at 7000 of {len(data)} bytes" in capsys.readouterr().out


def test_a_new_process_goes_on_where_the_last_one_stopped(server, images, tmp_path):
    part = tmp_path / "coco/train2017.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.files["train2017.zip"][:9000])
    fetch_all([images], tmp_path)
    assert server.requests == [("/train2017.zip", "bytes=9000-")]
    assert tree(tmp_path) == UNPACKED


@pytest.mark.parametrize("known", [True, False])
def test_a_complete_part_is_only_checked(known, server, images, tmp_path):
    data = server.files["train2017.zip"]
    (tmp_path / "x.zip.part").write_bytes(data)
    download(images.urls, tmp_path / "x.zip", images.size if known else None, images.checksum if known else "", QUICK)
    assert tree(tmp_path) == {"x.zip": data}
    assert len(server.requests) == (0 if known else 1)  # without a size the server must say that nothing is left


def test_a_part_longer_than_the_file_is_started_over(server, images, tmp_path):
    data = server.files["train2017.zip"]
    (tmp_path / "x.zip.part").write_bytes(data + b"more")
    download(images.urls, tmp_path / "x.zip", None, images.checksum, QUICK)
    assert tree(tmp_path) == {"x.zip": data}
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(data) + 4}-", None]


def test_a_server_without_range_sends_all_again(server, images, tmp_path):
    server.ranges = False
    server.cuts = [7000]
    fetch_all([images], tmp_path, wait=QUICK)
    assert tree(tmp_path) == UNPACKED
    assert len(server.requests) == 2


def test_a_server_that_always_cuts_is_given_up(server, images, tmp_path):
    server.ranges = False
    server.cuts = [7000] * 100
    with pytest.raises(UserError, match="given up after 6 tries: the connection was cut at 7000"):
        fetch_all([images], tmp_path, wait=QUICK)
    assert len(server.requests) == 6
    assert (tmp_path / "coco/train2017.zip.part").stat().st_size == 7000  # kept for the next run


def test_many_cuts_are_no_reason_to_stop_while_something_arrives(server, images, tmp_path):
    server.cuts = [1000] * 15
    fetch_all([images], tmp_path, wait=QUICK)
    assert len(server.requests) == 16
    assert tree(tmp_path) == UNPACKED


def test_a_busy_server_is_asked_again(server, images, tmp_path):
    server.statuses = [503, 429, 200]
    fetch_all([images], tmp_path, wait=QUICK)
    assert tree(tmp_path) == UNPACKED


def test_another_place_is_asked_where_one_has_nothing(server, images, tmp_path):
    fetch_all([replace(images, urls=(f"{server.url}/gone/train2017.zip", *images.urls))], tmp_path)
    assert [path for path, _ in server.requests] == ["/gone/train2017.zip", "/train2017.zip"]
    assert tree(tmp_path) == UNPACKED


def test_what_every_place_said_is_told(server, images, tmp_path):
    nobody = ("http://127.0.0.1:9/train2017.zip", f"{server.url}/gone/train2017.zip")
    with pytest.raises(UserError) as caught:
        fetch_all([replace(images, urls=nobody)], tmp_path, wait=QUICK)
    message = str(caught.value)
    assert "127.0.0.1:9" in message and "refused" in message and "HTTP 404" in message
    assert str(tmp_path / "coco/train2017.zip") in message  # where to put it by hand
    assert tree(tmp_path) == {}


def test_a_wrong_checksum_is_refused_and_removed(server, images, tmp_path):
    wrong = replace(images, checksum="md5:" + "0" * 32)
    with pytest.raises(
        UserError, match=f"wrong md5: {hashlib.md5(server.files['train2017.zip']).hexdigest()}, 0{{32}}"
    ):
        fetch_all([wrong], tmp_path, wait=QUICK)
    assert tree(tmp_path) == {}


def test_a_place_with_a_damaged_file_is_left_for_the_next(server, images, tmp_path):
    data = server.files["train2017.zip"]
    server.files["bad.zip"] = data[:6000] + b"?" + data[6001:]
    fetch_all([replace(images, urls=(f"{server.url}/bad.zip", *images.urls))], tmp_path, wait=QUICK)
    assert tree(tmp_path) == UNPACKED


def test_a_file_of_another_size_is_not_fetched(server, images, tmp_path):
    with pytest.raises(UserError, match=r"holds another file: .* bytes, 99999 expected"):
        fetch_all([replace(images, size=99999)], tmp_path, wait=QUICK)
    assert tree(tmp_path) == {}


def test_a_page_instead_of_an_archive_is_refused(server, annotations, tmp_path):
    server.files["a.json.zip"] = b"<html>Log in to use this network</html>"
    with pytest.raises(UserError, match="not a whole ZIP file"):
        fetch_all([annotations], tmp_path, wait=QUICK)
    assert tree(tmp_path) == {}


def test_a_damaged_member_is_found_without_a_checksum(server, annotations, tmp_path):
    data = server.files["a.json.zip"]
    server.files["a.json.zip"] = data[:500] + b"?" + data[501:]
    with pytest.raises(UserError, match=r"a\.json in it is damaged"):
        fetch_all([annotations], tmp_path, wait=QUICK)
    assert tree(tmp_path) == {}


def test_annotations_must_have_their_counts(server, annotations, tmp_path):
    with pytest.raises(UserError, match="6 images, 7 expected; 4 categories, 5 expected"):
        fetch_all([replace(annotations, images=7, categories=5)], tmp_path)
    server.files["a.json.zip"] = zipped({"a.json": b'{"images": []}'})
    (tmp_path / "lvis/annotations/a.json.zip").unlink()
    with pytest.raises(UserError, match=r"a\.json: no list of annotations"):
        fetch_all([annotations], tmp_path)
    server.files["a.json.zip"] = zipped({"b.json": b"{}"})
    (tmp_path / "lvis/annotations/a.json.zip").unlink()
    with pytest.raises(UserError, match=r"has no a\.json in it"):
        fetch_all([annotations], tmp_path)
    assert set(tree(tmp_path)) == {"lvis/annotations/a.json.zip"}


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "train2017/../../evil.jpg", "/evil.jpg", "C:\\evil.jpg", "train2017\\..\\evil.jpg"]
)
def test_files_outside_the_folder_are_refused_before_anything_is_unpacked(name, server, images, tmp_path):
    data = server.files["train2017.zip"] = zipped({**PICTURES, name: b"evil"})
    with pytest.raises(UserError, match="1 of its files would be written outside the folder") as caught:
        fetch_all([replace(images, size=len(data), checksum=sha256(data))], tmp_path)
    assert name in str(caught.value)
    assert set(tree(tmp_path)) == {"coco/train2017.zip"}
    assert not list(tmp_path.parent.glob("evil*"))


def test_links_are_refused(server, images, tmp_path):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        link = zipfile.ZipInfo("train2017/000000000000.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    data = server.files["train2017.zip"] = target.getvalue()
    with pytest.raises(UserError, match="or are links"):
        fetch_all([replace(images, size=len(data), checksum=sha256(data))], tmp_path)


@pytest.mark.parametrize("files", [{**PICTURES, "other/x.jpg": b"x"}, dict(list(PICTURES.items())[:3])])
def test_an_archive_must_hold_its_images_and_nothing_else(files, server, images, tmp_path):
    data = server.files["train2017.zip"] = zipped(files)
    with pytest.raises(UserError, match=r"images in train2017/, \d files, 4 expected"):
        fetch_all([replace(images, size=len(data), checksum=sha256(data))], tmp_path)


Usage = namedtuple("Usage", "total used free")


def test_free_disk_is_checked_before_anything_is_fetched(server, images, annotations, tmp_path, monkeypatch):
    needed = images.size + images.unpacked
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, needed - 1))
    with pytest.raises(UserError, match=r"GB are needed, 0\.0 GB are free"):
        fetch_all([images], tmp_path / "new")
    assert server.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, needed))
    fetch_all([images], tmp_path / "new")
    assert tree(tmp_path / "new") == UNPACKED


def test_what_has_arrived_needs_no_disk_again(server, images, tmp_path, monkeypatch):
    part = tmp_path / "coco/train2017.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.files["train2017.zip"][:9000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, images.size + images.unpacked - 9000))
    fetch_all([images], tmp_path)


def test_unpacking_goes_on_and_never_replaces_a_file(server, images, tmp_path):
    folder = tmp_path / "coco/train2017"
    folder.mkdir(parents=True)
    (folder / "000000000001.jpg").write_bytes(b"mine")
    (folder / ".000000000003.jpg.part").write_bytes(b"half")
    with pytest.raises(UserError, match=r"1 files have another size .* 000000000001\.jpg"):
        fetch_all([images], tmp_path)
    assert (folder / "000000000001.jpg").read_bytes() == b"mine"
    (folder / "000000000001.jpg").write_bytes(PICTURES["train2017/000000000001.jpg"])
    time_before = (folder / "000000000001.jpg").stat().st_mtime_ns
    fetch_all([images], tmp_path)
    assert tree(tmp_path) == UNPACKED  # without the half file of a stopped run
    assert (folder / "000000000001.jpg").stat().st_mtime_ns == time_before
    assert len(server.requests) == 1  # the archive was still there


def test_a_wrong_archive_put_there_by_hand_is_named_and_left(server, images, tmp_path):
    path = tmp_path / "coco/train2017.zip"
    path.parent.mkdir()
    path.write_bytes(b"x" * images.size)
    with pytest.raises(UserError, match=r"train2017\.zip: wrong sha256.*Remove it"):
        fetch_all([images], tmp_path)
    assert path.read_bytes() == b"x" * images.size and server.requests == []


def test_a_linked_folder_of_images_is_enough(server, images, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name, data in PICTURES.items():
        (own / Path(name).name).write_bytes(data)
    (tmp_path / "data/coco").mkdir(parents=True)
    os.symlink(own, tmp_path / "data/coco/train2017")
    fetch_all([images], tmp_path / "data")
    assert server.requests == []


def test_the_table_names_what_the_configs_expect():
    from loce.config import DataConfig

    data = DataConfig()
    places = {f"data/{a.folder}/{a.content}" for a in (*ANNOTATIONS["1.0"], *IMAGES)}
    assert {data.train_annotations, data.val_annotations} <= places
    assert {f"{data.train_images}/train2017", f"{data.val_images}/val2017"} <= places
    for archive in (*IMAGES, *ANNOTATIONS["1.0"], *ANNOTATIONS["0.5"], *ANNOTATIONS["coco"]):
        assert len(archive.urls) > 1 and len({url.rpartition("/")[2] for url in archive.urls}) == 1
        kind, _, digest = archive.checksum.partition(":")
        assert len(digest) == {"sha256": 64, "md5": 32, "": 0}[kind]


def script(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/fetch_data.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_ends_with_2_and_a_message(server, tmp_path):
    """The mirror has an archive of the right name that is not LVIS: no traceback, nothing left behind."""
    server.files["lvis_v1_val.json.zip"] = zipped({"lvis_v1_val.json": b"{}"})
    done = script(f"out={tmp_path}", f"mirror={server.url}/", "only=annotations")
    assert done.returncode == 2, done.stderr
    assert "wrong md5" in done.stderr and "87734a7f895990b9552075d7ce723e27 expected" in done.stderr
    assert "Traceback" not in done.stderr and tree(tmp_path) == {}
    assert [path for path, _ in server.requests] == ["/lvis_v1_val.json.zip"]


def test_mirrors_replace_all_places():
    for archive in from_mirror(IMAGES, "http://here/x/"):
        assert archive.urls == (f"http://here/x/{archive.name}",)
    assert not is_finished(IMAGES[0], Path("nowhere"))
