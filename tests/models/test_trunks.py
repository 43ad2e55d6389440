"""Trunks: maps against torchvision's own forward, stochastic depth, what is frozen, a trunk of one's own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.ops import StochasticDepth

from loce.config import MemoryConfig, ModelConfig, UserError, load_config
from loce.models import backbone as backbones
from loce.models.backbone import TRUNKS, Backbone, Trunk, build_backbone
from loce.models.mask_rcnn import MaskRCNN

from .small_trunks import SMALL_TRUNKS, small

LARGE = [name for name, trunk in TRUNKS.items() if trunk.norm == "layer"] + ["resnext101_64x4d"]
EACH_SMALL = pytest.mark.parametrize("name", SMALL_TRUNKS)


@pytest.fixture
def few_weights() -> Iterator[None]:
    """SMALL_TRUNKS in place of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, trunk in SMALL_TRUNKS.items():
            patch.setitem(TRUNKS, name, trunk)
        yield


def norm_of(name: str) -> str:
    return "layer" if TRUNKS[name].norm == "layer" else "batch"


@pytest.mark.parametrize("name", TRUNKS)
def test_channels_strides_and_frozen_stages_of_every_trunk(name: str) -> None:
    """On the meta device, where nothing is computed."""
    norm = "group" if name == "tiny" else norm_of(name)
    for stages in (0, 1, 4) if name == "resnet18" else (2,):
        with torch.device("meta"):
            backbone = build_backbone(ModelConfig(backbone=name, weights="none", norm=norm, frozen_stages=stages))  # type: ignore[arg-type]
        trunk, children = TRUNKS[name], [child for child, _ in backbone.body.named_children()]
        frozen = children[: children.index(trunk.layers[stages - 1]) + 1] if stages else []
        for child, module in backbone.body.named_children():
            assert all(p.requires_grad == (child not in frozen) for p in module.parameters()), (child, stages)
        after = [part for part_name, part in backbone.named_children() if part_name != "body"]
        assert all(p.requires_grad for part in after for p in part.parameters())
    maps = list(backbone.eval()(torch.empty(1, 3, 128, 192, device="meta")).values())
    assert [tuple(x.shape) for x in maps] == [(1, 256, 128 // s, 192 // s) for s in (4, 8, 16, 32, 64)]
    assert children[-1] == trunk.layers[-1]


def check_against_torchvision(name: str, size: tuple[int, int] = (64, 96)) -> None:
    """The last map, through the rest of torchvision's model, gives the model's logits; the others come before it."""
    trunk, image = TRUNKS[name], torch.randn(2, 3, *size)
    built: list[nn.Module] = []

    def build(**options: Any) -> nn.Module:
        built.append(trunk.build(**options))
        return built[0]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(TRUNKS, name, trunk._replace(build=build))
        backbone = build_backbone(ModelConfig(backbone=name, weights="none", norm=norm_of(name), frozen_stages=0))  # type: ignore[arg-type]
        model = built[0].eval()
        maps = list(backbone.eval().body(image).values())
        expected, x = model(image), maps[-1]
        if trunk.norm == "batch":
            logits = model.get_submodule("fc")(x.mean(dim=(2, 3)))
        elif trunk.channels_last:
            logits = model.get_submodule("head")(model.get_submodule("norm")(x).mean(dim=(1, 2)))
        else:
            logits = model.get_submodule("classifier")(x.mean(dim=(2, 3), keepdim=True))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        # What the pyramid gets: normalised over channels, channels first.
        seen: list[Tensor] = []
        backbone.fpn.register_forward_pre_hook(lambda _, given: seen.extend(given[0].values()))
        backbone(image)
        for level, (found, own) in enumerate(zip(seen, maps, strict=True)):
            first = own.permute(0, 3, 1, 2) if trunk.channels_last else own
            if trunk.norm == "layer":
                mean, variance = first.mean(dim=1, keepdim=True), first.var(dim=1, keepdim=True, correction=0)
                first = (first - mean) / (variance + 1e-5).sqrt()
            assert found.shape == (2, trunk.channels[level], size[0] // 4 // 2**level, size[1] // 4 // 2**level)
            torch.testing.assert_close(found, first, rtol=1e-3, atol=1e-4)


@EACH_SMALL
def test_maps_are_those_of_torchvisions_forward(few_weights: None, name: str) -> None:
    check_against_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_maps_of_the_real_trunks_are_those_of_torchvisions_forward(name: str) -> None:
    check_against_torchvision(name, (64, 64))


@EACH_SMALL
def test_stochastic_depth_is_torchvisions_and_keyed_by_image(few_weights: None, name: str) -> None:
    """A branch is there 1 / (1 - p) times or not; an image has the same branches whatever it is batched with."""
    torch.manual_seed(0)
    backbone = build_backbone(small(name)).train()
    assert not any(isinstance(module, StochasticDepth) for module in backbone.modules())
    images = torch.randn(6, 3, 64, 64)

    def maps(images: Tensor, seeds: Sequence[int]) -> list[Tensor]:
        backbone.draw_branches(seeds, images.device)
        return list(backbone(images).values())

    whole = maps(images, range(6))
    kept = [m.kept for m in backbone.modules() if isinstance(m, backbones.DroppedBranch)]
    assert len({tuple(column.tolist()) for column in torch.stack(kept, dim=1)}) > 1 and kept[0].all()  # p = 0 at first
    for i in (0, 3):
        for found, expected in zip(maps(images[i : i + 1], [i]), whole, strict=True):
            torch.testing.assert_close(found, expected[i : i + 1], rtol=1e-4, atol=1e-5)
    backbone.eval()
    still = maps(images, [])
    assert all(torch.equal(a, b) for a, b in zip(still, maps(images, range(6)), strict=True))
    assert not torch.allclose(still[3], whole[3], atol=1e-3)


def test_rates_of_stochastic_depth_are_an_option(few_weights: None) -> None:
    def rates(**options: float) -> list[float]:
        modules = build_backbone(small("convnext_tiny", **options)).modules()
        return [module.p for module in modules if isinstance(module, backbones.DroppedBranch)]

    assert rates() == pytest.approx([0, 0.15, 0.3, 0.45, 0.6]) and rates(stochastic_depth=1.5)[-1] == pytest.approx(0.9)
    off = build_backbone(small("convnext_tiny", stochastic_depth=0)).train()
    image = torch.randn(1, 3, 64, 64)
    assert not off.stochastic_depth and torch.equal(off(image)["3"], off.eval()(image)["3"])
    with pytest.raises(UserError, match="ConvNeXt and Swin alone have stochastic depth"):
        load_config(["stage1.yaml", "model.stochastic_depth=0.5"])


def test_a_dropped_branch_against_its_formula() -> None:
    branch = backbones.DroppedBranch(0.25)
    x = torch.randn(4, 3, 2, 2)
    assert branch(x) is x
    branch.kept = torch.tensor([True, False, True, False])
    for i, kept in enumerate(branch.kept.tolist()):
        torch.testing.assert_close(branch(x)[i], x[i] / 0.75 if kept else torch.zeros(3, 2, 2))
    seeds = torch.stack(
        [torch.rand(1, generator=backbones.generator_for(s, 6, torch.device("cpu"))) for s in range(2000)]
    )
    assert float((seeds >= 0.25).float().mean()) == pytest.approx(0.75, abs=0.03)


@EACH_SMALL
def test_what_is_frozen_stays_and_drops_nothing(
    few_weights: None, name: str, make_model: Callable[..., MaskRCNN], batch: list[dict[str, Any]]
) -> None:
    """Bit for bit after steps: stages by model.frozen_stages, all of trunk and pyramid in LOCE's second stage."""
    for number, sample in enumerate(batch):
        sample.update(seed=number, batch_index=number)
    for freeze, stages in (("none", 2), ("trunk", 0)):
        memory = MemoryConfig(enabled=freeze == "trunk")
        model = make_model("equilibrium", memory, freeze=freeze, config=small(name, frozen_stages=stages)).train()
        before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
        images = model.batch_images([sample["image"] for sample in batch])[0]
        early = model.backbone.body[["1", "3", "5", "7"][stages - 1]]
        seen: list[Tensor] = []
        handle = early.register_forward_hook(lambda _, __, out, to=seen: to.append(out.detach().clone()))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            optimizer.step()
        model.eval().features(images)
        handle.remove()
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
        still = tuple(f"body.{child}." for child in range(4)) if freeze == "none" else ("",)
        for key, value in model.backbone.state_dict().items():
            if key.startswith(still) or not value.is_floating_point() or "coords" in key:
                assert torch.equal(value, before[key]), key
        if freeze == "none":
            moved = [k for k, p in model.backbone.named_parameters() if p.grad is not None and p.grad.any()]
            reached = {k.split(".")[1] for k in moved if k.startswith("body.")}
            assert {"4", "5", "6"} <= reached <= {"4", "5", "6", "7"}  # 7 is one branch, which both images may lack
            assert any(k.startswith("level_norms.") for k in moved)


@pytest.mark.parametrize("name", [name for name, trunk in TRUNKS.items() if trunk.weights is not None])
def test_weights_that_cannot_be_had_name_their_file(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    weights = TRUNKS[name].weights
    assert weights is not None
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(WeightsEnum, "get_state_dict", fetch)
    layer = TRUNKS[name].norm == "layer"
    config = ModelConfig(backbone=name, norm="layer" if layer else "frozen")  # type: ignore[arg-type]
    file = weights.url.rsplit("/", 1)[-1]
    way_out = "model.frozen_stages=0" if layer else "model.norm=batch or group"
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=rf"{file} is not in the cache(.|\n)*model\.weights=none \(then {way_out}\)"),
    ):
        build_backbone(config)


def test_imagenet_weights_arrive(few_weights: None, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {k: torch.full_like(v, 0.25) for k, v in TRUNKS["swin_t"].build().state_dict().items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    body = build_backbone(small("swin_t", weights="imagenet")).body.state_dict()
    assert set(body) == {key.removeprefix("features.") for key in state if key.startswith("features.")}
    assert all((value == 0.25).all() for value in body.values() if value.is_floating_point())


@pytest.mark.parametrize("words", [("swin_t", "frozen"), ("convnext_base", "batch"), ("resnet50", "layer")])
def test_norms_that_a_trunk_does_not_have_are_refused(words: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"model\.backbone = .*, model\.norm = .*layer norms"):
        load_config(["stage1.yaml", f"model.backbone={words[0]}", f"model.norm={words[1]}"])


class Own(nn.Module):
    """As docs/trunks.md tells: a module that returns its four maps as a list, such as timm's `features_only` models."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        for i in range(4):
            self.add_module(f"stage{i}", nn.Conv2d(4 * (i or 1), 4 * (i + 1), 2, stride=2))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps, x = [], self.stem(x)
        for i in range(4):
            x = self.get_submodule(f"stage{i}")(x)
            maps.append(x)
        return maps


def test_a_trunk_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tuple(f"stage{i}" for i in range(4))
    monkeypatch.setitem(TRUNKS, "resnet18", Trunk(Own, None, layers, (4, 8, 12, 16), "own"))
    config = ModelConfig(backbone="resnet18", weights="imagenet", frozen_stages=1, fpn_channels=16)
    found = build_backbone(config)
    assert isinstance(found, Backbone) and isinstance(found.body, Own) and found.body.pretrained
    assert [name for name, p in found.body.named_parameters() if not p.requires_grad] == [
        *("stem.weight", "stem.bias", "stage0.weight", "stage0.bias")
    ]
    monkeypatch.setitem(TRUNKS, "resnet18", Trunk(Own, None, ("layer1",), (4, 8, 12, 16), "own"))
    with pytest.raises(ValueError, match="has no children layer1; it has stem, stage0"):
        build_backbone(config)
