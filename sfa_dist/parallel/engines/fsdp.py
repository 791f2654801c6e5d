"""The FSDP2 engine: torch's own sharding, with one unit for each transformer block and one for the rest.

With `engine.shard_ranks` a group of neighbouring ranks shares one copy of the state, and each group holds a copy
(hybrid sharding).

The sharded parameters are the fp32 masters. Each unit is gathered when it runs (in bf16 for `engine.precision: bf16`),
and gradients are averaged over the ranks in fp32.

FSDP2 splits a parameter along its first dimension, so a rank owns consecutive rows, which are one piece of the
flattened parameter. The optimizer steps these rows as plain tensors: not every fused kernel takes a DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.engines.engine import Fragment
from sfa_dist.parallel.engines.optimizers import clipped_step, make_optimizer, moments_of, reset_state
from sfa_dist.recipe.schema import StageBlock


class FsdpEngine:
    """`module` sharded in place over the ranks that share a copy; `accumulation` micro-batches make a step.

    Until the last micro-batch each rank keeps unsharded fp32 gradients, so that a step needs one reduction.
    Raises RecipeError if the recipe's sharding does not suit the number of ranks.
    """

    def __init__(self, module: nn.Module, stage: StageBlock, accumulation: int, device: torch.device) -> None:
        self.accumulation = accumulation
        self.clip_norm = stage.optimizer.clip_norm
        self.moments = moments_of(stage.optimizer)
        mesh = _mesh(stage, device)
        self.owners, self._shard_group = mesh.size(-1), mesh.get_group("shard")
        self._shard_rank = dist.get_rank(self._shard_group)
        self.module: Any = _shard(module, stage, device, mesh)
        # Collected now: during a forward the module shows the gathered parameters instead.
        self._parameters: dict[str, Any] = dict(self.module.named_parameters())
        self._rows = {name: nn.Parameter(rows) for name, p in self._parameters.items() if (rows := _rows(p)).numel()}
        self._optimizer = make_optimizer(self._rows, stage.optimizer)
        self._device = device
        self._optimizer_device = torch.device("cpu") if stage.engine.cpu_offload else device

    def forward(self, inputs: object) -> Tensor:
        self.module.train()
        return self.module(inputs)

    @torch.no_grad()
    def evaluate(self, inputs: object) -> Tensor:
        self.module.eval()
        out = self.module(inputs)
        self.module.reshard()  # FSDP2 would keep the root gathered for a backward, which does not follow.
        return out

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> float:
        for name, rows in self._rows.items():
            parameter = self._parameters[name]
            if _rows(parameter).data_ptr() != rows.data_ptr():
                raise RuntimeError(f"FSDP2 has moved {name}: the optimizer would step what no forward reads")
            rows.grad = None if parameter.grad is None else _rows(parameter.grad)
        norm = clipped_step(self._optimizer, lr, self._gradient_norm(), self.clip_norm)
        self.module.zero_grad()
        return norm

    def _gradient_norm(self) -> Tensor:
        """The global norm, over all rows of a copy. Summed in fp64, so that it hardly depends on the sharding."""
        own = torch.nn.utils.get_total_norm([rows.grad for rows in self._rows.values() if rows.grad is not None])
        squares = own.to(self._optimizer_device, torch.float64).square()
        dist.all_reduce(squares, group=self._shard_group)
        return squares.sqrt().float()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._parameters.items()}

    def fragments(self) -> Iterator[Fragment]:
        for name, rows in self._rows.items():
            state = self._optimizer.state.get(rows, {})
            tensors = {"master": rows.detach()} | {key: state[key] for key in self.moments if key in state}
            flat = {key: tensor.view(-1) for key, tensor in tensors.items()}
            yield Fragment(name, self._first_element(self._parameters[name]), rows.numel(), flat)

    def _first_element(self, parameter: DTensor) -> int:
        """The index in the flattened parameter of the first element that this rank holds.

        FSDP2 divides the rows as torch.chunk does: ceil(rows / ranks) for each rank until none are left.
        """
        rows_per_rank = -(-parameter.shape[0] // self.owners)
        return rows_per_rank * self._shard_rank * math.prod(parameter.shape[1:])

    def make_optimizer_state(self, step: int) -> None:
        reset_state(self._optimizer, self._rows.values(), self.moments, step)

    def full_parameters(self) -> dict[str, Tensor]:
        full: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            value = parameter.detach().to(self._device).full_tensor()
            if dist.get_rank() == 0:
                full[name] = value.to("cpu", copy=True)
        return full

    def optimizer_bytes(self) -> int:
        return sum(4 * f.numel * (1 + len(self.moments)) for f in self.fragments())


def _mesh(stage: StageBlock, device: torch.device) -> DeviceMesh:
    """All ranks as (copies of the state, ranks that share a copy); one dimension if there is one copy."""
    world = dist.get_world_size()
    shards = stage.engine.shards(world)
    if why := stage.engine.refusal_of(world, stage.batch.size // stage.batch.micro):
        raise RecipeError(why)
    if shards == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("copy", "shard"))


def _shard(module: nn.Module, stage: StageBlock, device: torch.device, mesh: DeviceMesh) -> nn.Module:
    """Shards each entry of each ModuleList, then the rest. Units move to the device one at a time."""
    bf16, offload = stage.engine.precision == "bf16", stage.engine.cpu_offload
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
        # Pinned memory makes the copies faster; there is none without a GPU.
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    for child in reversed(list(module.modules())):  # fully_shard expects inner units first.
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block, **options)
    fully_shard(module, **options)
    return module


def _rows(tensor: DTensor) -> Tensor:
    """This rank's rows, a view of the sharded tensor's memory."""
    return tensor.to_local().detach()
