"""The protocol of the watch: one JSON object per line over a stream socket. Standard library only.

Any program that reaches the port can write to it. So a line has a maximum length, checked before it is parsed, and a
line that is not a JSON object raises ValueError.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

LONGEST_LINE = 16_384  # Bytes. No rank sends more: an error's 500 characters take at most 6,000 bytes as JSON.

Message = dict[str, Any]


class Lines:
    """Sends and receives messages. `receive` waits only if `stream` is a blocking socket."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._rest = b""

    def send(self, message: Message) -> None:
        """Sends a message. Raises OSError if the other end is gone or does not read."""
        line = json.dumps(message).encode() + b"\n"
        if self.stream.send(line) != len(line):
            raise BlockingIOError("the other end does not read")

    def receive(self) -> Iterator[Message]:
        """The messages received so far, each parsed when the iterator gets to it.

        Raises OSError if the other end is gone, ValueError for a line that is not a message.
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
        """Closes the socket. Messages already sent still arrive."""
        self.stream.close()

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self.stream.fileno()


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("a line that is nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("a line that is not a JSON object")
    return message


def typed(message: Message, **fields: type) -> Message:
    """The message itself. Raises ValueError if a field is missing or not exactly of the given type."""
    for name, kind in fields.items():
        if type(message.get(name)) is not kind:
            raise ValueError(f"a message whose {name} is not of type {kind.__name__}")
    return message
