"""Two kernels of our own, in Triton, for stages in half precision: what a stage is bound by there is writing and
reading logits, biases and enlarged relations, and neither writes them.

Shapes: B images, h heads, d head dim, N tokens of a stage with class token and padding, n those of the stage before,
C = L * h channels of relations.

Sums are in float32. Half precision is rounded to where a tensor core is given what was computed, and where something
is handed on: once. Tiles are powers of two, as Triton wants them; what a tile has too much is zeros, or masked.

The kernels are chosen by tables, never tuned as they run: they are launched while a graph is being recorded.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger(__name__)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""By Triton's interpreter, on a CPU: for tests."""

LOG2E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut up. `rows`: queries, or positions; `columns`: keys, or hidden channels at a time."""

    rows: int
    columns: int
    warps: int
    stages: int  # of what is fetched ahead


ATTENTION = {
    "narrow": Tiles(64, 64, 4, 2),
    "short": Tiles(64, 32, 4, 3),
    "wide": Tiles(128, 32, 8, 3),
}
RELATION_MLP = {
    "many warps": Tiles(128, 32, 8, 3),
    "few warps": Tiles(128, 32, 4, 3),
    "small": Tiles(64, 64, 4, 2),
}
ATTENTION_TILES, RELATION_MLP_TILES = "short", "small"  # the ones that are taken, as measured on an H100


@triton.jit
def _product(a, b):
    """In float32."""
    if INTERPRETED:  # whose own product takes bfloat16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)


@triton.jit
def _added(sums, a, b):
    if INTERPRETED:
        return sums + _product(a, b)
    return tl.dot(a, b, sums)


@triton.jit(do_not_specialize=["channel_in", "channel_out"])  # one kernel for all layers
def _attention(
    q, k, v, relations, rows, columns, mixed, state,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    relations_image, state_image, channel_in, channel_out,
    HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
    COARSE: tl.constexpr, ENLARGES: tl.constexpr, HANDS_ON: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of one head of one image, keys a block at a time (Dao et al., 2022)."""
    half = mixed.dtype.element_ty
    blocks: tl.constexpr = (QUERIES + ROWS - 1) // ROWS
    program = tl.program_id(0)
    image, head = (program // (blocks * HEADS)).to(tl.int64), program // blocks % HEADS
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, D)
    row_here, at_here = row < QUERIES, at < DIM
    query = tl.load(
        q + image * q_image + head * q_head + row[:, None] * q_row + at[None, :],
        mask=row_here[:, None] & at_here[None, :], other=0.0,
    )  # fmt: skip
    if ENLARGES:  # U_r M of these rows, (ROWS, n): a product with a key block's U_c^T away from the bias
        coarse = tl.arange(0, M)
        coarse_here = coarse < COARSE
        own = tl.load(
            relations + image * relations_image + (channel_in + head) * (COARSE * COARSE)
            + coarse[:, None] * COARSE + coarse[None, :],
            mask=coarse_here[:, None] & coarse_here[None, :], other=0.0,
        )  # fmt: skip
        up = tl.load(
            rows + row[:, None] * COARSE + coarse[None, :], mask=row_here[:, None] & coarse_here[None, :], other=0.0
        )
        tall = _product(up, own).to(half)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, TOKENS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_here = column < TOKENS
        there = column_here[:, None] & at_here[None, :]
        key = tl.load(
            k + image * k_image + head * k_head + column[:, None] * k_row + at[None, :], mask=there, other=0.0
        )
        value = tl.load(
            v + image * v_image + head * v_head + column[:, None] * v_row + at[None, :], mask=there, other=0.0
        )
        logits = _product(query, tl.trans(key))
        if ENLARGES:
            wide = tl.load(
                columns + column[:, None] * COARSE + coarse[None, :],
                mask=column_here[:, None] & coarse_here[None, :], other=0.0,
            )  # fmt: skip
            logits = _added(logits, tall, tl.trans(wide))
        if HANDS_ON:  # without the mask of the padding
            tl.store(
                state + image * state_image + (channel_out + head) * (QUERIES * TOKENS)
                + row[:, None] * TOKENS + column[None, :],
                logits.to(half), mask=row_here[:, None] & column_here[None, :],
            )  # fmt: skip
        scaled = tl.where((column < KEYS)[None, :], logits * LOG2E, float("-inf"))
        now = tl.maximum(largest, tl.max(scaled, 1))  # finite: the first block has the class token
        weights = tl.exp2(scaled - now[:, None])
        fade = tl.exp2(largest - now)
        total = total * fade + tl.sum(weights, 1)
        sums = _added(sums * fade[:, None], weights.to(half), value)
        largest = now
    tl.store(
        mixed + ((image * QUERIES + row[:, None]) * HEADS + head) * DIM + at[None, :],
        (sums / total[:, None]).to(half), mask=row_here[:, None] & at_here[None, :],
    )  # fmt: skip


