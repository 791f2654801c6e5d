"""A folder of whole shards, shared by all loader workers and ranks of a node, that never exceeds its limit.

    shards/<sha256>.tar          a whole shard, checked against its index. The name is its hash, so a shard that is
                                 replaced and indexed again is another file
    shards/<sha256>.<size>.part  a shard being fetched, under the lock of its hash
    locks/<sha256>, locks/room   flock: one process fetches a shard, one process makes room

The kernel releases the locks of a process that ends, so a killed process leaves a .part whose lock is free. It is never
read as a shard, and the next process that makes room removes it. The least recently used shards are evicted; a process
that has one of them open can still read it. A complete cache can be read from a read-only disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

from sfa_dist.data.shards.fetch import fetch_shard
from sfa_dist.recipe.blocks import RemoteBlock

USED_EVERY = 60.0  # seconds; precision of the recorded last use
FAILED_FOR = 60.0  # seconds for which this process does not retry a shard that could not be fetched
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # faults of the local disk, whichever call raises them


class CannotKeepError(OSError):
    """The cache has no room for the shard, or cannot be written."""


@dataclass(frozen=True)
class Whole:
    """A remote shard, with the size in bytes and the hash that its index gives."""

    shard: str
    size: int
    sha256: str


class ShardCache:
    """This process's view of the cache in `remote.cache_dir`, which must be set."""

    def __init__(self, remote: RemoteBlock) -> None:
        assert remote.cache_dir is not None
        self.remote = remote
        self.folder = Path(remote.cache_dir).expanduser().absolute()
        self._shards, self._locks = self.folder / "shards", self.folder / "locks"
        self._limit = math.inf if remote.cache_gib is None else remote.cache_gib * 2**30
        self._failed: dict[str, tuple[float, OSError]] = {}
        self.has_warned = False  # whether the caller has warned that the cache cannot be used

    def open(self, whole: Whole) -> BinaryIO:
        """The shard, opened for reading; it is fetched if necessary.

        Raises CannotKeepError if the cache cannot store it, and OSError if it cannot be fetched or differs from its
        index. For FAILED_FOR seconds the same error is raised again at once: a shard has many samples, and waiting for
        a dead server for each of them would take hours.
        """
        when, fault = self._failed.get(whole.sha256, (0.0, None))
        if fault is not None and time.monotonic() - when < FAILED_FOR:
            raise fault
        try:
            return self._open_kept(whole) or self._fetch(whole)
        except OSError as error:
            self._failed[whole.sha256] = (time.monotonic(), error)
            raise

    def adopt(self, file: Path, whole: Whole) -> None:
        """Moves a complete and checked file of this disk into the cache.

        Without room the file stays where it is, and the shard is fetched again when it is read.
        """
        part = self._part(whole)
        with suppress(CannotKeepError), self._as_cannot_keep(), self._locked_shard(whole):
            if not self._kept(whole).exists():
                self._make_room(part, whole.size)
                os.replace(file, self._kept(whole))
                part.unlink(missing_ok=True)

    def _open_kept(self, whole: Whole) -> BinaryIO | None:
        """The shard if the cache has it. Its last use is recorded if possible: a read-only cache evicts nothing."""
        try:
            file = self._kept(whole).open("rb")
        except FileNotFoundError:
            return None
        state = os.fstat(file.fileno())
        if state.st_size != whole.size:  # the file was cut later, by another program
            file.close()
            return None
        if time.time() - state.st_mtime > USED_EVERY:
            with suppress(OSError):
                os.utime(file.fileno())
        return file

    def _kept(self, whole: Whole) -> Path:
        return self._shards / f"{whole.sha256}.tar"

    def _part(self, whole: Whole) -> Path:
        return self._shards / f"{whole.sha256}.{whole.size}.part"

    @contextmanager
    def _locked_shard(self, whole: Whole) -> Iterator[None]:
        self._shards.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(exist_ok=True)
        with locked(self._locks / whole.sha256):
            yield

    def _fetch(self, whole: Whole) -> BinaryIO:
        with self._as_cannot_keep(), self._locked_shard(whole):
            # Another process may have fetched it while this one waited.
            return self._open_kept(whole) or self._fetch_alone(whole)

    def _fetch_alone(self, whole: Whole) -> BinaryIO:
        """Fetches under the shard's lock. The file stays open: another process may evict it before it is read."""
        part = self._part(whole)
        part.unlink(missing_ok=True)  # this process holds the lock, so a killed one has left it
        self._make_room(part, whole.size)
        file = part.open("w+b")
        try:
            fetch_shard(whole.shard, file, self.remote, whole.size)
            file.flush()
            os.fsync(file.fileno())
            check_whole(file, whole)
            os.replace(part, self._kept(whole))
        except BaseException:
            file.close()
            part.unlink(missing_ok=True)
            raise
        return file

    def _make_room(self, part: Path, size: int) -> None:
        """Evicts the least recently used shards until `size` bytes fit, and makes `part`, which reserves them."""
        with locked(self._locks / "room"):
            self._remove_left_over()
            kept = sorted(self._shards.glob("*.tar"), key=lambda path: path.stat().st_mtime)
            taken = sum(path.stat().st_size for path in kept)
            taken += sum(int(other.name.split(".")[1]) for other in self._shards.glob("*.part"))
            while taken + size > self._limit or shutil.disk_usage(self._shards).free < size:
                if not kept:
                    raise OSError(errno.ENOSPC, f"no room for {size} bytes")
                oldest = kept.pop(0)
                taken -= oldest.stat().st_size
                oldest.unlink()
            part.touch()

    def _remove_left_over(self) -> None:
        """Removes each .part whose lock is free, because its process was killed."""
        for part in self._shards.glob("*.part"):
            with locked(self._locks / part.name.split(".")[0], wait=False) as is_free:
                if is_free:
                    part.unlink(missing_ok=True)

    @contextmanager
    def _as_cannot_keep(self) -> Iterator[None]:
        """Turns errors of the cache's own disk into CannotKeepError; errors of the source pass through."""
        try:
            yield
        except OSError as error:
            own = isinstance(error.filename, str | Path) and str(error.filename).startswith(str(self.folder))
            if own or error.errno in _LOCAL:
                raise CannotKeepError(error.errno, f"{self.folder}: {error.strerror}") from error
            raise


def check_whole(file: BufferedRandom, whole: Whole) -> None:
    """Raises OSError if a file differs from the shard's index in size or hash."""
    size = os.fstat(file.fileno()).st_size
    if size != whole.size:
        raise OSError(errno.EINVAL, f"{size} bytes came, its index says {whole.size}: it was cut or replaced since")
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != whole.sha256:
        raise OSError(errno.EINVAL, "sha256 is not what its index says: it was replaced or damaged since")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a file's lock. Yields False if another process holds it and `wait` is False, else True."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise CannotKeepError(error.errno, f"{path}: {error.strerror} (a file system without flock?)") from error
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked in the meantime also has the descriptor
    finally:
        os.close(descriptor)
