"""The samples of a folder as a few flat arrays: 60 bytes a sample instead of a thousand as Python objects.

Reading them in a loader worker copies no memory. They are derived from index.json. For many samples they are kept
beside it in index.npz, which records the hash of its index.json, is read without pickle, and is protected by the
checksums of zip. An Arrow file would be read as fast, but has no checksums, and every process would import
pyarrow.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import tokenize
import uuid
import zipfile
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from operator import eq
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from sfa_dist.data.shards.shard_walk import CLIP_SUFFIXES
from sfa_dist.recipe.blocks import LABEL_HEADS

Int64 = npt.NDArray[np.int64]
SIDECAR_NAME = "index.npz"
SIDECAR_VERSION = 1
SIDECAR_FROM = 50_000  # samples; below that index.json itself is read in less than a tenth of a second
SUFFIXES = ("", *CLIP_SUFFIXES)
# What zipfile and numpy raise for a damaged file.
UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, AttributeError, TypeError, SyntaxError),
    *(struct.error, zlib.error, zipfile.BadZipFile, tokenize.TokenError),
)

_log = logging.getLogger(__name__)


class Texts(Sequence[str]):
    """A sequence of texts that is not stored as Python objects; equal to any sequence of the same texts."""

    @abstractmethod
    def _at(self, position: int) -> str:
        """The text at a position, counted from 0."""

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        positions = range(len(self))[number]  # the usual meaning of -1, and the usual IndexError
        return self._at(positions) if isinstance(positions, int) else [self._at(each) for each in positions]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


class Strings(Texts):
    """Any texts in two arrays: all their bytes (uint8), and where each ends (int64)."""

    def __init__(self, text: npt.NDArray[np.uint8], ends: Int64) -> None:
        self.text, self.ends = text, ends

    @staticmethod
    def of(texts: Iterable[str]) -> Strings:
        """Strings of any texts, including lone surrogates (file names that are not unicode)."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return Strings(text, np.cumsum([len(each) for each in encoded], dtype=np.int64))

    @staticmethod
    def joined(parts: Sequence[Strings]) -> Strings:
        """The texts of all parts, one part after the other."""
        lengths = np.cumsum([0, *(len(part.text) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, lengths, strict=False)]
        return Strings(np.concatenate([part.text for part in parts]), np.concatenate(ends))

    def part(self, first: int, last: int) -> Strings:
        """The texts from `first` up to but not including `last`; shares memory."""
        start, stop = self._start(first), self._start(last)
        return Strings(self.text[start:stop], self.ends[first:last] - start)

    def _start(self, number: int) -> int:
        return int(self.ends[number - 1]) if number else 0

    def __len__(self) -> int:
        return len(self.ends)

    def _at(self, position: int) -> str:
        return self.text[self._start(position) : int(self.ends[position])].tobytes().decode("utf-8", "surrogatepass")


class Suffixes(Texts):
    """One of SUFFIXES for each sample, in a byte each."""

    def __init__(self, codes: npt.NDArray[np.uint8]) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    def _at(self, position: int) -> str:
        return SUFFIXES[self.codes[position]]


@dataclass(frozen=True, eq=False)
class Columns:
    """Some shards and their samples, in order.

    names, sha256, shard_bytes (int64): of each shard, (n,).   ends (n,): number of samples up to the end of each shard.
    keys, suffix, offset, size, crc32, label: of each sample, as in SampleIndex.   error_rows, error_texts: samples
    that cannot be used, and why.
    """

    names: Strings
    sha256: Strings
    shard_bytes: Int64
    ends: Int64
    keys: Strings
    suffix: npt.NDArray[np.uint8]
    offset: Int64
    size: Int64
    crc32: Int64
    label: Int64
    error_rows: Int64
    error_texts: Strings

    @property
    def errors(self) -> dict[int, str]:
        """Sample number -> why it cannot be used."""
        return dict(zip(self.error_rows.tolist(), self.error_texts, strict=True))

    def shard(self, number: int) -> Columns:
        """One shard alone; shares memory."""
        first, last = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
        rows = slice(first, last)
        bad_first, bad_last = np.searchsorted(self.error_rows, [first, last]).tolist()
        return Columns(
            names=self.names.part(number, number + 1),
            sha256=self.sha256.part(number, number + 1),
            shard_bytes=self.shard_bytes[number : number + 1],
            ends=np.array([last - first]),
            keys=self.keys.part(first, last),
            suffix=self.suffix[rows],
            offset=self.offset[rows],
            size=self.size[rows],
            crc32=self.crc32[rows],
            label=self.label[rows],
            error_rows=self.error_rows[bad_first:bad_last] - first,
            error_texts=self.error_texts.part(bad_first, bad_last),
        )


def join(parts: Sequence[Columns]) -> Columns:
    """The shards of all parts, one after the other; copies."""
    first = np.cumsum([0, *(len(part.keys) for part in parts)])
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(Columns)):
        values = [getattr(part, name) for part in parts]
        if name in ("ends", "error_rows"):
            values = [value + start for value, start in zip(values, first, strict=False)]
        elif name == "label":
            values = _in_common_shape(values)
        joined[name] = Strings.joined(values) if isinstance(values[0], Strings) else np.concatenate(values)
    return Columns(**joined)


