"""One job at a time in a run directory: two would write over each other's checkpoints and logs.

The lock is a POSIX record lock on `<run directory>/lock`, and the file's content names the holder. The kernel releases
the lock when the process ends, however it ends, so a dead job never blocks the directory. (Not flock: forked loader
processes would inherit it, and they outlive a killed rank by some seconds.) If the file system has no locks, the
file's content is compared with the processes of this host.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import explain, parse_json, print_line, warn_unwritten
from sfa_dist.boundary.file_names import LOCK
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.parallel.process_state import started_at

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(run_dir: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Locks the run directory for this process inside the block.

    Raises RecipeError, which names the holder, if another job holds it; CheckpointError if it cannot be written.
    """
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        me = _self(environ)
        descriptor = _take(path, me)
    except OSError as error:
        raise CheckpointError(f"cannot lock {run_dir}: {explain(error, path)}") from error
    try:
        _write(descriptor, path, me)
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # While it is still locked, so that nobody sees it without a holder.
        except OSError as error:  # The lock is released all the same.
            print_line(f"warning: {path} is not removed: {explain(error, path)}")
        os.close(descriptor)


def _take(path: Path, me: dict[str, Any]) -> int:
    """A descriptor of the locked file. Raises RecipeError if another process holds the lock, OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path, me)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:  # The holder has ended and removed the file in between.
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, me: dict[str, Any]) -> None:
    holder = _read(descriptor)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _refusal(path, holder, "wait for it, or stop it") from None
        if error.errno not in NO_LOCKS:
            raise
        print_line(f"{path}: the file system has no locks ({error}); relying on the holder that the file names")
        if not _is_over(holder, me):
            raise _refusal(path, holder, f"if that job is dead, remove {path}") from None


def _is_over(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the process that wrote the file has certainly ended."""
    if not holder:
        return True
    if holder["slurm_job_id"] is not None and holder["slurm_job_id"] == me["slurm_job_id"]:
        return holder["slurm_restarts"] != me["slurm_restarts"]  # This job, before it was requeued.
    return holder["host"] == me["host"] and holder["process_start"] != started_at(holder["pid"])


def _refusal(path: Path, holder: dict[str, Any], advice: str) -> RecipeError:
    who = "another process"
    if holder:
        job = f", Slurm job {holder['slurm_job_id']}" if holder["slurm_job_id"] else ""
        who = f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
    return RecipeError(f"{path.parent} is in use by {who}; {advice}, or use another --run-dir")


def _self(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": started_at(os.getpid()),
        "slurm_job_id": environ.get("SLURM_JOB_ID"),
        "slurm_restarts": environ.get("SLURM_RESTART_COUNT", "0"),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _read(descriptor: int) -> dict[str, Any]:
    """The holder that the file names; empty if its content is not of the form of `_self`."""
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    known = isinstance(holder, dict) and holder.keys() == _self({}).keys() and type(holder["pid"]) is int
    return holder if known else {}


def _write(descriptor: int, path: Path, holder: dict[str, Any]) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        os.fsync(descriptor)
    except OSError as error:  # The file is locked; only the holder's name is missing.
        warn_unwritten(path, error)
