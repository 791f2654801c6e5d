"""The index of shards: index.json beside them, and the flat table of samples that training reads from.

A sample is (shard, key) and is read by offset, so one damaged sample can neither shift nor relabel another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sfa_dist.data.shard_walk import CLIP_SUFFIXES, Member, SampleEntry, ShardEntry, walk_shard
from sfa_dist.errors import DataError

INDEX_NAME = "index.json"
INDEX_VERSION = 1
Int64 = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """All samples of some shards, by shard and then by place in it. Arrays are int64 of length `len(self)`.

    shard: number of the shard in `shards`.   offset, size, crc32: the clip's bytes in it (offset -1: there is no clip).
    label: class number, -1 where there is no single one.   suffix: of the clip ("" without).
    classes: names, if known.   errors: sample number -> why it cannot be used.
    """

    shards: tuple[Path, ...]
    shard_sha256: tuple[str, ...]
    shard: Int64
    offset: Int64
    size: Int64
    crc32: Int64
    label: Int64
    keys: list[str]
    suffix: list[str]
    classes: list[str] | None = None
    errors: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sha256(self) -> str:
        """Hash of the shards' hashes in order: equal on all ranks and after a resume, wherever the shards lie."""
        return hashlib.sha256("\n".join(self.shard_sha256).encode()).hexdigest()

    @property
    def shard_sizes(self) -> Int64:
        """Samples in each shard, (len(shards),)."""
        return np.bincount(self.shard, minlength=len(self.shards)).astype(np.int64)

    def num_classes_seen(self) -> int:
        """How many different labels there are."""
        return len(np.unique(self.label[self.label >= 0]))

    def name(self, sample: int) -> str:
        """`shard/key` for messages; characters that would break a log line are escaped."""
        return f"{self.shards[self.shard[sample]].name}/{self.keys[sample]}".encode("unicode_escape").decode()


def load_index(paths: Sequence[Path]) -> SampleIndex:
    """The table of samples of these shards, from index.json where it knows them; other shards are indexed now.

    Raises DataError where a shard's size is not what its index says, where a shard is damaged, or where there is none.
    A folder that cannot be written to keeps no index.json: a warning says so.
    """
    if not paths:
        raise DataError("no shards given: set data.train, data.val or data.test in the recipe")
    entries: dict[Path, ShardEntry] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        entries |= _folder_entries(folder, [path for path in paths if path.parent == folder])
    return _table(paths, [entries[path] for path in paths])


