"""Short trainings of a recipe's stage on a few of its clips, for a limited time.

Streams, model, loss and engine are those of a run; there are no checkpoints. The learning rate warms up for
WARMUP_STEPS and then stays constant.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import BatchFeed, Streams
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import eval_loader, train_loader
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.decode import Decoder
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, ModelBlock, ScheduleBlock
from sfa_dist.recipe.schema import StageBlock
from sfa_dist.run.context import Run
from sfa_dist.stages.assemble import classes_id
from sfa_dist.stages.open_data import StageData, loader_settings
from sfa_dist.stages.prepare import set_up
from sfa_dist.training.metrics import ClassificationSums
from sfa_dist.training.model_inputs import model_inputs
from sfa_dist.training.non_finite import DivergedError
from sfa_dist.training.trainer import Trainer

WARMUP_STEPS = 10
OVERFITTED = 8  # Clips to learn by heart.
FEWEST_STEPS = 100  # Clips that are not learned by heart after fewer steps do not count as a failure.
NO_AUGMENTATION = AugmentBlock(scale_jitter=None, flip=0.0, color=0.0, gray=0.0)
_LAST = 5  # Steps whose losses are averaged: a single one may be an outlier.
_ENDLESS = 100_000  # Epochs of the schedule: over a few hundred steps its cosine stays at the start.


@dataclass(frozen=True)
class ShortTraining:
    """The result of a short training: its steps and time, the mean loss of the last steps, and its test scores."""

    steps: int
    seconds: float
    loss: float
    diverged: bool
    scores: dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """The short trainings of a stage, with the run and the decoder that they share."""

    run: Run
    name: str
    stage: StageBlock
    decoder: Decoder

    def overfit(self, index: SampleIndex, seconds: float) -> ShortTraining:
        """Trains on one batch, the clips of `index`, until it is learned by heart or `seconds` are over.

        Augmentation, drop path and label smoothing are off.
        """
        micro = min(self.stage.batch.micro, len(index))
        stage = self.stage.model_copy(
            update={
                "augment": NO_AUGMENTATION,
                "batch": BatchBlock(size=len(index), micro=micro, eval_micro=micro),
                "model": self.stage.model.model_copy(update={"drop_path": 0.0}),
                "optimizer": self.stage.optimizer.model_copy(update={"label_smoothing": 0.0}),
            }
        )
        batches = list(self._epoch(index, stage, 0))
        enough = guessing_loss(stage.model) / 100
        return self._train(stage, len(index), lambda epoch: batches, batches, seconds, enough)

    def learn(self, index: SampleIndex, test: Iterable[Batch], seconds: float, order: str = "time") -> ShortTraining:
        """Trains on `index` as the recipe does, with the frames of each clip in `order`, and scores `test`."""
        data = self.stage.data.model_copy(update={"frame_order": order})
        stage = self.stage.model_copy(update={"data": data})
        return self._train(stage, len(index), lambda epoch: self._epoch(index, stage, epoch), test, seconds)

    def test_batches(self, index: SampleIndex, order: str = "time") -> Iterable[Batch]:
        """The clips of `index` as an evaluation reads them, one view each."""
        return eval_loader(index, self._settings(self.stage, {"frame_order": order}))

    def _epoch(self, index: SampleIndex, stage: StageBlock, epoch: int) -> Iterable[Batch]:
        return train_loader(index, self._settings(stage, {}), epoch=epoch)

    def _settings(self, stage: StageBlock, changes: dict[str, Any]) -> LoaderSettings:
        data = stage.data.model_copy(update={"workers": 0, **changes})
        settings = loader_settings(self.run, stage)
        return replace(settings, data=data, decoder=self.decoder, pin_memory=False)

    def _train(
        self,
        stage: StageBlock,
        clips: int,
        epoch_of: Callable[[int], Iterable[Batch]],
        test: Iterable[Batch],
        seconds: float,
        enough: float = 0.0,
    ) -> ShortTraining:
        """Trains until `seconds` are over or the last losses are below `enough`; then scores `test`."""
        end = time.monotonic() + seconds
        per_epoch = -(-clips // stage.batch.size)
        warmup = ScheduleBlock(epochs=_ENDLESS, warmup_epochs=WARMUP_STEPS / per_epoch)
        stage = stage.model_copy(update={"schedule": warmup})

        def feed(epoch: int, first: int) -> BatchFeed:
            yield from islice(epoch_of(epoch), first * stage.batch.accumulation(1), None)

        streams = Streams(per_epoch, stage.batch.accumulation(1), feed, None)
        data = StageData(streams, None, classes_id(None, stage.model), (clips, 0), "")
        trainer = set_up(self.run, self.name, stage, data, {}, self.run.directory, None).trainer
        started = time.monotonic()
        losses, diverged = _steps(trainer, end, enough)
        took = time.monotonic() - started
        last = losses[-_LAST:]
        return ShortTraining(len(losses), took, sum(last) / max(len(last), 1), diverged, _score(trainer, test))


def guessing_loss(model: ModelBlock) -> float:
    """The cross-entropy of uniform guessing, in nats: the mean over the heads of log(classes)."""
    sizes = model.head_sizes or (model.classes,)
    return math.fsum(map(math.log, sizes)) / len(sizes)


def _steps(trainer: Trainer, end: float, enough: float) -> tuple[list[float], bool]:
    """(the loss of each step, whether one was not finite)."""
    losses: list[float] = []
    for epoch in count():
        with closing(trainer.streams.train(epoch, 0)) as batches:
            for _ in range(trainer.streams.steps_per_epoch):
                try:
                    result = trainer.train_step(list(islice(batches, trainer.streams.accumulation)), epoch)
                except DivergedError:
                    return losses, True
                if result is None:
                    return losses, False
                losses.append(float(result.losses.sum()) / max(result.clips, 1.0))
                recent = losses[-_LAST:]
                if time.monotonic() >= end or (len(recent) == _LAST and max(recent) < enough):
                    return losses, trainer.progress.non_finite_steps > 0
    raise AssertionError("there is no last epoch")


def _score(trainer: Trainer, test: Iterable[Batch]) -> dict[str, Any]:
    sums = ClassificationSums(trainer.stage.model.class_heads or {})
    for batch in test:
        logits = trainer.engine.evaluate(model_inputs(batch, None, trainer.runtime.device))
        sums.update(logits.double().cpu(), batch.labels, batch.weights)
    return sums.result()
