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


def accuracy_interval(right: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) bools: Wilson's (1927), for few answers too.

    A bootstrap's is too narrow there: of 13 right answers out of 13 it says 100 % to 100 %.
    """
    n, mean, z = len(right), float(right.mean()), 1.959964
    centre, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


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


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number that logits are divided by so that their probabilities fit best (Guo et al., 2017).

    labels: int64 (n,), or bool (n, C) where each class is a question of its own. Up to 10; above 1 the
    classifier was too sure. The likelihood has one peak over it, found by golden sections; where nothing
    is wrong it has none, the surer the better, and 1 is given.
    """

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        if labels.ndim == 2:
            return binary_cross_entropy(scaled, labels)
        return negative_log_likelihood(scaled, labels)

    wrong = (logits > 0) != labels if labels.ndim == 2 else logits.argmax(axis=1) != labels
    if not wrong.any():
        return 1.0
    low, high = math.log(0.1), math.log(10.0)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        one, other = high - golden * (high - low), low + golden * (high - low)
        if loss(one) < loss(other):
            high = other
        else:
            low = one
    return math.exp((low + high) / 2)


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over pictures and classes of -log p of what is true, in nats; targets bool (n, C)."""
    signed = np.where(targets, -logits, logits).astype(np.float64)
    return float(np.logaddexp(0, signed).mean())


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(C,) area under each class's steps of precision over recall; nan for a class without a picture.

    scores: (n, C), targets bool (n, C). Pictures of equal score count as one step.
    """
    found = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(targets.any(axis=0)):
        order = np.argsort(-scores[:, c], kind="stable")
        hits = np.cumsum(targets[order, c])
        last = np.append(np.diff(scores[order, c]) != 0, True)  # of equal scores
        hits, shown = hits[last], np.flatnonzero(last) + 1
        found[c] = float((np.diff(hits, prepend=0) * hits / shown).sum() / hits[-1])
    return found


def real_accuracy(predicted: np.ndarray, accepted: Sequence[Sequence[int]]) -> float:
    """Share of answers (n,) that are among those accepted for the picture; ones with none are left out.

    The rule of ImageNet's reassessed labels (Beyer et al., 2020).
    """
    pairs = zip(predicted.tolist(), accepted, strict=True)
    right = [answer in answers for answer, answers in pairs if len(answers)]
    return sum(right) / max(len(right), 1)


def effective_rank(features: np.ndarray) -> float:
    """How many directions (n, D) features use: exp of the entropy of their singular values' shares.

    1 where all lie on a line, D where no direction has more than another (Roy and Vetterli, 2007). The
    mean is taken off first. 1.0 as well where all are the same.
    """
    values = np.linalg.svd(features - features.mean(axis=0, dtype=np.float64), compute_uv=False)
    shares = values[values > 0] / max(values.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(-(shares * np.log(shares)).sum()))


class CodebookUse(NamedTuple):
    """How much of a vocabulary is in use."""

    live: float  # share of codes used at least once
    perplexity: float  # exp of the entropy: as many equally used codes would look like this
    commonest: float  # share of the code used most: how often guessing it blindly would be right


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """Of the counts (V,) of each code. Judge `live` on many times V tokens."""
    total = counts.sum()
    if total == 0:
        return CodebookUse(0.0, 0.0, 0.0)
    share = counts[counts > 0] / total
    entropy = -float((share * np.log(share)).sum())
    return CodebookUse(float((counts > 0).mean()), math.exp(entropy), float(share.max()))


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))
