"""Arithmetic of a factorised encoder, counted from its shapes (ViViT's "GFLOPs" are multiply-accumulates).

It is exact for the matrix products, which FlopCounterMode counts as well; norms, GELU and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfa_dist.models.vivit import dims_of
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock
from sfa_dist.recipe.schema import StageBlock


@dataclass(frozen=True)
class ForwardMacs:
    """Multiply-accumulates of one clip's forward pass, by part."""

    trunk: int
    adapter: int
    temporal: int
    head: int

    @property
    def tail(self) -> int:
        """What stage 2 trains."""
        return self.adapter + self.temporal + self.head


def block_macs(tokens: int, width: int, mlp: int) -> int:
    """Multiply-accumulates of one transformer block on one sequence."""
    return 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * mlp


def pool_macs(tokens: int, width: int, mlp: int) -> int:
    """Multiply-accumulates of attention pooling on one sequence, without its query, which is one for all sequences."""
    return (2 * tokens + 1) * width * width + 2 * tokens * width + 2 * width * mlp


def forward_macs(model: ModelBlock, frames: int, adapter: AdapterBlock | None = None) -> ForwardMacs:
    """Multiply-accumulates of the forward pass of one clip of `frames` frames."""
    dims = dims_of(model)
    patches = (model.image_size // dims.patch) ** 2
    steps = frames // model.tubelet
    extra = int(model.pooling == "cls")
    embed = steps * patches * 3 * dims.patch**2 * model.tubelet * dims.width
    spatial = steps * dims.depth * block_macs(patches + extra, dims.width, dims.mlp)
    temporal = model.temporal_depth * block_macs(steps + extra, dims.width, dims.mlp)
    if model.pooling == "attention":
        spatial += steps * pool_macs(patches, dims.width, dims.mlp) + dims.width**2
        temporal += bool(temporal) * (pool_macs(steps, dims.width, dims.mlp) + dims.width**2)
    vectors = 0 if adapter is None else steps * (patches + extra if adapter.placement == "tokens" else 1)
    inner = 0 if adapter is None else max(1, round(dims.width * adapter.hidden))
    return ForwardMacs(embed + spatial, 2 * vectors * dims.width * inner, temporal, dims.width * model.classes)


def clip_flops(stage: StageBlock, recomputed: bool = False, live: float = 1.0) -> float:
    """Floating-point operations to train one clip of a stage, 2 for each multiply-accumulate.

    Backward costs two forward passes, and a frozen trunk has none. `recomputed` includes what checkpointed blocks
    compute again: the machine's work, but not the model's (mfu). `live` is the share of clips whose features do not
    come from a cache.
    """
    macs = forward_macs(stage.model, stage.frames, stage.adapter_block)
    flops = 2.0 * (macs.trunk * (live if stage.freezes_trunk else 3) + macs.tail * 3)
    if recomputed and recomputes(stage):
        flops += 2.0 * (macs.temporal + (0 if stage.freezes_trunk else macs.trunk))
    return flops


def recomputes(stage: StageBlock) -> bool:
    """Whether the trained blocks run their forward pass again in backward."""
    return stage.activation.startswith("checkpoint")
