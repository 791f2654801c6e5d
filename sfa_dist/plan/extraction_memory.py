"""The memory that filling a feature cache takes: the frozen trunk alone, one slice of a video after the other."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_slices import block_steps, slice_steps
from sfa_dist.models.footprint import offloads, trunk_dtype
from sfa_dist.models.vivit import dims_of
from sfa_dist.plan.decode_memory import frame_size_of, plan_decode
from sfa_dist.plan.memory import MemoryPlan
from sfa_dist.plan.memory_trace import CATEGORIES, HOST, MemoryTrace, materialise
from sfa_dist.plan.modules import link_to_host, shapes_of
from sfa_dist.recipe.schema import StageBlock


def predict_extraction(stage: StageBlock, video_frames: int | None) -> MemoryPlan:
    """The memory plan of filling the cache of `stage` from videos of `video_frames` frames (None: those of one clip).

    Raises RecipeError for a model that cannot be built.
    """
    assert stage.cache_block is not None
    shapes, trace = shapes_of(stage), MemoryTrace()
    frozen = shapes.frozen
    assert frozen is not None
    host, tubelet, side = offloads(stage), stage.model.tubelet, stage.model.image_size
    frames = video_frames or stage.frames * stage.data.stride
    stored = StepGrid(tubelet, stage.data.stride, stage.cache_block.phases).num_steps(frames)
    piece = slice_steps(max(1, frozen.chunk_frames // tubelet), tubelet)
    frozen.skip_repetitions(trace)
    with FakeTensorMode(allow_fallback_kernels=False), trace:
        with trace.category("frozen"):
            materialise(frozen)
        if host:
            link_to_host(frozen, trace)
        # A video's features so far, and their concatenation.
        kept = torch.empty(2 * stored, dims_of(stage.model).width, dtype=trunk_dtype(stage))
        with trace.category(HOST if host else "activations"):
            clips = torch.empty(1, 3, piece * tubelet, side, side, dtype=torch.uint8)
        frozen(clips)
        del kept
    size = frame_size_of(stage)
    block = tubelet * block_steps(size.height, size.width, tubelet, piece)
    decode = plan_decode(stage, min(frames, block))
    on_top = decode.bytes if decode else 0
    return MemoryPlan(
        peak_bytes=trace.peak + on_top,
        by_category={name: trace.at_peak.get(name, 0) for name in CATEGORIES} | {"decoder": on_top},
        host_bytes=trace.host_peak,
        resting={},
        decode=decode,
        trainable_parameters=0,
        frozen_parameters=shapes.frozen_parameters,
        optimizer_bytes_per_rank=0,
    )
