"""A stage's modules as its recipe describes them, without weights and without a device.

Training and the planner, which needs the shapes alone, both build their modules here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from sfa_dist.errors import RecipeError
from sfa_dist.models.footprint import offloads, takes_tokens, trunk_dtype, trunk_eight_bits
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Tail, Trunk, ViViT
from sfa_dist.recipe.schema import Stage2, StageBlock

# Elements (tubelets x tokens x width) of the largest chunk that `chunk_frames: auto` takes. On GPUs these are 128
# frames of ViT-B and L at 224 pixels, 64 of H and g: reckoned, not measured. On CPUs caches decide: a chunk of 128
# frames is slower than one of 32 (docs/memory.md).
LARGEST_CHUNK = {"cuda": 2**24, "cpu": 2**21}
LARGEST_CHUNK_FRAMES = 512  # Of a tiny model: the pixels of a chunk are held too, by loaders and in the cache.

Frozen = TypeVar("Frozen", bound=FrozenTrunk)


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules built inside have shapes but no storage. Raises RecipeError for sizes that do not fit together."""
    try:
        with torch.device("meta"):
            yield
    except ValueError as error:
        raise RecipeError(f"the recipe's model cannot be built: {error}") from error


def whole_model(stage: StageBlock) -> ViViT:
    """The ViViT, with its adapter, that a stage trains end to end, without storage. Raises as `without_storage`."""
    with without_storage():
        return ViViT(stage.model, stage.frames, stage.adapter_block, mean=stage.data.mean, std=stage.data.std)


def trunk_of(stage: StageBlock) -> Trunk:
    """A stage's trunk, without storage. Raises as `without_storage`."""
    with without_storage():
        return Trunk(stage.model)


def tail_of(stage: Stage2) -> Tail:
    """What stage 2 trains, without storage. Raises as `without_storage`."""
    with without_storage():
        return Tail(stage.model, stage.frames, stage.adapter)


def freeze(trunk: Trunk, stage: Stage2, pooled: bool) -> FrozenTrunk:
    """The trunk as stage 2 runs it: in its precision, and in chunks.

    With `chunk_frames: auto` a chunk is one tubelet step until the free memory of the device is known.
    """
    return freeze_as(FrozenTrunk, trunk, stage, pooled)


def freeze_as(runtime: type[Frozen], trunk: Trunk, stage: Stage2, pooled: bool) -> Frozen:
    """`freeze` for a subclass of FrozenTrunk."""
    frames = stage.model.tubelet if stage.chunk_frames == "auto" else stage.chunk_frames
    data, eight_bits = stage.data, trunk_eight_bits(stage)
    return runtime(trunk, frames, pooled, data.mean, data.std, trunk_dtype(stage), eight_bits=eight_bits)


def largest_chunk(trunk: Trunk, device: str) -> int:
    """Frames of the largest chunk that `chunk_frames: auto` takes on a kind of device: a power of two of tubelets."""
    tubelets = LARGEST_CHUNK[device] // (trunk.tokens * trunk.width)
    tubelets = max(1, min(tubelets, LARGEST_CHUNK_FRAMES // trunk.tubelet))
    return trunk.tubelet << (tubelets.bit_length() - 1)


def set_recompute(module: nn.Module, stage: StageBlock) -> str | None:
    """Sets how an adapter's backward recomputes over offloaded tokens, and describes it.

    Returns None, and sets nothing, where no tokens are offloaded.
    """
    if not (takes_tokens(stage) and offloads(stage)):
        return None
    if not isinstance(module, Tail) or module.adapter is None:
        return None
    gathered = stage.engine.gathers_parameters
    module.adapter.recompute = "checkpoint" if gathered else "function"
    return "by checkpoint, for the engine's hooks" if gathered else "with fp32 sums"
