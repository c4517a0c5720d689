"""What is kept on this machine between commands: where, and how much of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

UNSETTLED_S = 2.0  # a file changed this lately may change again within its time stamp


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/beit/NAME, or ~/.cache/beit/NAME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit" / name


def forget_old(kept: Iterable[tuple[Path, ...]], most_bytes: int, new: Path) -> None:
    """Delete the files longest unused, those of a tuple together, while all take more; `new` stays."""
    total = 0
    for files in sorted(kept, key=lambda files: -files[0].stat().st_mtime):
        total += sum(file.stat().st_size for file in files)
        if total > most_bytes and files[0] != new:
            for file in files:
                file.unlink(missing_ok=True)
