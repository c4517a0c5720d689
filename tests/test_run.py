"""The run folder: resume, torn files, other settings, stop signals, settings as TOML."""

from __future__ import annotations

import copy
import errno
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import held_by_another_process
from safetensors.torch import load_file
from torch import Tensor, nn

import beit.folder_lock
import beit.progress
import beit.run
from beit.atomic import CannotWrite
from beit.folder_lock import FolderTaken
from beit.optim import EMA, adamw, update
from beit.run import (
    NotFinite,
    Run,
    Stopped,
    check_folder,
    read_metrics,
    step_seed,
    weights_hash,
)
from beit.settings import FREE_SETTINGS, RunError
from beit.snapshots import DTYPES, snapshots, write_snapshot, write_tensors
from beit.tally import Tally
from beit.training import OptimizerWatch, load_optimizer_tensors, optimizer_tensors
from beit.training import Training as TrainingState

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Settings:
    data: Path = Path("pictures")
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    steps: int = 12
    val: Path | None = None
    augment: bool = True
    workers: int = 2


# --- A tiny training -------------------------------------------------------------------------------


@dataclass
class Training:
    """Dropout and batch norm, so that draws and buffers count; stops or is poisoned where told to."""

    run: Run
    stop_after: int = 1000
    seen: list[int] = field(default_factory=list)
    seed: int = 5
    total: int = 12
    signal_number: int | None = None
    poison: Callable[[Training, Tensor], float] | None = None  # gives what the loss is multiplied by
    poison_steps: set[int] = field(default_factory=set)
    left_out: int = -1  # a step whose update is not made
    frame: dict[str, Any] = field(default_factory=dict)  # more for `steps`

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        self.optimizer = adamw(list(self.model.parameters()), lr=0.01)
        self.ema = EMA(self.model, 0.9)

    def batches(self, steps: range) -> Iterator[Tensor]:
        for step in steps:
            yield torch.randn(6, 4, generator=torch.Generator().manual_seed(step))

    def go(self) -> dict[str, Tensor]:
        options = {"save_every": 4, "seed": self.seed, "ema": self.ema, **self.frame}
        loop = self.run.steps(self.model, self.optimizer, self.total, self.batches, **options)
        for step, batch in loop:
            if step == self.stop_after:
                if self.signal_number is None:
                    self.run._save_here = lambda *_: None  # which a power cut leaves no time for
                    raise PowerCut
                signal.raise_signal(self.signal_number)
            factor = 1.0
            if self.poison is not None and step in self.poison_steps:
                factor = self.poison(self, batch)
            loss = F.cross_entropy(self.model(batch), torch.arange(6) % 3) * factor
            loss.backward()
            if step != self.left_out:
                update(self.optimizer, loss, clip_grad_norm=1.0)
            self.optimizer.zero_grad()
            self.seen.append(step)
            self.run.log(step + 1, loss=loss.item())
        return self.everything

    @property
    def everything(self) -> dict[str, Tensor]:
        """Weights, buffers, moments, counters and average, by name."""
        files = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "ema": self.ema.tensors,
        }
        return {f"{file}.{name}": t.clone() for file, ts in files.items() for name, t in ts.items()}


class PowerCut(Exception):
    pass


def train(folder: Path, **options: Any) -> Training:
    return Training(Run(folder, Settings()), **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], str]:
    """All numbers, and the metrics, of a run that nothing stopped."""
    training = train(tmp_path_factory.mktemp("unbroken") / "run")
    return training.go(), training.run.metrics_file.read_text()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("stop_after", [3, 4, 7, 11])
