"""Which engine runs a bundle: the best that is there, the one that is named, or one line that says what is missing."""

from __future__ import annotations

import ctypes.util
from contextlib import closing
from pathlib import Path

import pytest

from server.bundle.manifest import Bundle
from server.engines import load_engine
from server.engines.gpu.load import NAMES
from server.engines.gpu.probe import visible_gpus
from server.engines.onnx import OnnxEngine
from server.engines.tensorrt.bundles import check_precision
from server.errors import BundleError, EngineUnavailable
from server.settings import ENGINES
from tests.server.engines.small_stages import write_bundle

without_gpu = pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path)


def test_the_settings_know_the_engines_that_there_are() -> None:
    assert set(ENGINES) == {"auto", "onnx", *NAMES}


def test_a_machine_without_a_driver_has_no_gpu() -> None:
    assert visible_gpus("libthere-is-no-such-thing.so.1") == 0
    other = ctypes.util.find_library("m")
    assert other is not None
    assert visible_gpus(other) == 0, "a library, but no driver"


@without_gpu
def test_without_a_gpu_the_best_is_the_cpu(bundle: Bundle) -> None:
    with closing(load_engine(bundle, executors=3, max_slots=5)) as engine:
        assert isinstance(engine, OnnxEngine)
        assert (engine.name, engine.max_slots) == ("onnx", None)


def test_the_cpu_can_be_asked_for(bundle: Bundle) -> None:
    with closing(load_engine(bundle, engine="onnx")) as engine:
        assert isinstance(engine, OnnxEngine)


@without_gpu
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_needs_a_gpu_says_so(bundle: Bundle, name: str) -> None:
    with pytest.raises(EngineUnavailable, match=f"{name} needs an NVIDIA GPU, and none is here; ask for --engine onnx"):
        load_engine(bundle, engine=name)


def test_an_engine_that_nobody_knows_is_an_error_that_names_the_others(bundle: Bundle) -> None:
    with pytest.raises(EngineUnavailable, match="no engine abacus; there are onnx, tensorrt, torch-cuda, onnx-cuda"):
        load_engine(bundle, engine="abacus")


@pytest.fixture
def int8(bundle: Bundle) -> Bundle:
    manifest = bundle.path / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision": "int8"'))
    return Bundle.load(bundle.path, need_frontier=False)


@pytest.mark.parametrize("engine", ["auto", "onnx"])
def test_integers_run_on_the_cpu_also_where_there_is_a_gpu(int8: Bundle, engine: str) -> None:
    with closing(load_engine(int8, engine=engine)) as loaded:
        assert isinstance(loaded, OnnxEngine)


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_refused_on_a_gpu_in_one_line_that_says_what_to_do(int8: Bundle, name: str) -> None:
    line = f"is in int8, which is for CPUs, and {name} does not run it; ask for --engine onnx, or export it with "
    with pytest.raises(BundleError, match=line) as refused:
        load_engine(int8, engine=name)
    assert "\n" not in str(refused.value)


def test_no_plans_are_made_of_integers(int8: Bundle) -> None:
    with pytest.raises(BundleError, match="TensorRT runs half precision, and this bundle is int8; export one for it"):
        check_precision(int8)


@without_gpu
def test_half_precision_does_not_run_on_a_cpu_unless_that_is_asked_for(bundle: Bundle) -> None:
    manifest = bundle.path / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision": "fp16"'))
    half = Bundle.load(bundle.path, need_frontier=False)
    with pytest.raises(EngineUnavailable, match=r"is in fp16, .*--precision fp32, or ask for --engine onnx"):
        load_engine(half)
    load_engine(half, engine="onnx").close()
