"""Frames by time: a video as if it had been stored at a constant rate.

A clip is every `stride`-th frame, so its frames are equally far apart in time only if the video's are. Other videos
are resampled as by FFmpeg's `fps` filter (and `ffmpeg -r`): each frame goes to the nearest slot of the new rate, and a
slot shows the latest frame up to it. The official data sets were brought to their rates in this way (25 for Kinetics,
12 for Something-Something v2). Only frame numbers are computed; no pixels are blended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch

from sfa_dist.data.sampling.clip_sampling import Indices
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.container import has_constant_rate
from sfa_dist.data.video.decode_limits import check_frame_count
from sfa_dist.data.video.video import Derived, FrameNumbers, FrameTimes, Shrink, StoredVideo, Video
from sfa_dist.recipe.blocks import LimitsBlock, Rate

# In frames of the new rate. Times are binary fractions, so a time half-way between slots may be slightly too small.
_ROUNDING = 1e-6
T = TypeVar("T")


class Resampled(Derived):
    """Frame k is frame `numbers[k]` (rising) of `video`, at `fps` frames a second; itself a `Video`."""

    def __init__(self, video: Video, numbers: Indices, fps: float) -> None:
        super().__init__(video, len(numbers), fps)
        self._numbers = numbers

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """See `Video.frames_at`."""
        return super().frames_at(self._numbers[np.asarray(indices, dtype=np.int64)], shrink)

    @property
    def stored(self) -> Video:
        """The video as it is stored."""
        return self._video

    def frames_before(self, stored: int) -> int:
        """How many frames come before frame `stored` of the video as it is stored."""
        return int(np.searchsorted(self._numbers, stored))


def at_rate(video: StoredVideo, data: bytes, rate: Rate, limits: LimitsBlock) -> Video:
    """The video at `rate` frames a second. Raises BadSample.

    None: at its own mean rate, which changes nothing if the rate is constant. `stored`: as it is stored.
    """
    constant = video.num_frames < 3 or has_constant_rate(data)
    if rate == "stored" or video.num_frames == 1 or (rate is None and constant):
        return video
    starts = video.times()
    if len(starts) != video.num_frames:
        raise BadSample(f"{len(starts)} time stamps for {video.num_frames} frames; data.fps: stored ignores them")
    fps = rate or own_rate(starts)
    check_frame_count(slot_of(end_of(starts), fps), limits)
    numbers = frame_numbers(starts, fps)
    if np.array_equal(numbers, np.arange(video.num_frames)):
        return video
    return Resampled(video, numbers, fps)


def own_rate(starts: FrameTimes) -> float:
    """Frames a second from the first frame to the last; 1.0 if all are shown at once."""
    seconds = float(starts[-1] - starts[0])
    return (len(starts) - 1) / seconds if seconds > 0 else 1.0


def end_of(starts: FrameTimes) -> float:
    """When the last frame ends, in seconds: it lasts as long as the others on average.

    (The durations of packets refer to decoding order.)
    """
    return float(starts[-1]) + 1 / own_rate(starts)


def frame_numbers(starts: FrameTimes, fps: float) -> Indices:
    """Number of the frame in each slot of a video at `fps`, int64, at least one; `starts` as `StoredVideo.times`."""
    slots = np.floor(starts * fps + 0.5 + _ROUNDING)
    count = max(1, slot_of(end_of(starts), fps))
    return np.searchsorted(slots, np.arange(count), side="right").astype(np.int64) - 1


def slot_of(seconds: float, fps: float) -> int:
    """The slot of a video at `fps` that is nearest to a time."""
    return math.floor(seconds * fps + 0.5 + _ROUNDING)


def held(frames: Iterable[tuple[float, T]], fps: float, longest_gap: float | None = None) -> Iterator[T]:
    """`frame_numbers` for a video that arrives frame by frame: yields the frames that a video at `fps` shows.

    `frames` are (seconds, frame), rising. After a jump in time of more than `longest_gap` seconds, back or forth, the
    clock restarts: the gap of a camera that was away is not filled with a frozen picture (None: no jump is too long).
    """
    last: T | None = None
    starts: list[float] = []  # times of the first and the latest frame of this clock
    shown = base = count = 0  # frames yielded; slot of the clock's first frame; frames received since
    for start, frame in frames:
        if not starts or (longest_gap is not None and abs(start - starts[1]) > longest_gap):
            base = shown + 1 if starts else 0
            starts, count = [start, start], 0
        if last is not None:
            for _ in range(shown, base + slot_of(start - starts[0], fps)):
                yield last
                shown += 1
        last, starts[1], count = frame, start, count + 1
    if last is not None:
        seconds = starts[1] - starts[0]
        own = seconds / (count - 1) if count > 1 else 0.0
        for _ in range(shown, max(base + slot_of(seconds + own, fps), base + 1)):
            yield last
