"""Kill `beit pretrain` at random, fill its disk, damage its files: it must end as an unbroken run does.

    python tests/chaos.py --kills 200 --stops 50 --full 20 --damaged 20      (`make chaos`)

Runs are forked from a process that has done one itself, so that most of their time is at risk.
After each blow every checkpoint must be whole; the same command goes on; a run that ends must have the
weights of an unbroken one, bit for bit. Prints what was counted as JSON; exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import command_line, write_shapes

from beit.cli import main
from beit.run import read_metrics
from beit.snapshots import snapshots, verify_snapshot
from beit.stop import stop_at_once

STEPS, LIMIT_S = 30, 10.0
PRETRAIN = {
    "model": "beit_mini_patch8_32", "batch_size": 6, "steps": STEPS, "save_every": 4, "log_every": 1,
    "workers": 1, "precision": "fp32", "device": "cpu", "lr": 3e-3, "drop_path": 0.2,
}  # fmt: skip
PHASES = ("start-up", "step", "checkpoint", "evaluation", "report")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 143}


class Chaos:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
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

    def command(self, name: str) -> list[str]:
        options = {**PRETRAIN, "tokenizer": self.folder / "t", "out": self.folder / name}
        return ["pretrain", *command_line(self.folder / "data", **options)]

    def start(self, words: list[str], file_limit: int = 0, weak: bool = False) -> int:
        """Fork a process that runs the command; its id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            with contextlib.suppress(KeyboardInterrupt), (self.folder / "said").open("w") as said:
                os.dup2(said.fileno(), 2)
                if file_limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
                if weak:
                    obey_modes()
                code = 130
                with stop_at_once():
                    here(words)
                code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def wait(self, child: int, seconds: float) -> int | None:
        """The exit code of a child, minus a signal's number where one killed it; None while it lives."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def until_phase(self, child: int, out: Path, phase: str) -> int | None:
        """Wait for a phase to begin and a random while in it; an exit code if the run ended first."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if phase_of(out) == phase:
                time.sleep(self.rng.choice((0, 0.001, 0.01, 0.1)) * self.rng.random())
                return None
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0003)
        return None

    def blow(self, out: Path) -> tuple[int, int | None]:
        """Start the run and wait for a random moment of it: the child, and its exit code if it ended."""
        child = self.start(self.command(out.name))
        if self.rng.random() < 0.5:
            return child, self.wait(child, self.rng.random() * self.seconds)
        return child, self.until_phase(child, out, self.rng.choice(PHASES))

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
            phase = phase_of(out)
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
            phase = phase_of(out)
            began = time.monotonic()
            os.kill(child, number)
            code = self.wait(child, 60)
            self.slowest_stop_s = max(self.slowest_stop_s, time.monotonic() - began)
            if code is None or time.monotonic() - began > LIMIT_S:
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
        code = self.wait(self.start(self.command(out.name), file_limit=size), 120)
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
        until = time.monotonic() + 60
        while len(snapshots(out / "checkpoints")) < 2 and time.monotonic() < until:
            time.sleep(0.002)
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


def here(words: list[str]) -> None:
    """Run a command in this process."""
    sys.argv = ["beit", *words]
    main()


def obey_modes() -> None:
    """Give up root's right to write into a folder that is read-only."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, none) != 0:
        raise OSError("capset failed")


def phase_of(out: Path) -> str:
    """Where a run is, by what it has written."""
    if (out / "config.json").exists():
        return "report"
    checkpoints = out / "checkpoints"
    if any(checkpoints.glob(".writing-*")):
        return "checkpoint"
    if (checkpoints / f"step-{STEPS:08d}").exists():
        return "evaluation"
    lines = read_metrics(out / "metrics.jsonl")
    newest = max((int(p.name[5:]) for p in snapshots(checkpoints)), default=0)
    return "step" if lines and lines[-1]["step"] > newest else "start-up"


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl")]


def chaos(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # more would be threads that a fork loses
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        run = Chaos(Path(place), arguments.seed)
        for action, times in (
            (run.kill, arguments.kills), (run.stop, arguments.stops), (run.full_disk, arguments.full),
            (run.damage, arguments.damaged), (run.read_only, 1),
        ):  # fmt: skip
            out = Path(place) / action.__name__
            while run.counts[COUNTED[action.__name__]] < times and len(run.failures) < 5:
                action(out)
                print(f"\r{dict(run.counts)} {run.failures}", end="", file=sys.stderr, flush=True)
            if out.exists() and not run.failures:
                run.end(out)
        result = {
            "seed": arguments.seed, **run.counts, "slowest stop, s": round(run.slowest_stop_s, 2),
            "seconds": round(time.monotonic() - began), "failures": run.failures,
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 1 if run.failures else 0


COUNTED = {
    "kill": "kills", "stop": "stops", "full_disk": "full disks", "damage": "damaged checkpoints",
    "read_only": "read-only folders",
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in (("kills", 200), ("stops", 50), ("full", 20), ("damaged", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    sys.exit(chaos(parser.parse_args()))
