"""The newer methods against numbers that their authors' own code gave (tests/fixtures/newer)."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from loce.adaptive_rates import AdaptiveRates, groups, initial_rates
from loce.config import FCBLOptions, FedLossOptions, GOLOptions, HeadConfig, IIFOptions, MemoryConfig, PCBOptions
from loce.gaussian_memory import GaussianMemory, confusion_probability
from loce.heads import HEADS, Head, RoIs, acsl
from loce.heads.fedloss import federated_loss
from loce.memory_bank import draw_classes
from loce.models.roi_heads import FirstStage, RoIHeads
from loce.utils.classes import ClassStats
from tests.fixtures.newer import TOLERANCE, Authors, rule
from tests.heads.cases import rois_of

S = rule.PUBLIC
C, D, N = S["C"], S["D"], S["N"]
CASES = ("mixed", "background", "foreground")


@pytest.fixture(scope="module")
def stats() -> ClassStats:
    return ClassStats(
        names=tuple(f"class {label}" for label in range(C)),
        category_ids=np.arange(C),
        image_counts=rule.image_counts(S),
        instance_counts=rule.instance_counts(S),
        groups=rule.groups(S),
        image_total=len(np.unique(rule.dataset(S)["image"])),
        file_images=S["images"],
    )


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def loss_and_gradient(head: Head, logits: np.ndarray, rois: RoIs) -> tuple[Tensor, Tensor]:
    z = tensor(logits).requires_grad_(True)
    loss = torch.stack(list(head.losses(z, rois).values())).sum()
    return loss, torch.autograd.grad(loss, z)[0]


def case(name: str, kind: str, **options: object) -> tuple[np.ndarray, Tensor]:
    """Logits (N, C + 1) and labels (N,) of one of the rule's cases."""
    return rule.logits(S, f"{name}/{kind}", C + 1), tensor(rule.labels(S, f"{name}/{kind}", kind, **options))


# Heads without state


