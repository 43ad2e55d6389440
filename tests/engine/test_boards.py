"""TensorBoard's files, read back: where each value stands, and that pictures and texts are what was given."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loce.engine.boards import TensorBoardLog, tag


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0, "tensors": 0}).Reload()


def test_places() -> None:
    places = {
        "loss": "loss/all",
        "loss_mask": "loss/mask",
        "lr": "speed/learning_rate",
        "peak_memory_gib": "memory/peak_GiB",
        "mean_score/r": "mean_score/rare",
        "eval/segm_APr": "eval/segm_APr",
    }
    assert {name: tag(name) for name in places} == places


def test_what_is_given_is_there(tmp_path: Path) -> None:
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    board = TensorBoardLog(tmp_path, 1)
    scores = torch.tensor([0.1, 0.2, 0.2, 0.9])
    assert board.show(3, {"loss": 1.5, "mean_score/classes": scores, "a/picture": picture, "run/config": "    x"}) == ""
    assert board.show(4, {"eval/segm_APr": -1.0, "eval/segm_APf": 0.5}) == ""
    board.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss/all")] == [(3, 1.5)]
    assert "eval/segm_APr" not in events.Tags()["scalars"] and events.Scalars("eval/segm_APf")[0].value == 0.5
    (histogram,) = events.Histograms("mean_score/classes")
    value = histogram.histogram_value
    assert (histogram.step, value.num) == (3, 4)
    assert np.isclose([value.min, value.max, value.sum], [0.1, 0.9, 1.4]).all()
    (image,) = events.Images("a/picture")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)
    (text,) = events.Tensors("run/config/text_summary")
    assert text.tensor_proto.string_val == [b"    x"]
    assert any("custom_scalars" in name for name in events.Tags()["tensors"])


def test_a_later_writer_takes_the_place_of_what_was_lost(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path, 1)
    for step in (1, 2, 3):
        board.show(step, {"loss": float(step)})
    board.close()
    board = TensorBoardLog(tmp_path, 3)  # step 3 came after the last checkpoint
    board.show(3, {"loss": 30.0})
    board.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss/all")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
