"""Batches for the tests of single heads."""

import torch

from loce.heads import RoIs
from loce.utils.classes import IGNORED


def rois_of(labels, **others):
    """RoIs with these labels, none from the memory."""
    none = torch.full_like(labels, -1)
    return RoIs(labels, none, torch.zeros_like(labels, dtype=torch.bool), **others)


def random_case(rows, classes, logits, seed, scale=2.0):
    """Logits (rows, logits) in float64 and labels (rows,): classes, background and ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes + 1, (rows,), generator=generator)
    labels[3::7] = IGNORED
    return scale * torch.randn(rows, logits, generator=generator, dtype=torch.float64), labels
