"""Files on a disk: flushed, hashed and replaced atomically, and read again after a transient error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfa_dist.boundary.disk import explain, file_sha256, nearest_folder
from sfa_dist.errors import CheckpointError

T = TypeVar("T")
# Errors of a network disk while it recovers, and (ENOENT) for a file that another node has just written.
FAILING = (errno.ESTALE, errno.EIO)
LATE = (*FAILING, errno.ENOENT)
RETRY_DELAYS_S = (0.2, 0.8, 2.0, 4.0, 8.0)
# File systems on which nodes that write disjoint parts of a file may overwrite each other's bytes, because each node
# writes whole pages back from its cache. Lustre, GPFS, CephFS and local file systems rule this out (POSIX).
LOOSE_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse", "afs", "ncpfs", "virtiofs")


def file_system(path: Path) -> str:
    """The type of the file system under `path`, as the kernel names it (`ext4`, `nfs4`, ...); empty if unknown."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return ""
    kinds: dict[str, str] = {}  # A later mount hides an earlier one at the same path.
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        kinds[mount.split()[4].encode().decode("unicode_escape")] = source.split()[0]
    real = nearest_folder(path).resolve()
    return next((kinds[str(p)] for p in (real, *real.parents) if str(p) in kinds), "")


def patiently(work: Callable[[], T], transient: tuple[int, ...] = LATE) -> T:
    """`work()`, retried with back-off on OSErrors whose errno is in `transient`. Raises the last one."""
    for delay in RETRY_DELAYS_S:
        try:
            return work()
        except OSError as error:
            if error.errno not in transient:
                raise
        time.sleep(delay)
    return work()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file and flushes it to disk. Equal tensors and metadata give equal bytes."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    with path.open("r+b") as file:
        if metadata:
            _sort_metadata(file)
        file.flush()
        os.fsync(file.fileno())


def _sort_metadata(file: BinaryIO) -> None:
    """Sorts the metadata of a file, which safetensors writes in random order: the file's hash must not depend on it."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length:
        raise AssertionError("the header is longer after its metadata is sorted")
    file.seek(8)
    file.write(text.ljust(length))


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Writes a stage's final weights to a temporary file and renames it. Returns their `size` and `sha256`.

    Raises CheckpointError if the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors, metadata)
        described = {"size": temporary.stat().st_size, "sha256": file_sha256(temporary)}
        temporary.replace(path)
        return described
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # It takes up space, perhaps on a full disk.
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise CheckpointError(f"could not write {path}: {explain(error, path, needed)}") from error


def sync_directory(path: Path) -> None:
    """Flushes a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
