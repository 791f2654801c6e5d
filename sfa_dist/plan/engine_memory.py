"""What the engines allocate around the trainable module, replayed on fake tensors, on one of `world` ranks.

Each class allocates and frees the tensors of its engine at the same moments as the engine does, so that a trace sees
them together with the activations that are alive then:

    Replicated      engine.zero: 0, and engine.reduction: tree: everything in fp32, bf16 by autocast
    Partitioned     engine.zero: 1, 2, with or without cpu_offload
    WideGradients   engine.zero: 1 in bf16 with several micro-batches a step
    GatheredMemory  engine.zero: 3, and engine.name: fsdp: parameters are sharded and gathered where they are needed

Source: DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, bf16_optimizer.py, stage3.py) and torch 2.14 (FSDP2). All but the
last are within 2 % of real allocations on a CPU (tests/unit/plan/test_plan_real.py). The last is arithmetic
(gathered_memory.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sfa_dist.parallel.engines.optimizers import make_optimizer, moments_of, reset_state
from sfa_dist.plan.engine_setting import Setting
from sfa_dist.plan.gathered_memory import GatheredMemory
from sfa_dist.plan.memory_trace import HOST, MemoryTrace, materialise

ALLREDUCE_BUCKET = 500_000_000  # Elements that ZeRO 0 reduces at a time (runtime/constants.py).


class EngineReplay(Protocol):
    """One step of an engine, as far as its memory is concerned."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output."""

    def backward(self, loss: Tensor) -> None:
        """The last micro-batch's backward pass, beside what earlier ones have left."""

    def step(self) -> None:
        """The optimizer's step."""


def replay(module: nn.Module, setting: Setting, trace: MemoryTrace) -> EngineReplay:
    """The replay of `setting.stage.engine`. It gives `module` (on the meta device) its fake storages."""
    engine = setting.stage.engine
    if engine.replicates:
        return Replicated(module, setting, trace)
    if not engine.gathers_parameters:
        wide = engine.zero_stage == 1 and setting.wide and not setting.offload
        return (WideGradients if wide else Partitioned)(module, setting, trace)
    return GatheredMemory(module, setting, trace)


class Replicated:
    """Everything on every rank: fp32 parameters, gradients and moments; bf16 by autocast."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        with trace.category("parameters"):
            materialise(module)
        named = dict(module.named_parameters())
        self.parameters = list(named.values())
        self.optimizer = make_optimizer(named, setting.stage.optimizer)
        with trace.category("optimizer"):
            reset_state(self.optimizer, self.parameters, moments_of(setting.stage.optimizer), 1)
        self.numel = sum(p.numel() for p in self.parameters)
        self.tree = setting.stage.engine.is_exact
        self._held: list[Tensor] = []  # Partial sums of the tree.
        with trace.category("gradients"):
            if self.tree:
                # Micro-batches before the last leave at most log2 of their number.
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
        """Gradients, then the buffers in which they are reduced."""
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
            elif self.setting.world > 1:
                torch.empty(min(ALLREDUCE_BUCKET, self.numel))  # Flattened for the reduction, then copied back.

    def step(self) -> None:
        """Nothing: fused optimizers allocate nothing, and have no fake kernel that could run."""


class Partitioned:
    """ZeRO 1 and 2: whole parameters in the compute dtype; masters, moments and, in ZeRO 2, gradients in shards."""

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        self.dtype = torch.bfloat16 if setting.bf16 else torch.float32
        self.first = setting.stage.engine.zero_stage == 1
        with trace.category("parameters"):
            materialise(module, self.dtype)
        self.parameters = list(module.parameters())
        self.shard = -(-sum(p.numel() for p in self.parameters) // setting.world)
        self.largest = min(self.shard, max(p.numel() for p in self.parameters))  # Of one parameter, on this rank.
        with trace.category(HOST if setting.offload else "optimizer"):
            self.master = nn.Parameter(torch.empty(self.shard))
            self.optimizer = make_optimizer({"weight": self.master}, setting.stage.optimizer)
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
            for p in self.parameters:  # ZeRO 1 sums micro-batches on each rank before it reduces.
                p.grad = torch.empty_like(p)
            return []

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output, in the dtype of its parameters."""
        return self.module(inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients go into the bucket as they come, and into this rank's shard when it is full."""
        with self.trace.category("buffers"):
            self._bucket = torch.empty(self.bucket_size, dtype=self.dtype)
        loss.backward()
        if self.first:  # ZeRO 1 reduces after the backward pass.
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
        """Copies the bucket into a flat tensor, in which it is reduced, and this rank's part out of it."""
        assert self._bucket is not None
        if not self._filled:
            return
        with self.trace.category("buffers"):
            flat = torch.empty(self._filled, dtype=self._bucket.dtype)
            self._filled = 0
            if self.setting.wide:  # Added to fp32 sums, one parameter at a time.
                torch.empty(self.largest, dtype=torch.float32)
        if not self.setting.offload and not self._reduced:
            with self.trace.category("gradients"):
                if self.setting.wide:
                    self._reduced = self._left  # Updated in place.
                else:
                    self._reduced = [torch.empty(self.shard, dtype=self._bucket.dtype)]
        del flat

    def step(self) -> None:
        """The norm of the gradients in fp64, one parameter at a time; then the gradient in fp32.

        The step and the gathering of the new parameters work in place.
        """
        if self.setting.offload:
            return
        with self.trace.category("buffers"):
            torch.empty(self.largest, dtype=torch.float64)
        with self.trace.category("gradients"):
            if self.setting.wide:
                self.master.grad = self._reduced[0]
            else:
                flat = torch.cat([*self._reduced, torch.empty(0, dtype=self.dtype)])
                self.master.grad = flat.float()
                del flat
        self._reduced, self._left = [], []
        self.master.grad = None


class WideGradients:
    """ZeRO 1 in bf16 that sums micro-batches in fp32: DeepSpeed's BF16_Optimizer.

    It keeps whole gradients on each rank, in bf16 and in fp32.
    """

    def __init__(self, module: nn.Module, setting: Setting, trace: MemoryTrace) -> None:
        self.module, self.setting, self.trace = module, setting, trace
        with trace.category("parameters"):
            materialise(module, torch.bfloat16)
        self.numel = sum(p.numel() for p in module.parameters())
        with trace.category("optimizer"):
            self.master = nn.Parameter(torch.empty(-(-self.numel // setting.world)))
            self.optimizer = make_optimizer({"weight": self.master}, setting.stage.optimizer)
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
        """Nothing: the step uses this rank's part of the sum in place."""


def _retag_gradients(parameters: list[nn.Parameter], trace: MemoryTrace) -> None:
    def retag(parameter: Tensor) -> None:
        assert parameter.grad is not None
        trace.retag(parameter.grad, "gradients")

    for p in parameters:
        p.register_post_accumulate_grad_hook(retag)
