"""Stop signals to real processes that train: in every phase they save, and go on to the same end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, ROOT, command_line
from forked import Forked, beit

from .conftest import PRETRAIN, Done, run, same_weights

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
CLOCKED = {"images_per_second", "data_wait_percent", "mfu_percent", "memory_mib"}


def logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_a_process_stopped_four_times_ends_with_the_weights_of_an_unbroken_run(
    shapes: Path, tokenizer: Done, tmp_path: Path
) -> None:
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 60, "log_every": 1, "drop_path": 0.2}
    out = tmp_path / "stopped"
    command = command_line("pretrain", shapes / "train", out=out, **options)
    before = 0
    for number, code in (
        (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143),
    ):  # fmt: skip
        with Forked(beit, *command) as process:
            for _ in range(12000):
                if logged(out) > before + 3 or process.poll() is not None:
                    break
                time.sleep(0.01)
            process.send_signal(number)
            said, complained = process.communicate(timeout=60)
        assert (process.returncode, said) == (code, ""), complained
        step = logged(out)
        assert step > before
        last_line = complained.splitlines()[-1]
        assert (
            last_line == f"beit: stopped and saved at step {step} of 60; give the same command to go on"
        )
        assert f"step-{step:08d}" in {p.name for p in (out / "checkpoints").iterdir()}
        before = step
    ended = run(out, "pretrain", shapes / "train", **options)
    assert f"going on from step {before} of 60" in ended.said
    unbroken = run(tmp_path / "unbroken", "pretrain", shapes / "train", **options)
    same_weights(ended, unbroken)

    def numbers(done: Done) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in CLOCKED} for line in done.metrics]

    assert numbers(ended) == numbers(unbroken)


# --- Phases that take long -------------------------------------------------------------------------


def trained(out: str, slow_phase: str) -> None:
    """A training that, in one of its phases, is caught in a call of C which no signal ends."""
    import beit.stop

    beit.stop.GRACE_S = 1.0
    try:
        with beit.stop.stop_at_once():
            train(Path(out), slow_phase)
    except beit.stop.Stopped as stopped:
        print(f"beit: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)


def train(out: Path, slow_phase: str) -> None:
    """Prints the SHA-256 of all its numbers."""
    import torch
    from torch import nn

    import beit.training
    from beit.optim import EMA, adamw, update
    from beit.run import Run

    @dataclass(frozen=True)
    class Settings:
        seed: int = 0

    def phase(name: str) -> None:
        if name == slow_phase:
            print("there", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

    phase("start-up")
    run = Run(out, Settings())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimizer, ema = adamw(list(model.parameters()), lr=0.1), EMA(model, 0.9)
    beit.training.Training.is_sharded = slow_phase.startswith("sharded")
    for step, _ in run.steps(
        model, optimizer, 8, lambda steps: steps, 100, seed=0, ema=ema, look_every=5
    ):
        if step == 5:
            phase("sharded look")
        loss = (model(torch.randn(6, 4)) - step).square().sum()
        loss.backward()
        if step == 5:
            phase("step")
        update(optimizer, loss)
        run.log(step + 1, loss=loss.item())
        if step == 5:
            phase("evaluation")
    phase("report")
    digest = hashlib.sha256()
    for tensors in (model.state_dict(), ema.tensors):
        for tensor in tensors.values():
            digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an unbroken training prints: the SHA-256 of all its numbers."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    said, complained = Forked(trained, out, "").communicate()
    assert len(said.strip()) == 64, complained
    return said


@pytest.mark.parametrize(
    ("phase", "step"),
    [("start-up", 0), ("step", 5), ("evaluation", 6), ("sharded look", 5), ("report", 8)],
)
def test_a_signal_in_a_call_that_does_not_end_saves_what_is_done(
    tmp_path: Path, digest: str, phase: str, step: int
) -> None:
    """In the step, batch norm has already seen the batch whose update is not made."""
    with Forked(trained, tmp_path / "run", phase) as process:
        process.wait_for("there\n")
        process.send_signal(signal.SIGTERM)
        _, complained = process.communicate(timeout=60)
    assert process.returncode == 143, complained
    newest = max((int(p.name[5:]) for p in tmp_path.glob("run/checkpoints/step-*")), default=0)
    assert newest == step
    if phase in ("step", "evaluation", "sharded look"):
        assert f"beit: stopped and saved at step {step} of 8" in complained
    assert Forked(trained, tmp_path / "run", "").communicate()[0] == digest


def test_a_signal_to_a_forked_child_does_not_stop_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries fork too, and end what they forked with SIGTERM."""
    from beit import stop

    monkeypatch.setattr(stop, "GRACE_S", 0.2)
    rescued: list[int] = []

    def rescue(code: int) -> None:
        rescued.append(code)

    with stop.stop_signals(rescue) as request:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)  # its handler is its parent's, which only takes note
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.6)
        assert not request
        assert rescued == []


def test_a_step_has_half_of_what_is_promised_to_end_by_itself() -> None:
    from beit import stop

    assert stop.GRACE_S <= 5.0


# --- Without a reader ------------------------------------------------------------------------------


@pytest.mark.parametrize(("spoilt", "code"), [(0, 0), (5, 4)])
def test_a_training_that_nobody_reads_ends_with_its_own_code(
    shapes: Path, tmp_path: Path, spoilt: int, code: int
) -> None:
    """Both pipes are closed before it begins."""
    shutil.copytree(shapes, tmp_path / "data")
    for number in range(spoilt):
        (tmp_path / "data" / "train" / "disc" / f"{number:02d}.png").write_bytes(b"no picture")
    words = [
        "finetune",
        str(tmp_path / "data"),
        "-m",
        "beit_mini_patch8_32",
        "-o",
        str(tmp_path / "run"),
    ]
    words += ["--steps", "2", "--log-every", "1", "--workers", "0", "--no-report", "--device", "cpu"]
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "beit", *words],
        env=ENVIRONMENT, stdout=writer, stderr=writer,
    ) as process:  # fmt: skip
        os.close(writer)
        os.close(reader)
        assert process.wait(timeout=120) == code
    assert (tmp_path / "run" / "config.json").exists() == (code == 0)


# --- Chaos -----------------------------------------------------------------------------------------


def test_kills_stops_full_disks_damaged_files_and_nans_change_nothing(tmp_path: Path) -> None:
    """A sample of `make chaos`, which does it by hundreds."""
    sizes = ["--kills=4", "--stops=4", "--full=1", "--damaged=1", "--poisoned=1"]
    sizes.append(f"--seed={time.time_ns() % 10**6}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "chaos.py"), *sizes],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout)
    assert counted["failures"] == []
    counts = {"kills": 4, "stops": 4, "full disks": 1, "damaged checkpoints": 1, "poisoned": 1}
    assert {what: counted[what] for what in counts} == counts
    print(f"a sample of `make chaos`, which was not run: {sizes}", file=sys.stderr)
