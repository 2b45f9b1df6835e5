"""The parts of `benchmarks.gpu`: each a function of the bench and a report, and, where it is about one, of a model.

Legend: B images in a batch, E exits.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import gpu_limits
from benchmarks.clients import Load, classify, classify_many
from benchmarks.gpu_engines import Opened, Timed, open_engine
from benchmarks.gpu_loops import ClosedLoop, LoopRun
from benchmarks.gpu_stage import LoneStage, fill, milliseconds
from benchmarks.gpu_timing import Card
from benchmarks.harness import Options, Report, Server, Window, failure, quantile_ms
from benchmarks.offline import decoded, thresholds_for
from server.bench.photos import photos
from server.bundle.frontier import NEVER
from server.bundle.manifest import EMBEDDED, FRONTIER, Bundle
from server.calibration.every_stage import every_stage
from server.core import Engine, Floats, Pixels, Slot, StageBatch, StageOutput
from server.engines.gpu.device import ALIGNMENT
from server.engines.gpu.engine import row_bytes
from server.engines.onnx import OnnxEngine

# Shares of the images at the exits. The first is the paper's example. With the second a T2T-ViT-12 cascade takes 1.04
# GMAC an image, at which it is as accurate as its backbone, read between the rows of the paper's table. The third is
# lighter traffic.
MIXES = {
    "46/30/24": (0.46, 0.30, 0.24),
    "70/17/13": (0.70, 0.17, 0.13),
    "80/13/7": (0.80, 0.13, 0.07),
}
PROFILED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROFILED_SINGLE = (1, 8, 64, 128)
PHOTOS = (1, 2, 4, 8, 16, 32, 64)  # batch sizes of the embedded model, where it is only to be right
CANDIDATES = (64, 128, 256)  # batch sizes that contend for the best
IN_FLIGHT = (1, 2, 3)  # batches
ROUNDS = 3
DISTINCT = 512  # images in turn: 77 MB at 224 pixels, so that staging them is not done from a cache
FP32_WITHIN = 1e-4  # probabilities of two engines in fp32
LITTLE = 64 * 2**20  # bytes that others leave free
NOTES = ".notes.json"


class Bench:
    """The engines that are open, and what earlier parts found out. `seconds`: what the part at hand may take."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.small: bool = options.small
        self.seconds = 0.0
        self.card = Card("cpu" if options.engine == "fake" else "cuda")
        self._opened: dict[tuple[Any, ...], Opened] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        while self._opened:
            self._opened.popitem()[1].engine.close()

    def has(self, name: str) -> bool:
        return name == "photo10-fp32" or (self.folder / name).exists()

    def smallest(self) -> str:
        """A bundle of which batches take little time."""
        toy = [f"{self.options.models[0]}-fp16"] if self.small else []
        return next(name for name in (*toy, "photo10-fp16", "photo10-fp32") if self.has(name))

    def bundle(self, name: str) -> Bundle:
        """Of the folder; `photo10-fp32` is the embedded one."""
        path = EMBEDDED if name == "photo10-fp32" else self.folder / name
        return Bundle.load(path, verify=False, need_frontier=False)

    def open(self, name: str, **how: Any) -> Opened:
        """Opened once, and shared by the parts of a process."""
        if self.options.sizes:
            how["sizes"] = tuple(self.options.sizes)
        if self.small:
            how |= {"sizes": (1, 2, 4), "lanes": 2, "max_slots": min(64, how.get("max_slots", 64))}
        key = (name, *sorted(how.items()))
        if key not in self._opened:
            self._opened[key] = open_engine(self.options.engine, self.bundle(name), **how)
        return self._opened[key]

    def note(self, **values: Any) -> None:
        """Keep what other parts, maybe of other processes, go by."""
        (self.folder / NOTES).write_text(json.dumps(self.notes | values))

    @property
    def notes(self) -> dict[str, Any]:
        file = self.folder / NOTES
        return json.loads(file.read_text()) if file.exists() else {}


