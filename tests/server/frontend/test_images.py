"""Image files from strangers: what decodes gives the right pixels, everything else a clear refusal."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from server.bundle.manifest import Preprocessing
from server.core import Pixels
from server.errors import BadImage, ImageTooLarge, UnsupportedMediaType
from server.frontend.images import ImageLimits, decode, fit

AS_IS = Preprocessing(resize=64, crop=(64, 64))
SMALL = Preprocessing(resize=40, crop=(32, 32))
LIMITS = ImageLimits()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some grain: like a photo to a codec, and unlike its own mirror images."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    planes = [255 * x / width, 255 * y / height, 255 * ((x / width) * (1 - y / height))]
    return Image.fromarray(np.clip(np.stack(planes, -1) + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def textbook(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Upright, RGB, the short side resized, then the centre cropped: as torchvision does it."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    short = min(image.size)
    image = image.resize(
        (preprocessing.resize * image.width // short, preprocessing.resize * image.height // short),
        Image.Resampling.BICUBIC,
    )
    height, width = preprocessing.crop
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def difference(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def webp_canvas(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas


def with_orientation(image: Image.Image, orientation: int, format: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, format, exif=exif.tobytes(), **options)


# --- what decodes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_allowed_format_gives_the_textbooks_pixels(format: str) -> None:
    data = encoded(photo(90, 70), format)
    pixels = decode(data, f"image/{format.lower()}", SMALL, LIMITS)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert difference(pixels, textbook(Image.open(io.BytesIO(data)), SMALL)) <= 1


@given(
    width=st.integers(20, 150),
    height=st.integers(20, 150),
    resize=st.integers(8, 96),
    crop=st.tuples(st.integers(1, 96), st.integers(1, 96)),
    orientation=st.integers(1, 8),
)
@settings(max_examples=80, deadline=None)
def test_one_boxed_resize_equals_resize_then_crop(
    width: int, height: int, resize: int, crop: tuple[int, int], orientation: int
) -> None:
    preprocessing = Preprocessing(resize=resize, crop=(min(crop[0], resize), min(crop[1], resize)))
    data = with_orientation(photo(width, height), orientation, "PNG", compress_level=1)
    pixels = decode(data, "image/png", preprocessing, LIMITS)
    assert pixels.shape == (*preprocessing.crop, 3)
    expected = textbook(Image.open(io.BytesIO(data)), preprocessing)
    # Pillow rounds between the two axes; a turned image meets that rounding in the other order.
    assert difference(pixels, expected) <= 2
    if pixels.size >= 192:  # of a few values the mean says nothing
        assert np.abs(pixels.astype(int) - expected.astype(int)).mean() <= 0.5


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    resize=st.integers(2, 96),
    crop=st.tuples(st.integers(1, 96), st.integers(1, 96)),
    orientation=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_a_jpeg_of_any_size_gives_the_textbooks_pixels(
    width: int, height: int, resize: int, crop: tuple[int, int], orientation: int
) -> None:
    preprocessing = Preprocessing(resize=resize, crop=(min(crop[0], resize), min(crop[1], resize)))
    data = with_orientation(photo(width, height), orientation, "JPEG", quality=95, subsampling=0)
    pixels = decode(data, "image/jpeg", preprocessing, ImageLimits(max_aspect=200))
    assert pixels.shape == (*preprocessing.crop, 3)
    assert pixels.flags.c_contiguous
    expected = textbook(Image.open(io.BytesIO(data)), preprocessing)
    if min(width, height) < 4 * resize:  # not shrunk while decoding
        assert difference(pixels, expected) <= 8  # where it shrinks much, its fixed-point weights are coarser
    if pixels.size >= 192:
        assert np.abs(pixels.astype(int) - expected.astype(int)).mean() <= 1.0


def test_an_image_that_already_fits_is_not_touched() -> None:
    image = photo(64, 64)
    assert difference(decode(encoded(image, "PNG"), None, AS_IS, LIMITS), np.asarray(image)) == 0
    jpeg = encoded(image, "JPEG")
    assert difference(decode(jpeg, None, AS_IS, LIMITS), np.asarray(Image.open(io.BytesIO(jpeg)))) <= 1


@pytest.mark.parametrize(("width", "height"), [(1000, 700), (701, 1003), (2000, 257)])
def test_a_large_jpeg_shrunk_while_decoding_stays_close_to_the_full_one(width: int, height: int) -> None:
    data = encoded(photo(width, height), "JPEG", quality=92)
    pixels = decode(data, "image/jpeg", AS_IS, LIMITS)
    expected = textbook(Image.open(io.BytesIO(data)), AS_IS)
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < 1.0


@pytest.mark.parametrize("size", [(600, 420), (80, 60)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg_is_honoured(orientation: int, size: tuple[int, int]) -> None:
    data = with_orientation(photo(*size), orientation, "JPEG", quality=95)
    expected = textbook(Image.open(io.BytesIO(data)), SMALL)
    pixels = decode(data, "image/jpeg", SMALL, LIMITS)
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < 1.0


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_of_other_formats_is_honoured(format: str, orientation: int) -> None:
    data = with_orientation(photo(90, 60), orientation, format, lossless=True)
    assert difference(decode(data, None, SMALL, LIMITS), textbook(Image.open(io.BytesIO(data)), SMALL)) <= 2


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 12,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 99, 0),
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 7, 1, 6, 0),
    ],
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    plain = encoded(photo(64, 64), "JPEG")
    broken = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert difference(decode(broken, "image/jpeg", AS_IS, LIMITS), decode(plain, "image/jpeg", AS_IS, LIMITS)) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_modes_become_rgb_and_alpha_is_dropped(mode: str) -> None:
    image = photo(64, 64).convert("RGB" if mode == "RGBA" else "L").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize((64, 64)))
    assert difference(decode(encoded(image, "PNG"), None, AS_IS, LIMITS), np.asarray(image.convert("RGB"))) == 0


def test_a_palette_with_transparency_decodes() -> None:
    image = photo(64, 64).quantize(16)
    data = encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))
    assert difference(decode(data, "image/png", AS_IS, LIMITS), np.asarray(image.convert("RGB"))) == 0


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode(encoded(Image.fromarray(levels), "PNG"), "image/png", AS_IS, LIMITS)
    assert difference(pixels[..., 0], (levels >> 8).astype(np.uint8)) == 0


def test_a_cmyk_jpeg_has_the_colours_that_pillow_sees() -> None:
    data = encoded(photo(64, 64).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert difference(decode(data, "image/jpeg", AS_IS, LIMITS), expected) <= 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    data = encoded(red, format, save_all=True, append_images=[blue])
    assert decode(data, None, AS_IS, LIMITS)[32, 32].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_a_jpeg_with_bytes_behind_it_or_stray_bytes_inside_decodes() -> None:
    data = encoded(photo(64, 64), "JPEG")
    expected = decode(data, "image/jpeg", AS_IS, LIMITS)
    assert difference(decode(data + b"\0" * 999, "image/jpeg", AS_IS, LIMITS), expected) == 0
    assert difference(decode(data[:-2] + bytes(9) + data[-2:], "image/jpeg", AS_IS, LIMITS), expected) <= 1


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (20, 1)])
def test_a_tiny_image_decodes_unless_the_limits_say_no(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (10, 200, 30)), "PNG")
    assert np.unique(decode(data, None, SMALL, LIMITS).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]
    with pytest.raises(BadImage, match="too small"):
        decode(data, None, SMALL, ImageLimits(min_side=8))


# --- media types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told", [None, "", "application/octet-stream", "image/jpg", "IMAGE/JPEG", "image/jpeg; charset=binary"]
)
def test_the_media_type_may_be_absent_or_spelt_otherwise(told: str | None) -> None:
    assert decode(encoded(photo(64, 64), "JPEG"), told, AS_IS, LIMITS).shape == (64, 64, 3)


@pytest.mark.parametrize("told", ["image/png", "text/plain", "image/tiff", "image/x-icon"])
def test_a_media_type_that_the_data_does_not_have_is_refused(told: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=told):
        decode(encoded(photo(64, 64), "JPEG"), told, AS_IS, LIMITS)


@pytest.mark.parametrize("format", ["TIFF", "ICO", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("told", [None, "image/jpeg"])
def test_other_image_formats_are_refused_by_name(format: str, told: str | None) -> None:
    if format not in Image.SAVE:
        Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    with pytest.raises(UnsupportedMediaType, match="is not one of image/jpeg"):
        decode(encoded(photo(64, 64), format), told, AS_IS, LIMITS)


# --- hostile and broken files -----------------------------------------------------------------------------------------

BOMBS = {
    "png": png(65536, 65536),
    "bmp": bmp(3_000_000, 2_000_000),
    "bmp of negative width": bmp(-127, 64),
    "bmp of top-down rows": bmp(30_000, -30_000),
    "gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"\x2c" + bytes(20),
    "gif whose frame is larger than its canvas": b"GIF89a" + struct.pack("<HH", 1, 1) + bytes(3)
    + b"\x21\xf9\x04\x08" + bytes(4) + b"\x2c" + struct.pack("<HHHH", 0, 0, 13000, 13000) + bytes(20),
    "webp": webp_canvas(1 << 24, 1 << 24),
    "jpeg": b"\xff\xd8\xff\xc0\0\x0b\x08" + struct.pack(">HH", 60000, 60000) + b"\1\1\x11\0\xff\xda\0\x08\1\1\0\0?\0",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_declares_too_many_pixels_is_refused(name: str) -> None:
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(BOMBS[name], None, AS_IS, LIMITS)


def test_the_refusal_names_size_and_limit() -> None:
    with pytest.raises(ImageTooLarge) as refusal:
        decode(encoded(photo(101, 100), "JPEG"), None, AS_IS, ImageLimits(max_pixels=10_000))
    assert refusal.value.extra == {"width": 101, "height": 100, "max_pixels": 10_000}


def test_a_very_long_image_is_refused() -> None:
    with pytest.raises(ImageTooLarge, match="longer than 20 to 1"):
        decode(png(6000, 1, bytes(18001)), None, AS_IS, LIMITS)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_inflates_without_end_is_refused(kind: bytes) -> None:
    bomb = zlib.compress(bytes(30_000_000))
    content = b"Comment\0\1\0\0\0" + bomb if kind == b"iTXt" else b"Comment\0\0" + bomb
    with pytest.raises(ImageTooLarge, match="inflates"):
        decode(png(1, 1, bytes(4), before=chunk(kind, content)), None, AS_IS, LIMITS)


def test_a_jpeg_of_scans_without_end_is_refused() -> None:
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        decode(data[:-2] + data[last:-2] * 100 + data[-2:], None, AS_IS, LIMITS)


def _slow_files() -> dict[str, bytes]:
    """Small ones of a kind that keeps the interpreter busy for many seconds at the size of a permitted body."""
    image = photo(8, 8)
    jpeg, gif, idat = encoded(image, "JPEG"), encoded(image, "GIF"), zlib.compress(bytes(25 * 8))
    start = gif.index(b",", 13 + (3 << (gif[10] & 7) + 1))
    small_chunks = chunk(b"tEXt", b"a\0b") * 2000
    return {
        "segments": jpeg[:2] + b"\xff\xe5\0\2" * 3000 + jpeg[2:],
        "small chunks": png(8, 8, before=small_chunks) + chunk(b"IDAT", idat),
        "run-length coded": bmp(8, 8)[:30] + b"\1" + bmp(8, 8)[31:],
        "before its first frame": gif[:start] + b"!\xfe" + (b"\xff" + bytes(255)) * 5000 + b"\0" + gif[start:],
    }


@pytest.mark.parametrize(("reason", "data"), _slow_files().items())
def test_a_file_made_to_be_slow_is_refused(reason: str, data: bytes) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data, None, AS_IS, LIMITS)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused_and_never_filled_in(format: str, kept: float) -> None:
    data = encoded(photo(64, 64), format)
    with pytest.raises(BadImage) as refusal:
        decode(data[: int(kept * len(data))], None, AS_IS, LIMITS)
    assert refusal.value.extra["reason"]


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_a_jpeg_that_ends_early_is_refused_even_with_an_end_marker(options: dict[str, object]) -> None:
    data = encoded(photo(200, 200), "JPEG", **options)
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2] + b"\xff\xd9", None, AS_IS, LIMITS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, world", "does not begin like an image"),
        (b"\xff\xd8\xff", "no frame header"),
        (b"\x89PNG\r\n\x1a\n", "no IHDR chunk"),
        (b"GIF89a", "cut short"),
        (b"GIF89a" + bytes(7) + b"," + bytes(20), "length zero"),
        (b"GIF89a" + bytes(7) + b"!\xf9\0", "without content"),
        (b"BM", "cut short"),
        (b"RIFF\0\0\0\0WEBP", "no VP8"),
    ],
)
def test_a_refusal_gives_a_short_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as refusal:
        decode(data, None, AS_IS, LIMITS)
    assert "\n" not in refusal.value.extra["reason"]
    assert " at 0x" not in refusal.value.extra["reason"]


def _originals() -> list[bytes]:
    image = photo(24, 20)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words " * 50, zip=True)
    return [
        encoded(image, "JPEG"),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "PNG", pnginfo=text),
        encoded(image.quantize(7), "PNG"),
        encoded(image, "WEBP"),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "GIF", save_all=True, append_images=[photo(24, 20, seed=1)]),
        encoded(image, "BMP"),
        with_orientation(image, 6, "JPEG"),
        with_orientation(image, 6, "PNG"),
    ]


ORIGINALS = _originals()


@given(
    original=st.sampled_from(ORIGINALS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_damage_gives_pixels_or_one_of_three_refusals(
    original: bytes, edits: list[tuple[float, bytes, int]], kept: float
) -> None:
    data = bytearray(original)
    for place, new, removed in edits:
        at = int(place * len(data))
        data[at : at + removed] = new
    try:
        pixels = decode(bytes(data[: int(kept * len(data))]), None, SMALL, ImageLimits(max_pixels=1_000_000))
    except (BadImage, ImageTooLarge, UnsupportedMediaType):
        return
    assert pixels.shape == (32, 32, 3)


@given(start=st.sampled_from([original[:40] for original in ORIGINALS]), rest=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bytes_behind_a_true_header_do_no_harm(start: bytes, rest: bytes) -> None:
    try:
        pixels = decode(start + rest, None, SMALL, ImageLimits(max_pixels=1_000_000))
    except (BadImage, ImageTooLarge, UnsupportedMediaType):
        return
    assert pixels.shape == (32, 32, 3)


MEMORY_PROBE = """
import pathlib, sys
from server.bundle.manifest import Preprocessing
from server.errors import ServeError
from server.frontend.images import ImageLimits, decode

