"""torch.compile for the blocks of a transformer, one at a time: alike blocks share their compiled code."""

from __future__ import annotations

import torch
import torch._dynamo
from torch import nn

# Graphs of one block's code: with and without gradients, drop-path or autocast, for the two encoders, for full and odd
# batches. Beyond the limit (torch's is 8) a block would run uncompiled with no more than a warning.
GRAPHS = 64


def compile_blocks(module: nn.Module) -> None:
    """Compiles the forward of every entry of every ModuleList in place, inside of what engines and activation
    checkpoints wrap around it. Names of parameters stay as they are."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.forward = torch.compile(block.forward)
