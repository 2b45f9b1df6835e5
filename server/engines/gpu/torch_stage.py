"""Stages by torch: the bundle's own ONNX graph, operator by operator, through torch's kernels.

Nothing is exported for it: torch launches, and the runtime records what it launched into a graph, so that the cost of
launching from Python is paid once. Compiled, which takes its time at the start, the same operators become fewer kernels
(see `torch_compile`).

In half precision attention and the MLP over relations are kernels of our own, see `fusions`.

A graph is read once a stage. What depends on weights alone is computed then. A context runs its operators one by one
the first time; what only depends on shapes turns out to be constant, and the rest becomes a list of steps.

float32 is true float32: TF32, which torch takes for convolutions unless it is told not to, moves confidences. But for a
bundle in half precision: what it leaves in float32 are sums and powers that half cannot hold, and its products may be
as exact as all the others.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from server.bundle.manifest import Bundle, StageSpec, TensorSpec
from server.engines.gpu import fusions
from server.errors import BundleError

RUNTIME = f"torch {torch.__version__}"

DTYPES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}  # of a manifest
ONNX_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
Shape = tuple[int, ...]
Kernel = Callable[..., Any]  # tensors -> one tensor, or one for each output of its node
Work = Callable[[], Callable[[], None] | None]
Compile = Callable[[Kernel, Sequence[Tensor]], Kernel]
"""What a program of torch's becomes, for tensors of these shapes at these addresses."""


