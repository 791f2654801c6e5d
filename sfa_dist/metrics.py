"""Loss and accuracy, each as sums that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_loss_sum(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """Sum over clips of weight x cross-entropy: logits (B, classes) fp32, labels (B,) int64, weights (B,) fp32.

    Padding and bad clips have weight 0; the caller divides by the global batch's sum of weights.
    """
    # Logits of what is no clip may be anything. They are masked before the loss: a mask behind it would keep a NaN out
    # of the sum, but backward would let it through as 0 x NaN.
    logits = torch.where((weights > 0)[:, None], logits, 0.0)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights).sum()


@dataclass
class ClassificationSums:
    """Top-1, top-5 and loss as plain sums: (correct at 1, correct at 5, loss, clips)."""

    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds clips: logits (B, classes), labels (B,), weights (B,) where 0 means "not a clip"."""
        real = weights > 0
        logits, labels = logits[real].float(), labels[real]
        if not len(labels):
            return
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        batch = [top[:, 0].sum().item(), top.any(dim=1).sum().item(), loss.item(), float(len(labels))]
        self.sums = [old + new for old, new in zip(self.sums, batch, strict=True)]

    def result(self) -> dict[str, float | int]:
        """acc1, acc5 and mean loss; without a clip there is no accuracy, and the values are NaN."""
        one, five, loss, count = self.sums
        nan = float("nan")
        return {
            "acc1": one / count if count else nan,
            "acc5": five / count if count else nan,
            "loss": loss / count if count else nan,
            "samples": int(count),
        }
