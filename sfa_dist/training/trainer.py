"""The training loop of one stage; it knows the Engine protocol, and no library behind it.

    batch -> (frozen trunk) -> engine -> loss -> backward -> step -> log, checkpoint, evaluation

Stage 1 and the image stage have no frozen trunk: the engine holds the whole model. Step s of a stage is the same set of
clips for any number of ranks, and all random numbers are drawn from (seed, stage, step), so a resumed run computes
exactly what an uninterrupted one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from sfa_dist.checkpoint import Outcome, Saver
from sfa_dist.checkpoint.probe import Probe, platform_of
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import Streams
from sfa_dist.errors import PreemptedError
from sfa_dist.models.chunked import ChunkedFeatures
from sfa_dist.models.footprint import overlaps
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.loss import mixed_loss_sum, weighted_loss_sum
from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import ANOTHER_RANK, StopFlag
from sfa_dist.parallel.watch.guard import Watch
from sfa_dist.recipe.schema import StageBlock
from sfa_dist.run.tracking import Tracker, eval_line
from sfa_dist.training.bad_clips import note_bad_clips, note_bad_test_clips
from sfa_dist.training.evaluation import Scoring, evaluate
from sfa_dist.training.model_inputs import model_inputs, to_device
from sfa_dist.training.non_finite import note_refused_save, note_skipped_step
from sfa_dist.training.progress import Progress
from sfa_dist.training.schedule import planned_steps, scheduled_rate
from sfa_dist.training.seeds import mix_seed
from sfa_dist.training.step import StepResult, StepTotals
from sfa_dist.training.train_log import LogWindow, TrainLog
from sfa_dist.training.trunk_ahead import TrunkAhead


@dataclass
class Trainer:
    """The training of one stage: `fit()` runs to the end of the schedule or to a stop request."""

    name: str
    stage: StageBlock
    seed: int
    engine: Engine
    frozen: FrozenTrunk | None
    streams: Streams
    runtime: Runtime
    tracker: Tracker
    stop: StopFlag
    saver: Saver
    state_extra: dict[str, Any]
    log_every: int
    progress: Progress = field(default_factory=Progress)
    watch: Watch = field(default_factory=Watch)
    saved_step: int = 0  # Of the newest committed checkpoint; 0: none.
    refused_saves: int = 0  # In a row.
    log: TrainLog = field(init=False)

    def __post_init__(self) -> None:
        per_epoch = self.streams.steps_per_epoch
        self.log = TrainLog(
            self.name, self.stage, per_epoch, self.progress, self.runtime, self.tracker, encoding=self.streams.encoding
        )

    @cached_property
    def probe(self) -> Probe:
        """Computes the loss that each checkpoint records; made on first use, as a run that saves nothing needs none."""
        return Probe.make(self.stage, self.seed, self.frozen, self.runtime.device)

    @cached_property
    def ahead(self) -> TrunkAhead | None:
        """Runs the trunk ahead of the tail; None where the stage does not ask for it. Raises RecipeError."""
        on_card = self.runtime.device.type == "cuda"
        if self.frozen is None or not overlaps(self.stage, on_card):
            return None
        return TrunkAhead(self._features, self.runtime.device)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the stage."""
        return planned_steps(self.stage.schedule, self.streams.steps_per_epoch)

    def fit(self) -> None:
        """Trains from `progress` to the last step, whose checkpoint is committed when this returns.

        Raises PreemptedError, with the state saved, on a stop request; DivergedError where the numbers stay non-finite;
        DataError over the budget of bad clips; CheckpointError where a checkpoint cannot be written.
        """
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """As `fit`, but yields after each optimizer step, so that the members of a sweep can take turns."""
        try:
            while True:
                epoch, first = self._position()
                at_epoch_end = first == 0 or self.progress.step >= self.total_steps
                if at_epoch_end and self.progress.evaluated_step < self.progress.step:
                    self._end_epoch()
                if self.progress.step >= self.total_steps:
                    break
                yield from self._run_epoch(epoch, first)
            self.settle_save()
        except BaseException:
            self.saver.abandon()
            raise

    def _position(self) -> tuple[int, int]:
        """(epoch, steps done in it): with the seed, the whole state of the data stream."""
        return divmod(self.progress.step, self.streams.steps_per_epoch)

    def _run_epoch(self, epoch: int, first: int) -> Iterator[None]:
        epoch_start = epoch * self.streams.steps_per_epoch
        last = min(self.streams.steps_per_epoch, self.total_steps - epoch_start)
        self.log.window = LogWindow()
        with (
            closing(self.streams.train(epoch, first)) as drawn,
            self.tracker.progress(f"{self.name}, epoch {epoch + 1}", first, last) as advance,
        ):
            micro_batches = drawn if self.ahead is None else self.ahead.over(drawn)
            for _ in range(first, last):
                started = time.perf_counter()
                self._enter("data")
                batches = list(islice(micro_batches, self.streams.accumulation))
                data_time = time.perf_counter() - started
                if self.ahead is not None:
                    data_time = self.ahead.idle_seconds(data_time)
                result = self.train_step(batches, epoch)
                if result is None:
                    self._stop()
                self.runtime.synchronize()
                seconds = time.perf_counter() - started
                self.log.window.add(seconds, data_time, result.clips)
                self.progress.seconds += seconds
                self.progress.data_seconds += data_time
                if self.progress.step % self.log_every == 0 or self.progress.step == self.total_steps:
                    self.log.write(result)
                every = self.stage.checkpoint.every_steps
                if every and self.progress.step % every == 0 and self.progress.step != epoch_start + last:
                    self.save()  # Not at the end of the epoch, which saves after its evaluation.
                advance()
                yield

    def _stop(self) -> NoReturn:
        """Saves the state, unless it is saved already, and raises PreemptedError on every rank."""
        self.save_now()
        reason = self.stop.reason or ANOTHER_RANK  # A collective may report another rank's stop before the watch does.
        self.tracker.event("preempted", stage=self.name, step=self.progress.step, reason=reason)
        stopped = f"stage {self.name} stopped at step {self.progress.step} of {self.total_steps}"
        saved = "state is saved"
        if not self.saved_step:
            saved = "nothing to save yet"
        elif self.saved_step != self.progress.step:  # The save was refused: numbers were not finite.
            saved = f"the last checkpoint is of step {self.saved_step}"
        raise self.runtime.for_all(PreemptedError(f"{stopped}; {saved}, run the same command again to go on"))

    def train_step(self, batches: Sequence[Batch], epoch: int) -> StepResult | None:
        """One optimizer step on this rank's micro-batches of a global batch. Collective.

        Returns None, without a step, when a rank was asked to stop. Raises DataError over the budget of bad clips,
        DivergedError after several steps with non-finite gradients.
        """
        totals = StepTotals.over(self.runtime, batches, bool(self.stop), self.saver.status())
        self._note_save(self.saver.advance(*totals.saving))
        if totals.stop:
            return None
        base, schedule = self.stage.optimizer.lr, self.stage.schedule
        lr = scheduled_rate(self.progress.step, base, schedule, self.streams.steps_per_epoch)
        losses, norm = self._update(batches, lr, totals.clips) if totals.clips else (torch.zeros(1), 0.0)
        self.progress.step += 1
        self.progress.samples_seen += int(totals.clips)
        self.progress.bad_samples += totals.bad
        self.progress.looped += totals.looped if epoch == 0 else 0
        if totals.bad:
            bad = [entry for batch in batches for entry in batch.bad]
            budget = self.stage.data.max_bad_fraction
            note_bad_clips(bad, self.name, self.progress, budget, self.runtime, self.tracker)
        self._check_finite(norm, losses, batches)
        return StepResult(epoch, lr, norm, losses, totals.clips)

    def _update(self, batches: Sequence[Batch], lr: float, total: float) -> tuple[Tensor, float]:
        # The engine averages over ranks and micro-batches; the loss is a mean over the clips of the global batch.
        scale = self.runtime.world_size * len(batches) / total
        losses = []
        for index, batch in enumerate(batches):
            number = self.runtime.rank * len(batches) + index  # In the global batch: the same clips for any ranks.
            torch.manual_seed(mix_seed(self.seed, self.name, self.progress.step, number))
            labels, weights = self._to_device(batch.labels), self._to_device(batch.weights)
            self._enter("forward")
            logits = self.engine.forward(self._features(batch) if self.ahead is None else self.ahead.features(batch))
            self._enter("backward")
            loss = self._loss(logits, labels, weights, batch)
            self.engine.backward(loss * scale, last=index == len(batches) - 1)
            losses.append(loss.detach())
        self._enter("step")
        return torch.stack(losses), self.engine.step(lr)

    def _check_finite(self, norm: float, losses: Tensor, batches: Sequence[Batch]) -> None:
        if math.isfinite(norm):
            self.progress.non_finite_steps = 0
            return
        names = [[self.streams.clip_name(i) for i in batch.ids.tolist() if i >= 0] for batch in batches]
        clips = list(zip(losses.isfinite().tolist(), names, strict=True))
        note_skipped_step(clips, norm, self.name, self.progress, self.runtime, self.tracker)

    def _enter(self, phase: str) -> None:
        self.watch.phase(f"{self.name} {phase}", self.progress.step)

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        smoothing, sizes = self.stage.optimizer.label_smoothing, self.stage.model.head_sizes
        if batch.mix is None:
            return weighted_loss_sum(logits, labels, weights, smoothing, sizes)
        shares, partners = self._to_device(batch.mix.shares), self._to_device(batch.mix.partners)
        return mixed_loss_sum(logits, labels, partners, shares, weights, smoothing, sizes)

    def _features(self, batch: Batch) -> Tensor | ChunkedFeatures:
        return model_inputs(batch, self.frozen, self.runtime.device)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.runtime.device)

    def _end_epoch(self) -> None:
        if not self.streams.loops_reported:
            self.log.report_looped_clips()
        if self.streams.evaluate is None:
            self.log.end_epoch(None)
        else:
            self._enter("evaluate")
            try:
                result = evaluate(
                    lambda batch: self.engine.evaluate(self._features(batch)),
                    Scoring(self.stage.model.class_heads or {}),
                    self.streams.evaluate(),
                    self.runtime,
                    self.stop,
                    lambda bad, clips: note_bad_test_clips(
                        bad, clips, self.name, self.progress.step, self.stage.data.max_bad_fraction, self.tracker
                    ),
                ).result()
            except PreemptedError:
                self._stop()  # A resumed run repeats the evaluation.
            self.progress.last_eval = result
            self.tracker.record("eval", stage=self.name, step=self.progress.step, views=1, **result)
            epoch = f"{math.ceil(self.progress.step / self.streams.steps_per_epoch)}/{self.stage.schedule.epochs}"
            self.log.end_epoch(eval_line(f"{self.name} [{epoch}]", result))
            self.log.warn_if_guessing(result)
        self.log.report_loader_wait()
        self.progress.evaluated_step = self.progress.step
        self.save()

    def save(self) -> None:
        """Saves a checkpoint of the present step, in the background where `checkpoint.asynchronous` is set. Collective.

        Weights that are not finite are not saved, because they would replace good ones. Raises CheckpointError on every
        rank when one cannot write.
        """
        self.settle_save()
        if self.progress.non_finite_steps:
            self.tracker.say(f"{self.name}: gradients are not finite, no checkpoint at step {self.progress.step}")
            return
        self._enter("save")
        loss = self.probe.loss(self.engine)
        if not all(math.isfinite(each) for each in self.runtime.gather(loss)):
            self._note_refused(self.progress.step, f"the loss of the probe is {loss}")
            return
        state = {
            "stage": self.name,
            "progress": vars(self.progress),
            "data": dict(zip(("epoch", "step_in_epoch"), self._position(), strict=True)),
            "probe": {"loss": loss, "place": platform_of(self.stage, self.runtime)},
            **self.state_extra,
        }
        self.saver.begin(self.progress.step, self.engine, state)
        if not self.stage.checkpoint.asynchronous:
            self.settle_save()

    def save_now(self) -> None:
        """Saves a checkpoint of the present step, unless there is one, and waits until it is committed."""
        self.settle_save()
        if self.progress.step not in (0, self.saved_step):
            self.save()
            self.settle_save()

    def settle_save(self) -> None:
        """Waits for a save that is in progress."""
        self._enter("save")
        self._note_save(self.saver.finish())

    def _note_save(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.refused:
            self._note_refused(outcome.step, outcome.refused)
            return
        self.refused_saves, self.saved_step = 0, outcome.step
        self.tracker.event(
            "checkpoint",
            stage=self.name,
            step=outcome.step,
            path=str(outcome.path),
            seconds=outcome.seconds,
            blocked_seconds=outcome.blocked_seconds,
        )

    def _note_refused(self, step: int, reason: str) -> None:
        self.refused_saves += 1
        is_last = step >= self.total_steps
        note_refused_save(step, reason, self.refused_saves, is_last, self.name, self.runtime, self.tracker)
