"""The listening end of the watch: hears every child, and reports a lost rank to all. Standard library only.

It lives in a thread of the child of rank 0. Each child connects once and then reports once a second; the answers carry
rank 0's phase, and the last one the verdict:

    child -> hub  {"token", "rank", "host", "state", "code", "why", "phase", "step", "stop"}
    hub -> child  {"kind": "welcome"}
                  {"kind": "beat", "phase", "step", "stop"}  stop: some rank was asked to stop
                  {"kind": "lost", "rank", "text", "exit_code", "speaker"}
                  {"kind": "end"}  all ranks have ended

Others may reach the port too. A connection is a rank's once it has sent the token; until then it gets no answer, it may
send one line, and it is closed after ten seconds, or earlier when many more come.
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
SUSPENDED_S = 5.0  # A loop that was away for longer was itself stopped: its clocks say nothing of the others.
DRAIN_S = 3.0
UNKNOWN_S = 10.0  # For a connection that has not said who it is; a child takes no longer to connect and say it.
UNKNOWN = 256  # Such connections beside the ranks' own; of more, the oldest is closed.
AT_A_TIME = 64  # Connections taken before the others are heard again.


class Hub:
    """Serves until all ranks are over or one is lost; `token` keeps strangers out."""

    def __init__(self, listener: socket.socket, world_size: int, token: str) -> None:
        now = time.monotonic()
        self._listener, self._token = listener, token
        self._stop = self._stop_is_news = False
        self._ranks = [RankState(rank, now) for rank in range(world_size)]
        self._links: dict[Lines, int] = {}  # The rank behind each connection.
        self._unknown: dict[Lines, float] = {}  # Connections that have not said it, oldest first, and since when.
        self._greeting: Message = {"kind": "welcome"}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Returns when the end has been reported to all ranks."""
        next_beat = 0.0
        last = time.monotonic()
        while True:
            self._hear(TICK_S)
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
            if now >= next_beat or self._stop_is_news:
                next_beat, self._stop_is_news = now + BEAT_S, False
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

    def _hear(self, seconds: float) -> None:
        heard = [key.fileobj for key, _ in self._selector.select(seconds)]
        for lines in heard:
            if isinstance(lines, Lines):
                self._read(lines)
        if self._listener in heard:  # Last, as it may close connections that have not been heard.
            self._accept()

    def _accept(self) -> None:
        """Takes the connections that wait, so that a rank's among many is not kept waiting."""
        for _ in range(AT_A_TIME):
            try:
                stream, _ = self._listener.accept()
            except OSError:  # There are no more, or it hung up before it was taken.
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
            # A closed connection, or a stranger's bytes. A rank that lost its connection comes back, or falls silent.
            self._drop(lines)

    def _take(self, lines: Lines, message: Message) -> None:
        """Raises ValueError for a message that no rank sends."""
        token = typed(message, token=str)["token"]
        if not compare_digest(token.encode(errors="replace"), self._token.encode()):
            raise ValueError("a stranger")
        typed(message, rank=int, host=str, state=str, code=int, phase=str, step=int)
        if message["rank"] not in range(len(self._ranks)) or message["state"] not in REPORTED:
            raise ValueError("no rank of this run, or no state of one")
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
            self._stop = self._stop_is_news = True

    def _send_all(self, message: Message) -> None:
        for lines in list(self._links):
            try:
                lines.send(message)
            except OSError:  # Its silence is noticed by the verdict.
                self._drop(lines)

    def _finish(self, message: Message) -> None:
        """Sends the last message, also to ranks that reconnect, and waits until all have closed."""
        self._greeting = message
        self._send_all(message)
        end = time.monotonic() + DRAIN_S
        while self._links and time.monotonic() < end:
            self._hear(TICK_S)
        for lines in [*self._links, *self._unknown]:
            self._drop(lines)

    def _drop(self, lines: Lines) -> None:
        with contextlib.suppress(KeyError):  # Dropped while its last messages were read.
            self._selector.unregister(lines)
        self._links.pop(lines, None)
        self._unknown.pop(lines, None)
        lines.close()
