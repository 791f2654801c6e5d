"""One JSON object a line over a stream socket: how the processes of the watch speak. Standard library only."""

from __future__ import annotations

import json
import socket
from typing import Any

LONGEST_LINE = 4096  # Bytes; whoever sends more is none of us.

Message = dict[str, Any]


class Lines:
    """Sends and receives messages; waits for them exactly if `stream` is a blocking socket."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._rest = b""

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone or has long stopped reading."""
        line = json.dumps(message).encode() + b"\n"
        if self.stream.send(line) != len(line):
            raise BlockingIOError("the other end does not read")

    def receive(self) -> list[Message]:
        """The messages that came in. Raises OSError when the other end is gone, ValueError for what is no message."""
        try:
            chunk = self.stream.recv(65536)
        except BlockingIOError:
            return []
        if not chunk:
            raise ConnectionResetError("the other end closed the connection")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise ValueError("a line without an end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a line that is no JSON object")
        return messages

    def close(self) -> None:
        """Closes the socket; what was sent still arrives."""
        self.stream.close()

    def fileno(self) -> int:
        """For selectors."""
        return self.stream.fileno()