@triton.jit
def _relation_mlp(
    x, first, second, out, x_image, x_channel,
    POSITIONS: tl.constexpr, INPUTS: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IN: tl.constexpr, IN_REST: tl.constexpr, OUT: tl.constexpr, OUT_REST: tl.constexpr,
):  # fmt: skip
    """One program: a block of positions of one image, hidden channels a block at a time. 88 channels are 64 and 32 of
    a tile, where one power of two would be 128."""
    half = out.dtype.element_ty
    blocks: tl.constexpr = (POSITIONS + ROWS - 1) // ROWS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    here = position < POSITIONS
    x += image * x_image
    out += image * (OUTPUTS * POSITIONS)
    into = tl.arange(0, IN)
    given = tl.load(
        x + into[:, None] * x_channel + position[None, :], mask=(into < INPUTS)[:, None] & here[None, :], other=0.0
    )
    given = tl.trans(given)  # (ROWS, IN)
    if IN_REST:
        into_rest = IN + tl.arange(0, IN_REST)
        given_rest = tl.load(
            x + into_rest[:, None] * x_channel + position[None, :],
            mask=(into_rest < INPUTS)[:, None] & here[None, :], other=0.0,
        )  # fmt: skip
        given_rest = tl.trans(given_rest)
    to = tl.arange(0, OUT)
    sums = tl.zeros((ROWS, OUT), tl.float32)
    if OUT_REST:
        to_rest = OUT + tl.arange(0, OUT_REST)
        sums_rest = tl.zeros((ROWS, OUT_REST), tl.float32)
    for start in range(0, HIDDEN, COLUMNS):
        hidden = start + tl.arange(0, COLUMNS)
        hidden_here = hidden < HIDDEN
        weight = tl.load(
            first + hidden[:, None] * INPUTS + into[None, :],
            mask=hidden_here[:, None] & (into < INPUTS)[None, :], other=0.0,
        )  # fmt: skip
        found = _product(given, tl.trans(weight))
        if IN_REST:
            weight_rest = tl.load(
                first + hidden[:, None] * INPUTS + into_rest[None, :],
                mask=hidden_here[:, None] & (into_rest < INPUTS)[None, :], other=0.0,
            )  # fmt: skip
            found = _added(found, given_rest, tl.trans(weight_rest))
        active = (0.5 * found * (1.0 + tl.math.erf(found * SQRT_HALF))).to(half)
        back = tl.load(
            second + to[:, None] * HIDDEN + hidden[None, :],
            mask=(to < OUTPUTS)[:, None] & hidden_here[None, :],
            other=0.0,
        )
        sums = _added(sums, active, tl.trans(back))
        if OUT_REST:
            back_rest = tl.load(
                second + to_rest[:, None] * HIDDEN + hidden[None, :],
                mask=(to_rest < OUTPUTS)[:, None] & hidden_here[None, :], other=0.0,
            )  # fmt: skip
            sums_rest = _added(sums_rest, active, tl.trans(back_rest))
    tl.store(
        out + to[None, :] * POSITIONS + position[:, None], sums.to(half), mask=(to < OUTPUTS)[None, :] & here[:, None]
    )
    if OUT_REST:
        tl.store(
            out + to_rest[None, :] * POSITIONS + position[:, None],
            sums_rest.to(half), mask=(to_rest < OUTPUTS)[None, :] & here[:, None],
        )  # fmt: skip


