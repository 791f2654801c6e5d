"""What the header of a video file claims, read from its bytes without a decoder and with little memory.

A decoder allocates tables and decodes a first frame as soon as it opens a file, so a small file with a false header can
make it take gigabytes. It also takes a truncated file for a short one. So limits and completeness are checked here, in
the same way for every decoder. A header that cannot be understood claims nothing: the decoder judges the file.

Boxes: ISO/IEC 14496-12 (mp4, mov). Chunks: RIFF (avi). Elements: RFC 8794 and RFC 9559 (mkv, webm). Pictures: PNG
(third edition, 5.3) and JPEG (ITU-T T.81, B.1).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

_TOP_BOXES = {
    *(b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid", b"meta", b"udta"),
    *(b"styp", b"moof", b"mfra", b"sidx", b"ssix", b"prft", b"emsg", b"pdin"),
}
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_TRACKS, _TRACK, _VIDEO, _WIDTH, _HEIGHT = 0x1654AE6B, 0xAE, 0xE0, 0xB0, 0xBA
_START_OF_FRAME = {*range(0xFFC0, 0xFFD0)} - {0xFFC4, 0xFFC8, 0xFFCC}
_MAX_PARTS = 10_000  # per level: bounds the walk through a header of empty boxes


class VideoPromise(NamedTuple):
    """Frames of the longest video track, height and width in pixels of the largest; 0 if the header does not say."""

    frames: int = 0
    height: int = 0
    width: int = 0


class _Box(NamedTuple):
    """A box or element: its name, and where its content starts and should end."""

    name: bytes | int
    start: int
    end: int


_Split = Callable[[bytes, _Box], Iterator[_Box]]


def is_known(data: bytes) -> bool:
    """Whether the content is of a kind that shards may hold, whatever the file's name."""
    return _is_iso(data) or _is_avi(data) or _is_matroska(data) or _is_png(data) or _is_jpeg(data)


def promised_size(data: bytes) -> int:
    """Size in bytes of the complete file; 0 if the header does not say."""
    whole = _Box(b"", 0, len(data))
    try:
        if _is_iso(data):
            return max((box.end for box in _boxes(data, whole) if box.name in _TOP_BOXES), default=0)
        if _is_avi(data):
            return 8 + int(struct.unpack_from("<I", data, 4)[0])
        if _is_matroska(data):
            return max((element.end for element in _elements(data, whole) if element.name == _SEGMENT), default=0)
    except (struct.error, IndexError):
        return 0
    return 0


def promised_video(data: bytes) -> VideoPromise:
    """What the header says about the video; zeros if it cannot be read."""
    try:
        if _is_iso(data):
            return _largest(_iso_tracks(data))
        if _is_avi(data):
            return _avi(data)
        if _is_matroska(data):
            return _largest(_matroska_tracks(data))
        if _is_png(data):
            width, height = struct.unpack_from(">II", data, 16)
            return VideoPromise(1, height, width)
        if _is_jpeg(data):
            return _jpeg(data)
    except (struct.error, IndexError):
        return VideoPromise()
    return VideoPromise()


def has_constant_rate(data: bytes) -> bool:
    """Whether the header guarantees that the frames are equally spaced in time (mp4 and mov only)."""
    try:
        tables = list(_video_tables(data)) if _is_iso(data) else []
        return bool(tables) and all(_is_constant(data, table) for table in tables)
    except (struct.error, IndexError):
        return False


def _is_iso(data: bytes) -> bool:
    return data[4:8] in _TOP_BOXES


