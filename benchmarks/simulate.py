"""Policies compared on the server's own scheduler under a virtual clock: no engine, no waiting, the same every time.

    python -m benchmarks.simulate compare --out --plots build   # the policy beside all baselines, many configurations
    python -m benchmarks.simulate overload --out --plots build  # the same at 1.5, 2 and 3 times the capacity
    python -m benchmarks.simulate p99 --out --plots build       # p99 latency against the law of the batching cycle
    python -m benchmarks.simulate maximum --profile 2,2,2/0.1,0.2,0.4 --deadline-ms 50   # one configuration, your own

Goodput is that at the highest rate at which 99 % of all arrivals are answered within the deadline, by an exit that was
sure. It is searched for with the same arrivals, stretched, and the same images for every policy. Under overload it is
the fraction of all arrivals that is answered correctly in time which counts, at fixed thresholds. Costs are stated as
c(n) = a + b n for a batch of n, not measured; images are synthetic, or with --bundle those that calibration logged.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import cascades
from benchmarks.baselines import BASELINES, DELAYS, Contender, fixed_delay, static
from benchmarks.harness import RESULTS, Options, Report, command_line, finish, fractions
from benchmarks.offline import thresholds_for
from benchmarks.plots import pyplot, save
from benchmarks.virtual import Setup, Simulation, Trace, quantiles
from server.bench import arrivals
from server.bundle.frontier import Records
from server.bundle.manifest import Bundle
from server.bundle.profile import LatencyProfile
from server.cascade.policy import DeepestRipe
from server.cascade.scheduler import Policy

TARGET = 0.99  # of all arrivals answered in time
SERVER = "server"  # the contender that the others are compared with
SPAN = (
    20.0  # deadlines that a run lasts at full load, at least: a shorter one ends before its queues are what they become
)
SAMPLES = 16_384  # records of a synthetic cascade

ARRIVALS: dict[str, Callable[[float, float, int], arrivals.Times]] = {
    "poisson": arrivals.poisson,
    "gamma": lambda rate, seconds, seed: arrivals.renewal(rate, seconds, seed, cv=4),
    "mmpp": lambda rate, seconds, seed: arrivals.mmpp(rate, seconds, seed, dwell_s=500 / rate),
}

# a_i and b_i in milliseconds. Stages of a ViT cascade do the same number of launches, on ever more tokens.
PROFILES = {
    **{f"gpu {ratio}": ((ratio * 0.1,) * 3, (0.1, 0.2, 0.4)) for ratio in (2, 6, 20, 60)},  # a/b of the first stage
    "cpu": ((0.35, 0.0, 0.0), (1.0, 2.0, 4.0)),
}
DEADLINES = (6.0, 20.0, 60.0)  # times what a lone image takes through all stages: 10 to 100 ms of a fast accelerator
MIXES = ((0.45, 0.30, 0.25), (0.55, 0.25, 0.20), (0.70, 0.20, 0.10), (0.30, 0.30, 0.40))
BATCH_SIZES = (16, 64, 256)
PAPER_MIX = MIXES[1]

P99_PROFILES = ("gpu 6", "gpu 20", "gpu 60")
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
LAW = 2.18  # p99 over T
LARGEST = 16_384  # a batch size that nothing reaches
FACTORS = (1.5, 2.0, 3.0)  # of the capacity, under overload

CYCLES = 400.0  # of the batching cycle that a run lasts, at least
WARM_UP = 0.1  # of the images are not looked at: the first find an empty server


def server(setup: Setup) -> tuple[Setup, Policy]:
    """The policy that the server runs."""
    return setup, DeepestRipe(setup.profile.seconds, setup.max_batch_sizes)


# --- the search for the maximum ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Traffic:
    """A schedule for any rate: the same gaps, stretched, so that two rates and two policies see the same luck."""

    times: NDArray[np.float64]  # (N,) at one arrival a second in the mean
    rows: NDArray[np.int64]  # (N,) records

    @classmethod
    def draw(
        cls, times: NDArray[np.float64], records: Records, seed: int, *, correlation: float = 0.0, shift: float = 0.0
    ) -> Traffic:
        """`times` at any rate."""
        span = float(times[-1] - times[0])
        if not span > 0:
            raise ValueError("all arrivals at one moment have no rate")
        rows = cascades.draw(records, len(times), seed, correlation=correlation, shift=shift)
        return cls((times - times[0]) * ((len(times) - 1) / span), rows)

    @classmethod
    def generate(cls, process: str, images: int, records: Records, seed: int, **options: float) -> Traffic:
        return cls.draw(ARRIVALS[process](1.0, float(images), seed), records, seed + 1, **options)


def images_of(options: Options, setup: Setup) -> int:
    """How many arrivals a run has."""
    return options.images or max(5_000, math.ceil(SPAN * setup.deadline_s * setup.capacity))


def run(contender: Contender, setup: Setup, traffic: Traffic, rate: float, *, give_up: bool = False) -> Trace:
    """`give_up`: end as soon as it is known that TARGET is missed."""
    allowed = (1 - TARGET) * len(traffic.times) if give_up else math.inf
    served, policy = contender(setup)
    return Simulation(served, policy, traffic.times / rate, traffic.rows, give_up_after=allowed).run()


def maximum(
    contender: Contender,
    setup: Setup,
    traffic: Traffic,
    *,
    guess: float,
    beat: float = 0.0,
    tolerance: float = 0.01,
) -> float:
    """The highest rate, images a second, at which TARGET of all arrivals are answered in time; 0 below `guess` / 1000.

    Bracketed from `guess` on, then bisected until both ends are within `tolerance`. With `beat` only a higher rate than
    that is searched for, and `beat` returned where there is none. Raises ValueError for so few images that even all at
    once are answered in time.
    """
    low, high, rate, stride = beat, math.inf, max(guess, beat * (1 + tolerance)), 1.15
    while high > low * (1 + tolerance) and (low or high > guess / 1000):
        if run(contender, setup, traffic, rate, give_up=True).attainment >= TARGET:
            low = rate
            if low > 1000 * setup.capacity:
                raise ValueError(f"{len(traffic.times)} images are too few: even all at once are answered in time")
        else:
            high = rate
        if not low or high == math.inf:
            rate, stride = (low * stride if low else high / stride), stride**1.5
        else:
            rate = math.sqrt(low * high)
    return low


def maxima(setup: Setup, traffic: Traffic) -> dict[str, float]:
    """The highest rate of the server's policy and of every baseline; of the fixed delays the best."""
    guess = 0.5 * setup.capacity
    found = {SERVER: maximum(server, setup, traffic, guess=guess)}
    guess = found[SERVER] or guess
    for name, contender in {**BASELINES, "static": static}.items():
        if setup.executors == 1 or name != "padded":
            found[name] = maximum(contender, setup, traffic, guess=guess)
    delayed = maximum(fixed_delay(DELAYS[0]), setup, traffic, guess=guess)
    for share in DELAYS[1:]:
        delayed = maximum(fixed_delay(share), setup, traffic, guess=delayed or guess, beat=delayed)
    return {**found, "fixed delay": delayed}


