"""Reading images of every kind, and the numerics of resizing and flipping."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from loce.data.transforms import (
    Geometry,
    ImageError,
    image_generator,
    is_whole,
    random_geometry,
    read_image,
    read_levels,
    resized,
)

HEIGHT, WIDTH = 33, 47


def picture():
    """Smooth colours, so that JPEG keeps them nearly."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([5 * x, 7 * y, 200 - 3 * x], axis=2).astype(np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return read_image(path, (HEIGHT, WIDTH))


def grey():
    return picture()[:, :, 0]


def test_rgb_order_and_exact_pixels(tmp_path):
    np.testing.assert_array_equal(save(tmp_path / "a.png", Image.fromarray(picture())), picture())


def test_jpeg_is_read_as_opencv_reads_it(tmp_path):
    image = save(tmp_path / "a.jpg", Image.fromarray(picture()), quality=90)
    np.testing.assert_array_equal(image, cv2.imread(str(tmp_path / "a.jpg"))[:, :, ::-1])
    assert np.abs(image.astype(int) - picture()).mean() < 4


KINDS = [(mode, kind) for mode in ("L", "P", "1") for kind in ("png", "tif", "gif", "bmp")]
KINDS += [("L", "tga"), ("P", "pcx"), ("LA", "png"), ("LA", "tif"), ("RGBA", "png"), ("I;16", "png"), ("I;16", "tif")]


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_every_mode_becomes_8_bit_rgb(mode, kind, tmp_path):
    expected = np.stack([grey()] * 3, axis=2)
    if mode == "I;16":
        image = Image.fromarray(grey().astype(np.uint16) * 256 + 77)
    elif mode == "1":
        image = Image.fromarray(grey() > 100)
        expected = np.where(expected > 100, 255, 0)
    elif mode == "RGBA":
        image = Image.fromarray(np.dstack([picture(), grey()]))  # alpha is left out, not blended
        expected = picture()
    else:
        image = Image.fromarray(grey()).convert(mode)
    read = save(tmp_path / f"a.{kind}", image)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)


def test_grey_and_cmyk_jpeg(tmp_path):
    read = save(tmp_path / "a.jpg", Image.fromarray(grey()), quality=95)
    assert (read[:, :, 0] == read[:, :, 1]).all() and np.abs(read[:, :, 0].astype(int) - grey()).mean() < 3
    read = save(tmp_path / "b.jpg", Image.fromarray(picture()).convert("CMYK"), quality=95)
    assert np.abs(read.astype(int) - picture()).mean() < 6


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = save(tmp_path / "a.jpg", Image.fromarray(picture()))
    np.testing.assert_array_equal(save(tmp_path / "b.jpg", Image.fromarray(picture()), exif=exif), plain)


