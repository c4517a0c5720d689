"""The looks of `beit pretrain`: when they are taken, at which pictures, and what they draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_shape

import beit.frozen
from beit.augment import normalise, to_unit
from beit.commands.pretrain import Batch, draw_predictions, look_steps
from beit.model import BeitForMaskedImageModeling, variant
from beit.tokenizer import PixelTargets

from .conftest import PRETRAIN, run


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


# --- What is drawn --------------------------------------------------------------------------------


def test_a_sheet_of_pixel_targets_shows_the_guessed_pixels_at_the_hidden_patches() -> None:
    """Un-normalised by the patch's own mean and deviation, in NumPy here; the others are the picture's."""
    rng = np.random.default_rng(0)
    views = [np.asarray(draw_shape(shape, 32, rng)) for shape in ("disc", "square")]
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[0, 1, 2] = masks[1, 3, 0] = True
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(variant("beit_mini_patch8_32").for_pretraining(192)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        images = normalise(to_unit(views, torch.device("cpu")), model.image_spec)
        said = model(images, torch.from_numpy(masks)).numpy()
    sheet = np.asarray(draw_predictions(model, PixelTargets(), Batch(views, views, masks)))
    assert sheet.shape == (2 * 100 + 4, 4 * 100 + 4, 3)  # picture, masked, its pixels, the guesses
    for row, (view, (y, x)) in enumerate(zip(views, ((1, 2), (3, 0)), strict=True)):
        tiles = [sheet[4 + 100 * row :, 4 + 100 * column :][:96:3, :96:3] for column in range(4)]
        np.testing.assert_array_equal(tiles[0], view)
        np.testing.assert_array_equal(tiles[2], view)
        at = np.s_[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        patch = view[at].transpose(2, 0, 1) / 255
        guess = said[row].reshape(3, 8, 8) * np.sqrt(patch.var(ddof=1) + 1e-6) + patch.mean()
        shown = tiles[3][at].transpose(2, 0, 1).astype(float)
        assert np.abs(shown - guess.clip(0, 1) * 255).max() <= 1
        rest = view.copy()
        rest[at] = tiles[3][at]
        np.testing.assert_array_equal(tiles[3], rest)


def test_pixels_are_drawn_in_each_look(shapes: Path, tmp_path: Path) -> None:
    options = {**PRETRAIN, "steps": 2, "tokenizer": "pixels"}
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert len(list((done.folder / "pictures").glob("step-*.jpg"))) == 3
    assert "Guessed pixels have" in (done.folder / "report.html").read_text()


def test_probe_data_without_val_is_probed_with_the_runs_workers_and_said_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared_by = []
    load_ahead = beit.frozen.load_ahead

    def noted(make: Any, steps: range, workers: int) -> Any:
        prepared_by.append(workers)
        return load_ahead(make, steps, workers)

    monkeypatch.setattr(beit.frozen, "load_ahead", noted)
    options = {**PRETRAIN, "steps": 2, "tokenizer": "pixels", "workers": 3}
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options, probe_data=shapes / "train")
    assert set(prepared_by) == {3}
    assert done.said.count("fitted to 30 pictures") == 1
    looks = json.loads((done.folder / "looks.json").read_text())
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert "6 labelled pictures named right" in (done.folder / "report.html").read_text()
