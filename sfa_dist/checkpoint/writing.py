"""What one rank writes of a save: its moments into a file of its own, its masters into the common file.

This runs during training, so it reads staged copies only, and it checks between two chunks whether the save has been
called off. A file's sha256 is computed from the bytes in memory, so damage by the disk shows when the file is read.
For its spans of the common file a rank reports the crc32 of the bytes in memory; rank 0 reads the file and compares.
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
    """NaN or infinity in what would be saved: the checkpoint would take the place of a good one."""


class CalledOffError(Exception):
    """The save is no longer wanted, because another rank's part has failed or the run is over."""


@dataclass(frozen=True)
class SavePart:
    """One rank's part of a save into `folder`.

    `masters` go into the common model file of `layout`, `moments` into the file named `optimizer`, which is empty on
    ranks that own nothing. `state` goes into state.json and is None on all ranks but 0.
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
        """Bytes that this rank will write, without headers."""
        return sum(piece.size for piece in (*self.masters, *self.moments))


@dataclass(frozen=True)
class Written:
    """What one rank has written: its own files, and its spans of the common file."""

    files: dict[str, Described]
    spans: list[Span]


def write_part(part: SavePart, failpoints: Failpoints, called_off: threading.Event) -> Written:
    """Writes and flushes one rank's part of a save.

    Raises OSError, NotFiniteError for a NaN or infinity, CalledOffError once `called_off` is set.
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
        positions = [(layout.offsets[f"{p.name}/{p.start}/{p.key}"], p) for p in part.moments]
        _write(part.folder / part.optimizer, layout.header, positions, digest.update, at_half, called_off)
        files[part.optimizer] = {"size": layout.size, "sha256": digest.hexdigest()}
        failpoints.reach("save.between_files", step=part.step)
    positions = [(part.layout.offsets[p.name] + ITEM * p.start, p) for p in part.masters]
    if positions:
        _write(part.folder / MODEL, b"", positions, _ignore, at_half, called_off)
        failpoints.reach("save.between_files", step=part.step)
    if part.state is not None:
        write_json(part.folder / STATE, part.state)
    return Written(files, [(position, p.size, zlib.crc32(bytes_of(p.values))) for position, p in positions])


def _write(
    path: Path,
    header: bytes,
    positions: Sequence[tuple[int, Piece]],
    on_chunk: Callable[[memoryview], object],
    at_half: Callable[[], None],
    called_off: threading.Event,
) -> None:
    """Writes pieces at their positions in a file, in order, and flushes it. `on_chunk` gets the bytes of the pieces."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _write_all(descriptor, memoryview(header), 0)
        for number, (position, piece) in enumerate(sorted(positions, key=lambda item: item[0])):
            if number == len(positions) // 2:
                at_half()
            data = bytes_of(piece.values)
            for first in range(0, len(data), CHUNK):
                if called_off.is_set():
                    raise CalledOffError
                chunk = data[first : first + CHUNK]
                on_chunk(chunk)
                _write_all(descriptor, chunk, position + first)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _ignore(data: memoryview) -> None:
    del data


def begin_model(path: Path, layout: Layout) -> None:
    """Makes the common file with its header and full length, before any rank writes into it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        os.ftruncate(descriptor, layout.size)
        _write_all(descriptor, memoryview(layout.header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_model(path: Path, layout: Layout, spans: Sequence[Span]) -> Described:
    """Reads the common file back, once, and returns its `size` and `sha256`.

    It is opened anew after all writers have closed it: only then does a network disk show what they wrote.
    Raises OSError if the file is not what the ranks wrote, ValueError if their spans do not cover it exactly.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if file.read(len(layout.header)) != layout.header:
            raise OSError(f"{path}: its header is not what rank 0 wrote")
        digest.update(layout.header)
        position = len(layout.header)
        for start, size, expected in sorted(spans):
            if start != position:
                raise ValueError(f"{path}: the ranks' parts leave a gap or overlap at byte {min(start, position)}")
            crc = 0
            while position < start + size:
                chunk = file.read(min(CHUNK, start + size - position))
                if not chunk:
                    raise OSError(f"{path} ends at byte {position} of {layout.size}")
                digest.update(chunk)
                crc = zlib.crc32(chunk, crc)
                position += len(chunk)
            if crc != expected:
                raise OSError(f"{path}: bytes {start} to {start + size} are not what was written")
        if position != layout.size or file.read(1):
            raise ValueError(f"{path}: the ranks' parts cover {position} bytes of {layout.size}")
    return {"size": layout.size, "sha256": digest.hexdigest()}
