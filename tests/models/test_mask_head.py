"""Mask head, its targets and its loss against loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from loce.data.masks import CroppedMasks
from loce.models.mask_head import MASK_SIZE, MaskHead, mask_loss, mask_targets


def head(normalised: bool = True, temperature: float = 20.0, convs: int = 1) -> MaskHead:
    made = MaskHead(8, 12, convs, 5, normalised, temperature)
    with torch.no_grad():
        made.predictor.bias.normal_()
    return made


def trunk(made: MaskHead, x: torch.Tensor) -> torch.Tensor:
    for conv in made.convs:
        x = torch.relu(conv(x))
    return torch.relu(made.upsample(x)).detach()


def slow_head(made: MaskHead, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The layers one after another: deconvolution, ReLU, normalised or plain 1 x 1 convolution of all classes."""
    for conv in made.convs:
        x = torch.relu(conv(x))
    x = torch.relu(made.upsample(x))
    weight = made.predictor.weight
    if made.normalised:
        x, weight = made.temperature * F.normalize(x, dim=1), F.normalize(weight, dim=1)
    return F.conv2d(x, weight, made.predictor.bias)[torch.arange(len(x)), labels]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("convs", [0, 2])
def test_logits_and_gradients_are_those_of_the_layers(normalised, convs):
    made = (MaskHead(12, 12, 0, 5, normalised) if convs == 0 else head(normalised, convs=convs)).double()
    channels = made.upsample.in_channels if convs == 0 else 8
    x, labels = torch.randn(4, channels, 3, 5, dtype=torch.float64), torch.tensor([4, 0, 2, 2])
    with torch.no_grad():
        made.upsample.bias.normal_()
    wanted, found = (x.clone().requires_grad_() for _ in range(2))
    parameters = list(made.parameters())
    gradients = []
    for way, given in ((slow_head, wanted), (MaskHead.forward, found)):
        logits = way(made, given, labels)
        assert logits.shape == (4, 6, 10)
        gradients.append([logits, *torch.autograd.grad(logits.sin().sum(), [given, *parameters])])
    for own, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(made(x, labels), gradients[0][0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("normalised", [True, False])
def test_gradcheck(normalised):
    made = MaskHead(3, 4, 1, 3, normalised).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*made.named_parameters(), strict=True)

    def logits(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x, torch.tensor([2, 0])))

    assert torch.autograd.gradcheck(logits, (x, *parameters))


def test_autocast_keeps_the_logits_in_fp32():
    made, x, labels = head(), torch.randn(3, 8, 4, 4), torch.tensor([4, 0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(x, labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, made(x, labels), rtol=0, atol=20 * 2**-6)


@pytest.mark.parametrize("temperature", [20.0, 5.0])
def test_normalised_logits_are_cosines(temperature):
    """temperature * <x, w> / (|x| |w|) + b at each pixel, for each region's own class."""
    made, x, labels = head(True, temperature), torch.randn(3, 8, 4, 4), torch.tensor([4, 0, 2])
    logits, features = made(x, labels), trunk(made, x).double()
    assert logits.shape == (3, 8, 8)
    for row, label in enumerate(labels.tolist()):
        w = made.predictor.weight[label].double().flatten()
        for y in range(8):
            for column in range(8):
                f = features[row, :, y, column]
                lengths = math.sqrt(float((f * f).sum())) * math.sqrt(float((w * w).sum().detach()))
                cosine = float((f * w.detach()).sum()) / max(lengths, 1e-12)
                expected = temperature * cosine + float(made.predictor.bias[label].detach())
                assert float(logits[row, y, column].detach()) == pytest.approx(expected, abs=1e-4)


def test_linear_logits():
    made, x, labels = head(False, convs=2), torch.randn(3, 8, 4, 4), torch.tensor([1, 1, 3])
    every = made.predictor(trunk(made, x))
    torch.testing.assert_close(made(x, labels), every[torch.arange(3), labels])


def test_a_pixel_without_features_gets_the_bias():
    made = head()
    with torch.no_grad():
        made.upsample.weight.zero_()
        made.upsample.bias.fill_(-1)  # ReLU makes every channel 0
    logits = made(torch.randn(2, 8, 4, 4), torch.tensor([0, 3]))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[1], made.predictor.bias[3].expand(8, 8))


def test_only_the_own_classes_channel_gets_a_gradient():
    made = head()
    made(torch.randn(2, 8, 4, 4), torch.tensor([1, 3])).square().sum().backward()
    touched = made.predictor.weight.grad.flatten(1).abs().sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, True, False]


