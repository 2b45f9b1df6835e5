"""`dvt evaluate BUNDLE IMAGES --report DIR`: what a bundle does with labelled images, as a page with plots.

One folder: `index.html`, the plots as PNG, thumbnails as JPEG, and `report.json` with every number on the page. It
needs no network and no script.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from server.bundle.frontier import FrontierRow, Records, evaluate_thresholds
from server.bundle.manifest import Bundle
from server.calibration.calibrate import Example, record
from server.calibration.evaluate import Evaluation, evaluate
from server.calibration.families import genetic, geometric
from server.core import Engine, Slot, StageBatch, StageOutput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 15  # of confidence, for the calibration error
SHARES = (0.3, 0.4, 0.5, 0.65, 0.8)  # of the last exit's cost: budgets that the genetic algorithm is given
PER_CLASS = 4  # easy images, and as many hard ones
CLASSES = 20  # at most, in the gallery
THUMBNAIL = 96  # pixels

Probabilities = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """How far an exit's confidence is from how often it is right."""

    accuracy: float
    confidence: float  # mean
    ece: float  # expected calibration error, BINS bins of equal width (Guo et al., 2017)
    temperature: float  # that its logits would have to be divided by
    ece_after: float  # with temperatures that other images tell: each half's from the other half


class Recording(Engine):
    """An engine that keeps the probabilities it gives, stage by stage. For one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.executors, self.max_slots = engine.name, engine.executors, engine.max_slots
        self.num_stages, self.num_classes = engine.num_stages, engine.num_classes
        self.input_size, self.max_batch_sizes = engine.input_size, engine.max_batch_sizes
        self.runtime, self.device, self.own_cores = engine.runtime, engine.device, engine.own_cores
        self._kept: list[list[Probabilities]] = [[] for _ in range(engine.num_stages)]

    @property
    def slots_in_use(self) -> int:
        return self._engine.slots_in_use

    @property
    def probabilities(self) -> list[Probabilities]:
        """Of every exit, (N, K)."""
        return [np.concatenate(parts) for parts in self._kept]

    def run(self, batch: StageBatch) -> StageOutput:
        output = self._engine.run(batch)
        self._kept[batch.stage - 1].append(np.array(output.probabilities))
        return output

    def free(self, slots: Sequence[Slot]) -> None:
        self._engine.free(slots)

    def warm_up(self) -> None:
        self._engine.warm_up()

    def close(self) -> None:
        self._engine.close()


def write_report(
    bundle: Bundle, engine: Engine, examples: Sequence[Example], out: Path, progress: bool = False
) -> Path:
    """Run every image through every stage and write the report into `out`. Returns the path of the page.

    Raises FileExistsError where `out` holds anything, CalibrationError for an image that cannot be read.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    recording = Recording(engine)
    records = record(bundle, recording, examples, progress=progress)
    probabilities = recording.probabilities
    labels = np.array([label for _, label in examples])
    evaluation = evaluate(bundle.frontier, records)
    calibrations = [calibration(p, labels) for p in probabilities]
    out.mkdir(parents=True, exist_ok=True)
    _plot_curve(bundle, records, evaluation, out / "curve.png")
    _plot_exits(bundle, records, out / "exits.png")
    _plot_calibration(probabilities, labels, calibrations, out / "calibration.png")
    gallery = _gallery(bundle, records.correct, probabilities, examples, out)
    counts = np.bincount(first_right(records.correct), minlength=len(records.correct) + 1).tolist()
    document = {
        "evaluation": asdict(evaluation),
        "calibration": [asdict(c) for c in calibrations],
        "first_right": {"exits": counts[1:], "none": counts[0]},
        "gallery": gallery,
    }
    (out / "report.json").write_text(json.dumps(document, indent=2) + "\n")
    page = out / "index.html"
    page.write_text(_page(bundle, evaluation, calibrations, counts, gallery), encoding="utf-8")
    return page


def calibration(probabilities: Probabilities, labels: NDArray[np.int64]) -> Calibration:
    """probabilities (N, K), labels (N,)."""
    log = np.log(np.maximum(probabilities.astype(np.float64), 1e-12))
    right = probabilities.argmax(axis=1) == labels
    confidence = probabilities.max(axis=1)
    return Calibration(
        accuracy=float(right.mean()),
        confidence=float(confidence.mean()),
        ece=calibration_error(confidence, right),
        temperature=_temperature(log, labels),
        ece_after=calibration_error(_cross_fitted(log, labels).max(axis=1), right),
    )