def test_damaged_files_are_named(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for kind in ("jpeg", "png"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        content = buffer.getvalue()
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(content + b"\0\0camera")  # bytes after the end do no harm
        assert read_image(path, (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH, 3)
        for share in (0.02, 0.5, 0.9):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(ImageError, match="damaged or not an image") as error:
                read_image(path, (HEIGHT, WIDTH))
            assert str(path) in str(error.value)
    for content in (b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ImageError, match="damaged or not an image"):
            read_image(path, (HEIGHT, WIDTH))
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "none.jpg", (HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "values", [grey().astype(np.float32), picture() / np.float32(255), grey().astype(np.int32), grey() / 255]
)
def test_pixels_of_32_bits_have_no_white(values, tmp_path):
    """Such as maps of heights: what part of their range an image shows is for their owner to say."""
    cv2.imwrite(str(tmp_path / "a.tif"), values)
    with pytest.raises(ImageError, match=r"32 bits or more.* save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif", (HEIGHT, WIDTH))


def test_files_that_are_no_images_and_links_that_lead_nowhere(tmp_path):
    for content, kind in (
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>not found</html>", "a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a photo in HEIC; save it as JPEG or PNG"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"", "is empty"),
    ):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(ImageError, match=f"a.jpg: damaged or not an image.*{kind}"):
            read_image(tmp_path / "a.jpg", None)
    (tmp_path / "b.jpg").symlink_to("annex/b.jpg")  # as git-annex and DVC have them before the files are fetched
    with pytest.raises(ImageError, match=r"b.jpg: cannot be read \(a link to annex/b.jpg: No such file"):
        read_image(tmp_path / "b.jpg", None)


def test_another_size_than_the_annotations_say(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: is 47 x 33 pixels .* says 50 x 33$"):
        read_image(tmp_path / "a.png", (33, 50))
    with pytest.raises(ImageError, match="says 33 x 47; turned by 90 degrees they agree"):
        read_image(tmp_path / "a.png", (47, 33))


def test_new_sizes():
    """int(side * scale + 0.5), and known COCO cases."""
    assert resized((480, 640), 800, 1333) == (800, 1067)
    assert resized((427, 640), 800, 1333) == (800, 1199)
    assert resized((640, 360), 800, 1333) == (1333, 750)
    assert resized((2, 5000), 800, 1333) == (1, 1333)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(32, 2000, (500, 2)).tolist():
        scale = min(1333 / max(height, width), 640 / min(height, width))
        assert resized((height, width), 640, 1333) == (int(height * scale + 0.5), int(width * scale + 0.5))


def test_boxes_against_plain_loops():
    rng = np.random.default_rng(0)
    for case in range(200):
        old, new = tuple(rng.integers(40, 300, 2).tolist()), tuple(rng.integers(40, 300, 2).tolist())
        geometry = Geometry(old, new, flip=bool(case % 2))
        boxes = rng.uniform(-10, 320, (5, 4)).astype(np.float32)
        sx, sy = np.float32(new[1] / old[1]), np.float32(new[0] / old[0])
        assert geometry.scale == (float(sx), float(sy))
        expected = []
        for x1, y1, x2, y2 in boxes:
            x1, x2 = (min(max(x * sx, np.float32(0)), np.float32(new[1])) for x in (x1, x2))
            y1, y2 = (min(max(y * sy, np.float32(0)), np.float32(new[0])) for y in (y1, y2))
            expected.append((new[1] - x2, y1, new[1] - x1, y2) if geometry.flip else (x1, y1, x2, y2))
        made = geometry.boxes(boxes)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, np.array(expected, dtype=np.float32))
    assert geometry.boxes(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_images_are_resized_by_opencv_on_integers_and_flipped():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    expected = cv2.resize(image, (70, 60), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(Geometry((HEIGHT, WIDTH), (60, 70)).image(image), expected)
    np.testing.assert_array_equal(Geometry((HEIGHT, WIDTH), (60, 70), True).image(image), expected[:, ::-1])
    np.testing.assert_array_equal(Geometry((HEIGHT, WIDTH), (HEIGHT, WIDTH)).image(image), image)


def test_random_choices_depend_on_seed_epoch_image_and_showing_only():
    def draws(*key):
        return image_generator(*key).random(4).tolist()

    keys = [(seed, epoch, image, draw) for seed in (0, 1) for epoch in (0, 1) for image in (0, 5) for draw in (0, 1)]
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)
    assert draws(3, 1, 4, 1) == draws(3, 1, 4, 1)
    assert draws(0, 0, -7, 0) != draws(0, 0, 7, 0)  # negative ids are ids


def test_jitter_draws_every_short_edge_and_half_are_flipped():
    generator = np.random.default_rng(0)
    edges = (640, 672, 704)
    made = [random_geometry((480, 640), edges, 1333, 0.5, generator) for _ in range(3000)]
    shorts = np.array([geometry.new[0] for geometry in made])
    for edge in edges:
        assert abs((shorts == edge).mean() - 1 / 3) < 0.04
    assert abs(np.mean([geometry.flip for geometry in made]) - 0.5) < 0.04
    assert not any(random_geometry((480, 640), edges, 1333, 0.0, generator).flip for _ in range(50))


def test_what_phones_write_behind_a_jpeg_does_no_harm(tmp_path, monkeypatch):
    """Also in a photo that is larger than what Pillow takes from strangers."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    buffer = io.BytesIO()
    thumbnail = io.BytesIO()
    Image.fromarray(picture()[:8, :8]).save(thumbnail, "jpeg")
    exif = b"Exif\0\0" + thumbnail.getvalue()  # a picture of its own, with an end of its own
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}, {"exif": exif}):
        buffer = io.BytesIO()
        Image.fromarray(picture()).save(buffer, "jpeg", quality=90, **options)
        whole = buffer.getvalue()
        path = tmp_path / "a.jpg"
        path.write_bytes(whole)
        expected = read_image(path, (HEIGHT, WIDTH))
        for tail in (b"SEFT", b"\0" * 999, thumbnail.getvalue() + b"x"):
            path.write_bytes(whole + tail)
            np.testing.assert_array_equal(read_image(path, (HEIGHT, WIDTH)), expected)
            cut = whole[:-60] + b"\0\0" + tail.replace(b"\xff", b"\0")
            assert not is_whole(cut) and is_whole(whole + tail)
            path.write_bytes(cut)
            with pytest.raises(ImageError, match="damaged or not an image"):
                read_image(path, (HEIGHT, WIDTH))


def test_pillow_has_no_limit_for_what_opencv_does_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    np.testing.assert_array_equal(save(tmp_path / "a.png", Image.fromarray(picture())), picture())
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_16_bit_files_by_plain_loops(kind, bits, tmp_path):
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 1 << bits, (HEIGHT, WIDTH)).astype(np.uint16)
    path = tmp_path / f"a.{kind}"
    cv2.imwrite(str(path), values)
    low, high = int(values.min()), int(values.max())
    for how, expected in (
        ("high_byte", [[value // 256 for value in row] for row in values.tolist()]),
        ("range", [[int((value - low) * 255 / (high - low) + 0.5) for value in row] for row in values.tolist()]),
    ):
        image, told = read_levels(path, (HEIGHT, WIDTH), scale_16bit=how)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - np.array(expected)[:, :, None]).max() <= (how == "range")
        assert bool(told) == (how == "high_byte" and bits < 16)
        if told:
            assert f"{path}: has 16 bits, but its values {low} to {high} become" in told
            assert f" {len(np.unique(image))} of 256 levels" in told and "data.scale_16bit=range" in told
    assert (image.min(), image.max()) == (0, 255)  # of the range


def test_16_bit_colours_keep_their_ratio_and_one_value_is_no_range(tmp_path):
    values = np.stack([np.full((HEIGHT, WIDTH), 300), np.full((HEIGHT, WIDTH), 200), np.full((HEIGHT, WIDTH), 100)], 2)
    values[0, 0] = 0, 0, 0
    cv2.imwrite(str(tmp_path / "a.png"), values.astype(np.uint16))
    assert read_image(tmp_path / "a.png", None, scale_16bit="range")[5, 5].tolist() == [85, 170, 255]
    cv2.imwrite(str(tmp_path / "b.png"), np.full((HEIGHT, WIDTH), 5000, np.uint16))
    assert np.unique(read_image(tmp_path / "b.png", None, scale_16bit="range")).tolist() == [5000 >> 8]


def test_light_in_floating_point_is_read_as_before(tmp_path):
    cv2.imwrite(str(tmp_path / "a.hdr"), picture().astype(np.float32) / 255)
    expected = cv2.imread(str(tmp_path / "a.hdr"))[:, :, ::-1]
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr", (HEIGHT, WIDTH)), expected)
