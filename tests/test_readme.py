"""The README's commands and code are run, on small pictures and few steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from forked import beit as beit_command
from PIL import Image

import beit
from beit.model import BeitConfig, BeitForImageClassification

README = (Path(__file__).parent.parent / "README.md").read_text()
SHORTER = {  # what makes a command of the README end in seconds; the rest of it is as printed
    "train-tokenizer": "--steps 2 --batch-size 4 --img-size 32 --hidden-dim 8",
    "pretrain": "--steps 2 --batch-size 2",
    "probe": "--batch-size 4",
    "finetune": "--steps 2 --batch-size 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and flowers/ as the README says they look."""
    root = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in (("rose", 200), ("violet", 60)):
            for number in range(5):
                folder = root / "flowers" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 50, (40, 48, 3), dtype=np.uint8) + np.uint8(colour)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "photos").mkdir()
    for number in range(8):
        name = "one.jpg" if number == 0 else f"{number}.jpg"
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / "photos" / name)
    write_released(root / "beit_base_patch16_224_pt22k_ft22kto1k.pth")
    return root


def write_released(file: Path) -> None:
    """A tiny classifier as the authors' code writes one, under a released name."""
    config = BeitConfig(img_size=64, embed_dim=64, depth=2, num_heads=1, num_classes=1000)
    beit.save(BeitForImageClassification(config), file, to="unilm")


def run(arguments: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def there(place: str, *words: str) -> None:
    """`beit ...` in a folder."""
    os.chdir(place)
    warnings.simplefilter("ignore")
    beit_command(*words)


def test_the_commands_of_the_readme_run_in_their_order(place: Path) -> None:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        prompt, program, *words = shlex.split(line)
        assert (prompt, program) == ("$", "beit")
        words += shlex.split(SHORTER.get(words[0], ""))
        if line == lines[0]:
            run(["-m", "beit", *words], place)
            continue
        process = Forked(there, place, *words)
        _, complained = process.communicate()
        assert process.returncode == 0, complained
    assert (place / "out.csv").read_text().count("\n") == 1 + 8


def test_the_python_of_the_readme_runs(place: Path) -> None:
    assert (place / "flowers.run" / "config.json").exists(), "the commands above have made it"
    for code in blocks("python"):
        run(["-W", "error", "-c", code], place)
    assert run(["-c", blocks("python")[0]], place).stdout.split()[0] in ("rose", "violet")


def test_every_file_the_readme_links_exists() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
