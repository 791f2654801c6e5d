"""The flat table of samples that training reads, built from the index.json files beside the shards.

A sample is (shard, key) and is read by offset, so one damaged sample can neither shift nor relabel another.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sfa_dist.boundary.disk import parse_json, read_plain
from sfa_dist.data.shards.index_columns import Columns, Int64, Suffixes, join
from sfa_dist.data.shards.index_file import (
    INDEX_NAME,
    RawShard,
    read_columns,
    read_raw,
    to_columns,
    to_entry,
    to_raw,
    write_index,
)
from sfa_dist.data.shards.remote_index import known_shards, publish, read_beside, remote_columns, walk_remote
from sfa_dist.data.shards.shard_names import LOCAL_ONLY, Shard, shard_folder, shard_name, shown
from sfa_dist.data.shards.shard_walk import ShardEntry, walk_shard, warn_of_ignored
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import LABEL_HEADS, RemoteBlock

ClassNames = list[str] | dict[str, list[str]]  # in label order; with several heads by head, in the order of LABEL_HEADS
MANIFEST_NAME = "manifest.json"
NO_LABEL = "no label, or not those of the other clips"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """All samples of some shards, by shard and then by position in it. Arrays are int64 of length `len(self)`.

    shard: number of the shard in `shards`.   offset, size, crc32: the clip's bytes in it (offset -1: no clip).
    label: class number, -1 without; (len(self), 2), in the order of LABEL_HEADS, for clips with a noun and a verb.
    suffix: of the clip ("" without).   classes: names, if known; by head if there are several.
    errors: sample number -> why it cannot be used.
    shard_bytes: size of each shard.   remote: how remote shards are read.
    decoders: versions of the decoders that checked the clips when they were packed, if known.
    """

    shards: tuple[Shard, ...]
    shard_sha256: tuple[str, ...]
    shard: Int64
    offset: Int64
    size: Int64
    crc32: Int64
    label: Int64
    keys: Sequence[str]
    suffix: Sequence[str]
    classes: ClassNames | None = None
    errors: dict[int, str] = field(default_factory=dict)
    shard_bytes: Sequence[int] | Int64 = ()
    remote: RemoteBlock = LOCAL_ONLY
    decoders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sha256(self) -> str:
        """A hash of the shards' hashes in order: the same on all ranks and after a resume, wherever the shards are."""
        return hashlib.sha256("\n".join(self.shard_sha256).encode()).hexdigest()

    @property
    def shard_sizes(self) -> Int64:
        """The number of samples in each shard, int64 (len(shards),)."""
        return np.bincount(self.shard, minlength=len(self.shards)).astype(np.int64)

    def has_label(self, sample: int) -> bool:
        """Whether a sample has its label, or all of them."""
        return bool((self.label[sample] >= 0).all())

    def labels(self, sample: int) -> dict[str, int]:
        """The label, or those of each head, as a sample's json has them; empty without."""
        if not self.has_label(sample):
            return {}
        names = ("label",) if self.label.ndim == 1 else LABEL_HEADS
        return dict(zip(names, np.atleast_1d(self.label[sample]).tolist(), strict=True))

    def name(self, sample: int) -> str:
        """`shard/key` for messages; characters that would break a log line are escaped."""
        shard = shard_name(self.shards[self.shard[sample]])
        return f"{shard}/{self.keys[sample]}".encode("unicode_escape").decode()


def load_index(shards: Sequence[Shard], remote: RemoteBlock = LOCAL_ONLY) -> SampleIndex:
    """The table of samples of these shards, from index.json if it lists them. Other shards are indexed now.

    Raises DataError if a shard's size differs from its index, if a shard is damaged or missing, or if `shards` is
    empty. Warns if index.json cannot be written.
    """
    if not shards:
        raise DataError("no shards given: set data.train, data.val or data.test in the recipe")
    sources: dict[Shard, tuple[Columns, int]] = {}
    for folder, members in _by_folder(shards).items():
        columns = _folder_columns(folder, members, remote)
        numbers = {name: number for number, name in enumerate(columns.names)}
        sources |= {shard: (columns, numbers[shard_name(shard)]) for shard in members}
    return _table(shards, join([columns.shard(number) for columns, number in map(sources.__getitem__, shards)]), remote)


