"""Decoding with PyAV, the backend that works wherever its wheel does: FFmpeg comes inside.

The packets are listed once, which gives the time stamps of all frames; then only the spans from the key frame before
each wanted frame are decoded.
"""

from __future__ import annotations

import bisect
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version as package_version
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import torch
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.container import promised_size
from sfa_dist.data.decode_limits import check_frame_count, check_frame_size, check_time
from sfa_dist.data.gather import Gathered
from sfa_dist.data.orientation import UPRIGHT, Orientation, exif_orientation, orientation_of
from sfa_dist.data.video import FrameNumbers, FrameTimes, Shrink
from sfa_dist.recipe_blocks import LimitsBlock

_DECODE_ERRORS = (av.FFmpegError, ValueError, IndexError)
Pixels = npt.NDArray[np.uint8]


def version() -> str:
    """The backend's version, for env.json."""
    return f"PyAV {package_version('av')}"


def sound_frames(data: bytes, limits: LimitsBlock) -> int:
    """See `decode.sound_frames`. Raises BadSample only where the file cannot be opened."""
    count, cut = 0, promised_size(data) > len(data)
    with opened(data) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt or (cut and packet.size == 0):
                    break  # what the decoder still holds would come out at the end, with those between it missing
                for frame in packet.decode():
                    check_time()
                    check_frame_size(frame.height, frame.width, limits)
                    if frame.is_corrupt:
                        return count
                    count += 1
        except _DECODE_ERRORS:
            return count
    return count


class PyAVVideo:
    """A `Video` on PyAV. It holds only the bytes and the time stamps; files are open only inside a call."""

    def __init__(self, data: bytes, limits: LimitsBlock) -> None:
        self._data, self._limits = data, limits
        self._key_frames: list[tuple[int, int]] = []  # (pts, where to seek for it), sorted
        times: list[int] = []
        end = 0
        with opened(data) as (container, stream):
            context = stream.codec_context
            check_frame_size(context.height, context.width, limits)
            for packet in container.demux(stream):
                check_time()
                time = packet.pts if packet.pts is not None else packet.dts
                if packet.size == 0 or packet.is_discard or time is None:  # discard: cut away by an edit list
                    continue
                times.append(time)
                check_frame_count(len(times), limits)
                end = max(end, time + (packet.duration or 0))
                if packet.is_keyframe:
                    # Some containers seek by pts, others by dts: the smaller of the two lands on this one or before.
                    seek_to = time if packet.dts is None else min(time, packet.dts)
                    self._key_frames.append((time, seek_to))
            self._size = (context.height, context.width)
            self._time_base = float(stream.time_base or 0)
        self._times = sorted(times)
        self._key_frames.sort()
        self.num_frames = len(times)
        if not times:
            raise BadSample("no frame can be decoded")
        seconds = (end - min(times)) * self._time_base
        self.fps = len(times) / seconds if seconds > 0 else 0.0

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self._size[1] if self._orientation.swaps_sides else self._size[0]

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self._size[0] if self._orientation.swaps_sides else self._size[1]

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """See `Video.frames_at`."""
        gathered = Gathered(indices, self._limits, shrink)
        numbers: dict[int, list[int]] = {}  # that are shown at a time: one, but in odd files
        for number in gathered.wanted:
            numbers.setdefault(self._times[number], []).append(number)
        for seek_to, span in self._spans(list(numbers)):
            for time, pixels in self._decode_span(seek_to, span):
                for number in numbers[time]:
                    gathered.add([number], torch.from_numpy(pixels).unsqueeze(0))
        return gathered.clip(self.num_frames)

    def times(self) -> FrameTimes:
        """See `StoredVideo.times`."""
        times: FrameTimes = np.asarray(self._times, dtype=np.float64)
        return (times - times[0]) * self._time_base

    @cached_property
    def _orientation(self) -> Orientation:
        return first_orientation(self._data, self._limits)

    def _spans(self, times: list[int]) -> Iterator[tuple[int | None, list[int]]]:
        """Groups wanted times by the key frame from which they are decoded; None means from the start of the file.

        A key frame that follows at once begins no new group: opening the file again costs more than going on."""
        groups: list[tuple[int, list[int]]] = []
        previous = -2
        for time in times:
            key_frame = max(0, bisect.bisect_right(self._key_frames, (time, 1 << 63)) - 1)
            if key_frame > previous + 1:
                groups.append((key_frame, []))
            groups[-1][1].append(time)
            previous = key_frame
        for key_frame, span in groups:
            yield (self._key_frames[key_frame][1] if key_frame > 0 else None), span

    def _decode_span(self, seek_to: int | None, times: list[int]) -> Iterator[tuple[int, Pixels]]:
        """(time, frame (H, W, 3)) for each of the given times, decoding from the seek point to the last of them."""
        missing = set(times)
        with opened(self._data) as (container, stream):
            if seek_to is not None:
                container.seek(seek_to, stream=stream, backward=True, any_frame=False)
            to_rgb = RgbConverter(stream, self._limits, self._orientation)
            for frame in container.decode(stream):
                check_time()
                time = frame.pts if frame.pts is not None else frame.dts
                if time in missing:
                    missing.remove(time)
                    yield time, to_rgb(frame)
                if not missing:
                    return


