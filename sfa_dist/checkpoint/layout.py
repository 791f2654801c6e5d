"""The layout of a safetensors file: names and shapes alone determine where each tensor's bytes are.

So several ranks can write their own spans of one file, and a rank can read only the elements that it owns. All tensors
are fp32, little endian, in order of their names and without gaps (https://github.com/huggingface/safetensors):

    8 bytes  length N of the header, little endian
    N bytes  JSON {name: {"dtype": "F32", "shape": [...], "data_offsets": [first, end]}}, padded by spaces to 8 bytes
    the tensors; `data_offsets` count from here
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfa_dist.boundary.disk import parse_json

ITEM = 4  # Bytes of an fp32 element.
MAX_HEADER = 100 * 2**20  # safetensors' own limit.
CHUNK = 16 * 2**20  # Bytes per call: the kernel moves at most 2 GiB at once, and between calls a save can be canceled.


@dataclass(frozen=True)
class Layout:
    """A file's header (length and JSON), its tensors' shapes and offsets in the file, and its size, in bytes."""

    header: bytes
    shapes: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, int]
    size: int

    def numel(self, name: str) -> int:
        """The number of elements of a tensor."""
        return math.prod(self.shapes[name])


def plan_layout(shapes: Mapping[str, Sequence[int]]) -> Layout:
    """The layout of a file of fp32 tensors with these names and shapes."""
    entries: dict[str, Any] = {}
    position = 0
    for name in sorted(shapes):
        end = position + ITEM * math.prod(shapes[name])
        entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return _layout(len(text).to_bytes(8, "little") + text, entries, position)


def _layout(header: bytes, entries: Mapping[str, Any], data: int) -> Layout:
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    return Layout(header, shapes, offsets, len(header) + data)


def read_layout(descriptor: int) -> Layout:
    """The layout of an open file. Raises ValueError if it is not such a safetensors file, TypeError if not fp32."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError("it is not a safetensors file")
    header = os.pread(descriptor, 8 + length, 0)
    entries = parse_json(header[8:])
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        first, end = _offsets(name, entry)
        shape = entry.get("shape")
        if entry.get("dtype") != "F32":
            raise TypeError(f"{name} is {entry.get('dtype')}, not F32")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"the shape of {name} is {shape!r}")
        if first != position or end - first != ITEM * math.prod(shape):
            raise ValueError(f"the offsets of {name} do not fit its shape and position")
        position = end
    if len(header) + position != size:
        raise ValueError(f"it has {size} bytes, but its header describes {len(header) + position}")
    return _layout(header, entries, position)


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    found = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int for n in found):
        raise ValueError(f"{name} has no offsets")
    return found[0], found[1]


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous fp32 CPU tensor, without a copy."""
    return values.detach().view(-1).numpy().view(np.uint8).data


class TensorReader:
    """An open safetensors file of fp32 tensors. Raises OSError and what `read_layout` raises.

    It reads by offset, not by mmap: a failing disk kills a process that reads a mapped file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            self.layout = read_layout(self._descriptor)
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, ValueError | TypeError):
                raise type(error)(f"{path.name}: {error}") from error
            raise

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor `name`, fp32 (numel,)."""
        out = torch.empty(numel, dtype=torch.float32)
        view, position = bytes_of(out), self.layout.offsets[name] + ITEM * start
        while view:
            count = os.preadv(self._descriptor, [view[:CHUNK]], position)
            if count == 0:
                raise OSError(f"{self.path} ends inside {name}")
            view, position = view[count:], position + count
        return out

    def read_whole(self, name: str) -> Tensor:
        """The whole tensor `name`, fp32, in its shape."""
        return self.read(name, 0, self.layout.numel(name)).view(self.layout.shapes[name])
