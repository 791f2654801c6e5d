"""Small files as a program keeps them for itself, and what a disk says when it refuses.

What was written here is read back with bounds: by its size, its nesting and its type, and only from a plain file. A
run directory lies where others may write, and a kill or a disk may have made anything of it.
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
MAX_JSON = 64 * MIB  # Bytes; far more than any of these files has.
MAX_NESTING = 32
MAX_NAME, MAX_PATH = 255, 4095  # Bytes: what Linux takes.
REASONS = {
    errno.EDQUOT: "the disk quota is used up (of bytes or of files)",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "input/output error, the disk or the way to it fails",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ESTALE: "stale file handle, the network disk has lost the file",
    errno.ENOENT: "it is not there (any more)",
    errno.EMFILE: "too many open files in this process (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.EFBIG: "the file is larger than the file system or the limit of this process allows (ulimit -f)",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.EEXIST: "something else stands there already",
    errno.EISDIR: "a folder stands where a file should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "symbolic links lead in a circle, or a link stands where none is allowed",
}


def explain(error: Exception, path: Path | None = None, needed: int = 0) -> str:
    """The disk's reason in words, and the place, which is `path` where the error names none; `needed` are the bytes
    that were to be written in all."""
    number, place = error.errno if isinstance(error, OSError) else None, _place(error, path)
    # safetensors hides the number of a full disk in its text.
    if number == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the disk (ENOSPC)" if place is None else no_space(place, needed)
    if number in REASONS:
        return f"{REASONS[number]} ({errno.errorcode[number]})" + (f" at {place}" if place else "")
    return str(error)


def _place(error: Exception, path: Path | None) -> Path | None:
    """Where it happened: the file that the system names, else `path`."""
    name = error.filename if isinstance(error, OSError) else None
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else path


def no_space(path: Path, needed: int = 0) -> str:
    """How much is asked of the disk at `path` and how much it has: bytes, or files where those have run out."""
    parent = nearest_folder(path)
    free = free_bytes(parent)
    with contextlib.suppress(OSError):
        left = os.statvfs(parent)
        if left.f_files and not left.f_favail and free > needed:
            return f"no room for another file: all {left.f_files} inodes of the file system are taken at {parent}"
    wanted = f", needed {needed / MIB:.1f} MiB" if needed else ""
    return f"no space left{wanted}, have {free / MIB:.1f} MiB at {parent}"


def free_bytes(path: Path) -> int:
    """What the disk at `path`, which need not be there yet, has left for this user."""
    left = os.statvfs(nearest_folder(path))
    return left.f_bavail * left.f_frsize


def nearest_folder(path: Path) -> Path:
    """`path`, or the first folder above it that is there."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def path_argument(text: str) -> Path:
    """A path of a command line. Raises ValueError for one that no file system has: empty, with NUL, too long."""
    if not text:
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError("a path holds no NUL")
    name = max(text.split("/"), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(name)) > MAX_NAME or len(os.fsencode(text)) > MAX_PATH:
        raise ValueError(f"the path is too long: {text[:40]}... ({MAX_NAME} bytes a name, {MAX_PATH} in all)")
    return Path(text)


def tell(line: str) -> None:
    """A line on stderr, without secrets and commands to the terminal. Never raises: stderr may be on a full disk, or
    its terminal gone."""
    with contextlib.suppress(OSError, ValueError):
        print(for_terminal(without_secrets(line)), file=sys.stderr, flush=True)


_unwritten: set[tuple[Path, int | None]] = set()  # Folders whose refusal has been told, and why they refuse.


def tell_unwritten(path: Path, error: OSError) -> None:
    """Says that a record is not written; of all that a folder refuses for one reason, the first."""
    refusal = (path.parent, error.errno)
    if refusal not in _unwritten:
        _unwritten.add(refusal)
        tell(f"warning: {path} is not written: {explain(error, path)}; nor are other records until that is mended")


def write_whole(path: Path, data: bytes) -> None:
    """A file that is complete or as it was: written beside, flushed, renamed. Raises OSError, and leaves no remains."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # A write that fails names no file.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_if_new(path: Path, text: str) -> None:
    """A text file; one that says the same already is left alone, so that a full disk cannot harm it. Raises OSError."""
    data = text.encode()
    with contextlib.suppress(OSError, ValueError):
        if read_plain(path, len(data)) == data:
            return
    write_whole(path, data)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, as `write_whole`."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def read_plain(path: Path, limit: int = MAX_JSON, follow: bool = True) -> bytes:
    """The bytes of a plain file, which is not waited for. Raises ValueError for anything else and for more than
    `limit` bytes, OSError. Without `follow` a symbolic link is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        data = file.read(min(limit, max(found.st_size, MIB)) + 1)  # as much memory is taken as is asked for
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit / MIB:,.0f} MiB")
    return data


def parse_json(data: bytes) -> Any:
    """A JSON value from a file that may be anybody's. Raises ValueError."""
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
    """A JSON object with these keys, each of its type. Raises ValueError that names what is missing or of another
    type."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    for key, kind in keys.items():
        if key not in value:
            raise ValueError(f"it has no {key!r}")
        # True is an int to Python, and no number to anybody else.
        if not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not bool):
            raise ValueError(f"its {key!r} is {value[key]!r:.40}")
    return value


def read_object(path: Path, **keys: type | tuple[type, ...]) -> dict[str, Any]:
    """`parse_object` of a file. Raises ValueError, OSError."""
    return parse_object(read_plain(path), **keys)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
