"""Image to tokens without T2T: one patch convolution, or a small convolutional stem in front of it."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from model.backbones.images import check_images


def patch_geometry(size: int, grid: int) -> tuple[int, int]:
    """(kernel = stride, padding) of a patch convolution from `size` pixels to `grid` tokens a side: the smallest patch
    that covers the image, padded evenly. 224 pixels: 7 -> 32/0, 10 -> 23/3, 14 -> 16/0, as published."""
    kernel = -(-size // grid)
    padding = -(-(kernel * grid - size) // 2)
    return kernel, padding


class PatchEmbed(nn.Module):
    """Non-overlapping patches (ViT, DeiT)."""

    def __init__(self, size: int, grid: int, embed_dim: int) -> None:
        super().__init__()
        self.size = size
        kernel, padding = patch_geometry(size, grid)
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=kernel, stride=kernel, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, grid*grid, D)."""
        check_images(x, self.size)
        return self.proj(x).flatten(2).transpose(1, 2)


class ResidualConv(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (He et al., 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        y: Tensor = self.act(x + self.branch(x))
        return y


class ConvStem(nn.Module):
    """Two 3x3 stride-2 convolutions, patches of what they see (Xiao et al., "Early Convolutions Help Transformers See
    Better", 2021), and a residual block among the tokens: its cost grows with their number, so coarse stages stay
    cheap."""

    def __init__(self, size: int, grid: int, embed_dim: int, stem_dim: int) -> None:
        super().__init__()
        self.size = size
        widths = (3, stem_dim // 2, stem_dim)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.GELU()]
        kernel, padding = patch_geometry(size // 4, grid)
        layers += [nn.Conv2d(stem_dim, embed_dim, kernel, stride=kernel, padding=padding), ResidualConv(embed_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, grid*grid, D)."""
        check_images(x, self.size)
        tokens: Tensor = self.layers(x).flatten(2).transpose(1, 2)
        return tokens
