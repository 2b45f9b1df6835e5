"""A bundle is read only if every part of it fits; what does not fit is named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bundle.frontier import Frontier
from server.bundle.manifest import Bundle, Manifest, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.calibration.sweep import sweep
from server.errors import BundleError

GMACS = (0.1, 0.25, 0.6)
LABELS = ("bird", "car", "cat")


def specs(root: Path) -> list[StageSpec]:
    state = {
        "features": TensorSpec(dtype="float32", shape=("B", 4, 8)),
        "relations": TensorSpec(dtype="float32", shape=("B", 2, 5, 5)),
    }
    answers = {
        "logits": TensorSpec(dtype="float32", shape=("B", len(LABELS))),
        "probabilities": TensorSpec(dtype="float32", shape=("B", len(LABELS))),
        "confidence": TensorSpec(dtype="float32", shape=("B",)),
    }
    image = {"image": TensorSpec(dtype="uint8", shape=("B", 64, 64, 3))}
    return [
        StageSpec.of(
            root,
            f"stage{stage}.onnx",
            inputs=image if stage == 1 else {**image, **state},
            outputs=answers if stage == 3 else {**answers, **state},
            grid=(2 * stage, 2 * stage),
            gmacs=GMACS[stage - 1],
        )
        for stage in (1, 2, 3)
    ]


def write(root: Path) -> Manifest:
    root.mkdir(exist_ok=True)
    for stage in (1, 2, 3):
        (root / f"stage{stage}.onnx").write_bytes(b"graph %d" % stage)
    return write_manifest(
        root,
        name="micro",
        labels=LABELS,
        preprocessing=Preprocessing(resize=72, crop=(64, 64)),
        stages=specs(root),
        parity={"logits_max_abs": 1e-6},
        provenance={"seed": 0},
    )


def frontier(key: str, gmacs: tuple[float, ...] = GMACS) -> Frontier:
    rng = np.random.default_rng(0)
    return sweep(rng.random((2, 100), dtype=np.float32), rng.random((3, 100)) < 0.7, gmacs, key=key)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    manifest = write(root)
    Bundle.load(root, need_frontier=False).write_frontier(frontier(manifest.frontier_key))
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    manifest = write(root)
    Bundle.load(root, need_frontier=False).write_frontier(frontier(manifest.frontier_key))
    return root


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((root / "bundle.json").read_text())
    edit(document)
    (root / "bundle.json").write_text(json.dumps(document))


def test_what_export_writes_is_what_the_server_reads(root: Path) -> None:
    bundle = Bundle.load(root)
    assert bundle.manifest.labels == LABELS
    assert bundle.manifest.stage_gmacs == GMACS
    assert bundle.manifest.precision == "fp32"
    assert bundle.manifest.parity == {"logits_max_abs": 1e-6}
    assert bundle.preprocessing == Preprocessing(resize=72, crop=(64, 64), interpolation="bicubic")
    assert bundle.stage_path(2).read_bytes() == b"graph 2"
    assert bundle.frontier.knee.accuracy > 0


def test_the_version_names_weights_and_pixels_and_nothing_else(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.version == again.version
    assert (tmp_path / "a/bundle.json").read_bytes() == (tmp_path / "b/bundle.json").read_bytes()
    (tmp_path / "b/stage2.onnx").write_bytes(b"other weights")
    other = write_manifest(
        tmp_path / "b",
        name="micro",
        labels=LABELS,
        preprocessing=Preprocessing(72, (64, 64)),
        stages=specs(tmp_path / "b"),
    )
    assert other.version != first.version


def test_a_manifest_that_names_no_criterion_means_the_largest_probability(root: Path) -> None:
    change(root, lambda document: document.pop("criterion"))
    assert Bundle.load(root).manifest.criterion == "max_probability"
    change(root, lambda document: document.update(criterion="surprise"))
    with pytest.raises(BundleError, match="criterion"):
        Bundle.load(root)


def test_a_frontier_of_another_criterion_is_refused(root: Path) -> None:
    bundle = Bundle.load(root)
    other = replace(bundle.frontier, criterion="entropy")
    with pytest.raises(BundleError, match="its confidence is entropy, the bundle's is max_probability"):
        bundle.write_frontier(other)
    (root / "frontier.json").write_text(other.to_json())
    with pytest.raises(BundleError, match="its confidence is entropy"):
        Bundle.load(root)


def test_a_new_calibration_replaces_the_old_without_a_new_manifest(root: Path) -> None:
    manifest_before = (root / "bundle.json").read_bytes()
    bundle = Bundle.load(root)
    fewer = sweep([[0.2, 0.9]] * 2, [[True, False]] * 3, GMACS, key=bundle.manifest.frontier_key)
    assert bundle.write_frontier(fewer).frontier == fewer
    assert Bundle.load(root).frontier == fewer
    assert (root / "bundle.json").read_bytes() == manifest_before
    assert sorted(file.name for file in root.iterdir()) == [
        "bundle.json",
        "frontier.json",
        "stage1.onnx",
        "stage2.onnx",
        "stage3.onnx",
    ]


def test_a_changed_stage_file_stops_the_load_by_name(root: Path) -> None:
    (root / "stage2.onnx").write_bytes(b"graph 2 and more")
    with pytest.raises(BundleError, match=r"stage2\.onnx: sha256"):
        Bundle.load(root)
    assert Bundle.load(root, verify=False).manifest.name == "micro"


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "a/../../x", "", ".", "..\\x", "a\0b"])
def test_no_path_leads_out_of_the_bundle(root: Path, name: str) -> None:
    change(root, lambda d: d["stages"][0].update(file=name))
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        Bundle.load(root)


def test_a_symbolic_link_is_refused_for_file_and_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/stage1.onnx").write_bytes(b"graph 1")
    (root / "stage1.onnx").unlink()
    (root / "stage1.onnx").symlink_to(tmp_path / "elsewhere/stage1.onnx")
    with pytest.raises(BundleError, match=r"stage1\.onnx: is a symbolic link"):
        Bundle.load(root)
    (root / "sub").symlink_to(tmp_path / "elsewhere")
    change(root, lambda d: d["stages"][0].update(file="sub/stage1.onnx"))
    with pytest.raises(BundleError, match="sub: is a symbolic link"):
        Bundle.load(root)


def test_what_is_missing_or_no_regular_file_is_named(root: Path, tmp_path: Path) -> None:
    (root / "stage3.onnx").unlink()
    with pytest.raises(BundleError, match=r"stage3\.onnx: no such file"):
        Bundle.load(root)
    (root / "stage3.onnx").mkdir()
    with pytest.raises(BundleError, match=r"stage3\.onnx: is not a regular file"):
        Bundle.load(root)
    with pytest.raises(BundleError, match="nowhere: no such folder"):
        Bundle.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"bundle\.json: no such file"):
        Bundle.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda d: d.update(format_version=2), r"format version 2, this server reads 1"),
        (lambda d: d.pop("labels"), r"labels: Field required"),
        (lambda d: d["labels"].append("dog"), r"stage 1 has 3 classes, but there are 4 labels"),
        (lambda d: d["stages"][1].update(gmacs=0.7), r"gmacs .* do not rise"),
        (lambda d: d["stages"][1].update(gmacs=0.1), r"gmacs .* do not rise"),
        (lambda d: d["stages"][0].update(gmacs=0), r"stages\.0\.gmacs: "),
        (lambda d: d["stages"][0]["inputs"].clear(), r"stage 1 has no input `image`"),
        (lambda d: d["stages"][2]["outputs"].pop("confidence"), r"stage 3 has no output `confidence`"),
        (lambda d: d["stages"][0]["outputs"].pop("features"), r"stage 2 wants `features`"),
        (
            lambda d: d["stages"][1]["inputs"]["features"].update(dtype="float16"),
            r"stage 2 wants `features` as 'float16', the stage before leaves 'float32'",
        ),
        (lambda d: d["stages"].reverse(), r"stage 1 wants|stage 2 wants|do not rise"),
        (lambda d: d["preprocessing"].update(resize=80), r"version does not follow"),
        (lambda d: d["preprocessing"].update(resize=32), r"preprocessing: resize 32 is smaller"),
        (lambda d: d["preprocessing"].update(crop=[32, 32]), r"preprocessing: crop .* differs"),
        (lambda d: d["preprocessing"].update(interpolation="nearest"), r"preprocessing\.interpolation: "),
        (lambda d: d.update(precision="fp16"), r"frontier\.json: calibrated for .*fp32"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_with_its_cause_in_one_line(
    root: Path, edit: Callable[[dict[str, Any]], object], cause: str
) -> None:
    change(root, edit)
    with pytest.raises(BundleError, match=cause) as caught:
        Bundle.load(root)
    assert ".json: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_manifest_that_is_no_manifest_is_refused(root: Path, text: str) -> None:
    (root / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"bundle\.json: "):
        Bundle.load(root)


def test_a_bundle_without_calibration_is_only_for_calibrating(root: Path) -> None:
    (root / "frontier.json").unlink()
    with pytest.raises(BundleError, match=r"frontier\.json: is missing"):
        Bundle.load(root)
    bundle = Bundle.load(root, need_frontier=False)
    with pytest.raises(BundleError, match=r"frontier\.json"):
        _ = bundle.frontier


def test_a_frontier_of_other_stages_is_neither_read_nor_written(root: Path) -> None:
    bundle = Bundle.load(root)
    with pytest.raises(BundleError, match=r"frontier\.json: calibrated for 'other/key'"):
        bundle.write_frontier(frontier("other/key"))
    with pytest.raises(BundleError, match=r"frontier\.json: stage gmacs"):
        bundle.write_frontier(frontier(bundle.manifest.frontier_key, (0.1, 0.2, 0.6)))
    (root / "frontier.json").write_text(frontier("other/key").to_json())
    with pytest.raises(BundleError, match=r"frontier\.json: calibrated for 'other/key'"):
        Bundle.load(root)
    (root / "frontier.json").write_text('{"format_version": 1, "key": 3}')
    with pytest.raises(BundleError, match=r"frontier\.json: its sha256"):
        Bundle.load(root)


def test_export_refuses_to_write_what_the_server_would_refuse(root: Path) -> None:
    before = (root / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="3 classes, but there are 1 labels"):
        write_manifest(root, name="x", labels=["one"], preprocessing=Preprocessing(72, (64, 64)), stages=specs(root))
    assert (root / "bundle.json").read_bytes() == before


@pytest.mark.parametrize("name", ["bundle.json", "frontier.json", "profile.json"])
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"format_version": ' + b"[" * 900 + b"]" * 900 + b"}", "format version"),
        (b"9" * 5000, "not readable as JSON"),
        (b'{"format_version": 1' + b"0" * 400 + b"}", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"null", "."),
        (b"[]", "."),
        (b'{"format_version": 1}', "."),
        (b'{"format_version": NaN}', "not readable as JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_of_a_bundle_that_is_no_document_is_one_line(root: Path, name: str, content: bytes, cause: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{re.escape(name)}: .*{cause}") as refused:
        Bundle.load(root)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500 + len(str(root))


@pytest.mark.parametrize("name", ["bundle.json", "frontier.json", "profile.json"])
def test_nobody_reads_gigabytes_of_nothing(root: Path, name: str) -> None:
    with (root / name).open("wb") as sparse:
        sparse.truncate(3 * 2**30)
    with pytest.raises(BundleError, match=rf"{re.escape(name)}: is larger than"):
        Bundle.load(root)


@pytest.mark.parametrize("name", ["bundle.json", "frontier.json", "profile.json", "stage1.onnx"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "loop"])
def test_what_is_no_file_is_refused_and_nobody_waits_for_it(root: Path, name: str, kind: str) -> None:
    file = root / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(root / "bundle.json" if kind == "link" and name != "bundle.json" else file)
    with pytest.raises(BundleError, match=rf"{re.escape(name)}: is (a symbolic link|not a regular file)"):
        Bundle.load(root)


@pytest.mark.parametrize(
    "path", [os.fsdecode(b"/tm\xffp"), "a\0b", "x" * 5000, "/dev/null"], ids=lambda path: repr(path)[:12]
)
def test_a_path_that_cannot_be_a_folder_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.load(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_by_its_name_or_says_the_same(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["bundle.json", "frontier.json"]))
    file = whole / name
    before, kept = Bundle.load(whole), file.read_bytes()
    at = data.draw(st.integers(0, len(kept) - 1))
    try:
        file.write_bytes(kept[:at] + data.draw(st.binary(max_size=3)) + kept[at + data.draw(st.integers(0, 3)) :])
        with suppress(BundleError):  # and nothing else
            loaded = Bundle.load(whole)
            assert loaded.solved == before.solved
            assert loaded.manifest.stages == before.manifest.stages
    finally:
        file.write_bytes(kept)
