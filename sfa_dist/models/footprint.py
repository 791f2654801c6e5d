"""Bytes of device memory: what a stage holds there without offload, and what a piece of work takes at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfa_dist.errors import RecipeError
from sfa_dist.models.eight_bits import EightBits
from sfa_dist.models.vivit import dims_of
from sfa_dist.recipe.schema import Stage2, StageBlock

OFFLOAD_FROM_BYTES = 256 * 2**20
# What an adapter on tokens saves for backward, as a multiple of the features: its input, and its inner layer before and
# after GELU (measured: 3.24 with an inner layer of half the model's width).
TOKENS_KEPT = 3.24


def trunk_dtype(stage: StageBlock) -> torch.dtype:
    """The dtype of the trunk's activations and features, and of its weights that are not in eight bits."""
    whole = stage.engine.precision == "fp32" and (not isinstance(stage, Stage2) or stage.trunk_precision == "auto")
    return torch.float32 if whole else torch.bfloat16


def trunk_eight_bits(stage: StageBlock) -> EightBits | None:
    """What the weights of a frozen trunk's linear layers are rounded to; None where they stay in `trunk_dtype`."""
    if isinstance(stage, Stage2) and stage.trunk_precision in ("int8", "fp8"):
        return stage.trunk_precision
    return None


def takes_tokens(stage: StageBlock) -> bool:
    """Whether the stage has an adapter that takes every token of the trunk."""
    return stage.adapter_block is not None and stage.adapter_block.placement == "tokens"


def feature_bytes(stage: StageBlock) -> int:
    """Bytes of the trunk's output for one micro-batch."""
    side = stage.model.image_size // dims_of(stage.model).patch
    tokens = side * side + (stage.model.pooling == "cls") if takes_tokens(stage) else 1
    tubelets = stage.batch.micro * stage.frames // stage.model.tubelet
    return tubelets * tokens * dims_of(stage.model).width * trunk_dtype(stage).itemsize


def clip_bytes(stage: StageBlock) -> int:
    """Bytes of the uint8 clips of one micro-batch."""
    return stage.batch.micro * 3 * stage.frames * stage.model.image_size**2


def offloads(stage: StageBlock) -> bool:
    """Whether clips and the frozen trunk's output stay in the host's memory.

    `auto` depends on the recipe alone, so that a run that is resumed elsewhere does the same: on for tokens that would
    take more than OFFLOAD_FROM_BYTES with their clips.
    """
    if not isinstance(stage, Stage2) or not stage.freeze_trunk:
        return False
    if stage.offload != "auto":
        return stage.offload == "on"
    return takes_tokens(stage) and clip_bytes(stage) + (1 + TOKENS_KEPT) * feature_bytes(stage) > OFFLOAD_FROM_BYTES


def overlaps(stage: StageBlock, on_card: bool) -> bool:
    """Whether the frozen trunk of the next micro-batch runs beside this one's tail. `auto` does so on a card only.

    Offloaded tokens rule it out: the tail's chunks and the trunk's share one queue of copies. Raises RecipeError for
    `on` with offloaded tokens.
    """
    if not isinstance(stage, Stage2) or not stage.freeze_trunk:
        return False
    queued = takes_tokens(stage) and offloads(stage)
    if stage.overlap == "on" and queued:
        raise RecipeError(
            "stage2.overlap is on, but offloaded tokens share one queue of copies with the next trunk's chunks, and "
            "the tail would wait for those: set stage2.overlap or stage2.offload to off"
        )
    return stage.overlap == "on" or (stage.overlap == "auto" and on_card and not queued)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` takes on `device` at its peak, beyond what is in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with StoragePeak() as storages:
        work()
    return storages.peak


class StoragePeak(TorchDispatchMode):
    """Counts the bytes of all storages that operations create while it is active, until they are freed.

    `now` is the sum of those alive, `peak` the largest sum so far. Views and in-place operations create none.
    `device_type` restricts the count to one kind of device.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_key(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and self._device_type in (None, leaf.device.type):
                key = _key(leaf)
                if key not in inputs and key not in self._seen:
                    self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
