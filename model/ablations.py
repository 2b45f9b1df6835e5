"""Designs of the two reuses that the paper tried and left (its Tables 5 and 6; 7 and 8 in the NeurIPS version): to be
compared with (`benchmarks.ablations`), not to be used. Nothing else needs this module.

Shapes: n tokens of the upstream grid, N of this stage's, both without the class token, D embed_dim, C reuse_dim,
L layers, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DVTConfig
from model.reuse import FeatureReuse, LayerFeatures, RelationReuse
from model.stage import Stage, block_of


def ablated_stage(config: DVTConfig, index: int) -> Stage:
    """The stage with whatever `config` has in place of the design that the paper kept."""
    stages = {"layer-wise": LayerWiseStage, "class-token": ClassTokenStage}
    stage = stages.get(config.feature_design, Stage)(config, index)
    if stage.feature_reuse is not None and config.feature_design != "final":
        reuse = FEATURES[config.feature_design](config, config.grids[index - 1], config.grids[index])
        stage.feature_reuse = reuse
        for layer in range(len(reuse), config.depth):  # these reuse nothing
            stage.blocks[layer] = block_of(config, layer, 0)
    if stage.relation_reuse is not None and config.relation_design != "all-layers":
        relations = RELATIONS[config.relation_design]
        stage.relation_reuse = relations(config, config.grids[index - 1], config.grids[index])
    return stage


# --- features ---------------------------------------------------------------------------------------------------------


class LayerWiseStage(Stage):
    def hand_on(self, outputs: list[Tensor]) -> Tensor:
        return torch.stack([x[:, 1:] for x in outputs], dim=1)  # (B, L, n, D)

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features, relations = super().state_shapes()
        return (len(self.blocks), *features), relations


class LayerWiseFeatures(FeatureReuse):
    """Layer l reuses the features of layer l."""

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, L, n, D) -> (B, N+1, C) for each layer."""
        return [layer(own) for layer, own in zip(self, features.unbind(1), strict=True)]


class ClassTokenStage(Stage):
    def hand_on(self, outputs: list[Tensor]) -> Tensor:
        return outputs[-1]  # (B, n+1, D)

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (n, D), relations = super().state_shapes()
        return (n + 1, D), relations


class ClassTokenLayer(LayerFeatures):
    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__(config, source, target)
        self.upsample = torch.block_diag(torch.ones(1, 1), self.upsample[1:])  # (N+1, n+1)


class ClassTokenFeatures(FeatureReuse):
    """The class token is reused as well."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        nn.ModuleList.__init__(self, (ClassTokenLayer(config, source, target) for _ in range(config.depth)))


class FirstLayerFeatures(FeatureReuse):
    """Only the first layer reuses."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        nn.ModuleList.__init__(self, [LayerFeatures(config, source, target)])
        self.depth = config.depth

    def forward(self, features: Tensor) -> list[Tensor | None]:  # type: ignore[override]
        """(B, n, D) -> (B, N+1, C) for the first layer, None for the others."""
        return [self[0](features), *[None] * (self.depth - 1)]


class PlainFeatures(FeatureReuse):
    """Without the LayerNorm."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__(config, source, target)
        for layer in self:
            layer.norm = nn.Identity()


FEATURES: dict[str, type[FeatureReuse]] = {
    "layer-wise": LayerWiseFeatures,
    "class-token": ClassTokenFeatures,
    "first-layer": FirstLayerFeatures,
    "no-norm": PlainFeatures,
}


# --- relations --------------------------------------------------------------------------------------------------------


class LayerWiseRelations(RelationReuse):
    """Each layer's come from those of the same layer."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__(config, source, target)
        channels, groups = config.depth * config.num_heads, config.depth
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, kernel_size=1, groups=groups),
            nn.GELU(),
            nn.Conv2d(3 * channels, channels, kernel_size=1, groups=groups),
        )


class FinalLayerRelations(RelationReuse):
    """All come from those of the last layer."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__(config, source, target)
        channels = config.depth * config.num_heads
        self.mlp[0] = nn.Conv2d(config.num_heads, 3 * channels, kernel_size=1)

    def forward(self, relations: Tensor) -> Tensor:
        """(B, L*h, n+1, n+1) -> the same shape, before upsampling."""
        return super().forward(relations[:, -self.num_heads :])


class LinearRelations(RelationReuse):
    """A linear map for the MLP."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__(config, source, target)
        channels = config.depth * config.num_heads
        self.mlp = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1))


class NaiveRelations(RelationReuse):
    """Upsampled along the flat list of tokens, as if they lay on a line."""

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        """(B, L*h, n+1, n+1) -> (B, h, N+1, N+1)."""
        own = mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]
        return self._stretched(self._stretched(own).transpose(2, 3)).transpose(2, 3)

    def _stretched(self, x: Tensor) -> Tensor:
        """(B, h, R, n+1) -> (B, h, R, N+1), the class token as it is."""
        tokens = F.interpolate(x[..., 1:].flatten(1, 2), size=self.target * self.target, mode="linear")
        return torch.cat((x[..., :1], tokens.unflatten(1, x.shape[1:3])), dim=-1)


RELATIONS: dict[str, type[RelationReuse]] = {
    "layer-wise": LayerWiseRelations,
    "final-layer": FinalLayerRelations,
    "linear": LinearRelations,
    "naive-upsampling": NaiveRelations,
}
