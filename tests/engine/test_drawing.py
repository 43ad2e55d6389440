"""Text in pictures: any script that a font on the machine has, else a number."""

import cv2
import numpy as np
import pytest

from loce.engine import drawing
from loce.engine.drawing import class_text, draw_objects, put_text, text_size

NAMES = ["bicycle", "Fahrrad für Kinder", "велосипед", "自行车", "자전거", "دراجة", "U\u0308bung", "साइकिल", "🚲"]


def drawn(text: str, corner: tuple[int, int] = (10, 40)) -> np.ndarray:
    canvas = np.zeros((60, 400, 3), np.uint8)
    put_text(canvas, text, corner, (255, 200, 100), 0.8)
    return canvas


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_or_is_its_number_and_never_question_marks(name: str) -> None:
    text = class_text(name, 17)
    assert text in (name, "class 17")
    picture = drawn(text)
    assert picture.any() and not any(np.array_equal(picture, drawn("?" * n)) for n in range(1, 2 * len(name) + 1))


def test_names_of_the_fonts_that_every_machine_has() -> None:
    """matplotlib brings DejaVu Sans."""
    for name in ("Fahrrad für Kinder", "велосипед", "ποδήλατο", "U\u0308bung", "دراجة"):
        assert class_text(name, 1) == name
    assert np.array_equal(drawn("U\u0308bung"), drawn("Übung"))
    assert not np.array_equal(drawn("велосипед"), drawn("велосипет"))


def test_without_opencvs_letters_truetype_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with OpenCV 4, which has ASCII only."""
    monkeypatch.setattr(drawing, "_opencv_has", str.isascii)
    drawing._font.cache_clear()
    try:
        assert class_text("велосипед", 1) == "велосипед" and drawing._font("велосипед")
        assert drawn("велосипед").any()
        monkeypatch.setattr(drawing, "_font_files", list)
        drawing._font.cache_clear()
        assert class_text("велосипед", 23) == "class 23"
        assert np.array_equal(drawn("ш 0.5"), drawn("? 0.5"))  # a caption, say
    finally:
        drawing._font.cache_clear()


def test_ascii_is_what_opencv_draws() -> None:
    expected = np.zeros((60, 400, 3), np.uint8)
    cv2.putText(expected, "cat 0.98", (10, 40), drawing.FONT, 0.8, (255, 200, 100), 1, cv2.LINE_AA)
    assert np.array_equal(drawn("cat 0.98"), expected)


def test_truetype_letters_stay_within_their_size_and_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_opencv_has", str.isascii)
    drawing._font.cache_clear()
    try:
        width, height, base = text_size("Жук", 0.8)
        ys, xs, _ = drawn("Жук").nonzero()
        assert xs.min() >= 10 and xs.max() < 10 + width and 40 - height <= ys.min() and ys.max() < 40 + base
        for corner in ((-15, 40), (390, 40), (10, 3), (10, 70), (-500, -500), (900, 900)):
            drawn("Жук", corner)
        picture = np.full((30, 40, 3), 90, np.uint8)
        boxes = np.array([[20, 0, 24, 4]], np.float32)
        assert draw_objects(picture, boxes, [], ["очень длинное имя 0.98"], ["c"]).shape[2] == 3
        assert (picture == 90).all()
    finally:
        drawing._font.cache_clear()
