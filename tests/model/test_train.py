"""Training learns, resumes to the same curve, and keeps its held-out slice out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from model.augment import OPERATIONS, rand_augment
from model.checkpoint import CheckpointError, load_model, load_tensors, save_model, save_tensors
from model.commands import parse_changes
from model.config import variant
from model.data import EpochSampler, Sample, TrainImages, held_out, scan_image_folder, select
from model.dvt import DVT
from model.evaluate import exit_logits
from model.losses import cascade_loss
from model.recipes import RECIPES, Recipe
from model.resample import resized_patch
from model.train import Average, build_optimizer, initial_model, learning_rate, parameter_groups, train
from server.__main__ import build
from server.calibration.calibrate import held_out as held_out_by_the_server
from tests.model.test_published import SMALL, saved

SHORT = replace(RECIPES["micro"], epochs=2, held_out=0.5)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_learns(micro_checkpoint: Path):
    curve = losses(micro_checkpoint.parent)
    assert len(curve) == 8
    assert curve[-1] < 0.8 * curve[0]
    last = json.loads((micro_checkpoint.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert min(last["held_out_accuracy"]) > 0.5  # chance is 0.25


class Interrupted(Exception):
    pass


def test_a_resumed_run_has_the_same_loss_curve_and_the_same_weights(image_folder: Path, tmp_path: Path, monkeypatch):
    whole = train(image_folder, tmp_path / "whole", SHORT)

    import model.train as module

    saved = module.Run.save

    def save_and_stop(self, path: Path) -> None:
        saved(self, path)
        raise Interrupted

    monkeypatch.setattr(module.Run, "save", save_and_stop)
    with pytest.raises(Interrupted):
        train(image_folder, tmp_path / "parts", SHORT)
    monkeypatch.undo()
    parts = train(image_folder, tmp_path / "parts", SHORT, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, _ = load_tensors(whole)
    second, _ = load_tensors(parts)
    assert all(torch.equal(first[key], second[key]) for key in first)


CONVOLUTIONS = {"tokenizer": "conv", "stem_dim": 8}
FAST = replace(
    SHORT,
    epochs=3,
    changes=CONVOLUTIONS,
    in_memory=True,
    rand_augment=5.0,
    erasing=0.3,
    check_every=2,
    distillation=0.5,
)


def test_a_run_that_was_out_of_time_goes_on_to_the_same_curve_and_weights(image_folder: Path, tmp_path: Path):
    whole = train(image_folder, tmp_path / "whole", FAST)
    for epochs in (1, 2):
        train(image_folder, tmp_path / "parts", FAST, minutes=0.0, resume=True)
        assert len(losses(tmp_path / "parts")) == epochs
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"epoch": 3, "loss": 0.0}) + "\n" + '{"epoch": 4, "lo')  # cut short behind its checkpoint
    parts = train(image_folder, tmp_path / "parts", FAST, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = (load_tensors(path)[0] for path in (whole, parts))
    # Convolutions lie in memory otherwise than in a file: the moments of fused AdamW must, too.
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_held_out_images_are_looked_at_with_every_checkpoint(image_folder: Path, tmp_path: Path):
    train(image_folder, tmp_path / "run", FAST)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert ["held_out_accuracy" in record for record in records] == [False, True, True]


def test_images_in_memory_and_from_files_train_alike(image_folder: Path, tmp_path: Path):
    """With nothing random but the order, the two are the same images."""
    curves = []
    for in_memory in (False, True):
        recipe = replace(SHORT, min_area=1.0, colour=0.0, mix_probability=0.0, in_memory=in_memory, lr=4e-3)
        run = tmp_path / str(in_memory)
        train(image_folder, run, recipe)
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=0.1)  # other images are mirrored


def test_a_step_is_recorded_only_where_there_is_a_gpu(image_folder: Path, tmp_path: Path):
    if torch.cuda.is_available():
        plain, recorded = (train(image_folder, tmp_path / str(g), FAST, graph=g).parent for g in (False, True))
        assert losses(recorded) == pytest.approx(losses(plain), rel=0.05)
    else:
        with pytest.raises(ValueError, match="on a single GPU"):
            train(image_folder, tmp_path, FAST, graph=True)


def test_the_average_looks_back_further_as_training_goes_on():
    model = DVT(variant("micro"))
    average = Average(model, decay=0.9)
    head = model.stages[0].head.bias
    for step in range(1, 201):
        with torch.no_grad():
            head.fill_(float(step))
        average.update(step)
        if step == 10:
            assert average.model.stages[0].head.bias.mean() > 5
    assert average.model.stages[0].head.bias.mean() == pytest.approx(200 - 9, abs=0.1)
    assert not any(p.requires_grad for p in average.model.parameters())


def test_a_folder_that_holds_a_run_is_not_overwritten(image_folder: Path, micro_checkpoint: Path):
    with pytest.raises(FileExistsError, match="--resume"):
        train(image_folder, micro_checkpoint.parent, SHORT)
    with pytest.raises(CheckpointError, match="recipe differs in epochs"):
        train(image_folder, micro_checkpoint.parent, SHORT, resume=True)


def test_a_file_that_is_no_run_is_not_resumed(image_folder: Path, micro_checkpoint: Path, tmp_path: Path):
    shutil.copy(micro_checkpoint, tmp_path / "last.safetensors")  # averaged weights alone
    recipe = Recipe(**load_model(micro_checkpoint)[1]["recipe"])
    with pytest.raises(CheckpointError, match="is no run that can be resumed: its header has no epoch"):
        train(image_folder, tmp_path, recipe, resume=True)
    tensors, header = load_tensors(micro_checkpoint.parent / "last.safetensors")
    del tensors["live.stages.0.head.bias"]
    save_tensors(tmp_path / "last.safetensors", tensors, header)
    with pytest.raises(CheckpointError, match=r"live\.stages\.0\.head\.bias is not in both"):
        train(image_folder, tmp_path, recipe, resume=True)


def test_unusable_data_is_refused_with_the_folder_s_name(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(tmp_path / "nowhere", tmp_path / "out", SHORT)
    with pytest.raises(ValueError, match="no class folders"):
        train(tmp_path, tmp_path / "out", SHORT)


def test_the_held_out_slice_is_kept_out_and_the_server_finds_the_same_one(image_folder: Path):
    _, samples = scan_image_folder(image_folder)
    kept = {s.path for s in select(image_folder, samples, 0.3, "train")}
    out = {s.path for s in select(image_folder, samples, 0.3, "held-out")}
    assert kept | out == {s.path for s in samples}
    assert not kept & out
    assert 0.15 < len(out) / len(samples) < 0.45
    for i in range(500):
        name = f"class/{i:05d}.jpg"
        assert held_out(name, 0.1) == held_out_by_the_server(name, 0.1)


def test_processes_share_out_an_epoch_without_overlap_and_draw_a_new_order_each_time():
    parts = [EpochSampler(103, 8, seed=1, rank=rank, world=2) for rank in range(2)]
    first = [list(part) for part in parts]
    assert len(first[0]) == len(first[1]) == 48
    assert not set(first[0]) & set(first[1])
    for part in parts:
        part.epoch = 1
    assert [list(part) for part in parts] != first


def test_an_image_is_augmented_alike_whatever_the_order_it_is_read_in(image_folder: Path):
    _, samples = scan_image_folder(image_folder)
    a, b = (TrainImages(samples, 48, 0.3, 0.2, seed=0) for _ in range(2))
    _ = b[5]
    assert torch.equal(a[7][0], b[7][0])
    b.epoch = 1
    assert not torch.equal(a[7][0], b[7][0])


def test_images_of_a_run_with_padding_are_whole_ones_moved_and_mirrored(tmp_path: Path):
    (tmp_path / "all").mkdir()
    photo = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "all" / "one.png")
    images = TrainImages([Sample(tmp_path / "all" / "one.png", 0)], 48, 0.08, 0.0, seed=0, padding=0.125)
    for epoch in range(20):
        images.epoch = epoch
        middle = images[0][0][:, 6:-6, 6:-6].permute(1, 2, 0).numpy()  # of the photo's own pixels, wherever it went
        places = np.lib.stride_tricks.sliding_window_view(photo, (36, 36), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
        assert (places == middle).all(axis=(2, 3, 4)).any() or (places == middle[:, ::-1]).all(axis=(2, 3, 4)).any()


def test_rand_augment_changes_images_and_nothing_else_about_them():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    seen = []
    for seed in range(60):
        changed = rand_augment(image, 9.0, np.random.default_rng(seed))
        again = rand_augment(image, 9.0, np.random.default_rng(seed))
        assert (changed.size, changed.mode) == (image.size, "RGB")
        assert np.array_equal(changed, again)
        seen.append(np.asarray(changed).tobytes())
    assert len(set(seen)) > 25  # about a quarter is left as it is


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_rand_augment_does_something(name: str):
    y, x = np.mgrid[0:40, 0:60]
    grain = np.random.default_rng(0).integers(0, 20, (40, 60, 1))
    image = Image.fromarray((np.stack([x * 3, y * 5, 30 + x + y], axis=-1) + grain).astype(np.uint8))
    changed = OPERATIONS[name](image, 0.9, 1)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert not np.array_equal(changed, image)


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """A checkpoint without dropout and batch norm: nothing in it depends on how a batch is cut up."""
    torch.manual_seed(3)
    path = tmp_path / "patches.safetensors"
    save_model(path, DVT(variant("micro", tokenizer="patch", qkv_bias=True)))
    return path


PLAIN = replace(SHORT, mix_probability=0.0, epochs=2)


def test_a_batch_in_parts_trains_as_the_whole_one(image_folder: Path, tmp_path: Path, patches: Path):
    curves = []
    for parts in (1, 4):
        run = tmp_path / str(parts)
        train(image_folder, run, replace(PLAIN, accumulate=parts), start=patches)
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][0] != curves[0][1]


def test_two_processes_train_as_one(image_folder: Path, tmp_path: Path, patches: Path):
    train(image_folder, tmp_path / "one", PLAIN, start=patches)
    options = [f"--set={f}={getattr(PLAIN, f)}" for f in ("epochs", "held_out", "mix_probability")]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "server", "train"]
    ran = subprocess.run(
        [sys.executable, *command, str(image_folder), str(tmp_path / "two"), "--recipe=micro", f"--from={patches}",
         "--threads=1", *options],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_tensors(tmp_path / name / "model.safetensors")[0] for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)


def test_the_command_line_changes_a_recipe_and_its_variant():
    values = parse_changes(
        ["lr=1e-3", "mean=0.5,0.4,0.3", "drop_path=0.1", "variant.grids=2,4", "variant.feature_reuse=false"],
        RECIPES["micro"],
    )
    assert values == {
        "lr": 1e-3,
        "mean": (0.5, 0.4, 0.3),
        "drop_path": 0.1,
        "changes": {"grids": (2, 4), "feature_reuse": False},
    }
    model = initial_model(replace(RECIPES["micro"], **values), ("a", "b"), None)[0]
    assert model.config.grids == (2, 4)
    assert model.stages[1].feature_reuse is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("speed=9", "expected FIELD=VALUE with one of variant, epochs"),
        ("epochs", "expected FIELD=VALUE"),
        ("epochs=x", "not int"),
        ("variant.qkv_bias=maybe", "not true or false"),
        ("variant.grids=a,b", "a list of int"),
        ("variant.speed=9", "expected FIELD=VALUE"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(change: str, cause: str):
    with pytest.raises(click.UsageError, match=cause):
        parse_changes([change], RECIPES["micro"])


def test_fine_tuning_keeps_the_backbone_and_makes_a_head_for_other_classes(patches: Path):
    source, _ = load_model(patches)
    recipe = replace(PLAIN, mean=(0.5, 0.4, 0.3), drop_path=0.2)
    same = initial_model(recipe, ("a", "b", "c", "d"), patches)[0]
    other = initial_model(recipe, ("a", "b", "c"), patches)[0]
    assert torch.equal(same.stages[1].head.weight, source.stages[1].head.weight)
    assert other.stages[1].head.weight.shape == (3, 32)
    assert torch.equal(other.stages[1].blocks[0].attn.qkv.weight, source.stages[1].blocks[0].attn.qkv.weight)
    assert other.config.labels == ("a", "b", "c")
    assert other.config.mean == (0.5, 0.4, 0.3)
    assert other.config.tokenizer == "patch"
    assert other.stages[0].blocks[-1].drop_path.rate == 0.2


# --- beginning with weights that do not fit ---------------------------------------------------------------------------


def from_patches(patches: Path, fresh: bool = False, classes: str = "abcd", **changes: Any) -> tuple[DVT, Any]:
    return initial_model(replace(PLAIN, changes=changes), tuple(classes), patches, fresh)


def test_what_fits_is_taken_without_a_word_and_new_heads_are_told(patches: Path):
    _, taken = from_patches(patches)
    assert str(taken) == ""
    _, taken = from_patches(patches, classes="abc")
    assert str(taken).startswith("begins anew: stages.0.head.weight, stages.0.head.bias, ")
    assert len(taken.fresh) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grids": (5,)}, "stages.0.blocks.0.norm2.weight has shape (40,), wanted is (32,)"),
        ({"mlp_hidden": 96}, "stages.0.blocks.0.mlp.fc1.weight has shape (48, 32), wanted is (96, 32)"),
        ({"depth": 3}, "it has no stages.0.blocks.2.norm1.weight"),
        ({"reuse_dim": 4}, "stages.1.blocks.0.norm2.weight has shape (40,), wanted is (36,)"),
        ({"image_size": 60, "resize": 60}, "stages.0.tokenizer.proj.weight has shape (32, 3, 24, 24), wanted is "),
        ({"embed_dim": 64}, "and "),  # more than a message holds
    ],
)
def test_what_does_not_fit_is_named_and_begins_anew_only_when_told_to(
    patches: Path, changes: dict[str, Any], said: str
):
    with pytest.raises(CheckpointError) as refused:
        from_patches(patches, **changes)
    message = str(refused.value)
    assert message.startswith(f"{patches} does not fit: ")
    assert message.endswith("; to begin these anew: --fresh")
    assert said in message
    assert len(message) < 700
    model, taken = from_patches(patches, fresh=True, **changes)
    assert taken.fresh
    assert all(not name.startswith("stages.") or name in model.state_dict() for name in taken.fresh)


def test_stages_take_the_weights_of_the_stage_on_their_own_grid(patches: Path):
    source, _ = load_model(patches)
    model, taken = from_patches(patches, grids=(2, 4))
    for mine, theirs in ((0, 0), (1, 2)):
        for name in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"):
            got, want = (m.get_parameter(f"stages.{i}.{name}") for m, i in ((model, mine), (source, theirs)))
            assert torch.equal(got, want)
    assert not taken.fresh
    assert all(name.startswith("stages.1.") for name in taken.unused)
    alone, taken = from_patches(patches, grids=(4,), fresh=True)
    assert torch.equal(alone.stages[0].pos_embed, source.stages[2].pos_embed)
    # Without reuse a block's second norm and the layer behind it are narrower.
    assert {name.split(".")[4] for name in taken.fresh} == {"norm2", "mlp"}


def test_a_published_checkpoint_is_begun_with_as_it_is(tmp_path: Path):
    path = saved(tmp_path / "x.pth.tar")
    model, taken = initial_model(PLAIN, ("a", "b"), path)
    expected = SMALL.random()["less_token.blocks.0.attn.proj.weight"]
    assert torch.equal(model.stages[1].blocks[0].attn.proj.weight, expected)
    assert {name.split(".")[2] for name in taken.fresh} == {"head"}


@pytest.mark.parametrize(("grids", "nearest"), [((2, 6), 4), ((2, 4, 8), 4), ((2, 3, 5, 9), 4)])
def test_a_stage_on_a_grid_of_its_own_begins_as_the_nearest_one_resampled(
    patches: Path, grids: tuple[int, ...], nearest: int
):
    source, _ = load_model(patches)
    old = source.stages[source.config.grids.index(nearest)]
    model, taken = from_patches(patches, grids=grids)
    assert not taken.fresh
    assert f"the stage on {grids[-1]}x{grids[-1]} tokens begins as that on 4x4, resampled" in str(taken)
    new = model.stages[-1]
    for name, tensor in old.named_parameters():
        if name not in ("pos_embed", "tokenizer.proj.weight"):  # reuse, too, knows no grid
            assert torch.equal(new.get_parameter(name), tensor), name
    kernel = new.tokenizer.proj.weight
    assert kernel.shape[-1] < old.tokenizer.proj.weight.shape[-1]
    assert torch.equal(kernel, resized_patch(old.tokenizer.proj.weight, kernel.shape[-1]))
    means = [stage.pos_embed[0, 1:].mean(dim=0) for stage in (old, new)]
    assert torch.allclose(*means, atol=0.02)
    assert new.pos_embed.shape[1] == 1 + grids[-1] ** 2


def test_patches_behind_a_convolutional_stem_are_resampled_as_well(tmp_path: Path):
    small = {"embed_dim": 16, "mlp_hidden": 16, "stem_dim": 8, "depth": 2, "num_classes": 4}
    source = DVT(variant("photo10", grids=(4, 8), **small))
    save_model(tmp_path / "model.safetensors", source)
    model, taken = from_patches(tmp_path / "model.safetensors", grids=(4, 8, 16))
    assert not taken.fresh
    # Where all that the stem sees is alike, a patch of it is the same token, however large it is.
    pixels = torch.rand(1, 8, 1, 1).expand(1, 8, 16, 16)
    old, new = (m.stages[i].tokenizer.layers[6] for m, i in ((source, 1), (model, 2)))
    assert torch.allclose(new(pixels)[..., 3, 3], old(pixels)[..., 1, 1], atol=1e-5)


def test_a_t2t_stage_on_another_grid_keeps_the_positions_of_its_formula(tmp_path: Path):
    source = DVT(variant("micro", grids=(2, 3)))
    save_model(tmp_path / "model.safetensors", source)
    model, _ = from_patches(tmp_path / "model.safetensors", grids=(2, 3, 4), fresh=True)
    assert torch.equal(model.stages[2].pos_embed, DVT(variant("micro")).stages[2].pos_embed)
    assert torch.equal(model.stages[2].blocks[1].attn.qkv.weight, source.stages[1].blocks[1].attn.qkv.weight)


def test_what_does_not_fit_is_refused_in_one_line_on_the_command_line_and_begun_when_told_to(
    image_folder: Path, tmp_path: Path, patches: Path
):
    command = [
        "train",
        str(image_folder),
        str(tmp_path / "run"),
        "--recipe=micro",
        "--set=epochs=1",
        "--set=held_out=0.5",
    ]
    command += [f"--from={patches}", "--set=variant.depth=3"]
    ran = CliRunner().invoke(build(), command, standalone_mode=False)
    assert isinstance(ran.exception, click.ClickException)
    assert "it has no stages.0.blocks.2.norm1.weight" in ran.exception.message
    assert not (tmp_path / "run").exists()
    ran = CliRunner().invoke(build(), [*command, "--fresh"])
    assert ran.exit_code == 0, ran.output
    assert "begins anew: stages.0.blocks.2.norm1.weight" in ran.stderr
    ran = CliRunner().invoke(build(), [*command[:4], "--fresh"], standalone_mode=False)
    assert isinstance(ran.exception, click.UsageError)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("variant.image_size=96", "micro: resize 48 is smaller than image_size 96"),
        ("lr=0", "lr must be above 0, got 0"),
        ("batch_size=0", "batch_size must be at least 1, got 0"),
        ("check_every=0", "check_every must be at least 1, got 0"),
        ("accumulate=0", "accumulate must be at least 1, got 0"),
        ("precision=fp8", "precision is one of fp32, bf16, fp16, not fp8"),
        ("optimizer=lion", "optimizer is one of adamw, sgd, not lion"),
        ("padding=2", "padding lies between 0 and 1, got 2"),
        ("held_out=1.5", "held_out lies between 0 and 1, got 1.5"),
        ("warmup_epochs=-1", "warmup_epochs must not be below 0, got -1"),
        ("lr=nan", "lr must be above 0, got nan"),
        ("mean=0.5,0.5", "micro: mean has 2 numbers, one a channel is 3"),
        ("variant.tokenizer=pixels", "micro: tokenizer is one of t2t, patch, conv"),
        ("variant.depth=0", "micro: depth must be at least 1, got 0"),
        ("variant=mikro", "unknown variant 'mikro'; did you mean micro"),
    ],
)
def test_a_recipe_that_would_fail_later_is_refused_at_once(image_folder: Path, tmp_path: Path, change: str, said: str):
    command = ["train", str(image_folder), str(tmp_path / "run"), "--recipe=micro", f"--set={change}"]
    ran = CliRunner().invoke(build(), command, standalone_mode=False)
    assert isinstance(ran.exception, click.ClickException)
    assert said in ran.exception.message
    assert not (tmp_path / "run").exists()


def test_heads_may_learn_faster_than_the_backbone():
    model = DVT(variant("micro"))
    recipe = replace(RECIPES["fine-tune"], backbone_lr=0.01)
    groups = parameter_groups(model, recipe)
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert scales[id(model.stages[0].head.weight)] == 1.0
    assert scales[id(model.stages[0].blocks[0].attn.qkv.weight)] == 0.01
    assert isinstance(build_optimizer(model, recipe), torch.optim.SGD)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.stages[0].cls_token)] == 0.0
    assert decays[id(model.stages[0].head.weight)] == recipe.weight_decay


def test_after_the_cosine_the_rate_stays_at_its_floor_for_the_cooldown(image_folder: Path, tmp_path: Path):
    recipe = replace(PLAIN, epochs=1, cooldown_epochs=2, min_lr=1e-5, rand_augment=9.0, erasing=0.5)
    train(image_folder, tmp_path / "run", recipe)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 3
    assert rates[1:] == pytest.approx([1e-5, 1e-5])


def test_the_loss_is_the_plain_sum_over_exits():
    exits = [torch.randn(5, 4) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0])
    by_hand = sum(-logits.log_softmax(1)[range(5), labels].mean() for logits in exits)
    torch.testing.assert_close(cascade_loss(exits, labels), by_hand)


def test_earlier_exits_learn_from_the_last_one_which_does_not_learn_from_them():
    exits = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0])
    cascade_loss(exits, labels, distillation=1.0).backward()
    answers = exits[2].detach().softmax(1)
    for logits in exits[:2]:
        torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - answers) / 5)
    torch.testing.assert_close(exits[2].grad, (answers - F.one_hot(labels, 4)) / 5)


def test_the_rate_warms_up_and_falls_to_its_floor():
    rate = learning_rate(Recipe("micro", epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1), steps_per_epoch=5)
    assert [rate(step) for step in range(10)] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rate(50) == pytest.approx(0.1)
    assert all(rate(step) >= rate(step + 1) for step in range(10, 50))


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is not a DVT checkpoint"):
        load_model(broken)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(tmp_path / "missing.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path):
    model = DVT(variant("micro"))
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    header = {"config": model.config.to_dict()}
    path = tmp_path / "x.safetensors"
    head = "model.stages.0.head.bias"
    save_tensors(path, {k: v for k, v in tensors.items() if k != head}, header)
    with pytest.raises(CheckpointError, match=r"missing tensors: stages\.0\.head\.bias"):
        load_model(path)
    save_tensors(path, {**tensors, "model.extra": torch.zeros(1)}, header)
    with pytest.raises(CheckpointError, match="unexpected tensors: extra"):
        load_model(path)
    save_tensors(path, {**tensors, head: torch.zeros(9)}, header)
    with pytest.raises(CheckpointError, match=r"head\.bias has shape \(9,\), expected \(4,\)"):
        load_model(path)


def test_a_saved_model_comes_back_the_same(tmp_path: Path):
    torch.manual_seed(1)
    model = DVT(variant("micro", labels=("a", "b", "c", "d"))).eval()
    save_model(tmp_path / "m.safetensors", model, epochs=3)
    again, header = load_model(tmp_path / "m.safetensors")
    assert header["epochs"] == 3
    assert again.config == model.config
    x = torch.randn(5, 3, 48, 48)
    assert torch.equal(exit_logits(model, x, batch_size=2), exit_logits(again, x, batch_size=2))
