"""Measures real optimizer steps of a stage, with random weights and grey clips: their time and their memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.errors import UsageError
from sfa_dist.models.chunked import ChunkedFeatures
from sfa_dist.models.footprint import overlaps, trunk_dtype
from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.models.vivit import dims_of
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.plan.feature_cache_plan import mean_live_share
from sfa_dist.plan.memory import predict, stages_of
from sfa_dist.recipe.schema import Recipe, Stage2, StageBlock
from sfa_dist.stages.assemble import assemble_end_to_end, assemble_stage2
from sfa_dist.stages.trunk_setup import place_trunk, prepare_trainable
from sfa_dist.training.model_inputs import model_inputs
from sfa_dist.training.trunk_ahead import TrunkAhead

PROBE_STEPS = 20
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class StepProbe:
    """Seconds of a micro-batch with its share of the step, and the allocator's peak in bytes, measured and planned."""

    micro_seconds: float
    peak_bytes: int
    planned_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dict(vars(self))


def probe_recipe(recipe: Recipe, only: str | None) -> dict[str, StepProbe]:
    """Probes each stage that is trained, on this machine's GPU as one rank. Raises UsageError without a GPU."""
    if not torch.cuda.is_available():
        raise UsageError("--probe measures steps on a GPU, but there is none here: without it a table of cards is used")
    runtime = parallel_runtime.start(environment())
    try:
        return {
            name: probe_stage(stage.on_ranks(1), runtime)
            for name, stage in stages_of(recipe).items()
            if only in (None, name) and not stage.given_weights
        }
    finally:
        parallel_runtime.stop()


def probe_stage(stage: StageBlock, runtime: Runtime) -> StepProbe:
    """Measures PROBE_STEPS steps on a GPU, of two micro-batches, or of one if the recipe's batch has no more."""
    device = runtime.device
    size = min(2 * stage.batch.micro, stage.batch.size)
    stage = stage.model_copy(update={"batch": stage.batch.model_copy(update={"size": size})})
    started = 0.0

    def note(step: int) -> None:
        nonlocal started
        if step == WARM_UP_STEPS:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()

    run_steps(stage, runtime, WARM_UP_STEPS + PROBE_STEPS, note)
    torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / PROBE_STEPS
    planned = predict(stage, world_size=1).peak_bytes
    return StepProbe(seconds / stage.batch.accumulation(1), torch.cuda.max_memory_allocated(device), planned)


def run_steps(stage: StageBlock, runtime: Runtime, steps: int, before: Callable[[int], None]) -> None:
    """Runs optimizer steps of a stage on one rank, as the trainer does; calls `before(step)` before each."""
    device = runtime.device
    if isinstance(stage, Stage2) and stage.freeze_trunk:
        parts = assemble_stage2(stage, None, "", "random" if stage.reads_features else None)
    else:
        parts = assemble_end_to_end(stage, None)
    accumulation = stage.batch.accumulation(1)
    prepare_trainable(parts.trainable, stage)
    engine = make_engine(parts.trainable, stage, accumulation, device)
    if parts.frozen is not None:
        place_trunk(parts.frozen, stage, runtime)
    micro = stage.batch.micro

    def features(batch: Batch) -> Tensor | ChunkedFeatures:
        return model_inputs(batch, parts.frozen, device)

    drawn = range(steps * accumulation)
    batches: Iterator[Batch] = (_batch(stage) for _ in drawn)
    take: Callable[[Batch], Tensor | ChunkedFeatures] = features
    if parts.frozen is not None and overlaps(stage, on_card=device.type == "cuda"):
        ahead = TrunkAhead(features, device)
        batches, take = ahead.over(batches), ahead.features
    for step in range(steps):
        before(step)
        for index in range(accumulation):
            labels, weights = torch.zeros(micro, dtype=torch.int64, device=device), torch.ones(micro, device=device)
            logits = engine.forward(take(next(batches)))  # No name holds the batch: its clips die before the tail runs.
            loss = weighted_loss_sum(logits, labels, weights, stage.optimizer.label_smoothing)
            engine.backward(loss / micro, last=index == accumulation - 1)
        engine.step(0.0)


def _batch(stage: StageBlock) -> Batch:
    """Grey clips; with a feature cache, features of zeros and the schedule's average share of live clips."""
    micro, side = stage.batch.micro, stage.model.image_size
    batch = Batch(torch.zeros(micro, dtype=torch.int64), torch.ones(micro), torch.arange(micro))
    live = micro
    if stage.cache_block is not None:
        shape = (micro, stage.frames // stage.model.tubelet, dims_of(stage.model).width)
        batch.features = torch.zeros(shape, dtype=trunk_dtype(stage))
        live = math.ceil(micro * mean_live_share(stage))
        batch.live = torch.arange(live)
    if live:
        batch.clips = torch.full((live, 3, stage.frames, side, side), 128, dtype=torch.uint8)
    return batch
