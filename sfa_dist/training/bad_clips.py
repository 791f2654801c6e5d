"""Clips that cannot be read: log and console name each, and too many end the run (`data.max_bad_fraction`)."""

from __future__ import annotations

from collections import Counter

from sfa_dist.errors import DataError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.run.tracking import Tracker
from sfa_dist.training.progress import Progress

FEWEST_CLIPS = 100  # The budget is computed for at least this many clips: a share of a handful means nothing.


def note_bad_clips(
    mine: list[tuple[str, str]],
    stage: str,
    progress: Progress,
    max_bad_fraction: float,
    runtime: Runtime,
    tracker: Tracker,
) -> None:
    """Names the bad clips of a step and enters them into the ledger of `progress`, whose counters include them already.

    `mine` has this rank's (name, reason) pairs. Collective. Raises DataError on every rank when the bad clips so far
    exceed the budget.
    """
    for entries in runtime.gather(mine):
        for key, reason in entries:
            progress.ledger[key] = reason
            _report(key, reason, "weight 0", stage, progress.step, tracker)
    over = _over_budget(progress.bad_samples, progress.samples_seen + progress.bad_samples, max_bad_fraction)
    if over:
        shards = Counter(key.split("/", 1)[0] for key in progress.ledger).most_common(3)
        worst = ", ".join(f"{shard} ({count})" for shard, count in shards)
        where = f"stage {stage}, step {progress.step}"
        raise runtime.for_all(DataError(f"{where}: {over}; most in {worst}; log.jsonl names each (bad_sample)"))


def note_bad_test_clips(
    bad: list[tuple[str, str]], clips: int, stage: str, step: int, max_bad_fraction: float, tracker: Tracker
) -> None:
    """Names the clips, (name, reason), that an evaluation could not read; `clips` is how many it did read.

    Raises DataError over the budget: a score on half of the clips is not the score of the split.
    """
    for key, reason in bad:
        _report(key, reason, "not scored", stage, step, tracker)
    over = _over_budget(len(bad), clips + len(bad), max_bad_fraction)
    if over:
        raise DataError(f"evaluation in stage {stage}, step {step}: {over}; log.jsonl names each (bad_sample)")


def _report(key: str, reason: str, consequence: str, stage: str, step: int, tracker: Tracker) -> None:
    tracker.event("bad_sample", stage=stage, step=step, key=key, reason=reason)
    tracker.say(f"bad clip {key}: {reason} ({consequence})")


def _over_budget(bad: int, clips: int, max_bad_fraction: float) -> str | None:
    if bad <= max_bad_fraction * max(clips, FEWEST_CLIPS):
        return None
    return f"{bad} of {clips} clips are bad, over data.max_bad_fraction {max_bad_fraction}"
