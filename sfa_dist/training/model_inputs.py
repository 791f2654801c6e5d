"""What a stage's trainable module takes: clips, or what the frozen trunk makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.models.chunked import ChunkedFeatures
from sfa_dist.models.frozen import FrozenTrunk


def model_inputs(batch: Batch, frozen: FrozenTrunk | None, device: torch.device) -> Tensor | ChunkedFeatures:
    """A batch's clips on `device`; with a frozen trunk its features there, or in chunks where the trunk offloads."""
    if batch.features is None:
        assert batch.clips is not None, "a batch has clips or features"
        # A frozen trunk brings clips to the device itself: chunk by chunk, where it offloads.
        return to_device(batch.clips, device) if frozen is None else frozen(batch.clips)
    features = to_device(batch.features, device)
    if batch.clips is not None and batch.live is not None and frozen is not None:
        features[to_device(batch.live, device)] = frozen(batch.clips)
    return features


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from page-locked memory the copy does not wait."""
    return tensor.to(device, non_blocking=True)
