"""The child process that watches one rank: it reports the rank's state to the hub, and a lost rank to its parent.

    rank 0 ─ child 0 ─┐        parent and child: a socket pair, and a few bytes of shared memory for the phase
    rank 1 ─ child 1 ─┼─ hub   children and hub: TCP; the hub is a thread of child 0
    rank 2 ─ child 2 ─┘

A thread of the rank would not do: a long C call that holds the interpreter's lock would look like a death. The file is
started by its path and imports the standard library only, so that it starts in some 50 ms.

    parent -> child  {"rank", "host", "world_size", "hub": [address, port], "token", "listener", "board"}   settings
                     {"state", "code", "why"}                                                               goodbye
    child -> parent  {"kind": "ready"}, or {"kind": "failed", "reason"}
                     {"kind": "lost", ...} as the hub sent it, {"kind": "stop"}, {"kind": "off"}, {"kind": "end"}
"""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterable

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

from sfa_dist.parallel.process_state import state_of
from sfa_dist.parallel.watch.hub import BEAT_S, SUSPENDED_S, TICK_S, Hub
from sfa_dist.parallel.watch.lines import Lines, Message, typed
from sfa_dist.parallel.watch.verdict import ENDED, GONE, LOST, RUNS, SILENT_S, STOPPED, RankState, describe

BOARD = struct.Struct("<q24s?")  # The rank's shared memory: step, phase, whether it was asked to stop.
STOP_AT = BOARD.size - 1

# Seconds.
CONNECT_S = 10.0
RETRY_S = 5.0  # To restore a broken connection.
LEAVE_S = 8.0  # For a rank to end after the verdict.
LINGER_S = 20.0  # For the hub to finish after rank 0 has ended.

# Terminals, launchers and Slurm signal every process of a job; this process ends with its parent, not by a signal.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP)


