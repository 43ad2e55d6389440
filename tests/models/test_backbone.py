"""Backbones: pyramid sizes, names, what is frozen, and what a missing download says."""

import copy
from dataclasses import replace
from http.client import IncompleteRead
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from loce.config import ModelConfig, UserError
from loce.models.backbone import GLYPH_WEIGHTS, build_backbone
from loce.models.mask_rcnn import MaskRCNN
from tests.models.conftest import SMALL

TINY = ModelConfig(backbone="tiny", weights="none", norm="group", frozen_stages=0, fpn_channels=16)


@pytest.mark.parametrize("size", [(64, 96), (320, 416), (96, 32)])
def test_pyramid_sizes(size):
    """P2..P5 have strides 4..32; P6 is every second position of P5."""
    maps = list(build_backbone(TINY)(torch.randn(1, 3, *size)).values())
    expected = [tuple(side // stride for side in size) for stride in (4, 8, 16, 32)]
    expected.append(tuple(-(-side // 64) for side in size))
    assert [tuple(x.shape[2:]) for x in maps] == expected
    assert all(x.shape[1] == 16 for x in maps)
    torch.testing.assert_close(maps[4], maps[3][:, :, ::2, ::2])


def test_the_pyramid_against_its_definition():
    """Lateral 1 x 1, nearest upsampling of the coarser level added, then 3 x 3; no activation."""
    backbone = build_backbone(TINY).eval()
    image = torch.randn(1, 3, 64, 96)
    fpn, body = backbone.fpn, list(backbone.body(image).values())
    lateral = [block(x) for block, x in zip(fpn.inner_blocks, body, strict=True)]
    merged = lateral[3]
    outputs = [fpn.layer_blocks[3](merged)]
    for level in (2, 1, 0):
        merged = lateral[level] + merged.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        outputs.insert(0, fpn.layer_blocks[level](merged))
    for own, expected in zip(backbone(image).values(), outputs, strict=False):
        torch.testing.assert_close(own, expected)


def test_only_a_group_normalised_model_normalises_its_pyramid():
    """Official weights have biases and no norm there."""
    for norm, expected in (("frozen", 0), ("batch", 0), ("group", 8)):
        fpn = build_backbone(ModelConfig(weights="none", norm=norm, fpn_channels=16)).fpn
        assert sum(isinstance(m, nn.GroupNorm | nn.BatchNorm2d) for m in fpn.modules()) == expected
        assert sum(name.endswith("0.0.bias") for name, _ in fpn.named_parameters()) == (0 if expected else 2)


@pytest.mark.parametrize(("stages", "frozen"), [(0, ()), (1, ("stem", "layer1")), (2, ("stem", "layer1", "layer2"))])
def test_frozen_stages_of_the_tiny_backbone(stages, frozen):
    backbone = build_backbone(ModelConfig(backbone="tiny", weights="none", norm="group", frozen_stages=stages))
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name
    assert all(parameter.requires_grad for parameter in backbone.fpn.parameters())


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [(0, ()), (1, ("conv1", "bn1", "layer1")), (4, ("conv1", "bn1", *(f"layer{i}" for i in range(1, 5))))],
)
def test_frozen_stages_of_a_resnet(stages, frozen):
    backbone = build_backbone(ModelConfig(weights="none", frozen_stages=stages))
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name


def test_batch_norms_of_the_resnet_have_affine_weights_that_train():
    backbone = build_backbone(ModelConfig(weights="none"))
    norms = [m for m in backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 and all(norm.eps == 1e-5 for norm in norms)
    assert (
        backbone.body["layer2"][0].bn1.weight.requires_grad and not backbone.body["layer1"][0].bn1.weight.requires_grad
    )


@pytest.fixture
def resnet18(make_model):
    """A detector's trunk with statistics of its own; a function of what is frozen."""

    def build(stages: int, freeze: str = "none") -> MaskRCNN:
        options = replace(SMALL, backbone="resnet18", norm="frozen", frozen_stages=stages)
        model = make_model(freeze=freeze, config=options)
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                for x in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(x, 0.5, 1.5)
        return model.double().train()

    return build


@pytest.mark.parametrize(("stages", "freeze"), [(1, "none"), (4, "none"), (1, "trunk")])
def test_folded_norms_change_no_map_and_no_gradient(resnet18, stages, freeze):
    model = resnet18(stages, freeze)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    names = list(model.state_dict())
    for _ in range(2):
        wanted, found = list(model.backbone(image).values()), model.features(image)
        for own, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
        trained = [p for p in model.backbone.parameters() if p.requires_grad]
        for own, expected in zip(*(_gradients(maps, trained) for maps in (found, wanted)), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)
        # Frozen weights that are loaded later are noticed.
        with torch.no_grad():
            model.backbone.body["layer1"][0].bn2.running_var.mul_(3)
            model.backbone.body["conv1"].weight.mul_(0.7)
    folded = model.backbone.folded
    assert (folded is None) == bool(trained and stages < 4)
    assert folded is None or not any(isinstance(m, nn.BatchNorm2d) for m in folded.backbone.modules())
    assert list(model.state_dict()) == names and list(copy.deepcopy(model).state_dict()) == names


def _gradients(maps: list[torch.Tensor], trained: list[nn.Parameter]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(sum(x.sin().sum() for x in maps), trained)) if trained else []


def test_what_trains_anew_is_folded_no_more(resnet18):
    model = resnet18(1, "trunk")
    model.backbone.requires_grad_(True)
    maps = model.features(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert model.backbone.folded is None
    assert all(g.any() for g in _gradients(maps, [model.backbone.body["conv1"].weight]))


def test_the_stride_is_in_the_3x3_convolution():
    block = build_backbone(ModelConfig(weights="none")).body["layer2"][0]
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)


def test_imagenet_weights_come_from_the_v1_file(monkeypatch):
    """Every tensor of the file but the classifier's arrives; a file of the right names is enough to show it."""
    state = {k: torch.full_like(v, 0.25) if v.is_floating_point() else v for k, v in resnet50().state_dict().items()}
    asked = []

    def fetch(weights, **options):
        asked.append(weights)
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", fetch)
    body = build_backbone(ModelConfig()).body.state_dict()
    assert asked == [ResNet50_Weights.IMAGENET1K_V1]
    assert set(body) == {key for key in state if not key.startswith("fc.")}
    assert all((value == 0.25).all() for value in body.values() if value.is_floating_point())


def test_the_small_trunks_own_weights():
    """All of the file arrives, in single precision; the pyramid is new, as with ImageNet's weights."""
    first, second = (build_backbone(replace(TINY, weights="glyphs")) for _ in range(2))
    stored = torch.load(GLYPH_WEIGHTS, weights_only=True)
    assert GLYPH_WEIGHTS.stat().st_size < 1e6 and set(stored) == set(first.body.state_dict())
    for name, value in first.body.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, stored[name].float()), name
    assert not torch.equal(first.fpn.inner_blocks[0][0].weight, second.fpn.inner_blocks[0][0].weight)


@pytest.mark.parametrize(
    "error", [URLError("no route"), TimeoutError(), IncompleteRead(b""), RuntimeError("invalid hash value")]
)
def test_weights_that_cannot_be_downloaded_have_a_way_out(monkeypatch, tmp_path, error):
    def fetch(*_, **__):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", fetch)
    with pytest.raises(UserError, match=r"resnet50-0676ba61\.pth.*cannot be downloaded(.|\n)*hub/checkpoints"):
        build_backbone(ModelConfig())


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 half of a file"])
def test_a_damaged_file_in_the_cache_is_named(monkeypatch, tmp_path, content):
    """An interrupted copy, a proxy's answer: nothing is downloaded over it, so it must be deleted by hand."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints/resnet50-0676ba61.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*Delete it") as caught:
        build_backbone(ModelConfig())
    assert str(cached) in str(caught.value) and cached.read_bytes() == content


def test_group_norm_takes_the_place_of_batch_norm():
    body = build_backbone(ModelConfig(weights="none", norm="group")).body
    assert not any(isinstance(m, nn.BatchNorm2d) for m in body.modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in body.modules()) == 53
