"""Numbers that are not finite: the step is skipped, the checkpoint refused, and several in a row end the run.

Scores of an evaluation that are not finite are an error at once.
"""

from __future__ import annotations

from sfa_dist.errors import LostRankError, SfaError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.run.tracking import Tracker
from sfa_dist.training.progress import Progress

LIMIT = 5  # In a row.
CLIPS_SHOWN = 4
ADVICE = "lower optimizer.lr or use engine.precision: fp32, and resume from the last checkpoint"


class DivergedError(LostRankError):
    """Training has diverged: its numbers are no longer finite. In a sweep the other members go on."""


def broken_scores(where: str) -> SfaError:
    """The error for a model whose scores are not finite: with NaN, class 0 would win."""
    why = "its weights are broken, or its precision overflows (engine.precision: fp32)"
    return SfaError(f"{where}: the model's scores are not finite: {why}")


def note_skipped_step(
    mine: list[tuple[bool, list[str]]],
    norm: float,
    stage: str,
    progress: Progress,
    runtime: Runtime,
    tracker: Tracker,
) -> None:
    """Counts a step that all ranks skipped because its gradients' `norm` was not finite, and names its clips.

    `mine` has, for each micro-batch of this rank, whether its loss is finite and its clips' names. Named are the clips
    of micro-batches whose loss is not finite, or all where each is. Collective. Raises DivergedError on every rank
    after `LIMIT` such steps in a row.
    """
    progress.non_finite_steps += 1
    progress.skipped_steps += 1
    everywhere = [entry for entries in runtime.gather(mine) for entry in entries]
    culprits = [name for finite, names in everywhere for name in names if not finite]
    clips = culprits or [name for _, names in everywhere for name in names]
    tracker.event("non_finite", stage=stage, step=progress.step, grad_norm=norm, clips=clips)
    if progress.non_finite_steps >= LIMIT:
        where = f"stage {stage}, step {progress.step}"
        what = f"gradients were not finite {LIMIT} steps in a row"
        shown = f"the last step's clips: {', '.join(clips[:CLIPS_SHOWN])}{' ...' * (len(clips) > CLIPS_SHOWN)}"
        raise runtime.for_all(
            DivergedError(f"{where}: {what} ({shown}; log.jsonl names those of each step: non_finite); {ADVICE}")
        )


def note_refused_save(
    step: int, reason: str, in_a_row: int, is_last: bool, stage: str, runtime: Runtime, tracker: Tracker
) -> None:
    """Reports a checkpoint that was refused, the newest of `in_a_row`.

    Raises DivergedError on every rank after `LIMIT` in a row, or where it `is_last`: the checkpoint of the stage's end.
    """
    tracker.event("checkpoint_refused", stage=stage, step=step, reason=reason)
    tracker.say(f"{stage}: no checkpoint of step {step}: {reason}; the one before stays")
    if in_a_row >= LIMIT or is_last:
        refused = f"so there is no checkpoint of it ({in_a_row} refused in a row)"
        raise runtime.for_all(DivergedError(f"stage {stage}, step {step}: {reason}, {refused}; {ADVICE}"))
