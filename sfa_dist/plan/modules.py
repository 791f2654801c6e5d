"""The modules that a stage trains and freezes, as shapes on the meta device: what the traces run.

They come from `models/assembly.py`, as in training, which also loads weights and looks at the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sfa_dist.models import frozen as frozen_module
from sfa_dist.models.assembly import (
    LARGEST_CHUNK_FRAMES,
    freeze,
    set_recompute,
    tail_of,
    trunk_of,
    whole_model,
    without_storage,
)
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.parallel.engines.offload import HostFeatures, HostLink, HostPool
from sfa_dist.plan.memory_trace import HOST, MemoryTrace
from sfa_dist.recipe.schema import Stage2, StageBlock


@dataclass(frozen=True)
class Shapes:
    """What the engine gets, and what runs frozen in front of it (None where everything is trained)."""

    trainable: nn.Module
    frozen: FrozenTrunk | None

    @property
    def trainable_parameters(self) -> int:
        """Elements that are trained."""
        return sum(p.numel() for p in self.trainable.parameters())

    @property
    def frozen_parameters(self) -> int:
        """Elements that are not."""
        return sum(p.numel() for p in self.frozen.parameters()) if self.frozen else 0


def shapes_of(stage: StageBlock) -> Shapes:
    """A stage's modules without storage. Raises RecipeError for sizes that do not go together."""
    if not isinstance(stage, Stage2):
        return Shapes(whole_model(stage), None)
    trunk, tail = trunk_of(stage), tail_of(stage)
    with without_storage():
        frozen = freeze(trunk, stage, pooled=not tail.takes_tokens)
    if stage.chunk_frames == "auto":
        frozen.chunk_frames = LARGEST_CHUNK_FRAMES  # On a full card it takes fewer.
    set_recompute(tail, stage)
    return Shapes(tail, frozen)


def link_to_host(frozen: FrozenTrunk, trace: MemoryTrace) -> None:
    """Lets the trunk offload as in training, over the same code; its host buffers are counted in the host."""
    frozen.link = _TracedLink(trace)


class _TracedLink(HostLink):
    """Host buffers are counted; copies into them, which make no storage, are left out: each is a slice that no trace
    has seen, and 4,096 frames have thousands of them."""

    def __init__(self, trace: MemoryTrace) -> None:
        super().__init__(torch.device("cpu"))
        self.pool = _CountedPool(trace)

    def store(self, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype) -> HostFeatures:
        return _UncopiedFeatures(self, clips, spans, row_shape, dtype)


class _UncopiedFeatures(HostFeatures):
    def _copy_out(self, span: slice, value: Tensor) -> None:
        pass


class _CountedPool(HostPool):
    """Host buffers that the trace knows to be such."""

    def __init__(self, trace: MemoryTrace) -> None:
        super().__init__(pinned=False)
        self._trace = trace

    def take(self, shape: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with self._trace.category(HOST):
            return super().take(shape, dtype)


@contextmanager
def quick_chunks(frozen: FrozenTrunk | None, trace: MemoryTrace) -> Iterator[None]:
    """Lets the trunk run each shape of chunk once; a repetition only tells the trace how far the first one rose.

    The trunk keeps nothing of a chunk but its output, and the copies that cut clips into rows and put features together
    make no storage, so this is exact, and 1,024 frames trace as fast as 8.
    """
    if frozen is None:
        yield
        return
    run: Callable[[Tensor, Tensor | None], Tensor] = frozen.run_rows
    seen: dict[torch.Size, tuple[int, torch.Size, torch.dtype]] = {}

    def run_rows(rows: Tensor, still: Tensor | None = None) -> Tensor:
        if rows.shape in seen:
            rise, shape, dtype = seen[rows.shape]
            trace.bump(rise)
            return torch.empty(shape, dtype=dtype, device=rows.device)
        with trace.transient() as risen:
            out = run(rows, still)
        seen[rows.shape] = (risen[0], out.shape, out.dtype)
        return out

    copy_rows, put_rows = frozen_module.copy_rows, frozen_module.put_rows
    frozen.run_rows = run_rows  # type: ignore[method-assign]
    frozen_module.copy_rows = lambda clips, tubelet, span, out: None
    frozen_module.put_rows = lambda features, span, value: None
    try:
        yield
    finally:
        frozen_module.copy_rows, frozen_module.put_rows = copy_rows, put_rows


def treat_activations(module: nn.Module, mode: str, trace: MemoryTrace) -> None:
    """Lets each block (entry of a ModuleList) keep, recompute or move away what it saves, as `stage.activation` says.

    Call it when `module` has its storages. What goes to the host is counted there.
    """
    for block in [block for blocks in module.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]:
        run = block.forward
        if mode.startswith("checkpoint"):
            run = partial(checkpoint, run, use_reentrant=False)
        if mode.endswith("offload"):
            run = partial(_with_host, run, block, trace)
        block.forward = run


def _with_host(run: Callable[..., Any], block: nn.Module, trace: MemoryTrace, *args: Any) -> Any:
    own = {id(p.untyped_storage()) for p in block.parameters()}

    def pack(tensor: Tensor) -> tuple[bool, Tensor]:
        if id(tensor.untyped_storage()) in own:
            return False, tensor
        with trace.category(HOST):
            return True, torch.empty(tensor.shape, dtype=tensor.dtype)

    def unpack(packed: tuple[bool, Tensor]) -> Tensor:
        moved, tensor = packed
        return torch.empty(tensor.shape, dtype=tensor.dtype) if moved else tensor

    with saved_tensors_hooks(pack, unpack):
        return run(*args)
