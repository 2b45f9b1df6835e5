"""What every engine promises (`core.Engine`): FakeEngine; and, on three small stages whose state is in fp32 or in half,
ONNX Runtime and the GPU engine, its stages by torch, on a device that is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from server import engines
from server.bundle.manifest import Bundle
from server.core import Engine, Pixels, Slot, StageBatch, StageOutput
from server.engines import load_engine
from server.engines.fake import FakeEngine
from server.engines.gpu import torch_stage
from server.engines.gpu.engine import GpuEngine, batch_sizes
from server.engines.gpu.probe import visible_gpus
from server.engines.onnx import OnnxEngine, largest_batch_that_pays, own_gmacs, sessions_that_pay
from server.errors import BundleError
from server.settings import usable_cores
from tests.server.engines.gpu.fake_cuda import FakeCuda, HostPlace
from tests.server.engines.small_stages import CLASSES, MAPS, SIDE, stage_model, write_bundle

STAY = 2.0  # a threshold that no confidence reaches
LEAVE = 0.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("half"), "float16")


ENGINES = ("fake", "onnx", "gpu")  # modules and rooms of server.engines


@pytest.fixture(params=[*ENGINES, "onnx, state in half", "gpu, state in half"])
def engine(request: pytest.FixtureRequest, bundle: Bundle, half_bundle: Bundle) -> Iterator[Engine]:
    cuda = FakeCuda()
    engine: Engine
    kind, _, half = request.param.partition(", ")
    chosen = half_bundle if half else bundle
    match kind:
        case "fake":
            engine = FakeEngine()
        case "onnx":
            engine = OnnxEngine(chosen)
        case "gpu":
            stages = torch_stage.load(chosen, HostPlace(cuda), [batch_sizes(16)] * 3)
            engine = GpuEngine(chosen, cuda, stages, name="torch-cuda", runtime="torch", executors=2, max_slots=16)
    yield engine
    engine.close()
    assert not cuda.faults
    assert not cuda.leaks


def assert_equal(engine: Engine, found: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit; on a GPU another batch size may add in another order, and state in half may be rounded apart."""
    if engine.name == "torch-cuda":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.fixture
def images() -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), np.uint8))


def first(engine: Engine, images: Sequence[Pixels], threshold: float = STAY) -> StageOutput:
    return engine.run(StageBatch(1, images, [], [threshold] * len(images)))


def then(
    engine: Engine, stage: int, images: Sequence[Pixels], slots: Sequence[Slot | None], threshold: float = STAY
) -> StageOutput:
    return engine.run(StageBatch(stage, images, [s for s in slots if s is not None], [threshold] * len(images)))


@dataclass
class Traces:
    """What the three stages say, each (stages, B, ...)."""

    probabilities: np.ndarray
    confidence: np.ndarray


def all_stages(engine: Engine, images: Sequence[Pixels]) -> Traces:
    said = [first(engine, images)]
    said.append(then(engine, 2, images, said[-1].slots))
    said.append(then(engine, 3, images, said[-1].slots, LEAVE))
    return Traces(np.stack([s.probabilities for s in said]), np.stack([s.confidence for s in said]))


def test_every_engine_is_held_to_it() -> None:
    room = Path(engines.__file__).parent
    modules = {file.stem for file in room.glob("*.py")} | {file.parent.name for file in room.glob("*/engine.py")}
    assert modules - {"__init__", "slots"} == set(ENGINES)


def test_it_describes_itself(engine: Engine):
    assert (engine.num_stages, engine.num_classes, engine.input_size) == (3, CLASSES, (SIDE, SIDE))
    assert len(engine.max_batch_sizes) == 3
    assert min(engine.max_batch_sizes) >= 1


def test_every_stage_gives_one_distribution_and_one_confidence_a_row(engine: Engine, images):
    said = all_stages(engine, images)
    assert said.probabilities.shape == (3, 12, CLASSES)
    assert said.confidence.shape == (3, 12)
    assert said.probabilities.dtype == said.confidence.dtype == np.float32
    np.testing.assert_allclose(said.probabilities.sum(axis=-1), 1, atol=1e-5)


def test_rows_below_their_threshold_keep_state_and_the_others_leave(engine: Engine, images):
    confidence = first(engine, images, LEAVE).confidence
    assert engine.slots_in_use == 0
    thresholds = [float(np.median(confidence))] * 10 + [LEAVE, STAY]
    output = engine.run(StageBatch(1, images, [], thresholds))
    stays = [slot is not None for slot in output.slots]
    assert stays == [float(c) < t for c, t in zip(confidence, thresholds, strict=True)]
    assert engine.slots_in_use == sum(stays) > 0


