"""Run what was exported, before anybody relies on it: against PyTorch, and against itself in other batches.

In half precision the graphs are run on the CPU, too, where ONNX Runtime computes between two operators in fp32: that
they are the right graphs shows there, and what half tensors do to the logits where PyTorch runs the same modules with
them. Neither says anything of a GPU's batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.half import Precision
from export.stage import ANSWER, IMAGE, StageGraph
from model.dvt import DVT

MAX_LOGIT_DIFFERENCE = 1e-4  # fp32 in another order of summation: differences seen are near 1e-6
# Half precision, as a share of an exit's largest logit: 16 units of rounding, 2^-11 in fp16 and 2^-8 in bf16. Seen are
# 1 to 5 in all variants, as roundings of dozens of operators cancel; a wrong operator is off by as much as the logits.
MAX_HALF_DIFFERENCE = {"fp16": 16 * 2.0**-11, "bf16": 16 * 2.0**-8}
# In int8, on photos: the root mean square of an exit's differences, as a share of the deviation of its logits. Seen is
# 0.03 of photo10; a wrong operator, or scales for other tensors, come to 1.
MAX_INT8_DIFFERENCE = 0.125
PHOTOS = 32  # of those that found the scales
NOISE = 4  # images of it, beside a black one, a white one and a single bright pixel: where overflows show

Tensors = dict[str, NDArray[Any]]


class VerificationError(RuntimeError):
    """The exported graphs do not compute what the model computes."""


@dataclass(frozen=True)
class Parity:
    """What was measured at export; written into the manifest."""

    images: int
    max_logit_difference: tuple[float, ...]  # per exit, against PyTorch in fp32
    # Every output of a batch of 1 equals, bit for bit, its row of a batch of `images`. False in half precision, where
    # that is not looked at.
    batch_invariant: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(model: DVT, graphs: Sequence[StageGraph], sessions: Sequence[Any]) -> Parity:
    """Run the cascade through `sessions` (ONNX Runtime's, one a stage) and compare.

    Raises VerificationError where logits differ by more than MAX_LOGIT_DIFFERENCE, in half precision by more than
    MAX_HALF_DIFFERENCE of the largest, or, in fp32, a row depends on its batch.
    """
    images = example_images(model.config.image_size)
    together = run_cascade(graphs, sessions, images)
    reference = torch_logits(model, images)
    precision = graphs[0].precision
    differences = _compare(together, reference, precision)
    if precision == "fp32":
        _check_batches(graphs, sessions, images, together)
        return Parity(len(images), differences, True)
    rounded = _compare(run_modules(graphs, images), reference, precision)
    return Parity(len(images), tuple(map(max, differences, rounded)), False)


def verify_int8(model: DVT, graphs: Sequence[StageGraph], sessions: Sequence[Any], photos: NDArray[np.uint8]) -> Parity:
    """As `verify`, for sessions of quantised stages, whose graphs in fp32 passed there.

    Raises VerificationError where an exit's logits for `photos`, (B, S, S, 3), differ by more than MAX_INT8_DIFFERENCE
    of their deviation, or are not finite for any image, or a row depends on its batch. Noise is not what scales are
    for: of it only that is looked at.
    """
    images = example_images(model.config.image_size)
    together = run_cascade(graphs, sessions, images)
    _check_finite(together)
    _check_batches(graphs, sessions, images, together)
    photos = photos[:: -(-len(photos) // PHOTOS)]
    outputs = run_cascade(graphs, sessions, photos)
    _check_finite(outputs)
    differences = []
    for number, (out, want) in enumerate(zip(outputs, torch_logits(model, photos), strict=True), start=1):
        off = np.abs(out["logits"] - want)
        typical, deviation = float(np.sqrt((off**2).mean())), float(want.std())
        if not typical <= MAX_INT8_DIFFERENCE * deviation:
            raise VerificationError(
                f"exit {number}: logits in int8 are off by {typical:.2g}, more than {MAX_INT8_DIFFERENCE} of their "
                f"deviation, {deviation:.2g}; leave the model in fp32, or find its scales on other images"
            )
        differences.append(float(off.max()))
    return Parity(len(photos), tuple(differences), True)


def _check_finite(outputs: Sequence[Tensors]) -> None:
    for number, out in enumerate(outputs, start=1):
        if not np.isfinite(out["logits"]).all():
            raise VerificationError(f"exit {number}: logits are not finite in int8")


def example_images(size: int) -> NDArray[np.uint8]:
    """(B, size, size, 3), deterministic. Their number is odd, so that no kernel's block size divides it."""
    images = np.zeros((NOISE + 3, size, size, 3), np.uint8)
    images[:NOISE] = np.random.default_rng(0).integers(0, 256, (NOISE, size, size, 3))
    images[-2] = 255
    images[-1, size // 2, size // 2] = 255
    return images


def _compare(
    outputs: Sequence[Tensors], reference: Sequence[NDArray[np.float32]], precision: Precision
) -> tuple[float, ...]:
    """The largest difference of each exit's logits. Raises VerificationError where one is more than allowed."""
    differences = []
    for number, (out, want) in enumerate(zip(outputs, reference, strict=True), start=1):
        if not np.isfinite(out["logits"]).all():
            why = ", which ends at 65504; try bf16" if precision == "fp16" else ""
            raise VerificationError(f"exit {number}: logits are not finite in {precision}{why}")
        allowed = MAX_LOGIT_DIFFERENCE
        if precision != "fp32":
            allowed = MAX_HALF_DIFFERENCE[precision] * float(np.abs(want).max())
        difference = float(np.abs(out["logits"] - want).max())
        if not difference <= allowed:  # also where the reference is no number
            raise VerificationError(
                f"exit {number}: logits differ from PyTorch by {difference:.2e}, more than {allowed:.0e}"
            )
        differences.append(difference)
    return tuple(differences)


def _check_batches(
    graphs: Sequence[StageGraph], sessions: Sequence[Any], images: NDArray[np.uint8], together: Sequence[Tensors]
) -> None:
    for i in range(len(images)):
        alone = run_cascade(graphs, sessions, images[i : i + 1])
        for number, (one, many) in enumerate(zip(alone, together, strict=True), start=1):
            for name, value in one.items():
                if not np.array_equal(value[0], many[name][i]):
                    raise VerificationError(f"stage {number}: `{name}` of an image depends on the batch it is in")


def run_cascade(graphs: Sequence[StageGraph], sessions: Sequence[Any], images: NDArray[np.uint8]) -> list[Tensors]:
    """Every stage on every image, (B, H, W, 3): all outputs of each stage by name."""
    results: list[Tensors] = []
    left: Tensors = {}
    for graph, session in zip(graphs, sessions, strict=True):
        names = list(graph.outputs())
        feeds = {name: images if name == IMAGE else left[name] for name in graph.inputs()}
        left = dict(zip(names, session.run(names, feeds), strict=True))
        results.append(left)
    return results


@torch.inference_mode()
def run_modules(graphs: Sequence[StageGraph], images: NDArray[np.uint8]) -> list[Tensors]:
    """Every stage on every image in PyTorch, the state in its own precision: the answers of each stage by name."""
    results: list[Tensors] = []
    left: dict[str, torch.Tensor] = {}
    for graph in graphs:
        feeds = [torch.from_numpy(images) if name == IMAGE else left[name] for name in graph.inputs()]
        left = dict(zip(graph.outputs(), graph(*feeds), strict=True))
        results.append({name: left[name].numpy() for name in ANSWER})
    return results


@torch.inference_mode()
def torch_logits(model: DVT, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The reference: the model itself, in fp32 on the CPU. images (B, H, W, 3) -> logits of every exit, (B, K)."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.mean, model.config.std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return [logits.numpy() for logits in model.cpu().float().eval()(pixels)]
