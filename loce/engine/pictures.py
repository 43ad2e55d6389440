"""Pictures of images with their objects: first training samples, annotations and detections of validation images.

OpenCV scales images and finds outlines, Pillow draws; figures with axes are matplotlib's (loce/report/figures.py).
"""

import colorsys
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from loce.data.annotations.lvis import LVISAnnotations
from loce.data.dataset import Sample, TrainDataset
from loce.data.masks import CroppedMasks
from loce.data.samplers import TrainingPlan
from loce.data.transforms import read_image
from loce.evaluation.stream import read_detections
from loce.evaluation.thresholds import read_thresholds
from loce.models.mask_rcnn import MaskRCNN
from loce.utils.classes import GROUP_NAMES, GROUP_RGB, GROUPS, ClassStats
from loce.utils.files import atomic_write

CELL, GAP, CAPTION, TITLE, LINE = 448, 8, 26, 44, 20  # pixels: side of a picture, between two, lines of text
CROP = 160  # pixels: side of the picture of one object
WHITE, INK, GREY = (255, 255, 255), (40, 40, 40), (128, 128, 128)
LUMA, BRIGHT = (0.299, 0.587, 0.114), 140  # of a colour; on brighter ones letters are dark
SHADES = ((0.0, 0.0), (0.035, 0.08), (-0.035, -0.1), (0.035, -0.1), (-0.035, 0.08))  # of hue and lightness
TINT = 0.45  # how much of the colour goes into a mask
READABLE = 480  # pixels of the short side; smaller images are enlarged by a whole number, so that names fit
LARGEST = 4096  # pixels of the long side, beyond which nothing is enlarged
LONGEST_NAME = 60  # letters
FIRST, PREDICTED = 16, 8  # training samples, and validation images, on a sheet
Colour = tuple[int, int, int]
_truetype = cache(ImageFont.truetype)

SURE, COMPARED_FROM = 0.3, 0.1  # scores drawn where no evaluation chose thresholds; of runs that are compared


class Limits(NamedTuple):
    """Which detections are drawn: scores of at least `threshold` (one number, or one for each class (C,)), one for each
    place (boxes of all classes together overlap at most `overlap`), and at most `most`.
    """

    threshold: float | np.ndarray = SURE
    most: int = 30
    overlap: float = 0.7


COMPARED = Limits(threshold=COMPARED_FROM, overlap=0.5)  # where runs are compared: scores of rare classes are low
RULE = (
    "Drawn: scores of at least the threshold of the run's class (best F1 on this data, so these pictures flatter; "
    f"{COMPARED_FROM:g} where an evaluation has none), one label for each place "
    f"(NMS over all classes at {COMPARED.overlap:g})."
)


# ---- sheets ----------------------------------------------------------------------------------------------------------


