"""A decoder that fails on chosen clips in ways that no file makes a real one fail: it crashes, hangs, is slow."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import zlib
from dataclasses import dataclass

from sfa_dist.data.batches import planned
from sfa_dist.data.video.decode import Decoder, Video, choose_decoder


@dataclass(frozen=True)
class Faulty:
    """Opens videos with PyAV, but first does `action` for a clip with this crc32 (0: for each one).

    Actions: a signal's name, `hang`, `slow SECONDS`, or `no_memory`.
    """

    action: str
    crc32: int = 0

    def __call__(self, data: bytes) -> Video:
        if self.crc32 in (0, zlib.crc32(data)):
            self._act()
        return choose_decoder("pyav").open(data)

    def _act(self) -> None:
        if self.action == "SIGSEGV":
            ctypes.string_at(0)  # A real one.
        elif self.action == "hang":
            time.sleep(1e6)
        elif self.action == "no_memory":
            raise MemoryError("cannot allocate 12 GiB")
        elif self.action.startswith("slow "):
            time.sleep(float(self.action.split()[1]))
        else:
            os.kill(os.getpid(), signal.Signals[self.action])


def faulty_decoder(action: str, crc32: int = 0) -> Decoder:
    """The decoder that does `action`."""
    return Decoder("faulty", "1", Faulty(action, crc32))


def install(spec: str) -> None:
    """`ACTION@CRC32`: in this process, loaders that are given no decoder take the faulty one."""
    action, _, crc32 = spec.partition("@")
    assert hasattr(planned, "decoder_of"), "a name that moved would leave the real decoder, without a word"
    planned.decoder_of = lambda data: faulty_decoder(action, int(crc32 or 0))
