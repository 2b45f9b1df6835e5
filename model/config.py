"""What a DVT is made of, as numbers: one frozen record per variant, and the table of variants.

Nothing here computes; a configuration travels inside a checkpoint and rebuilds the very same network.
Figures: "Not All Images are Worth 16x16 Words" (Wang et al., NeurIPS 2021), section 4 and its supplement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_args

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


FeatureDesign = Literal["final", "layer-wise", "class-token", "first-layer", "no-norm"]
"""What f_l takes and where it goes. "final": every layer reuses the last features of the stage before. The others are
the paper's ablations (`model.ablations`): layer l reuses layer l's features; the class token's feature as well; only
the first layer reuses; no LayerNorm in f_l."""

RelationDesign = Literal["all-layers", "layer-wise", "final-layer", "linear", "naive-upsampling"]
"""What r_l is made from. "all-layers": an MLP over the logits of all layers. The others are the paper's ablations: each
layer's from its own; all from the last layer's; a linear map for the MLP; upsampling along the flat list of tokens, as
if they lay on a line."""

Tokenizer = Literal["t2t", "patch", "conv"]


_CHOICES = {
    "tokenizer": get_args(Tokenizer),
    "feature_design": get_args(FeatureDesign),
    "relation_design": get_args(RelationDesign),
}
_SIZES = (
    "image_size", "embed_dim", "depth", "num_heads", "mlp_hidden", "reuse_hidden", "reuse_dim", "stem_dim",
    "num_classes",
)  # fmt: skip


@dataclass(frozen=True)
class DVTConfig:
    """A cascade of ViTs that see the same image as coarser or finer token grids. All stages share these numbers,
    none of them shares weights."""

    name: str
    image_size: int  # pixels, square
    grids: tuple[int, ...]  # tokens per side, one entry a stage, coarse to fine; a single one is the backbone alone
    tokenizer: Tokenizer
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    qkv_bias: bool
    norm_eps: float
    feature_reuse: bool = True
    relation_reuse: bool = True
    feature_design: FeatureDesign = "final"
    relation_design: RelationDesign = "all-layers"
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
        for field in _SIZES:
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")
        if not self.grids or any(a >= b for a, b in pairwise(self.grids)):
            raise ValueError(f"{self.name}: grids must be at least one and rise, got {self.grids}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{self.name}: embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.resize < self.image_size:
            raise ValueError(f"{self.name}: resize {self.resize} is smaller than image_size {self.image_size}")
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{self.name}: {field} is one of {', '.join(known)}")
        for field in ("mean", "std"):
            if len(getattr(self, field)) != 3:
                raise ValueError(f"{self.name}: {field} has {len(getattr(self, field))} numbers, one a channel is 3")
        if min(self.std) <= 0:
            raise ValueError(f"{self.name}: std must be above 0, got {self.std}")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.labels)} labels for {self.num_classes} classes")

    @property
    def ablates(self) -> bool:
        """Whether it has a design that only ablations have."""
        return (self.feature_design, self.relation_design) != ("final", "all-layers")

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


# Tokens-to-token ViTs (Yuan et al., 2021): (embed_dim, depth, mlp_hidden); heads are 64 wide in all backbones.
_T2T = {
    "t2t-vit-7": (256, 7, 512),
    "t2t-vit-10": (256, 10, 512),
    "t2t-vit-12": (256, 12, 512),
    "t2t-vit-14": (384, 14, 1152),
    "t2t-vit-19": (448, 19, 1344),
    "t2t-vit-24": (512, 24, 1536),
}
# Plain patches: DeiT (Touvron et al., 2021) and ViT (Dosovitskiy et al., 2021).
_PATCH = {
    "deit-tiny": (192, 12, 768),
    "deit-small": (384, 12, 1536),
    "vit-base": (768, 12, 3072),
}


def backbone(
    name: str, tokenizer: Literal["t2t", "patch"], embed_dim: int, depth: int, mlp_hidden: int, **fields: Any
) -> DVTConfig:
    """A DVT on a published backbone: 224 pixels, 7x7, 10x10 and 14x14 tokens unless `fields` say otherwise."""
    plain = tokenizer == "patch"
    defaults = {"image_size": 224, "grids": (7, 10, 14), "qkv_bias": plain, "norm_eps": 1e-6 if plain else 1e-5}
    return DVTConfig(
        name=name,
        tokenizer=tokenizer,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // 64,
        mlp_hidden=mlp_hidden,
        **{**defaults, **fields},
    )


VARIANTS: dict[str, DVTConfig] = {
    config.name: config
    for config in (
        *(backbone(name, "t2t", *sizes) for name, sizes in _T2T.items()),
        *(backbone(name, "patch", *sizes) for name, sizes in _PATCH.items()),
        # With two exits, which the paper finds faster in practice (its Table 2).
        backbone("t2t-vit-12-two-exits", "t2t", *_T2T["t2t-vit-12"], grids=(7, 14)),
        # Small photographs, 64x64, ten everyday classes: the model that the server embeds. A convolutional stem
        # instead of T2T: with 24k training images a transformer alone does not learn edges (Xiao et al., 2021).
        DVTConfig(
            name="photo10",
            image_size=64,
            grids=(4, 8, 16),
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
        near = get_close_matches(name, VARIANTS)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown variant {name!r}; {meant}known: {', '.join(VARIANTS)}")
    return replace(VARIANTS[name], **changes)