class Child:
    """Watches the process `parent`, at the other end of `post`, until it ends or the watch is over."""

    def __init__(self, parent: int, post: Lines, settings: Message) -> None:
        self._parent, self._post, self._settings = parent, post, settings
        self._board = mmap.mmap(settings["board"], BOARD.size, prot=mmap.PROT_READ)
        self._state, self._code, self._why = RUNS, 0, ""
        self._over = self._stop_sent = self._stop_received = False
        self._hub_heard, self._hub_progress = time.monotonic(), ("start", 0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(post, selectors.EVENT_READ, self._read_parent)
        end = _pidfd(parent)
        self._polls = end is None
        if end is not None:
            self._selector.register(end, selectors.EVENT_READ, self._parent_ended)
        self._link = self._connect()

    def run(self) -> None:
        """Returns when the parent has ended, or all ranks have, or one is lost and the parent has left."""
        next_beat, last = 0.0, time.monotonic()
        while not self._over:
            for key, _ in self._selector.select(TICK_S):
                if not self._over:
                    key.data()
            if self._polls and not self._over and os.getppid() != self._parent:
                self._parent_ended()
            now = time.monotonic()
            if now - last > SUSPENDED_S:
                self._hub_heard += now - last
            last = now
            if now >= next_beat or self._stop_asked() != self._stop_sent:
                next_beat = now + BEAT_S
                self._check_parent()
                self._report()
            if now - self._hub_heard > SILENT_S:
                self._lose_hub()

    # -------------------------------------------------------------------------------------------- the parent

    def _check_parent(self) -> None:
        """Updates the parent's state, unless it has already reported how it ends."""
        if self._state in (RUNS, STOPPED):
            kernel = state_of(self._parent) if os.getppid() == self._parent else None
            # "T" is a stop by a signal; "t", a stop by a debugger, is not a loss.
            self._state = GONE if kernel is None else STOPPED if kernel == "T" else RUNS

    def _parent_ended(self) -> None:
        self._read_parent()  # Its goodbye may be waiting.
        if self._state in (RUNS, STOPPED):
            self._state = GONE
        self._report()
        self._over = True

    def _read_parent(self) -> None:
        try:
            for message in self._post.receive():
                self._state, self._code, self._why = message["state"], message["code"], message["why"]
                self._report()
        except ConnectionResetError:
            with contextlib.suppress(KeyError):  # Already unregistered.
                self._selector.unregister(self._post)

    def _send_parent(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # It has ended, which the kernel reports.
            self._post.send(message)

    # -------------------------------------------------------------------------------------------- the hub

    def _connect(self) -> Lines:
        """A connection that the hub has answered. Raises OSError, or ValueError if another program answers."""
        link = Lines(socket.create_connection(tuple(self._settings["hub"]), timeout=CONNECT_S))
        link.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.send(self._message())
        answers = link.receive()
        link.stream.setblocking(False)
        self._selector.register(link, selectors.EVENT_READ, self._read_hub)
        self._take(answers)
        return link

    def _message(self) -> Message:
        step, phase, _ = BOARD.unpack(self._board[:])
        self._stop_sent = self._stop_asked()
        return {
            **{key: self._settings[key] for key in ("token", "rank", "host")},
            "state": self._state,
            "code": self._code,
            "why": self._why,
            "phase": phase.rstrip(b"\0").decode(errors="replace"),
            "step": step,
            "stop": self._stop_sent,
        }

    def _stop_asked(self) -> bool:
        return self._board[STOP_AT] != 0

    def _report(self) -> None:
        if self._over:
            return
        try:
            self._link.send(self._message())
        except OSError:
            self._reconnect()

    def _read_hub(self) -> None:
        try:
            self._take(self._link.receive())
        except (OSError, ValueError):
            self._reconnect()

    def _take(self, messages: Iterable[Message]) -> None:
        """Acts on the hub's messages. Raises ValueError for a message that no hub sends."""
        for message in messages:
            kind = typed(message, kind=str)["kind"]
            self._hub_heard = time.monotonic()
            if kind == "beat":
                typed(message, phase=str, step=int, stop=bool)
                self._hub_progress = (message["phase"], message["step"])
                if message["stop"] and not self._stop_received:
                    self._stop_received = True
                    self._send_parent({"kind": "stop"})
            elif kind in ("lost", "off", "end"):
                if kind == "lost":
                    typed(message, rank=int, text=str, exit_code=int, speaker=int)
                self._over = True
                self._send_parent(message)
            if kind == "lost":
                self._see_off(message)

    def _reconnect(self) -> None:
        """Replaces a broken connection, or concludes that the hub's node is gone."""
        self._selector.unregister(self._link)
        self._link.close()
        end = time.monotonic() + RETRY_S
        while not self._over:
            try:
                self._link = self._connect()
                return
            except (OSError, ValueError):
                if time.monotonic() > end:
                    self._lose_hub()
                time.sleep(TICK_S)

    def _lose_hub(self) -> None:
        """Reports rank 0 as lost: it and its child are both silent, so their node is gone."""
        if self._state != ENDED:
            rank_state = RankState(0, self._hub_heard)
            rank_state.host, (rank_state.phase, rank_state.step) = self._settings["hub"][0], self._hub_progress
            text = describe(rank_state, time.monotonic())
            self._take([{"kind": "lost", "rank": 0, "text": text, "exit_code": LOST, "speaker": 1}])
        self._over = True

    def _see_off(self, verdict: Message) -> None:
        """Waits until the parent has left, as the verdict demands; kills it if it does not leave in time."""
        end = time.monotonic() + LEAVE_S
        while self._state in (RUNS, STOPPED):
            if self._state == STOPPED:
                os.kill(self._parent, signal.SIGCONT)  # It must run to leave.
            if time.monotonic() > end:
                if verdict["speaker"] == self._settings["rank"]:
                    print(f"error: {verdict['text']}", file=sys.stderr)
                os.kill(self._parent, signal.SIGKILL)
                return
            time.sleep(0.05)
            self._read_parent()  # It may be about to end with an error of its own.
            self._check_parent()


def main() -> None:
    """Watches the parent, whose socket is the file descriptor given as the first argument."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    post = Lines(socket.socket(fileno=int(sys.argv[1])))
    [settings] = post.receive()
    post.stream.setblocking(False)
    hub = None
    if settings["listener"] is not None:
        listener = socket.socket(fileno=settings["listener"])
        hub = threading.Thread(target=_serve, args=(Hub(listener, settings["world_size"], settings["token"]),))
        hub.daemon = True
        hub.start()
    try:
        child = Child(parent, post, settings)
    except (OSError, ValueError) as error:
        address, port = settings["hub"]
        post.send({"kind": "failed", "reason": f"{settings['host']} cannot reach {address}:{port} ({error})"})
        return
    post.send({"kind": "ready"})
    child.run()
    if hub is not None:
        hub.join(LINGER_S)


def _pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None on systems without it (Linux before 5.3)."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _serve(hub: Hub) -> None:
    try:
        hub.run()
    except BaseException:  # noqa: BLE001 (a child without its hub is worse than none: rank 0 then switches the watch off)
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
