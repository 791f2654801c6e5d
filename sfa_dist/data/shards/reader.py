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
    """The bytes of a sample's clip. Raises BadSample where it has none, cannot be read, is cut, or is not what was
    indexed (crc32). Errors that storage and networks recover from are tried again (data.remote.retries).

    Raises DataError where nothing more of this shard can come: it must be cached and the cache cannot hold it.
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
    """`size` bytes, fewer where the shard ends. Raises OSError."""
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
        _go_on_without(cache, str(shard), error)
    except OSError:
        if not isinstance(shard, Path):
            raise
        # A shard that is damaged somewhere: which samples are shows when each is read, as without staging.
    return None


@lru_cache(maxsize=4)
def _cache(settings: str) -> ShardCache:
    return ShardCache(RemoteBlock.model_validate_json(settings))


def _go_on_without(cache: ShardCache, shard: str, error: CannotKeepError) -> None:
    """Warns, once per process, that samples are read one by one; raises DataError for a pipe, which cannot be."""
    if shard_kind(shard) == "pipe":
        raise DataError(
            f"{shown(shard)} must be kept in the cache, which cannot hold it ({error.strerror}): make room, raise "
            "data.remote.cache_gib or set data.remote.cache_dir to a larger disk"
        ) from error
    if not cache.has_warned:
        cache.has_warned = True
        text = without_secrets(
            f"the shard cache on {socket.gethostname()} cannot be used ({error.strerror}): samples are read one by one "
            "from where they are"
        )
        warnings.warn(text, stacklevel=2)


def _read_file(shard: Path, offset: int, size: int) -> bytes:
    # Opened for each sample: costs little beside decoding, and there is no handle to go stale or to share after a fork.
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
