"""What a fine-tuning minimises, and what it counts as right.

Shapes: B batch, C classes; labels int64 (B,), or bool (B, C) where pictures have several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Criterion:
    """Cross-entropy, summed over pictures; where they have several labels, the mean over the classes of
    the binary ones."""

    smoothing: float
    weights: Tensor | None  # (C,)
    several: bool

    def __call__(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """logits: (B, C); wanted: (B,) labels, or (B, C) shares or 0s and 1s. Returns ()."""
        if self.several:
            smoothed = wanted * (1 - self.smoothing) + self.smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(1).sum()
        return F.cross_entropy(
            logits, wanted, self.weights, reduction="sum", label_smoothing=self.smoothing
        )


def class_weights(counts: np.ndarray) -> Tensor:
    """(C,) float32 from a class's pictures (C,): one over their root; 1 in the mean over the pictures."""
    counts = np.maximum(counts, 1)
    weights = counts**-0.5
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def right_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of (B,) labels are named; of (B, C) answers the shares that are right, summed."""
    if labels.ndim == 2:
        return ((logits > 0) == labels).float().mean(dim=1).sum()
    return (logits.argmax(dim=-1) == labels).sum()
