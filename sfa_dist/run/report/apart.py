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
from sfa_dist.parallel.process_state import end_with_parent

Make = Callable[[int], Iterator[bytes | None]]  # From a position on: each picture, None for one that cannot be made.

SHUTDOWN_S, POLL_S = 3.0, 0.25  # Seconds.
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


def made_apart(count: int, make: Make, seconds: float, stopped: Callable[[], bool] = bool) -> Made:
    """The pictures 0 to `count` - 1, `seconds` for all of them; the rest is left out once `stopped` says so.

    Raises NoPicturesError for what `make` raises, OSError where no process can be started.
    """
    made, end = Made(), time.monotonic() + seconds

    def is_over() -> str:
        return "was stopped" if stopped() else f"had {seconds:g} s for all clips" if time.monotonic() >= end else ""

    while len(made.pictures) < count:
        receiver, sender = _forks.Pipe(duplex=False)
        process = _forks.Process(target=_serve, args=(make, len(made.pictures), receiver, sender), daemon=True)
        try:
            process.start()
            sender.close()
            over = _receive(receiver, made.pictures, count, is_over)
            if len(made.pictures) == count:
                break
            process.join(0 if over else SHUTDOWN_S)
            made.ended[len(made.pictures)] = over or _words(process.exitcode)
            made.pictures += [None] * (count - len(made.pictures) if over else 1)
        finally:
            sender.close()
            receiver.close()
            if process.pid is not None:
                process.kill()
                process.join(SHUTDOWN_S)
    return made


def _receive(receiver: Connection, pictures: list[bytes | None], count: int, is_over: Callable[[], str]) -> str:
    """Adds what the process sends until it has sent all, or ends; `is_over` where that was not "" first."""
    while len(pictures) < count:
        while not receiver.poll(POLL_S):  # In short slices: a stop request does not end a wait.
            if over := is_over():
                return over
        try:
            message = receiver.recv_bytes(MOST_BYTES)
        except EOFError:
            return ""
        kind, content = message[:1], message[1:]
        if kind == _FAILURE:
            raise NoPicturesError(content.decode(errors="replace"))
        pictures.append(content or None)
    return ""


def _words(code: int | None) -> str:
    if code is None:
        return "did not end"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _serve(make: Make, first: int, receiver: Connection, sender: Connection) -> None:
    """The process. It ends with its parent, however that ends."""
    receiver.close()  # The parent's end of the pipe: with a copy of it here, a lost parent would not be noticed.
    end_with_parent()
    leave_signals_to_the_rank()
    try:
        for picture in make(first):
            sender.send_bytes(_PICTURE + (picture or b""))
    except Exception as error:  # noqa: BLE001 (the report tells it)
        known = isinstance(error, SfaError | OSError | ImportError)
        words = str(error) if known else f"{type(error).__name__}: {error}"
        sender.send_bytes(_FAILURE + words.encode(errors="replace")[: MOST_BYTES // 2])
