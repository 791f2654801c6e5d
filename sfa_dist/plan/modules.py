"""The modules that a stage trains and freezes, as shapes on the meta device: what the traces run.

The same constructors as in `assemble.py`, which stands in a later layer and loads weights too; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sfa_dist.errors import RecipeError
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Tail, Trunk, ViViT
from sfa_dist.plan.trace import HOST, MemoryTrace
from sfa_dist.recipe import Stage2, StageBlock


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
    data = stage.data
    try:
        with torch.device("meta"):
            if not isinstance(stage, Stage2):
                return Shapes(ViViT(stage.model, stage.frames, mean=data.mean, std=data.std), None)
            trunk, tail = Trunk(stage.model), Tail(stage.model, stage.frames, stage.adapter)
            dtype = torch.bfloat16 if stage.engine.precision == "bf16" else torch.float32
            frozen = FrozenTrunk(trunk, stage.chunk_frames, not tail.takes_tokens, data.mean, data.std, dtype)
            return Shapes(tail, frozen)
    except ValueError as error:
        raise RecipeError(f"the recipe's model cannot be built: {error}") from error


def skip_repeated_chunks(frozen: FrozenTrunk, trace: MemoryTrace) -> None:
    """Lets the trunk run each shape of chunk once; a repetition only tells the trace how far the first one rose.

    The trunk keeps nothing of a chunk but its output, so this is exact, and 1,024 frames trace as fast as 8.
    """
    run: Callable[..., Tensor] = frozen.trunk.forward_rows
    seen: dict[tuple[object, ...], tuple[int, torch.Size, torch.dtype]] = {}

    def forward_rows(rows: Tensor, *args: object, **kwargs: object) -> Tensor:
        key = (rows.shape, rows.dtype, args, tuple(sorted(kwargs.items())))
        if key in seen:
            rise, shape, dtype = seen[key]
            trace.bump(rise)
            return torch.empty(shape, dtype=dtype, device=rows.device)
        with trace.transient() as risen:
            out = run(rows, *args, **kwargs)
        seen[key] = (risen[0], out.shape, out.dtype)
        return out

    frozen.trunk.forward_rows = forward_rows  # type: ignore[method-assign]


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
