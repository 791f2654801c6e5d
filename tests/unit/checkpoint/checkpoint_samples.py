"""An engine to save, and how to look at what was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sfa_dist import checkpoint as ckpt
from sfa_dist.parallel.engines.engine import Fragment


class OneRankEngine:
    """An engine of one rank around a plain torch optimizer's state: the whole protocol, no library."""

    owners = 1

    def __init__(self, seed: int = 0, size: tuple[int, int] = (3, 5)) -> None:
        torch.manual_seed(seed)
        self.module: nn.Module = nn.Linear(*size)
        self.moments: dict[str, dict[str, Tensor]] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)

    def evaluate(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        raise NotImplementedError

    def step(self, lr: float) -> float:
        self.make_optimizer_state(0)
        for name, parameter in self.module.named_parameters():
            self.moments[name]["exp_avg"].normal_()
            parameter.detach().view(-1).sub_(lr * self.moments[name]["exp_avg"])
        return 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.module.named_parameters()}

    def fragments(self) -> Iterator[Fragment]:
        """Each parameter in two pieces, as two ranks would own it."""
        for name, parameter in self.module.named_parameters():
            flat = parameter.detach().view(-1)
            half = flat.numel() // 2
            for start, numel in ((0, half), (half, flat.numel() - half)):
                moments = {key: value[start : start + numel] for key, value in self.moments.get(name, {}).items()}
                yield Fragment(name, start, numel, {"master": flat[start : start + numel], **moments})

    def make_optimizer_state(self, step: int) -> None:
        self.moments = {name: {"exp_avg": torch.zeros(p.numel())} for name, p in self.module.named_parameters()}

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def optimizer_bytes(self) -> int:
        return 0

    def state(self) -> list[Tensor]:
        return [tensor for piece in self.fragments() for _, tensor in sorted(piece.tensors.items())]


Save = Callable[..., Path]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest(root: Path) -> str:
    path, _ = ckpt.newest_valid(root)
    assert path is not None
    return path.name
