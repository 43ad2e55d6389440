"""Image files are found by their names; what lies there in place of a missing one is said."""

import os
import unicodedata

import pytest

from loce.data.annotations.image_files import Listings, image_name, is_readable_name
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import images_in_both
from loce.utils.errors import UserError
from tests.data.made_annotations import content


@pytest.fixture
def named(write, tmp_path):
    """(annotations with images of these names, folder that has files of those names)."""

    def make(names, files, folder="pictures"):
        made = content()
        for image, name in zip(made["images"], names, strict=False):
            image["file_name"] = name
        made["images"] = made["images"][: len(names)]
        kept = {image["id"] for image in made["images"]}
        made["annotations"] = [a for a in made["annotations"] if a["image_id"] in kept]
        for file in files:
            path = tmp_path / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return LVISAnnotations.open(write(made)), tmp_path / folder

    return make


def refusal(annotations, folder):
    with pytest.raises(UserError) as error:
        annotations.require_images(folder)
    return str(error.value)


LAYOUTS = [  # name in the file, name on disk
    ("COCO_val2014_000000000007.jpg", "COCO_val2014_000000000007.jpg"),
    ("COCO_val2014_000000000007.jpg", "000000000007.jpg"),
    ("val2014/COCO_val2014_000000000007.jpg", "val2014/COCO_val2014_000000000007.jpg"),
    ("val2014/COCO_val2014_000000000007.jpg", "COCO_val2014_000000000007.jpg"),
    ("val2017/000000000007.jpg", "val2014/COCO_val2014_000000000007.jpg"),
    ("000000000007.jpg", "COCO_train2014_000000000007.jpg"),
    ("COCO-leaves_plot3_0007.jpg", "COCO-leaves_plot3_0007.jpg"),
    ("COCO.jpg", "COCO.jpg"),
    ("day1\\0007.jpg", "day1/0007.jpg"),
    ("D:\\set\\day1\\0007.jpg", "0007.jpg"),
    ("./day1//0007.jpg", "day1/0007.jpg"),
    ("/home/anna/set/day1/0007.jpg", "day1/0007.jpg"),
    ("../other/day1/0007.jpg", "day1/0007.jpg"),
    ("COCO_val2014_000000000007.jpg", "val2014/COCO_val2014_000000000007.jpg"),
    ("Screenshot 10.00.00\u202fAM.png", "Screenshot 10.00.00\u202fAM.png"),
    ("全角\u3000空白\u00a0.png", "全角\u3000空白\u00a0.png"),
    ("👩\u200d🌾.png", "👩\u200d🌾.png"),
]


@pytest.mark.parametrize(("name", "file"), LAYOUTS)
def test_a_file_is_found(name, file, named):
    annotations, folder = named([name], [file])
    annotations.require_images(folder)
    assert annotations.image_path(0, folder).relative_to(folder).as_posix() == file
    assert annotations.name(0) == name.replace("\\", "/")


@pytest.mark.parametrize(
    ("names", "files", "missing"),
    [
        (["left/1.png", "right/1.png"], ["1.png"], [0, 1]),
        (["left/1.png", "right/1.png"], ["1.png", "left/1.png"], [1]),
        (["1.png", "right/1.png"], ["1.png"], [1]),
        (["left/1.png", "right/2.png"], ["1.png", "2.png"], []),
        (["left/1.png", "./left/1.png"], ["1.png"], []),  # one image, listed twice
        (["COCO_train2014_000000000001.jpg", "COCO_val2014_000000000001.jpg"], ["000000000001.jpg"], [0, 1]),
        (["COCO_val2014_000000000001.jpg", "000000000001.jpg"], ["000000000001.jpg"], [0]),
        (["D:\\set\\left\\1.png", "D:\\set\\right\\1.png"], ["left/1.png", "right/1.png"], []),
        (["/a/left/1.png", "/b/left/1.png", "/b/right/1.png"], ["left/1.png", "right/1.png"], [0, 1]),
        (["a/left/1.png", "left/1.png"], ["left/1.png", "1.png"], [0]),
    ],
)
def test_two_images_never_get_one_file(names, files, missing, named):
    annotations, folder = named(names, files)
    assert annotations.missing_images(folder) == missing
    assert [i for i in range(len(names)) if not annotations.image_path(i, folder).exists()] == missing
    if missing:
        assert "under its whole name" in refusal(annotations, folder)


TWINS = [  # name in the file, name on disk, what differs
    ("Photo 1.png", "photo 1.png", "upper and lower case"),
    ("Photo%201.png", "Photo 1.png", "the escapes"),
    ("Photo 1.png", "Photo%201.png", "the escapes"),
    (unicodedata.normalize("NFC", "Käfer.png"), unicodedata.normalize("NFD", "Käfer.png"), "the Unicode form"),
    ("1.png", "1.jpeg", "the extension"),
    ("1.png", "1.JPG", "the extension"),
    ("Day1/1.png", "day1/1.PNG", "upper and lower case"),
    ("gone/Photo.png", "photo.png", "spelling"),
    ("10.00 AM.png", "10.00\u202fAM.png", "spaces"),
    ("1.png ", "1.png", "spaces"),
    ("1.png", "1 .png", "spaces"),
    ("my+photo#1.png", "my photo%231.png", "the escapes"),
    ("\u2764\ufe0f.png", "\u2764.png", "spelling"),
    ("Käfer.png", os.fsdecode("Käfer.png".encode("latin-1")), "spelling"),
    (unicodedata.normalize("NFC", "Käfer/1.png"), unicodedata.normalize("NFD", "Käfer/1.png"), "the Unicode form"),
    ("/home/anna/Set/1.png", "set/1.png", "spelling"),
]


