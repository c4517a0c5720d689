"""Accuracy, confusion, calibration, codebook use, against closed forms, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beit.metrics import (
    accuracy_interval,
    average_precision,
    binary_cross_entropy,
    calibration,
    codebook_use,
    confusion_matrix,
    effective_rank,
    fit_temperature,
    most_confused,
    negative_log_likelihood,
    psnr,
    real_accuracy,
    top_k_accuracy,
    top_k_right,
)

LOGITS = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 0.0]])


@pytest.mark.parametrize(("k", "accuracy"), [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (9, 1.0)])
def test_top_k_counts_labels_among_the_k_largest(k: int, accuracy: float) -> None:
    assert top_k_accuracy(LOGITS, np.array([0, 2, 0]), k) == pytest.approx(accuracy)


def test_ties_go_to_the_first_classes() -> None:
    same = np.zeros((500, 500))
    for k in (1, 2, 50):
        assert top_k_accuracy(same, np.arange(500), k) == k / 500
        assert top_k_accuracy(same, np.arange(500) % k, k) == 1.0


def test_top_k_is_that_of_scikit_learn() -> None:
    ranking = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 10)), rng.integers(0, 10, 200)
    for k in (1, 3, 5):
        theirs = ranking.top_k_accuracy_score(labels, logits, k=k, labels=np.arange(10))
        assert top_k_accuracy(logits, labels, k) == pytest.approx(theirs)


def test_confusion_has_truth_in_rows_and_answers_in_columns() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0])
    expected = [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(confusion_matrix(predicted, labels, 4), expected)


def test_confusion_is_that_of_scikit_learn() -> None:
    ranking = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 7, 300), rng.integers(0, 7, 300)
    theirs = ranking.confusion_matrix(labels, predicted, labels=np.arange(7))
    np.testing.assert_array_equal(confusion_matrix(predicted, labels, 7), theirs)


def test_most_confused_pairs_come_in_their_order_without_the_right_answers() -> None:
    confusion = np.array([[9, 2, 0], [5, 9, 0], [1, 0, 9]])
    assert most_confused(confusion) == [(1, 0, 5), (0, 1, 2), (2, 0, 1)]
    assert most_confused(confusion, most=1) == [(1, 0, 5)]
    assert most_confused(np.diag([3, 4])) == []


def test_accuracy_is_the_mean_of_the_right_ones() -> None:
    assert top_k_right(LOGITS, np.array([0, 2, 0]), 1).tolist() == [True, False, False]
    assert top_k_right(LOGITS, np.array([0, 2, 0]), 2).tolist() == [True, True, False]


@pytest.mark.parametrize(("right", "n"), [(90, 100), (499, 1000), (3, 15), (13, 13), (0, 1), (0, 7)])
def test_the_interval_is_scipys(right: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
    assert accuracy_interval(np.arange(n) < right) == pytest.approx(tuple(expected), abs=1e-6)


@pytest.mark.parametrize(("n", "share"), [(13, 0.92), (50, 0.97), (100, 0.98), (500, 0.95)])
def test_the_interval_holds_the_truth_as_often_as_it_says(n: int, share: float) -> None:
    """Exactly, over all numbers of right answers there may be."""
    chances = [math.comb(n, right) * share**right * (1 - share) ** (n - right) for right in range(n + 1)]
    intervals = [accuracy_interval(np.arange(n) < right) for right in range(n + 1)]
    held = sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= share <= high)
    assert 0.91 < held < 0.97


def of_probabilities(rows: list[list[float]]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32) + 5  # a constant changes no probability


def test_likelihood_of_given_probabilities() -> None:
    logits = of_probabilities([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    expected = -(math.log(0.7) + math.log(0.25)) / 2
    assert negative_log_likelihood(logits, np.array([0, 1])) == pytest.approx(expected)


def test_likelihood_is_scikit_learns_and_finite_for_huge_logits() -> None:
    ranking = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(100, 5)), rng.integers(0, 5, 100)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    theirs = ranking.log_loss(labels, probabilities, labels=np.arange(5))
    assert negative_log_likelihood(logits, labels) == pytest.approx(theirs)
    huge = np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32)
    assert negative_log_likelihood(huge, np.array([0, 0])) == pytest.approx(5000)


def test_calibration_error_by_hand() -> None:
    """Sure 0.9, 0.91 and 0.59; right, wrong, right: two bins of fifteen."""
    logits = of_probabilities([[0.9, 0.1], [0.91, 0.09], [0.41, 0.59]])
    found = calibration(logits, np.array([0, 1, 1]))
    assert np.flatnonzero(found.counts).tolist() == [8, 13]
    assert found.counts[[8, 13]].tolist() == [1, 2]
    assert found.confidence[[8, 13]] == pytest.approx([0.59, 0.905])
    assert found.accuracy[[8, 13]].tolist() == [1.0, 0.5]
    assert found.error == pytest.approx((1 * 0.41 + 2 * 0.405) / 3)


def test_a_bin_holds_its_upper_edge_and_certainty_is_in_the_last() -> None:
    found = calibration(of_probabilities([[0.6, 0.4], [1 - 1e-30, 1e-30]]), np.array([0, 0]), bins=4)
    assert found.counts.tolist() == [0, 0, 1, 1]
    edge = calibration(np.zeros((3, 2)), np.array([0, 0, 1]), bins=2)  # exactly one half
    assert edge.counts.tolist() == [3, 0]
    assert edge.error == pytest.approx(abs(2 / 3 - 1 / 2))


def test_answers_drawn_from_the_probabilities_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 40_000)
    labels = (probabilities.cumsum(axis=1) < rng.random((40_000, 1))).sum(axis=1)
    assert calibration(np.log(probabilities), labels).error < 0.01
    assert calibration(5 * np.log(probabilities), labels).error > 0.1  # too sure


def test_real_labels_accept_any_of_several_and_leave_out_pictures_without() -> None:
    assert real_accuracy(np.array([3, 1, 2, 0]), [[1, 3], [2], [], [0]]) == 2 / 3


@pytest.mark.parametrize(("equal", "of"), [(1, 1), (1, 8), (5, 8), (8, 8)])
def test_equally_used_codes_have_their_number_as_perplexity(equal: int, of: int) -> None:
    use = codebook_use(np.array([13] * equal + [0] * (of - equal)))
    assert use.live == equal / of
    assert use.perplexity == pytest.approx(equal)
    assert use.commonest == pytest.approx(1 / equal)


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    use = codebook_use(np.array([3, 0, 1, 0]))
    assert use.live == 0.5
    assert use.commonest == 0.75
    assert use.perplexity == pytest.approx(math.exp(entropy))


def test_unused_codebook_is_dead_rather_than_an_error() -> None:
    assert codebook_use(np.zeros(4, dtype=np.int64)) == (0.0, 0.0, 0.0)


def test_psnr_is_twenty_decibels_a_decimal_place_of_error() -> None:
    assert psnr(1.0) == 0.0
    assert psnr(0.1**2) == pytest.approx(20.0)
    assert psnr(0.01**2) == pytest.approx(40.0)
    assert psnr(0.0) == pytest.approx(120.0)  # perfect is finite


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_effective_rank_counts_the_directions_in_use(scale: float) -> None:
    even = np.concatenate([np.eye(8), -np.eye(8)]) * scale  # mean 0, all directions alike
    assert effective_rank(even + 5.0) == pytest.approx(8.0, rel=1e-6)
    line = np.outer(np.linspace(-1, 1, 16), np.arange(1.0, 9.0))
    assert effective_rank(line) == pytest.approx(1.0, rel=1e-6)
    assert effective_rank(np.ones((4, 8))) == 1.0
    two = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # shares 3/4 and 1/4
    assert effective_rank(two) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_by_which_logits_were_spoilt(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((20_000, 5))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)
    several = rng.random(p.shape) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(logits * temperature, several) == pytest.approx(temperature, rel=0.05)


def test_a_temperature_is_left_alone_where_all_are_right_and_finite_where_all_are_wrong() -> None:
    """Where nothing is wrong the likelihood has no peak: the surer the better, on these pictures."""
    logits = 3 * np.eye(4)
    assert fit_temperature(logits, np.arange(4)) == 1.0
    assert fit_temperature(logits - 1, np.eye(4, dtype=bool)) == 1.0
    assert fit_temperature(logits, (np.arange(4) + 1) % 4) == pytest.approx(10.0, rel=1e-3)


def test_binary_cross_entropy_is_the_mean_of_the_negative_logarithms() -> None:
    logits, targets = np.array([[0.0, 2.0], [-1.0, 900.0]]), np.array([[True, False], [True, True]])
    p = 1 / (1 + np.exp(-logits[:, :1]))
    expected = -np.log(p[0, 0]) - math.log(1 - 1 / (1 + math.exp(-2))) - np.log(p[1, 0])
    assert binary_cross_entropy(logits, targets) == pytest.approx(expected / 4)


def test_average_precision_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    targets = rng.random((200, 6)) < 0.3
    targets[:, 5] = False
    scores = np.round(rng.standard_normal((200, 6)) + targets, 1)  # rounded: many are equal
    found = average_precision(scores, targets)
    for c in range(5):
        assert found[c] == pytest.approx(metrics.average_precision_score(targets[:, c], scores[:, c]))
    assert np.isnan(found[5])
    last = average_precision(np.array([[3.0], [2.0], [1.0]]), np.array([[True], [False], [True]]))
    assert last == pytest.approx((1 + 2 / 3) / 2)
