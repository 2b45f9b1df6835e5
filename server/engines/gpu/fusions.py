"""What kernels of our own take over in the graph of a stage in half precision, see `kernels`: attention whose logits
are handed on or whose bias is enlarged relations, and the MLP over relations. It is found in graphs as `export` writes
them; anything else stays as it is, and so does everything where Triton is not there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from server.engines.gpu.torch_stage import Kernel, _Bound, _Node

ATTENTION, RELATION_MLP, STATE = "RelationAttention", "RelationMlp", "RelationState"
HALF = (torch.float16, torch.bfloat16)
MASKED = -1e4  # or less: a key of padding
# What a kernel keeps in registers grows with it.
LARGEST_HEAD = 128  # dim
LARGEST_GRID = 128  # tokens of the stage before
LARGEST_RELATIONS = 256  # channels


@functools.cache
def run_on(device: torch.device) -> bool:
    """Whether our kernels do. Triton comes with torch for CUDA, and not with torch for CPUs."""
    try:
        from server.engines.gpu import kernels
    except ImportError:
        return False
    return kernels.work_on(device)


def fuse(nodes: Sequence[_Node], constants: dict[str, Tensor], outputs: frozenset[str]) -> list[_Node]:
    """The nodes of a graph with ours among them; some of the others are needed no more. What follows from constants
    alone is among `constants` already."""
    return _Fusions(nodes, constants, outputs).nodes


@dataclass(frozen=True)
class _Bias:
    """U_r M U_c^T."""

    relations: str  # (B, C, n, n)
    channel: int  # where M begins in it
    channels: int
    rows: str  # U_r (N, n)
    columns: str  # U_c (N', n)


@dataclass(frozen=True)
class _Attention:
    """softmax(q k^T + bias + mask) v, at the node that gives it."""

    node: _Node
    qkv: tuple[str, str, str]
    heads: int
    bias: _Bias | None
    keys: int | None  # that the mask leaves, the first ones; None: there is no mask
    logits: str  # before the mask


class _Fusions:
    def __init__(self, nodes: Sequence[_Node], constants: dict[str, Tensor], outputs: frozenset[str]) -> None:
        self._constants = constants
        self._by_output = {name: node for node in nodes for name in node.outputs if name}
        self._order = {node.outputs[0]: at for at, node in enumerate(nodes)}
        self._uses = Counter(name for node in nodes for name in node.inputs)
        self._uses.update(outputs)
        found = {one.logits: one for node in nodes if (one := self._attention(node)) is not None}
        ours: dict[str, list[_Node]] = {}  # by what the node gives whose place they take
        for node in nodes:
            if (mlp := self._relation_mlp(node)) is not None:
                ours[node.outputs[0]] = [mlp]
            elif node.operator == "Concat" and node.outputs[0] in outputs and self._uses[node.outputs[0]] == 1:
                ours |= self._handing_on(node, found)
        for one in found.values():
            if self._uses[one.logits] == 1:  # nobody else's
                ours[one.node.outputs[0]] = [self._fused(one)]
        self.nodes = [new for node in nodes for new in ours.get(node.outputs[0], [node])]

    def _attention(self, node: _Node) -> _Attention | None:
        softmax = self._alone(node.inputs[0], "Softmax") if node.operator == "MatMul" else None
        if softmax is None or softmax.get("axis", -1) not in (-1, 3):
            return None
        logits, keys = self._unmasked(softmax.inputs[0])
        bias, product = None, self._made(logits, "MatMul")
        if (added := self._made(logits, "Add")) is not None:
            for one, other in (added.inputs, added.inputs[::-1]):
                if product is None and (bias := self._bias(other)) is not None:
                    product = self._alone(one, "MatMul")
        if product is None or (bias is None and keys is None):
            return None  # without either, torch's own kernel writes no logits, too
        transposed = self._made(product.inputs[1], "Transpose")
        if transposed is None or transposed.get("perm", None) != [0, 1, 3, 2]:
            return None
        qkv = (product.inputs[0], transposed.inputs[0], node.inputs[1])
        shapes = [self._by_head(name) for name in qkv]
        heads, dim = shapes[0] or (0, 0)
        fits = shapes == [(heads, dim)] * 3 and 0 < dim <= LARGEST_HEAD
        if not fits or (bias is not None and bias.channels != heads):
            return None
        return _Attention(node, qkv, heads, bias, keys, logits)

    def _unmasked(self, name: str) -> tuple[str, int | None]:
        """The logits below a mask of padding, and how many keys it leaves."""
        node = self._alone(name, "Add")
        for logits, other in () if node is None else (node.inputs, node.inputs[::-1]):
            if (mask := self._half(other, 1)) is not None:
                keys = int((mask == 0).sum())
                if keys and not mask[:keys].any() and bool((mask[keys:] <= MASKED).all()):
                    return logits, keys
        return name, None

    def _by_head(self, name: str) -> tuple[int, int] | None:
        """h and d of a part (B, h, N, d) of what was reshaped to (B, N, h, d) or (B, N, parts, h, d)."""
        node = self._by_output.get(name)
        while node is not None and node.operator in ("Slice", "Squeeze", "Gather", "Split", "Transpose"):
            if node.operator == "Transpose" and node.get("perm", None) not in ([2, 0, 3, 1, 4], [0, 2, 1, 3]):
                return None
            node = self._by_output.get(node.inputs[0])
        shape = self._shape(node)
        return (shape[-2], shape[-1]) if len(shape) in (4, 5) and min(shape[-2:]) > 0 else None

    def _bias(self, name: str) -> _Bias | None:
        """Relations of one layer, enlarged an axis at a time, and cut to the keys that are no padding."""
        cut = self._made(name, "Slice")
        if cut is not None and self._range(cut, 3, 4)[:1] == (0,):
            name = cut.inputs[0]
        outer = self._alone(name, "MatMul")
        if outer is None:
            return None
        left, right = outer.inputs
        if self._half(left, 2) is not None:  # U_r (M U_c^T), the inner one maybe on all rows of all heads
            split = self._alone(right, "Reshape")
            inner = self._alone(right if split is None else split.inputs[0], "MatMul")
            merged = None if inner is None or split is None else self._alone(inner.inputs[0], "Reshape")
            if inner is None or (split is None) != (merged is None):
                return None
            own, rows, columns = inner.inputs[0] if merged is None else merged.inputs[0], left, inner.inputs[1]
        else:  # (U_r M) U_c^T
            inner, split, merged = self._alone(left, "MatMul"), None, None
            if inner is None:
                return None
            own, rows, columns = inner.inputs[1], inner.inputs[0], right
        part = self._made(own, "Slice")
        up, across = self._half(rows, 2), self._half(columns, 2)
        if part is None or up is None or across is None:
            return None
        shape, channels = self._shape(self._made(part.inputs[0], "Reshape")), self._range(part, 1, 4)
        if len(shape) != 4 or not channels:
            return None
        start, count = channels[0], min(channels[1], shape[1]) - channels[0]
        n = shape[3]
        if not (shape[2] == n == up.shape[1] == across.shape[0] <= LARGEST_GRID) or start < 0 or count < 1:
            return None
        if self._shape(merged)[1:] not in ([], [count * n, n]) or self._shape(split)[1:3] not in ([], [count, n]):
            return None
        by_rows = f"{columns} by rows"
        self._constants[by_rows] = across.t().contiguous()
        return _Bias(part.inputs[0], start, count, rows, by_rows)

    def _handing_on(self, node: _Node, found: Mapping[str, _Attention]) -> dict[str, list[_Node]]:
        """Layers whose logits are handed on, one after the other, and behind them maybe what is alike for all images:
        each writes its own there. Nothing, where it is anything else."""
        layers = [found[name] for name in node.inputs if name in found and self._uses[name] == 2]
        rest = node.inputs[len(layers) :]
        expand = self._made(rest[0], "Expand") if rest else None
        ones = self._half(expand.inputs[0], 4) if expand is not None else None
        if (
            node.get("axis", 0) != 1
            or [one.logits for one in layers] != list(node.inputs[: len(layers)])
            or len({one.heads for one in layers}) != 1
            or len(set(node.inputs)) != len(node.inputs)
            or len(rest) > 1
            or (rest and (expand is None or ones is None or len(ones) != 1))
        ):
            return {}
        (state,) = node.outputs
        last = expand.inputs[0] if expand is not None else ""
        ours = {
            one.node.outputs[0]: [self._fused(one, layer, state, last if layer == len(layers) - 1 else "")]
            for layer, one in enumerate(layers)
        }
        first = min(layers, key=lambda one: self._order[one.node.outputs[0]])
        channels = len(layers) * first.heads + (0 if ones is None else ones.shape[1])
        made = replace(node, operator=STATE, inputs=first.qkv[:2], attributes={"channels": channels})
        ours[first.node.outputs[0]].insert(0, made)
        return {**ours, state: []}

    def _fused(self, one: _Attention, layer: int = 0, state: str = "", ones: str = "") -> _Node:
        bias = one.bias or _Bias("", 0, 0, "", "")
        inputs = (*one.qkv, bias.relations, bias.rows, bias.columns, ones)
        attributes = {"keys": one.keys, "channel": bias.channel, "layer": layer}
        return replace(one.node, operator=ATTENTION, inputs=inputs, attributes=attributes, writes=state)

    def _relation_mlp(self, node: _Node) -> _Node | None:
        """W2 gelu(W1 x), x (B, C, P)."""
        second = self._half(node.inputs[0], 2) if node.operator == "MatMul" else None
        gelu = None if second is None else self._alone(node.inputs[1], "Gelu")
        product = None if gelu is None else self._alone(gelu.inputs[0], "MatMul")
        if second is None or gelu is None or product is None or gelu.get("approximate", b"none") != b"none":
            return None
        first, x = self._half(product.inputs[0], 2), product.inputs[1]
        if first is None or len(self._shape(self._made(x, "Reshape"))) != 3:
            return None
        if max(first.shape[1], len(second)) > LARGEST_RELATIONS:
            return None
        return replace(node, operator=RELATION_MLP, inputs=(x, product.inputs[0], node.inputs[0]), attributes={})

    def _made(self, name: str, operator: str) -> _Node | None:
        """What gives it, where it is such an operator."""
        node = self._by_output.get(name)
        return node if node is not None and node.operator == operator else None

    def _alone(self, name: str, operator: str) -> _Node | None:
        """Likewise, where nobody else takes it."""
        return self._made(name, operator) if self._uses[name] == 1 else None

    def _half(self, name: str, dim: int) -> Tensor | None:
        """A constant in half precision."""
        constant = self._constants.get(name)
        return constant if constant is not None and constant.dtype in HALF and constant.dim() == dim else None

    def _shape(self, reshape: _Node | None) -> list[int]:
        """What it makes, [] where that is not known."""
        sizes = (
            self._constants.get(reshape.inputs[1]) if reshape is not None and reshape.operator == "Reshape" else None
        )
        return [] if sizes is None else [int(size) for size in sizes]

    def _range(self, cut: _Node, axis: int, rank: int) -> tuple[int, ...]:
        """Where a slice of this one axis begins and ends, () for any other."""
        given = [self._constants.get(name) for name in cut.inputs[1:]]
        numbers = [int(one) for one in given if one is not None and one.numel() == 1]
        if len(given) not in (3, 4) or len(numbers) != len(given):
            return ()
        start, end, at, *step = numbers
        return (start, end) if at % rank == axis and step in ([], [1]) else ()


# -- what they are in torch


def _attention(node: _Bound) -> Kernel:
    from server.engines.gpu import kernels

    keys, channel, layer = (node.get(name, None) for name in ("keys", "channel", "layer"))

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relations: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        ones: Tensor | None,
        state: Tensor | None = None,
    ) -> Tensor:
        left = k.shape[2] if keys is None else keys
        mixed: Tensor = kernels.attention(q, k, v, left, relations, channel, rows, columns, ones, state, layer)
        return mixed.transpose(1, 2)  # (B, h, N, d): a view, that the projection's undoes

    return attention


def _relation_mlp(node: _Bound) -> Kernel:  # noqa: ARG001
    from server.engines.gpu import kernels

    return kernels.relation_mlp


def _state(node: _Bound) -> Kernel:
    """What attention fills, (B, channels, N, N'). It is made before: of the first layer's q (B, h, N, d) and k."""
    channels = node.get("channels", 0)

    def state(q: Tensor, k: Tensor, *, out: Tensor | None = None) -> Tensor:
        return q.new_empty(q.shape[0], channels, q.shape[2], k.shape[2]) if out is None else out

    return state


OPERATORS: dict[str, Callable[[_Bound], Kernel]] = {
    ATTENTION: _attention,
    RELATION_MLP: _relation_mlp,
    STATE: _state,
}
