"""Arithmetic of a factorised encoder, counted from its shapes (facts: ViViT's "GFLOPs" are multiply-accumulates)."""

from __future__ import annotations

from sfa_dist.models.vivit import dims_of
from sfa_dist.recipe import ModelBlock

# Sustained dense bf16 matrix peak in TFLOP/s by the name that the driver gives a card (vendors' data sheets, no
# sparsity).
CARD_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A6000": 155.0,
    "4090": 165.0,
    "3090": 71.0,
    "V100": 125.0,
}


def block_macs(tokens: int, width: int, mlp: int) -> int:
    """Multiply-accumulates of one transformer block on one sequence."""
    return 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * mlp


def forward_macs(model: ModelBlock, frames: int) -> tuple[int, int]:
    """(trunk, temporal encoder) multiply-accumulates of one clip's forward pass."""
    dims = dims_of(model)
    patches = (model.image_size // dims.patch) ** 2
    steps = frames // model.tubelet
    extra = int(model.pooling == "cls")
    embed = steps * patches * 3 * dims.patch**2 * model.tubelet * dims.width
    spatial = steps * dims.depth * block_macs(patches + extra, dims.width, dims.mlp)
    temporal = model.temporal_depth * block_macs(steps + extra, dims.width, dims.mlp)
    return embed + spatial, temporal


def step_flops(model: ModelBlock, frames: int, trunk_frozen: bool, live: float = 1.0) -> float:
    """Floating-point operations of one training clip: 2 a MAC; backward costs two forwards, and a frozen trunk has
    none. `live` is the share of clips whose features are not read from a cache."""
    trunk, temporal = forward_macs(model, frames)
    return 2.0 * (trunk * live * (1 if trunk_frozen else 3) + temporal * 3)


def peak_tflops(card: str) -> float | None:
    """The bf16 matrix peak of a card by its name, None where it is not known (or is a CPU)."""
    return next((peak for name, peak in CARD_PEAK_TFLOPS.items() if name in card), None)
