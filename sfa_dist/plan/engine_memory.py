"""What the engines allocate around the trainable module, replayed on fake tensors: one rank of `world` of them.

Each class makes and frees, at the same moments, the tensors that the engine of the same kind does, so that a trace sees
them on top of activations when they are:

    Replicated    engine.zero: 0, and engine.reduction: tree: fp32 everything, bf16 by autocast
    Partitioned   engine.zero: 1, 2, with or without cpu_offload
    WideGradients engine.zero: 1 in bf16 with several micro-batches a step
    Gathered      engine.zero: 3, and engine.name: fsdp: parameters are sharded and gathered where they are needed

Read in DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py) and torch 2.14 (FSDP2). The first two are exact to a
percent on CPU (tests/unit/test_plan_real.py). The third is arithmetic: gathered parameters are bounded from above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfa_dist.parallel.optimizers import make_optimizer, moments_of, reset_state
from sfa_dist.parallel.zero_config import limit_buckets
from sfa_dist.plan.trace import HOST, MemoryTrace, materialise
from sfa_dist.recipe import StageBlock

ZERO3_PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
ZERO3_REUSE = 1_000_000_000  # stage3_max_reuse_distance, and stage3_max_live_parameters
ALLREDUCE_BUCKET = 500_000_000  # Elements that ZeRO 0 reduces at a time (runtime/constants.py).


@dataclass(frozen=True)
class Setting:
    """What an engine's memory depends on, apart from its module."""

    stage: StageBlock
    world: int
    accumulation: int
    fused: bool  # Fused optimizers have no temporaries; the CPU's have.

    @property
    def bf16(self) -> bool:
        """Whether the engine computes in bf16."""
        return self.stage.engine.precision == "bf16"

    @property
    def offload(self) -> bool:
        """Whether masters and moments lie in the host's memory."""
        return self.stage.engine.cpu_offload

    @property
    def wide(self) -> bool:
        """Whether bf16 gradients of several micro-batches are added in fp32."""
        return self.bf16 and self.accumulation > 1

    @property
    def zero_block(self) -> Mapping[str, Any]:
        """The recipe's native `deepspeed.zero_optimization` keys."""
        return self.stage.deepspeed.get("zero_optimization", {})

    def bucket_elements(self, trainable: int) -> int:
        """Elements of the buffer that DeepSpeed reduces gradients in."""
        config = {"zero_optimization": dict(self.zero_block)}
        limit_buckets(config, trainable)
        return int(config["zero_optimization"]["reduce_bucket_size"])


class EngineReplay(Protocol):
    """One step of an engine, as far as memory goes."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output."""

    def backward(self, loss: Tensor) -> None:
        """The last micro-batch's backward pass, with what those before it have left."""

    def step(self) -> None:
        """The optimizer's step."""


def replay(module: nn.Module, setting: Setting, trace: MemoryTrace) -> EngineReplay:
    """The replay that `setting.stage.engine` asks for; gives `module` (on the meta device) its fake storages."""
    engine = setting.stage.engine
    if engine.reduction == "tree" or (engine.name == "deepspeed" and engine.zero == 0):
        return Replicated(module, setting, trace)
    if engine.name == "deepspeed" and engine.zero < 3:
        wide = engine.zero == 1 and setting.wide and not setting.offload
        return (WideGradients if wide else Partitioned)(module, setting, trace)
    return Gathered(module, setting, trace)


