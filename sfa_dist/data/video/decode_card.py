"""Decoding on the rank's own GPU (`data.decode_device: cuda`): which GPU, and on which CUDA stream.

The GPU decodes, resizes and augments. Finished clips go back to the host, where batches are made as usual, so later
steps are the same. This happens in the loader's thread of the training process: a loader process cannot share the CUDA
context, and a context of its own would take hundreds of MiB of GPU memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from sfa_dist.errors import RecipeError

CPU = torch.device("cpu")


def own_card() -> torch.device:
    """The GPU of this process. Raises RecipeError if there is none."""
    if not torch.cuda.is_available():
        raise RecipeError("data.decode_device: cuda needs a GPU, and there is none here: set data.decode_device to cpu")
    return torch.device("cuda", torch.cuda.current_device())


def beside_training(device: torch.device) -> AbstractContextManager[object]:
    """Queues the work inside the block on a CUDA stream for decoding, so that it does not wait for training.

    It does nothing on a CPU. Every thread that decodes enters it, because the current stream belongs to a thread.
    """
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
