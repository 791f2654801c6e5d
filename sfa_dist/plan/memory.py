"""Predicts the peak of device memory of a training stage, by tracing one real step on fake tensors.

What runs is the project's own: the stage's modules, its frozen trunk with its chunks, its loss and its optimizer
(`modules.py`), inside a replay of the engine's buffers (`engine_memory.py`), under a mode that counts storages
(`memory_trace.py`). The optimizer's state is there from the start, as in every step but the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfa_dist.metrics import weighted_loss_sum
from sfa_dist.models.footprint import overlaps
from sfa_dist.plan.engine_memory import replay
from sfa_dist.plan.engine_setting import Setting, optimizer_bytes_per_rank
from sfa_dist.plan.memory_trace import CATEGORIES, HOST, MemoryTrace, materialise
from sfa_dist.plan.modules import (
    Shapes,
    keeps_clips_on_host,
    link_to_host,
    quick_chunks,
    shapes_of,
    treat_activations,
)
from sfa_dist.recipe import STAGE_NAMES, Recipe, Stage2, StageBlock


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of tensors on one rank's device at the moment of the largest sum; `by_category` has all CATEGORIES.

    `host_bytes` is the peak of what is kept in the host's memory on purpose (offloaded state, pinned buffers).
    """

    peak_bytes: int
    by_category: dict[str, int]
    host_bytes: int
    trainable_parameters: int
    frozen_parameters: int
    optimizer_bytes_per_rank: int
    world_size: int
    frames: int
    micro: int


def predict(what: Recipe | StageBlock, world_size: int = 1, *, accumulation: int | None = None) -> MemoryPlan:
    """The memory plan of a stage on one of `world_size` ranks; of a recipe, that of its most demanding stage.

    Raises RecipeError for a model that cannot be built.
    """
    if isinstance(what, Recipe):
        plans = [predict(stage, world_size, accumulation=accumulation) for stage in stages_of(what).values()]
        return max(plans, key=lambda plan: plan.peak_bytes)
    accumulation = accumulation or what.batch.accumulation(world_size)
    setting = Setting(what, world_size, accumulation)
    shapes = shapes_of(what)
    trainable, frozen = shapes.trainable_parameters, shapes.frozen_parameters
    trace = trace_step(shapes, setting)
    by_category = {name: trace.at_peak.get(name, 0) for name in CATEGORIES}
    return MemoryPlan(
        peak_bytes=trace.peak,
        by_category=by_category,
        host_bytes=trace.host_peak,
        trainable_parameters=trainable,
        frozen_parameters=frozen,
        optimizer_bytes_per_rank=optimizer_bytes_per_rank(trainable, setting),
        world_size=world_size,
        frames=what.frames,
        micro=what.batch.micro,
    )


def stages_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training stages that there are, by name."""
    return {name: stage for name in STAGE_NAMES if (stage := getattr(recipe, name)) is not None}


def _run_ahead(features: Callable[[], Any], trace: MemoryTrace) -> list[Tensor]:
    """What the next micro-batch's trunk leaves while this one's tail works: its features, and the memory that the trunk
    has worked in, which the allocator keeps for the trunk's own stream."""
    before = trace.total
    with trace.transient() as risen:
        out = features()
    with trace.category("buffers"):
        return [out, torch.empty(risen[0] - (trace.total - before), dtype=torch.uint8)]


def trace_step(shapes: Shapes, setting: Setting) -> MemoryTrace:
    """The last micro-batch and the optimizer step of a stage, traced."""
    stage = setting.stage
    trace = MemoryTrace()
    # A kernel without a fake twin must not run on real memory: that would be the whole model's.
    mode = FakeTensorMode(allow_fallback_kernels=False)
    host = keeps_clips_on_host(stage)
    with mode, trace, quick_chunks(shapes.frozen, trace):
        if shapes.frozen is not None:
            with trace.category("frozen"):
                materialise(shapes.frozen)
            if host:
                link_to_host(shapes.frozen, trace)
        engine = replay(shapes.trainable, setting, trace)
        treat_activations(shapes.trainable, stage.activation, trace)
        micro, side = stage.batch.micro, stage.model.image_size
        labels = torch.empty(micro, dtype=torch.int64)
        weights = torch.empty(micro)

        def features() -> Any:  # A frame of its own, as in the trainer: the clips die with it.
            with trace.category(HOST if host else "activations"):
                clips = torch.empty(micro, 3, stage.frames, side, side, dtype=torch.uint8)
            return clips if shapes.frozen is None else shapes.frozen(clips)

        ahead: list[Tensor] = []

        def inputs() -> Any:
            own = features()
            if isinstance(stage, Stage2) and overlaps(stage, on_card=True):
                ahead.extend(_run_ahead(features, trace))
            return own

        logits = engine.forward(inputs())
        loss = weighted_loss_sum(logits, labels, weights, stage.optimizer.label_smoothing)
        engine.backward(loss * 1.0)
        engine.step()
    return trace
