"""How much of the engine's own throughput a batch of images gets: the streaming cascade beside the raw engine loop.

Rounds of A, B and C in turn, in this process, on the same engine, threads, images and thresholds:

A   the raw engine loop: decoded images, full batches, survivors compacted; nothing but the engine.
B   the streaming cascade, fed with the same decoded images.
C   the streaming cascade, fed with the JPEG files: what `dvt batch` does, but for reading files and writing lines.

The figures are the ratios B / A, which is what streaming costs, and C / A; of images per second, and of images per
second of CPU, which others on the machine disturb less. On CPUs the decoding takes its time from the
same cores: C / A can be no more than engine / (engine + decoding), which is told beside it.

    taskset -c 0,1 python -m benchmarks.batch --bundle build/t2t-vit-12 --out
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks.harness import Options, Report, finish, load_bundle, parse
from benchmarks.offline import RawLoop, RawRun, know, thresholds_for
from server.bench.photos import photos
from server.core import ImageResult
from server.engines import load_engine
from server.frontend.images import ImageLimits, decode
from server.offline.cascade import MAX_SLOTS, Cascade

TARGET = 0.95


def main(arguments: list[str] | None = None) -> int:
    options = parse("batch", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=8, help="of A, B and C each (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each part of a round (default %(default)s)")
    parser.add_argument("--engine", default="auto", help="as dvt serve --engine (default %(default)s)")


def measure(options: Options) -> Report:
    report = Report("batch")
    bundle = load_bundle(options)
    files = photos(options.images)
    engine = load_engine(bundle, engine=options.engine, max_slots=MAX_SLOTS)
    engine.warm_up()
    known = know(bundle, engine, files)
    thresholds = thresholds_for(known.confidence, options.mix)
    with Cascade(bundle, engine, {"thresholds": thresholds[:-1]}) as cascade:
        loop = RawLoop(engine, known.pixels, thresholds, engine.executors)
        sources: dict[str, Sequence[Any]] = {"pixels": known.pixels, "files": files}
        rates: dict[str, list[float]] = {"raw": [], "pixels": [], "files": []}
        cpu: dict[str, list[float]] = {"raw": [], "pixels": [], "files": []}  # images per second of CPU
        raws: list[RawRun] = []
        exits = {name: [0] * engine.num_stages for name in sources}
        failed = 0
        loop.run(min(1.0, options.seconds))  # warm before anything counts
        for number in range(1, options.rounds + 1):
            began_cpu = time.process_time()
            raws.append(loop.run(options.seconds))
            rates["raw"].append(raws[-1].images / raws[-1].seconds)
            cpu["raw"].append(raws[-1].images / (time.process_time() - began_cpu))
            for name, images in sources.items():
                began, began_cpu, count = time.monotonic(), time.process_time(), 0
                for _, answer in cascade.classify(enumerate(_for_so_long(images, options.seconds))):
                    count += 1
                    if isinstance(answer, ImageResult):
                        exits[name][answer.exit - 1] += 1
                    else:
                        failed += 1
                rates[name].append(count / (time.monotonic() - began))
                cpu[name].append(count / (time.process_time() - began_cpu))
            shown = "   ".join(f"{name} {rate[-1]:8.1f}" for name, rate in rates.items())
            report.add(f"round {number}", f"{shown} images/s")
        fill = [rows / max(1, batches) for rows, batches in zip(cascade.rows, cascade.batches, strict=True)]
    decode_s = _decode_seconds(bundle, files)
    executors = engine.executors
    report.add("executors, batch sizes", f"{executors}, {cascade.batch_sizes}", executors=executors)
    for what, found in (("", rates), ("cpu_", cpu)):
        for name in sources:
            ratios = [rate / raw for rate, raw in zip(found[name], found["raw"], strict=True)]
            target = f"; target >= {TARGET:.2f}" if name == "pixels" else ""
            report.add(
                f"ratio of {name}, {'CPU' if what else 'time'}",
                f"{median(ratios):.3f}   (from {min(ratios):.3f} to {max(ratios):.3f}{target})",
                **{f"{what}ratios_{name}": ratios, f"{what}ratio_{name}_median": median(ratios)},
            )
    engine_s = 1 / median(cpu["raw"])
    share = engine_s / (engine_s + decode_s)
    report.add(
        "decoding",
        f"{1000 * decode_s:.2f} ms a photo: where it takes the engine's cores, {share:.3f} of the raw loop is left",
        decode_s=decode_s,
        share_left=share,
    )
    for stage in range(1, engine.num_stages + 1):
        raw_fill = sum(run.rows[stage - 1] for run in raws) / max(1, sum(run.batches[stage - 1] for run in raws))
        report.add(
            f"mean batch fill, stage {stage}",
            f"stream {fill[stage - 1]:.2f}   raw {raw_fill:.2f}",
            **{f"fill_stage{stage}": fill[stage - 1], f"raw_fill_stage{stage}": raw_fill},
        )
    mixes = [[count / sum(counted) for count in counted] for counted in (*exits.values(), _sum(raws))]
    report.add(
        "images/s, median", "   ".join(f"{name} {median(rates[name]):.1f}" for name in rates), images_per_s=rates
    )
    shown = "   ".join("/".join(f"{part:.3f}" for part in mix) for mix in mixes)
    report.add("exit fractions", shown, mixes=mixes)
    report.must_be_zero("images that failed", failed)
    report.must_be_zero("states left in the engine", engine.slots_in_use)
    return report


def _for_so_long(images: Sequence[Any], seconds: float) -> Iterator[Any]:
    until = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < until, itertools.cycle(images))


def _decode_seconds(bundle: Any, files: Sequence[bytes]) -> float:
    began = time.thread_time()
    for file in files:
        decode(file, None, bundle.preprocessing, ImageLimits())
    return (time.thread_time() - began) / len(files)


def _sum(runs: Sequence[RawRun]) -> list[int]:
    return [sum(counts) for counts in zip(*(run.exits for run in runs), strict=True)]


if __name__ == "__main__":
    sys.exit(main())
