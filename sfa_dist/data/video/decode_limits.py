"""Limits on a single video: bytes, pixels, frames and time. A video that exceeds one is a bad sample (OverLimit).

Sizes are checked from the header before memory is allocated (`check_promise`), and again from what the decoder finds,
since a header may be false. Time is checked twice too: decoders call `check_time` between frames, and `within` abandons
a thread whose decoder hangs inside its library.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TypeVar

from sfa_dist.data.video.bad_sample import BadSample, OverLimit
from sfa_dist.data.video.container import is_known, promised_size, promised_video
from sfa_dist.data.video.file_kinds import HEAD_BYTES, unreadable
from sfa_dist.recipe.blocks import LimitsBlock

MAX_ASPECT = 32  # bounds the long side after the short side is resized
MIB = 1 << 20
_GRACE_SECONDS = 1.0  # for the frame in progress, before a decoder counts as hanging
_own = threading.local()  # per thread: its helper thread, and the time limit of its job
T = TypeVar("T")


def check_bytes(size: int, limits: LimitsBlock) -> None:
    """Raises OverLimit for a file of more than `limits.mib`."""
    if size > limits.mib * MIB:
        raise OverLimit(f"{size} bytes (data.limits.mib is {limits.mib})")


def check_promise(data: bytes, limits: LimitsBlock) -> None:
    """Raises BadSample for a file of no known kind, and OverLimit if its header claims more than the limits."""
    check_bytes(len(data), limits)
    if not is_known(data):
        raise BadSample(unreadable(data[:HEAD_BYTES]))
    promise = promised_video(data)
    if promise.height and promise.width:
        check_frame_size(promise.height, promise.width, limits)
    check_frame_count(promise.frames, limits)


def check_whole(data: bytes) -> None:
    """Raises BadSample for a file shorter than its header says: an interrupted download or copy."""
    promised = promised_size(data)
    if promised > len(data):
        raise BadSample(f"the file was cut: {len(data)} bytes of {promised} are there")


def check_frame_size(height: int, width: int, limits: LimitsBlock) -> None:
    """Raises OverLimit for frames that are empty, too large or of an absurd shape."""
    if height <= 0 or width <= 0 or height * width > limits.megapixels * 1e6:
        raise OverLimit(f"frames of {width}x{height} pixels (data.limits.megapixels is {limits.megapixels:g})")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise OverLimit(f"frames of {width}x{height} pixels (the limit is an aspect of {MAX_ASPECT} to 1)")


def check_frame_count(frames: int, limits: LimitsBlock) -> None:
    """Raises OverLimit for a video of more than `limits.frames`."""
    if frames > limits.frames:
        raise OverLimit(f"{frames} frames (data.limits.frames is {limits.frames})")


def check_clip_bytes(frames: int, height: int, width: int, limits: LimitsBlock) -> None:
    """Raises OverLimit for a clip whose frames, at the size kept in memory, exceed `limits.decoded_mib`."""
    size = frames * height * width * 3
    if size > limits.decoded_mib * MIB:
        what = f"{frames} frames of {width}x{height} pixels are {size / MIB:.0f} MiB"
        raise OverLimit(f"{what} (data.limits.decoded_mib is {limits.decoded_mib})")


class _HelperThread:
    """A thread that runs jobs one after another. Each calling thread has one, which ends with it.

    A new thread for each job would cost a memory arena each time.
    """

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self.jobs,), name="decode", daemon=True)
        self.thread.start()  # A daemon does not delay the exit.

    def __del__(self) -> None:
        self.jobs.put(None)


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns or raises what `work()` does. Raises OverLimit after `seconds`.

    `work` runs in another thread, the only way to leave a library call that does not return. That thread is abandoned.
    """
    outcome: Future[T] = Future()

    def job() -> None:
        _own.limit, _own.end = seconds, time.monotonic() + seconds
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- raised again by the thread that waits
            outcome.set_exception(error)

    helper: _HelperThread | None = getattr(_own, "helper", None)
    if helper is None or not helper.thread.is_alive():  # a thread does not survive a fork
        helper = _own.helper = _HelperThread()
    helper.jobs.put(job)
    if not wait([outcome], timeout=seconds + _GRACE_SECONDS).done:
        del _own.helper
        raise _too_slow(seconds)
    return outcome.result()


def check_time() -> None:
    """Raises OverLimit if the time that `within` gave this thread is over. Does nothing in other threads."""
    if time.monotonic() > getattr(_own, "end", float("inf")):
        raise _too_slow(_own.limit)


def _too_slow(seconds: float) -> OverLimit:
    return OverLimit(f"decoding took longer than {seconds:g} s (data.limits.seconds)")
