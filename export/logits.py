"""Every exit's logits for already normalised inputs, through the exported graphs of a bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.to_onnx import NORMALIZED, normalized_input
from server.bundle.manifest import Bundle
from server.engines.onnx import open_session, refuse_bfloat16


def bundle_logits(bundle: Bundle, inputs: NDArray[np.float32], batch_size: int = 16) -> NDArray[np.float32]:
    """inputs (B, 3, H, W), normalised -> (exits, B, K) float32. The graphs run as exported, from the tensor after their
    normalisation on. Raises ValueError for another shape, BundleError for a bundle in bf16."""
    refuse_bfloat16(bundle)
    size = bundle.manifest.preprocessing.size
    if inputs.ndim != 4 or inputs.shape[1:] != (3, *size):
        raise ValueError(f"inputs have shape {inputs.shape}, the bundle takes (B, 3, {size[0]}, {size[1]})")
    stages = bundle.manifest.stages
    sessions = [
        open_session(normalized_input(bundle.stage_path(n)).SerializeToString()) for n in range(1, len(stages) + 1)
    ]
    parts = []
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size].astype(np.float32)
        left: dict[str, NDArray[Any]] = {}
        exits = []
        for stage, session in zip(stages, sessions, strict=True):
            feeds = {name: batch if name == "image" else left[name] for name in stage.inputs}
            feeds[NORMALIZED] = feeds.pop("image")
            names = list(stage.outputs)
            left = dict(zip(names, session.run(names, feeds), strict=True))
            exits.append(left["logits"])
        parts.append(np.stack(exits))
    return np.concatenate(parts, axis=1)