@pytest.mark.parametrize(("name", "file", "difference"), TWINS)
def test_a_twin_of_a_missing_image_is_named(name, file, difference, named):
    annotations, folder = named([name, "gone.png"], [file, "other.png"])
    message = refusal(annotations, folder)
    assert "2 of 2 images are missing" in message and "1 of them are there under another name" in message
    assert repr(name) in message and repr(file) in message and f"they differ in {difference}" in message
    if not file.isascii():
        assert ascii(name)[1:-1] in message and ascii(file)[1:-1] in message


def test_of_two_folders_that_look_alike_the_one_with_the_file_is_named(named):
    kept, other = unicodedata.normalize("NFC", "Käfer"), unicodedata.normalize("NFD", "Käfer")
    annotations, folder = named([f"{kept}/1.png", f"{kept}/2.png"], [f"{kept}/1.png", f"{other}/2.png"])
    assert f"{ascii(other)[1:-1]}/2.png" in refusal(annotations, folder)


@pytest.mark.parametrize("twin", ["a.jpg", "A.jpeg"])
def test_the_file_of_another_image_is_no_twin(twin, named):
    annotations, folder = named(["a.jpg", "A.JPG"], ["a.jpg"])
    assert "another name" not in refusal(annotations, folder)  # to rename it would lose the other
    annotations, folder = named(["a.jpg", "A.JPG"], ["a.jpg", twin])
    assert ("another name" in refusal(annotations, folder)) == (twin == "A.jpeg")


URLS = [  # what the JSON says, the name that is read
    ("http://images.cocodataset.org/val2017/1.png", "val2017/1.png"),
    ("https://disk.org/set/day%201/a%231.png?sig=x%2Fy&e=1#top", "set/day 1/a#1.png"),
    ("gs://bucket/day1/1.png", "day1/1.png"),
    ("file:///home/anna/1.png", "/home/anna/1.png"),
    ("C:/set/1.png", "C:/set/1.png"),
    ("a%20b.png", "a%20b.png"),  # no URL, so a name as it stands
]


@pytest.mark.parametrize(("text", "name"), URLS)
def test_of_a_url_the_path_is_the_name(text, name):
    assert image_name({"file_name": text}) == name
    if "://" in text:
        assert image_name({"coco_url": text}) == "/".join(name.split("/")[-2:])


def test_what_is_there_in_place_of_the_folder(named, tmp_path):
    annotations, _ = named(["1.png"], ["1.png"], "Pictures/new")
    (tmp_path / "new.zip").write_bytes(b"PK")
    assert "new.zip is no folder: give the one" in refusal(annotations, tmp_path / "new.zip")
    assert f"Did you mean '{tmp_path}/Pictures/new'?" in refusal(annotations, tmp_path / "pictures/New")
    assert "Did you mean" not in refusal(annotations, tmp_path / "old")


def test_files_in_several_folders_are_in_none_of_them(named):
    annotations, folder = named(["1.png", "2.png"], ["a/1.png", "b/2.png"])
    assert f"(1 in {folder}/a, 1 in {folder}/b): put the folder before" in refusal(annotations, folder)
    names = ["COCO_val2014_000000000001.jpg", "COCO_train2014_000000000002.jpg"]
    annotations, folder = named(names, ["train2017/000000000001.jpg", "val2017/000000000002.jpg"], "years")
    assert f"(1 in {folder}/train2017, 1 in {folder}/val2017)" in refusal(annotations, folder)


def test_files_a_folder_further_down_are_named(named):
    annotations, folder = named(["1.png", "2.png"], ["val/1.png", "val/2.png", "readme.txt"])
    assert f"2 of them are in {folder}/val: is this the folder to give?" in refusal(annotations, folder)


def test_nothing_like_it(named):
    annotations, folder = named(["1.png", "2.png"], ["3.png"])
    assert "them are" not in refusal(annotations, folder) and "may be" not in refusal(annotations, folder)


def test_each_folder_is_listed_once(named, monkeypatch):
    names = [f"{split}/{split}{number}.png" for split in ("a", "b") for number in range(3)]
    annotations, folder = named(names, [*names[:2], "x.png"])
    listed = []
    monkeypatch.setattr(Listings, "_names", staticmethod(lambda place: listed.append(place) or frozenset()))
    annotations.missing_images(folder)
    assert sorted(listed) == sorted({str(folder), f"{folder}/a", f"{folder}/b"})


def test_images_in_both_sets_are_known_by_their_files(named):
    train, folder = named(["COCO_val2014_000000000001.jpg"], ["000000000001.jpg"])
    val, _ = named(["000000000001.jpg"], [])
    object.__setattr__(val, "path", "another.json")
    assert images_in_both(train, val, str(folder), str(folder)) == [str(folder / "000000000001.jpg")]


@pytest.mark.parametrize("name", ["a\nb.png", "a\0b.png", "a\ud800.png", "a\x1b[31m.png"])
def test_names_that_no_message_can_show(name, named):
    assert not is_readable_name(name)
    with pytest.raises(UserError, match="file name is no text that can be printed"):
        named([name], [])
