"""One command from a plain ViT and a folder of images to a calibrated bundle, whatever ends it on the way."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from typer.testing import CliRunner

from export.convert import STEPS, Bought, Conversion, Wish, what_is_left
from model.checkpoint import load_model, save_model
from model.config import variant
from model.dvt import DVT
from model.recipes import RECIPES
from server.__main__ import build
from server.bundle.manifest import Bundle
from tests.model.vits import HF_CONFIG, HF_PREPROCESSOR, MEAN, STD, TIMM_CONFIG, hugging_face, in_timm, saved_vit, timm

QUICK = ("--epochs=2", "--set=batch_size=40", "--set=held_out=0.4", "--device=cpu", "--grids=2,4")


def dvt(*arguments: object) -> Any:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments], standalone_mode=False)


def convert(vit: Path, images: Path, out: Path, *options: str) -> Any:
    return dvt("convert", vit, images, out, *QUICK, *options)


def refused(*arguments: Any) -> str:
    ran = convert(*arguments)
    assert isinstance(ran.exception, click.ClickException), ran.exception or ran.output
    assert "\n" not in ran.exception.message
    return ran.exception.message


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_timm(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def converted(vit: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    ran = convert(vit, image_folder, out)
    assert ran.exit_code == 0, ran.exception
    assert "left to do: vit, train, export, calibrate, evaluate" in ran.stderr
    assert re.search(
        r"next: dvt serve \S+/out/bundle\n\d+\.\d\d% at \S+ GMAC an image, where the ViT alone has ", ran.stdout
    )
    assert re.search(r"unseen images\)$", ran.stdout.strip())
    return out


def copied(converted: Path, to: Path, without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(converted, to)
    for name in without:
        thing = to / name
        shutil.rmtree(thing) if thing.is_dir() else thing.unlink()
    return to


def test_a_vit_becomes_a_bundle_that_serves(converted: Path, image_folder: Path):
    bundle = Bundle.load(converted / "bundle")
    assert bundle.manifest.labels == ("blue", "green", "red", "white")
    assert [stage.grid[0] for stage in bundle.manifest.stages] == [2, 4]
    config = load_model(converted / "run" / "model.safetensors")[0].config
    assert (config.mean, config.std) == (tuple(MEAN), tuple(STD))  # which the bundle's graph begins with
    summary = json.loads((converted / "summary.json").read_text())
    judged = summary["evaluation"]
    assert judged["images"] == summary["images"] < 0.4 * 160
    assert summary["vit_gmacs"] < judged["stage_gmacs"][1]
    assert not summary["vit_trained_here"]
    ran = dvt("evaluate", converted / "bundle", image_folder)
    assert ran.exit_code == 0, ran.exception


def test_images_to_judge_on_are_neither_trained_nor_calibrated_on(converted: Path):
    summary = json.loads((converted / "summary.json").read_text())
    header = load_model(converted / "run" / "model.safetensors")[1]
    assert summary["images"] + header["training_images"] + Bundle.load(converted / "bundle").frontier.samples == 160


def test_a_conversion_that_is_done_is_only_told_again(converted: Path, vit: Path, image_folder: Path):
    before = {path: path.stat().st_mtime_ns for path in converted.rglob("*") if path.is_file()}
    ran = convert(vit, image_folder, converted, "--json")
    assert json.loads(ran.stdout) == json.loads((converted / "summary.json").read_text())
    assert ran.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in converted.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("lost", "left"),
    [
        (("summary.json",), "evaluate"),
        (("summary.json", "bundle/frontier.json"), "calibrate, evaluate"),
    ],
)
def test_it_goes_on_with_what_is_left_to_the_same_end(
    converted: Path, vit: Path, image_folder: Path, tmp_path: Path, lost: tuple[str, ...], left: str
):
    out = copied(converted, tmp_path / "out", lost)
    assert what_is_left(out) == left.split(", ")
    ran = convert(vit, image_folder, out)
    assert f"left to do: {left}\n" in ran.stderr
    again, before = (json.loads((folder / "summary.json").read_text()) for folder in (out, converted))
    assert again | {"bundle": ""} == before | {"bundle": ""}


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from dataclasses import replace
    from pathlib import Path
    from tqdm import tqdm
    from export.convert import STEPS, Wish, convert, what_is_left
    from model.recipes import RECIPES

    recipe = replace(RECIPES["from-vit"], epochs=2, warmup_epochs=0, batch_size=40, held_out=0.4)
    wish = Wish(*map(Path, sys.argv[1:4]), recipe, device="cpu", grids=(2, 4))

    class Deadly(tqdm):
        '''Kills the process in the middle of a step.'''
        def set_description(self, desc, refresh=True):
            self.step, self.seen = desc.split()[0], 0
        def update(self, n=1):
            self.seen += n > 0
            if self.step == dies_in and self.seen == {"train": 3, "export": 3}.get(dies_in, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            self.n += n

    for dies_in in (*STEPS[1:], "never"):
        child = os.fork()  # before the first thread
        if not child:
            convert(wish, Deadly(disable=True), lambda line: None)
            os._exit(0)
        print(dies_in, os.waitpid(child, 0)[1], *what_is_left(wish.out), flush=True)
    """
)


def test_killed_in_every_step_it_comes_to_the_same_end(converted: Path, vit: Path, image_folder: Path, tmp_path: Path):
    command = [sys.executable, "-c", KILLED, str(vit), str(image_folder), str(tmp_path / "parts")]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "train 9 train export calibrate evaluate",
        "export 9 export calibrate evaluate",
        "calibrate 9 calibrate evaluate",
        "evaluate 9 evaluate",
        "never 0",
    ]
    parts, whole = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "parts", converted))
    assert parts | {"bundle": ""} == whole | {"bundle": ""}
    assert not list((tmp_path / "parts").glob(".bundle*"))


