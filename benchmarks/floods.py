"""Single clients that send what costs a server more than it costs them: the loop's longest stop, and the memory.

Each flood has a server of its own. Beside it one client asks for /livez, one request after another: the longest that it
waits is how long the event loop stood still, or what it had to do first.

- trailers: a chunked body whose trailers never end, in many lines, and in one
- json: 30 MiB that begin like images in JSON and hold something else
- pipelined: small requests by the thousand on a few connections, in as few reads as they fit in, no answer read

    taskset -c 0,1 python -m benchmarks.floods --out
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from benchmarks.clients import Line, classify
from benchmarks.harness import HOST, Options, Report, Server, finish, load_bundle, parse

MIB = 2**20
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = (
    b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\nbody\r\n0\r\n"
)


def main(arguments: list[str] | None = None) -> int:
    options = parse("floods", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, default=30, help="of a JSON body (default %(default)s)")
    parser.add_argument("--trailers-mib", type=int, default=227, help="of trailers (default %(default)s)")
    parser.add_argument("--pipelined-mib", type=int, default=20, help="on each connection (default %(default)s)")
    parser.add_argument("--connections", type=int, default=10, help="that pipeline (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="at most, of each (default %(default)s)")


def measure(options: Options) -> Report:
    report = Report("floods")
    size, bundle = options.mib * MIB, load_bundle(options)
    bodies = {
        "arrays": b'{"images":[' + b"[]," * (size // 3),
        "objects": b'{"images":[' + b"{}," * (size // 3),
        "numbers": b'{"images":[' + b"1," * (size // 2),
        "empty strings": b'{"images":[' + b'"",' * (size // 3),
        "keys": b"{" + b",".join(b'"%08d":0' % number for number in range(size // 13)) + b"}",
        "nesting": b'{"images":' + b"[" * size,
        "one string": b'{"images":["' + b"A" * size,
        "blanks": b'{"images":' + b" " * size,
    }
    trailers = options.trailers_mib * MIB
    floods: dict[str, Callable[[int], None]] = {
        "trailers in lines": lambda port: _send(port, options, _lines(trailers)),
        "trailers in one": lambda port: _send(port, options, _one(trailers)),
        **{
            f"json {name}": lambda port, body=body: _send(port, options, iter([classify(body, "application/json")]))
            for name, body in bodies.items()
        },
        "pipelined": lambda port: _pipeline(port, options),
    }
    for name, flood in floods.items():
        with Server(bundle.path, max_timeout_ms=600_000) as server:
            _beside(report, name, server, flood)
    return report


def _beside(report: Report, name: str, server: Server, flood: Callable[[int], None]) -> None:
    done, waits = threading.Event(), [0.0]

    def probe() -> None:
        line = Line(server.port)
        while not done.is_set():
            began = time.monotonic()
            line.send(LIVEZ)
            line.receive()
            waits.append(time.monotonic() - began)
            time.sleep(0.001)
        line.close()

    server.get("/livez")
    before = server.resident_mb()
    server.reset_peak()
    asker = threading.Thread(target=probe)
    asker.start()
    began = time.monotonic()
    try:
        flood(server.port)
    finally:
        seconds = time.monotonic() - began
        done.set()
        asker.join()
    peak, longest = server.peak_mb(), max(waits)
    key = name.replace(" ", "_")
    report.add(
        name,
        f"{longest * 1000:7.1f} ms longest stop, {peak - before:7.1f} MB more at most, over in {seconds:.1f} s",
        **{f"{key}_stop_ms": longest * 1000, f"{key}_more_mb": peak - before, f"{key}_seconds": seconds},
    )


def _lines(size: int) -> Iterator[bytes]:
    yield CHUNKED
    block = b"X-Trailer: some value or other\r\n" * 2048
    for _ in range(size // len(block)):
        yield block


def _one(size: int) -> Iterator[bytes]:
    yield CHUNKED + b"X-Trailer: "
    for _ in range(size // 65536):
        yield b"x" * 65536


def _send(port: int, options: Options, blocks: Iterator[bytes]) -> None:
    """All of it, or as much as the server takes; then wait for its answer, or its end."""
    with socket.create_connection((HOST, port), timeout=options.seconds) as client:
        try:
            for block in blocks:
                client.sendall(block)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
        except (ConnectionError, TimeoutError):
            pass


def _pipeline(port: int, options: Options) -> None:
    until = time.monotonic() + options.seconds
    block = LIVEZ * (options.pipelined_mib * MIB // len(LIVEZ))
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((HOST, port))) for _ in range(options.connections)]
        left = {client: memoryview(block) for client in clients}
        for client in clients:
            client.setblocking(False)
        while left and time.monotonic() < until:
            for client, rest in list(left.items()):
                try:
                    left[client] = rest[client.send(rest) :]
                except BlockingIOError:
                    continue
                except ConnectionError:
                    del left[client]
                    continue
                if not left[client]:
                    del left[client]
            time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
