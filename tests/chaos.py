"""Kill `beit pretrain`, fill its disk, damage its files, poison its numbers: it must end as if unbroken.

    python tests/chaos.py --kills 200 --stops 50 --full 20 --damaged 20 --poisoned 10      (`make chaos`)

Runs are forked from a process that has done one itself, so that most of their time is at risk. Each tells,
in memory that it shares, which phase it is in. After each blow every checkpoint must be whole; the same
command goes on; a run that ends must have the weights of an unbroken one, bit for bit. Of ten places where
a NaN is put, what an update sees moves nothing, and what is poisoned for good is rolled back.
Prints what was counted as JSON; exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import command_line, write_shapes
from safetensors.torch import load_file
from torch import Tensor

import beit.commands.pretrain
from beit.cli import main
from beit.run import Run, read_metrics
from beit.snapshots import snapshots, verify_snapshot
from beit.stop import stop_at_once
from beit.watch import Watch

STEPS, LIMIT_S = 30, 10.0
PRETRAIN = {
    "model": "beit_mini_patch8_32", "batch_size": 6, "steps": STEPS, "save_every": 4, "log_every": 1,
    "workers": 1, "precision": "fp32", "device": "cpu", "lr": 3e-3, "drop_path": 0.2, "look_epochs": 2,
    "peak_tflops": 1.0,
}  # fmt: skip
PHASES = ("start-up", "step", "checkpoint", "evaluation", "report")
PHASE = mmap.mmap(-1, 1)  # its number, of the only child that runs
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 143}
SIGNALS = {
    n: code for n, code in SIGNALS.items() if signal.getsignal(n) is not signal.SIG_IGN
}  # by nohup


class Chaos:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.rng = folder, seed, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest_stop_s = 0.0
        write_shapes(folder / "data", 12, seed=0)
        small = {"img_size": 32, "vocab_size": 32, "code_dim": 8, "hidden_dim": 32, "batch_size": 12}
        here(["train-tokenizer", *command_line(folder / "data", out=folder / "t", steps=20, **small)])
        here(self.command("unbroken"))  # in this process, which has then loaded all there is to load
        self.expected = (folder / "unbroken" / "model.safetensors").read_bytes()
        self.expected_losses = losses(folder / "unbroken")
        began = time.monotonic()
        self.end(folder / "forked")
        self.seconds = time.monotonic() - began

    def command(self, name: str, **others: object) -> list[str]:
        options = {**PRETRAIN, **others, "tokenizer": self.folder / "t", "out": self.folder / name}
        return ["pretrain", *command_line(self.folder / "data", **options)]

    def start(
        self,
        words: list[str],
        file_limit: int = 0,
        weak: bool = False,
        poison: Callable[[], None] = lambda: None,
    ) -> int:
        """Fork a process that runs the command; its id."""
        sys.stdout.flush()
        PHASE[0] = 0
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has its handlers
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return child
        code = 99
        try:
            with contextlib.suppress(KeyboardInterrupt), (self.folder / "said").open("w") as said:
                os.dup2(said.fileno(), 2)
                if file_limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
                if weak:
                    obey_modes()
                poison()
                code = 130
                with stop_at_once():
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                    here(words)
                code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def wait(self, child: int, seconds: float) -> int | None:
        """The exit code of a child, minus a signal's number where one killed it; None while it lives."""
        for _ in awake(seconds, 0.002):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
        return None

    def until_phase(self, child: int, phase: str) -> int | None:
        """Wait for a phase to begin and a random while in it; an exit code if the run ended first."""
        for _ in awake(60, 0.0003):
            if phase_now() == phase:
                time.sleep(self.rng.choice((0, 0.001, 0.01, 0.1)) * self.rng.random())
                return None
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
        return None

    def blow(self, out: Path) -> tuple[int, int | None]:
        """Start the run and wait for a random moment of it: the child, and its exit code if it ended."""
        child = self.start(self.command(out.name))
        if self.rng.random() < 0.5:
            return child, self.wait(child, self.rng.random() * self.seconds)
        return child, self.until_phase(child, self.rng.choice(PHASES))

    def fail(self, what: str) -> None:
        self.failures.append(f"{what}: {(self.folder / 'said').read_text()[-600:]}")

    def look(self, out: Path) -> None:
        """Everything that has a name must be whole."""
        for folder in snapshots(out / "checkpoints"):
            try:
                verify_snapshot(folder)
            except Exception as error:
                self.fail(f"unreadable {folder}: {error}")
        if (out / "config.json").exists() and (out / "model.safetensors").read_bytes() != self.expected:
            self.fail("the finished model is not the unbroken run's")

    def end(self, out: Path) -> None:
        """Let a run end, compare it with the unbroken one, and throw it away."""
        code = self.wait(self.start(self.command(out.name)), 120)
        if code != 0:
            self.fail(f"going on ended with {code}")
        self.look(out)
        self.counts["runs ended"] += 1
        if losses(out) != self.expected_losses:
            self.fail("metrics differ from the unbroken run's")
        shutil.rmtree(out, ignore_errors=True)

    def kill(self, out: Path) -> None:
        child, code = self.blow(out)
        if code is None:
            phase = phase_now()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.counts["kills"] += 1
            self.counts[f"kills: {phase}"] += 1
        elif code != 0:
            self.fail(f"ended with {code} before it was killed")
        self.look(out)
        if code == 0 or self.rng.random() < 0.1:
            self.end(out)

    def stop(self, out: Path) -> None:
        child, code = self.blow(out)
        if code is None:
            number = self.rng.choice(list(SIGNALS))
            phase = phase_now()
            os.kill(child, number)
            code, seconds = None, 0.0
            for passed in awake(60, 0.002):
                seconds = passed
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    break
            self.slowest_stop_s = max(self.slowest_stop_s, seconds)
            if code == -number and (out / "config.json").exists():
                code = 0  # its work was done, and its handlers were gone, when the signal came
            if code is None or seconds > LIMIT_S:
                self.fail(f"{number.name} in {phase}: no end within {LIMIT_S:.0f} s")
            elif code != SIGNALS[number] and not (code == 0 and (out / "config.json").exists()):
                self.fail(f"{number.name} in {phase}: ended with {code}")
            self.counts["stops"] += 1
            self.counts[f"stops: {phase}"] += 1
            logged = max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)
            saved = max((int(p.name[5:]) for p in snapshots(out / "checkpoints")), default=0)
            if saved < logged and phase != "start-up":
                self.fail(f"{number.name} in {phase}: saved step {saved}, though {logged} were done")
        self.look(out)
        if code == 0 or self.rng.random() < 0.1:
            self.end(out)

    def full_disk(self, out: Path) -> None:
        """A file system on which no file grows beyond a random size."""
        size = self.rng.randrange(100, 3 * len(self.expected))
        words = self.command(out.name, workers=0)  # the limit holds for memory they share, too
        code = self.wait(self.start(words, file_limit=size), 120)
        self.counts["full disks"] += 1
        if code != 6 and not (code == 0 and size > len(self.expected)):
            self.fail(f"a disk full at {size} bytes ended with {code}")
        self.look(out)
        self.end(out)

    def read_only(self, out: Path) -> None:
        out.mkdir()
        out.chmod(0o555)
        code = self.wait(self.start(self.command(out.name), weak=True), 120)
        self.counts["read-only folders"] += 1
        if code != 6:
            self.fail(f"a read-only folder ended with {code}")
        out.chmod(0o755)
        self.end(out)

    def damage(self, out: Path) -> None:
        """Stop a run, then cut or change a file of its newest checkpoint."""
        child = self.start(self.command(out.name))
        for _ in awake(60, 0.002):
            if len(snapshots(out / "checkpoints")) > 1:
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        file = self.rng.choice(sorted(snapshots(out / "checkpoints")[-1].iterdir()))
        content = bytearray(file.read_bytes())
        place = self.rng.randrange(len(content))
        if self.rng.random() < 0.5:
            del content[place:]
        else:
            content[place] ^= 1 << self.rng.randrange(8)
        file.write_bytes(content)
        self.counts["damaged checkpoints"] += 1
        self.end(out)

    def poison(self, out: Path) -> None:
        """Put a NaN somewhere in a step, in a run that is killed besides."""
        name = sorted(PLACES)[(self.seed + self.counts["poisoned"]) % len(PLACES)]
        step, once = self.rng.randrange(5, STEPS - 1), out.with_name("once")
        once.unlink(missing_ok=True)
        stays = name.startswith("for good")

        def poisoned() -> None:
            poison_step(PLACES[name], step, once if stays else None)

        child = self.start(self.command(out.name), poison=poisoned)
        if self.wait(child, self.rng.random() * self.seconds) is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for run in (out, out.with_name("poisoned without a break")):
            if stays and run != out:
                break  # that is the unbroken run
            code = self.wait(self.start(self.command(run.name), poison=poisoned), 120)
            if code != 0:
                return self.fail(f"{name} poisoned in step {step}: ended with {code}")
        ended = read_metrics(out / "metrics.jsonl")[-1]
        weights = (out / "model.safetensors").read_bytes()
        if stays:
            if weights != self.expected:
                self.fail(f"{name} poisoned in step {step}: not the unbroken run's weights")
        else:
            if weights != (run / "model.safetensors").read_bytes() or ended["skipped"] != 1:
                self.fail(f"{name} poisoned in step {step}: {ended}")
            if not (out / "nonfinite" / f"step-{step:08d}" / "batch-0.safetensors").exists():
                self.fail(f"{name} poisoned in step {step}: the batch was not kept")
            shutil.rmtree(run)
        if not all(tensor.isfinite().all() for tensor in load_file(out / "model.safetensors").values()):
            self.fail(f"{name} poisoned in step {step}: reached the weights")
        self.counts["poisoned"] += 1
        self.counts[f"poisoned: {name}"] += 1
        shutil.rmtree(out)
        return None


