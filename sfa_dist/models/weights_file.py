"""Compares weights files with their recorded sha256 wherever one is read.

The record is beside the file: in the stage's `done.json` (`files: {NAME: {size, sha256}}`), or in `NAME.sha256` as
`sha256sum NAME > NAME.sha256` writes it. A file without either, as in older run directories, is taken as it is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sfa_dist.boundary.disk import explain, file_sha256, read_object, read_plain
from sfa_dist.boundary.file_names import DONE
from sfa_dist.errors import CheckpointError

_DIGEST = re.compile(r"(?<![0-9a-fA-F])[0-9a-fA-F]{64}(?![0-9a-fA-F])")
_MAX_LIST = 2**20  # Bytes of a `.sha256` file.


def checked_sha256(path: Path) -> str:
    """The sha256 of a weights file, after comparing it with the record beside it, if there is one.

    A file that has not changed since is not read again. Raises CheckpointError for a file that differs from its record,
    and for what cannot be read.
    """
    try:
        found = path.stat()
        size, digest = _recorded(path)
        advice = f"restore it from a copy, or remove {path.with_name(DONE)} to run the stage again from its checkpoint"
        if size is not None and found.st_size != size:
            raise CheckpointError(f"{path} has {found.st_size} bytes, {size} were written ({DONE}): {advice}")
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        sha256 = _sha256_of(path, stamp)
        if digest is not None and sha256 != digest:
            difference = f"its sha256 is {sha256[:16]}..., {digest[:16]}... was written ({DONE})"
            raise CheckpointError(f"{path} is damaged or another run's: {difference}: {advice}")
        wanted = _listed(path)
    except OSError as error:
        raise CheckpointError(f"cannot read weights file {path}: {explain(error, path)}") from error
    if wanted is not None and sha256 != wanted:
        difference = f"its sha256 is {sha256[:16]}..., {path.name}.sha256 beside it says {wanted[:16]}..."
        advice = "download it again, or correct the list"
        raise CheckpointError(f"{path} is damaged or another file: {difference}: {advice}")
    return sha256


def recorded_sha256(path: Path) -> str | None:
    """The sha256 that `done.json` beside a weights file records of it, which need not be there; None without a record.

    Raises CheckpointError for a record that cannot be read.
    """
    try:
        return _recorded(path)[1]
    except OSError as error:
        raise CheckpointError(f"cannot read {path.with_name(DONE)}: {explain(error, path)}") from error


@lru_cache(maxsize=64)
def _sha256_of(path: Path, stamp: tuple[int, ...]) -> str:
    del stamp  # Part of the cache's key: a file that has changed has another one.
    return file_sha256(path)


def _recorded(path: Path) -> tuple[int | None, str | None]:
    """(size, sha256) from the `done.json` beside a file, or (None, None). Raises CheckpointError, OSError."""
    record = path.with_name(DONE)
    try:
        files = read_object(record).get("files")
        described = files.get(path.name) if isinstance(files, dict) else None
        if described is None:
            return None, None
        size, digest = (described.get(key) if isinstance(described, dict) else None for key in ("size", "sha256"))
        if type(size) is not int or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"it has no size and sha256 of {path.name}")
    except FileNotFoundError:
        return None, None
    except ValueError as error:
        raise CheckpointError(f"{record} cannot be read ({error}), so {path.name} cannot be checked") from error
    return size, digest.lower()


def _listed(path: Path) -> str | None:
    """The sha256 from `NAME.sha256`, None where there is none. Raises CheckpointError, OSError."""
    beside = path.with_name(f"{path.name}.sha256")
    try:
        lines = read_plain(beside, _MAX_LIST).decode("utf-8").splitlines()
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{beside} is not a list of sha256 sums ({error})") from error
    found = [line for line in lines if _DIGEST.search(line)]
    if len(found) > 1:
        found = [line for line in found if path.name in re.split(r"[\s*/()]+", line)]
    digests = {digest.lower() for line in found for digest in _DIGEST.findall(line)}
    if len(digests) != 1:
        raise CheckpointError(f"{beside} has no sha256 of {path.name}, or several: correct or remove it")
    return digests.pop()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a weights file; empty for a file without any.

    Raises CheckpointError when the file is missing, cannot be read or differs from its record.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}")
    checked_sha256(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read weights file {path}: {error}") from error
