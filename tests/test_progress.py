"""Progress as people read it; the numbers of a loop are in tests/test_run.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT

import beit.progress
from beit.progress import Progress, peak_memory_mib


class Clock:
    """Seconds that pass only where a test says so."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(beit.progress.time, "monotonic", lambda: clock.now)
    return clock


def test_progress_off_a_terminal_is_a_plain_line_every_half_minute(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress("flowers.run", 100) as progress:
        for done in range(1, 101):
            clock.now += 1.0
            progress.update(done, "loss 2.5")
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 3
    assert lines[0].startswith("flowers.run 31/100, ")
    assert lines[0].endswith("loss 2.5")
    left = float(lines[1].split(", ")[1].removesuffix(" s left"))
    assert left == pytest.approx(100 - 62, abs=2)  # a second a step


def test_the_time_until_the_first_step_says_nothing_of_the_pace(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress("run", 100) as progress:
        for done in (1, 2, 3):
            clock.now = 460.0 + 40 * done
            progress.update(done, "loss 2.5")
    assert capfd.readouterr().err.splitlines() == [
        "run 1/100, loss 2.5", "run 2/100, 3920 s left, loss 2.5", "run 3/100, 3880 s left, loss 2.5",
    ]  # fmt: skip


def test_quiet_progress_is_silent(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("x", 3, quiet=True) as progress:
        clock.now = 1000.0
        progress.update(1)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told elsewhere with the parent's")
def test_the_memory_of_a_process_is_not_its_parents() -> None:
    held = torch.ones(75_000_000)  # 286 MiB
    code = "import beit.progress; print(beit.progress.peak_memory_mib())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert 0 < float(done.stdout) < 250 < held.numel() * 4 / 2**20 < peak_memory_mib()
