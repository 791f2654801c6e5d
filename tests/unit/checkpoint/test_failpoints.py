"""Failpoints: a process fails where it is told to, there only, and as often as it is told to."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from sfa_dist.checkpoint.failpoints import ERRORS, POINTS, Failpoints, parse_failpoints
from sfa_dist.errors import UsageError


def test_without_rules_nothing_happens() -> None:
    for failpoints in (Failpoints(), parse_failpoints(""), parse_failpoints(" ; ")):
        for point in POINTS:
            failpoints.reach(point, rank=0, step=1)


def test_a_rule_fires_where_all_its_conditions_hold() -> None:
    failpoints = parse_failpoints("save.write:enospc@step=4,rank=1,stage=stage2,times=9")
    for point, rank, step, stage in (
        ("save.stage", 1, 4, "stage2"),
        ("save.write", 0, 4, "stage2"),
        ("save.write", 1, 5, "stage2"),
        ("save.write", 1, 4, "stage1"),
    ):
        failpoints.reach(point, rank=rank, step=step, stage=stage)
    failpoints.reach("save.write", rank=1, step=4)  # A condition on what the point does not tell does not hold.
    with pytest.raises(OSError, match=r"No space left on device \(failpoint save\.write\)") as caught:
        failpoints.reach("save.write", rank=1, step=4, stage="stage2")
    assert caught.value.errno == errno.ENOSPC


def test_a_rule_fires_as_often_as_it_says() -> None:
    failpoints = parse_failpoints("load.read:estale@times=2; load.read:eio@rank=1")
    for _ in range(2):
        with pytest.raises(OSError, match="Stale") as caught:
            failpoints.reach("load.read", rank=0)
        assert caught.value.errno == errno.ESTALE
    failpoints.reach("load.read", rank=0)
    with pytest.raises(OSError, match="Input/output error"):
        failpoints.reach("load.read", rank=1)
    failpoints.reach("load.read", rank=1)


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_its_number(name: str) -> None:
    with pytest.raises(OSError, match="failpoint") as caught:
        parse_failpoints(f"save.stage:{name}").reach("save.stage")
    assert errno.errorcode[caught.value.errno or 0].lower() == name


@pytest.mark.parametrize(("action", "code"), [("kill", -9), ("term", -15)])
def test_a_process_kills_itself(action: str, code: int) -> None:
    program = (
        "from sfa_dist.checkpoint.failpoints import parse_failpoints\n"
        f"failpoints = parse_failpoints('save.write:{action}@step=2')\n"
        "for step in (1, 2, 3):\n"
        "    print(step, flush=True)\n"
        "    failpoints.reach('save.write', step=step)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "1\n2\n")


@pytest.mark.parametrize(
    "text",
    ["save.write", "save.nowhere:kill", "save.write:explode", "save.write:kill@day=4", "save.write:kill@times=x"],
)
def test_a_rule_that_means_nothing_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="SFA_FAILPOINT") as caught:
        parse_failpoints(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)
