"""The training objective (paper, Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cascade_loss(
    exits: list[Tensor], targets: Tensor, distillation: float = 0.0, teacher: Tensor | None = None
) -> Tensor:
    """Plain sum of the exits' cross entropies, which is the paper's. With `distillation`, that share of what earlier
    exits learn comes from the last one's answers in place of the targets (Phuong and Lampert, "Distillation-based
    training for multi-exit architectures", 2019); the last exit learns nothing from theirs. With a `teacher` it comes
    from the teacher's, for all exits.

    exits, teacher: logits, each (B, K); targets: classes (B,) or distributions (B, K).
    """
    losses = [F.cross_entropy(logits.float(), targets) for logits in exits]
    if distillation:
        answers = (exits[-1] if teacher is None else teacher).detach().float().softmax(dim=-1)
        for number, logits in enumerate(exits[:-1] if teacher is None else exits):
            losses[number] = torch.lerp(losses[number], F.cross_entropy(logits.float(), answers), distillation)
    return torch.stack(losses).sum()
