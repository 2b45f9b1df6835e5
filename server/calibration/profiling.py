"""Measuring a latency profile: a real engine, real survivors, as many batches at once as the server will run.

A machine is noisy for seconds at a time, so sizes are not measured one after the other: every round takes each size
once, and rounds go on while there is time. The first goes upwards, as far as there is time for. On a CPU batches that
run at once slow one another down; from the second round on every thread walks the sizes from another place, as in a
server, where batches of all stages and sizes meet.

A server measures each size twice before it is ready, no more: a start that waits is what a fleet scales by, and the
profile then follows what batches take. Of two runs the shorter counts, as no accident makes a batch quick.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from server.bundle.manifest import Bundle
from server.bundle.profile import Identity, LatencyProfile, StageCost
from server.calibration.every_stage import every_stage
from server.core import Engine, Pixels
from server.engines import load_engine

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WARM_UP_SIZES = (1, 4, 16, 64, 256)
WARM_UP_RUNS = 2  # of each size, by all threads together
LEAST_ROUNDS = 5  # where nobody asks for fewer: sizes without time for as many are left out, the largest first


def identify(bundle: Bundle, engine: Engine, concurrency: int) -> Identity:
    """What a profile that is measured here and now holds for."""
    manifest = bundle.manifest
    return Identity(manifest.version, manifest.precision, engine.runtime, engine.device, concurrency)


def measure(
    engine: Engine,
    *,
    seconds: float,
    concurrency: int = 1,
    sizes: Sequence[int] = SIZES,
    beyond: int = 1,
    rounds: int | None = None,
    progress: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[StageCost, ...]:
    """Seconds per batch of every stage, p50 and p99, with `concurrency` batches running at once.

    `sizes`, rising: those up to `beyond` times a stage's largest batch that pays. Takes about `seconds`, or `rounds`
    per thread where that is shorter; with an engine that is too slow for that, as long as it needs for one image. The
    engine must be warm and idle. No state stays in it. Raises EngineFailed, and whatever the engine raises.
    """
    # A stage gets its images from the one before: none is measured with more than that one is.
    most = sizes[-1] if engine.max_slots is None else max(1, engine.max_slots // concurrency)
    largest = tuple(accumulate((min(most, beyond * size) for size in engine.max_batch_sizes), min))
    rng = np.random.default_rng(0)
    pixels: list[Pixels] = list(rng.integers(0, 256, (min(largest[0], sizes[-1]), *engine.input_size, 3), np.uint8))
    until = clock() + seconds

    def run(size: int) -> list[float]:
        """Seconds of stage 1, 2, … as far as they take so many images."""
        taken = []
        with closing(every_stage(engine, pixels[:size])) as outputs:
            for _ in range(sum(size <= most for most in largest)):
                began = clock()
                next(outputs)
                taken.append(clock() - began)
        return taken

    fitting = [size for size in sizes if size <= largest[0]]
    least = LEAST_ROUNDS if rounds is None else rounds
    failed = threading.Event()

    def walk(thread: int) -> list[tuple[int, list[float]]]:
        runs: list[tuple[int, list[float]]] = []

        def take(size: int) -> float:
            try:
                runs.append((size, run(size)))
            except BaseException:
                failed.set()  # the others need not go on
                raise
            if thread == 0:
                bar.update(max(0.0, min(clock(), until) - (until - seconds) - bar.n))
            return sum(runs[-1][1])

        chosen: list[int] = []
        spent = last = 0.0
        for size in fitting:
            if failed.is_set() or (chosen and spent + last * size / chosen[-1] > seconds / least):
                break
            last = take(size)
            spent += last
            chosen.append(size)
        at = thread * len(chosen) // concurrency
        while not failed.is_set() and clock() < until and (rounds is None or len(runs) < rounds * len(chosen)):
            take(chosen[at % len(chosen)])
            at += 1
        # Nobody has run the engine with more than pays: what that took at first was to get the memory for it.
        return runs[len(chosen) :] or runs if beyond > 1 else runs

    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with (
        tqdm(total=seconds, desc="batches", bar_format=layout, disable=not progress, file=sys.stderr) as bar,
        ThreadPoolExecutor(concurrency, thread_name_prefix="profile") as pool,
    ):
        try:
            walked = list(pool.map(walk, range(concurrency)))
        except BaseException:
            failed.set()  # Ctrl-C as well: the pool waits for its threads
            raise
    by_stage: list[dict[int, list[float]]] = [defaultdict(list) for _ in largest]
    for size, taken in (pair for runs in walked for pair in runs):
        for at, one in zip(by_stage, taken, strict=False):
            at[size].append(one)
    return tuple(_summary(samples) for samples in by_stage)


def profile_at_start(bundle: Bundle, engine: Engine, *, executors: int, seconds: float) -> LatencyProfile | None:
    """The bundle's profile where it is one for this engine here, otherwise a short one, measured now.

    None where `seconds` is 0, or where the engine cannot be measured: a server starts all the same. Engine: warm, idle.
    """
    if (kept := kept_profile(bundle, engine, executors)) is not None:
        return kept
    here = identify(bundle, engine, executors)
    if bundle.profile is not None and bundle.profile.identity is not None:
        log.info("the bundle's latency profile was measured with %s", bundle.profile.identity.misfit(here))
    if seconds == 0:
        return None
    began = time.monotonic()
    try:
        stages = measure(
            engine,
            seconds=seconds,
            concurrency=executors,
            sizes=WARM_UP_SIZES,
            rounds=WARM_UP_RUNS // min(executors, WARM_UP_RUNS),
        )
    except Exception as error:  # whatever the engine raises
        log.warning("no latency profile: the engine failed while it was measured (%s: %s)", type(error).__name__, error)
        return None
    log.info("measured a latency profile in %.1f s; a better one: dvt profile", time.monotonic() - began)
    return LatencyProfile(stages, here)


def kept_profile(bundle: Bundle, engine: Engine, executors: int) -> LatencyProfile | None:
    """The bundle's profile, where it is one for this engine here."""
    if bundle.profile is None or bundle.profile.identity is None:
        return None
    fits = bundle.profile.identity.misfit(identify(bundle, engine, executors)) is None
    return bundle.profile if fits else None


