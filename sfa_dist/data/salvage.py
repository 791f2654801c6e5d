"""`data.damaged: salvage`: a clip from the frames before the damage, where a damaged video has enough of them.

The valid prefix of a video is all frames up to the first that does not decode. It is a property of the file alone,
so a salvaged clip is the same in each epoch of the same number, on any rank and under either decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sfa_dist.data.bad_sample import BadSample, OverLimit
from sfa_dist.data.decode import FrameNumbers, Video

_CHUNK = 16


class Prefix:
    """The first `num_frames` frames of a video, as a `Video`."""

    def __init__(self, video: Video, num_frames: int) -> None:
        self._video, self.num_frames, self.fps = video, num_frames, video.fps

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self._video.height

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self._video.width

    def frames_at(self, indices: FrameNumbers) -> torch.Tensor:
        """See `Video.frames_at`."""
        return self._video.frames_at(indices)


def valid_prefix(open_video: Callable[[], Video], needed: int, damage: BadSample) -> Video:
    """The frames before the first that does not decode. Raises BadSample where they are fewer than `needed`, with the
    reason of `damage`, or where the video cannot be opened at all."""
    video = open_video()
    whole = 0  # frames known to decode
    while whole < video.num_frames and _decodes(video, whole, min(whole + _CHUNK, video.num_frames)):
        whole = min(whole + _CHUNK, video.num_frames)
    broken = min(whole + _CHUNK, video.num_frames + 1)  # the smallest count known not to decode
    while broken - whole > 1:
        middle = (whole + broken) // 2
        if _decodes(open_video(), whole, middle):  # opened anew: a decoder that has met an error may not be what it was
            whole = middle
        else:
            broken = middle
    if whole < needed:
        raise BadSample(f"{damage.reason}; {whole} frames are before the damage, {needed} are needed")
    return Prefix(open_video(), whole)


def _decodes(video: Video, start: int, end: int) -> bool:
    try:
        video.frames_at(range(start, end))
    except OverLimit:
        raise
    except BadSample:
        return False
    return True