def build_index(shards: Sequence[Shard], workers: int = 1, remote: RemoteBlock = LOCAL_ONLY) -> dict[Shard, ShardEntry]:
    """Walks the shards and replaces their entries in the index.json of their folders. Returns the new entries.

    `workers` threads walk at a time, since hashing releases the interpreter lock. Raises DataError for a damaged shard.
    """
    return build_indexes(shards, workers, remote)[0]


def build_indexes(
    shards: Sequence[Shard], workers: int, remote: RemoteBlock
) -> tuple[dict[Shard, ShardEntry], list[str]]:
    """Like `build_index`, but also returns where each index.json is: for remote shards not always beside them."""
    found: dict[Shard, ShardEntry] = {}
    written = []
    for folder, members in _by_folder(shards).items():
        entries = _entries(folder, members, workers, remote)
        if isinstance(folder, Path):
            raw = _intact(folder)
            write_index(folder, raw | {shard_name(shard): to_raw(entry) for shard, entry in entries.items()})
            written.append(str(folder / INDEX_NAME))
        else:
            written.append(publish(folder, {shard_name(shard): to_raw(e) for shard, e in entries.items()}, remote))
        found |= entries
    return found, written


def verify_index(shards: Sequence[Shard], workers: int = 1, remote: RemoteBlock = LOCAL_ONLY) -> list[str]:
    """Reads every byte again and compares with index.json. Returns a line for each problem."""
    problems: list[str] = []
    for folder, members in _by_folder(shards).items():
        known = _known(folder, members, remote)
        for shard, walked in _walk(folder, members, workers, remote).items():
            problems += _problems(shard, known.get(shard_name(shard)), walked)
    return problems


def _known(folder: Path | str, shards: Sequence[Shard], remote: RemoteBlock) -> dict[str, RawShard]:
    if isinstance(folder, Path):
        return read_raw(folder)
    return known_shards(folder, [str(shard) for shard in shards], remote)


def _by_folder(shards: Sequence[Shard]) -> dict[Path | str, list[Shard]]:
    folders: dict[Path | str, list[Shard]] = {}
    for shard in shards:
        folders.setdefault(shard_folder(shard), []).append(shard)
    return folders


def _walk(
    folder: Path | str, shards: Sequence[Shard], workers: int, remote: RemoteBlock
) -> dict[Shard, ShardEntry | DataError]:
    """The content of each shard of a folder, or the error that prevents reading it."""
    if isinstance(folder, str):
        fetched = walk_remote(folder, [str(shard) for shard in shards], workers, remote)
        return {shard: fetched[str(shard)] for shard in shards}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return dict(zip(shards, pool.map(lambda shard: _tried(Path(shard)), shards), strict=True))


def _tried(path: Path) -> ShardEntry | DataError:
    try:
        return walk_shard(path)
    except DataError as error:
        return error


def _entries(folder: Path | str, shards: Sequence[Shard], workers: int, remote: RemoteBlock) -> dict[Shard, ShardEntry]:
    """Like `_walk`, but raises the first DataError, and warns once about members that are ignored."""
    entries: dict[Shard, ShardEntry] = {}
    for shard, walked in _walk(folder, shards, workers, remote).items():
        if isinstance(walked, DataError):
            raise walked
        entries[shard] = walked
    warn_of_ignored(entries.values())
    return entries


def _intact(folder: Path) -> dict[str, RawShard]:
    """The entries of a folder's index.json; none, with a warning, if they cannot be read."""
    try:
        raw = read_raw(folder)
        to_columns(raw, folder / INDEX_NAME)
    except DataError as error:
        _log.warning("making a new index: %s", error)
        return {}
    return raw


def _folder_columns(folder: Path | str, shards: Sequence[Shard], remote: RemoteBlock) -> Columns:
    """All known samples of a folder, including those of `shards`."""
    if isinstance(folder, str):
        return remote_columns(folder, [str(shard) for shard in shards], remote)
    columns = read_columns(folder)
    known = {} if columns is None else dict(zip(columns.names, columns.shard_bytes.tolist(), strict=True))
    for shard in shards:
        if shard_name(shard) in known:
            _check_size(Path(shard), known[shard_name(shard)])
    missing = [shard for shard in shards if shard_name(shard) not in known]
    if not missing:
        assert columns is not None
        return columns
    _log.info("indexing %d shards in %s", len(missing), folder)
    added = {shard_name(shard): to_raw(entry) for shard, entry in _entries(folder, missing, 1, remote).items()}
    write_index(folder, read_raw(folder) | added)
    new = to_columns(added, folder / INDEX_NAME)
    return new if columns is None else join([columns, new])


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is gone: bring it back or correct the shard list") from error
    if found != size:
        raise DataError(
            f"shard {path} has {found} bytes, its index says {size}: it was cut or replaced since. Copy it again, or "
            f"run `sfa index {path}` if the change was meant"
        )


