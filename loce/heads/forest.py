"""Forest R-CNN (ACM MM 2020), Sec. 3: fine classifier, weighted by the parent classifiers of several class trees.

A tree t puts every class c under a parent t(c); the background is a parent of its own in each tree.
z (N, C+1): fine logits; u_t (N, P_t+1): logits of tree t's parents, background last
L = sum over rows of [-log softmax(z_N)[y_N] - sum_t log softmax(u_tN)[t(y_N)]] / R   each term is a loss of its own
Inference: a_c = mean over t of softmax(u_t)[t(c)];  p_c = a_c e^{z_c} / sum_j a_j e^{z_j}, background among j; in logs
Every classifier reads the features after the first shared FC through a layer and a ReLU of its own, D numbers wide; the
parents' are cut off from the gradient, so that of these losses only the fine one trains the trunk. The second shared FC
serves box regression alone. Initialisation: layers Xavier, classifiers N(0, 0.01), biases 0. Logits: z, then u_t in the
order visual, geometrical, lexical. Rows from the memory are rows like others; stored are features after the first FC.

State: none that training changes; `tree_visual`, `tree_geometrical`, `tree_lexical` (C,), the parent of each class, are
buffers. They come from the file head.forest.trees when a training starts, and from its checkpoints later.

Differences from the paper / the released code:
- Trees are built for any data set by scripts/build_forest.py; how the released ones were made is not in their code.
- Masks stay class-specific; the released code predicts one mask for each geometrical parent.
- p is computed in logs; the released exp without a shift overflows in half precision.
- 1000 proposals an image in training, as all methods here have; the released configs keep 2000.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loce.config import HeadConfig
from loce.heads.base import Head, RoIs, at_least_fp32, cross_entropy, linear
from loce.heads.forest_trees import read_trees
from loce.utils.classes import IGNORED, ClassStats
from loce.utils.errors import UserError

OWN = "roi_heads.classifier."
TREES = ("visual", "geometrical", "lexical")


def tree_sizes(options: HeadConfig) -> dict[str, int]:
    """Tree -> number of its parents, of the trees that are used."""
    return {name: count for name in TREES if (count := getattr(options.forest, name))}


class Branch(nn.Module):
    """A layer with ReLU, as wide as its input, and a classifier."""

    def __init__(self, features: int, logits: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, features)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.fc_cls = linear(features, logits)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, L)."""
        return self.fc_cls(F.relu(self.fc(x_ND)))


class ForestHead(Head):
    """The fine classifier and one for the parents of each tree; `sizes`: tree -> P_t, of the trees that are used.

    Until a file or a checkpoint gives the trees, neighbouring labels share a parent.
    """

    depth = 1

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        self.sizes = tree_sizes(self.options)
        self.fine = Branch(in_features, self.num_classes + 1)
        self.parents = nn.ModuleDict({name: Branch(in_features, count + 1) for name, count in self.sizes.items()})
        for name, count in self.sizes.items():
            self.register_buffer(f"tree_{name}", torch.arange(self.num_classes) * count // self.num_classes)

    @classmethod
    def from_files(cls, options: HeadConfig, annotations: Path | str, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The parents (C,) of the trees that are used, from head.forest.trees."""
        trees = read_trees(Path(options.forest.trees), annotations, names, tree_sizes(options))
        return {f"tree_{name}": parents for name, parents in trees.items()}

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are; UserError where they belong to other trees, whose parents mean something else."""
        for name in self.sizes:
            theirs, ours = weights.get(f"{OWN}tree_{name}"), self.get_buffer(f"tree_{name}")
            if theirs is not None and not torch.equal(theirs, ours.cpu()):
                raise UserError(
                    f"train.init has another {name} tree than head.forest.trees; give the trees that it was trained "
                    "with, or set head.reset=true to start the classifiers anew"
                )
        return weights

    def forward(self, x_ND: Tensor) -> Tensor:
        """Features after the first shared FC (N, D) -> logits (N, C+1 + sum of P_t+1)."""
        parents = [self.parents[name](x_ND.detach()) for name in self.sizes]
        return torch.cat([self.fine(x_ND), *parents], dim=1)

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls` of the fine classes and `loss_visual`, ... of the parents, over the rows that take part."""
        fine_NL, parents = self._split(logits_NL)
        losses = {"loss_cls": cross_entropy(fine_NL, rois.labels_N, rois.count)}
        for name, parent_NP in parents.items():
            own_N = self._parent_of(name)[rois.labels_N.clamp(min=0)]
            own_N = torch.where(rois.labels_N == IGNORED, IGNORED, own_N)
            losses[f"loss_{name}"] = cross_entropy(parent_NP, own_N, rois.count)
        return losses

    def scores(self, logits_NL: Tensor) -> Tensor:
        """Logits -> scores (N, C), fp32: the fine softmax, each class weighed by its parents' probabilities."""
        fine_NL, parents = self._split(logits_NL)
        logs = [u_NP.log_softmax(dim=1)[:, self._parent_of(name)] for name, u_NP in parents.items()]
        weighed_NL = fine_NL + torch.stack(logs).logsumexp(dim=0)  # the mean over trees cancels to their sum
        return weighed_NL.softmax(dim=1)[:, : self.num_classes]

    def _split(self, logits_NL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Fine logits, and those of each tree's parents."""
        widths = [self.num_classes + 1, *(count + 1 for count in self.sizes.values())]
        fine_NL, *parents = at_least_fp32(logits_NL).split(widths, dim=1)
        return fine_NL, dict(zip(self.sizes, parents, strict=True))

    def _parent_of(self, name: str) -> Tensor:
        """(C+1,) long: the parent of each class; the background is its own, the last."""
        return F.pad(self.get_buffer(f"tree_{name}"), (0, 1), value=self.sizes[name])
