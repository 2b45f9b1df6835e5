"""From the bytes of one image file to the pixels that the model takes: (H, W, 3) uint8, RGB, resized and cropped.

This is the edge: the bytes are a stranger's, so whatever a decoder raises is a `BadImage`. Normalisation is not here,
it is in the exported graph. Nothing here knows HTTP beyond the media type, and no state is kept but one lock.

Theory of operation
-------------------
1. The magic bytes name the format, out of five; a Content-Type that says otherwise is refused. No other decoder of
   Pillow is ever reached, as the plugin is called by name and not found by search.
2. The size is read from the header with `struct`, and judged, before any decoder sees the file. So a 97-byte file
   cannot ask for gigabytes.
3. JPEG is decoded by libjpeg-turbo through simplejpeg, already shrunk in the DCT domain where that leaves at least
   twice the pixels that the resize needs (closer than that the error is visible: MAE 0.8 and more, against 0.3). What
   simplejpeg does not take (CMYK, odd subsampling, harmless warnings) and every other format is decoded by Pillow.
4. A JPEG that is not much longer than wide is resized and then cropped, with vector instructions (cykooz-resizer: in a
   fifth of Pillow's time, mean difference 0.2 of 255). For every other image Pillow resizes only the box that becomes
   the crop: within one level of the same (two, in one value of 500), and a 6000 x 1 image never becomes the 1.6 GB that
   the textbook's first half makes of it.
5. Orientation turns the box before, and the small result after, never the large image.

Alpha is dropped, not composited: that is `convert("RGB")`, which is what image folders are trained with.

Memory: one decode needs 8.7 bytes for each pixel of `max_pixels` at most (measured, a progressive CMYK JPEG; RGBA PNG
6, see `_WEIGHT` for WebP), and large images take turns, so that the sum over the decode threads stays bounded too.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock, local
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from server.core import Pixels
from server.errors import BadImage, ImageTooLarge, ServeError, UnsupportedMediaType

if TYPE_CHECKING:
    from server.bundle.manifest import Preprocessing

MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")

_ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}
_UNTOLD = ("", "application/octet-stream", "binary/octet-stream")  # the sender does not know: the magic decides

_PLUGINS: dict[str, type[ImageFile]] = {
    "image/jpeg": JpegImageFile,
    "image/png": PngImageFile,
    "image/webp": WebPImageFile,
    "image/gif": GifImageFile,
    "image/bmp": BmpImageFile,
}

# How many pixels of `max_pixels` one pixel counts for. libwebp's animation decoder, the only way that Pillow offers,
# holds two RGBA canvases beside Pillow's two copies.
_WEIGHT = {"image/webp": 2.0}

_QUICK_PIXELS = 128 * 128  # before and after: a JPEG that takes less time than it takes to wake a thread for it
_QUICK_BYTES = 16 * 1024
_QUICK_SEGMENTS = 32  # before the picture: encoders write about ten
_TAKES_TURNS = 4_000_000  # weighted pixels; an image above that, about 32 MB, is decoded alone
_large_image = Lock()

_MAX_SCANS = 64  # of a JPEG; encoders write 10 to 18, and each costs one more pass over all pixels
_MAX_SEGMENTS = 2000  # of a JPEG; cameras write some tens, a large colour profile 255
_MAX_PREAMBLE = 2**20  # bytes of a GIF before its first frame, which Pillow reads block by block
_ORIENTATION = 0x0112  # the EXIF tag

# What turns the stored image upright, per EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

EncodedImage = tuple[bytes, str | None]  # the file, and the media type that the client states for it
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may ask for, judged from its header.

    Small sides are allowed by default: thanks to `box=` a 1 x 1 image costs no more than another.
    """

    max_pixels: int = 25_000_000  # 218 MB at worst while decoding; 89,000,000 is where Pillow begins to warn
    max_aspect: float = 20.0  # long side over short side
    min_side: int = 1  # pixels


class NeedsTurnError(Exception):
    """A large image, which was not to wait for its turn."""


class NeedsThreadError(Exception):
    """An image that may take longer than an event loop should."""


