"""Pairwise Class Balance loss (PCB, CVPR 2022, arXiv 2201.02784), single step: confused pairs share their targets.

    state: M (C, C), M_y a running mean (momentum 0.99) of softmax(z)[:C], over foreground logits, of rows of class y
    foreground row: (1 - alpha) CE(z, y) + alpha KL(tau || softmax(z)),  tau_j = M_jy / sum_i M_iy,  tau_background = 0
    background row: CE.  loss_cls: sum over rows / rows that take part

tau gives the classes that are mistaken for y a share of y's target. The losses are plain cross-entropy until 2/3 of the
training is done (epoch 17 of 24) and every class has been seen. Scores: softmax(z)[:C]. Initialisation: weights N(0,
0.01), bias 0. Rows from the memory are rows like others.

State: `confusion`, M, and `seen`, rows of each class so far; rows of all ranks are taken together in every step.

Differences from the paper / the released code:
- Of the published model, with three refinement passes through one box head, this is the loss of its last pass.
- The released classifier starts from Xavier's normal values (std 0.03 on LVIS), a side effect of its framework.
- A rank without objects takes part in the sum over ranks (the released one leaves it out, and the others wait).
- A class that never appears keeps the loss from starting, as released: `head.pcb.wait_for_all=false` starts without.
- A loss computed in evaluation mode changes no state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loce.config import HeadConfig
from loce.heads.base import RoIs, at_least_fp32
from loce.heads.confusion import class_softmax_sums
from loce.heads.softmax import SoftmaxHead
from loce.utils.classes import IGNORED, ClassStats


class PCBHead(SoftmaxHead):
    """The softmax head; buffers `confusion` (C, C) fp32, rows are true classes, and `seen` (C,) long."""

    confusion: Tensor
    seen: Tensor

    def __init__(self, in_features: int, stats: ClassStats, options: HeadConfig | None = None) -> None:
        super().__init__(in_features, stats, options)
        classes = self.num_classes
        self.register_buffer("confusion", torch.zeros(classes, classes))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.long))

    def losses(self, logits_NL: Tensor, rois: RoIs) -> dict[str, Tensor]:
        """`loss_cls`; in training mode the rows enter the state first, and every rank must call."""
        z_NL, labels_N, section = at_least_fp32(logits_NL), rois.labels_N, self.options.pcb
        if self.training:
            self._update(z_NL.detach(), labels_N)
        log_p_NL = z_NL.log_softmax(dim=1)
        entropy_N = F.nll_loss(log_p_NL, labels_N, ignore_index=IGNORED, reduction="none")
        ready = (self.seen > 0).all() | (not section.wait_for_all)
        active = ready & (rois.progress >= section.start)
        foreground_N = (labels_N >= 0) & (labels_N < self.num_classes)
        alpha_N = section.alpha * (foreground_N & active).to(z_NL.dtype)
        # KL(tau || p) = sum_j tau_j (log tau_j - log p_j); xlogy: 0 log 0 = 0.
        tau_NC = self.targets().to(z_NL.dtype)[torch.where(foreground_N, labels_N, 0)]
        divergence_N = (torch.xlogy(tau_NC, tau_NC) - tau_NC * log_p_NL[:, :-1]).sum(dim=1)
        return {"loss_cls": ((1 - alpha_N) * entropy_N + alpha_N * divergence_N).sum() / rois.count}

    def targets(self) -> Tensor:
        """(C, C): row y is tau of class y, M_jy / sum_i M_iy; its own class alone while no class was taken for it."""
        columns_CC = self.confusion.t()
        total_C1 = columns_CC.sum(dim=1, keepdim=True)
        own_CC = torch.eye(self.num_classes, device=columns_CC.device)
        return torch.where(total_C1 > 0, columns_CC / total_C1.clamp(min=1e-30), own_CC)

    def own_share(self) -> Tensor:
        """(C,) M_cc."""
        return self.confusion.diagonal()

    @torch.no_grad()
    def _update(self, z_NL: Tensor, labels_N: Tensor) -> None:
        sums_CC, counts_C = class_softmax_sums(z_NL[:, :-1], labels_N)
        momentum, seen_C1 = self.options.pcb.momentum, (counts_C > 0)[:, None]
        mean_CC = sums_CC / counts_C.clamp(min=1)[:, None]
        moved_CC = momentum * self.confusion + (1 - momentum) * mean_CC.to(self.confusion)
        moved_CC = moved_CC / moved_CC.sum(dim=1, keepdim=True).clamp(min=1e-30)
        self.confusion = torch.where(seen_C1, moved_CC, self.confusion)
        self.seen = self.seen + counts_C
