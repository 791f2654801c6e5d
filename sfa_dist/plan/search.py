"""The largest number of frames, or of clips, with which a stage still fits: by interpolation, in few traces.

The peak of memory is the largest of several linear functions (forward, backward, step), so it is convex in the size.
The line between a size that fits and one that does not lies above it, and where that line meets the limit, the stage
fits. Where the peak is linear in between, that is the answer, and its trace the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sfa_dist.plan.memory import predict_together
from sfa_dist.recipe.schema import StageBlock

FRAMES_LIMIT = 4096  # The search ends there: 4,096 frames at stride 1 are over two minutes of video.
TRACES = 8


def largest(peak: Callable[[int], int], limit: int, granule: int, start: int, ceiling: int, known: int) -> int:
    """The largest multiple of `granule` up to `ceiling` with `peak(size) <= limit`, or 0 where there is none.

    `known` is `peak(start)`. After TRACES traces the best size so far is returned.
    """
    low, low_peak, high, high_peak = 0, 0, 0, 0
    if known <= limit:
        low, low_peak = start, known
        if start >= ceiling or (high_peak := peak(ceiling)) <= limit:
            return max(start, ceiling)
        high = ceiling
    else:
        high, high_peak = start, known
        if start <= granule or (low_peak := peak(granule)) > limit:
            return 0
        low = granule
    for _ in range(TRACES):
        if high - low <= granule:
            break
        ideal = low + (high - low) * (limit - low_peak) / (high_peak - low_peak)
        guess = min(max(int(ideal) // granule * granule, low + granule), high - granule)
        size = peak(guess)
        if size > limit:
            high, high_peak = guess, size
            continue
        # The peak is convex: the next granule takes at least as much as those before it.
        slope = (size - low_peak) / (guess - low)
        low, low_peak = guess, size
        if size + slope * granule > limit:
            break
    return low


def largest_frames(
    stages: Sequence[StageBlock], world_size: int, limit: int, known: int, ceiling: int = FRAMES_LIMIT
) -> int:
    """The most frames, up to `ceiling`, with which the peak stays within `limit` bytes.

    `stages` is one stage, or the members of a sweep that train together; `known` is their peak as they are.
    """

    def peak(frames: int) -> int:
        return predict_together([with_frames(stage, frames) for stage in stages], world_size).peak_bytes

    return largest(peak, limit, stages[0].model.tubelet, stages[0].frames, ceiling, known)


def largest_micro(stages: Sequence[StageBlock], world_size: int, limit: int, known: int) -> int:
    """The most clips of a micro-batch, up to a rank's share of the batch, with which the peak stays within `limit`."""

    def peak(micro: int) -> int:
        return predict_together([_with_micro(stage, micro) for stage in stages], world_size).peak_bytes

    share = max(1, -(-stages[0].batch.size // world_size))
    return largest(peak, limit, 1, stages[0].batch.micro, share, known)


def _with_micro(stage: StageBlock, micro: int) -> StageBlock:
    return stage.model_copy(update={"batch": stage.batch.model_copy(update={"micro": micro})})


def with_frames(stage: StageBlock, frames: int) -> StageBlock:
    """The stage with another clip length, which is not validated."""
    return stage.model_copy(update={"frames": frames})
