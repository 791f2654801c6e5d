"""Reads one sample's bytes out of its shard, by offset, and checks them."""

from __future__ import annotations

import errno
import os
import time
import zlib
from pathlib import Path

from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.shard_index import SampleIndex

_RETRY_SECONDS = (0.1, 1.0, 5.0)
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EBUSY}


def read_clip_bytes(index: SampleIndex, sample: int) -> bytes:
    """The bytes of a sample's clip. Raises BadSample where it has none, cannot be read, is cut, or is not what was
    indexed (crc32). Errors that network storage recovers from are tried again for a few seconds."""
    if index.offset[sample] < 0:
        raise BadSample(index.errors.get(sample, "no clip"))
    shard = index.shards[index.shard[sample]]
    data = _read(shard, int(index.offset[sample]), int(index.size[sample]))
    if zlib.crc32(data) != index.crc32[sample]:
        raise BadSample(f"crc32 mismatch at offset {index.offset[sample]} of {shard}: the shard changed or is damaged")
    return data


def _read(shard: Path, offset: int, size: int) -> bytes:
    for pause in (*_RETRY_SECONDS, None):
        try:
            return _pread(shard, offset, size)
        except OSError as error:
            if pause is None or error.errno not in _TRANSIENT:
                raise BadSample(f"{shard} cannot be read at offset {offset}: {error}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _pread(shard: Path, offset: int, size: int) -> bytes:
    # Opened for each sample: costs little beside decoding, and there is no handle to go stale or to share after a fork.
    with shard.open("rb", buffering=0) as file:
        parts = []
        while size > 0:
            part = os.pread(file.fileno(), size, offset)
            if not part:
                raise BadSample(f"{shard} ends at offset {offset}: it was cut")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
    return b"".join(parts)
