"""Bytes on a disk: flushed, hashed, replaced whole, asked for again, and what the disk says when it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfa_dist.errors import CheckpointError

T = TypeVar("T")
MIB = 2**20
REASONS = {
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "input/output error, the disk or the way to it fails",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ESTALE: "stale file handle, the network disk has lost the file",
    errno.ENOENT: "it is not there (any more)",
}
# What a network disk says while it recovers, and also for a file that another node has just written.
FAILING = (errno.ESTALE, errno.EIO)
LATE = (*FAILING, errno.ENOENT)
RETRY_DELAYS_S = (0.2, 0.8, 2.0, 4.0, 8.0)
# File systems that do not promise that nodes which write disjoint parts of one file leave each other's bytes alone:
# they write whole pages back from each node's cache. Lustre, GPFS, CephFS and local ones promise it (POSIX).
LOOSE_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse", "afs", "ncpfs", "virtiofs")


def explain(error: OSError | SafetensorError, path: Path, needed: int = 0) -> str:
    """The disk's reason in words; `needed` are the bytes that were to be written in all."""
    # safetensors hides the number of a full disk in its text.
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC or "No space left" in str(error):
        return no_space(path, needed)
    if isinstance(error, OSError) and number in REASONS:
        return f"{REASONS[number]} ({errno.errorcode[number]}) at {error.filename or path}"
    return str(error)


def no_space(path: Path, needed: int) -> str:
    """How much is asked of the disk at `path` and how much it has."""
    parent = _nearest(path)
    wanted = f", needed {needed / MIB:.1f} MiB" if needed else ""
    return f"no space left{wanted}, have {free_bytes(parent) / MIB:.1f} MiB at {parent}"


def free_bytes(path: Path) -> int:
    """What the disk at `path`, which need not be there yet, has left for this user."""
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def file_system(path: Path) -> str:
    """The kind of file system under `path`, as the kernel names it (`ext4`, `nfs4`, ...); empty where it cannot be
    told."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return ""
    kinds: dict[str, str] = {}  # A later mount hides an earlier one at the same place.
    for line in mounts.splitlines():
        place, _, source = line.partition(" - ")
        kinds[place.split()[4].encode().decode("unicode_escape")] = source.split()[0]
    real = _nearest(path).resolve()
    return next((kinds[str(p)] for p in (real, *real.parents) if str(p) in kinds), "")


def patiently(work: Callable[[], T], transient: tuple[int, ...] = LATE) -> T:
    """`work()`, tried again with back-off on OSErrors with these numbers. Raises the last one."""
    for delay in RETRY_DELAYS_S:
        try:
            return work()
        except OSError as error:
            if error.errno not in transient:
                raise
        time.sleep(delay)
    return work()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, flushed to disk. Equal tensors and metadata give equal bytes."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    with path.open("r+b") as file:
        if metadata:
            _sort_metadata(file)
        file.flush()
        os.fsync(file.fileno())


def _sort_metadata(file: BinaryIO) -> None:
    """safetensors writes metadata in a random order; a file's hash is what the next stage knows it by."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length:
        raise AssertionError("the same header in another order has grown")
    file.seek(8)
    file.write(text.ljust(length))


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A stage's final weights, by write and rename. Raises CheckpointError when the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise CheckpointError(f"could not write {path}: {explain(error, path, needed)}") from error


def write_json(path: Path, value: Any) -> None:
    """A JSON file, complete or not there: written beside, flushed, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def parse_json(data: bytes) -> Any:
    """A JSON value from a file that may be anybody's. Raises ValueError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
