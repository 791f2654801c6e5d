"""What holds for each test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # Started in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def as_polite_as_before() -> Iterator[None]:
    """Real-time processes stop the machine: SVT-AV1's encoder makes the process that calls it one, where it is root,
    and all that it starts afterwards."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before, "the test changed the scheduling policy of this process"
