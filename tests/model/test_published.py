"""`dvt import`: foreign checkpoints give the foreign model's answers, and unusable ones a clear error."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from model.checkpoint import CheckpointError, load_model
from model.config import variant
from model.dvt import DVT
from model.published import PREFIXES, import_checkpoint, published_key
from server.__main__ import build
from tests.model.published import Layout, forward

SMALL = Layout("t2t", dim=64, depth=2, hidden=128, classes=5)
PUBLISHED = {
    "t2t-vit-12": (Layout("t2t", 256, 12, 512), 650),
    "t2t-vit-14": (Layout("t2t", 384, 14, 1152), 740),
    "deit-small": (Layout("deit", 384, 12, 1536), 608),
}


def saved(path: Path, layout: Layout = SMALL, **more: Any) -> Path:
    torch.save({"model_state_dict": layout.random(), **more}, path)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_tensors_are_the_published_ones_name_by_name(name: str):
    layout, count = PUBLISHED[name]
    with torch.device("meta"):
        ours = DVT(variant(name)).state_dict()
    theirs = {published_key(key, list(PREFIXES)): tuple(tensor.shape) for key, tensor in ours.items()}
    assert theirs == layout.shapes()
    assert len(theirs) == count


@pytest.mark.parametrize(
    "layout",
    [
        SMALL,
        Layout("deit", 128, 2, 256, classes=7),
        replace(SMALL, grids=(7, 14)),
        replace(SMALL, relations=False),
        replace(SMALL, features=False, dim=128),
        replace(SMALL, features=False, relations=False),
    ],
    ids=["t2t", "deit", "two exits", "features only", "relations only", "no reuse"],
)
def test_an_imported_model_answers_as_the_published_one_does(layout: Layout, tmp_path: Path):
    model, _ = import_checkpoint(saved(tmp_path / "x.pth.tar", layout))
    images = torch.randn(2, 3, 224, 224)
    expected = forward(layout, layout.random(), images)
    with torch.inference_mode():
        exits = model(images)
    assert len(exits) == len(layout.grids)
    for got, want in zip(exits, expected, strict=True):
        assert want.std() > 0.1  # the exits say something
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_a_published_file_brings_along_is_kept(tmp_path: Path):
    path = saved(
        tmp_path / "x.pth.tar",
        flops=[0.5, np.float64(1.5), 3.5],
        dynamic_threshold=np.ones((59, 3)),
        anytime_classification=torch.tensor([0.7, 0.8, 0.9]),
        note="else",
    )
    _, header = import_checkpoint(path)
    assert header["imported"]["from"] == "model_state_dict"
    assert header["imported"]["flops"] == [0.5, 1.5, 3.5]
    assert header["imported"]["dynamic_threshold"] == [[1.0] * 3] * 59
    assert header["imported"]["anytime_classification"] == pytest.approx([0.7, 0.8, 0.9])
    assert "note" not in header["imported"]


def test_a_training_run_gives_its_average_without_the_wrapper_s_prefix(tmp_path: Path):
    average = {f"module.{key}": value.half() for key, value in SMALL.random().items()}
    torch.save(
        {
            "epoch": 3,
            "arch": "x",
            "state_dict": SMALL.random(seed=1),
            "state_dict_ema": average,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "args": argparse.Namespace(lr=0.1, mean=[0.5, 0.5, 0.4], std=None, model="t2t"),
        },
        tmp_path / "last.pth.tar",
    )
    model, header = import_checkpoint(tmp_path / "last.pth.tar")
    assert header["imported"]["from"] == "state_dict_ema"
    expected = SMALL.random()["less_token.head.weight"]
    torch.testing.assert_close(model.stages[1].head.weight, expected, atol=1e-3, rtol=1e-3)
    assert model.stages[1].head.weight.dtype == torch.float32
    assert model.config.mean == (0.5, 0.5, 0.4)


def test_options_say_what_a_file_cannot(tmp_path: Path):
    model, _ = import_checkpoint(saved(tmp_path / "x.pth"), labels=tuple("abcde"), std=(0.2, 0.2, 0.2), resize=240)
    assert model.config.labels == tuple("abcde")
    assert model.config.std == (0.2, 0.2, 0.2)
    assert model.config.resize == 240
    with pytest.raises(CheckpointError, match="2 labels for 5 classes"):
        import_checkpoint(tmp_path / "x.pth", labels=("a", "b"))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_unexpected_and_misshapen_tensors_are_named_as_the_file_spells_them(tmp_path: Path):
    path = tmp_path / "x.pth"
    state = SMALL.random()
    key = "normal_token.blocks.1.feature_resuse_mlp.1.fc2.bias"
    torch.save({"model_state_dict": {k: v for k, v in state.items() if k != key}}, path)
    assert f"missing tensors: {key}" in refused(path)
    torch.save({"model_state_dict": {**state, "less_token.blocks.1.gate": torch.zeros(1)}}, path)
    assert "unexpected tensors: less_token.blocks.1.gate" in refused(path)
    key = "less_token.blocks.0.attn.proj.weight"
    torch.save({"model_state_dict": {**state, key: torch.zeros(64, 63)}}, path)
    assert f"{key} has shape (64, 63), expected (64, 64)" in refused(path)
    torch.save({"model_state_dict": {**state, key: torch.full((64, 64), torch.nan)}}, path)
    assert f"{key} holds values that are not finite" in refused(path)
    torch.save({"model_state_dict": {k: v for k, v in state.items() if k != "less_less_token.cls_token"}}, path)
    assert "missing tensors: less_less_token.cls_token" in refused(path)
    key = "less_token.pos_embed"
    torch.save({"model_state_dict": {**state, key: torch.zeros(1, 100, 64)}}, path)
    assert f"{key} has 100 positions" in refused(path)


def test_other_models_and_other_files_are_told_apart(tmp_path: Path):
    path = tmp_path / "x.pth"
    torch.save({"model_state_dict": {"conv1.weight": torch.zeros(3)}}, path)
    assert "not a DVT" in refused(path)
    torch.save({"epoch": 3, "best": 0.7}, path)
    assert "holds no state dict" in refused(path)
    torch.save([1, 2], path)
    assert "holds a list" in refused(path)
    path.write_bytes(b"")
    assert "broken, cut short, or no PyTorch file" in refused(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused(path)
    assert "no such checkpoint" in refused(tmp_path / "absent.pth")
    assert "no such checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(part: float, tmp_path: Path):
    path = saved(tmp_path / "x.pth")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert "broken, cut short" in refused(path)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.target),)


def test_no_code_of_a_file_is_run(tmp_path: Path):
    path = saved(tmp_path / "x.pth", extra=Hostile(tmp_path / "run"))
    assert "it wants to call posix.mkdir" in refused(path)
    assert not (tmp_path / "run").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_checkpoint_that_evaluates_like_the_file(tmp_path: Path):
    source, out = saved(tmp_path / "x.pth.tar"), tmp_path / "x.safetensors"
    ran = CliRunner().invoke(build(), ["import", str(source), str(out), "--mean", "0.5,0.5,0.5"])
    assert ran.exit_code == 0, ran.output
    assert "exit 3: 14x14 tokens" in ran.output
    model, header = load_model(out)
    assert model.config.mean == (0.5, 0.5, 0.5)
    assert header["imported"]["file"] == "x.pth.tar"
    images = torch.randn(1, 3, 224, 224)
    np.save(tmp_path / "x.npy", images.numpy())
    ran = CliRunner().invoke(
        build(), ["evaluate", str(out), "--inputs", str(tmp_path / "x.npy"), "--logits", str(tmp_path / "y.npy")]
    )
    assert ran.exit_code == 0, ran.output
    expected = torch.stack(forward(SMALL, SMALL.random(), images))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected.numpy(), atol=1e-4)
    again = CliRunner().invoke(build(), ["import", str(source), str(out)])
    assert again.exit_code == 1


@pytest.mark.parametrize(
    "option", [["--mean", "1,2"], ["--std", "0,0.5,0.5"], ["--mean", "a,b,c"], ["--mean", "9,9,9"]]
)
def test_unusable_statistics_are_refused(option: list[str], tmp_path: Path):
    ran = CliRunner().invoke(build(), ["import", str(saved(tmp_path / "x.pth")), str(tmp_path / "y"), *option])
    assert isinstance(ran.exception, click.UsageError)
    assert not (tmp_path / "y").exists()
