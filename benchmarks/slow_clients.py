"""Clients that hold connections and hardly use them, many at once: when the server closes them, what others feel.

Kinds: `header` and `body` send one byte now and then, `idle` nothing (every other one after one answer), `deaf` many
requests whose answers it never reads. Each kind by itself, then all together, each time with a new server. A connection
that the server closes is made again, so the crowd stays.

Beside them others ask at a steady rate, far below what the server can do: POST /classify of a small JPEG, open loop.
First alone, then beside a `polite` crowd that is as large and asks for something small as often as the others send a
byte, then beside the slow ones. The driver shares the machine with the server, and so do the polite: ratios count.

The server's time limits are short here, so that a run ends in minutes; --setting changes them.

    taskset -c 0,1 python -m benchmarks.slow_clients --out
    taskset -c 0,1 python -m benchmarks.slow_clients --kinds body --setting body_timeout_s=2 --setting max_requests=2000
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks.clients import classify
from benchmarks.dawdlers import KINDS, POLITE, Crowd, Held, raise_open_files
from benchmarks.harness import Options, Report, Server, finish, load_bundle, parse, quantile_ms
from benchmarks.open_loop import Shot, fire
from server.bench.photos import photos

SETTINGS = {"header_timeout_s": "5", "body_timeout_s": "5", "keep_alive_timeout_s": "5", "send_timeout_s": "5"}
TOGETHER = "together"
SIDE = 96  # pixels
TARGET = 1.5  # p99 of the others beside slow clients over that alone


def main(arguments: list[str] | None = None) -> int:
    options = parse("slow_clients", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(images=20)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, TOGETHER), default=(*KINDS, TOGETHER), help="(all)")
    parser.add_argument("--connections", type=int, default=500, help="of each kind (default %(default)s)")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two bytes (default %(default)s)")
    parser.add_argument("--pipelined", type=int, default=1000, help="requests of a deaf one (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="that the slow stay (default %(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="requests of the others a second (%(default)s)")
    parser.add_argument(
        "--setting",
        action="append",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="of the server, DVT_NAME; by default " + " ".join(f"{name}={value}" for name, value in SETTINGS.items()),
    )


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name.lower().removeprefix("dvt_"), value


def measure(options: Options) -> Report:
    report = Report("slow_clients")
    bundle = load_bundle(options)
    raise_open_files()
    settings = SETTINGS | dict(options.setting)
    report.figures |= {"settings": settings, "seconds": options.seconds, "rate": options.rate}
    requests = [classify(small(file)) for file in photos(options.images)]
    for kind in options.kinds:
        with Server(bundle.path, **settings) as server:
            _measure_kind(report, options, server, kind, requests)
    return report


def small(file: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(file)).resize((SIDE, SIDE)).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def _measure_kind(report: Report, options: Options, server: Server, kind: str, requests: Sequence[bytes]) -> None:
    kinds = KINDS if kind == TOGETHER else (kind,)

    def others() -> list[Shot]:
        times = np.arange(1, math.ceil(options.rate * options.seconds) + 1) / options.rate
        return fire(server.port, requests, np.arange(len(times)) % len(requests), times)

    def crowd(kinds: Sequence[str], each: int) -> Crowd:
        return Crowd(server.port, kinds, each, options.pause, options.pipelined)

    others()  # the first of everything takes longer
    alone = others()
    with crowd((POLITE,), options.connections * len(kinds)) as polite:
        beside_polite = others()
    before_mb = server.resident_mb()
    server.reset_peak()
    with crowd(kinds, options.connections) as slow:
        beside_slow = others()
    peak_mb = server.peak_mb()

    report.add(f"{kind}: connections", str(options.connections * len(kinds)))
    kept = {each: _tell_held(report, kind, each, slow.held) for each in kinds}
    figures: dict[str, float] = {}
    for what, shots in (("alone", alone), ("beside polite", beside_polite), ("beside slow", beside_slow)):
        seconds = [shot.seconds for shot in shots if shot.status == 200]
        p50, p99 = quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.99)
        key = f"{kind}_{what.replace(' ', '_')}"
        figures |= {f"{key}_p50_ms": p50, f"{key}_p99_ms": p99}
        statuses = _words(Counter(shot.status for shot in shots))
        report.add(f"  others {what}", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms; {statuses}")
        report.figures |= {name: _known(value) for name, value in figures.items()}
    for share in ("p50", "p99"):
        now = figures[f"{kind}_beside_slow_{share}_ms"]
        to_alone, to_polite = (now / figures[f"{kind}_{what}_{share}_ms"] for what in ("alone", "beside_polite"))
        target = f" (target {TARGET})" if share == "p99" else ""
        report.add(
            f"  {share} beside slow",
            f"{to_alone:.2f} x alone{target}, {to_polite:.2f} x beside polite",
            **{f"{kind}_{share}_ratio": _known(to_alone), f"{kind}_{share}_ratio_to_polite": _known(to_polite)},
        )
    report.add(
        "  memory of the server",
        f"{before_mb:.0f} MB before, at most {peak_mb:.0f} MB",
        **{f"{kind}_before_mb": before_mb, f"{kind}_peak_mb": peak_mb},
    )
    refused = sum(shot.status == 503 for shot in beside_slow)
    lost = sum(shot.status != 200 for shot in [*alone, *beside_polite, *beside_slow]) - refused
    report.must_be_zero("  others refused (503) beside slow", refused, **{f"{kind}_refused": refused})
    report.must_be_zero("  others without an answer, or another", lost, **{f"{kind}_lost": lost})
    report.must_be_zero("  slow ones never closed", sum(kept.values()), **{f"{kind}_never_closed": kept})
    closed = sum(held.closed for held in polite.held)
    report.must_be_zero("  polite ones closed", closed)
    report.must_be_zero("  connections that could not be made", slow.refused + polite.refused)


def _tell_held(report: Report, of: str, kind: str, held: Sequence[Held]) -> int:
    """Report after how long connections of a kind were closed; how many never were."""
    mine = [one for one in held if one.kind == kind]
    seconds = sorted(one.seconds for one in mine if one.closed)
    never = sum(one.first and not one.closed for one in mine)
    statuses: Counter[int] = sum((one.statuses for one in mine), Counter())
    key = f"{of}_{kind}" if of == TOGETHER else kind
    words = "none closed"
    if seconds:
        low, median, high = seconds[0], float(np.median(seconds)), seconds[-1]
        words = f"closed after {low:.1f} / {median:.1f} / {high:.1f} s (min, median, max), {len(seconds)} times"
        report.figures[f"{key}_closed_after_s"] = [low, median, high]
    answers = f"; answers read {_words(statuses)}" if statuses else ""
    report.add(f"  {kind}", f"{words}; {never} never{answers}", **{f"{key}_statuses": statuses})
    return never


def _known(value: float) -> float | None:
    """JSON has no other word for what there is not: nobody was answered."""
    return value if math.isfinite(value) else None


def _words(statuses: Counter[int]) -> str:
    return ", ".join(f"{status or 'none'}: {count}" for status, count in sorted(statuses.items()))


if __name__ == "__main__":
    sys.exit(main())
