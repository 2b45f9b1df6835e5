"""Batches are changed as single images are with Pillow, alike on every device and in every order, and nobody is mixed
with a label that is not in the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from model.augment import FILL, OPERATIONS, crop_boxes, padded_crop
from model.batch_augment import COLOURS, MOVES, NAMES, SLOTS, Augment, Draws, draw, erase, mix
from model.data import EpochSampler, InMemory, Sample, decoded, scan_image_folder

CPU = torch.device("cpu")


def pictures(count: int, side: int = 48) -> list[Image.Image]:
    """Smooth, with a grain, each another."""
    y, x = np.mgrid[0:side, 0:side]
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = [np.sin(x / rng.uniform(4, 9) + number) + np.cos(y / rng.uniform(4, 9)) for _ in range(3)]
        pixels = np.stack(waves, axis=-1) * 50 + 120 + rng.normal(0, 6, (side, side, 3))
        made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return made


def tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def still(count: int) -> Draws:
    """Draws that change nothing."""
    return Draws(
        np.tile(np.eye(3, dtype=np.float32)[:2], (count, 1, 1)),
        np.full((count, SLOTS), -1),
        np.ones((count, SLOTS, 2), np.float32),
        np.ones((count, 3), np.float32),
    )


def changed(images: list[Image.Image], draws: Draws, size: int = 48) -> torch.Tensor:
    numbers = np.arange(len(images))
    return Augment(draws, size, CPU)(tensor(images), numbers, torch.from_numpy(numbers))


def apart(result: torch.Tensor, images: list[Image.Image]) -> np.ndarray:
    return (result - tensor(images).float()).abs().numpy()


def test_images_come_out_as_they_are_where_nothing_was_drawn():
    images = pictures(3)
    assert apart(changed(images, still(3)), images).max() == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.3, 0.9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_does_to_a_batch_what_pillow_does_to_an_image(name: str, magnitude: float, sign: int):
    images = pictures(4)
    expected = [OPERATIONS[name](image, magnitude, sign) for image in images]
    draws = still(4)
    if name in COLOURS:
        draws.operations[:, 0] = NAMES.index(name)
        draws.strengths[:, 0] = magnitude, sign
        assert apart(changed(images, draws), expected).max() <= 1  # Pillow rounds elsewhere
    else:
        for i, row in enumerate(MOVES[name](np.full(4, magnitude * sign))):
            for j, entry in enumerate(row):
                draws.maps[:, i, j] = entry
        difference = apart(changed(images, draws), expected)
        assert difference.mean() < 2  # another bicubic kernel
        assert np.percentile(difference, 99) < 10


def test_a_crop_is_pillows_crop():
    images = pictures(6)
    boxes = crop_boxes(48, 48, 0.2, np.random.default_rng(0), 6)
    draws = still(6)
    draws.maps[:, 0, 0], draws.maps[:, 1, 1] = (boxes[:, 2] - boxes[:, 0]) / 48, (boxes[:, 3] - boxes[:, 1]) / 48
    draws.maps[:, 0, 2], draws.maps[:, 1, 2] = (
        (boxes[:, 0] + boxes[:, 2]) / 48 - 1,
        (boxes[:, 1] + boxes[:, 3]) / 48 - 1,
    )
    for size in (48, 32):
        expected = [
            image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box))
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
        assert apart(changed(images, draws, size), expected).mean() < (2 if size == 48 else 4)


def test_crops_and_flips_are_spread_as_they_are_told():
    draws = draw(4000, 48, 0.3, 0.0, 0.0, np.random.default_rng(0))
    width, height = np.abs(draws.maps[:, 0, 0]), draws.maps[:, 1, 1]
    area, ratio = width * height, width / height
    assert 0.3 - 1e-6 <= area.min() < 0.32
    assert area.max() <= 1 + 1e-6
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)
    assert 3 / 4 - 1e-6 <= ratio.min() < 0.78
    assert 1.28 < ratio.max() <= 4 / 3 + 1e-6
    assert (draws.maps[:, 0, 0] < 0).mean() == pytest.approx(0.5, abs=0.03)
    corners = np.array([[-1, -1, 1], [1, 1, 1]]).T
    assert np.abs(draws.maps @ corners).max() <= 1 + 1e-6  # nothing from beyond the image
    assert (draws.operations == -1).all()
    assert (draws.jitter == 1).all()


def test_a_padded_crop_is_pillows_and_moves_whole_pixels():
    for number, image in enumerate(pictures(20)):
        draws = draw(1, 48, 0.3, 0.0, 0.0, np.random.default_rng(number), padding=0.125)
        expected = padded_crop(image, 48, 0.125, np.random.default_rng(number))
        if draws.maps[0, 0, 0] < 0:
            expected = ImageOps.mirror(expected)
        assert apart(changed([image], draws), [expected]).max() == 0


def test_padded_crops_leave_the_size_as_it_is_and_reach_as_far_as_the_padding():
    draws = draw(4000, 48, 0.3, 0.0, 0.0, np.random.default_rng(0), padding=0.125)
    assert (np.abs(draws.maps[:, 0, 0]) == 1).all()
    assert (draws.maps[:, 0, 0] < 0).mean() == pytest.approx(0.5, abs=0.03)
    assert (draws.maps[:, 1, 1] == 1).all()
    for moved in draws.maps[:, :, 2].T * 48 / 2:
        pixels, counts = np.unique(moved.round(3), return_counts=True)
        assert pixels.tolist() == list(range(-6, 7))
        assert counts.min() > 4000 / 13 * 0.7


def test_a_padded_crop_of_another_shape_is_of_its_middle_and_resized():
    wide = np.zeros((32, 80, 3), np.uint8)
    wide[:, 24:56] = 200
    corners = []
    for seed in range(30):
        crop = np.asarray(padded_crop(Image.fromarray(wide), 64, 0.125, np.random.default_rng(seed)))
        assert crop.shape == (64, 64, 3)
        assert (crop[32, 32] == 200).all()
        corners += [crop[row, column].astype(int) for row in (0, 63) for column in (0, 63)]
    bare = np.abs(np.array(corners) - FILL).max(axis=1) < 10  # bicubic edges overshoot
    assert 0 < bare.sum() < len(corners)
    assert (np.array(corners)[~bare] == 200).all()


def test_rand_augment_gives_each_image_two_operations_each_at_half_the_odds():
    draws = draw(6000, 48, 1.0, 9.0, 0.2, np.random.default_rng(0))
    colours = (draws.operations >= 0).mean()
    assert colours == pytest.approx(0.5 * len(COLOURS) / len(NAMES), abs=0.02)
    assert set(np.unique(draws.operations)) == {-1, *(NAMES.index(name) for name in COLOURS)}
    turned = np.abs(draws.maps[:, 0, 1]) + np.abs(draws.maps[:, 1, 0]) > 1e-6  # rotations and shears: three of fifteen
    assert turned.mean() == pytest.approx(1 - (1 - 0.5 * 3 / 15) ** 2, abs=0.02)
    assert draws.strengths[..., 0].mean() == pytest.approx(0.9, abs=0.02)
    assert 0.8 <= draws.jitter.min() < draws.jitter.max() <= 1.2


def test_what_a_moved_image_leaves_bare_has_the_fill_colour():
    draws = still(1)
    draws.maps[:, 0, 2] = 1.0  # half its width to the left
    result = changed(pictures(1), draws)
    assert (result[0, :, :, 24:] == torch.tensor(FILL).view(3, 1, 1)).all()
    assert (result[0, :, :, :24] == tensor(pictures(1))[0, :, :, 24:]).all()


def in_memory(images: Path, **changes: int) -> InMemory:
    _, samples = scan_image_folder(images)
    order = EpochSampler(len(samples), 16, seed=3)
    order.epoch = changes.get("epoch", 0)
    made = InMemory(samples, 48, 48, 16, order, 0.4, 0.2, 3, 9.0, 0.0, CPU)
    made.epoch = order.epoch
    return made


def test_an_epoch_is_the_same_each_time_and_the_next_one_another(image_folder: Path):
    first, again, next_one = in_memory(image_folder), in_memory(image_folder), in_memory(image_folder, epoch=1)
    assert len(first) == len(list(first)) == 10
    for (a, labels), (b, same) in zip(first, again, strict=True):
        assert a.shape == (16, 3, 48, 48)
        assert torch.equal(a, b)
        assert torch.equal(labels, same)
        assert ((a >= 0) & (a <= 255) & (a == a.round())).all()
    assert not torch.equal(next(iter(first))[0], next(iter(next_one))[0])


def test_every_image_keeps_its_label(image_folder: Path):
    _, samples = scan_image_folder(image_folder)
    order = EpochSampler(len(samples), 16, seed=0)
    flipped = InMemory(samples, 48, 48, 16, order, 1.0, 0.0, 0, 0.0, 0.0, CPU)  # whole images, some of them mirrored

    def seen(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, ...]]:
        return [(*image.double().sum((1, 2)).tolist(), float(y)) for image, y in zip(images, labels, strict=True)]

    found = [row for images, labels in flipped for row in seen(images, labels)]
    assert sorted(found) == sorted(seen(*decoded(samples, 48, 48, CPU)))


def test_images_of_other_shapes_are_kept_by_their_middle(tmp_path: Path):
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 30:90] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels, labels = decoded([Sample(tmp_path / "wide.png", 2)], 48, 48, CPU)
    assert pixels.shape == (1, 3, 48, 48)
    assert int(pixels.min()) > 150
    assert labels.tolist() == [2]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_the_labels_of_what_they_show(kind: str):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)  # image i is i everywhere
    alphas = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}
    mixed, targets = mix(
        images, torch.arange(4), 4, **alphas, probability=1.0, smoothing=0.0, rng=np.random.default_rng(3)
    )
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    # The mean shade is the labels' mixture, in either way of mixing.
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(4.0))


def test_erasing_replaces_a_rectangle_in_some_images():
    images = torch.full((200, 3, 32, 32), 7.0)
    erased = erase(images, 0.25, np.random.default_rng(0))
    assert (images == 7.0).all()
    gone = (erased != 7.0).all(dim=1)
    assert 30 <= int(gone.flatten(1).any(dim=1).sum()) <= 70
    for mask in gone[gone.flatten(1).any(dim=1)]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert int(mask.sum()) == int(rows.sum() * columns.sum())  # a full rectangle
        assert 0.01 < mask.float().mean() < 0.36


def test_images_that_would_fill_the_memory_are_refused_before_one_is_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"50000 images of 256 pixels a side take 10 GB.*in_memory=false"):
        decoded([Sample(tmp_path / "none.png", 0)] * 50_000, 256, 256, CPU)
