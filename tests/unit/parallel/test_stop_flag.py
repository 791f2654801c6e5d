"""A stop request is noted at once, wherever the main thread is, and told once; a second Ctrl-C ends at once."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfa_dist.errors import PreemptedError
from sfa_dist.parallel.stop_flag import DEFAULT_SIGNALS, INTERRUPTED, StopFlag

LONG_IN_C = 5_000_000  # Rounds that take seconds, in which no handler of Python runs.
ALL_SIGNALS = (signal.SIGINT, signal.SIGHUP, *DEFAULT_SIGNALS)


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in ALL_SIGNALS}
    flag = StopFlag()
    flag.install()
    yield flag
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_signal_there_is_no_request(stop: StopFlag) -> None:
    assert not stop


@pytest.mark.parametrize("number", ALL_SIGNALS, ids=lambda number: number.name)
def test_each_signal_is_a_request(stop: StopFlag, number: signal.Signals) -> None:
    signal.raise_signal(number)
    assert stop
    assert stop.reason == number.name


def test_a_process_that_is_to_outlive_its_terminal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in ALL_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup.
    flag = StopFlag()
    try:
        flag.install()
        signal.raise_signal(signal.SIGHUP)
        assert not flag
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_scheduler_may_ask_again_and_again(stop: StopFlag) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop


def wait_until(condition: Callable[[], object], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.fault(12)
def test_a_request_is_told_while_the_main_thread_is_deep_in_c(stop: StopFlag) -> None:
    """Python's own handlers run when that call is over."""
    told: list[float] = []
    stop.on_request(lambda: told.append(time.monotonic()))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", LONG_IN_C)
    ended = time.monotonic()
    wait_until(lambda: told)
    assert len(told) == 1
    assert told[0] < ended - 0.3
    assert stop.reason == "SIGTERM"


@pytest.mark.fault(10)
def test_only_the_first_request_is_told(stop: StopFlag) -> None:
    told: list[str] = []
    stop.on_request(lambda: told.append(stop.reason))
    stop.request("the launcher")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    stop.request("somebody")
    late: list[bool] = []
    stop.on_request(lambda: late.append(True))
    assert (told, late, stop.reason) == (["the launcher"], [True], "the launcher")


def test_a_process_with_many_open_files_hears_too() -> None:
    """Rank 0 of a large run holds a connection to each of the others."""
    program = (
        "import os, signal, time\n"
        "held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1030)]\n"
        "from sfa_dist.parallel.stop_flag import StopFlag\n"
        "flag, told = StopFlag(), []\n"
        "flag.install()\n"
        "flag.on_request(lambda: told.append(flag.reason))\n"
        "signal.raise_signal(signal.SIGTERM)\n"
        "end = time.monotonic() + 20\n"
        "while not told and time.monotonic() < end:\n"
        "    time.sleep(0.01)\n"
        "print(told)\n"
    )
    if (allowed := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < 1100:
        pytest.skip(f"a process may open {allowed} files here")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert (done.stdout, done.stderr) == ("['SIGTERM']\n", "")


def test_signals_that_are_not_in_the_list_stay_as_they_are() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR2)}
    flag = StopFlag()
    flag.install([signal.SIGUSR2])
    assert signal.getsignal(signal.SIGUSR1) == before
    signal.raise_signal(signal.SIGUSR2)
    assert flag
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_launcher_that_is_gone_is_a_request() -> None:
    handlers = {number: signal.getsignal(number) for number in ALL_SIGNALS}
    said = [""]
    flag = StopFlag()
    flag.install(lost_launcher=lambda: said[0])
    assert not flag
    said[0] = "its launcher is gone"
    wait_until(lambda: flag)
    assert flag.reason == "its launcher is gone"
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.fault(11)
def test_long_work_before_the_first_step_ends_at_once(stop: StopFlag) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(PreemptedError, match="stopped by SIGTERM"), stop.nothing_to_save():
        time.sleep(30)
    with pytest.raises(PreemptedError), stop.nothing_to_save():
        pytest.fail("it was asked to stop before")


def test_also_when_it_is_not_a_signal_that_asks(stop: StopFlag) -> None:
    threading.Timer(0.1, stop.request, ("another rank",)).start()
    with pytest.raises(PreemptedError, match="stopped by another rank"), stop.nothing_to_save():
        time.sleep(30)
    signal.raise_signal(signal.SIGTERM)  # No longer an error.


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("time.sleep(60)", "at once\n"),
        ("hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)", f"{INTERRUPTED}\n"),
    ],
    ids=["in Python", "deep in C"],
)
def test_a_second_ctrl_c_does_not_wait(work: str, said: str) -> None:
    program = (
        "import hashlib, sys, time\n"
        "from sfa_dist.parallel.stop_flag import StopFlag\n"
        "StopFlag().install()\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True:\n"
        f"        {work}\n"
        "except KeyboardInterrupt:\n"
        "    sys.stderr.write('at once\\n')\n"
        "    sys.exit(70)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)  # The first is a request.
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 70
    finally:
        process.kill()
    assert process.communicate()[1] == said
