"""A hub of two ranks in a thread of the test, and what a rank's child says to it."""

from __future__ import annotations

import socket
import threading

from sfa_dist.parallel.watch.hub import Hub
from sfa_dist.parallel.watch.lines import Lines
from sfa_dist.parallel.watch.verdict import RUNS

TOKEN = "0123456789abcdef"


class Running:
    """A hub of two ranks in a thread, and what became of it."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
        self.address = listener.getsockname()
        self.hub = Hub(listener, 2, TOKEN)
        self.fault: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.hub.run()
        except BaseException as error:  # noqa: BLE001 (the test looks at it)
            self.fault = error

    def connect(self, timeout: float = 5.0) -> socket.socket:
        return socket.create_connection(self.address, timeout=timeout)

    def rank(self, number: int) -> Rank:
        return Rank(self, number)

    @property
    def lives(self) -> bool:
        return self.thread.is_alive() and self.fault is None


class Rank:
    """What the child of a rank says."""

    def __init__(self, running: Running, number: int) -> None:
        self.lines, self.number = Lines(running.connect()), number
        self.says(RUNS)
        assert self.hears()["kind"] == "welcome"

    def says(self, state: str) -> None:
        self.lines.send(report(self.number, state))

    def hears(self) -> dict[str, object]:
        while True:
            for message in self.lines.receive():
                if message["kind"] != "beat":
                    return message


def report(rank: int, state: str = RUNS, **fields: object) -> dict[str, object]:
    message = {"token": TOKEN, "rank": rank, "host": "h", "state": state, "code": 0, "why": "", "phase": "x", "step": 1}
    return {**message, **fields}
