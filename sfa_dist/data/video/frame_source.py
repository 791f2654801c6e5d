"""Frames one after another, from a file of any length, a camera, a stream or a pipe, at a constant rate.

PyAV decodes. Only the current frame is held and nothing is sought, so sources without seeking work too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from sfa_dist.data.video.bad_sample import BadSample, OverLimit
from sfa_dist.data.video.container import is_known
from sfa_dist.data.video.decode_pyav import Pixels, RgbConverter, look, opened
from sfa_dist.data.video.file_kinds import HEAD_BYTES, unreadable
from sfa_dist.data.video.frame_order import FrameOrder, shown_frames, timed
from sfa_dist.data.video.resample import held
from sfa_dist.recipe.blocks import LimitsBlock, Rate

PIPE = "-"
SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")
LONGEST_GAP = 10.0  # seconds without a frame after which the clock of a live source restarts
_OPEN_SECONDS, _READ_SECONDS = 15.0, 30.0  # limits for a server


@dataclass
class FrameSource:
    """An opened source.

    `fps` is the rate of `frames`; `skipped[0]` counts the packets of a live source that did not decode.
    """

    fps: float
    frames: Iterator[Pixels]
    skipped: list[int] = field(default_factory=lambda: [0])


def is_live(source: str) -> bool:
    """Whether the source has no known end: a pipe, a stream or a device."""
    path = Path(source)
    return source == PIPE or "://" in source or path.is_char_device() or path.is_fifo()


@contextmanager
def open_source(source: str, rate: Rate, limits: LimitsBlock) -> Iterator[FrameSource]:
    """Upright uint8 (H, W, 3) frames of a source at `rate` (`data.fps`). Raises BadSample, also while reading.

    With a `rate` of None, a file's rate is found by reading its packets once before; a live source's is its header's.
    """
    live = is_live(source)
    with ExitStack() as stack:
        container, stream = stack.enter_context(_opened(source, live))
        order = None if live or rate == "stored" else _order_of(Path(source))
        own = order.fps if order else float(stream.average_rate or stream.guessed_rate or 0)
        fps = rate if isinstance(rate, float) else own
        if fps <= 0:
            raise BadSample("its header has no frame rate: set data.fps")
        found = FrameSource(fps, iter(()))
        if live:
            received = timed(_live_frames(container, stream, found.skipped), stream, LONGEST_GAP)
            timed_frames = _from_zero(received)
        else:
            timed_frames = _by_order(shown_frames(container.demux(stream)), order)
        if rate == "stored":
            timed_frames = ((number / fps, frame) for number, (_, frame) in enumerate(timed_frames))
        to_rgb = RgbConverter(stream, limits)
        shown = held(timed_frames, fps, LONGEST_GAP if live else None)
        found.frames = _converted(shown, to_rgb)
        yield found


def _order_of(path: Path) -> FrameOrder:
    with path.open("rb") as file:
        return look(file, None).order


@contextmanager
def _opened(source: str, live: bool) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. For a pipe that does not decode, BadSample has the likely reason added."""
    try:
        with _container(source, live) as opening:
            yield opening
    except OverLimit:
        raise
    except BadSample as error:
        if source != PIPE:
            raise
        hint = "an mp4 can come through a pipe only with its header in front (ffmpeg -movflags faststart)"
        raise BadSample(f"{error.reason}; {hint}") from error


@contextmanager
def _container(source: str, live: bool) -> Iterator[tuple[Any, Any]]:
    with ExitStack() as stack:
        file: str | BinaryIO
        options: dict[str, Any] = {}
        if source == PIPE:
            file = _Unseekable(sys.stdin.buffer)  # type: ignore[assignment]
        elif live:
            file = source
            options = {"timeout": (_OPEN_SECONDS, _READ_SECONDS)}
            if Path(source).is_char_device():
                options["format"] = "v4l2"
        else:
            # An open file and not a path, so that a playlist cannot open other files.
            file = stack.enter_context(Path(source).open("rb"))
            head = file.read(HEAD_BYTES)
            if not is_known(head):
                raise BadSample(unreadable(head, source))
            file.seek(0)
        yield stack.enter_context(opened(file, **options))


class _Unseekable:
    """A pipe without `seek`: PyAV treats any object that has `seek` as a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.name = PIPE


def _by_order(frames: Iterator[av.VideoFrame], order: FrameOrder | None) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) of a file. Without an order all times are 0.0, because they are not used."""
    number = -1
    for number, frame in enumerate(frames):
        if order is not None and number >= len(order.times):
            break
        yield float(order.times[number]) if order else 0.0, frame
    if order is not None and number + 1 < len(order.times):
        raise BadSample(f"frame {number + 1} of {len(order.times)} cannot be decoded")


def _from_zero(frames: Iterator[tuple[float, av.VideoFrame]]) -> Iterator[tuple[float, av.VideoFrame]]:
    first: float | None = None
    for time, frame in frames:
        first = time if first is None else first
        yield time - first, frame


def _live_frames(container: Any, stream: Any, skipped: list[int]) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            skipped[0] += 1  # a stream continues after lost packets


def _converted(frames: Iterator[av.VideoFrame], to_rgb: RgbConverter) -> Iterator[Pixels]:
    """RGB pixels; a frame that is repeated is converted once."""
    last: av.VideoFrame | None = None
    pixels: Pixels = np.empty((0, 0, 3), np.uint8)
    for frame in frames:
        if frame is not last:
            last, pixels = frame, to_rgb(frame)
        yield pixels
