"""The listening side of the watch: receives all children's reports, reports a lost rank. Standard library only.

It runs in a thread of rank 0's child. Each child connects once and then reports once a second. The answers carry rank
0's phase; the last one carries the verdict:

    child -> hub  {"token", "rank", "host", "state", "code", "why", "phase", "step", "stop"}
    hub -> child  {"kind": "welcome"}
                  {"kind": "beat", "phase", "step", "stop"}  stop: some rank was asked to stop
                  {"kind": "lost", "rank", "text", "exit_code", "speaker"}
                  {"kind": "end"}  all ranks have ended

Other programs may reach the port too. A connection belongs to a rank once it has sent the token. Until then it gets no
answer, may send one line, and is closed after ten seconds, or earlier if many others connect.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from hmac import compare_digest

from sfa_dist.parallel.watch.lines import Lines, Message, typed
from sfa_dist.parallel.watch.verdict import REPORTED, RankState, describe, exit_code, find_lost, is_over, speaker

BEAT_S = 1.0
TICK_S = 0.25
SUSPENDED_S = 5.0  # A loop that pauses for longer was itself suspended: missing reports prove nothing then.
DRAIN_S = 3.0
UNKNOWN_S = 10.0  # For a connection to send the token; a child needs no longer to connect and send it.
UNKNOWN = 256  # Connections without the token, beside one per rank; beyond that the oldest is closed.
AT_A_TIME = 64  # Connections accepted before the others are read again.


class Hub:
    """Serves until all ranks have ended or one is lost. Connections that do not send `token` are refused."""

    def __init__(self, listener: socket.socket, world_size: int, token: str) -> None:
        now = time.monotonic()
        self._listener, self._token = listener, token
        self._stop = self._stop_is_new = False
        self._ranks = [RankState(rank, now) for rank in range(world_size)]
        self._links: dict[Lines, int] = {}  # The rank behind each connection.
        self._unknown: dict[Lines, float] = {}  # Connections without the token and their start, oldest first.
        self._greeting: Message = {"kind": "welcome"}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Returns when the end has been reported to all ranks."""
        next_beat = 0.0
        last = time.monotonic()
        while True:
            self._serve(TICK_S)
            now = time.monotonic()
            self._drop_unknown(now)
            if now - last > SUSPENDED_S:
                for rank_state in self._ranks:
                    rank_state.excuse(now - last)
            last = now
            if lost := find_lost(self._ranks, now):
                self._finish(self._verdict(lost, now))
                return
            if is_over(self._ranks):
                self._finish({"kind": "end"})
                return
            if now >= next_beat or self._stop_is_new:
                next_beat, self._stop_is_new = now + BEAT_S, False
                first = self._ranks[0]
                self._send_all({"kind": "beat", "phase": first.phase, "step": first.step, "stop": self._stop})

    def _verdict(self, lost: RankState, now: float) -> Message:
        return {
            "kind": "lost",
            "rank": lost.rank,
            "text": describe(lost, now),
            "exit_code": exit_code(lost),
            "speaker": speaker(self._ranks, lost),
        }

    def _serve(self, seconds: float) -> None:
        ready = [key.fileobj for key, _ in self._selector.select(seconds)]
        for lines in ready:
            if isinstance(lines, Lines):
                self._read(lines)
        if self._listener in ready:  # Last, because it may close connections that have not been read yet.
            self._accept()

    def _accept(self) -> None:
        """Accepts pending connections, many at a time, so that a rank's is not delayed behind others."""
        for _ in range(AT_A_TIME):
            try:
                stream, _ = self._listener.accept()
            except OSError:  # There are no more, or one was closed before it was accepted.
                return
            stream.setblocking(False)
            lines = Lines(stream)
            self._unknown[lines] = time.monotonic()
            self._selector.register(lines, selectors.EVENT_READ)
            if len(self._unknown) > len(self._ranks) + UNKNOWN:
                self._drop(next(iter(self._unknown)))

    def _drop_unknown(self, now: float) -> None:
        """Closes connections that have not sent the token in time."""
        for lines in [lines for lines, since in self._unknown.items() if now - since > UNKNOWN_S]:
            self._drop(lines)

    def _read(self, lines: Lines) -> None:
        try:
            for message in lines.receive():
                self._take(lines, message)
        except (OSError, ValueError):
            # A closed connection, or another program's bytes. A rank that lost its connection reconnects or is silent.
            self._drop(lines)

    def _take(self, lines: Lines, message: Message) -> None:
        """Takes a rank's report. Raises ValueError for a message that no rank sends."""
        token = typed(message, token=str)["token"]
        if not compare_digest(token.encode(errors="replace"), self._token.encode()):
            raise ValueError("wrong token")
        typed(message, rank=int, host=str, state=str, code=int, phase=str, step=int)
        if message["rank"] not in range(len(self._ranks)) or message["state"] not in REPORTED:
            raise ValueError("unknown rank or state")
        rank_state = self._ranks[message["rank"]]
        if lines not in self._links:
            del self._unknown[lines]
            self._links[lines] = rank_state.rank
            rank_state.host = message["host"]
            lines.send(self._greeting)
        values = (message[key] for key in ("state", "code", "phase", "step"))
        rank_state.update(time.monotonic(), *values)
        rank_state.why = str(message.get("why", ""))
        if message.get("stop") and not self._stop:
            self._stop = self._stop_is_new = True

    def _send_all(self, message: Message) -> None:
        for lines in list(self._links):
            try:
                lines.send(message)
            except OSError:  # The verdict will name the rank if it stays silent.
                self._drop(lines)

    def _finish(self, message: Message) -> None:
        """Sends the last message, also to ranks that reconnect, and waits until all have closed."""
        self._greeting = message
        self._send_all(message)
        end = time.monotonic() + DRAIN_S
        while self._links and time.monotonic() < end:
            self._serve(TICK_S)
        for lines in [*self._links, *self._unknown]:
            self._drop(lines)

    def _drop(self, lines: Lines) -> None:
        with contextlib.suppress(KeyError):  # Already dropped while its last messages were read.
            self._selector.unregister(lines)
        self._links.pop(lines, None)
        self._unknown.pop(lines, None)
        lines.close()