def build_index(paths: Sequence[Path], workers: int = 1) -> dict[Path, ShardEntry]:
    """Walks the shards (in `workers` threads: hashing lets go of the interpreter lock) and writes them into the
    index.json of their folders, replacing what it said about them. Raises DataError for a damaged shard."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        entries = dict(zip(paths, pool.map(walk_shard, paths), strict=True))
    unknown = sorted({name for entry in entries.values() for name in entry.ignored})
    if unknown:
        some = ", ".join(repr(name) for name in unknown[:5])
        warnings.warn(f"{len(unknown)} members have unknown suffixes and are ignored: {some} ...", stacklevel=2)
    for folder in dict.fromkeys(path.parent for path in paths):
        index = {} if _is_garbled(folder) else read_index(folder)
        index |= {path.name: entry for path, entry in entries.items() if path.parent == folder}
        _write_index(folder, index)
    return entries


def verify_index(paths: Sequence[Path], workers: int = 1) -> list[str]:
    """Reads every byte again and compares with index.json. One line for each problem; empty when all is well."""
    known = {folder: read_index(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        found = pool.map(lambda path: _problems(path, known[path.parent].get(path.name)), paths)
        return [problem for problems in found for problem in problems]


def read_index(folder: Path) -> dict[str, ShardEntry]:
    """The entries of a folder's index.json by shard name; empty without the file. Raises DataError if it is garbled."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != INDEX_VERSION:
            raise ValueError(f"version {content['version']}, this program reads {INDEX_VERSION}")
        return {name: _entry_from_json(value) for name, value in content["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a readable index ({error!r}): run `sfa index {folder}/*.tar`") from error


def write_json_atomically(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes JSON beside `path` and moves it there, so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    separators = (",", ":") if indent is None else None
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=indent, separators=separators)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_garbled(folder: Path) -> bool:
    try:
        read_index(folder)
    except DataError as error:
        _log.warning("making the index anew: %s", error)
        return True
    return False


def _folder_entries(folder: Path, paths: Sequence[Path]) -> dict[Path, ShardEntry]:
    known = read_index(folder)
    entries = {path: known[path.name] for path in paths if path.name in known}
    for path, entry in entries.items():
        if not path.exists():
            raise DataError(f"shard {path} is gone: bring it back or correct the shard list")
        if path.stat().st_size != entry.size:
            raise DataError(
                f"shard {path} has {path.stat().st_size} bytes, its index says {entry.size}: it was cut or replaced "
                f"since. Copy it again, or run `sfa index {path}` if the change was meant"
            )
    missing = [path for path in paths if path not in entries]
    if missing:
        _log.info("indexing %d shards in %s", len(missing), folder)
        entries |= build_index(missing)
    return entries


def _write_index(folder: Path, entries: dict[str, ShardEntry]) -> None:
    shards = {name: _entry_to_json(entry) for name, entry in sorted(entries.items())}
    try:
        write_json_atomically(folder / INDEX_NAME, {"version": INDEX_VERSION, "shards": shards})
    except OSError as error:
        text = f"{folder / INDEX_NAME} cannot be written ({error}): the shards are indexed again at each start"
        warnings.warn(text, stacklevel=2)


def _problems(path: Path, known: ShardEntry | None) -> list[str]:
    if known is None:
        return [f"shard {path}: not in {INDEX_NAME}, run `sfa index {path}`"]
    try:
        found = walk_shard(path)
    except DataError as error:
        return [str(error)]
    if found.sha256 == known.sha256:
        return []
    now = {(sample.key, suffix): member for sample in found.samples for suffix, member in sample.members.items()}
    changed = [
        f"shard {path}, key {sample.key!r}, offset {member.offset}: .{suffix} is not what was indexed"
        for sample in known.samples
        for suffix, member in sample.members.items()
        if now.get((sample.key, suffix)) != member
    ]
    return changed or [f"shard {path}: sha256 is not what was indexed, though all known members are the same"]


def _entry_to_json(entry: ShardEntry) -> dict[str, Any]:
    samples = []
    for sample in entry.samples:
        value: dict[str, Any] = {"key": sample.key, "members": sample.members, "label": sample.label}
        samples.append(value | ({"error": sample.error} if sample.error else {}))
    return {"size": entry.size, "sha256": entry.sha256, "samples": samples}


def _entry_from_json(value: dict[str, Any]) -> ShardEntry:
    size = int(value["size"])
    samples = []
    for sample in value["samples"]:
        members = {suffix: Member(*map(int, place)) for suffix, place in sample["members"].items()}
        if any(member.offset < 0 or member.offset + member.size > size for member in members.values()):
            raise ValueError(f"sample {sample['key']!r} lies outside its shard")
        samples.append(SampleEntry(sample["key"], members, sample["label"], sample.get("error")))
    return ShardEntry(size, value["sha256"], tuple(samples))


def _table(paths: Sequence[Path], entries: Sequence[ShardEntry]) -> SampleIndex:
    rows = [(number, sample) for number, entry in enumerate(entries) for sample in entry.samples]
    if not rows:
        raise DataError(f"{len(paths)} shards hold no sample (first: {paths[0]}): pack them again")
    suffix = [next((known for known in CLIP_SUFFIXES if known in sample.members), "") for _, sample in rows]
    nothing = Member(-1, 0, 0)
    places = np.array([sample.members.get(suffix[i], nothing) for i, (_, sample) in enumerate(rows)], dtype=np.int64)
    return SampleIndex(
        shards=tuple(paths),
        shard_sha256=tuple(entry.sha256 for entry in entries),
        shard=np.array([number for number, _ in rows], dtype=np.int64),
        offset=places[:, 0],
        size=places[:, 1],
        crc32=places[:, 2],
        label=np.array([-1 if sample.label is None else sample.label for _, sample in rows], dtype=np.int64),
        keys=[sample.key for _, sample in rows],
        suffix=suffix,
        classes=_classes(paths),
        errors={i: sample.error for i, (_, sample) in enumerate(rows) if sample.error},
    )


def _classes(paths: Sequence[Path]) -> list[str] | None:
    """Class names from manifest.json beside the shards; folders that have none do not count, others must agree."""
    found: dict[Path, list[str]] = {}
    for path in dict.fromkeys(shard.parent / "manifest.json" for shard in paths):
        if not path.exists():
            continue
        try:
            classes = json.loads(path.read_bytes()).get("classes")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a readable manifest ({error}): pack the shards again") from error
        if classes is not None:
            found[path] = [str(name) for name in classes]
    if len({tuple(classes) for classes in found.values()}) > 1:
        raise DataError(f"the class lists of {', '.join(map(str, found))} differ: pack them with the same --classes")
    return next(iter(found.values()), None)
