"""A stop request sets a flag and nothing else; a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from sfa_dist.parallel.stop_flag import STOP_SIGNALS, StopFlag


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = StopFlag()
    flag.install()
    yield flag
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_signal_there_is_no_request(stop: StopFlag) -> None:
    assert not stop


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_each_signal_is_a_request(stop: StopFlag, number: signal.Signals) -> None:
    signal.raise_signal(number)
    assert stop
    assert stop.signal == number


def test_a_scheduler_may_ask_again_and_again(stop: StopFlag) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop


def test_a_second_ctrl_c_does_not_wait(stop: StopFlag) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop
