"""The frozen trunk's runtime: bf16, inference mode, a few frames at a time.

It stands outside the engine: nothing of it is sharded, optimised, reduced or checkpointed. Its weights are held once in
bf16, it stays in eval mode whatever `.train()` is called, and its sha256 stands in the checkpoint instead of a copy.

Shape legend: B clips, C = 3, T frames, t tubelet, F = T / t tubelet steps, R = B * F rows, L tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sfa_dist.models.chunked import ChunkedFeatures
from sfa_dist.models.eight_bits import EightBits, to_eight_bits
from sfa_dist.models.folding import FoldedEmbed
from sfa_dist.models.still import still_of, still_rows
from sfa_dist.models.vivit import Trunk, normalise


class _Inward(Protocol):
    def load(self, index: int) -> Tensor: ...


class _Store(ChunkedFeatures, Protocol):
    def put(self, span: slice, value: Tensor) -> None: ...

    def whole(self) -> Tensor: ...


class OffloadLink(Protocol):
    """What moves chunks between the host's memory and the device (parallel/offload.py)."""

    def inward(
        self, fill: Callable[[int, Tensor], None], spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype
    ) -> _Inward:
        """Chunks of the clip for the device, the next beside the computation on this one."""

    def store(self, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype) -> _Store:
        """Room in the host's memory for what the trunk puts out."""


class FrozenTrunk(nn.Module):
    """Runs `trunk` over uint8 clips in chunks of `chunk_frames` frames.

    Without a `link` the clip and the output, (B, F, D) or (B, F, L, D), stand on the device, and all else is that of
    one chunk. With one, the clip stays in the host's memory and the output goes there: the device holds two chunks of
    the clip and of the tokens, whatever the number of frames. `eight_bits` rounds the blocks' linear layers, for good.
    """

    def __init__(
        self,
        trunk: Trunk,
        chunk_frames: int,
        pooled: bool = True,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        dtype: torch.dtype = torch.bfloat16,
        fold: bool = True,
        eight_bits: EightBits | None = None,
    ) -> None:
        super().__init__()
        self.trunk = cast(trunk, dtype).requires_grad_(False)
        self.pooled, self.dtype = pooled, dtype
        self.mean, self.std = tuple(mean), tuple(std)
        # Less what does not move, pixels are no whole numbers any more, which the folded weights rely on.
        fold = fold and trunk.subtract == "none"
        self.folded = FoldedEmbed(trunk.embed, mean, std) if fold else None
        if eight_bits is not None:
            to_eight_bits(self.trunk, eight_bits)
        self.link: OffloadLink | None = None
        self.chunk_frames = chunk_frames
        super().train(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stays in eval mode: a frozen trunk has no dropped branches and no moving statistics."""
        del mode
        return super().train(False)

    def compile_blocks(self) -> None:
        """Compiles the transformer's blocks; they share one compiled graph, which takes any number of rows."""
        for block in self.trunk.encoder.blocks:
            block.compile(dynamic=True)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.trunk.embed.bias.device

    def forward(self, clips: Tensor) -> Tensor | ChunkedFeatures:
        """uint8 clips (B, C, T, H, W), on the device or not -> features (B, F, D) or (B, F, L, D) in `dtype`, ready
        for autograd; with a `link`, tokens in chunks outside of the device."""
        batch, steps = len(clips), clips.shape[2] // self.trunk.tubelet
        rows = batch * steps
        size = max(1, self.chunk_frames // self.trunk.tubelet)
        spans = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        row_shape = (self.trunk.width,) if self.pooled else (self.trunk.tokens, self.trunk.width)
        if self.link is not None:
            return self._offloaded(clips, spans, row_shape)
        clips = clips.to(self.device, non_blocking=True)
        # Made outside of inference mode: an inference tensor could not be saved for backward by the tail.
        features = torch.empty((rows, *row_shape), dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            still = still_of(clips, self.trunk.subtract)
            for span in spans:
                cut = cut_rows(clips, self.trunk.tubelet, span)
                put_rows(features, span, self.run_rows(cut, still_rows(still, span, steps)))
        return features.unflatten(0, (batch, -1))

    def _offloaded(self, clips: Tensor, spans: list[slice], row_shape: tuple[int, ...]) -> Tensor | ChunkedFeatures:
        assert self.link is not None
        tubelet = self.trunk.tubelet
        store = self.link.store(len(clips), spans, row_shape, self.dtype)
        pixels = (clips.shape[1], tubelet, *clips.shape[3:])
        inward = self.link.inward(lambda i, out: copy_rows(clips, tubelet, spans[i], out), spans, pixels, clips.dtype)
        steps = clips.shape[2] // tubelet
        with torch.inference_mode():
            still = still_of(clips, self.trunk.subtract)  # In the host's memory, where all frames are.
            still = None if still is None else still.to(self.device)
            for index, span in enumerate(spans):
                store.put(span, self.run_rows(inward.load(index), still_rows(still, span, steps)))
        # A pooled tail looks at all frames at once.
        return store.whole() if self.pooled else store

    def run_rows(self, rows: Tensor, still: Tensor | None = None) -> Tensor:
        """uint8 rows (r, C, t, H, W) on the device -> (r, D) or (r, L, D): what one chunk costs.

        `still` (r, C, H, W) is what does not move in the clips that the rows are of. Raises TypeError where
        `model.subtract` needs it and it is not there.
        """
        if (still is None) != (self.trunk.subtract == "none"):
            raise TypeError(f"rows of a trunk with model.subtract: {self.trunk.subtract} need the clips they are of")
        if self.folded is not None:
            tokens = self.folded(rows)
        else:
            tokens = self.trunk.embed(normalise(rows, self.mean, self.std, self.dtype, still))
        tokens = self.trunk.encoder(tokens)
        return self.trunk.encoder.pool(tokens) if self.pooled else tokens

    def sha256(self) -> str:
        """Hash over names, dtypes, shapes and bytes of all weights; the folded copy, which follows from them, is not
        part of it."""
        return module_sha256(self.trunk)


def cast(trunk: Trunk, dtype: torch.dtype) -> Trunk:
    """The trunk in `dtype`. One that is in it already is not touched: fake tensors cannot be swapped in a module."""
    if any(parameter.dtype != dtype for parameter in trunk.parameters()):
        trunk.to(dtype)
    return trunk


def cut_rows(clips: Tensor, tubelet: int, span: slice) -> Tensor:
    """Rows `span` of clips (B, C, T, H, W), as (r, C, t, H, W) on the clips' device; nothing else is copied."""
    shape = (span.stop - span.start, clips.shape[1], tubelet, *clips.shape[3:])
    out = torch.empty(shape, dtype=clips.dtype, device=clips.device)
    copy_rows(clips, tubelet, span, out)
    return out


def put_rows(features: Tensor, span: slice, value: Tensor) -> None:
    """`value` (r, ...) into rows `span` of features (R, ...)."""
    features[span] = value


def copy_rows(clips: Tensor, tubelet: int, span: slice, out: Tensor) -> None:
    """Rows `span` of clips (B, C, T, H, W) into `out` (r, C, t, H, W), which may be on another device.

    One channel of a row is one run of memory on both sides, so a copy from pinned memory waits for nothing.
    """
    steps = clips.shape[2] // tubelet
    for place, row in enumerate(range(span.start, span.stop)):
        clip, step = divmod(row, steps)
        for channel in range(clips.shape[1]):
            frames = clips[clip, channel, step * tubelet : (step + 1) * tubelet]
            out[place, channel].copy_(frames, non_blocking=True)


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