# --- limits -----------------------------------------------------------------------------------------------------------


def products(bench: Bench, report: Report) -> None:
    report.add("card", bench.card.facts, card=bench.card.facts)
    gpu_limits.products(bench.card, report, bench.options.models, bench.small, bench.seconds)
    bench.note(**{kind: report.figures[f"tflops peak {kind}"] for kind in gpu_limits.PEAKS})


def copies(bench: Bench, report: Report) -> None:
    gpu_limits.copies(bench.card, report, bench.small, bench.seconds)
    bench.note(copy=report.figures["gb_s copy on the device"])


def launches(bench: Bench, report: Report) -> None:
    gpu_limits.launches(bench.card, report, bench.seconds)


# --- stages, one by one -----------------------------------------------------------------------------------------------


def profile(
    bench: Bench, report: Report, model: str, precision: str = "fp16", wanted: Sequence[int] = PROFILED
) -> None:
    """By stage and batch size: the engine's `run`, the stage alone on the device, and what the host takes beside."""
    opened = bench.open(f"{model}-{precision}", **({} if wanted is PROFILED else {"sizes": tuple(wanted), "lanes": 1}))
    engine, stages = opened.engine, opened.bundle.manifest.stages
    macs = np.diff([0.0, *opened.bundle.manifest.stage_gmacs])
    peak = bench.notes.get("float16" if precision == "fp16" else "float32", float("nan"))
    report.add("opened", f"{engine.runtime}, {engine.device}, in {opened.seconds:.1f} s", opened_s=opened.seconds)
    report.add("GMAC by stage", ", ".join(f"{g:.3f}" for g in macs), gmacs=macs.tolist())
    sizes = opened.sizes(wanted)
    pixels = pixels_for(engine, sizes[-1])
    for size in sizes:
        alone, capturable = [], True
        for stage in opened.stages:
            with LoneStage(opened.device, stage, size) as lone:
                alone.append(lone.ms(bench.seconds / len(sizes) / len(stages) / 3))
                capturable &= lone.graph is not None
        walls, waits, last = chains(opened, pixels[:size], bench.seconds / len(sizes) / 2)
        p50, p99 = (np.percentile(walls, q, axis=0) * 1e3 for q in (50, 99))  # (E,)
        host = np.median(walls - waits, axis=0) * 1e6
        rates, share = size / p50 * 1e3, 2 * macs * size / np.array(alone) / peak
        report.add(
            f"batch {size}" + ("" if capturable else ", not recorded"),
            f"run {slashed(p50)} ms (p99 {slashed(p99)}), device {slashed(alone)}, images/s {slashed(rates, '.0f')}, "
            f"of peak {slashed(100 * share, '.1f')} %, host us {slashed(host, '.0f')}",
            **{
                f"batch {size}": {
                    "p50_ms": p50.tolist(), "p99_ms": p99.tolist(), "device_ms": alone, "images_s": rates.tolist(),
                    "share_of_peak": share.tolist(), "host_us": host.tolist(), "runs": len(walls),
                }
            },
        )  # fmt: skip
    # Graphs with seeded weights, too, must stay within what half precision can hold.
    report.must_be_zero("answers that are no number", sum(int((~np.isfinite(out.probabilities)).sum()) for out in last))


def single(bench: Bench, report: Report, model: str) -> None:
    profile(bench, report, model, "fp32", PROFILED_SINGLE)


