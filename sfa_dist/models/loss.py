"""The loss of a clip, and its sum over the clips that count.

A clip has one label (B,), or a noun and a verb (B, 2). The logits of several heads stand side by side, divided by
`sizes`, (300, 97); () is a single head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, sizes: Sequence[int] = ()) -> Tensor:
    """Cross-entropy of each clip, (B,): logits (B, classes), labels int64 (B,), or (B, heads) where the logits are
    divided by `sizes`. The unweighted mean of the heads', each smoothed over its own classes."""
    if not sizes:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    heads = zip(logits.split(list(sizes), dim=1), labels.unbind(dim=1), strict=True)
    losses = [F.cross_entropy(*head, reduction="none", label_smoothing=label_smoothing) for head in heads]
    return torch.stack(losses).mean(dim=0)


def weighted_loss_sum(
    logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float, sizes: Sequence[int] = ()
) -> Tensor:
    """Sum over clips of weight x `clip_losses`: logits (B, classes) fp32, weights (B,) fp32.

    Padding and bad clips have weight 0; the caller divides by the global batch's sum of weights.
    """
    # Logits of what is no clip may be anything. They are masked before the loss: a mask behind it would keep a NaN out
    # of the sum, but backward would let it through as 0 x NaN.
    logits = torch.where((weights > 0)[:, None], logits, 0.0)
    return (clip_losses(logits, labels, label_smoothing, sizes) * weights).sum()


def mixed_loss_sum(
    logits: Tensor,
    labels: Tensor,
    partners: Tensor,
    shares: Tensor,
    weights: Tensor,
    label_smoothing: float,
    sizes: Sequence[int] = (),
) -> Tensor:
    """`weighted_loss_sum` of clips that mixup blended: `shares` (B,) of each clip's own labels, the rest of those of
    its partner, as `labels`."""
    own = weighted_loss_sum(logits, labels, weights * shares, label_smoothing, sizes)
    return own + weighted_loss_sum(logits, partners, weights * (1 - shares), label_smoothing, sizes)
