"""Which frames of a video make a clip. The rules are DMVR's (processors.py), which ViViT's public loader uses.

Frame i of a clip is frame offset + stride * i of the video; a video that is too short is looped.
Stride 0 repeats one frame: a static clip.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sfa_dist.data.sampling.randomness import below

Indices = npt.NDArray[np.int64]


def frame_indices(num_video_frames: int, frames: int, stride: int, offset: int) -> Indices:
    """Frame numbers of one clip, int64 (frames,), each in [0, num_video_frames).

    DMVR tiles the list 0..n-1 until it is long enough and takes offset, offset + stride, ... from it.
    """
    return (offset + stride * np.arange(frames, dtype=np.int64)) % num_video_frames


def random_offset(rng: np.random.Generator, num_video_frames: int, frames: int, stride: int) -> int:
    """A uniformly random start frame at which the clip fits; 0 for a video that is too short and is looped.

    Source: DMVR processors.py, `_get_random_sampling_offset`.
    """
    return below(rng, offset_choices(num_video_frames, frames, stride))


def offset_choices(num_video_frames: int, frames: int, stride: int) -> int:
    """The number of start frames at which a clip fits, from frame 0 on; at least 1."""
    return max(1, num_video_frames - (frames - 1) * stride)


def view_offsets(num_video_frames: int, frames: int, stride: int, views: int) -> list[int]:
    """Start frames of `views` temporal views.

    A single view is the centre window; several are spread evenly from the first window to the last. The window of a
    static clip (stride 0) is one frame, so its single view is the middle frame.
    """
    room = max(0, num_video_frames - max(1, frames * stride))
    if views == 1:
        return [room // 2]
    return [int(start) for start in np.linspace(0, room, views)]


def spread_frames(frames: int, most: int) -> list[int]:
    """At most `most` of the frames, evenly spaced from first to last."""
    return sorted({round(place) for place in np.linspace(0, frames - 1, most)})
