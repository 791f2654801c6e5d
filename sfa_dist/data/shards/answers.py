"""Limits on what a server or a command may send: no more bytes than were asked for, and not too slowly.

bytes   a range: its size; a shard: the size in its index, else LARGEST_SHARD; other files: LARGEST_FILE
time    SLOWEST bytes a second on average, after some seconds in which nothing need come
"""

from __future__ import annotations

import asyncio
import errno
import re
import tarfile
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

SLOWEST = 16 << 10  # bytes a second
LARGEST_SHARD = 64 << 30  # bytes of a shard whose size no index states
LARGEST_FILE = {"index.json": 1 << 30, "manifest.json": 64 << 20}  # bytes; nine million samples
PIECE = 1 << 20
_BLOCK = 512  # of a tar


class Sink(Protocol):
    """Receives bytes."""

    def write(self, data: bytes, /) -> object:
        """Takes the next bytes."""


class ContentRange(NamedTuple):
    """The bytes that an answer holds, `last` included, and the file's size (None: unknown)."""

    first: int
    last: int
    size: int | None


def wrong_answer(what: str) -> OSError:
    """An error that a retry does not cure."""
    return OSError(errno.EBADMSG, what)


def parse_content_range(text: str) -> ContentRange:
    """Parses `bytes 0-99/1234` (RFC 9110, 14.4). Raises OSError."""
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text.strip(), re.ASCII)
    if found:
        first, last, size = int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
        if first <= last and (size is None or last < size):
            return ContentRange(first, last, size)
    raise wrong_answer(f"the server does not say which bytes it sends (Content-Range {text[:80]!r})")


class Patience:
    """A deadline for slow transfers: `seconds`, plus one second for each SLOWEST bytes received."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def left(self, taken: int) -> float:
        """Seconds in which the next bytes must come, after `taken` bytes. Raises TimeoutError if it is too late."""
        left = min(self._seconds, self._seconds + taken / SLOWEST - (time.monotonic() - self._since))
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"{taken} bytes in {time.monotonic() - self._since:.0f} s")
        return left


async def take(read: Callable[[int], Awaitable[bytes]], sink: Sink, limit: int, seconds: float) -> int:
    """Writes all that `read(size)` gives into `sink`, and returns the number of bytes.

    Raises OSError for more than `limit` bytes, TimeoutError if they come too slowly.
    """
    patience, taken = Patience(seconds), 0
    while True:
        async with asyncio.timeout(patience.left(taken)):
            data = await read(min(PIECE, limit + 1 - taken))
        if not data:
            return taken
        taken += len(data)
        if taken > limit:
            raise wrong_answer(f"more than the {limit} bytes that were asked for came")
        sink.write(data)


class ShardSink:
    """A shard's file while it is filled.

    `write` raises OSError if the first block is not a tar's, and for more than `limit` bytes.
    """

    def __init__(self, file: Sink, limit: int) -> None:
        self._file, self._limit, self._taken, self._head = file, limit, 0, b""

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""
        self._taken += len(data)
        if self._taken > self._limit:
            raise wrong_answer(f"more than {self._limit} bytes came")
        if len(self._head) < _BLOCK:
            self._head += data[: _BLOCK - len(self._head)]
            if len(self._head) == _BLOCK:
                _check_first_block(self._head)
        self._file.write(data)


def _check_first_block(head: bytes) -> None:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise wrong_answer(f"it is not a plain, complete tar ({error}): it begins with {head[:16]!r}") from error
