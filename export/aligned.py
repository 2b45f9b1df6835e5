"""Shapes that tensor cores like, for half precision. Done on the exported copy, never on the trained model.

Products in half precision run at full speed where every row is a multiple of 16 bytes, 8 numbers. A grid and a class
token are 50, 101 or 197 tokens. So tokens of padding follow, up to a multiple of 8. They compute something, but nobody
looks at it:
- as keys they are masked, or cut off where the logits are not handed on;
- the matrices of the next stage's upsampling have zeros where its inputs are padding. What is handed on is finite
  there, too, since the mask is not part of it.

The MLP over relations has its biases inside its products: a channel of ones is handed on with the relations, which
makes their number a multiple of 8, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DVTConfig
from model.layers import Attend, Attention, attend
from model.reuse import LayerFeatures, RelationReuse, ReuseState
from model.stage import Stage

MULTIPLE = 8
MASKED = -3e4  # finite, and with any logit still so in fp16
SATURATED = 8.0  # GELU leaves it as it is, also in fp32


def padded(size: int) -> int:
    """The next multiple."""
    return -(-size // MULTIPLE) * MULTIPLE


def tokens(config: DVTConfig, number: int) -> int:
    """Of stage `number`, class token and no padding."""
    return config.grids[number - 1] ** 2 + 1


def state_shapes(config: DVTConfig, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the features and the relations that stage `number` hands on, without the batch."""
    P = padded(tokens(config, number))
    channels = config.depth * config.num_heads
    # Features keep the class token: cutting it off would shift all others.
    return (P, config.embed_dim), (channels + _ones(config), P, P)


def _ones(config: DVTConfig) -> int:
    """Channels that follow the relations where they are reused: one of ones, and zeros."""
    channels = config.depth * config.num_heads
    return padded(channels + 1) - channels if config.relation_reuse else 0


