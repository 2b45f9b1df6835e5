"""A client that asks for previews in a loop: what one takes, and what others feel beside it.

A preview looks at all calibration records, on the event loop, and needs no token. Asked is for each kind of target in
turn, of a bundle with so many records (calibration keeps 16,384), after so many images that the window is full. Beside
the one that previews others ask at a steady rate, POST /classify of a small JPEG, open loop: first alone, then beside a
client that asks for something small in a loop (/livez), then beside the one that previews. With --before another
checkout is measured the same way, first.

    git worktree add build/before REVISION
    taskset -c 0,1 python -m benchmarks.previews --before build/before --out
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.cascades import synthetic
from benchmarks.clients import Line, Load, classify
from benchmarks.harness import ROOT, Options, Report, Server, finish, load_bundle, parse, quantile_ms
from benchmarks.open_loop import fire
from benchmarks.slow_clients import small
from server.bench.photos import photos
from server.bundle.frontier import Frontier
from server.bundle.manifest import Bundle
from server.calibration.sweep import sweep

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def main(arguments: list[str] | None = None) -> int:
    options = parse("previews", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(images=20)
    parser.add_argument("--before", type=Path, help="folder of another checkout")
    parser.add_argument("--records", type=int, nargs="+", default=[16_384, 50_000], help="(default %(default)s)")
    parser.add_argument("--window", type=int, default=10_000, help="images before anything counts (%(default)s)")
    parser.add_argument("--lone", type=int, default=200, help="previews one by one (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="that the others ask (default %(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="requests of the others a second (%(default)s)")


def measure(options: Options) -> Report:
    report = Report("previews")
    bundle = load_bundle(options)
    checkouts = {"before": options.before.resolve(), "now": ROOT} if options.before else {"now": ROOT}
    requests = [classify(small(file)) for file in photos(options.images)]
    for records in options.records:
        with TemporaryDirectory() as folder:
            path = _with_records(bundle, Path(folder), records)
            targets = _targets(Bundle.load(path).frontier)
            for name, root in checkouts.items():
                with Server(path, root=root, timeout_ms=30_000) as server:
                    _measure(report, options, server, f"{name}, {records} records", requests, targets)
    return report


def _with_records(bundle: Bundle, folder: Path, count: int) -> Path:
    """The bundle with the frontier of so many synthetic images, all of them kept."""
    copytree(bundle.path, folder, dirs_exist_ok=True)
    seen = synthetic(count, exits=len(bundle.manifest.stages))
    frontier = sweep(seen.confidence, seen.correct, bundle.manifest.stage_gmacs, key=bundle.manifest.frontier_key)
    Bundle.load(folder, need_frontier=False).write_frontier(replace(frontier, records=seen))
    return folder


def _targets(frontier: Frontier) -> list[bytes]:
    """Requests: a cost that is held, by a row and by a mixture; one that is not; thresholds that are no row's."""
    gmacs = (frontier.rows[0].gmacs + frontier.knee.gmacs) / 2
    bodies = [{"gmacs": gmacs}, {"gmacs": gmacs, "mix": True}, {"gmacs": gmacs, "hold": "quality"}]
    bodies.append({"thresholds": [0.777] * (frontier.num_exits - 1)})
    return [_post(json.dumps(body).encode()) for body in bodies]


def _post(body: bytes) -> bytes:
    head = "POST /budget/preview HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _measure(
    report: Report, options: Options, server: Server, what: str, requests: Sequence[bytes], targets: Sequence[bytes]
) -> None:
    key = what.replace(", ", "_").replace(" ", "_")
    server.set_thresholds([0.8] * (len(options.mix) - 1))  # no row's: the point in force is evaluated, too
    with Load(server.port, requests, 8, options.window) as load:
        load.join()
    failed = len(load.failed)
    line, taken = Line(server.port), {}
    for name, request in (("livez", [LIVEZ]), ("preview", targets)):
        seconds = []
        for one in (one for _, one in zip(range(options.lone), cycle(request), strict=False)):
            began = time.perf_counter()
            failed += line.ask(one).status != 200
            seconds.append(time.perf_counter() - began)
        taken[name] = quantile_ms(seconds, 0.5)
        report.figures |= {f"{key}_{name}_first_ms": 1000 * seconds[0], f"{key}_{name}_p50_ms": taken[name]}
    line.close()
    more = taken["preview"] - taken["livez"]
    report.add(
        what, f"lone preview p50 {taken['preview']:.2f} ms, {more:.2f} ms more than /livez", **{f"{key}_more_ms": more}
    )

    def others() -> list[float]:
        nonlocal failed
        times = np.arange(1, math.ceil(options.rate * options.seconds) + 1) / options.rate
        shots = fire(server.port, requests, np.arange(len(times)) % len(requests), times)
        failed += sum(shot.status != 200 for shot in shots)
        return [shot.seconds for shot in shots if shot.status == 200]

    p99 = {"alone": quantile_ms(others(), 0.99)}
    for name, asked in (("livez", [LIVEZ]), ("previews", targets)):
        with _asking(server.port, asked) as answered:
            p99[f"beside {name}"] = quantile_ms(others(), 0.99)
        report.figures |= {f"{key}_{name}_per_s": len(answered) / options.seconds}
    words = ", ".join(f"{value:.1f} ms {name}" for name, value in p99.items())
    p99_figures = {f"{key}_p99_{name.replace(' ', '_')}_ms": value for name, value in p99.items()}
    report.add("  /classify of others, p99", words, **p99_figures)
    report.must_be_zero("  requests that were not answered", failed)


@contextmanager
def _asking(port: int, requests: Sequence[bytes]) -> Iterator[list[int]]:
    """One client beside the block, one request after the other; the statuses that it got so far."""
    done, statuses = threading.Event(), list[int]()

    def ask() -> None:
        line = Line(port)
        for request in cycle(requests):
            if done.is_set():
                break
            statuses.append(line.ask(request).status)
        line.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