def test_resume_is_bit_exact(tmp_path: Path, unbroken: Any, stop_after: int) -> None:
    """After a cut at any step: weights, buffers, moments, averages and metrics of an unbroken run."""
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=stop_after).go()
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen == list(range(stop_after // 4 * 4, 12))
    assert second.run.metrics_file.read_text() == unbroken[1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_checkpoint_that_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Its tensors lie in mapped files, twelve bytes a parameter; one that stayed would keep its file."""
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=5).go()
    second = train(tmp_path / "run")
    loop = second.run.steps(second.model, second.optimizer, 12, second.batches, 4, 5, ema=second.ema)
    assert next(iter(loop))[0] == 4
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    loop.close()  # type: ignore[attr-defined]


def test_another_seed_gives_other_weights(tmp_path: Path, unbroken: Any) -> None:
    other = train(tmp_path / "run", seed=6).go()
    assert not torch.equal(other["model.0.weight"], unbroken[0]["model.0.weight"])


def test_every_step_of_every_seed_begins_with_draws_of_its_own(tmp_path: Path) -> None:
    def draws(name: str, seed: int) -> list[float]:
        training = train(tmp_path / name)
        loop = training.run.steps(
            training.model, training.optimizer, 6, lambda steps: steps, save_every=100, seed=seed
        )
        return [torch.rand(()).item() for step, batch in loop if step == batch]

    runs = [draws(f"{seed}", seed) for seed in range(4)]
    assert len({draw for run in runs for draw in run}) == 4 * 6
    assert draws("again", 2) == runs[2]


def test_a_finished_run_takes_no_more_steps(tmp_path: Path, unbroken: Any) -> None:
    train(tmp_path / "run").go()
    again = train(tmp_path / "run")
    same(again.go(), unbroken[0])
    assert again.seen == []
    assert again.run.metrics_file.read_text() == unbroken[1]


def test_going_on_is_told_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=5).go()
    train(tmp_path / "run").go()
    out, err = capfd.readouterr()
    assert "run: going on from step 4 of 12" in err
    assert out == ""


# --- Checkpoints ---------------------------------------------------------------------------------


def test_two_newest_checkpoints_are_kept_and_the_last_step_is_one(tmp_path: Path) -> None:
    train(tmp_path / "run", total=11).go()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000011"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints" / kept[0]).iterdir()) == [
        "SHA256SUMS", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_saved_checkpoints_hold_the_weights(tmp_path: Path) -> None:
    training = train(tmp_path / "run", total=4)
    training.go()
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    same(load_file(folder / "model.safetensors"), training.model.state_dict())
    same(load_file(folder / "ema.safetensors"), training.ema.tensors)


@pytest.mark.parametrize(
    "torn", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("how", ["half", "empty", "gone", "one bit"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, unbroken: Any, capfd: pytest.CaptureFixture[str], torn: str, how: str
) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=10).go()
    file = tmp_path / "run" / "checkpoints" / "step-00000008" / torn
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "one bit":  # the last number's: all of its file can still be read
        place = len(content) - (1 if torn.endswith(".safetensors") else 4)
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2] if how == "half" else b"")
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen[0] == 4
    assert "step-00000008 cannot be read" in capfd.readouterr().err
    assert second.run.metrics_file.read_text() == unbroken[1]
    names = {p.name for p in second.run.checkpoints.iterdir()}
    assert names == {"step-00000008", "step-00000012", "unreadable-step-00000008"}


def test_a_run_none_of_whose_checkpoints_can_be_read_is_not_begun_again(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=10).go()
    for file in tmp_path.glob("run/checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    for _ in range(2):  # and not when it is tried once more
        with pytest.raises(RunError, match=r"none of the checkpoints .* \(2 set aside.* --overwrite"):
            train(tmp_path / "run").go()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == logged


def test_a_disk_that_does_not_answer_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=10).go()

    def away(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(beit.run, "verify_snapshot", away)
        with pytest.raises(CannotWrite, match=r"Input/output error\. They may be whole"):
            train(tmp_path / "run").go()
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen[0] == 8


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path: Path, unbroken: Any) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=6).go()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000004.best")
    same(train(tmp_path / "run", frame={"keep_every": 4}).go(), unbroken[0])
    assert (checkpoints / "step-00000004.best" / "model.safetensors").exists()


def test_an_error_of_the_pictures_ends_a_run_that_has_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], unbroken: Any
) -> None:
    training = train(tmp_path / "run")
    batches = training.batches

    def fail_at_7(steps: range) -> Iterator[Any]:
        for step, batch in zip(steps, batches(steps), strict=False):
            if step == 7:
                raise ConnectionError("the store is away")
            yield batch

    training.batches = fail_at_7  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        training.go()
    assert "run: step 7 is saved" in capfd.readouterr().err
    again = train(tmp_path / "run")
    same(again.go(), unbroken[0])
    assert again.seen[0] == 7


def test_an_error_of_the_loop_ends_a_run_that_has_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], unbroken: Any
) -> None:
    """As where another process has ended. Batch norm has seen the batch whose update is not made."""

    def fail(training: Training, batch: Tensor) -> float:
        training.model(batch)
        raise ConnectionError("connection closed by peer")

    with pytest.raises(ConnectionError):
        train(tmp_path / "run", poison=fail, poison_steps={7}).go()
    assert "run: step 7 is saved" in capfd.readouterr().err
    again = train(tmp_path / "run")
    same(again.go(), unbroken[0])
    assert again.seen[0] == 7


@pytest.mark.parametrize(("step", "kept"), [(0, []), (7, ["step-00000004"])])
def test_an_error_saves_neither_the_beginning_nor_what_is_not_finite(
    tmp_path: Path, step: int, kept: list[str]
) -> None:
    def fail(training: Training, batch: Tensor) -> float:
        training.model[0].weight.data.fill_(math.nan)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        train(tmp_path / "run", poison=fail, poison_steps={step}).go()
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == kept


def test_an_error_while_the_weights_change_saves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], unbroken: Any
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    def arm(training: Training, batch: Tensor) -> float:
        training.optimizer.register_step_post_hook(fail)
        training.optimizer._optimizer_step_post_hooks.move_to_end(  # before the watch's
            next(iter(training.optimizer._optimizer_step_post_hooks))
        )
        return 1.0

    with pytest.raises(MemoryError):
        train(tmp_path / "run", poison=arm, poison_steps={7}).go()
    assert "is saved" not in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    same(train(tmp_path / "run").go(), unbroken[0])


def test_a_stop_signal_while_an_error_is_saved_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    """The watching thread would write the same files at the same time."""
    writing, most, codes, write = 0, 0, [], Run._write

    def slow(*args: Any) -> None:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        if writing == 1:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.6)
        write(*args)
        writing -= 1

    training = train(tmp_path / "run")
    batches = training.batches

    def fail_at_3(steps: range) -> Iterator[Any]:
        yield from batches(steps[:3])
        monkeypatch.setattr(Run, "_write", slow)
        raise ConnectionError("the store is away")

    training.batches = fail_at_3  # type: ignore[method-assign]
    monkeypatch.setattr("beit.stop.GRACE_S", 0.1)
    monkeypatch.setattr("beit.stop.os._exit", codes.append)
    with pytest.raises(ConnectionError):
        training.go()
    assert most == 1
    assert codes in ([], [143])
    monkeypatch.setattr(Run, "_write", write)
    again = train(tmp_path / "run")
    same(again.go(), unbroken[0])
    assert again.seen[0] == 3


def test_a_save_that_fails_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    training = train(tmp_path / "run")
    replace, count = os.replace, 0

    def full_disk(source: Path, target: Path) -> None:
        nonlocal count
        if Path(target).name == "step-00000008":
            count += 1
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(CannotWrite, match=r"No space left.*go on from step 4") as caught:
        training.go()
    assert caught.value.exit_code == 6
    assert count == 1
    monkeypatch.undo()
    names = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert names == ["step-00000004"]
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])


def test_what_a_killed_save_left_behind_is_swept_away(tmp_path: Path) -> None:
    training = train(tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / ".writing-1"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    training.go()
    assert not left.exists()


def test_optimizer_state_goes_to_disk_and_back_by_name(tmp_path: Path) -> None:
    training = train(tmp_path / "run", total=3)
    training.go()
    saved = optimizer_tensors(training.model, training.optimizer)
    assert {"step.0.weight", "exp_avg.0.weight", "exp_avg_sq.4.bias"} <= saved.keys()
    fresh = train(tmp_path / "other")
    load_optimizer_tensors(fresh.model, fresh.optimizer, saved)
    same(optimizer_tensors(fresh.model, fresh.optimizer), saved)


def test_a_checkpoint_is_written_when_the_last_is_long_ago(
    tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may take minutes, and a kill should not cost hours of them."""
    monkeypatch.setattr(beit.run, "SAVE_AFTER_S", 0.0)
    written: list[int] = []
    save = Run.save
    monkeypatch.setattr(
        Run, "save", lambda run, t, *given: written.append(t.step) or save(run, t, *given)
    )
    same(train(tmp_path / "run").go(), unbroken[0])
    assert written == list(range(1, 13))


def test_every_nth_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    frame = {"save_every": 1, "keep_last": 3, "keep_every": 5}
    training = train(tmp_path / "run", frame=frame)
    training.go()
    steps = [int(p.name[-8:]) for p in sorted(training.run.checkpoints.iterdir())]
    assert steps == [5, 10, 11, 12]


def test_checkpoints_stand_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """Their names have eight digits, and a step of 25 ms comes to more in a month."""
    for step in (99_999_996, 100_000_000, 99_999_998, 8):
        (tmp_path / f"step-{step:08d}").mkdir()
    steps = [int(folder.name[5:]) for folder in snapshots(tmp_path)]
    assert steps == [8, 99_999_996, 99_999_998, 100_000_000]


def test_sums_are_those_of_the_ordinary_tool(tmp_path: Path) -> None:
    training = train(tmp_path / "run", total=4)
    training.go()
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=training.run.checkpoints / "step-00000004", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 4


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    training = train(tmp_path / "run", stop_after=5)
    with pytest.raises(PowerCut):
        training.go()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000))
    with pytest.raises(CannotWrite) as caught:
        train(tmp_path / "run").go()
    assert "it needs 0.00 GB, and 0.00 GB are free. Make room there" in str(caught.value)
    assert "go on from step 4" in str(caught.value)
    assert [p.name for p in training.run.checkpoints.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    same(train(tmp_path / "run").go(), unbroken[0])


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_disk_that_fills_while_a_checkpoint_is_written_costs_nothing(
    tmp_path: Path, unbroken: Any
) -> None:
    import resource

    training = train(tmp_path / "run", stop_after=5)
    with pytest.raises(PowerCut):
        training.go()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # bytes of any one file
    try:
        with pytest.raises(CannotWrite, match="File too large"):
            train(tmp_path / "run").go()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in training.run.checkpoints.iterdir()] == ["step-00000004"]
    same(train(tmp_path / "run").go(), unbroken[0])


def test_moments_of_channels_last_weights_come_back_in_their_order(tmp_path: Path) -> None:
    """A fused step walks weights and moments by address."""

    def batches(steps: range) -> Iterator[Tensor]:
        for step in steps:
            yield torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))

    def go(name: str, stop_after: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        model = model.to(memory_format=torch.channels_last)
        optimizer = adamw(list(model.parameters()), lr=0.1)
        run = Run(tmp_path / name, Settings())
        for step, images in run.steps(model, optimizer, 6, batches, 2, seed=1):
            if step == stop_after:
                break
            loss = model(images).square().mean()
            loss.backward()
            update(optimizer, loss)
        return model.state_dict()

    go("broken", 3)
    same(go("broken", 99), go("whole", 99))


@pytest.mark.parametrize("age", [0.0, 1000.0])
def test_before_a_look_there_is_a_checkpoint_where_the_last_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    monkeypatch.setattr(beit.run, "LOOK_SAVES_AFTER_S", age)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=6, frame={"save_every": 100, "look_every": 3}).go()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ([] if age else ["step-00000003", "step-00000006"])


