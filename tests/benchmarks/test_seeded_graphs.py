"""A bundle travels without its weights, and is one again where it arrives."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import seeded_graphs
from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.engines.onnx import OnnxEngine, open_session

SIDE, HIDDEN = 8, 96


@pytest.fixture
def whole(tmp_path: Path) -> Bundle:
    """Two stages of one product each: a big matrix of weights, a small bias, and a big matrix that is mostly zeros."""
    root = tmp_path / "whole"
    root.mkdir()
    rng = np.random.default_rng(0)
    weights = (0.02 * rng.standard_normal((3 * SIDE * SIDE, HIDDEN)) + 0.5).astype(np.float32)
    sparse = np.eye(HIDDEN, dtype=np.float32)
    for number in (1, 2):
        nodes = [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "sparse"], ["same"]),
            helper.make_node("Add", ["same", "bias"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
            helper.make_node("ReduceMax", ["probabilities", "last"], ["confidence"], keepdims=0),
        ]
        constants = {
            "weights": weights,
            "sparse": sparse,
            "bias": np.full(HIDDEN, number, np.float32),
            "last": np.array([-1]),
        }
        graph = helper.make_graph(
            nodes,
            f"stage{number}",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", SIDE, SIDE, 3])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in (("logits", ["B", HIDDEN]), ("probabilities", ["B", HIDDEN]), ("confidence", ["B"]))
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.save(model, root / f"stage{number}.onnx")
    outputs = {name: TensorSpec(dtype="float32", shape=("B", HIDDEN)) for name in ("logits", "probabilities")}
    stages = [
        StageSpec.of(
            root,
            f"stage{number}.onnx",
            inputs={"image": TensorSpec(dtype="uint8", shape=("B", SIDE, SIDE, 3))},
            outputs={**outputs, "confidence": TensorSpec(dtype="float32", shape=("B",))},
            grid=(1, 1),
            gmacs=number,
        )
        for number in (1, 2)
    ]
    labels = [str(n) for n in range(HIDDEN)]
    write_manifest(root, name="two", labels=labels, preprocessing=Preprocessing(SIDE, (SIDE, SIDE)), stages=stages)
    return Bundle.load(root, need_frontier=False)


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}


def test_big_weights_become_others_of_their_kind_and_the_rest_stays(whole: Bundle, tmp_path: Path) -> None:
    size = seeded_graphs.strip(whole, tmp_path / "small")
    assert size < whole.stage_path(1).stat().st_size / 10
    filled = seeded_graphs.fill(tmp_path / "small", tmp_path / "again")
    before, after = tensors(whole.stage_path(1)), tensors(filled.stage_path(1))
    assert before.keys() == after.keys()
    assert not np.array_equal(before["weights"], after["weights"])
    assert after["weights"].mean() == pytest.approx(0.5, abs=0.001)
    assert after["weights"].std() == pytest.approx(0.02, rel=0.05)
    assert after["weights"].dtype == np.float32
    for name in ("sparse", "bias", "last"):
        assert np.array_equal(before[name], after[name])


def test_what_was_filled_is_a_bundle_that_runs(whole: Bundle, tmp_path: Path) -> None:
    seeded_graphs.strip(whole, tmp_path / "small")
    seeded_graphs.fill(tmp_path / "small", tmp_path / "again")
    bundle = Bundle.load(tmp_path / "again", need_frontier=False)
    assert bundle.manifest.stage_gmacs == whole.manifest.stage_gmacs
    engine = OnnxEngine(bundle)
    engine.warm_up()
    engine.close()


def test_the_same_recipe_gives_the_same_bundle(whole: Bundle, tmp_path: Path) -> None:
    seeded_graphs.strip(whole, tmp_path / "small")
    versions = {seeded_graphs.fill(tmp_path / "small", tmp_path / name).manifest.version for name in ("one", "two")}
    assert len(versions) == 1
    assert versions != {whole.manifest.version}
    stages = tensors(tmp_path / "one" / "stage1.onnx"), tensors(tmp_path / "one" / "stage2.onnx")
    assert not np.array_equal(stages[0]["weights"], stages[1]["weights"]), "each tensor has a seed of its own"


def test_a_stripped_graph_is_refused_by_who_does_not_know_recipes(whole: Bundle, tmp_path: Path) -> None:
    seeded_graphs.strip(whole, tmp_path / "small")

    stripped = tmp_path / "stripped.onnx"
    stripped.write_bytes(gzip.decompress((tmp_path / "small" / "stage1.onnx.gz").read_bytes()))
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        open_session(stripped)


def test_commands(whole: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seeded_graphs.main(["strip", str(whole.path), str(tmp_path / "small")]) == 0
    assert seeded_graphs.main(["fill", str(tmp_path / "small"), str(tmp_path / "again")]) == 0
    assert "two fp32, 1.0000, 2.0000 GMAC" in capsys.readouterr().out
