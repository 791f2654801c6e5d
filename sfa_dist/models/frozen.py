"""The frozen trunk's runtime: bf16, inference mode, a few frames at a time.

It stands outside the engine: nothing of it is sharded, optimised, reduced or checkpointed. Its weights are held once in
bf16, it stays in eval mode whatever `.train()` is called, and its sha256 stands in the checkpoint instead of a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sfa_dist.models.vivit import Trunk, normalise


class FrozenTrunk(nn.Module):
    """Runs `trunk` over uint8 clips in chunks of `chunk_frames` frames.

    Peak memory is that of one chunk plus the output, (B, F, D) or (B, F, L, D), so it does not grow with the frames
    of a clip
    beyond what the tail needs to see.
    """

    def __init__(
        self,
        trunk: Trunk,
        chunk_frames: int,
        pooled: bool = True,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.trunk = trunk.to(dtype).requires_grad_(False)
        self.chunk_rows = max(1, chunk_frames // trunk.tubelet)
        self.pooled, self.dtype = pooled, dtype
        self.mean, self.std = tuple(mean), tuple(std)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stays in eval mode: a frozen trunk has no dropped branches and no moving statistics."""
        del mode
        return super().train(False)

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 clips (B, C, T, H, W) -> features (B, F, D) or (B, F, L, D) in `dtype`, ready for autograd."""
        batch, steps = clips.shape[0], clips.shape[2] // self.trunk.tubelet
        rows = self.trunk.rows(clips)
        shape = (len(rows), self.trunk.width) if self.pooled else (len(rows), self.trunk.tokens, self.trunk.width)
        # Made outside of inference mode: an inference tensor could not be saved for backward by the tail.
        features = torch.empty(shape, dtype=self.dtype, device=clips.device)
        with torch.inference_mode():
            for start in range(0, len(rows), self.chunk_rows):
                chunk = normalise(rows[start : start + self.chunk_rows], self.mean, self.std, self.dtype)
                features[start : start + self.chunk_rows] = self.trunk.forward_rows(chunk, pooled=self.pooled)
        return features.unflatten(0, (batch, steps))

    def sha256(self) -> str:
        """Hash over names, dtypes, shapes and bytes of all weights."""
        return module_sha256(self.trunk)


def module_sha256(module: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a module's state, in order of names."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
