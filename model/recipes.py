"""How variants are trained, as numbers: one frozen record per recipe, and the table of recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

_NOT_NEGATIVE = (
    "min_lr", "weight_decay", "backbone_lr", "clip_norm", "warmup_epochs", "cooldown_epochs", "clean_epochs", "mixup",
    "cutmix", "rand_augment", "seed",
)  # fmt: skip
_SHARES = (
    "ema_decay", "min_area", "padding", "mix_probability", "smoothing", "held_out", "erasing", "distillation", "colour",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to train a variant. The table `RECIPES` holds the ones whose results are reported."""

    variant: str
    epochs: int = 300
    warmup_epochs: int = 5
    batch_size: int = 128  # of the whole run, shared out over its processes
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    ema_decay: float = 0.9998
    clip_norm: float = 1.0
    min_area: float = 0.08  # random resized crop
    padding: float = 0.0  # in place of that crop: share of the side by which the whole image is moved at most
    colour: float = 0.4
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_probability: float = 1.0
    clean_epochs: int = 0  # the last epochs, in which no images are mixed: they come to see what they will be asked
    smoothing: float = 0.1
    held_out: float = 0.08  # slice of the training images that is kept for calibration
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    rand_augment: float = 0.0  # magnitude, 0 to 10; 0: without
    erasing: float = 0.0  # probability of random erasing
    drop_path: float | None = None  # in place of the variant's
    cooldown_epochs: int = 0  # after the others, at min_lr
    distillation: float = 0.0  # share of what earlier exits learn from the last one's answers; the paper has none
    in_memory: bool = False  # images are decoded once and augmented in batches, on the device: for small photographs
    check_every: int = 1  # epochs from one checkpoint, and look at the held-out slice, to the next
    accumulate: int = 1  # parts that a batch is cut into, so that it fits into memory
    optimizer: Literal["adamw", "sgd"] = "adamw"
    backbone_lr: float = 1.0  # factor on the rate of everything but the heads, for fine-tuning
    changes: dict[str, Any] = field(default_factory=dict)  # to the variant: fields of DVTConfig
    mean: tuple[float, ...] = ()  # of the images, per channel; empty: the variant's
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError, by name, for what would otherwise end a run after hours, or change it in silence."""
        for name, known in (("precision", ("fp32", "bf16", "fp16")), ("optimizer", ("adamw", "sgd"))):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {given}")
        for names, holds, wanted in (
            (("epochs", "batch_size", "check_every", "accumulate"), lambda value: value >= 1, "must be at least 1"),
            (("lr",), lambda value: value > 0, "must be above 0"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "must not be below 0"),
            (_SHARES, lambda value: 0 <= value <= 1, "lies between 0 and 1"),
        ):
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} {wanted}, got {value:g}")

    @property
    def all_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs


def _imagenet(variant: str, batch_size: int, lr: float, weight_decay: float) -> Recipe:
    """What the paper's authors train with on ImageNet (their supplement)."""
    return Recipe(
        variant=variant,
        epochs=300,
        warmup_epochs=20,
        cooldown_epochs=10,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        ema_decay=0.99996,
        rand_augment=9.0,
        erasing=0.25,
        drop_path=0.1,
        held_out=0.02,
        precision="bf16",
    )


# The embedded model, for a GPU: long enough for strong augmentation. The last exit teaches the earlier ones.
_PHOTO10 = Recipe(
    variant="photo10",
    epochs=200,
    warmup_epochs=8,
    batch_size=512,
    lr=2e-3,
    ema_decay=0.998,
    min_area=0.3,
    colour=0.0,
    rand_augment=7.0,
    mixup=0.2,
    mix_probability=0.6,
    clean_epochs=15,
    drop_path=0.1,
    precision="bf16",
    distillation=0.5,
    in_memory=True,
    check_every=10,
)

# Small enough to train many of them on a processor: to compare designs, not to be used. So few epochs ask for little
# augmentation: mild crops, every other batch cut and mixed.
_ABLATION = Recipe(
    variant="photo10",
    changes={"embed_dim": 64, "mlp_hidden": 128, "stem_dim": 32, "reuse_hidden": 32, "reuse_dim": 16},
    epochs=8,
    warmup_epochs=1,
    ema_decay=0.995,
    min_area=0.5,
    colour=0.0,
    mixup=0.0,
    mix_probability=0.5,
    clean_epochs=1,
    precision="bf16",
)

RECIPES: dict[str, Recipe] = {
    "micro": Recipe(variant="micro", epochs=2, warmup_epochs=0, batch_size=16, ema_decay=0.9, held_out=0.2),
    "t2t-vit-12": _imagenet("t2t-vit-12", batch_size=1024, lr=2e-3, weight_decay=0.03),
    "t2t-vit-14": _imagenet("t2t-vit-14", batch_size=512, lr=5e-4, weight_decay=0.05),
    "deit-small": _imagenet("deit-small", batch_size=1024, lr=1e-3, weight_decay=0.05),
    # From ImageNet to small photographs enlarged to 224 pixels; start it with --from. Padded crops, 4 of 32 pixels, and
    # flips are what is usual there; of a thumbnail 8 % would show nothing.
    "fine-tune": Recipe(
        variant="t2t-vit-12",
        epochs=60,
        warmup_epochs=0,
        batch_size=512,
        lr=0.05,
        min_lr=0.0,
        backbone_lr=0.01,
        optimizer="sgd",
        weight_decay=5e-4,
        ema_decay=0.999,
        padding=0.125,
        colour=0.0,
        mix_probability=0.0,
        smoothing=0.0,
        precision="bf16",
    ),
    # From a ViT that has learnt what images are (model.vit); start it with --from, best with --teacher.
    "from-vit": Recipe(
        variant="deit-small",
        epochs=30,
        warmup_epochs=2,
        batch_size=128,
        lr=3e-4,
        ema_decay=0.998,
        min_area=0.3,
        colour=0.0,
        mixup=0.2,
        mix_probability=0.5,
        clean_epochs=3,
        held_out=0.1,
        precision="bf16",
        distillation=0.5,
    ),
    "ablation": _ABLATION,
    # The same on CIFAR-10: a DVT against its own backbone (benchmarks/backbone.py). Too short for mixed images.
    "cifar10": replace(
        _ABLATION,
        changes={**_ABLATION.changes, "image_size": 32, "resize": 32, "grids": (3, 5, 8)},
        epochs=12,
        mix_probability=0.0,
    ),
    # As `ablation`, of thumbnails and in narrower models: a table in an hour or two of one core.
    "ablation-thumbnails": replace(
        _ABLATION,
        changes={
            **_ABLATION.changes,
            "image_size": 32,
            "resize": 32,
            "grids": (3, 5, 8),
            "depth": 3,
            "embed_dim": 48,
            "mlp_hidden": 96,
            "stem_dim": 16,
        },
        lr=2e-3,
        ema_decay=0.98,
        mix_probability=0.0,
        in_memory=True,
    ),
    "photo10": _PHOTO10,
}
