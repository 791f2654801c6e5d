"""One JSON object a line over a stream socket: the protocol of the watch. Standard library only.

Anyone who reaches the port may write to it, so a line has a maximum length, which is checked before parsing, and
a line that is not an object is a ValueError.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

LONGEST_LINE = 16_384  # Bytes; no rank sends more: an error's 500 characters take at most 6,000 as JSON.

Message = dict[str, Any]


class Lines:
    """Sends and receives messages; waits for them only if `stream` is a blocking socket."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._rest = b""

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone or has long stopped reading."""
        line = json.dumps(message).encode() + b"\n"
        if self.stream.send(line) != len(line):
            raise BlockingIOError("the other end does not read")

    def receive(self) -> Iterator[Message]:
        """The messages received so far; each is parsed when it is taken.

        Raises OSError when the other end is gone, ValueError for a line that is not a message.
        """
        try:
            chunk = self.stream.recv(LONGEST_LINE)
        except BlockingIOError:
            return iter(())
        if not chunk:
            raise ConnectionResetError("the other end closed the connection")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if max(map(len, (*lines, self._rest))) > LONGEST_LINE:
            raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
        return map(_parsed, lines)

    def close(self) -> None:
        """Closes the socket; what was sent still arrives."""
        self.stream.close()

    def fileno(self) -> int:
        """For selectors."""
        return self.stream.fileno()


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("a line that is nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("a line that is no JSON object")
    return message


def typed(message: Message, **fields: type) -> Message:
    """The message, if its fields are there and of these types exactly. Raises ValueError."""
    for name, kind in fields.items():
        if type(message.get(name)) is not kind:
            raise ValueError(f"a message whose {name} is no {kind.__name__}")
    return message
