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
from server.errors import EngineUnavailable
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


@without_gpu
def test_half_precision_does_not_run_on_a_cpu_unless_that_is_asked_for(bundle: Bundle) -> None:
    manifest = bundle.path / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision": "fp16"'))
    half = Bundle.load(bundle.path, need_frontier=False)
    with pytest.raises(EngineUnavailable, match=r"is in fp16, .*--precision fp32, or ask for --engine onnx"):
        load_engine(half)
    load_engine(half, engine="onnx").close()