def chains(opened: Opened, pixels: Sequence[Pixels], seconds: float) -> tuple[Floats, Floats, list[StageOutput]]:
    """Images through all stages as one batch, again and again: seconds in `run`, and of these waiting for the device,
    (runs, E) each; and what the stages said the last time."""
    engine, walls, waits, outputs = opened.engine, [], [], []
    until = time.perf_counter() + seconds
    while len(walls) < 3 or time.perf_counter() < until:
        taken, waited, outputs = [], [], []
        slots: Sequence[Slot] = ()
        try:
            for stage in range(1, engine.num_stages + 1):
                last = stage == engine.num_stages
                batch = StageBatch(stage, pixels, slots, [0.0 if last else NEVER] * len(pixels))
                before, began = opened.device.waited, time.perf_counter()
                output = engine.run(batch)
                taken.append(time.perf_counter() - began)
                waited.append(opened.device.waited - before)
                outputs.append(output)
                slots = [slot for slot in output.slots if slot is not None]
        finally:
            engine.free(slots)
        walls.append(taken)
        waits.append(waited)
    return np.array(walls, np.float32)[1:], np.array(waits, np.float32)[1:], outputs


def slashed(values: Iterable[float], form: str = ".3g") -> str:
    return "/".join(f"{value:{form}}" for value in values)


def pixels_for(engine: Engine, count: int) -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *engine.input_size, 3), np.uint8))


# --- the cascade in closed loop ---------------------------------------------------------------------------------------


def throughput(bench: Bench, report: Report, model: str) -> None:
    """Images/s of the cascade by mix of exits, over those of its backbone alone. Both first find their best batch size
    and lanes; rounds of all contenders alternate."""
    cascade = bench.open(f"{model}-fp16")
    alone = bench.open(f"{model}-alone-fp16", stages=1, sizes=CANDIDATES)
    exits = cascade.engine.num_stages
    pixels = pixels_for(cascade.engine, 16 if bench.small else DISTINCT)
    mixes = {name: mix for name, mix in MIXES.items() if len(mix) == exits}
    first = next(iter(mixes))
    sizes = cascade.sizes(CANDIDATES) or [4]

    def loop(opened: Opened, mix: Sequence[float], how: tuple[int, int], rebatch: bool = True) -> ClosedLoop:
        size, lanes = how
        return ClosedLoop(opened.engine, pixels, mix, [size] * len(mix), lanes, rebatch)

    tries = {(size, lanes) for size in sizes for lanes in IN_FLIGHT}
    slice_s = bench.seconds / 1.25 / (2 * 2 * len(tries))  # half of the time to find the best
    best: dict[str, tuple[int, int]] = {}
    for name, opened, mix in (("alone", alone, (1.0,)), ("cascade", cascade, mixes[first])):
        found = {how: loop(opened, mix, how).run(slice_s).rate for how in sorted(tries)}
        best[name] = max(found, key=lambda how: found[how])
        report.add(
            f"best of {len(found)}, {name}",
            f"batch {best[name][0]}, {best[name][1]} lanes, {max(found.values()):.0f} images/s",
            **{f"tried {name}": {f"batch {size}, {lanes} lanes": rate for (size, lanes), rate in found.items()}},
        )
    everything = (*[0.0] * (exits - 1), 1.0)
    contenders = {
        "backbone alone": loop(alone, (1.0,), best["alone"]),
        **{name: loop(cascade, mix, best["cascade"]) for name, mix in mixes.items()},
        "no exit": loop(cascade, everything, best["cascade"]),
        **{f"{name}, shrinking": loop(cascade, mixes[name], best["cascade"], rebatch=False) for name in (first,)},
    }
    runs = in_turn(contenders, bench.seconds / 2)
    gmacs = cascade.bundle.manifest.stage_gmacs
    lone_gmacs = alone.bundle.manifest.stage_gmacs[0]
    costs = {name: float(np.dot(mix, gmacs)) for name, mix in {**mixes, "no exit": everything}.items()}
    costs |= {"backbone alone": lone_gmacs, f"{first}, shrinking": costs[first]}
    tell(report, runs, "backbone alone", {name: f"MACs {lone_gmacs / costs[name]:.3f}" for name in runs})
    report.add("re-batched over shrinking", spread(ratios(runs, first, f"{first}, shrinking")))
    bench.note(**{f"best {model}": best["cascade"]})
    most = max(runs[name][-1].rate for name in mixes)
    host = min(runs[name][-1].host_us for name in mixes)
    report.add("host CPU an image, best mix", f"{host:.1f} us at up to {most:.0f} images/s", host_us=host)
    must_be_empty(report, cascade, alone)


