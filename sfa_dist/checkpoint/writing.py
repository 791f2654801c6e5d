"""What one rank writes of a save: its moments into a file of its own, its masters into the file of all.

It runs beside the training, so it touches staged copies alone, and between two chunks it looks whether it was called
off. A file's sha256 is that of the bytes that were meant, so what a disk makes of them shows when they are read. For
its spans in the common file a rank tells the crc32 of what was meant; rank 0 reads the whole and compares.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfa_dist.boundary.disk import write_json
from sfa_dist.checkpoint.failpoints import Failpoints
from sfa_dist.checkpoint.layout import CHUNK, ITEM, Layout, bytes_of, plan_layout
from sfa_dist.checkpoint.staging import Piece

MODEL = "model.safetensors"
STATE = "state.json"
Described = dict[str, Any]  # `size` and `sha256` of a file.
Span = tuple[int, int, int]  # First byte in the file, bytes, crc32.


class NotFiniteError(Exception):
    """NaN or infinity where it would be saved: a checkpoint of it would push out a good one."""


class CalledOffError(Exception):
    """The save is not wanted any more, because another rank's part of it has failed or the run is over."""


@dataclass(frozen=True)
class SavePart:
    """One rank's part of a save into `folder`.

    `masters` go into the common model file of `layout`; `moments` into the file `optimizer`, which only ranks that
    own something write (else it is empty); `state` is written by rank 0 and None elsewhere.
    """

    folder: Path
    layout: Layout
    masters: Sequence[Piece]
    moments: Sequence[Piece]
    optimizer: str
    state: Mapping[str, Any] | None
    step: int

    @property
    def size(self) -> int:
        """Bytes that this rank is going to write, headers not counted."""
        return sum(piece.size for piece in (*self.masters, *self.moments))


@dataclass(frozen=True)
class Written:
    """What one rank has on disk: its own files, and its spans of the common one."""

    files: dict[str, Described]
    spans: list[Span]


def write_part(part: SavePart, failpoints: Failpoints, called_off: threading.Event) -> Written:
    """Writes and flushes everything of one rank.

    Raises OSError, NotFiniteError, CalledOffError.
    """
    for piece in (*part.masters, *part.moments):
        if not np.isfinite(piece.values.numpy()).all():
            raise NotFiniteError(f"{piece.key} of {piece.name} is not finite")

    def at_half() -> None:
        failpoints.reach("save.write", step=part.step)

    files: dict[str, Described] = {}
    if part.optimizer:
        shapes = {f"{p.name}/{p.start}/{p.key}": (len(p.values),) for p in part.moments}
        layout = plan_layout(shapes)
        digest = hashlib.sha256(layout.header)
        places = [(layout.offsets[f"{p.name}/{p.start}/{p.key}"], p) for p in part.moments]
        _write(part.folder / part.optimizer, layout.header, places, digest.update, at_half, called_off)
        files[part.optimizer] = {"size": layout.size, "sha256": digest.hexdigest()}
        failpoints.reach("save.between_files", step=part.step)
    places = [(part.layout.offsets[p.name] + ITEM * p.start, p) for p in part.masters]
    if places:
        _write(part.folder / MODEL, b"", places, _ignore, at_half, called_off)
        failpoints.reach("save.between_files", step=part.step)
    if part.state is not None:
        write_json(part.folder / STATE, part.state)
    return Written(files, [(place, p.size, zlib.crc32(bytes_of(p.values))) for place, p in places])


def _write(
    path: Path,
    header: bytes,
    places: Sequence[tuple[int, Piece]],
    note: Callable[[memoryview], object],
    at_half: Callable[[], None],
    called_off: threading.Event,
) -> None:
    """Pieces at their places in a file, in order, flushed; `note` is told all bytes after the header."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _write_all(descriptor, memoryview(header), 0)
        for number, (place, piece) in enumerate(sorted(places, key=lambda item: item[0])):
            if number == len(places) // 2:
                at_half()
            data = bytes_of(piece.values)
            for first in range(0, len(data), CHUNK):
                if called_off.is_set():
                    raise CalledOffError
                chunk = data[first : first + CHUNK]
                note(chunk)
                _write_all(descriptor, chunk, place + first)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count


def _ignore(data: memoryview) -> None:
    del data


def begin_model(path: Path, layout: Layout) -> None:
    """The common file with its header and its length, before any rank writes into it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        os.ftruncate(descriptor, layout.size)
        _write_all(descriptor, memoryview(layout.header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_model(path: Path, layout: Layout, spans: Sequence[Span]) -> Described:
    """Reads the common file back, once. Raises OSError where it is not what the ranks wrote, or where their spans do
    not cover it.

    It is opened anew, after all writers have closed it: then a network disk shows what they wrote.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if file.read(len(layout.header)) != layout.header:
            raise OSError(f"{path}: its header is not what rank 0 wrote")
        digest.update(layout.header)
        place = len(layout.header)
        for start, size, expected in sorted(spans):
            if start != place:
                raise ValueError(f"{path}: the ranks' parts leave a gap or overlap at byte {min(start, place)}")
            crc = 0
            while place < start + size:
                chunk = file.read(min(CHUNK, start + size - place))
                if not chunk:
                    raise OSError(f"{path} ends at byte {place} of {layout.size}")
                digest.update(chunk)
                crc = zlib.crc32(chunk, crc)
                place += len(chunk)
            if crc != expected:
                raise OSError(f"{path}: bytes {start} to {start + size} are not what was written")
        if place != layout.size or file.read(1):
            raise ValueError(f"{path}: the ranks' parts cover {place} bytes of {layout.size}")
    return {"size": layout.size, "sha256": digest.hexdigest()}