def test_a_confidence_equal_to_its_threshold_leaves(engine: Engine, images):
    confidence = first(engine, images, LEAVE).confidence
    output = engine.run(StageBatch(1, images, [], confidence.tolist()))
    assert set(output.slots) == {None}


def test_a_later_stage_gives_back_what_it_was_handed(engine: Engine, images):
    slots = first(engine, images).slots
    then(engine, 2, images[:4], slots[:4], LEAVE)
    assert engine.slots_in_use == 8
    later = then(engine, 2, images[4:], slots[4:]).slots
    assert engine.slots_in_use == 8
    assert not set(later) & set(slots), "a slot is never given twice"
    then(engine, 3, images[4:], later, LEAVE)
    assert engine.slots_in_use == 0


def test_no_answer_depends_on_the_batch_it_came_with(engine: Engine, images):
    together = all_stages(engine, images)
    for size in (1, 5):
        parts = [all_stages(engine, images[start : start + size]) for start in range(0, 12, size)]
        assert_equal(engine, np.concatenate([p.probabilities for p in parts], axis=1), together.probabilities)
        assert_equal(engine, np.concatenate([p.confidence for p in parts], axis=1), together.confidence)


def test_survivors_of_several_batches_go_on_in_any_order(engine: Engine, images):
    together = all_stages(engine, images)
    slots = [*first(engine, images[:5]).slots, *first(engine, images[5:]).slots]
    first(engine, images[::-1], LEAVE)  # what ran in between leaves no trace in kept state
    order = np.random.default_rng(1).permutation(12)
    output = then(engine, 2, [images[i] for i in order], [slots[i] for i in order], LEAVE)
    assert_equal(engine, output.probabilities, together.probabilities[1][order])


def test_what_waits_is_not_written_over_by_what_comes_later(engine: Engine, images):
    want = all_stages(engine, images)
    early, waiting, late = images[:4], images[4:8], images[8:]
    said = {name: first(engine, batch) for name, batch in (("early", early), ("waiting", waiting))}
    said["early"] = then(engine, 2, early, said["early"].slots)
    said["late"] = first(engine, late)  # an engine may put it where the early ones were
    said["late"] = then(engine, 2, late[:1], said["late"].slots[:1])
    said["early"] = then(engine, 3, early, said["early"].slots, LEAVE)
    said["waiting"] = then(engine, 3, waiting, then(engine, 2, waiting, said["waiting"].slots).slots, LEAVE)
    said["late"] = then(engine, 3, late[:1], said["late"].slots, LEAVE)
    got = np.concatenate([said[name].probabilities for name in ("early", "waiting", "late")])
    assert_equal(engine, got, want.probabilities[2, :9])


def test_freed_slots_are_gone(engine: Engine, images):
    slots = [slot for slot in first(engine, images).slots if slot is not None]
    engine.free(slots[:3])
    assert engine.slots_in_use == 9
    with pytest.raises(KeyError):
        engine.free([slots[3], slots[0]])
    with pytest.raises(KeyError):
        engine.free([slots[3], slots[3]])
    assert engine.slots_in_use == 9, "a wrong call frees nothing"
    engine.free(slots[3:])
    assert engine.slots_in_use == 0


def test_a_run_that_raises_takes_no_slots_and_keeps_those_it_was_handed(engine: Engine, images):
    slots = first(engine, images[:2]).slots
    engine.free([slots[1]])
    with pytest.raises(KeyError):
        then(engine, 2, images[:2], slots)
    assert engine.slots_in_use == 1
    with pytest.raises(Exception):  # noqa: B017, PT011  how an engine says that pixels and state do not match is its own
        then(engine, 2, images[:2], slots[:1])
    assert engine.slots_in_use == 1
    then(engine, 2, images[:1], slots[:1], LEAVE)
    assert engine.slots_in_use == 0


def test_two_threads_run_at_once(engine: Engine, images):
    together = all_stages(engine, images)
    with ThreadPoolExecutor(2) as threads:
        for said in threads.map(lambda _: all_stages(engine, images), range(40)):
            assert_equal(engine, said.probabilities, together.probabilities)
    assert engine.slots_in_use == 0


def test_warming_up_leaves_nothing_held(engine: Engine):
    engine.warm_up()
    assert engine.slots_in_use == 0


# -- ONNX Runtime only


def test_it_is_what_a_machine_without_a_gpu_gets(bundle: Bundle):
    with closing(load_engine(bundle)) as engine:
        assert isinstance(engine, OnnxEngine if not visible_gpus() else GpuEngine)