def decode(
    data: bytes,
    content_type: str | None,
    preprocessing: Preprocessing,
    limits: ImageLimits,
    *,
    wait_for_turn: bool = True,
    only_quick: bool = False,
) -> Pixels:
    """Decode one image file: upright, first frame, short side resized, centre cropped. Blocking; releases the GIL.

    Expects `preprocessing.crop` to be no larger than `preprocessing.resize` (the bundle checks that).

    Returns (H, W, 3) uint8, RGB, contiguous, read-only.

    Raises UnsupportedMediaType (not one of the five formats, or not the one that `content_type` names),
    ImageTooLarge (more pixels, or a longer shape, than `limits` allow; told from the header), or
    BadImage(reason=...) (everything else: empty, truncated, corrupt, too small). With `wait_for_turn=False` also
    NeedsTurnError, at once, for an image so large that it takes turns with other large ones. With `only_quick`
    NeedsThreadError, for all but small JPEGs of one scan that libjpeg-turbo takes: those take some tens of
    microseconds, a third of a millisecond at most, whatever is in them.
    """
    if only_quick and (len(data) > _QUICK_BYTES or preprocessing.resize**2 > _QUICK_PIXELS):
        raise NeedsThreadError
    media_type = _media_type(data, content_type)
    try:
        jpeg = _JpegHeader.read(data, only_quick) if media_type == "image/jpeg" else None
        width, height = jpeg.size if jpeg is not None else _declared_size(data, media_type)
        _check(width, height, media_type, limits)
        if only_quick and (jpeg is None or jpeg.several_scans or width * height > _QUICK_PIXELS):
            raise NeedsThreadError
        shrinks = jpeg is not None and not jpeg.several_scans and min(width, height) >= 4 * preprocessing.resize
        # A JPEG of one scan that is shrunk row by row is never large in memory.
        large = width * height * _WEIGHT.get(media_type, 1.0) > _TAKES_TURNS and not shrinks
        if large and not wait_for_turn:
            raise NeedsTurnError
        with _large_image if large else nullcontext():
            if jpeg is not None and (pixels := _decode_jpeg(data, jpeg, preprocessing)) is not None:
                return pixels
            if only_quick:
                raise NeedsThreadError
            return _decode_with_pillow(data, media_type, preprocessing, limits)
    except (ServeError, NeedsTurnError, NeedsThreadError):
        raise
    except Image.DecompressionBombError as error:  # a frame larger than the canvas that the header declares
        raise ImageTooLarge(f"The image declares more pixels than allowed: {error}") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error, EOFError...
        if "MAX_TEXT" in str(error):  # Pillow's words for compressed text or colour profiles that inflate without end
            raise ImageTooLarge("The text or colour profile in the image inflates to more than is allowed") from error
        raise _bad(_cause(error)) from error


# --- which format, what size ------------------------------------------------------------------------------------------


def _media_type(data: bytes, content_type: str | None) -> str:
    """The media type by magic bytes. Raises UnsupportedMediaType where `content_type` does not agree."""
    told = (content_type or "").partition(";")[0].strip().lower()
    told = _ALIASES.get(told, told)
    if told not in MEDIA_TYPES and told not in _UNTOLD:
        raise UnsupportedMediaType(f"{_quoted(told)} is not one of {', '.join(MEDIA_TYPES)}", accepted=MEDIA_TYPES)
    if not data:
        raise _bad("empty file")
    found = _sniff(data)
    if found in MEDIA_TYPES and told in (*_UNTOLD, found):
        return found
    if found is None:
        raise _bad(f"it does not begin like {told if told in MEDIA_TYPES else 'an image'}")
    if found in MEDIA_TYPES:
        raise UnsupportedMediaType(f"Content-Type says {told}, the data is {found}", accepted=MEDIA_TYPES)
    raise UnsupportedMediaType(f"{found} is not one of {', '.join(MEDIA_TYPES)}", accepted=MEDIA_TYPES)


def _sniff(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"BM"):
        return "image/bmp"
    # Known, and not supported: better named than called broken.
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "image/tiff"
    if data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        return "image/jp2"
    if data[4:8] == b"ftyp":
        return "image/avif" if data[8:12] in (b"avif", b"avis") else "image/heif"
    if data.startswith((b"\0\0\1\0", b"\0\0\2\0")):
        return "image/x-icon"
    if data[4:6] in (b"\x11\xaf", b"\x12\xaf"):
        return "video/x-fli"
    if data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():
        return "image/x-portable-anymap"
    return None