@torch.library.custom_op("dvt::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: int,
    relations: Optional[Tensor],  # noqa: UP045 - the operator's schema is read from the types
    channel: int,
    rows: Optional[Tensor],  # noqa: UP045
    columns: Optional[Tensor],  # noqa: UP045
    ones: Optional[Tensor],  # noqa: UP045
    state: Optional[Tensor],  # noqa: UP045
    layer: int,
) -> Tensor:
    """Softmax attention with relation reuse (paper, Eq. 8 and 9): softmax(q k^T + U_r M U_c^T) v, of which neither the
    logits nor the bias exist but in registers.

    q (B, h, N, d), scaled already; k, v (B, h, N', d): views whose rows are whole; keys: the first of N' that are not
    padding; relations (B, C, n, n), of which M are h from `channel` on; rows U_r (N, n), columns U_c (N', n)
    -> (B, N, h, d), as the projection takes it.

    state (B, L * h + ..., N, N'), what the stage hands on: the logits go to this layer's part of it, `ones` (1, ..., N,
    N') behind the last. That it is written to is not declared: torch's compiler, which then keeps what was there
    before, would copy all of it twice. Nobody else reads or writes a state in the stage that makes it, and it lies at a
    multiple of 16 bytes, or that compiler would hand on a copy.
    """
    assert state is None or state.is_contiguous()
    B, h, N, d = q.shape
    parts = [part if part.stride(3) == 1 else part.contiguous() for part in (q, k, v)]
    mixed = q.new_empty(B, N, h, d)
    n = 0
    if relations is not None:
        assert rows is not None
        assert columns is not None
        relations, rows, columns = relations.contiguous(), rows.contiguous(), columns.contiguous()
        n = relations.shape[2]
    tiles = ATTENTION[ATTENTION_TILES]
    size = min(tiles.rows, _tile(N))
    _attention[(-(-N // size) * h * B,)](
        *parts, relations, rows, columns, mixed, state,
        *(stride for part in parts for stride in part.stride()[:3]),
        0 if relations is None else relations.stride(0), 0 if state is None else state.stride(0), channel, layer * h,
        HEADS=h, DIM=d, QUERIES=N, TOKENS=k.shape[2], KEYS=keys, COARSE=n,
        ENLARGES=relations is not None, HANDS_ON=state is not None,
        ROWS=size, COLUMNS=tiles.columns, D=_tile(d), M=_tile(n),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if state is not None and ones is not None:
        state[:, (layer + 1) * h :].copy_(ones)
    return mixed


@attention.register_fake
def _(q, k, v, keys, relations, channel, rows, columns, ones, state, layer):  # noqa: ARG001
    B, h, N, d = q.shape
    return q.new_empty(B, N, h, d)


@torch.library.custom_op("dvt::relation_mlp", mutates_args=())
def relation_mlp(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The MLP over relations, W2 gelu(W1 x), gelu in its erf form: x (B, C, P), channels first, W1 (3C, C), W2 (C', 3C)
    -> (B, C', P). Biases are in the products, see `export.aligned`. Nothing in between is written."""
    B, C, P = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    first, second = first.contiguous(), second.contiguous()
    out = x.new_empty(B, len(second), P)
    tiles = RELATION_MLP[RELATION_MLP_TILES]
    (into, into_rest), (to, to_rest) = _two_tiles(C), _two_tiles(len(second))
    _relation_mlp[(-(-P // tiles.rows) * B,)](
        x, first, second, out, x.stride(0), x.stride(1),
        POSITIONS=P, INPUTS=C, HIDDEN=len(first), OUTPUTS=len(second), ROWS=tiles.rows, COLUMNS=tiles.columns,
        IN=into, IN_REST=into_rest, OUT=to, OUT_REST=to_rest,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


@relation_mlp.register_fake
def _(x, first, second):  # noqa: ARG001
    return x.new_empty(x.shape[0], len(second), x.shape[2])


def _tile(size: int) -> int:
    """The power of two that holds it, at least what tensor cores take."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def _two_tiles(size: int) -> tuple[int, int]:
    """Two powers of two that hold it together, the second 0 where the first does."""
    if _tile(size) in (16, size):
        return _tile(size), 0
    first = _tile(size) // 2
    return (first, _tile(size - first)) if _tile(size - first) < first else (2 * first, 0)


def work_on(device: torch.device) -> bool:
    """Whether they can be built and run there: Triton wants a C compiler, and a folder to write to."""
    if device.type != "cuda" and not INTERPRETED.value:
        return False
    try:
        x = torch.ones(1, 16, 16, dtype=torch.float16, device=device)
        return bool(relation_mlp(x, x[0], x[0]).isfinite().all())
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.warning("stages run without kernels of their own, as Triton cannot build them: %s", reason)
        return False


def names_of_tiles() -> dict[str, list[str]]:
    return {"ATTENTION_TILES": list(ATTENTION), "RELATION_MLP_TILES": list(RELATION_MLP)}


@contextmanager
def tiles(kernel: str, name: str) -> Iterator[None]:
    """For measurements: another row of a kernel's table."""
    settings: dict[str, Any] = globals()
    before = settings[kernel]
    settings[kernel] = name
    try:
        yield
    finally:
        settings[kernel] = before
