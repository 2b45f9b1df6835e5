"""A whole server around a FakeEngine, in process: real scheduler, batcher, budget and HTTP, no model."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvloop
from PIL import Image

from server import process
from server.__main__ import main
from server.app import create_app
from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.calibration.sweep import sweep
from server.core import Pixels
from server.engines.fake import FakeEngine
from server.frontend import address, listener
from server.service import Service
from server.settings import Settings

GMACS = (0.01, 0.03, 0.08)
LABELS = tuple(f"label{number}" for number in range(10))
SIDE = 8
# Nothing is kept, measured or audited: the engine's record is the test's alone.
DEFAULTS: dict[str, Any] = {
    "state_dir": None, "executors": 1, "decode_threads": 2, "profile_seconds": 0, "audit_fraction": 0
}  # fmt: skip


def png(pixels: Pixels) -> bytes:
    """As a file, without loss."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(num_classes=len(LABELS), input_size=(SIDE, SIDE))


@pytest.fixture
def photo(engine: FakeEngine) -> Callable[..., bytes]:
    """`photo(255, klass=3)`: a PNG with these confidences at stages 1, 2, 3, in units of 1/255, and this class."""

    def make(*confidences: int, klass: int = 0) -> bytes:
        return png(engine.image(*confidences, klass=klass))

    return make


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three stages, ten classes, and a frontier with many rows."""
    root = tmp_path_factory.mktemp("bundle")
    answers = {
        "logits": TensorSpec(dtype="float32", shape=("B", len(LABELS))),
        "probabilities": TensorSpec(dtype="float32", shape=("B", len(LABELS))),
        "confidence": TensorSpec(dtype="float32", shape=("B",)),
    }
    image = {"image": TensorSpec(dtype="uint8", shape=("B", SIDE, SIDE, 3))}
    stages = []
    for number, gmacs in enumerate(GMACS, start=1):
        (root / f"stage{number}.onnx").write_bytes(b"no graph: the engine is a fake")
        stages.append(
            StageSpec.of(root, f"stage{number}.onnx", inputs=image, outputs=answers, grid=(number, number), gmacs=gmacs)
        )
    manifest = write_manifest(
        root, name="fake-dvt", labels=LABELS, preprocessing=Preprocessing(SIDE, (SIDE, SIDE)), stages=stages
    )
    rng = np.random.default_rng(0)
    confidence = rng.random((3, 2000), dtype=np.float32)
    frontier = sweep(confidence[:2], rng.random((3, 2000)) < confidence, GMACS, key=manifest.frontier_key)
    return Bundle.load(root, need_frontier=False).write_frontier(frontier)


class Served:
    """A started server and a client of it."""

    def __init__(self, service: Service, http: httpx.AsyncClient) -> None:
        self.service = service
        self.http = http

    async def classify(self, content: bytes, content_type: str = "image/png", **options: Any) -> httpx.Response:
        headers = {"content-type": content_type, **options.pop("headers", {})}
        response = await self.http.post("/classify", content=content, headers=headers, **options)
        await asyncio.sleep(0)  # a socket would give the loop this turn, in which the answer is counted
        return response

    async def metric(self, name: str, **labels: str) -> float:
        """The value that Prometheus would read."""
        value = self.service.metrics.registry.get_sample_value(name, labels)
        assert value is not None, f"there is no {name} {labels}"
        return value


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Servers run on uvloop, tests on asyncio's loop; those of sockets on both: the two differ where one ends."""
    both = item.path.stem in ("test_connection", "test_listener")
    return {"asyncio": asyncio.new_event_loop} | ({"uvloop": uvloop.new_event_loop} if both else {})


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(bundle: Bundle, engine: FakeEngine) -> Serve:
    """`async with serve(max_images=2) as served:` starts a server with these settings; it keeps no state."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Served]:
        settings = {**DEFAULTS, **settings}
        app = create_app(Settings(**settings), bundle, engine)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            await http.put("/budget", json={"thresholds": [0.5, 0.5]})
            yield Served(app.state.service, http)
            engine.open_gates()

    return start


@pytest.fixture
async def served(serve: Serve) -> AsyncIterator[Served]:
    """A server with defaults and thresholds 0.5."""
    async with serve() as served:
        yield served


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["code"]
        return code


@dataclass
class Line:
    """One connection, with nothing between the test and the bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, body: bytes, *headers: str, path: str = "/classify", cut: int | None = None) -> None:
        """Send a POST, or only its first `cut` bytes."""
        head = "\r\n".join(
            [
                f"POST {path} HTTP/1.1",
                "Host: localhost",
                "Content-Type: image/png",
                f"Content-Length: {len(body)}",
                *headers,
            ]
        )
        self.writer.write((head.encode() + b"\r\n\r\n" + body)[:cut])

    async def answer(self) -> Answer:
        """The next answer. Raises IncompleteReadError where the connection ends first."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        return Answer(
            int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers.get("content-length", 0)))
        )

    async def ended(self) -> bool:
        return await self.reader.read() == b""

    def close(self) -> None:
        self.writer.close()


async def connect(port: int) -> Line:
    return Line(*await asyncio.open_connection("127.0.0.1", port))


@pytest.fixture
def dial() -> Callable[[int], Awaitable[Line]]:
    return connect


class Listening:
    """A server behind a socket, in this process."""

    def __init__(self, service: Service, server: listener.Server, port: int, task: asyncio.Task[None]) -> None:
        self.service, self.server, self.port, self.task = service, server, port, task
        self.lines: list[Line] = []

    async def turn(self) -> None:
        """Until the server has had time to read what was sent: it answers others that came later."""
        other = await self.connect()
        other.writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await other.answer()

    async def connect(self) -> Line:
        line = await connect(self.port)
        self.lines.append(line)
        return line


@pytest.fixture
def listening(request: pytest.FixtureRequest, bundle: Bundle, engine: FakeEngine) -> Any:
    """A server in this process; with `wherever_http_is_spoken` also one whose front end has a process of its own."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Listening]:
        values = Settings(**{"port": 0, "frontends": getattr(request, "param", 0), **DEFAULTS, **settings})
        app = create_app(values, bundle, engine)
        started = asyncio.Event()
        server = listener.make_server(app, values, started.set)
        loop = asyncio.get_running_loop()
        for number in process.STOP:
            loop.add_signal_handler(number, server.signalled, number)
        with address.bind(values) as bound:
            task = asyncio.create_task(server.serve([bound]))
            await started.wait()
            await app.state.service.budget.put({"thresholds": [0.5, 0.5]})
            here = Listening(app.state.service, server, bound.getsockname()[1], task)
            try:
                yield here
            finally:
                engine.open_gates()
                for line in here.lines:
                    line.close()
                for _ in range(2):  # the second one skips what is waited for
                    server.signalled(signal.SIGINT)
                await task
                for number in process.STOP:
                    loop.remove_signal_handler(number)

    return start


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of whoever runs the tests plays no part."""
    for name in os.environ:
        if name.startswith("DVT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def dvt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`dvt("serve", "--help")` gives the exit status, what was printed, and what was complained about."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dvt", *arguments])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return run
