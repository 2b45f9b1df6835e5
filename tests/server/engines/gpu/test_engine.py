"""The GPU engine: what it answers, what it keeps, and what becomes of both when the device fails."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bundle.manifest import Bundle, TensorSpec
from server.cascade.batcher import Batcher
from server.cascade.scheduler import Scheduler
from server.core import EngineLost, ImageResult, OperatingPoint, Pixels, Slot, StageBatch
from server.engines.gpu import torch_stage
from server.engines.gpu.device import DeviceError, OutOfDeviceMemory
from server.engines.gpu.engine import GpuEngine, batch_sizes, row_bytes
from server.engines.gpu.pool import SlotsExhausted
from server.engines.gpu.stage import Context, Stage
from server.errors import BundleError, EngineFailed
from tests.server.engines.gpu.conftest import Rig
from tests.server.engines.gpu.fake_cuda import FakeCuda, HostPlace
from tests.server.engines.gpu.runs import LEAVE, STAY, all_stages, images, run

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")


def engine_on(cuda: FakeCuda, bundle: Bundle, largest: int = 8, **options: object) -> GpuEngine:
    stages = torch_stage.load(bundle, HostPlace(cuda), [batch_sizes(largest)] * 3)
    return GpuEngine(bundle, cuda, stages, name="torch-cuda", runtime="torch", **options)  # type: ignore[arg-type]


# -- what it answers


def test_batches_of_all_sizes_are_answered_as_by_the_engine_on_the_cpu(rig: Rig, photo10: Bundle) -> None:
    from server.engines.onnx import OnnxEngine

    engine, other = rig.engine(photo10, largest=4), OnnxEngine(photo10)
    for size in (1, 2, 3, 4, 5, 9):  # the largest program is for 4: the last two run in parts
        pixels = images(photo10, size, seed=size)
        ours, theirs = all_stages(engine, pixels), all_stages(other, pixels)
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=rig.within)
        np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=rig.within)
    other.close()


@pytest.mark.parametrize("max_slots", [1, 256])
def test_a_stream_of_images_is_answered_as_by_the_engine_on_the_cpu(rig: Rig, photo10: Bundle, max_slots: int) -> None:
    from server.engines.onnx import OnnxEngine
    from server.offline.cascade import Cascade

    streamed = []
    for engine in (rig.engine(photo10, largest=4, max_slots=max_slots), OnnxEngine(photo10)):
        with Cascade(photo10, engine, {"thresholds": [0.5, 0.4]}) as cascade:
            streamed.append([answer for _, answer in cascade.classify(enumerate(images(photo10, 24)))])
    for ours, theirs in zip(*streamed, strict=True):
        assert isinstance(ours, ImageResult)
        assert isinstance(theirs, ImageResult)
        assert ours.exit == theirs.exit
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=rig.within)


def test_a_recorded_program_answers_as_the_first_plain_run(rig: Rig, photo10: Bundle) -> None:
    engine = rig.engine(photo10, largest=4)
    pixels = images(photo10, 4)
    first = all_stages(engine, pixels)
    for _ in range(3):
        np.testing.assert_allclose(all_stages(engine, pixels).probabilities, first.probabilities, atol=rig.within)
        all_stages(engine, images(photo10, 3, seed=9))


def test_rows_are_judged_in_double_by_their_own_thresholds(rig: Rig, small: Bundle) -> None:
    engine, pixels = rig.engine(small), images(small, 5)
    confidence = run(engine, 1, pixels, threshold=LEAVE).confidence
    as_double = [float(one) for one in confidence]
    assert set(engine.run(StageBatch(1, pixels, [], as_double)).slots) == {None}
    just_above = [float(np.nextafter(one, 2.0)) for one in as_double]  # equal to it as float32
    output = engine.run(StageBatch(1, pixels, [], [*just_above[:3], *as_double[3:]]))
    assert [slot is not None for slot in output.slots] == [True] * 3 + [False] * 2
    engine.free([slot for slot in output.slots if slot is not None])


def test_nobody_survives_the_last_stage(rig: Rig, small: Bundle) -> None:
    engine, pixels = rig.engine(small), images(small, 3)
    slots = run(engine, 2, pixels, run(engine, 1, pixels).slots).slots
    assert run(engine, 3, pixels, slots, STAY).slots == [None] * 3


def test_survivors_of_several_batches_share_one(rig: Rig, photo10: Bundle) -> None:
    engine, pixels = rig.engine(photo10), images(photo10, 12)
    alone = all_stages(engine, pixels)
    slots = [*run(engine, 1, pixels[:5]).slots, *run(engine, 1, pixels[5:]).slots]
    all_stages(engine, images(photo10, 8, seed=3))  # what runs in between leaves no trace
    order = np.random.default_rng(1).permutation(12)
    output = run(engine, 2, [pixels[i] for i in order], [slots[i] for i in order], LEAVE)
    np.testing.assert_allclose(output.probabilities, alone.probabilities[1][order], atol=rig.within)


def test_a_whole_batcher_answers_many_requests_right(rig: Rig, photo10: Bundle) -> None:
    engine, pixels = rig.engine(photo10), images(photo10, 24)
    alone = all_stages(engine, pixels)
    point = OperatingPoint(
        1, (float(np.quantile(alone.confidence[0], 0.7)), float(np.median(alone.confidence[1])), 0.0)
    )
    answered = asyncio.run(_classified(engine, point, pixels))
    exits = [_exit(alone.confidence[:, at], point.thresholds) for at in range(24)]
    assert len(set(exits)) == 3
    for at, result in enumerate(answered):
        assert result.exit == exits[at]
        np.testing.assert_allclose(result.probabilities, alone.probabilities[result.exit - 1, at], atol=rig.within)


async def _classified(engine: GpuEngine, point: OperatingPoint, pixels: list[Pixels]) -> list[ImageResult]:
    scheduler = Scheduler(
        point,
        max_batch_sizes=engine.max_batch_sizes,
        max_queued_images=64,
        max_slots=engine.max_slots or 1,
        executors=2,
    )
    batcher = Batcher(engine, scheduler, _Silent(), executors=2)
    await batcher.start()
    deadline = asyncio.get_running_loop().time() + 300
    try:
        requests = [batcher.submit(pixels[at : at + 3], deadline=deadline) for at in range(0, len(pixels), 3)]
        return [result for answer in await asyncio.gather(*requests) for result in answer.results]
    finally:
        await batcher.close()


def _exit(confidence: np.ndarray, thresholds: tuple[float, ...]) -> int:
    return next(at for at, (c, t) in enumerate(zip(confidence, thresholds, strict=True), start=1) if not float(c) < t)


class _Silent:
    def batch_finished(self, *_: object) -> None: ...

    def image_finished(self, *_: object) -> None: ...

    def image_abandoned(self, *_: object) -> None: ...


# -- how it runs


def test_the_smallest_size_that_holds_a_batch_runs_it() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(8) == (1, 2, 4, 8)
    assert batch_sizes(48) == (1, 2, 4, 8, 16, 32, 48)


def test_after_the_warm_up_everything_is_one_graph(cuda: FakeCuda, small: Bundle) -> None:
    engine = engine_on(cuda, small, executors=2)
    engine.warm_up()
    cuda.launches.clear()
    for size in (1, 3, 8):
        all_stages(engine, images(small, size))
    assert cuda.launches == ["graph"] * 9
    engine.close()


def test_what_cannot_be_recorded_runs_call_by_call(
    cuda: FakeCuda, small: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_on(cuda, small, largest=2)
    pixels = images(small, 2)
    recorded = all_stages(engine, pixels)
    engine.close()
    again = FakeCuda()
    again.refuse_capture = True
    plain = engine_on(again, small, largest=2)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(all_stages(plain, pixels).probabilities, recorded.probabilities)
    assert "cannot be recorded: told to refuse" in caplog.text
    again.launches.clear()
    all_stages(plain, pixels)
    assert again.launches == ["plain"] * 3
    plain.close()
    assert not again.faults
    assert not again.leaks


def test_a_context_that_says_so_is_never_recorded(cuda: FakeCuda, small: Bundle) -> None:
    stages = [_Unrecorded(stage) for stage in torch_stage.load(small, HostPlace(cuda), [(1, 2)] * 3)]
    engine = GpuEngine(small, cuda, stages, name="onnx-cuda", runtime="none")
    engine.warm_up()
    all_stages(engine, images(small, 2))
    assert set(cuda.launches) == {"plain"}
    engine.close()


class _Unrecorded:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.inputs, self.outputs, self.batch_sizes = stage.inputs, stage.outputs, stage.batch_sizes

    def arena_bytes(self, batch_size: int) -> int:
        return self._stage.arena_bytes(batch_size)

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> Context:
        context = self._stage.context(batch_size, addresses, arena, stream)
        context.capturable = False  # type: ignore[misc]
        return context

    def close(self) -> None:
        self._stage.close()


def test_a_stage_has_the_largest_arena_that_one_of_its_lane_wants_and_shares_it_with_no_other(
    cuda: FakeCuda, small: Bundle
) -> None:
    stages = [_WithArena(cuda, stage) for stage in torch_stage.load(small, HostPlace(cuda), [(1, 4)] * 3)]
    engine = GpuEngine(small, cuda, stages, name="none", runtime="none", executors=2)
    pixels = images(small, 4)
    together = all_stages(engine, pixels)
    with ThreadPoolExecutor(2) as threads:
        for said in threads.map(lambda _: all_stages(engine, pixels), range(20)):
            np.testing.assert_array_equal(said.probabilities, together.probabilities)
    engine.close()


class _WithArena(_Unrecorded):
    """Uses the arena that it was given; the device finds fault with two streams in one."""

    def __init__(self, cuda: FakeCuda, stage: Stage) -> None:
        super().__init__(stage)
        self._cuda = cuda

    def arena_bytes(self, batch_size: int) -> int:
        return 1000 * batch_size

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> Context:
        context = self._stage.context(batch_size, addresses, arena, stream)
        span, plain = (arena, 1000 * batch_size), context.enqueue

        def enqueue() -> None:
            self._cuda.compute(stream, lambda: None, writes=[span])
            plain()

        context.enqueue = enqueue  # type: ignore[method-assign]
        return context


def test_two_threads_run_at_once(rig: Rig, photo10: Bundle) -> None:
    engine, pixels = rig.engine(photo10, largest=4), images(photo10, 4)
    engine.warm_up()
    together = all_stages(engine, pixels)
    with ThreadPoolExecutor(4) as threads:  # two more than there are lanes: they wait
        for said in threads.map(lambda _: all_stages(engine, pixels), range(8)):
            np.testing.assert_allclose(said.probabilities, together.probabilities, atol=rig.within)


def test_programs_that_are_first_used_by_several_threads_are_right(rig: Rig, small: Bundle) -> None:
    engine = rig.engine(small)  # cold
    pixels = images(small, 8)
    gate = threading.Barrier(2)

    def cold(size: int) -> np.ndarray:
        gate.wait()
        return all_stages(engine, pixels[:size]).probabilities

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(cold, (3, 8))
    np.testing.assert_allclose(first, second[:, :3], atol=rig.within)


def test_it_says_what_it_is(rig: Rig, small: Bundle) -> None:
    engine = rig.engine(small, executors=3, max_slots=20)
    assert (engine.name, engine.executors, engine.max_slots) == ("torch-cuda", 3, 20 + 3 * 8)
    assert engine.max_batch_sizes == (8, 8, 8)
    assert engine.device == rig.device.name


# -- what it keeps


def test_no_more_states_than_it_has_rows_for(rig: Rig, small: Bundle) -> None:
    engine = rig.engine(small, largest=4, executors=1, max_slots=4)
    assert engine.max_slots == 8
    slots = [slot for _ in range(2) for slot in run(engine, 1, images(small, 4)).slots if slot is not None]
    with pytest.raises(SlotsExhausted):
        run(engine, 1, images(small, 1))
    assert engine.slots_in_use == 8
    run(engine, 2, images(small, 4), slots[:4], LEAVE)
    deeper = run(engine, 2, images(small, 4), slots[4:]).slots  # another boundary has rows of its own
    engine.free([slot for slot in deeper if slot is not None])
    run(engine, 1, images(small, 4), threshold=LEAVE)


def test_a_device_with_little_memory_holds_fewer_states(small: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    fixed, row = _without_states(small)
    cuda = FakeCuda(memory=fixed + 2 * 4 * row)
    with caplog.at_level(logging.WARNING):
        engine = engine_on(cuda, small, largest=2, max_slots=1000)
    assert engine.max_slots == 3, "half of what is free, and one row of it stays blank"
    assert engine.max_batch_sizes == (1, 1, 1), "in both lanes at once"
    assert "of 3 images at once, not of 1004" in caplog.text
    engine.close()
    assert not cuda.faults


def test_a_device_without_room_for_one_state_is_refused(small: Bundle) -> None:
    fixed, row = _without_states(small)
    for memory in (0, fixed - 1, fixed, fixed + 2 * 2 * row):
        cuda = FakeCuda(memory=memory)
        with pytest.raises(OutOfDeviceMemory):
            engine_on(cuda, small, largest=2)
        assert not cuda.leaks
        assert cuda.closed


def _without_states(bundle: Bundle) -> tuple[int, int]:
    """Bytes that an engine with batches of two takes without its states, and those of a state at every boundary."""
    states = [spec for stage in bundle.manifest.stages[1:] for name, spec in stage.inputs.items() if name != "image"]
    row = sum(map(row_bytes, states))
    cuda = FakeCuda()
    engine = engine_on(cuda, bundle, largest=2, max_slots=1)
    taken = (1 << 30) - cuda.free_memory()
    engine.close()
    return taken - (1 + 4 + 1) * row, row


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_order_of_batches_mixes_images_up(small: Bundle, data: st.DataObject) -> None:
    """Any batches, their survivors mixed, dropped, or failing: what an image is told is what it is told alone."""
    cuda = FakeCuda()
    stages = torch_stage.load(small, HostPlace(cuda), [(2, 4)] * 3)
    engine = GpuEngine(small, cuda, stages, name="torch-cuda", runtime="torch", executors=2, max_slots=8)
    pixels = images(small, 6)
    alone = all_stages(engine, pixels)
    waiting: list[list[tuple[Slot, int]]] = [[], [], []]  # at stages 2 and 3; the third stays empty
    for _ in range(data.draw(st.integers(1, 12))):
        stage = data.draw(st.sampled_from([1, 1, 2, 3]))
        room = engine.max_slots - engine.slots_in_use if stage == 1 else len(waiting[stage - 2])
        size = data.draw(st.integers(0, min(5, room)))
        if not size:
            continue
        if stage == 1:
            taken = [(None, data.draw(st.integers(0, 5))) for _ in range(size)]
        else:
            here = data.draw(st.permutations(waiting[stage - 2]))
            taken, waiting[stage - 2] = here[:size], here[size:]
        stays = [stage < 3 and data.draw(st.booleans()) for _ in taken]
        fails = data.draw(st.booleans()) and data.draw(st.booleans())
        cuda.break_next = int(fails)
        slots = [slot for slot, _ in taken if slot is not None]
        batch = StageBatch(stage, [pixels[at] for _, at in taken], slots, [STAY if stay else LEAVE for stay in stays])
        if fails:
            with pytest.raises(DeviceError, match="told to break"):
                engine.run(batch)
            engine.free(slots)
            cuda.break_next = 0
        else:
            output = engine.run(batch)
            for row, (_, at) in enumerate(taken):
                np.testing.assert_allclose(output.probabilities[row], alone.probabilities[stage - 1, at], atol=1e-5)
            assert [slot is not None for slot in output.slots] == stays
            for slot, (_, at) in zip(output.slots, taken, strict=True):
                if slot is not None:
                    waiting[stage - 1].append((slot, at))
        gone = data.draw(st.integers(0, 1)) if waiting[0] else 0
        engine.free([waiting[0].pop()[0] for _ in range(gone)])
        assert engine.slots_in_use == sum(map(len, waiting))
        _poison(cuda, engine)
    engine.free([slot for held in waiting for slot, _ in held])
    assert engine.slots_in_use == 0
    engine.close()
    assert not cuda.faults
    assert not cuda.leaks


def _poison(cuda: FakeCuda, engine: GpuEngine) -> None:
    """Rows that nobody holds are no numbers from now on: who reads one after it was freed says so."""
    for store, free in zip(engine._stores, engine._pool._free, strict=True):
        for name, address in store.addresses.items():
            row = next(plan.leaves[name] for plan in engine._plans if name in plan.leaves)
            for at in free:
                cuda.memory(address + at * row, row)[:] = 0xFF


# -- when the device fails


def test_a_batch_that_fails_fails_alone(cuda: FakeCuda, small: Bundle) -> None:
    engine, pixels = engine_on(cuda, small), images(small, 6)
    expected = all_stages(engine, pixels)
    slots = run(engine, 1, pixels).slots
    cuda.break_next = 1
    with pytest.raises(DeviceError, match="told to break"):
        run(engine, 2, pixels, slots)
    assert engine.slots_in_use == 6, "the caller frees them"
    output = run(engine, 2, pixels, slots, LEAVE)
    np.testing.assert_array_equal(output.probabilities, expected.probabilities[1])
    assert engine.slots_in_use == 0
    engine.close()


def test_bad_batches_are_refused_before_anything_is_launched(cuda: FakeCuda, small: Bundle) -> None:
    engine, pixels = engine_on(cuda, small), images(small, 2)
    engine.warm_up()
    cuda.launches.clear()
    slots = [slot for slot in run(engine, 1, pixels).slots if slot is not None]
    for batch in (
        StageBatch(1, [], [], []),
        StageBatch(1, pixels, [], [LEAVE]),
        StageBatch(1, pixels, slots, [LEAVE] * 2),
        StageBatch(2, pixels, slots[:1], [LEAVE] * 2),
        StageBatch(1, [np.zeros((3, 3, 3), np.uint8)], [], [LEAVE]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            engine.run(batch)
    for slots_of_others in ([slots[0], slots[0]], [slots[0], Slot(99)]):
        with pytest.raises(KeyError):
            run(engine, 2, pixels, slots_of_others)
    with pytest.raises(KeyError):
        run(engine, 3, pixels, slots)
    assert engine.slots_in_use == 2
    assert cuda.launches == ["graph"]
    engine.free(slots)
    engine.close()


def test_a_lost_device_is_said_to_be_lost_and_is_left_alone(cuda: FakeCuda, small: Bundle) -> None:
    engine, pixels = engine_on(cuda, small), images(small, 2)
    slots = run(engine, 1, pixels).slots
    cuda.lost = True
    with pytest.raises(EngineLost):
        run(engine, 2, pixels, slots)
    cuda.lost = False  # it does not come back, whatever it says
    with pytest.raises(EngineLost):
        run(engine, 1, pixels)
    assert engine.slots_in_use == 2
    engine.free([slot for slot in slots if slot is not None])
    cuda.lost = True
    engine.close()
    cuda.lost = False
    for parts in (cuda._blocks, cuda._pinned, cuda._pending, cuda._events, cuda._graphs):
        parts.clear()  # what it did not take back is gone with the process


def test_when_the_device_is_lost_everybody_is_answered_and_the_process_is_told_to_end(
    cuda: FakeCuda, small: Bundle
) -> None:
    async def lose() -> None:
        engine = engine_on(cuda, small)
        scheduler = Scheduler(
            OperatingPoint(1, (STAY, STAY, 0.0)), max_batch_sizes=(2, 2, 2), max_queued_images=64, max_slots=8
        )
        batcher = Batcher(engine, scheduler, _Silent(), executors=2)
        await batcher.start()
        deadline = asyncio.get_running_loop().time() + 300
        waiters = [asyncio.ensure_future(batcher.submit(images(small, 2), deadline=deadline)) for _ in range(6)]
        cuda.lost = True
        answers = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(answer, EngineFailed) for answer in answers)
        assert isinstance(await batcher.died, EngineLost)
        assert not batcher.healthy
        await batcher.close()

    asyncio.run(lose())
    for parts in (cuda._blocks, cuda._pinned, cuda._pending, cuda._events, cuda._graphs):
        parts.clear()


def test_closing_twice_is_closing_once(cuda: FakeCuda, small: Bundle) -> None:
    engine = engine_on(cuda, small)
    all_stages(engine, images(small, 1))
    engine.close()
    engine.close()
    assert cuda.closed


# -- stages that do not fit


def test_stages_that_do_not_fit_together_are_named(cuda: FakeCuda, small: Bundle) -> None:
    stages = torch_stage.load(small, HostPlace(cuda), [(1,)] * 3)
    stages[1].inputs = {**stages[1].inputs, "features1": TensorSpec(dtype="float16", shape=("B", 2, 6))}
    with pytest.raises(BundleError, match=r"`features1` leaves stage 1 as .* and the next one takes .*float16"):
        GpuEngine(small, cuda, stages, name="none", runtime="none")
    stages = torch_stage.load(small, HostPlace(cuda), [(1,)] * 3)
    stages[2].outputs = {**stages[2].outputs, "confidence": TensorSpec(dtype="float16", shape=("B",))}
    with pytest.raises(BundleError, match="stage 3: `confidence` is float16"):
        GpuEngine(small, cuda, stages, name="none", runtime="none")
    for spec in (TensorSpec(dtype="int64", shape=("B", 2)), TensorSpec(dtype="float32", shape=("B", "T"))):
        with pytest.raises(BundleError, match="a GPU does not take tensors of"):
            row_bytes(spec)