@pytest.mark.parametrize("kind", CASES)
def test_ecm(stats: ClassStats, kind: str) -> None:
    """The released weights are rounded in float32: with exact ones 2e-3, with theirs the usual tolerance."""
    wanted, head = Authors("ecm"), HEADS["ecm"](D, stats)
    logits, labels = case("ecm", kind)
    margin = torch.from_numpy(wanted["margin_positive"] - wanted["margin_negative"])
    torch.testing.assert_close(head.margin_L, margin, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
    wanted.close("class_weight", head.weight_L, 2e-2)
    for tolerance in (2e-3, TOLERANCE):
        loss, gradient = loss_and_gradient(head, logits, rois_of(labels))
        wanted.close(f"{kind}/loss", loss, tolerance)
        wanted.close(f"{kind}/grad", gradient, tolerance)
        head.weight_L = tensor(wanted["class_weight"]).float()
    if kind == "mixed":
        wanted.close("mixed/scores", head.scores(tensor(logits)))
        with torch.no_grad():
            head.fc_cls.weight.copy_(tensor(rule.normal(S, "ecm/cosine/weight", C + 1, D, scale=0.1)))
            head.fc_cls.bias.copy_(tensor(rule.normal(S, "ecm/cosine/bias", C + 1, scale=0.1)))
        wanted.close("cosine/logits", head(tensor(rule.features(S, "ecm/cosine", rows=16))))


@pytest.mark.parametrize("keep", [8, 14])
@pytest.mark.parametrize("kind", [*CASES, "few"])
def test_fedloss(stats: ClassStats, keep: int, kind: str) -> None:
    wanted, key = Authors("fedloss"), f"keep{keep}/{kind}"
    never = [c for c in range(C) if c % 5] if kind == "few" else []
    labels = tensor(rule.labels(S, f"fedloss/{kind}", "mixed" if kind == "few" else kind, never=never))
    logits = tensor(rule.logits(S, f"fedloss/{kind}", C + 1)[:, :C]).requires_grad_(True)
    taking_part = torch.zeros(C, dtype=torch.bool)
    taking_part[[int(c) for c in wanted[f"{key}/taken"] if c < C]] = True
    loss = federated_loss(logits, rois_of(labels), taking_part)
    wanted.close(f"{key}/loss", loss)
    wanted.close(f"{key}/grad", torch.autograd.grad(loss, logits)[0])
    head = HEADS["fedloss"](D, stats, HeadConfig(fedloss=FedLossOptions(classes=keep)))
    generator = torch.Generator().manual_seed(0)
    if f"{key}/drawn" not in wanted:  # the batch has classes enough
        assert torch.equal(head.draw(labels, generator), taking_part)
    if f"{key}/drawn_share_of_20000" in wanted:
        share = sum(head.draw(labels, generator).double() for _ in range(20_000)) / 20_000
        wanted.close(f"{key}/drawn_share_of_20000", share, 0.02)


@pytest.mark.parametrize("activation", ["gumbel", "sigmoid"])
@pytest.mark.parametrize("kind", [*CASES, "no_tail_row"])
def test_gol_and_droploss(stats: ClassStats, monkeypatch: pytest.MonkeyPatch, activation: str, kind: str) -> None:
    """Where the own logit is below -3.3 the released gradient vanishes (see the head's page): left out, seldom."""
    wanted = Authors("gol")
    options = GOLOptions(activation=activation, threshold=float(wanted["lambda"]))  # type: ignore[arg-type]
    head = HEADS["gol"](D, stats, HeadConfig(gol=options))
    assert head.tail_C.tolist() == wanted["tail"].astype(bool).tolist()
    never = np.flatnonzero(wanted["tail"]).tolist() if kind == "no_tail_row" else []
    labels = tensor(rule.labels(S, f"gol/{kind}", "mixed" if never else kind, never=never))
    logits, uniform = rule.logits(S, f"gol/{kind}", C), tensor(rule.uniform(S, f"gol/{kind}/uniform", N, C))
    weights = np.unpackbits(wanted[f"{kind}/weights"])[: N * C].reshape(N, C)
    assert torch.equal(head.weights(labels, uniform), tensor(weights).bool())
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    loss, gradient = loss_and_gradient(head, logits, rois_of(labels))
    tolerance = 1e-4 if activation == "gumbel" else TOLERANCE
    wanted.close(f"{activation}/{kind}/loss", loss, tolerance)
    vanished = (labels[:, None] == torch.arange(C)) & (tensor(logits) < -3.3)
    assert vanished.sum() <= 5
    if activation == "gumbel":
        gradient = torch.where(vanished, tensor(wanted[f"gumbel/{kind}/grad"]), gradient)
    wanted.close(f"{activation}/{kind}/grad", gradient, tolerance)
    if kind == "mixed":
        wanted.close(f"{activation}/scores", head.scores(tensor(logits)))


@pytest.mark.parametrize("kind", [*CASES, "ignored"])
def test_gumbel(stats: ClassStats, kind: str) -> None:
    """The loss where the released cut at 20 does not bind."""
    wanted, name = Authors("gol"), f"gumbel/{kind}"
    labels = rule.labels(S, name, "mixed" if kind == "ignored" else kind)
    labels = rule.ignore(S, name, labels) if kind == "ignored" else labels
    logits = 0.3 * rule.logits(S, name, C + 1) - 2
    own = np.flatnonzero(labels >= 0)
    logits[own, labels[own]] += 2.5
    head = HEADS["gumbel"](D, stats)
    loss, gradient = loss_and_gradient(head, logits.astype(np.float32), rois_of(tensor(labels)))
    wanted.close(f"gumbel_ce/{kind}/small/loss", loss, 1e-4)
    wanted.close(f"gumbel_ce/{kind}/small/grad", gradient, 1e-4)


@pytest.mark.parametrize(
    ("kind", "labels_of", "rows"),
    [
        ("mixed", "mixed", 640),
        ("background", "background", 640),
        ("foreground", "foreground", N),
        ("small", "mixed", 64),
        ("few_background", "mixed", 24),
    ],
)
def test_acsl(stats: ClassStats, monkeypatch: pytest.MonkeyPatch, kind: str, labels_of: str, rows: int) -> None:
    wanted, head = Authors("acsl"), HEADS["acsl"](D, stats)
    labels = tensor(rule.labels(S, f"acsl/{kind}", labels_of, rows=rows))
    logits = rule.logits(S, f"acsl/{kind}", C + 1, rows=rows)
    drawn = {}
    for group, share in (("common", 0.1), ("rare", 0.01)):
        chosen = torch.zeros(rows, dtype=torch.bool)
        chosen[wanted.get(f"{kind}/rows_{group}", np.empty(0)).astype(int)] = True
        assert acsl.draw_rows(labels == C, share, None).sum() == chosen.sum()
        drawn[share] = chosen
    weights = np.unpackbits(wanted[f"{kind}/weights"])[: rows * (C + 1)].reshape(rows, C + 1)
    assert torch.equal(head.weights(tensor(logits), labels, drawn[0.1], drawn[0.01]), tensor(weights).bool())
    monkeypatch.setattr(acsl, "draw_rows", lambda _, share, __: drawn[share])
    loss, gradient = loss_and_gradient(head, logits, rois_of(labels))
    wanted.close(f"{kind}/loss", loss)
    wanted.close(f"{kind}/grad" if f"{kind}/grad" in wanted else f"{kind}/grad_head", gradient)


VARIANTS = ("raw", "smooth", "prob", "base10_obj")


@pytest.mark.parametrize("variant", [*VARIANTS, "normit", "gombit", "base2", "base10", "normit_obj", "smooth_obj"])
def test_iif(stats: ClassStats, variant: str) -> None:
    wanted = Authors("iif")
    counts = "instances" if variant.endswith("_obj") else "images"
    options = IIFOptions(variant=variant.removesuffix("_obj"), counts=counts)  # type: ignore[arg-type]
    head = HEADS["iif"](D, stats, HeadConfig(iif=options))
    wanted.close(f"{variant}/weights", head.weight_C)
    for kind in (*CASES, "ignored") if variant in VARIANTS else ():
        labels = rule.labels(S, f"iif/{kind}", "mixed" if kind == "ignored" else kind)
        labels = rule.ignore(S, "iif/ignored", labels) if kind == "ignored" else labels
        logits = rule.logits(S, f"iif/{kind}", C + 1, scale=1)
        loss, gradient = loss_and_gradient(head, logits, rois_of(tensor(labels)))
        wanted.close(f"{variant}/{kind}/loss", loss)
        if f"{variant}/{kind}/grad" in wanted:
            wanted.close(f"{variant}/{kind}/grad", gradient)
        if kind == "mixed":
            key = f"{variant}/scores"
            wanted.close(key if key in wanted else f"{key}_head", head.scores(tensor(logits)))


# DisAlign: the loss, then four steps of gradient descent


@pytest.mark.parametrize("kind", [*CASES, "ignored"])
def test_disalign_loss(stats: ClassStats, kind: str) -> None:
    wanted, head = Authors("disalign"), HEADS["disalign"](D, stats)
    wanted.close("class_weight/rho0.8", head.class_weight_L)
    labels = rule.labels(S, f"disalign/{kind}", "mixed" if kind == "ignored" else kind)
    labels = rule.ignore(S, "disalign/ignored", labels) if kind == "ignored" else labels
    logits = rule.logits(S, f"disalign/{kind}", C + 1)
    loss, gradient = loss_and_gradient(head, logits, rois_of(tensor(labels)))
    wanted.close(f"loss/{kind}/loss", loss)
    wanted.close(f"loss/{kind}/grad", gradient)


def test_disalign_training(stats: ClassStats) -> None:
    wanted, head = Authors("disalign"), HEADS["disalign"](D, stats)
    head.fc_cls.weight.copy_(tensor(rule.normal(S, "disalign/weight", C + 1, D, scale=0.4)))
    head.fc_cls.bias.copy_(tensor(rule.normal(S, "disalign/bias", C + 1, scale=0.5)))
    gate = head.confidence
    gate.weight.data.copy_(tensor(rule.normal(S, "disalign/confidence", 1, D, scale=0.3)))
    gate.bias.data.fill_(-0.2)
    trained = {"scale": head.scale, "bias": head.shift, "confidence_weight": gate.weight, "confidence_bias": gate.bias}
    for step in range(4):
        name = f"disalign/train/{step}"
        labels = rule.labels(S, name, "background" if step == 2 else "mixed")
        logits = head(tensor(rule.class_features(S, name, labels)))
        loss = head.losses(logits, rois_of(tensor(labels)))["loss_cls"]
        wanted.close(f"linear/step{step}/loss", loss)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        for (key, parameter), gradient in zip(trained.items(), gradients, strict=True):
            wanted.close(f"linear/step{step}/{key}_grad", gradient)
            parameter.data -= 0.5 * gradient
    wanted.close("linear/after/logits", head(tensor(rule.features(S, "disalign/test"))))


# Heads with state, step by step


def test_pcb(stats: ClassStats) -> None:
    wanted, head, rows = Authors("pcb"), HEADS["pcb"](D, stats), 160
    for step in range(6):
        name, never = f"pcb/{step}", [rule.rarest(S)] if step == 0 else []
        labels = rule.labels(S, name, "mixed" if step else "foreground", rows=rows, never=never)
        if step == 1:
            labels[:C] = np.arange(C)  # from here on every class has been seen
        logits = rule.logits(S, name, C + 1, rows=rows)
        loss, gradient = loss_and_gradient(head, logits, rois_of(tensor(labels), progress=17 / 24))
        wanted.close(f"step{step}/loss", loss)
        wanted.close(f"step{step}/confusion", head.confusion)
        assert head.seen.tolist() == wanted[f"step{step}/seen"].tolist()
        if f"step{step}/grad" in wanted:
            wanted.close(f"step{step}/grad", gradient)
    labels = tensor(rule.labels(S, "pcb/refine", "mixed", rows=rows))
    logits = rule.logits(S, "pcb/refine", C + 1, rows=rows)
    for refinement in range(3):
        again = copy.deepcopy(head)
        again.options = HeadConfig(pcb=PCBOptions(alpha=0.4 * refinement / 2))
        wanted.close(f"refine{refinement}/loss", loss_and_gradient(again, logits, rois_of(labels, progress=1.0))[0])


def test_pcb_waits_for_the_epoch_and_for_every_class(stats: ClassStats) -> None:
    wanted = Authors("pcb")
    for key, names, progress, steps in (("never", "pcb/never", 1.0, 3), ("early", "pcb", 15 / 24, 2)):
        head = HEADS["pcb"](D, stats)
        for step in range(steps):
            never = [rule.rarest(S)] if key == "never" or step == 0 else []
            kind = "foreground" if key == "early" and step == 0 else "mixed"
            labels = rule.labels(S, f"{names}/{step}", kind, rows=160, never=never)
            if key == "early" and step == 1:
                labels[:C] = np.arange(C)
            logits = rule.logits(S, f"{names}/{step}", C + 1, rows=160)
            loss, _ = loss_and_gradient(head, logits, rois_of(tensor(labels), progress=progress))
            wanted.close(f"{key}/step{step}/loss", loss)


@pytest.mark.parametrize("mode", ["plain", "reweight"])
def test_fcbl(stats: ClassStats, mode: str) -> None:
    wanted = Authors("bacl")
    head = HEADS["fcbl"](D, stats, HeadConfig(fcbl=FCBLOptions(reweight=mode == "reweight")))
    for step in range(5):
        kind = {2: "background", 3: "foreground"}.get(step, "mixed")
        labels = tensor(rule.labels(S, f"bacl/{step}", kind, never=[rule.rarest(S)]))
        loss, gradient = loss_and_gradient(head, rule.logits(S, f"bacl/{step}", C + 1), rois_of(labels))
        wanted.close(f"fcbl/{mode}/step{step}/loss", loss)
        wanted.close(f"fcbl/{mode}/step{step}/grad", gradient)
        if mode == "plain":
            wanted.close(f"fcbl/plain/step{step}/diagonal", head.confusion().diagonal())
            assert head.rows.tolist() == wanted[f"fcbl/plain/step{step}/rows_seen"].tolist()
    wanted.close("fcbl/confusion", head.confusion())


# Gaussian memories: what is stored, drawn, lost and learned, step by step


def classifier(stats: ClassStats, name: str, head: str) -> Head:
    """A head with the weight and bias of the rule."""
    made = HEADS[head](D, stats)
    with torch.no_grad():
        made.fc_cls.weight.copy_(tensor(rule.normal(S, f"{name}/weight", C + 1, D, scale=0.3)))
        made.fc_cls.bias.copy_(tensor(rule.normal(S, f"{name}/bias", C + 1, scale=0.5)))
    return made


def own_and_drawn(labels: Tensor, drawn: Tensor) -> RoIs:
    """RoIs of a batch's own rows and, after them, of rows from the memory."""
    rois = rois_of(torch.cat([labels, drawn]))
    rois.from_memory_N[len(labels) :] = True
    return rois


def gradients(head: Head, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [head.fc_cls.weight, head.fc_cls.bias])


def test_bacl_feature_hallucination(stats: ClassStats) -> None:
    """Classes are drawn of all here, as the authors do; of the batch only those with a memory give vectors."""
    wanted, memory, head = Authors("bacl"), GaussianMemory(C, (D,)), classifier(stats, "fhm", "fcbl")
    for step in range(5):
        name, key, never = f"fhm/{step}", f"fhm/step{step}", [rule.rarest(S)]
        labels = rule.labels(S, name, "background" if step == 3 else "mixed", never=never)
        features = rule.class_features(S, name, labels)
        if step != 3:
            own = np.repeat(rule.labels(S, f"{name}/generated", "foreground", rows=5, never=never), 16)
            memory.enqueue(tensor(rule.class_features(S, f"{name}/generated", own)), tensor(own))

        uniform = tensor(np.sort(rule.stream(S, f"{name}/classes").rand(8)))
        everyone = torch.ones(C, dtype=torch.long)
        drawn_K = draw_classes(confusion_probability(head.own_share().double(), everyone), uniform)
        assert drawn_K.tolist() == wanted[f"{key}/classes"].tolist()
        stored = drawn_K[memory.used[drawn_K]]
        noise = tensor(rule.normal(S, f"{name}/noise", 8, 12, D))[: len(stored)]
        vectors, drawn, _ = memory.rows_of(stored, noise)
        assert drawn.tolist() == wanted[f"{key}/drawn_labels"].tolist()
        if f"{key}/drawn_features_head" in wanted:
            wanted.close(f"{key}/drawn_features_head", vectors)

        logits = head(torch.cat([tensor(features), vectors]))
        loss = head.losses(logits, own_and_drawn(tensor(labels), drawn))["loss_cls"]
        wanted.close(f"{key}/loss", loss)
        for found, what in zip(gradients(head, loss), ("weight_grad", "bias_grad"), strict=True):
            wanted.close(f"{key}/{what}", found)
    wanted.close("fhm/mean", memory.mean)
    wanted.close("fhm/variance", memory.variance)
    assert memory.used.tolist() == wanted["fhm/used"].astype(bool).tolist()
    wanted.close("fhm/diagonal", head.own_share())


def test_fasa(stats: ClassStats) -> None:
    """Six steps, then four epochs of rates that follow held-out losses, grouped as the authors do and as they meant."""
    wanted, memory, head = Authors("fasa"), GaussianMemory(C, (D,)), classifier(stats, "fasa", "softmax")
    roi = SimpleNamespace(memory=SimpleNamespace(config=MemoryConfig(loss_weight=0.1)), classifier=head)
    rates = AdaptiveRates(stats.instance_counts)
    wanted.close("probability/initial", rates.rates)
    for power, scale in ((0.5, 1), (1, 10)):
        wanted.close(f"probability/power{power}_scale{scale}", initial_rates(stats.instance_counts, power, scale))
    rates.rates.copy_(tensor(wanted["probability/start_of_steps"]))
    for step in range(6):
        name, kind = f"fasa/{step}", {3: "background", 4: "foreground"}.get(step, "mixed")
        labels = rule.labels(S, name, kind, never=[rule.rarest(S)])
        features = tensor(rule.class_features(S, name, labels))
        memory.enqueue(features, tensor(labels))
        stored = memory.counts * (step > 0)  # nothing is drawn in the first epoch
        drawn_K = rates.draw(tensor(rule.uniform(S, f"{name}/uniform", C)), stored)
        noise = tensor(rule.normal(S, f"{name}/noise", C, D))[drawn_K][:, None]
        vectors, drawn, _ = memory.rows_of(drawn_K, noise)
        assert drawn.tolist() == wanted[f"step{step}/drawn_labels"].tolist()
        if f"step{step}/drawn_features_head" in wanted:
            wanted.close(f"step{step}/drawn_features_head", vectors)

        logits, rois = head(torch.cat([features, vectors])), own_and_drawn(tensor(labels), drawn)
        parts = [rois.part(slice(N), torch.tensor(N)), rois.part(slice(N, None), torch.tensor(max(len(drawn), 1)))]
        wanted.close(f"step{step}/plain_cross_entropy", head.losses(logits[:N], parts[0])["loss_cls"])
        loss = RoIHeads._losses_apart(roi, logits, *parts)["loss_cls"]
        wanted.close(f"step{step}/loss", loss)
        for found, what in zip(gradients(head, loss), ("weight_grad", "bias_grad"), strict=True):
            wanted.close(f"step{step}/{what}", found)
        if step in (0, 5):
            wanted.close(f"step{step}/mean", memory.mean)
            wanted.close(f"step{step}/variance", memory.variance)
            assert memory.used.tolist() == wanted[f"step{step}/used"].astype(bool).tolist()

    assert groups(memory.mean.numpy()).tolist() == wanted["groups_with_the_sign_corrected"].tolist()
    rates, weight = AdaptiveRates(stats.instance_counts), head.fc_cls.weight.detach().clone()
    for epoch in range(4):
        factor = 0.4 + 1.2 * tensor(rule.uniform(S, f"fasa/val/factor/{epoch}", C + 1, 1))
        head.fc_cls.weight.data = weight * factor
        total = torch.zeros(C + 1)
        for batch in range(3):
            labels = rule.labels(S, f"fasa/val/{batch}")
            total += held_out(head, tensor(rule.class_features(S, f"fasa/val/{batch}", labels)), tensor(labels))
        wanted.close(f"epoch{epoch}/sums", total[:C])
        losses = (total[:C] / total[C]).numpy()
        wanted.close(f"epoch{epoch}/mean_loss", losses)
        group = groups(memory.mean.numpy(), released=True)
        assert group.tolist() == wanted[f"epoch{epoch}/groups"].tolist()
        rates.adapt(losses, group, epoch + 1)
        wanted.close(f"epoch{epoch}/probability", rates.rates)


def held_out(head: Head, features: Tensor, labels: Tensor) -> Tensor:
    """`RoIHeads.held_out_losses` of regions with these features."""
    regions, shown = SimpleNamespace(boxes=None, labels=labels), SimpleNamespace(store_rows=[0])
    roi = SimpleNamespace(
        classifier=head,
        num_classes=C,
        select=lambda *_: regions,
        pool=lambda *_: features,
        features_of=lambda x: x,
    )
    return RoIHeads.held_out_losses(roi, FirstStage([], [None], [shown], []))
