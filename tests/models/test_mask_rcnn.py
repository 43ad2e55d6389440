"""The whole detector on small batches: what trains, which batches it survives, what it predicts."""

import dataclasses
import itertools
import math

import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn

from loce.config import EvalConfig, HeadConfig, IndicatorConfig, MemoryConfig, ModelConfig, UserError
from loce.models import mask_rcnn
from loce.models.mask_rcnn import PIXEL_MEAN, PIXEL_STD, build_roi_heads

CLASSES = 6
MEMORY = MemoryConfig(enabled=True, capacity=40)
NO_MEMORY = MemoryConfig()
SCORE, PRIOR = IndicatorConfig(), IndicatorConfig(kind="prior")
TABLE_1 = {  # head, memory, indicator
    "baseline": ("softmax", NO_MEMORY, SCORE),
    "EBL": ("equilibrium", NO_MEMORY, SCORE),
    "MFS": ("softmax", MEMORY, SCORE),
    "EBL + MFS": ("equilibrium", MEMORY, SCORE),
    "EBL, prior": ("equilibrium", NO_MEMORY, PRIOR),
    "EBL + MFS, prior": ("equilibrium", MEMORY, PRIOR),
}
ROWS = pytest.mark.parametrize("row", TABLE_1)


@pytest.fixture
def model_of(make_model):
    """The small model of a row of Table 1, as stage 2 trains it."""
    return lambda row, freeze="trunk": make_model(*TABLE_1[row], freeze=freeze).train()


def step(model, samples):
    """Losses of a batch and gradients by name."""
    model.zero_grad()
    losses = model(samples)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def noise(height, width):
    """A random image."""
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def empty(make_sample):
    """An image without objects."""
    return make_sample([], [], (64, 64), 5)


@ROWS
def test_a_step_of_each_row_of_table_1(model_of, batch, row):
    model = model_of(row)
    losses, gradients = step(model, batch)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"}
    assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())
    assert set(gradients) == trainable(model)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert (model.roi_heads.memory is None) == (TABLE_1[row][1] is NO_MEMORY)


def test_the_rows_of_table_1_differ_where_they_should(model_of, batch):
    """Same weights, same random numbers: RPN and mask losses agree; classification losses all differ."""
    for sample in batch:
        sample["store_rows"] = torch.arange(len(sample["labels"]))
    found = {}
    for row in TABLE_1:
        model = model_of(row)
        torch.manual_seed(4)
        found[row] = {name: loss.item() for name, loss in model(batch).items()}
    for a, b in itertools.combinations(TABLE_1, 2):
        assert found[a]["loss_cls"] != pytest.approx(found[b]["loss_cls"], rel=1e-4), (a, b)
    for name in ("loss_rpn_cls", "loss_rpn_box", "loss_mask"):
        assert len({losses[name] for losses in found.values()}) == 1, name
    with_memory = {found[row]["loss_box"] for row in ("MFS", "EBL + MFS")}
    assert len(with_memory) == 1 and with_memory != {found["baseline"]["loss_box"]}


@ROWS
@pytest.mark.parametrize("which", ["one empty image", "all empty"])
def test_images_without_objects(model_of, batch, empty, row, which):
    """Losses are finite and every trainable parameter has a gradient, which training on several GPUs needs."""
    model = model_of(row)
    losses, gradients = step(model, [batch[0], empty] if which == "one empty image" else [empty, empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert set(gradients) == trainable(model)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    if which == "all empty":
        assert losses["loss_rpn_box"] == losses["loss_mask"] == 0
    step(model, batch)  # and training goes on


@ROWS
@pytest.mark.parametrize("part", ["", "backbone.", "rpn.head.bbox_pred.", "rpn.head.cls_logits."])
def test_a_diverged_model_says_nan(model_of, batch, row, part):
    """Whatever has become nan (all, the features, the proposals, their order): the step ends and a loss shows it."""
    model = model_of(row)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(part):
                parameter.fill_(math.nan)
    losses = model(batch)
    assert not torch.isfinite(sum(losses.values()))
    sum(losses.values()).backward()


def test_proposals_with_a_side_that_is_no_number(model_of, batch):
    """Only x is nan: y alone must not tell RoIAlign how much to do."""
    model = model_of("EBL + MFS")
    with torch.no_grad():
        model.rpn.head.bbox_pred.bias[0::4] = math.nan
    assert not torch.isfinite(model(batch)["loss_box"])


def test_stage_1_trains_everything_that_is_not_frozen(make_model, batch, empty):
    model = make_model().train()
    for samples in (batch, [empty]):
        _, gradients = step(model, samples)
        assert set(gradients) == trainable(model) == {name for name, _ in model.named_parameters()}


PARTS = {
    "roi_heads.classifier.": "classifier",
    "roi_heads.fc_reg.": "box regressor",
    "rpn.": "RPN",
    "roi_heads.mask_head.": "mask head",
}


def test_stage_2_trains_exactly_four_parts(model_of, batch):
    model = model_of("EBL + MFS")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    step(model, batch)
    optimizer.step()
    for name in trainable(model):
        assert name.startswith(tuple(PARTS)), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(tuple(PARTS))
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])
    assert {part for name in frozen for part in [name.rsplit(".", 2)[0]] if "head" in part} == {"roi_heads.box_head"}


