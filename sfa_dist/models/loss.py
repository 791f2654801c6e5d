"""The loss of a clip, and its sum over the clips that count.

A clip has one label (B,), or a noun and a verb (B, 2). The logits of several class heads are concatenated, and `sizes`
divides them, such as (300, 97); () is a single head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, sizes: Sequence[int] = ()) -> Tensor:
    """Cross-entropy of each clip, (B,): logits (B, classes), labels int64 (B,), or (B, heads) with `sizes`.

    Of several heads it is the unweighted mean, each smoothed over its own classes.
    """
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
    # The logits of padding may hold anything. They are masked before the loss: a mask after it would keep a NaN out of
    # the sum, but backward would multiply 0 x NaN.
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
    """`weighted_loss_sum` of clips that mixup blended.

    `shares` (B,) is the weight of a clip's own label, 1 - `shares` that of its partner's. `partners` holds the labels
    of the partners, shaped as `labels`.
    """
    own = weighted_loss_sum(logits, labels, weights * shares, label_smoothing, sizes)
    return own + weighted_loss_sum(logits, partners, weights * (1 - shares), label_smoothing, sizes)