@pytest.mark.parametrize("stop_after", [3, 5, 99])
def test_a_tally_is_gone_on_with_and_one_that_was_never_saved_begins_anew(
    tmp_path: Path, stop_after: int
) -> None:
    def go(name: str, stop_after: int, tally: Tally | None) -> None:
        training = train(tmp_path / name)
        loop = training.run.steps(
            training.model, training.optimizer, 6, training.batches, 2, seed=1, tally=tally
        )
        for step, images in loop:
            if step == stop_after:
                training.run._save_here = lambda *_: None
                break
            if tally is not None:
                tally.add(torch.tensor([step, 1]), torch.tensor(float(step)))
            loss = training.model(images).square().mean()
            loss.backward()
            update(training.optimizer, loss)

    go("run", stop_after, Tally(2))
    go("run", 99, tally := Tally(2))
    assert tally.counts.tolist() == [15, 6]
    assert tally.mean_error() == 2.5
    go("old", 3, None)
    go("old", 99, tally := Tally(2))
    assert tally.counts.tolist() == [2 + 3 + 4 + 5, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_written_as_the_library_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.arange(24).reshape(2, 3, 4) % 2 if dtype == torch.bool else torch.arange(24.0)
    tensors = {
        "a": numbers.to(dtype),
        "b.ü": numbers.to(dtype).flatten()[::2],  # not contiguous
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "other": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "wide": torch.tensor([1.5], dtype=torch.float64),
    }
    digest = write_tensors(tmp_path / "x.safetensors", tensors)
    same(load_file(tmp_path / "x.safetensors"), {**tensors, "b.ü": tensors["b.ü"].contiguous()})
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


# --- Numbers that are not finite -------------------------------------------------------------------


def in_gradient(layer: int, value: float) -> Callable[[Training, Tensor], float]:
    def poison(training: Training, batch: Tensor) -> float:
        handle: Any = None

        def spoil(gradient: Tensor) -> Tensor:
            handle.remove()
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
            return gradient

        handle = training.model[layer].weight.register_hook(spoil)
        return 1.0

    return poison


def in_place(find: Callable[[Training, Tensor], Tensor], value: float) -> Callable[..., float]:
    def poison(training: Training, batch: Tensor) -> float:
        with torch.no_grad():
            find(training, batch).view(-1)[0] = value
        return 1.0

    return poison


def moment(key: str) -> Callable[[Training, Tensor], Tensor]:
    return lambda training, batch: training.optimizer.state[training.model[0].weight][key]


@pytest.fixture(params=["at once", "late"])
def answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When a step says whether it was finite: at once, as on a processor, or a step later, as on a GPU."""

    class Late(OptimizerWatch):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.late = True

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    if request.param == "late":
        monkeypatch.setattr(beit.run, "OptimizerWatch", Late)
        monkeypatch.setattr(torch.cuda, "Event", Event)
    return str(request.param)


LEFT_OUT = {
    "loss nan": lambda training, batch: math.nan,
    "loss inf": lambda training, batch: math.inf,
    "first gradient": in_gradient(0, math.nan),
    "last gradient": in_gradient(4, -math.inf),
}
UNDONE = {
    "input": in_place(lambda training, batch: batch, math.nan),  # which batch norm remembers
    "weight": in_place(lambda training, batch: training.model[0].weight, math.nan),
    "bias": in_place(lambda training, batch: training.model[4].bias, math.inf),
    "exp_avg": in_place(moment("exp_avg"), math.nan),
    "exp_avg_sq": in_place(moment("exp_avg_sq"), math.inf),
    "buffer": in_place(lambda training, batch: training.model[1].running_var, math.nan),
    "average": in_place(lambda training, batch: training.ema.tensors["0.weight"], math.nan),
}


@pytest.mark.parametrize("step", [5, 7, 11])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_update_that_is_not_finite_is_left_out(
    tmp_path: Path, answers: str, name: str, step: int
) -> None:
    """The run ends as one that never made this update, bit for bit."""
    reference = train(tmp_path / "reference", left_out=step).go()
    ours = train(tmp_path / "run", poison=LEFT_OUT[name], poison_steps={step}).go()
    for key, value in reference.items():
        if not key.startswith("ema."):  # which counts steps, not updates
            assert torch.equal(value, ours[key]), key
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    assert state == {
        "step": 12,
        "skipped": 1,
        "in_a_row": int(step == 11),
        "rolled_back": 0,
        "jumped": 0,
    }


@pytest.mark.parametrize("step", [5, 7, 11])
@pytest.mark.parametrize("name", UNDONE)
def test_what_is_poisoned_for_good_is_rolled_back(
    tmp_path: Path, answers: str, unbroken: Any, name: str, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments, buffers or averages that are not finite reach no checkpoint."""

    def once(training: Training, batch: Tensor) -> float:
        training.poison_steps = set()
        return UNDONE[name](training, batch)

    training = train(tmp_path / "run", poison=once, poison_steps={step})
    same(training.go(), unbroken[0])
    assert training.run.metrics_file.read_text() == unbroken[1]
    said = capfd.readouterr().err
    assert f"not finite at step {min(12, step // 4 * 4 + 4)}; going back to step {step // 4 * 4}" in said
    for file in training.run.checkpoints.glob("*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values()), file
    state = json.loads((training.run.checkpoints / "step-00000012" / "state.json").read_text())
    assert state["rolled_back"] == 1


def test_many_in_a_row_are_rolled_back_twice_and_then_end_the_run(tmp_path: Path, answers: str) -> None:
    training = train(
        tmp_path / "run", total=40, poison=lambda *_: math.nan, poison_steps=set(range(6, 40)),
        frame={"max_skipped": 3, "save_every": 5},
    )  # fmt: skip
    with pytest.raises(NotFinite) as caught:
        training.go()
    late = [9] if answers == "late" else []
    assert training.seen == [0, 1, 2, 3, 4, *3 * [5, 6, 7, 8, *late]]
    told = f"3 updates in a row were not finite at step {9 + len(late)}, and so they were from step 5"
    assert told in str(caught.value)
    assert "--out" in str(caught.value)
    assert caught.value.exit_code == 1
    assert [p.name for p in training.run.checkpoints.iterdir()] == ["step-00000005"]


def test_the_checkpoint_of_step_0_brings_back_that_there_were_no_moments(
    tmp_path: Path, answers: str, unbroken: Any
) -> None:
    """A signal in a long first step leaves one."""

    def once(training: Training, batch: Tensor) -> float:
        training.poison_steps = set()
        return UNDONE["exp_avg"](training, batch)

    training = train(tmp_path / "run", poison=once, poison_steps={2})
    stored = training.run.checkpoints / "step-00000000"
    files = TrainingState(training.model, training.optimizer, training.ema)
    write_snapshot(stored, files.tensors(), files.counters())
    same(training.go(), unbroken[0])


def test_checkpoints_between_updates_that_are_left_out_are_put_off(
    tmp_path: Path, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run whose every update is left out would go back to one of them again and again, to its end."""
    written: list[int] = []
    save = Run.save
    monkeypatch.setattr(
        Run, "save", lambda run, t, *given: written.append(t.step) or save(run, t, *given)
    )
    frame = {"max_skipped": 3, "save_every": 2}
    never = {"poison": lambda *_: math.nan, "poison_steps": set(range(7, 40)), "total": 40}
    training = train(tmp_path / "never", frame=frame, **never)
    with pytest.raises(NotFinite, match=r"3 updates in a row .* and so they were from step 6"):
        training.go()
    assert written == [2, 4, 6]
    del written[:]
    twice = {"poison": lambda *_: math.nan, "poison_steps": {7, 8, 11}}
    train(tmp_path / "twice", frame=frame, **twice).go()
    assert written == [2, 4, 6, 10, 12]  # not 8; the last whatever it was
    del written[:]
    once = {"poison": lambda *_: math.nan, "poison_steps": {4}}
    train(tmp_path / "once", frame={"max_skipped": 3, "save_every": 5}, **once).go()
    assert written == [6, 10, 12]  # at the first update that is made again


def test_a_stop_between_updates_that_are_left_out_saves(tmp_path: Path, answers: str) -> None:
    poisoned = {"poison": lambda *_: math.nan, "poison_steps": {5, 6, 7}}
    at = 8 if answers == "late" else 7
    whole = train(tmp_path / "whole", **poisoned).go()
    stopped = train(tmp_path / "run", stop_after=6, signal_number=signal.SIGTERM, **poisoned)
    with pytest.raises(Stopped, match=f"stopped and saved at step {at} of 12"):
        stopped.go()
    again = train(tmp_path / "run", **poisoned)
    same(again.go(), whole)
    assert again.seen[0] == at


@pytest.mark.parametrize("never", [(6, 7, 8), (6, 7, 8, 9)])
def test_batches_that_are_never_finite_are_passed_over(
    tmp_path: Path, answers: str, never: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """First the same batches once more, then those behind them; a cut afterwards changes nothing."""

    def go(folder: Path, stop_after: int = 1000) -> tuple[dict[str, Tensor], list[int]]:
        known = [batch.sum() for batch in train(tmp_path / "other").batches(range(30))]
        fed: list[int] = []

        def poison(_: Training, batch: Tensor) -> float:
            fed.append(int(torch.stack(known).sub(batch.sum()).abs().argmin()))
            return math.nan if fed[-1] in never else 1.0

        training = train(
            folder, poison=poison, poison_steps=set(range(12)), stop_after=stop_after,
            frame={"max_skipped": 3, "save_every": 5},
        )  # fmt: skip
        return training.go(), fed

    ours, fed = go(tmp_path / "run")
    late = [9] if answers == "late" else []
    jumped = 4 + len(late)
    tried = [5, 6, 7, 8, *late]
    assert fed == [0, 1, 2, 3, 4, *tried, *tried, *range(5 + jumped, 12 + jumped)]
    told = f"not finite at step {5 + jumped}; going back to step 5, past the batches of {jumped} steps"
    assert told in capfd.readouterr().err
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    skipped = len(set(never) - set(tried))
    assert state == {"step": 12, "skipped": skipped, "in_a_row": 0, "rolled_back": 2, "jumped": jumped}
    with pytest.raises(PowerCut):
        go(tmp_path / "cut", stop_after=11)
    again, fed = go(tmp_path / "cut")
    assert fed == [10 + jumped, 11 + jumped]
    same(again, ours)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path, answers: str) -> None:
    training = train(
        tmp_path / "run", poison=lambda *_: math.nan, poison_steps=set(range(12)),
        frame={"max_skipped": 3},
    )  # fmt: skip
    with pytest.raises(NotFinite, match="there is no checkpoint to go back to"):
        training.go()
    assert training.seen == [0, 1, 2, *([3] if answers == "late" else [])]


def test_a_stop_with_poisoned_weights_keeps_the_good_checkpoint(
    tmp_path: Path, answers: str, unbroken: Any
) -> None:
    def poison(training: Training, batch: Tensor) -> float:
        signal.raise_signal(signal.SIGTERM)
        return UNDONE["exp_avg"](training, batch)

    with pytest.raises(Stopped, match="saved at step 4 of 12"):
        train(tmp_path / "run", poison=poison, poison_steps={5}).go()
    same(train(tmp_path / "run").go(), unbroken[0])


def test_the_first_batch_that_is_not_finite_can_be_replayed(tmp_path: Path, answers: str) -> None:
    training = train(
        tmp_path / "run", poison=UNDONE["input"], poison_steps={2, 6}, frame={"save_every": 100}
    )
    with pytest.raises(NotFinite):
        training.go()
    (folder,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert folder.name == "step-00000002"
    told = json.loads((folder / "batch-0.json").read_text())
    batch = load_file(folder / "batch-0.safetensors")["batch"]
    again = train(tmp_path / "again")
    again.model.load_state_dict(load_file(folder / "model.safetensors"))
    torch.manual_seed(told["torch_seed"])
    assert told["torch_seed"] == step_seed(5, 2)
    assert F.cross_entropy(again.model(batch), torch.arange(6) % 3).isnan()
    clean = next(again.batches(range(2, 3)))
    assert torch.equal(batch.flatten()[1:], clean.flatten()[1:])


def test_a_batch_of_any_kind_is_captured_by_name(tmp_path: Path, answers: str) -> None:
    class Batch(NamedTuple):
        views: list[np.ndarray]
        names: tuple[str, ...]
        mask: dict[str, Tensor]

    model = nn.Linear(2, 2)
    optimizer = adamw(list(model.parameters()), lr=0.1)
    run = Run(tmp_path / "run", Settings())
    views = [np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((1, 1), np.uint8)]
    batch = Batch(views, ("a", "é"), {"left": torch.tensor([True])})

    def go() -> None:
        for _ in run.steps(model, optimizer, 1, lambda steps: [batch], 10, seed=0):
            loss = model(torch.ones(1, 2)).sum() * math.nan
            loss.backward()
            update(optimizer, loss)

    with pytest.raises(NotFinite, match="none of 1 updates was finite, so nothing was learned"):
        go()
    folder = run.out / "nonfinite" / "step-00000000"
    tensors = load_file(folder / "batch-0.safetensors")
    assert tensors.keys() == {"views.0", "views.1", "mask.left"}
    np.testing.assert_array_equal(tensors["views.0"].numpy(), views[0])
    assert json.loads((folder / "batch-0.json").read_text())["batch"] == {"names.0": "a", "names.1": "é"}


# --- Metrics -------------------------------------------------------------------------------------


def test_metrics_are_one_json_object_a_line_with_six_digits(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", Settings())
    run.log(10, loss=1.23456789, lr=1.23456789e-5, epoch=2, note="é")
    run.log(20, loss=math.nan, lr=math.inf, rate=-math.inf)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert lines == [
        {"step": 10, "loss": 1.23457, "lr": 1.23457e-05, "epoch": 2, "note": "é"},
        {"step": 20, "loss": None, "lr": None, "rate": None},
    ]
    assert run.read_metrics() == lines


def test_a_loop_of_known_size_logs_its_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a line, each 1 s of waiting and 3 s of work, 8 pictures of 1 GFLOP, 10 GFLOP/s."""
    now = 0.0
    monkeypatch.setattr(beit.progress.time, "perf_counter", lambda: now)

    def batches(steps: range) -> Iterator[int]:
        nonlocal now
        for step in steps:
            now += 1.0
            yield step

    model = nn.Linear(2, 2)
    optimizer = adamw(list(model.parameters()), lr=0.1)
    run = Run(tmp_path / "run", Settings())
    for step, _ in run.steps(
        model, optimizer, 6, batches, 100, seed=0, batch_size=8, flops_per_image=1e9, peak_flops=1e10
    ):
        now += 3.0
        model.weight.grad = torch.full((2, 2), math.nan if step == 2 else 1.0)
        update(optimizer, torch.zeros(()))
        if step % 2:
            run.log(step + 1, loss=1.0)
    lines = run.read_metrics()
    assert [line.pop("memory_mib") > 50 for line in lines] == [True] * 3  # torch alone takes more
    shared = {"loss": 1.0, "images_per_second": 2.0, "data_wait_percent": 25.0, "mfu_percent": 20.0}
    assert lines == [
        {"step": 2, **shared, "skipped": 0},
        {"step": 4, **shared, "skipped": 1},
        {"step": 6, **shared, "skipped": 1},
    ]


def test_what_takes_long_beside_the_training_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    training = train(tmp_path / "run", total=3)
    training.poison = lambda training, _: watch(training)
    training.poison_steps = {1}

    def watch(training: Training) -> float:
        with training.run.apart("probing it"):
            pass
        with training.run.apart():
            pass
        return 1.0

    training.go()
    with training.run.apart("the last probe"):
        pass
    assert capfd.readouterr().err == "run: probing it\nrun: the last probe\n"


def test_tensorboard_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=re.escape('pip install "beit[tensorboard]"')):
        train(tmp_path / "run", frame={"tensorboard": True}).go()


def test_tensorboard_holds_what_the_metrics_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frame = {"tensorboard": True, "batch_size": 6}
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=6, frame=frame).go()
    training = train(tmp_path / "run", frame=frame)
    training.go()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for key in ("loss", "skipped"):
        logged = {event.step: event.value for event in board.Scalars(key)}
        told = {line["step"]: line[key] for line in training.run.read_metrics()}
        assert logged == pytest.approx(told)


def test_metrics_on_a_full_disk_end_with_6(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", Settings())
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match="No space left") as caught:
        run.log(1, loss=1.0)
    assert caught.value.exit_code == 6


def test_a_metrics_line_broken_by_a_crash_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "nothing.jsonl") == []


