"""What a DVT is made of, as numbers: one frozen record per variant, and the table of variants.

Nothing here computes; a configuration travels inside a checkpoint and rebuilds the very same network.
Figures: "Not All Images are Worth 16x16 Words" (Wang et al., NeurIPS 2021), section 4 and its supplement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DVTConfig:
    """A cascade of ViTs that see the same image as coarser or finer token grids. All stages share these numbers,
    none of them shares weights."""

    name: str
    image_size: int  # pixels, square
    grids: tuple[int, ...]  # tokens per side, one entry a stage, coarse to fine
    tokenizer: Literal["t2t", "patch", "conv"]
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    qkv_bias: bool
    norm_eps: float
    feature_reuse: bool = True
    relation_reuse: bool = True
    reuse_hidden: int = 128  # hidden width of the feature-reuse MLP
    reuse_dim: int = 48  # channels that feature reuse adds in front of each MLP
    stem_dim: int = 64  # "conv" tokenizer only: channels of its stem
    drop_path: float = 0.0  # of the last block; earlier ones rise linearly to it
    num_classes: int = 1000
    labels: tuple[str, ...] = ()  # empty: classes have numbers only
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: int = 256  # short side before the centre crop at evaluation, pixels

    def __post_init__(self) -> None:
        if len(self.grids) < 2 or any(a >= b for a, b in pairwise(self.grids)):
            raise ValueError(f"{self.name}: grids must be at least two and rise, got {self.grids}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{self.name}: embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.labels)} labels for {self.num_classes} classes")

    @property
    def num_stages(self) -> int:
        return len(self.grids)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DVTConfig:
        """Rebuild from JSON. Raises ValueError for an unknown or missing field, by name."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown configuration fields: {', '.join(unknown)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(str(error)) from error


_T2T = {"image_size": 224, "grids": (7, 10, 14), "tokenizer": "t2t", "qkv_bias": False, "norm_eps": 1e-5}

VARIANTS: dict[str, DVTConfig] = {
    config.name: config
    for config in (
        # The paper's main models.
        DVTConfig(name="t2t-vit-12", embed_dim=256, depth=12, num_heads=4, mlp_hidden=512, **_T2T),  # type: ignore[arg-type]
        DVTConfig(name="t2t-vit-14", embed_dim=384, depth=14, num_heads=6, mlp_hidden=1152, **_T2T),  # type: ignore[arg-type]
        DVTConfig(
            name="deit-small",
            image_size=224,
            grids=(7, 10, 14),
            tokenizer="patch",
            embed_dim=384,
            depth=12,
            num_heads=6,
            mlp_hidden=1536,
            qkv_bias=True,
            norm_eps=1e-6,
        ),
        # Small photographs, 64x64, ten everyday classes: the model that the server embeds. A convolutional stem
        # instead of T2T: with 24k training images a transformer alone does not learn edges (Xiao et al., 2021).
        DVTConfig(
            name="photo10",
            image_size=64,
            grids=(4, 6, 8),
            tokenizer="conv",
            embed_dim=128,
            depth=4,
            num_heads=2,
            mlp_hidden=256,
            qkv_bias=True,
            norm_eps=1e-6,
            reuse_hidden=64,
            reuse_dim=32,
            drop_path=0.05,
            num_classes=10,
            resize=64,
        ),
        # A real three-exit DVT that trains and exports in moments: every test runs the code that users run.
        DVTConfig(
            name="micro",
            image_size=48,
            grids=(2, 3, 4),
            tokenizer="t2t",
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_hidden=48,
            qkv_bias=False,
            norm_eps=1e-5,
            reuse_hidden=16,
            reuse_dim=8,
            num_classes=4,
            resize=48,
        ),
    )
}


def variant(name: str, **changes: Any) -> DVTConfig:
    """A row of the table, with fields replaced. Raises ValueError for an unknown name, listing the known ones."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    return replace(VARIANTS[name], **changes)