def attention(config: DVTConfig, number: int, dtype: torch.dtype) -> Attend:
    """`model.layers.attend` for padded keys. It takes queries that are scaled already."""
    N = tokens(config, number)
    P = padded(N)
    if number < config.num_stages:
        mask = torch.zeros(P, dtype=dtype)
        mask[N:] = MASKED

        def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
            logits = q @ k.transpose(-2, -1)  # (B, h, P, P)
            if bias is not None:
                logits = logits + bias
            return (logits + mask).softmax(dim=-1) @ v, logits

        return masked

    def cut(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        # Views, also of the bias: its rows are P apart.
        return attend(q, k[:, :, :N], v[:, :, :N], None if bias is None else bias[..., :N], 1.0)

    return cut


def align(stage: Stage, config: DVTConfig) -> AlignedStage:
    """The same stage with padding, out of the same parts, which are changed. To be done before other savings; the
    attention operator is exchanged by the caller."""
    P = padded(tokens(config, stage.index + 1))
    for module in stage.modules():
        if isinstance(module, Attention):
            _scale_queries(module)
    if stage.feature_reuse is not None:
        source = padded(tokens(config, stage.index))
        for layer in stage.feature_reuse:
            assert isinstance(layer, LayerFeatures)
            layer.upsample = _to_the_end(F.pad(layer.upsample, (1, 0)), P, source)  # nothing of the class token
    if stage.relation_reuse is not None:
        stage.relation_reuse = AlignedRelations(stage.relation_reuse, config)
    return AlignedStage(stage, config)


def _to_the_end(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, to that size."""
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def _scale_queries(attention: Attention) -> None:
    queries = slice(0, attention.num_heads * attention.head_dim)
    with torch.no_grad():
        for parameter in attention.qkv.parameters():
            parameter[queries] *= attention.head_dim**-0.5


class AlignedStage(Stage):
    """B images, P tokens with the class token and padding."""

    places: Tensor
    ones: Tensor

    def __init__(self, stage: Stage, config: DVTConfig) -> None:
        nn.Module.__init__(self)
        self.index, self.hands_on = stage.index, stage.hands_on
        self.tokenizer, self.blocks, self.norm, self.head = stage.tokenizer, stage.blocks, stage.norm, stage.head
        self.feature_reuse, self.relation_reuse = stage.feature_reuse, stage.relation_reuse
        N = tokens(config, stage.index + 1)
        P = padded(N)
        self.padding = P - N
        # The class token, alike for all images, is part of its position.
        places = stage.pos_embed.detach().clone()
        places[:, :1] += stage.cls_token.detach()
        self.register_buffer("places", F.pad(places, (0, 0, 0, self.padding)))  # (1, P, D)
        ones = torch.zeros(1, _ones(config), P, P)
        ones[:, :1] = 1
        self.register_buffer("ones", ones)

    def forward(self, images: Tensor, state: ReuseState | None = None) -> tuple[Tensor, ReuseState | None]:
        """As `Stage.forward`."""
        x = F.pad(self.tokenizer(images), (0, 0, 1, self.padding)) + self.places  # (B, P, D)
        mixed = self.relation_reuse(state.relations) if self.relation_reuse is not None and state is not None else None
        features = self.feature_reuse(state.features) if self.feature_reuse is not None and state is not None else None
        relations = []
        for layer, block in enumerate(self.blocks):
            relation = None
            if self.relation_reuse is not None and mixed is not None:
                relation = self.relation_reuse.layer(mixed, layer)
            x, logits = block(x, relation, None if features is None else features[layer])
            if self.hands_on:
                relations.append(logits)
        answer = self.head(self.norm(x[:, 0]))
        if not self.hands_on:
            return answer, None
        if self.ones.shape[1]:
            relations.append(self.ones.expand(x.shape[0], -1, -1, -1))
        return answer, ReuseState(x, torch.cat(relations, dim=1))


class AlignedRelations(RelationReuse):
    def __init__(self, reuse: RelationReuse, config: DVTConfig) -> None:
        nn.Module.__init__(self)
        self.source, self.target = reuse.source, reuse.target
        self.num_heads = reuse.num_heads
        self.mlp = AlignedMlp(reuse.mlp, _ones(config))  # type: ignore[assignment]
        P, source = (padded(grid * grid + 1) for grid in (self.target, self.source))
        self.register_buffer("upsample", _to_the_end(reuse.upsample, P, source), persistent=False)

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        """(B, C, n, n) -> (B, h, P, P), n upstream tokens with padding. A layer's channels lie together, image by
        image: as rows of one matrix an image they need not be copied."""
        B, _, n, _ = mixed.shape
        own = mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]
        wide = own.reshape(B, self.num_heads * n, n) @ self.upsample.T
        return self.upsample @ wide.reshape(B, self.num_heads, n, -1)


class AlignedMlp(nn.Module):
    """The MLP over relations, for relations that a channel of ones follows. One hidden channel is made to hold a
    number, too, for the second bias."""

    first: Tensor
    second: Tensor

    def __init__(self, mlp: nn.Sequential, ones: int) -> None:
        super().__init__()
        one, self.act, two = mlp
        assert isinstance(one, nn.Conv2d)
        assert isinstance(two, nn.Conv2d)
        assert one.bias is not None
        assert two.bias is not None
        channels, hidden = one.in_channels, one.out_channels
        first = torch.zeros(padded(hidden + 1), channels + ones)
        first[:hidden, :channels] = one.weight.detach()[:, :, 0, 0]
        first[:hidden, channels] = one.bias.detach()
        first[hidden, channels] = SATURATED
        second = torch.zeros(two.out_channels, len(first))
        second[:, :hidden] = two.weight.detach()[:, :, 0, 0]
        second[:, hidden] = two.bias.detach() / SATURATED
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C + ones, n, n) -> (B, C, n, n)."""
        B, _, n, _ = x.shape
        y: Tensor = self.second @ self.act(self.first @ x.flatten(2))  # (B, C, n * n)
        return y.reshape(B, -1, n, n)
