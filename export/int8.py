"""A stage in 8-bit integers, for CPUs. Done on the exported graph, which is fp32's, by ONNX Runtime's own quantiser.

It is static: scales are known before an image comes, so no image moves another's answer, as it can where scales are
taken from the batch. They are the ranges of what the fp32 stages compute on photos that training saw, none of which
solves a frontier. Activations have 8 bits and a zero point, weights a scale for each output channel. Theirs are 7 bits:
sums of two products do not overflow then on CPUs without VNNI instructions either.

What is quantised are the products with weights: convolutions of the tokeniser, linear layers of the blocks and of
feature reuse. Norms, softmax, attention with its logits, relation reuse, the head and the state between stages stay
float, and so does what linear layers give.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from export.half import Precision
from export.stage import IMAGE, StageGraph
from export.to_onnx import NORMALIZED
from export.verify import Tensors, run_cascade
from server.calibration.calibrate import CalibrationError, Example, held_out, read_image_folder

BundlePrecision = Literal[Precision, "int8"]
"""Of a bundle. Graphs are traced in one of the first, in fp32 for int8."""

QUANTISED = ("Conv", "Gemm", "MatMul")
SCALING = 256  # photos that find the scales
BATCH = 16  # of them


@dataclass(frozen=True)
class Design:
    """How activations and weights become whole numbers."""

    activations: QuantType
    symmetric: bool  # no zero point
    weight_bits: Literal[7, 8]


DESIGN = Design(QuantType.QUInt8, symmetric=False, weight_bits=7)


def quantise(before: Path, after: Path, feeds: Iterable[Tensors], design: Design = DESIGN) -> None:
    """Write the graph of `before` with its products in whole numbers, scales from what it does with `feeds`, batches
    of its inputs."""
    proto = onnx.load(before)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation of shapes, which this wants none of
    try:
        quantize_static(
            proto,
            after,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            nodes_to_quantize=body_products(proto.graph),
            per_channel=True,
            reduce_range=design.weight_bits == 7,
            activation_type=design.activations,
            weight_type=QuantType.QInt8,
            # What linear layers give goes on in float, into sums and norms. A convolution has no kernel for that.
            extra_options={
                "ActivationSymmetric": design.symmetric,
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            },
        )
    finally:
        root.setLevel(level)


def body_products(graph: onnx.GraphProto) -> list[str]:
    """The nodes to quantise.

    Of the convolutions not those of relation reuse, which see single values of attention logits, and not the first:
    in whole numbers the runtime moves the normalisation behind the transposition to channels last, where to stretch
    three factors over the image takes longer than the convolution. Of the linear layers not the head, which is the
    last. Of other products only that of a norm's outcome, as upsampling multiplies with constants, too.
    """
    weights = {tensor.name for tensor in graph.initializer}
    normed = {node.output[0] for node in graph.node if node.op_type == "LayerNormalization"}
    head = [node.name for node in graph.node if node.op_type == "Gemm"][-1]
    chosen = []
    for node in graph.node:
        match node.op_type:
            case "Conv":
                sides = next(attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape")
                wanted = max(sides) > 1 and node.input[0] != NORMALIZED
            case "Gemm":
                wanted = node.name != head
            case "MatMul":
                wanted = node.input[0] in normed and node.input[1] in weights
            case _:
                wanted = False
        if wanted:
            chosen.append(node.name)
    return chosen


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands out batches until none is left, as the runtime asks for them."""

    def __init__(self, feeds: Iterable[Tensors]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Tensors | None:
        return next(self._feeds, None)


def stage_feeds(
    graphs: Sequence[StageGraph], sessions: Sequence[Any], number: int, images: NDArray[np.uint8]
) -> Iterator[Tensors]:
    """What stage `number` is given, all images going on to it, in batches: the state of hundreds of images would fill
    the memory. `sessions` are those of the stages in fp32."""
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        before = run_cascade(graphs[: number - 1], sessions[: number - 1], batch)
        state = before[-1] if before else {}
        yield {name: batch if name == IMAGE else state[name] for name in graphs[number - 1].inputs()}


def scaling_images(root: Path, labels: Sequence[str], fraction: float, count: int = SCALING) -> list[Example]:
    """So many images of a folder, at even steps of a list that is in order of classes, but none of the held-out slice.

    Raises CalibrationError for a folder that has none, or a class that is no label.
    """
    rest = [
        (file, label)
        for file, label in read_image_folder(root, labels)
        if not held_out(file.relative_to(root).as_posix(), fraction)
    ]
    if not rest:
        raise CalibrationError(f"{root}: every image is in the held-out slice of {fraction:g}; scales need others")
    count = min(count, len(rest))
    return [rest[at * len(rest) // count] for at in range(count)]
