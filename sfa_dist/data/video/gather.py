"""Collects the frames of a clip as they are decoded.

A few frames are shrunk before the next few are decoded, so a whole clip is never held at its stored size.
"""

from __future__ import annotations

import numpy as np
import torch

from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode_card import CPU
from sfa_dist.data.video.decode_limits import MIB, check_clip_bytes
from sfa_dist.data.video.video import FrameNumbers, Shrink
from sfa_dist.recipe.blocks import LimitsBlock

SLICE = 8  # frames decoded at a time, more of small ones; the time limit is checked between slices
SMALL_BYTES = MIB  # so much of small frames at a time, as each slice has a cost of its own
SLICE_BYTES = 64 * MIB  # limit for a slice of more than one frame


def slice_frames(height: int, width: int) -> int:
    """How many frames of this size are decoded at a time."""
    frame = 3 * height * width
    return max(1, min(max(SLICE, SMALL_BYTES // frame), SLICE_BYTES // frame))


class GatheredClip:
    """A clip of the frames `indices`, each after `shrink`. `wanted` are the frames to decode, in rising order."""

    def __init__(
        self, indices: FrameNumbers, limits: LimitsBlock, shrink: Shrink | None, device: torch.device = CPU
    ) -> None:
        numbers = np.asarray(indices, dtype=np.int64)
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            self._rows.setdefault(number, []).append(row)
        self.wanted = sorted(self._rows)
        self._count, self._limits, self._shrink, self._device = len(numbers), limits, shrink, device
        self._stored: torch.Size | None = None
        self._clip: torch.Tensor | None = None

    def add(self, numbers: list[int], frames: torch.Tensor) -> None:
        """Adds some of the wanted frames, each once, uint8 (len(numbers), H, W, 3).

        Raises BadSample if frames differ in size, OverLimit if the clip would take too much memory.
        """
        if self._stored is None:
            self._stored = frames.shape[1:]
        if frames.shape[1:] != self._stored:
            raise BadSample("the size of the frames changes inside the video")
        kept = frames if self._shrink is None else self._shrink(frames)
        if self._clip is None:
            check_clip_bytes(self._count, kept.shape[1], kept.shape[2], self._limits)
            self._clip = torch.empty((self._count, *kept.shape[1:]), dtype=torch.uint8, device=self._device)
        for number, frame in zip(numbers, kept, strict=True):
            for row in self._rows.pop(number):
                self._clip[row] = frame

    def clip(self, num_frames: int) -> torch.Tensor:
        """The clip, uint8 (len(indices), h, w, 3). Raises BadSample if a frame is missing.

        `num_frames`, the number of the video's frames, is used in the message only.
        """
        if self._clip is None or self._rows:
            raise BadSample(f"frame {min(self._rows)} of {num_frames} cannot be decoded")
        return self._clip
