"""The report as one page: no script, nothing from the network, plots as SVG written here. Readable by day and night.

What a server says of itself, and names of files, may be anything: all text goes through `_text`.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 480, 280  # of a plot; it grows and shrinks with the page
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 42
_OUTCOMES = {
    "in_time": "answered in time",
    "late": "answered late",
    "refused": "refused (503)",
    "expired": "expired (504)",
    "failed": "failed",
    "unanswered": "no answer",
}
_LINES = 6  # colours of exits

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1d2430; --soft: #5d6777; --line: #dfe3e9; --card: #f6f7f9;
  --warn: #8a4b00; --warn-ground: #fff1dc; --c1: #1f6fb8; --c2: #c8641b; --c3: #2f8a57; --c4: #8250b4; --c5: #b23a6b;
  --c6: #6b7480; --in_time: #2f8a57; --late: #d9a21b; --refused: #7d8ba0; --expired: #8d6cc0; --failed: #cf3f3f;
  --unanswered: #7a1f2e; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --ink: #e4e8ee; --soft: #9aa5b4; --line: #303844;
  --card: #1a2028; --warn: #ffc876; --warn-ground: #3a2a10; --c1: #6db3f2; --c2: #f2a15f; --c3: #6fcf97; --c4: #bb9af7;
  --c5: #f07ba8; --c6: #aab4c0; --in_time: #55b37f; --late: #e3b94c; --refused: #8fa0b8; --expired: #a98be0;
  --failed: #ef6f6f; --unanswered: #c2596b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); }
.doubt { background: var(--warn-ground); color: var(--warn); padding: .6rem .8rem; border-radius: 6px;
  margin: .8rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem; }
.wide { grid-column: 1 / -1; } .scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; font: 14px system-ui, sans-serif; } svg text { fill: var(--soft); }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.all { stroke: var(--ink); stroke-dasharray: 5 3; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 0; padding: 0; list-style: none; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
td, th { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); font-weight: 400; }
th { color: var(--soft); } td:first-child, th:first-child { text-align: left; padding-left: 0; white-space: normal; }
details { margin-top: .8rem; } pre { overflow-x: auto; font-size: 12px; }
"""


def page(document: dict[str, Any]) -> str:
    """The document of `measure` as HTML."""
    model = _model(document)
    load = document["load"]
    curves = document["curves"]
    lines = [("all", "of all that were sent", _steps(curves["all"], document["shares"]["answered"] or 0.0))]
    lines += [(f"c{_colour(exit_)}", f"exit {exit_}", _steps(ms)) for exit_, ms in curves["by_exit"].items()]
    over = document["over_time"]
    moments = [(number + 0.5) * over["slice_s"] for number in range(len(over["sent_per_s"]))]
    rates = [
        (name, label, list(zip(moments, over[f"{key}_per_s"], strict=True)))
        for name, label, key in (("all", "sent", "sent"), ("c1", "answered", "answered"), ("c3", "in time", "in_time"))
    ]
    slow = [("c2", "p99", run) for run in _runs(zip(moments, over["p99_ms"], strict=True))]
    closed = " Closed loop: a latency counts from the client's own sending." if load["clients"] else ""
    stopped = " Stopped before its end." if document["interrupted"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(model)}: load report</title><style>{_STYLE}</style></head><body>
