"""The linear probe, against scikit-learn's logistic regression and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from beit.probe import PENALTIES, LinearProbe, fit_best_probe, fit_probe


def clusters(count: int, seed: int = 0, dims: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Overlapping clouds, one a class, with dimensions of very different size."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + 1.3 * torch.randn(count, dims, generator=generator)
    return (features.double() * torch.logspace(-3, 3, dims) + 50), labels


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_probe_is_scikit_learns_logistic_regression(penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (test_x, test_y) = clusters(400), clusters(500, seed=1)
    ours = fit_probe(x, y, 4, penalty)

    mean, std = x.double().mean(dim=0), x.double().std(dim=0, correction=0)
    standard = ((x.double() - mean) / std).numpy()
    theirs = linear_model.LogisticRegression(C=1 / penalty, max_iter=10_000, tol=1e-10).fit(standard, y)
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=2e-3)
    # A constant added to every bias changes no answer.
    bias, their_bias = ours.bias.numpy(), theirs.intercept_
    np.testing.assert_allclose(bias - bias.mean(), their_bias - their_bias.mean(), atol=2e-3)
    accuracy = theirs.score(((test_x.double() - mean) / std).numpy(), test_y)
    assert 0.5 < accuracy < 0.99
    assert ours.accuracy(test_x, test_y) == pytest.approx(accuracy, abs=0.002)


def test_at_the_minimum_the_bias_explains_the_class_counts() -> None:
    """The gradient is zero: mean probability = share of a class, penalty x weight = pull of the data."""
    x, y = clusters(300)
    penalty = 3.0
    probe = fit_probe(x, y, 4, penalty)
    probabilities = probe.logits(x).softmax(dim=1)
    shares = torch.bincount(y, minlength=4) / len(y)
    torch.testing.assert_close(probabilities.mean(dim=0), shares.double(), atol=1e-6, rtol=0)
    standard = (x.double() - probe.mean) / probe.std
    pull = (torch.nn.functional.one_hot(y, 4) - probabilities).T @ standard
    torch.testing.assert_close(penalty * probe.weight, pull, atol=1e-3, rtol=0)


def test_features_are_standardised_with_their_own_statistics() -> None:
    x, y = clusters(200)
    probe = fit_probe(x, y, 4, 1.0)
    torch.testing.assert_close(probe.mean, x.double().mean(dim=0))
    torch.testing.assert_close(probe.std, x.double().std(dim=0, correction=0))
    moved = fit_probe(x * 7 - 3, y, 4, 1.0)
    torch.testing.assert_close(moved.weight, probe.weight, atol=1e-3, rtol=0)


def test_a_constant_feature_does_no_harm() -> None:
    x, y = clusters(100)
    x[:, 3] = 1e4
    probe = fit_probe(x, y, 4, 1.0)
    assert torch.isfinite(probe.logits(x)).all()
    assert not probe.weight[:, 3].any()


def test_a_stronger_penalty_gives_smaller_weights_and_in_the_end_the_largest_class() -> None:
    x, y = clusters(300)
    norms = [float(fit_probe(x, y, 4, penalty).weight.norm()) for penalty in (0.01, 1.0, 100.0, 1e4)]
    assert norms == sorted(norms, reverse=True)
    strongest = fit_probe(x, y, 4, 1e9)
    share = float((y == torch.bincount(y).argmax()).double().mean())
    assert strongest.accuracy(x, y) == pytest.approx(share)


def test_what_a_line_can_part_is_parted() -> None:
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    y = torch.tensor([0, 0, 1, 1])
    probe = fit_probe(x, y, 2, 1e-3)
    assert probe.accuracy(x, y) == 1.0
    assert float(probe.logits(torch.zeros(1, 1)).softmax(dim=1)[0, 0]) == pytest.approx(0.5, abs=1e-6)


def test_a_class_without_pictures_is_never_answered() -> None:
    x, y = clusters(200, classes=3)
    probe = fit_probe(x, y, 5, 0.1)
    assert int(probe.logits(x).argmax(dim=1).max()) <= 2


def test_logits_are_a_line_of_standardised_features() -> None:
    one = torch.ones(2, dtype=torch.float64)
    probe = LinearProbe(one, 2 * one, torch.eye(2, dtype=torch.float64), 3 * one, 0.0)
    expected = torch.tensor([[3 + 1.0, 3 - 0.5]], dtype=torch.float64)
    assert torch.equal(probe.logits(torch.tensor([[3.0, 0.0]])), expected)


def test_best_penalty_is_the_one_that_scores_best_on_the_validation_set() -> None:
    train, validation = clusters(60), clusters(400, seed=2)
    best, accuracy = fit_best_probe(train, validation, 4)
    by_hand = [fit_probe(*train, 4, p * 60).accuracy(*validation) for p in PENALTIES]
    assert accuracy == max(by_hand)
    assert best.penalty == pytest.approx(60 * PENALTIES[int(np.argmax(by_hand))])
    assert best.accuracy(*validation) == accuracy
    assert len(set(by_hand)) > 2  # so there was a choice


def test_penalties_are_in_decades_from_almost_none_to_strong() -> None:
    steps = np.diff(np.log10(PENALTIES))
    np.testing.assert_allclose(steps, 1.0)
    assert math.isclose(PENALTIES[0], 1e-4)


def test_fitting_needs_no_gradients_around_it() -> None:
    x, y = clusters(50)
    with torch.no_grad():
        probe = fit_probe(x, y, 4, 1.0)
    assert probe.weight.any()
    assert not probe.weight.requires_grad
