"""index.json: the file beside shards that records where each sample is in them.

    {"version": 2, "shards": {"train-000000.tar": {
        "size": BYTES, "sha256": HEX,
        "keys": [...], "labels": [3, null, ...],
        "members": {"mp4": [OFFSETS, SIZES, CRC32S], "cls": [...], ...},
        "errors": {"1": "missing label"}}}}

It has one list for each attribute, not one object for each sample: a third of the size and a tenth of the reading time.
A label of a noun and a verb is a list of the two, in this order. A sample that lacks a member has offset -1 in its
lists. Version 1, of release 0.1, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sfa_dist.boundary.disk import parse_json
from sfa_dist.data.shards.index_columns import (
    SIDECAR_FROM,
    SUFFIXES,
    Columns,
    Int64,
    Strings,
    label_array,
    read_sidecar,
    write_sidecar,
)
from sfa_dist.data.shards.shard_walk import CLIP_SUFFIXES, SampleEntry, ShardEntry, TarMember
from sfa_dist.errors import DataError

INDEX_NAME = "index.json"
INDEX_VERSION = 2
RawShard = dict[str, Any]  # one value of "shards"


def read_index(folder: Path) -> dict[str, ShardEntry]:
    """The entries of a folder's index.json by shard name; empty without the file. Raises DataError if it is garbled."""
    with _readable(folder / INDEX_NAME):
        return {name: to_entry(raw) for name, raw in read_raw(folder).items()}


