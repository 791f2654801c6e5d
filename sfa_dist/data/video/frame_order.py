"""Which frames a file shows, and when: the same numbers for every decoder.

Frame k is the k-th one that is shown when the file is played from its start. Usually the packets are enough to tell:
each becomes one frame, at its own time. Sometimes they are not: they have no times (B-frames in an AVI), frames at the
start cannot be decoded (an open group of pictures that was cut), or a packet shows nothing. Such a video is counted:
decoded once to find its frames, and always read from its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode_limits import check_frame_count, check_time
from sfa_dist.data.video.resample import own_rate
from sfa_dist.data.video.video import FrameTimes
from sfa_dist.recipe.blocks import LimitsBlock

# Containers that can be sought and whose packets have times; videos in others are counted.
_TIMED_CONTAINERS = {"mov", "mp4", "matroska", "webm", "avi"}
# Codecs with one frame a packet, besides those that store every frame by itself (intra only).
_ONE_EACH = {"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "vp9", "libdav1d", "png"}
_NOT_CODED = 8  # most bytes of an MPEG-4 picture marked as not coded (6 or 7, and stuffing)
# Start code of a picture, bytes to skip after it, mask and value of a B-frame's type
# (ISO/IEC 13818-2, 6.2.3; 14496-2, 6.2.5).
_PICTURES = {
    "mpeg1video": (b"\0\0\1\0", 1, 0x38, 0x18),
    "mpeg2video": (b"\0\0\1\0", 1, 0x38, 0x18),
    "mpeg4": (b"\0\0\1\xb6", 0, 0xC0, 0x80),
}
_GUESSED_RATE = 25.0  # frames a second for a file without a rate, as in FFmpeg
_FAR = 1 << 62
_HEAD = 8  # packets: enough for the first frame of a stream with B-frames


@dataclass(frozen=True)
class FrameOrder:
    """The frames of a video, in the order in which they are shown.

    times: seconds of each frame from the first, rising, float64 (N,).   fps: their mean rate in frames a second.
    stamps: their pts; None for a video that is counted.   key_frames: (pts, where to seek for it), sorted.
    closed: no frame depends on one beyond the next key frame, so a seek gives the same frames as playing.
    """

    times: FrameTimes
    fps: float
    stamps: list[int] | None
    key_frames: list[tuple[int, int]]
    closed: bool


def order_of(
    container: Any, stream: Any, limits: LimitsBlock | None, head: list[Any] | None = None
) -> FrameOrder | None:
    """The order by the packets of a file that was just opened; None if the video must be counted.

    The first few packets are appended to `head`. Raises BadSample, and OverLimit for more than `limits.frames`.
    """
    if container.format.name.endswith("_pipe"):
        return _pictures(container, stream, limits)
    codec = stream.codec_context.codec
    kinds = set(container.format.name.split(","))
    if not _TIMED_CONTAINERS & kinds or not (codec.name in _ONE_EACH or codec.intra_only):
        return None
    h264, mpeg4, shown_at = codec.name == "h264", codec.name == "mpeg4", stamper(stream)
    stamps: list[int] = []
    keys: list[tuple[int, int]] = []
    closed, latest, references = True, -_FAR, 0
    for packet in _packets(container, stream, head):
        time = shown_at(packet)
        if time is None or (mpeg4 and packet.size <= _NOT_CODED):
            return None
        if references < 2:  # a B-frame needs two references, so an earlier one may not decode, whatever its time
            if _is_b_frame(packet, codec.name):
                return None
            references += 1
        if packet.is_keyframe:
            if h264 and not _is_idr(packet, stream):
                return None
            closed = closed and time > latest
            keys.append((time, time if packet.dts is None else min(time, packet.dts)))
        elif not keys or time < keys[0][0]:  # its reference is missing
            return None
        closed = closed and time >= keys[-1][0]
        latest = max(latest, time)
        if not packet.is_discard:  # an edit list cuts the others
            stamps.append(time)
            _check_count(len(stamps), limits)
    in_order = sorted(stamps)
    if len(set(stamps)) < len(stamps) or not stamps:
        return None
    if len(stamps) > 1 and in_order == stamps and stream.codec_context.has_b_frames:
        return None  # made-up times, from a copy of an AVI: the frames are reordered, the times are not
    times = np.asarray(in_order, dtype=np.float64) * float(stream.time_base or 0)
    return _order(times, stream, in_order, sorted(keys), closed)


def counted_order(container: Any, stream: Any, limits: LimitsBlock | None) -> FrameOrder:
    """The order by decoding a file that was just opened. Raises BadSample if nothing decodes, and OverLimit."""
    stored: list[int] = []
    frames = _limited(shown_frames(_recording_dts(container.demux(stream), stored), through_damage=True), limits)
    stamps: list[int | None] = []
    times: FrameTimes = np.fromiter(
        (time for time, _ in timed(_recording_stamps(frames, stream, stamps), stream)), dtype=np.float64
    )
    if len(stored) > 1 and stored[-1] > stored[0] and not any(stamp is not None for stamp in stamps):
        # Not the header's rate: an AVI may count fields, with an empty chunk between the frames.
        step = (stored[-1] - stored[0]) / (len(stored) - 1) * float(stream.time_base or 0)
        times = np.arange(len(times), dtype=np.float64) * step
    given = [stamp for stamp in stamps if stamp is not None]
    if len(given) == len(set(given)) == len(stamps):
        times = np.sort(np.asarray(given, dtype=np.float64)) * float(stream.time_base or 0)
    return _order(times, stream, None, [], closed=False)


def shown_frames(packets: Iterable[Any], through_damage: bool = False) -> Iterator[av.VideoFrame]:
    """All frames of a stream's packets, in the order in which a player shows them.

    A recording that begins between key frames may not decode before the first one; players do not show that part.
    Damage after it raises av.FFmpegError; with `through_damage` it is skipped, to count what follows.
    """
    begun = False
    for packet in packets:
        begun = begun or packet.is_keyframe
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if begun and not through_damage:
                raise
            continue
        yield from frames


def timed(
    frames: Iterable[av.VideoFrame], stream: Any, longest_step_back: float = math.inf
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) with rising times.

    A frame without a time, or with one that goes back, follows one frame after the previous one. A jump back of more
    than `longest_step_back` seconds is kept: there a camera has restarted.
    """
    base, step = float(stream.time_base or 0), 1 / _rate(stream)
    last: float | None = None
    shown_at = stamper(stream)
    for frame in frames:
        stamp = shown_at(frame)
        time = None if stamp is None else stamp * base
        if time is None or (last is not None and 0 <= last - time <= longest_step_back):
            time = 0.0 if last is None else last + step
        last = time
        yield time, frame


