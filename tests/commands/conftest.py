"""One small run of each training command, for all tests of this folder to look at."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, command_line
from safetensors.torch import load_file

import beit.probe
import beit.run
from beit.cli import app
from beit.run import Stopped

Options = dict[str, Any]
# What makes a command fit the tests: small, exact, and logging often.
EXACT: Options = {"precision": "fp32", "device": "cpu", "log_every": 10, "hflip": 0.0}
TOKENIZER: Options = {**EXACT, "img_size": 32, "vocab_size": 32, "code_dim": 8, "hidden_dim": 32,
                      "batch_size": 12, "lr": 3e-3}  # fmt: skip
PRETRAIN: Options = {**EXACT, "model": "beit_mini_patch8_32", "batch_size": 12, "lr": 3e-3,
                     "warmup_epochs": 2, "drop_path": 0, "color_jitter": 0, "crop_ratio": 1}  # fmt: skip
FINETUNE: Options = {**EXACT, "batch_size": 12, "lr": 2e-3, "layer_decay": 1, "crop_ratio": 1,
                     "crop_scale": (0.5, 1.0)}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A run that has ended: its folder, what the command returned, what it said on stderr."""

    folder: Path
    result: dict[str, Any]
    said: str

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return beit.run.read_metrics(self.folder / "metrics.jsonl")


def run(out: Path, *words: str | Path, **options: object) -> Done:
    """`beit ... --out OUT`, in this process; nothing may come on stdout."""
    stdout, stderr = io.StringIO(), io.StringIO()
    app.config = []  # what a test with --recipe or --config has left
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        result = app(command_line(*words, out=out, **options))
    assert stdout.getvalue() == ""
    return Done(out, result, stderr.getvalue())


@pytest.fixture(scope="package", autouse=True)
def probes_of_few_steps() -> Iterator[None]:
    """How a probe is fitted to its end is for test_probe.py beside this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beit.probe, "MOST_STEPS", 40)
        yield


@pytest.fixture(scope="session")
def tokenizer(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    return run(out, "train-tokenizer", shapes / "train", steps=80, **TOKENIZER)


@pytest.fixture(scope="session")
def pretrained(shapes: Path, tokenizer: Done, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    return run(out, "pretrain", shapes / "train", tokenizer=tokenizer.folder, steps=60, **PRETRAIN)


@pytest.fixture(scope="session")
def finetuned(shapes: Path, pretrained: Done, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("runs") / "shapes.run"
    return run(out, "finetune", shapes, model=pretrained.folder, steps=50, warmup_epochs=1, **FINETUNE)


Stopping = Callable[..., None]
Broken = Callable[..., Done]


@pytest.fixture
def stopped_run(monkeypatch: pytest.MonkeyPatch) -> Stopping:
    """Run a command, or let it go on, and stop it by SIGTERM after `more` steps, before step `at`."""

    def call(out: Path, more: int, at: int, *words: str | Path, **options: object) -> None:
        seed_of_step, seen = torch.manual_seed, 0

        def stop(seed: int) -> torch.Generator:
            nonlocal seen
            seen += 1
            if seen == more + 1:  # the first seeds the new weights
                signal.raise_signal(signal.SIGTERM)
            return seed_of_step(seed)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", stop)
            with pytest.raises(Stopped, match=f"stopped and saved at step {at} of ") as caught:
                run(out, *words, **options)
        assert caught.value.exit_code == 143
        assert not (out / "config.json").exists()

    return call


@pytest.fixture
def broken_run(stopped_run: Stopping, tmp_path: Path) -> Broken:
    """Run a command, stop it in its step number `stop_at`, then let it go on."""

    def call(stop_at: int, *words: str | Path, **options: object) -> Done:
        stopped_run(tmp_path / "broken", stop_at, stop_at, *words, **options)
        return run(tmp_path / "broken", *words, **options)

    return call


def same_weights(one: Done, other: Done) -> None:
    ours, theirs = one.weights, other.weights
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@dataclass
class Served:
    """A `beit serve` in a process of its own."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the answer to one request."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, content


@contextlib.contextmanager
def serving(*words: str | Path, **environment: str) -> Iterator[Served]:
    """Start `beit serve ... --port 0`, and end it by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "beit", "serve", "--port", "0", *map(str, words)],
        env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)$", told.strip())
        assert found, told
        yield Served(process, found[1], int(found[2]))
    finally:
        process.terminate()
        process.communicate(timeout=60)