<h1>{_text(model)}</h1>
<p class="soft">{_text(_described(document))}.{closed}{stopped}</p>
{"".join(f'<p class="doubt">{_text(doubt)}</p>' for doubt in document["doubts"])}
<div class="tiles">{_tiles(document)}</div>
<div class="plots">
<section><h2>Latency: the share that is answered within</h2>
{_plot(lines, x="milliseconds", logarithmic=True, top=1.0, y_format=_percent)}
{_legend((name, label) for name, label, _ in lines)}</section>
<section><h2>Requests a second, by the moment of the request</h2>
{_plot(rates, x="seconds")}
{_legend((name, label) for name, label, _ in rates)}</section>
<section class="wide"><h2>What became of {document["requests"]["sent"]} requests</h2>{_outcomes(document)}</section>
<section class="wide"><h2>Milliseconds from the scheduled moment</h2>
<div class="scroll">{_latencies(document)}</div></section>
<section><h2>p99 over time, milliseconds</h2>{_plot(slow, x="seconds")}</section>
<section><h2>Images</h2><div class="scroll">{_images(document)}</div></section>
<section><h2>The driver</h2><div class="scroll">{_driver(document)}</div></section>
</div>
<details><summary>Everything that was asked for</summary><pre>{_text(json.dumps(load, indent=1))}</pre></details>
<p class="soft">dvt bench {_text(document["release"])}, {_text(document["date"])}, {_text(document["machine"])}</p>
</body></html>
"""


def _model(document: dict[str, Any]) -> str:
    model = (document["server"]["before"] or {}).get("model") or {}
    name = " ".join(str(model[key]) for key in ("name", "version") if isinstance(model.get(key), str))
    return name or str(document["url"])


def _described(document: dict[str, Any]) -> str:
    load, rates = document["load"], document["rates"]
    if load["clients"]:
        how = f"{load['clients']} clients that ask again once they are answered"
    elif load["trace"]:
        how = f"the moments of {load['trace']}"
    else:
        name = "steps" if len(load["rates"]) > 1 else load["arrivals"]
        how = f"{name} arrivals, seed {load['seed']}"
    parts = [how, f"{rates['offered_per_s']:.1f} requests a second for {rates['seconds']:.1f} s"]
    if load["together"] > 1:
        parts.append(f"{load['together']} images a request")
    if load["timeout_ms"] is not None:
        parts.append(f"deadline {load['timeout_ms']:g} ms")
    if load["capacity_per_s"] is not None:
        parts.append(f"capacity measured before: {load['capacity_per_s']:.1f} requests a second")
    return ", ".join(parts)


def _tiles(document: dict[str, Any]) -> str:
    shares, rates, images, latency = (document[name] for name in ("shares", "rates", "images", "latency_ms"))
    tiles = [("answered in time", _percent(shares["in_time"]))]
    if images["correct_in_time_share"] is not None:
        tiles.append(("correct in time", _percent(images["correct_in_time_share"])))
    tiles += [
        ("in time, a second", _number(rates["in_time_per_s"])),
        ("p50, ms", _number(latency["all"]["p50"])),
        ("p99, ms", _number(latency["all"]["p99"])),
        ("degraded images", _percent(images["degraded"] / images["answered"] if images["answered"] else None)),
    ]
    return "".join(f'<div class="tile"><span class="soft">{name}</span><b>{value}</b></div>' for name, value in tiles)


def _outcomes(document: dict[str, Any]) -> str:
    requests = document["requests"]
    sent = max(1, requests["sent"])
    bar, at = [], 0.0
    for name in _OUTCOMES:
        width = 1000 * requests[name] / sent
        if width:
            bar.append(f'<rect x="{at:.2f}" width="{width:.2f}" height="28" style="fill: var(--{name})"/>')
        at += width
    label = ", ".join(f"{requests[name]} {text}" for name, text in _OUTCOMES.items())
    # Stretched: a bar has no proportions to keep.
    picture = (
        f'<svg viewBox="0 0 1000 28" preserveAspectRatio="none" style="height: 28px" role="img" '
        f'aria-label="{_text(label)}">{"".join(bar)}</svg>'
    )
    legend = _legend(
        (name, f"{text}: {requests[name]} ({_percent(requests[name] / sent)})") for name, text in _OUTCOMES.items()
    )
    causes = "".join(f"<tr><td>{_text(cause)}</td><td>{count}</td></tr>" for cause, count in document["errors"].items())
    told = f"<table><tr><th>cause</th><th>requests</th></tr>{causes}</table>" if causes else ""
    odd = "".join(
        f"<p>{name} clients, besides: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        + "</p>"
        for name, counts in document["odd_clients"].items()
    )
    return picture + legend + told + odd


def _latencies(document: dict[str, Any]) -> str:
    latency = document["latency_ms"]
    columns = ("count", "mean", "p50", "p90", "p99", "p99.9", "max")
    rows = [("all answers", latency["all"]), *((f"exit {exit_}", of) for exit_, of in latency["by_exit"].items())]
    for exit_, parts in document["server_ms"].items():
        rows += [(f"exit {exit_}: {part}", of) for part, of in parts.items() if of["count"] and part != "total"]
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{_number(of[column])}</td>" for column in columns) + "</tr>"
        for name, of in rows
    )
    return f"<table><tr><th></th>{''.join(f'<th>{column}</th>' for column in columns)}</tr>{body}</table>"


def _images(document: dict[str, Any]) -> str:
    images = document["images"]
    rows = [("sent", images["sent"]), ("answered", images["answered"])]
    rows += [
        (f"left at exit {exit_}", f"{count} ({_percent(count / images['answered'])})")
        for exit_, count in images["by_exit"].items()
    ]
    rows += [
        ("degraded", images["degraded"]),
        ("mean GMAC", _number(images["gmacs"])),
        ("labelled", images["labelled"]),
    ]
    if images["labelled"]:
        rows.append(("correct in time, of all labelled", _percent(images["correct_in_time_share"])))
        rows.append(("correct, of those answered", _percent(images["accuracy"])))
    return _pairs(rows)


def _driver(document: dict[str, Any]) -> str:
    driver = document["driver"]
    late = driver["late_ms"]
    rows: list[tuple[str, Any]] = [
        ("processes", driver["processes"]),
        ("most requests a second", _number(driver["ceiling_per_s"])),
        ("CPU a request, microseconds", _number(driver["cpu_us_per_request"])),
    ]
    if late is not None:
        rows += [(f"late by, ms, {name}", _number(late[name])) for name in ("p50", "p99", "max")]
    return _pairs(rows)


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    return "<table>" + "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows) + "</table>"


# --- plots ------------------------------------------------------------------------------------------------------------


def _plot(
    lines: Sequence[tuple[str, str, Points]],
    *,
    x: str,
    logarithmic: bool = False,
    top: float | None = None,
    y_format: Any = None,
) -> str:
    """Lines by class, label and points. y begins at 0, and x too, unless it is logarithmic."""
    points = [point for _, _, line in lines for point in line]
    if not points:
        return '<p class="soft">nothing was answered</p>'
    xs, ys = [at for at, _ in points], [value for _, value in points]
    if logarithmic:
        ticks = _decades(max(min(xs), 1e-3), max(xs))
        low, high = math.log(ticks[0]), math.log(ticks[-1])
    else:
        ticks = _round_ticks(max(xs))
        low, high = 0.0, max(xs[-1], ticks[-1])
    y_ticks = [0, 0.25, 0.5, 0.75, 1.0] if top else _round_ticks(max(ys))
    most = y_ticks[-1]

    def across(value: float) -> float:
        value = math.log(max(value, 1e-3)) if logarithmic else value
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / most

    parts = []
    for tick in y_ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        shown = (y_format or _number)(tick)
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{shown}</text>')
    for tick in _thinned(ticks):
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        anchor = "end" if at > _WIDTH - _RIGHT - 10 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="{anchor}">{_number(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{x}</text>')
    for name, _, line in lines:
        path = " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in line)
        style = "" if name == "all" else f' style="stroke: var(--{name})"'
        if len(line) == 1:  # a line of one point is none
            ((at, value),) = line
            parts.append(f'<circle class="dot {name}"{style} cx="{across(at):.1f}" cy="{up(value):.1f}" r="2"/>')
        elif line:
            parts.append(f'<polyline class="curve {name}"{style} points="{path}"/>')
    label = "; ".join(label for _, label, _ in lines)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)}">{"".join(parts)}</svg>'


def _steps(ms: Sequence[float], top: float = 1.0) -> Points:
    """A distribution is a staircase: two answers are two steps, and no slope from the one to the other."""
    stairs = []
    for number, at in enumerate(ms):
        stairs += [(at, top * number / len(ms)), (at, top * (number + 1) / len(ms))]
    return stairs


def _runs(points: Iterable[tuple[float, float | None]]) -> list[Points]:
    """Without what is not there, and no line across it."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is not None:
            runs[-1].append((at, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around a span."""
    first = 10.0 ** math.floor(math.log10(low))
    ticks = [first * 10**n * m for n in range(math.ceil(math.log10(high / first)) + 2) for m in (1, 2, 5)]
    begin = max(n for n, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = next(n for n, tick in enumerate(ticks) if tick >= high and n > begin)
    return ticks[begin : end + 1]


def _round_ticks(most: float) -> list[float]:
    """From 0 to `most` or a little above, four to six of them."""
    if most < 1e-6:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * 5 >= most)
    return [step * n for n in range(math.ceil(most / step - 1e-9) + 1)]


def _thinned(ticks: Sequence[float]) -> Sequence[float]:
    """No more than have room."""
    return ticks if len(ticks) <= 10 else ticks[:: -(-len(ticks) // 10)]


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><i style="background: var(--{"ink" if name == "all" else name})"></i>{_text(label)}</li>'
        for name, label in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _colour(exit_: str) -> int:
    return (int(exit_) - 1) % _LINES + 1


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %" if share != 1 else "100 %"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _text(text: object) -> str:
    return html.escape(str(text))