def here(words: list[str]) -> None:
    """Run a command in this process."""
    sys.argv = ["beit", *words]
    main()


def obey_modes() -> None:
    """Give up root's right to write into a folder that is read-only."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, none) != 0:
        raise OSError("capset failed")


def awake(seconds: float, pause: float) -> Iterator[float]:
    """The seconds that went by, until they are so many, with pauses. Those that this process slept through,
    stopped by somebody (and the child with it), do not count."""
    passed, last = 0.0, time.monotonic()
    while passed < seconds:
        yield passed
        time.sleep(pause)
        now = time.monotonic()
        passed, last = passed + min(now - last, 1.0), now


def phase_now() -> str:
    """Where the child is."""
    return PHASES[PHASE[0]]


def tell_phases() -> None:
    """Let every run of this process and its children tell its phase."""

    def telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*given: Any, **named: Any) -> Any:
            before, PHASE[0] = PHASE[0], PHASES.index(name)
            try:
                return function(*given, **named)
            finally:
                PHASE[0] = before

        return told

    def stepping(*given: Any) -> float:
        PHASE[0] = PHASES.index("step")
        return rate(*given)

    command = beit.commands.pretrain
    rate = command.cosine_schedule  # the first call of a step
    command.cosine_schedule = stepping
    Run.save = telling("checkpoint", Run.save)
    Watch.look = telling("evaluation", Watch.look)
    Watch.write_page = telling("report", Watch.write_page)
    command.save = telling("report", command.save)


# --- Where a NaN may be put ------------------------------------------------------------------------

Place = Callable[[torch.optim.Optimizer, Tensor], Tensor | None]


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def in_gradient(which: int, value: float) -> Place:
    def put(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        parameters(optimizer)[which].grad.flatten()[-1] = value
        return loss

    return put


def in_moment(name: str) -> Place:
    def put(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.state[parameters(optimizer)[0]][name].flatten()[0] = math.nan
        return loss

    return put


def in_weight(which: int) -> Place:
    def put(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        parameters(optimizer)[which].data.flatten()[0] = math.nan
        return loss

    return put


PLACES: dict[str, Place] = {
    "loss, nan": lambda optimizer, loss: loss * math.nan,
    "loss, inf": lambda optimizer, loss: loss + math.inf,
    "first gradient": in_gradient(0, math.nan),
    "last gradient": in_gradient(-1, math.nan),
    "middle gradient": in_gradient(9, math.nan),
    "a gradient, inf": in_gradient(4, math.inf),
    "for good: first weight": in_weight(0),
    "for good: last weight": in_weight(-1),
    "for good: exp_avg": in_moment("exp_avg"),
    "for good: exp_avg_sq": in_moment("exp_avg_sq"),
}


def poison_step(place: Place, at: int, once: Path | None) -> None:
    """Poison the update of a step of this process's run; only the first time, with a file `once`."""
    command, now = beit.commands.pretrain, 0
    rate, update = command.cosine_schedule, command.update

    def noted(step: int, *given: Any) -> float:
        nonlocal now
        now = step
        return rate(step, *given)

    def poisoned(optimizer: torch.optim.Optimizer, loss: Tensor, *given: Any) -> Any:
        if now == at and not (once and once.exists()):
            if once:
                once.touch()
            loss = place(optimizer, loss)
        return update(optimizer, loss, *given)

    command.cosine_schedule, command.update = noted, poisoned


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl")]


