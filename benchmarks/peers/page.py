"""peers.md and its plots, from peers.json alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plots import pyplot, save

TARGET = 0.99
OTHERS = ("C0", "C1", "C2", "C4", "C5", "C8")
PANELS = (("full model", ("full",)), ("cascade", ("cascade", "budget")))
COLOURS = {"full": "#9aa5b1", "cascade": "#3b7dd8", "budget": "#d8843b"}


def row(told: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: medians over the rounds."""
    rounds, half, double = told["closed"], _at(told, 0.5), _at(told, 2.0)
    middle = {key: median(found[key] for found in rounds) for key in ("images_per_s", "cpu_ms", "start_s", "memory_mb")}
    return middle | {
        "spread": [min(found["images_per_s"] for found in rounds), max(found["images_per_s"] for found in rounds)],
        "half_p50_ms": _median(level["p50_ms"] for level in half),
        "half_p99_ms": _median(level["p99_ms"] for level in half),
        "goodput": _median(goodput(found["levels"]) for found in told["open"]),
        "correct_at_200": _median(level["correct_in_time"] for level in double),
        "right_a_second_at_200": _median(level["correct_in_time"] * level["rate"] for level in double),
        "exit_1_held": _median(map(_held, half)),
        "failed": sum(found["failed"] for found in rounds),
        "wrong": rounds[0]["wrong"],
    }


def goodput(levels: Sequence[dict[str, Any]]) -> float:
    """The highest of the rates tried, below the first that fails, at which TARGET of all are answered in time."""
    best = 0.0
    for level in sorted(levels, key=lambda level: level["load"]):
        if level["in_time"] < TARGET:
            break
        best = level["rate"]
    return best


def _held(level: dict[str, Any]) -> float:
    """Median latency of who leaves at the first exit over that of who leaves at the last."""
    medians = list(level["p50_ms_by_exit"].values())
    return medians[0] / medians[-1] if len(medians) > 1 else float("nan")


def _at(told: dict[str, Any], load: float) -> list[dict[str, Any]]:
    return [level for found in told["open"] for level in found["levels"] if level["load"] == load]


def _median(values: Any) -> float:
    found = [value for value in values if value == value]
    return median(found) if found else float("nan")


# --- the page ---------------------------------------------------------------------------------------------------------

# Title, value, format, and whether more is better.
COLUMNS: tuple[tuple[str, str, str, bool], ...] = (
    ("images/s", "images_per_s", ".0f", True),
    ("CPU ms an image", "cpu_ms", ".2f", False),
    ("p50 at half load, ms", "half_p50_ms", ".1f", False),
    ("p99 at half load, ms", "half_p99_ms", ".1f", False),
    ("goodput, images/s", "goodput", ".0f", True),
    ("correct in time at 200 %", "correct_at_200", ".2f", True),
    ("right answers/s at 200 %", "right_a_second_at_200", ".0f", True),
    ("start, s", "start_s", ".1f", False),
    ("memory, MB", "memory_mb", ".0f", False),
)


def write(folder: Path, name: str) -> None:
    document = json.loads((folder / f"{name}.json").read_text())
    contenders = document["figures"]["contenders"]
    if contenders:
        _plot_throughput(folder / f"{name}_throughput.svg", contenders)
    if any(told["open"] for told in contenders.values()):
        _plot_loads(folder / f"{name}_loads.svg", contenders)
    (folder / f"{name}.md").write_text(_page(name, document))