def _is_avi(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"AVI "


def _is_matroska(data: bytes) -> bool:
    return data[:4] == _EBML.to_bytes(4, "big")


def _is_png(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n"


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _largest(tracks: Iterator[VideoPromise]) -> VideoPromise:
    found = list(tracks) or [VideoPromise()]
    largest = max(found, key=lambda track: track.height * track.width)
    return largest._replace(frames=max(track.frames for track in found))


def _inside(data: bytes, split: _Split, parent: _Box, *path: bytes | int) -> Iterator[_Box]:
    """The boxes or elements under `parent` at a path of names."""
    for part in split(data, parent):
        if part.name == path[0]:
            yield from _inside(data, split, part, *path[1:]) if path[1:] else (part,)


def _video_tables(data: bytes) -> Iterator[_Box]:
    """The sample tables of an mp4's video tracks."""
    for track in _inside(data, _boxes, _Box(b"", 0, len(data)), b"moov", b"trak"):
        kinds = [data[box.start + 8 : box.start + 12] for box in _inside(data, _boxes, track, b"mdia", b"hdlr")]
        if kinds == [b"vide"]:
            yield from _inside(data, _boxes, track, b"mdia", b"minf", b"stbl")


def _iso_tracks(data: bytes) -> Iterator[VideoPromise]:
    for table in _video_tables(data):
        sizes = [struct.unpack_from(">HH", data, box.start + 40) for box in _inside(data, _boxes, table, b"stsd")]
        frames = [
            struct.unpack_from(">I", data, box.start + 8)[0]
            for name in (b"stsz", b"stz2")
            for box in _inside(data, _boxes, table, name)
        ]
        for width, height in sizes:
            yield VideoPromise(max(frames, default=0), height, width)


def _is_constant(data: bytes, table: _Box) -> bool:
    """Whether all samples of a table have one duration, and all composition offsets (ctts) are multiples of it.

    The last sample's duration may differ.
    """
    runs = (run for box in _inside(data, _boxes, table, b"stts") for run in _runs(data, box))
    steps = list(islice(runs, 3))  # enough for the test; a file may have millions
    moves = (move for box in _inside(data, _boxes, table, b"ctts") for _, move in _runs(data, box))
    if len(steps) == 2 and steps[1][0] == 1:
        steps.pop()
    if len(steps) != 1 or steps[0][1] == 0:
        return False
    first = next(moves, 0)
    return all((move - first) % steps[0][1] == 0 for move in moves)


def _runs(data: bytes, box: _Box) -> Iterator[tuple[int, int]]:
    """(count, value) of the runs of stts or ctts. Raises struct.error if they are truncated."""
    count = struct.unpack_from(">I", data, box.start + 4)[0]
    if box.start + 8 + 8 * count > min(box.end, len(data)):
        raise struct.error("runs are cut off")
    return struct.iter_unpack(">Ii", memoryview(data)[box.start + 8 : box.start + 8 + 8 * count])


def _boxes(data: bytes, parent: _Box) -> Iterator[_Box]:
    start, end = parent.start, min(parent.end, len(data))
    for _ in range(_MAX_PARTS):
        if end - start < 8:  # a few bytes of padding at the end are not a box
            return
        size, name = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:
            size, content = struct.unpack_from(">Q", data, content)[0], content + 8
        stop = start + size if size else end  # 0: to the end of the file
        if stop < content:
            return
        yield _Box(name, content, stop)
        start = stop


def _avi(data: bytes) -> VideoPromise:
    header = data.find(b"avih", 12, 4096)
    if header < 0:
        return VideoPromise()
    frames = struct.unpack_from("<I", data, header + 8 + 16)[0]
    width, height = struct.unpack_from("<II", data, header + 8 + 32)
    return VideoPromise(frames, height, width)


def _jpeg(data: bytes) -> VideoPromise:
    position = 2
    for _ in range(_MAX_PARTS):
        marker, size = struct.unpack_from(">HH", data, position)
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return VideoPromise(1, height, width)
        position += 2 + size
    return VideoPromise()


def _matroska_tracks(data: bytes) -> Iterator[VideoPromise]:
    for video in _inside(data, _elements, _Box(b"", 0, len(data)), _SEGMENT, _TRACKS, _TRACK, _VIDEO):
        values = {part.name: int.from_bytes(data[part.start : part.end], "big") for part in _elements(data, video)}
        yield VideoPromise(0, values.get(_HEIGHT, 0), values.get(_WIDTH, 0))


def _elements(data: bytes, parent: _Box) -> Iterator[_Box]:
    start, end = parent.start, min(parent.end, len(data))
    for _ in range(_MAX_PARTS):
        if end - start < 2:
            return
        name, position = _variable(data, start, keep_marker=True)
        size, content = _variable(data, position, keep_marker=False)
        unknown = size == (1 << 7 * (content - position)) - 1  # all ones: to the end, as in a live recording
        stop = end if unknown else content + size
        yield _Box(name, content, stop)
        start = stop


def _variable(data: bytes, position: int, *, keep_marker: bool) -> tuple[int, int]:
    """(an EBML variable-length integer, the position after it). Raises IndexError if there is none."""
    length = 9 - data[position].bit_length()
    if length > 8:
        raise IndexError("no such length")
    value = int.from_bytes(data[position : position + length], "big")
    return value if keep_marker else value & ((1 << 7 * length) - 1), position + length