def switches(bench: Bench, report: Report, model: str) -> None:
    """The first mix with graphs and without, with one batch in flight and with several, large batches and small."""
    graphs = bench.open(f"{model}-fp16")
    mix = next(mix for mix in MIXES.values() if len(mix) == graphs.engine.num_stages)
    pixels = pixels_for(graphs.engine, 16 if bench.small else DISTINCT)
    large = bench.notes.get(f"best {model}", [4 if bench.small else 128])[0]
    plain = bench.open(f"{model}-fp16", graphs=False, sizes=(8, large), lanes=2, max_slots=1024)
    contenders = {
        f"{name}, batch {size}, {lanes} in flight": ClosedLoop(opened.engine, pixels, mix, [size] * len(mix), lanes)
        for size in sorted({2 if bench.small else 8, large})
        for name, opened in (("graphs", graphs), ("no graphs", plain))
        for lanes in (IN_FLIGHT if opened is graphs else IN_FLIGHT[:2])
    }
    runs = in_turn(contenders, bench.seconds)
    base = f"no graphs, batch {large}, 1 in flight"
    tell(report, runs, base, {name: f"host {of[-1].host_us:.1f} us" for name, of in runs.items()})
    must_be_empty(report, graphs, plain)


def in_turn(contenders: Mapping[str, ClosedLoop], seconds: float) -> dict[str, list[LoopRun]]:
    """Every contender once a round, from another place in each."""
    names, runs = list(contenders), defaultdict(list)
    window = seconds / ROUNDS / len(names) / 1.25  # of which a quarter more is for the start
    for number in range(ROUNDS):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            runs[name].append(contenders[name].run(window))
    return {name: runs[name] for name in names}


def ratios(runs: Mapping[str, Sequence[LoopRun]], name: str, base: str) -> list[float]:
    pairs = zip(runs[name], runs[base], strict=True)
    return [one.rate / other.rate if other.rate else float("nan") for one, other in pairs]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def tell(report: Report, runs: Mapping[str, Sequence[LoopRun]], base: str, more: Mapping[str, str]) -> None:
    report.add("x", f"images/s over those of: {base}")
    for name, of in runs.items():
        rate = statistics.median(run.rate for run in of)
        over = ratios(runs, name, base)
        last = of[-1]
        report.add(
            name,
            f"{rate:.0f} images/s, x {spread(over)}; {more[name]}; fill {slashed(last.fill, '.0f')}",
            **{
                name: {
                    "images_s": [run.rate for run in of], "ratio": over, "fill": last.fill,
                    "host_us": last.host_us, "more": more[name],
                }
            },
        )  # fmt: skip


def must_be_empty(report: Report, *opened: Opened) -> None:
    report.must_be_zero("slots left", sum(one.engine.slots_in_use for one in opened))


# --- what the runtime does beside the stages --------------------------------------------------------------------------


