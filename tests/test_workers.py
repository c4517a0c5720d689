"""Work done ahead: in order, bounded, and no hang whatever becomes of a worker."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, LOCK_LEFT_HELD

import beit.workers
from beit.workers import WorkerDied, available_processors, load_ahead, load_in_processes, now_doing

WORKERS = [0, 1, 3]


def within(seconds: float, work: Callable[[], object]) -> object:
    """The result of work, or a failure where it hangs."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return found[0]


def until(happened: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it has not happened in 10 s")


@pytest.mark.parametrize("workers", WORKERS)
def test_loading_ahead_keeps_the_order_whoever_is_first(workers: int) -> None:
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3 == 0))  # some take longer than those after them
        return step * step

    assert list(load_ahead(make, range(5, 40), workers)) == [step * step for step in range(5, 40)]


@pytest.mark.parametrize("workers", WORKERS)
def test_nothing_to_load_gives_nothing(workers: int) -> None:
    assert list(load_ahead(str, range(3, 3), workers)) == []


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_is_raised_at_its_step(workers: int) -> None:
    def make(step: int) -> int:
        if step == 4:
            raise ValueError("picture 4 is broken")
        return step

    loader = load_ahead(make, range(20), workers)
    assert [next(loader) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="picture 4 is broken"):
        next(loader)


@pytest.mark.parametrize("workers", [1, 3])
def test_work_is_done_ahead_but_not_without_bound(workers: int) -> None:
    made: list[int] = []
    loader = load_ahead(lambda step: made.append(step), range(1000), workers)
    next(loader)
    until(lambda: len(made) == 2 * workers + 1)
    time.sleep(0.02)
    assert len(made) == 2 * workers + 1
    within(10, loader.close)  # type: ignore[attr-defined]


def test_without_workers_nothing_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    loader = load_ahead(lambda step: made.append(step), range(10), 0)
    next(loader)
    assert made == [0]


@pytest.mark.parametrize("workers", WORKERS)
def test_stopping_early_does_not_hang_and_makes_no_more(workers: int) -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step

    def work() -> int:
        loader = load_ahead(make, range(100_000), workers)
        first = next(loader)
        loader.close()  # type: ignore[attr-defined]
        return first

    assert within(10, work) == 0
    count = len(made)
    time.sleep(0.02)
    assert len(made) == count <= 2 * workers + 1


STOPPED_AHEAD = """
from beit.workers import load_ahead
try:
    list(load_ahead(lambda step: step, range(1000), 2))
except KeyboardInterrupt:
    os._exit(130)
"""


def test_ctrl_c_that_leaves_a_lock_held_waits_for_no_thread() -> None:
    command = [sys.executable, "-c", LOCK_LEFT_HELD + STOPPED_AHEAD]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=120, check=False).returncode == 130


def test_what_was_not_begun_is_not_done_after_stopping() -> None:
    made: list[int] = []
    go_on = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        assert step == 0 or go_on.wait(10)
        return step

    loader = load_ahead(make, range(10), 1)
    next(loader)
    until(lambda: made == [0, 1])  # and 2 waits for its turn
    closing = threading.Thread(target=loader.close)  # type: ignore[attr-defined]
    closing.start()
    time.sleep(0.05)
    go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    assert made == [0, 1]


def test_work_is_done_in_as_many_threads_as_asked_for() -> None:
    meeting = threading.Barrier(3, timeout=10)  # passes only where three work at once
    list(load_ahead(lambda _: meeting.wait(), range(3), 3))


# --- By processes --------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux")


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("steps", [range(0), range(3), range(5, 40)])
def test_processes_keep_the_order_whoever_is_first(workers: int, steps: range) -> None:
    def make(step: int) -> tuple[int, np.ndarray]:
        time.sleep(0.002 * (step % 3 == 0))
        return step, np.full((step, 3), step)

    made = list(load_in_processes(make, steps, workers))
    assert [step for step, _ in made] == list(steps)
    for step, array in made:
        np.testing.assert_array_equal(array, np.full((step, 3), step))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64, bool])
