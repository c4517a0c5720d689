"""What several test files stand on: golden files, a small learnable dataset, the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import beit

# A test that imports openvino by itself would let it report on its users; `graphs` sees to that elsewhere.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# What a shell starts in the background ignores Ctrl-C, what nohup starts a hang-up. The tests send both.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

ROOT = Path(beit.__file__).parents[1]
# Beside an installed copy, the package under test comes first for child processes too.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

Cli = Callable[..., tuple[int, str, str]]


def draw_shape(shape: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A coloured shape on a dark ground; its class shows in shape and colour."""
    colours = {"disc": (230, 60, 40), "square": (50, 90, 230), "triangle": (60, 200, 80)}
    ground = tuple(int(v) for v in rng.integers(0, 60, 3))
    picture = Image.new("RGB", (size, size), ground)
    drawing = ImageDraw.Draw(picture)
    radius = int(rng.integers(size // 4, size // 2 - 2))
    x, y = (int(v) for v in rng.integers(radius, size - radius, 2))
    box = [x - radius, y - radius, x + radius, y + radius]
    if shape == "disc":
        drawing.ellipse(box, fill=colours[shape])
    elif shape == "square":
        drawing.rectangle(box, fill=colours[shape])
    else:
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        drawing.polygon(corners, fill=colours[shape])
    return picture


def write_shapes(folder: Path, per_class: int, seed: int, size: int = 36) -> Path:
    """One folder a class: disc, square, triangle."""
    rng = np.random.default_rng(seed)
    for shape in ("disc", "square", "triangle"):
        (folder / shape).mkdir(parents=True)
        for number in range(per_class):
            draw_shape(shape, size, rng).save(folder / shape / f"{number:02d}.png")
    return folder


def command_line(*words: str | Path, **options: object) -> list[str]:
    """Words of a command: `out="run"` is `--out run`, True a flag, a tuple several values."""
    given = [str(word) for word in words]
    for name, value in options.items():
        given.append("--" + name.replace("_", "-"))
        if value is not True:
            given += [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return given


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 36 and val/ with 15 pictures of three classes. To be read only."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "train", 12, seed=0)
    write_shapes(root / "val", 5, seed=1)
    return root


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A .pt2 is opened, though it is a program."""
    monkeypatch.setenv("BEIT_TRUST_PT2", "1")


@contextmanager
def held_by_another_process(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which holds a folder or a file as `folder_lock` does."""
    other = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    words = [sys.executable, "-c", f"{other}; print(flush=True); sys.stdin.read()", place]
    with subprocess.Popen(words, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """`beit ...` in this process: (exit code, stdout, stderr in one line)."""
    from beit.cli import run

    def call(*words: str | Path, **options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["beit", *command_line(*words, **options)])
        capfd.readouterr()
        code = 0
        with warnings.catch_warnings():  # cyclopts finds it odd that a test gives sys.argv
            warnings.filterwarnings("ignore", "Cyclopts application invoked without tokens")
            try:
                run()
            except SystemExit as end:
                code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, " ".join(err.replace("│", " ").split())

    return call


@pytest.fixture(scope="session")
def beit_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m beit ...` in a process of its own, from a folder of one's choice."""

    def call(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "beit", *map(str, words)]
        return subprocess.run(
            command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )

    return call


@pytest.fixture
def real_weights() -> Callable[[str], Path]:
    """A released file by its name; the test is skipped where $BEIT_WEIGHTS has it not."""

    def find(name: str) -> Path:
        file = Path(os.environ.get("BEIT_WEIGHTS", "")) / name
        if not os.environ.get("BEIT_WEIGHTS") or not file.is_file():
            pytest.skip(NO_WEIGHTS)
        return file

    return find


NO_WEIGHTS = "no weights in $BEIT_WEIGHTS"


# Minutes each: begun first, so that no process of `make test` is left alone with one at the end.
LONG = ("test_torchrun", "test_runs", "test_finetune", "test_stop", "test_other_device", "test_demo",
        "test_export", "test_readme", "test_distributed", "test_engine")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which files are given out."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the released files would have shown is not passed over in silence."""
    skipped = terminalreporter.getreports("skipped")
    count = sum(NO_WEIGHTS in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"not run: {NO_WEIGHTS} ({count} tests of released files)")


# Ctrl-C as it comes once in some ten times that it meets a pool's semaphore: its lock has been taken, and
# nobody gives it back. Goes before a program that submits work to a pool of threads.
LOCK_LEFT_HELD = """
import os, sys, threading

honest, count = threading.Condition.__enter__, 0

def enter(condition):
    global count
    got = honest(condition)
    if sys._getframe(2).f_code.co_name == "_adjust_thread_count":
        count += 1
        if count == 5:
            raise KeyboardInterrupt
    return got

threading.Condition.__enter__ = enter
"""
