"""A stage of TensorRT makes only moves that TensorRT allows; the fake judges them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bundle.manifest import TensorSpec
from server.engines.tensorrt.network import Built, build_plan, logger_of
from server.engines.tensorrt.stage import TensorRTContext, TensorRTFailed, TensorRTStage
from server.errors import BundleError
from tests.server.engines.tensorrt.fake_tensorrt import MAGIC, FakeTensorRT, graph
from tests.server.engines.tensorrt.tiny_bundle import H100, tensors

SIZES = (1, 2, 8)
STREAM = 77
FILE = Path("stage2.plan")


def specs(side: int) -> dict[str, TensorSpec]:
    named = tensors(2)[side].items()
    return {name: TensorSpec(dtype=d, shape=tuple(shape)) for name, (d, *shape) in named if name != "logits"}


INPUTS, OUTPUTS = specs(0), specs(1)
ADDRESSES = {name: 4096 * number for number, name in enumerate([*INPUTS, *OUTPUTS], start=1)}


def build(trt: FakeTensorRT) -> Built:
    return build_plan(
        trt,
        graph(*tensors(2)),
        gpu=H100,
        inputs=INPUTS,
        outputs=OUTPUTS,
        batch_sizes=SIZES,
        optimization_level=3,
        workspace_bytes=None,
    )


def load(trt: FakeTensorRT, plan: bytes) -> TensorRTStage:
    runtime = trt.Runtime(logger_of(trt))
    return TensorRTStage(trt, runtime, FILE, plan, inputs=INPUTS, outputs=OUTPUTS, batch_sizes=SIZES)


@pytest.fixture
def stage(trt: FakeTensorRT) -> TensorRTStage:
    return load(trt, build(trt).plan)


def context(stage: TensorRTStage, size: int = 2, arena: int = 2**20, stream: int = STREAM) -> TensorRTContext:
    return stage.context(size, ADDRESSES, arena, stream)


def test_a_context_of_each_size_runs_on_its_stream(trt: FakeTensorRT, stage: TensorRTStage) -> None:
    contexts = [context(stage, size, stream=STREAM + size) for size in SIZES]
    for one in contexts * 2:
        one.enqueue()
    assert trt.runs == [(size, STREAM + size) for size in SIZES] * 2


def test_contexts_of_one_size_may_run_on_several_streams(trt: FakeTensorRT, stage: TensorRTStage) -> None:
    for stream in (1, 2, 3):
        context(stage, 8, stream=stream).enqueue()
    assert trt.runs == [(8, 1), (8, 2), (8, 3)]


def test_a_context_has_its_profile_its_addresses_and_the_memory_that_was_given(
    trt: FakeTensorRT, stage: TensorRTStage
) -> None:
    context(stage, 8, arena=512 * 256)
    (made,) = trt.contexts
    assert made.profile == SIZES.index(8)
    assert made.addresses == ADDRESSES
    assert made.memory == (512 * 256, stage.arena_bytes(8))


def test_each_size_wants_memory_of_its_own_measure(stage: TensorRTStage) -> None:
    assert [stage.arena_bytes(size) for size in SIZES] == [1000, 2000, 8000]
    with pytest.raises(ValueError, match="not in tuple"):
        stage.arena_bytes(3)


def test_a_stage_that_wants_no_memory_is_given_none() -> None:
    trt = FakeTensorRT(arena=0)
    stage = load(trt, build(trt).plan)
    context(stage, arena=0).enqueue()
    assert trt.contexts[0].memory is None


@pytest.mark.parametrize("name", list(ADDRESSES))
def test_every_tensor_needs_an_address(stage: TensorRTStage, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        stage.context(2, {n: a for n, a in ADDRESSES.items() if n != name}, 2**20, STREAM)


def test_a_tensor_that_the_stage_does_not_have_is_refused(stage: TensorRTStage) -> None:
    with pytest.raises(ValueError, match="logits"):
        stage.context(2, {**ADDRESSES, "logits": 2**20}, 2**20, STREAM)


@pytest.mark.parametrize("address", [0, -256, 4096 + 128])
@pytest.mark.parametrize("where", ["image", "arena"])
def test_what_can_be_no_address_is_refused(stage: TensorRTStage, where: str, address: int) -> None:
    arena = address if where == "arena" else 2**20
    addresses = {**ADDRESSES, "image": address} if where == "image" else ADDRESSES
    with pytest.raises(ValueError, match=f"not a multiple of 256: .'{where}'"):
        stage.context(2, addresses, arena, STREAM)


def test_the_default_stream_is_refused(stage: TensorRTStage) -> None:
    with pytest.raises(ValueError, match="default stream"):
        context(stage, stream=0)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("create_execution_context", "no context for a batch of 2: out of memory"),
        ("set_optimization_profile_async", "refuses a batch of 2: profile refused"),
        ("set_tensor_address", "refuses a batch of 2: no tensor image"),
    ],
)
def test_what_tensorrt_refuses_is_told_with_its_reason(
    trt: FakeTensorRT, stage: TensorRTStage, call: str, why: str
) -> None:
    trt.refuse.add(call)
    with pytest.raises(TensorRTFailed, match=why):
        context(stage)


def test_an_enqueue_that_fails_says_why_in_one_line(trt: FakeTensorRT, stage: TensorRTStage) -> None:
    one = context(stage)
    trt.refuse.add("execute_async_v3")
    with pytest.raises(TensorRTFailed, match="not enqueued: CUDA error 700: an illegal memory access") as caught:
        one.enqueue()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("plan", [b"", b"junk", MAGIC[:5]], ids=["empty", "junk", "cut"])
def test_what_is_no_plan_is_refused_by_name(trt: FakeTensorRT, plan: bytes) -> None:
    with pytest.raises(BundleError, match=r"stage2\.plan: TensorRT does not take it: Magic tag"):
        load(trt, plan)


@pytest.mark.parametrize(
    ("other", "what"), [(FakeTensorRT("10.16.1.11"), "version"), (FakeTensorRT(gpu="sm80"), "gpu")]
)
def test_a_plan_of_another_version_or_gpu_is_refused(trt: FakeTensorRT, other: FakeTensorRT, what: str) -> None:
    with pytest.raises(BundleError, match=f"does not take it: The engine plan file is of another {what}"):
        load(trt, build(other).plan)


def changed(plan: bytes, **parts: object) -> bytes:
    return MAGIC + json.dumps({**json.loads(plan[len(MAGIC) :]), **parts}).encode()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"inputs": {"image": [2, -1, 8, 8, 3]}}, r"inputs are not those of the stage: \['features_1'\]"),
        ({"outputs": {"confidence": [0, -1], "probabilities": [0, -1, 3]}}, r"outputs are not those .*'features_2'"),
        (
            {"inputs": {"image": [2, -1, 9, 8, 3], "features_1": [1, -1, 4]}},
            r"input `image` is DataType.UINT8 \[-1, 9, 8, 3\], the manifest says uint8 \['B', 8, 8, 3\]",
        ),
        ({"inputs": {"image": [2, -1, 8, 8, 3], "features_1": [0, -1, 4]}}, "the manifest says float16"),
        ({"profiles": []}, "has 0 profiles for 3 batch sizes"),
        (
            {"profiles": [{"image": [[n, 8, 8, 3]] * 3, "features_1": [[n, 4]] * 3} for n in (1, 2, 4)]},
            "profile 2 is not for batches of 8",
        ),
    ],
)
def test_an_engine_that_is_not_the_stages_is_refused(trt: FakeTensorRT, parts: dict[str, object], says: str) -> None:
    with pytest.raises(BundleError, match=rf"stage2\.plan: .*{says}"):
        load(trt, changed(build(trt).plan, **parts))


def test_tensorrt_may_always_be_recorded_and_rtx_says_when(trt: FakeTensorRT, stage: TensorRTStage) -> None:
    one = context(stage)
    assert one.capturable
    asked: list[int] = []
    trt.contexts[0].is_stream_capturable = lambda stream: bool(asked.append(stream))  # type: ignore[attr-defined]
    assert not one.capturable
    assert asked == [STREAM]


def test_what_was_closed_does_not_run(stage: TensorRTStage) -> None:
    one = context(stage)
    one.close()
    with pytest.raises(TensorRTFailed, match="context was closed"):
        one.enqueue()
    stage.close()
    with pytest.raises(TensorRTFailed, match="stage was closed"):
        stage.arena_bytes(1)
    one.close()
    stage.close()