def first_samples(dataset: TrainDataset, plan: TrainingPlan) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the first 16 training samples, resized and flipped as the model will see them.

    Augmentation depends on seed, epoch, image and draw alone, so that to make them here changes nothing in training.
    """
    shown = plan.epoch(0).reshape(-1, 3)[:FIRST].tolist()
    samples = [dataset[index, 0, draw, drawn, 0] for index, draw, drawn in shown]
    pictures = [_annotated(sample, dataset.annotations.stats) for sample in samples]
    return sheet(pictures, [_caption(sample) for sample in samples], f"the first {len(samples)} training samples")


def _caption(sample: Sample) -> str:
    if "replaced" in sample and "pasted" not in sample:  # else it may be the source of pasted objects
        return f"in place of a bad image: {sample['image_id']}"
    height, width = sample["image"].shape[1:]
    pasted = f", {sample['pasted']} pasted" if sample.get("pasted") else ""
    return f"image {sample['image_id']}, {width} x {height} px, {len(sample['labels'])} objects{pasted}"


def predictions(model: MaskRCNN, dataset: TrainDataset, evaluation: Path | None) -> np.ndarray:
    """(H, W, 3) uint8 RGB: some validation images twice, with their annotations and with the model's detections.

    The same images whatever the model: in turn one with a rare, a common and a frequent class. evaluation: the folder
    with the thresholds of its classes; None: in training, where no score is known to mean anything, so that as many
    detections as objects are drawn, the best. One rank suffices.
    """
    stats = model.stats
    own = None if evaluation is None else read_thresholds(evaluation, stats.category_ids, SURE)
    limits = Limits(SURE if own is None else own)
    least = f"a score of {SURE:g} or more" if own is None else "their class's threshold (best F1) or more"
    pictures, captions = [], []
    model.eval()
    for index in examples(dataset, stats, PREDICTED):
        sample = dataset[index, 0]
        height, width = sample["image"].shape[1:]
        found = model.detect([sample["image"]], [(1.0, 1.0)], [(height, width)])[0]
        if evaluation is None:
            limits = Limits(0.0, len(sample["labels"]))
            least = "the best scores, as many as are annotated"
        drawn, rows = draw_detections(_pixels(sample), found, stats, limits, CELL)
        # Below the picture: how many are drawn, or the best of all where none is.
        caption = f"found: {len(rows)} with {least}"
        if not len(rows):
            caption = f"found: nothing with {least}"
            if len(found["scores"]):
                best = int(found["scores"].argmax())
                caption += f"; the best: {_name(stats, found['labels'][best])} {found['scores'][best]:.2g}"
        pictures += [_annotated(sample, stats), drawn]
        captions += [f"image {sample['image_id']}: annotated", caption]
    return sheet(pictures, captions, "what is annotated, and what is found")


def examples(dataset: TrainDataset, stats: ClassStats, most: int) -> list[int]:
    """Indices of up to `most` images with objects: in turn one that shows a rare, a common and a frequent class."""
    annotations = dataset.annotations
    rows = annotations.train_rows
    groups = stats.groups[annotations.labels[rows]]
    shown = [np.unique(annotations.image_of[rows[groups == group]]) for group in GROUPS]
    usable = [images[np.isin(images, annotations.train_images)] for images in shown]
    generator = np.random.default_rng(dataset.seed)
    queues = [generator.permutation(images).tolist() for images in usable]
    chosen: list[int] = []
    while len(chosen) < most and any(queues):
        for queue in queues:
            fresh = next((image for image in queue if image not in chosen), None)
            queue[:] = queue[queue.index(fresh) + 1 :] if fresh is not None else []
            if fresh is not None and len(chosen) < most:
                chosen.append(fresh)
    return chosen


def comparison_sheet(
    annotations: LVISAnnotations,
    images: str,
    folders: Mapping[str, Path],
    count: int,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB: `comparisons` of runs, an image a line. folders: title -> folder of an evaluation."""
    stats = annotations.stats
    classes = dict(zip(stats.category_ids.tolist(), zip(stats.names, stats.groups, strict=True), strict=True))
    drawn = [row for _, row in comparisons(annotations, images, folders, classes, count)]
    pictures = [picture for row in drawn for picture in row.values()]
    return sheet(pictures, [title for row in drawn for title in row], RULE, 1 + len(folders))