def best_baseline(rates: dict[str, float]) -> str:
    """Of those that serve the same cascade."""
    return max((name for name in rates if name not in (SERVER, "static")), key=lambda name: rates[name])


# --- compare ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    profile: str
    deadline: float  # times the seconds of a lone image
    mix: tuple[float, ...]
    arrivals: str
    max_batch_size: int

    def setup(self, records: Records) -> Setup:
        profile = profile_of(*PROFILES[self.profile])
        alone = sum(profile.seconds(stage, 1) for stage in range(1, len(profile.stages) + 1))
        return Setup(
            profile,
            records,
            thresholds_for(records.confidence, self.mix),
            (self.max_batch_size,) * len(profile.stages),
            deadline_s=self.deadline * alone,
        )


def profile_of(fixed_ms: Sequence[float], per_image_ms: Sequence[float]) -> LatencyProfile:
    return LatencyProfile.lines([ms / 1000 for ms in fixed_ms], [ms / 1000 for ms in per_image_ms])


def configurations(count: int, seed: int = 0) -> list[Configuration]:
    """Every level of every factor equally often, in random combinations (a Latin hypercube)."""
    rng = np.random.default_rng(seed)
    factors: tuple[Sequence[Any], ...] = (tuple(PROFILES), DEADLINES, MIXES, tuple(ARRIVALS), BATCH_SIZES)
    columns = [[levels[at] for at in rng.permutation(np.arange(count) % len(levels))] for levels in factors]
    return [Configuration(*row) for row in zip(*columns, strict=True)]


