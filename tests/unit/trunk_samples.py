"""Tiny trunks and tails with known weights, and clips for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Tail, Trunk, build
from sfa_dist.parallel.engines.offload import HostLink
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock

MODEL = ModelBlock(size="tiny", classes=5, temporal_depth=2, image_size=16)
CPU = torch.device("cpu")


def trunk_of(model: ModelBlock = MODEL) -> Trunk:
    torch.manual_seed(0)
    with torch.device("meta"):
        trunk = Trunk(model)
    build(trunk)
    nn.init.normal_(trunk.embed.bias, std=0.02)
    return trunk


def tail_of(frames: int, placement: str = "tokens") -> Tail:
    torch.manual_seed(1)
    with torch.device("meta"):
        tail = Tail(MODEL, frames, AdapterBlock.model_validate({"placement": placement}))
    build(tail)
    nn.init.normal_(tail.head.weight)
    assert tail.adapter is not None
    nn.init.normal_(tail.adapter.fc2.weight, std=0.1)
    return tail


def clips(frames: int = 8, batch: int = 2, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8, generator=generator)


def frozen_of(offload: bool, chunk: int = 6, pooled: bool = False, dtype: torch.dtype = torch.float32) -> FrozenTrunk:
    frozen = FrozenTrunk(trunk_of(), chunk, pooled, dtype=dtype)
    frozen.link = HostLink(CPU) if offload else None
    return frozen
