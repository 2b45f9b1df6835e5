"""A plain ViT of timm's or Hugging Face's making begins every stage of a cascade."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from model.checkpoint import CheckpointError, load_model, load_tensors, save_model
from model.config import variant
from model.dvt import DVT
from model.losses import cascade_loss
from model.recipes import RECIPES, Recipe
from model.resample import grid_ladder, resize_matrix, resized_patch, resized_positions
from model.start import read_start, take_weights
from model.train import initial_model, teaching_model, train
from server.__main__ import build
from tests.model.vits import (
    CLASSES,
    GRID,
    HEADS,
    HF_CONFIG,
    HF_PREPROCESSOR,
    MEAN,
    PATCH,
    STD,
    TIMM_CONFIG,
    WIDTH,
    answers,
    hugging_face,
    in_timm,
    saved_vit,
    timm,
)

SHORT = replace(RECIPES["micro"], epochs=2, lr=1e-3, held_out=0.5, distillation=0.5, mix_probability=0.0, ema_decay=0.0)
LABELS = ("a", "b", "c", "d")
LIKE_SAVED = pytest.mark.parametrize("scale", [False, True], ids=["ViT", "DINOv2"])


def begun(path: Path, labels: tuple[str, ...] = LABELS, **changes: Any) -> DVT:
    return initial_model(replace(SHORT, changes=changes), labels, path)[0].eval()


def alone(cascade: DVT, number: int, path: Path) -> Tensor:
    """The logits of the ViT alone, resampled to the grid of a cascade's stage."""
    model = DVT(replace(cascade.config, grids=cascade.config.grids[number : number + 1]))
    take_weights(model, read_start(path))
    return model.eval()(images())[0]


def images(size: int = PATCH * GRID) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- reading ----------------------------------------------------------------------------------------------------------


@LIKE_SAVED
def test_both_layouts_begin_the_same_cascade_bit_by_bit(tmp_path: Path, scale: bool):
    state = timm(scale)
    ours = begun(saved_vit(tmp_path / "timm", state, TIMM_CONFIG))
    theirs = begun(
        saved_vit(tmp_path / "hf", hugging_face(state, "dinov2." if scale else "vit."), HF_CONFIG, HF_PREPROCESSOR)
    )
    assert ours.config == theirs.config
    assert ours.config.grids == (2, 3, 4)
    assert (ours.config.mean, ours.config.std, ours.config.resize) == (tuple(MEAN), tuple(STD), 48)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@LIKE_SAVED
def test_the_vit_alone_computes_what_its_definition_says(tmp_path: Path, scale: bool):
    state = timm(scale)
    model = begun(saved_vit(tmp_path, state, TIMM_CONFIG), grids=(GRID,))
    torch.testing.assert_close(model(images())[0].double(), answers(state, images()), atol=2e-5, rtol=1e-4)


