"""A trial: a guarantee, a fault that tries it, the rows of the fault catalogue that it covers, and how it is played.

`play` injects the fault, checks what is promised, and gives in a few words what was seen; BrokenError means that the
promise was not kept. The trials themselves stand in trials_*.py, by what they damage.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfa_dist.chaos.bench import Bench, BrokenError, References
from sfa_dist.chaos.processes import StuckError
from sfa_dist.chaos.workplace import Workplace

SAME_BITS = "a run that is killed goes on to the same bits"
STOPS_SAVED = "a run that is asked to stop saves and goes on to the same bits"
LOSS_IS_LOUD = "a lost rank ends the others in 30 s, by name"
CHECKPOINTS_HOLD = "a damaged checkpoint is never used, and never costs the run"
NO_CODE = "nothing in data or checkpoints is ever executed"
DISK_IS_LOUD = "a save that fails leaves the older ones"
FINITE = "weights that are not finite are never saved"
DATA_IS_CHECKED = "nothing damaged or exchanged is trained on unnoticed"
EXACTLY_ONCE = "each clip is seen once an epoch, by any ranks and workers"
MOVES = "a checkpoint goes on on other ranks, workers and engines"
ALONE = "a run directory has one job"


@dataclass(frozen=True)
class Trial:
    """See the head of this file. `needs` is the least number of ranks, `most` the largest."""

    name: str
    guarantee: str
    fault: str
    rows: tuple[int, ...]
    play: Callable[[Bench], str]
    needs: int = 1
    most: int = 1_000_000


@dataclass(frozen=True)
class Result:
    """What came of a trial on so many ranks."""

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
        """Plain values."""
        return asdict(self)


TRIALS: list[Trial] = []


def trial(
    guarantee: str, fault: str, rows: Sequence[int], needs: int = 1, most: int = 1_000_000
) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Registers a function as a trial, under its name with dashes."""

    def register(play: Callable[[Bench], str]) -> Callable[[Bench], str]:
        name = play.__name__.replace("_", "-")
        TRIALS.append(Trial(name, guarantee, fault, tuple(rows), play, needs, most))
        return play

    return register


def play_all(
    trials: Sequence[Trial], place: Workplace, ranks: Sequence[int], seed: int, rounds: int, thorough: bool, keep: bool
) -> Iterator[Result]:
    """Plays each trial on each number of ranks that it can have. The folders of those that pass are removed."""
    references = References(place)
    for world_size in ranks:
        for each in trials:
            if each.needs <= world_size <= each.most:
                yield _play(each, place, references, world_size, seed, rounds, thorough, keep)


def _play(
    each: Trial,
    place: Workplace,
    references: References,
    ranks: int,
    seed: int,
    rounds: int,
    thorough: bool,
    keep: bool,
) -> Result:
    folder = place.folder / "trials" / f"{each.name}-on-{ranks}"
    chance = random.Random(f"{seed} {each.name} {ranks}")  # Its own, so that --only plays the same faults.
    started = time.monotonic()
    try:
        with Bench(place, references, folder, ranks, chance, rounds, thorough).closing() as bench:
            passed, seen, details = True, each.play(bench), []
    except BrokenError as broken:
        passed, seen, details = False, str(broken), broken.details
    except StuckError as stuck:
        passed, seen, details = False, str(stuck), []
    except (OSError, ValueError, LookupError) as error:
        passed, seen, details = False, f"the trial itself failed: {type(error).__name__}: {error}", []
    seconds = time.monotonic() - started
    if passed and not keep:
        shutil.rmtree(folder)
    elif not passed:
        write_evidence(folder, each, seen, details)
    return Result(
        each.name, each.guarantee, each.fault, each.rows, ranks, passed, seen, seconds, None if passed else str(folder)
    )


def write_evidence(folder: Path, each: Trial, seen: str, details: Sequence[str]) -> None:
    """What was promised and what was seen, beside the run directories and outputs of a trial that failed."""
    lines = [f"guarantee: {each.guarantee}", f"fault: {each.fault}", f"seen: {seen}", "", *details]
    (folder / "evidence.txt").write_text("\n".join(lines) + "\n")
