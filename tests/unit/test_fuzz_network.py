"""Malformed answers of servers and messages to the watch: errors, within bounds."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable

import pytest
from fuzzing import amounts, fuzz
from impatient import HTTP, quick
from running_hub import Running, report
from shard_servers import serving

from sfa_dist.data.shards.remote import read_range, read_whole
from sfa_dist.parallel.watch.lines import Lines
from sfa_dist.parallel.watch.verdict import GONE, RUNS
from sfa_dist.parallel.watch.watch_process import Child

__all__ = ["quick"]
HEAD = b'HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 10-19/1000\r\nETag: "a"\r\n'
RANGES = [
    HEAD + b"Content-Length: 10\r\n\r\n0123456789",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n",
    HEAD + b"Connection: close\r\n\r\n0123456789",
]
FILES = [
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"shards": {}}'[:-1],
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}",
]


def fuzz_http(name: str, seeds: list[bytes], read: Callable[[str], bytes], most: int, inputs: int) -> None:
    """What is read of an answer is an OSError, or at most `most` bytes that stand in it."""
    answer = b""
    with serving(lambda _, send: send(answer)) as url:

        def parse(data: bytes) -> None:
            nonlocal answer
            answer = data
            assert len(read(url)) <= min(most, len(data))

        fuzz(name, seeds, parse, (OSError,), inputs=inputs)


@amounts
def test_http_ranges(inputs: int, short: None) -> None:
    fuzz_http("HTTP ranges", RANGES, lambda url: read_range(url, 10, 10, HTTP), 10, inputs)


@amounts
def test_http_files(inputs: int, short: None) -> None:
    fuzz_http("HTTP files", FILES, lambda url: read_whole(url.replace("x.tar", "index.json"), HTTP), 1 << 20, inputs)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that say nothing are given up after a second."""
    monkeypatch.setattr("sfa_dist.data.shards.remote.READ_SECONDS", 1.0)
    monkeypatch.setattr("sfa_dist.data.shards.remote.CONNECT_SECONDS", 1.0)


MESSAGES = [
    json.dumps(report(0)).encode() + b"\n",
    json.dumps(report(1, step=5, why="x")).encode() + b"\n" + json.dumps(report(1)).encode() + b"\n",
    b'{"token": "another", "rank": 0, "host": "h", "state": "runs", "code": 0, "phase": "x", "step": 1}\n',
]


@amounts
def test_the_hub(inputs: int) -> None:
    """It lives, and who lacks the token is no rank."""
    running = Running()
    ranks = [running.rank(number) for number in range(2)]
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.5):
            for rank in ranks:
                rank.says(RUNS)
                with contextlib.suppress(TimeoutError):
                    rank.lines.stream.settimeout(0.01)
                    list(rank.lines.receive())

    threading.Thread(target=beat, daemon=True).start()

    def parse(data: bytes) -> None:
        if b'"gone"' in data or b'"ended"' in data or b'"waits"' in data:
            return
        with running.connect() as stranger:
            try:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                answered = b""
                while chunk := stranger.recv(65536):
                    answered += chunk
            except TimeoutError:
                raise
            except OSError:
                answered = b""
        assert running.lives, repr(running.fault)
        assert not answered or report(0)["token"].encode() in data, "a stranger is a rank"

    fuzz("hub", MESSAGES, parse, (), inputs=inputs)
    over.set()
    ranks[0].lines.stream.settimeout(5)
    ranks[1].says(GONE)
    assert ranks[0].hears()["rank"] == 1


BEATS = [
    b'{"kind": "welcome"}\n{"kind": "beat", "phase": "forward", "step": 12, "stop": false}\n',
    b'{"kind": "beat", "phase": "forward", "step": 12, "stop": true}\n',
    b'{"kind": "lost", "rank": 1, "text": "rank 1 was lost", "exit_code": 70, "speaker": 0}\n',
    b'{"kind": "end"}\n',
]


@amounts
def test_the_child_of_a_rank(inputs: int) -> None:
    """What another program than the hub says is an error or nothing, never a verdict without its fields."""
    told: list[dict[str, object]] = []
    child = Child.__new__(Child)
    child._over = child._stop_received = False
    child._send_parent = told.append  # type: ignore[method-assign]
    child._see_off = lambda verdict: None  # type: ignore[method-assign]

    def parse(data: bytes) -> None:
        told.clear()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(5)
            theirs.sendall(data[:100_000])
            theirs.shutdown(socket.SHUT_WR)
            lines = Lines(ours)
            try:
                while True:
                    child._take(lines.receive())
            except (ConnectionResetError, ValueError):
                pass
        for message in told:
            if message["kind"] == "lost":
                assert [type(message[key]) for key in ("rank", "text", "exit_code", "speaker")] == [int, str, int, int]

    fuzz("child of a rank", BEATS, parse, (), inputs=inputs)