def optimizer_bytes_per_rank(trainable: int, setting: Setting) -> int:
    """fp32 masters and moments that one rank owns, wherever they lie."""
    engine = setting.stage.engine
    shards = 1 if engine.reduction == "tree" or (engine.name, engine.zero) == ("deepspeed", 0) else setting.world
    return 4 * -(-trainable // shards) * (1 + len(moments_of(setting.stage.optimizer)))


class Replicated:
    """Everything on every rank: fp32 parameters, gradients and moments; bf16 by autocast."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        with trace.category("parameters"):
            materialise(module)
        named = dict(module.named_parameters())
        self.parameters = list(named.values())
        self.optimizer = make_optimizer(named, setting.stage.optimizer, setting.fused)
        with trace.category("optimizer"):
            reset_state(self.optimizer, self.parameters, moments_of(setting.stage.optimizer), 1)
        self.numel = sum(p.numel() for p in self.parameters)
        self.tree = setting.stage.engine.reduction == "tree"
        self._held: list[Tensor] = []  # Branches of the tree's sum.
        with trace.category("gradients"):
            if self.tree:
                # Micro-batches before the last have left at most log2 of them.
                self._held = [torch.empty(self.numel) for _ in range((setting.accumulation - 1).bit_length())]
            elif setting.accumulation > 1:
                for p in self.parameters:
                    p.grad = torch.empty_like(p)
        _retag_gradients(self.parameters, trace)

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output, under the autocast that the engine uses."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.bf16):
            return self.module(inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients, then the buffers that they are reduced in."""
        loss.backward()
        with self.trace.category("buffers"):
            if self.tree:
                whole = torch.empty(self.numel)
                self._held.clear()
                for p in self.parameters:
                    p.grad = None
                for p, g in zip(self.parameters, whole.split([p.numel() for p in self.parameters]), strict=True):
                    p.grad = g.view_as(p)
                if self.setting.world > 1:
                    torch.empty_like(whole)
            else:
                torch.empty(min(ALLREDUCE_BUCKET, self.numel))  # Flattened for the reduction, then copied back.

    def step(self) -> None:
        """Fused optimizers allocate nothing (and have no fake kernel: they would run on real memory)."""
        if not self.setting.fused:
            self.optimizer.step()


class Partitioned:
    """ZeRO 1 and 2: whole parameters in the compute dtype; masters, moments and, in ZeRO 2, gradients in shards."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        self.dtype = torch.bfloat16 if setting.bf16 else torch.float32
        self.first = setting.stage.engine.zero == 1
        with trace.category("parameters"):
            materialise(module, self.dtype)
        self.parameters = list(module.parameters())
        self.shard = -(-sum(p.numel() for p in self.parameters) // setting.world)
        with trace.category(HOST if setting.offload else "optimizer"):
            self.master = nn.Parameter(torch.empty(self.shard))
            self.optimizer = make_optimizer({"weight": self.master}, setting.stage.optimizer, setting.fused)
            reset_state(self.optimizer, [self.master], moments_of(setting.stage.optimizer), 1)
        self._left = self._left_by_earlier_micro_batches()
        self._bucket: Tensor | None = None
        self._filled = 0
        self._reduced: list[Tensor] = []  # This rank's reduced gradients in the compute dtype.
        self.bucket_size = setting.bucket_elements(sum(p.numel() for p in self.parameters))
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(self._hook)
        if setting.offload:
            with trace.category("buffers"):
                self._copy = torch.empty(max(p.numel() for p in self.parameters), dtype=self.dtype)

    def _left_by_earlier_micro_batches(self) -> list[Tensor]:
        if self.setting.accumulation == 1 or self.setting.offload:
            return []
        with self.trace.category("gradients"):
            if not self.first:
                return [torch.empty(self.shard, dtype=torch.float32)]
            for p in self.parameters:  # ZeRO 1 adds micro-batches up on each rank before it reduces.
                p.grad = torch.empty_like(p)
            return []

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output, in the dtype of its parameters."""
        return self.module(inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients go into the bucket as they come, and out of it into this rank's shard when it is full."""
        with self.trace.category("buffers"):
            self._bucket = torch.empty(self.bucket_size, dtype=self.dtype)
        loss.backward()
        if self.first:  # ZeRO 1 reduces behind the backward pass.
            for p in self.parameters:
                self._into_bucket(p)
        self._reduce()
        self._bucket = None
        for p in self.parameters:
            p.grad = None

    def _hook(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.trace.retag(parameter.grad, "gradients")
        if not self.first:
            self._into_bucket(parameter)

    def _into_bucket(self, parameter: Tensor) -> None:
        assert self._bucket is not None
        if self._filled + parameter.numel() > self.bucket_size:
            self._reduce()
        self._filled += parameter.numel()
        if parameter.numel() <= self.bucket_size:
            parameter.grad = None  # It is a view of the bucket from now on.

    def _reduce(self) -> None:
        """The bucket is flattened into one more copy, reduced, and this rank's part copied out."""
        assert self._bucket is not None
        if not self._filled:
            return
        with self.trace.category("buffers"):
            flat = torch.empty(self._filled, dtype=self._bucket.dtype)
            self._filled = 0
        if not self.setting.offload and not self._reduced:
            with self.trace.category("gradients"):
                if self.setting.wide:
                    self._reduced = self._left  # Added to what is there.
                else:
                    self._reduced = [torch.empty(self.shard, dtype=self._bucket.dtype)]
        del flat

    def step(self) -> None:
        """The gradient in fp32, the step, and the new parameters gathered in place."""
        if self.setting.offload:
            return
        with self.trace.category("gradients"):
            if self.setting.wide:
                self.master.grad = self._reduced[0]
            else:
                flat = torch.cat([*self._reduced, torch.empty(0, dtype=self.dtype)])
                self.master.grad = flat.float()
                del flat
        self._reduced, self._left = [], []
        if not self.setting.fused:
            self.optimizer.step()
        self.master.grad = None


class WideGradients:
    """ZeRO 1 in bf16 that adds micro-batches up in fp32: DeepSpeed's BF16_Optimizer. It keeps whole gradients on each
    rank, in bf16 and in fp32."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        with trace.category("parameters"):
            materialise(module, torch.bfloat16)
        self.numel = sum(p.numel() for p in module.parameters())
        with trace.category("optimizer"):
            self.master = nn.Parameter(torch.empty(-(-self.numel // setting.world)))
            self.optimizer = make_optimizer({"weight": self.master}, setting.stage.optimizer, setting.fused)
            reset_state(self.optimizer, [self.master], moments_of(setting.stage.optimizer), 1)
        with trace.category("gradients"):
            self.sum = torch.empty(self.numel, dtype=torch.float32)
            for p in module.parameters():
                p.grad = torch.empty_like(p)
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(self._widen)

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output, in bf16."""
        return self.module(inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients, and the copy in which the sum is reduced."""
        loss.backward()
        with self.trace.category("buffers"):
            torch.empty(min(ALLREDUCE_BUCKET, self.numel))

    def _widen(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.trace.retag(parameter.grad, "gradients")
        parameter.grad.float()  # Added to the sum.

    def step(self) -> None:
        """The step takes this rank's part of the sum."""
        if not self.setting.fused:
            self.master.grad = self.sum[: self.master.numel()]
            self.optimizer.step()


class Gathered:
    """ZeRO 3 and FSDP2: shards at rest; whole parameters, in the compute dtype, where a block runs."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        self.dtype = torch.bfloat16 if setting.bf16 else torch.float32
        with trace.category(HOST):  # Whole parameters are counted below.
            materialise(module, self.dtype)
        numel = sum(p.numel() for p in module.parameters())
        shard, moments = -(-numel // setting.world), len(moments_of(setting.stage.optimizer))
        engine = setting.stage.engine
        home = HOST if setting.offload else "optimizer"
        width = torch.finfo(self.dtype).bits // 8
        self._kept: list[Tensor] = []
        if engine.name == "fsdp":
            # The masters are the parameters at rest. Two units are gathered at a time, the root's stays.
            units = unit_sizes(module)
            gathered = units[0] + sum(sorted(units[1:])[-2:]) + max(units)  # The last one: flat, before it is cut.
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
        """Gradients live until they are scattered."""
        with self.trace.category("buffers"):
            buffer = torch.empty(self._buffer, dtype=torch.uint8)
        with self.trace.category("gradients"):
            numel, dtype = self._gradient
            self._kept.append(torch.empty(numel, dtype=dtype))
        loss.backward()
        del buffer

    def step(self) -> None:
        """The shard's gradient in fp32."""
        with self.trace.category("gradients"):
            torch.empty(self._at_step, dtype=torch.uint8)


def unit_sizes(module: nn.Module) -> list[int]:
    """Elements of FSDP2's units: the root's, then those of each entry of each ModuleList."""
    blocks = [block for child in module.modules() if isinstance(child, nn.ModuleList) for block in child]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return [sum(p.numel() for p in module.parameters()) - sum(sizes), *sizes]


def gathered_by_zero3(module: nn.Module, block: Mapping[str, Any]) -> int:
    """Elements that ZeRO 3 holds gathered at most: what backward needs again within the reuse distance (a parameter
    at depth x from the end comes back after 2 x elements), and what is prefetched."""
    numel = sum(p.numel() for p in module.parameters())
    largest = max(p.numel() for p in module.parameters())
    reuse = int(block.get("stage3_max_reuse_distance", ZERO3_REUSE))
    live = int(block.get("stage3_max_live_parameters", ZERO3_REUSE))
    prefetch = int(block.get("stage3_prefetch_bucket_size", ZERO3_PREFETCH))
    return min(numel, live, math.ceil(reuse / 2) + prefetch + largest)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _retag_gradients(parameters: list[nn.Parameter], trace: MemoryTrace) -> None:
    def retag(parameter: Tensor) -> None:
        assert parameter.grad is not None
        trace.retag(parameter.grad, "gradients")

    for p in parameters:
        p.register_post_accumulate_grad_hook(retag)
