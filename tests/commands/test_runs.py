"""The scripts of runs/ at reduced size, on a processor: killed once in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from PIL import Image

from beit.run import read_metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash and signals of POSIX")
SMALL = {
    "MODEL": "beit_mini_patch8_32", "EPOCHS": "2", "TOKENIZER_STEPS": "4", "BATCH": "20", "HIDDEN": "8",
    "WORKERS": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 40 and val/ with 20 pictures of ten colours, as Imagenette has ten classes."""
    root, rng = tmp_path_factory.mktemp("ten"), np.random.default_rng(0)
    colours = rng.integers(30, 226, (10, 3))
    for split, per_class in (("train", 4), ("val", 2)):
        for number, colour in enumerate(colours):
            folder = root / split / f"colour-{number}"
            folder.mkdir(parents=True)
            for picture in range(per_class):
                pixels = colour + rng.integers(-30, 31, (40, 40, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{picture}.png")
    return root


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ with beit and python, as .venv/bin has them, whatever runs these tests."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in (("python", ""), ("beit", "-W error -m beit")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def start(script: str, pictures: Path, out: Path, programs: Path, **smaller: str) -> Any:
    """The script in a group of its own, so that all it starts can be killed at one blow."""
    with out.with_suffix(".said").open("a") as said:
        return subprocess.Popen(
            ["bash", str(ROOT / "runs" / script), str(pictures), str(out)],
            cwd=ROOT, env=ENVIRONMENT | SMALL | {"BEIT": str(programs / "beit")} | smaller,
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def killed_when(place: Path, script: str, *words: Path, **smaller: str) -> None:
    """Kill the script and all it has started as soon as there is something in a place."""
    with start(script, *words, **smaller) as process:
        while not place.exists() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it came to be killed"
        os.killpg(process.pid, signal.SIGKILL)


def ended(script: str, *words: Path, **smaller: str) -> str:
    """Let the script come to its end: what it said, the part before it was killed too."""
    with start(script, *words, **smaller) as process:
        code = process.wait()
    said = words[1].with_suffix(".said").read_text()
    assert code == 0, said
    return said


def test_the_ladder_is_climbed_after_a_kill(ten_classes: Path, programs: Path, tmp_path: Path) -> None:
    """Two of its arms; the other test trains a VQ-KD."""
    arms = ("dvae-random", "pixels-blocks")
    out = tmp_path / "ladder"
    smaller = {"EPOCHS": "1", "TUNE_EPOCHS": "1", "IMG_SIZE": "32", "ARMS": " ".join(arms)}
    words = ("imagenette_cpu.sh", ten_classes, out, programs)
    here = out / "seed-0"
    killed_when(here / "dvae-random" / "run.toml", *words, **smaller)
    assert not (here / "dvae-random" / "config.json").exists()
    said = ended(*words, **smaller)
    assert f"there already: {here / 'dvae'}" in said
    assert not (here / "vqkd").exists(), "no arm asks for it"
    table = said[said.index("| pre-training |") :].splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == ["scratch", *arms]
    for row in table[2:]:
        numbers = [float(cell) for cell in row.strip("| ").split(" | ")[1:] if cell != "-"]
        assert len(numbers) == (
            1 if row.startswith("| scratch") else 4
        )  # what is not trained has no probe
        assert all(0 <= number <= 100 for number in numbers)
    for arm in arms:
        assert f'masks = "{arm.split("-")[1]}"' in (here / arm / "run.toml").read_text()
        assert read_metrics(here / arm / "metrics.jsonl")[-1]["step"] == 2  # 40 pictures, 20 a step


def test_both_arms_of_the_row_to_beat_cost_the_same_after_a_kill(
    ten_classes: Path, programs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vits16"
    words = ("imagenette_vits16.sh", ten_classes, out, programs)
    killed_when(out / "one" / "run.toml", *words)
    said = ended(*words, ARMS="one two")
    assert f"there already: {out / 'one-vqkd'}" in said
    steps = {
        name: read_metrics(out / name / "metrics.jsonl")[-1]["step"]
        for name in ("one-vqkd", "one", "two-dvae", "two-first", "two-vqkd", "two")
    }
    assert steps["one-vqkd"] == steps["two-dvae"] + steps["two-vqkd"] == 4
    assert steps["one"] == steps["two-first"] + steps["two"] == 4  # 2 epochs of 40 pictures, 20 a step
    teacher = f'teacher = "{out / "two-first"}"'
    assert teacher in (out / "two-vqkd" / "run.toml").read_text()
    for arm in ("one", "two"):
        rows = json.loads((out / f"{arm}.probe.json").read_text())["rows"]
        assert {"linear", "knn"} <= rows[-1].keys()
        assert rows[-1]["layer"] == 4  # the last is what was published


@pytest.mark.parametrize(
    ("script", "cure"),
    [
        ("imagenette_vits16.sh", "it takes one, two, or both"),
        ("imagenette_cpu.sh", "dvae, vqkd or pixels"),
    ],
)
def test_an_unknown_arm_is_refused(
    ten_classes: Path, programs: Path, tmp_path: Path, script: str, cure: str
) -> None:
    words = (script, ten_classes, tmp_path / "run", programs)
    with start(*words, ARMS="three") as process:
        assert process.wait() == 2
    assert cure in (tmp_path / "run.said").read_text()
    assert not (tmp_path / "run").exists()
