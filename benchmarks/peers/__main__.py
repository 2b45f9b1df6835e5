"""The same cascade served by us and by others, in turns, on the same cores.

    taskset -c 0,1 python -m benchmarks.peers --images-from photo10/test --minutes 11 --out
    python -m benchmarks.peers --only ours mosec --bundle build/t2t-vit-12 --mix 0.46,0.30,0.24 --clients 8 \\
        --deadline-ms 1500 --seconds 10

Each peer runs in an environment of its own, under build/peers, made when it is first asked for (pip, from PyPI), and
kept. Each serves the same ONNX files with the same runtime, thresholds and preprocessing: the full model, and the
cascade as it can express it. In every round each contender is started for the closed loop; in the first
(--open-rounds) once more, with the patience that the deadline asks for, for the open loop: loads in parts of its own
capacity, clients that leave, a bad image among good ones, SIGTERM under load. Answers are compared with the engine's
own once.

Writes peers.json, peers.md and its plots. Photos are JPEGs of the size that the model is resized from: nobody resizes.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import wrk
from benchmarks.harness import Options, Report, ServerFailed, failure, finish, parse
from benchmarks.offline import decoded, thresholds_for
from benchmarks.peers import bentoml, litserve, mlserver, mosec, page, ray, triton
from benchmarks.peers.ours import Ours
from benchmarks.peers.peer import Contender, PeerFailed, Running, Task
from benchmarks.peers.visit import Photos, Plan, behaviour, closed_loop
from server.bench.photos import photos
from server.bundle.manifest import EMBEDDED, Bundle
from server.calibration.every_stage import every_stage
from server.engines import load_engine
from server.settings import usable_cores

CONTENDERS: tuple[Contender, ...] = (
    Ours(),
    mosec.PEER,
    litserve.PEER,
    bentoml.PEER,
    ray.PEER,
    mlserver.PEER,
    triton.PEER,
)
WAITS_S = 30.0  # patience in the closed loop, where clients set the pace
PATIENCE = 0.8  # of the deadline: what waits for longer in open loop is late by the time it has run


def main(arguments: list[str] | None = None, contenders: Sequence[Contender] = CONTENDERS) -> int:
    options = parse("peers", __doc__, arguments, lambda parser: _more(parser, contenders))
    report = measure(options, [contender for contender in contenders if contender.name in options.only])
    status = finish(report, options)
    if options.out is not None:
        page.write(options.out, report.name)
    return status


def _more(parser: argparse.ArgumentParser, contenders: Sequence[Contender]) -> None:
    names = [contender.name for contender in contenders]
    parser.set_defaults(images=200, mix=None)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these contenders")
    parser.add_argument(
        "--modes", nargs="+", choices=("full", "cascade", "budget"), default=("full", "cascade", "budget")
    )
    parser.add_argument(
        "--images-from", type=Path, help="folder with a folder of images for each class; by default made photos"
    )
    parser.add_argument(
        "--gmacs", type=float, help="mean cost of the operating point; by default half of the last exit's"
    )
    parser.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--open-rounds", type=int, default=1, help="that have the open loop, too (default %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="after which no contender is started any more"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of the closed loop, whole (default %(default)s)")
    parser.add_argument("--open-seconds", type=float, help="of each open-loop load (default: half of --seconds)")
    parser.add_argument("--clients", type=int, default=32, help="of the closed loop (default %(default)s)")
    parser.add_argument("--deadline-ms", type=float, default=250.0, help="(default %(default)s)")
    parser.add_argument(
        "--loads", type=_numbers, default=(0.2, 0.5, 0.8, 1.0, 2.0, 3.0), help="of each one's own capacity"
    )
    parser.add_argument(
        "--window-ms", type=float, default=2.0, help="that peers wait for a batch (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, help="largest of a peer; by default what pays at the first stage")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="of a peer; by default one a core")
    parser.add_argument("--cores", type=_cores, help="to run everything on, as 0,1")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _cores(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def measure(options: Options, contenders: Sequence[Contender]) -> Report:
    wrk.require()
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    bundle = Bundle.load(options.bundle or EMBEDDED)
    report = Report("peers" if options.bundle is None else f"peers_{bundle.path.name}")
    jpegs, labels = _photos(options, bundle)
    task, known = _prepare(options, bundle, jpegs)
    right = labels or [class_id for class_id, _ in known["full"]]
    plan = Plan(
        options.clients,
        options.seconds,
        options.open_seconds or options.seconds / 2,
        options.loads,
        options.deadline_ms / 1000,
    )
    report.figures = {
        "bundle": bundle.manifest.name,
        "thresholds": task.thresholds,
        "mix": _mix(known["cascade"], len(task.thresholds)),
        "labels": "of the images" if labels else "what the last exit says",
        "deadline_ms": options.deadline_ms,
        "clients": options.clients,
        "workers": task.workers,
        "batch": task.batch,
        "window_ms": task.window_ms,
        "rounds": options.rounds,
        "about": {contender.name: contender.about for contender in contenders},
        "peer_versions": {},
        "not_raced": {},
        "contenders": {},
    }
    racing = _install(contenders, report)
    field = [(c, mode) for mode in options.modes for c in racing if mode in c.modes]
    if options.mix is not None:
        field = [(c, mode) for c, mode in field if mode != "budget"]  # thresholds that are no point of the frontier
    figures: dict[str, Any] = report.figures["contenders"]
    until = time.monotonic() + 60 * options.minutes
    for number in range(options.rounds):
        for contender, mode in field if number % 2 == 0 else field[::-1]:
            if time.monotonic() > until:
                continue
            name = f"{contender.name} {mode}"
            seen = Photos(jpegs, right, known["full" if mode == "full" else "cascade"])
            own = replace(task, mode=mode)
            told = figures.setdefault(name, {"closed": [], "open": []})
            began = time.monotonic()
            try:
                with _running(contender, own, jpegs[0]) as running:
                    told["closed"].append(closed_loop(running, seen, plan, check=number == 0))
                if number < options.open_rounds:
                    with _running(contender, replace(own, timeout_s=PATIENCE * plan.deadline_s), jpegs[0]) as running:
                        capacity = told["closed"][-1]["images_per_s"]
                        told["open"].append(behaviour(running, seen, plan, capacity, 100 * number))
            except (PeerFailed, ServerFailed, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                report.figures["not_raced"].setdefault(name, failure(error))
                print(f"{name}: {failure(error)}", flush=True)
                continue
            last = told["closed"][-1]
            print(
                f"round {number + 1}  {name:18} {last['images_per_s']:7.1f} images/s  {last['cpu_ms']:6.2f} ms CPU  "
                f"(took {time.monotonic() - began:.0f} s)",
                flush=True,
            )
    for name in (f"{contender.name} {mode}" for contender, mode in field):
        if name not in figures:
            report.figures["not_raced"][name] = "no time was left"
    report.figures["contenders"] = {name: told for name, told in figures.items() if told["closed"]}
    report.add("raced", f"{len(report.figures['contenders'])} of {len(field)}")
    for name, told in report.figures["contenders"].items():
        told["row"] = page.row(told)
        _tell(report, name, told)
    return report


@contextmanager
def _running(contender: Contender, task: Task, photo: bytes) -> Iterator[Running]:
    running = contender.start(task, photo)
    try:
        yield running
    finally:
        running.close()


def _tell(report: Report, name: str, told: dict[str, Any]) -> None:
    row = told["row"]
    report.add(
        name,
        f"{row['images_per_s']:7.1f} images/s, {row['cpu_ms']:6.2f} ms CPU an image, at 200 %: "
        f"{row['correct_at_200']:.2f} correct in time, start {row['start_s']:.1f} s, {row['memory_mb']:.0f} MB",
    )
    if row["wrong"]:
        report.must_be_zero(f"{name}: answers that are not the engine's", row["wrong"])


def _install(contenders: Sequence[Contender], report: Report) -> list[Contender]:
    racing = []
    for contender in contenders:
        try:
            contender.install()
        except PeerFailed as error:
            report.figures["not_raced"][contender.name] = str(error)
            print(f"{contender.name}: {error}", flush=True)
        else:
            racing.append(contender)
            if found := contender.versions():
                report.figures["peer_versions"][contender.name] = found
    return racing


# --- what is served ---------------------------------------------------------------------------------------------------


def _photos(options: Options, bundle: Bundle) -> tuple[list[bytes], list[int]]:
    """JPEGs, and their labels where they are known."""
    side = bundle.preprocessing.resize
    if options.images_from is None:
        return [_resized(file, side) for file in photos(options.images)], []
    files = sorted(path for path in options.images_from.glob("*/*") if path.is_file())
    chosen = [files[n] for n in np.random.default_rng(0).permutation(len(files))[: options.images]]
    if not chosen:
        raise SystemExit(f"{options.images_from}: no images in folders by class")
    labels = [bundle.manifest.labels.index(path.parent.name) for path in chosen]
    return [_resized(path.read_bytes(), side) for path in chosen], labels


def _resized(file: bytes, side: int) -> bytes:
    stream = io.BytesIO()
    image = Image.open(io.BytesIO(file)).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + short, top + short)).save(
        stream, "JPEG", quality=92
    )
    return stream.getvalue()


def _prepare(options: Options, bundle: Bundle, jpegs: Sequence[bytes]) -> tuple[Task, dict[str, list[tuple[int, int]]]]:
    """The task, and class and exit of each photo by mode."""
    engine = load_engine(bundle)
    size = min(engine.max_batch_sizes)
    pixels = decoded(bundle, jpegs)
    classes, confidence = [], []
    for start in range(0, len(pixels), size):
        outputs = list(every_stage(engine, pixels[start : start + size]))
        classes.append(np.stack([output.probabilities.argmax(axis=1) for output in outputs]))
        confidence.append(np.stack([output.confidence for output in outputs]))
    largest = engine.max_batch_sizes[0]
    engine.close()
    said, sure = np.concatenate(classes, axis=1), np.concatenate(confidence, axis=1)  # (E, N)
    stages = bundle.manifest.stages
    row = bundle.frontier.by_gmacs(options.gmacs or bundle.manifest.stage_gmacs[-1] / 2) or bundle.frontier.rows[0]
    thresholds = row.thresholds if options.mix is None else thresholds_for(sure, options.mix)
    leaves = sure >= np.array(thresholds)[:, None]
    exits = leaves.argmax(axis=0)
    known = {
        "full": [(int(class_id), len(stages)) for class_id in said[-1]],
        "cascade": [(int(said[exit_, n]), int(exit_) + 1) for n, exit_ in enumerate(exits)],
    }
    task = Task(
        bundle=bundle.path,
        mode="",
        side=bundle.preprocessing.crop[0],
        thresholds=tuple(thresholds),
        gmacs=row.gmacs,
        workers=options.workers,
        batch=options.batch or largest,
        window_ms=options.window_ms,
        timeout_s=WAITS_S,
    )
    return task, known


def _mix(answers: Sequence[tuple[int, int]], stages: int) -> list[float]:
    exits = [exit_ for _, exit_ in answers]
    return [exits.count(number) / len(exits) for number in range(1, stages + 1)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    sys.exit(main())