def _compare_one(options: Options, configuration: Configuration) -> dict[str, Any]:
    records = cascades.synthetic(SAMPLES, options.seed)
    setup = configuration.setup(records)
    images = images_of(options, setup)
    rates = maxima(setup, Traffic.generate(configuration.arrivals, images, records, options.seed + 1))
    best = best_baseline(rates)
    return {**asdict(configuration), "images": images, "capacity": setup.capacity, "best": best, "rates": rates}


def compare(options: Options) -> Report:
    report = Report("simulate_compare", figures={"seed": options.seed, "profiles_ms": PROFILES})
    rows = []
    for row in _parallel(partial(_compare_one, options), configurations(options.configurations), options.processes):
        rows.append(row)
        print(f"{len(rows)}: {_name(row)}: {row['rates']}", file=sys.stderr, flush=True)  # it takes minutes
    _summarise(report, rows)
    if options.plots:
        _plot_compare(rows, report.figures["ratios"], options.plots / "simulate_compare.png")
    return report


def _summarise(report: Report, rows: Sequence[dict[str, Any]]) -> None:
    report.add("configurations", f"{len(rows)}", configurations=rows)
    ratios = np.array([_over([row], row["best"])[0] for row in rows])
    report.add(
        "goodput over the best baseline's",
        f"median {np.median(ratios):.3f}, worst {ratios.min():.3f}, best {ratios.max():.3f}",
        ratios=ratios,
        median=float(np.median(ratios)),
        worst=float(ratios.min()),
    )
    for name in rows[0]["rates"]:
        if name != SERVER:
            against = _over(rows, name)
            report.add(f"over {name}", _spread(against), **{f"over_{name.replace(' ', '_')}": against})
    paper = [row for row in rows if tuple(row["mix"]) == PAPER_MIX]
    for name in ("padded", "no exit"):
        if paper:
            against = _over(paper, name)
            report.add(f"over {name}, mix .55 .25 .20", _spread(against), **{f"paper_mix_over_{name}": against})
    for at in np.argsort(ratios)[:8]:
        report.add(f"lowest: {_name(rows[at])}", f"{ratios[at]:.3f} of {rows[at]['best']}")


def _name(row: dict[str, Any]) -> str:
    mix = " ".join(f"{share:.2f}" for share in row["mix"])
    return f"{row['profile']}, D {row['deadline']:g}, {mix}, {row['arrivals']}, {row['max_batch_size']}"


