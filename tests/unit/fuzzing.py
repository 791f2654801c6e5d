"""Parsers of bytes from outside under malformed input: what may come of it is a right value or the documented error.

Inputs are mutations of valid seeds, the same in each run. Each has a bound on processor time and on memory, within one
process. SFA_FUZZ_INPUTS sets how many a parser gets (default 200); the tests that are marked `chaos` give 10,000.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

import pytest

INPUTS = int(os.environ.get("SFA_FUZZ_INPUTS", "200"))
SECONDS = 5.0  # of processor time for one input; a sound parser takes milliseconds
ADDRESS_SPACE = 1 << 30  # bytes that all inputs together may reserve beyond what the process had
RESIDENT = 256 << 20  # bytes by which one input may move the resident peak
LONGEST = 1 << 20  # bytes of an input

NUMBERS = [
    *(b"0", b"-1", b"1", b"-0.0", b"1.5", b"1e999", b"NaN", b"-Infinity", b"9" * 20, b"9" * 5000, b"true", b"null"),
    *(b'"0"', b'""', b"[]", b"{}", b"[[]]", b"2147483648", b"9223372036854775807", b"9223372036854775808", b"~", b"&a"),
]
PIECES = [
    *(b"\0", b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\n", b"\r", b'"', b",", b"\xef\xbb\xbf"),
    *(
        b"[" * 5000,
        b'{"a":' * 2000,
        b"../../x",
        b"/etc/passwd",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\x1b[2J",
        b": ",
        b"- ",
        b"\t",
    ),
    *(
        b"&a [*a, *a]",
        b"<<: *a",
        b"!!python/object:os.system",
        b"${A:-${A}}",
        b"{0..9999999999}",
        b"'",
        b"%",
        b"\\u0000",
    ),
]


class Hang(BaseException):
    """An input took too long; not an Exception, so that no parser takes it for one of its own."""


@dataclass
class Found:
    """What became of the inputs of one parser."""

    name: str
    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    faults: list[tuple[str, bytes]] = field(default_factory=list)

    def __str__(self) -> str:
        kinds: dict[str, int] = {"hang": 0, "crash": 0, "memory": 0, "wrong": 0}
        for what, _ in self.faults:
            kinds[what.partition(":")[0]] += 1
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{self.name}: {self.inputs} inputs, {self.accepted} accepted, {told}; slowest {self.slowest:.3f} s"


def mutated(seeds: Sequence[bytes], random_: random.Random) -> bytes:
    """A seed with one to four changes."""
    data = bytearray(random_.choice(seeds))
    for _ in range(random_.choice((1, 1, 1, 2, 3, 4))):
        random_.choice(_CHANGES)(data, random_, seeds)
    return bytes(data[:LONGEST])


def fuzz(
    name: str,
    seeds: Sequence[bytes],
    parse: Callable[[bytes], object],
    allowed: tuple[type[Exception], ...] = (),
    repair: Callable[[bytes], bytes] | None = None,
    inputs: int = INPUTS,
    one_line: bool = True,
) -> Found:
    """Gives `parse` the mutations of `seeds`; half of them go through `repair`, which makes checksums right again.

    `parse` raises AssertionError where it accepts what is wrong; the errors in `allowed` are text for a terminal, of
    one line unless `one_line` is off.
    Fails, with the first of each kind, where an input hangs, crashes, takes memory or is wrongly accepted.
    """
    random_ = random.Random(name)
    found = Found(name)
    for seed in seeds:
        parse(seed)  # Valid, and what is made once is made.
    with _bounded_memory():
        for number in range(inputs):
            data = mutated(seeds, random_)
            if repair is not None and number % 2:
                data = repair(data)
            _try(found, data, parse, allowed, one_line)
    print(found)
    if told := os.environ.get("SFA_FUZZ_REPORT"):
        with open(told, "a", encoding="utf-8") as file:
            file.write(f"{found}\n")
    kinds: dict[str, str] = {}
    for what, data in found.faults:
        kinds.setdefault(what[:60], f"{what[:300]} of {data[:400]!r} ({len(data)} bytes)")
    assert not kinds, "\n".join([str(found), *kinds.values()])
    return found


def _try(
    found: Found,
    data: bytes,
    parse: Callable[[bytes], object],
    allowed: tuple[type[Exception], ...],
    one_line: bool,
) -> None:
    found.inputs += 1
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with _bounded_time():
            parse(data)
        found.accepted += 1
    except allowed as error:
        if ("\n" in str(error) and one_line) or "\x1b" in str(error):
            found.faults.append((f"wrong: a message of several lines or with escapes: {error!r}", data))
    except Hang:
        found.faults.append(("hang", data))
    except MemoryError as error:
        found.faults.append((f"memory: {error!r}", data))
    except AssertionError as error:
        found.faults.append((f"wrong: {error!r}", data))
    except Exception as error:  # noqa: BLE001 (this is what is looked for)
        found.faults.append((f"crash: {type(error).__name__}: {error}", data))
    found.slowest = max(found.slowest, time.process_time() - begin)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    if grown > RESIDENT:
        found.faults.append((f"memory: {grown >> 20} MiB more", data))


@contextlib.contextmanager
def _bounded_time() -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)  # By processor time, so that a busy machine is no hang.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _place(data: bytearray, random_: random.Random) -> int:
    """Somewhere, more often near the front, where headers are."""
    end = len(data) if random_.random() < 0.6 else min(len(data), 1024)
    return random_.randrange(end) if end else 0


def _flip(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[_place(data, random_)] ^= 1 << random_.randrange(8)


def _set(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[_place(data, random_)] = random_.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, random_.randrange(256)))


def _overwrite(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    piece = random_.choice([piece for piece in PIECES if len(piece) <= 8])
    place = _place(data, random_)
    data[place : place + len(piece)] = piece


def _insert(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    place = _place(data, random_)
    data[place:place] = random_.choice((*PIECES, random_.randbytes(random_.randrange(1, 64))))


def _cut(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    del data[_place(data, random_) :]


def _remove(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    place = _place(data, random_)
    del data[place : place + random_.choice((1, 4, 16, 512, random_.randrange(1, 2048)))]


def _repeat(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    place = _place(data, random_)
    part = bytes(data[place : place + random_.choice((1, 8, 64, 512, 1024))])
    times = random_.choice((1, 2, 3, 50, 1000))
    data[place:place] = part * min(times, LONGEST // max(1, len(part)))


def _splice(data: bytearray, random_: random.Random, seeds: Sequence[bytes]) -> None:
    other = random_.choice(seeds)
    start, place = _place(bytearray(other), random_), _place(data, random_)
    part = other[start : start + random_.choice((16, 512, len(other)))]
    if random_.random() < 0.5:
        data[place : place + len(part)] = part
    else:
        data[place:place] = part


def _number(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    """Another number, or something else, in place of one that stands there as text."""
    if found := list(re.finditer(rb"-?\d+(\.\d+)?|true|false|null", bytes(data[:20_000]))):
        match = random_.choice(found)
        data[match.start() : match.end()] = random_.choice(NUMBERS)


def _word(data: bytearray, random_: random.Random, _: Sequence[bytes]) -> None:
    """A word in place of another one."""
    if found := list(re.finditer(rb"[A-Za-z_][A-Za-z0-9_]+|\[[^\[\]]*\]", bytes(data[:20_000]))):
        one, other = random_.choice(found), random_.choice((*(match[0] for match in found), *NUMBERS))
        data[one.start() : one.end()] = other


_CHANGES = (_flip, _flip, _set, _set, _overwrite, _insert, _cut, _remove, _repeat, _splice, _number, _number, _word)

amounts = pytest.mark.parametrize(
    "inputs", [pytest.param(INPUTS, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.chaos)]
)
