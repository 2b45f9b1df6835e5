"""What deciding costs: the scheduler's microseconds an image as its queues grow, and swaps beside readers.

    taskset -c 0 python -m benchmarks.hot_path --out

The scheduler is run as the batcher runs it (admit, expire, schedule, update, free), with so many images queued at all
times, and with the policy that the server runs; what the engine would take is left out. One image a request.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from benchmarks import cascades
from benchmarks.harness import Options, Report, finish, parse
from benchmarks.offline import thresholds_for
from benchmarks.virtual import Setup, VirtualEngine
from server.budget.controller import BudgetController
from server.budget.store import MemoryStore
from server.bundle.profile import LatencyProfile
from server.calibration.sweep import sweep
from server.cascade.policy import DeepestRipe
from server.cascade.scheduler import Scheduler
from server.core import OperatingPoint

QUEUED = (100, 1_000, 10_000, 100_000)
GMACS = (0.4725, 1.4625, 3.4975)


def main(arguments: list[str] | None = None) -> int:
    def more(parser):  # type: ignore[no-untyped-def]
        parser.add_argument("--queued", type=int, nargs="+", default=list(QUEUED), help="images (default %(default)s)")
        parser.add_argument("--decide", type=int, default=20_000, help="images a measurement (default %(default)s)")
        parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
        parser.add_argument("--swaps", type=int, default=1_000_000, help="(default %(default)s)")

    options = parse("hot_path", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    report = Report("hot_path")
    found: dict[int, list[float]] = {queued: [] for queued in options.queued}
    for _ in range(options.rounds):
        for queued in options.queued:
            found[queued].append(_microseconds_an_image(queued, options.decide, options.mix))
    for queued, each in found.items():
        report.add(f"{queued} queued", f"{median(each):.1f} us an image", **{f"us_at_{queued}": median(each)})
    middle = [median(found[queued]) for queued in options.queued]
    if len(middle) > 1:
        decades = [np.log10(b / a) for a, b in pairwise(options.queued)]
        grows = [(b / a) ** (1 / decade) for (a, b), decade in zip(pairwise(middle), decades, strict=True)]
        report.add("grows with ten times as many by", ", ".join(f"{factor:.2f}" for factor in grows), grows=grows)
    torn, looked, seconds = _swaps_beside_readers(options.swaps)
    report.add(
        "swaps",
        f"{options.swaps} in {seconds:.1f} s, readers looked {looked} times",
        swaps=options.swaps,
        looked=looked,
    )
    report.must_be_zero("torn pairs of thresholds", torn, torn=torn)
    return report


def _microseconds_an_image(queued: int, images: int, mix: Sequence[float]) -> float:
    """`images` more come in one by one, and as many leave, while `queued` wait."""
    records = cascades.synthetic(4096)
    profile = LatencyProfile.lines((0.002,) * 3, (0.0001, 0.0002, 0.0004))
    sizes = (64, 64, 64)
    setup = Setup(profile, records, thresholds_for(records.confidence, mix), sizes)
    engine = VirtualEngine(setup, np.arange(queued + images + 1) % 4096)
    scheduler = Scheduler(
        OperatingPoint(1, setup.thresholds),
        max_batch_sizes=sizes,
        max_queued_images=2 * (queued + images),
        max_slots=1024,
        policy=DeepestRipe(profile.seconds, sizes),
        seconds=profile.seconds,
    )
    now, admitted, answered = 0.0, 0, 0

    def admit(count: int) -> None:
        nonlocal admitted
        for _ in range(count):
            scheduler.admit([admitted], now, deadline=1e9 + admitted % 977)  # type: ignore[list-item]
            admitted += 1

    admit(queued)
    began = time.perf_counter()
    while answered < images:
        now += 1e-6
        scheduler.expire(now)
        batch = scheduler.schedule(now)
        assert batch is not None
        outcome = scheduler.update(batch, engine.run(batch.run), now)
        engine.free(outcome.freed)
        answered += len(outcome.settled)
        admit(min(len(outcome.settled), queued + images - admitted))
    return 1e6 * (time.perf_counter() - began) / answered


def _swaps_beside_readers(swaps: int) -> tuple[int, int, float]:
    """A budget is swapped to and fro between two pairs of thresholds, while threads read the point in force."""
    records = cascades.synthetic(4096)
    frontier = sweep(records.confidence, records.correct, GMACS)
    budget = BudgetController(frontier, MemoryStore())
    targets = [{"gmacs": row.gmacs} for row in (frontier.rows[len(frontier.rows) // 3], frontier.rows[-2])]
    pairs = [row.thresholds for row in map(frontier.by_gmacs, (t["gmacs"] for t in targets)) if row is not None]
    torn, looked, done = [0, 0], [0, 0], threading.Event()

    def read(reader: int) -> None:
        while not done.is_set():
            point = budget.point
            looked[reader] += 1
            # The version tells which of the two it must be.
            torn[reader] += point.version > 1 and point.thresholds != pairs[point.version % 2]

    async def swap() -> None:
        for number in range(swaps):
            await budget.put(targets[number % 2], "quality")
            if number % 4096 == 0:
                await asyncio.sleep(0)

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(len(torn))]
    for thread in readers:
        thread.start()
    began = time.perf_counter()
    try:
        asyncio.run(swap())
    finally:
        done.set()
        for thread in readers:
            thread.join()
    return sum(torn), sum(looked), time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
