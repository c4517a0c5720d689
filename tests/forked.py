"""Processes forked from one that has imported torch: each begins three seconds sooner.

For what is asked between processes, or of one that is stopped or killed. Python's own server forks them,
which does nothing else: a process that has had threads, as that of the tests has, may not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from conftest import ENVIRONMENT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "beit.commands.pretrain", "beit.commands.train_tokenizer"]
)


class Forked:
    """`work(*words)` in a process of its own, with what `subprocess.Popen` says of one; it writes text."""

    def __init__(self, work: Callable[..., None], *words: str | Path, **environment: str) -> None:
        self._files = [tempfile.NamedTemporaryFile("r") for _ in ("out", "err")]  # noqa: SIM115
        told = ENVIRONMENT | environment
        self._process = SERVER.Process(
            target=begin, args=(work, [*map(str, words)], told, *(file.name for file in self._files))
        )
        self._process.start()
        self.pid = self._process.pid or 0

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self._process.join()

    @property
    def returncode(self) -> int | None:
        """None while it lives; minus the number of the signal that killed it."""
        return self._process.exitcode

    poll = returncode.fget

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote on stdout and on stderr, to its end."""
        self._process.join(timeout)
        said = tuple(file.read() for file in self._files)
        if self._process.is_alive():
            self.kill()
            raise TimeoutError(said[1])
        return said[0], said[1]

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until it has begun to write that on stdout."""
        end = time.monotonic() + timeout
        while not Path(self._files[0].name).read_text().startswith(text):
            if self.returncode is not None or time.monotonic() > end:
                raise AssertionError(self.communicate(0))
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        """Send a signal to it; it may have ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def begin(work: Callable[..., None], words: list[str], told: dict[str, str], out: str, err: str) -> None:
    """What the forked process does: the environment, the streams, then the work."""
    os.environ.clear()
    os.environ.update(told)
    for stream, place in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND), stream.fileno())
    warnings.simplefilter("error")
    work(*words)


def ranks(number: int, work: Callable[..., None], *words: str | Path) -> list[Forked]:
    """Processes that work together, as srun begins them: each told its rank by its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked(work, *words, RANK=rank, LOCAL_RANK=rank, **shared) for rank in map(str, range(number))
    ]


def beit(*words: str) -> None:
    """`beit ...`, as its program does it."""
    from beit.cli import main

    sys.argv = ["beit", *words]
    os.environ.setdefault("GLIBC_TUNABLES", "")  # or it would begin anew
    main()
