"""Accuracy, confusion, codebook use and PSNR, against closed forms and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beit.metrics import codebook_use, confusion_matrix, psnr, top_k_accuracy

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


@pytest.mark.parametrize(("equal", "of"), [(1, 1), (1, 8), (5, 8), (8, 8)])
def test_equally_used_codes_have_their_number_as_perplexity(equal: int, of: int) -> None:
    use = codebook_use(np.array([13] * equal + [0] * (of - equal)))
    assert use.live == equal / of
    assert use.perplexity == pytest.approx(equal)


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    use = codebook_use(np.array([30, 0, 10, 0]))
    assert use.live == 0.5
    assert use.perplexity == pytest.approx(math.exp(entropy))


def test_unused_codebook_is_dead_rather_than_an_error() -> None:
    assert codebook_use(np.zeros(4, dtype=np.int64)) == (0.0, 0.0)


def test_psnr_is_twenty_decibels_a_decimal_place_of_error() -> None:
    assert psnr(1.0) == 0.0
    assert psnr(0.1**2) == pytest.approx(20.0)
    assert psnr(0.01**2) == pytest.approx(40.0)
    assert psnr(0.0) == pytest.approx(120.0)  # perfect is finite
