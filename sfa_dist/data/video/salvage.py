"""`data.damaged: salvage`: a clip from the frames before the damage, if a damaged video has enough of them.

FFmpeg's strictest reading finds where the damage starts, whichever decoder then reads the pixels. So the position is a
property of the file alone, and a salvaged clip is the same on any rank and under either decoder.
"""

from __future__ import annotations

from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode import Decoder, sound_frames
from sfa_dist.data.video.decode_limits import within
from sfa_dist.data.video.resample import Resampled
from sfa_dist.data.video.video import Derived, Video
from sfa_dist.recipe.blocks import LimitsBlock


def valid_prefix(decoder: Decoder, data: bytes, limits: LimitsBlock, needed: int, damage: BadSample) -> Video:
    """The video's frames before the damage.

    Raises BadSample with the reason of `damage` if they are fewer than `needed`, and if the video cannot be opened.
    """
    video = decoder.open(data)
    sound = within(limits.seconds, lambda: sound_frames(data, limits))
    sound = video.frames_before(sound) if isinstance(video, Resampled) else min(sound, video.num_frames)
    if sound < needed:
        raise BadSample(f"{damage.reason}; {sound} frames are before the damage, a clip needs {needed}")
    return Derived(video, sound, video.fps)