def profile_bundle(path: Path, *, executors: int | None, seconds: float, engine: str = "auto") -> LatencyProfile:
    """`dvt profile`: measure the bundle at `path` and write its profile.json. Raises BundleError and EngineFailed."""
    bundle = Bundle.load(path, need_frontier=False)
    loaded = load_engine(bundle, engine=engine, executors=executors)
    concurrency = executors or loaded.executors
    try:
        loaded.warm_up()
        # Beyond what pays, to see that it does not. A server does not: the memory for it would stay with the engine.
        stages = measure(loaded, seconds=seconds, concurrency=concurrency, beyond=2, progress=sys.stderr.isatty())
        profile = LatencyProfile(stages, identify(bundle, loaded, concurrency))
    finally:
        loaded.close()
    bundle.write_profile(profile)
    return profile


def as_table(profile: LatencyProfile) -> str:
    lines = []
    if identity := profile.identity:
        lines.append(f"{identity.runtime}, {identity.device}, {identity.concurrency} at once")
    lines.append(f"{'stage':>5} {'batch':>5} {'p50 ms':>9} {'p99 ms':>9} {'ms/image':>9}")
    for number, stage in enumerate(profile.stages, start=1):
        for size, p50, p99 in zip(stage.batches, stage.p50, stage.p99, strict=True):
            lines.append(f"{number:>5} {size:>5} {1e3 * p50:9.3f} {1e3 * p99:9.3f} {1e3 * p50 / size:9.3f}")
    for number, stage in enumerate(profile.stages, start=1):
        used = "a straight line" if stage.linear else "the table is used, a line is off by more than 10 %"
        lines.append(
            f"stage {number}: {1e3 * stage.fixed:.3f} ms a batch + {1e3 * stage.per_image:.3f} ms an image; {used}"
        )
    return "\n".join(lines)


def _summary(samples: dict[int, list[float]]) -> StageCost:
    batches = tuple(sorted(samples))
    p50, p99 = (
        tuple(round(float(np.percentile(samples[size], q, method="lower")), 9) for size in batches) for q in (50, 99)
    )
    return StageCost(batches, p50, p99)
