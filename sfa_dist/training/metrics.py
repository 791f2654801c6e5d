"""Accuracy and confusion, as sums that can be added over micro-batches and ranks in any order.

A clip has one label (B,), or a noun and a verb (B, 2). The logits of several heads are concatenated; `sizes` has the
number of classes of each, such as (300, 97), or is () for a single head. With several heads there is also an action,
the combination of their classes. Its probability is the product of theirs, so actions rank by the sum of the heads'
logits, and its number is noun * 97 + verb (scenic, vivit/model_utils.py). `acc1` and `acc5` are those of the single
head, or of the action.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sfa_dist.models.loss import clip_losses
from sfa_dist.run.chance import chance_facts

ACTION = "action"
SINGLE = "label"


def average_views(logits: Tensor, views: int, average: Literal["logits", "softmax"], sizes: Sequence[int]) -> Tensor:
    """Logits (B * views, classes), with a clip's views in neighbouring rows, -> scores fp64 (B, classes).

    They are the mean of the logits, or the logarithm of the mean softmax, taken head by head. In fp64 the order of the
    views does not matter; in fp32 it would change the last bits.
    """
    each = logits.double().unflatten(0, (-1, views))
    if average == "logits":
        return each.mean(dim=1)
    heads = each.split(list(sizes) or [each.shape[-1]], dim=-1)
    return torch.cat([head.log_softmax(dim=-1).logsumexp(dim=1) for head in heads], dim=-1) - math.log(views)


def action_scores(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sums of the heads' scores for all combinations of their classes, fp64 (B, product of sizes).

    They rank the actions of a clip exactly as the product of the heads' softmax does, without underflow.
    """
    first, *others = scores.double().split(list(sizes), dim=1)
    for head in others:
        first = (first[:, :, None] + head[:, None, :]).flatten(1)
    return first


def action_numbers(labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Labels (B, heads) -> action numbers (B,): noun * 97 + verb."""
    number = torch.zeros_like(labels[:, 0])
    for column, size in zip(labels.unbind(dim=1), sizes, strict=True):
        number = number * size + column
    return number


def action_heads(number: int, sizes: Sequence[int]) -> list[int]:
    """An action's number -> the label in each head: the inverse of `action_numbers`."""
    labels = []
    for size in reversed(sizes):
        number, label = divmod(number, size)
        labels.append(label)
    return labels[::-1]


def action_words(names: Sequence[str]) -> str:
    """The name of an action from the names in its heads, in reverse order: the verb is the last head."""
    return " ".join(reversed(names))


# Losses are summed as multiples of 2**-30. Such sums are exact in any order, so the number of ranks changes no bit.
LOSS_GRAINS = 2**30


@dataclass
class HeadSums:
    """The counts of one head."""

    right1: int = 0
    """Clips whose class has the best score."""
    right5: int = 0
    """Clips whose class is among the best five."""
    classes: int = 0
    """Number of classes of the head; 0 before the first clip."""
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of clips of each (class, prediction)."""

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds clips: scores (B, classes), labels (B,)."""
        self.classes = scores.shape[1]
        best = scores.topk(min(5, self.classes), dim=1).indices
        right = (best == labels[:, None]) & scores.isfinite().all(dim=1, keepdim=True)  # With NaN, class 0 would win.
        self.right1 += int(right[:, 0].sum())
        self.right5 += int(right.any(dim=1).sum())
        self.pairs.update(zip(labels.tolist(), best[:, 0].tolist(), strict=True))

    def add(self, other: HeadSums) -> None:
        """Adds what another rank counted."""
        self.right1 += other.right1
        self.right5 += other.right5
        self.classes = max(self.classes, other.classes)
        self.pairs.update(other.pairs)

    @property
    def clips(self) -> int:
        """Number of clips that were counted."""
        return self.pairs.total()

    def recalls(self) -> dict[int, tuple[int, int]]:
        """For each class that has clips: (clips that are right, clips)."""
        found: dict[int, tuple[int, int]] = {}
        for (label, predicted), count in sorted(self.pairs.items()):
            right, clips = found.get(label, (0, 0))
            found[label] = right + count * (label == predicted), clips + count
        return found

    def mean_class_accuracy(self) -> float:
        """The share of right clips, averaged over the classes that have clips; NaN without a clip."""
        shares = [right / clips for right, clips in self.recalls().values()]
        return math.fsum(shares) / len(shares) if shares else math.nan

    def accuracies(self) -> tuple[float, float]:
        """(top-1, top-5) accuracy; NaN without a clip."""
        return (self.right1 / self.clips, self.right5 / self.clips) if self.clips else (math.nan, math.nan)

    def guessing(self) -> dict[str, Any]:
        """The accuracy of guessing, as `chance_facts` computes it."""
        return chance_facts(self.pairs, self.right1, self.classes)


@dataclass
class ClassificationSums:
    """The counts of an evaluation; `heads` are the model's `class_heads`, empty for a single head."""

    heads: Mapping[str, int] = field(default_factory=dict)
    loss: float = 0.0
    by_head: dict[str, HeadSums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (*self.heads, ACTION) if self.heads else (SINGLE,)
        self.by_head = self.by_head or {name: HeadSums() for name in names}

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds clips: scores (B, classes), labels (B,) or (B, heads), weights (B,), 0 for rows that do not count."""
        real = weights > 0
        scores, labels = scores[real].double(), labels[real]
        if not len(labels):
            return
        sizes = tuple(self.heads.values())
        self.loss += float((clip_losses(scores, labels, sizes=sizes) * LOSS_GRAINS).round().sum()) / LOSS_GRAINS
        if not sizes:
            self.by_head[SINGLE].update(scores, labels)
            return
        for name, part, column in zip(self.heads, scores.split(list(sizes), dim=1), labels.unbind(dim=1), strict=True):
            self.by_head[name].update(part, column)
        self.by_head[ACTION].update(action_scores(scores, sizes), action_numbers(labels, sizes))

    @classmethod
    def added(cls, parts: Iterable[ClassificationSums]) -> ClassificationSums:
        """The sums of all ranks, added up."""
        first, *others = parts
        total = cls(first.heads, math.fsum([first.loss, *(other.loss for other in others)]))
        for part in (first, *others):
            for name, head in part.by_head.items():
                total.by_head[name].add(head)
        return total

    @property
    def main(self) -> HeadSums:
        """The single head, or the action."""
        return self.by_head[ACTION if self.heads else SINGLE]

    def result(self) -> dict[str, Any]:
        """acc1, acc5, mean loss, samples and the accuracy of guessing (chance.KEYS), with verb_acc1, ... by head.

        Without a clip the accuracies and the loss are NaN, and the keys about guessing are absent.
        """
        one, five = self.main.accuracies()
        clips = self.main.clips
        scores: dict[str, Any] = {"acc1": one, "acc5": five}
        guessing = self.main.guessing()
        for name in self.by_head if self.heads else ():
            head = self.by_head[name]
            scores[f"{name}_acc1"], scores[f"{name}_acc5"] = head.accuracies()
            guessing |= {f"{name}_{key}": value for key, value in head.guessing().items()}
        return {**scores, "loss": self.loss / clips if clips else math.nan, "samples": clips, **guessing}

    def class_means(self) -> dict[str, float]:
        """`mean_class_acc1`, the mean class accuracy; with several heads also `verb_mean_class_acc1`, ..."""
        names = self.by_head if self.heads else ()
        means = {f"{name}_mean_class_acc1": self.by_head[name].mean_class_accuracy() for name in names}
        return {"mean_class_acc1": self.main.mean_class_accuracy(), **means}