def wish(path: Path, images: Path, out: Path, **changes: Any) -> Wish:
    recipe = replace(RECIPES["from-vit"], epochs=1, warmup_epochs=0, batch_size=40, held_out=0.4)
    return Wish(path, images, out, recipe, device="cpu", **changes)


def test_a_vit_of_other_classes_is_trained_alone_first(image_folder: Path, tmp_path: Path):
    state = hugging_face(timm(True, classes=None), "dinov2.")
    path = saved_vit(tmp_path / "dino", state, HF_CONFIG, HF_PREPROCESSOR).parent
    conversion = Conversion(wish(path, image_folder, tmp_path / "out", grids=(2, 4), test=image_folder))
    with conversion.held():
        for step in ("vit", "train"):
            conversion.run(step, lambda *_: None)
            assert conversion.left()[0] == STEPS[STEPS.index(step) + 1]
    alone, header = load_model(conversion.vit)
    assert (alone.config.grids, header["epochs"]) == ((4,), 1)
    assert load_model(conversion.model)[0].config.grids == (2, 4)  # and the ViT, which knows them now, taught it
    assert len(conversion.judging) == 160


def test_two_conversions_do_not_work_in_one_folder(vit: Path, image_folder: Path, tmp_path: Path):
    first, second = (Conversion(wish(vit, image_folder, tmp_path / "out")) for _ in range(2))
    with first.held(), pytest.raises(FileExistsError, match="another conversion works in it"), second.held():
        pass
    with second.held():
        pass


def test_a_folder_that_is_something_else_is_left_alone(converted: Path, vit: Path, image_folder: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(vit, image_folder, tmp_path) == f"{tmp_path} holds something else; name another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert "file exists" in refused(vit, image_folder, tmp_path / "notes.txt")
    said = refused(vit, image_folder, converted, "--grids=3,4", "--no-teacher")
    assert said == f"{converted} was made by another command: cascade, teacher; name another folder"
    other = in_timm(tmp_path / "vit", **{"norm.bias": timm()["norm.bias"] + 1})
    assert "was made by another command: vit;" in refused(other, image_folder, converted)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "convert.json").write_text("[]")
    assert "is not what a conversion leaves" in refused(vit, image_folder, broken)


def test_what_cannot_be_converted_is_refused_before_anything_is_made(vit: Path, image_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    cascade = tmp_path / "cascade.safetensors"
    save_model(cascade, DVT(variant("micro")))
    assert "is a cascade already" in refused(cascade, image_folder, out)
    save_model(cascade, DVT(variant("micro", grids=(4,))))
    assert "its tokeniser is t2t, only plain patches are resampled" in refused(cascade, image_folder, out)
    assert "no such checkpoint" in refused(tmp_path / "nowhere.pth", image_folder, out)
    assert "no such image folder" in refused(vit, tmp_path / "nowhere", out)
    assert "--grids 4,2: expected two numbers or more that rise" in refused(vit, image_folder, out, "--grids=4,2")
    assert "--precision is" in refused(vit, image_folder, out, "--precision=fp8")
    assert "in bf16 is calibrated on a GPU" in refused(vit, image_folder, out, "--precision=bf16")
    assert "where it would be taken for a class" in refused(vit, image_folder, image_folder / "out")
    assert "lr must be above 0" in refused(vit, image_folder, out, "--set=lr=0")
    shutil.copytree(image_folder / "red", tmp_path / "one" / "red")
    assert "holds the class red alone" in refused(vit, tmp_path / "one", out)
    assert not out.exists()
    assert not (image_folder / "out").exists()


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_full_disk_is_told_in_one_line_with_what_is_left(
    converted: Path, vit: Path, image_folder: Path, tmp_path: Path, step: str
):
    lost = ("summary.json",) if step == "evaluate" else ("summary.json", "bundle", "run")
    out = copied(converted, tmp_path / "out", lost)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        said = refused(vit, image_folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "too large" in said.lower()
    assert said.endswith(f"(left to do: {', '.join(STEPS[STEPS.index(step) :])})")
    assert step == "train" or convert(vit, image_folder, out).exit_code == 0


def test_a_bargain_and_none_are_told_apart():
    def last(gmacs: float) -> str:
        point = {"accuracy": 0.5, "gmacs": gmacs}
        judged = {"exit_accuracy": [0.4], "stage_gmacs": [0.1]}
        document = {"evaluation": judged, "point": point, "grids": [2], "vit_gmacs": 0.4, "vit_accuracy": 0.5}
        return list(Bought.lines(document | {"bundle": "b", "images": 9}))[-1]

    assert "has 50.00% at 0.4: 2.00 times fewer (" in last(0.2)
    assert "2.00 times more, so nothing is bought" in last(0.8)


def test_settings_that_are_not_given_are_the_vits(image_folder: Path, tmp_path: Path):
    path = saved_vit(tmp_path / "vit", timm(), TIMM_CONFIG)
    plain = Conversion(wish(path, image_folder, tmp_path / "out")).cascade
    assert (plain.grids, plain.image_size, plain.resize, plain.mean, plain.std) == (
        (2, 3, 4), 48, 48, tuple(MEAN), tuple(STD),
    )  # fmt: skip
    given = wish(path, image_folder, tmp_path / "out", image_size=24, resize=30)
    given = Conversion(replace(given, recipe=replace(given.recipe, mean=(0.1, 0.1, 0.1)))).cascade
    assert (given.grids, given.image_size, given.resize, given.mean, given.std) == (
        (1, 2), 24, 30, (0.1, 0.1, 0.1), tuple(STD),
    )  # fmt: skip
