"""The index of shards that are not local files.

An index.json beside the shards is read from the server. Shards without one are fetched once and indexed; their index is
kept in a local folder (`index_home`), in the shard cache's folder or the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sfa_dist.boundary.secret import without_secrets
from sfa_dist.data.shards.fetch import fetch_shard
from sfa_dist.data.shards.index_columns import SIDECAR_FROM, Columns, Strings, join, read_sidecar, write_sidecar
from sfa_dist.data.shards.index_file import (
    INDEX_NAME,
    RawShard,
    format_index,
    parse_index,
    read_columns,
    read_raw,
    to_columns,
    to_raw,
    write_index,
)
from sfa_dist.data.shards.remote import look, read_whole, write_s3
from sfa_dist.data.shards.retry import with_retries
from sfa_dist.data.shards.shard_cache import ShardCache, Whole, locked
from sfa_dist.data.shards.shard_names import PIPE, shard_name, shown
from sfa_dist.data.shards.shard_walk import ShardEntry, walk_shard, warn_of_ignored
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import RemoteBlock, shard_kind

USER_CACHE = "~/.cache/sfa_dist"
REQUESTS_AT_A_TIME = 16

_log = logging.getLogger(__name__)


def index_home(folder: str, remote: RemoteBlock) -> Path:
    """Where the index of a remote folder is kept on this machine."""
    base = Path(remote.cache_dir or USER_CACHE).expanduser().absolute()
    return base / "index" / hashlib.sha256(folder.encode()).hexdigest()[:32]


def remote_columns(folder: str, shards: Sequence[str], remote: RemoteBlock) -> Columns:
    """All known samples of a remote folder, including those of `shards`; shards in no index are indexed now.

    Raises DataError, naming the URL, for a shard that is gone, cannot be read, is damaged, has another size than its
    index says, or is given twice.
    """
    for name, count in Counter(map(shard_name, shards)).items():
        if count > 1:
            raise DataError(f"{count} of the shards of {shown(folder)} are called {name}: they differ in who may read")
    published = _published_columns(folder, remote)
    if published is not None:
        local_names = local_names_of(shards)
        published = replace(published, names=Strings.of(local_names.get(name, name) for name in published.names))
    parts = [published] if published is not None else []
    if missing := _unknown(shards, published):
        parts.append(_kept_columns(folder, missing, set(published.names) if published else set(), remote))
    columns = join(parts)
    _check_sizes(shards, dict(zip(columns.names, columns.shard_bytes.tolist(), strict=True)), remote)
    return columns


def local_names_of(shards: Iterable[str]) -> dict[str, str]:
    """The local name of each shard, which includes its query, by its file name, as in an index beside the shards.

    File names that several shards have are left out: that index cannot distinguish them.
    """
    named: dict[str, set[str]] = {}
    for shard in shards:
        named.setdefault(shard_name(shard).partition("?")[0], set()).add(shard_name(shard))
    return {file: names.pop() for file, names in named.items() if len(names) == 1}


def known_shards(folder: str, shards: Sequence[str], remote: RemoteBlock) -> dict[str, RawShard]:
    """The known entries of a remote folder, by shard name. The index beside the shards precedes the local one."""
    data, local_names = read_beside(folder, INDEX_NAME, remote), local_names_of(shards)
    published = parse_index(data, shown(folder + INDEX_NAME)) if data else {}
    return read_raw(index_home(folder, remote)) | {local_names.get(name, name): raw for name, raw in published.items()}


def read_beside(folder: str, name: str, remote: RemoteBlock) -> bytes | None:
    """A small file beside remote shards; None if it is missing or access is denied. Raises DataError."""
    if folder == PIPE:
        return None
    try:
        return with_retries(lambda: read_whole(folder + name, remote), remote.retries)
    except (FileNotFoundError, PermissionError):  # S3 answers 403 for a missing file if listing is not allowed
        return None
    except OSError as error:
        raise DataError(f"{shown(folder + name)} cannot be read: {error.strerror or error}") from error


def walk_remote(
    folder: str, shards: Sequence[str], workers: int, remote: RemoteBlock
) -> dict[str, ShardEntry | DataError]:
    """Fetches shards of one folder, `workers` at a time. Returns the content of each, or why it cannot be read.

    They stay in the cache if there is one.
    """
    home = index_home(folder, remote)
    with _home_lock(home), ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return dict(zip(shards, pool.map(lambda shard: _tried(shard, home, remote), shards), strict=True))


def publish(folder: str, entries: dict[str, RawShard], remote: RemoteBlock) -> str:
    """Adds entries, by shard name, to the index of a folder, and returns the path or URL of the index.

    The index is beside shards on s3 if writing there is allowed, else on this machine.
    """
    if shard_kind(folder) == "s3":
        try:
            data = format_index(known_shards(folder, (), remote) | entries)
            with_retries(lambda: write_s3(folder + INDEX_NAME, data, remote), remote.retries)
            return shown(folder + INDEX_NAME)
        except OSError as error:
            why = without_secrets(str(error.strerror or error))
            _log.warning("%s cannot be written (%s)", shown(folder + INDEX_NAME), why)
    home = index_home(folder, remote)
    with _home_lock(home):
        write_index(home, read_raw(home) | entries)
    return str(home / INDEX_NAME)


def _published_columns(folder: str, remote: RemoteBlock) -> Columns | None:
    """The index beside the shards; its arrays are kept locally, so that a large one is parsed once."""
    data = read_beside(folder, INDEX_NAME, remote)
    if data is None:
        return None
    home = index_home(folder, remote) / "published"
    sha256 = hashlib.sha256(data).hexdigest()
    columns = read_sidecar(home, sha256)
    if columns is None:
        columns = to_columns(parse_index(data, shown(folder + INDEX_NAME)), shown(folder + INDEX_NAME))
        if len(columns.keys) >= SIDECAR_FROM and _make_folder(home):
            write_sidecar(home, sha256, columns)
    return columns


def _kept_columns(folder: str, missing: Sequence[str], published: set[str], remote: RemoteBlock) -> Columns:
    """The samples of shards without an index beside them, from the local index. Missing shards are added to it."""
    home = index_home(folder, remote)
    kept = read_columns(home)
    if _unknown(missing, kept):
        with _home_lock(home):
            kept = read_columns(home)  # another process may have indexed them while this one waited
            if new := _unknown(missing, kept):
                _log.info("fetching and indexing %d shards of %s", len(new), shown(folder))
                found = {shard_name(shard): _walk(shard, home, remote) for shard in new}
                warn_of_ignored(found.values())
                raw = {name: to_raw(entry) for name, entry in found.items()}
                write_index(home, read_raw(home) | raw)
                kept = join([*([kept] if kept else []), to_columns(raw, home / INDEX_NAME)])
    assert kept is not None
    return join([kept.shard(number) for number, name in enumerate(kept.names) if name not in published])


def _unknown(shards: Sequence[str], columns: Columns | None) -> list[str]:
    known = set(columns.names) if columns is not None else set()
    return [shard for shard in shards if shard_name(shard) not in known]


def _tried(shard: str, home: Path, remote: RemoteBlock) -> ShardEntry | DataError:
    try:
        return _walk(shard, home, remote)
    except DataError as error:
        return error


def _walk(shard: str, home: Path, remote: RemoteBlock) -> ShardEntry:
    copy = home / f".{uuid.uuid4().hex}.part"
    try:
        with copy.open("w+b") as file:
            fetch_shard(shard, file, remote)
            file.flush()
            os.fsync(file.fileno())
        entry = walk_shard(copy, shown(shard))
        if remote.cache_dir is not None:
            ShardCache(remote).adopt(copy, Whole(shard, entry.size, entry.sha256))
        return entry
    except OSError as error:
        raise DataError(f"shard {shown(shard)} cannot be read: {error.strerror or error}") from error
    finally:
        copy.unlink(missing_ok=True)


def _check_sizes(shards: Sequence[str], sizes: dict[str, int], remote: RemoteBlock) -> None:
    """Raises DataError for the first shard that is gone, changed, or cannot be read as the recipe requires."""

    def check(shard: str) -> None:
        try:
            answer = with_retries(lambda: look(shard, remote), remote.retries)
        except OSError as error:
            raise DataError(f"shard {shown(shard)} cannot be read: {error.strerror or error}") from error
        size = sizes[shard_name(shard)]
        if answer.size not in (None, size):
            raise DataError(
                f"shard {shown(shard)} has {answer.size} bytes, its index says {size}: it was cut or replaced since. "
                "Copy it again, or run `sfa index` on it if the change was meant"
            )
        if not answer.ranges and remote.cache_dir is None:
            raise DataError(
                f"shard {shown(shard)}: its server sends whole files only, so shards must be kept on disk: set "
                "data.remote.cache_dir to a local folder"
            )

    with ThreadPoolExecutor(max_workers=REQUESTS_AT_A_TIME) as pool:
        list(pool.map(check, (shard for shard in shards if shard_kind(shard) != "pipe")))


def _make_folder(folder: Path) -> bool:
    """Makes a folder if it is missing. A failure is logged, and returns False."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.info("%s is not kept: %s", folder, error)
        return False
    return True


@contextmanager
def _home_lock(home: Path) -> Iterator[None]:
    """Lets one process at a time index a folder, and removes partial fetches of killed processes."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the index of remote shards cannot be kept in {home} ({error}): set data.remote.cache_dir to a folder "
            "that can be written to"
        ) from error
    with locked(home / "lock"):
        for left in home.glob(".*.part"):
            left.unlink(missing_ok=True)
        yield