def state(bench: Bench, report: Report, model: str) -> None:
    """Rows of state moved by their indices, over the copy peak; what staging costs the host."""
    opened = bench.open(f"{model}-fp16")
    device, engine = opened.device, opened.engine
    peak = bench.notes.get("copy", float("nan"))
    size = 4 if bench.small else 256
    share = bench.seconds / 12
    device.attach()
    stream = device.stream()
    rng = np.random.default_rng(0)
    for stage in opened.stages[1:]:
        for name, spec in stage.inputs.items():
            if name == "image":
                continue
            row = row_bytes(spec)
            rows = 2 * size
            order = rng.permutation(rows).astype(np.int32)
            half = np.where(rng.random(size) < 0.5, order[:size], -1).astype(np.int32)
            with held(device, (rows + 1) * row, size * row, 4 * size) as (store, batch, index):
                fill(device, batch, spec, size, stream)
                first, second = order[size:], order[:size]  # all of the store is written before any of it is read
                for what, places in (
                    ("scatter", first),
                    ("scatter", second),
                    ("scatter half", half),
                    ("gather", second),
                ):
                    put(device, index, places, stream)
                    addresses = (store, index, batch) if what == "gather" else (batch, index, store)
                    work = partial(device.gather if what == "gather" else device.scatter, *addresses, row, size, stream)
                    ms = milliseconds(device, stream, work, share)
                    if places is first:
                        continue
                    moved = int((places >= 0).sum())
                    rate = 2e-6 * moved * row / ms
                    report.add(
                        f"{what} {name}",
                        f"{rate:.4g} GB/s, {rate / peak:.2f} of the copy peak, {moved} x {row} B, {1e3 * ms:.1f} us",
                        **{f"{what} {name}": {"gb_s": rate, "ms": ms, "of_peak": rate / peak}},
                    )
    pixels = pixels_for(engine, 16 if bench.small else DISTINCT)
    image = pixels[0].nbytes
    host = device.pin(size * image)
    staged = host.reshape(size, *pixels[0].shape)
    turn = [0]

    def stage_some() -> None:
        first = turn[0] % (len(pixels) - size + 1)
        turn[0] += size
        np.stack(pixels[first : first + size], out=staged)

    with held(device, size * image) as (there,):
        ms = milliseconds(device, stream, stage_some, share)
        report.add(
            "staging on the host", f"{1e3 * ms / size:.2f} us an image, {1e-6 * size * image / ms:.3g} GB/s",
            staging_us=1e3 * ms / size,
        )  # fmt: skip
        ms = milliseconds(device, stream, lambda: device.copy_in(there, host, size * image, stream), share)
        report.add(
            "sending it",
            f"{1e3 * ms / size:.2f} us an image, {1e-6 * size * image / ms:.3g} GB/s",
            sending_us=1e3 * ms / size,
        )
    device.unpin(host)
    device.destroy_stream(stream)


@contextmanager
def held(device: Timed, *sizes: int) -> Iterator[list[int]]:
    """Device memory, given back at the end."""
    addresses: list[int] = []
    try:
        for size in sizes:
            addresses.append(device.allocate(size))
        yield addresses
    finally:
        for address in addresses:
            device.free(address)


def put(device: Timed, address: int, values: NDArray[Any], stream: int) -> None:
    """An array into device memory, at once."""
    content = values.view(np.uint8).reshape(-1)
    host = device.pin(content.nbytes)
    host[:] = content
    device.copy_in(address, host, content.nbytes, stream)
    device.synchronize(stream)
    device.unpin(host)


# --- is it right ------------------------------------------------------------------------------------------------------


def answers(bench: Bench, report: Report) -> None:
    """The device, in fp32 and fp16, against ONNX Runtime on the CPU in fp32; exits by thresholds of the first mix."""
    for model in (name for name in ("micro", "photo10") if bench.has(f"{name}-fp32")):
        bundle = bench.bundle(f"{model}-fp32")
        pixels = decoded(bundle, photos(4 if bench.small else 64))
        reference = OnnxEngine(bundle)
        try:
            want = every_answer(reference, pixels)
        finally:
            reference.close()
        mix = next(mix for mix in MIXES.values() if len(mix) == reference.num_stages)
        # Half the way down to the next confidence, so that a rounding decides no exit by itself.
        thresholds = between(want.confidence, thresholds_for(want.confidence, mix))
        for precision in ("fp32", "fp16"):
            if not bench.has(f"{model}-{precision}"):
                report.add(f"{model} {precision}", "no such bundle")
                continue
            got = every_answer(bench.open(f"{model}-{precision}", sizes=PHOTOS, lanes=1).engine, pixels)
            differences = np.abs(got.probabilities - want.probabilities).max(axis=(1, 2))  # (E,)
            moved = int((exits_of(got.confidence, thresholds) != exits_of(want.confidence, thresholds)).sum())
            report.add(
                f"{model} {precision} against ONNX Runtime",
                f"probabilities within {slashed(differences, '.1e')}, {moved} of {len(pixels)} exits differ",
                **{
                    f"{model} {precision}": {"differences": differences.tolist(), "exits": moved, "images": len(pixels)}
                },
            )
            if precision == "fp32" and not (differences.max() < FP32_WITHIN and moved == 0):
                report.must_be_zero(f"{model}: beyond {FP32_WITHIN:g}, or another exit", 1)


