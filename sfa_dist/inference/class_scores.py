"""From a clip's scores to its likeliest classes with their names: of one head, or of noun, verb and their action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.stages.assemble import trained_classes
from sfa_dist.training.metrics import ACTION, SINGLE, action_heads, action_scores, action_words

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class ClassScores:
    """The class names of each head, in the order of the logits: under `label`, or under `noun` and `verb`."""

    names: dict[str, list[str]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The classes of each head, as `ModelBlock.head_sizes`; () for a single head."""
        return tuple(map(len, self.names.values())) if len(self.names) > 1 else ()

    @property
    def total(self) -> int:
        """The number of logits: the classes of all heads."""
        return sum(map(len, self.names.values()))

    def split(self, scores: Tensor) -> dict[str, Tensor]:
        """The scores by head: (..., classes) -> (..., classes of the head)."""
        return dict(zip(self.names, scores.split([len(names) for names in self.names.values()], dim=-1), strict=True))

    def probabilities(self, scores: Tensor) -> Tensor:
        """(..., classes) -> the same shape: the softmax over the classes of each head."""
        return torch.cat([head.softmax(dim=-1) for head in self.split(scores).values()], dim=-1)

    def top(self, scores: Tensor, k: int = 5) -> dict[str, Entries]:
        """The k likeliest classes of scores (classes,), best first, each with label, name and probability.

        They are under the key `top5`. With two heads `top5` has the actions, and `noun_top5` and `verb_top5` have the
        classes of each head. An action's label is noun * 97 + verb, its probability the product of the two.
        """
        logarithms = {head: part.double().log_softmax(dim=-1) for head, part in self.split(scores).items()}
        if not self.sizes:
            return {"top5": _likeliest(logarithms[SINGLE], self.names[SINGLE], k)}
        together = action_scores(torch.cat([*logarithms.values()]).unsqueeze(0), self.sizes)[0]
        by_head = {f"{head}_top5": _likeliest(part, self.names[head], k) for head, part in logarithms.items()}
        return {"top5": self._actions(together, k), **by_head}

    def _actions(self, logarithms: Tensor, k: int) -> Entries:
        best, labels = logarithms.topk(min(k, len(logarithms)))
        parts = [action_heads(label, self.sizes) for label in labels.tolist()]
        names = [
            action_words([self.names[head][n] for head, n in zip(self.names, part, strict=True)]) for part in parts
        ]
        return _entries(labels, names, best)


def _likeliest(logarithms: Tensor, names: Sequence[str], k: int) -> Entries:
    best, labels = logarithms.topk(min(k, len(names)))
    return _entries(labels, [names[label] for label in labels.tolist()], best)


def _entries(labels: Tensor, names: Sequence[str], logarithms: Tensor) -> Entries:
    return [
        {"label": label, "name": name, "score": score}
        for label, name, score in zip(labels.tolist(), names, logarithms.exp().tolist(), strict=True)
    ]


def title_of(key: str) -> str:
    """The title of a list of two heads: `top5` -> action, `noun_top5` -> noun."""
    return key.removesuffix("top5").removesuffix("_") or ACTION


def classes_of(weights: Path, model: ModelBlock) -> ClassScores:
    """The classes that the weights were trained on; without recorded names, their numbers.

    Raises RecipeError if the model has another number of classes.
    """
    sizes = model.class_heads or {SINGLE: model.classes}
    recorded = trained_classes(weights)
    if recorded is None:
        return ClassScores({head: [str(number) for number in range(size)] for head, size in sizes.items()})
    names = recorded if isinstance(recorded, dict) else {SINGLE: recorded}
    if {head: len(own) for head, own in names.items()} != sizes:
        found = ", ".join(f"{len(own)} of {head}" for head, own in names.items())
        wanted = ", ".join(f"{size} of {head}" for head, size in sizes.items())
        raise RecipeError(f"{weights} names other classes ({found}) than the recipe's model has ({wanted})")
    return ClassScores({head: [str(name) for name in names[head]] for head in sizes})