def _declared_size(data: bytes, media_type: str) -> tuple[int, int]:
    """(width, height) as the header declares them. Raises struct.error or ValueError where there is no such header."""
    if media_type == "image/png":
        width, height = _png_size(data)
    elif media_type == "image/gif":
        width, height = _gif_size(data)
    elif media_type == "image/bmp":
        width, height = _bmp_size(data)
    else:
        width, height = _webp_size(data)
    return width, height


# Besides telling the size, these refuse what would hold the interpreter's lock in Pillow's Python code for seconds.


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError("no IHDR chunk")
    at, chunks = 8, 0
    while at + 8 <= len(data):
        at += 12 + int.from_bytes(data[at : at + 4])
        chunks += 1
        if chunks > 1000 + len(data) // 512:  # encoders write chunks of 4 kB and more
            raise ValueError("a PNG in too many small chunks")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height, _, _, compression = struct.unpack_from("<IiHHI", data, 18)
        if compression in (1, 2):
            raise ValueError("a run-length coded BMP")
    return width, abs(height)  # a negative height: rows run top-down


def _gif_size(data: bytes) -> tuple[int, int]:
    """The canvas, or as far as the first frame reaches beyond it: Pillow allocates that on opening the file."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # behind the global colour table
    while (introducer := data[at : at + 1]) not in (b",", b";", b""):
        if at > _MAX_PREAMBLE:
            raise ValueError("a GIF with too much before its first frame")
        at += 1
        if introducer == b"!":  # an extension: a label, blocks that begin with their length, an empty block
            label, length = struct.unpack_from("BB", data, at)
            if length == 0 and label != 0xFE:
                raise ValueError("an extension without content")  # Pillow would read on where we stop
            at += 1
            while length and at <= _MAX_PREAMBLE:
                at += 1 + length
                (length,) = struct.unpack_from("B", data, at)
            at += 1
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
    return (max(width, left + frame_width), max(height, top + frame_height)) if width and height else (width, height)


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise ValueError("no VP8, VP8L or VP8X chunk")


def _check(width: int, height: int, media_type: str, limits: ImageLimits) -> None:
    if width <= 0 or height <= 0:
        raise _bad(f"a side of length zero ({width} x {height})")
    max_pixels = int(limits.max_pixels / _WEIGHT.get(media_type, 1.0))
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{width} x {height} is {width * height:,} pixels; {max_pixels:,} are allowed for {media_type}",
            width=width,
            height=height,
            max_pixels=max_pixels,
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageTooLarge(
            f"{width} x {height} is longer than {limits.max_aspect:g} to 1",
            width=width,
            height=height,
            max_aspect=limits.max_aspect,
        )
    if min(width, height) < limits.min_side:
        raise _bad(f"too small: {width} x {height}, the least side is {limits.min_side}")


_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # one that is followed by a length, or the end of the image
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn


@dataclass(frozen=True, slots=True)
class _JpegHeader:
    """What has to be known before libjpeg runs, and that simplejpeg does not tell."""

    size: tuple[int, int]  # (width, height) as stored
    orientation: int
    several_scans: bool  # then libjpeg holds the coefficients of the whole image

    @classmethod
    def read(cls, data: bytes, only_quick: bool = False) -> _JpegHeader:
        """Walk the segments. Raises BadImage without a frame header, or for more scans than any encoder writes; with
        `only_quick` NeedsThreadError for more segments than one would expect."""
        size, orientation, components, several_scans = None, 1, 0, True
        at, number, scans = 2, 0, 0
        # The entropy-coded data is skipped: no marker that counts is in it.
        while (found := _MARKER.search(data, at)) and (marker := data[found.start() + 1]) != 0xD9:
            at = found.end()
            length = int.from_bytes(data[at : at + 2])
            if marker == 0xE1 and orientation == 1:
                segment = data[at + 2 : at + length]
                if segment.startswith(b"Exif\0\0"):
                    orientation = _exif_orientation(segment[6:])
            elif marker in _FRAMES and size is None:
                height, width, components = struct.unpack_from(">HHB", data[at + 2 : at + length], 1)
                size, several_scans = (width, height), marker not in (0xC0, 0xC1)
            elif marker == 0xDA:  # SOS
                several_scans = several_scans or data[at + 2 : at + min(length, 3)] != bytes([components])
                scans += 1
                if not several_scans:
                    break
                if scans > _MAX_SCANS:
                    raise _bad(f"a JPEG of more than {_MAX_SCANS} scans")
            at += max(length, 2)
            number += 1
            if only_quick and number > _QUICK_SEGMENTS:
                raise NeedsThreadError
            if number > _MAX_SEGMENTS:
                raise _bad(f"a JPEG of more than {_MAX_SEGMENTS} segments")
        if size is None:
            raise _bad("no frame header")
        return cls(size, orientation, several_scans)


def _exif_orientation(tiff: bytes) -> int:
    """1..8 from the first directory of an EXIF block; 1 where it is absent or broken. Reads nothing else."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(min(entries, 512)):
            tag, kind, _, value, _ = struct.unpack_from(f"{order}HHIHH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1  # 3: SHORT
    except struct.error:
        pass
    return 1


# --- to pixels --------------------------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, header: _JpegHeader, preprocessing: Preprocessing) -> Pixels | None:
    """By libjpeg-turbo, or None where Pillow should have a go. Raises BadImage where picture data is missing."""
    width, height = header.size
    least = 2 * preprocessing.resize
    try:
        *shape, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if shape != [height, width] or colorspace in ("CMYK", "YCCK"):
            return None
        shrink = {"min_height": least, "min_width": least, "min_factor": 2} if min(width, height) >= 2 * least else {}
        rgb: Pixels = simplejpeg.decode_jpeg(data, "RGB", **shrink)  # (h, w, 3)
    except ValueError as error:
        # Data that is not there would be filled in with grey: say no. Other warnings (bytes too many, odd markers) are
        # what real cameras write, and Pillow takes them.
        if any(words in str(error) for words in ("remature end", "Huffman", "Invalid SOS")):
            raise _bad(_cause(error)) from error
        return None
    # DCT scaling is by n/8, rounded up: the exact factor keeps the box where it would be in the full image.
    scaled_height, scaled_width = rgb.shape[:2]
    scale = 1.0 if (scaled_height, scaled_width) == (height, width) else (8 * scaled_width // width) / 8
    exact = (scaled_width, scaled_height) == (scale * width, scale * height)
    if exact and max(width, height) <= 2 * min(width, height):
        return _resize_then_crop(rgb, preprocessing, header.orientation)
    box, size = _crop_box(width, height, preprocessing, header.orientation)
    box = _fit(tuple(scale * edge for edge in box), scaled_width, scaled_height)
    return _to_pixels(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC, box=box), header.orientation)


class _Resizer(local):
    """One for each thread: a Resizer keeps the buffer between its two axes."""

    def __init__(self) -> None:
        self.resize = Resizer().resize


_resizer = _Resizer()
_BICUBIC = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom))  # the kernel that Pillow calls so


