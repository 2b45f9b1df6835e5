"""The decoding threads: who waits for whom, until when, and what counts as busy."""

from __future__ import annotations

import asyncio
import gc
import io
import sys
import threading
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
from PIL import Image

from server.bundle.manifest import Preprocessing
from server.errors import BadImage, DeadlineExceeded, Overloaded
from server.frontend import images
from server.frontend.decoding import Decoder

FAR = time.monotonic() + 3600


def png(side: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
async def decoder() -> AsyncIterator[Decoder]:
    decoder = Decoder(Preprocessing(8, (8, 8)), images.ImageLimits(), threads=1, max_waiting=8, clock=time.monotonic)
    decoder.start()
    yield decoder
    await decoder.close()


async def test_small_images_do_not_wait_for_large_ones(decoder: Decoder) -> None:
    large = png(2200)  # 4.8 megapixels
    with images._large_image:  # somebody else's turn: no large image is decoded now
        waiting = [asyncio.ensure_future(decoder.decode([(large, "image/png")], FAR)) for _ in range(3)]
        (pixels,) = await asyncio.wait_for(decoder.decode([(png(32), "image/png")], FAR), timeout=30)
        assert pixels.shape == (8, 8, 3)
        assert not any(future.done() for future in waiting)
    for future in waiting:
        assert (await future)[0].shape == (8, 8, 3)


async def test_a_large_image_that_nobody_waits_for_is_skipped(decoder: Decoder) -> None:
    with images._large_image:
        given_up = asyncio.ensure_future(decoder.decode([(png(2200), "image/png")], FAR))
        await decoder.decode([(png(32), "image/png")], FAR)  # by now the large one is in its own line
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
    assert (await decoder.decode([(png(2200), "image/png")], FAR))[0].shape == (8, 8, 3)


def test_who_will_not_wait_for_a_turn_is_told_at_once() -> None:
    with images._large_image, pytest.raises(images.NeedsTurnError):
        images.decode(png(2200), "image/png", Preprocessing(8, (8, 8)), images.ImageLimits(), wait_for_turn=False)


class Gate:
    """A clock that holds the threads, and nobody else, for as long as it is closed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Semaphore(0)

    def __call__(self) -> float:
        if threading.current_thread().name.startswith("decode"):
            self.reached.release()
            self.open.wait()
        return time.monotonic()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
async def held(gate: Gate) -> AsyncIterator[Decoder]:
    """One thread, that does not get on, and room for eight images before it."""
    decoder = Decoder(Preprocessing(8, (8, 8)), images.ImageLimits(), threads=1, max_waiting=8, clock=gate)
    decoder.start()
    yield decoder
    gate.open.set()
    await decoder.close()


def soon() -> float:
    return time.monotonic() + 0.02


async def test_the_deadline_is_kept_while_an_image_is_being_decoded(decoder: Decoder) -> None:
    large = png(2200)
    with images._large_image:
        with pytest.raises(DeadlineExceeded):
            await decoder.decode([(large, "image/png")], soon())
        assert decoder.pending == 1, "the thread goes on with it"
    await decoder.decode([(large, "image/png")], FAR)  # behind it in the line
    assert decoder.pending == 0


async def test_the_deadline_is_kept_while_an_image_waits_for_a_thread(held: Decoder, gate: Gate) -> None:
    busy = asyncio.ensure_future(held.decode([(png(8), None)], FAR))
    await asyncio.to_thread(gate.reached.acquire)
    with pytest.raises(DeadlineExceeded):
        await held.decode([(png(8), None)] * 2, soon())
    assert held.pending == 1, "those that waited have left the line"
    gate.open.set()
    assert len(await busy) == 1


async def test_a_deadline_that_has_passed_occupies_nobody(held: Decoder) -> None:
    with pytest.raises(DeadlineExceeded):
        await held.decode([(png(8), None)], time.monotonic() - 1)
    assert held.pending == 0


async def test_who_gives_up_early_gets_no_more_of_the_threads(held: Decoder, gate: Gate) -> None:
    first = asyncio.ensure_future(held.decode([(png(8), None)], time.monotonic() + 1.0))
    await asyncio.to_thread(gate.reached.acquire)
    with pytest.raises(DeadlineExceeded):
        await first
    left = asyncio.ensure_future(held.decode([(png(8), None)] * 8, FAR))
    await asyncio.sleep(0)
    assert held.pending == 9
    with pytest.raises(Overloaded):
        await held.decode([(png(8), None)], soon())
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert held.pending == 1, "the thread is still busy with the first"
    with pytest.raises(Overloaded):
        await held.decode([(png(8), None)] * 9, FAR)


async def test_what_was_given_up_leaves_nothing_behind(held: Decoder, gate: Gate) -> None:
    busy = asyncio.ensure_future(held.decode([(png(8), None)], FAR))
    await asyncio.to_thread(gate.reached.acquire)
    file = png(8)
    references = sys.getrefcount(file)
    last = asyncio.ensure_future(held.decode([(png(16), None)], FAR))
    for _ in range(100):
        left = asyncio.ensure_future(held.decode([(file, None)] * 7, FAR))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
    del left
    gc.collect()
    assert sys.getrefcount(file) == references
    assert held._line.qsize() < 20
    assert asyncio.all_tasks() == {asyncio.current_task(), busy, last}
    gate.open.set()
    assert [len(decoded) for decoded in await asyncio.gather(busy, last)] == [1, 1]
    assert held.pending == 0


async def test_the_first_bad_image_is_named_and_the_threads_live_on(decoder: Decoder) -> None:
    for _ in range(3):
        with pytest.raises(BadImage) as caught:
            await decoder.decode([(png(8), None), (b"\x89PNG\r\n\x1a\n", None), (b"", None)], FAR)
        assert caught.value.extra["index"] == 1
    assert decoder.pending == 0


async def test_ends_and_new_images_cross_without_a_loss(decoder: Decoder) -> None:
    """Large images are given up at any moment, also while they change lines."""
    large = png(2200)
    for number in range(60):
        request = asyncio.ensure_future(decoder.decode([(large, None), (png(8), None)], FAR))
        for _ in range(number % 7):
            await asyncio.to_thread(time.monotonic)  # a turn of the loop and of the threads
        request.cancel()
        await asyncio.wait([request])
    await decoder.decode([(png(8), None)], FAR)
    await decoder.decode([(large, None)], FAR)
    assert decoder.pending == 0


def jpeg(side: int, mode: str = "RGB", **how: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side), 90).save(stream, "JPEG", **how)
    return stream.getvalue()


@pytest.mark.parametrize("side", [1, 64, 128])
async def test_a_single_small_jpeg_needs_no_thread(held: Decoder, side: int) -> None:
    (pixels,) = await asyncio.wait_for(held.decode([(jpeg(side), "image/jpeg")], FAR), timeout=30)
    assert pixels.shape == (8, 8, 3)
    assert held.pending == 0


@pytest.mark.parametrize(
    "files",
    [
        [jpeg(129)],
        [jpeg(64, progressive=True)],
        [png(8)],
        [jpeg(64) + bytes(20_000)],
        [jpeg(64)[:2] + b"\xff\xfe\0\2" * 100 + jpeg(64)[2:]],
        [jpeg(64, "CMYK")],
        [jpeg(64), jpeg(64)],
    ],
    ids=["large", "of several scans", "no JPEG", "long", "of many segments", "not for libjpeg-turbo", "several"],
)
async def test_whatever_may_take_longer_goes_to_a_thread(held: Decoder, gate: Gate, files: list[bytes]) -> None:
    waiting = asyncio.ensure_future(held.decode([(file, None) for file in files], FAR))
    await asyncio.to_thread(gate.reached.acquire)
    assert held.pending == len(files)
    gate.open.set()
    assert [pixels.shape for pixels in await waiting] == [(8, 8, 3)] * len(files)


async def test_a_model_of_large_inputs_has_all_its_images_in_threads() -> None:
    decoder = Decoder(
        Preprocessing(129, (129, 129)), images.ImageLimits(), threads=1, max_waiting=0, clock=time.monotonic
    )  # no thread was started
    waiting = asyncio.ensure_future(decoder.decode([(jpeg(64), None)], FAR))
    await asyncio.sleep(0)
    assert decoder.pending == 1
    waiting.cancel()


async def test_a_small_jpeg_that_is_none_is_named_and_one_that_is_late_is_late(held: Decoder) -> None:
    with pytest.raises(BadImage) as caught:
        await held.decode([(jpeg(64)[:-20], "image/jpeg")], FAR)
    assert caught.value.extra["index"] == 0
    with pytest.raises(DeadlineExceeded):
        await held.decode([(jpeg(64), "image/jpeg")], time.monotonic() - 1)
