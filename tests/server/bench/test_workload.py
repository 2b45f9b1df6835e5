"""What is sent: images of a folder with the labels that the model knows, pixels of an array, photos made by code."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.bench.workload import WorkloadError, workload


def test_folders_are_labels_where_the_model_knows_them(image_folder: Path) -> None:
    work = workload(image_folder, images=40, labels=["red", "blue"])
    labels = {label for body in work.bodies for label in body.labels}
    assert labels == {"red", "blue", None}
    assert (work.sound, work.images, work.labelled) == (40, 40, True)
    assert {body.content_type for body in work.bodies} == {"image/png"}
    assert not workload(image_folder, images=40, labels=[]).labelled


def test_the_seed_draws_the_images(image_folder: Path) -> None:
    assert workload(image_folder, images=9, seed=3).bodies == workload(image_folder, images=9, seed=3).bodies
    assert workload(image_folder, images=9, seed=3).bodies != workload(image_folder, images=9, seed=4).bodies


def test_several_images_are_one_form(image_folder: Path) -> None:
    work = workload(image_folder, images=8, together=3, labels=["red", "blue", "green", "white"])
    assert work.sound == 2
    for body in work.bodies:
        assert body.content_type.startswith("multipart/form-data; boundary=")
        assert body.content.count(b'name="image"') == len(body.labels) == 3
    assert len(workload(image_folder, images=2, together=5).bodies[0].labels) == 5


def test_spoilt_bodies_have_one_broken_image(image_folder: Path) -> None:
    work = workload(image_folder, images=30)
    assert 1 <= len(work.bodies) - work.sound <= 16
    for body in work.bodies[: work.sound]:
        Image.open(io.BytesIO(body.content)).load()
    for body in work.bodies[work.sound :]:
        with pytest.raises(OSError, match=r"truncated|cannot identify"):
            Image.open(io.BytesIO(body.content)).load()


def test_an_array_is_sent_without_loss(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    work = workload(tmp_path / "x.npy", images=10)
    sent = [np.asarray(Image.open(io.BytesIO(body.content))) for body in work.bodies[: work.sound]]
    assert sorted(image.tobytes() for image in sent) == sorted(image.tobytes() for image in pixels)


def test_photos_are_made_where_there_are_none() -> None:
    work = workload(None, images=2)
    assert (work.images, work.labelled, work.source) == (2, False, "made by code")


def test_what_cannot_be_sent_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:20])
    for name, says in (
        ("nowhere", "no such folder"),
        ("empty", "no images in it"),
        ("gone.npy", "no such file"),
        ("flat.npy", r"uint8 \(N, H, W, 3\), not float32 \(3, 4\)"),
        ("objects.npy", "not an array"),
        ("text.npy", "not an array"),
        ("cut.npy", "not an array"),
    ):
        with pytest.raises(WorkloadError, match=says) as caught:
            workload(tmp_path / name, images=5)
        assert "\n" not in str(caught.value)
