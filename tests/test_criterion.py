"""What a fine-tuning minimises: torch's losses, with rare classes weighed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit.criterion import Criterion, class_weights, right_of


def test_losses_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator)
    labels = torch.tensor([0, 3, 1, 1, 2])
    one = Criterion(0.1, None, False)(logits, labels) / 5
    torch.testing.assert_close(one, F.cross_entropy(logits, labels, label_smoothing=0.1))
    truth = torch.rand(5, 4, generator=generator) > 0.5
    several = Criterion(0.0, None, True)(logits, truth.float()) / 5
    torch.testing.assert_close(several, F.binary_cross_entropy_with_logits(logits, truth.float()))


def test_rare_classes_weigh_more_and_the_mean_stays_one() -> None:
    weights = class_weights(np.array([27, 3]))
    assert float(weights[1] / weights[0]) == pytest.approx(3)
    assert float((27 * weights[0] + 3 * weights[1]) / 30) == pytest.approx(1)


def test_a_class_without_pictures_has_a_weight() -> None:
    assert class_weights(np.array([4, 0])).isfinite().all()


def test_right_answers_are_counted() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5], [-2.0, 3.0, 0.1]])
    assert right_of(logits, torch.tensor([0, 2])) == 1
    truth = torch.tensor([[True, False, False], [False, True, True]])
    assert float(right_of(logits, truth)) == pytest.approx(2 / 3 + 1)
