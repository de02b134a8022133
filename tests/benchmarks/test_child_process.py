"""Signals on which a command closes everything it has opened."""

from __future__ import annotations

import os
import signal

import pytest

from twotower_bench.child_process import ended_by_signals, signals_held


def test_signals_end_the_command_so_that_what_is_open_is_closed() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with pytest.raises(SystemExit) as ended, ended_by_signals():
                os.kill(os.getpid(), number)
            assert ended.value.code == 128 + number
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, before)


def test_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_while_a_process_starts_is_heeded_when_it_has_started(
    number: signal.Signals, error: type[BaseException]
) -> None:
    started = []
    # A run of the tests under nohup, or behind a shell, may have begun with the signal ignored.
    before = signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)

    def start() -> None:
        with ended_by_signals(), signals_held():
            os.kill(os.getpid(), number)
            started.append(True)

    try:
        with pytest.raises(error):
            start()
    finally:
        signal.signal(number, before)
    assert started
