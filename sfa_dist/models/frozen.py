"""The frozen trunk at run time: bf16, inference mode, a few frames at a time.

The engine never sees it: nothing of it is sharded, optimised, reduced or checkpointed. Its weights are held once, in
bf16. It stays in eval mode whatever `.train()` is called with, and checkpoints record its sha256 instead of a copy.

Shape legend: B clips, C = 3, T frames, t tubelet, F = T / t tubelet steps, R = B * F tubelets of a batch,
r tubelets of a chunk, L tokens of a tubelet, D width.
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
from sfa_dist.models.still import still_of, still_of_tubelets
from sfa_dist.models.vivit import Trunk, normalise


class _Inward(Protocol):
    def load(self, index: int) -> Tensor: ...


class _Store(ChunkedFeatures, Protocol):
    def put(self, span: slice, value: Tensor) -> None: ...

    def whole(self) -> Tensor: ...


class OffloadLink(Protocol):
    """Moves chunks between the host's memory and the device (parallel/engines/offload.py)."""

    def inward(
        self, fill: Callable[[int, Tensor], None], spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype
    ) -> _Inward:
        """Chunks of the clips for the device; the next one is copied while this one is computed on."""

    def store(self, clips: int, spans: Sequence[slice], row_shape: Sequence[int], dtype: torch.dtype) -> _Store:
        """Allocates host memory for the trunk's output."""


