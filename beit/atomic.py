"""Files that are there whole or not at all: write beside, flush to the disk, rename."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a file: whoever reads it sees the old content or the new, never a part."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_bytes(content)
    flush(beside)
    os.replace(beside, file)


def flush(path: Path) -> None:
    """Make the disk hold what was written to a file, or renamed in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
