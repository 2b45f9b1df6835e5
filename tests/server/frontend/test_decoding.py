"""The decoding threads: who waits for whom."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
from PIL import Image

from server.bundle.manifest import Preprocessing
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