def test_a_pickle_and_a_folder_are_taken_as_well_and_no_code_is_run(tmp_path: Path):
    path = in_timm(tmp_path / "timm")
    torch.save({"model": timm(), "epoch": 3}, tmp_path / "timm" / "vit.pth")
    (tmp_path / "folder").mkdir()
    torch.save(hugging_face(timm()), tmp_path / "folder" / "pytorch_model.bin")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(HF_CONFIG))
    expected = begun(path).state_dict()
    for other in (tmp_path / "timm" / "vit.pth", tmp_path / "timm", tmp_path / "folder"):
        found = begun(other).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    class Dangerous:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("owned",))

    torch.save({"patch_embed.proj.weight": Dangerous()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read safely"):
        read_start(tmp_path / "evil.pth")


def test_half_precision_is_read_as_fp32(tmp_path: Path):
    path = saved_vit(tmp_path, {name: tensor.half() for name, tensor in timm().items()}, TIMM_CONFIG)
    assert begun(path).stages[0].blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_positions_without_one_for_the_class_token_are_taken(tmp_path: Path):
    state = timm()
    bare = state | {"pos_embed": state["pos_embed"][:, 1:].clone()}
    model = begun(saved_vit(tmp_path, bare, TIMM_CONFIG), grids=(GRID,))
    padded = state | {"pos_embed": torch.cat((torch.zeros(1, 1, WIDTH), bare["pos_embed"]), dim=1)}
    torch.testing.assert_close(model(images())[0].double(), answers(padded, images()), atol=2e-5, rtol=1e-4)


def test_what_is_not_told_is_assumed_and_said(tmp_path: Path):
    path = saved_vit(tmp_path, timm())
    with pytest.raises(CheckpointError, match="its 32 channels are no multiple of 64: tell its heads with --heads"):
        read_start(path)
    start = read_start(path, heads=HEADS)
    said = "; ".join(start.notes)
    for assumed in ("an epsilon of 1e-6", "ImageNet's mean and std", "resized to 8/7 of the crop"):
        assert assumed in said
    assert start.config.resize == 54
    assert read_start(in_timm(tmp_path / "told")).notes == ()


def test_a_mask_token_and_a_pooler_are_left_out_by_name(tmp_path: Path):
    more = {"mask_token": torch.zeros(1, WIDTH), "pooler.dense.weight": torch.zeros(WIDTH, WIDTH)}
    start = read_start(saved_vit(tmp_path, timm(classes=None) | more, TIMM_CONFIG))
    assert start.notes == ("not used: mask_token, pooler.dense.weight",)
    assert not any("head" in name for name in start.tensors)


def test_a_head_that_reads_patches_too_is_left_out(tmp_path: Path):
    state = hugging_face(timm(True, classes=None), "dinov2.")
    state |= {"classifier.weight": torch.zeros(CLASSES, 2 * WIDTH), "classifier.bias": torch.zeros(CLASSES)}
    start = read_start(saved_vit(tmp_path, state, HF_CONFIG, HF_PREPROCESSOR))
    assert start.notes == ("its head is left out: it reads more than the class token",)


REFUSED_TENSORS = [
    ({"dist_token": (1, 1, WIDTH)}, "it has a distillation token, which is not computed here (dist_token)"),
    ({"head_dist.weight": (4, WIDTH)}, "a distillation token, which is not computed here (head_dist.weight)"),
    ({"embeddings.distillation_token": (1, 1, WIDTH)}, "distillation token, which is not computed here (embeddings.d"),
    ({"reg_token": (1, 4, WIDTH)}, "it has register tokens, which is not computed here (reg_token)"),
    ({"register_tokens": (1, 4, WIDTH)}, "it has register tokens"),
    ({"embeddings.register_tokens": (1, 4, WIDTH)}, "computed here (embeddings.register_tokens)"),
    (
        {"blocks.0.mlp.w12.weight": (96, WIDTH)},
        "its MLPs are gated (SwiGLU), which is not computed here (blocks.0.mlp.",
    ),
    ({"encoder.layer.0.mlp.weights_in.weight": (96, WIDTH)}, "gated (SwiGLU), which is not computed here (encoder.l"),
    ({"norm_pre.weight": (WIDTH,)}, "it has a norm in front of its blocks"),
    ({"fc_norm.weight": (WIDTH,)}, "it averages its tokens where ours reads the class token"),
    ({"attn_pool.latent": (1, 1, WIDTH)}, "it pools its tokens by attention"),
    ({"blocks.0.attn.q_norm.weight": (16,)}, "it normalises queries and keys"),
    ({"blocks.0.attn.relative_position_bias_table": (49, 2)}, "unexpected tensors: blocks.0.attn.relative_position_bi"),
    ({"pos_embed": (1, 1 + 3 * 4, WIDTH)}, "pos_embed has 13 positions, not those of a square and the class token"),
    ({"pos_embed": (1, 17, 16)}, "pos_embed has shape (1, 17, 16), expected (1, 17, 32)"),
    ({"patch_embed.proj.weight": (WIDTH, 3, 12, 8)}, "its patches are 12 x 8 pixels, not square"),
    ({"patch_embed.proj.weight": (WIDTH, 1, 12, 12)}, "its patches have 1 channels, images here have 3"),
    ({"blocks.1.mlp.fc1.weight": (40, WIDTH)}, "blocks.1.mlp.fc1.weight has shape (40, 32), expected (48, 32)"),
    ({"blocks.0.ls1.gamma": (8,)}, "blocks.0.ls1.gamma does not fit blocks.0.attn.proj.weight"),
    ({"cls_token": None}, "it has no cls_token"),
    ({"blocks.1.norm2.bias": None}, "missing tensors: blocks.1.norm2.bias"),
    ({"blocks.0.mlp.fc1.weight": None}, "it has no blocks.0.mlp.fc1.weight"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED_TENSORS, ids=[next(iter(c)) for c, _ in REFUSED_TENSORS])
def test_what_is_not_computed_here_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str):
    state = timm() | {name: torch.zeros(shape) for name, shape in changes.items() if shape is not None}
    state = {name: tensor for name, tensor in state.items() if changes.get(name, ()) is not None}
    path = saved_vit(tmp_path, state, TIMM_CONFIG)
    with pytest.raises(CheckpointError) as refused:
        read_start(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


REFUSED_SETTINGS = [
    ({"hidden_act": "gelu_new"}, "config.json: hidden_act is 'gelu_new', computed here is gelu, the erf form, alone"),
    ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn"),
    ({"global_pool": "avg"}, "global_pool is 'avg', ours reads the class token"),
    ({"hidden_size": 64}, "config.json: hidden_size is 64, but the tensors say 32"),
    ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the tensors say 2"),
    ({"image_size": 224}, "image_size is 224, but the tensors say 48"),
    ({"patch_size": 16}, "patch_size is 16, but the tensors say 12"),
    ({"num_attention_heads": 5}, "5 heads do not divide its 32 channels"),
    ({"num_attention_heads": "two"}, "num_attention_heads is 'two', no such number"),
    ({"layer_norm_eps": -1}, "layer_norm_eps is -1, no such number"),
    ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, "its activation is not the erf form"),
    ({"model_args": {"act_layer": "silu"}}, "model_args has act_layer"),
    ({"pretrained_cfg": {"mean": [1], "std": [1, 1, 1]}}, "the mean of its images is [1], not three numbers"),
    ({"pretrained_cfg": {"mean": [0, 0, 0], "std": [0, 1, 1]}}, "the std of its images is [0, 1, 1]"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED_SETTINGS, ids=[str(c)[1:30] for c, _ in REFUSED_SETTINGS])
def test_settings_of_another_function_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str):
    path = saved_vit(tmp_path, hugging_face(timm()), HF_CONFIG | changes, HF_PREPROCESSOR)
    with pytest.raises(CheckpointError) as refused:
        read_start(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a":' * 100_000])
def test_a_document_beside_it_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str):
    path = in_timm(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json beside it"):
        read_start(path)


def assert_taken_or_refused_in_one_line(path: Path) -> None:
    refused = ""
    try:
        assert read_start(path).config.embed_dim == WIDTH
    except CheckpointError as error:
        refused = str(error)
    assert "\n" not in refused


@pytest.mark.parametrize("value", [True, -1, 1e308, "x", None, [], {}, [[]], {"0": 1}, 10**400])
@pytest.mark.parametrize(
    "name", [*HF_CONFIG, "id2label", "pretrained_cfg", "model_args", "architecture", "global_pool"]
)
def test_odd_settings_are_taken_or_refused_but_never_fail(tmp_path: Path, name: str, value: Any):
    path = saved_vit(tmp_path, hugging_face(timm()), HF_CONFIG | {name: value}, HF_PREPROCESSOR)
    assert_taken_or_refused_in_one_line(path)


@pytest.mark.parametrize("value", [True, -1, "x", None, [], {}, 10**400])
@pytest.mark.parametrize("name", [*HF_PREPROCESSOR, "rescale_factor", "do_rescale", "crop_size"])
def test_odd_preprocessing_is_taken_or_refused_but_never_fails(tmp_path: Path, name: str, value: Any):
    path = saved_vit(tmp_path, hugging_face(timm()), HF_CONFIG, HF_PREPROCESSOR | {name: value})
    assert_taken_or_refused_in_one_line(path)


def test_how_images_are_resized_and_normalised_is_taken_from_either_making(tmp_path: Path):
    def of(**changes: Any) -> tuple[Any, ...]:
        config = read_start(saved_vit(tmp_path, hugging_face(timm()), HF_CONFIG, HF_PREPROCESSOR | changes)).config
        return config.resize, config.mean, config.std

    assert of() == (48, tuple(MEAN), tuple(STD))
    assert of(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})[0] == 55
    assert of(do_normalize=False)[1:] == ((0, 0, 0), (1, 1, 1))
    cropped = TIMM_CONFIG | {"pretrained_cfg": {"mean": MEAN, "std": STD, "crop_pct": 0.9}}
    assert read_start(saved_vit(tmp_path / "timm", timm(), cropped)).config.resize == 53


# --- resampling -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(old=st.integers(2, 9), more=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_larger_patch_says_of_enlarged_pixels_what_the_old_one_says_of_the_pixels(old: int, more: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, old, old, dtype=torch.float64, generator=draw)
    pixels = torch.randn(3, old, old, dtype=torch.float64, generator=draw)
    enlarge = resize_matrix(old, old + more)
    enlarged = enlarge @ pixels @ enlarge.T
    expected = (weight * pixels).sum((1, 2, 3))
    torch.testing.assert_close((resized_patch(weight, old + more) * enlarged).sum((1, 2, 3)), expected)


@settings(max_examples=30, deadline=None)
@given(old=st.integers(3, 9), less=st.integers(1, 2), seed=st.integers(0, 99))
def test_no_smaller_patch_says_of_reduced_pixels_more_nearly_what_the_old_one_says(old: int, less: int, seed: int):
    weight = torch.randn(1, 1, old, old, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    reduce = resize_matrix(old, old - less)
    by_definition = torch.linalg.lstsq(torch.kron(reduce, reduce).T, weight.flatten()[:, None], driver="gelsd").solution
    torch.testing.assert_close(resized_patch(weight, old - less).flatten(), by_definition[:, 0])


@pytest.mark.parametrize(("old", "new"), [(12, 24), (16, 23), (16, 7)])
def test_resizing_is_the_one_that_images_know(old: int, new: int):
    pixels = torch.randn(1, 1, old, old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axis = resize_matrix(old, new)
    expected = F.interpolate(pixels, size=(new, new), mode="bicubic", antialias=True)
    torch.testing.assert_close(axis @ pixels @ axis.T, expected)


@settings(max_examples=20, deadline=None)
@given(old=st.integers(1, 8), new=st.integers(1, 8))
def test_positions_are_interpolated_on_the_square_and_the_class_token_keeps_its_own(old: int, new: int):
    positions = torch.randn(1, 1 + old * old, 5, generator=torch.Generator().manual_seed(0))
    resized = resized_positions(positions, new)
    assert resized.shape == (1, 1 + new * new, 5)
    assert torch.equal(resized[:, 0], positions[:, 0])
    flat = torch.full((1, 1 + old * old, 5), 0.5)
    torch.testing.assert_close(resized_positions(flat, new), torch.full((1, 1 + new * new, 5), 0.5))
    # Rows and columns are not mixed up: what is turned before is turned after.
    turned = positions[:, 1:].reshape(1, old, old, 5).transpose(1, 2).reshape(1, -1, 5)
    again = resized_positions(torch.cat((positions[:, :1], turned), dim=1), new)[:, 1:].reshape(1, new, new, 5)
    torch.testing.assert_close(again.transpose(1, 2).reshape(1, -1, 5), resized[:, 1:])


def test_the_ladder_of_grids_is_the_papers():
    assert grid_ladder(14) == (7, 10, 14)
    assert grid_ladder(8) == (4, 6, 8)
    assert [grid_ladder(grid) for grid in (1, 2)] == [(1,), (1, 2)]
    assert all(grid_ladder(grid)[-1] == grid for grid in range(1, 60))


# --- beginning --------------------------------------------------------------------------------------------------------


@LIKE_SAVED
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grids": (2, 4)},
        {"grids": (3, 5, 6)},
        {"reuse_dim": 16},
        {"relation_reuse": False},
        {"feature_reuse": False},
    ],
    ids=str,
)
def test_the_first_forward_of_every_stage_is_the_resampled_vit_alone(
    tmp_path: Path, scale: bool, changes: dict[str, Any]
):
    state = timm(scale)
    path = saved_vit(tmp_path, state, TIMM_CONFIG)
    cascade = begun(path, **changes)
    exits = cascade(images())
    for number, logits in enumerate(exits):
        torch.testing.assert_close(logits, alone(cascade, number, path), atol=1e-4, rtol=1e-4)
    if cascade.config.grids[-1] == GRID:  # as it was given
        torch.testing.assert_close(exits[-1].double(), answers(state, images()), atol=1e-4, rtol=1e-4)


def test_reuse_starts_at_zero_effect_and_learns_from_the_first_step(tmp_path: Path):
    cascade = begun(in_timm(tmp_path))
    state = cascade.stages[0](images())[1]
    other = type(state)(*(torch.randn_like(part) for part in state))
    assert torch.equal(cascade.stages[1](images(), state)[0], cascade.stages[1](images(), other)[0])
    cascade_loss(cascade(images()), torch.tensor([0, 1, 2])).backward()
    for stage in cascade.stages[1:]:
        assert stage.feature_reuse[0].mlp.fc2.weight.grad.abs().sum() > 0
        assert stage.relation_reuse.mlp[2].weight.grad.abs().sum() > 0


def test_a_backbone_of_our_own_grows_in_the_same_way(tmp_path: Path):
    torch.manual_seed(0)
    backbone = DVT(variant("micro", tokenizer="patch", grids=(4,), labels=LABELS)).eval()
    with torch.no_grad():
        backbone.stages[0].pos_embed.mul_(20)  # tokens that vary as trained ones do, far more than an epsilon
    path = tmp_path / "backbone.safetensors"
    save_model(path, backbone)
    cascade = begun(path, grids=(2, 4))
    torch.testing.assert_close(cascade(images())[1], backbone(images())[0], atol=1e-5, rtol=1e-4)
    again = begun(path).state_dict()  # on its own grid it is left as it is
    assert all(torch.equal(again[name], tensor) for name, tensor in backbone.state_dict().items())


def test_images_of_another_size_keep_the_proportion_of_their_crop(tmp_path: Path):
    cropped = TIMM_CONFIG | {"pretrained_cfg": {"mean": MEAN, "std": STD, "crop_pct": 0.75}}
    model = begun(saved_vit(tmp_path, timm(), cropped), image_size=24)
    assert (model.config.image_size, model.config.resize) == (24, 32)
    assert model(images(24))[2].shape == (3, 4)


def test_heads_are_kept_where_classes_agree_in_the_order_of_ours(tmp_path: Path):
    state = hugging_face(timm())
    config = HF_CONFIG | {"id2label": {"0": "d", "1": "c", "2": "b", "3": "a"}}
    path = saved_vit(tmp_path, state, config, HF_PREPROCESSOR)

    def head(labels: tuple[str, ...]) -> tuple[Tensor, Any]:
        model, taken = initial_model(SHORT, labels, path)
        return model.stages[2].head.weight, taken

    assert torch.equal(head(LABELS)[0], state["classifier.weight"].flip(0))
    assert torch.equal(head(("d", "c", "b", "a"))[0], state["classifier.weight"])
    weight, taken = head(("a", "b", "c", "e"))
    assert not torch.equal(weight, state["classifier.weight"])
    assert "begins anew: stages.0.head.weight" in str(taken)
    assert set(taken.unused) == {"stages.0.head.weight", "stages.0.head.bias"}
    numbered = tuple(f"n0000000{number}" for number in range(4))  # ImageNet's, whose order is that of its classes
    assert torch.equal(head(numbered)[0], state["classifier.weight"])
    assert not torch.equal(head(("a", "b"))[0], state["classifier.weight"][:2])


# --- teaching ---------------------------------------------------------------------------------------------------------


def test_all_exits_learn_from_a_teacher():
    draw = torch.Generator().manual_seed(0)
    exits = [torch.randn(5, 4, generator=draw, requires_grad=True) for _ in range(3)]
    teacher, labels = torch.randn(5, 4, generator=draw), torch.tensor([0, 1, 2, 3, 0])
    cascade_loss(exits, labels, distillation=1.0, teacher=teacher).backward()
    for logits in exits:
        torch.testing.assert_close(logits.grad, (logits.softmax(1) - teacher.softmax(1)).detach() / 5)


def test_distillation_brings_the_exits_nearer_to_the_teacher(tmp_path: Path, image_folder: Path):
    path = in_timm(tmp_path / "vit")

    @torch.no_grad()
    def distance(model: DVT) -> float:
        teacher = teaching_model(path, model.config).eval()
        pixels = images()
        wanted = teacher(pixels)[-1].log_softmax(1)
        return sum(
            float(F.kl_div(logits.log_softmax(1), wanted, log_target=True, reduction="batchmean"))
            for logits in model(pixels)
        )

    recipe = replace(SHORT, epochs=6, distillation=1.0)
    labels = ("blue", "green", "red", "white")
    before = distance(initial_model(recipe, labels, path)[0].eval())
    trained = train(image_folder, tmp_path / "run", recipe, start=path, teacher=path)
    assert distance(load_model(trained)[0]) < 0.9 * before
    curve = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] < curve[0]


def test_a_run_is_resumed_with_the_teacher_that_it_had(tmp_path: Path, image_folder: Path):
    path = in_timm(tmp_path / "vit")
    other = in_timm(tmp_path / "other", **{"head.bias": torch.ones(4)})

    def run(out: str, resume: bool = False, epochs: float = 9.0, teacher: Path | None = path) -> Path:
        return train(image_folder, tmp_path / out, SHORT, resume, start=path, teacher=teacher, minutes=epochs)

    run("parts", epochs=0)  # ends with the epoch that it is in
    for wrong in (other, None):
        with pytest.raises(CheckpointError, match="its teacher is another one, or none"):
            run("parts", resume=True, teacher=wrong)
    first, _ = load_tensors(run("parts", resume=True))
    second, _ = load_tensors(run("whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_who_cannot_teach_is_refused_in_one_line(tmp_path: Path):
    config = begun(in_timm(tmp_path / "vit")).config
    headless = saved_vit(tmp_path / "headless", timm(classes=None), TIMM_CONFIG)
    with pytest.raises(CheckpointError, match="cannot teach: it does not know these 4 classes"):
        teaching_model(headless, config)
    with pytest.raises(CheckpointError, match="cannot teach: it sees images normalised in another way"):
        teaching_model(tmp_path / "vit", replace(config, mean=(0.1, 0.1, 0.1)))
    assert teaching_model(tmp_path / "vit", replace(config, mean=(0.1, 0.1, 0.1)), told=True)
    assert teaching_model(tmp_path / "vit", replace(config, image_size=24, resize=24)).config.grids == (2,)


def test_on_the_command_line_a_vit_begins_and_teaches(tmp_path: Path, image_folder: Path):
    path = saved_vit(tmp_path / "vit", timm())
    command = ["train", str(image_folder), str(tmp_path / "run"), "--recipe=from-vit", f"--from={path}"]
    command += [f"--teacher={path}", "--set=epochs=1", "--set=batch_size=32", "--set=warmup_epochs=0"]
    ran = CliRunner().invoke(build(), command, standalone_mode=False)
    assert isinstance(ran.exception, click.ClickException)
    assert "tell its heads with --heads" in ran.exception.message
    ran = CliRunner().invoke(build(), [*command, "--heads=2"])
    assert ran.exit_code == 0, ran.output
    assert f"{path}: assumed: an epsilon of 1e-6 in its norms; assumed: images normalised" in ran.stderr
    assert load_model(tmp_path / "run" / "model.safetensors")[0].config.grids == (2, 3, 4)
    shutil.rmtree(tmp_path / "run")
    ran = CliRunner().invoke(build(), [*command, "--heads=2", "--set=distillation=0"], standalone_mode=False)
    assert "a teacher teaches by the share that distillation is" in ran.exception.message
    assert not (tmp_path / "run").exists()
    assert isinstance(RECIPES["from-vit"], Recipe)
