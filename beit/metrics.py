"""Numbers that say how well it goes: accuracy, confusion, calibration, codebook use, reconstruction.

NumPy only; arrays in, floats out. n pictures, C classes; logits (n, C), labels int64 (n,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def top_k_right(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """(n,) bool: is the label among the k largest of (n, C) logits? Ties count by class order."""
    k = min(k, logits.shape[1])
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(axis=1)


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of pictures whose label is among the k largest logits."""
    return float(top_k_right(logits, labels, k).mean())


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64 counts; row = true class, column = predicted."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def most_confused(confusion: np.ndarray, most: int = 10) -> list[tuple[int, int, int]]:
    """(true class, answer, how often) of the commonest mistakes in a confusion matrix."""
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def bootstrap_interval(right: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of (n,) bools: 2.5 and 97.5 % of its resamples.

    Drawing n of n answers with replacement counts the right ones of a binomial, so that is drawn. Seeded.
    Where all are right, so are all resamples: of n pictures then say that at most 3 / n may be wrong.
    """
    draws = np.random.default_rng(0).binomial(len(right), right.mean(), resamples) / len(right)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, C) float64 logarithms of the probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


class Calibration(NamedTuple):
    """Confidence against accuracy, in bins of confidence of equal width; empty ones have 0, 0, 0."""

    counts: np.ndarray  # (bins,) int64
    confidence: np.ndarray  # (bins,) mean in the bin
    accuracy: np.ndarray  # (bins,)

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |accuracy - confidence|, bins by their counts."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / self.counts.sum())


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Calibration:
    """Of the likeliest class's probability, in bins (0, 1/15], (1/15, 2/15] ... (Guo et al., 2017)."""
    confidence = np.exp(log_softmax(logits).max(axis=1))
    right = logits.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, values, minlength=bins) for values in (confidence, right))
    return Calibration(counts, *(total / np.maximum(counts, 1) for total in sums))


def real_accuracy(predicted: np.ndarray, accepted: Sequence[Sequence[int]]) -> float:
    """Share of answers (n,) that are among those accepted for the picture; ones with none are left out.

    The rule of ImageNet's reassessed labels (Beyer et al., 2020).
    """
    pairs = zip(predicted.tolist(), accepted, strict=True)
    right = [answer in answers for answer, answers in pairs if len(answers)]
    return sum(right) / max(len(right), 1)


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
