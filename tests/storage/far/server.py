"""A server of files on loopback that counts what it is asked and gives, and fails when told."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


NONE: Mapping[str, str] = {}


class Asked(NamedTuple):
    """A request: its path with the query, its range, and its headers in lower case."""

    path: str
    span: tuple[int, int] | None
    headers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet for a small answer
    server: Server

    def do_GET(self) -> None:
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        span = (int(found[1]), int(found[2]) + 1) if found else None
        headers = {name.lower(): text for name, text in self.headers.items()}
        with self.server.lock:
            self.server.asked.append(Asked(self.path, span, headers))
            turn = self.server.turns.popleft() if self.server.turns else None
        if turn is None or not turn(self):
            self.serve()

    def serve(self, *, cut: int | None = None) -> None:
        """The range that was asked for; with ``cut`` the connection drops after so many bytes."""
        server = self.server
        data = server.files.get(unquote(self.path.partition("?")[0]).lstrip("/"))
        if data is None:
            self.say(404)
            return
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        etag = {"ETag": server.etag} if server.etag else {}
        if found is None or not server.ranges:
            self.say(200, data, etag, cut)
            return
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            self.say(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        where = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", **etag}
        self.say(206, data[start:stop], where, cut)

    def say(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] = NONE,
        cut: int | None = None,
    ) -> bool:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        sent = body if cut is None else body[:cut]
        with suppress(OSError):
            for at in range(0, len(sent), 1 << 16):
                self.wfile.write(sent[at : at + (1 << 16)])
                with self.server.lock:
                    self.server.sent += len(sent[at : at + (1 << 16)])
            self.wfile.flush()
        if cut is not None:
            self.close_connection = True
        return True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """``files`` by their paths; ``turns`` are what to do instead, a request each: they get the
    handler, and say whether that was the answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.turns: deque[Callable[[Handler], Any]] = deque()
        self.asked: list[Asked] = []
        self.sent = 0
        self.etag, self.ranges = '"1"', True
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """Count from here."""
        self.asked.clear()
        self.sent = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of our troubles."""


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
