"""What holds for each test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OF_THE_USER = ("data", "runs")  # Folders of the repository that a clean clone does not have.
PLACES = ("SFA_DATA", "SFA_DEMO_DATA", "SFA_OWN_DATA", "SFA_OWN_TEST")  # What recipes read from the environment.

# Started in the background of a script, or by nohup: then signals are ignored that tests send.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def as_in_a_clean_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test depends on what lies in data/ or runs/: tests start in a folder that has all of the repository but these,
    and recipes name places that start there."""
    before, view = Path.cwd(), tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name not in OF_THE_USER:
            (view / entry.name).symlink_to(entry)
    set_before = {name: os.environ.pop(name) for name in PLACES if name in os.environ}
    os.chdir(view)
    yield view
    os.chdir(before)
    os.environ.update(set_before)


def _local_rank_as_before() -> Iterator[None]:
    """A run in the process of a test sets LOCAL_RANK, for which DeepSpeed looks; to the next one it would be half a
    launcher."""
    before = os.environ.get("LOCAL_RANK")
    yield
    os.environ.pop("LOCAL_RANK", None)
    if before is not None:
        os.environ["LOCAL_RANK"] = before


started_by_no_launcher = pytest.fixture(autouse=True)(_local_rank_as_before)
file_started_by_no_launcher = pytest.fixture(autouse=True, scope="module")(_local_rank_as_before)


@pytest.fixture(autouse=True)
def as_polite_as_before() -> Iterator[None]:
    """Real-time processes stop the machine: SVT-AV1's encoder makes the process that calls it one, where it is root,
    and all that it starts afterwards."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before, "the test changed the scheduling policy of this process"
