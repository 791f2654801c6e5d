"""Fetches a whole shard into a local file, from a server, a pipe or a file.

From a server it comes in ranges if the server supports them, else in one stream.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from typing import IO, BinaryIO

from sfa_dist.data.shards.answers import LARGEST_SHARD, PIECE, Patience, ShardSink, wrong_answer
from sfa_dist.data.shards.remote import Answer, copy_stream, look, read_range
from sfa_dist.data.shards.retry import with_retries
from sfa_dist.data.shards.shard_names import PIPE
from sfa_dist.recipe.blocks import RemoteBlock, shard_kind

CHUNK = 16 << 20  # bytes of one ranged request, which a failure repeats
SILENT_SECONDS = 300.0  # a pipe that is silent for longer has hung
_NO_SUCH_COMMAND = (126, 127)


def fetch_shard(shard: str, file: BinaryIO, remote: RemoteBlock, size: int | None = None) -> None:
    """Fills `file`, from its start, with the bytes of a URL, a pipe, or a file of a shared file system.

    `size` is the expected size in bytes, if known; a longer shard is refused. A temporary failure is retried: with
    ranges only the piece that failed, else the whole shard. Raises OSError, also if the local disk is full or the
    content is not a tar.
    """
    limit = LARGEST_SHARD if size is None else size
    if not shard_kind(shard):
        with_retries(lambda: _copy_file(shard, _emptied(file, limit)), remote.retries)
        return
    if shard_kind(shard) == "pipe":
        with_retries(lambda: _copy_pipe(shard.removeprefix(PIPE), _emptied(file, limit)), remote.retries)
        return
    answer = with_retries(lambda: look(shard, remote), remote.retries)
    if answer.size is not None and answer.size > limit:
        raise wrong_answer(f"it has {answer.size} bytes, more than {limit}")
    if answer.ranges and answer.size is not None:
        _copy_ranges(shard, _emptied(file, limit), answer, remote)
    else:
        with_retries(lambda: copy_stream(shard, _emptied(file, limit), limit, remote), remote.retries)


def _emptied(file: BinaryIO, limit: int) -> ShardSink:
    file.seek(0)
    file.truncate()
    return ShardSink(file, limit)


def _copy_ranges(url: str, sink: ShardSink, answer: Answer, remote: RemoteBlock) -> None:
    assert answer.size is not None
    for start in range(0, answer.size, CHUNK):
        wanted = min(CHUNK, answer.size - start)
        sink.write(with_retries(partial(read_range, url, start, wanted, remote, answer), remote.retries))


def _copy_file(path: str, sink: ShardSink) -> None:
    with open(path, "rb") as source:
        while data := source.read(CHUNK):
            sink.write(data)


def _copy_pipe(command: str, sink: ShardSink) -> None:
    """Copies the output of `command`, run in a shell. Raises OSError with the last line of its stderr.

    The error counts as temporary unless the shell cannot run the command: other exit codes do not show the cause.
    """
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    tail: deque[bytes] = deque(maxlen=2)
    reader = threading.Thread(target=_keep_tail, args=(process.stderr, tail), daemon=True)
    reader.start()
    try:
        _copy_until_silent(process.stdout, sink)
        code = process.wait(SILENT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, f"gave nothing for {SILENT_SECONDS:.0f} s") from error
    finally:
        with suppress(ProcessLookupError):  # it has already ended, the usual case
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        reader.join(1.0)  # only a child that left the process group keeps stderr open longer
    if code:
        final = code in _NO_SUCH_COMMAND
        raise OSError(errno.ENOEXEC if final else errno.EIO, f"exit code {code}: {_last_line(tail)}")


def _copy_until_silent(source: IO[bytes], sink: ShardSink) -> None:
    patience, taken = Patience(SILENT_SECONDS), 0
    while True:
        if not select.select([source], [], [], patience.left(taken))[0]:
            raise TimeoutError(errno.ETIMEDOUT, f"gave nothing for {SILENT_SECONDS:.0f} s")
        data = os.read(source.fileno(), PIECE)
        if not data:
            return
        taken += len(data)
        sink.write(data)


def _keep_tail(source: IO[bytes], tail: deque[bytes]) -> None:
    """Reads a command's stderr to its end, and keeps the last two reads."""
    with source:
        while data := os.read(source.fileno(), 1 << 16):
            tail.append(data)


def _last_line(tail: deque[bytes]) -> str:
    lines = b"".join(tail)[-2000:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing on stderr"