def shuffled(bench: Bench, report: Report, model: str = "") -> None:
    """Survivors in batches of random sizes, in random order, against the same images in one batch a stage: another
    image's state would show, and so would what another batch size left in memory."""
    if model:
        random_batches(report, f"{model}-fp16", bench.open(f"{model}-fp16"), bench.small, rounds=3)
        return
    for name in ("micro-fp32", "photo10-fp32", "photo10-fp16"):
        if bench.has(name):
            random_batches(report, name, bench.open(name, sizes=PHOTOS, lanes=1), bench.small, rounds=10)


def random_batches(report: Report, name: str, opened: Opened, small: bool, rounds: int) -> None:
    engine, rng = opened.engine, np.random.default_rng(1)
    pixels = decoded(opened.bundle, photos(4 if small else 64))
    want = every_answer(engine, pixels)
    got = np.full_like(want.probabilities, np.nan)  # (E, N, K)
    worst, batches = 0.0, 0
    for _ in range(1 if small else rounds):
        waiting: list[list[tuple[int, Slot]]] = [
            [(n, Slot(-1)) for n in range(len(pixels))],
            *([] for _ in want.confidence),
        ]
        while any(waiting):
            stage = int(rng.choice([at for at, some in enumerate(waiting, 1) if some]))
            some = waiting[stage - 1]
            rng.shuffle(some)  # type: ignore[arg-type]
            size = int(rng.integers(1, min(len(some), opened.engine.max_batch_sizes[stage - 1]) + 1))
            batch, waiting[stage - 1] = some[:size], some[size:]
            last = stage == engine.num_stages
            output = engine.run(
                StageBatch(
                    stage,
                    [pixels[n] for n, _ in batch],
                    [slot for _, slot in batch] if stage > 1 else [],
                    [0.0 if last else NEVER] * size,
                )
            )
            batches += 1
            for (n, _), row, slot in zip(batch, output.probabilities, output.slots, strict=True):
                got[stage - 1, n] = row
                if slot is not None:
                    waiting[stage].append((n, slot))
        worst = max(worst, float(np.abs(got - want.probabilities).max()))
        if not np.isfinite(got).all():
            raise RuntimeError("an answer is missing, or no number")
    other = float(np.median(np.abs(want.probabilities - np.roll(want.probabilities, 1, axis=1)).max(axis=2)))
    report.add(
        f"{name}, {batches} random batches",
        f"probabilities within {worst:.1e}; another image's would be {other:.1e} apart",
        **{name: {"within": worst, "another": other, "batches": batches}},
    )
    report.must_be_zero(f"{name}: other answers in other batches", int(not worst < other / 10))
    must_be_empty(report, opened)


@dataclass(frozen=True)
class Answers:
    probabilities: Floats  # (E, N, K)
    confidence: Floats  # (E, N)


def every_answer(engine: Engine, pixels: Sequence[Pixels]) -> Answers:
    """Every image through every stage."""
    size = min(engine.max_batch_sizes)
    parts = [list(every_stage(engine, pixels[first : first + size])) for first in range(0, len(pixels), size)]
    probabilities = np.concatenate([np.stack([out.probabilities for out in part]) for part in parts], axis=1)
    confidence = np.concatenate([np.stack([out.confidence for out in part]) for part in parts], axis=1)
    return Answers(probabilities, confidence)


