"""Predicts the peak of device memory of a training stage, by tracing one real step on fake tensors.

The code that runs is that of training: the stage's modules, its frozen trunk in chunks, its loss and its optimizer
(`modules.py`), inside a replay of the engine's buffers (`engine_memory.py`), under a mode that counts storages
(`memory_trace.py`). The optimizer's state exists from the start, as in every step but the first. Decoding on the card
comes on top (`decode_memory.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfa_dist.errors import RecipeError
from sfa_dist.models.footprint import offloads, overlaps, trunk_dtype
from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.models.vivit import dims_of
from sfa_dist.parallel.engines.optimizers import moments_of
from sfa_dist.plan.decode_memory import DecodePlan, plan_decode
from sfa_dist.plan.engine_memory import replay
from sfa_dist.plan.engine_setting import Setting, optimizer_bytes_per_rank
from sfa_dist.plan.memory_trace import CATEGORIES, HOST, MemoryTrace, materialise
from sfa_dist.plan.modules import (
    Shapes,
    link_to_host,
    shapes_of,
    treat_activations,
)
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, StageBlock

MOST_FRAMES = 8192  # Tracing so many takes a minute for tokens; a longer clip is a mistake.
RESTING = ("parameters", "optimizer", HOST)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of tensors on one rank's device at the moment of the largest sum; `by_category` has all CATEGORIES.

    `host_bytes` is the peak of what is kept in the host's memory on purpose (offloaded state, pinned buffers).
    `resting` is what stays between two steps, by category: parameters and optimizer, or "host". `decode` explains
    `by_category["decoder"]`.
    """

    peak_bytes: int
    by_category: dict[str, int]
    host_bytes: int
    resting: dict[str, int]
    decode: DecodePlan | None
    trainable_parameters: int
    frozen_parameters: int
    optimizer_bytes_per_rank: int


def predict(what: Recipe | StageBlock, world_size: int = 1, *, accumulation: int | None = None) -> MemoryPlan:
    """The memory plan of a stage on one of `world_size` ranks; of a recipe, that of its most demanding stage.

    Raises RecipeError for a model that cannot be built, and for more than MOST_FRAMES frames.
    """
    if isinstance(what, Recipe):
        plans = [predict(stage, world_size, accumulation=accumulation) for stage in stages_of(what).values()]
        return max(plans, key=lambda plan: plan.peak_bytes)
    if what.frames > MOST_FRAMES:
        raise RecipeError(f"frames {what.frames}: a plan traces clips of at most {MOST_FRAMES} frames")
    accumulation = accumulation or what.batch.accumulation(world_size)
    setting = Setting(what, world_size, accumulation)
    shapes = shapes_of(what)
    trainable, frozen = shapes.trainable_parameters, shapes.frozen_parameters
    (trace, resting), decode = trace_step(shapes, setting), plan_decode(what)
    on_top = decode.bytes if decode else 0
    by_category = {name: trace.at_peak.get(name, 0) for name in CATEGORIES} | {"decoder": on_top}
    return MemoryPlan(
        peak_bytes=trace.peak + on_top,
        by_category=by_category,
        host_bytes=trace.host_peak,
        resting=resting,
        decode=decode,
        trainable_parameters=trainable,
        frozen_parameters=frozen,
        optimizer_bytes_per_rank=optimizer_bytes_per_rank(trainable, setting),
    )


def stages_of(recipe: Recipe) -> dict[str, Any]:
    """The training stages that the recipe has, by name."""
    return {name: stage for name in STAGE_NAMES if (stage := getattr(recipe, name)) is not None}


def _run_ahead(features: Callable[[], Any], trace: MemoryTrace) -> list[Tensor]:
    """What the next micro-batch's trunk holds while this one's tail works.

    That is its features, and the memory that it worked in, which the allocator keeps for the trunk's own stream.
    """
    before = trace.total
    with trace.transient() as risen:
        out = features()
    with trace.category("buffers"):
        return [out, torch.empty(risen[0] - (trace.total - before), dtype=torch.uint8)]


