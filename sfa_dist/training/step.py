"""What the ranks exchange before an optimizer step, and the result of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.parallel.runtime import Runtime


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks that a step needs before it updates anything."""

    clips: float
    """Clips of the global batch that count."""
    bad: int
    """Clips of the global batch that could not be read."""
    looped: int
    """Clips of the global batch that are longer than their videos."""
    stop: bool
    """Whether a rank was asked to stop; some ranks may then lack batches."""
    saving: list[float]
    """The status of the save in the background, as `Saver.advance` takes it."""

    @classmethod
    def over(cls, runtime: Runtime, batches: Sequence[Batch], stop: bool, saving: Sequence[float]) -> StepTotals:
        """Sums over this rank's micro-batches and all ranks, in one all-reduce. Collective."""
        own_clips = sum(float(batch.weights.sum()) for batch in batches)
        own_bad, own_looped = sum(len(batch.bad) for batch in batches), sum(batch.looped for batch in batches)
        clips, bad, looped, stopping, *statuses = runtime.sum(own_clips, own_bad, own_looped, stop, *saving)
        return cls(clips, int(bad), int(looped), bool(stopping), statuses)


@dataclass(frozen=True)
class StepResult:
    """The values of a step that are logged."""

    epoch: int
    lr: float
    grad_norm: float
    losses: Tensor
    """float32 (micro-batches,): the loss summed over the clips of each micro-batch of this rank."""
    clips: float
    """Clips of all ranks that count."""
