"""Stop signals: a run that is asked to end saves first, within 10 s, wherever it is.

Ctrl-C (SIGINT) ends with exit code 130; SIGTERM, SIGUSR1 (Slurm's warning before the time is up) and
SIGHUP (a terminal that closed) with 143. A signal that was ignored stays ignored. No torch here: the
signals are watched from the first line on.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOPS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]
END = b"\0"  # no signal has this number
GRACE_S = 5.0  # for a step to end by itself; half of what is promised


Rescue = Callable[[int], "int | None"]  # from an exit code to the one to end with, or None


class Stopped(Exception):
    """A loop was asked to stop, and has saved. `exit_code` is 130 (Ctrl-C) or 143."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(exit_code, message)  # both, so that it travels between processes
        self.exit_code, self.message = exit_code, message

    def __str__(self) -> str:
        return self.message


def exit_code_of(number: int) -> int:
    """130 for Ctrl-C, a person's; 143 for all others, a machine's."""
    return 130 if number == signal.SIGINT else 143


class StopRequest:
    """Whether a stop signal came: a loop looks here after each step."""

    def __init__(self) -> None:
        self.exit_code = 0

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def receive(self, number: int, _frame: object) -> None:
        """The handler of the signals. A second Ctrl-C stops at once."""
        if not self.exit_code:
            self.exit_code = exit_code_of(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


class _StopNow(StopRequest):
    def __init__(self, then: str) -> None:
        super().__init__()
        self.then = then

    def receive(self, number: int, _frame: object) -> None:
        self.exit_code = exit_code_of(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        print(f"beit: stopped by {name}; {self.then}", file=sys.stderr)
        # Not Stopped: whoever reads a broken file catches every Exception, and would say it is broken.
        raise SystemExit(self.exit_code)


def _let_go() -> None:
    """In a forked child: a signal to it is none to its parent, whose pipe it would tell."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def stop_signals(rescue: Rescue = lambda code: code) -> Iterator[StopRequest]:
    """Turn stop signals into a request that a loop reads at its next step.

    rescue: called from another thread when the loop takes longer than 5 s to read it, in a long step
    or an evaluation; it saves, and gives the code to end the process with, or None to let it go on.
    """
    with _watched(StopRequest(), rescue) as request:
        yield request


@contextmanager
def stop_at_once(then: str = "give the same command to go on") -> Iterator[None]:
    """Outside a loop, where all is on the disk: stop signals raise SystemExit or KeyboardInterrupt.

    Where Python cannot raise, inside a long call of C, the process ends after 5 s. then: what is said
    besides of a signal.
    """
    with _watched(_StopNow(then), lambda code: code) as request:
        try:
            yield
        except Exception as error:
            if request:  # foreign code, reading a file, made an error of its own of what was raised
                raise KeyboardInterrupt if request.exit_code == 130 else SystemExit(143) from error
            raise


@contextmanager
def _watched(request: StopRequest, rescue: Rescue) -> Iterator[StopRequest]:
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are somebody else's
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = [n for n in STOPS if signal.getsignal(n) is not signal.SIG_IGN]
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    watch = threading.Thread(target=_watch, args=(reader, numbers, rescue), daemon=True)
    watch.start()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.write(writer, END)  # a closed pipe would not do: forked processes hold it too
        watch.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int, numbers: list[int], rescue: Rescue) -> None:
    """Wait for a signal's number on a pipe, then for END; where that does not come, rescue and exit.

    The main thread hears of a signal only between lines of Python; this one always does.
    """
    came = 0
    while came not in numbers:
        content = os.read(reader, 1)
        if content == END:
            return
        came = content[0]
    until = time.monotonic() + GRACE_S
    while select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
        if os.read(reader, 1) == END:
            return
    code = rescue(exit_code_of(came))
    if code is not None:
        sys.stderr.flush()
        os._exit(code)