@pytest.mark.parametrize("broken", ['{"step": 9, "lo', "{", "\x00\x00\x00"])
def test_resume_survives_a_broken_metrics_line(tmp_path: Path, unbroken: Any, broken: str) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=9).go()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(broken)
    second = train(tmp_path / "run")
    second.go()
    assert second.run.metrics_file.read_text() == unbroken[1]


# --- The folder ------------------------------------------------------------------------------------


def test_a_new_run_writes_its_settings(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run", Settings())
    content = tomllib.loads((run.out / "run.toml").read_text())
    assert content == {
        "command": "Settings", "data": "pictures", "lr": 1e-3, "betas": [0.9, 0.98], "steps": 12,
        "augment": True, "workers": 2,
    }  # fmt: skip
    assert not run.finished


def test_same_settings_go_on_and_free_ones_may_differ(tmp_path: Path) -> None:
    Run(tmp_path / "run", Settings())
    Run(tmp_path / "run", Settings())
    assert "workers" in FREE_SETTINGS
    Run(tmp_path / "run", Settings(workers=9))


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    Run(tmp_path / "run", Settings())
    with pytest.raises(RunError) as caught:
        Run(tmp_path / "run", Settings(lr=2e-3, val=Path("v"), betas=(0.9, 0.999)))
    text = str(caught.value)
    assert "lr was 0.001, now 0.002" in text
    assert "val was None, now 'v'" in text
    assert "betas was [0.9, 0.98], now [0.9, 0.999]" in text
    assert "--overwrite" in text
    assert "workers" not in text
    assert "steps" not in text


def test_a_folder_that_another_process_works_in_is_waited_for_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path / "run", Settings())
    with held_by_another_process(tmp_path / "run") as process:
        monkeypatch.setattr(beit.folder_lock, "WAIT_S", 0)
        with pytest.raises(FolderTaken, match="another process is at work on"):
            Run(tmp_path / "run", Settings(), overwrite=True)
        monkeypatch.setattr(beit.folder_lock, "WAIT_S", 60)
        threading.Timer(0.2, process.kill).start()
        Run(tmp_path / "run", Settings())  # waits for its end
    assert (tmp_path / "run" / "run.toml").exists()


