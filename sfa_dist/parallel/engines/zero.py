"""The DeepSpeed engine: ZeRO 0 to 3. The only module that imports deepspeed.

ZeRO 1, 2 and 3 hold parameters in bf16 (or fp32) and sharded fp32 masters. ZeRO 0 in bf16 holds fp32 parameters and
runs under torch's autocast, because DeepSpeed's own replicated bf16 optimizer drifts from the other stages: after three
AdamW steps of a toy model its loss was off by 5 %, where stages 1 to 3 agree with fp32 to 0.5 %.

This engine takes the stage that it is given on any number of ranks; `StageBlock.on_ranks` gives one rank ZeRO 0.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.engines.engine import Fragment
from sfa_dist.parallel.engines.optimizers import make_optimizer, moments_of, reset_state, set_lr
from sfa_dist.parallel.engines.zero_config import check_known_keys, derive_config, limit_buckets
from sfa_dist.parallel.environment import set_default, temporarily
from sfa_dist.recipe.schema import StageBlock

CLIP_EPS = 1e-6  # torch adds it to the norm before it divides.


class ZeroEngine:
    """`module` sharded and stepped by DeepSpeed as `stage` says; `accumulation` micro-batches make a step.

    Raises RecipeError for settings that DeepSpeed refuses.
    """

    def __init__(self, module: nn.Module, stage: StageBlock, accumulation: int, device: torch.device) -> None:
        deepspeed = _import_deepspeed()
        config = derive_config(stage, dist.get_world_size(), accumulation)
        limit_buckets(config, sum(p.numel() for p in module.parameters()))
        deepspeed.init_distributed(dist_init_required=False)  # Uses the process group that exists.
        check_known_keys(config, deepspeed.DeepSpeedConfig)
        self.stage_number = stage.engine.zero
        self.owners = stage.engine.shards(dist.get_world_size())
        if self.stage_number == 0:
            config["gradient_clipping"] = 0.0  # step() clips.
        self.moments = moments_of(stage.optimizer)
        self.clip_norm = stage.optimizer.clip_norm
        self.device = device
        self.module = module.to(device)
        self._offloaded = stage.engine.cpu_offload
        # DeepSpeed rounds the parameters to bf16 before it makes the masters from them: put the exact values back.
        exact = (
            {name: p.detach().to("cpu", copy=True) for name, p in self._named()} if config["bf16"]["enabled"] else {}
        )
        try:
            # DeepSpeed takes the GPU with the number LOCAL_RANK, also where this rank is shown only its own.
            with temporarily("LOCAL_RANK", str(device.index)) if device.type == "cuda" else nullcontext():
                self._engine, *_ = deepspeed.initialize(
                    model=self.module,
                    optimizer=make_optimizer(dict(self._named()), stage.optimizer),
                    config=config,
                    dist_init_required=False,
                )
        except (AssertionError, ValueError) as error:
            raise RecipeError(f"DeepSpeed refuses the recipe's engine settings: {error}") from error
        if self.stage_number == 0 and dist.get_world_size() == 1:
            # On one rank there is nothing to reduce, but DeepSpeed would still copy all gradients into a buffer and
            # back, which takes longer than the forward pass of a step on stored features.
            self._engine.enable_backward_allreduce = False
        self._optimizer: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        for fragment in self.fragments() if exact else ():
            source = exact[fragment.name].flatten()[fragment.start : fragment.start + fragment.numel]
            fragment.tensors["master"].copy_(source)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.module.named_parameters())

    def forward(self, inputs: object) -> Tensor:
        self._engine.train()
        return self._engine(inputs)

    @torch.no_grad()
    def evaluate(self, inputs: object) -> Tensor:
        self._engine.eval()
        return self._engine(inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # Only counts the micro-batch.

    def step(self, lr: float) -> float:
        set_lr(self._optimizer, lr)
        norm = self._clip_replicated() if self.stage_number == 0 else None
        self._engine.step()
        value = float(self._engine.get_global_grad_norm() if norm is None else norm)
        if self._offloaded and self.stage_number < 3 and not math.isfinite(value):
            # DeepSpeed (0.19.8) skips the step, but would add all later gradients to those of this step.
            zero = self._engine.optimizer
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        return value

    def _clip_replicated(self) -> Tensor:
        """Clips ZeRO 0's averaged gradients as ZeRO 1 to 3 do, and returns their norm.

        DeepSpeed's ZeRO 0 does not report the norm that it clips by, and steps on gradients that are not finite.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in self._named() if p.grad is not None])
        if not math.isfinite(norm):
            self.module.zero_grad()  # Without gradients the step changes nothing.
        elif 0 < self.clip_norm < float(norm + CLIP_EPS):  # A smaller norm would only be multiplied by one.
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip_norm, norm)
        return norm

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._named()}

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._named():
            located = self._locate(parameter)
            if located is not None:
                start, flat, offset, numel = located
                state = self._optimizer.state.get(flat, {})
                tensors = {"master": flat.detach().view(-1)[offset : offset + numel]}
                tensors |= {key: state[key].view(-1)[offset : offset + numel] for key in self.moments if key in state}
                yield Fragment(name, start, numel, tensors)

    def _locate(self, parameter: nn.Parameter) -> tuple[int, nn.Parameter, int, int] | None:
        """This rank's piece of a parameter: (start in the parameter, flat master, offset in it, length), or None."""
        zero: Any = self._engine.optimizer
        if self.stage_number == 0:
            return 0, parameter, 0, parameter.numel()
        if self.stage_number == 3:
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = padded * dist.get_rank()
            numel = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            return (start, zero.fp32_partitioned_groups_flat[group], offset, numel) if numel > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat_groups = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        flat = flat_groups[mapping.param_group_index]
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return here.start, flat, there.start, here.numel

    def make_optimizer_state(self, step: int) -> None:
        reset_state(self._optimizer, self._masters(), self.moments, step)

    def _masters(self) -> list[nn.Parameter]:
        """The tensors that the optimizer steps.

        ZeRO-3 lends them to the optimizer one at a time, so the optimizer's own list holds only the last one.
        """
        if self.stage_number == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def full_parameters(self) -> dict[str, Tensor]:
        if self.stage_number == 0:
            return {name: p.detach().float().to("cpu", copy=True) for name, p in self._named()}
        mine = {f.name: f for f in self.fragments()}
        full: dict[str, Tensor] = {}
        for name, parameter in self._named():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            value = torch.zeros(shape.numel(), dtype=torch.float32)
            if name in mine:
                piece = mine[name]
                value[piece.start : piece.start + piece.numel] = piece.tensors["master"].cpu()
            dist.reduce(value, dst=0)  # Each element is owned by one rank and is zero on the others.
            if dist.get_rank() == 0:
                full[name] = value.view(shape)
        return full

    def optimizer_bytes(self) -> int:
        return sum(4 * f.numel * (1 + len(self.moments)) for f in self.fragments())


def activation_checkpoint(offload: bool) -> Callable[..., Any]:
    """DeepSpeed's `checkpoint(function, *args)`, which saves the arguments: in host memory if `offload`."""
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    # Without a GPU the arguments are in host memory already. DeepSpeed (0.19.8) makes no second copy there and would
    # empty them.
    offload = offload and torch.cuda.is_available()
    checkpointing = deepspeed.checkpointing
    checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=offload)
    return checkpointing.checkpoint


def _import_deepspeed() -> Any:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    if not torch.cuda.is_available():
        set_default("DS_ACCELERATOR", "cpu")  # Otherwise DeepSpeed warns that it finds no accelerator.
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile a shared-memory op, which takes minutes and a compiler; only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
