"""A rolling update under load, as Kubernetes does it: failed requests, with preStop sleep, drain delay, both, neither.

Two real servers behind a balancer of connections, replaced one after the other with one more than there are (`maxSurge:
1`). It balances as kube-proxy does: a new connection goes to one of the endpoints, and stays there whatever becomes of
it. A new server counts as an endpoint when it is ready, and `--lag` later everywhere. An old one is deleted when the
new one has been ready for `--min-ready`: in that moment its endpoint begins to go, which takes the same lag, and its
preStop sleep begins; then comes SIGTERM. Nobody waits for anybody there: that is the race.

Half of the clients keep their connections, half make a new one for each request, all pause between two. Everything but
200 is a failure, a 503 with Retry-After, too, and a connection that the server closed while it was idle: no client here
asks a second time.

    python -m benchmarks.rolling_update --out
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from signal import SIGTERM

from benchmarks.clients import Line, classify
from benchmarks.harness import HOST, Options, Report, Server, finish, load_bundle, parse
from server.bench.photos import photos

REPLICAS = 2
AFTER_FAILURE_S = 0.05  # a client that is refused does not hammer
VARIANTS = ("none", "prestop", "delay", "both")


def main(arguments: list[str] | None = None) -> int:
    options = parse("rolling_update", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(images=50)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(default all)")
    parser.add_argument("--prestop", type=float, default=3.0, help="seconds of preStop sleep (default %(default)s)")
    parser.add_argument("--drain-delay", type=float, default=2.0, help="DVT_DRAIN_DELAY_S (default %(default)s)")
    parser.add_argument(
        "--lag", type=float, default=1.0, help="until an endpoint is known, or gone (default %(default)s)"
    )
    parser.add_argument("--min-ready", type=float, default=1.5, help="minReadySeconds (default %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="(default %(default)s)")
    parser.add_argument(
        "--pause", type=float, default=0.05, help="of a client between two requests (default %(default)s)"
    )


class Endpoints:
    """A balancer of connections on a port of its own, in a thread of its own: `with Endpoints(lag) as endpoints`."""

    def __init__(self, lag_s: float) -> None:
        self.port = 0
        self._lag_s = lag_s
        self._ready: list[int] = []
        self._deal = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._started, self._ended = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="endpoints")

    def __enter__(self) -> Endpoints:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    def add(self, port: int) -> None:
        """Takes effect after the lag; so does `remove`."""
        self._loop.call_soon_threadsafe(self._loop.call_later, self._lag_s, self._ready.append, port)

    def remove(self, port: int) -> None:
        self._loop.call_soon_threadsafe(self._loop.call_later, self._lag_s, self._ready.remove, port)

    def wait_until_known(self, number: int) -> None:
        while len(self._ready) != number:
            time.sleep(0.01)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, HOST, 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            backend = await asyncio.open_connection(HOST, self._deal.choice(self._ready))
        except (OSError, IndexError):
            writer.transport.abort()
            return
        both = [asyncio.create_task(_pass_on(reader, backend[1])), asyncio.create_task(_pass_on(backend[0], writer))]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        for side in (writer, backend[1]):
            side.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side ends; a reset is passed on as one."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        writer.transport.abort()


@dataclass(frozen=True, slots=True)
class Sent:
    outcome: str  # "200", or what came in its place
    keeps: bool  # by a client that keeps its connection
    seconds: float


class Crowd:
    """Clients that ask until they are told to stop: `with Crowd(...) as crowd`."""

    def __init__(self, port: int, files: Sequence[bytes], clients: int, pause_s: float) -> None:
        self.sent: list[Sent] = []
        self._port, self._pause_s = port, pause_s
        self._requests = {keeps: [classify(file, close=not keeps) for file in files] for keeps in (True, False)}
        self._numbers = count()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number % 2 == 0,)) for number in range(clients)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, keeps: bool) -> None:
        requests = self._requests[keeps]
        line = Line(self._port, timeout_s=30.0)
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                reply = line.ask(requests[next(self._numbers) % len(requests)])
                outcome = str(reply.status) if reply.status == 200 else f"{reply.status} {reply.json().get('code')}"
            except OSError as error:
                line.close()
                outcome = type(error).__name__
            self.sent.append(Sent(outcome, keeps, time.monotonic() - began))
            self._stopping.wait(self._pause_s if outcome == "200" else AFTER_FAILURE_S)
        line.close()


@dataclass(frozen=True)
class Update:
    """What clients saw while all replicas were replaced."""

    sent: list[Sent]
    seconds: float
    exit_statuses: list[int]

    @property
    def failed(self) -> list[Sent]:
        return [one for one in self.sent if one.outcome != "200"]


def update(bundle: Path, files: Sequence[bytes], prestop_s: float, delay_s: float, options: Options) -> Update:
    statuses: list[int] = []
    with contextlib.ExitStack() as stack:

        def start() -> Server:
            # No profile: how long a start takes plays no part.
            return stack.enter_context(
                Server(bundle, drain_delay_s=delay_s, executors=1, profile_seconds=0, timeout_ms=10_000)
            )

        old = [start() for _ in range(REPLICAS)]
        endpoints = stack.enter_context(Endpoints(options.lag))
        for server in old:
            endpoints.add(server.port)
        endpoints.wait_until_known(REPLICAS)
        with Crowd(endpoints.port, files, options.clients, options.pause) as crowd:
            time.sleep(options.lag)
            began = time.monotonic()
            for leaving in old:
                coming = start()  # the readiness probe passes from here on
                endpoints.add(coming.port)
                time.sleep(options.min_ready)
                endpoints.remove(leaving.port)
                time.sleep(prestop_s)
                leaving.signal(SIGTERM)
                statuses.append(leaving.wait())
            time.sleep(options.lag)
            seconds = time.monotonic() - began
    return Update(crowd.sent, seconds, statuses)


def measure(options: Options) -> Report:
    report = Report("rolling_update")
    bundle = load_bundle(options).path
    files = photos(options.images)
    seconds = {"prestop": options.prestop, "delay": options.drain_delay}
    report.add(
        "as if",
        f"an endpoint is known, or gone, after {options.lag:g} s; minReadySeconds {options.min_ready:g}",
        lag_s=options.lag,
        min_ready_s=options.min_ready,
        prestop_s=options.prestop,
        drain_delay_s=options.drain_delay,
    )
    lost = 0
    for variant in options.variants:
        has = {name: value if variant in (name, "both") else 0.0 for name, value in seconds.items()}
        one = update(bundle, files, has["prestop"], has["delay"], options)
        kinds = Counter(f"{sent.outcome}, {'kept' if sent.keeps else 'new'} connection" for sent in one.failed)
        report.add(
            f"preStop {has['prestop']:g} s, DVT_DRAIN_DELAY_S={has['delay']:g}",
            f"{len(one.failed)} of {len(one.sent)} requests failed, in {one.seconds:.1f} s",
            **{f"{variant}_requests": len(one.sent), f"{variant}_failed": len(one.failed)},
            **{f"{variant}_failures": kinds, f"{variant}_seconds": one.seconds},
        )
        for kind, number in kinds.most_common(4):
            report.add("", f"{number}: {kind}")
        report.must_be_zero("  servers that did not end well", sum(status != 0 for status in one.exit_statuses))
        lost += len(one.failed) if variant == "both" else 0
    report.must_be_zero("requests that fail as the manifests have it", lost)
    return report


if __name__ == "__main__":
    sys.exit(main())
