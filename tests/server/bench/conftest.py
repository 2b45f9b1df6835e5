"""A server that says what it is told to say, one thread a connection, and counts what it said."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Say = Callable[[int], Any]


def result(exit_: int = 1, label: str = "cat", **more: Any) -> dict[str, Any]:
    return {"predictions": [{"label": label}], "exit": exit_, "degraded": False, "gmacs": 0.1 * exit_, **more}


def answer(*results: dict[str, Any]) -> dict[str, Any]:
    return {"results": list(results or [result()])}


HANG_UP = object()


class Standing(ThreadingHTTPServer):
    """`say(n)` gives the n-th answer to POST /classify: a document, a status with its code, bytes, or HANG_UP."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, say: Say) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.say = say
        self.said: Counter[str] = Counter()
        self.queries: list[str] = []
        self.bodies: list[bytes] = []
        self.lock = threading.Lock()
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Clients that leave are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Standing

    def do_GET(self) -> None:
        if self.path == "/model":
            self._send(200, json.dumps({"name": "standing", "version": "1", "labels": ["cat", "dog"]}).encode())
        else:
            self._send(404, b'{"code": "not_found", "detail": "no"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            number = self.server.asked
            self.server.asked += 1
            self.server.queries.append(self.path)
            self.server.bodies.append(body)
        said = self.server.say(number)
        with self.server.lock:
            self.server.said[str(said[0]) if isinstance(said, tuple) else type(said).__name__] += 1
        if said is HANG_UP:
            self.close_connection = True
        elif isinstance(said, tuple):
            self._send(said[0], json.dumps({"code": said[1], "detail": "so"}).encode())
        elif isinstance(said, bytes):
            self._send(200, said)
        else:
            self._send(200, json.dumps(said).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def standing() -> Any:
    @contextmanager
    def start(say: Say = lambda _: answer()) -> Iterator[Standing]:
        with Standing(say) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield server
            server.shutdown()

    return start
