"""The thread that decodes lives as long as the one that it decodes for."""

from __future__ import annotations

import threading
import time

import pytest

from sfa_dist.data.video.decode_limits import OverLimit, within


def decoding() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name == "decode"}


def test_jobs_of_a_thread_share_one_which_ends_with_it() -> None:
    before = decoding()
    seen: list[int] = []

    def ask() -> None:
        seen.extend(within(60, threading.get_ident) for _ in range(3))

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    assert len(set(seen)) == 1
    end = time.monotonic() + 60
    while decoding() - before:
        assert time.monotonic() < end, "it was left behind"
        time.sleep(0.01)


def test_one_that_does_not_return_is_left_behind_and_the_next_job_has_another() -> None:
    first = within(60, threading.get_ident)
    go_on = threading.Event()
    with pytest.raises(OverLimit, match=r"decoding took longer than 0\.01 s"):
        within(0.01, go_on.wait)
    assert within(60, threading.get_ident) != first
    go_on.set()