def test_no_regions():
    made = head()
    logits = made(torch.zeros(0, 8, 14, 14), torch.zeros(0, dtype=torch.long))
    assert logits.shape == (0, MASK_SIZE, MASK_SIZE)
    mask_loss(logits, torch.zeros(0, MASK_SIZE, MASK_SIZE, dtype=torch.bool), torch.ones(())).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in made.parameters())


def test_loss_by_hand():
    logits, targets = torch.randn(2, 3, 3) * 4, torch.rand(2, 3, 3) > 0.5
    total = 0.0
    for z, t in zip(logits.double().flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= math.log(p) if t else math.log(1 - p)
    for positives in (2.0, 0.25):
        loss = mask_loss(logits, targets, torch.tensor(positives))
        assert float(loss) == pytest.approx(total / (positives * 9), rel=1e-5)


@pytest.fixture
def truth():
    """Four masks of an image of 60 x 80: full-size bitmaps, and the same cut to windows with a margin."""
    y, x = np.mgrid[0:60, 0:80] + 0.5
    bitmaps = np.stack(
        [
            (x - 30) ** 2 + (y - 25) ** 2 < 200,
            (x > 60) & (y > 40),  # touches the right and the lower border
            (x + y < 30),  # touches the upper left corner
            np.zeros((60, 80), bool),
        ]
    ).astype(np.uint8)
    crops = []
    for bitmap in bitmaps:
        rows, columns = np.flatnonzero(bitmap.any(1)), np.flatnonzero(bitmap.any(0))
        if len(rows) == 0:
            crops.append((np.zeros((1, 1), np.uint8), (0, 0)))
            continue
        y0, y1 = max(0, rows[0] - 2), min(60, rows[-1] + 3)
        x0, x1 = max(0, columns[0] - 2), min(80, columns[-1] + 3)
        crops.append((np.ascontiguousarray(bitmap[y0:y1, x0:x1]), (int(x0), int(y0))))
    return bitmaps, CroppedMasks.pack(crops, (60, 80))


def test_targets_equal_roi_align_on_full_bitmaps(truth):
    """More regions than are cropped at once, some reaching out of the image, with half-pixel corners."""
    bitmaps, masks = truth
    instances = torch.arange(50) % 4
    corner = torch.rand(50, 2) * torch.tensor([70.0, 50.0]) - 5
    boxes = torch.cat([corner, corner + 1 + torch.rand(50, 2) * 60], dim=1)
    own = mask_targets(masks, instances, boxes)
    limit = torch.tensor([80.0, 60, 80, 60])
    clipped = torch.minimum(boxes.clamp(min=0), limit)
    full = torch.from_numpy(bitmaps)[instances][:, None].float()
    regions = torch.cat([torch.arange(50.0)[:, None], clipped], dim=1)
    soft = roi_align(full, regions, MASK_SIZE, 1.0, 0, aligned=True)[:, 0]
    assert own.dtype == torch.bool and own.any() and not own.all()
    different = own != (soft >= 0.5)
    assert not different[(soft - 0.5).abs() > 1e-5].any()
    assert int(different.sum()) == 0


def test_half_covered_cells_count_as_mask():
    """Cells that are exactly half covered are inside (>=)."""
    bitmap = np.zeros((28, 56), np.uint8)
    bitmap[:, 0::2] = 1  # every other column: each cell of two columns is half covered
    masks = CroppedMasks.pack([(bitmap, (0, 0))], (28, 56))
    assert mask_targets(masks, torch.tensor([0]), torch.tensor([[0.0, 0, 56, 28]])).all()


def test_targets_without_regions(truth):
    assert mask_targets(truth[1], torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)).shape == (0, 28, 28)


def test_a_region_that_is_no_number_has_no_mask(truth):
    fine = torch.tensor([[10.0, 10, 50, 40]])
    boxes = torch.cat([torch.tensor([[math.nan, 3, math.nan, 30], [5, math.nan, 40, math.nan]]), fine])
    own = mask_targets(truth[1], torch.tensor([0, 1, 0]), boxes)
    assert not own[:2].any() and torch.equal(own[2:], mask_targets(truth[1], torch.tensor([0]), fine)) and own.any()
