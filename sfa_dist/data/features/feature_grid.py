"""Which tubelet steps of a video the feature cache stores, and which of them make a clip.

A tubelet step that starts at frame p consists of the frames p, p + stride, ... (`tubelet` of them, modulo the video's
length, as the live stream loops). The steps of a clip start `pitch` = tubelet * stride frames apart. A view stores the
steps of the whole video that start at `phases` of the `pitch` possible offsets:

    pitch 4, phases 1:  0       4       8  ...        phases 2:  0   2   4   6   8  ...        phases 4: all

For each of its steps a clip takes the stored step that starts at the same frame, or else the nearest earlier one. With
all phases every temporal crop is exact. With fewer, a crop starts up to pitch - 1 frames earlier than in live training,
and its steps stay `pitch` apart (except where a looped video starts over).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfa_dist.data.sampling.clip_sampling import Indices


@dataclass(frozen=True)
class StepGrid:
    """The stored steps of a video: `phases` of its tubelet * stride phases. `tubelet` and `stride` are in frames."""

    tubelet: int
    stride: int
    phases: int

    @property
    def pitch(self) -> int:
        """Frames from the start of one tubelet step of a clip to the start of the next one."""
        return self.tubelet * self.stride

    def num_steps(self, num_video_frames: int) -> int:
        """Number of tubelet steps that are stored of a video."""
        return -(-num_video_frames * self.phases // self.pitch)

    def starts(self, num_video_frames: int) -> Indices:
        """First frames of all stored steps, int64 (num_steps,), ascending: evenly spread phases, the first at 0."""
        return np.arange(self.num_steps(num_video_frames), dtype=np.int64) * self.pitch // self.phases

    def clip_rows(self, num_video_frames: int, frames: int, offset: int) -> Indices:
        """Rows of `starts`, int64 (frames / tubelet,), that make the clip of `frames` frames from frame `offset` on.

        Row i starts at i * pitch // phases, so the last row that starts at or before frame p is
        ((p + 1) * phases - 1) // pitch.
        """
        wanted = clip_starts(num_video_frames, frames, self.tubelet, self.stride, offset)
        return ((wanted + 1) * self.phases - 1) // self.pitch


def clip_starts(num_video_frames: int, frames: int, tubelet: int, stride: int, offset: int) -> Indices:
    """First frames of a clip's tubelet steps, int64 (frames / tubelet,), each in [0, num_video_frames)."""
    steps = np.arange(frames // tubelet, dtype=np.int64)
    return (offset + tubelet * stride * steps) % num_video_frames


def step_frames(starts: Indices, tubelet: int, stride: int, num_video_frames: int) -> Indices:
    """Frame numbers of tubelet steps, int64 (len(starts), tubelet)."""
    return (starts[:, None] + stride * np.arange(tubelet, dtype=np.int64)) % num_video_frames