def test_another_command_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class OtherWork:
        data: Path = Path("pictures")

    Run(tmp_path / "run", OtherWork())
    with pytest.raises(
        RunError, match=r"run holds a run of beit other-work, and this is beit settings; choose another"
    ):
        Run(tmp_path / "run", Settings())


def test_what_a_run_began_with_must_stay_and_what_may_change_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, told = {"data_hash": "ab", "pictures": 3}, {"precision": "bf16", "processes": 2}
    Run(tmp_path / "run", Settings()).begin(same, told)
    run = Run(tmp_path / "run", Settings())
    run.begin(same, told)
    assert capsys.readouterr().err == ""
    run.begin(same, {**told, "precision": "fp32"})
    assert capsys.readouterr().err == "run: goes on though precision was bf16, now fp32\n"
    with pytest.raises(
        RunError, match=r"something else: pictures holds other pictures now\. Put that back"
    ):
        run.begin({**same, "data_hash": "cd"}, told)
    Run(tmp_path / "run", Settings(), overwrite=True).begin({**same, "data_hash": "cd"}, told)


def test_weights_are_known_by_every_bit_and_name() -> None:
    torch.manual_seed(0)
    one = torch.nn.Linear(3, 2)
    known = weights_hash(one)
    assert known == weights_hash(copy.deepcopy(one))
    with torch.no_grad():
        one.bias[1] = torch.nextafter(one.bias[1], torch.tensor(9.0))
    assert weights_hash(one) != known
    assert weights_hash(one.bfloat16()) != weights_hash(one.float())
    assert len(known) == 16


