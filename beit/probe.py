"""The linear probe: how much of the labels a linear layer can read off frozen features.

Multinomial logistic regression on standardised features, fitted to the end with L-BFGS in float64;
the strength of its penalty is chosen on a validation set.

Shapes: n pictures, D features, C classes. Features float (n, D), labels int64 (n,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the squared weights, per picture


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

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of pictures whose class it names."""
        return float((self.logits(features).argmax(dim=1) == labels).double().mean())


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> LinearProbe:
    """Minimise mean cross-entropy + penalty / (2n) * |weight|^2; the bias is not penalised."""
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-8)
    x = (x - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels)
        loss = loss + penalty / (2 * len(x)) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return LinearProbe(mean, std, weight.detach(), bias.detach(), penalty)


def fit_best_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    num_classes: int,
    penalties: tuple[float, ...] = PENALTIES,
) -> tuple[LinearProbe, float]:
    """Fit one probe a penalty on `train`; the best on `validation`, with its accuracy there."""
    probes = [fit_probe(*train, num_classes, penalty * len(train[0])) for penalty in penalties]
    scored = [(probe.accuracy(*validation), probe) for probe in probes]
    accuracy, probe = max(scored, key=lambda pair: pair[0])
    return probe, accuracy
