"""Ctrl-C and SIGTERM to a real process that trains: it saves, says so, and goes on to the same end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, command_line

from .conftest import PRETRAIN, Done, run, same_weights


def logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_stopped_twice_ends_with_the_weights_of_an_unbroken_run(
    shapes: Path, tokenizer: Done, tmp_path: Path
) -> None:
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 60, "log_every": 1, "drop_path": 0.2}
    out = tmp_path / "stopped"
    command = [sys.executable, "-W", "error", "-m", "beit"]
    command += command_line("pretrain", shapes / "train", out=out, **options)
    before = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            for _ in range(6000):
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

    def numbers(done: Done) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in done.metrics]

    assert numbers(ended) == numbers(unbroken)
