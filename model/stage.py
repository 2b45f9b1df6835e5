"""One stage of the cascade: a complete ViT on one token grid, which can stand alone (paper, Figure 2).

Shapes: B images, N tokens with the class token, n without it, D embed_dim, L layers, h heads, K classes.
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


def block_of(config: DVTConfig, layer: int, reuse_dim: int) -> Block:
    """`reuse_dim`: channels that feature reuse adds in it."""
    return Block(
        config.embed_dim,
        config.num_heads,
        config.mlp_hidden,
        config.qkv_bias,
        config.norm_eps,
        reuse_dim,
        config.drop_path * layer / max(config.depth - 1, 1),
    )


class Stage(nn.Module):
    """A reuse that a stage does not have is a module that is not there."""

    def __init__(self, config: DVTConfig, index: int) -> None:
        super().__init__()
        grid = config.grids[index]
        D = config.embed_dim
        self.index = index
        self.hands_on = index + 1 < config.num_stages
        reuses_features = config.feature_reuse and index > 0
        reuses_relations = config.relation_reuse and index > 0

        self.tokenizer = build_tokenizer(config, grid)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, D), std=0.02))
        if config.tokenizer == "t2t":
            self.pos_embed = nn.Parameter(sinusoid(grid * grid + 1, D), requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid * grid + 1, D), std=0.02))
        self.blocks = nn.ModuleList(
            block_of(config, layer, config.reuse_dim if reuses_features else 0) for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.head = nn.Linear(D, config.num_classes)
        self.feature_reuse: FeatureReuse | None = None
        self.relation_reuse: RelationReuse | None = None
        if reuses_features:
            self.feature_reuse = FeatureReuse(config, config.grids[index - 1], grid)
        if reuses_relations:
            self.relation_reuse = RelationReuse(config, config.grids[index - 1], grid)

    @property
    def takes_state(self) -> bool:
        return self.feature_reuse is not None or self.relation_reuse is not None

    def forward(self, images: Tensor, state: ReuseState | None = None) -> tuple[Tensor, ReuseState | None]:
        """images (B, 3, S, S), normalised; `state` of the stage before -> logits (B, K), state for the next stage.

        Raises ValueError for images of another size, and without the state that it reuses.
        """
        if state is None and self.takes_state:
            raise ValueError(
                f"stage {self.index + 1} reuses what stage {self.index} hands on: call it with that state, too"
            )
        x = self.tokenizer(images)  # (B, n, D)
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
        handed_on = ReuseState(self.hand_on(outputs), torch.cat(relations, dim=1)) if self.hands_on else None
        return self.head(self.norm(x[:, 0])), handed_on  # LayerNorm is per token: only the class token's is needed

    def hand_on(self, outputs: list[Tensor]) -> Tensor:
        """Of the blocks' outputs, each (B, N, D), what the next stage reuses."""
        return outputs[-1][:, 1:]

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the features and the relations that it hands on, without the batch."""
        N, D = self.pos_embed.shape[1:]
        return (N - 1, D), (sum(block.attn.num_heads for block in self.blocks), N, N)
