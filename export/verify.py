"""Run what was exported, before anybody relies on it: against PyTorch, and against itself in other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.stage import IMAGE, StageGraph
from model.dvt import DVT

MAX_LOGIT_DIFFERENCE = 1e-4  # fp32 in another order of summation: differences seen are near 1e-6
BATCH = 5  # odd, so that no kernel's block size divides it

Tensors = dict[str, NDArray[Any]]


class VerificationError(RuntimeError):
    """The exported graphs do not compute what the model computes."""


@dataclass(frozen=True)
class Parity:
    """What was measured at export; written into the manifest."""

    images: int
    max_logit_difference: tuple[float, ...]  # per exit, against PyTorch in fp32
    batch_invariant: bool  # every output of a batch of 1 equals, bit for bit, its row of a batch of `images`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(model: DVT, graphs: Sequence[StageGraph], sessions: Sequence[Any]) -> Parity:
    """Run the cascade through `sessions` (ONNX Runtime's, one a stage) and compare.

    Raises VerificationError where logits differ by more than MAX_LOGIT_DIFFERENCE, or a row depends on its batch.
    """
    size = model.config.image_size
    images = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    together = run_cascade(graphs, sessions, images)
    reference = torch_logits(model, images)
    differences = tuple(
        float(np.abs(out["logits"] - want).max()) for out, want in zip(together, reference, strict=True)
    )
    worst = max(differences)
    if not worst <= MAX_LOGIT_DIFFERENCE:  # also catches NaN
        raise VerificationError(f"logits differ from PyTorch by {worst:.2e}, more than {MAX_LOGIT_DIFFERENCE:.0e}")
    for i in range(BATCH):
        alone = run_cascade(graphs, sessions, images[i : i + 1])
        for number, (one, many) in enumerate(zip(alone, together, strict=True), start=1):
            for name, value in one.items():
                if not np.array_equal(value[0], many[name][i]):
                    raise VerificationError(f"stage {number}: `{name}` of an image depends on the batch it is in")
    return Parity(BATCH, differences, True)


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
def torch_logits(model: DVT, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The reference: the model itself, in fp32 on the CPU. images (B, H, W, 3) -> logits of every exit, (B, K)."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.mean, model.config.std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return [logits.numpy() for logits in model.cpu().float().eval()(pixels)]
