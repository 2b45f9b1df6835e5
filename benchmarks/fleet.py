"""How long a budget takes to reach a fleet, and how long the fleet needs to agree again after its API server was away.

The replicas are the server's own stores, controllers and watches, without an engine behind them, all on one event loop.
The API server is the tests' stand-in, in a process of its own: it compares and sets and streams as the real one does,
but keeps nothing on a disk, and nothing lies between. So the figures are what this code adds, and a real cluster adds
its own.

    python -m benchmarks.fleet --out
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from typing import Any

from benchmarks.harness import ROOT, Options, Report, finish, load_bundle, parse, quantile_ms
from server.budget.configmap import ConfigMapStore
from server.budget.controller import BudgetController
from server.budget.fleet import Fleet
from server.bundle.frontier import Frontier
from server.core import OperatingPoint
from server.errors import StoreUnavailable

NAMESPACE, NAME = "serving", "dvt-policy"  # as the stand-in has them
LIMIT_S = 90.0  # for whatever is waited for


def main(arguments: list[str] | None = None) -> int:
    options = parse("fleet", __doc__, arguments, _more)
    logging.getLogger("server").setLevel(logging.ERROR)  # a hundred replicas that miss their API server say so
    return finish(asyncio.run(measure(options)), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watchers", type=int, default=100, help="replicas (default %(default)s)")
    parser.add_argument("--puts", type=int, default=200, help="budgets that are set (default %(default)s)")
    parser.add_argument("--away", type=float, default=5.0, help="seconds for which it is away (default %(default)s)")
    parser.add_argument("--watch", type=float, default=30.0, help="seconds of a watch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that it is away, each way (default %(default)s)")


class StandIn:
    """The API server, told by lines what to do."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process, self.port = process, port

    @classmethod
    async def start(cls) -> StandIn:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.server.budget.api_server"),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        return cls(process, int(await process.stdout.readline()))

    async def tell(self, order: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n".encode())
        async with asyncio.timeout(LIMIT_S):
            await self._process.stdout.readline()

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class Replica:
    """When it had which budget in force, by its version."""

    def __init__(self, frontier: Frontier, port: int, watch_s: float) -> None:
        from kubernetes.aio.client import ApiClient, Configuration

        async def connect() -> ApiClient:
            return ApiClient(Configuration(host=f"http://127.0.0.1:{port}"))

        self.errors: Counter[str] = Counter()
        self.had: dict[int, float] = {}
        store = ConfigMapStore(NAME, NAMESPACE, "benchmark", connect, watch_s=watch_s)
        self.budget = BudgetController(frontier, store, self._swapped)
        self.fleet = Fleet(self.budget, store, self, time.monotonic)

    def _swapped(self, point: OperatingPoint) -> None:
        self.had[point.version] = time.monotonic()

    def policy_error(self, reason: str) -> None:
        self.errors[reason] += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.fleet.news()


async def measure(options: Options) -> Report:
    report = Report("fleet")
    frontier = load_bundle(options).frontier
    low, high = frontier.rows[0].gmacs, frontier.knee.gmacs
    targets = cycle([low + (high - low) * step / 7 for step in range(1, 7)])
    api = await StandIn.start()
    replicas = [Replica(frontier, api.port, options.watch) for _ in range(options.watchers)]
    try:
        began = time.monotonic()
        await asyncio.gather(*(replica.fleet.start() for replica in replicas))
        report.add("replicas", f"{len(replicas)}, started in {time.monotonic() - began:.2f} s", watchers=len(replicas))
        await _propagation(report, replicas, targets, options.puts)
        for name, (away, back) in {
            "refused": ("stop", "serve"),
            "half open": ("silence", "serve"),
            "restarted": ("restart", None),
        }.items():
            await _absence(report, api, replicas, targets, name, away, back, options)
        versions = {replica.budget.point.version for replica in replicas}
        report.must_be_zero("replicas that disagree in the end", len(versions) - 1)
    finally:
        await asyncio.gather(*(replica.fleet.stop() for replica in replicas))
        await api.stop()
    return report


async def _propagation(report: Report, replicas: list[Replica], targets: Any, puts: int) -> None:
    put_s: list[float] = []
    reach_s: list[float] = []
    last_s: list[float] = []
    for number, target in zip(count(), targets):
        if number == puts:
            break
        writer = replicas[number % len(replicas)]
        began = time.monotonic()
        version = (await writer.budget.put({"gmacs": target})).version
        put_s.append(time.monotonic() - began)
        await _agree(replicas, version)
        others = [replica.had[version] - began for replica in replicas if replica is not writer]
        reach_s += others
        last_s.append(max(others, default=put_s[-1]))
    for what, seconds, name in (
        ("a PUT, until it is answered", put_s, "put"),
        ("until it is in force on a replica", reach_s, "reach"),
        ("until it is in force on the last one", last_s, "last"),
    ):
        p50, p99 = quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.99)
        report.add(what, f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", **{f"{name}_p50_ms": p50, f"{name}_p99_ms": p99})


async def _absence(
    report: Report,
    api: StandIn,
    replicas: list[Replica],
    targets: Any,
    name: str,
    away: str,
    back: str | None,
    options: Options,
) -> None:
    """The API server goes; a PUT is tried; another budget is written into the store while nobody hears of it, or as
    soon as it is back; then all are waited for."""
    agree_s, refused_s, lost = [], [], 0
    for _ in range(options.rounds):
        before = max(replica.budget.point.version for replica in replicas)
        await api.tell(away)
        if back is not None:
            began = time.monotonic()
            try:
                await replicas[0].budget.put({"gmacs": next(targets)})
                lost += 1  # nobody can have stored it
            except StoreUnavailable:
                refused_s.append(time.monotonic() - began)
            await asyncio.sleep(max(0.0, options.away - (time.monotonic() - began)))
        lost += sum(replica.budget.point.version != before for replica in replicas)
        await api.tell("put " + json.dumps({"budget": json.dumps({"gmacs": next(targets)})}))
        began = time.monotonic()
        if back is not None:
            await api.tell(back)
        await _agree(replicas, before + 1)
        agree_s.append(max(replica.had[before + 1] for replica in replicas) - began)
    figures = {f"{name.replace(' ', '_')}_agree_s": agree_s, f"{name.replace(' ', '_')}_put_s": refused_s}
    told = f"a PUT meanwhile was refused after {max(refused_s):.2f} s at most; " if refused_s else ""
    shown = ", ".join(f"{seconds:.2f}" for seconds in agree_s)
    report.add(f"API server {name}", f"{told}all agree {shown} s after it is back", **figures)
    report.must_be_zero(f"budgets changed or promised while it was {name}", lost)


async def _agree(replicas: list[Replica], version: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(replica.until(partial(_has, replica, version)) for replica in replicas))


def _has(replica: Replica, version: int) -> bool:
    return replica.budget.point.version >= version and version in replica.had


if __name__ == "__main__":
    sys.exit(main())
