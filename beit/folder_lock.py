"""A folder, or a file, held by one process at a time, however that ends."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from weakref import WeakValueDictionary

WAIT_S = 60.0  # until another process leaves it


class FolderTaken(ValueError):
    """Another process works in a folder, or on a file, and does not end."""


class FolderLock:
    """A folder, or a file, held by this process, however that ends, so that no other writes there."""

    handle = -1

    def __init__(self, folder: Path) -> None:
        self.handle = os.open(folder, os.O_RDONLY)
        if self._is_taken():
            print(f"{folder}: another process is at work on it; waiting for its end", file=sys.stderr)
        until = time.monotonic() + WAIT_S  # a job that was requeued meets the one before
        while self._is_taken():
            if time.monotonic() >= until:
                raise FolderTaken(
                    f"another process is at work on {folder}; wait for its end, or choose another --out"
                )
            time.sleep(0.5)

    def _is_taken(self) -> bool:
        import fcntl  # Unix's alone

        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a file system without locks
        return False

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


_held: WeakValueDictionary[str, FolderLock] = WeakValueDictionary()


def hold(folder: Path) -> FolderLock | None:
    """Hold a folder or a file as long as what is returned lives; the same for all of a process.

    Raises FolderTaken where another process still holds it after a minute. None where locks are not
    known, outside Unix.
    """
    if os.name != "posix":
        return None
    place = os.path.realpath(folder)
    lock = _held[place] = _held.get(place) or FolderLock(folder)
    return lock
