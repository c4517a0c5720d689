"""Looks at a pre-training: what is probed and drawn when, and the page that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit.data import open_source
from beit.model import Beit, BeitConfig
from beit.watch import MOST_SHEETS, Watch


@pytest.fixture
def model() -> Beit:
    torch.manual_seed(0)
    return Beit(BeitConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)).eval()


def watch(out: Path, shapes: Path, **others: Any) -> Watch:
    """A watch that draws noise, the hardest to make small."""
    rng = np.random.default_rng(0)

    def draw(_: Beit) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (804, 504, 3), dtype=np.uint8))

    out.mkdir(exist_ok=True)
    (out / "run.toml").write_text("seed = 0\n")
    return Watch(out, open_source(shapes), (1, 2), "fp32", draw, **others)


def test_a_page_shows_a_dozen_sheets_evenly_spread_and_stays_below_5_mb(
    shapes: Path, tmp_path: Path, model: Beit
) -> None:
    looks = watch(tmp_path / "run", shapes)
    for step in range(0, 340, 10):
        looks.look(model, step, probe=step % 100 == 0)
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 34
    lines = [{"step": step, "loss": 1 / (1 + step), "lr": 1e-3} for step in range(50_000)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    looks.write_page("A run", [("steps", "0", "")], 16)
    page = (tmp_path / "run" / "report.html").read_text()
    shown = [int(step) for step in re.findall(r'alt="step-(\d+)"', page)]
    assert len(shown) == MOST_SHEETS
    assert (shown[0], shown[-1]) == (0, 330)
    assert np.diff(shown).min() == np.diff(shown).max() == 30
    assert "All 34 sheets are in run/pictures" in page
    assert len(page) < 5e6


def test_a_look_without_probes_draws_alone_but_the_first_probes_always(
    shapes: Path, tmp_path: Path, model: Beit
) -> None:
    looks = watch(tmp_path / "run", shapes)
    for step, probe in ((0, False), (1, False), (2, True)):
        looks.look(model.train(step == 1), step, probe)
        assert model.training == (step == 1)
    assert [look["step"] for look in looks.looks] == [0, 2]
    assert looks.looks == json.loads((tmp_path / "run" / "looks.json").read_text())
    assert looks.looks[0].keys() == {"step", "effective_rank_1", "effective_rank_2"}
    sheets = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == [f"step-{step:08d}.jpg" for step in range(3)]


def test_a_run_that_goes_on_forgets_later_looks(shapes: Path, tmp_path: Path, model: Beit) -> None:
    looks = watch(tmp_path / "run", shapes)
    for step in (0, 4, 8):
        looks.look(model, step)
    again = watch(tmp_path / "run", shapes)
    again.look(model, 6, probe=False)
    assert [look["step"] for look in again.looks] == [0, 4]
