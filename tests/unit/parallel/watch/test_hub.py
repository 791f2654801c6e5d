"""The hub of the watch among strangers: real sockets, and whatever bytes come over them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running_hub import Running, report

from sfa_dist.parallel.watch import hub as watch_hub
from sfa_dist.parallel.watch.lines import LONGEST_LINE, Lines
from sfa_dist.parallel.watch.verdict import GONE, RUNS


def is_closed(stream: socket.socket) -> bool:
    """The other end hung up; it said nothing before."""
    try:
        return stream.recv(1) == b""
    except ConnectionError:
        return True


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    if running.thread.is_alive():
        ranks = [Lines(running.connect()) for _ in range(2)]
        for number, lines in enumerate(ranks):
            lines.send(report(number, "ended"))
        running.thread.join(5)


BAD = {
    "brackets": b"[" * 60_000 + b"\n",
    "short brackets": b"[" * 4_000 + b"\n",
    "objects": b'{"a":' * 3_000 + b"\n",
    "a number": b"9" * 10_000 + b"\n",
    "no unicode": b"\xff\xfe\n",
    "no object": b"[]\n",
    "another token": json.dumps({**report(0), "token": "x"}).encode() + b"\n",
    "a token that is no text": json.dumps({**report(0), "token": ["x"]}).encode() + b"\n",
    "a surrogate": b'{"token": "\\ud800"}\n',
    "no token": b"{}\n" * 20_000,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "endless": b"x" * (LONGEST_LINE + 1),
    "rank -1": json.dumps(report(-1)).encode() + b"\n",
    "rank 2": json.dumps(report(2)).encode() + b"\n",
    "rank true": json.dumps({**report(0), "rank": True}).encode() + b"\n",
    "rank 1e999": json.dumps(report(0)).replace('"rank": 0', '"rank": 1e999').encode() + b"\n",
    "no state": json.dumps(report(0, "happy")).encode() + b"\n",
    "a step that is no number": json.dumps({**report(0), "step": {}}).encode() + b"\n",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_no_rank_says_closes_the_connection_and_nothing_else(running: Running, data: bytes) -> None:
    ranks = [running.rank(number) for number in range(2)]
    with running.connect() as stranger:
        with contextlib.suppress(ConnectionError):
            stranger.sendall(data)
        assert is_closed(stranger)
    assert running.lives
    ranks[1].says(GONE)
    assert ranks[0].hears()["rank"] == 1


def test_the_longest_report_of_a_rank_is_taken(running: Running) -> None:
    ranks = [running.rank(number) for number in range(2)]
    ranks[1].lines.send(report(1, "waits", code=70, why="\N{PILE OF POO}" * 500))
    ranks[1].lines.send(report(1, GONE, why="\N{PILE OF POO}" * 500))
    assert ranks[0].hears()["rank"] == 1


def test_connections_that_say_nothing_are_few_and_short(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_hub, "UNKNOWN", 4)
    first = running.rank(0)
    silent = [running.connect() for _ in range(20)]
    for stream in silent[:14]:
        assert is_closed(stream)
    second = running.rank(1)
    monkeypatch.setattr(watch_hub, "UNKNOWN_S", 0.2)
    for stream in silent[14:]:
        assert is_closed(stream)
    assert running.lives
    second.says(GONE)
    assert first.hears()["rank"] == 1


def test_a_flood_delays_no_verdict(running: Running) -> None:
    first, second = running.rank(0), running.rank(1)
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            try:
                with running.connect(1.0) as stream:
                    stream.sendall(b"{}\n" * 5_000)
            except OSError:
                pass

    threads = [threading.Thread(target=flood, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    try:
        second.says(GONE)
        assert first.hears()["kind"] == "lost"
    finally:
        over.set()
    assert time.monotonic() - begin < 5  # Of 30, and it takes a tenth of a second.


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["token", "rank", "host", "state", "code", "why", "phase", "step", "stop", "kind"])
spoiled = st.dictionaries(fields, json_values, max_size=4).map(lambda new: json.dumps({**report(0), **new}).encode())
streams = st.lists(st.binary(max_size=200) | spoiled | st.sampled_from([*BAD.values()]), min_size=1, max_size=4).map(
    b"\n".join
)


def test_any_bytes_leave_the_hub_alive() -> None:
    running = Running()
    ranks = [running.rank(number) for number in range(2)]

    @settings(max_examples=150, deadline=None)
    @given(data=streams)
    def spoil(data: bytes) -> None:
        with running.connect() as stranger:
            try:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(65536):
                    pass
            except TimeoutError:
                raise
            except OSError:  # It hung up meanwhile.
                pass
        assert running.lives

    over = threading.Event()

    def beat() -> None:
        while not over.wait(1.0):
            for rank in ranks:
                rank.says(RUNS)

    threading.Thread(target=beat, daemon=True).start()
    spoil()
    over.set()
    ranks[1].says(GONE)
    assert ranks[0].hears()["rank"] == 1
