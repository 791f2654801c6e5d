"""A whole shard into a local file: by ranges where its server sends them, in one stream, from a pipe or from a file."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO, BinaryIO

from sfa_dist.data.remote import copy_stream, look, read_range
from sfa_dist.data.retry import with_retries
from sfa_dist.data.shards import PIPE
from sfa_dist.recipe_blocks import RemoteBlock, shard_kind

CHUNK = 16 << 20  # bytes of one ranged request: what a failure costs
SILENT_SECONDS = 300.0  # a pipe that gives nothing for so long has hung
_NO_SUCH_COMMAND = (126, 127)


def fetch_shard(shard: str, file: BinaryIO, remote: RemoteBlock) -> None:
    """Fills `file`, from its start, with the bytes of a URL, a pipe, or a file of a shared file system.

    A failure that may pass is tried again: by ranges only the piece that failed, else the whole. Raises OSError, also
    where the local disk is full.
    """
    if shard_kind(shard) == "pipe":
        with_retries(lambda: _copy_pipe(shard.removeprefix(PIPE), file), remote.retries)
        return
    if not shard_kind(shard):
        with_retries(lambda: _copy_file(shard, file), remote.retries)
        return
    answer = with_retries(lambda: look(shard, remote), remote.retries)
    if answer.ranges and answer.size is not None:
        _copy_ranges(shard, file, answer.size, remote)
    else:
        with_retries(lambda: _copy_stream(shard, file, remote), remote.retries)


def _copy_ranges(url: str, file: BinaryIO, size: int, remote: RemoteBlock) -> None:
    file.seek(0)
    for start in range(0, size, CHUNK):
        wanted = min(CHUNK, size - start)
        data = with_retries(lambda s=start, n=wanted: _exactly(url, s, n, remote), remote.retries)  # type: ignore[misc]
        file.write(data)


def _exactly(url: str, start: int, size: int, remote: RemoteBlock) -> bytes:
    data = read_range(url, start, size, remote)
    if len(data) != size:
        raise OSError(errno.EIO, f"{len(data)} bytes came instead of {size}")
    return data


def _copy_stream(url: str, file: BinaryIO, remote: RemoteBlock) -> None:
    _rewind(file)
    copy_stream(url, file, remote)


def _copy_file(path: str, file: BinaryIO) -> None:
    _rewind(file)
    with open(path, "rb") as source:
        shutil.copyfileobj(source, file, CHUNK)


def _rewind(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _copy_pipe(command: str, file: BinaryIO) -> None:
    """Runs `command` in a shell. Raises OSError with the last line it said, of a passing kind but where the shell does
    not know the command: an exit code does not tell more."""
    _rewind(file)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        )
        try:
            assert process.stdout is not None
            _copy_while_it_speaks(process.stdout, file)
            code = process.wait(SILENT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(errno.ETIMEDOUT, f"gave nothing for {SILENT_SECONDS:.0f} s") from error
        finally:
            with suppress(ProcessLookupError):  # it ended by itself, as it should
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout:
                process.stdout.close()
        if code:
            final = code in _NO_SUCH_COMMAND
            raise OSError(errno.ENOEXEC if final else errno.EIO, f"exit code {code}: {_last_line(said)}")


def _copy_while_it_speaks(source: IO[bytes], file: BinaryIO) -> None:
    while True:
        if not select.select([source], [], [], SILENT_SECONDS)[0]:
            raise TimeoutError(errno.ETIMEDOUT, f"gave nothing for {SILENT_SECONDS:.0f} s")
        data = os.read(source.fileno(), 1 << 20)
        if not data:
            return
        file.write(data)


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read()[-2000:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
