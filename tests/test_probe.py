"""The probes, against scikit-learn, torch's own attention and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import beit.probe
from beit.probe import (
    DRAWS,
    FOLDS,
    PENALTIES,
    SGD_BATCH,
    SGD_EPOCHS,
    STUDENT_T,
    AttentiveProbe,
    LinearProbe,
    few_shot,
    fit_attentive,
    fit_best_probe,
    fit_probe,
    fit_probes,
    fit_sgd,
    knn_scores,
    out_of_fold,
    out_of_fold_several,
    review_labels,
    review_several,
    stratified_fifth,
)


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
    assert float(probe.weight[:, 3].abs().max()) < 1e-12


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


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real features: scikit-learn's handwritten digits; 1,197 to fit on, 600 to score."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.from_numpy(a) for a in datasets.load_digits(return_X_y=True))
    return x[:1197], y[:1197].long(), x[1197:], y[1197:].long()


def test_on_real_features_every_penalty_scores_as_in_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, test_x, test_y = digits()
    strengths = [penalty * len(x) for penalty in PENALTIES]
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-8)
    for probe, penalty in zip(fit_probes(x, y, 10, strengths), strengths, strict=True):
        theirs = linear_model.LogisticRegression(C=1 / penalty, max_iter=20_000, tol=1e-7)
        theirs.fit(((x - mean) / std).numpy(), y)
        accuracy = theirs.score(((test_x - mean) / std).numpy(), test_y)
        assert probe.accuracy(test_x, test_y) == pytest.approx(accuracy, abs=0.002)


def test_sgd_is_the_written_out_descent_for_each_rate_alone() -> None:
    """Heavy ball on the closed-form gradient of softmax regression, in NumPy."""
    x, y = clusters(300)
    lrs = (0.01, 0.3)
    mean, std = x.numpy().mean(axis=0), x.numpy().std(axis=0)
    rows = np.concatenate([(x.numpy() - mean) / std, np.ones((300, 1))], axis=1)
    truth = np.eye(4)[y]
    for probe, lr in zip(fit_sgd(x, y, 4, lrs, seed=3), lrs, strict=True):
        generator = torch.Generator().manual_seed(3)
        theta, momentum = np.zeros((4, 13)), np.zeros((4, 13))
        steps = 2 * SGD_EPOCHS
        for step in range(steps):
            if step % 2 == 0:
                order = torch.randperm(300, generator=generator).numpy()
            batch = order[step % 2 * SGD_BATCH :][:SGD_BATCH]
            p = np.exp(rows[batch] @ theta.T)
            p /= p.sum(axis=1, keepdims=True)
            momentum = 0.9 * momentum + (p - truth[batch]).T @ rows[batch] / len(batch)
            theta -= lr * (1 + math.cos(math.pi * step / steps)) / 2 * momentum
        np.testing.assert_allclose(probe.weight.numpy(), theta[:, :-1], atol=2e-3)
        np.testing.assert_allclose(probe.bias.numpy(), theta[:, -1], atol=2e-3)


def test_sgd_comes_near_scikit_learns_regression_on_real_features() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, test_x, test_y = digits()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-8)
    theirs = linear_model.LogisticRegression(C=1.0, max_iter=20_000).fit(((x - mean) / std).numpy(), y)
    accuracy = theirs.score(((test_x - mean) / std).numpy(), test_y)
    best = max(probe.accuracy(test_x, test_y) for probe in fit_sgd(x, y, 10))
    assert best == pytest.approx(accuracy, abs=0.015)  # 9 of 600; it stops before the end


def test_with_fewer_pictures_than_features_it_is_still_scikit_learns() -> None:
    """The weights are found in the span of the pictures."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = clusters(30, dims=80)
    ours = fit_probe(x, y, 4, 2.0)
    standard = ((x - x.mean(dim=0)) / x.std(dim=0, correction=0)).numpy()
    theirs = linear_model.LogisticRegression(C=1 / 2, max_iter=10_000, tol=1e-10).fit(standard, y)
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-4)


