"""Files that are there whole or not at all: write beside, flush to the disk, rename."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM_OR_RIGHTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
CURE = "make room or choose another place"


class CannotWrite(ValueError):
    """A place that the disk, or its rights, do not allow."""

    exit_code = 6


def not_there(place: str | Path) -> str:
    """That a path leads nowhere, with a name beside it that may have been meant."""
    path = Path(place)
    if "://" in str(place):
        return f"{place} does not exist; check the address"
    if not path.parent.is_dir():
        return f"{place} does not exist, nor does its folder {path.parent}; check the path"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    cure = f"did you mean {path.parent / near[0]}?" if near else "check the path"
    return f"{place} does not exist; {cure}"


def check_place(file: Path | None, inputs: Iterable[str | Path] = (), ending: str = "") -> None:
    """Raise CannotWrite for a file that cannot be, before any work is done for it.

    inputs: what the command reads, which it may not write over. ending: the one that tells what is written;
        ValueError for another.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise CannotWrite(
            f"cannot write {file}: {file.parent} is not a folder; make it, or name another place"
        )
    folder = target_of(file).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWrite(f"cannot write {file}: {folder} may not be written; name another place")
    if file.exists() and any(os.path.exists(place) and file.samefile(place) for place in inputs):
        raise CannotWrite(f"cannot write {file}: it is what the command reads; name another file")
    if file.suffix != ending and ending:
        raise ValueError(
            f"{file} must end in {ending}, which is what is written; name {file.stem}{ending}"
        )


def target_of(file: Path) -> Path:
    """Where a file is to be written: what a link leads to. Raises CannotWrite for a folder or a device."""
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "a device"
        raise CannotWrite(f"cannot write {file}: it is {what}; name a file")
    return target


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a file: whoever reads it sees the old content or the new, never a part."""
    write_together(file.parent, {file.name: content})


def write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Replace files of a folder, in this order, once the disk holds all of them.

    What fails before, a full disk above all, leaves every old file as it was and nothing beside them; its
    OSError has the name of the file.
    """
    targets = {name: target_of(folder / name) for name in contents}
    beside = {name: place_beside(target) for name, target in targets.items()}
    try:
        for name, content in contents.items():
            with naming(folder / name):
                beside[name].write_bytes(content)
                flush(beside[name])
        for name in contents:
            os.replace(beside[name], targets[name])
    finally:
        for left in beside.values():
            left.unlink(missing_ok=True)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name a file in the OSError of a full or forbidden disk, which names none, or a hidden one beside."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM_OR_RIGHTS:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(file)) from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A place beside a file, to be written in whatever way; it takes the file's place if all goes well.

    Raises CannotWrite where the disk is full or may not be written.
    """
    target = target_of(file)
    beside = place_beside(target)
    try:
        yield beside
        flush(beside)
        os.replace(beside, target)
    except OSError as error:
        if error.errno not in NO_ROOM_OR_RIGHTS:
            raise
        raise CannotWrite(f"cannot write {file}: {os.strerror(error.errno)}; {CURE}") from error
    finally:
        beside.unlink(missing_ok=True)


def place_beside(file: Path) -> Path:
    """Where this process writes what becomes a file; what killed ones left there is removed."""
    prefix = f".{file.name}.{socket.gethostname()}-"
    for left in file.parent.glob(f"{glob.escape(prefix)}*"):
        if not is_alive(left.name.removeprefix(prefix)):
            left.unlink(missing_ok=True)
    return file.with_name(f"{prefix}{os.getpid()}")


def is_alive(pid: str) -> bool:
    """Whether a process of this machine runs; True where that cannot be known."""
    if not pid.isdecimal() or os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def flush(path: Path) -> None:
    """Make the disk hold what was written to a file, or renamed in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
