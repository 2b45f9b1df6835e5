"""Front ends in processes of their own: images/s, and the CPU that an image takes in each process.

The engine takes 0.1 ms an image and no CPU (`benchmarks.serve_at_gpu_speed`); clients send 64x64 JPEGs. 0, 1 and 2
front ends take turns. Where wrk and all processes share few cores, images/s say little: the CPU microseconds do. A
process is one event loop, so 1,000,000 over the busiest loop's microseconds is what it can reach with cores enough.

    python -m benchmarks.frontends --out
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

from benchmarks import wrk
from benchmarks.harness import Options, Report, Server, Window, cpu_seconds, finish, load_bundle, parse
from benchmarks.host_cpu import Sampler
from server.bench.photos import photo

SERVE = "benchmarks.serve_at_gpu_speed"
SIDE = 64


def main(arguments: list[str] | None = None) -> int:
    options = parse("frontends", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=64, help="connections (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all numbers of front ends (default %(default)s)")
    parser.add_argument("--settle", type=float, default=wrk.SETTLE_S, help="before it counts (default %(default)s)")
    parser.add_argument("--front-ends", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")


def measure(options: Options) -> Report:
    wrk.require()
    report = Report("frontends")
    bundle = load_bundle(options)
    files = [small(number) for number in range(options.images)]
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    parts: dict[int, dict[str, float]] = {}
    failed = 0
    with wrk.Driver(files) as driver:
        for _ in range(options.rounds):
            for count in options.front_ends:
                with Server(bundle.path, SERVE, timeout_ms=30000, frontends=count, profile_seconds=0) as server:
                    before = _cpu(server.pid)
                    load = driver.load(server, options.clients, options.seconds, options.settle)
                    settled, after = server.settled(), _cpu(server.pid)
                    images = Window(load.window.before, settled).images + load.window.before.total("dvt_images_total")
                    micros = {name: 1e6 * (after[name] - before[name]) / images for name in after}
                    found[count].append(
                        {"images_per_s": load.images_per_s, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms, **micros}
                    )
                    failed += load.failed
        for count in options.front_ends:
            with Server(bundle.path, SERVE, timeout_ms=30000, frontends=count, profile_seconds=0) as server:
                sampler = Sampler.start(server.pid, options.settle, options.seconds)
                failed += driver.load(server, options.clients, options.seconds, options.settle).failed
                parts[count] = (sampler.finish() if sampler else {}).get("loop", {})
    for count, rounds in found.items():
        middle = {name: statistics.median(one.get(name, 0.0) for one in rounds) for name in rounds[0]}
        of_loops = [middle["engine loop"]] + ([middle["front ends"] / count] if count else [])
        ceiling = 1e6 / max(of_loops)
        report.add(
            f"{count} front ends",
            f"{middle['images_per_s']:8.0f} images/s, p50 {middle['p50_ms']:.1f}, p99 {middle['p99_ms']:.1f} ms",
        )
        for name in ("engine loop", "engine threads", "front ends"):
            report.add(f"  {name}", f"{middle[name]:8.1f} us an image")
        for part, share in sorted(parts[count].items(), key=lambda item: -item[1]):
            report.add(f"    engine loop: {part}", f"{share * middle['engine loop']:8.1f} us")
        report.add("  ceiling, with cores enough", f"{ceiling:8.0f} images/s")
        report.figures[str(count)] = {**middle, "ceiling_images_per_s": ceiling, "engine_loop_parts": parts[count]}
        report.figures[f"{count} rounds"] = rounds
    report.must_be_zero("failed requests", failed)
    return report


def small(number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(photo(number))).resize((SIDE, SIDE)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _cpu(pid: int) -> dict[str, float]:
    """Seconds so far, of the engine's process and of its front ends together."""
    engine = cpu_seconds(pid)
    front = [cpu_seconds(child) for child in _children(pid)]
    return {
        "engine loop": engine["loop"],
        "engine threads": sum(engine.values()) - engine["loop"],
        "front ends": sum(sum(one.values()) for one in front),  # small images are decoded by their loops
    }


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in found for child in children.read_text().split()]


if __name__ == "__main__":
    sys.exit(main())