def test_arrays_arrive_as_they_were_sent(dtype: type) -> None:
    rng = np.random.default_rng(0)
    sent = [(rng.random((size, 7)) * 200).astype(dtype) for size in (0, 1, 3, 1000)]
    (received,) = load_in_processes(lambda _: sent, range(1), 1)
    for one, other in zip(received, sent, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    received[3][0] = 1  # they are the caller's own


def test_numbers_behind_an_odd_number_of_bytes_arrive_where_processors_want_them() -> None:
    sent = [np.arange(size, dtype=dtype) for size in (7, 1, 3) for dtype in (np.uint8, np.float64)]
    (received,) = load_in_processes(lambda _: sent, range(1), 1)
    assert all(array.flags.aligned for array in received)
    for one, other in zip(received, sent, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_process_is_raised_at_its_step(workers: int) -> None:
    def make(step: int) -> int:
        if step == 4:
            raise KeyError("picture 4")
        return step

    loader = load_in_processes(make, range(20), workers)
    assert [next(loader) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="picture 4") as caught:
        next(loader)
    if workers:  # of which traceback the caller sees nothing
        assert "in make" in str(caught.value.__cause__)


def test_an_error_that_cannot_travel_arrives_as_its_words() -> None:
    class Local(Exception):
        pass

    def make(step: int) -> int:
        raise Local("no such thing")

    with pytest.raises(RuntimeError, match="Local: no such thing"):
        list(load_in_processes(make, range(1), 1))


@linux
def test_work_is_done_by_other_processes_as_many_as_asked_for() -> None:
    pids = set(load_in_processes(lambda _: os.getpid(), range(12), 3))
    assert len(pids) == 3
    assert os.getpid() not in pids


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_death(loader: Iterator[int]) -> tuple[list[int], str]:
    """What a loader gave before a worker of its died, and what was said of that."""

    def work() -> tuple[list[int], str]:
        given: list[int] = []
        try:
            for value in loader:
                given.append(value)
        except WorkerDied as error:
            return given, str(error)
        return given, "no worker died"

    return within(30, work)  # type: ignore[return-value]


@linux
def test_a_worker_that_is_killed_is_reported_with_its_file_and_nothing_hangs() -> None:
    def make(step: int) -> int:
        now_doing(f"photos/{step}.jpg")
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    pids, said = until_death(load_in_processes(make, range(1000), 2))
    assert "a worker process was killed by SIGKILL while reading photos/5.jpg, twice" in said
    assert len(pids) == 5  # all before it were given
    assert not any(map(is_running, pids))


@linux
def test_another_takes_the_place_of_a_worker_that_is_killed_and_nothing_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def make(step: int) -> int:
        now_doing(f"photos/{step}.jpg")
        if step in (5, 8, 9) and not (tmp_path / f"{step}").exists():
            (tmp_path / f"{step}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    assert list(load_in_processes(make, range(20), 2)) == list(range(20))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    for step, line in zip((5, 8, 9), said, strict=True):
        told = f"a worker process was killed by SIGKILL while reading photos/{step}.jpg"
        assert line == f"{told}; another begins there again"


@linux
def test_names_of_any_length_are_told_up_to_a_limit_and_none_where_nothing_was_begun() -> None:
    def make(step: int) -> int:
        if step:
            now_doing("long/" * 10_000)
            now_doing("short.jpg" if step == 1 else "x" * 10_000)
        os.kill(os.getpid(), signal.SIGKILL)
        return step

    for step, told in ((0, "nothing yet"), (1, "short.jpg"), (2, "x" * beit.workers.NOTE_BYTES)):
        _, said = until_death(load_in_processes(make, range(step, step + 1), 1))
        assert f"while reading {told}, twice" in said


@linux
def test_as_many_deaths_as_are_forgiven_are_forgiven(tmp_path: Path) -> None:
    def make(step: int) -> int:
        if step % 2 and not (tmp_path / f"{step}").exists():
            (tmp_path / f"{step}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    most = 2 * beit.workers.MOST_DEATHS
    assert list(load_in_processes(make, range(most), 2)) == list(range(most))
    given, said = until_death(load_in_processes(make, range(most, 2 * most + 3), 2))
    assert given == list(range(most, 2 * most + 1))
    assert "SIGKILL" in said


@linux
def test_workers_killed_from_outside_again_and_again_are_reported() -> None:
    loader = load_in_processes(lambda _: os.getpid(), range(100_000), 2)
    killed: set[int] = set()
    with pytest.raises(WorkerDied, match="killed by SIGKILL"):  # noqa: PT012
        for number, pid in enumerate(loader):
            assert number < 100, "the loader goes on for ever"
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    assert len(killed) >= beit.workers.MOST_DEATHS + 1


@linux
def test_no_worker_outlives_its_loader() -> None:
    loader = load_in_processes(lambda _: os.getpid(), range(100), 3)
    pids = [next(loader) for _ in range(3)]
    assert all(map(is_running, pids))
    loader.close()  # type: ignore[attr-defined]
    assert not any(map(is_running, pids))
    for pid in pids:
        with pytest.raises(ChildProcessError):  # none is left to be waited for
            os.waitpid(pid, os.WNOHANG)


@linux
def test_processes_work_ahead_but_not_without_bound(tmp_path: Path) -> None:
    loader = load_in_processes(lambda step: (tmp_path / f"{step}").touch(), range(100), 2)
    next(loader)
    until(lambda: len(list(tmp_path.iterdir())) == 5)
    time.sleep(0.02)
    assert len(list(tmp_path.iterdir())) == 5
    loader.close()  # type: ignore[attr-defined]


@linux
def test_no_file_stays_open_on_either_side() -> None:
    def opened(step: int) -> tuple[np.ndarray, int]:
        return np.ones(step), len(os.listdir("/proc/self/fd"))

    ours, theirs = [], []
    for _, theirs_now in load_in_processes(opened, range(60), 2):
        ours.append(len(os.listdir("/proc/self/fd")))
        theirs.append(theirs_now)
    assert max(ours[10:]) < max(ours[:10]) + 10  # others open some too
    assert max(theirs[10:]) < max(theirs[:10]) + 10


@linux
def test_no_more_workers_are_made_than_there_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    fork = os.fork

    def counted() -> int:
        made.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    assert list(load_in_processes(lambda step: step, range(2), 5)) == [0, 1]
    assert len(made) == 2


@linux
def test_the_processors_are_those_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(allowed)])
        assert available_processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@linux
def test_torch_takes_one_thread_in_a_worker() -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert list(load_in_processes(lambda _: torch.get_num_threads(), range(2), 2)) == [1, 1]
    finally:
        torch.set_num_threads(threads)


@linux
def test_workers_outlive_stop_signals_which_their_parent_answers() -> None:
    loader = load_in_processes(lambda _: os.getpid(), range(100), 2)
    pids = [next(loader), next(loader)]
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
    assert [next(loader) for _ in range(20)] == 10 * pids  # more than were made ahead of the signals


@linux
def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "import os, sys\nfrom beit.workers import load_in_processes\n"
        "loader = load_in_processes(lambda _: os.getpid(), range(100), 3)\n"
        "print(*[next(loader) for _ in range(3)], flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.kill()
    until(lambda: not any(map(is_running, pids)))


@linux
def test_memory_stays_flat_however_much_passes_through() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    big = np.ones(1_000_000, dtype=np.uint8)
    sizes = [resident() for _ in load_in_processes(lambda step: big + step % 2, range(300), 2)]
    assert sizes[-1] - sizes[50] < 20_000_000 / os.sysconf("SC_PAGE_SIZE")  # of 250 MB that passed


@linux
def test_a_worker_holds_no_pipe_of_its_parent_open() -> None:
    reader, writer = os.pipe()
    loader = load_in_processes(lambda _: os.getpid(), range(100), 2)
    assert is_running(next(loader))
    os.close(writer)
    assert within(10, lambda: os.read(reader, 1)) == b""
    os.close(reader)


def test_a_parent_without_room_says_so_and_waits_for_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no room")

    monkeypatch.setattr(beit.workers, "_receive", full)
    with pytest.raises(OSError, match="no room"):
        list(load_in_processes(lambda step: step, range(4), 2))
