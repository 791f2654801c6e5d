"""torch.compile for the blocks of a transformer, one at a time: identical blocks share their compiled code."""

from __future__ import annotations

import torch
import torch._dynamo
from torch import nn

# Compiled graphs of one block: with and without gradients, drop-path or autocast, for both encoders, for full and
# partial batches. Beyond the limit (8 by default) torch runs a block uncompiled, with no more than a warning.
GRAPHS = 64


def compile_blocks(module: nn.Module) -> None:
    """Compiles the forward of every block (entry of a ModuleList) in place; parameters keep their names.

    The compiled code is inside the wrappers of engines and activation checkpoints.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.forward = torch.compile(block.forward)
