"""Real servers on 127.0.0.1 that stumble on demand."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Send = Callable[[bytes], None]
Script = Callable[[bytes, Send], None]


class FileServer(ThreadingHTTPServer):
    """Serves a folder over HTTP.

    ranges: whether it honours Range.   faults: what happens to the next requests for a shard: an HTTP status, "cut"
    (the connection breaks in the middle of the answer), "reset" (before it), or a number of seconds (float) to wait.
    gets: how often each file was asked for; bytes_sent: of all answers together.   by_query: what comes in place of a
    file for a path with its query.
    """

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: list[int | float | str] = []
        self.gets: Counter[str] = Counter()
        self.by_query: dict[str, bytes] = {}
        self.bytes_sent = 0
        self.lock = threading.Lock()
        self._connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, object]:
        """Also keeps the connection, to end it with the server."""
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def hang_up(self) -> None:
        """Ends all connections, those that wait for another request included."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server, name = self.server, self.path.partition("?")[0].lstrip("/")
        with server.lock:
            server.gets[name] += 1
            fault = server.faults.pop(0) if server.faults and name.endswith(".tar") else None
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        for key, data in server.by_query.items():
            place, _, query = key.partition("?")
            if name == place and query in self.path.partition("?")[2].split("&"):
                self._send(data, cut=False)
                return
        file = server.folder / name
        if isinstance(fault, int) or not file.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(file.read_bytes(), cut=fault == "cut")

    def _send(self, data: bytes, cut: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.server.bytes_sent += len(data)  # Before the client has them: it may look at once.
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Silence."""


class Proxy(ThreadingHTTPServer):
    """A reverse proxy in front of a real server that spoils some of the answers.

    faults: what happens to the next GETs: an HTTP status instead of the answer, or "cut" in the middle of it.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.target = urlsplit(target).netloc
        self.faults: list[int | str] = []

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class _ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        connection = http.client.HTTPConnection(self.server.target)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response_only(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "transfer-encoding"):
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.wfile.flush()
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Silence."""


@contextmanager
def file_server(folder: Path, ranges: bool = True) -> Iterator[FileServer]:
    """A FileServer that runs inside of the block."""
    with FileServer(folder, ranges) as server, _running(server):
        yield server
        server.hang_up()


@contextmanager
def stumbling_proxy(target: str) -> Iterator[Proxy]:
    """A Proxy that runs inside of the block."""
    with Proxy(target) as server, _running(server):
        yield server


@contextmanager
def _running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The URL of a server that does with each request what `script` says; the connection ends with it."""

    def serve(stream: socket.socket) -> None:
        with stream, suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += stream.recv(65536)
            script(asked, stream.sendall)
            stream.shutdown(socket.SHUT_WR)
            stream.settimeout(1.0)
            while stream.recv(65536):
                pass

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/d/x.tar"
        listener.shutdown(socket.SHUT_RDWR)
