"""What the card itself can do: matrix products, copies, launches. Everything else is held against these.

Legend: M, K, N of a matrix product (M, K) x (K, N); B images in a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu_timing import Card
from benchmarks.harness import Report

# The products of a stage by model: (K, N) of queries, keys and values, both of the MLP (reuse adds 48), the projection.
PRODUCTS = {
    "t2t-vit-12": {"qkv": (256, 768), "proj": (256, 256), "fc1": (304, 512), "fc2": (512, 256)},
    "t2t-vit-14": {"qkv": (384, 1152), "proj": (384, 384), "fc1": (432, 1152), "fc2": (1152, 384)},
}
TOKENS = (50, 101, 197)
PEAKS = ("float16", "bfloat16", "float32", "tf32")
TINY_CALLS = 100  # small kernels in one graph


def products(card: Card, report: Report, models: Sequence[str], small: bool, seconds: float) -> None:
    """Peaks on a big square, and what the shapes of the models leave of them."""
    side = 128 if small else 8192
    squares = {}
    for kind in PEAKS:
        n = side if "16" in kind else side // 2
        squares[kind] = (2.0 * n**3, _product(card, [(n, n, n)], kind, copies=2))
    _tell(card, report, "peak", squares, seconds)
    batch = 1 if small else 128
    shapes = {
        f"{model} {name}, {tokens} tokens": (batch * tokens, *PRODUCTS[model][name])
        for model in models
        if model in PRODUCTS
        for tokens in (TOKENS[:1] if small else TOKENS)
        for name in PRODUCTS[model]
    }
    works = {name: (2.0 * m * k * n, _product(card, [(m, k, n)], "float16", copies=4)) for name, (m, k, n) in shapes.items()}
    _tell(card, report, f"float16, batch {batch}:", works, seconds, times=False)


def _product(card: Card, shapes: list[tuple[int, int, int]], kind: str, copies: int) -> Callable[[], None]:
    """Products of random matrices, from one set of operands to the next, so that no cache holds them all."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    sets = [(card.normal(m, k, dtype=dtype), card.normal(k, n, dtype=dtype)) for m, k, n in shapes * copies]
    results = [torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=card.device) for a, b in sets]
    turn = itertools.cycle(zip(sets, results, strict=True))

    def work() -> None:
        (a, b), out = next(turn)
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        torch.mm(a, b, out=out)

    return work


def _tell(
    card: Card, report: Report, what: str, works: dict[str, tuple[float, Callable[[], None]]], seconds: float, times: bool = True
) -> None:
    spent = card.compare({name: work for name, (_, work) in works.items()}, seconds, rounds=3)
    for name, (operations, _) in works.items():
        rate = operations / spent[name].median / 1e9
        shown = f"{rate:.4g} TFLOP/s" + (f", {spent[name]}" if times else "")
        report.add(f"{what} {name}", shown, **{f"tflops {what} {name}": rate})


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
    rows = card.compare({"a launch": tiny, "a graph of one": graph_of_one, f"a graph of {TINY_CALLS}": graph_of_many}, seconds / 2)
    waits = card.compare({"a launch, waited for": tiny, "a graph of one, waited for": graph_of_one}, seconds / 2, wall=True)
    for name, spread in {**rows, **waits}.items():
        report.add(name, str(spread), **{f"us {name}": 1e3 * spread.median})
