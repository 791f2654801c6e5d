"""Endless batches of generated clips, from blocks of clips that are replaced in turn.

Generating a clip takes about as long as a step of the smallest model on it, so each is used about four times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset

from sfa_dist.data.motion.clips import MotionLabels, motion_clips
from sfa_dist.data.sampling.randomness import sample_rng

MotionBatch = tuple[torch.Tensor, MotionLabels]
_MADE_TOGETHER = 64  # Clips generated at a time; more do not fit into the processor's cache.


@dataclass(frozen=True)
class MotionStream(IterableDataset[MotionBatch]):
    """Endless batches of `batch` clips, uint8 (B, 3, T, H, W), with their labels; the arguments determine them.

    A block has `block` clips with consecutive indices, from 0 on. Every `renewed_after` batches a new one is generated.
    Clips are drawn uniformly from the latest `blocks` blocks.
    """

    seed: int
    batch: int
    frames: int
    size: int
    block: int = 512
    blocks: int = 16
    renewed_after: int = 64

    def __iter__(self) -> Iterator[MotionBatch]:
        """Starts at the first batch."""
        pool: list[MotionBatch] = []
        step = 0
        while True:
            if step % self.renewed_after == 0:
                made = step // self.renewed_after
                pool.append(
                    made_clips(self.seed, range(made * self.block, (made + 1) * self.block), self.frames, self.size)
                )
                pool = pool[-self.blocks :]
            drawn = sample_rng(self.seed, 0, step, "motion batch").random(self.batch) * (len(pool) * self.block)
            chosen = drawn.astype(np.int64)
            yield _joined([_taken(pool[number // self.block], number % self.block) for number in chosen], torch.stack)
            step += 1


def made_clips(seed: int, indices: range, frames: int, size: int) -> MotionBatch:
    """The clips of `indices` and their labels, as `motion_clips` makes them, a few at a time."""
    parts = [
        motion_clips(seed, indices[first : first + _MADE_TOGETHER], frames, size)
        for first in range(0, len(indices), _MADE_TOGETHER)
    ]
    return _joined(parts, torch.cat)


def _taken(batch: MotionBatch, number: int) -> MotionBatch:
    clips, labels = batch
    return clips[number], MotionLabels(*(value[number] for value in labels))


def _joined(parts: list[MotionBatch], by: Callable[[list[torch.Tensor]], torch.Tensor]) -> MotionBatch:
    labels = zip(*(labels for _, labels in parts), strict=True)
    return by([clips for clips, _ in parts]), MotionLabels(*(by(list(values)) for values in labels))
