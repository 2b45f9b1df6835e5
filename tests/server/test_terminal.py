"""Text for a terminal: made harmless, told apart, in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from server.client import ImageError, Model, Result
from server.terminal import Table, Tally, printable, told_apart

MODEL = Model.model_validate({"labels": ["cat", "house"], "stages": [{"gmacs": 0.0218336}, {"gmacs": 0.134}]})
WORDS = st.sampled_from(["a", "b", "c", "cat.jpg"])
PATHS = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(lambda parts: Path(*parts)), min_size=1, max_size=12)
# What a file may be called: no zero and no slash; bytes that are not UTF-8 are kept as surrogates.
NAMES = st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=30).filter(lambda name: name != ".")
ENCODINGS = st.sampled_from(["ascii", "latin-1", "utf-8", "cp1252"])


def result(label: str = "cat", *, exit_: int = 1, gmacs: float = 0.0218336, degraded: bool = False) -> Result:
    return Result.model_validate(
        {
            "predictions": [{"label": label, "probability": 0.9312}, {"label": "house", "probability": 0.01}],
            "exit": exit_,
            "degraded": degraded,
            "gmacs": gmacs,
            "timing_ms": {"total": 3.14},
        }
    )


@given(st.text(st.characters()), ENCODINGS)
@example("\x1b]0;title\x07", "utf-8")
@example("\udcff\u202e\x9b31m\x7f", "utf-8")
def test_what_is_printed_moves_no_cursor_and_can_be_encoded(text: str, encoding: str) -> None:
    shown = printable(text, encoding)
    shown.encode(encoding)
    assert "\n" not in shown
    assert all(character.isprintable() or character.isspace() for character in shown)
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in shown)


def test_escapes_say_what_was_there() -> None:
    assert printable("a\tb\x1b[31m\udce9\u202ex.jpg") == r"a\tb\x1b[31m\xe9\u202ex.jpg"
    assert printable("日本 é\u202fx") == "日本 é\u202fx"
    assert printable("日é", "latin-1") == r"\u65e5é"


@given(PATHS)
def test_different_paths_are_told_apart_by_their_shortest_endings(paths: list[Path]) -> None:
    names = told_apart(paths)
    assert len(set(names)) == len(set(paths))
    for path, name in zip(paths, names, strict=True):
        parts = Path(name).parts
        assert path.parts[-len(parts) :] == parts
        shorter = parts[1:]
        assert not shorter or any(other.parts[-len(shorter) :] == shorter for other in paths if other != path)


def test_folders_are_named_where_names_are_the_same() -> None:
    paths = [Path("x/one/cat.jpg"), Path("x/two/cat.jpg"), Path("y/two/cat.jpg"), Path("x/dog.jpg"), Path("x/dog.jpg")]
    assert told_apart(paths) == ["one/cat.jpg", "x/two/cat.jpg", "y/two/cat.jpg", "dog.jpg", "dog.jpg"]


def test_rows_stand_in_columns() -> None:
    images = [Path("photos/日本.jpg"), Path("photos/a-long-name.jpg")]
    table = Table(images, MODEL, width=None, encoding="utf-8")
    assert "\n".join(
        [
            table.head,
            *table.rows(images[0], result()),
            *table.rows(images[1], result("house", exit_=2, gmacs=0.134, degraded=True)),
        ]
    ) == (
        "image            label  probability  exit    GMAC      ms\n"
        "日本.jpg         cat         93.1 %     1  0.0218     3.1\n"
        "                 house        1.0 %\n"
        "a-long-name.jpg  house       93.1 %     2  0.1340     3.1  degraded\n"
        "                 house        1.0 %"
    )


@given(st.lists(NAMES, min_size=1, max_size=6), st.none() | st.integers(20, 200), ENCODINGS)
def test_whatever_the_names_columns_stay(names: list[str], width: int | None, encoding: str) -> None:
    images = [Path(name) for name in names]
    table = Table(images, MODEL, width=width, encoding=encoding)
    table.head.encode(encoding)
    for image in images:
        row, further = table.rows(image, result())
        row.encode(encoding)
        assert cell_len(row) == cell_len(table.head)
        assert further.startswith(" " * (cell_len(table.head.partition("label")[0])))


def test_on_a_narrow_terminal_long_names_are_cut_as_long_as_that_tells_them_apart() -> None:
    def shown(names: list[str], encoding: str = "utf-8") -> list[str]:
        images = [Path(name) for name in names]
        table = Table(images, MODEL, width=60, encoding=encoding)
        rows = [next(table.rows(image, result())) for image in images]
        return [row.split("  ")[0] for row in rows if len(row) == len(table.head)]

    long = "x" * 40
    assert all(len(name) <= 24 for name in shown([f"one{long}.jpg", f"two{long}.jpg"]))
    assert shown([f"one{long}.jpg", f"two{long}.jpg"]) == ["onexxxxxxxxxx…xxxx.jpg", "twoxxxxxxxxxx…xxxx.jpg"]
    assert shown([f"one{long}.jpg"], "ascii") == ["onexxxxxxxxx...xxx.jpg"]
    assert shown([f"{long}123456789.jpg", f"{long}023456789.jpg"]) == [
        "…xxxxxxxx123456789.jpg",
        "…xxxxxxxx023456789.jpg",
    ]
    alike = [f"{long}1{long}.jpg", f"{long}2{long}.jpg"]
    assert shown(alike) == alike, "whole, and wider than the terminal"


def test_long_labels_are_cut_on_a_terminal_only() -> None:
    model = Model.model_validate({"labels": ["l" * 100], "stages": [{"gmacs": 1.0}]})
    image = Path("cat.jpg")
    piped = next(Table([image], model, width=None, encoding="utf-8").rows(image, result("l" * 100)))
    assert "l" * 100 in piped
    table = Table([image], model, width=80, encoding="utf-8")
    assert "l" * 19 + "…" in next(table.rows(image, result("l" * 100)))
    assert len(table.head) <= 80


@pytest.mark.parametrize("costs", [[], [0.0], [1e-300], [1e12]])
def test_costs_of_any_size_have_a_column(costs: list[float]) -> None:
    model = Model.model_validate({"labels": [], "stages": [{"gmacs": cost} for cost in costs]})
    assert len(Table([Path("x")], model, width=80, encoding="utf-8").head) < 80


def test_the_tally_says_what_came_of_the_images() -> None:
    tally = Tally()
    assert str(tally) == "0 images: 0 answered"
    for answer in (result(), result(exit_=3, gmacs=0.134), result(exit_=3, gmacs=0.134, degraded=True)):
        tally.answered(answer)
    for code in ("bad_image", "bad_image", "overloaded"):
        tally.failed(ImageError("", code=code))
    assert (tally.images, tally.failures) == (6, 3)
    assert str(tally) == (
        "6 images: 3 answered, 1 at exit 1, 2 at exit 3, mean 0.09661 GMAC, 1 degraded; "
        "3 failed (2 bad_image, 1 overloaded)"
    )


def test_a_tally_names_no_raw_code() -> None:
    tally: Any = Tally()
    tally.failed(ImageError("", code="\x1b[31m"))
    assert "\x1b" not in str(tally)
