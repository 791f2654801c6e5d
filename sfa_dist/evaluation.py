"""Scores of one model or several over all ranks' batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from torch import Tensor

from sfa_dist.data.feed import BatchFeed
from sfa_dist.data.loader import Batch
from sfa_dist.errors import DataError, PreemptedError, SfaError
from sfa_dist.metrics import ClassificationSums
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.tracking import Tracker


def evaluate(
    predict: Callable[[Batch], Tensor],
    batches: BatchFeed,
    runtime: Runtime,
    stop: StopFlag,
    note_bad: Callable[[list[tuple[str, str]], int], None],
) -> dict[str, Any]:
    """Top-1, top-5 and loss over all ranks' batches; `predict` gives logits (clips * views, classes).

    Logits are averaged over the views of a clip (scenic, vivit/train_utils.py `test_step`).
    `note_bad` is told, on every rank, all clips that do not count, (name, reason), and how many do. Raises
    PreemptedError on every rank, before the next batch, when one was asked to stop.
    """
    return evaluate_all(lambda batch: [predict(batch)], 1, batches, runtime, stop, note_bad)[0]


def evaluate_all(
    predict: Callable[[Batch], Iterable[Tensor]],
    models: int,
    batches: BatchFeed,
    runtime: Runtime,
    stop: StopFlag,
    note_bad: Callable[[list[tuple[str, str]], int], None],
) -> list[dict[str, Any]]:
    """`evaluate` of several models in one pass: `predict` gives the logits of each."""
    sums = [ClassificationSums() for _ in range(models)]
    bad: list[tuple[str, str]] = []
    with closing(batches):
        while True:
            batch = next(batches, None)
            [stopping] = runtime.sum(bool(stop))
            if stopping:
                text = "stopped in an evaluation; what was done before is saved, run the same command again to go on"
                raise runtime.for_all(PreemptedError(text))
            if batch is None:  # On all ranks: each has as many batches.
                break
            bad += batch["bad"]
            for own, logits in zip(sums, predict(batch), strict=True):
                logits = logits.view(-1, batch["views"], logits.shape[-1]).mean(dim=1)
                own.update(logits, batch["labels"].to(logits.device), batch["weights"].to(logits.device))
    results = [ClassificationSums(runtime.sum(*own.sums)).result() for own in sums]
    everywhere = [entry for entries in runtime.gather(bad) for entry in entries]
    if everywhere:
        try:
            note_bad(everywhere, int(results[0]["samples"]))
        except SfaError as error:
            raise runtime.for_all(error) from None
    return results


def note_bad_test_clips(
    bad: list[tuple[str, str]], clips: int, stage: str, step: int, max_bad_fraction: float, tracker: Tracker
) -> None:
    """Names the clips that an evaluation could not read. Raises DataError over the budget: a score over half of the
    clips is not the score of the set."""
    for key, reason in bad:
        tracker.event("bad_sample", stage=stage, step=step, key=key, reason=reason)
        tracker.say(f"bad clip {key}: {reason} (not scored)")
    if len(bad) > max_bad_fraction * max(clips + len(bad), 100):
        over = f"{len(bad)} of {clips + len(bad)} clips are bad, over data.max_bad_fraction {max_bad_fraction}"
        raise DataError(f"evaluation in stage {stage}, step {step}: {over}; log.jsonl names each (bad_sample)")