def test_several_penalties_at_once_are_each_alone() -> None:
    x, y = clusters(200)
    for together, penalty in zip(fit_probes(x, y, 4, (0.1, 100.0, 3.0)), (0.1, 100.0, 3.0), strict=True):
        alone = fit_probe(x, y, 4, penalty)
        assert together.penalty == penalty
        torch.testing.assert_close(together.weight, alone.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_features_that_are_read_in_blocks_give_the_same_probe(
    monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    x, y = clusters(200)
    whole = fit_probe(x, y, 4, 3.0)
    monkeypatch.setattr(beit.probe, "_BLOCK", 12 * 7)
    monkeypatch.setattr(beit.probe, "_KEPT", kept)
    blocks = fit_probe(x, y, 4, 3.0)
    torch.testing.assert_close(blocks.weight, whole.weight, atol=1e-6, rtol=0)
    assert torch.equal(blocks.predict(x), whole.predict(x))


@pytest.mark.parametrize("k", [1, 20])
def test_nearest_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y, test_x, test_y = digits()
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(x, y)
    expected = theirs.predict_proba(test_x)
    monkeypatch.setattr(beit.probe, "_BLOCK", 1197 * 50)  # twelve blocks
    scores = knn_scores((x, y), test_x, 10, k)
    shares = scores / scores.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(shares.numpy(), expected, atol=1e-4)
    accuracy = float((scores.argmax(dim=1) == test_y).double().mean())
    assert accuracy == pytest.approx(theirs.score(test_x, test_y), abs=0.002)
    assert 0.9 < accuracy < 1


def test_with_fewer_pictures_than_neighbours_all_vote() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    (votes,) = knn_scores((x, torch.tensor([0, 1, 1])), torch.tensor([[5.0, 0.0]]), 3)
    expected = [1.0, 2 * math.exp(-1 / 0.07), 0.0]  # relative to a vote of cosine 1
    assert votes.tolist() == pytest.approx(expected)


def attentive(classes: int = 3, heads: int = 2, width: int = 8) -> AttentiveProbe:
    torch.manual_seed(0)
    probe = AttentiveProbe(torch.randn(width), torch.rand(width) + 0.5, heads, classes)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter)
    return probe


@torch.no_grad()
def test_attentive_probe_is_torchs_attention_with_learned_queries() -> None:
    probe, tokens = attentive(), torch.randn(4, 5, 8)
    x = ((tokens - probe.mean) / probe.std)[:, None].expand(-1, 2, -1, -1)
    query = probe.query[None, :, None].expand(4, -1, -1, -1)
    seen = torch.nn.functional.scaled_dot_product_attention(query, x, x)[:, :, 0]
    values = torch.cat([seen[:, head] @ probe.value[head] for head in range(2)], dim=1)
    torch.testing.assert_close(probe(tokens), probe.head(values))


def test_attention_finds_the_token_that_a_mean_drowns() -> None:
    """One token of 40, anywhere, is marked and tells the class; the others are noise."""
    generator = torch.Generator().manual_seed(0)

    def pictures(count: int) -> tuple[Tensor, Tensor]:
        tokens = 2 * torch.randn(count, 40, 8, generator=generator)
        tokens[..., 0] = 0
        labels = torch.randint(2, (count,), generator=generator)
        place = torch.randint(40, (count,), generator=generator)
        tokens[torch.arange(count), place] = 0
        tokens[torch.arange(count), place, 0] = 8
        tokens[torch.arange(count), place, 1] = 4.0 * (2 * labels - 1)
        return tokens, labels

    (tokens, labels), (test_tokens, test_labels) = pictures(600), pictures(300)
    probe = fit_attentive(tokens, labels, 2, num_heads=2, lr=1e-2)
    attended = float((probe.predict(test_tokens) == test_labels).double().mean())
    line = fit_probe(tokens.mean(dim=1), labels, 2, 1.0)
    assert attended > 0.95
    assert line.accuracy(test_tokens.mean(dim=1), test_labels) < 0.75


def test_same_seed_gives_the_same_attentive_probe() -> None:
    tokens, labels = torch.randn(50, 6, 8), torch.randint(3, (50,))
    one, same, other = (fit_attentive(tokens, labels, 3, 2, 1e-3, seed) for seed in (1, 1, 2))
    assert torch.equal(one(tokens), same(tokens))
    assert not torch.equal(one(tokens), other(tokens))


def test_an_attentive_probe_is_the_written_out_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens standardised by a thousand pictures from end to end; AdamW, a twentieth of warm-up."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2000, 2, 8, generator=generator)
    tokens[1000:] += 10
    labels = torch.randint(3, (2000,), generator=generator)
    before = torch.get_rng_state()
    probe = fit_attentive(tokens, labels, 3, 2, 1e-2, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    some = tokens[::2].flatten(0, 1)
    torch.testing.assert_close(probe.mean, some.mean(dim=0))
    torch.testing.assert_close(probe.std, some.std(dim=0, correction=0))

    torch.manual_seed(5)
    ours = AttentiveProbe(probe.mean, probe.std, 2, 3)
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2, weight_decay=0.05)
    generator = torch.Generator().manual_seed(5)
    total = 500  # 30 passes of 16 batches are fewer
    for step in range(total):
        if step % 16 == 0:
            order = torch.randperm(2000, generator=generator)
        batch = order[step % 16 * 128 :][:128]
        warm = total // 20
        cosine = (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * (step / warm if step < warm else cosine)
        loss = torch.nn.functional.cross_entropy(ours(tokens[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(probe(tokens[:50]), ours(tokens[:50]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("usual", [0.0, 1.0])
def test_the_interval_of_an_accuracy_stays_between_none_and_all(
    monkeypatch: pytest.MonkeyPatch, usual: float
) -> None:
    accuracies = iter([1 - usual, *[usual] * (DRAWS - 1)])
    monkeypatch.setattr(LinearProbe, "accuracy", lambda *_: next(accuracies))
    found = few_shot(clusters(40), clusters(40), 4, 1)
    assert usual in found.interval
    assert 0 <= found.interval[0] < found.accuracy < found.interval[1] <= 1


def test_few_shots_of_all_pictures_are_the_linear_probe_of_penalty_one() -> None:
    train, test = clusters(80), clusters(300, seed=1)
    found = few_shot(train, test, 4, shots=80)
    accuracy = fit_probe(*train, 4, 1.0).accuracy(*test)
    assert found == (80, pytest.approx(accuracy), pytest.approx((accuracy, accuracy)))


def test_more_shots_are_better_and_the_interval_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx(stats.t.ppf(0.975, DRAWS - 1), abs=1e-3) == STUDENT_T
    train, test = clusters(400), clusters(300, seed=1)
    one, five, ten = (few_shot(train, test, 4, shots, seed=3) for shots in (1, 5, 10))
    assert one.accuracy < five.accuracy < ten.accuracy
    for found in (one, five, ten):
        low, high = found.interval
        assert low < found.accuracy < high
        assert (low + high) / 2 == pytest.approx(found.accuracy)
    assert one == few_shot(train, test, 4, 1, seed=3)
    assert one != few_shot(train, test, 4, 1, seed=4)


def test_few_shot_interval_covers_the_mean_of_many_draws() -> None:
    train, test = clusters(400), clusters(300, seed=1)
    found = [few_shot(train, test, 4, 5, seed=seed) for seed in range(20)]
    mean = float(np.mean([f.accuracy for f in found]))
    covered = sum(f.interval[0] <= mean <= f.interval[1] for f in found)
    assert covered >= 16  # 95 % of 20 are 19; fewer than 16 happen once in 400


@pytest.mark.parametrize("seed", [0, 1])
def test_flipped_labels_come_first_in_the_review_and_their_class_is_suggested(seed: int) -> None:
    x, y, test_x, test_y = digits()
    x, truth = torch.cat([x, test_x]), torch.cat([y, test_y])
    rng = np.random.default_rng(seed)
    flipped = torch.from_numpy(rng.permutation(len(truth))[: len(truth) // 20])
    labels = truth.clone()
    labels[flipped] = (truth[flipped] + torch.from_numpy(rng.integers(1, 10, len(flipped)))) % 10
    order, suggestion, _, _ = review_labels(out_of_fold(x, labels, 10), labels)
    assert sorted(order.tolist()) == list(range(len(truth)))
    first = order[: len(order) // 10]
    assert float(torch.isin(flipped, first).double().mean()) >= 0.8
    assert float((suggestion[flipped] == truth[flipped]).double().mean()) >= 0.8


@pytest.mark.parametrize("seed", [0, 1])
def test_a_wrong_one_of_several_labels_comes_first_in_the_review(seed: int) -> None:
    """Is it a 0? A 4? A 6? Of one picture in twenty an answer is turned."""
    x, y, test_x, test_y = digits()
    x, digit = torch.cat([x, test_x]), torch.cat([y, test_y])
    truth = torch.stack([digit == number for number in (0, 4, 6)], dim=1)
    rng = np.random.default_rng(seed)
    flipped = torch.from_numpy(rng.permutation(len(truth))[: len(truth) // 20])
    which = torch.from_numpy(rng.integers(0, 3, len(flipped)))
    given = truth.clone()
    given[flipped, which] = ~given[flipped, which]
    probability = out_of_fold_several(x, given)
    order, suggestion, confidence, likely = review_several(probability, given)
    assert sorted(order.tolist()) == list(range(len(truth)))
    assert (likely[order].diff() >= 0).all()
    torch.testing.assert_close(confidence, 1 - likely)
    first = order[: len(order) // 10]
    assert float(torch.isin(flipped, first).double().mean()) >= 0.8
    assert float((suggestion[flipped] == which).double().mean()) >= 0.8


def test_a_review_begins_where_another_class_is_likelier_by_most() -> None:
    probability = torch.tensor(
        [[0.3, 0.4, 0.3], [0.35, 0.65, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64
    )
    order, suggestion, confidence, given = review_labels(probability, torch.tensor([0, 0, 2]))
    assert order.tolist() == [1, 0, 2]  # though the label of 0 is the less likely
    assert suggestion.tolist() == [1, 1, 1]
    assert confidence.tolist() == [0.4, 0.65, 0.1]
    assert given.tolist() == [0.3, 0.35, 0.9]


def test_each_class_is_spread_over_all_folds_as_the_seed_says() -> None:
    labels = torch.tensor([0] * 10 + [1] * 15 + [2] * 5)
    folds = beit.probe._folds(labels, seed=0)
    for label, each in ((0, 2), (1, 3), (2, 1)):
        assert torch.bincount(folds[labels == label]).tolist() == [each] * FOLDS
    assert torch.equal(folds, beit.probe._folds(labels, seed=0))
    assert not torch.equal(folds, beit.probe._folds(labels, seed=1))


def test_a_fifth_of_each_class_is_held_out_as_the_seed_says() -> None:
    labels = [0] * 10 + [1] * 17 + [2] * 4
    held_out = stratified_fifth(labels, seed=0)
    assert [int(held_out[torch.tensor(labels) == c].sum()) for c in range(3)] == [2, 3, 0]
    assert torch.equal(held_out, stratified_fifth(labels, seed=0))
    assert not torch.equal(held_out, stratified_fifth(labels, seed=1))
    assert int(stratified_fifth([0, 1, 2, 3], seed=0).sum()) == 1
    assert int(stratified_fifth(list(range(13)), seed=0).sum()) == 2


def test_out_of_fold_probabilities_do_not_know_the_label() -> None:
    """With labels of pure chance, a probe that has seen a picture names it, and one that has not cannot."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 300, generator=generator), torch.randint(2, (300,), generator=generator)
    assert fit_probe(x, y, 2, 0.1).accuracy(x, y) == 1.0
    probability = out_of_fold(x, y, 2)
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(300, dtype=torch.float64))
    right = float((probability.argmax(dim=1) == y).double().mean())
    assert abs(right - 0.5) < 0.12  # four standard deviations


def test_a_class_of_one_picture_gets_probabilities_too() -> None:
    x, y = clusters(40, classes=3)
    y[0] = 3
    probability = out_of_fold(x, y, 4)
    assert torch.isfinite(probability).all()
    assert int(review_labels(probability, y).order[0]) == 0  # no other looks like it
