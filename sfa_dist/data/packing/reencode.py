"""Re-encodes clips before they are packed: smaller frames, more key frames, or a part of a longer video.

A training clip starts at a random frame, and the decoder has to start at the key frame before it. Videos from the web
have one every 250 frames; with one every 12 a loader process decodes about 1.7 times as many clips a second. The bytes
that this costs are saved by smaller frames (benchmarks/decode.py measures both).
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from sfa_dist.data.packing.pack_settings import Encoding
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.decode_limits import check_frame_size
from sfa_dist.data.video.decode_pyav import RgbConverter, look, opened
from sfa_dist.data.video.frame_order import FrameOrder, shown_frames, stamper, timed
from sfa_dist.recipe.blocks import LimitsBlock

SUFFIX = "mp4"
_LIMITS = LimitsBlock()
_TIME_BASE = Fraction(1, 90_000)
_SEEK_AHEAD = (0, 2, 10, 60)  # seconds
_FRAME_NAME = re.compile(r"(\d+)\.(jpe?g|png)$", re.IGNORECASE)


class _Picture(NamedTuple):
    """An upright frame, uint8 RGB (H, W, 3), and its time in seconds since the start of the clip."""

    pixels: npt.NDArray[np.uint8]
    seconds: Fraction


class _TimeSpan(NamedTuple):
    """From `begin` to `end` seconds of a stream, end excluded; `seek_to` is in its time base, None for its start."""

    begin: Fraction
    end: Fraction
    seek_to: int | None


def reencode(source: bytes | Path, encoding: Encoding, cut: tuple[float, float] | None = None) -> bytes:
    """The bytes of an mp4 with the same frames at the same times as a video, which is given as bytes or as a file.

    With `cut` only the frames from `cut[0]` to `cut[1]` seconds, end excluded. Uses one thread, so that the same input
    gives the same bytes. Raises BadSample for a video that cannot be decoded.
    """
    if isinstance(source, bytes):
        return _encode_stream(io.BytesIO(source), encoding, cut)
    with source.open("rb") as file:
        return _encode_stream(file, encoding, cut)


def inspect_cut(source: Path, cut: tuple[float, float]) -> tuple[int, float]:
    """(frames, frames a second) of the part from `cut[0]` to `cut[1]` seconds, estimated from the video's frame rate.

    Only its first frame is decoded. Raises BadSample where that cannot be done.
    """
    with source.open("rb") as file:
        part = _span_of(file, cut)
        with opened(file) as (container, stream):
            rate = stream.average_rate or Fraction(25)
            if next(_pictures(container, stream, part), None) is None:
                raise BadSample("no frame can be decoded")
        return round((_exact(cut[1]) - _exact(cut[0])) * rate), float(rate)


def inspect_frames(folder: Path, first: int, last: int) -> int:
    """The number of pictures from number `first` to `last`, both included; only the first is read.

    Raises BadSample where one is missing, or the first cannot be read.
    """
    files = _frame_files(folder, folder.stat().st_mtime_ns)
    absent = next((number for number in range(first, last + 1) if number not in files), None)
    if absent is not None:
        raise BadSample(f"frame {absent} is not in {folder}")
    if first > last:
        raise BadSample(f"no frame from {first} to {last}")
    _read_picture(files[first])
    return last + 1 - first


def encode_frames(folder: Path, first: int, last: int, fps: float, encoding: Encoding) -> bytes:
    """The bytes of an mp4 with a folder's pictures from number `first` to `last`, `fps` frames a second.

    Raises BadSample where a picture is missing or cannot be read.
    """
    rate = Fraction(fps).limit_denominator(1001)

    def pictures() -> Iterator[_Picture]:
        files = _frame_files(folder, folder.stat().st_mtime_ns)
        for position, number in enumerate(range(first, last + 1)):
            if number not in files:
                raise BadSample(f"frame {number} is not in {folder}")
            yield _Picture(_read_picture(files[number]), position / rate)

    return _encode(pictures(), rate, _TIME_BASE, encoding)


def target_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """(height, width) in the same proportion with a short side of at most `short_side` pixels; even, for H.264."""
    scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def _encode_stream(file: BinaryIO, encoding: Encoding, cut: tuple[float, float] | None) -> bytes:
    part = _span_of(file, cut) if cut else None
    order = None if cut else look(file, None).order
    with opened(file) as (container, stream):
        rate = stream.average_rate or Fraction(25)
        pictures = _pictures(container, stream, part) if order is None else _all_pictures(container, stream, order)
        return _encode(pictures, rate, stream.time_base or _TIME_BASE, encoding)


def _span_of(file: BinaryIO, cut: tuple[float, float]) -> _TimeSpan:
    """The part of the stream that `cut` means: data sets count seconds from the first frame that is shown."""
    with opened(file) as (container, stream):
        _check_end(container, stream, cut)
        first = next(timed(shown_frames(container.demux(stream)), stream), None)
    if first is None:
        raise BadSample("no frame can be decoded")
    begin, end = (_exact(first[0]) + _exact(second) for second in cut)
    return _TimeSpan(begin, end, _seek_point(file, begin))


def _seek_point(file: BinaryIO, begin: Fraction) -> int | None:
    """Where to seek to reach the frame at `begin` seconds, in the stream's time base; None: decode from the start.

    Some containers seek by decoding time, so that the key frame found is shown too late, and some key frames need
    frames before them. So each position is tried, and then one further ahead.
    """
    for ahead in _SEEK_AHEAD:
        with opened(file) as (container, stream):
            target = int((begin - ahead) / (stream.time_base or _TIME_BASE))
            if ahead > begin:
                return None
            container.seek(target, stream=stream, backward=True, any_frame=False)
            packets = container.demux(stream)
            key = next(packets)
            frame = next(shown_frames(chain([key], packets)), None)
            stamps = [stamper(stream)(part) for part in (key, frame) if part is not None]
            base = stream.time_base or _TIME_BASE
            if key.is_keyframe and all(stamp is not None and stamp * base <= begin for stamp in stamps):
                return target
    return None


def _check_end(container: av.container.InputContainer, stream: av.VideoStream, cut: tuple[float, float]) -> None:
    """Raises BadSample where the video ends before half of the part: it is another video, or incomplete."""
    if stream.duration and stream.time_base:
        end = float(stream.duration * stream.time_base)
    elif container.duration:
        end = container.duration / av.time_base
    else:
        return
    if end < sum(cut) / 2:
        raise BadSample(f"the video ends at {end:.2f} s, the part goes from {cut[0]:.2f} to {cut[1]:.2f} s")


def _all_pictures(
    container: av.container.InputContainer, stream: av.VideoStream, order: FrameOrder
) -> Iterator[_Picture]:
    to_rgb = RgbConverter(stream, _LIMITS)
    frames = shown_frames(container.demux(stream))
    # Not strict: a damaged video has fewer frames, and the caller counts them.
    for seconds, frame in zip(order.times.tolist(), frames, strict=False):
        yield _Picture(to_rgb(frame), _exact(seconds))


def _pictures(
    container: av.container.InputContainer, stream: av.VideoStream, part: _TimeSpan | None
) -> Iterator[_Picture]:
    if part is not None and part.seek_to is not None:
        container.seek(part.seek_to, stream=stream, backward=True, any_frame=False)
    to_rgb = RgbConverter(stream, _LIMITS)
    first: Fraction | None = None
    for seconds, frame in timed(shown_frames(container.demux(stream)), stream):
        time = _exact(seconds)
        if part is not None and time < part.begin:
            continue
        if part is not None and time >= part.end:
            return
        first = time if first is None else first
        yield _Picture(to_rgb(frame), time - first)


def _exact(seconds: float) -> Fraction:
    """The decimal number that a float stands for; without it the frame at exactly that time would be lost."""
    return Fraction(seconds).limit_denominator(1_000_000)


def _encode(pictures: Iterator[_Picture], rate: Fraction, base: Fraction, encoding: Encoding) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as out:
        stream: av.VideoStream | None = None
        last = -1
        for pixels, seconds in pictures:
            if stream is None:
                stream = _add_stream(out, encoding, rate, base, *pixels.shape[:2])
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")
            last = max(last + 1, round(seconds / base))  # x264 needs increasing times
            frame.pts, frame.time_base = last, base
            _write(out, stream.encode(frame), rate)
        if stream is None:
            raise BadSample("no frame can be decoded")
        _write(out, stream.encode(None), rate)
    return target.getvalue()


def _write(out: av.container.OutputContainer, packets: Iterable[av.Packet], rate: Fraction) -> None:
    for packet in packets:
        if not packet.duration and packet.time_base:
            packet.duration = round(1 / rate / packet.time_base)  # gives the last frame of the file its length
        out.mux(packet)


def _add_stream(
    out: av.container.OutputContainer, encoding: Encoding, rate: Fraction, base: Fraction, height: int, width: int
) -> av.VideoStream:
    stream = out.add_stream("libx264", rate=rate)
    stream.height, stream.width = target_size(height, width, encoding.short_side)
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = base
    stream.codec_context.gop_size, stream.codec_context.thread_count = encoding.gop, 1
    stream.options = {"crf": str(encoding.crf), "preset": "medium", "sc_threshold": "0"}
    return stream


@functools.lru_cache(maxsize=8)
def _frame_files(folder: Path, changed: int) -> dict[int, Path]:
    """The pictures of a folder by the number that ends their names. `changed` is its mtime, a key of the cache."""
    del changed
    found = ((_FRAME_NAME.search(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _read_picture(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            check_frame_size(image.height, image.width, _LIMITS)  # from the header, before anything is decoded
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path} cannot be read ({error})") from error
