"""Graphs that are kept in the user's cache folder, and which runtime was found the fastest there.

Both are named by the model and the versions that they depend on, a choice by the machine too. No
torch here.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from beit.atomic import write_atomically
from beit.cache import cache_folder, forget_old
from beit.graphs import installed, is_graph
from beit.hub import sha256_of
from beit.workers import available_processors

LEFT_S = 86_400.0  # an export does not take a day
KEPT_BYTES = 4 << 30  # of graphs; the longest unused go first


def graph_folder() -> Path:
    """Where graphs and choices are kept, made where it is not."""
    folder = cache_folder("graphs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def making() -> Iterator[None]:
    """While one process makes graphs there, others that come to it wait, where locks are known."""
    with (graph_folder() / ".making").open("w") as held:
        with suppress(ImportError, OSError):
            import fcntl  # Unix's alone

            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def forget_old_graphs(new: Path) -> None:
    """Delete what killed exports have left, and graphs while all take more than KEPT_BYTES.

    The longest unused go first; `new` stays.
    """
    for left in graph_folder().glob(".*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > LEFT_S:
            shutil.rmtree(left, ignore_errors=True)
    graphs = [file for file in graph_folder().iterdir() if is_graph(file)]
    weights = [file.with_suffix(".bin") for file in graphs]  # of OpenVINO
    together = [(g, w) if w.is_file() else (g,) for g, w in zip(graphs, weights, strict=True)]
    forget_old(together, KEPT_BYTES, new)


def key_of(path: Path) -> str:
    """A name for a model file or folder, and for the versions that its graphs depend on."""
    files = [path / "config.json", path / "preprocessor_config.json"]
    told = [sha256_of(file) for file in files if file.is_file()]
    told += [] if path.is_dir() else [path.name]  # of a file the name says how pictures are prepared
    return digest(" ".join([sha256_of(path), *told, versions()]))


def _choice_file(key: str, threads: int | None, precision: str) -> Path:
    return graph_folder() / f"choice-{digest(f'{key} {machine()} {threads} {precision}')}.json"


def kept_choice(key: str, threads: int | None, precision: str) -> dict[str, Any] | None:
    """What was measured before to be the fastest for a model on this machine."""
    try:
        choice: dict[str, Any] = json.loads(_choice_file(key, threads, precision).read_text())
    except (OSError, ValueError):
        return None
    return choice if choice["runtime"] == "torch" or installed(choice["runtime"]) else None


def keep_choice(choice: dict[str, Any], key: str, threads: int | None, precision: str) -> None:
    """Keep it for the next time. Raises OSError."""
    write_atomically(_choice_file(key, threads, precision), json.dumps(choice, indent=1).encode())


def known_choice(path: Path) -> str:
    """What `auto` was found to be for a model file or folder on this machine, in words, if it was."""
    choice = kept_choice(key_of(path), None, "auto")
    if choice is None:
        return "not measured here yet; the first classify or embed does"
    return f"{choice['runtime']} {choice['precision']}: {choice['why']}"


def digest(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def machine() -> str:
    """The processor, how many of it there are, and its instructions, in a line."""
    model = platform.processor() or platform.machine()
    try:
        facts = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        known = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in facts}
        flags = hashlib.sha256(known.get("flags", "").encode()).hexdigest()[:8]
        model = f"{known.get('model name', model)} {flags}"
    except OSError:
        pass
    return f"{model} x {available_processors()}"


def versions() -> str:
    """Those that a graph may differ by."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "-"

    return " ".join(f"{name} {of(name)}" for name in ("beit", "torch", "openvino", "onnxruntime"))
