"""Evaluation: the scores of one model, or of several in one pass, over all ranks' batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import BatchFeed
from sfa_dist.errors import PreemptedError, SfaError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.training.metrics import ClassificationSums, average_views
from sfa_dist.training.prediction_file import PredictionFile


@dataclass(frozen=True)
class Scoring:
    """How the logits of its views become the scores of a clip.

    `heads` are the model's `class_heads` (empty: a single head), `average` is the key of the recipe's test block.
    """

    heads: Mapping[str, int] = field(default_factory=dict)
    average: Literal["logits", "softmax"] = "logits"

    def scores(self, logits: Tensor, views: int) -> Tensor:
        """Logits (clips * views, classes) -> scores fp64 (clips, classes)."""
        return average_views(logits, views, self.average, tuple(self.heads.values()))


def evaluate(
    predict: Callable[[Batch], Tensor],
    scoring: Scoring,
    batches: BatchFeed,
    runtime: Runtime,
    stop: StopFlag,
    note_bad: Callable[[list[tuple[str, str]], int], None],
    keep: PredictionFile | None = None,
) -> ClassificationSums:
    """The sums of a model over all ranks' batches. Collective.

    `predict` returns logits (clips * views, classes); the clips' scores also go into `keep`. Where clips could not be
    read, every rank calls `note_bad` with their (name, reason) pairs and the number of clips that count; an SfaError
    that it raises is raised on every rank. Raises PreemptedError on every rank, before the next batch, when one was
    asked to stop.
    """
    kept = {} if keep is None else {0: keep}
    return evaluate_all(lambda batch: [predict(batch)], 1, scoring, batches, runtime, stop, note_bad, kept)[0]


def evaluate_all(
    predict: Callable[[Batch], Iterable[Tensor]],
    models: int,
    scoring: Scoring,
    batches: BatchFeed,
    runtime: Runtime,
    stop: StopFlag,
    note_bad: Callable[[list[tuple[str, str]], int], None],
    keep: Mapping[int, PredictionFile],
) -> list[ClassificationSums]:
    """As `evaluate`, for several models in one pass; `predict` gives the logits of each, `keep` is by model number."""
    sums = [ClassificationSums(scoring.heads) for _ in range(models)]
    bad: list[tuple[str, str]] = []
    with closing(batches):
        while True:
            batch = next(batches, None)
            [stopping] = runtime.sum(bool(stop))
            if stopping:
                text = "stopped in an evaluation; what was done before is saved, run the same command again to go on"
                raise runtime.for_all(PreemptedError(text))
            if batch is None:  # On all ranks at once: they have equally many batches.
                break
            bad += batch.bad
            for number, logits in enumerate(predict(batch)):
                scores = scoring.scores(logits, batch.views)
                sums[number].update(scores, batch.labels.to(logits.device), batch.weights.to(logits.device))
                if number in keep:
                    keep[number].add(batch, scores)
    totals = [ClassificationSums.added(runtime.gather(own)) for own in sums]
    everywhere = [entry for entries in runtime.gather(bad) for entry in entries]
    if everywhere:
        try:
            note_bad(everywhere, totals[0].main.clips)
        except SfaError as error:
            raise runtime.for_all(error) from None
    return totals