def _resize_then_crop(rgb: Pixels, preprocessing: Preprocessing, orientation: int) -> Pixels:
    """The textbook's order, with vector instructions. rgb (h, w, 3), as stored -> (crop, crop, 3), upright.

    No `CropBox`: with one, version 4.0.1 reads beyond its buffers where it enlarges.
    """
    height, width = rgb.shape[:2]
    resized_width, resized_height = _resized(width, height, preprocessing)
    if (resized_width, resized_height) != (width, height):
        target = ImageData(resized_width, resized_height, PixelType.U8x3)
        _resizer.resize(ImageData(width, height, PixelType.U8x3, rgb.tobytes()), target, _BICUBIC)
        rgb = np.frombuffer(target.get_buffer(), np.uint8).reshape(resized_height, resized_width, 3)
    if orientation != 1:
        rgb = _to_pixels(Image.fromarray(rgb), orientation)
    crop_height, crop_width = preprocessing.crop
    left = round((rgb.shape[1] - crop_width) / 2)
    top = round((rgb.shape[0] - crop_height) / 2)
    return np.ascontiguousarray(rgb[top : top + crop_height, left : left + crop_width])


def _decode_with_pillow(data: bytes, media_type: str, preprocessing: Preprocessing, limits: ImageLimits) -> Pixels:
    with _PLUGINS[media_type](io.BytesIO(data)) as image:  # first frame
        width, height = image.size
        _check(width, height, media_type, limits)  # a first frame may be larger than what the header declares
        scale = 1.0
        if media_type == "image/jpeg":
            least = 2 * preprocessing.resize
            if drafted := image.draft(None, (least, least)):  # DCT scaling by 1, 2, 4 or 8
                scale = drafted[1][2] / width
        image.load()
        orientation = _orientation(image)
        box, size = _crop_box(width, height, preprocessing, orientation)
        box = _fit(tuple(scale * edge for edge in box), *image.size)
        resized = [plane.resize(size, Image.Resampling.BICUBIC, box=box) for plane in _planes(image)]
    return _to_pixels(Image.merge("RGB", resized) if len(resized) == 3 else resized[0].convert("RGB"), orientation)


