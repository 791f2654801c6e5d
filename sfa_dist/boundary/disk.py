"""The small files that the program keeps for itself, and disk errors in words.

Files are read within bounds of size, nesting and type, and only if they are regular files: others may write to a run
directory, and a killed process or a failing disk may have damaged what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from sfa_dist.boundary.plain import for_terminal
from sfa_dist.boundary.secret import without_secrets

MIB = 2**20
MAX_JSON = 64 * MIB  # Bytes; far more than any of these files needs.
MAX_NESTING = 32
MAX_NAME, MAX_PATH = 255, 4095  # Bytes: the limits of Linux.
REASONS = {
    errno.EDQUOT: "the disk quota is used up (of bytes or of files)",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "input/output error: the disk, or the connection to it, fails",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ESTALE: "stale file handle: the network disk has lost the file",
    errno.ENOENT: "it is missing",
    errno.EMFILE: "too many open files in this process (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.EFBIG: "the file is larger than the file system or the limit of this process allows (ulimit -f)",
    errno.ENOTDIR: "there is a file where a folder should be",
    errno.EEXIST: "something of this name exists already",
    errno.EISDIR: "there is a folder where a file should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "symbolic links form a circle, or there is a link where none is allowed",
}


def explain(error: Exception, path: Path | None = None, needed: int = 0) -> str:
    """The reason for a disk error in words, with the file that the error names, or else `path`.

    `needed` is the total number of bytes to write; the message for a full disk reports it.
    """
    number, failed = error.errno if isinstance(error, OSError) else None, _failed_path(error, path)
    # safetensors reports a full disk in its text only, without an errno.
    if number == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the disk (ENOSPC)" if failed is None else no_space(failed, needed)
    if number in REASONS:
        return f"{REASONS[number]} ({errno.errorcode[number]})" + (f" at {failed}" if failed else "")
    return str(error)


def _failed_path(error: Exception, path: Path | None) -> Path | None:
    """The file that the error names, or else `path`."""
    name = error.filename if isinstance(error, OSError) else None
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else path


def no_space(path: Path, needed: int = 0) -> str:
    """A message for a full disk: the bytes needed and left at `path`, or that no inodes are left."""
    parent = nearest_folder(path)
    free = free_bytes(parent)
    with contextlib.suppress(OSError):
        left = os.statvfs(parent)
        if left.f_files and not left.f_favail and free > needed:
            return f"no room for another file: all {left.f_files} inodes of the file system are used at {parent}"
    wanted = f", needed {needed / MIB:.1f} MiB" if needed else ""
    return f"no space left{wanted}, have {free / MIB:.1f} MiB at {parent}"


def free_bytes(path: Path) -> int:
    """Bytes left for this user on the disk of `path`, which need not exist yet. Raises OSError."""
    left = os.statvfs(nearest_folder(path))
    return left.f_bavail * left.f_frsize


def nearest_folder(path: Path) -> Path:
    """`path`, or its nearest parent that exists as a folder."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def path_argument(text: str) -> Path:
    """A path from the command line. Raises ValueError for one that cannot exist: empty, with NUL or too long."""
    if not text:
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError("a path cannot contain NUL")
    name = max(text.split("/"), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(name)) > MAX_NAME or len(os.fsencode(text)) > MAX_PATH:
        raise ValueError(f"the path is too long: {text[:40]}... ({MAX_NAME} bytes a name, {MAX_PATH} in all)")
    return Path(text)


def print_line(line: str) -> None:
    """Prints a line to stderr, without secrets and terminal escapes.

    Never raises OSError: stderr may be a file on a full disk or a closed terminal.
    """
    with contextlib.suppress(OSError, ValueError):
        print(for_terminal(without_secrets(line)), file=sys.stderr, flush=True)


_unwritten: set[tuple[Path, int | None]] = set()  # Folders already reported, and the errno of each.


def warn_unwritten(path: Path, error: OSError) -> None:
    """Reports that a record is not written, once for each folder and reason."""
    refusal = (path.parent, error.errno)
    if refusal not in _unwritten:
        _unwritten.add(refusal)
        print_line(f"warning: {path} is not written: {explain(error, path)}; nor are other records until this is fixed")


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file atomically: writes a temporary file, flushes it to disk and renames it. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # A failed write names no file.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_if_new(path: Path, text: str) -> None:
    """Writes a text file unless it has this content already: a full disk then does no harm. Raises OSError."""
    data = text.encode()
    with contextlib.suppress(OSError, ValueError):
        if read_plain(path, len(data)) == data:
            return
    write_whole(path, data)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically. Raises OSError."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def read_plain(path: Path, limit: int = MAX_JSON, follow: bool = True) -> bytes:
    """The bytes of a regular file. Without `follow` a symbolic link is refused.

    Raises ValueError for any other kind of file (a pipe does not block) and for more than `limit` bytes; OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(min(limit, max(found.st_size, MIB)) + 1)  # read() allocates the full size it is given.
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit / MIB:,.0f} MiB")
    return data


def parse_json(data: bytes) -> Any:
    """A JSON value from an untrusted file. Raises ValueError for bad syntax and for deep nesting."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_NESTING + 1):
        if not layer:
            return value
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in layer)
        layer = [each for values in inside for each in values if isinstance(each, dict | list)]
    raise ValueError("it is nested too deeply")


def parse_object(data: bytes, **keys: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object with these keys, each of the given type. Raises ValueError that names a missing or wrong key."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    for key, kind in keys.items():
        if key not in value:
            raise ValueError(f"it has no {key!r}")
        # True is an int in Python, but no number in these files.
        if not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not bool):
            raise ValueError(f"its {key!r} is {value[key]!r:.40}")
    return value


def read_object(path: Path, **keys: type | tuple[type, ...]) -> dict[str, Any]:
    """`parse_object` on a file's content. Raises ValueError and OSError."""
    return parse_object(read_plain(path), **keys)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
