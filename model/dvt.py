"""The cascade: stages that can stand alone, and the DVT that chains them (paper, Figure 2).

Shapes: B images, N tokens with the class token, D embed_dim, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.backbones.t2t_vit import TokensToToken, sinusoid
from model.backbones.vit import ConvStem, PatchEmbed
from model.config import DVTConfig
from model.layers import Block
from model.reuse import FeatureReuse, RelationReuse, ReuseState


def build_tokenizer(config: DVTConfig, grid: int) -> nn.Module:
    """Image -> tokens for one grid, (B, 3, S, S) -> (B, grid*grid, D)."""
    match config.tokenizer:
        case "t2t":
            return TokensToToken(config.image_size, grid, config.embed_dim)
        case "patch":
            return PatchEmbed(config.image_size, grid, config.embed_dim)
        case "conv":
            return ConvStem(config.image_size, grid, config.embed_dim, config.stem_dim)


class Stage(nn.Module):
    """One complete ViT on one token grid. A reuse that a stage does not have is a module that is not there."""

    def __init__(self, config: DVTConfig, index: int) -> None:
        super().__init__()
        grid = config.grids[index]
        D = config.embed_dim
        self.index = index
        self.hands_on = index + 1 < config.num_stages
        reuses_features = config.feature_reuse and index > 0
        reuses_relations = config.relation_reuse and index > 0
        first_only = config.feature_design == "first-layer"
        self.feature_design = config.feature_design

        self.tokenizer = build_tokenizer(config, grid)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, D), std=0.02))
        if config.tokenizer == "t2t":
            self.pos_embed = nn.Parameter(sinusoid(grid * grid + 1, D), requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid * grid + 1, D), std=0.02))
        self.blocks = nn.ModuleList(
            Block(
                D,
                config.num_heads,
                config.mlp_hidden,
                config.qkv_bias,
                config.norm_eps,
                config.reuse_dim if reuses_features and (layer == 0 or not first_only) else 0,
                config.drop_path * layer / max(config.depth - 1, 1),
            )
            for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.head = nn.Linear(D, config.num_classes)
        self.feature_reuse: FeatureReuse | None = None
        self.relation_reuse: RelationReuse | None = None
        if reuses_features:
            self.feature_reuse = FeatureReuse(config, config.grids[index - 1], grid)
        if reuses_relations:
            self.relation_reuse = RelationReuse(config, config.grids[index - 1], grid)

    def forward(self, images: Tensor, state: ReuseState | None = None) -> tuple[Tensor, ReuseState | None]:
        """images (B, 3, S, S), normalised; `state` of the stage before -> logits (B, K), state for the next stage."""
        x = self.tokenizer(images)  # (B, N-1, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed  # (B, N, D)
        mixed = self.relation_reuse(state.relations) if self.relation_reuse is not None and state is not None else None
        features = self.feature_reuse(state.features) if self.feature_reuse is not None and state is not None else None
        relations, outputs = [], []
        for layer, block in enumerate(self.blocks):
            relation = self.relation_reuse.layer(mixed, layer) if self.relation_reuse is not None else None
            x, logits = block(x, relation, None if features is None else features[layer])
            if self.hands_on:
                relations.append(logits)
                outputs.append(x)
        handed_on = ReuseState(self._features(outputs), torch.cat(relations, dim=1)) if self.hands_on else None
        return self.head(self.norm(x[:, 0])), handed_on  # LayerNorm is per token: only the class token's is needed

    def _features(self, outputs: list[Tensor]) -> Tensor:
        """Of the blocks' outputs, each (B, N, D), what the next stage reuses."""
        match self.feature_design:
            case "layer-wise":
                return torch.stack([x[:, 1:] for x in outputs], dim=1)
            case "class-token":
                return outputs[-1]
        return outputs[-1][:, 1:]


class DVT(nn.Module):
    """All stages in a row. Training runs every exit on every image; a server runs the stages one by one and stops."""

    def __init__(self, config: DVTConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(Stage(config, i) for i in range(config.num_stages))
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S), normalised -> logits of every exit, each (B, K)."""
        exits, state = [], None
        for stage in self.stages:
            logits, state = stage(images, state)
            exits.append(logits)
        return exits


def _init_weights(module: nn.Module) -> None:
    """ViT's initialisation: truncated normal 0.02 for linear layers, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