def between(confidence: Floats, thresholds: Sequence[float]) -> tuple[float, ...]:
    """Each threshold moved half the way to the largest confidence below it."""
    moved = []
    for row, threshold in zip(confidence, thresholds, strict=True):
        below = row[row < np.float32(threshold)]
        moved.append((threshold + float(below.max())) / 2 if len(below) and threshold <= 1 else threshold)
    return (*moved[:-1], 0.0)


def exits_of(confidence: Floats, thresholds: Sequence[float]) -> NDArray[np.int64]:
    """(E, N) -> (N,), from 1."""
    leaves = confidence >= np.array(thresholds)[:, None]
    return leaves.argmax(axis=0) + 1


# --- the pool of state ------------------------------------------------------------------------------------------------


def pool(bench: Bench, report: Report) -> None:
    """Random batches, thresholds and hang-ups from several threads: nobody's state is lost, and none stays."""
    opened = bench.open(bench.smallest(), sizes=PHOTOS)
    engine = opened.engine
    pixels = pixels_for(engine, 64)
    until = time.monotonic() + bench.seconds * 0.8
    most = 60 if bench.small else 5000
    counts = {"batches": 0, "freed": 0, "wrong": 0}
    lock, failures = threading.Lock(), []

    def walk(seed: int) -> None:
        rng = np.random.default_rng(seed)
        waiting: list[list[Slot]] = [[] for _ in range(engine.num_stages)]
        try:
            while time.monotonic() < until and counts["batches"] < most:
                stage = int(rng.integers(1, engine.num_stages + 1))
                largest = min(engine.max_batch_sizes[stage - 1], 16)
                size = int(rng.integers(1, largest + 1))
                slots: list[Slot] = []
                if stage > 1:
                    rng.shuffle(waiting[stage - 1])  # type: ignore[arg-type]
                    slots, waiting[stage - 1] = waiting[stage - 1][:size], waiting[stage - 1][size:]
                    if not (size := len(slots)):
                        continue
                thresholds = rng.choice([0.0, NEVER, 0.5], size).tolist()
                images = [pixels[n] for n in rng.integers(0, len(pixels), size)]
                output = engine.run(StageBatch(stage, images, slots, thresholds))
                last = stage == engine.num_stages
                goes_on = [not last and bool(c < t) for c, t in zip(output.confidence, thresholds, strict=True)]
                wrong = sum((slot is not None) != on for slot, on in zip(output.slots, goes_on, strict=True))
                left = [slot for slot in output.slots if slot is not None]
                gone, left = left[: len(left) // 4], left[len(left) // 4 :]  # whose client hung up
                engine.free(gone)
                if left:
                    waiting[stage] += left
                while sum(map(len, waiting)) > 48:
                    deep = max(waiting, key=len)
                    engine.free([deep.pop()])
                with lock:
                    counts["batches"] += 1
                    counts["freed"] += len(gone)
                    counts["wrong"] += wrong
        except BaseException as error:
            failures.append(error)
        finally:
            engine.free([slot for some in waiting for slot in some])

    threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    report.add(
        "random batches", f"{counts['batches']} in 3 threads, {counts['freed']} states given back early", **counts
    )
    report.must_be_zero("rows whose survival does not follow from confidence and threshold", counts["wrong"])
    must_be_empty(report, opened)


def capped(bench: Bench, report: Report) -> None:
    """More states than there are rows; a device whose memory others have."""
    name = bench.smallest()
    opened = bench.open(name, sizes=(1, 2, 4), max_slots=8)
    engine, pixels = opened.engine, pixels_for(opened.engine, 4)
    slots: list[Slot] = []
    refused = ""
    for _ in range(1000):
        try:
            output = engine.run(StageBatch(1, pixels, [], [NEVER] * len(pixels)))
        except Exception as error:
            refused = type(error).__name__
            break
        slots += [slot for slot in output.slots if slot is not None]
    report.add(
        "a full pool", f"{refused or 'never refused'} after {len(slots)} states", full=refused, states=len(slots)
    )
    report.must_be_zero(
        "a full pool: not refused, or states lost", int(not refused or engine.slots_in_use != len(slots))
    )
    engine.free(slots)
    engine.run(StageBatch(1, pixels, [], [0.0] * len(pixels)))
    must_be_empty(report, opened)
    device = opened.device
    device.attach()
    free = device.free_memory()
    with held(device, max(ALIGNMENT, free - LITTLE)):
        outcome = starve(bench)
    lost = (free - device.free_memory()) / 2**20
    report.add(
        f"{LITTLE / 2**20:.0f} MiB free", f"{outcome}; {lost:.0f} MiB less afterwards", starved=outcome, lost_mib=lost
    )
    again = engine.run(StageBatch(1, pixels, [], [0.0] * len(pixels)))
    report.must_be_zero("afterwards: answers that are no number", int(not np.isfinite(again.probabilities).all()))


def starve(bench: Bench) -> str:
    """What comes of opening the first model."""
    size = 2 if bench.small else 256
    try:
        opened = open_engine(
            bench.options.engine, bench.bundle(f"{bench.options.models[0]}-fp16"), sizes=(1, size), lanes=1
        )
    except Exception as error:
        return failure(error)
    opened.engine.close()
    return "opened all the same"


# --- the server -------------------------------------------------------------------------------------------------------


def server(bench: Bench, report: Report) -> None:
    """`dvt serve` with the embedded model, forms of JPEGs over loopback from many connections. Decoding takes cores,
    and the event loop is one thread: whose time it is, is told."""
    fake = bench.options.engine == "fake"
    half = bench.folder / "photo10-fp16"
    bundle = half if (half / FRONTIER).exists() and not fake else ""  # half precision is for GPUs
    files = photos(4 if bench.small else 64)
    together = 4 if bench.small else 16
    forms = [classify_many(files[first : first + together]) for first in range(0, len(files), together)]
    seconds = bench.seconds / 4
    engine = {} if fake else {"engine": bench.options.engine}
    room = {"timeout_ms": 10_000, "max_queued_images": 2048, "max_queued_decodes": 2048, "max_slots": 1024}
    with Server(bundle, **room, **engine) as serving:
        status, ready = serving.get("/model")
        report.add("serves", f"{status} {ready.get('name')} on {ready.get('engine')}", model=ready)
        with Load(serving.port, forms, 4 if bench.small else 24, 10**6) as load:
            time.sleep(seconds / 2)
            before, first = serving.snapshot(), len(load.asked)
            time.sleep(seconds)
            window, asked = Window(before, serving.snapshot()), load.asked[first:]
        taken = [one.seconds for one in asked if one.ok]
        rate = window.images / window.seconds
        report.add(
            f"forms of {together} JPEGs",
            f"{rate:.0f} images/s, p50 {quantile_ms(taken, 0.5):.1f} ms, p99 {quantile_ms(taken, 0.99):.1f} ms, "
            f"{sum(not one.ok for one in asked)} of {len(asked)} failed",
            images_s=rate, p50_ms=quantile_ms(taken, 0.5), p99_ms=quantile_ms(taken, 0.99),
        )  # fmt: skip
        cpu = {name: spent / window.seconds for name, spent in window.cpu.items()}
        report.add("cores busy", ", ".join(f"{name} {cores:.2f}" for name, cores in cpu.items()), cores=cpu)
        report.add("images in a batch", slashed([window.fill(stage) for stage in (1, 2, 3)], ".1f"))
        with Load(serving.port, [classify(files[0])], 1, 5 if bench.small else 200) as lone:
            lone.join()
        taken = [one.seconds for one in lone.asked if one.ok]
        report.add(
            "a lone client", f"p50 {quantile_ms(taken, 0.5):.2f} ms, p99 {quantile_ms(taken, 0.99):.2f} ms",
            lone_p50_ms=quantile_ms(taken, 0.5), lone_p99_ms=quantile_ms(taken, 0.99),
        )  # fmt: skip
