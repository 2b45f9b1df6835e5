"""The torch side to play with: a model by its name, predictions that stop at an exit, other classes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.checkpoint import CheckpointError, save_model
from model.config import variant
from model.create import create_model
from model.data import EvalImages, Sample
from model.dvt import DVT
from tests.model.test_published import SMALL, saved

EMBEDDED = Path(__file__).parents[2] / "model" / "checkpoints" / "photo10.safetensors"
EXAMPLE = Path(__file__).parents[2] / "docs" / "example.jpg"


def lively(**changes: Any) -> DVT:
    """Exits that disagree and are sure to different degrees."""
    torch.manual_seed(0)
    model = DVT(variant("micro", tokenizer="patch", **changes)).eval()
    with torch.no_grad():
        for stage in model.stages:
            stage.head.weight.mul_(40)
    return model


def test_a_name_is_enough():
    model = create_model("micro")
    assert not model.training
    assert model.config == variant("micro")
    assert create_model("micro", num_classes=7)(torch.zeros(1, 3, 48, 48))[2].shape == (1, 7)


def test_the_two_exit_variant_of_table_2_has_a_name():
    config = variant("t2t-vit-12-two-exits")
    assert config.grids == (7, 14)
    assert replace(config, name="t2t-vit-12") == variant("t2t-vit-12", grids=(7, 14))


def test_a_checkpoint_brings_its_weights_and_its_configuration(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    source = lively(num_classes=4, labels=tuple("abcd"))
    save_model(path, source)
    images = torch.randn(2, 3, 48, 48)
    model = create_model("micro", checkpoint=str(path))
    assert model.config.labels == tuple("abcd")
    assert all(torch.equal(a, b) for a, b in zip(model(images), source(images), strict=True))
    other = create_model("micro", path, num_classes=9)
    assert (other.config.num_classes, other.config.labels) == (9, ())
    assert torch.equal(other.stages[2].blocks[0].attn.qkv.weight, source.stages[2].blocks[0].attn.qkv.weight)
    assert other(images)[0].shape == (2, 9)


def test_a_published_checkpoint_is_taken_as_it_is(tmp_path: Path):
    path = saved(tmp_path / "x.pth.tar")
    with pytest.raises(ValueError, match=r"x\.pth\.tar holds t2t-64x2, not t2t-vit-12"):
        create_model("t2t-vit-12", path)
    torch.save({"model_state_dict": SMALL.random()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="holds t2t-64x2"):  # the older format of torch.save, too
        create_model("t2t-vit-12", path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t2t-vit-21", "unknown variant 't2t-vit-21'; did you mean t2t-vit-24 or "),
        ("DeiT-small", "did you mean deit-small"),
        ("resnet", "unknown variant 'resnet'; known: t2t-vit-7"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(name: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        create_model(name)


def test_a_checkpoint_of_another_variant_or_of_none_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"photo10\.safetensors holds photo10, not micro"):
        create_model("micro", EMBEDDED)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        create_model("micro", tmp_path / "absent.safetensors")


def test_images_of_another_size_are_refused_with_both_sizes():
    for tokenizer in ("t2t", "patch", "conv"):
        model = DVT(variant("micro", tokenizer=tokenizer)).eval()
        for shape in ((2, 3, 32, 32), (2, 1, 48, 48), (3, 48, 48)):
            with pytest.raises(
                ValueError, match=re.escape(f"images have shape {shape}, the model takes (B, 3, 48, 48)")
            ):
                model(torch.zeros(shape))
    with pytest.raises(ValueError, match="the model takes"):
        model.predict(torch.zeros(2, 3, 32, 32), [0.5, 0.5])


def test_a_later_stage_without_the_state_before_it_is_refused():
    model = lively()
    with pytest.raises(ValueError, match="stage 2 reuses what stage 1 hands on"):
        model.stages[1](torch.zeros(1, 3, 48, 48))
    alone = lively(feature_reuse=False, relation_reuse=False)
    assert alone.stages[1](torch.zeros(1, 3, 48, 48))[0].shape == (1, 4)


@pytest.mark.parametrize("reuse", [True, False])
@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(0, 9),
    batch_size=st.integers(1, 10),
    thresholds=st.tuples(*[st.one_of(st.floats(0.25, 1), st.sampled_from([0.0, 2.0]))] * 2),
)
def test_each_image_leaves_at_the_first_exit_that_is_sure(
    reuse: bool, count: int, batch_size: int, thresholds: tuple[float, float]
):
    model = lively(feature_reuse=reuse)
    images = torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    found = model.predict(images, thresholds, batch_size)
    with torch.inference_mode():
        every = [logits.softmax(-1) for logits in model(images)] if count else []
    for i in range(count):
        expected = next(exit for exit, t in enumerate((*thresholds, 0.0)) if every[exit][i].max() >= t or exit == 2)
        if all(abs(float(p[i].max()) - t) > 1e-5 for p, t in zip(every, thresholds, strict=False)):
            assert found.exits[i] == expected + 1
            torch.testing.assert_close(found.probabilities[i], every[expected][i], atol=1e-5, rtol=1e-4)
            assert found.confidence[i] == found.probabilities[i].max()
            assert found.classes[i] == found.probabilities[i].argmax()
    assert found.probabilities.shape == (count, 4)


def test_later_stages_run_on_survivors_alone_in_batches_that_are_filled_again():
    model = lively()
    images = torch.randn(12, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    sizes: list[list[int]] = [[], [], []]
    for number, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _, inputs, __, number=number: sizes[number].append(len(inputs[0])))
    with torch.inference_mode():
        confidence = model(images)[0].softmax(-1).amax(-1)
    sizes = [[], [], []]
    threshold = float(confidence.sort().values[6])  # half of them go on
    found = model.predict(images, [threshold, 0.0], batch_size=3)
    assert sizes == [[3, 3, 3, 3], [3, 3], []]
    assert found.exits.unique().tolist() == [1, 2]


def test_predicting_leaves_the_mode_of_the_model_as_it_was():
    model = lively(drop_path=0.9).train()
    images = torch.randn(4, 3, 48, 48)
    one, two = (model.predict(images, [2.0, 2.0]).probabilities for _ in range(2))
    assert torch.equal(one, two)
    assert model.training


def test_thresholds_are_checked():
    model, images = lively(), torch.zeros(1, 3, 48, 48)
    assert model.predict(images, [0.0, 0.0, 0.0]).exits.tolist() == [1]  # as frontiers have them
    for thresholds in ([0.5], [0.5] * 3, [0.5] * 4, [float("nan"), 0.5]):
        with pytest.raises(ValueError, match="thresholds are 2 numbers, one for each of 3 exits but the last"):
            model.predict(images, thresholds)
    with pytest.raises(ValueError, match="batch_size"):
        model.predict(images, [0.5, 0.5], batch_size=0)
    with pytest.raises(ValueError, match="normalised ones are taken, as `preprocess` makes them"):
        model.predict(images.to(torch.uint8), [0.5, 0.5])


def test_a_single_exit_takes_no_thresholds():
    model = lively(grids=(4,))
    assert model.predict(torch.zeros(2, 3, 48, 48), []).exits.tolist() == [1, 1]


def test_new_heads_are_untrained_and_the_rest_is_as_it_was():
    model = lively(labels=tuple("abcd"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_classifier(6)
    assert (model.config.num_classes, model.config.labels) == (6, ())
    assert [logits.shape for logits in model(torch.zeros(2, 3, 48, 48))] == [(2, 6)] * 3
    for name, value in model.state_dict().items():
        assert ".head." in name or torch.equal(value, before[name])
    assert model.stages[0].head.weight.std() < 0.05
    model.reset_classifier(2, labels=("cat", "dog"))
    assert model.config.labels == ("cat", "dog")
    with pytest.raises(ValueError, match="2 labels for 3 classes"):
        model.reset_classifier(3, labels=("cat", "dog"))
    assert model.config.num_classes == 2


def test_photos_are_seen_as_the_evaluation_sees_them_turned_upright(tmp_path: Path):
    picture = Image.new("RGB", (60, 90))
    picture.paste((255, 0, 0), (0, 0, 60, 45))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    path = tmp_path / "x.jpg"
    picture.save(path, exif=exif, quality=95)
    model = lively()
    with Image.open(path) as photo:
        pixels = model.preprocess([photo, picture])
    config = model.config
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    images, _ = EvalImages([Sample(path, 0)], config.resize, config.image_size)[0]
    torch.testing.assert_close(pixels[0] * std + mean, images / 255, atol=1e-5, rtol=0)
    red = pixels[0, 0] * std[0] + mean[0]
    assert red[:, 40:].mean() > 0.9  # the upper half is on the right now
    assert red[:, :8].mean() < 0.1


def test_the_first_lines_of_the_documentation_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text()
    (code, *_) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    monkeypatch.chdir(EXAMPLE.parents[1])
    exec(code, {})
    assert "landscape" in capsys.readouterr().out
