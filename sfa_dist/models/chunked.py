"""A function over features that are held outside the device: they come chunk by chunk and are not kept for backward.

The trunk is frozen, so the features need no gradient; only the function's parameters get one. The function's value for
a chunk does not depend on other chunks, so backward recomputes it chunk by chunk. The device holds one chunk, and the
next one on its way, whatever the number of frames.

Shape legend: B clips, F tubelet steps, R = B * F tubelets of a batch, r tubelets of a chunk,
L tokens of a tubelet, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# `function` adds the chunks' gradients in fp32 and needs whole parameters on each rank. `checkpoint` leaves forward and
# backward to autograd, so that an engine's hooks can gather sharded parameters.
Recompute = Literal["function", "checkpoint"]


class ChunkedFeatures(Protocol):
    """Features (R, L, D) that are held outside the device and loaded in chunks of tubelets."""

    clips: int  # B

    @property
    def spans(self) -> Sequence[slice]:
        """The tubelets of each chunk, in order."""

    def load(self, index: int) -> Tensor:
        """Chunk `index`, (r, L, D) on the device. It is valid until the next call."""


def over_chunks(
    run: Callable[[Tensor], Tensor], features: ChunkedFeatures, parameters: Sequence[Tensor], recompute: Recompute
) -> Tensor:
    """Applies `run` to each chunk, (r, L, D) -> (r, D'), and joins the results to (B, F, D').

    `parameters` are all trained parameters of `run`; `recompute` sets how backward computes the chunks again.
    """
    if recompute == "checkpoint":
        chunks = [
            checkpoint(lambda i: run(features.load(i)), index, use_reentrant=False)
            for index in range(len(features.spans))
        ]
        out: Tensor = torch.cat(chunks)
    else:
        out = _OverChunks.apply(run, features, *parameters)
    return out.unflatten(0, (features.clips, -1))


class _OverChunks(torch.autograd.Function):
    """Forward saves no chunk; backward runs each one again and adds the parameters' gradients in fp32."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], features: ChunkedFeatures, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.features = run, features
        ctx.save_for_backward(*parameters)
        kind = parameters[0].device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        ctx.kind = kind
        # No cache: autocast would cache weights without a graph, and backward, which needs one, would reuse them.
        out: Tensor | None = None
        with torch.autocast(kind, **ctx.autocast, cache_enabled=False):
            for index, span in enumerate(features.spans):
                chunk = run(features.load(index))
                if out is None:
                    out = chunk.new_empty(features.spans[-1].stop, *chunk.shape[1:])
                out[span] = chunk
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parameters, features = ctx.saved_tensors, ctx.features
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for index, span in enumerate(features.spans):
            with torch.enable_grad(), torch.autocast(ctx.kind, **ctx.autocast, cache_enabled=False):
                out = ctx.run(features.load(index))
            for total, gradient in zip(sums, torch.autograd.grad(out, parameters, grads[0][span]), strict=True):
                total += gradient
        return None, None, *(total.to(p.dtype) for total, p in zip(sums, parameters, strict=True))