class FrozenTrunk(nn.Module):
    """Runs `trunk` over uint8 clips in chunks of `chunk_frames` frames.

    Without a `link`, the device holds the clips and the output, (B, F, D) or (B, F, L, D), as a whole, and everything
    else for one chunk. With a link, the clips stay in the host's memory and the output goes there: the device holds
    two chunks of the clips and two of the tokens, whatever the number of frames. `eight_bits` rounds the weights of
    the blocks' linear layers permanently.
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
        # The folded weights rely on pixels that are whole numbers, which differences from a still image are not.
        fold = fold and trunk.subtract == "none"
        self.folded = FoldedEmbed(trunk.embed, mean, std) if fold else None
        if eight_bits is not None:
            to_eight_bits(self.trunk, eight_bits)
        self.link: OffloadLink | None = None
        self.chunk_frames = chunk_frames
        super().train(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stays in eval mode: a frozen trunk drops no branches."""
        del mode
        return super().train(False)

    def compile_blocks(self) -> None:
        """Compiles the blocks and the attention pool in place. Each kind is one graph for any number of tubelets."""
        for block in (*self.trunk.encoder.blocks, *self.trunk.encoder.attn_pool):
            block.compile(dynamic=True)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.trunk.embed.bias.device

    def forward(self, clips: Tensor) -> Tensor | ChunkedFeatures:
        """uint8 clips (B, C, T, H, W), on any device -> features (B, F, D) or (B, F, L, D) in `dtype`.

        Autograd can save the features. With a `link`, tokens come back in chunks that the host's memory holds.
        """
        batch, steps = len(clips), clips.shape[2] // self.trunk.tubelet
        tubelets = batch * steps
        size = max(1, self.chunk_frames // self.trunk.tubelet)
        spans = [slice(start, min(start + size, tubelets)) for start in range(0, tubelets, size)]
        row_shape = (self.trunk.width,) if self.pooled else (self.trunk.tokens, self.trunk.width)
        if self.link is not None:
            return self._offloaded(clips, spans, row_shape)
        clips = clips.to(self.device, non_blocking=True)
        # Allocated outside inference mode: the tail cannot save an inference tensor for backward.
        features = torch.empty((tubelets, *row_shape), dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            still = still_of(clips, self.trunk.subtract)
            for span in spans:
                chunk, own_still = self.cut_tubelets(clips, span), still_of_tubelets(still, span, steps)
                self.put_tubelets(features, span, self.run_tubelets(chunk, own_still))
        return features.unflatten(0, (batch, -1))

    def _offloaded(self, clips: Tensor, spans: list[slice], row_shape: tuple[int, ...]) -> Tensor | ChunkedFeatures:
        assert self.link is not None
        store = self.link.store(len(clips), spans, row_shape, self.dtype)
        pixels = (clips.shape[1], self.trunk.tubelet, *clips.shape[3:])
        inward = self.link.inward(lambda i, out: self.copy_tubelets(clips, spans[i], out), spans, pixels, clips.dtype)
        steps = clips.shape[2] // self.trunk.tubelet
        with torch.inference_mode():
            still = still_of(clips, self.trunk.subtract)  # Computed in the host's memory, which holds all frames.
            still = None if still is None else still.to(self.device)
            for index, span in enumerate(spans):
                store.put(span, self.run_tubelets(inward.load(index), still_of_tubelets(still, span, steps)))
        # A pooled tail takes all frames at once.
        return store.whole() if self.pooled else store

    def run_tubelets(self, tubelets: Tensor, still: Tensor | None = None) -> Tensor:
        """uint8 tubelets (r, C, t, H, W) on the device -> (r, D) or (r, L, D) in `dtype`: the work on one chunk.

        `still` (r, C, H, W) is the still image of each tubelet's clip. Raises TypeError where `model.subtract` needs it
        and it is missing, and the other way round.
        """
        if (still is None) != (self.trunk.subtract == "none"):
            needs = "takes no still images" if still is not None else "needs the still image of each tubelet's clip"
            raise TypeError(f"a trunk with model.subtract: {self.trunk.subtract} {needs}")
        if self.folded is not None:
            tokens = self.folded(tubelets)
        else:
            tokens = self.trunk.embed(normalise(tubelets, self.mean, self.std, self.dtype, still))
        tokens = self.trunk.encoder(tokens)
        return self.trunk.encoder.pool(tokens) if self.pooled else tokens

    def cut_tubelets(self, clips: Tensor, span: slice) -> Tensor:
        """Tubelets `span` of clips (B, C, T, H, W), as (r, C, t, H, W) on the clips' device."""
        shape = (span.stop - span.start, clips.shape[1], self.trunk.tubelet, *clips.shape[3:])
        out = torch.empty(shape, dtype=clips.dtype, device=clips.device)
        self.copy_tubelets(clips, span, out)
        return out

    def copy_tubelets(self, clips: Tensor, span: slice, out: Tensor) -> None:
        """Copies tubelets `span` of clips (B, C, T, H, W) into `out` (r, C, t, H, W), which may be on another device.

        To another device each channel of a tubelet is a copy, contiguous on both sides: so a copy from pinned memory
        does not block the host.
        """
        tubelets = clips.unflatten(2, (-1, self.trunk.tubelet)).transpose(1, 2)  # (B, F, C, t, H, W), a view.
        if clips.device == out.device:
            copy_rows(tubelets, span, out)
            return
        steps = tubelets.shape[1]
        for slot, index in enumerate(range(span.start, span.stop)):
            for own, channel in zip(out[slot], tubelets[divmod(index, steps)], strict=True):
                own.copy_(channel, non_blocking=True)

    def put_tubelets(self, features: Tensor, span: slice, value: Tensor) -> None:
        """Copies the output of one chunk, (r, ...), to its place in the features (R, ...)."""
        features[span] = value

    def sha256(self) -> str:
        """Hex sha256 over the names, dtypes, shapes and bytes of all weights; the folded copy is left out."""
        return module_sha256(self.trunk)


def copy_rows(rows: Tensor, span: slice, out: Tensor) -> None:
    """Copies rows `span` of (B, F, ...), counted over both dimensions, into `out` (r, ...), by at most three copies."""
    steps, start = rows.shape[1], span.start
    while start < span.stop:
        first, step = divmod(start, steps)
        whole = (span.stop - start) // steps if step == 0 else 0
        count = whole * steps or min(steps - step, span.stop - start)
        target = out[start - span.start : start - span.start + count]
        if whole:
            target.unflatten(0, (whole, steps)).copy_(rows[first : first + whole])
        else:
            target.copy_(rows[first, step : step + count])
        start += count


def cast(trunk: Trunk, dtype: torch.dtype) -> Trunk:
    """The trunk in `dtype`. One that has it already is left alone: a module's fake tensors cannot be replaced."""
    if any(parameter.dtype != dtype for parameter in trunk.parameters()):
        trunk.to(dtype)
    return trunk


def module_sha256(module: nn.Module) -> str:
    """Hex sha256 over the names, dtypes, shapes and bytes of a module's state, in order of names."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
