"""Named points of a run at which a process can be made to die, stall or fail, so that recovery can be tested.

    SFA_FAILPOINT="save.write:kill@step=4,rank=1"               dies in the middle of writing a file of step 4's save
    SFA_FAILPOINT="save.write:enospc@step=4; load.read:estale@times=2"

A rule is `point:action`, or `point:action@condition,...`; rules are separated by `;`. Actions:

    kill   SIGKILL to the process itself          stop   SIGSTOP to itself: it hangs until SIGCONT
    term   SIGTERM to itself: a stop request      enospc eio estale erofs edquot eacces   an OSError of that number

Conditions: `rank=R`, `step=S`, `stage=NAME`, all of which must hold, and `times=N`: how often the rule fires in one
process (default 1). Points of a checkpoint, in the order in which a save passes them:

    save.stage           the state has been copied to host memory                           each rank
    save.write           half of a file is written, not flushed                             each rank that writes it
    save.between_files   a file is complete and on disk, the next one is not begun          each rank that writes
    save.before_commit   all files and MANIFEST.json are written, the folder is still .tmp  rank 0
    save.between_renames an existing checkpoint of the same step has been moved aside       rank 0
    save.after_rename    the new checkpoint is in place, older ones are not purged          rank 0
    save.after_purge     the save is over                                                   rank 0
    load.read            a file of a checkpoint is about to be read                         each rank that reads it

Without rules a point costs one check of an empty tuple. `run.session` reads the variable; `Run` carries the rules.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field

from sfa_dist.errors import UsageError

VARIABLE = "SFA_FAILPOINT"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
ERRORS = {name: getattr(errno, name.upper()) for name in ("enospc", "eio", "estale", "erofs", "edquot", "eacces")}
POINTS = (
    *("save.stage", "save.write", "save.between_files", "save.before_commit", "save.between_renames"),
    *("save.after_rename", "save.after_purge", "load.read"),
)
CONDITIONS = ("rank", "step", "stage")


@dataclass
class Rule:
    """What happens at a point, under which conditions, and how many more times."""

    point: str
    action: str
    conditions: dict[str, str] = field(default_factory=dict)
    times: int = 1

    def fire(self) -> None:
        """Takes the action. Raises OSError if the action is an error."""
        self.times -= 1
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
            return
        number = ERRORS[self.action]
        raise OSError(number, f"{os.strerror(number)} (failpoint {self.point})")


class Failpoints:
    """The rules of one process (by default none) and the values of rank, step and stage known so far."""

    def __init__(self, rules: tuple[Rule, ...] = (), **context: int | str) -> None:
        self.rules, self._context = rules, context

    def within(self, **context: int | str) -> Failpoints:
        """The same rules with more values of rank, step and stage."""
        return Failpoints(self.rules, **{**self._context, **context})

    def reach(self, point: str, **more: int | str) -> None:
        """Fires the rules of `point` whose conditions hold. Raises what `Rule.fire` raises."""
        for rule in self.rules:
            context = {**self._context, **more}
            here = all(str(context.get(key)) == value for key, value in rule.conditions.items())
            if rule.point == point and here and rule.times > 0:
                rule.fire()


NO_FAILPOINTS = Failpoints()


def parse_failpoints(text: str) -> Failpoints:
    """The rules in the text of SFA_FAILPOINT. Raises UsageError for an unknown point, action or condition."""
    return Failpoints(tuple(_rule(part.strip()) for part in text.split(";") if part.strip()))


def _rule(text: str) -> Rule:
    head, _, tail = text.partition("@")
    point, _, action = head.strip().partition(":")
    conditions = dict(item.strip().partition("=")[::2] for item in tail.split(",") if item.strip())
    times = conditions.pop("times", "1")
    known = (point in POINTS, action in SIGNALS or action in ERRORS, conditions.keys() <= set(CONDITIONS))
    if not all(known) or not times.isdigit():
        raise UsageError(
            f"{VARIABLE}: {text!r} is not point:action[@condition,...]; points: {', '.join(POINTS)}; "
            f"actions: {', '.join([*SIGNALS, *ERRORS])}; conditions: {', '.join([*CONDITIONS, 'times'])}"
        )
    return Rule(point, action, conditions, int(times))