class RgbConverter:
    """Frame to upright uint8 (H, W, 3) through FFmpeg's own filter graph. `frame.to_ndarray` scales chroma of 10-bit
    video in another way than FFmpeg and torchcodec do. All frames have to be turned alike, as `orientation` where it is
    known before."""

    def __init__(self, stream: av.VideoStream, limits: LimitsBlock, orientation: Orientation | None = None) -> None:
        self._stream, self._limits, self._orientation = stream, limits, orientation
        self._graph: Graph | None = None
        self._layout: tuple[int, int, str] = (0, 0, "")

    def __call__(self, frame: av.VideoFrame) -> Pixels:
        check_frame_size(frame.height, frame.width, self._limits)
        layout = (frame.width, frame.height, frame.format.name)
        if self._graph is None or layout != self._layout:
            self._graph, self._layout = self._build(frame), layout
        orientation = _matrix_orientation(frame) or self._orientation or _turned(frame)
        if self._orientation is None:
            self._orientation = orientation
        if orientation != self._orientation:
            raise BadSample("the orientation of the picture changes inside the video: encode it anew")
        self._graph.push(frame)
        pixels: Any = self._graph.pull().to_ndarray()
        return orientation.applied(pixels)

    def _build(self, frame: av.VideoFrame) -> Graph:
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self._stream.time_base
        )
        scale, rgb, sink = graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")
        source.link_to(scale)
        scale.link_to(rgb)
        rgb.link_to(sink)
        graph.configure()
        return graph


def first_orientation(data: bytes, limits: LimitsBlock) -> Orientation:
    """The orientation of the first frame that decodes; upright where none does. Only a decoded frame tells all of it.
    Raises BadSample as `orientation_of`, and where the file cannot be opened."""
    with opened(data) as (container, stream):
        check_frame_size(stream.codec_context.height, stream.codec_context.width, limits)
        for packet in container.demux(stream):
            check_time()
            with suppress(av.error.InvalidDataError):  # the decoder that is asked for frames says what it thinks of it
                for frame in packet.decode():
                    return _matrix_orientation(frame) or exif_orientation(bytes(packet)) or _turned(frame)
    return UPRIGHT


def _matrix_orientation(frame: av.VideoFrame) -> Orientation | None:
    """How a decoded frame is turned and mirrored before it is shown; None where PyAV does not tell: it lists no side
    data of a frame that has some of a kind unknown to it, as EXIF is. Raises BadSample as `orientation_of`."""
    try:
        side_data: Any = frame.side_data
        matrix = side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:
        return None
    return orientation_of(None if matrix is None else struct.unpack("=9i", bytes(matrix)))


def _turned(frame: av.VideoFrame) -> Orientation:
    """What PyAV tells of any frame: the angle."""
    return Orientation(round(frame.rotation / 90) % 4)


@contextmanager
def opened(
    data: bytes | BinaryIO | str, **options: Any
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """(container, its best video stream), always closed again; what FFmpeg raises becomes BadSample.

    `data` is a file's content, an open file, or the name of a device or stream; `options` go to `av.open`.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with av.open(source, mode="r", metadata_errors="replace", **options) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise BadSample("no video stream")
            if stream.codec_context is None:
                raise BadSample("unknown codec")
            stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
            yield container, stream
    except _DECODE_ERRORS as error:
        raise BadSample(f"cannot be decoded: {' '.join(str(error).split())[:200]}") from error
