"""Signals stop at once, or after what is half done; and the exit status names them."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tso_fast import interrupts

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def unchanged() -> Any:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_stops_at_once(number: int) -> None:
    with pytest.raises(interrupts.Stopped) as stopped, interrupts.handled():
        signal.raise_signal(number)
    assert stopped.value.number == number


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_waits_for_the_end(number: int) -> None:
    seen = []
    with pytest.raises(interrupts.Stopped) as stopped, interrupts.handled(), interrupts.waiting() as signalled:
        seen.append(signalled())
        signal.raise_signal(number)
        seen.append(signalled())
    assert seen == [0, number]
    assert stopped.value.number == number
    with interrupts.handled(), interrupts.waiting() as signalled:  # nothing is left of it
        assert signalled() == 0


def test_the_second_does_not() -> None:
    with pytest.raises(interrupts.Stopped) as stopped, interrupts.handled(), interrupts.waiting():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError
    assert stopped.value.number == signal.SIGINT


def test_what_is_ignored_stays_ignored() -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.handled():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
