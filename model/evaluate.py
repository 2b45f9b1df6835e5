"""What a trained DVT is worth: accuracy and logits of every exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model.dvt import DVT


@torch.inference_mode()
def exit_accuracy(
    model: DVT, batches: Iterable[tuple[Tensor, Tensor]], normalize: Callable[[Tensor], Tensor]
) -> list[float]:
    """Top-1 accuracy of every exit over (images (B, 3, H, W) from 0 to 255, labels (B,)) batches."""
    was_training = model.training
    model.eval()
    counts, seen = [], 0
    for images, labels in batches:
        exits = model(normalize(images))
        theirs = labels.to(exits[0].device)
        counts.append(torch.stack([(logits.argmax(1) == theirs).sum() for logits in exits]))
        seen += len(labels)
    model.train(was_training)
    if not seen:
        raise ValueError("no images to evaluate on")
    return (torch.stack(counts).sum(0).double() / seen).tolist()


@torch.inference_mode()
def exit_logits(model: DVT, inputs: Tensor, batch_size: int = 64) -> Tensor:
    """Logits of every exit for normalised inputs (B, 3, H, W): (exits, B, K), float32."""
    model.eval()
    return torch.cat([torch.stack(model(batch)) for batch in inputs.float().split(batch_size)], dim=1)
