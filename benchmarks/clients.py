"""Clients with nothing between them and the bytes: one connection, and many of them as a load.

Blocking sockets and threads: a benchmark must know when a request was sent to its last byte, and hang up when it likes.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import HOST

_CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
CHUNKED = b"\r\ntransfer-encoding: chunked"
BOUNDARY = b"3f7c0d8e5b1a4926"


def classify(body: bytes, content_type: str = "image/jpeg", query: str = "", close: bool = False) -> bytes:
    """The bytes of a whole request."""
    head = [
        f"POST /classify{query} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *(["Connection: close"] if close else []),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def classify_many(files: Sequence[bytes], query: str = "") -> bytes:
    """One request with several JPEGs, as a form."""
    parts = [b'Content-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + file for file in files]
    body = b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + BOUNDARY + b"--\r\n"
    return classify(body, f"multipart/form-data; boundary={BOUNDARY.decode()}", query)


def dechunked(data: bytes) -> bytes | None:
    """A body in chunks put together; None where its end is still to come. Raises ValueError for what is none."""
    parts, at = [], 0
    while (end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:end].partition(b";")[0], 16)
        at = end + 2 + size + 2
        if len(data) < at:
            return None
        if not size:  # our servers, and those beside them, send no trailers
            return b"".join(parts)
        parts.append(data[end + 2 : at - 2])
    return None


@dataclass(frozen=True, slots=True)
class Reply:
    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head[9:12])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    def json(self) -> Any:
        return json.loads(self.body)


class Line:
    """One keep-alive connection, made when it is first needed. Errors of the socket are OSError."""

    def __init__(self, port: int, timeout_s: float = 60.0) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self.socket: socket.socket | None = None

    def ask(self, request: bytes) -> Reply:
        self.send(request)
        return self.receive()

    def connect(self) -> socket.socket:
        if self.socket is None:
            self.socket = socket.create_connection((HOST, self._port), self._timeout_s)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.socket

    def send(self, request: bytes) -> None:
        self.connect().sendall(request)

    def receive(self) -> Reply:
        """The next answer. The connection is closed after one that says so, and where there is none."""
        assert self.socket is not None
        try:
            data = b""
            while (end := data.find(b"\r\n\r\n")) < 0:
                data += self._more()
            head = data[:end]  # taken apart when somebody asks: a client is not to add to what it measures
            stated = _CONTENT_LENGTH.search(head)
            if stated is None and CHUNKED in head.lower():
                return Reply(head, self._chunks(data[end + 4 :]))
            chunks, missing = [data[end + 4 :]], (int(stated[1]) if stated else 0) - (len(data) - end - 4)
            while missing > 0:
                chunks.append(self._more())
                missing -= len(chunks[-1])
        except BaseException:
            self.close()
            raise
        if b"\r\nconnection: close" in head.lower():
            self.close()
        return Reply(head, b"".join(chunks))

    def _chunks(self, data: bytes) -> bytes:
        while (body := dechunked(data)) is None:
            data += self._more()
        return body

    def _more(self) -> bytes:
        assert self.socket is not None
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the connection ended before the answer")
        return data

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a load: the answer, or why there is none."""

    request: int  # which of the load's requests
    began: float
    ended: float
    reply: Reply | None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.reply is not None and self.reply.status == 200

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Load:
    """`clients` threads, each asking on its own keep-alive connection, the requests in turn: `with Load(...) as load`.

    They end at `limit` requests, all together, or at the end of the block, each after the answer that it waits for.
    """

    def __init__(self, port: int, requests: Sequence[bytes], clients: int, limit: int) -> None:
        self.asked: list[Asked] = []
        self._port = port
        self._requests = requests
        self._limit = limit
        self._begun = 0
        self._stopping = False
        self._change = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name=f"client-{n}") for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stopping = True
        self.join()

    def join(self) -> None:
        """Until the limit is reached."""
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """Until so many requests have ended, or all."""
        with self._change:
            self._change.wait_for(lambda: len(self.asked) >= min(count, self._limit))

    @property
    def failed(self) -> list[Asked]:
        return [asked for asked in self.asked if not asked.ok]

    def failures(self) -> str:
        """In words, the first few."""
        words = [
            asked.error or f"{asked.reply.status} {asked.reply.body[:120]!r}" for asked in self.failed if asked.reply
        ]
        return "; ".join(sorted({*words, *(asked.error for asked in self.failed if asked.error)})[:5])

    def _run(self) -> None:
        line = Line(self._port)
        while (number := self._next()) is not None:
            which = number % len(self._requests)
            began = time.monotonic()
            reply, error = None, ""
            try:
                reply = line.ask(self._requests[which])
            except OSError as cause:
                error = f"{type(cause).__name__}: {cause}"
            asked = Asked(which, began, time.monotonic(), reply, error)
            with self._change:
                self.asked.append(asked)
                self._change.notify_all()
        line.close()

    def _next(self) -> int | None:
        with self._change:
            if self._stopping or self._begun == self._limit:
                return None
            self._begun += 1
            return self._begun - 1
