"""Our own kernels against the plain formulas in float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from server.engines.gpu.probe import visible_gpus

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

from server.engines.gpu import kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),
    *([pytest.mark.gpu] if visible_gpus() else []),
]

DEVICE = torch.device("cuda" if visible_gpus() else "cpu")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _what_is_not_written_is_no_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch then fills what it allocates with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses products on a GPU in that mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype)


def by_head(B: int, h: int, N: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, scaled, k and v as a stage has them: views of one product."""
    qkv = normal(B, N, 3, h, d, dtype=dtype, seed=N + d)
    qkv[:, :, 0] *= d**-0.5
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def upsampling(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Means of a few columns."""
    picked = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)).topk(min(4, columns)).indices
    return torch.zeros(rows, columns).scatter_(1, picked, 1 / picked.shape[1]).to(DEVICE, dtype)


def logits_of(q: Tensor, k: Tensor, relations: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    logits = q.double() @ k.double().transpose(-2, -1)
    return logits if relations is None else logits + rows.double() @ relations.double() @ columns.double().t()


def mixed_of(logits: Tensor, v: Tensor, keys: int) -> Tensor:
    weights = logits[..., :keys].softmax(dim=-1)
    return (weights @ v[:, :, :keys].double()).transpose(1, 2)


def within(found: Tensor, expected: Tensor, times: float = 2.0) -> None:
    """To what half precision rounds here and on the way. The interpreter cuts bfloat16 off."""
    assert found.isfinite().all()
    step = torch.finfo(found.dtype).eps
    bound = times * step * max(1.0, float(expected.abs().max()))
    assert (found.double() - expected).abs().max() <= bound


SHAPES = [  # B, h, N, d, n, keys: a stage of T2T-ViT with padding, of photo10, of the micro model, and odd ones
    (1, 3, 104, 64, 56, 101),
    (3, 2, 40, 64, 24, 37),
    (3, 2, 24, 16, 16, 17),
    (1, 2, 67, 32, 33, 67),
    (3, 1, 5, 24, 3, 4),
    (1, 1, 130, 8, 65, 1),
]
if visible_gpus():  # T2T-ViT-14's stages, as large as they are, which take an interpreter minutes
    SHAPES += [(128, 6, 56, 64, 56, 50), (128, 6, 104, 64, 56, 101), (64, 6, 200, 64, 104, 197)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("biased", "hands_on"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("tiles", list(kernels.ATTENTION))
def test_attention_mixes_values_and_hands_logits_on(
    shape: tuple[int, ...], dtype: torch.dtype, biased: bool, hands_on: bool, tiles: str
) -> None:
    B, h, N, d, n, keys = shape
    if tiles != kernels.ATTENTION_TILES and (dtype is torch.bfloat16 or N != 104):
        pytest.skip("every row of the table once is enough")
    q, k, v = by_head(B, h, N, d, dtype)
    up = upsampling(N, n, dtype)
    relations = normal(B, 3 * h, n, n, dtype=dtype) if biased else None
    state = torch.full((B, 3 * h + 2, N, N), torch.nan, dtype=dtype, device=DEVICE) if hands_on else None
    ones = torch.ones(1, 2, N, N, dtype=dtype, device=DEVICE) if hands_on else None
    matrices = (up, up) if biased else (None, None)
    with kernels.tiles("ATTENTION_TILES", tiles):
        found = kernels.attention(q, k, v, keys, relations, h, *matrices, ones, state, 2)
    own = None if relations is None else relations[:, h : 2 * h]
    logits = logits_of(q, k, own, up, up)
    assert found.shape == (B, N, h, d)
    within(found, mixed_of(logits, v, keys))
    if state is not None:
        within(state[:, 2 * h : 3 * h], logits)
        assert (state[:, 3 * h :] == 1).all()
        assert state[:, : 2 * h].isnan().all(), "other layers' parts"


def test_few_queries_and_keys_that_are_cut_off() -> None:
    """As the last block of the last stage: two rows, keys of another product, no padding among them."""
    q = normal(3, 2, 2, 32, dtype=torch.float16).transpose(1, 2).contiguous().transpose(1, 2)
    k, v = by_head(3, 2, 24, 32, torch.float16)[1:]
    k, v = k[:, :, :17], v[:, :, :17]
    up = upsampling(24, 16, torch.float16)
    relations = normal(3, 4, 16, 16, dtype=torch.float16)
    found = kernels.attention(q, k, v, 17, relations, 2, up[:2], up, None, None, 0)
    within(found, mixed_of(logits_of(q, k, relations[:, 2:], up[:2], up[:17]), v, 17))


def test_parts_whose_rows_are_not_whole_are_taken_too() -> None:
    q, k, v = (part.transpose(2, 3).contiguous().transpose(2, 3) for part in by_head(1, 2, 24, 16, torch.float16))
    found = kernels.attention(q, k, v, 20, None, 0, None, None, None, None, 0)
    within(found, mixed_of(logits_of(q, k, None, q, q), v, 20))


def test_large_logits_stay_numbers_and_padding_never_counts() -> None:
    q, k, v = by_head(1, 2, 24, 16, torch.float16)
    q, k = q * 150, k * 20  # logits of ten thousands, still below what half precision holds
    v[:, :, 17:] = 6e4
    k[:, :, 17:] = k[:, :, :1] * 2
    state = torch.full((1, 2, 24, 24), torch.nan, dtype=torch.float16, device=DEVICE)
    found = kernels.attention(q, k, v, 17, None, 0, None, None, None, state, 0)
    logits = logits_of(q, k, None, q, q)
    assert 5e3 < logits.abs().max() < 6.5e4
    within(state, logits)
    within(found, mixed_of(logits, v, 17))


@settings(max_examples=5 if visible_gpus() else 20, deadline=None)  # each is compiled
@given(st.data())
def test_attention_of_any_shape(data: st.DataObject) -> None:
    B, h, N, n = (data.draw(st.integers(1, largest)) for largest in (3, 3, 80, 40))
    d, keys = data.draw(st.integers(1, 72)), data.draw(st.integers(1, N))
    q, k, v = by_head(B, h, N, d, torch.float16)
    up, relations = upsampling(N, n, torch.float16), normal(B, h, n, n, dtype=torch.float16)
    state = torch.full((B, h, N, N), torch.nan, dtype=torch.float16, device=DEVICE)
    found = kernels.attention(q, k, v, keys, relations, 0, up, up, None, state, 0)
    logits = logits_of(q, k, relations, up, up)
    within(state, logits)
    within(found, mixed_of(logits, v, keys))


def mlp_of(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return second.double() @ F.gelu(first.double() @ x.double())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tiles", list(kernels.RELATION_MLP))
@pytest.mark.parametrize(
    ("B", "C", "hidden", "out", "P"),
    [
        (1, 88, 256, 84, 300),
        (3, 24, 40, 16, 64),
        (1, 5, 13, 4, 9),
        (1, 136, 408, 133, 130),
        (3, 16, 48, 16, 257),
        *([(16, 88, 256, 84, 104 * 104)] if visible_gpus() else []),
    ],
)
def test_the_mlp_over_relations(B: int, C: int, hidden: int, out: int, P: int, dtype: torch.dtype, tiles: str) -> None:
    if tiles != kernels.RELATION_MLP_TILES and dtype is torch.bfloat16:
        pytest.skip("every row of the table once is enough")
    x = normal(B, C, P, dtype=dtype)
    first = normal(hidden, C, dtype=dtype, seed=1, scale=C**-0.5)
    second = normal(out, hidden, dtype=dtype, seed=2, scale=hidden**-0.5)
    with kernels.tiles("RELATION_MLP_TILES", tiles):
        found = kernels.relation_mlp(x, first, second)
    within(found, mlp_of(x, first, second))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)  # positions that do not lie together
    torch.testing.assert_close(kernels.relation_mlp(apart, first, second), found)


def test_gelu_is_the_erf_form() -> None:
    """One channel through weights of one. The other form is off by percents of what is left of -2."""
    x = torch.linspace(-6, 6, 512).to(DEVICE, torch.float16).reshape(1, 1, -1)
    one = torch.ones(1, 1, dtype=torch.float16, device=DEVICE)
    found, exact = kernels.relation_mlp(x, one, one).double(), F.gelu(x.double())
    assert ((found - exact).abs() <= 1e-3 * exact.abs() + 1e-6).all()


def test_torch_is_told_their_shapes_rightly() -> None:
    q, k, v = by_head(2, 2, 24, 16, torch.float16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.attention, (q, k, v, 20, None, 0, None, None, None, None, 0), test_utils=checks)
    x, weight = normal(2, 16, 40, dtype=torch.float16), normal(16, 16, dtype=torch.float16)
    torch.library.opcheck(kernels.relation_mlp, (x, weight, weight), test_utils=checks)


@torch.inference_mode()
def test_a_compiled_program_writes_a_state_where_it_belongs_and_copies_it_nowhere() -> None:
    torch.use_deterministic_algorithms(False)
    qkv = torch.stack(by_head(2, 2, 24, 16, torch.float16))
    ones = torch.ones(1, 1, 24, 24, dtype=torch.float16, device=DEVICE)

    def program(given: Tensor, state: Tensor, answer: Tensor) -> None:
        q, k, v = given.unbind(0)
        for layer in range(2):
            last = ones if layer == 1 else None
            v = kernels.attention(q, k, v, 17, None, 0, None, None, last, state, layer).transpose(1, 2)
            q = torch.relu(q)
        answer.copy_(v)

    def run(work: object, factor: float) -> tuple[Tensor, Tensor]:
        state = torch.full((2, 5, 24, 24), torch.nan, dtype=torch.float16, device=DEVICE)
        answer = torch.full((2, 2, 24, 16), torch.nan, dtype=torch.float16, device=DEVICE)
        work(qkv * factor, state, answer)  # type: ignore[operator]
        assert state.isfinite().all()
        return state, answer

    state, answer = run(program, 1.0)
    graph = make_fx(program)(qkv, state, answer)
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(graph, backend=backend, fullgraph=True, dynamic=False)
    for factor in (1.0, 0.5):
        for one, other in zip(run(compiled, factor), run(program, factor), strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
