"""What ZeRO 3 and FSDP2 allocate around the trainable module, as arithmetic (see engine_memory.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfa_dist.parallel.engines.optimizers import moments_of
from sfa_dist.plan.engine_setting import Setting
from sfa_dist.plan.memory_trace import HOST, MemoryTrace, materialise

ZERO3_PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
ZERO3_REUSE = 1_000_000_000  # stage3_max_reuse_distance, and stage3_max_live_parameters


class GatheredMemory:
    """ZeRO 3 and FSDP2: shards at rest; whole parameters, in the compute dtype, where a block runs."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        self.dtype = torch.bfloat16 if setting.bf16 else torch.float32
        with trace.category(HOST):  # Whole parameters are counted below.
            materialise(module, self.dtype)
        numel = sum(p.numel() for p in module.parameters())
        shard, moments = -(-numel // setting.shards), len(moments_of(setting.stage.optimizer))
        engine = setting.stage.engine
        home = HOST if setting.offload else "optimizer"
        width = torch.finfo(self.dtype).bits // 8
        self._kept: list[Tensor] = []
        if engine.uses_fsdp:
            # The masters are the parameters at rest. Two units are gathered at a time; the root's stays gathered.
            units = unit_sizes(module)
            gathered = units[0] + sum(sorted(units[1:])[-2:]) + max(units)  # The last term: flat, before it is split.
            self._keep(HOST if setting.offload else "parameters", shard, torch.float32)
            self._keep(home, shard * moments, torch.float32)
            self._gradient = (numel, torch.float32) if setting.accumulation > 1 else (0, torch.float32)
            self._buffer = 2 * max(units) * 4 if setting.world > 1 else 0
            self._at_step = 0 if setting.offload else shard * 4
        else:
            gathered = gathered_by_zero3(module, setting.zero_block)
            self._keep("parameters", shard, self.dtype)
            self._keep(home, shard * (1 + moments), torch.float32)
            self._gradient = (0 if setting.offload else shard, torch.float32 if setting.wide else self.dtype)
            self._buffer = width * setting.bucket_elements(numel)
            self._at_step = 0 if setting.offload else shard * 4
        with trace.category("buffers"):
            self._gathered = torch.empty(gathered, dtype=self.dtype)
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(_drop_gradient)
        self._home, self._shard = home, shard

    def _keep(self, category: str, numel: int, dtype: torch.dtype) -> None:
        with self.trace.category(category):
            self._kept.append(torch.empty(numel, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output, in the compute dtype."""
        return self.module(inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients, which stay until they are scattered."""
        with self.trace.category("buffers"):
            buffer = torch.empty(self._buffer, dtype=torch.uint8)
        with self.trace.category("gradients"):
            numel, dtype = self._gradient
            self._kept.append(torch.empty(numel, dtype=dtype))
        loss.backward()
        del buffer

    def step(self) -> None:
        """The gradient of the shard in fp32."""
        with self.trace.category("gradients"):
            torch.empty(self._at_step, dtype=torch.uint8)


def unit_sizes(module: nn.Module) -> list[int]:
    """Elements of FSDP2's units: the root's, then those of each entry of each ModuleList."""
    blocks = [block for child in module.modules() if isinstance(child, nn.ModuleList) for block in child]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return [sum(p.numel() for p in module.parameters()) - sum(sizes), *sizes]


def gathered_by_zero3(module: nn.Module, block: Mapping[str, Any]) -> int:
    """The most elements that ZeRO 3 holds gathered.

    They are what backward needs again within the reuse distance (a parameter at depth x from the end is needed again
    after 2 x elements), and what is prefetched.
    """
    numel = sum(p.numel() for p in module.parameters())
    largest = max(p.numel() for p in module.parameters())
    reuse = int(block.get("stage3_max_reuse_distance", ZERO3_REUSE))
    live = int(block.get("stage3_max_live_parameters", ZERO3_REUSE))
    prefetch = int(block.get("stage3_prefetch_bucket_size", ZERO3_PREFETCH))
    return min(numel, live, math.ceil(reuse / 2) + prefetch + largest)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
