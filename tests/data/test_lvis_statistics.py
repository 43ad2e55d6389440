"""Statistics that compare drawn sets with LVIS: benchmarks/lvis_statistics.py."""

import json
from pathlib import Path

from benchmarks.lvis_statistics import reduced

STORED = Path(__file__).resolve().parents[2] / "benchmarks/results/lvis_statistics.json"


def test_statistics_of_three_images(tmp_path: Path) -> None:
    """Image 1 shows a rare class once and a frequent one twice, image 2 the frequent one, image 3 nothing."""
    absent = {1: [], 2: [7, 8], 3: [7]}
    content = {
        "categories": [{"id": 7, "frequency": "r"}, {"id": 8, "frequency": "c"}, {"id": 9, "frequency": "f"}],
        "images": [
            {
                "id": i,
                "width": 100,
                "height": 50,
                "neg_category_ids": absent[i],
                "not_exhaustive_category_ids": [9] * (i == 2),
            }
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": [0, 0, side, side / 2]}
            for image, category, side in ((1, 7, 10), (1, 9, 20), (1, 9, 20), (2, 9, 50))
        ],
    }
    (tmp_path / "file.json").write_text(json.dumps(content))
    found = reduced(tmp_path / "file.json")
    sides = found.pop("sides")
    assert (sides[0], sides[50], sides[100], len(sides)) == (0.1, 0.2, 0.5, 101)
    assert found == {
        "images": 3,
        "images_a_class": [2, 1],
        "classes_an_image": [1, 1, 1],  # images with 0, 1, 2 classes
        "objects_a_label": [0, 2, 1],  # of three labels, two have 1 object, one has 2
        "objects_an_image": [1, 1, 0, 1],
        "labels": {"r": 1, "c": 0, "f": 2},
        "beside": {"r": [0, 0, 1], "c": [0, 0, 0], "f": [0.5, 0, 0]},  # rare, common, frequent classes
        "absent": {"r": 2, "c": 1, "f": 0},
        "not_exhaustive": round(1 / 3, 4),
        "empty": round(1 / 3, 4),
    }


def test_the_stored_counts_are_of_lvis_v1() -> None:
    stored = json.loads(STORED.read_text())
    counts = stored["images_a_class"]
    assert [sum(low <= n <= high for n in counts) for low, high in ((1, 10), (11, 100), (101, 9999))] == [337, 461, 405]
    assert counts == sorted(counts, reverse=True) and stored["images"] == sum(stored["classes_an_image"]) == 100
