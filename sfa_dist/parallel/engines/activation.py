"""What happens to the activations of the trained blocks between forward and backward.

Every entry of every ModuleList is a block. Its `forward` is replaced on the instance, so that parameter names,
the engines' hooks and the types stay as they are.

| mode               | kept on the device      | moved to the host | computed twice | backends                      |
|--------------------|-------------------------|-------------------|----------------|-------------------------------|
| keep               | everything              | -                 | -              |                               |
| checkpoint         | each block's input      | -                 | every block    | torch, fairscale, deepspeed   |
| offload            | nothing but weights     | everything else   | -              | torch                         |
| checkpoint_offload | nothing                 | each block's input| every block    | torch, fairscale, deepspeed   |

DeepSpeed's checkpoint_offload needs a GPU; on a CPU it is the same as its checkpoint.

torch's checkpoint here is the non-reentrant one; those of fairscale and DeepSpeed are reentrant. Each replays the
random numbers of the forward (drop-path) in the second forward.
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
from sfa_dist.recipe.schema import StageBlock

Run = Callable[..., Any]


@dataclass
class Moved:
    """Bytes that torch's hooks have moved to the host so far. Other backends do not report them."""

    bytes: int = 0


def treat_activations(module: nn.Module, stage: StageBlock) -> Moved:
    """Replaces the forward of `module`'s blocks as `stage.activation` and `stage.activation_backend` say.

    Raises RecipeError if the backend's library is not installed.
    """
    moved = Moved()
    if stage.activation == "keep":
        return moved
    offload = stage.activation.endswith("offload")
    for block in [block for blocks in module.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]:
        if stage.activation_backend == "fairscale":
            _fairscale_wrapper()(block, offload_to_cpu=offload)
            continue
        if stage.activation_backend == "deepspeed":
            run: Run = partial(_deepspeed_checkpoint(offload), block.forward)
        else:
            recompute = stage.activation.startswith("checkpoint")
            run = partial(checkpoint, block.forward, use_reentrant=False) if recompute else block.forward
            run = partial(_save_to_host, run, block, moved) if offload else run
        block.forward = partial(_if_grad_enabled, run, block.forward)
    return moved


def _if_grad_enabled(run: Run, plain: Run, *args: Any) -> Any:
    """`plain` under no_grad: without a backward there is nothing to save."""
    return run(*args) if torch.is_grad_enabled() else plain(*args)


def _save_to_host(run: Run, block: nn.Module, moved: Moved, *args: Any) -> Any:
    with ToHost(block, moved):
        return run(*args)


class ToHost(saved_tensors_hooks):
    """Moves tensors that autograd saves inside the block to (pinned) host memory, and back when backward needs them.

    Like torch's save_on_cpu, but the block's own weights, which stay on the device anyway, are not moved: in a
    transformer block they are most of what is saved.
    """

    def __init__(self, block: nn.Module, moved: Moved) -> None:
        own = {p.untyped_storage().data_ptr() for p in block.parameters()}

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
            if tensor.untyped_storage().data_ptr() in own:
                return tensor
            pinned = tensor.device.type == "cuda"
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            host.copy_(tensor, non_blocking=True)
            moved.bytes += host.nbytes
            return tensor.device, host

        def unpack(packed: tuple[torch.device, Tensor] | Tensor) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True, copy=True)

        super().__init__(pack, unpack)


def _fairscale_wrapper() -> Callable[..., nn.Module]:
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError as error:
        raise RecipeError(
            f"activation_backend: fairscale cannot be used ({error}): pip install 'sfa_dist[fairscale]', "
            "or use activation_backend: torch"
        ) from error
    return checkpoint_wrapper


def _deepspeed_checkpoint(offload: bool) -> Run:
    from sfa_dist.parallel.engines.zero import activation_checkpoint

    return activation_checkpoint(offload)
