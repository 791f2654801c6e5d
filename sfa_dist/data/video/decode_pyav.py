"""Decoding with PyAV, whose wheel includes FFmpeg.

The packets are listed once, which usually gives the time stamps of all frames (frame_order.py). Then decoding starts at
the key frame before each wanted frame. A video whose frames must be counted is decoded from its start.
"""

from __future__ import annotations

import bisect
import io
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version as package_version
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import torch
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType

from sfa_dist.data.video.bad_sample import BadSample, OverLimit
from sfa_dist.data.video.container import promised_size
from sfa_dist.data.video.decode_limits import check_frame_size, check_time
from sfa_dist.data.video.frame_order import FrameOrder, counted_order, order_of, shown_frames, stamper
from sfa_dist.data.video.gather import GatheredClip
from sfa_dist.data.video.orientation import UPRIGHT, Orientation, exif_orientation, orientation_of
from sfa_dist.data.video.video import FrameNumbers, FrameTimes, Shrink
from sfa_dist.recipe.blocks import LimitsBlock

_DECODE_ERRORS = (av.FFmpegError, ValueError, IndexError)
Pixels = npt.NDArray[np.uint8]


def version() -> str:
    """The backend's version, for env.json."""
    return f"PyAV {package_version('av')}"


def sound_frames(data: bytes, limits: LimitsBlock) -> int:
    """See `decode.sound_frames`. Raises BadSample only if the file cannot be opened."""
    count, cut = 0, promised_size(data) > len(data)
    with opened(data) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt or (cut and packet.size == 0):
                    break  # flushing the decoder would give later frames with some missing in between
                for frame in packet.decode():
                    check_time()
                    check_frame_size(frame.height, frame.width, limits)
                    if frame.is_corrupt:
                        return count
                    count += 1
        except _DECODE_ERRORS:
            return count
    return count


def played(data: bytes, limits: LimitsBlock) -> Iterator[Pixels]:
    """All frames of the file played from its start, upright, uint8 (H, W, 3). Raises BadSample."""
    with opened(data) as (container, stream):
        to_rgb = RgbConverter(stream, limits)
        yield from map(to_rgb, shown_frames(container.demux(stream)))


class Look(NamedTuple):
    """What a file's packets tell: the order of its frames, and their stored height and width in pixels.

    `orientation` is how they are rotated and mirrored for display; None if the first packets do not tell.
    """

    order: FrameOrder
    size: tuple[int, int]
    orientation: Orientation | None


def look(source: bytes | BinaryIO, limits: LimitsBlock | None) -> Look:
    """Reads a file's packets. Raises BadSample, and OverLimit if `limits` are given."""
    with opened(source) as (container, stream):
        size = (stream.codec_context.height, stream.codec_context.width)
        if limits is not None:
            check_frame_size(*size, limits)
        head: list[av.Packet] = []
        order = order_of(container, stream, limits, head)
        if order is not None:
            return Look(order, size, _orientation_in(head))
    with opened(source) as (container, stream):
        return Look(counted_order(container, stream, limits), size, None)