def comparisons(
    annotations: LVISAnnotations,
    images: str,
    folders: Mapping[str, Path],
    classes: Mapping[int, tuple[str, str]],
    count: int,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name of an image -> caption -> (H, W, 3) uint8 RGB: "ground truth", and the detections of each run.

    At most `count` images, those with most objects of rare classes first. images: their folder; folders: title ->
    folder of an evaluation, with its detections; classes: category id -> name and group, by the training data. `RULE`
    says what is drawn.
    """

    def draw(
        corners: np.ndarray,
        codes: Sequence[Any],
        category_ids: np.ndarray,
        scores: np.ndarray,
    ) -> np.ndarray:
        known = [(number, *classes.get(number, ("?", "r"))) for number in category_ids.tolist()]
        names = [class_text(name, number) for number, name, _ in known]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)] if len(scores) else names
        labels = [label_of.get(number, 0) for number, _, _ in known]
        return draw_objects(image, corners, codes, texts, [group for _, _, group in known], labels, CELL)

    ids = annotations.stats.category_ids
    label_of = {number: label for label, number in enumerate(ids.tolist())}
    found = {title: read_detections(folder / "detections", annotations.image_ids) for title, folder in folders.items()}
    chosen = {title: read_thresholds(folder, ids, COMPARED_FROM) for title, folder in folders.items()}
    limits = {title: COMPARED._replace(threshold=COMPARED_FROM if t is None else t) for title, t in chosen.items()}
    rare = np.array([classes.get(int(c), ("", ""))[1] == "r" for c in ids])
    telling = [int(rare[annotations.labels[annotations.rows(i)]].sum()) for i in range(len(annotations))]
    for index in sorted(range(len(annotations)), key=lambda i: (-telling[i], i))[:count]:
        height, width = (int(side) for side in annotations.image_sizes[index])
        image = read_image(annotations.image_path(index, images), (height, width))
        # What is annotated, without scores; then what each run found, if it is worth drawing.
        own = annotations.rows(index)
        masked = annotations.has_mask[own]
        masks = iter(annotations.segmentations.rles(own[masked], height, width))
        codes = [next(masks) if has_mask else None for has_mask in masked]  # of the others the box is drawn
        corners = annotations.clipped_boxes(own)
        drawn = {"ground truth": draw(corners, codes, ids[annotations.labels[own]], np.empty(0))}
        for title, detections in found.items():
            mine = np.flatnonzero(detections.image_ids == annotations.image_ids[index])
            labels = np.array([label_of[number] for number in detections.category_ids[mine].tolist()], dtype=np.int64)
            scores = detections.scores[mine]
            best = mine[worth_drawing(detections.corners()[mine], scores, labels, limits[title])]
            found_masks = detections.masks.rles(best) if detections.masks is not None else []
            ids_of_best, scores = detections.category_ids[best], detections.scores[best]
            drawn[title] = draw(detections.corners()[best], found_masks, ids_of_best, scores)
        yield annotations.name(index), drawn


def sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str,
    columns: int = 4,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB: pictures of any size in rows, a line below each, title and colours on top."""
    columns = min(columns, max(1, len(pictures)))
    fitted = [_fitted(picture, CELL / max(picture.shape[:2])) for picture in pictures]
    rows = [fitted[first : first + columns] for first in range(0, len(fitted), columns)]
    # The title, in as many lines as it needs, and on the right the colours of the groups.
    width = max(columns, 2) * (CELL + GAP) + GAP
    lines = textwrap.wrap(title, (width - 325) // 9)  # 9 pixels: a letter at most, on average
    top = TITLE + LINE * (len(lines) - 1) if lines else TITLE
    tops = top + np.cumsum([0, *(max(len(picture) for picture in row) + CAPTION + GAP for row in rows)])
    page = Image.new("RGB", (width, int(tops[-1])), WHITE)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        write(pen, line, (GAP, 29 + LINE * number), INK, 16)
    for number, group in enumerate(GROUPS):
        left = page.width - 325 + 108 * number
        pen.rectangle((left, 16, left + 15, 31), fill=GROUP_RGB[group])
        write(pen, GROUP_NAMES[group], (left + 22, 29), INK, 15)
    for place, (picture, caption) in enumerate(zip(fitted, captions, strict=True)):
        top, left = int(tops[place // columns]), GAP + place % columns * (CELL + GAP)
        page.paste(Image.fromarray(picture), (left, top))
        write(pen, caption, (left, top + len(picture) + CAPTION - 9), INK, 13)
    return np.array(page)


def write_picture(file: Path, picture: np.ndarray) -> None:
    """A picture (H, W, 3) uint8 RGB as a file, in the format of its suffix."""
    with atomic_write(file) as temporary:
        Image.fromarray(picture).save(temporary, quality=88)


# ---- one picture -----------------------------------------------------------------------------------------------------


def _pixels(sample: Sample) -> np.ndarray:
    """(H, W, 3) of a sample's (3, H, W) image."""
    return np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())


def _name(stats: ClassStats, label: int) -> str:
    return class_text(stats.names[label], int(stats.category_ids[label]))


def _annotated(sample: Sample, stats: ClassStats) -> np.ndarray:
    """A sample with its objects, each with box and mask; regions that take part in nothing have a grey box."""
    image, labels = _pixels(sample), sample["labels"].tolist()
    groups = [str(stats.groups[label]) for label in labels]
    names = [_name(stats, label) for label in labels]
    codes = _codes(sample["masks"], image.shape[:2]) if "masks" in sample else []
    picture = draw_objects(image, sample["boxes"].numpy(), codes, names, groups, labels, CELL)
    boxes = torch.cat([sample["ignored"], sample["boxes"]]) * (CELL / max(image.shape[:2]))
    own = [shade(group, label) for group, label in zip(groups, labels, strict=True)]
    colours = [GREY] * len(sample["ignored"]) + own
    for (x1, y1, x2, y2), colour in zip(boxes.round().int().tolist(), colours, strict=True):
        cv2.rectangle(picture, (x1, y1), (x2, y2), colour, 1)
    return picture


def _codes(masks: CroppedMasks, size: tuple[int, ...]) -> list[dict[str, Any]]:
    """Run-length codes of the masks of an image of this size, one by one: all at once may not fit the memory."""
    codes = []
    for crop, (x0, y0) in masks.crops():
        full = np.zeros(size, np.uint8, order="F")
        full[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop.numpy()
        codes.append(coco_mask.encode(full))
    return codes


def draw_detections(
    image: np.ndarray,
    found: Mapping[str, Any],
    stats: ClassStats,
    limits: Limits,
    longest: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) with a model's detections, as `MaskRCNN.detect` gives them, and the rows that are drawn.

    longest: see `draw_objects`.
    """
    boxes, scores, labels = (found[name].numpy() for name in ("boxes", "scores", "labels"))
    rows = worth_drawing(boxes, scores, labels, limits)
    texts = [f"{_name(stats, labels[row])} {scores[row]:.2f}" for row in rows]
    groups = [str(stats.groups[labels[row]]) for row in rows]
    counts = [found["rles"][row] for row in rows] if "rles" in found else []
    codes = [{"size": list(image.shape[:2]), "counts": count} for count in counts]
    return draw_objects(image, boxes[rows], codes, texts, groups, labels[rows].tolist(), longest), rows


def crop_object(
    image: np.ndarray,
    box: np.ndarray,
    code: Mapping[str, Any] | None,
    group: str,
) -> np.ndarray:
    """(CROP, CROP, 3) uint8 RGB: an object with what is around it, its outline in the colour of its group.

    image: (H, W, 3) uint8 RGB; box: (4,) xyxy; code: run-length code of the mask, of the image's size; None: the box
    is drawn.
    """
    # A square, half as large again as the object; beyond the image it is grey.
    side = max(16, round(1.5 * float(max(box[2] - box[0], box[3] - box[1]))))
    corner = np.round((box[:2] + box[2:]) / 2 - side / 2).astype(int)
    shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]], np.float32)
    square = cv2.warpAffine(image, shift, (side, side), flags=cv2.INTER_NEAREST, borderValue=GREY)
    large = cv2.resize(square, (CROP, CROP), interpolation=cv2.INTER_AREA if side > CROP else cv2.INTER_LINEAR)
    if code is None:
        ends = ((box - np.tile(corner, 2)) * CROP / side).round().astype(int).tolist()
        cv2.rectangle(large, tuple(ends[:2]), tuple(ends[2:]), GROUP_RGB[group], 1)
        return large
    mask = cv2.warpAffine(coco_mask.decode(code), shift, (side, side), flags=cv2.INTER_NEAREST)
    mask = cv2.resize(mask, (CROP, CROP), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(large, contours, -1, GROUP_RGB[group], 1)
    return large


def worth_drawing(boxes_N4: np.ndarray, scores_N: np.ndarray, labels_N: np.ndarray, limits: Limits) -> np.ndarray:
    """Rows to draw within `limits`, best first."""
    least = limits.threshold
    rows = np.flatnonzero(scores_N >= (least[labels_N] if isinstance(least, np.ndarray) else least))
    boxes, scores = torch.from_numpy(boxes_N4[rows]).float(), torch.from_numpy(scores_N[rows]).float()
    return rows[nms(boxes, scores, limits.overlap).numpy()][: limits.most]


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    codes: Sequence[dict[str, Any] | None],
    texts: Sequence[str],
    groups: Sequence[str],
    labels: Sequence[int],
    longest: int | None = None,
) -> np.ndarray:
    """A scaled copy of the (H, W, 3) uint8 RGB image with N objects, the best first.

    boxes: (N, 4) xyxy; codes: N run-length codes of masks of the image's size, or none at all; None: the box is drawn;
    texts: what is written at each; groups: "r", "c" or "f", which gives the colour, and labels, which give its shade;
    longest: pixels of the picture's longer side (None: those of the image, times a whole number where it is small).
    """
    height, width = image.shape[:2]
    whole = max(1, min(READABLE // min(height, width), LARGEST // max(height, width)))
    scale = longest / max(height, width) if longest else whole
    canvas = _fitted(image, scale)
    pixels = max(12, round(min(canvas.shape[:2]) / 40))  # of the letters
    line = max(1, round(pixels / 15))
    corners = (boxes * scale).round().astype(int).tolist()
    colours = [shade(group, label) for group, label in zip(groups, labels, strict=True)]
    # Where the label of each object may be: over its box's top left corner, within it, below, beside.
    points: list[Points] = [
        [(x1, y1, 0, 1), (x1, y1, 0, 0), (x1, y2, 0, 0), (x2, y1, 0, 0), (x1, y1, 1, 0), (x2, y2, 0, 1)]
        for x1, y1, x2, y2 in corners
    ]
    for place in reversed(range(len(boxes))):  # the best on top
        colour = colours[place]
        if len(codes) and codes[place] is not None:
            mask = cv2.resize(coco_mask.decode(codes[place]), canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            shown = mask.astype(bool)
            canvas[shown] = ((1 - TINT) * canvas[shown] + TINT * np.array(colour)).astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(canvas, contours, -1, colour, line)
            if contours:
                points[place] = _mask_points(np.concatenate(contours)[:, 0])
        else:
            cv2.rectangle(canvas, tuple(corners[place][:2]), tuple(corners[place][2:]), colour, line)
    # Letters on plates at their objects, the best first, each where it covers least of the plates before it.
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    plates: list[tuple[int, int, int, int]] = []
    for text, own in zip(texts, points, strict=True):
        plate = int(pen.textlength(*_letters(text, pixels))) + 4, pixels + 4
        plates.append(_free_place(own, plate, picture.size, plates))
    for (left, top, right, bottom), text, colour in reversed(list(zip(plates, texts, colours, strict=True))):
        pen.rectangle((left, top, right, bottom), fill=colour)
        bright = np.dot(colour, LUMA) > BRIGHT
        write(pen, text, (left + 2, bottom - pixels // 4 - 1), INK if bright else WHITE, pixels)
    return np.array(picture)


def shade(group: str, label: int) -> Colour:
    """A class's colour: its group's, lighter or darker and of a neighbouring hue, so that few classes share one."""
    turn, lighter = SHADES[label % len(SHADES)]
    hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in GROUP_RGB[group]))
    red, green, blue = colorsys.hls_to_rgb((hue + turn) % 1, min(max(lightness + lighter, 0), 1), saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


# x, y of an object, and which share of a plate lies left of and above it
Points = list[tuple[float, float, float, float]]


def _mask_points(outline: np.ndarray) -> Points:
    """Where the label of a mask may be, touching its outline (P, 2) of x, y: over, below, beside; on its middle."""
    x, y = outline[:, 0], outline[:, 1]
    top, bottom, right, left = (outline[i].tolist() for i in (y.argmin(), y.argmax(), x.argmax(), x.argmin()))
    middle = (float(x.mean()), float(y.mean()))
    return [(*top, 0.5, 1), (*bottom, 0.5, 0), (*right, 0, 0.5), (*left, 1, 0.5), (*middle, 0.5, 0.5)]


def _free_place(
    points: Points,
    plate: tuple[int, int],
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a plate (width, height) within a picture (width, height), at the first of the points
    where it covers none that are taken, or least of them."""

    def covered(place: tuple[int, int, int, int]) -> int:
        sides = [(min(place[2], o[2]) - max(place[0], o[0]), min(place[3], o[3]) - max(place[1], o[1])) for o in taken]
        return sum(max(width, 0) * max(height, 0) for width, height in sides)

    places = []
    for x, y, left, above in points:
        corner = x - left * plate[0], y - above * plate[1]
        a, b = (max(0, min(round(corner[n]), size[n] - plate[n] - 1)) for n in (0, 1))
        places.append((a, b, a + plate[0], b + plate[1]))
    return min(places, key=covered)  # the first of equal ones


def _fitted(picture: np.ndarray, scale: float) -> np.ndarray:
    """A scaled copy; enlarged by a whole number, pixels become squares."""
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    larger = cv2.INTER_NEAREST if scale == int(scale) else cv2.INTER_LINEAR
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else larger)


# ---- letters ---------------------------------------------------------------------------------------------------------


def write(
    pen: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[int, int],
    colour: Colour,
    pixels: int,
) -> None:
    """Text of any script; letters that no font here has become `?`. corner: (x, y), where the baseline begins."""
    shown, font = _letters(text, pixels)
    pen.text(corner, shown, fill=colour, font=font, anchor="ls")


def class_text(name: str, number: int) -> str:
    """A class's name, or its number (category id) where it has none, or no font here has its letters.

    A long name is cut, and has the number, too: it may begin as another does.
    """
    if not name.strip() or not _font_file(unicodedata.normalize("NFC", name)):
        return f"class {number}"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}... (class {number})"


def _letters(text: str, pixels: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """What is drawn of a text, on one line and accents joined with their letters, and the font for it."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not _font_file(text):
        text = text.encode("ascii", "replace").decode()
    return text, _truetype(_font_file(text), pixels)


@cache
def _font_file(text: str) -> str:
    """A font file with all letters of a text; "" where there is none."""
    wanted = {ord(c) for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
    return next((file for file in _font_files() if wanted <= _characters(file)), "")


def _font_files() -> Iterator[str]:
    """DejaVu Sans, which comes with matplotlib, then the machine's fonts, upright and of normal weight first."""
    yield str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    from matplotlib import font_manager  # half a second, and rarely needed

    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: (font.style != "normal", str(font.weight) not in ("400", "normal"), font.name))
    yield from (font.fname for font in fonts)


@cache
def _characters(file: str) -> frozenset[int]:
    """Code points of a font; none where it cannot be read."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
