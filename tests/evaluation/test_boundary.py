"""Boundary AP against the official evaluator with an IoU written from the paper's equations, pixel by pixel."""

from typing import Any

import lvis
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from loce.evaluation import evaluate_lvis
from loce.evaluation.iou import boundary
from loce.evaluation.report import evaluate_and_report
from loce.utils.errors import UserError
from tests.evaluation.cases import official_lvis, random_case

Pixels = set[tuple[int, int]]


def edge_pixels(code: dict[str, Any], dilation: float) -> Pixels:
    """G_d and G: pixels of a mask within d of one that is none, or of the image's outside (Sec. 4 of the paper)."""
    mask = mask_utils.decode(code).astype(bool)
    height, width = mask.shape
    d = max(1, round(dilation * (height**2 + width**2) ** 0.5))
    found = set()
    for y, x in zip(*np.nonzero(mask), strict=True):
        around = mask[max(y - d, 0) : y + d + 1, max(x - d, 0) : x + d + 1]
        if around.size < (2 * d + 1) ** 2 or not around.all():
            found.add((int(y), int(x)))
    return found


def test_the_pixels_of_a_boundary() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width = rng.integers(20, 80, 2)
        mask = np.zeros((height, width), np.uint8, order="F")
        for _ in range(rng.integers(1, 4)):  # also in several parts, and up to the border
            y, x = rng.integers(0, height), rng.integers(0, width)
            mask[y : y + rng.integers(1, 40), x : x + rng.integers(1, 40)] ^= 1
        code, dilation = mask_utils.encode(mask), float(rng.choice([0.008, 0.02, 0.05]))
        ours = mask_utils.decode(boundary(code, dilation))
        assert {(int(y), int(x)) for y, x in zip(*np.nonzero(ours), strict=True)} == edge_pixels(code, dilation)


@pytest.mark.usefixtures("numpy_float")
def test_boundary_ap(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lvis.LVISEval.compute_iou

    def lower(self: Any, image: int, category: int) -> Any:
        """The lower of mask IoU and |edges in both| / |edges in one|, in the order of the official matrix."""
        iou = plain(self, image, category)
        if not len(iou):
            return iou
        objects, found = self._get_gt_dt(image, category)
        found = [found[i] for i in np.argsort([-d["score"] for d in found], kind="mergesort")]
        edges = [[edge_pixels(self.lvis_gt.ann_to_rle(a), 0.008) for a in some] for some in (found, objects)]
        for n, ours in enumerate(edges[0]):
            for g, theirs in enumerate(edges[1]):
                iou[n, g] = min(iou[n, g], len(ours & theirs) / max(len(ours | theirs), 1))
        return iou

    moved = 0
    small = [seed for seed in range(30) if random_case(seed)[0]["images"][0]["height"] == 64]
    for seed in small:
        truth, results = random_case(seed)
        if not results:
            continue
        masks = evaluate_lvis(truth, results, "segm")
        with monkeypatch.context() as patched:
            patched.setattr(lvis.LVISEval, "compute_iou", lower)
            official = official_lvis(truth, results, "segm")
        ours = evaluate_lvis(truth, results, "boundary")
        np.testing.assert_allclose(list(ours.metrics.values()), list(official.results.values()), rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.precision, official.eval["precision"], rtol=0, atol=1e-9)
        assert ours.metrics["AP"] <= masks.metrics["AP"]
        moved += ours.metrics["AP"] < masks.metrics["AP"]
    assert moved > len(small) / 4


def test_boundary_ap_by_option(tmp_path: Any) -> None:
    truth, results = random_case(10)
    found = evaluate_and_report(truth, results, tmp_path, protocol=["lvis", "pool"], resamples=0, boundary=True)
    assert list(found) == ["bbox", "segm", "boundary", "bbox_pool", "segm_pool", "boundary_pool"]
    assert found["boundary"].metrics == evaluate_lvis(truth, results, "boundary").metrics
    assert (tmp_path / "tallies_boundary.npz").is_file()
    with pytest.raises(UserError, match=r"eval.boundary: boundary AP is of masks"):
        evaluate_and_report(truth, results, tmp_path / "out", ["bbox"], boundary=True)
