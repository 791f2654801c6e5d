"""A trial: a guarantee, a fault that tests it, the rows of the fault catalogue that it covers, and a function `play`.

`play` injects the fault, checks the guarantee and returns a few words on what was seen; BrokenError means that the
guarantee does not hold. The trials are in trials_*.py, by what they damage.
"""

from __future__ import annotations

import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfa_dist.chaos.bench import Bench, BrokenError, References
from sfa_dist.chaos.processes import StuckError

SAME_BITS = "a killed run resumes to the same bits"
STOPS_SAVED = "a run that is asked to stop saves and resumes to the same bits"
LOSS_IS_LOUD = "a lost rank ends the others within 30 s, and is named"
CHECKPOINTS_HOLD = "a damaged checkpoint is never used, and never costs the run"
NO_CODE = "nothing in data or checkpoints is ever executed"
DISK_IS_LOUD = "a failed save leaves the older checkpoints intact"
FINITE = "weights that are not finite are never saved"
DATA_IS_CHECKED = "nothing damaged or exchanged is trained on unnoticed"
EXACTLY_ONCE = "each clip is seen once an epoch, on any ranks and workers"
MOVES = "a checkpoint resumes on other ranks, workers and engines"
ALONE = "a run directory belongs to one job at a time"


@dataclass(frozen=True)
class Trial:
    """See the top of this file. `on` is a key of RANKS: the numbers of ranks on which the trial can be played."""

    name: str
    guarantee: str
    fault: str
    rows: tuple[int, ...]
    play: Callable[[Bench], str]
    on: str = "any"


@dataclass(frozen=True)
class Result:
    """The outcome of a trial on a number of ranks. `evidence` is the folder that a failed trial leaves."""

    name: str
    guarantee: str
    fault: str
    rows: tuple[int, ...]
    ranks: int
    passed: bool
    seen: str
    seconds: float
    evidence: str | None

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


# The numbers of ranks on which a trial can be played.
RANKS: dict[str, Callable[[int], bool]] = {
    "any": lambda ranks: True,
    "one": lambda ranks: ranks == 1,
    "several": lambda ranks: ranks > 1,
    "powers of two": lambda ranks: ranks & (ranks - 1) == 0,
}
TRIALS: list[Trial] = []


def trial(
    guarantee: str, fault: str, rows: Sequence[int], on: str = "any"
) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Registers a function as a trial, named like the function, with dashes."""

    def register(play: Callable[[Bench], str]) -> Callable[[Bench], str]:
        name = play.__name__.replace("_", "-")
        TRIALS.append(Trial(name, guarantee, fault, tuple(rows), play, on))
        return play

    return register


@dataclass(frozen=True)
class Options:
    """How trials are played.

    `seed` is that of all random choices and `rounds` the number of random kill points; `thorough` damages every file
    of a checkpoint in place of a random one, and `keep` keeps the folders of trials that pass.
    """

    seed: int = 0
    rounds: int = 5
    thorough: bool = False
    keep: bool = False


def play_all(
    trials: Sequence[Trial], references: References, ranks: Sequence[int], options: Options
) -> Iterator[Result]:
    """Plays each trial on each number of ranks that it supports. The folders of those that pass are removed."""
    for world_size in ranks:
        for each in trials:
            if RANKS[each.on](world_size):
                yield _play(each, references, world_size, options)


def _play(each: Trial, references: References, ranks: int, options: Options) -> Result:
    folder = references.workplace.folder / "trials" / f"{each.name}-on-{ranks}"
    # Each trial has a generator of its own, so that it plays the same faults with --only.
    chance = random.Random(f"{options.seed} {each.name} {ranks}")
    details: list[str] = []
    passed = False
    started = time.monotonic()
    try:
        with Bench(references, folder, ranks, chance, options.rounds, options.thorough).closing() as bench:
            seen = each.play(bench)
            passed = True
    except BrokenError as broken:
        seen, details = str(broken), broken.details
    except StuckError as stuck:
        seen = str(stuck)
    except (OSError, ValueError, LookupError) as error:
        seen = f"the trial itself failed: {type(error).__name__}: {error}"
        details = traceback.format_exc().splitlines()
    seconds = time.monotonic() - started
    if not passed:
        write_evidence(folder, each, seen, details)
    elif not options.keep:
        shutil.rmtree(folder)
    evidence = None if passed else str(folder)
    return Result(each.name, each.guarantee, each.fault, each.rows, ranks, passed, seen, seconds, evidence)


def write_evidence(folder: Path, each: Trial, seen: str, details: Sequence[str]) -> None:
    """Writes the guarantee and what was seen beside the run directories and outputs of a failed trial."""
    lines = [f"guarantee: {each.guarantee}", f"fault: {each.fault}", f"seen: {seen}", "", *details]
    (folder / "evidence.txt").write_text("\n".join(lines) + "\n")
