"""Another checkout of this repository against this one, in turns: lone requests, and what both cores can do.

Both servers run all the time, each from its own checkout with this interpreter; only one is asked at a time. So a noisy
second hits both, and their ratio counts. For changes that are to cost nothing, or to pay.

    git worktree add build/before REVISION
    taskset -c 0,1 python -m benchmarks.checkouts build/before --out
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.clients import Line, Load, classify, classify_many
from benchmarks.harness import Options, Report, Server, finish, load_bundle, parse, process_cpu_seconds, quantile_ms
from server.bench.photos import photos

NAMES = ("before", "now")


def main(arguments: list[str] | None = None) -> int:
    options = parse("checkouts", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(images=50)
    parser.add_argument("before", type=Path, help="folder of the other checkout")
    parser.add_argument("--each", type=int, default=1, help="images in a request (default %(default)s)")
    parser.add_argument("--side", type=int, default=64, help="of the JPEGs (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(default %(default)s)")
    parser.add_argument("--lone", type=int, default=200, help="lone requests, each, a round (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, each, a round (default %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="(default %(default)s)")


def measure(options: Options) -> Report:
    report = Report("checkouts")
    files = [_small(file, options.side) for file in photos(options.images)]
    requests = [classify(file) for file in files]
    if options.each > 1:
        forms = [[files[(first + more) % len(files)] for more in range(options.each)] for first in range(len(files))]
        requests = [classify_many(form) for form in forms]
    bundle = load_bundle(options).path if options.bundle else ""  # by default each serves the one that it embeds
    lone: dict[str, list[float]] = {name: [] for name in NAMES}
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    cpu: dict[str, list[float]] = {name: [] for name in NAMES}
    failed = 0
    settings = {"max_timeout_ms": 60_000, "timeout_ms": 30_000}
    with (
        Server(bundle, root=options.before.resolve(), **settings) as before,
        Server(bundle, **settings) as now,
    ):
        servers = {"before": before, "now": now}
        for server in servers.values():
            server.set_thresholds([0.8, 0.7])
        for number in range(options.rounds):
            order = NAMES if number % 2 else NAMES[::-1]
            lines = {name: Line(servers[name].port) for name in order}
            for which in range(-5, options.lone):  # the first few do not count
                for name in order:
                    began = time.perf_counter()
                    reply = lines[name].ask(requests[which % len(requests)])
                    failed += reply.status != 200
                    if which >= 0:
                        lone[name].append(time.perf_counter() - began)
            for line in lines.values():
                line.close()
            for name in order:
                spent = process_cpu_seconds(servers[name].pid)
                began = time.perf_counter()
                with Load(servers[name].port, requests, options.clients, 10**9) as load:
                    time.sleep(options.seconds)
                seconds = time.perf_counter() - began
                failed += len(load.failed)
                rates[name].append(options.each * len(load.asked) / seconds)
                cpu[name].append((process_cpu_seconds(servers[name].pid) - spent) / len(load.asked))
    for name in NAMES:
        p50, p90 = quantile_ms(lone[name], 0.5), quantile_ms(lone[name], 0.9)
        rate, each = float(np.median(rates[name])), 1000 * float(np.median(cpu[name]))
        report.add(
            name,
            f"lone p50 {p50:.2f} ms, p90 {p90:.2f} ms; {rate:.0f} images/s, {each:.2f} ms of CPU each",
            **{f"{name}_lone_p50_ms": p50, f"{name}_lone_p90_ms": p90, f"{name}_rates": rates[name]},
            **{f"{name}_cpu_ms": [1000 * value for value in cpu[name]]},
        )
    ratios = [now / before for before, now in zip(rates["before"], rates["now"], strict=True)]
    report.add(
        "now / before, images/s",
        f"median {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        throughput_ratios=ratios,
    )
    ratio = float(np.median(lone["now"]) / np.median(lone["before"]))
    report.add("now / before, lone p50", f"{ratio:.3f}", lone_ratio=ratio)
    ratios = [now / before for before, now in zip(cpu["before"], cpu["now"], strict=True)]
    report.add(
        "now / before, CPU a request",
        f"median {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        cpu_ratios=ratios,
    )
    report.must_be_zero("requests that were not answered", failed)
    return report


def _small(file: bytes, side: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(file)).resize((side, side)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())