def test_overwrite_begins_again(tmp_path: Path) -> None:
    train(tmp_path / "run").go()
    run = Run(tmp_path / "run", Settings(lr=9.0), overwrite=True)
    assert sorted(p.name for p in run.out.iterdir()) == ["checkpoints", "run.toml"]
    assert not list(run.checkpoints.iterdir())


@pytest.mark.parametrize("inside", ["", "photos"])
def test_overwrite_spares_what_the_command_reads(tmp_path: Path, inside: str) -> None:
    out = tmp_path / "run"
    Run(out, Settings())
    (out / inside).mkdir(exist_ok=True)
    with pytest.raises(RunError, match=rf"--overwrite would delete {out / inside}, which this command"):
        check_folder(out, Settings(data=out / inside), overwrite=True)
    with pytest.raises(RunError, match="--overwrite would delete"):
        check_folder(out, Settings(data=out / "photos" / "?.png"), overwrite=True)
    check_folder(out, Settings(data=tmp_path), overwrite=True)  # the run lies in what is read: as before
    beside = tmp_path / "run.photos"
    beside.mkdir()
    check_folder(out, Settings(data=beside), overwrite=True)


def test_overwrite_empties_checkpoints_on_another_disk_and_leaves_what_else_is_linked(
    tmp_path: Path,
) -> None:
    train(tmp_path / "run").go()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    (tmp_path / "run" / "mine").symlink_to(tmp_path / "photos")
    run = Run(tmp_path / "run", Settings(lr=9.0), overwrite=True)
    assert sorted(p.name for p in run.out.iterdir()) == ["checkpoints", "run.toml"]
    assert run.checkpoints.is_symlink()
    assert not list((tmp_path / "disk").iterdir())
    assert (tmp_path / "photos" / "a.png").exists()


