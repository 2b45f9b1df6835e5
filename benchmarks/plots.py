"""Plots of benchmarks: one figure, without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def figure() -> Any:
    """The axes of a new figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    axes.grid(alpha=0.3)
    return axes


def save(axes: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.tight_layout()
    axes.figure.savefig(path)