def chaos(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # more would be threads that a fork loses
    began = time.monotonic()
    tell_phases()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        run = Chaos(Path(place), arguments.seed)
        for action, times in (
            (run.kill, arguments.kills), (run.stop, arguments.stops), (run.full_disk, arguments.full),
            (run.damage, arguments.damaged), (run.poison, arguments.poisoned), (run.read_only, 1),
        ):  # fmt: skip
            out = Path(place) / action.__name__
            while run.counts[COUNTED[action.__name__]] < times and len(run.failures) < 5:
                action(out)
                print(f"\r{dict(run.counts)} {run.failures}", end="", file=sys.stderr, flush=True)
            if out.exists() and not run.failures:
                run.end(out)
        result = {
            "seed": arguments.seed, **run.counts, "slowest stop, s": round(run.slowest_stop_s, 2),
            "a run, s": round(run.seconds, 1), "seconds": round(time.monotonic() - began),
            "failures": run.failures,
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 1 if run.failures else 0


COUNTED = {
    "kill": "kills", "stop": "stops", "full_disk": "full disks", "damage": "damaged checkpoints",
    "poison": "poisoned", "read_only": "read-only folders",
}  # fmt: skip

USUAL = {"kills": 200, "stops": 50, "full": 20, "damaged": 20, "poisoned": 10, "seed": 0}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in USUAL.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    sys.exit(chaos(parser.parse_args()))
