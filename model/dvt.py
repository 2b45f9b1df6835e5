"""The cascade: the DVT that chains its stages (paper, Figure 2).

Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn

from model.ablations import ablated_stage
from model.config import DVTConfig
from model.data import Normalize, resize_and_crop, to_tensor, upright
from model.predict import Predictions, predict
from model.stage import Stage


class DVT(nn.Module):
    """All stages in a row. Training runs every exit on every image; `predict`, as a server, stops at the first that is
    sure."""

    def __init__(self, config: DVTConfig) -> None:
        super().__init__()
        self.config = config
        build = ablated_stage if config.ablates else Stage
        self.stages = nn.ModuleList(build(config, i) for i in range(config.num_stages))
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S), normalised -> logits of every exit, each (B, K). Raises ValueError for another size."""
        exits, state = [], None
        for stage in self.stages:
            logits, state = stage(images, state)
            exits.append(logits)
        return exits

    def predict(self, images: Tensor, thresholds: Sequence[float], batch_size: int = 64) -> Predictions:
        """What the first exit that is sure says of each image, (B, 3, S, S) and normalised (see `preprocess`).

        An image leaves where its largest probability reaches the exit's threshold; what is left of several batches goes
        on as one. `thresholds`: one per exit but the last. Raises ValueError for another number of them, and for images
        of another size.
        """
        was_training = self.training
        self.eval()
        try:
            return predict(list(self.stages), images, thresholds, batch_size)
        finally:
            self.train(was_training)

    def preprocess(self, photos: Sequence[Image.Image]) -> Tensor:
        """Photos as evaluation and server see them: (B, 3, S, S), normalised, on the model's device."""
        config = self.config
        squares = [to_tensor(resize_and_crop(upright(p), config.resize, config.image_size)) for p in photos]
        device = self.stages[0].cls_token.device
        return Normalize(config.mean, config.std, device)(torch.stack(squares))

    def reset_classifier(self, num_classes: int, labels: Sequence[str] = ()) -> None:
        """New heads, untrained, at all exits. Raises ValueError for labels of another number."""
        self.config = replace(self.config, num_classes=num_classes, labels=tuple(labels))
        for stage in self.stages:
            old = stage.head.weight
            stage.head = nn.Linear(old.shape[1], num_classes, device=old.device, dtype=old.dtype)
            _init_weights(stage.head)


def _init_weights(module: nn.Module) -> None:
    """ViT's initialisation: truncated normal 0.02 for linear layers, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
