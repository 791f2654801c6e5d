"""Reads the bytes of one sample from its shard, by offset, and checks them."""

from __future__ import annotations

import os
import socket
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sfa_dist.boundary.secret import without_secrets
from sfa_dist.data.shards.remote import NoRangesError, read_range
from sfa_dist.data.shards.retry import with_retries
from sfa_dist.data.shards.shard_cache import CannotKeepError, ShardCache, Whole
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.shards.shard_names import shown
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import RemoteBlock, shard_kind


def read_clip_bytes(index: SampleIndex, sample: int) -> bytes:
    """The bytes of a sample's clip. Transient errors are retried (data.remote.retries).

    Raises BadSample if it has no clip, cannot be read, is cut, or differs from the index (crc32). Raises DataError if
    no sample of the shard can be read, because the shard must be cached and the cache cannot hold it.
    """
    if index.offset[sample] < 0:
        raise BadSample(index.errors.get(sample, "no clip"))
    number, offset, size = int(index.shard[sample]), int(index.offset[sample]), int(index.size[sample])
    shard = index.shards[number]
    try:
        data = _read(index, number, offset, size)
    except OSError as error:
        reason = f"{shown(shard)} cannot be read at offset {offset}: {error.strerror or error}"
        raise BadSample(reason) from error
    if len(data) != size:
        raise BadSample(f"{shown(shard)} ends at offset {offset + len(data)}: it was cut")
    if zlib.crc32(data) != index.crc32[sample]:
        raise BadSample(f"crc32 mismatch at offset {offset} of {shown(shard)}: the shard changed or is damaged")
    return data


def _read(index: SampleIndex, number: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, fewer if the shard ends before. Raises OSError."""
    shard, remote = index.shards[number], index.remote
    if remote.cache_dir is not None and (remote.stage or not isinstance(shard, Path)):
        kept = _open_kept(index, number)
        if kept is not None:
            with kept as file:
                return with_retries(lambda: _pread(file.fileno(), offset, size), remote.retries)
    if isinstance(shard, Path):
        return with_retries(lambda: _read_file(shard, offset, size), remote.retries)
    try:
        return with_retries(lambda: read_range(shard, offset, size, remote), remote.retries)
    except NoRangesError as error:
        raise DataError(
            f"{shown(shard)} cannot be read: {error.strerror}, and there is no cache to hold the whole shard: set "
            "data.remote.cache_dir to a local folder with room for it"
        ) from error


def _open_kept(index: SampleIndex, number: int) -> BinaryIO | None:
    """The whole shard from the cache; None if its samples must be read one by one. Raises OSError."""
    shard, cache = index.shards[number], _cache(index.remote.model_dump_json())
    try:
        return cache.open(Whole(str(shard), int(index.shard_bytes[number]), index.shard_sha256[number]))
    except CannotKeepError as error:
        _report_uncached(cache, str(shard), error)
    except OSError:
        if not isinstance(shard, Path):
            raise
        # The shard is damaged somewhere. Reading each sample shows which ones are, as without staging.
    return None


@lru_cache(maxsize=4)
def _cache(settings: str) -> ShardCache:
    return ShardCache(RemoteBlock.model_validate_json(settings))


def _report_uncached(cache: ShardCache, shard: str, error: CannotKeepError) -> None:
    """Warns once per process that samples are read one by one. Raises DataError for a pipe, which has no ranges."""
    if shard_kind(shard) == "pipe":
        raise DataError(
            f"{shown(shard)} must be kept in the cache, which cannot hold it ({error.strerror}): make room, raise "
            "data.remote.cache_gib or set data.remote.cache_dir to a larger disk"
        ) from error
    if not cache.has_warned:
        cache.has_warned = True
        text = without_secrets(
            f"the shard cache on {socket.gethostname()} cannot be used ({error.strerror}): samples are read one by one "
            "from their source"
        )
        warnings.warn(text, stacklevel=2)


def _read_file(shard: Path, offset: int, size: int) -> bytes:
    # Opened for each sample, which costs little beside decoding: no handle can go stale or be shared after a fork.
    with shard.open("rb", buffering=0) as file:
        return _pread(file.fileno(), offset, size)


def _pread(file: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(file, size, offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)
