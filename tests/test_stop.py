"""Stop signals outside a loop and in one that looks for them; tests/test_run.py has those of a run."""

from __future__ import annotations

import signal

import pytest

from beit.stop import stop_at_once, stop_signals


def test_outside_a_loop_a_signal_is_raised_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_at_once():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            with pytest.raises(SystemExit) as caught:  # which no `except Exception` swallows
                signal.raise_signal(number)
            assert caught.value.code == 143
            assert f"stopped by {signal.Signals(number).name}" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "ends_with"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_stop_that_foreign_code_turned_into_its_own_error_is_a_stop(
    number: signal.Signals, ends_with: type[BaseException]
) -> None:
    def read() -> None:  # as torch did, asked for a storage's shape while safetensors read a file
        try:
            signal.raise_signal(number)
        except BaseException:
            raise TypeError("could not determine the shape of object type 'torch.storage'") from None

    with pytest.raises(ends_with) as caught, stop_at_once():
        read()
    assert getattr(caught.value, "code", 143) == 143


def test_an_error_without_a_stop_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="shape"), stop_at_once():
        raise TypeError("shape")


def test_a_loop_inside_asks_and_gives_the_signals_back() -> None:
    with stop_at_once():
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.exit_code == 143
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_machines_may_repeat_themselves() -> None:
    with stop_signals() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 143


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_signals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130


def test_the_first_signal_gives_the_code() -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 143


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def use() -> int:
        with stop_signals() as stop:
            return stop.exit_code

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use).result(10) == 0
    assert signal.getsignal(signal.SIGTERM) is before
