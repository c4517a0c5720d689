"""Work done ahead of its use, in order: by threads, or by processes that may die.

Threads share Python's lock, which the two views of pre-training hold for half of their time (0.52 at
224 pixels, 0.46 at 500, py-spy, 2026-11-22), so that any number of them fills two cores. Processes are
forked: they share the tables of the parent, start in milliseconds, and need nothing to be picklable but
their results. Where forking is not safe (outside Linux) threads do the work.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, NoReturn, TypeVar

S = TypeVar("S")
T = TypeVar("T")

NOTE_BYTES = 4096  # of the name of what a worker is doing
MOST_DEATHS = 3  # of the workers of one loader that others take the place of; more are no accident
CURES = (
    "If memory was short, use fewer --workers; if it dies there again, take that picture away. "
    "The same command goes on from what is saved"
)


class WorkerDied(RuntimeError):
    """A worker process ended by itself: killed by a person, by the kernel for memory, or by a crash."""

    exit_code = 1


def load_ahead(make: Callable[[int], T], steps: range, workers: int) -> Iterator[T]:
    """make(step) for each step, in order, prepared by threads while the caller works.

    Decoding and resizing release Python's lock, so for them threads do; an error in one is raised
    here, at its step. workers 0 works in the caller.
    """
    if workers == 0:
        yield from map(make, steps)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield from make_ahead(pool, make, steps, 2 * workers)
    finally:  # Ctrl-C may leave a lock held that the pool's threads wait for, see `cli.main`
        pool.shutdown(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt))


def make_ahead(pool: Executor, make: Callable[[S], T], steps: Iterable[S], ahead: int) -> Iterator[T]:
    """As `load_ahead`, in a pool that several callers share: at most `ahead` steps before their use.

    `steps` may be endless; it is read by the caller's thread.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def load_in_processes(make: Callable[[int], T], steps: range, workers: int) -> Iterator[T]:
    """As `load_ahead`, by processes; what `make` changes in one is not seen outside it.

    Worker i makes steps i, i + workers, ... and keeps a result until it is taken. An error is raised
    here, at its step. A worker that ends by itself is told on stderr, with what it was doing, and another
    makes that step; where that one dies in it too, or after three such, WorkerDied is raised.
    """
    if workers == 0 or not sys.platform.startswith("linux"):
        yield from load_ahead(make, steps, workers)
        return
    crew = [_Worker(make) for _ in range(min(workers, len(steps)))]
    deaths = 0
    try:
        ahead = iter(steps)
        for place, step in enumerate(islice(ahead, 2 * len(crew))):
            crew[place % len(crew)].ask(step)
        for place in range(len(steps)):
            worker = crew[place % len(crew)]
            try:
                result = worker.answer()
            except WorkerDied as death:
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise WorkerDied(f"{death}. {CURES}") from None
                print(f"{death}; another begins there again", file=sys.stderr)
                worker = crew[place % len(crew)] = worker.successor()
                try:
                    result = worker.answer()
                except WorkerDied as again:
                    raise WorkerDied(f"{again}, twice. {CURES}") from None
            for step in islice(ahead, 1):
                worker.ask(step)
            yield result
    finally:
        for worker in crew:
            worker.end()


_note: mmap.mmap | None = None  # in a worker: what it is doing, for its parent to read


def now_doing(what: str) -> None:
    """Tell the parent process, should this worker die, what it died of."""
    if _note is not None:
        _note[:] = what.encode(errors="replace")[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")


class _Worker(Generic[T]):
    """A forked process that answers `make(step)`, one step after the other."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make
        self.owed: deque[int] = deque()  # steps that were asked for
        self.ours, theirs = Pipe()
        self.note = mmap.mmap(-1, NOTE_BYTES)
        with warnings.catch_warnings():  # a fork beside threads; this one takes no lock of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            global _note
            _note = self.note
            _serve(make, theirs)
        theirs.close()

    def ask(self, step: int) -> None:
        self.owed.append(step)
        with suppress(OSError):  # it died: `answer` says so, once what it made before is taken
            self.ours.send(step)

    def answer(self) -> T:
        try:
            result, error, where = _receive(self.ours)
        except (EOFError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                raise  # this process has no room; the worker lives
            self._died()
        self.owed.popleft()
        if error is not None:
            raise error from RuntimeError(f"in a worker process:\n{where}")
        return result

    def successor(self) -> _Worker[T]:
        """Another that owes what this one, which died, has not given."""
        self.end()
        other = _Worker(self.make)
        for step in self.owed:
            other.ask(step)
        return other

    def _died(self) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        what = self.note[:].rstrip(b"\0").decode(errors="replace") or "nothing yet"
        raise WorkerDied(f"a worker process {how} while reading {what}")

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        self.ours.close()
        self.note.close()


def _serve(make: Callable[[int], Any], pipe: Connection) -> NoReturn:
    """The life of a worker, until its parent closes the pipe or dies."""
    try:
        # Pipes of the parent stay open, and those who wait for their end wait on, while a child has them.
        gc.freeze()  # nothing inherited is collected, and closes a number that is another file's by then
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        if "torch" in sys.modules:  # its pool of threads does not survive a fork
            sys.modules["torch"].set_num_threads(1)
        # The parent decides when to stop, and may finish and save its step first.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        with suppress(EOFError, ConnectionError):
            while True:
                _send(pipe, _answer(make, pipe.recv()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:  # whatever happens, a child never runs on as a second parent
        os._exit(0)


Answer = tuple[Any, BaseException | None, str]  # result, error, where it arose


def _answer(make: Callable[[int], Any], step: int) -> Answer:
    try:
        return make(step), None, ""
    except BaseException as error:
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # one that does not travel goes as its text
            return None, RuntimeError(f"{type(error).__name__}: {error}"), where
        return None, error, where


def _send(pipe: Connection, answer: Answer) -> None:
    """Arrays travel as shared memory without a name: a batch of 256 pictures took 110 ms in the pipe.

    Shared memory with a name is short where most containers run, 64 MiB.
    """
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    memory = os.memfd_create("beit")
    ends = [0]
    for buffer in buffers:
        raw = buffer.raw()
        os.pwrite(memory, raw, ends[-1])
        ends.append(ends[-1] + -(-raw.nbytes // 64) * 64)
    os.ftruncate(memory, ends[-1])
    pipe.send(
        (content, [(start, buffer.raw().nbytes) for start, buffer in zip(ends, buffers, strict=False)])
    )
    send_handle(pipe, memory, 0)
    os.close(memory)


def _receive(pipe: Connection) -> Answer:
    content, spans = pipe.recv()
    memory = recv_handle(pipe)
    try:
        shared = (
            memoryview(mmap.mmap(memory, 0)) if spans and os.fstat(memory).st_size else memoryview(b"")
        )
    finally:
        os.close(memory)
    return pickle.loads(content, buffers=[shared[start : start + size] for start, size in spans])


def available_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
