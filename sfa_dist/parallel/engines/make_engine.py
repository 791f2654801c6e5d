"""Makes the engine that a recipe names."""

from __future__ import annotations

import torch
from torch import nn

from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.recipe.schema import StageBlock


def make_engine(module: nn.Module, stage: StageBlock, accumulation: int, device: torch.device) -> Engine:
    """The engine that `stage.engine` names, around `module`; `accumulation` micro-batches of a rank make a step.

    The engine owns the module from now on. Collective. Raises RecipeError for settings that the library refuses,
    ValueError if a parameter is frozen: an engine takes trainable ones only.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ValueError(f"the engine takes trainable parameters only, but got frozen {frozen[:3]}")
    # A library is imported only by the run that uses it: deepspeed alone takes seconds.
    if stage.engine.is_exact:
        from sfa_dist.parallel.engines.exact import ExactEngine

        return ExactEngine(module, stage, accumulation, device)
    if stage.engine.uses_fsdp:
        from sfa_dist.parallel.engines.fsdp import FsdpEngine

        return FsdpEngine(module, stage, accumulation, device)
    from sfa_dist.parallel.engines.zero import ZeroEngine

    return ZeroEngine(module, stage, accumulation, device)
