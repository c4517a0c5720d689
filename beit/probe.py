"""Probes: how much of the labels can be read off frozen features, and which labels look wrong.

Linear: multinomial logistic regression on standardised features, fitted to the end with L-BFGS in
float64; the strength of its penalty is chosen on held-out pictures. SGD: the same line by gradient
descent, as papers report it, its learning rate chosen likewise. k-NN: 20 neighbours by cosine, each
with the weight exp(similarity / 0.07), as DINO has it. Attentive: a learned pooling of the tokens, then a
line. Few-shot: the linear probe on 1, 5 or 10 pictures a class, over several draws.

Shapes: n pictures, D features, C classes. Features float (n, D), labels int64 (n,); work is done on the
features' device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.optim import cosine_schedule

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the squared weights, per picture
NEIGHBOURS = 20
TEMPERATURE = 0.07
LEARNING_RATES = (3e-4, 1e-3, 3e-3)  # of the attentive probe
SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # for batches of 256
SGD_BATCH, SGD_EPOCHS = 256, 100
DRAWS = 10
FOLDS = 5  # of pictures, each judged by a probe of the others
STUDENT_T = 2.262  # 97.5 % of its distribution for 10 draws

MOST_STEPS = 500  # of L-BFGS; few, separable pictures take them all at the weakest penalties

_BLOCK = 1 << 24  # numbers worked on at a time
_KEPT = 1 << 28  # standardised features, 2 GiB in float64; more are made anew in each iteration


# --- Linear --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe. `accuracy` says how well it reads the features it is given."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """(n, D) -> (n, C)."""
        return F.linear((features.double() - self.mean) / self.std, self.weight, self.bias)

    def as_head(self) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) that give the same logits without standardising."""
        weight = self.weight / self.std
        return weight, self.bias - weight @ self.mean

    def predict(self, features: Tensor) -> Tensor:
        """(n, D) -> (n,) classes."""
        rows = max(1, _BLOCK // max(features.shape[1], len(self.bias)))
        return torch.cat([self.logits(part).argmax(dim=1) for part in features.split(rows)])

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of pictures whose class it names."""
        return float((self.predict(features) == labels).double().mean())


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> LinearProbe:
    """Minimise mean cross-entropy + penalty / (2n) * |weight|^2; the bias is not penalised."""
    return fit_probes(features, labels, num_classes, (penalty,))[0]


def fit_probes(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    tolerance: float = 1e-6,
    standard: tuple[Tensor, Tensor] | None = None,
) -> list[LinearProbe]:
    """`fit_probe` for several penalties at once: they share the products with the features.

    tolerance: of the gradient's largest entry, per picture.
    standard: (mean, std) to standardise by instead of the features' own.
    """
    n, width = features.shape
    mean, std = standard_of(features) if standard is None else standard
    strength = features.new_tensor(penalties, dtype=torch.float64)[:, None, None] / n
    rows = max(1, _BLOCK // max(width, num_classes * len(penalties)))
    basis, variance = _principal_axes(features, mean, std)

    def block(begin: int) -> tuple[Tensor, Tensor]:
        x = (features[begin : begin + rows].double() - mean) / std @ basis
        return F.pad(x, (0, 1), value=1.0), labels[begin : begin + rows]  # the last weight is the bias

    kept = [block(begin) for begin in range(0, n, rows)] if n * width <= _KEPT else None

    def objective(theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        weights = theta.view(len(theta), num_classes, -1)
        penalised = F.pad(weights[..., :-1], (0, 1)) * strength[which]
        loss = (penalised * weights).sum(dim=(1, 2)) / 2
        gradient = penalised.clone()
        for x, y in kept or map(block, range(0, n, rows)):
            logits = (x @ weights.flatten(0, 1).T).view(len(x), len(theta), num_classes)
            log_p = logits.log_softmax(dim=2)
            loss -= log_p.gather(2, y.view(-1, 1, 1).expand(-1, len(theta), 1)).sum(dim=(0, 2)) / n
            pull = log_p.exp_()
            pull[torch.arange(len(x), device=x.device), :, y] -= 1
            gradient += (pull.flatten(1).T @ x).view_as(gradient) / n
        return loss, gradient.flatten(1)

    # About the second derivatives: those of the cross-entropy are the covariance times p (1 - p).
    curvature = variance / (2 * num_classes) + strength  # (P, 1, R)
    curvature = (
        F.pad(curvature, (0, 1), value=1 / (2 * num_classes)).expand(-1, num_classes, -1).flatten(1)
    )
    start = mean.new_zeros(len(penalties), num_classes * (basis.shape[1] + 1))
    with torch.no_grad():
        found = _minimise(objective, start, curvature, tolerance)
    found = found.view(len(penalties), num_classes, -1)
    weights = found[..., :-1] @ basis.T
    return [
        LinearProbe(mean, std, weight.contiguous(), bias.contiguous(), float(penalty))
        for weight, bias, penalty in zip(weights, found[..., -1], penalties, strict=True)
    ]


def _principal_axes(features: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Axes (D, R) that turn standardised features to where they are uncorrelated, their variances (R,).

    A turn leaves the penalty as it is. Of n < D pictures the weights lie in the span: n axes are enough.
    """
    n, width = features.shape
    if n < width:
        _, scale, axes = torch.linalg.svd((features.double() - mean) / std, full_matrices=False)
        return axes.T, scale.square() / n
    covariance = mean.new_zeros(width, width)
    for part in features.split(max(1, _BLOCK // width)):
        x = (part.double() - mean) / std
        covariance += x.T @ x / n
    variance, axes = torch.linalg.eigh(covariance)
    return axes, variance.clamp_min(0)


def standard_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) float64 of each feature; the latter at least 1e-8."""
    parts = features.split(max(1, _BLOCK // features.shape[1]))
    mean = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in parts]).sum(0) / len(features)
    squares = [(part.double() - mean).square().sum(dim=0) for part in parts]
    return mean, (torch.stack(squares).sum(0) / len(features)).sqrt().clamp_min(1e-8)


def fit_best_probe(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], num_classes: int
) -> tuple[LinearProbe, float]:
    """Fit one probe a penalty on `train`; the best on `validation`, with its accuracy there."""
    strengths = [penalty * len(train[0]) for penalty in PENALTIES]
    probes = fit_probes(*train, num_classes, strengths)
    scored = [(probe.accuracy(*validation), probe) for probe in probes]
    accuracy, probe = max(scored, key=lambda pair: pair[0])
    return probe, accuracy


def fit_sgd(
    features: Tensor, labels: Tensor, num_classes: int, lrs: Sequence[float] = SGD_RATES, seed: int = 0
) -> list[LinearProbe]:
    """A line a learning rate, by SGD as DINO and MAE probe: momentum 0.9, cosine to 0, no penalty.

    100 passes in batches of 256 over standardised features, float32; all rates see the same batches.
    """
    mean, std = standard_of(features)
    heads = [features.new_zeros(num_classes, features.shape[1] + 1).float() for _ in lrs]
    for head in heads:
        head.requires_grad_()
    groups = [{"params": [head], "lr": lr} for head, lr in zip(heads, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(features) // SGD_BATCH)
    for step in range(SGD_EPOCHS * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(features), generator=generator).to(features.device)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = cosine_schedule(step, SGD_EPOCHS * per_epoch, 0, lr, 0.0)
        batch = order[step % per_epoch * SGD_BATCH :][:SGD_BATCH]
        x = F.pad(((features[batch] - mean) / std).float(), (0, 1), value=1.0)
        with torch.enable_grad():
            logits = (x @ torch.cat(heads).T).view(len(x), len(lrs), num_classes)
            answers = labels[batch, None].expand(-1, len(lrs))
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten()) * len(lrs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = [head.detach().double() for head in heads]
    return [LinearProbe(mean, std, w[:, :-1].contiguous(), w[:, -1].contiguous(), 0.0) for w in weights]


def stratified_fifth(labels: Sequence[int] | np.ndarray, seed: int) -> Tensor:
    """A (n,) bool choice of a fifth of each class; where all have fewer than five, a fifth of all."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    array = np.array(labels)
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        held_out[members[: len(members) // 5]] = True
    if not held_out.any():  # too few to hold any out of each
        held_out[rng.permutation(len(labels))[: max(1, len(labels) // 5)]] = True
    return torch.from_numpy(held_out)


Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _minimise(objective: Objective, theta: Tensor, curvature: Tensor, tolerance: float) -> Tensor:
    """L-BFGS (Nocedal & Wright, 7.4) on several convex problems at once; a row of theta (P, K) each.

    objective: rows (A, K) and which of the P problems they are -> losses (A,), gradients (A, K).
    curvature: (P, K) first guess of the second derivatives' diagonal, up to a factor.
    Problems that have arrived leave the batch. The line search halves its step until it descends: on
    convex losses that is enough, and mostly costs one look a step.
    """
    found = theta.clone()
    which = torch.arange(len(theta), device=theta.device)
    loss, gradient = objective(theta, which)
    history: list[_Pair] = []
    for _ in range(MOST_STEPS):
        going = gradient.abs().amax(dim=1) > tolerance
        if not going.all():
            found[which[~going]] = theta[~going]
            which, theta, loss, gradient = which[going], theta[going], loss[going], gradient[going]
            curvature = curvature[going]
            history = [_Pair(*(part[going] for part in pair)) for pair in history]
        if not len(which):
            break
        direction = -_inverse_hessian(history, gradient, curvature)
        slope = (direction * gradient).sum(dim=1, keepdim=True)
        length = theta.new_ones(len(theta), 1)
        for _ in range(40):
            new = theta + length * direction
            new_loss, new_gradient = objective(new, which)
            rounding = 1e-14 * loss.abs()
            high = new_loss > loss + 1e-4 * (length * slope)[:, 0] + rounding
            if not high.any():
                break
            length[high] /= 2
        step, change = new - theta, new_gradient - gradient
        along = (step * change).sum(dim=1, keepdim=True)
        rho = torch.where(along > 0, 1 / along, 0)  # not positive by rounding: leave the pair out
        history = [*history[-19:], _Pair(step, change, rho)]
        theta, loss, gradient = new, new_loss, new_gradient
    found[which] = theta
    return found


class _Pair(NamedTuple):
    step: Tensor  # (A, K)
    change: Tensor  # (A, K), of the gradient
    rho: Tensor  # (A, 1), 1 / (step . change)


def _inverse_hessian(history: list[_Pair], gradient: Tensor, curvature: Tensor) -> Tensor:
    """What L-BFGS takes for the inverse of the second derivatives, times the gradient: (A, K)."""
    q = gradient.clone()
    alphas = []
    for step, change, rho in reversed(history):
        alphas.append(rho * (step * q).sum(dim=1, keepdim=True))
        q -= alphas[-1] * change
    q /= curvature
    if history:
        change, rho = history[-1][1:]
        scale = rho * (change.square() / curvature).sum(dim=1, keepdim=True)
        q /= torch.where(scale > 0, scale, 1)
    for step, change, rho in history:
        q += step * (alphas.pop() - rho * (change * q).sum(dim=1, keepdim=True))
    return q


# --- Nearest neighbours --------------------------------------------------------------------------


def knn_scores(
    train: tuple[Tensor, Tensor], features: Tensor, num_classes: int, k: int = NEIGHBOURS
) -> Tensor:
    """(m, C) float32 votes of the k training pictures nearest by cosine, each exp(cosine / 0.07)."""
    known = F.normalize(train[0].float(), dim=1)
    k = min(k, len(known))
    found = []
    for part in features.split(max(1, _BLOCK // max(len(known), num_classes))):
        cosine, nearest = (F.normalize(part.float(), dim=1) @ known.T).topk(k, dim=1)
        weight = ((cosine - 1) / TEMPERATURE).exp()  # divided by exp(1 / 0.07), to stay small
        votes = weight.new_zeros(len(part), num_classes)
        found.append(votes.scatter_add_(1, train[1][nearest], weight))
    return torch.cat(found)


# --- Attentive -----------------------------------------------------------------------------------


class AttentiveProbe(nn.Module):
    """Each head looks at the tokens by a learned query and keeps a mean of what it saw; then a line.

    Query and key matrix of a head are one vector, which is the same function with less work. Tokens are
    standardised by statistics of the training pictures.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, num_heads: int, num_classes: int) -> None:
        """mean, std: (D,); D is a multiple of num_heads."""
        super().__init__()
        width = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.query = nn.Parameter(torch.zeros(num_heads, width))  # at first: the mean of all tokens
        self.value = nn.Parameter(torch.empty(num_heads, width, width // num_heads))
        nn.init.normal_(self.value, std=width**-0.5)
        self.head = nn.Linear(width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> logits (B, C)."""
        x = (tokens.float() - self.mean) / self.std
        attention = (x @ self.query.T / math.sqrt(x.shape[2])).softmax(dim=1)  # (B, N, H)
        seen = attention.transpose(1, 2) @ x  # (B, H, D)
        return self.head(torch.einsum("bhd,hde->bhe", seen, self.value).flatten(1))

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """(n, N, D) -> (n,) classes, on the CPU."""
        device = self.query.device
        return torch.cat([self(part.to(device)).argmax(dim=1).cpu() for part in tokens.split(256)])


def fit_attentive(
    tokens: Tensor, labels: Tensor, num_classes: int, num_heads: int, lr: float, seed: int = 0,
    device: torch.device | None = None,
) -> AttentiveProbe:  # fmt: skip
    """AdamW, cosine to 0, batches of 128, 30 passes over the pictures but 500 steps at least.

    tokens: (n, N, D) of any float type, labels (n,), both on the CPU.
    """
    device = device or torch.device("cpu")
    some = tokens[:: max(1, len(tokens) // 1000)].float().flatten(0, 1)
    mean, std = (value.float().to(device) for value in standard_of(some))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = AttentiveProbe(mean.cpu(), std.cpu(), num_heads, num_classes).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=0.05)
    per_epoch = -(-len(tokens) // 128)
    total = max(500, 30 * per_epoch)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(tokens), generator=generator)
        batch = order[step % per_epoch * 128 :][:128]
        optimizer.param_groups[0]["lr"] = cosine_schedule(step, total, total // 20, lr, 0.0)
        with torch.enable_grad():
            loss = F.cross_entropy(probe(tokens[batch].to(device)), labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe


# --- Few-shot ------------------------------------------------------------------------------------


class FewShot(NamedTuple):
    """Accuracy with a few pictures of each class."""

    shots: int
    accuracy: float  # mean over the draws
    interval: tuple[float, float]  # 95 % of that mean, by Student's t over the draws


def few_shot(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    shots: int,
    seed: int = 0,
) -> FewShot:
    """Linear probes on `shots` pictures a class, drawn 10 times; penalty 1 in all, none to choose it on.

    Features are standardised by all training pictures, whose labels are not used for that.
    """
    features, labels = train
    standard, known = standard_of(features), labels.cpu().numpy()
    of_class = [np.flatnonzero(known == c) for c in range(num_classes)]
    accuracies = []
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, shots, draw])
        chosen = np.concatenate([rng.permutation(members)[:shots] for members in of_class])
        (probe,) = fit_probes(features[chosen], labels[chosen], num_classes, (1.0,), 1e-5, standard)
        accuracies.append(probe.accuracy(*test))
    mean, half = float(np.mean(accuracies)), STUDENT_T * float(np.std(accuracies, ddof=1)) / DRAWS**0.5
    return FewShot(shots, mean, (max(0.0, mean - half), min(1.0, mean + half)))


# --- What may be wrong with the data -------------------------------------------------------------


def out_of_fold(features: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """(n, C) float64 probabilities, each of a linear probe that has not seen the picture.

    The penalty is the one whose probabilities fit the labels best.
    """
    fold = _folds(labels, seed)
    found = features.new_zeros(len(PENALTIES), len(features), num_classes, dtype=torch.float64)
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        if not (inside.any() and outside.any()):
            continue
        strengths = [penalty * int(inside.sum()) for penalty in PENALTIES]
        probes = fit_probes(features[inside], labels[inside], num_classes, strengths, tolerance=1e-4)
        for place, probe in enumerate(probes):
            found[place, outside] = probe.logits(features[outside]).softmax(dim=1)
    given = found.gather(2, labels.view(1, -1, 1).expand(len(found), -1, 1))
    fit = given.clamp_min(1e-12).log().mean(dim=(1, 2))
    return found[int(fit.argmax())]


class LabelReview(NamedTuple):
    """In which order to review labels, and what each may be instead.

    By confidence: the probability of the given label less that of the likeliest other, as in confident
    learning (Northcutt et al., 2021).
    """

    order: Tensor  # (n,) int64, likeliest error first
    suggestion: Tensor  # (n,) int64, the likeliest other class, in the pictures' order
    confidence: Tensor  # (n,) float64, its probability
    given: Tensor  # (n,) float64, that of the label


def review_labels(probability: Tensor, labels: Tensor) -> LabelReview:
    """What a look at labels (n,) should begin with.

    probability: (n, C), of a classifier that has not learned these labels.
    """
    given = probability.gather(1, labels[:, None])[:, 0]
    confidence, suggestion = probability.scatter(1, labels[:, None], -1).max(dim=1)
    return LabelReview((given - confidence).argsort(stable=True), suggestion, confidence, given)


def review_several(probability: Tensor, truth: Tensor) -> LabelReview:
    """The same where a picture may have several labels: each class is a question of its own.

    probability: (n, C) that a picture has a class. truth: (n, C) bool. The suggestion is the class whose
    answer is most in doubt, to be taken away or added; the confidence is that of the other answer.
    """
    given, suggestion = torch.where(truth, probability, 1 - probability).min(dim=1)
    return LabelReview(given.argsort(stable=True), suggestion, 1 - given, given)


def out_of_fold_several(features: Tensor, truth: Tensor, seed: int = 0) -> Tensor:
    """(n, C) float64 probabilities that a picture has a class, of probes that have not seen its answer.

    truth: (n, C) bool.
    """
    questions = truth.long().unbind(dim=1)
    return torch.stack([out_of_fold(features, y, 2, seed=seed)[:, 1] for y in questions], dim=1)


def _folds(labels: Tensor, seed: int) -> Tensor:
    """(n,) numbers of folds; each class is spread over all of them."""
    array = labels.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(array))
    order = order[np.argsort(array[order], kind="stable")]
    fold = np.empty(len(array), dtype=np.int64)
    fold[order] = np.arange(len(array)) % FOLDS
    return torch.from_numpy(fold).to(labels.device)
