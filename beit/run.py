"""The run folder: settings, metrics, checkpoints that survive anything, stop signals, progress.

    run.toml          the settings, resolved, with the command's name
    metrics.jsonl     one JSON object a logged step
    checkpoints/      step-00000100/: model.safetensors, optimizer.safetensors, state.json
    config.json, model.safetensors, ...   the finished model, which -m/--model takes

A command given the same folder and the same settings again goes on where it stopped. A checkpoint is
written beside its place, flushed to the disk and renamed, so there is never half of one under a good
name. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beit.atomic import flush, write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

# Settings that change how a run is carried out, not what it computes: they may differ on resume.
FREE_SETTINGS = {"out", "overwrite", "workers", "device", "log_every", "save_every", "quiet"}
KEPT_CHECKPOINTS = 2


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class CannotWrite(RunError):
    """A run folder that the disk, or its rights, do not allow."""

    exit_code = 6


class Stopped(Exception):
    """The run was asked to stop, and has saved. `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Run:
    """One run in one folder.

    settings: the command's frozen dataclass. Raises RunError where the folder holds something else,
    or a run with other settings, and says which.
    """

    def __init__(self, out: Path, settings: Any, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.metrics_file = self.out / "metrics.jsonl"
        self.checkpoints = self.out / "checkpoints"
        self.latest = ""  # the last logged numbers, for people
        described = describe_settings(settings)
        try:
            if overwrite and (self.out / "run.toml").exists():
                shutil.rmtree(self.out)
            if self.out.exists() and any(self.out.iterdir()):
                paths = {key for key, value in vars(settings).items() if isinstance(value, Path)}
                self._check_same(described, paths)
            else:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                write_atomically(self.out / "run.toml", to_toml(described).encode())
        except (PermissionError, NotADirectoryError, OSError) as error:
            raise CannotWrite(f"cannot write the run folder {self.out}: {error}") from error

    def _check_same(self, described: dict[str, Any], paths: set[str]) -> None:
        file = self.out / "run.toml"
        if not file.exists():
            raise RunError(f"{self.out} is not empty and holds no run; choose another --out")
        try:
            before = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{file} is not TOML: {error}; --overwrite begins again") from error
        now = tomllib.loads(to_toml(described))
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if key not in FREE_SETTINGS
            and before.get(key) != now.get(key)
            and not (key in paths and same_place(before.get(key), now.get(key)))
        ]
        if changed:
            raise RunError(
                f"{self.out} holds a run with other settings ({'; '.join(changed)}). "
                "Use the same settings to go on with it, --overwrite to begin again, or another --out"
            )

    @property
    def finished(self) -> bool:
        """Whether the finished model is there."""
        return (self.out / "config.json").exists()

    # --- metrics -------------------------------------------------------------------------------

    def log(self, step: int, **values: float | int | str | None) -> None:
        """Append one JSON line. Numbers are rounded to six digits; what is not finite becomes null."""
        line = {"step": step, **{k: _short(v) for k, v in values.items()}}
        self.latest = ", ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All logged lines; one broken by a crash is left out."""
        return read_metrics(self.metrics_file)

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint of `step` finished steps and drop all but the newest two."""
        final = self.checkpoints / f"step-{step:08d}"
        beside = self.checkpoints / f".writing-{os.getpid()}"
        for left in self.checkpoints.glob(".writing-*"):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), beside / "model.safetensors")
        if optimizer is not None:
            save_file(optimizer_tensors(model, optimizer), beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": step}))
        for file in beside.iterdir():
            flush(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        flush(self.checkpoints)
        for old in self._steps()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Load the newest readable checkpoint; returns its step, 0 where there is none.

        Metrics logged after it are dropped: they will be logged again.
        """
        for folder in reversed(self._steps()):
            try:
                step = int(json.loads((folder / "state.json").read_text())["step"])
                tensors = load_file(folder / "model.safetensors")
                moments = load_file(folder / "optimizer.safetensors") if optimizer else {}
            except Exception as error:  # whatever a torn disk gives, an older one is the answer
                print(f"checkpoint {folder} cannot be read ({error}); trying older", file=sys.stderr)
                continue
            model.load_state_dict(tensors)
            if optimizer is not None:
                load_optimizer_tensors(model, optimizer, moments)
            kept = [line for line in self.read_metrics() if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.metrics_file, text.encode())
            return step
        write_atomically(self.metrics_file, b"")
        return 0

    def _steps(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))

    # --- the loop's frame ----------------------------------------------------------------------

    def steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: int,
        batches: Callable[[range], Iterable[T]],
        save_every: int,
        seed: int,
    ) -> Iterator[tuple[int, T]]:
        """Yield (step, batch) from the last checkpoint on; between steps save, show progress, stop.

        batches: gives the batches of a range of steps. Each step starts from torch's seed for that
        step, so a resumed run draws what an unbroken one draws. Raises Stopped, having saved, where
        SIGINT or SIGTERM asked for it.
        """
        start = self.resume(model, optimizer)
        name = self.out.name
        if start:
            print(f"{name}: going on from step {start} of {total}", file=sys.stderr)
        with stop_signals() as stop, Progress(name, total) as progress:
            for step, batch in enumerate(batches(range(start, total)), start):
                torch.manual_seed(step_seed(seed, step))
                yield step, batch
                done = step + 1
                progress.update(done, self.latest)
                if stop or done % save_every == 0 or done == total:
                    self.save(done, model, optimizer)
                if stop and done < total:
                    raise Stopped(
                        stop.exit_code,
                        f"stopped and saved at step {done} of {total}; give the same command to go on",
                    )


def step_seed(seed: int, step: int) -> int:
    """Torch's seed of a step. Mixed, since torch on a CPU looks at the lower 32 bits alone."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one broken by a crash is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `exp_avg.blocks.0...`."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{key}.{names[id(parameter)]}": value.detach().clone().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Give an optimiser the state that `optimizer_tensors` took from one of the same model."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, name = full_name.split(".", 1)
        # A fused AdamW counts its steps beside the parameter, any other on the CPU.
        beside = value.ndim or optimizer.defaults.get("fused")
        device = parameters[name].device if beside else "cpu"
        optimizer.state[parameters[name]][key] = value.to(device)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _short(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


# --- settings as TOML ------------------------------------------------------------------------------


def describe_settings(settings: Any) -> dict[str, Any]:
    """A command's dataclass as plain values, its name first; what is None is left out."""
    values = {"command": type(settings).__name__, **dataclasses.asdict(settings)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}


def same_place(one: Any, other: Any) -> bool:
    """Whether two paths lead to the same place, one of them perhaps relative."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return Path(one).resolve() == Path(other).resolve()


def to_toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML's words, not JSON's
    # JSON's strings, but TOML knows no halves of characters and no bare delete.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- stopping and progress -------------------------------------------------------------------------


class StopRequest:
    """Whether SIGINT or SIGTERM came. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.exit_code = 0

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def receive(self, number: int, _frame: object) -> None:
        """The handler of the signals."""
        if self.exit_code:
            raise KeyboardInterrupt
        self.exit_code = 128 + number


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop reads at its next step."""
    request = StopRequest()
    watched = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, request.receive) for number in watched}
    except ValueError:  # not the main thread: signals are somebody else's
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Progress on stderr: a live bar on a terminal, elsewhere one plain line every 30 s."""

    def __init__(self, label: str, total: int, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.started = self.last_line = time.monotonic()
        self.first: int | None = None
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task(label, total=total, text="")
            self.bar.start()

    def update(self, done: int, text: str = "") -> None:
        """`done` of the total are finished; `text` is the latest numbers."""
        self.first = done if self.first is None else self.first
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
        elif not self.quiet and time.monotonic() - self.last_line > 30:
            self.last_line = time.monotonic()
            pace = (self.last_line - self.started) / max(done - self.first, 1)
            left = pace * (self.total - done)
            print(f"{self.label} {done}/{self.total}, {left:.0f} s left, {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