def read_raw(folder: Path) -> dict[str, RawShard]:
    """Like `read_index`, but with the entries as stored in the file, which is fast for millions of samples."""
    _require_plain(folder / INDEX_NAME)
    try:
        data = (folder / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{folder / INDEX_NAME} cannot be read: {error}") from error
    return parse_index(data, folder / INDEX_NAME)


def _require_plain(path: Path) -> None:
    """Raises DataError for a pipe or a device: opening one waits for its other end."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file: remove it, and `sfa index` makes a new one")


def parse_index(data: bytes, where: Path | str) -> dict[str, RawShard]:
    """The entries in the text of an index.json. Raises DataError if it is garbled or of another version."""
    with _readable(where):
        content = parse_json(data)
        if content["version"] == 1:
            text = f"{where} is an index of version 1, which is no longer read"
            raise DataError(f"{text}: remove it and run `sfa index {_shards_beside(where)}`")
        if content["version"] != INDEX_VERSION:
            raise ValueError(f"version {content['version']}, this program reads {INDEX_VERSION}")
        shards: dict[str, RawShard] = dict(content["shards"].items())
        return shards


def format_index(shards: Mapping[str, RawShard]) -> bytes:
    """The text of an index.json."""
    content = {"version": INDEX_VERSION, "shards": dict(sorted(shards.items()))}
    return json.dumps(content, separators=(",", ":")).encode()


def write_index(folder: Path, shards: Mapping[str, RawShard]) -> bool:
    """Writes index.json. If it cannot be written, warns and returns False."""
    try:
        write_atomically(folder / INDEX_NAME, format_index(shards))
    except OSError as error:
        text = f"{folder / INDEX_NAME} cannot be written ({error}): the shards are indexed again at each start"
        warnings.warn(text, stacklevel=2)
        return False
    return True


def read_columns(folder: Path) -> Columns | None:
    """All samples of a folder's index.json, None without the file; read from index.npz if there are many.

    Raises DataError if index.json is garbled.
    """
    path = folder / INDEX_NAME
    _require_plain(path)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    columns = read_sidecar(folder, sha256)
    if columns is None:
        columns = to_columns(read_raw(folder), path)
        if len(columns.keys) >= SIDECAR_FROM:
            write_sidecar(folder, sha256, columns)
    return columns


def to_raw(entry: ShardEntry) -> RawShard:
    """The entry of a shard in index.json."""
    samples = entry.samples
    nothing = TarMember(-1, 0, 0)
    suffixes = dict.fromkeys(suffix for sample in samples for suffix in sample.members)
    return {
        "size": entry.size,
        "sha256": entry.sha256,
        "keys": [sample.key for sample in samples],
        "labels": [sample.label for sample in samples],
        "members": {
            suffix: [list(column) for column in zip(*(s.members.get(suffix, nothing) for s in samples), strict=True)]
            for suffix in suffixes
        },
        "errors": {str(row): sample.error for row, sample in enumerate(samples) if sample.error},
    }


def to_entry(raw: RawShard) -> ShardEntry:
    """The inverse of `to_raw`. Raises LookupError, ValueError, AttributeError or TypeError for an invalid entry."""
    members: list[dict[str, TarMember]] = [{} for _ in raw["keys"]]
    for suffix, columns in raw["members"].items():
        for row, position in enumerate(zip(*columns, strict=True)):
            if position[0] >= 0:
                members[row][suffix] = TarMember(*position)
    samples = [
        SampleEntry(key, members[row], tuple(label) if isinstance(label, list) else label, raw["errors"].get(str(row)))
        for row, (key, label) in enumerate(zip(raw["keys"], raw["labels"], strict=True))
    ]
    return ShardEntry(int(raw["size"]), raw["sha256"], tuple(samples))


def to_columns(shards: Mapping[str, RawShard], where: Path | str) -> Columns:
    """The samples of entries as arrays. Raises DataError, naming `where`, for an invalid entry."""
    with _readable(where):
        clips = [_clip_positions(name, raw) for name, raw in shards.items()]
        label = label_array([label for raw in shards.values() for label in raw["labels"]])
        counts = [len(raw["keys"]) for raw in shards.values()]
        first = np.cumsum([0, *counts])
        errors = {
            int(start) + row: text
            for start, raw in zip(first, shards.values(), strict=False)
            for row, text in _errors(raw)
        }
        suffix, offset, size, crc32 = (
            np.concatenate([clip[i] for clip in clips]) if clips else np.empty(0) for i in range(4)
        )
        if len(label) != len(suffix):
            raise ValueError(f"{len(label)} labels for {len(suffix)} keys")
        return Columns(
            names=Strings.of(shards),
            sha256=Strings.of(_sha256(raw["sha256"]) for raw in shards.values()),
            shard_bytes=_whole_numbers([raw["size"] for raw in shards.values()]),
            ends=np.cumsum(counts, dtype=np.int64),
            keys=Strings.of(key for raw in shards.values() for key in raw["keys"]),
            suffix=suffix.astype(np.uint8),
            offset=offset.astype(np.int64),
            size=size.astype(np.int64),
            crc32=crc32.astype(np.int64),
            label=label,
            error_rows=np.array(list(errors), dtype=np.int64),
            error_texts=Strings.of(errors.values()),
        )


def write_json_atomically(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes JSON beside `path` and renames it, so that a reader sees the old file or the new one, never a part."""
    separators = (",", ":") if indent is None else None
    write_atomically(path, json.dumps(content, indent=indent, separators=separators).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes bytes to a temporary file beside `path` and renames it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _readable(where: Path | str) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        text = f"{where} is not a readable index ({error!r})"
        raise DataError(f"{text}: run `sfa index {_shards_beside(where)}`") from error


def _shards_beside(where: Path | str) -> str:
    return str(where).removesuffix(INDEX_NAME) + "*.tar"


def _clip_positions(name: str, raw: RawShard) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(suffix code, offset, size, crc32) of each sample's clip, the first of CLIP_SUFFIXES that it has."""
    count, size = len(raw["keys"]), int(_whole_numbers(raw["size"]))
    if size < 0 or not isinstance(raw["keys"], list):
        raise ValueError(f"{name} has no valid size or keys")
    code = np.zeros(count, dtype=np.uint8)
    clip = np.tile(np.array([[-1], [0], [0]], dtype=np.int64), count)
    for suffix in raw["members"]:
        position = _whole_numbers(raw["members"][suffix])
        if position.shape != (3, count):
            raise ValueError(f"{suffix} of {name} is not 3 lists of {count}")
        here = position[0] >= 0
        if (position[0] < -1).any() or (position[1] < 0).any() or (here & (position[1] > size - position[0])).any():
            raise ValueError(f"a sample of {name} lies outside its shard")
        if suffix in CLIP_SUFFIXES:
            number = SUFFIXES.index(suffix)
            better = here & ((code == 0) | (number < code))
            code[better] = number
            clip[:, better] = position[:, better]
    return code, clip[0], clip[1], clip[2]


def _whole_numbers(values: Any) -> Int64:
    """int64 from whole numbers. Raises ValueError for values that numpy would convert: fractions, texts, true."""
    numbers = np.array(values)
    if numbers.dtype.kind != "i" and numbers.size:
        raise ValueError(f"{values!r:.40} are not whole numbers")
    return numbers.astype(np.int64, copy=False)


def _sha256(value: Any) -> str:
    """Checks a hash, because it is used as a file name. Raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r:.80} is not a sha256")
    return value


def _errors(raw: RawShard) -> list[tuple[int, str]]:
    """(row, why) of the samples that cannot be used, by row. Raises ValueError."""
    found = sorted((int(row), str(text)) for row, text in raw["errors"].items())
    if found and not 0 <= found[0][0] <= found[-1][0] < len(raw["keys"]):
        raise ValueError(f"there is no sample {found[0][0]} or {found[-1][0]}")
    return found
