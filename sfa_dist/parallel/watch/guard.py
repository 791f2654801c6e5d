"""The watch for lost ranks: if one is killed, crashes, hangs or loses its node, all others end within 30 seconds.

If one is asked to stop, all others know within a second, wherever they wait. Without the watch they would wait in a
collective for ten minutes or for ever.

Each rank has a small child process (watch_process.py) that reports the rank's state to a hub on rank 0's node once a
second. This module is the rank's side: it starts the child, records the rank's phase and step, announces an orderly
end, and ends the process when the child reports that another rank is lost.

The watch itself never ends a healthy run. A rank whose child dies reports it and goes on unwatched; if the hub dies,
all ranks go on unwatched.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sfa_dist.boundary.plain import for_terminal
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.errors import SfaError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import ANOTHER_RANK, StopFlag
from sfa_dist.parallel.watch import watch_process
from sfa_dist.parallel.watch.lines import Lines, Message
from sfa_dist.parallel.watch.verdict import ENDED, LOST, UNWATCHED, WAITS
from sfa_dist.parallel.watch.watch_process import BOARD, STOP_AT

WHY_CHARACTERS = 500  # Of an error, as reported to the other ranks.

# Seconds.
START_S = 30.0
CAUSE_S = 25.0  # More than the hub needs to find out which rank failed first.

ANSWERED = 256  # Connections kept open for a while after the answer that the watch is off.
LOOPBACK = "127.0.0.1"

_PROGRESS = struct.Struct("<q24s")  # BOARD without the stop request, which another thread writes.


class Watch:
    """The phase and step of this rank, in memory shared with its watch process. Without `board` nobody reads them."""

    def __init__(self, board: mmap.mmap | None = None) -> None:
        self._board = board or bytearray(BOARD.size)

    def phase(self, name: str, step: int = 0) -> None:
        """Records the phase that begins and the number of steps done. It costs one memory write."""
        _PROGRESS.pack_into(self._board, 0, step, name.encode())

    @property
    def position(self) -> tuple[str, int]:
        """The phase and the step recorded last."""
        step, name = _PROGRESS.unpack_from(self._board)
        return name.rstrip(b"\0").decode(errors="replace"), step

    def ask_to_stop(self) -> None:
        """Informs the other ranks that this one was asked to stop."""
        self._board[STOP_AT] = 1


@contextmanager
def watched(
    runtime: Runtime, address: str, logs: Path | None, stop: StopFlag, on_loss: Callable[[int, str], None] | None = None
) -> Iterator[Watch]:
    """Inside the block the ranks watch each other and share stop requests (`stop`). Collective.

    `address` is where other nodes reach rank 0; on a single node it is not used, and nothing listens to other nodes.

    If another rank is lost, this rank writes its stacks into the folder `logs` (None: nowhere), calls
    `on_loss(exit code, verdict)` and ends by os._exit with the contract's exit code. An error inside the block that may
    only be a consequence of another rank's loss is held back until the cause is known.
    """
    guard = _start(runtime, address, logs, stop)
    if guard is None:
        yield Watch()
        return
    guard.on_loss = on_loss
    try:
        yield guard.watch
        runtime.barrier()
    except SfaError as error:
        guard.say_goodbye(ENDED, error.exit_code, str(error))
        raise
    except Exception as error:
        guard.held_back = error
        guard.say_goodbye(WAITS, LOST, f"{type(error).__name__}: {error}")
        guard.settled.wait(CAUSE_S)
        raise
    except BaseException:  # The user's second Ctrl-C, for one.
        guard.say_goodbye(ENDED, LOST)
        raise
    guard.say_goodbye(ENDED, 0)


def _start(runtime: Runtime, address: str, logs: Path | None, stop: StopFlag) -> _Guard | None:
    """The guard of this rank; None for a single rank, or if any rank's child cannot start."""
    if runtime.world_size == 1:
        return None
    guard = _Guard(runtime, address, logs, stop)
    faults = [fault for fault in runtime.gather(guard.start()) if fault is not None]
    if not faults:
        stop.on_request(guard.watch.ask_to_stop)
        threading.Thread(target=guard.listen, name="watch", daemon=True).start()
        return guard
    guard.close()
    if runtime.is_main:
        _say(f"the watch for lost ranks is off: {faults[0]}")
    return None


