"""What the trainer knows of the library that shards and steps the trainable module.

An engine is handed the trainable module alone. Its state is told as fragments: pieces of flattened parameters with
their fp32 master values and optimizer moments, each owned by one rank. A checkpoint made of them does not know
how many ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name` that this rank holds.

    `tensors` are fp32 views of length `numel` into the engine's own memory: `master`, and the optimizer's moments
    (`exp_avg`, `exp_avg_sq`, or `momentum_buffer`), which are missing before the first step.
    """

    name: str
    start: int
    numel: int
    tensors: Mapping[str, Tensor]


class Engine(Protocol):
    """Forward, backward and step of one trainable module, and its state."""

    module: nn.Module
    owners: int  # The first `owners` ranks own the whole state between them; what the others hold are copies of it.

    def forward(self, inputs: object) -> Tensor:
        """The module's output; in training mode with gradients. `inputs` is whatever the module takes: a tensor, or
        features that come in chunks."""

    def evaluate(self, inputs: object) -> Tensor:
        """The module's output in eval mode, under no_grad (inference mode would break ZeRO-3's next step)."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of one micro-batch; `last` ends the accumulation and reduces them."""

    def step(self, lr: float) -> float:
        """Clips, updates with this learning rate and returns the gradient's global norm before clipping.

        A norm that is not finite (all ranks see the same) leaves parameters and moments as they were.
        """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole parameter, the same on all ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds, and steps."""

    def make_optimizer_state(self, step: int) -> None:
        """Allocates zeroed moments as after `step` steps, so that fragments can be loaded into."""

    def full_parameters(self) -> dict[str, Tensor]:
        """fp32 master values of all parameters on CPU. Collective; only rank 0's answer is complete."""

    def optimizer_bytes(self) -> int:
        """Bytes of fp32 master weights and moments on this rank, padding not counted."""
