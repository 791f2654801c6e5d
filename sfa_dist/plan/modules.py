"""The modules that a stage trains and freezes, as shapes on the meta device: what the traces run.

They are built by `models/assembly.py`, as in training, which then loads weights and looks at the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sfa_dist.models.assembly import (
    freeze_as,
    largest_chunk,
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


class PlannedTrunk(FrozenTrunk):
    """The frozen trunk of a plan. It can run each shape of chunk once, and then traces 1,024 frames as fast as 8.

    This is exact: of a chunk the trunk keeps the output alone, and the copies that cut clips into tubelets and join
    features allocate nothing. For a repeated shape it only notes in the trace how far its first run rose.
    """

    _trace: MemoryTrace | None = None

    def skip_repetitions(self, trace: MemoryTrace) -> None:
        """Runs each shape of chunk once from now on, under `trace`. Without this call all chunks run."""
        self._trace = trace
        self._seen: dict[torch.Size, tuple[int, torch.Size, torch.dtype]] = {}

    def run_tubelets(self, tubelets: Tensor, still: Tensor | None = None) -> Tensor:
        """As FrozenTrunk's; a shape that has run before returns an empty tensor."""
        if self._trace is None:
            return super().run_tubelets(tubelets, still)
        if tubelets.shape in self._seen:
            rise, shape, dtype = self._seen[tubelets.shape]
            self._trace.bump(rise)
            return torch.empty(shape, dtype=dtype, device=tubelets.device)
        with self._trace.transient() as risen:
            out = super().run_tubelets(tubelets, still)
        self._seen[tubelets.shape] = (risen[0], out.shape, out.dtype)
        return out

    def copy_tubelets(self, clips: Tensor, span: slice, out: Tensor) -> None:
        """As FrozenTrunk's; does nothing where repetitions are skipped."""
        if self._trace is None:
            super().copy_tubelets(clips, span, out)

    def put_tubelets(self, features: Tensor, span: slice, value: Tensor) -> None:
        """As FrozenTrunk's; does nothing where repetitions are skipped."""
        if self._trace is None:
            super().put_tubelets(features, span, value)


@dataclass(frozen=True)
class Shapes:
    """What the engine trains, and the frozen trunk before it (None where everything is trained)."""

    trainable: nn.Module
    frozen: PlannedTrunk | None

    @property
    def trainable_parameters(self) -> int:
        """The number of trained elements."""
        return sum(p.numel() for p in self.trainable.parameters())

    @property
    def frozen_parameters(self) -> int:
        """The number of frozen elements."""
        return sum(p.numel() for p in self.frozen.parameters()) if self.frozen else 0


def shapes_of(stage: StageBlock) -> Shapes:
    """A stage's modules without storage. Raises RecipeError for sizes that do not fit together."""
    if not isinstance(stage, Stage2) or not stage.freeze_trunk:
        return Shapes(whole_model(stage), None)
    trunk, tail = trunk_of(stage), tail_of(stage)
    with without_storage():
        frozen = freeze_as(PlannedTrunk, trunk, stage, pooled=not tail.takes_tokens)
    if stage.chunk_frames == "auto":
        frozen.chunk_frames = largest_chunk(trunk, "cuda")  # With little free memory it takes fewer.
    set_recompute(tail, stage)
    return Shapes(tail, frozen)


def link_to_host(frozen: FrozenTrunk, trace: MemoryTrace) -> None:
    """Lets the trunk offload with the code of training; its host buffers are counted as HOST."""
    frozen.link = _TracedLink(trace)


class _TracedLink(HostLink):
    """A link that counts its host buffers and copies nothing into them.

    Copies allocate nothing and take long to trace: each is of another slice, and 4,096 frames have thousands.
    """

    def __init__(self, trace: MemoryTrace) -> None:
        super().__init__(torch.device("cpu"))
        self.pool = _CountedPool(trace)

    def store(self, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype) -> HostFeatures:
        return _UncopiedFeatures(self, clips, spans, row_shape, dtype)


class _UncopiedFeatures(HostFeatures):
    def _copy_out(self, span: slice, value: Tensor) -> None:
        pass


class _CountedPool(HostPool):
    """A pool whose buffers the trace counts as HOST."""

    def __init__(self, trace: MemoryTrace) -> None:
        super().__init__(pinned=False)
        self._trace = trace

    def take(self, shape: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with self._trace.category(HOST):
            return super().take(shape, dtype)


def treat_activations(module: nn.Module, mode: str, trace: MemoryTrace) -> None:
    """Makes each block (entry of a ModuleList) keep, recompute or offload what it saves; `mode` is `stage.activation`.

    Call it after `module` has its storages. What is offloaded is counted as HOST.
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