class _Guard:
    """The rank's side of its watch process."""

    def __init__(self, runtime: Runtime, address: str, logs: Path | None, stop: StopFlag) -> None:
        self._rank, self._host, self._logs, self._stop = runtime.rank, runtime.host, logs, stop
        # The first rank of each other node prints a verdict too: its console may not show the speaker's line.
        self._prints = runtime.launch.prints_errors and not runtime.is_main
        self._listener: socket.socket | None = None
        port, self._fault = 0, ""
        if runtime.is_main:
            one_node = runtime.launch.local_world_size == runtime.world_size
            address = LOOPBACK if one_node else address
            try:
                self._listener = socket.create_server((LOOPBACK if one_node else "", 0), backlog=socket.SOMAXCONN)
                port = self._listener.getsockname()[1]
            except OSError as error:
                self._fault = f"rank 0 on {self._host} cannot open a port for it ({error})"
        address, port, self._fault, token = runtime.broadcast((address, port, self._fault, secrets.token_hex(16)))
        self._settings: dict[str, Any] = {
            "rank": runtime.rank,
            "host": runtime.host,
            "world_size": runtime.world_size,
            "hub": [address, port],
            "token": token,
            "listener": self._listener.fileno() if self._listener else None,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._post: Lines | None = None
        self._goodbye: str | None = None
        self.held_back: BaseException | None = None
        self.on_loss: Callable[[int, str], None] | None = None
        self.settled = threading.Event()  # The hub has no more messages for this rank.
        self.watch = Watch()

    def start(self) -> str | None:
        """Starts the child. Returns None if it reaches the hub, else the reason why not."""
        if self._fault:
            return self._fault
        ours, theirs = socket.socketpair()
        self._post = Lines(ours)
        try:
            board = _shared_memory()
        except OSError as error:
            theirs.close()
            return f"{self._host} has no room for {BOARD.size} bytes ({error})"
        self.watch = Watch(mmap.mmap(board, BOARD.size))
        self.watch.phase("start")
        listener = self._settings["listener"]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", watch_process.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor for descriptor in (theirs.fileno(), board, listener) if descriptor is not None],
                start_new_session=True,  # The terminal's signals do not reach it.
            )
            theirs.close()  # Only the child keeps it open, so that its death closes the connection.
            ours.settimeout(START_S)
            self._post.send({**self._settings, "board": board})
            answer, *_ = self._post.receive()
            ours.settimeout(None)
        except (OSError, ValueError) as error:
            return f"{self._host} cannot start its child process ({type(error).__name__}: {error})"
        finally:
            theirs.close()
            os.close(board)
        return answer.get("reason")

    def close(self) -> None:
        """Ends the child: the watch is off because another rank's child cannot start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._post is not None:
            self._post.close()
        if self._listener is not None:
            self._listener.close()

    def say_goodbye(self, state: str, code: int, why: str = "") -> None:
        """Reports to the child how this rank ends and why, so that its end does not count as a loss."""
        self._goodbye = state
        assert self._post is not None
        with contextlib.suppress(OSError):  # The child has died, and `listen` has reported it.
            why = " ".join(without_secrets(why).split())[:WHY_CHARACTERS]
            self._post.send({"state": state, "code": code, "why": why})

    def listen(self) -> None:
        """Handles the child's messages as long as it lives."""
        assert self._post is not None
        try:
            while True:
                for message in self._post.receive():
                    if message["kind"] == "stop":
                        self._stop.request(ANOTHER_RANK)
                        continue
                    if message["kind"] == "lost" and self._applies(message):
                        self._end_process(message)
                    self.settled.set()
        except OSError as error:
            if not self.settled.is_set():
                self._run_unwatched(error)

    def _applies(self, verdict: Message) -> bool:
        """Whether this rank obeys the verdict: not if it ends with an error of its own, which may be the cause."""
        return self._goodbye is None or (self._goodbye == WAITS and verdict["rank"] != self._rank)

    def _end_process(self, verdict: Message) -> None:
        if verdict["speaker"] == self._rank or self._prints:
            stacks = "" if self._logs is None else f"; the stacks of all ranks are in {self._logs}"
            _say(f"error: {verdict['text']}{stacks}")
        if self._logs is not None:
            try:
                self._logs.mkdir(parents=True, exist_ok=True)
                with (self._logs / f"rank-{self._rank:05d}.stacks").open("w") as file:
                    if self.held_back is not None:  # The main thread has already left the failing frame.
                        file.write(without_secrets("".join(traceback.format_exception(self.held_back))))
                        file.flush()
                    faulthandler.dump_traceback(file)
            except OSError as error:
                _say(f"rank {self._rank} on {self._host} cannot write its stacks: {error}")
        if self.on_loss is not None:
            try:
                self.on_loss(verdict["exit_code"], verdict["text"])
            except SfaError as error:
                _say(f"rank {self._rank} on {self._host}: {error}")
        with contextlib.suppress(OSError, ValueError):  # Nobody reads stdout any more.
            sys.stdout.flush()
        # Not by an exception: the main thread waits in a collective that never ends.
        os._exit(verdict["exit_code"])

    def _run_unwatched(self, error: OSError) -> None:
        """Reports that the child has died, which the hub must not take for the death of this rank."""
        assert self._process is not None
        code = self._process.wait()
        who = f"rank {self._rank} on {self._host}"
        self.settled.set()
        if self._goodbye is not None:
            return
        if self._listener is not None:
            _say(f"{who}: the hub of the watch ended with code {code}; the run goes on without the watch")
            self._turn_away()
        _say(f"{who}: its watch process ended with code {code} ({error}); the run goes on, this rank unwatched")
        settings = self._settings
        report = {"state": UNWATCHED, "code": 0, "phase": "", "step": 0}
        try:
            with socket.create_connection(tuple(settings["hub"]), timeout=START_S) as stream:
                lines = Lines(stream)
                lines.send({**{key: settings[key] for key in ("token", "rank", "host")}, **report})
                lines.receive()
        except OSError as unreachable:
            _say(f"{who} cannot reach the hub of the watch ({unreachable}), which may take this rank for lost")

    def _turn_away(self) -> NoReturn:
        """Answers every connection, in place of the hub, that the watch is off. It does not read the requests."""
        assert self._listener is not None
        self._listener.setblocking(True)
        answered: deque[socket.socket] = deque()
        while True:
            with contextlib.suppress(OSError):
                stream, _ = self._listener.accept()
                answered.append(stream)  # Kept open: to close it with unread input would discard the answer.
                stream.setblocking(False)
                Lines(stream).send({"kind": "off"})
            if len(answered) > ANSWERED:
                answered.popleft().close()


def _shared_memory() -> int:
    """A descriptor of BOARD.size bytes: anonymous memory, or an unnamed file on systems without it. Raises OSError."""
    try:
        board = os.memfd_create("watch")
        os.truncate(board, BOARD.size)
        return board
    except (AttributeError, OSError):
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(bytes(BOARD.size))
            return os.dup(file.fileno())


def _say(line: str) -> None:
    # Not through sys.stderr: the main thread may hold its lock.
    os.write(2, f"{for_terminal(without_secrets(line))}\n".encode())