def _over(rows: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """The server's rate over that of a baseline; where the baseline serves none, over a thousandth of the capacity."""
    return np.array([row["rates"][SERVER] / max(row["rates"][name], row["capacity"] / 1000) for row in rows])


def _spread(ratios: NDArray[np.float64]) -> str:
    return f"median {np.median(ratios):.2f}, lowest {ratios.min():.2f}, highest {ratios.max():.2f}"


# --- overload ---------------------------------------------------------------------------------------------------------


def _overload_one(options: Options, configuration: Configuration) -> dict[str, Any]:
    records = cascades.synthetic(SAMPLES, options.seed)
    setup = configuration.setup(records)
    images = images_of(options, setup)
    traffic = Traffic.generate(configuration.arrivals, images, records, options.seed + 1)
    delays = {f"fixed delay {share:g}": fixed_delay(share) for share in DELAYS}
    contenders: dict[str, Contender] = {SERVER: server, "compacted": BASELINES["compacted"], **delays}
    found: dict[str, Any] = {}
    for factor in FACTORS:
        found[f"{factor:g}"] = {}
        for name, contender in contenders.items():
            figures = run(contender, setup, traffic, factor * setup.capacity).figures()
            told = OUTCOMES if name == SERVER else OUTCOMES[:1]
            found[f"{factor:g}"][name] = {key: figures[key] for key in told}
    return {**asdict(configuration), "images": images, "capacity": setup.capacity, "loads": found}


OUTCOMES = ("correct_in_time", "in_time", "degraded", "refused", "expired")


def overload(options: Options) -> Report:
    """All contenders shed what cannot be answered in time: that is the scheduler's, whatever the policy."""
    report = Report("simulate_overload", figures={"seed": options.seed, "profiles_ms": PROFILES, "factors": FACTORS})
    rows = []
    for row in _parallel(partial(_overload_one, options), configurations(options.configurations), options.processes):
        rows.append(row)
        print(f"{len(rows)}: {_name(row)}", file=sys.stderr, flush=True)
    report.add("configurations", f"{len(rows)}", configurations=rows)
    for load in rows[0]["loads"]:
        ours = [row["loads"][load][SERVER] for row in rows]
        means = {key: float(np.mean([figures[key] for figures in ours])) for key in OUTCOMES}
        report.add(f"{load} times: of all arrivals", _told(means), **{f"x{load}": means})
        against = np.array([_over_delay(row["loads"][load]) for row in rows])
        report.add(f"{load} times: correct in time over the best fixed delay's", _spread(against))
        report.figures[f"x{load}_over_fixed_delay"] = against
    if options.plots:
        _plot_overload(rows, options.plots / "simulate_overload.png")
    return report


def _told(means: dict[str, float]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {mean:.3f}" for key, mean in means.items())


def _over_delay(contenders: dict[str, dict[str, float]]) -> float:
    best = max(figures["correct_in_time"] for name, figures in contenders.items() if name.startswith("fixed delay"))
    return contenders[SERVER]["correct_in_time"] / best


# --- the law of the batching cycle ------------------------------------------------------------------------------------


def _p99_one(options: Options, case: tuple[str, float]) -> dict[str, Any]:
    name, load = case
    records = cascades.synthetic(SAMPLES, options.seed)
    setup = Configuration(name, math.inf, PAPER_MIX, "poisson", LARGEST).setup(records)
    cycle = sum(stage.fixed for stage in setup.profile.stages) / (1 - load)
    rate = load / setup.image_s
    images = options.images or max(30_000, math.ceil(CYCLES * cycle * rate))
    trace = run(server, setup, Traffic.generate("poisson", images, records, options.seed + 1), rate)
    found = quantiles(trace.latency[int(WARM_UP * images) :])
    assert found is not None
    return {
        "profile": name,
        "load": load,
        "images": images,
        "cycle_s": cycle,
        **found,
        "over_law": found["p99"] / (LAW * cycle),
    }


def p99(options: Options) -> Report:
    report = Report("simulate_p99", figures={"seed": options.seed, "mix": PAPER_MIX, "law": LAW})
    cases = [(name, load) for name in P99_PROFILES for load in LOADS]
    points = list(_parallel(partial(_p99_one, options), cases, options.processes))
    report.figures["points"] = points
    for name in P99_PROFILES:
        here = [point for point in points if point["profile"] == name]
        off = max(abs(point["over_law"] - 1) for point in here)
        report.add(f"{name}: load", " ".join(f"{point['load']:5.2f}" for point in here))
        report.add(f"{name}: p99 / ({LAW} T)", " ".join(f"{point['over_law']:5.2f}" for point in here))
        report.add(f"{name}: p50 / T", " ".join(f"{point['p50'] / point['cycle_s']:5.2f}" for point in here))
        report.add(f"{name}: off by at most", f"{off:.1%}", **{f"off_{name.replace(' ', '_')}": off})
    if options.plots:
        _plot_p99(points, options.plots / "simulate_p99.png")
    return report


# --- one configuration ------------------------------------------------------------------------------------------------


def one(options: Options) -> Report:
    report = Report("simulate_maximum")
    fixed, per_image = options.profile
    bundle = Bundle.load(options.bundle) if options.bundle else None
    records = bundle.frontier.records if bundle else cascades.synthetic(SAMPLES, options.seed)
    exits = records.correct.shape[0]
    if not len(fixed) == len(per_image) == len(options.mix) == len(options.max_batch_sizes) == exits:
        raise SystemExit(f"--profile, --mix and --max-batch-sizes need {exits} values, one per stage")
    setup = Setup(
        profile_of(fixed, per_image),
        records,
        thresholds_for(records.confidence, options.mix),
        options.max_batch_sizes,
        deadline_s=options.deadline_ms / 1000,
        executors=options.executors,
    )
    images = images_of(options, setup)
    if options.trace:
        times = arrivals.read_trace(options.trace, time=options.trace_time, count=options.trace_count)[:images]
    else:
        times = ARRIVALS[options.arrivals](1.0, float(images), options.seed + 1)
    traffic = Traffic.draw(times, records, options.seed + 2, correlation=options.correlation)
    try:
        rates = maxima(setup, traffic)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    report.add("capacity, full batches", f"{setup.capacity:.0f} images/s", capacity=setup.capacity)
    for name, rate in sorted(rates.items(), key=lambda pair: -pair[1]):
        report.add(name, f"{rate:8.1f} images/s", **{f"maximum_{name.replace(' ', '_')}": rate})
    if rates[SERVER]:
        figures = run(server, setup, traffic, rates[SERVER]).figures(bundle.frontier.stage_gmacs if bundle else None)
        report.figures["at_maximum"] = figures
        report.add("there: batch fill", " ".join(f"{fill:.1f}" for fill in figures["fill"]))
        report.add("there: utilisation", f"{figures['utilisation']:.3f}")
        report.add("there: p50, p99, p99.9", " ".join(f"{s * 1000:.1f}" for s in figures["latency_s"].values()) + " ms")
        report.add("there: degraded, expired", f"{figures['degraded']:.4f} {figures['expired']:.4f}")
    if options.plots:
        _plot_maximum(rates, options.plots / "simulate_maximum.png")
    return report


# --- plots ------------------------------------------------------------------------------------------------------------


def _plot_compare(rows: Sequence[dict[str, Any]], ratios: NDArray[np.float64], path: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150)
    order = np.argsort(ratios)
    for size, colour in zip(BATCH_SIZES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        at = [place for place, row in enumerate(order) if rows[row]["max_batch_size"] == size]
        left.plot(at, ratios[order][at], "o", ms=4, color=colour, label=f"batches up to {size}")
    left.axhline(1, color="black", lw=0.8)
    left.set_xlabel("configuration, by ratio")
    left.set_ylabel("goodput over the best baseline's")
    left.legend()
    left.grid(alpha=0.3)
    names = [name for name in rows[0]["rates"] if name != SERVER]
    right.boxplot([np.minimum(1 / _over(rows, name), 2) for name in names], orientation="horizontal", whis=(0, 100))
    right.axvline(1, color="black", lw=0.8)
    right.set_yticks(range(1, len(names) + 1), names)
    right.set_xlabel("baseline's goodput over the server's policy (whiskers: all)")
    right.grid(alpha=0.3, axis="x")
    figure.suptitle(f"Goodput at {TARGET:.0%} in deadline, {len(rows)} simulated configurations")
    save(figure, path)


def _plot_overload(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4.2), dpi=150)
    for load in rows[0]["loads"]:
        axes.plot(np.sort([_over_delay(row["loads"][load]) for row in rows]), "o-", ms=3, label=f"{load} times")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xlabel("configuration, by ratio")
    axes.set_ylabel("correct in time over the best fixed delay's")
    axes.set_title("Overload at fixed thresholds, offered load over the capacity")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def _plot_p99(points: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4.2), dpi=150)
    for name in P99_PROFILES:
        here = [point for point in points if point["profile"] == name]
        axes.plot([p["load"] for p in here], [p["over_law"] for p in here], "o-", ms=4, label=f"{name} (a/b)")
    axes.axhspan(0.88, 1.12, color="tab:gray", alpha=0.15, label="12 %")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xlabel("load: rate times device seconds of an image")
    axes.set_ylabel(f"simulated p99 over {LAW} T")
    axes.set_title("T = sum of fixed costs / (1 - load); Poisson arrivals, batches without a bound")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def _plot_maximum(rates: dict[str, float], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 3.6), dpi=150)
    names = sorted(rates, key=lambda name: rates[name])
    colours = ["tab:blue" if name == SERVER else "tab:gray" for name in names]
    axes.barh(names, [rates[name] for name in names], color=colours)
    axes.set_xlabel(f"images/s at {TARGET:.0%} in deadline")
    axes.grid(alpha=0.3, axis="x")
    save(figure, path)