class PyAVVideo:
    """A `Video` on PyAV. It holds only the bytes and the order of the frames; files are open only inside a call.

    `closed` is `FrameOrder.closed`.
    """

    def __init__(self, data: bytes, limits: LimitsBlock) -> None:
        self._data, self._limits = data, limits
        order, self._size, self._early_orientation = look(data, limits)
        self._order, self.closed = order, order.closed
        self.num_frames, self.fps = len(order.times), order.fps

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self._size[1] if self.orientation.swaps_sides else self._size[0]

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self._size[0] if self.orientation.swaps_sides else self._size[1]

    def frames_at(self, indices: FrameNumbers, shrink: Shrink | None = None) -> torch.Tensor:
        """See `Video.frames_at`."""
        gathered, stamps = GatheredClip(indices, self._limits, shrink), self._order.stamps
        numbers = {stamps[number] if stamps else number: number for number in gathered.wanted}
        for key_frame, span in self._spans(list(numbers)):
            for label, pixels in self._decode_span(key_frame, span):
                gathered.add([numbers[label]], torch.from_numpy(pixels).unsqueeze(0))
        return gathered.clip(self.num_frames)

    def times(self) -> FrameTimes:
        """See `StoredVideo.times`."""
        return self._order.times

    @cached_property
    def orientation(self) -> Orientation:
        """How frames are rotated and mirrored for display."""
        return self._early_orientation or first_orientation(self._data, self._limits)

    def _spans(self, wanted: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Groups wanted frames by the key frame from which they are decoded; 0 means from the start of the file.

        The next key frame starts no new group: opening the file again costs more than decoding on.
        """
        groups: list[tuple[int, list[int]]] = []
        previous = -2
        for label in wanted:
            key_frame = max(0, bisect.bisect_right(self._order.key_frames, (label, 1 << 63)) - 1)
            if key_frame > previous + 1:
                groups.append((key_frame, []))
            groups[-1][1].append(label)
            previous = key_frame
        yield from groups

    def _decode_span(self, key_frame: int, wanted: list[int]) -> Iterator[tuple[int, Pixels]]:
        """(stamp or number, frame (H, W, 3)) of each wanted frame, decoding from the key frame to the last of them."""
        missing, counted = set(wanted), self._order.stamps is None
        with opened(self._data) as (container, stream):
            packets, shown_at = container.demux(stream), stamper(stream)
            if key_frame:
                key, seek_to = self._order.key_frames[key_frame]
                container.seek(seek_to, stream=stream, backward=True, any_frame=False)
                first = next(packets)
                if not (first.is_keyframe and (shown_at(first) or 0) <= key):  # the container has a wrong index
                    yield from self._decode_span(0, wanted)
                    return
                packets = chain([first], packets)
            to_rgb = RgbConverter(stream, self._limits, self.orientation)
            for number, frame in enumerate(shown_frames(packets)):
                check_time()
                label = number if counted else shown_at(frame)
                if label in missing:
                    missing.remove(label)
                    yield label, to_rgb(frame)
                if not missing:
                    return


class RgbConverter:
    """Converts frames to upright uint8 (H, W, 3) with FFmpeg's filter graph.

    (`frame.to_ndarray` scales the chroma of 10-bit video differently from FFmpeg and torchcodec.) Raises BadSample if
    the orientation changes between frames, or differs from a given `orientation`.
    """

    def __init__(self, stream: av.VideoStream, limits: LimitsBlock, orientation: Orientation | None = None) -> None:
        self._stream, self._limits, self._orientation = stream, limits, orientation
        self._graph: Graph | None = None
        self._layout: tuple[int, int, str] = (0, 0, "")

    def __call__(self, frame: av.VideoFrame) -> Pixels:
        check_frame_size(frame.height, frame.width, self._limits)
        layout = (frame.width, frame.height, frame.format.name)
        if self._graph is None or layout != self._layout:
            self._graph, self._layout = self._build(frame), layout
        orientation = _matrix_orientation(frame) or self._orientation or _rotation(frame)
        if self._orientation is None:
            self._orientation = orientation
        if orientation != self._orientation:
            raise BadSample("the orientation of the picture changes inside the video: encode it again")
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
    """The orientation of the first frame that decodes; upright if none does. Only a decoded frame has all of it.

    Raises BadSample as `orientation_of` does, and if the file cannot be opened.
    """
    with opened(data) as (container, stream):
        check_frame_size(stream.codec_context.height, stream.codec_context.width, limits)
        return _orientation_of_first(container.demux(stream)) or UPRIGHT


def _orientation_in(head: list[av.Packet]) -> Orientation | None:
    """As `first_orientation`, from the first packets; None if they hold no frame, or one at a wrong angle."""
    try:
        return _orientation_of_first(head)
    except OverLimit:
        raise
    except (BadSample, *_DECODE_ERRORS):  # reported when the orientation is asked for
        return None


def _orientation_of_first(packets: Iterable[av.Packet]) -> Orientation | None:
    """The orientation of the first frame that decodes; None if none does. Raises BadSample as `orientation_of` does."""
    for packet in packets:
        check_time()
        with suppress(av.error.InvalidDataError):  # reported when frames are decoded
            for frame in packet.decode():
                return _matrix_orientation(frame) or exif_orientation(bytes(packet)) or _rotation(frame)
    return None


def _matrix_orientation(frame: av.VideoFrame) -> Orientation | None:
    """How a decoded frame is rotated and mirrored for display; None if PyAV does not say.

    PyAV cannot list the side data of a frame that has some of a kind unknown to it, such as EXIF. Raises BadSample as
    `orientation_of` does.
    """
    try:
        side_data: Any = frame.side_data
        matrix = side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:
        return None
    return orientation_of(None if matrix is None else struct.unpack("=9i", bytes(matrix)))


def _rotation(frame: av.VideoFrame) -> Orientation:
    """The rotation of a frame, which PyAV always gives."""
    return Orientation(round(frame.rotation / 90) % 4)


@contextmanager
def opened(
    data: bytes | BinaryIO | str, **options: Any
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """(container, its best video stream), closed at the end. Errors of FFmpeg become BadSample.

    `data` is a file's content, an open file, or the name of a device or stream; `options` go to `av.open`.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    if isinstance(source, io.BufferedIOBase):
        source.seek(0)  # the file may have been read before
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
