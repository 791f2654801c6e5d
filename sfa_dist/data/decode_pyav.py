"""Decoding with PyAV, the backend that works wherever its wheel does: FFmpeg comes inside.

The packets are listed once, which mostly gives the time stamps of all frames (frame_order.py); then only the spans from
the key frame before each wanted frame are decoded. What has to be counted is decoded from its start.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version as package_version
from itertools import chain
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import torch
from av.filter import Graph

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.container import promised_size
from sfa_dist.data.decode_limits import check_clip_bytes, check_frame_size, check_time
from sfa_dist.data.frame_order import FrameOrder, counted_order, order_of, shown_frames, stamper
from sfa_dist.data.video import FrameNumbers, FrameTimes
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


def played(data: bytes, limits: LimitsBlock) -> Iterator[Pixels]:
    """All frames as they come out where the file is played from its start, upright (H, W, 3). Raises BadSample."""
    with opened(data) as (container, stream):
        to_rgb = RgbConverter(stream, limits)
        yield from map(to_rgb, shown_frames(container.demux(stream)))


def look(source: bytes | BinaryIO, limits: LimitsBlock | None) -> tuple[FrameOrder, tuple[int, int]]:
    """(the order of a file's frames, their stored height and width). Raises BadSample; OverLimit where `limits` are
    given."""
    with opened(source) as (container, stream):
        size = (stream.codec_context.height, stream.codec_context.width)
        if limits is not None:
            check_frame_size(*size, limits)
        order = order_of(container, stream, limits)
    if order is not None:
        return order, size
    with opened(source) as (container, stream):
        return counted_order(container, stream, limits), size


class PyAVVideo:
    """A `Video` on PyAV. It holds only the bytes and the order of the frames; files are open only inside a call.

    `closed` is `FrameOrder.closed`."""

    def __init__(self, data: bytes, limits: LimitsBlock) -> None:
        self._data, self._limits = data, limits
        order, self._size = look(data, limits)
        self._order, self.closed = order, order.closed
        self.num_frames, self.fps = len(order.times), order.fps

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self._size[1] if self._quarter_turns % 2 else self._size[0]

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self._size[0] if self._quarter_turns % 2 else self._size[1]

    def frames_at(self, indices: FrameNumbers) -> torch.Tensor:
        """See `Video.frames_at`."""
        check_clip_bytes(len(indices), *self._size, self._limits)
        labels = self._order.stamps or range(self.num_frames)
        rows: dict[int, list[int]] = {}
        for row, index in enumerate(indices):
            rows.setdefault(labels[index], []).append(row)
        clip: Pixels | None = None
        for key_frame, span in self._spans(sorted(rows)):
            for label, pixels in self._decode_span(key_frame, span):
                if clip is None:
                    clip = np.empty((len(indices), *pixels.shape), np.uint8)
                if pixels.shape != clip.shape[1:]:
                    raise BadSample("the size of the frames changes inside the video")
                clip[rows.pop(label)] = pixels
        if rows or clip is None:
            raise BadSample(f"frame {labels.index(min(rows))} of {self.num_frames} cannot be decoded")
        return torch.from_numpy(clip)

    def times(self) -> FrameTimes:
        """See `StoredVideo.times`."""
        return self._order.times

    @cached_property
    def _quarter_turns(self) -> int:
        """Counter-clockwise quarter turns that make a frame upright. Only a decoded frame tells."""
        with opened(self._data) as (container, stream):
            for frame in shown_frames(container.demux(stream)):
                return _quarter_turns(frame)
        raise BadSample("no frame can be decoded")

    def _spans(self, wanted: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Groups wanted frames by the key frame from which they are decoded; 0 means from the start of the file.

        A key frame that follows at once begins no new group: opening the file again costs more than going on."""
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
            to_rgb = RgbConverter(stream, self._limits)
            for number, frame in enumerate(shown_frames(packets)):
                check_time()
                label = number if counted else shown_at(frame)
                if label in missing:
                    missing.remove(label)
                    yield label, to_rgb(frame)
                if not missing:
                    return


class RgbConverter:
    """Frame to upright uint8 (H, W, 3) through FFmpeg's own filter graph. `frame.to_ndarray` scales chroma of 10-bit
    video in another way than FFmpeg and torchcodec do."""

    def __init__(self, stream: av.VideoStream, limits: LimitsBlock) -> None:
        self._stream, self._limits = stream, limits
        self._graph: Graph | None = None
        self._layout: tuple[int, int, str] = (0, 0, "")

    def __call__(self, frame: av.VideoFrame) -> Pixels:
        check_frame_size(frame.height, frame.width, self._limits)
        layout = (frame.width, frame.height, frame.format.name)
        if self._graph is None or layout != self._layout:
            self._graph, self._layout = self._build(frame), layout
        self._graph.push(frame)
        pixels = self._graph.pull().to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, _quarter_turns(frame)))

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


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


@contextmanager
def opened(
    data: bytes | BinaryIO | str, **options: Any
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """(container, its best video stream), always closed again; what FFmpeg raises becomes BadSample.

    `data` is a file's content, an open file, or the name of a device or stream; `options` go to `av.open`.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    if isinstance(source, io.BufferedIOBase):
        source.seek(0)  # a file may be opened again
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
