"""Open-loop load on the real server: how much it answers in time, and what it gives up when there is too much.

    python -m benchmarks.goodput policies --out      # highest rate at p99 <= 50 ms: ours, and the usual ways to serve
    python -m benchmarks.goodput simulator --out     # an engine that sleeps, against the simulator with the same costs
    python -m benchmarks.goodput overload --images-from photo10/test --out   # two and three times what it can do

Poisson arrivals of requests; a latency counts from the moment that the schedule set. `policies` runs the contenders in
turn, one search for the highest rate after the other, and again in other order: this measures ratios.

An overload of the engine needs cores that are left for HTTP, decoding and the load: a model that is dear enough, or
fewer executors than cores (`--executors 1`) and several images a request (`--together 4`).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import cascades
from benchmarks.clients import classify, classify_many
from benchmarks.harness import Options, Report, Server, finish, load_bundle, parse
from benchmarks.offline import know_bundle, thresholds_for
from benchmarks.open_loop import Shot, fire
from benchmarks.serve_with import SLEEP_BATCH, sleeping
from benchmarks.simulate import Traffic, maximum
from benchmarks.simulate import server as servers_policy
from benchmarks.virtual import Setup
from server.bench import arrivals
from server.bench.photos import photos
from server.bundle.frontier import NEVER, Records
from server.bundle.manifest import Bundle

TARGET = 0.99
CONTENDERS = {
    "server": ("--policy", "server", "--steady"),
    "run to completion": ("--policy", "deepest-first", "--steady"),
    "fixed delay 2 ms": ("--policy", "fixed-delay:2", "--steady"),
    "fixed delay 10 ms": ("--policy", "fixed-delay:10", "--steady"),
    "no exit": ("--policy", "deepest-first", "--steady"),
}


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("study", choices=STUDIES)
        parser.add_argument("--seconds", type=float, default=4.0, help="of one run (default %(default)s)")
        parser.add_argument("--rounds", type=int, default=2, help="of all contenders (default %(default)s)")
        parser.add_argument("--deadline-ms", type=float, default=50.0, help="(default %(default)s; simulator: 250)")
        parser.add_argument("--steps", type=int, default=6, help="of one search for a rate (default %(default)s)")
        parser.add_argument("--guess", type=float, default=100.0, help="images/s where a search begins (default 100)")
        parser.add_argument("--sleep", default="5,5,5/1,2,4", help="milliseconds of the engine that sleeps")
        parser.add_argument("--executors", type=int, help="of the server, for overload; by default one per core")
        parser.add_argument("--together", type=int, default=1, help="images a request, for overload (default 1)")
        parser.add_argument("--images-from", type=Path, help="image folder with labels, in place of made photos")

    options = parse("goodput", __doc__, arguments, more)
    return finish(STUDIES[options.study](options), options)


def shoot(server: Server, requests: Sequence[bytes], rate: float, seconds: float, seed: int) -> list[Shot]:
    times = arrivals.poisson(rate, seconds, seed)
    return fire(server.port, requests, np.random.default_rng(seed).integers(len(requests), size=len(times)), times)


def highest(server: Server, requests: Sequence[bytes], options: Options, seed: int, guess: float) -> float:
    """The highest rate at which TARGET of all requests are answered within the deadline by an exit that was sure."""
    low, high, rate = 0.0, np.inf, guess
    for step in range(options.steps):
        shots = shoot(server, requests, rate, options.seconds, seed + step)
        in_time = np.mean([_good(shot, options.deadline_ms / 1000) for shot in shots])
        server.settled()
        if in_time >= TARGET:
            low = rate
        else:
            high = rate
        rate = np.sqrt(low * high) if low and high < np.inf else low * 1.5 if low else high / 1.5
    return low


def _good(shot: Shot, deadline_s: float) -> bool:
    """In time, and by a threshold."""
    return shot.status == 200 and shot.seconds <= deadline_s and b'"degraded":true' not in shot.body


def _query(options: Options) -> str:
    """The server is told the deadline that it is judged by."""
    return f"?timeout_ms={options.deadline_ms:g}&top_k=1"


# --- policies ---------------------------------------------------------------------------------------------------------


def policies(options: Options) -> Report:
    report = Report("goodput_policies", figures={"deadline_ms": options.deadline_ms, "target": TARGET})
    bundle = load_bundle(options)
    files = photos(options.images)
    thresholds = thresholds_for(know_bundle(bundle, files).confidence, options.mix)
    requests = [classify(file, query=_query(options)) for file in files]
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    names = list(CONTENDERS)
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            with Server(bundle.path, module="benchmarks.serve_with", arguments=CONTENDERS[name]) as server:
                never = [NEVER] * (len(thresholds) - 1)
                server.set_thresholds([*never, 0.0] if name == "no exit" else thresholds)
                shoot(server, requests, 50, 1.0, 0)  # both are warm before anything counts
                known = [rate for found in rates.values() for rate in found]
                guess = median(known) if known else options.guess
                rates[name].append(highest(server, requests, options, 100 * number, guess))
    for name, found in rates.items():
        ratio = median(a / b if b else np.inf for a, b in zip(rates["server"], found, strict=True))
        report.add(
            name,
            " ".join(f"{rate:7.1f}" for rate in found) + f" images/s   ours over it {ratio:.2f}",
            **{f"{name.replace(' ', '_')}_rates": found, f"over_{name.replace(' ', '_')}": ratio},
        )
    return report


# --- the simulator ----------------------------------------------------------------------------------------------------


def simulator(options: Options) -> Report:
    if options.deadline_ms == 50.0:
        options.deadline_ms = 250.0
    profile = sleeping(options.sleep)
    report = Report("goodput_simulator", figures={"sleep_ms": options.sleep, "deadline_ms": options.deadline_ms})
    bundle = load_bundle(options)
    levels = _levels(256)
    requests = [classify(_picture(level, bundle), "image/png", _query(options)) for level in levels]
    confidence = np.array(levels, dtype=np.float32).T / 255  # (E, N)
    thresholds = thresholds_for(confidence, options.mix)
    records = Records(confidence[:-1], np.ones(confidence.shape, dtype=bool))
    sizes = (SLEEP_BATCH,) * len(profile.stages)
    setup = Setup(profile, records, thresholds, sizes, deadline_s=options.deadline_ms / 1000)
    simulated = []
    for seed in range(3):
        traffic = Traffic.generate("poisson", round(options.seconds * setup.capacity), records, seed)
        simulated.append(maximum(servers_policy, setup, traffic, guess=setup.capacity / 2))
    live = []
    arguments = ("--steady", "--sleep", options.sleep)
    with Server(bundle.path, module="benchmarks.serve_with", arguments=arguments, executors=1) as server:
        server.set_thresholds(thresholds)
        shoot(server, requests, 50, 1.0, 0)
        for number in range(options.rounds):
            live.append(highest(server, requests, options, 100 * number, median(simulated)))
    report.add("capacity, full batches", f"{setup.capacity:.1f} images/s", capacity=setup.capacity)
    report.add("simulated", " ".join(f"{rate:.1f}" for rate in simulated) + " images/s", simulated=simulated)
    report.add("live", " ".join(f"{rate:.1f}" for rate in live) + " images/s", live=live)
    ratio = median(live) / median(simulated)
    report.add("live over simulated", f"{ratio:.3f}", ratio=ratio)
    return report


def _levels(count: int) -> list[tuple[int, int, int]]:
    """Confidences of every exit in units of 1/255, as the engine that sleeps reads them from an image."""
    confidence = cascades.synthetic(count).confidence
    last = np.full((1, count), 1.0)
    return [tuple(row) for row in np.rint(255 * np.concatenate([confidence, last])).astype(int).T.tolist()]


def _picture(level: tuple[int, int, int], bundle: Bundle) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", bundle.preprocessing.crop[::-1], level).save(stream, "PNG")
    return stream.getvalue()


# --- overload ---------------------------------------------------------------------------------------------------------


def overload(options: Options) -> Report:
    bundle = load_bundle(options)
    own = "" if options.bundle is None else f"_{bundle.path.name}"
    report = Report(
        f"goodput_overload{own}", figures={"timeout_ms": options.deadline_ms, "images_a_request": options.together}
    )
    requests, labels = _labelled(options, bundle)
    together = options.together
    knee = bundle.frontier.knee.thresholds
    some: dict[str, Any] = {} if options.executors is None else {"executors": options.executors}
    with Server(bundle.path, module="benchmarks.serve_with", arguments=("--steady",), **some) as server:
        server.set_thresholds(knee)
        shoot(server, requests, 50 / together, 1.0, 0)
        capacity = together * highest(server, requests, options, 7, options.guess / together)
    if not capacity:
        raise SystemExit("no rate that was tried is answered in time: try a smaller --guess or a larger --deadline-ms")
    report.add("highest rate in time, dearest operating point", f"{capacity:.1f} images/s", capacity=capacity)
    for factor in (2.0, 3.0):
        found: dict[str, list[dict[str, float]]] = {"brownout": [], "fixed": []}
        for number in range(options.rounds):
            for name in found if number % 2 == 0 else list(found)[::-1]:
                with Server(bundle.path, module="benchmarks.serve_with", **some) as server:
                    if name == "fixed":
                        server.set_thresholds(knee)
                    else:
                        server.request("PUT", "/budget", {"gmacs": bundle.frontier.knee.gmacs})
                    shoot(server, requests, capacity / together / 2, 1.0, 0)
                    shots = shoot(server, requests, factor * capacity / together, 2 * options.seconds, 31 * number)
                found[name].append(_outcome(shots, labels, options.deadline_ms / 1000))
        for name, outcomes in found.items():
            told = {key: median(outcome[key] for outcome in outcomes) for key in outcomes[0]}
            report.add(
                f"{factor:g} times, {name}",
                f"in time {told['in_time']:.3f}, late {told['late']:.3f}, refused {told['refused']:.3f}, "
                f"degraded {told['degraded']:.3f}, correct in time {told['correct_in_time']:.3f}, "
                f"p99 {told['p99_ms']:.1f} ms; p99 of the load's own delay {told['load_p99_ms']:.1f} ms",
                **{f"x{factor:g}_{name}": told},
            )
    return report


def _labelled(options: Options, bundle: Bundle) -> tuple[list[bytes], list[list[str | None]]]:
    """Requests, and the labels of the images of each; None where nobody knows them."""
    files, labels = _files(options, bundle)
    if not 1 <= options.together <= len(files):
        raise SystemExit(f"--together must be from 1 to the {len(files)} images")
    groups = [range(at, at + options.together) for at in range(0, len(files) - options.together + 1, options.together)]
    requests = [classify_many([files[n] for n in group], _query(options)) for group in groups]
    return requests, [[labels[n] for n in group] for group in groups]


def _files(options: Options, bundle: Bundle) -> tuple[list[bytes], list[str | None]]:
    if options.images_from is None:
        return photos(options.images), [None] * options.images
    from server.calibration.calibrate import read_image_folder

    examples = read_image_folder(options.images_from, bundle.manifest.labels, limit=5 * options.images)
    return [path.read_bytes() for path, _ in examples], [bundle.manifest.labels[label] for _, label in examples]


def _outcome(shots: Sequence[Shot], labels: Sequence[Sequence[str | None]], deadline_s: float) -> dict[str, float]:
    """Fractions of all images. In time: 200 within the deadline, as the client's clock has it, and the way there."""
    results: list[list[Any]] = [shot.results for shot in shots]
    in_time = np.array([shot.status == 200 and shot.seconds <= deadline_s for shot in shots])
    right = [
        [result["predictions"][0]["label"] == label for result, label in zip(answer, labels[shot.request], strict=True)]
        for answer, shot in zip(results, shots, strict=True)
        if answer and shot.seconds <= deadline_s
    ]
    latencies = [shot.seconds for shot in shots if shot.status == 200]
    images = sum(len(labels[shot.request]) for shot in shots)
    return {
        "images": images,
        "in_time": float(in_time.mean()),  # all requests have as many images
        "late": float(np.mean([shot.status == 200 and shot.seconds > deadline_s for shot in shots])),
        "refused": float(np.mean([shot.status != 200 for shot in shots])),
        "degraded": sum(result["degraded"] for answer in results for result in answer) / images,
        "correct_in_time": sum(map(sum, right)) / images,
        "p99_ms": float(np.quantile(latencies, 0.99)) * 1000 if latencies else float("nan"),
        "load_p99_ms": float(np.quantile([shot.behind for shot in shots], 0.99)) * 1000,
    }


STUDIES = {"policies": policies, "simulator": simulator, "overload": overload}

if __name__ == "__main__":
    sys.exit(main())
