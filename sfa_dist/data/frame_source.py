"""Frames one after another, from a file of any length, a camera, a stream or a pipe, at a constant rate.

By PyAV alone. Nothing is held but the frame in hand, and nothing is skipped to, so what cannot be sought works too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from sfa_dist.data.bad_sample import BadSample, OverLimit
from sfa_dist.data.container import is_known
from sfa_dist.data.decode_pyav import Pixels, RgbConverter, opened
from sfa_dist.data.file_kinds import HEAD_BYTES, unreadable
from sfa_dist.data.resample import held
from sfa_dist.recipe_blocks import LimitsBlock, Rate

PIPE = "-"
SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")
LONGEST_GAP = 10.0  # seconds without a frame after which a live source starts its clock anew
_OPEN_SECONDS, _READ_SECONDS = 15.0, 30.0  # that a server may take


@dataclass
class FrameSource:
    """An opened source. `fps` is the rate at which its frames come; `skipped` counts packets of a live source that did
    not decode."""

    fps: float
    frames: Iterator[Pixels]
    skipped: list[int] = field(default_factory=lambda: [0])


def is_live(source: str) -> bool:
    """Whether it has no end that is known: a pipe, a stream or a device."""
    path = Path(source)
    return source == PIPE or "://" in source or path.is_char_device() or path.is_fifo()


@contextmanager
def open_source(source: str, rate: Rate, limits: LimitsBlock) -> Iterator[FrameSource]:
    """Upright uint8 (H, W, 3) frames of a source at `rate` (`data.fps`). Raises BadSample, on opening and in between.

    The own rate (None) of a file is found by reading its packets once before; of what is live, its header is believed.
    """
    live = is_live(source)
    with ExitStack() as stack:
        own = own_rate(Path(source)) if rate is None and not live else None
        container, stream = stack.enter_context(_opened(source, live))
        fps = rate if isinstance(rate, float) else own or float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0:
            raise BadSample("it does not tell its frame rate: set data.fps")
        stored = rate == "stored"
        found = FrameSource(fps, iter(()))
        timed = _decoded(container, stream, live, fps, stored, found.skipped)
        to_rgb = RgbConverter(stream, limits)
        shown = held(timed, fps, LONGEST_GAP if live else None)
        found.frames = _converted(shown, to_rgb)
        yield found


def own_rate(path: Path) -> float:
    """Frames a second from the first frame of a file to its last, as `resample.own_rate`; 1.0 for a single frame."""
    first = last = frames = 0
    with _opened(str(path), live=False) as (container, stream):
        for packet in container.demux(stream):
            time = packet.pts if packet.pts is not None else packet.dts
            if packet.size == 0 or packet.is_discard or time is None:
                continue
            first, last = (min(first, time), max(last, time)) if frames else (time, time)
            frames += 1
        seconds = (last - first) * float(stream.time_base or 0)
    return (frames - 1) / seconds if seconds > 0 else 1.0


@contextmanager
def _opened(source: str, live: bool) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. What does not decode behind a pipe, at once or later, is told with the likely
    reason."""
    try:
        with _container(source, live) as opening:
            yield opening
    except OverLimit:
        raise
    except BadSample as error:
        if source != PIPE:
            raise
        hint = "a mp4 can come through a pipe only with its header in front (ffmpeg -movflags faststart)"
        raise BadSample(f"{error.reason}; {hint}") from error


@contextmanager
def _container(source: str, live: bool) -> Iterator[tuple[Any, Any]]:
    with ExitStack() as stack:
        place: str | BinaryIO
        options: dict[str, Any] = {}
        if source == PIPE:
            place = _Unseekable(sys.stdin.buffer)  # type: ignore[assignment]
        elif live:
            place = source
            options = {"timeout": (_OPEN_SECONDS, _READ_SECONDS)}
            if Path(source).is_char_device():
                options["format"] = "v4l2"
        else:
            # As an open file, so that a playlist in it cannot lead to others.
            place = stack.enter_context(Path(source).open("rb"))
            head = place.read(HEAD_BYTES)
            if not is_known(head):
                raise BadSample(unreadable(head, source))
            place.seek(0)
        yield stack.enter_context(opened(place, **options))


class _Unseekable:
    """A pipe: PyAV takes whatever can `seek` for a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.name = PIPE


def _decoded(
    container: Any, stream: Any, live: bool, fps: float, stored: bool, skipped: list[int]
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame); by its number where times are not asked for, or where there are none."""
    base = float(stream.time_base or 0)
    first: int | None = None
    numbers = count()
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if not live:
                raise
            skipped[0] += 1  # a stream that loses packets goes on
            continue
        for frame in frames:
            number, time = next(numbers), frame.pts if frame.pts is not None else frame.dts
            if first is None:
                first = time
            timed = not stored and time is not None and first is not None
            yield (time - first) * base if timed else number / fps, frame


def _converted(frames: Iterator[av.VideoFrame], to_rgb: RgbConverter) -> Iterator[Pixels]:
    """A frame that is shown again is converted once."""
    last: av.VideoFrame | None = None
    pixels: Pixels = np.empty((0, 0, 3), np.uint8)
    for frame in frames:
        if frame is not last:
            last, pixels = frame, to_rgb(frame)
        yield pixels