def test_freezing_the_backbone_leaves_the_shared_fcs(make_model):
    model = make_model(freeze="backbone")
    assert all(not p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("backbone."))


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_weights(make_model):
    config = ModelConfig(
        weights="none", norm="frozen", frozen_stages=1, fpn_channels=16, fc_features=8, mask_channels=8
    )
    model = make_model(config=config).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    assert model.training and not any(norm.training for norm in norms)
    sum(x.mean() for x in model.features(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert norms[-1].weight.grad is not None and norms[0].weight.grad is None
    trained = make_model(config=dataclasses.replace(config, norm="batch")).train()
    assert all(norm.training for norm in trained.backbone.modules() if isinstance(norm, nn.BatchNorm2d))


def test_images_are_normalised_then_padded_with_zeros(make_model):
    model = make_model()
    images = [
        torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8),
        torch.randint(0, 256, (3, 64, 33), dtype=torch.uint8),
    ]
    padded, sizes, own = model.batch_images(images)
    assert padded.shape == (2, 3, 64, 96) and sizes == [(40, 70), (64, 33)] and own == [(64, 96), (64, 64)]
    for row, image, (height, width) in zip(padded, images, sizes, strict=True):
        for channel in range(3):
            expected = (image[channel].double() - PIXEL_MEAN[channel]) / PIXEL_STD[channel]
            torch.testing.assert_close(row[channel, :height, :width], expected.float())
        assert (row[:, height:] == 0).all() and (row[:, :, width:] == 0).all()


def test_rows_to_store_are_those_given(model_of, batch):
    """`store_rows` of a sample says which instances are stored; 16 boxes each."""
    model = model_of("MFS")
    batch[0]["store_rows"], batch[1]["store_rows"] = torch.tensor([2]), torch.tensor([1])
    model(batch)
    assert model.roi_heads.memory.bank.counts.tolist() == [0, 0, 0, 0, 16, 16]  # labels 5 and 4


def test_rows_to_store_are_chosen_where_none_are_given(make_model, make_sample):
    memory = MemoryConfig(enabled=True, capacity=200, instances_per_class=2)
    model = make_model("softmax", memory).train()
    boxes = [[4.0 + 8 * i, 4, 34 + 8 * i, 40] for i in range(5)]
    model([make_sample(boxes, [1, 1, 1, 1, 2])])
    assert model.roi_heads.memory.bank.counts.tolist() == [0, 32, 16, 0, 0, 0]


def test_filling_stores_and_warms_up_but_learns_nothing(model_of, batch):
    model = model_of("EBL + MFS")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch[0]["store_rows"], batch[1]["store_rows"] = torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)
    model.fill_memory(batch)
    assert model.roi_heads.memory.bank.counts.tolist() == [16, 0, 0, 0, 0, 16]
    assert (model.roi_heads.tracker.scores[[0, 3, 4, 5]] != 0.01).all()
    assert all(p.grad is None for p in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("roi_heads.memory.", "roi_heads.tracker.")) for name in changed)


@pytest.mark.parametrize(("images", "rows"), [(1, 16), (2, 32), (3, 48)])
def test_draws_per_image_do_not_depend_on_the_batch(model_of, make_sample, images, rows):
    model = model_of("MFS")
    drawn, forward_rows = [], model.roi_heads.forward_rows

    def spy(*arguments):
        result = forward_rows(*arguments)
        drawn.append(int(result.rois.from_memory_N.sum()))
        return result

    model.roi_heads.forward_rows = spy
    model([make_sample([[5, 5, 40, 40]], [1], seed=i) for i in range(images)])
    assert drawn == [rows]


