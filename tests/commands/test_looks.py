"""The looks of `beit pretrain`: when they are taken, at which pictures, and what they draw."""

from __future__ import annotations

import pytest

from beit.commands.pretrain import look_steps


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 312])
@pytest.mark.parametrize("epochs", [10, 25, 99, 100, 101, 300, 800])
def test_pictures_are_drawn_each_epoch_but_at_most_100_times(epochs: int, steps_per_epoch: int) -> None:
    total = epochs * steps_per_epoch
    draw_every, probe_every = look_steps(0, steps_per_epoch, total)
    drawn, probed = range(0, total, draw_every), range(0, total, probe_every)
    if epochs <= 100:
        assert list(drawn) == [epoch * steps_per_epoch for epoch in range(epochs)]
    assert 50 < len(drawn) <= 100 or epochs < 99
    assert set(probed) <= set(drawn)  # a look that probes draws as well
    assert 7 <= len(probed) <= 14


@pytest.mark.parametrize(("steps_per_epoch", "total"), [(7000, 7000), (100, 901), (50, 30), (1, 5)])
def test_a_run_of_few_epochs_is_looked_at_ten_times_or_at_each_step(
    steps_per_epoch: int, total: int
) -> None:
    draw_every, probe_every = look_steps(0, steps_per_epoch, total)
    assert draw_every == probe_every
    assert len(range(0, total, draw_every)) in (min(total, 10), 11)


def test_epochs_that_are_given_hold_for_pictures_and_probes() -> None:
    assert look_steps(3, 40, 100_000) == (120, 120)