def _problems(shard: Shard, raw: RawShard | None, found: ShardEntry | DataError) -> list[str]:
    what = shown(shard)
    if raw is None:
        return [f"shard {what}: not in {INDEX_NAME}, run `sfa index {what}`"]
    if isinstance(found, DataError):
        return [str(found)]
    if found.sha256 == raw["sha256"]:
        return []
    now = {(sample.key, suffix): member for sample in found.samples for suffix, member in sample.members.items()}
    changed = [
        f"shard {what}, key {sample.key!r}, offset {member.offset}: .{suffix} is not what was indexed"
        for sample in to_entry(raw).samples
        for suffix, member in sample.members.items()
        if now.get((sample.key, suffix)) != member
    ]
    return changed or [f"shard {what}: sha256 is not what was indexed, though all known members are the same"]


def _table(shards: Sequence[Shard], columns: Columns, remote: RemoteBlock) -> SampleIndex:
    if not len(columns.keys):
        raise DataError(f"{len(shards)} shards hold no sample (first: {shown(shards[0])}): pack them again")
    counts = np.diff(columns.ends, prepend=0)
    classes, decoders = _described(shards, remote)
    return SampleIndex(
        shards=tuple(shards),
        shard_sha256=tuple(columns.sha256),
        shard=np.repeat(np.arange(len(shards), dtype=np.int64), counts),
        offset=columns.offset,
        size=columns.size,
        crc32=columns.crc32,
        label=columns.label,
        keys=columns.keys,
        suffix=Suffixes(columns.suffix),
        classes=classes,
        errors=columns.errors,
        shard_bytes=columns.shard_bytes,
        remote=remote,
        decoders=decoders,
    )


def _described(shards: Sequence[Shard], remote: RemoteBlock) -> tuple[ClassNames | None, tuple[str, ...]]:
    """(class names, decoders of the packs) from manifest.json beside the shards.

    Folders without one are ignored; the others must agree on the classes, or DataError is raised.
    """
    found: dict[str, ClassNames] = {}
    decoders: dict[str, None] = {}
    for folder, members in _by_folder(shards).items():
        where = shown(folder / MANIFEST_NAME if isinstance(folder, Path) else folder + MANIFEST_NAME)
        try:
            data = _read_beside(folder, remote)
            manifest = {} if data is None else parse_json(data)
            classes = _class_names(manifest)
            decoders |= dict.fromkeys(_decoders(manifest, {shard_name(shard) for shard in members}))
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise DataError(f"{where} is not a readable manifest ({error}): pack the shards again") from error
        if classes is not None:
            found[where] = classes
    names = list(found.values())
    if any(other != names[0] for other in names[1:]):
        raise DataError(f"the class lists of {', '.join(found)} differ: pack them with the same --classes")
    return names[0] if names else None, tuple(decoders)


def _decoders(manifest: dict[str, Any], names: set[str]) -> list[str]:
    """The decoders of the packs that made shards of these names."""
    packs = manifest.get("packs", {}).values()
    return [str(pack["decoder"]) for pack in packs if pack.get("decoder") and names & set(pack.get("shards", ()))]


def _class_names(manifest: dict[str, Any]) -> ClassNames | None:
    """The class names of a manifest: its `heads` if it has them, else its `classes`."""
    heads = manifest.get("heads")
    if heads is not None and set(heads) >= set(LABEL_HEADS):
        return {head: [str(name) for name in heads[head]] for head in LABEL_HEADS}
    classes = manifest.get("classes")
    return None if classes is None else [str(name) for name in classes]


def _read_beside(folder: Path | str, remote: RemoteBlock) -> bytes | None:
    if isinstance(folder, str):
        return read_beside(folder, MANIFEST_NAME, remote)
    try:
        return read_plain(folder / MANIFEST_NAME)
    except FileNotFoundError:
        return None
