"""The inputs of a stage's trainable module: clips, or the frozen trunk's features of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.models.chunked import ChunkedFeatures
from sfa_dist.models.frozen import FrozenTrunk


def model_inputs(batch: Batch, frozen: FrozenTrunk | None, device: torch.device) -> Tensor | ChunkedFeatures:
    """The batch's clips on `device`, uint8; with a frozen trunk its features there, in chunks where the trunk offloads.

    Of a batch from the feature cache the trunk runs only the rows in `live`.
    """
    if batch.features is None:
        assert batch.clips is not None, "a batch has clips or features"
        # A frozen trunk moves clips to the device itself, chunk by chunk where it offloads.
        return to_device(batch.clips, device) if frozen is None else frozen(batch.clips)
    features = to_device(batch.features, device)
    if batch.clips is not None and batch.live is not None and frozen is not None:
        features[to_device(batch.live, device)] = frozen(batch.clips)
    return features


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the copy is asynchronous from page-locked memory."""
    return tensor.to(device, non_blocking=True)
