"""Answers for people: text that a terminal can be given, and the table of `dvt classify`.

Nothing is written here. Rows come one by one, so widths are chosen before the first: the names are known by then, and
the server tells its labels and what its exits cost.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len

from server.client import ImageError, Model, Result

_WIDEST_LABEL = 32
_LEAST_NAME = 8


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` on one line, with escapes in place of what would move the cursor, and of what `encoding` lacks.

    File names hold anything, and so do the answers of a server that is not ours.
    """
    shown = "".join(
        character if character.isprintable() or unicodedata.category(character) == "Zs" else _escaped(character)
        for character in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8, as Python keeps it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def told_apart(paths: Sequence[Path]) -> list[str]:
    """Each path's shortest ending that no other one has: the file name, and as many folders as it takes."""
    depth = dict.fromkeys(paths, 1)
    alike = set(depth)
    while alike:
        endings: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        for path in depth:
            endings[path.parts[-depth[path] :]].append(path)
        alike = {path for same in endings.values() if len(same) > 1 for path in same if depth[path] < len(path.parts)}
        for path in alike:
            depth[path] += 1
    return [str(Path(*path.parts[-depth[path] :])) for path in paths]


class Table:
    """`width`: cells of the terminal; None for a pipe, which gets everything whole."""

    def __init__(self, images: Sequence[Path], model: Model, *, width: int | None, encoding: str) -> None:
        self._encoding = encoding
        self._dots = printable("…", encoding) if "…".encode(encoding, "ignore") else "..."
        self._cut_labels = width is not None
        # In 60 columns every one counts.
        self._probability = "probability" if width is None or width >= 80 else "prob."
        labels = max((cell_len(printable(label, encoding)) for label in model.labels), default=0)
        self._label = max(5, min(labels, _WIDEST_LABEL if width is None else min(_WIDEST_LABEL, width // 4)))
        costs = [stage.gmacs for stage in model.stages] or [1.0]
        # As many decimals as show three digits of the smallest cost: points below one another.
        self._decimals = min(9, max(0, 2 - _exponent(min(costs))))
        self._cost = max(4, *(len(f"{cost:.{self._decimals}f}") for cost in costs))
        names = [printable(name, encoding) for name in told_apart(images)]
        if width is not None:
            names = self._fitting(names, max(_LEAST_NAME, width - cell_len(self._rest("", "", "", "", ""))))
        self._names = dict(zip(images, names, strict=True))
        self._name = max(5, *(cell_len(name) for name in names))

    @property
    def head(self) -> str:
        return _left("image", self._name) + self._rest("label", self._probability, "exit", "GMAC", "ms")

    def rows(self, image: Path, result: Result) -> Iterator[str]:
        """The most probable class with all the rest; further ones below it."""
        first, *others = result.predictions
        cost, took = f"{result.gmacs:.{self._decimals}f}", f"{result.timing_ms.total:.1f}"
        row = self._rest(self._shown(first.label), _percent(first.probability), str(result.exit), cost, took)
        yield _left(self._names[image], self._name) + row + ("  degraded" if result.degraded else "")
        for other in others:
            row = self._rest(self._shown(other.label), _percent(other.probability), "", "", "")
            yield " " * self._name + row.rstrip()

    def _rest(self, label: str, probability: str, exit_: str, cost: str, took: str) -> str:
        chance = f"{probability:>{max(7, len(self._probability))}}"
        return f"  {_left(label, self._label)}  {chance}  {exit_:>4}  {cost:>{self._cost}}  {took:>6}"

    def _shown(self, label: str) -> str:
        label = printable(label, self._encoding)
        if not self._cut_labels or cell_len(label) <= self._label:
            return label
        return _start(label, self._label - cell_len(self._dots)) + self._dots

    def _fitting(self, names: list[str], room: int) -> list[str]:
        """Names of at most `room` cells, cut in the middle or at the start; whole, where none of that tells apart."""
        room_left = room - cell_len(self._dots)
        for tail in (room_left * 2 // 5, room_left):
            cut = [
                name
                if cell_len(name) <= room
                else _start(name, room_left - tail) + self._dots + _start(name[::-1], tail)[::-1]
                for name in names
            ]
            if len(set(cut)) == len(set(names)):
                return cut
        return names


class Tally:
    """What came of the images so far."""

    def __init__(self) -> None:
        self._exits: Counter[int] = Counter()
        self._degraded = 0
        self._gmacs = 0.0
        self._failed: Counter[str] = Counter()

    def answered(self, result: Result) -> None:
        self._exits[result.exit] += 1
        self._degraded += result.degraded
        self._gmacs += result.gmacs

    def failed(self, error: ImageError) -> None:
        self._failed[printable(error.code)] += 1

    @property
    def failures(self) -> int:
        return self._failed.total()

    @property
    def images(self) -> int:
        return self._exits.total() + self.failures

    def __str__(self) -> str:
        answered = self._exits.total()
        parts = [f"{answered} answered"]
        if answered:
            parts += [f"{count} at exit {number}" for number, count in sorted(self._exits.items())]
            parts.append(f"mean {self._gmacs / answered:.4g} GMAC")
        if self._degraded:
            parts.append(f"{self._degraded} degraded")
        causes = ", ".join(f"{count} {cause}" for cause, count in self._failed.most_common())
        failed = f"; {self.failures} failed ({causes})" if self._failed else ""
        return f"{self.images} images: {', '.join(parts)}{failed}"


def _left(text: str, cells: int) -> str:
    return text + " " * (cells - cell_len(text))


def _start(text: str, cells: int) -> str:
    """As much of the text's start as fits."""
    while cell_len(text) > cells:
        text = text[:-1]
    return text


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _exponent(number: float) -> int:
    return int(f"{number:e}".partition("e")[2])