def _page(name: str, document: dict[str, Any]) -> str:
    figures = document["figures"]
    contenders, machine = figures["contenders"], document["machine"]
    mix = ", ".join(f"{100 * part:.0f}" for part in figures["mix"])
    parts = [
        "# Beside its peers",
        f"Made by `{document['command']}` on {document['date']}: {machine['cpu']}, {machine['usable_cores']} cores for"
        f" server and load together, {figures['rounds']} rounds in turns, {figures['clients']} clients in the closed "
        f"loop, deadline {figures['deadline_ms']:g} ms. Bundle {figures['bundle']}; with the thresholds of the cascade"
        f" {mix} % of the photos leave at the exits. Labels: {figures['labels']}. Peers: {figures['workers']} workers,"
        f" batches of at most {figures['batch']}, a window of {figures['window_ms']:g} ms.",
        "\n".join(_table(contenders)),
        "*CPU*: of all of a server's processes, the companion that a busy machine does not move much. *Half load, 200"
        " %*: of each one's own images/s; so who is faster is asked more. *Goodput*: the highest rate tried at which "
        f"{TARGET:.0%} are answered by the deadline. *Correct in time*: of all arrivals, those answered rightly by "
        "then.",
        f"![images/s and CPU]({name}_throughput.svg)\n\n![rightly in time, by load]({name}_loads.svg)",
        "## Where ours is not first\n\n" + "\n".join(_not_first(contenders)),
        "## Batches, clients that leave, bad images, stopping\n\n" + "\n".join(_behaviour(contenders)),
        "*Fill*: images in a batch, by stage, in the closed loop. *Held*: the median latency of images of the first "
        "exit over that of the last, at half load; 1 means that who is sure waits for who is not. *Left*: of the "
        "images of clients that asked all at once and left, how many each stage ran. *Bad*: status of a bad image, "
        "and how many of the good ones beside it failed. *SIGTERM*: requests without an answer, seconds until the "
        "end, processes that remain.",
        UNFAIR,
        "## How each is set up\n\n" + "\n\n".join(_setups(figures)),
    ]
    if figures["not_raced"]:
        lines = [f"- **{which}**: {' '.join(why.split())}" for which, why in figures["not_raced"].items()]
        parts.append("## Not raced\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


UNFAIR = """\
## What is not fair

- Server and load share the cores: who answers more makes the load work more. The open-loop driver goes before all else.
- Photos come in the model's own size. Nobody resizes, which ours does quicker than most.
- The graphs were made for ours. All peers have one batch size and one window. Batches of 8, 16 and 32 and windows of 1
  to 10 ms moved the CPU an image of mosec, LitServe and Triton by a tenth at most; `--batch`, `--window-ms` try others.
- Ours hears the deadline with each request. Of its peers mosec, LitServe, BentoML, Ray Serve and Triton are told at
  their start to give up after 0.8 of it; MLServer cannot be told. What counts as in time is the same for all.
- Triton runs the stages in its Python backend: that of ONNX Runtime, in C++, is in no package of PyPI.
- It is one machine's loopback: a peer's strength on many machines, or on a GPU, does not show."""


def _table(contenders: dict[str, Any]) -> list[str]:
    names = sorted(contenders, key=lambda name: -contenders[name]["row"]["images_per_s"])
    best = {key: _best(contenders, key, more) for _, key, _, more in COLUMNS}
    lines = ["| | " + " | ".join(title for title, *_ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in names:
        told = contenders[name]["row"]
        cells = []
        for _, key, form, _ in COLUMNS:
            cell = _number(told[key], form)
            if key == "images_per_s":
                cell += f" ({told['spread'][0]:.0f} to {told['spread'][1]:.0f})"
            cells.append(f"**{cell}**" if name in best[key] else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _number(value: float, form: str) -> str:
    return format(value, form) if value == value else "none in time"


def _best(contenders: dict[str, Any], key: str, more: bool) -> set[str]:
    values = {name: told["row"][key] for name, told in contenders.items() if told["row"][key] == told["row"][key]}
    top = (max if more else min)(values.values(), default=None)
    return {name for name, value in values.items() if value == top}


def _not_first(contenders: dict[str, Any]) -> list[str]:
    """By column, and separately for the full model and for the cascade."""
    lines = []
    for what, modes in PANELS:
        among = {name: told for name, told in contenders.items() if name.split()[-1] in modes}
        own = {name: told for name, told in among.items() if name.startswith("ours ")}
        if not own or len(own) == len(among):
            continue
        for title, key, form, more in COLUMNS:
            first = sorted(_best(among, key, more))
            if first and not set(first) & set(own):
                ours = sorted(_best(own, key, more))
                best_of_ours = _number(own[ours[0]]["row"][key], form) if ours else "none"
                theirs = _number(among[first[0]]["row"][key], form)
                lines.append(
                    f"- {what}, {title}: {first[0]} {theirs}, ours {best_of_ours}. {_why(key, first[0])}".rstrip()
                )
    return lines or ["Nowhere: it is first in every column, with the full model and with the cascade."]


COMPILED = ("mosec", "triton")
WHY = {
    "start_s": "It runs every stage, and measures its batches, before it says that it is ready.",
    "half_p50_ms": "Each is asked half of its own images/s, the faster more.",
    "half_p99_ms": "Each is asked half of its own images/s, the faster more.",
    "correct_at_200": "A share of twice each one's own images/s: the column beside it says how many answers that is.",
}


def _why(key: str, first: str) -> str:
    if key in ("images_per_s", "cpu_ms") and first.split()[0] in COMPILED:
        return "Its front is compiled, where ours is Python."
    return WHY.get(key, "")


def _behaviour(contenders: dict[str, Any]) -> list[str]:
    lines = ["| | fill | held | left | bad | SIGTERM |", "|---|---|---|---|---|---|"]
    for name, told in contenders.items():
        if not told["open"]:
            continue
        first, bad, held = told["open"][0], told["closed"][0]["bad"], told["row"]["exit_1_held"]
        stop = [found["stop"] for found in told["open"]]
        cells = [
            " ".join(f"{fill:.1f}" for fill in told["closed"][0]["fill"]),
            f"{held:.2f}" if held == held else "-",
            " ".join(map(str, first["left"]["images_run"])) + f" of {first['left']['left']}",
            f"{bad['status'] or 'no answer'}; {bad['spoilt']} of {bad['beside']}",
            f"{sum(found['lost'] for found in stop)} lost; {median(found['seconds'] for found in stop):.1f} s; "
            f"{max(found['processes_left'] for found in stop)} left",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _setups(figures: dict[str, Any]) -> list[str]:
    found = []
    for name, about in figures["about"].items():
        versions = figures["peer_versions"].get(name, {})
        with_versions = ", ".join(f"{package} {version}" for package, version in versions.items())
        found.append(f"**{name}**. {about}" + (f" ({with_versions})" if with_versions else ""))
    return found


# --- plots ------------------------------------------------------------------------------------------------------------


def _plot_throughput(path: Path, contenders: dict[str, Any]) -> None:
    names = sorted(contenders, key=lambda name: contenders[name]["row"]["images_per_s"])
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 0.32 * len(names) + 1.2), sharey=True)
    colours = [COLOURS[name.split()[-1]] for name in names]
    rows = [contenders[name]["row"] for name in names]
    rates = [told["images_per_s"] for told in rows]
    spread = [
        [told["images_per_s"] - told["spread"][0] for told in rows],
        [told["spread"][1] - told["images_per_s"] for told in rows],
    ]
    left.barh(names, rates, xerr=spread, color=colours, ecolor="#444444", capsize=2)
    left.set_xlabel("images/s, closed loop")
    right.barh(names, [told["cpu_ms"] for told in rows], color=colours)
    right.set_xlabel("CPU ms an image")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        for label in axis.get_yticklabels():
            label.set_fontweight("bold" if label.get_text().startswith("ours") else "normal")
    save(figure, path)


def _plot_loads(path: Path, contenders: dict[str, Any]) -> None:
    """What comes back rightly and in time against what is offered, in images/s: the full model, and the cascade."""
    ran = {name.split()[1] for name, told in contenders.items() if told["open"]}
    panels = [(title, modes) for title, modes in PANELS if ran & set(modes)]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    peers = sorted({name.split()[0] for name in contenders} - {"ours"})
    shades = {"ours": "#d62728", **dict(zip(peers, OTHERS * 2, strict=False))}
    for axis, (title, modes) in zip(axes[0], panels, strict=True):
        for name, told in contenders.items():
            peer, mode = name.split()
            if mode in modes and told["open"]:
                levels = sorted(told["open"][0]["levels"], key=lambda level: level["rate"])
                axis.plot(
                    [level["rate"] for level in levels],
                    [level["correct_in_time"] * level["rate"] for level in levels],
                    "--" if mode == "budget" else "-",
                    marker=".",
                    color=shades[peer],
                    linewidth=2.2 if peer == "ours" else 1.2,
                    label=name if peer == "ours" else peer,
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("offered, images/s")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("answered rightly in time, images/s")
    save(figure, path)
