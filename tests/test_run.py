"""The run folder: resume, torn files, other settings, stop signals, settings as TOML."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import beit.atomic
import beit.run
from beit.atomic import write_atomically
from beit.run import (
    FREE_SETTINGS,
    CannotWrite,
    Progress,
    Run,
    RunError,
    Stopped,
    describe_settings,
    load_optimizer_tensors,
    optimizer_tensors,
    read_metrics,
    stop_signals,
    to_toml,
)

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
    """Dropout and batch norm, so that draws and buffers count; stops where it is told to."""

    run: Run
    stop_after: int = 1000
    seen: list[int] = field(default_factory=list)
    seed: int = 5
    total: int = 12
    signal_number: int | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def batches(self, steps: range) -> Iterator[Tensor]:
        for step in steps:
            yield torch.randn(6, 4, generator=torch.Generator().manual_seed(step))

    def go(self) -> dict[str, Tensor]:
        loop = self.run.steps(
            self.model, self.optimizer, self.total, self.batches, save_every=4, seed=self.seed
        )
        for step, batch in loop:
            if step == self.stop_after:
                if self.signal_number is None:
                    raise PowerCut
                signal.raise_signal(self.signal_number)
            loss = F.cross_entropy(self.model(batch), torch.arange(6) % 3)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.seen.append(step)
            self.run.log(step + 1, loss=loss.item())
        return self.model.state_dict()


class PowerCut(Exception):
    pass


def train(folder: Path, **options: Any) -> Training:
    return Training(Run(folder, Settings()), **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], str, Tensor]:
    """Final weights, metrics and optimiser moments of a run that nothing stopped."""
    training = train(tmp_path_factory.mktemp("unbroken") / "run")
    weights = training.go()
    moments = optimizer_tensors(training.model, training.optimizer)
    return weights, training.run.metrics_file.read_text(), moments["exp_avg_sq.0.weight"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("stop_after", [3, 4, 7, 11])
def test_resume_is_bit_exact(tmp_path: Path, unbroken: Any, stop_after: int) -> None:
    """After a cut at any step: weights, buffers, moments and metrics are those of an unbroken run."""
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=stop_after).go()
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen == list(range(stop_after // 4 * 4, 12))
    moments = optimizer_tensors(second.model, second.optimizer)
    assert torch.equal(moments["exp_avg_sq.0.weight"], unbroken[2])
    assert second.run.metrics_file.read_text() == unbroken[1]


def test_another_seed_gives_other_weights(tmp_path: Path, unbroken: Any) -> None:
    other = train(tmp_path / "run", seed=6).go()
    assert not torch.equal(other["0.weight"], unbroken[0]["0.weight"])


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
        "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


@pytest.mark.parametrize("torn", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["half", "empty", "gone"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, unbroken: Any, capfd: pytest.CaptureFixture[str], torn: str, how: str
) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=10).go()
    file = tmp_path / "run" / "checkpoints" / "step-00000008" / torn
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "half" else b"")
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen[0] == 4
    assert "step-00000008 cannot be read" in capfd.readouterr().err
    assert second.run.metrics_file.read_text() == unbroken[1]


def test_without_a_readable_checkpoint_the_run_begins_again(tmp_path: Path, unbroken: Any) -> None:
    with pytest.raises(PowerCut):
        train(tmp_path / "run", stop_after=5).go()
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    second = train(tmp_path / "run")
    same(second.go(), unbroken[0])
    assert second.seen[0] == 0
    assert second.run.metrics_file.read_text() == unbroken[1]


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
    with pytest.raises(OSError, match="No space left"):
        training.go()
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


def test_another_command_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Other:
        data: Path = Path("pictures")

    Run(tmp_path / "run", Other())
    with pytest.raises(RunError, match="command was 'Other', now 'Settings'"):
        Run(tmp_path / "run", Settings())


def test_overwrite_begins_again(tmp_path: Path) -> None:
    train(tmp_path / "run").go()
    run = Run(tmp_path / "run", Settings(lr=9.0), overwrite=True)
    assert sorted(p.name for p in run.out.iterdir()) == ["checkpoints", "run.toml"]
    assert not list(run.checkpoints.iterdir())


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


# --- Settings as TOML ----------------------------------------------------------------------------


VALUES: list[Any] = [
    *(0, -3, 10**12, 1.5, 1e-6, 1e22, 4e-3, 0.1 + 0.2, math.inf, -math.inf, True, False),
    *("", "a b", "é 猫 🐈", 'say "no"\\n', "tab\tline\n", "\x7f\x01"),
    *([], [0.9, 0.98], [1.0, math.inf], ["a", "b"], [True]),
]


@pytest.mark.parametrize("value", VALUES)
def test_settings_come_back_from_toml_as_they_went(value: Any) -> None:
    assert tomllib.loads(to_toml({"key": value, "last": 1})) == {"key": value, "last": 1}


def test_every_commands_settings_come_back_from_toml() -> None:
    from beit.commands.demo import Demo
    from beit.commands.finetune import Finetune
    from beit.commands.pretrain import Pretrain
    from beit.commands.train_tokenizer import TrainTokenizer

    path = Path("/pictures/mit Leerzeichen \\ und ü")
    for settings in (
        Demo(),
        Finetune(path, model="m", out=path, val=path),
        Pretrain(path, tokenizer=path, out=path, img_size=64),
        TrainTokenizer(path, out=path),
    ):
        described = describe_settings(settings)
        assert tomllib.loads(to_toml(described)) == json.loads(json.dumps(described))
        assert described["command"] == type(settings).__name__
        assert None not in described.values()


# --- Stop signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_a_signal_in_the_last_step_does_not_undo_a_finished_run(tmp_path: Path, unbroken: Any) -> None:
    training = train(tmp_path / "run", stop_after=11, signal_number=signal.SIGTERM)
    same(training.go(), unbroken[0])


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130


def test_the_first_signal_gives_the_code() -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 143


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def use() -> int:
        with stop_signals() as stop:
            return stop.exit_code

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use).result(10) == 0
    assert signal.getsignal(signal.SIGTERM) is before


# --- Progress ------------------------------------------------------------------------------------


def test_progress_off_a_terminal_is_a_plain_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(beit.run.time, "monotonic", lambda: now)
    with Progress("flowers.run", 100) as progress:
        for done in range(1, 101):
            now += 1.0
            progress.update(done, "loss 2.5")
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 3
    assert lines[0].startswith("flowers.run 31/100, ")
    assert lines[0].endswith("loss 2.5")
    left = float(lines[1].split(", ")[1].removesuffix(" s left"))
    assert left == pytest.approx(100 - 62, abs=2)  # a second a step


def test_quiet_progress_is_silent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(beit.run.time, "monotonic", lambda: now)
    with Progress("x", 3, quiet=True) as progress:
        now = 1000.0
        progress.update(1)
    assert capfd.readouterr().err == ""


# --- Atomic files --------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content in (b"one", b"second", b""):
        write_atomically(file, content)
        assert file.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_write_cut_short_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def cut(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(beit.atomic.os, where, cut)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "a part is left beside it"
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_content_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(beit.atomic.os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(beit.atomic.os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    write_atomically(tmp_path / "a", b"x")
    assert order[:2] == ["fsync", "replace"]


def test_saved_checkpoints_hold_the_weights(tmp_path: Path) -> None:
    training = train(tmp_path / "run", total=4)
    training.go()
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    same(saved, training.model.state_dict())