def _cross_fitted(log: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities (N, K) at the temperature that the other half of the images tells; as they are where there is no
    other half. On the images that it was fitted to any temperature looks better than it is."""
    order = np.random.default_rng(0).permutation(len(labels))
    halves = (order[::2], order[1::2])
    fitted = np.empty_like(log)
    for mine, others in (halves, halves[::-1]):
        fitted[mine] = _softmax(log[mine] / (_temperature(log[others], labels[others]) if len(others) else 1.0))
    return fitted


def calibration_error(confidence: NDArray[Any], right: NDArray[np.bool_]) -> float:
    """Mean distance of accuracy from confidence over bins of confidence, weighted by their images."""
    at = np.minimum((np.asarray(confidence, dtype=np.float64) * BINS).astype(int), BINS - 1)
    gap = np.bincount(at, weights=right.astype(np.float64) - confidence, minlength=BINS)
    return float(np.abs(gap).sum() / len(right))


def _temperature(log: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Of the smallest negative log-likelihood, 0.2 to 5, by golden section on its logarithm: it has one minimum."""

    def loss(t: float) -> float:
        scaled = log / np.exp(t)
        top = scaled.max(axis=1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((total - scaled[np.arange(len(labels)), labels]).mean())

    low, high, golden = np.log(0.2), np.log(5.0), (np.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


# --- plots ------------------------------------------------------------------------------------------------------------


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, list[Axes]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_curve(bundle: Bundle, records: Records, evaluation: Evaluation, path: Path) -> None:
    """Accuracy against cost (Figures 6 to 8 of the paper), thresholds from calibration, accuracy on these images."""
    frontier = bundle.frontier
    costs, logged = frontier.stage_gmacs, frontier.records
    figure, (axes,) = _axes(7, 4.5)

    def draw(rows: Sequence[FrontierRow], style: str, label: str) -> None:
        judged = sorted(
            (evaluate_thresholds(records, row.thresholds, costs) for row in rows), key=lambda row: row.gmacs
        )
        axes.plot([row.gmacs for row in judged], [row.accuracy * 100 for row in judged], style, label=label)

    draw(frontier.rows, "-" if len(frontier.rows) > 1 else "o", "frontier")
    if logged is not None and len(costs) > 1:
        c, r = logged.confidence, logged.correct
        draw(geometric(c, r, costs), "--", "geometric family")
        draw([genetic(c, r, costs, share * costs[-1]) for share in SHARES], "^", "genetic algorithm")
    axes.plot(costs, [a * 100 for a in evaluation.exit_accuracy], "ks", label="all leave at one exit")
    axes.set(xlabel="mean GMAC per image", ylabel="top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _plot_exits(bundle: Bundle, records: Records, path: Path) -> None:
    """Where images leave, by budget (Figure 10)."""
    frontier = bundle.frontier
    judged = [evaluate_thresholds(records, row.thresholds, frontier.stage_gmacs) for row in frontier.rows]
    fractions = np.array([row.exit_fractions for row in judged]).T * 100
    figure, (axes,) = _axes(7, 3.5)
    names = [f"exit {number}" for number in range(1, len(fractions) + 1)]
    if len(judged) == 1:
        for name, part, below in zip(names, fractions, fractions.cumsum(axis=0) - fractions, strict=True):
            axes.bar([f"{frontier.knee.gmacs:.4g}"], part, bottom=below, label=name, alpha=0.85)
    else:
        axes.stackplot([row.gmacs for row in frontier.rows], fractions, labels=names, alpha=0.85)
    axes.set(xlabel="budget, mean GMAC per image", ylabel="images, %", ylim=(0, 100))
    axes.margins(x=0)
    axes.legend(loc="lower left")
    _save(figure, path)


def _plot_calibration(
    probabilities: list[Probabilities], labels: NDArray[np.int64], found: list[Calibration], path: Path
) -> None:
    """How often an exit is right at each confidence."""
    figure, columns = _axes(3.2 * len(probabilities), 3.4, len(probabilities))
    for number, (axes, p, c) in enumerate(zip(columns, probabilities, found, strict=True), start=1):
        confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
        at = np.minimum((confidence * BINS).astype(int), BINS - 1)
        counts = np.bincount(at, minlength=BINS)
        filled = counts > 0
        rates = np.bincount(at, weights=right, minlength=BINS)[filled] / counts[filled]
        axes.bar((np.arange(BINS)[filled] + 0.5) / BINS, rates, width=1 / BINS, edgecolor="white")
        axes.plot([0, 1], [0, 1], "k--", linewidth=1)
        axes.set(title=f"exit {number}: ECE {c.ece:.3f}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    columns[0].set_ylabel("right")
    _save(figure, path)


# --- gallery and page -------------------------------------------------------------------------------------------------


def first_right(correct: NDArray[np.bool_]) -> NDArray[np.intp]:
    """correct (E, N) -> (N,) the first exit, from 1, that is right, whatever would leave there; 0: none is."""
    return np.where(correct.any(axis=0), correct.argmax(axis=0) + 1, 0)


def _gallery(
    bundle: Bundle,
    correct: NDArray[np.bool_],
    probabilities: list[Probabilities],
    examples: Sequence[Example],
    out: Path,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Per class images that the first exit has right, and such as none before the last has (Figure 9): of the former
    those of which it is surest, of the latter those that the last exit is surest of."""
    from PIL import Image, ImageOps

    first, last = first_right(correct), len(correct)
    answers = [[bundle.manifest.labels[k] for k in p.argmax(axis=1)] for p in probabilities]
    labels = np.array([label for _, label in examples])
    gallery: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for label in np.unique(labels)[:CLASSES].tolist():
        shown: dict[str, list[dict[str, Any]]] = {}
        for kind, exit_ in [("easy", 1)] + [("hard", last)] * (last > 1):
            mine = np.flatnonzero((labels == label) & (first == exit_))
            surest = mine[np.argsort(-probabilities[exit_ - 1][mine].max(axis=1), kind="stable")]
            shown[kind] = []
            for index in surest[:PER_CLASS].tolist():
                name = f"{kind}-{label}-{index}.jpg"
                with Image.open(examples[index][0]) as image:
                    small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (THUMBNAIL, THUMBNAIL))
                small.save(out / name, quality=85)
                shown[kind].append({"file": name, "answers": [answer[index] for answer in answers]})
        gallery[bundle.manifest.labels[label]] = shown
    return gallery


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child { text-align: left; }
img.plot { max-width: 100%; } .images img { width: 5rem; height: 5rem; margin: 2px; }
.images td, .images th { text-align: left; vertical-align: middle; }
"""


def _page(
    bundle: Bundle,
    evaluation: Evaluation,
    calibrations: Sequence[Calibration],
    counts: list[int],
    gallery: dict[str, dict[str, list[dict[str, Any]]]],
) -> str:
    name = html.escape(f"{bundle.manifest.name} {bundle.manifest.version}")
    exits = [
        (f"exit {number}", f"{c.accuracy:.2%}", f"{gmacs:.4g}", f"{c.confidence:.3f}", f"{c.ece:.3f}",
         f"{c.temperature:.2f}", f"{c.ece_after:.3f}")
        for number, (c, gmacs) in enumerate(zip(calibrations, evaluation.stage_gmacs, strict=True), start=1)
    ]  # fmt: skip
    points = [
        (budget, f"{row.accuracy:.2%}", f"{row.gmacs:.4g}", " ".join(f"{f:.0%}" for f in row.exit_fractions))
        for budget, row in evaluation.points.items()
    ]
    images = [(html.escape(label), *map(_images, kinds.values())) for label, kinds in gallery.items()]
    last = len(calibrations)
    shown = [f"first right at exit {number}" for number in sorted({1, last})]
    spread = ", ".join(f"{count} at exit {number}" for number, count in enumerate(counts[1:], start=1))
    origin = "calibration" if bundle.frontier.source == "calibration" else "the imported checkpoint"
    family = evaluation.geometric_area
    compared = "" if family is None else f"; of the geometric family: {family:.4f}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head><body>
<h1>{name}</h1>
<p>{evaluation.images} images. Thresholds come from {origin}, everything else from these images.</p>
<h2>Accuracy against cost</h2>
<img class="plot" src="curve.png" alt="top-1 accuracy against mean cost">
{_table(("budget, share of the last exit", "top-1", "mean GMAC", "leave at each exit"), points)}
<p>Area under the budget curve: {evaluation.area:.4f}{compared}.</p>
<h2>Where images leave</h2>
<img class="plot" src="exits.png" alt="share of the images at each exit, by budget">
<h2>Confidence</h2>
<p>ECE: mean distance of accuracy from confidence. Temperature: what the logits would have to be divided by; the last
column judges each half of the images by the temperature of the other half.</p>
<img class="plot" src="calibration.png" alt="how often each exit is right, by confidence">
{_table(("", "top-1", "GMAC so far", "mean confidence", "ECE", "temperature", "ECE with it"), exits)}
<h2>Easy and hard images</h2>
<p>Images by the first exit that has them right, whatever the thresholds: {spread}, {counts[0]} at none. Shown are those
that it is surest of; under the mouse, the answers of all exits.</p>
<div class="images">{_table(("class", *shown), images)}</div>
</body></html>
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>" for tag, row in _tagged(head, rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def _tagged(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return [("th", head), *(("td", row) for row in rows)]


def _images(shown: Sequence[dict[str, Any]]) -> str:
    return "".join(
        f'<img src="{image["file"]}" title="{html.escape(answers)}" alt="{html.escape(answers)}">'
        for image in shown
        for answers in [", then ".join(image["answers"])]
    )
