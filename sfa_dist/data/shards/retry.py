"""Retries of reads that fail with a transient error, after growing pauses."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FIRST_PAUSE, GROWTH, LONGEST_PAUSE = 0.1, 4.0, 30.0  # seconds; the factor from one pause to the next
TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH),
}


def with_retries(work: Callable[[], T], retries: int) -> T:
    """Returns `work()`, called again up to `retries` times while it raises a transient OSError."""
    for attempt in range(retries):
        try:
            return work()
        except OSError as error:
            if not is_transient(error):
                raise
        time.sleep(min(FIRST_PAUSE * GROWTH**attempt, LONGEST_PAUSE))
    return work()


def is_transient(error: OSError) -> bool:
    """Whether the same call may succeed later: a network or a network disk failed. A missing file is not transient."""
    return error.errno in TRANSIENT or isinstance(error, TimeoutError | ConnectionError)