def _stored_features(stage: StageBlock) -> Tensor | None:
    """A micro-batch of cached features on the device; None where there is no cache."""
    if stage.cache_block is None:
        return None
    shape = (stage.batch.micro, stage.frames // stage.model.tubelet, dims_of(stage.model).width)
    return torch.empty(shape, dtype=trunk_dtype(stage))


def trace_step(shapes: Shapes, setting: Setting) -> tuple[MemoryTrace, dict[str, int]]:
    """Traces the last micro-batch and the optimizer step of a stage.

    Returns the trace, and the bytes that stay after the step, by category of RESTING.
    """
    stage = setting.stage
    trace = MemoryTrace()
    # A kernel without a fake version must not fall back to real memory: that would be the whole model's.
    mode = FakeTensorMode(allow_fallback_kernels=False)
    frozen = shapes.frozen if stage.runs_frozen_trunk else None
    host = frozen is not None and offloads(stage)
    with mode, trace:
        if frozen is not None:
            frozen.skip_repetitions(trace)
            with trace.category("frozen"):
                materialise(frozen)
            if host:
                link_to_host(frozen, trace)
        engine = replay(shapes.trainable, setting, trace)
        treat_activations(shapes.trainable, stage.activation, trace)
        micro, side = stage.batch.micro, stage.model.image_size
        labels = torch.empty(micro, dtype=torch.int64)
        weights = torch.empty(micro)

        def features() -> Any:  # A function, as in the trainer: on its return the clips are freed.
            stored = _stored_features(stage)
            if frozen is None and stored is not None:
                return stored
            with trace.category(HOST if host else "activations"):
                clips = torch.empty(micro, 3, stage.frames, side, side, dtype=torch.uint8)
            if frozen is None:
                return clips
            own = frozen(clips)
            return own if stored is None else stored  # With live clips beside cached ones: at most all are live.

        ahead: list[Tensor] = []

        def inputs() -> Any:
            own = features()
            if frozen is not None and overlaps(stage, on_card=True):
                ahead.extend(_run_ahead(features, trace))
            return own

        logits = engine.forward(inputs())
        loss = weighted_loss_sum(logits, labels, weights, stage.optimizer.label_smoothing)
        engine.backward(loss * 1.0)
        engine.step()
    return trace, {name: trace.live.get(name, 0) for name in RESTING}


def predict_together(stages: Sequence[StageBlock], world_size: int = 1) -> MemoryPlan:
    """The memory plan of stages that train together and take turns, as the members of a sweep.

    The state of all of them stays on the device, and one at a time works. Raises as `predict`.
    """
    kinds: dict[str, MemoryPlan] = {}
    plans = [kinds.get(kind) or kinds.setdefault(kind, predict(stage, world_size)) for kind, stage in _kinds(stages)]
    if len(plans) == 1:
        return plans[0]
    most = max(plans, key=lambda plan: plan.peak_bytes - _on_device(plan))
    resting = {name: sum(plan.resting[name] for plan in plans) - most.resting[name] for name in RESTING}
    return replace(
        most,
        peak_bytes=most.peak_bytes + sum(size for name, size in resting.items() if name != HOST),
        by_category={name: size + resting.get(name, 0) for name, size in most.by_category.items()},
        host_bytes=most.host_bytes + resting[HOST],
        trainable_parameters=sum(plan.trainable_parameters for plan in plans),
        optimizer_bytes_per_rank=sum(plan.optimizer_bytes_per_rank for plan in plans),
    )


def _on_device(plan: MemoryPlan) -> int:
    return sum(size for name, size in plan.resting.items() if name != HOST)


def _kinds(stages: Sequence[StageBlock]) -> Iterator[tuple[str, StageBlock]]:
    """Each stage with a key of what a sweep can vary and its memory depends on."""
    for stage in stages:
        adapter, moments = stage.adapter_block, moments_of(stage.optimizer)
        kind = (stage.frames, stage.batch.micro, adapter, stage.model.temporal_depth, stage.model.drop_path, moments)
        yield repr(kind), stage