def test_batch_sizes_follow_from_the_work_unless_they_are_set(bundle: Bundle):
    assert OnnxEngine(bundle).max_batch_sizes == (2, 2, 2)
    assert OnnxEngine(bundle, max_batch_sizes=(3, 2, 1)).max_batch_sizes == (3, 2, 1)
    assert [largest_batch_that_pays(gmacs) for gmacs in (0.0218, 0.07, 0.15, 0.3, 0.47, 2.0)] == [16, 16, 8, 4, 2, 2]
    assert own_gmacs((1.0, 3.0, 7.0)) == [1.0, 2.0, 4.0]
    with pytest.raises(ValueError, match="batch sizes"):
        OnnxEngine(bundle, max_batch_sizes=(3, 2))


def test_threads_have_sessions_of_their_own_as_long_as_their_weights_are_bounded():
    assert [sessions_that_pay(12_000_000, threads) for threads in (1, 2, 16)] == [1, 2, 16]
    assert [sessions_that_pay(size, 16) for size in (88_000_000, 400_000_000, 2**31, 0)] == [3, 1, 1, 16]


def test_a_cpu_engine_runs_as_many_batches_at_once_as_it_is_told_to(bundle: Bundle):
    assert OnnxEngine(bundle, executors=3).executors == 3
    assert OnnxEngine(bundle).executors == usable_cores()


@pytest.mark.parametrize("executors", [1, 3])
def test_threads_of_a_warm_cpu_engine_answer_as_one_that_is_cold(bundle: Bundle, images, executors: int):
    with closing(OnnxEngine(bundle)) as cold, closing(OnnxEngine(bundle, executors=executors)) as warm:
        warm.warm_up()
        expected = all_stages(cold, images).probabilities
        with ThreadPoolExecutor(4) as threads:
            together = threading.Barrier(4)  # so that all four run, each with its own number

            def answer(_: int) -> list[Any]:
                together.wait()
                return [*all_stages(warm, images).probabilities]

            for said in threads.map(answer, range(4)):
                assert all(np.array_equal(one, other) for one, other in zip(said, expected, strict=True))


def test_no_thread_gets_another_graph_than_the_others(tmp_path: Path):
    bundle = write_bundle(tmp_path)
    with closing(OnnxEngine(bundle, executors=2)) as engine:
        graph = tmp_path / "stage2.onnx"
        content = graph.read_bytes()
        graph.rename(tmp_path / "before.onnx")
        graph.write_bytes(content)
        with pytest.raises(BundleError, match=r"stage2\.onnx: was replaced while the server started"):
            engine.warm_up()
        graph.unlink()
        with pytest.raises(BundleError, match=r"stage2\.onnx: cannot be loaded"):
            engine.warm_up()
        (tmp_path / "before.onnx").rename(graph)
        engine.warm_up()
        graph.unlink()
        engine.warm_up()  # a second time does nothing


def test_a_stage_that_is_not_a_graph_is_named(tmp_path: Path):
    bundle = write_bundle(tmp_path)
    (tmp_path / "stage2.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"stage2\.onnx: cannot be loaded"):
        OnnxEngine(bundle)


def test_a_tensor_of_another_shape_than_the_manifest_says_is_named(tmp_path: Path):
    bundle = write_bundle(tmp_path, relations2=("B", MAPS, 9, 9))
    with pytest.raises(BundleError, match=r"stage2\.onnx: output `relations2` is .* the manifest says"):
        OnnxEngine(bundle)


def test_a_tensor_that_the_graph_lacks_is_named(tmp_path: Path):
    bundle = write_bundle(tmp_path)
    model = stage_model(3)
    del model.graph.output[0]
    onnx.save(model, tmp_path / "stage3.onnx")
    with pytest.raises(BundleError, match=r"stage3\.onnx: has no output `logits`"):
        OnnxEngine(bundle)
    onnx.save(stage_model(3), tmp_path / "stage2.onnx")
    with pytest.raises(BundleError, match=r"stage2\.onnx: has no input `features1`"):
        OnnxEngine(bundle)


def test_a_graph_of_one_batch_size_is_refused(tmp_path: Path):
    bundle = write_bundle(tmp_path)
    model = stage_model(1)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "stage1.onnx")
    with pytest.raises(BundleError, match=r"stage1\.onnx: input `image`"):
        OnnxEngine(bundle)


def test_a_tensor_of_another_type_than_the_manifest_says_is_named(tmp_path: Path):
    bundle = write_bundle(tmp_path)
    onnx.save(stage_model(1, TensorProto.FLOAT16), tmp_path / "stage1.onnx")
    with pytest.raises(BundleError, match=r"stage1\.onnx: output `\w+1` is tensor\(float16\) .*says float32"):
        OnnxEngine(bundle)


def test_a_bundle_in_bf16_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(BundleError, match=r"is in bf16, which ONNX Runtime does not run on CPUs; .*--precision fp32$"):
        OnnxEngine(write_bundle(tmp_path, "bfloat16"))