def peak():  # bytes; of this process alone, unlike ru_maxrss, which begins with the parent's
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

files = [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]
before = peak()
for data in files:
    try:
        decode(data, None, Preprocessing(resize=256, crop=(224, 224)), ImageLimits())
        answer = "pixels"
    except ServeError as error:
        answer = error.code
    print(answer, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_below_the_ceiling_for_bombs_and_for_the_largest_image_allowed(tmp_path: Path) -> None:
    rows = zlib.compressobj(1)
    squeezed = b"".join([*(rows.compress(bytes(20_001)) for _ in range(5000)), rows.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 6, 0, 0, 0))  # RGBA
    largest = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", squeezed) + chunk(b"IEND", b"")
    files = []
    for number, data in enumerate([*BOMBS.values(), largest]):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(data)
    probe = [sys.executable, "-c", MEMORY_PROBE, *map(str, files)]
    # -c puts the working directory first on the path
    run = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[3])
    answers = [line.split() for line in run.stdout.splitlines()]
    assert [answer for answer, _ in answers] == ["image_too_large"] * len(BOMBS) + ["pixels"]
    extra = [int(size) for _, size in answers]
    assert max(extra[:-1]) < 20e6
    assert extra[-1] < 200e6


@pytest.mark.parametrize("size", [(200, 250), (250, 200), (900, 100), (33, 40), (1, 1), (8, 140)])
def test_pixels_become_what_their_jpeg_becomes(size: tuple[int, int]) -> None:
    how = Preprocessing(72, (64, 64))
    width, height = size
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(stream, "JPEG")
    pixels = simplejpeg.decode_jpeg(stream.getvalue(), "RGB")
    expected = decode(stream.getvalue(), None, how, ImageLimits())
    assert np.array_equal(fit(pixels, how), expected)
    assert np.array_equal(fit(np.asfortranarray(pixels), how), expected)


def test_pixels_of_the_models_input_size_are_its_input() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert np.array_equal(fit(pixels, Preprocessing(72, (64, 64))), pixels)
