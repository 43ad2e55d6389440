"""SimCal (ECCV 2020), Sec. 4: two classifiers, the second calibrated on class-balanced proposals for the tail.

Two classifiers read the pooled features, 256 x 7 x 7 numbers a region: the original, a frozen copy of the detector's
shared FCs and last layer, and the calibrated one of the same layers. Logits (N, 2C + 2): original, then calibrated.

Bi-level sampling, level 1: sampler.name=bilevel draws classes, and an image for each. Level 2, of the batch's rows:
K+ = positives of the class that their image was drawn for, and all rows from the memory
K- = background rows at random, as many as K+ has rows, or all where there are fewer
L = mean over K+ and K- of -log softmax(z^cal_N)[y_N], over C + 1 classes; 0 where K+ is empty
Inference: p_c = softmax(z^cal)[c] where class c has fewer than head.simcal.threshold training instances, else
softmax(z)[c] of the original; nothing is normalised again. Boxes and masks are the detector's.
Initialisation: head.simcal.layers=3fc_ft copies the original; 3fc_rand, 2fc_rand draw all weights and biases from
U(-1/sqrt(D), 1/sqrt(D)), D inputs of the layer (torch's own).

State: none that training changes; `tail`, classes that take the calibrated score, is a buffer.

Differences from the paper / the released code:
- A row goes with the class its own image was drawn for; in the released code so only at 16 images a batch.
- Rows from a feature memory, which SimCal has not, are kept as positives.
- RoIs are sampled as in all of our training (512 an image, 128 positives) before level 2 chooses of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, linear
from loce.utils.classes import ClassStats
from loce.utils.distributed import mean_count

MODEL, OWN = "roi_heads.box_head.", "roi_heads.classifier."


class Layers(nn.Module):
    """Shared FCs with ReLU, two or one, and the last layer, named like the detector's own.

    kind: as head.simcal.layers; 3fc_ft starts like a detector's layers, whose values are copied into it.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        logits: int,
        kind: str = "3fc_ft",
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, width)
        self.fc2 = None if kind == "2fc_rand" else nn.Linear(width, width)
        self.fc_cls = nn.Linear(width, logits) if kind != "3fc_ft" else linear(width, logits)
        if kind == "3fc_ft":
            for layer in (self.fc1, self.fc2):
                assert layer is not None
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Pooled features (N, D) -> logits (N, C+1)."""
        x = F.relu(self.fc1(x_ND))
        return self.fc_cls(x if self.fc2 is None else F.relu(self.fc2(x)))


class SimCalHead(Head):
    """The detector's own classifier, frozen, and the calibrated one that takes its place for classes of the tail.

    `tail`: buffer (C,) bool, classes with fewer training instances than the threshold.
    """

    depth = 0
    tail: Tensor

    def __init__(
        self,
        in_features: int,
        stats: ClassStats,
        options: HeadConfig | None = None,
        width: int = 1024,
    ) -> None:
        super().__init__(in_features, stats, options, width)
        logits, simcal = self.num_classes + 1, self.options.simcal
        self.original = Layers(in_features, width, logits)
        self.calibrated = Layers(in_features, width, logits, simcal.layers)
        self.register_buffer("tail", torch.from_numpy(stats.instance_counts < simcal.threshold))
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "SimCalHead":
        """As of any module, but the original classifier never trains."""
        super().requires_grad_(requires_grad)
        self.original.requires_grad_(False)
        return self

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The detector's shared FCs and classifier become the original one and, with 3fc_ft, the calibrated one."""
        if any(name.startswith(f"{OWN}original.") for name in weights):
            return weights  # of a run with this head
        parts = ("original", "calibrated") if self.options.simcal.layers == "3fc_ft" else ("original",)
        adopted = {name: tensor for name, tensor in weights.items() if not name.startswith(OWN)}
        for prefix, layers in ((MODEL, ("fc1.", "fc2.")), (OWN, ("fc_cls.",))):
            for name, tensor in weights.items():
                layer = name.removeprefix(prefix)
                if name.startswith(prefix) and layer.startswith(layers):
                    adopted |= {f"{OWN}{part}.{layer}": tensor for part in parts}
        return adopted

    def forward(self, x_ND: Tensor) -> Tensor:
        """Pooled features (N, D), flattened -> logits (N, 2C+2): the original classifier's, the calibrated one's."""
        with torch.no_grad():
            original_NL = self.original(x_ND)
        return torch.cat([original_NL, self.calibrated(x_ND)], dim=1)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`: cross-entropy of the calibrated classifier, mean over the rows that level 2 keeps."""
        kept_N = self.second_level(rois)
        calibrated_NL = at_least_fp32(logits_NL[:, self.num_classes + 1 :])
        labels_N = rois.labels_N.clamp(min=0)  # ignored rows are never kept
        loss_N = F.cross_entropy(calibrated_NL, labels_N, reduction="none")
        return {"loss_cls": (loss_N * kept_N).sum() / mean_count(kept_N.sum())}

    def second_level(self, rois: RoIs) -> Tensor:
        """(N,) bool: rows of the class that their image was drawn for, and as many of the background, at random."""
        labels_N = rois.labels_N
        own_N = rois.from_memory_N
        if rois.sampled_class_N is not None:
            own_N = own_N | (rois.sampled_class_N == labels_N)
        positive_N = own_N & (labels_N >= 0) & (labels_N < self.num_classes)
        background_N = labels_N == self.num_classes
        random_N = torch.rand(labels_N.shape, generator=rois.generator, device=labels_N.device)
        random_N = random_N.masked_fill(~background_N, -1.0)
        rank_N = random_N.argsort(descending=True).argsort()  # background rows first, in random order
        return positive_N | (background_N & (rank_N < positive_N.sum()))

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits (N, 2C+2) -> scores (N, C), fp32: calibrated for the tail, else original."""
        original_NL, calibrated_NL = at_least_fp32(logits_NL).chunk(2, dim=1)
        chosen_NL = torch.where(F.pad(self.tail, (0, 1)), calibrated_NL.softmax(dim=1), original_NL.softmax(dim=1))
        return chosen_NL[:, : self.num_classes]