class Place(Protocol):
    """Where torch runs."""

    device: torch.device

    def tensor(self, address: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """What lies at an address of the runtime's, not a copy."""
        ...

    def run(self, stream: int, work: Work) -> None:
        """Do the work on a stream. What it allocates is for that stream alone, and is not given back to the device
        while anybody who entered has still to leave: a recorded graph may use it.

        Nothing of it may be kept for a later run: graphs that were recorded earlier compute there, too. What `work`
        gives back is called behind it, on the same stream, and allocates elsewhere."""
        ...

    def enter(self, stream: int) -> None: ...

    def leave(self, stream: int) -> None: ...


class CudaPlace:
    """The first CUDA device. `tf32`: for products of float32. Raises RuntimeError where torch has none."""

    def __init__(self, tf32: bool = False) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
        self.device = torch.device("cuda", 0)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            # There are newer names for these two, but then torch refuses to be asked by the old ones.
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.backends.cudnn.allow_tf32 = tf32
        # Partial sums of half precision products are added in float32, as the other engines do.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # Of torch's fused attentions the one that plans, and may refuse, a graph of its own.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._streams: dict[int, tuple[torch.cuda.Stream, torch.cuda.MemPool]] = {}
        self._inside: Counter[int] = Counter()  # by stream

    def tensor(self, address: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        # The protocol knows no bfloat16; 16 bits are 16 bits.
        bits = torch.int16 if dtype is torch.bfloat16 else dtype
        return torch.as_tensor(_Memory(address, shape, bits), device=self.device).view(dtype)

    def enter(self, stream: int) -> None:
        if not self._inside[stream]:
            self._streams[stream] = (
                torch.cuda.ExternalStream(stream, self.device),  # type: ignore[no-untyped-call]
                torch.cuda.MemPool(),
            )
        self._inside[stream] += 1

    def leave(self, stream: int) -> None:
        self._inside[stream] -= 1
        if not self._inside[stream]:
            del self._streams[stream]

    def run(self, stream: int, work: Work) -> None:
        ours, pool = self._streams[stream]
        # A pool of its own, as torch's own graphs have: freed memory is used again by later work of the same stream,
        # and stays at its address as long as the pool lives.
        with torch.cuda.stream(ours):
            with torch.cuda.use_mem_pool(pool, self.device):
                then = work()
            if then is not None:
                then()


_ARRAY_TYPES = {torch.uint8: "|u1", torch.int16: "<i2", torch.float16: "<f2", torch.float32: "<f4"}


class _Memory:
    """Somebody else's memory, as the CUDA array interface (version 3) describes it."""

    def __init__(self, address: int, shape: Shape, dtype: torch.dtype) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": _ARRAY_TYPES[dtype],
            "data": (address, False),  # not read-only
            "strides": None,
            "version": 3,
        }


def load(
    bundle: Bundle,
    place: Place,
    batch_sizes: Sequence[Sequence[int]],
    compile_: Compile | None = None,
    fuse: bool = True,
) -> list[TorchStage]:
    """All stages of a bundle, each for its batch sizes; `fuse`: with kernels of our own, where they run. Raises
    BundleError."""
    return [
        TorchStage(bundle.stage_path(number), spec, place, sizes, compile_, fuse)
        for number, (spec, sizes) in enumerate(zip(bundle.manifest.stages, batch_sizes, strict=True), start=1)
    ]


class TorchStage:
    """One stage; see `stage.Stage`. Raises BundleError, naming the file, for a graph that it cannot run."""

    def __init__(
        self,
        file: Path,
        spec: StageSpec,
        place: Place,
        batch_sizes: Sequence[int],
        compile_: Compile | None = None,
        fuse: bool = True,
    ) -> None:
        self.inputs, self.outputs, self.batch_sizes = spec.inputs, spec.outputs, tuple(batch_sizes)
        self._file, self._place, self._compile = file, place, compile_
        self._compiled: dict[tuple[int, tuple[str, ...]], Kernel] = {}  # by batch size, and what is given and wanted
        with _naming(file):
            self._graph = _Graph.read(file, place.device if fuse else None)
            self._graph.check(spec)
        self._weights: dict[str, Tensor] = {}  # on the device
        used = {name for node in self._graph.nodes for name in node.inputs}
        for name, constant in self._graph.constants.items():
            if name in used and constant.is_floating_point():
                self._weights[name] = constant.to(place.device)

    def arena_bytes(self, batch_size: int) -> int:  # noqa: ARG002
        return 0  # torch has an allocator of its own

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> TorchContext:  # noqa: ARG002
        specs = {**self.inputs, **self.outputs}
        tensors = {
            name: self._place.tensor(addresses[name], _shape(spec, batch_size), DTYPES[spec.dtype])
            for name, spec in specs.items()
            if name in addresses
        }
        compile_ = None if self._compile is None else functools.partial(self._compiled_once, batch_size, tuple(tensors))
        return TorchContext(
            self._file, self._graph, self._weights, self._place, stream, tensors, self.inputs.keys(), compile_
        )

    def _compiled_once(
        self, batch_size: int, names: tuple[str, ...], program: Kernel, tensors: Sequence[Tensor]
    ) -> Kernel:
        """For all contexts of a batch size that are asked for the same: a program is given its tensors at each call."""
        assert self._compile is not None
        if (batch_size, names) not in self._compiled:
            self._compiled[batch_size, names] = self._compile(program, tensors)
        return self._compiled[batch_size, names]

    def close(self) -> None:
        self._weights.clear()
        self._compiled.clear()


@dataclass(slots=True)
class _Step:
    """One operator of a context: what it is called with, where its results go, and what nobody needs after it."""

    kernel: Kernel
    arguments: tuple[Tensor | str | None, ...]  # a constant, or the name of what an earlier step gave
    results: tuple[str, ...]
    dead: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()  # of the results: what the stage hands on
    in_place: bool = False  # the kernel can make what is wanted where it belongs


class TorchContext:
    """See `stage.Context`."""

    capturable = True

    def __init__(
        self,
        file: Path,
        graph: _Graph,
        weights: Mapping[str, Tensor],
        place: Place,
        stream: int,
        tensors: Mapping[str, Tensor],
        inputs: Iterable[str],
        compile_: Compile | None,
    ) -> None:
        self._file, self._graph, self._weights, self._place, self._stream = file, graph, weights, place, stream
        self._compile = compile_
        self._given = {name: tensor for name, tensor in tensors.items() if name in inputs}
        self._wanted = {name: tensor for name, tensor in tensors.items() if name not in inputs}
        place.enter(stream)
        self._steps: list[_Step] | None = None
        self._compiled: Kernel | None = None

    def enqueue(self) -> None:
        self._place.run(self._stream, self._first_time if self._steps is None else self._again)

    def close(self) -> None:
        """Once."""
        self._steps = self._compiled = None
        self._given, self._wanted = {}, {}
        self._place.leave(self._stream)

    @torch.inference_mode()
    def _first_time(self) -> Callable[[], None]:
        nodes = self._graph.needed_for(self._wanted.keys())
        last_use = {
            name: at
            for at, node in enumerate(nodes)
            for name in (*node.outputs, *(node.inputs if node.operator != "Shape" else ()), node.writes)
        }
        values, constants, on_device = dict(self._given), dict(self._graph.constants), dict(self._weights)
        shapes = {name: tensor.shape for name, tensor in values.items()}  # of all that is no constant
        steps: list[_Step] = []

        def argument(name: str) -> Tensor | str | None:
            if not name or name in shapes:
                return name or None
            if name not in on_device:
                on_device[name] = constants[name].to(self._place.device, copy=True)
            return on_device[name]

        with _naming(self._file):
            for at, node in enumerate(nodes):
                if node.operator == "Shape" and node.inputs[0] in shapes:
                    shape = torch.tensor(shapes[node.inputs[0]], dtype=torch.int64)
                    constants[node.outputs[0]] = shape[node.get("start", 0) : node.get("end", None)]
                    continue
                kernel, which = node.kernel(constants)
                if all(name in constants for name in node.inputs if name):  # of shapes alone
                    constants.update(node.named(kernel(*(constants[name] if name else None for name in which))))
                    continue
                if node.writes:
                    which = (*which, node.writes if node.writes in shapes else "")
                step = _Step(kernel, tuple(argument(name) for name in which), node.outputs)
                with _explaining(node):
                    _do(step, values, {})
                results = [name for name in node.outputs if name]
                shapes |= {name: values[name].shape for name in results}
                step.wanted = tuple(self._wanted.keys() & set(results))
                for name in step.wanted:
                    self._check(name, values[name])
                step.in_place = node.operator in IN_PLACE and bool(step.wanted)  # the largest that a stage leaves
                dead = {
                    name for name in (*node.inputs, *results, node.writes) if name in values and last_use[name] == at
                }
                step.dead = tuple(dead - self._given.keys())
                for name in step.dead:
                    if name in self._wanted:  # now nobody writes to it any more
                        self._wanted[name].copy_(values[name])
                    del values[name]
                steps.append(step)
            if missing := self._wanted.keys() - shapes.keys():
                raise BundleError(f"`{min(missing)}` does not depend on the inputs")
        self._steps = steps
        return self._prepare

    @torch.inference_mode()
    def _prepare(self) -> None:
        self._keep_constants()
        if self._compile is not None:
            self._compiled = self._compile(self._all_steps, self._tensors)

    def _keep_constants(self) -> None:
        """Those that follow from the batch size were made on the way."""
        assert self._steps is not None
        shared = {id(weight) for weight in self._weights.values()}
        kept: dict[int, Tensor] = {}
        for step in self._steps:
            for a in step.arguments:
                if isinstance(a, Tensor) and id(a) not in shared and id(a) not in kept:
                    kept[id(a)] = a.clone()
            step.arguments = tuple(kept.get(id(a), a) if isinstance(a, Tensor) else a for a in step.arguments)

    def _check(self, name: str, found: Tensor) -> None:
        """Raises BundleError for an output that is not what the manifest says."""
        said = self._wanted[name]
        if (found.shape, found.dtype) != (said.shape, said.dtype):
            what = [f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") for tensor in (found, said)]
            raise BundleError(f"output `{name}` is {what[0]}, the manifest says {what[1]}")

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self._given.values(), *self._wanted.values())

    @torch.inference_mode()
    def _again(self) -> None:
        program = self._all_steps if self._compiled is None else self._compiled
        program(*self._tensors)

    def _all_steps(self, *tensors: Tensor) -> None:
        """What is given, what is wanted: as `_tensors`."""
        assert self._steps is not None
        values = dict(zip(self._given, tensors, strict=False))
        wanted = dict(zip(self._wanted, tensors[len(values) :], strict=True))
        for step in self._steps:
            _do(step, values, wanted)
            for name in step.dead:
                del values[name]


def _do(step: _Step, values: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    arguments = (values[a] if isinstance(a, str) else a for a in step.arguments)
    if step.in_place and wanted:
        values[step.results[0]] = step.kernel(*arguments, out=wanted[step.results[0]])
        return
    values.update(_named(step.results, step.kernel(*arguments)))
    for name in step.wanted if wanted else ():
        wanted[name].copy_(values[name])


@contextlib.contextmanager
def _explaining(node: _Node) -> Iterator[None]:
    """Tensors that do not fit an operator are the bundle's fault; memory and devices are not."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = str(error)
        if "out of memory" in said or "CUDA" in said:
            raise
        raise BundleError(f"{node.operator} that gives `{node.outputs[0]}`: {said.splitlines()[0]}") from error


def _named(names: Sequence[str], given: Any) -> dict[str, Tensor]:
    tensors = given if isinstance(given, tuple | list) else (given,)
    return {name: tensor for name, tensor in zip(names, tensors, strict=False) if name}


# -- reading a graph


@dataclass(frozen=True, slots=True)
class _Node:
    """One operator of a graph, or what two were joined to."""

    operator: str
    inputs: tuple[str, ...]  # "" stands for one that is left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    writes: str = ""  # what an earlier node made, and this one fills a part of if it is wanted: its last argument

    def get(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)

    def kernel(self, constants: Mapping[str, Tensor]) -> tuple[Kernel, tuple[str, ...]]:
        """What computes it, and which inputs that takes. Raises BundleError for a form of it that is not known here."""
        bound = _Bound(self, constants)
        kernel = OPERATORS[self.operator](bound)
        return kernel, tuple(name for at, name in enumerate(self.inputs) if at not in bound.read)

    def named(self, given: Any) -> dict[str, Tensor]:
        return _named(self.outputs, given)


@dataclass(slots=True)
class _Bound:
    """A node with the constants of its graph: those of its inputs that say how are read here, and are no tensors of
    its kernel's any more."""

    node: _Node
    constants: Mapping[str, Tensor]
    read: set[int] = field(default_factory=set)

    def get(self, name: str, default: Any) -> Any:
        return self.node.get(name, default)

    def has(self, at: int) -> bool:
        return len(self.node.inputs) > at and bool(self.node.inputs[at])

    def constant(self, at: int) -> Tensor:
        """Raises BundleError for one that is computed."""
        name = self.node.inputs[at]
        if name not in self.constants:
            raise BundleError(f"{self.node.operator}: `{name}` must not depend on what the images show")
        self.read.add(at)
        return self.constants[name]

    def ints(self, at: int) -> list[int] | None:
        """None where it is left out."""
        if not self.has(at):
            self.read.add(at)
            return None
        return [int(value) for value in self.constant(at).reshape(-1).tolist()]

    def axes(self, at: int = 1) -> list[int] | None:
        """Of an input, in older forms of an attribute."""
        given = self.get("axes", None)
        return list(given) if given is not None else self.ints(at)


@dataclass(frozen=True, slots=True)
class _Graph:
    nodes: tuple[_Node, ...]
    constants: Mapping[str, Tensor]  # on the host; weights, and what follows from them alone
    inputs: frozenset[str]
    outputs: frozenset[str]

    @classmethod
    def read(cls, file: Path, fuse_on: torch.device | None = None) -> _Graph:
        """`fuse_on`: where kernels of our own may run. Raises BundleError, and the errors of a file that is none."""
        try:
            proto = onnx.load(file).graph
        except Exception as error:  # whatever the parser raises
            raise BundleError(f"cannot be read as ONNX: {error}") from None
        constants = {tensor.name: _constant(tensor) for tensor in proto.initializer}
        nodes = []
        for node in proto.node:
            if node.domain not in ("", "ai.onnx"):
                raise BundleError(f"the operator {node.domain}.{node.op_type} is not known here")
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            if node.op_type == "Constant":
                constants[node.output[0]] = _constant_of(attributes)
                continue
            nodes.append(_Node(node.op_type, tuple(node.input), tuple(node.output), attributes))
        outputs = frozenset(value.name for value in proto.output)
        inputs = frozenset(value.name for value in proto.input) - constants.keys()
        if fuse_on is not None and fusions.run_on(fuse_on):
            nodes = _needed_for(outputs, fusions.fuse(_without_constants(nodes, constants), constants, outputs))
        left = _without_constants(_Joins(nodes, constants, outputs).nodes, constants)
        return cls(tuple(left), constants, inputs, outputs)

    def check(self, spec: StageSpec) -> None:
        """Against what is known here, and against the manifest. Raises BundleError."""
        if unknown := {node.operator for node in self.nodes} - OPERATORS.keys():
            raise BundleError(f"the operator {min(unknown)} is not known here")
        for what, here, there in (("input", self.inputs, spec.inputs), ("output", self.outputs, spec.outputs)):
            if missing := there.keys() - here:
                raise BundleError(f"has no {what} `{min(missing)}`, the manifest names one")
        if extra := self.inputs - spec.inputs.keys():
            raise BundleError(f"has an input `{min(extra)}` that the manifest does not name")
        for name, tensor in {**spec.inputs, **spec.outputs}.items():
            if tensor.dtype not in DTYPES:
                raise BundleError(f"`{name}` is of {tensor.dtype}; known here are {', '.join(DTYPES)}")

    def needed_for(self, wanted: Iterable[str]) -> list[_Node]:
        return _needed_for(wanted, self.nodes)


def _needed_for(wanted: Iterable[str], nodes: Sequence[_Node]) -> list[_Node]:
    needed, found = set(wanted), []
    for node in reversed(nodes):
        if needed & {*node.outputs, node.writes}:
            needed |= set(node.inputs) - {""}
            found.append(node)
    return found[::-1]


IN_PLACE = ("Concat", fusions.STATE)  # they take where their result belongs
VECTOR = 4  # float32 numbers that a thread reads at once
PRODUCTS = ("MatMul", "AddedProduct")


class _Joins:
    """Operators that are joined to one, each a kernel or more fewer:

    - a product with a matrix of weights, and its bias
    - a normalisation that half precision leaves for float32 and comes back from: torch's own adds in float32, too, and
      only its weights are rounded
    - attention in half precision whose logits nobody else wants: none of its large matrices is written
    - a product and a product that is added to it: the second is added to in place

    Queries, keys and values that products take are laid out by head at once, or every product would do it for itself.
    """

    def __init__(self, nodes: Sequence[_Node], constants: dict[str, Tensor], outputs: frozenset[str]) -> None:
        self._constants = constants
        self._by_output = {name: node for node in nodes for name in node.outputs if name}
        self._uses = Counter(name for node in nodes for name in node.inputs)
        self._uses.update(outputs)
        self._dropped: set[str] = set()
        self._alike = set(constants)  # for all images
        for node in nodes:
            if node.operator == "Shape" or self._alike.issuperset(name for name in node.inputs if name):
                self._alike.update(node.outputs)
        joined = [self._join(node) for node in nodes]
        kept = [node for node in joined if node.outputs[0] not in self._dropped]
        by_head = {name for node in kept if node.operator in PRODUCTS for name in map(self._by_head, node.inputs)}
        self.nodes = [
            _Node("ByHead", node.inputs, node.outputs, node.attributes) if node.outputs[0] in by_head else node
            for node in kept
        ]

    def _join(self, node: _Node) -> _Node:
        match node.operator:
            case "Add":
                return self._linear(node) or self._added_product(node) or node
            case "Cast":
                return self._half_normalization(node) or node
            case "MatMul":
                return self._half_attention(node) or node
        return node

    def _for_this_alone(self, name: str, operator: str) -> _Node | None:
        """What gives it, where it is such an operator and nobody else takes it."""
        node = self._by_output.get(name)
        return node if node is not None and node.operator == operator and self._uses[name] == 1 else None

    def _linear(self, node: _Node) -> _Node | None:
        for name, bias in (node.inputs, node.inputs[::-1]):
            product = self._for_this_alone(name, "MatMul")
            weight = None if product is None else self._constants.get(product.inputs[1])
            if product is None or weight is None or bias not in self._constants:
                continue
            if weight.dim() == 2 and self._constants[bias].shape == weight.shape[1:]:
                self._dropped.add(name)
                return _Node("Linear", (*product.inputs, bias), node.outputs, {})
        return None

    def _added_product(self, node: _Node) -> _Node | None:
        product, summand = (self._for_this_alone(name, "MatMul") for name in node.inputs)
        if product is None or summand is None or self._alike & {*product.inputs, *summand.outputs}:
            return None
        self._dropped.add(product.outputs[0])
        return _Node("AddedProduct", (*summand.outputs, *product.inputs), node.outputs, {})

    def _by_head(self, name: str) -> str | None:
        """The transposition of (B, N, 3, h, d) to (3, B, h, N, d) that a part comes from."""
        node = self._by_output.get(name)
        while node is not None and node.operator in ("Transpose", "Squeeze", "Slice", "Split", "Gather"):
            if node.get("perm", None) == [2, 0, 3, 1, 4]:
                return node.outputs[0]
            node = self._by_output.get(node.inputs[0])
        return None

    def _half_normalization(self, node: _Node) -> _Node | None:
        half = ONNX_DTYPES.get(node.get("to", None))
        normalization = self._for_this_alone(node.inputs[0], "LayerNormalization")
        if half not in (torch.float16, torch.bfloat16) or normalization is None or any(normalization.outputs[1:]):
            return None
        x, *weights = normalization.inputs
        cast = self._for_this_alone(x, "Cast")
        if cast is None or cast.get("to", None) != onnx.TensorProto.FLOAT or not set(weights) <= self._constants.keys():
            return None
        for name in weights:
            self._constants[f"{name} in {half}"] = self._constants[name].to(half)
        self._dropped |= {x, node.inputs[0]}
        rounded = tuple(f"{name} in {half}" for name in weights)
        attributes = {**normalization.attributes, "to": half, "exact": len(weights)}
        return _Node("HalfLayerNormalization", (cast.inputs[0], *rounded, *weights), node.outputs, attributes)

    def _half_attention(self, node: _Node) -> _Node | None:
        softmax = self._for_this_alone(node.inputs[0], "Softmax")
        if softmax is None or softmax.get("axis", -1) not in (-1, 3):
            return None
        logits, mask = softmax.inputs[0], ""
        if (masked := self._for_this_alone(logits, "Add")) is not None:
            logits, mask = masked.inputs
            if self._for_this_alone(logits, "MatMul") is None:
                logits, mask = mask, logits
        product = self._for_this_alone(logits, "MatMul")
        if product is None:
            return None
        transposed = self._by_output.get(product.inputs[1])
        if transposed is None or transposed.operator != "Transpose" or transposed.get("perm", None) != [0, 1, 3, 2]:
            return None
        self._dropped |= {node.inputs[0], softmax.inputs[0], logits}
        inputs = (product.inputs[0], transposed.inputs[0], node.inputs[1], *([mask] if mask else []))
        return _Node("PlainAttention", inputs, node.outputs, {})


def _without_constants(nodes: Sequence[_Node], constants: dict[str, Tensor]) -> list[_Node]:
    """Without those that follow from constants alone: they become constants."""
    left = []
    with torch.inference_mode():
        for node in nodes:
            if all(name in constants for name in node.inputs if name) and node.operator in OPERATORS:
                kernel, which = node.kernel(constants)
                constants.update(node.named(kernel(*(constants[name] if name else None for name in which))))
            else:
                left.append(node)
    return left


def _constant(tensor: onnx.TensorProto) -> Tensor:
    if tensor.data_type not in ONNX_DTYPES:
        raise BundleError(f"`{tensor.name}` is of a type that is not known here: {tensor.data_type}")
    array = numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.BFLOAT16:  # which numpy does not know
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _constant_of(attributes: Mapping[str, Any]) -> Tensor:
    for name, dtype in (
        ("value_float", torch.float32),
        ("value_int", torch.int64),
        ("value_floats", torch.float32),
        ("value_ints", torch.int64),
    ):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=dtype)
    if "value" not in attributes:
        raise BundleError(f"a Constant of {', '.join(attributes)} is not known here")
    return _constant(attributes["value"])


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of a bundle name the file."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None


def _shape(spec: TensorSpec, batch_size: int) -> Shape:
    return (batch_size, *(int(size) for size in spec.shape[1:]))


# -- operators: what each of ONNX's is in torch

OPERATORS: dict[str, Callable[[_Bound], Kernel]] = {}


OPERATORS.update(fusions.OPERATORS)


def _operator(*names: str) -> Callable[[Callable[[_Bound], Kernel]], Callable[[_Bound], Kernel]]:
    def register(build: Callable[[_Bound], Kernel]) -> Callable[[_Bound], Kernel]:
        for name in names:
            OPERATORS[name] = build
        return build

    return register


def _plain(kernels: Mapping[str, Kernel]) -> None:
    """Operators whose inputs are all tensors, and which have no attributes."""
    OPERATORS.update({name: functools.partial(_itself, kernel) for name, kernel in kernels.items()})


def _itself(kernel: Kernel, node: _Bound) -> Kernel:  # noqa: ARG001
    return kernel


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _fold(kernel: Kernel) -> Kernel:
    def folded(first: Tensor, *rest: Tensor) -> Tensor:
        for one in rest:
            first = kernel(first, one)
        return first

    return folded


_plain(
    {
        "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
        "Floor": torch.floor, "Identity": lambda x: x, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not,
        "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
        "Sign": torch.sign, "Sin": torch.sin, "Softplus": F.softplus, "Sqrt": torch.sqrt, "Tanh": torch.tanh,
        "Add": torch.add, "And": torch.logical_and, "Div": _divide, "Equal": torch.eq, "Greater": torch.gt,
        "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le, "MatMul": torch.matmul,
        "Mul": torch.mul, "Or": torch.logical_or, "Pow": torch.pow, "Sub": torch.sub, "Where": torch.where,
        "Max": _fold(torch.maximum), "Min": _fold(torch.minimum), "Sum": _fold(torch.add),
        "Linear": lambda x, weight, bias: F.linear(x, weight.t(), bias),
    }
)  # fmt: skip


@_operator("Cast")
def _cast(node: _Bound) -> Kernel:
    dtype = ONNX_DTYPES.get(node.get("to", None))
    if dtype is None:
        raise BundleError(f"Cast to type {node.get('to', None)} is not known here")
    return lambda x: x.to(dtype)


@_operator("Gelu")
def _gelu(node: _Bound) -> Kernel:
    approximate = node.get("approximate", b"none").decode()
    return lambda x: F.gelu(x, approximate=approximate)


@_operator("Gemm")
def _gemm(node: _Bound) -> Kernel:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    left, right = node.get("transA", 0), node.get("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if left else a, b.t() if right else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, alpha=alpha, beta=beta)

    return gemm


@_operator("Einsum")
def _einsum(node: _Bound) -> Kernel:
    equation = node.get("equation", b"").decode().replace(" ", "")
    return lambda *tensors: torch.einsum(equation, *tensors)


@_operator("Conv")
def _conv(node: _Bound) -> Kernel:
    if node.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise BundleError(f"Conv with auto_pad {node.get('auto_pad', b'').decode()} is not known here")
    pads, groups = node.get("pads", None), node.get("group", 1)
    strides, dilations = node.get("strides", None), node.get("dilations", None)

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        axes = x.dim() - 2
        before, after = (pads[:axes], pads[axes:]) if pads else ([0] * axes, [0] * axes)
        if before != after:
            x, before = F.pad(x, _backwards(before, after)), [0] * axes
        kernel = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        return kernel(x, weight, bias, strides or [1] * axes, before, dilations or [1] * axes, groups)

    return conv


@_operator("LayerNormalization")
def _layer_normalization(node: _Bound) -> Kernel:
    if any(node.node.outputs[1:]):
        raise BundleError("LayerNormalization that gives its mean is not known here")
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)

    def normalize(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        if len(shape) > 1 or shape[-1] % VECTOR == 0 or bias is None:
            return F.layer_norm(x, shape, weight, bias, epsilon)
        # Torch gives such a row, which it cannot read by vectors, a block of threads, of which most wait.
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        centred = (x - mean).mul_(torch.rsqrt(variance + epsilon))
        return torch.addcmul(bias, centred, weight)

    return normalize


@_operator("HalfLayerNormalization")
def _half_layer_normalization(node: _Bound) -> Kernel:
    axis, epsilon, half = node.get("axis", -1), node.get("epsilon", 1e-5), node.get("to", None)
    count = node.get("exact", 0)

    def normalize(x: Tensor, *weights: Tensor) -> Tensor:
        rounded, exact = (_weight_and_bias(part) for part in (weights[:count], weights[count:]))
        if x.dtype is half:
            return F.layer_norm(x, x.shape[axis:], *rounded, epsilon)
        x = x.to(torch.float32)
        return F.layer_norm(x, x.shape[axis:], *exact, epsilon).to(half)

    return normalize


def _weight_and_bias(given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return given[0], given[1] if len(given) > 1 else None


@_operator("PlainAttention")
def _plain_attention(node: _Bound) -> Kernel:  # noqa: ARG001
    """q, scaled already, k, v and maybe what is added to the logits -> the mixed values, (B, h, N, d)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.dtype is not torch.float32:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        # Not torch's fused kernel: on tensor cores it is less than float32.
        logits = q @ k.transpose(-2, -1)
        return (logits if mask is None else logits + mask).softmax(dim=-1) @ v

    return attention


@_operator("AddedProduct")
def _added_product(node: _Bound) -> Kernel:  # noqa: ARG001
    """What is added, a product that nobody else takes, and the two factors -> the sum."""

    def add(summand: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = a.shape[-2:], b.shape[-2:]
        if summand.shape != (*a.shape[:-1], columns[1]) or a.shape[:-2] != b.shape[:-2] or a.dim() < 3:
            return a @ b + summand
        flat = summand.reshape(-1, rows[0], columns[1])
        return flat.baddbmm_(a.reshape(-1, *rows), b.reshape(-1, *columns)).view(summand.shape)

    return add


@_operator("Softmax")
def _softmax(node: _Bound) -> Kernel:
    axis = node.get("axis", -1)
    return lambda x: torch.softmax(x, axis)


@_operator("LogSoftmax")
def _log_softmax(node: _Bound) -> Kernel:
    axis = node.get("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


@_operator("Clip")
def _clip(node: _Bound) -> Kernel:
    low, high = (node.constant(at).item() if node.has(at) else None for at in (1, 2))
    node.read |= {1, 2}
    return lambda x: torch.clamp(x, low, high)


@_operator("Dropout")
def _dropout(node: _Bound) -> Kernel:
    node.read |= {1, 2}
    return lambda x: x


REDUCTIONS: dict[str, Kernel] = {
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
}


@_operator(*REDUCTIONS)
def _reduce(node: _Bound) -> Kernel:
    kernel, keep, axes = REDUCTIONS[node.node.operator], bool(node.get("keepdims", 1)), node.axes()
    if axes is None and node.get("noop_with_empty_axes", 0):
        return lambda x: x
    return lambda x: kernel(x, list(range(x.dim())) if axes is None else axes, keep)


@_operator("Reshape")
def _reshape(node: _Bound) -> Kernel:
    sizes, zeros = node.ints(1) or [], bool(node.get("allowzero", 0))
    return lambda x: x.reshape([x.shape[at] if size == 0 and not zeros else size for at, size in enumerate(sizes)])


@_operator("Flatten")
def _flatten(node: _Bound) -> Kernel:
    axis = node.get("axis", 1)
    return lambda x: x.reshape(math.prod(x.shape[: axis if axis >= 0 else axis + x.dim()]), -1)


@_operator("Transpose")
def _transpose(node: _Bound) -> Kernel:
    order = node.get("perm", None)
    return lambda x: x.permute(order or list(range(x.dim()))[::-1])


@_operator("ByHead")
def _by_head(node: _Bound) -> Kernel:
    transpose = _transpose(node)
    return lambda x: transpose(x).contiguous()


@_operator("Squeeze")
def _squeeze(node: _Bound) -> Kernel:
    axes = node.axes()
    return lambda x: x.squeeze() if axes is None else x.squeeze(tuple(axes))


@_operator("Unsqueeze")
def _unsqueeze(node: _Bound) -> Kernel:
    axes = node.axes() or []

    def unsqueeze(x: Tensor) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


@_operator("Expand")
def _expand(node: _Bound) -> Kernel:
    sizes = node.ints(1) or []
    return lambda x: x.expand(torch.broadcast_shapes(x.shape, sizes))  # type: ignore[no-untyped-call]


@_operator("Tile")
def _tile(node: _Bound) -> Kernel:
    repeats = node.ints(1) or []
    return lambda x: x.repeat(repeats)


@_operator("Concat")
def _concat(node: _Bound) -> Kernel:
    axis = node.get("axis", 0)
    return lambda *tensors, out=None: torch.cat(tensors, axis, out=out)


@_operator("Split")
def _split(node: _Bound) -> Kernel:
    axis, sizes, parts = node.get("axis", 0), node.ints(1), len(node.node.outputs)
    sizes = list(node.get("split", ())) or sizes
    return lambda x: x.split(sizes if sizes else -(-x.shape[axis] // parts), axis)


@_operator("TopK")
def _top_k(node: _Bound) -> Kernel:
    counts = node.ints(1) or []
    axis, largest = node.get("axis", -1), bool(node.get("largest", 1))
    return lambda x: torch.topk(x, counts[0], axis, largest)


@_operator("Slice")
def _slice(node: _Bound) -> Kernel:
    starts, ends = (node.get(name, None) or node.ints(at) for at, name in ((1, "starts"), (2, "ends")))
    axes, steps = node.axes(3), node.ints(4)
    if starts is None or ends is None or (steps is not None and min(steps) < 1):
        raise BundleError("Slice backwards is not known here")
    axes = axes or list(range(len(starts)))
    cuts = list(zip(axes, starts, ends, steps or [1] * len(axes), strict=True))

    def cut(x: Tensor) -> Tensor:
        slices = [slice(None)] * x.dim()
        for axis, start, end, step in cuts:
            slices[axis] = slice(start, end, step)
        return x[tuple(slices)]

    return cut


@_operator("Gather")
def _gather(node: _Bound) -> Kernel:
    axis, indices = node.get("axis", 0), node.constant(1)
    if indices.dim() == 0:
        return lambda x: x.select(axis, int(indices))
    if indices.numel() and int(indices.min()) < 0:
        raise BundleError("Gather that counts from the end is not known here")
    node.read.discard(1)  # torch wants it on the device

    def gather(x: Tensor, index: Tensor) -> Tensor:
        at = axis % x.dim()
        found = x.index_select(at, index.reshape(-1))
        return found.reshape(*x.shape[:at], *index.shape, *x.shape[at + 1 :])

    return gather


@_operator("Pad")
def _pad(node: _Bound) -> Kernel:
    mode, pads = node.get("mode", b"constant").decode(), node.get("pads", None) or node.ints(1) or []
    value = node.constant(2).item() if node.has(2) else node.get("value", 0)
    axes = node.ints(3)
    node.read |= {2}
    if mode != "constant":
        raise BundleError(f"Pad in mode {mode} is not known here")

    def pad(x: Tensor) -> Tensor:
        before, after = [0] * x.dim(), [0] * x.dim()
        for at, axis in enumerate(axes if axes is not None else range(x.dim())):
            before[axis], after[axis] = pads[at], pads[at + len(pads) // 2]
        return F.pad(x, _backwards(before, after), value=value)

    return pad


def _backwards(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """As torch names pads: from the last axis, before and after."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


@_operator("ConstantOfShape")
def _constant_of_shape(node: _Bound) -> Kernel:
    sizes, value = node.ints(0) or [], node.get("value", None)
    filled = torch.zeros(1) if value is None else _constant(value)
    return lambda: filled.reshape([1] * len(sizes)).expand(sizes).contiguous()


@_operator("Range")
def _range(node: _Bound) -> Kernel:
    start, limit, delta = (node.constant(at) for at in range(3))
    return lambda: torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@_operator("Shape")
def _shape_of(node: _Bound) -> Kernel:
    start, end = node.get("start", 0), node.get("end", None)
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)[start:end]


@_operator("Attention")
def _attention(node: _Bound) -> Kernel:
    """Opset 23. The fourth output is the softmax's input (mode 0 without the mask, 1 and 2 with it) or output (3)."""
    heads, mode = node.get("q_num_heads", 0), node.get("qk_matmul_output_mode", 0)
    given = node.node
    if (
        node.get("is_causal", 0)
        or node.get("softcap", 0.0)
        or node.get("kv_num_heads", heads) != heads
        or any(given.inputs[4:])
        or any(given.outputs[1:3])
    ):
        raise BundleError("Attention with a cache, a cap, causal or with shared keys is not known here")
    node.read |= {4, 5, 6}
    scale, wants_logits = node.get("scale", None), any(given.outputs[3:])

    def split(x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.view(*x.shape[:-1], heads, -1).transpose(1, 2)  # (B, h, N, d)

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        flat = q.dim() == 3
        q, k, v = split(q), split(k), split(v)
        by = q.shape[-1] ** -0.5 if scale is None else scale
        logits = plain = (q * by) @ k.transpose(-2, -1)  # (B, h, N, N)
        if mask is not None:
            logits = plain.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else plain + mask
        weights = logits.softmax(dim=-1)
        mixed = weights @ v
        if flat:
            mixed = mixed.transpose(1, 2).flatten(2)
        if not wants_logits:
            return mixed
        return mixed, None, None, (plain, logits, logits, weights)[mode]

    return attention
