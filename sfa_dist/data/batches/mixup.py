"""Mixup: blends each training clip with another clip of its batch, and the losses of their two labels alike.

As in the official code (scenic dataset_utils.mixup), a batch is paired with its reverse and has one share, drawn from
Beta(alpha, alpha): a row becomes share x itself + (1 - share) x its mirror image. The official code mixes the batch of
a device, which changes nothing where a device holds one clip. Here it is the global batch (`over: global`: the same
pairs and shares for any number of ranks) or the micro-batch (`over: device`).

Shares are keyed by (seed, epoch, step), so that a resumed run mixes exactly as an uninterrupted one. Labels are not
blended: a batch carries both (`Batch.labels`, `Batch.mix`), and the loss is
share x loss(labels) + (1 - share) x loss(partners), which also works with label smoothing. Padding and bad clips are
never mixed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from sfa_dist.data.batches.batch import Batch, Mix
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.data.sampling.sample_plan import Ids

_ELEMENTS_AT_ONCE = 1 << 20  # Blending works in float32: this many elements fit into the CPU cache.


def mirrored(positions: Ids, batch_size: int) -> Ids:
    """Positions, int64 of any shape, -> those of their partners in the reversed global batch; -1 stays -1."""
    step, slot = np.divmod(positions, batch_size)
    return np.where(positions >= 0, step * batch_size + batch_size - 1 - slot, -1)


def draw_share(alpha: float, seed: int, epoch: int, step: int, micro_batch: int | None = None) -> float:
    """The share of itself that each clip of a step keeps, or each of one micro-batch, numbered over all ranks."""
    purpose = "mixup" if micro_batch is None else f"mixup of micro-batch {micro_batch}"
    return beta_share(sample_rng(seed, epoch, step, purpose), alpha)


def beta_share(rng: np.random.Generator, alpha: float) -> float:
    """One draw of Beta(alpha, alpha) for alpha in (0, 1], from uniform numbers alone (Joehnk 1964)."""
    while True:
        first, second = float(rng.random()) ** (1 / alpha), float(rng.random()) ** (1 / alpha)
        if 0 < first + second <= 1:
            return first / (first + second)


def mix(
    batch: Batch, name: Literal["clips", "features"], partners: Ids, share: float, read: Callable[[Ids], Batch]
) -> None:
    """Blends each row of field `name`, (B, ...), with the sample in `partners`, and sets `batch.mix`.

    `partners` is int64 (B,), -1 for none. `read` returns a batch of the samples that this one lacks.
    """
    ids = batch.ids.numpy()
    partners = np.where((ids >= 0) & (partners >= 0), partners, ids)  # Padding, and a clip paired with it, stay alone.
    absent = np.setdiff1d(partners, ids)
    batches = [batch, read(absent)] if len(absent) else [batch]
    row_of = {int(sample): row for row, sample in enumerate(np.concatenate([ids, absent]))}
    rows = torch.tensor([row_of[int(sample)] for sample in partners])
    labels, weights = (torch.cat([getattr(each, key) for each in batches])[rows] for key in ("labels", "weights"))
    real = (weights > 0) & (batch.weights > 0) & (rows != torch.arange(len(rows)))
    shares = torch.where(real, share, 1.0).to(torch.float32)
    own, *others = (getattr(each, name) for each in batches)
    mixed = torch.empty_like(own)
    for row, at in enumerate(rows.tolist()):
        other = own[at] if at < len(ids) else others[0][at - len(ids)]
        mixed[row] = blend(own[row], other, float(shares[row]))
    setattr(batch, name, mixed)
    batch.mix = Mix(labels, shares)


def blend(own: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """share x own + (1 - share) x other, computed in float32, in the dtype of `own`; uint8 is rounded."""
    if share == 1.0:
        return own
    parts = []
    for a, b in zip(own.flatten().split(_ELEMENTS_AT_ONCE), other.flatten().split(_ELEMENTS_AT_ONCE), strict=True):
        part = a.float() * share + b.float() * (1 - share)
        parts.append((part if own.is_floating_point() else part.round_()).to(own.dtype))
    return torch.cat(parts).view(own.shape)