def _planes(image: Image.Image) -> Iterator[Image.Image]:
    """One RGB image, one grey image, or the three colours one by one: what `convert("RGB")` would hold, in less memory.

    Resizing RGBA itself would weight the colours by alpha, and converting it first costs 4 bytes a pixel more.
    """
    mode = image.mode
    if mode in ("RGB", "L"):
        yield image
    elif mode in ("RGBA", "RGBX"):
        for channel in "RGB":
            yield image.getchannel(channel)
    elif mode == "LA":
        yield image.getchannel("L")
    elif mode == "1":
        yield image.convert("L")
    elif mode.startswith("I;16"):  # 16-bit grey: the upper byte, as libpng strips it; convert("L") would clip at 255
        yield Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    else:  # P, PA, CMYK
        image.info.pop("transparency", None)  # which is dropped anyhow, but not without a warning
        yield image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, from wherever the format keeps it. A broken EXIF block is no reason to refuse pixels."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _resized(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) with the short side at `resize`, the long one rounded down, as torchvision counts."""
    short = min(width, height)
    return preprocessing.resize * width // short, preprocessing.resize * height // short


def _crop_box(width: int, height: int, preprocessing: Preprocessing, orientation: int) -> tuple[Box, tuple[int, int]]:
    """The part of the stored (not yet upright) image that becomes the crop, and the (width, height) to resize it to.

    As torchvision counts: the crop's offset is rounded to even.
    """
    turned = orientation >= 5
    if turned:
        width, height = height, width
    crop_height, crop_width = preprocessing.crop
    resized_width, resized_height = _resized(width, height, preprocessing)
    x = width / resized_width
    y = height / resized_height
    left = round((resized_width - crop_width) / 2)
    top = round((resized_height - crop_height) / 2)
    upright = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
    size = (crop_height, crop_width) if turned else (crop_width, crop_height)
    return _stored(upright, width, height, orientation), size


def _stored(box: Box, width: int, height: int, orientation: int) -> Box:
    """`box` of the upright (width, height) image in the coordinates of the image as stored."""
    left, top, right, bottom = box
    if orientation in (2, 3, 6, 7):  # the stored image runs against the upright x axis
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):  # ... and the y axis
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def _fit(box: tuple[float, ...], width: int, height: int) -> Box:
    """Take off what rounding put outside of the image: Pillow refuses a box that is larger by 1e-12."""
    left, top, right, bottom = box
    return max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)


def _to_pixels(image: Image.Image, orientation: int) -> Pixels:
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.asarray(image)  # (H, W, 3)


# --- words ------------------------------------------------------------------------------------------------------------


def _bad(reason: str) -> BadImage:
    return BadImage(f"The image cannot be decoded: {reason}", reason=reason)


def _cause(error: Exception) -> str:
    """A short cause in a client's words: no object addresses, no file names, one line."""
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, struct.error):
        return "the header is cut short"
    text = " ".join(str(error).split())
    return text[:120] if text.isprintable() and text else type(error).__name__


def _quoted(text: str) -> str:
    return repr(text[:60])
