"""How much of the engine's own throughput arrives through HTTP.

Rounds of A and B in turn, on the same cores, with the same images and thresholds:

A   the raw engine loop: as many threads as the server has executors, decoded images, full batches, survivors compacted;
    nothing but the engine. The most that this engine can do.
B   the server, driven by wrk: keep-alive connections that each post one JPEG after the other.

While one runs the other sleeps; what CPU it takes all the same is reported. The figure is the ratio B / A.

    taskset -c 0,1 python -m benchmarks.throughput --bundle build/t2t-vit-12 --out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks import wrk
from benchmarks.harness import Options, Report, Server, Window, finish, load_bundle, parse, process_cpu_seconds
from benchmarks.offline import RawProcess, RawRun, know_bundle, thresholds_for
from server.bench.photos import photos

TARGET = 0.80


def main(arguments: list[str] | None = None) -> int:
    options = parse("throughput", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=32, help="connections (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of A and B each (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half of a round (default %(default)s)")
    parser.add_argument(
        "--settle", type=float, default=wrk.SETTLE_S, help="of load before B counts (default %(default)s)"
    )


def measure(options: Options) -> Report:
    wrk.require()
    report = Report("throughput")
    bundle = load_bundle(options)
    exits = len(bundle.manifest.stages)
    files = photos(options.images)
    known = know_bundle(bundle, files)
    thresholds = thresholds_for(known.confidence, options.mix)
    runs: list[RawRun] = []
    loads: list[wrk.Loaded] = []
    idle_server_s = idle_raw_s = 0.0
    with Server(bundle.path, timeout_ms=30000) as server, wrk.Driver(files) as driver:
        server.set_thresholds(thresholds)
        engine = server.get("/model")[1]["engine"]
        with RawProcess(bundle.path, files, thresholds, engine["executors"]) as raw:
            raw.run(min(1.0, options.seconds))  # both are warm before anything counts
            driver.load(server, options.clients, min(1.0, options.seconds), 0)
            for number in range(1, options.rounds + 1):
                before = process_cpu_seconds(server.pid)
                runs.append(raw.run(options.seconds))
                idle_server_s += process_cpu_seconds(server.pid) - before
                before = process_cpu_seconds(raw.pid)
                loads.append(driver.load(server, options.clients, options.seconds, options.settle))
                idle_raw_s += process_cpu_seconds(raw.pid) - before
                a, b = runs[-1].images / runs[-1].seconds, loads[-1].images_per_s
                report.add(f"round {number}", f"raw {a:8.1f}   HTTP {b:8.1f} images/s   ratio {b / a:.3f}")
    raw_rates = [run.images / run.seconds for run in runs]
    http_rates = [load.images_per_s for load in loads]
    ratios = [b / a for a, b in zip(raw_rates, http_rates, strict=True)]
    windows = [load.window for load in loads]
    seconds, images = sum(w.seconds for w in windows), sum(w.images for w in windows)
    report.add(
        "ratio, median",
        f"{median(ratios):.3f}   (from {min(ratios):.3f} to {max(ratios):.3f}; target >= {TARGET:.2f})",
        raw_images_per_s=raw_rates,
        http_images_per_s=http_rates,
        ratios=ratios,
        ratio_median=median(ratios),
        target=TARGET,
    )
    report.add("executors, batch sizes", f"{engine['executors']}, {engine['max_batch_sizes']}", engine=engine)
    for stage in range(1, exits + 1):
        fill = _sum(windows, "dvt_batch_images_total", stage) / max(1, _sum(windows, "dvt_batches_total", stage))
        raw_fill = sum(run.rows[stage - 1] for run in runs) / max(1, sum(run.batches[stage - 1] for run in runs))
        report.add(
            f"mean batch fill, stage {stage}",
            f"HTTP {fill:.2f}   raw {raw_fill:.2f}",
            **{f"fill_stage{stage}": fill, f"raw_fill_stage{stage}": raw_fill},
        )
    mix = [sum(w.total("dvt_images_total", exit=str(e)) for w in windows) / max(1, images) for e in range(1, exits + 1)]
    raw_mix = [sum(run.exits[e] for run in runs) / sum(run.images for run in runs) for e in range(exits)]
    report.add("exit fractions", f"HTTP {_list(mix)}   raw {_list(raw_mix)}", mix=mix, raw_mix=raw_mix)
    for stage in range(1, exits + 1):
        ms = 1000 * _sum(windows, "dvt_engine_seconds_total", stage) / _sum(windows, "dvt_batch_images_total", stage)
        report.add(f"engine time an image, stage {stage}", f"{ms:.2f} ms", **{f"engine_ms_stage{stage}": ms})
    groups = {group: sum(w.cpu[group] for w in windows) for group in windows[0].cpu}
    for group, spent in groups.items():
        value = f"{1e6 * spent / max(1, images):9.0f} us an image   {spent / seconds:.3f} cores"
        report.add(f"server CPU, {group}", value, **{f"cpu_us_{group}": 1e6 * spent / max(1, images)})
    driver_s = sum(load.driver_cpu_s for load in loads)
    report.add("driver CPU", f"{1e6 * driver_s / max(1, images):9.0f} us an image   {driver_s / seconds:.3f} cores")
    report.add(
        "CPU of the half that sleeps",
        f"server {idle_server_s / sum(run.seconds for run in runs):.4f} cores, raw {idle_raw_s / seconds:.4f} cores",
        idle_server_s=idle_server_s,
        idle_raw_s=idle_raw_s,
    )
    p50, p99 = median(load.p50_ms for load in loads), median(load.p99_ms for load in loads)
    report.add(f"latency of {options.clients} clients", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", p50_ms=p50, p99_ms=p99)
    report.add("requests", str(sum(load.requests for load in loads)), requests=sum(load.requests for load in loads))
    report.must_be_zero("failed requests", sum(load.failed for load in loads))
    degraded = sum(w.total("dvt_images_total", degraded="true") for w in windows)
    report.must_be_zero("degraded answers", int(degraded))
    return report


def _sum(windows: Sequence[Window], name: str, stage: int) -> float:
    return sum(window.total(name, stage=str(stage)) for window in windows)


def _list(fractions: Sequence[float]) -> str:
    return "/".join(f"{fraction:.3f}" for fraction in fractions)


if __name__ == "__main__":
    sys.exit(main())
