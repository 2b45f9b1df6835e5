"""What the server adds to a lone request, over the bare engine call for the same image through the same exits.

One request at a time on a keep-alive connection, no other load. Each image takes both ways, one right after the other,
in changing order: the bare engine in this process on one thread, and the server. What lies between is decoding, HTTP,
the hand-over between threads, and the client's own few microseconds.

    taskset -c 0,1 python -m benchmarks.latency --bundle build/t2t-vit-12 --out
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.clients import Line, classify
from benchmarks.harness import Options, Report, Server, finish, load_bundle, parse, quantile_ms
from benchmarks.offline import know, thresholds_for
from server.bench.photos import photos
from server.core import Engine, Pixels, Slot, StageBatch
from server.engines import load_engine

TARGET_MS = 3.0
PARTS = ("decode", "queue", "compute", "total")  # of an answer's timing_ms


def main(arguments: list[str] | None = None) -> int:
    options = parse(
        "latency",
        __doc__,
        arguments,
        lambda parser: parser.add_argument("--requests", type=int, default=400, help="(default %(default)s)"),
    )
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    report = Report("latency")
    bundle = load_bundle(options)
    files = photos(options.images)
    engine = load_engine(bundle)
    known = know(bundle, engine, files)
    thresholds = thresholds_for(known.confidence, options.mix)
    requests = [classify(file) for file in files]
    bare: list[float] = []
    http: list[float] = []
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    differing = 0
    with Server(bundle.path) as server:
        server.set_thresholds(thresholds)
        line = Line(server.port)
        for image in range(min(20, len(files))):
            _ask_engine(engine, known.pixels[image], thresholds)
            line.ask(requests[image])
        for number in range(options.requests):
            image = number % len(files)
            if number % 2:
                bare_s, exit_ = _ask_engine(engine, known.pixels[image], thresholds)
            began = time.perf_counter()
            reply = line.ask(requests[image])
            http.append(time.perf_counter() - began)
            if not number % 2:
                bare_s, exit_ = _ask_engine(engine, known.pixels[image], thresholds)
            bare.append(bare_s)
            result = reply.json()["results"][0] if reply.status == 200 else {"exit": 0}
            differing += result["exit"] != exit_
            for part in PARTS if reply.status == 200 else ():
                parts[part].append(result["timing_ms"][part] / 1000)
        line.close()
    engine.close()
    more = [b - a for a, b in zip(bare, http, strict=True)]
    report.add("requests", str(len(http)), requests=len(http), mix=known.mix(thresholds))
    for what, seconds in (("bare engine call", bare), ("through the server", http)):
        p50, p90 = quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.9)
        key = what.replace(" ", "_")
        report.add(what, f"p50 {p50:7.2f} ms   p90 {p90:7.2f} ms", **{f"{key}_p50_ms": p50, f"{key}_p90_ms": p90})
    p50, p90 = quantile_ms(more, 0.5), quantile_ms(more, 0.9)
    report.add(
        "the server adds",
        f"p50 {p50:7.2f} ms   p90 {p90:7.2f} ms   (target <= {TARGET_MS:g} ms)",
        added_p50_ms=p50,
        added_p90_ms=p90,
        target_ms=TARGET_MS,
    )
    given = {part: np.array(values) for part, values in parts.items()}
    rest = given["total"] - given["decode"] - given["queue"] - given["compute"]
    engine_more = given["compute"] - np.array(bare) if not differing else given["compute"] * 0
    for what, key, seconds in (
        ("  of it: decoding", "decode", given["decode"]),
        ("  of it: waiting in queues", "queue", given["queue"]),
        ("  of it: batches over the bare calls", "compute_over_bare", engine_more),
        ("  of it: between the parts", "between", rest),
        ("  of it: HTTP, sockets, client", "http", np.array(http) - given["total"] if not differing else rest * 0),
    ):
        p50 = quantile_ms(seconds, 0.5)
        report.add(what, f"p50 {p50:7.2f} ms", **{f"{key}_p50_ms": p50})
    report.must_be_zero("answers that differ from the engine's", differing)
    return report


def _ask_engine(engine: Engine, pixels: Pixels, thresholds: Sequence[float]) -> tuple[float, int]:
    """Seconds, and the exit."""
    began = time.perf_counter()
    slots: list[Slot] = []
    for stage, threshold in enumerate(thresholds, start=1):
        slot = engine.run(StageBatch(stage, [pixels], slots, [threshold])).slots[0]
        if slot is None:
            return time.perf_counter() - began, stage
        slots = [slot]
    raise AssertionError("the last threshold is 0")


if __name__ == "__main__":
    sys.exit(main())
