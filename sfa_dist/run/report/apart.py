"""Pictures that a process of their own makes: a decoder that crashes or never returns costs pictures, and no run.

The process is forked, as the loader's workers are. It sends each picture as it is made. When it ends at one, another
goes on behind that; when its time is up it is killed, and the rest stays without pictures.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from sfa_dist.data.batches.loader import leave_signals_to_the_rank
from sfa_dist.errors import SfaError

Make = Callable[[int], Iterator[bytes | None]]  # From a position on: each picture, None for one that cannot be made.

SHUTDOWN_S = 3.0  # Seconds.
MOST_BYTES = 1 << 20  # Of a message.
_PICTURE, _FAILURE = b"p", b"f"
_forks = multiprocessing.get_context("fork")


class NoPicturesError(Exception):
    """Why no picture can be made, in words."""


@dataclass
class Made:
    """The pictures by position, None without one; and how the process ended at those where it did."""

    pictures: list[bytes | None] = field(default_factory=list)
    ended: dict[int, str] = field(default_factory=dict)


def made_apart(count: int, make: Make, seconds: float) -> Made:
    """The pictures 0 to `count` - 1, `seconds` for all of them. Raises NoPicturesError for what `make` raises."""
    made, end = Made(), time.monotonic() + seconds
    while len(made.pictures) < count:
        receiver, sender = _forks.Pipe(duplex=False)
        process = _forks.Process(target=_serve, args=(make, len(made.pictures), sender), daemon=True)
        process.start()
        sender.close()
        try:
            is_late = _receive(receiver, made.pictures, count, end)
            if len(made.pictures) == count:
                break
            process.join(0 if is_late else SHUTDOWN_S)
            made.ended[len(made.pictures)] = f"took more than {seconds:g} s" if is_late else _words(process.exitcode)
            made.pictures += [None] * (count - len(made.pictures) if is_late else 1)
        finally:
            process.kill()
            process.join(SHUTDOWN_S)
            receiver.close()
    return made


def _receive(receiver: Connection, pictures: list[bytes | None], count: int, end: float) -> bool:
    """Adds what the process sends until it has sent all, or ends; whether time was up first."""
    while len(pictures) < count:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            return True
        try:
            message = receiver.recv_bytes(MOST_BYTES)
        except EOFError:
            return False
        kind, content = message[:1], message[1:]
        if kind == _FAILURE:
            raise NoPicturesError(content.decode())
        pictures.append(content or None)
    return False


def _words(code: int | None) -> str:
    return f"ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"


def _serve(make: Make, first: int, sender: Connection) -> None:
    """The process."""
    leave_signals_to_the_rank()
    try:
        for picture in make(first):
            sender.send_bytes(_PICTURE + (picture or b""))
    except Exception as error:  # noqa: BLE001 (the report tells it)
        known = isinstance(error, SfaError | OSError | ImportError)
        words = str(error) if known else f"{type(error).__name__}: {error}"
        sender.send_bytes(_FAILURE + words.encode()[: MOST_BYTES // 2])
