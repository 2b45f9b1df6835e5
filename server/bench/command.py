"""`dvt bench`: its options, and what it prints and writes."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import click
import orjson
import typer
from tqdm import tqdm

from server.client import DEFAULT_URL, ClientError
from server.terminal import printable

ARRIVALS = ("poisson", "gamma", "mmpp", "even")
PRIORITIES = ("high", "normal", "low")
_INTERRUPTED = 130
_MOST_RATES = 1000


def bench(
    images: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGES",
            help="A folder of images, in folders by class where the labels are known; or a .npy of uint8 (N, H, W, 3). "
            "By default photos made by code.",
        ),
    ] = None,
    url: Annotated[
        str, typer.Option("--url", envvar="DVT_URL", metavar="URL", help="The server to load.", show_default=True)
    ] = DEFAULT_URL,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="N|Nx|N,N,...",
            help="Requests a second; 1.5x: of what the server answers when asked as fast as can be, measured before; "
            "a list: one after the other.  [default: 50; of a trace its own]",
        ),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(metavar="|".join(ARRIVALS), help="How requests come; with a list of rates, poisson.")
    ] = "poisson",
    cv: Annotated[float, typer.Option(min=0.05, max=16, help="Of gamma: standard deviation over mean of gaps.")] = 4.0,
    burst: Annotated[float, typer.Option(min=1, max=1000, help="Of mmpp: rate in a burst over that outside.")] = 3.0,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Moments from a file: CSV, JSON lines, or a number a line.")
    ] = None,
    trace_time: Annotated[str, typer.Option(metavar="NAME", help="The trace's column of times.")] = "timestamp",
    trace_count: Annotated[
        str | None, typer.Option(metavar="NAME", help="The trace's column of counts, where a line is an interval.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Closed loop in place of arrivals: so many ask again once answered."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, max=86_400, help="Length of what is measured.  [default: 10, or the trace's]"),
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="End after so many requests, if that is earlier.")] = None,
    warm_up: Annotated[float, typer.Option(min=0, max=3600, help="Seconds of load before, at the same rate.")] = 1.0,
    timeout_ms: Annotated[
        float | None, typer.Option(min=1, help="The server's deadline; what is answered later is late.")
    ] = None,
    together: Annotated[int, typer.Option(min=1, max=1024, help="Images a request.")] = 1,
    top_k: Annotated[int, typer.Option(min=1, help="Classes an image.")] = 1,
    max_exit: Annotated[int | None, typer.Option(min=1, help="Passed on to the server.")] = None,
    min_confidence: Annotated[float | None, typer.Option(min=0, max=1, help="Passed on to the server.")] = None,
    priority: Annotated[str | None, typer.Option(metavar="high|normal|low", help="Passed on to the server.")] = None,
    leaving: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that hang up after 50 ms.")] = 0.0,
    slow: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that take a second to send.")] = 0.0,
    spoilt: Annotated[float, typer.Option(min=0, max=1, help="Share of requests with a broken image.")] = 0.0,
    distinct: Annotated[int, typer.Option(min=1, max=100_000, help="Different images, at most.")] = 50,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that send.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, images and clients.")] = 0,
    give_up: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds after which a client gives up.")] = 30.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report there, a page of HTML.")] = None,
    json_out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Load a running server, and tell how it does.

    Open loop: requests come at moments that are fixed in advance, whether the server is ready or not, and a latency
    counts from that moment. What the driver itself was late, and how fast it could be at most, is told, too. Ctrl-C
    ends the load, and what was measured until then is told. The exit status is 1 where requests failed.

    \b
    Examples:
      dvt bench
      dvt bench --rate 200 --seconds 30 --timeout-ms 100 --out report.html
      dvt bench photo10/test --rate 2x --timeout-ms 200 --together 4
      dvt bench --rate 50,200,50 --seconds 30
      dvt bench --arrivals gamma --cv 8 --rate 100
      dvt bench --trace requests.csv --trace-time at --seconds 60
      dvt bench --clients 32 --json | jq .rates.images_per_s
    """
    given = dict(locals())
    if arrivals not in ARRIVALS:
        raise click.UsageError(f"--arrivals is {', '.join(ARRIVALS[:-1])} or {ARRIVALS[-1]}, not {arrivals}")
    if priority not in (None, *PRIORITIES):
        raise click.UsageError(f"--priority is high, normal or low, not {priority}")
    if leaving + slow + spoilt > 1:
        raise click.UsageError("--leaving, --slow and --spoilt are shares of the same clients: at most 1 together")
    if clients is not None and (rate is not None or trace is not None or requests is not None):
        raise click.UsageError("--clients asks in a closed loop: it goes with none of --rate, --trace and --requests")
    rates, relative = _rates(rate)
    if len(rates) > 1 and (trace is not None or arrivals != "poisson"):
        raise click.UsageError("a --rate that changes goes with neither --trace nor --arrivals")
    for file in (out, json_out):  # an hour of load should not end in this
        if file is not None and not os.path.isdir(file.parent):
            raise click.UsageError(f"{file}: no such folder")
    # Heavy, and not needed for --help.
    import aiohttp  # noqa: F401 - here, where its absence is told in one line, and not by a process that sends

    from server.bench.measure import Load, NoLoad, measure
    from server.bench.page import page
    from server.bench.senders import DriverFailed
    from server.bench.workload import WorkloadError

    load = Load(
        **{field.name: given[field.name] for field in fields(Load) if field.name in given}
        | {"rates": rates, "relative": relative}
    )
    with tqdm(
        unit="s",
        desc="load",
        disable=as_json or not sys.stderr.isatty(),
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s",
    ) as bar:

        def progress(so_far: float, total: float) -> None:
            bar.total = total
            bar.update(max(0.0, so_far - bar.n))

        try:
            document = measure(url.rstrip("/"), load, progress)
        except NoLoad as error:
            raise click.UsageError(str(error)) from None
        except (ClientError, DriverFailed, WorkloadError) as error:
            raise click.ClickException(str(error)) from None
    click.echo(orjson.dumps(document).decode() if as_json else table(document))
    for doubt in document["doubts"]:
        click.echo(f"Warning: {doubt}", err=True)
    if json_out is not None:
        _write(json_out, orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if out is not None:
        _write(out, page(document).encode())
    counts = document["requests"]
    if document["interrupted"]:
        raise typer.Exit(_INTERRUPTED)
    if counts["failed"] or counts["unanswered"]:
        raise typer.Exit(1)


def _rates(text: str | None) -> tuple[tuple[float, ...], bool]:
    """`50`, `50,100` or `1.5x`: the numbers, and whether they are multiples of a capacity. Raises click.UsageError."""
    parts = [] if text is None else text.split(",")
    try:
        rates = tuple(float(part.removesuffix("x")) for part in parts)
    except ValueError:
        raise click.UsageError(f"--rate is requests a second, as 50, 50,200,50 or 1.5x, not {text}") from None
    relative = {part.endswith("x") for part in parts}
    if len(relative) > 1:
        raise click.UsageError("--rate is either in requests a second or in multiples (x), not both")
    if parts and not (0 <= min(rates) <= max(rates) < math.inf and max(rates) > 0 and len(rates) <= _MOST_RATES):
        raise click.UsageError(f"--rate takes numbers above 0, not {text}")
    return rates, relative == {True}


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise click.ClickException(f"{path}: {str(error.strerror).lower()}") from None


def table(document: dict[str, Any]) -> str:
    """For people."""
    counts, shares, rates, images = (document[name] for name in ("requests", "shares", "rates", "images"))
    sent = counts["sent"]
    lines = [
        ("sent", f"{sent} requests in {rates['seconds']:.1f} s, {rates['offered_per_s']:.1f} a second"),
        ("answered in time", f"{_percent(shares['in_time'])}, {rates['in_time_per_s']:.1f} a second"),
    ]
    if images["correct_in_time_share"] is not None:
        correct = f"{_percent(images['correct_in_time_share'])} of {images['labelled']} labelled images"
        lines.append(("correct in time", correct))
    other = [(name, counts[name]) for name in ("late", "refused", "expired", "failed", "unanswered")]
    lines.append(("others", ", ".join(f"{count} {name}" for name, count in other)))
    if document["errors"]:
        causes = (f"{count} {printable(cause)}" for cause, count in list(document["errors"].items())[:8])
        lines.append(("causes", ", ".join(causes)))
    for name, odd in document["odd_clients"].items():
        told = ", ".join(f"{count} {outcome}" for outcome, count in odd.items() if count and outcome != "sent")
        lines.append((f"{name} clients", f"{odd['sent']} sent: {told}"))
    lines.append(("images", _images(images)))
    for name, of in (("all", document["latency_ms"]["all"]), *document["latency_ms"]["by_exit"].items()):
        if of["count"]:
            what = "latency" if name == "all" else f"  exit {name}"
            lines.append((what, ", ".join(f"{q} {of[q]:.1f}" for q in ("p50", "p90", "p99", "p99.9", "max")) + " ms"))
    driver = document["driver"]
    late = driver["late_ms"]
    told = (
        "closed loop"
        if late is None or not late["count"]
        else f"late by p50 {late['p50']:.2f}, p99 {late['p99']:.2f} ms"
    )
    ceiling = f"at most {driver['ceiling_per_s']:.0f} requests/s ({driver['processes']} process"
    ceiling += "es)" if driver["processes"] > 1 else ")"
    lines.append(("driver", f"{told}; {ceiling}; {driver['cpu_us_per_request']:.0f} us of CPU a request"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _images(images: dict[str, Any]) -> str:
    answered = images["answered"]
    if not answered:
        return "none answered"
    exits = ", ".join(f"{count / answered:.0%} at exit {exit_}" for exit_, count in images["by_exit"].items())
    cost = "" if images["gmacs"] is None else f", mean {images['gmacs']:.4g} GMAC"
    return f"{answered} answered, {exits}, {images['degraded']} degraded{cost}"


def _percent(share: float | None) -> str:
    return "nothing sent" if share is None else f"{100 * share:.2f} %"
