"""What the card itself can do: matrix products, copies, launches. Everything else is held against these.

Legend: M, K, N of a matrix product (M, K) x (K, N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu_timing import Card
from benchmarks.harness import Report
from model.config import VARIANTS, DVTConfig

TOKENS = (50, 101, 197)
PEAKS = ("float16", "bfloat16", "float32", "tf32")
COPIES = 8  # products of a shape in one graph
TINY_CALLS = 100  # small kernels in one graph


def products(card: Card, report: Report, models: Sequence[str], small: bool, seconds: float) -> None:
    """Peaks on a big square, and what the shapes of the models leave of them."""
    side = 128 if small else 8192
    squares = {}
    for kind in PEAKS:
        n = side if "16" in kind else side // 2
        squares[kind] = (2.0 * n**3, Products(card, (n, n, n), kind, copies=1))
    spent = card.compare({kind: work for kind, (_, work) in squares.items()}, seconds / 2, rounds=3)
    for kind, (operations, _) in squares.items():
        rate = operations / spent[kind].median / 1e9
        report.add(f"peak {kind}", f"{rate:.4g} TFLOP/s, {spent[kind]}", **{f"tflops peak {kind}": rate})
    batch = 1 if small else 128
    rows = [(model, tokens) for model in models if model in VARIANTS for tokens in (TOKENS[:1] if small else TOKENS)]
    for model, tokens in rows:
        shapes = {name: (batch * tokens, *sides) for name, sides in _products_of(VARIANTS[model]).items()}
        # As a graph: products of this size are over sooner than Python launches the next.
        works = {name: card.graph(Products(card, shape, "float16", COPIES)) for name, shape in shapes.items()}
        spent = card.compare(works, seconds / 2 / len(rows), rounds=3)
        rates = {name: COPIES * 2.0 * m * k * n / spent[name].median / 1e9 for name, (m, k, n) in shapes.items()}
        what = f"{model}, batch {batch}, {tokens} tokens"
        report.add(what, ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()) + " TFLOP/s", **{what: rates})


def _products_of(config: DVTConfig) -> dict[str, tuple[int, int]]:
    """(K, N) of the products of a block whose stage reuses features."""
    D, hidden = config.embed_dim, config.mlp_hidden
    return {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D + config.reuse_dim, hidden), "fc2": (hidden, D)}


class Products:
    """So many products of random matrices, each of other ones, so that no cache holds them all."""

    def __init__(self, card: Card, shape: tuple[int, int, int], kind: str, copies: int) -> None:
        m, k, n = shape
        dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
        self._tf32 = kind == "tf32"
        self._sets = [
            (card.normal(m, k, dtype=dtype), card.normal(k, n, dtype=dtype), card.normal(m, n, dtype=dtype))
            for _ in range(copies)
        ]

    def __call__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._tf32
        for a, b, out in self._sets:
            torch.mm(a, b, out=out)


def copies(card: Card, report: Report, small: bool, seconds: float) -> None:
    """Device to device, counting bytes read and written; host to device and back, pinned."""
    count = 2**20 if small else 2**30
    source, target = card.bytes(count), card.bytes(count)
    report_rates(card, report, {"copy on the device": (2.0 * count, lambda: target.copy_(source))}, seconds / 3)
    works: dict[str, tuple[float, Callable[[], object]]] = {}
    for mib in (1,) if small else (1, 16, 256):
        there = card.host(mib * 2**20)
        here = card.bytes(mib * 2**20)
        works[f"host to device, {mib} MiB"] = (mib * 2.0**20, _copy(there, here))
        works[f"device to host, {mib} MiB"] = (mib * 2.0**20, _copy(here, there))
    report_rates(card, report, works, seconds * 2 / 3)


def _copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source, non_blocking=True)


def report_rates(
    card: Card, report: Report, works: dict[str, tuple[float, Callable[[], object]]], seconds: float
) -> dict[str, float]:
    """GB/s of works that move so many bytes."""
    spent = card.compare({name: work for name, (_, work) in works.items()}, seconds, rounds=3)
    rates = {name: moved / spent[name].median / 1e6 for name, (moved, _) in works.items()}
    for name, rate in rates.items():
        report.add(name, f"{rate:.4g} GB/s, {spent[name]}", **{f"gb_s {name}": rate})
    return rates


def launches(card: Card, report: Report, seconds: float) -> None:
    """A kernel that does next to nothing: alone, a hundred in a row, and as one graph; and waiting for it."""
    one = card.normal(1)

    def tiny() -> None:
        one.add_(1.0)

    def many() -> None:
        for _ in range(TINY_CALLS):
            tiny()

    graph_of_one, graph_of_many = card.graph(tiny), card.graph(many)
    rows = card.compare(
        {"a launch": tiny, "a graph of one": graph_of_one, f"a graph of {TINY_CALLS}": graph_of_many}, seconds / 2
    )
    waits = card.compare(
        {"a launch, waited for": tiny, "a graph of one, waited for": graph_of_one}, seconds / 2, wall=True
    )
    for name, spread in {**rows, **waits}.items():
        report.add(name, str(spread), **{f"us {name}": 1e3 * spread.median})
