"""Decoding on the rank's own card (`data.decode_device: cuda`): which card that is, beside what, and whether it can.

The card decodes, resizes and augments; finished clips go back to the host, where batches are put together as ever, so
nothing that comes after knows the difference. It happens in the training process, in the loader's thread: a loader
process cannot share the card's context, and one of its own would take hundreds of MiB of the card.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from sfa_dist.errors import RecipeError

CPU = torch.device("cpu")


def own_card() -> torch.device:
    """This process's card. Raises RecipeError where there is none."""
    if not torch.cuda.is_available():
        raise RecipeError("data.decode_device: cuda needs a GPU, and there is none here: set data.decode_device to cpu")
    return torch.device("cuda", torch.cuda.current_device())


def beside_training(device: torch.device) -> AbstractContextManager[object]:
    """Work inside is queued on the card's stream for decoding, so that it does not wait for training's; on a CPU it
    is just done. Every thread that has a part in decoding enters it: the current stream is a matter of each."""
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
