"""What is asked: the bodies of requests, from an image folder, an array of pixels, or photos made by code."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from server.bench.orders import Body
from server.bench.photos import photos
from server.documents import cause, read_file

TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
_MOST_BYTES = 256 * 2**20  # of one file, and of all together: they are held by every sender
_SPOILT = 16  # bodies with a broken image, at most
_BOUNDARY = "3f7c0d8e5b1a4926"


class WorkloadError(ValueError):
    """In one line."""


@dataclass(frozen=True)
class Workload:
    """Bodies of sound requests, and behind them some that have one broken image."""

    bodies: tuple[Body, ...]
    sound: int
    images: int  # distinct ones
    source: str

    @property
    def labelled(self) -> bool:
        return any(label is not None for body in self.bodies for label in body.labels)


Example = tuple[bytes, str, str | None]  # a file, its media type, its label where it is known


def workload(
    source: Path | None, *, images: int, together: int = 1, labels: Collection[str] = (), seed: int = 0
) -> Workload:
    """At most `images` different images of `source`, drawn by the seed, `together` a request.

    `source`: a folder of images, in folders by class or not; a `.npy` of uint8 (N, H, W, 3), sent as PNG; None: photos
    made by code. A class counts as a label where it is one of `labels`. Raises WorkloadError.
    """
    examples: list[Example]
    if source is None:
        examples = [(photo, "image/jpeg", None) for photo in photos(images)]
    elif source.suffix.lower() == ".npy":
        examples = _pictures(source, images, seed)
    else:
        examples = _files(source, images, labels, seed)
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    count = max(1, len(order) // together) if together > 1 else len(order)
    # In turn, so that a request may have more images than there are.
    groups = [[examples[order[(n * together + k) % len(order)]] for k in range(together)] for n in range(count)]
    spoilt = [_spoil(group) for group in groups[:_SPOILT]]
    bodies = tuple(_body(group) for group in groups + spoilt)
    return Workload(bodies, len(groups), len(examples), "made by code" if source is None else source.name)


def _files(root: Path, images: int, labels: Collection[str], seed: int) -> list[Example]:
    try:
        found = sorted(file for file in root.rglob("*") if file.suffix.lower() in TYPES)
        if not found:
            raise WorkloadError(f"{root}: {'no images in it' if root.is_dir() else 'no such folder'}")
        chosen = np.random.default_rng(seed).permutation(len(found))[:images].tolist()
        examples: list[Example] = []
        left = _MOST_BYTES
        for number in sorted(chosen):
            file = found[number]
            content = read_file(file, _MOST_BYTES)
            left -= len(content)
            if left < 0:
                raise WorkloadError(f"{root}: more than {_MOST_BYTES // 2**20} MiB of images; take fewer with --images")
            label = file.parent.name if file.parent != root else None
            examples.append((content, TYPES[file.suffix.lower()], label if label in labels else None))
    except WorkloadError:
        raise
    except (OSError, ValueError) as error:
        name = error.filename if isinstance(error, OSError) and error.filename else root
        raise WorkloadError(f"{name}: {cause(error)}") from None
    return examples


def _pictures(path: Path, images: int, seed: int) -> list[Example]:
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = cause(error) if isinstance(error, OSError) else "not an array of numpy"
        raise WorkloadError(f"{path}: {why}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        shape = ", ".join(map(str, pixels.shape))
        raise WorkloadError(f"{path}: images are uint8 (N, H, W, 3), not {pixels.dtype} ({shape})")
    chosen = np.random.default_rng(seed).permutation(len(pixels))[:images]
    return [(_png(pixels[number]), "image/png", None) for number in np.sort(chosen)]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(stream, "PNG")
    return stream.getvalue()


def _spoil(group: Sequence[Example]) -> list[Example]:
    """Its last image is cut off."""
    *rest, (content, media_type, label) = group
    return [*rest, (content[: min(64, len(content) // 2)], media_type, label)]


def _body(group: Sequence[Example]) -> Body:
    labels = tuple(label for _, _, label in group)
    if len(group) == 1:
        return Body(group[0][0], group[0][1], labels)
    parts = [
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="image"; filename="{number}"\r\n'
        f"content-type: {media_type}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for number, (content, media_type, _) in enumerate(group)
    ]
    return Body(b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={_BOUNDARY}", labels)