def test_a_run_killed_while_it_began_begins_again(tmp_path: Path) -> None:
    """Whatever of the first files was there."""
    (tmp_path / ".run.toml.4711").write_text("data = ")
    assert Run(tmp_path, Settings()).checkpoints.is_dir()
    (tmp_path / "checkpoints").rmdir()
    assert Run(tmp_path, Settings()).checkpoints.is_dir()


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_does_not_overwrite_what_it_was_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Those who start processes again give them the same words, --overwrite among them."""
    Run(tmp_path / "run", Settings())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setenv(name, "1")
    check_folder(tmp_path / "run", Settings(), overwrite=True)
    assert Run(tmp_path / "run", Settings(), overwrite=True).read_metrics() == [{"step": 1}]
    assert "so without --overwrite" in capsys.readouterr().err
    monkeypatch.setenv(name, "0")
    assert Run(tmp_path / "run", Settings(), overwrite=True).read_metrics() == []


def test_a_stopped_run_is_gone_on_with_without_overwrite(tmp_path: Path) -> None:
    """The same command would begin again."""
    Run(tmp_path / "run", Settings())
    training = Training(
        Run(tmp_path / "run", Settings(), overwrite=True), 3, signal_number=signal.SIGTERM
    )
    with pytest.raises(Stopped, match="give the same command without --overwrite to go on"):
        training.go()


def test_a_killed_overwrite_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run").go()

    def cut(path: Path) -> None:
        raise PowerCut

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(PowerCut):
        Run(tmp_path / "run", Settings(lr=9.0), overwrite=True)
    monkeypatch.undo()
    Run(tmp_path / "run", Settings())
    Run(tmp_path / "run", Settings(lr=9.0), overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and holds no run; choose another --out"):
        Run(tmp_path, Settings(), overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert Run(tmp_path, Settings()).checkpoints.is_dir()


def test_settings_that_are_not_toml_any_more_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("lr = = 3\n")
    with pytest.raises(RunError, match=r"run\.toml is not TOML"):
        Run(tmp_path, Settings())


def test_a_file_in_the_place_of_the_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(CannotWrite, match="cannot write the run folder") as caught:
            Run(out, Settings())
        assert caught.value.exit_code == 6


def test_finished_is_where_the_model_is(tmp_path: Path) -> None:
    run = Run(tmp_path, Settings())
    (tmp_path / "config.json").write_text("{}")
    assert run.finished


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_done_again(
    tmp_path: Path, unbroken: Any
) -> None:
    """Whoever makes room, and gives a script's commands again, would lose the model and wait for days."""
    train(tmp_path / "run").go()
    (tmp_path / "run" / "config.json").write_text("{}")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = train(tmp_path / "run")
    with pytest.raises(RunError, match="holds a finished run without a checkpoint"):
        again.go()
    assert again.seen == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


