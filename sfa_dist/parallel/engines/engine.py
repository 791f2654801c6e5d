"""The interface between the trainer and the library that shards and steps the trainable module.

An engine gets the trainable module alone. It exposes its state as fragments: pieces of flattened parameters with
their fp32 master values and optimizer moments, each owned by one rank. A checkpoint made of fragments does not depend
on the number of ranks that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name` that this rank holds.

    `tensors` are fp32 views, each (numel,), into the engine's own memory: `master`, and the optimizer's moments
    (`exp_avg` and `exp_avg_sq`, or `momentum_buffer`), which are absent before the first step.
    """

    name: str
    start: int
    numel: int
    tensors: Mapping[str, Tensor]


class Engine(Protocol):
    """Forward, backward and step of one trainable module, and access to its state."""

    module: nn.Module
    owners: int  # The first `owners` ranks together own the whole state; the other ranks hold copies.

    def forward(self, inputs: object) -> Tensor:
        """The module's output in training mode, with gradients.

        `inputs` is what the module takes: a tensor, or features that come in chunks.
        """

    def evaluate(self, inputs: object) -> Tensor:
        """The module's output in eval mode, under no_grad (inference mode would break ZeRO-3's next step)."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of one micro-batch; `last` ends the accumulation and reduces them."""

    def step(self, lr: float) -> float:
        """Clips the gradients, updates with this learning rate, and returns the global norm before clipping.

        If the norm is not finite (all ranks see the same one), parameters and moments stay as they are.
        """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole parameter by name, the same on all ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """The fragments that this rank holds and steps."""

    def make_optimizer_state(self, step: int) -> None:
        """Allocates zeroed moments as after `step` steps, so that a checkpoint can be copied into the fragments."""

    def full_parameters(self) -> dict[str, Tensor]:
        """fp32 master values of all parameters, on the CPU. Collective; complete on rank 0 only."""

    def optimizer_bytes(self) -> int:
        """Bytes of fp32 master weights and moments on this rank, without padding."""