# --- the command line -------------------------------------------------------------------------------------------------

STUDIES = {"compare": compare, "overload": overload, "p99": p99, "maximum": one}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return finish(STUDIES[options.study](options), options)


def _parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--images",
        type=int,
        help="arrivals of one run (p99: those of 400 cycles; else those of 20 deadlines at capacity)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for simulate_<study>.json")
    parser.add_argument("--plots", type=Path, help="folder for simulate_<study>.png")
    parser.add_argument("--configurations", type=int, default=64, help="of compare and overload (default %(default)s)")
    own = parser.add_argument_group("maximum")
    own.add_argument("--bundle", type=Path, help="draw from its logged records; by default they are synthetic")
    own.add_argument("--profile", type=_profile, default=PROFILES["gpu 20"], help="a,a,a/b,b,b in ms")
    own.add_argument("--mix", type=fractions, default=MIXES[0], help="fractions at the exits (default 0.45,0.30,0.25)")
    own.add_argument("--max-batch-sizes", type=_sizes, default=(64, 64, 64), help="per stage (default 64,64,64)")
    own.add_argument("--deadline-ms", type=_positive, default=100.0)
    own.add_argument("--executors", type=int, default=1)
    own.add_argument("--arrivals", choices=ARRIVALS, default="poisson")
    own.add_argument("--correlation", type=float, default=0.0, help="of the difficulty of two images in succession")
    own.add_argument("--trace", type=Path, help="CSV of arrivals, stretched to any rate; in place of --arrivals")
    own.add_argument("--trace-time", default="timestamp", help="its column of times (default %(default)s)")
    own.add_argument("--trace-count", help="its column of arrivals per interval; without one every line is an arrival")
    options = parser.parse_args(arguments)
    options.command = command_line("simulate", sys.argv[1:] if arguments is None else arguments)
    return options


def _profile(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    parts = [tuple(float(ms) for ms in part.split(",")) for part in text.split("/")]
    if len(parts) != 2 or len(parts[0]) != len(parts[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a,a,a/b,b,b")
    return parts[0], parts[1]


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _parallel(work: Callable[[Any], dict[str, Any]], items: Sequence[Any], processes: int) -> Iterator[dict[str, Any]]:
    """The results in the order of the items."""
    if processes == 1:
        yield from map(work, items)
        return
    with Pool(processes) as pool:
        yield from pool.imap(work, items)


if __name__ == "__main__":
    sys.exit(main())