# --- Stop signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)],
)
def test_a_signal_saves_ends_with_its_code_and_loses_nothing(
    tmp_path: Path, unbroken: Any, number: int, code: int
) -> None:
    handler = signal.getsignal(number)
    training = train(tmp_path / "run", stop_after=5, signal_number=number)
    with pytest.raises(Stopped, match="stopped and saved at step 6 of 12") as caught:
        training.go()
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is handler
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen == [6, 7, 8, 9, 10, 11]


def test_a_signal_in_the_last_step_ends_the_command_and_keeps_the_run(
    tmp_path: Path, unbroken: Any
) -> None:
    """What follows the steps may take long; the same command does it, without a step."""
    training = train(tmp_path / "run", stop_after=11, signal_number=signal.SIGTERM)
    with pytest.raises(Stopped, match="saved at step 12 of 12"):
        training.go()
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen == []


def test_a_signal_while_the_last_step_is_saved_is_not_lost(
    tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Run.save

    def signalled(run: Run, training: Any, *given: int) -> None:
        save(run, training, *given)
        if training.step == 12:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", signalled)
        with pytest.raises(Stopped, match="saved at step 12 of 12") as caught:
            train(tmp_path / "run").go()
    assert caught.value.exit_code == 143
    same(train(tmp_path / "run").go(), unbroken[0])
