"""The training objective (paper, Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cascade_loss(exits: list[Tensor], targets: Tensor) -> Tensor:
    """Plain sum of the exits' cross entropies.

    exits: logits, each (B, K); targets: classes (B,) or distributions (B, K).
    """
    losses = [F.cross_entropy(logits.float(), targets) for logits in exits]
    return torch.stack(losses).sum()
