"""Numbers that say how well it goes: accuracy, confusion, codebook use, reconstruction.

NumPy only; arrays in, floats out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of rows of (n, C) logits whose label is among the k largest; ties count by class order."""
    k = min(k, logits.shape[1])
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64 counts; row = true class, column = predicted."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


class CodebookUse(NamedTuple):
    """How much of a vocabulary is in use."""

    live: float  # share of codes used at least once
    perplexity: float  # exp of the entropy: as many equally used codes would look like this


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """Of the counts (V,) of each code. Judge `live` on many times V tokens."""
    total = counts.sum()
    if total == 0:
        return CodebookUse(0.0, 0.0)
    share = counts[counts > 0] / total
    entropy = -float((share * np.log(share)).sum())
    return CodebookUse(float((counts > 0).mean()), math.exp(entropy))


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))