def stamper(stream: Any) -> Callable[[Any], int | None]:
    """A function from a packet or a frame to the time it is shown at, in the stream's time base; None if unknown."""
    reorders = bool(stream.codec_context.has_b_frames)
    if reorders and stream.container.format.name == "avi":
        return lambda part: None  # an AVI stores no times, and FFmpeg's guesses are wrong if frames are reordered
    if reorders:
        return lambda part: part.pts
    return lambda part: part.dts if part.pts is None else part.pts  # shown in the order of decoding


def _pictures(container: Any, stream: Any, limits: LimitsBlock | None) -> FrameOrder:
    """The order of a file of pictures: each packet is a picture that decodes by itself."""
    count = sum(1 for _ in _packets(container, stream))
    _check_count(count, limits)
    return _order(np.arange(count) / _rate(stream), stream, None, [], closed=True)


def _order(
    times: FrameTimes, stream: Any, stamps: list[int] | None, keys: list[tuple[int, int]], closed: bool
) -> FrameOrder:
    if not len(times):
        raise BadSample("no frame can be decoded")
    return FrameOrder(times - times[0], own_rate(times) if len(times) > 1 else _rate(stream), stamps, keys, closed)


def _packets(container: Any, stream: Any, head: list[Any] | None = None) -> Iterator[Any]:
    """The packets that are not empty; the first few are appended to `head`."""
    for packet in container.demux(stream):
        check_time()
        if packet.size:
            if head is not None and len(head) < _HEAD:
                head.append(packet)
            yield packet


def _recording_dts(packets: Iterable[Any], stored: list[int]) -> Iterator[Any]:
    """Yields the packets, and appends the dts of those that are not empty to `stored`."""
    for packet in packets:
        if packet.size and packet.dts is not None:
            stored.append(packet.dts)
        yield packet


def _limited(frames: Iterable[av.VideoFrame], limits: LimitsBlock | None) -> Iterator[av.VideoFrame]:
    """Yields the frames. Raises OverLimit for too many, or if they take too long."""
    for number, frame in enumerate(frames, start=1):
        check_time()
        _check_count(number, limits)
        yield frame


def _recording_stamps(
    frames: Iterable[av.VideoFrame], stream: Any, stamps: list[int | None]
) -> Iterator[av.VideoFrame]:
    """Yields the frames, and appends the time of each to `stamps`."""
    shown_at = stamper(stream)
    for frame in frames:
        stamps.append(shown_at(frame))
        yield frame


def _check_count(count: int, limits: LimitsBlock | None) -> None:
    if limits is not None:
        check_frame_count(count, limits)


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0) or _GUESSED_RATE


def _is_b_frame(packet: Any, codec: str) -> bool:
    """Whether an MPEG-1, MPEG-2 or MPEG-4 packet holds a picture that depends on one before and one after it."""
    if codec not in _PICTURES:
        return False
    start, skipped, mask, kind = _PICTURES[codec]
    data = bytes(packet)
    position = data.find(start)
    at = position + len(start) + skipped
    return position >= 0 and at < len(data) and data[at] & mask == kind


def _is_idr(packet: Any, stream: Any) -> bool:
    """Whether an H.264 key frame is an IDR frame. Others (recovery points) may depend on earlier frames."""
    data, extra = memoryview(packet), stream.codec_context.extradata or b""
    if extra[:1] != b"\x01":  # start codes
        content, position = bytes(data), 0
        while (position := content.find(b"\0\0\1", position) + 3) > 2 and position < len(content):
            if (kind := content[position] & 31) in (1, 5):
                return kind == 5
        return False
    size, position = (extra[4] & 3) + 1, 0
    while position + size < len(data):
        if (kind := data[position + size] & 31) in (1, 5):
            return kind == 5
        position += size + int.from_bytes(data[position : position + size], "big")
    return False
