"""What one optimizer step exchanges between the ranks, and what it results in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.parallel.runtime import Runtime


@dataclass(frozen=True)
class StepTotals:
    """What a step needs to know of all ranks before it updates anything."""

    clips: float
    """Clips of the global batch that count."""
    bad: int
    """Clips of it that were not read."""
    looped: int
    """Clips of it that are longer than their videos."""
    stop: bool
    """Whether a rank was asked to stop: then the batches of some ranks may be too few."""
    saving: list[float]
    """The status of a save in the background, as `Saver.advance` takes it."""

    @classmethod
    def over(cls, runtime: Runtime, batches: Sequence[Batch], stop: bool, saving: Sequence[float]) -> StepTotals:
        """Sums over this rank's micro-batches and all ranks, in one all-reduce. Collective."""
        own_clips = sum(float(batch.weights.sum()) for batch in batches)
        own_bad, own_looped = sum(len(batch.bad) for batch in batches), sum(batch.looped for batch in batches)
        clips, bad, looped, stopping, *statuses = runtime.sum(own_clips, own_bad, own_looped, stop, *saving)
        return cls(clips, int(bad), int(looped), bool(stopping), statuses)


@dataclass(frozen=True)
class StepResult:
    """What a step logs: `losses` float32 (micro-batches,), sums over this rank's clips; `clips` of all ranks."""

    epoch: int
    lr: float
    grad_norm: float
    losses: Tensor
    clips: float