def test_a_memory_survives_saving_and_loading(model_of, batch):
    model, copy = model_of("EBL + MFS"), model_of("EBL + MFS")
    model(batch)
    copy.load_state_dict(model.state_dict())
    results = []
    for one in (model, copy):
        torch.manual_seed(2)
        results.append(one(batch))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_class_without_instances_has_no_prior(small_stats):
    counts = small_stats.instance_counts.copy()
    counts[4] = 0
    stats = dataclasses.replace(small_stats, instance_counts=counts)
    with pytest.raises(UserError, match=r"class 4(.|\n)*indicator\.kind=score"):
        build_roi_heads(ModelConfig(backbone="tiny"), HeadConfig(name="equilibrium"), PRIOR, NO_MEMORY, stats)


class TestPrediction:
    """Evaluation mode."""

    @pytest.fixture
    def model(self, make_model):
        made = make_model()
        with torch.no_grad():  # scores that differ enough to detect something of every class
            made.roi_heads.classifier.fc_cls.weight.normal_(std=0.5)
        return made.eval()

    def test_detections_of_a_batch(self, model):
        images = [
            noise(64, 96),
            torch.randint(0, 256, (3, 60, 50), dtype=torch.uint8),
        ]
        scales, originals = [(0.5, 0.5), (1.0, 0.75)], [(128, 192), (80, 50)]
        for found, size in zip(model.detect(images, scales, originals), originals, strict=True):
            count = len(found["boxes"])
            assert 0 < count <= 300 and len(found["scores"]) == len(found["labels"]) == len(found["rles"]) == count
            assert (found["scores"].diff() <= 0).all() and (found["scores"] > 1e-4).all()
            assert found["boxes"].min() >= 0 and (found["boxes"].amax(0) <= torch.tensor(size[::-1] * 2) + 1e-3).all()
            assert set(found["labels"].tolist()) <= set(range(CLASSES))
            masks = coco_mask.decode([{"size": size, "counts": code} for code in found["rles"]])
            assert masks.shape == (*size, count)

    def test_masks_lie_in_their_boxes(self, model):
        image = noise(64, 96)
        found = model.detect([image], [(0.5, 0.5)], [(128, 192)])[0]
        masks = coco_mask.decode([{"size": (128, 192), "counts": code} for code in found["rles"]])
        for index, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
            rows, columns = masks[..., index].nonzero()
            if len(rows):
                assert columns.min() >= x1 - 2 and columns.max() <= x2 + 1
                assert rows.min() >= y1 - 2 and rows.max() <= y2 + 1

    def test_classes_that_are_not_evaluated_count_towards_the_cap(self, model):
        model.evaluation = EvalConfig(detections=20)
        image = noise(64, 96)
        every = model.detect([image], [(1.0, 1.0)], [(64, 96)])[0]
        allowed = torch.tensor([True, False, True, False, True, False])
        some = model.detect([image], [(1.0, 1.0)], [(64, 96)], [allowed])[0]
        kept = allowed[every["labels"]]
        assert len(every["labels"]) == 20 and 0 < int(kept.sum()) < 20
        assert torch.equal(some["boxes"], every["boxes"][kept]) and torch.equal(some["labels"], every["labels"][kept])
        assert some["rles"] == [code for code, keep in zip(every["rles"], kept.tolist(), strict=True) if keep]

    def test_uncapped_protocols_keep_all_of_the_classes_that_are_evaluated(self, model):
        allowed = torch.tensor([True, False, True, False, True, False])
        call = [noise(64, 96)], [(1.0, 1.0)], [(64, 96)]
        model.evaluation = EvalConfig(detections=10_000)
        every = model.detect(*call, [allowed])[0]
        model.evaluation = EvalConfig(detections=20)
        capped = model.detect(*call, [allowed])[0]
        model.evaluation = EvalConfig(detections=20, protocol=("lvis", "pool"))
        wide = model.detect(*call, [allowed])[0]
        assert 20 < len(wide["boxes"]) == len(every["boxes"]) and torch.equal(wide["boxes"], every["boxes"])
        within = wide["ranks"] < 20
        assert torch.equal(wide["boxes"][within], capped["boxes"]) and torch.equal(
            wide["ranks"][within], capped["ranks"]
        )
        assert torch.equal(within, every["ranks"] < 20) and wide["rles"] == every["rles"]
        assert "ranks" not in model.detect(*call)[0] and len(model.detect(*call)[0]["boxes"]) == 20

    def test_nothing_found(self, model):
        model.evaluation = EvalConfig(score_threshold=0.999999)
        image = torch.zeros(3, 64, 96, dtype=torch.uint8)
        found = model.detect([image], [(1.0, 1.0)], [(64, 96)])[0]
        assert found["boxes"].shape == (0, 4) and found["rles"] == []
        assert model([image])[0]["masks"].shape == (0, 64, 96)

    def test_a_call_with_images_gives_full_size_masks(self, model):
        image = noise(90, 120)
        found = model([image])[0]
        assert set(found) == {"boxes", "scores", "labels", "masks"}
        assert found["masks"].dtype == torch.bool and found["masks"].shape == (len(found["boxes"]), 90, 120)
        assert found["boxes"][:, 2].max() <= 120 + 1e-3 and found["boxes"][:, 3].max() <= 90 + 1e-3

    def test_scores_of_true_boxes_from_the_pass_of_detections(self, model, batch, empty):
        """As of a pass of their own, box by box; detections are what they are without."""
        samples = [*batch, empty]
        images, sizes = [s["image"] for s in samples], [s["size"] for s in samples]
        call = (images, [(1.0, 1.0)] * len(images), sizes)
        found = model.detect(*call, true_boxes=[(s["boxes"], s["labels"]) for s in samples])
        with torch.no_grad():
            maps, roi = model.features(model.batch_images(images)[0]), model.roi_heads
        for i, (one, alone, sample) in enumerate(zip(found, model.detect(*call), samples, strict=True)):
            assert all(torch.equal(one[key], alone[key]) for key in ("boxes", "scores", "labels"))
            own, best, best_scores = one["class_scores"]
            assert len(own) == len(best) == len(best_scores) == len(sample["labels"])
            for g, label in enumerate(sample["labels"].tolist()):
                with torch.no_grad():
                    pooled = roi.pool([x[i : i + 1] for x in maps], [sample["boxes"][g : g + 1]], 7)
                    logits = roi.classifier(roi.features_of(pooled))[0].double()
                scores = [math.exp(z) / sum(math.exp(y) for y in logits.tolist()) for z in logits.tolist()]
                assert own[g].item() == pytest.approx(scores[label], rel=1e-5)
                assert best[g].item() == max(range(CLASSES), key=scores.__getitem__)
                assert best_scores[g].item() == pytest.approx(max(scores[:-1]), rel=1e-5)

    def test_nothing_is_learned(self, model):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model([noise(64, 96)])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_crowd_is_neither_object_nor_background(model_of, batch):
    """With all of the image ignored no region is background; with none, the losses are those without the key."""
    model = model_of("baseline")
    plain = [loss.item() for loss in seeded(model, batch)]
    assert [loss.item() for loss in seeded(model, [{**s, "ignored": torch.zeros(0, 4)} for s in batch])] == plain
    everywhere = [{**s, "ignored": torch.tensor([[0.0, 0.0, s["size"][1], s["size"][0]]])} for s in batch]
    losses = seeded(model, everywhere)
    assert all(torch.isfinite(loss) for loss in losses) and [loss.item() for loss in losses] != plain
    truth = model.targets_of(everywhere[0])
    proposals = torch.rand(200, 4) * 40
    proposals[:, 2:] += proposals[:, :2] + 1
    regions = model.roi_heads.select(proposals, truth)
    assert not (regions.labels == model.roi_heads.num_classes).any() and (regions.labels >= 0).sum() >= 3
    usual = model.roi_heads.select(proposals, model.targets_of(batch[0]))
    assert (usual.labels == model.roi_heads.num_classes).any()


def seeded(model, samples):
    torch.manual_seed(4)
    return model(samples).values()


def test_a_model_that_only_predicts_has_the_same_weights_and_finds_the_same(make_model):
    """Channels last, and masks of a few regions at a time: results move by rounding."""
    model, image = make_model().eval(), noise(64, 80)
    with torch.no_grad():
        model.roi_heads.classifier.fc_cls.bias[-1] = -3  # objects everywhere
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (wanted,) = model([image])
    (found,) = model.only_predict()([image])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(found["labels"], wanted["labels"])
    for key in ("boxes", "scores"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-4)
    assert (found["masks"] != wanted["masks"]).float().mean() < 1e-3


def test_masks_of_a_few_regions_at_a_time_are_the_same(make_model, monkeypatch):
    model, image = make_model().eval(), noise(64, 80)
    (wanted,) = model([image])
    assert len(wanted["scores"]) > 20
    monkeypatch.setattr(mask_rcnn, "MASK_BYTES", 20 * 4 * 28**2 * model.roi_heads.mask_head.upsample.out_channels)
    (found,) = model([image])
    assert torch.equal(found["boxes"], wanted["boxes"])
    assert (found["masks"] != wanted["masks"]).float().mean() < 1e-3