def label_array(labels: Sequence[Any]) -> Int64:
    """int64 (n,) from labels that are numbers, or (n, heads) if most are lists of a number for each head.

    -1 stands for no label: None, or a label of another kind than most.
    """
    lists = sum(isinstance(label, list | tuple) for label in labels)
    if lists <= sum(isinstance(label, int) for label in labels):
        return np.array([label if isinstance(label, int) else -1 for label in labels], dtype=np.int64)
    none = [-1] * len(LABEL_HEADS)
    return np.array([label if isinstance(label, list | tuple) else none for label in labels], dtype=np.int64)


def _in_common_shape(labels: list[Int64]) -> list[Int64]:
    """The labels in the shape that most samples have; labels of another shape become -1."""
    counts: Counter[tuple[int, ...]] = Counter()
    for label in labels:
        counts[label.shape[1:]] += len(label)
    wanted = counts.most_common(1)[0][0]
    return [label if label.shape[1:] == wanted else np.full((len(label), *wanted), -1) for label in labels]


def read_sidecar(folder: Path, index_sha256: str) -> Columns | None:
    """The columns kept for the index.json with this hash; None if missing, damaged or made from another index.json."""
    path = folder / SIDECAR_NAME
    try:
        _check_members(path)
        with np.load(path, allow_pickle=False) as arrays:
            if arrays["made_of"].tobytes() != _mark(index_sha256):
                return None
            columns = Columns(**{field.name: _unpacked(arrays, field.name) for field in fields(Columns)})
        _check_columns(columns)
        return columns
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        _log.warning("%s is not readable and not used (%s)", path, error)
        return None


def write_sidecar(folder: Path, index_sha256: str, columns: Columns) -> None:
    """Keeps the columns beside their index.json. A failure to write is only logged: they can be rebuilt."""
    arrays: dict[str, Any] = {"made_of": np.frombuffer(_mark(index_sha256), dtype=np.uint8)}
    for name in (field.name for field in fields(Columns)):
        value = getattr(columns, name)
        arrays |= (
            {f"{name}.text": value.text, f"{name}.ends": value.ends} if isinstance(value, Strings) else {name: value}
        )
    temporary = folder / f".{SIDECAR_NAME}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / SIDECAR_NAME)
    except OSError as error:
        _log.info("%s is not kept: %s", folder / SIDECAR_NAME, error)
    finally:
        temporary.unlink(missing_ok=True)


def _mark(index_sha256: str) -> bytes:
    return f"{SIDECAR_VERSION} {index_sha256}".encode()


def _check_members(path: Path) -> None:
    """Raises ValueError for arrays that are compressed, or whose size differs from their header's."""
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            with file.open(member) as data:
                version = np.lib.format.read_magic(data)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(data)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - data.tell():
                    raise ValueError(f"the size of {member.filename} differs from its header's")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")


def _check_columns(columns: Columns) -> None:
    """Raises ValueError for arrays that contradict each other or point outside a shard."""
    texts = (columns.names, columns.sha256, columns.keys, columns.error_texts)
    arrays = [columns.shard_bytes, columns.ends, columns.offset, columns.size, columns.crc32, columns.error_rows]
    ends = [columns.ends, *(text.ends for text in texts)]
    shards, samples = len(columns.names), len(columns.keys)
    if any(array.dtype != np.int64 or array.ndim != 1 for array in (*arrays, *ends)):
        raise ValueError("a column that is not a list of whole numbers")
    if any((np.diff(each, prepend=0) < 0).any() for each in ends) or any(
        text.text.dtype != np.uint8 or text.text.shape != (text.ends[-1] if len(text) else 0,) for text in texts
    ):
        raise ValueError("texts with wrong ends")
    for text in texts:
        text.text.tobytes().decode("utf-8", "surrogatepass")
        if (text.text[text.ends[:-1][text.ends[:-1] < len(text.text)]] & 0xC0 == 0x80).any():
            raise ValueError("a text that ends within a character")
    if not len(columns.sha256) == len(columns.shard_bytes) == len(columns.ends) == shards:
        raise ValueError("columns of different numbers of shards")
    of_samples = (columns.suffix, columns.offset, columns.size, columns.crc32, columns.label)
    if any(len(column) != samples for column in of_samples) or (columns.ends[-1] if shards else 0) != samples:
        raise ValueError("columns of different numbers of samples")
    if columns.suffix.dtype != np.uint8 or columns.label.dtype != np.int64 or (columns.suffix >= len(SUFFIXES)).any():
        raise ValueError("an unknown suffix, or labels that are not whole numbers")
    room = np.repeat(columns.shard_bytes, np.diff(columns.ends, prepend=0)) - columns.offset
    here = columns.offset >= 0
    if (columns.offset < -1).any() or (columns.size < 0).any() or (here & (columns.size > room)).any():
        raise ValueError("a sample outside its shard")
    rows = columns.error_rows
    if len(rows) != len(columns.error_texts) or (len(rows) and not 0 <= rows.min() <= rows.max() < samples):
        raise ValueError("an error of a sample that does not exist")
    if not all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in columns.sha256):
        raise ValueError("a shard without its sha256")


def _unpacked(arrays: Any, name: str) -> Any:
    return arrays[name] if name in arrays else Strings(arrays[f"{name}.text"], arrays[f"{name}.ends"])
