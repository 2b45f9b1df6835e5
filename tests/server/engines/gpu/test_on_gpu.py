"""What only a real device can show. `test_engine` runs on it, too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.bundle.manifest import Bundle
from server.engines.gpu.device import ALIGNMENT, CaptureFailed, DeviceError, OutOfDeviceMemory
from server.engines.gpu.probe import visible_gpus
from server.engines.gpu.torch_stage import CudaPlace
from tests.server.engines.gpu.conftest import Rig
from tests.server.engines.gpu.runs import all_stages, images

if TYPE_CHECKING:
    from server.engines.gpu.cuda import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not visible_gpus(), reason="there is no NVIDIA GPU"),
]


class Buffers:
    """Device memory as arrays, for tests."""

    def __init__(self, device: CudaDevice) -> None:
        self.device, self.stream = device, device.stream()
        self._held: list[int] = []

    def put(self, array: NDArray[np.generic]) -> int:
        """Its address on the device."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        address = self.device.allocate(data.size)
        self._held.append(address)
        host = self.device.pin(data.size)
        host[:] = data
        self.device.copy_in(address, host, data.size, self.stream)
        self.device.synchronize(self.stream)
        self.device.unpin(host)
        return address

    def get(self, address: int, like: NDArray[np.generic]) -> NDArray[np.generic]:
        host = self.device.pin(like.nbytes)
        self.device.copy_out(host, address, like.nbytes, self.stream)
        self.device.synchronize(self.stream)
        found = host.view(like.dtype).reshape(like.shape).copy()
        self.device.unpin(host)
        return found

    def close(self) -> None:
        for address in self._held:
            self.device.free(address)
        self.device.destroy_stream(self.stream)


@pytest.fixture
def buffers() -> Iterator[Buffers]:
    from server.engines.gpu.cuda import CudaDevice

    device = CudaDevice()
    found = Buffers(device)
    yield found
    found.close()
    device.close()


@pytest.mark.parametrize("row_bytes", [1, 3, 4, 12, 16, 48, 9248, 16 * 1024 + 4, 100_001, 2_937_888])
def test_rows_are_gathered_and_scattered(buffers: Buffers, row_bytes: int) -> None:
    rng = np.random.default_rng(row_bytes)
    store = rng.integers(0, 256, (9, row_bytes), np.uint8)
    rows = np.array([3, 8, 0, 3, 5], np.int32)
    batch = np.zeros((5, row_bytes), np.uint8)
    device, stream = buffers.device, buffers.stream
    at_store, at_rows, at_batch = buffers.put(store), buffers.put(rows), buffers.put(batch)
    assert at_store % ALIGNMENT == at_rows % ALIGNMENT == at_batch % ALIGNMENT == 0
    device.gather(at_store, at_rows, at_batch, row_bytes, 5, stream)
    np.testing.assert_array_equal(buffers.get(at_batch, batch), store[rows])
    fresh = rng.integers(0, 256, (5, row_bytes), np.uint8)
    targets = np.array([1, -1, 7, -1, 0], np.int32)
    device.scatter(buffers.put(fresh), buffers.put(targets), at_store, row_bytes, 5, stream)
    expected = store.copy()
    expected[[1, 7, 0]] = fresh[[0, 2, 4]]
    np.testing.assert_array_equal(buffers.get(at_store, store), expected)


def test_survivors_are_decided_in_double(buffers: Buffers) -> None:
    size = 1000
    rng = np.random.default_rng(0)
    confidence = rng.random(size, dtype=np.float32)
    confidence[::50] = np.nan
    thresholds = np.where(rng.random(size) < 0.5, confidence.astype(np.float64), rng.random(size))
    thresholds[::7] = np.nextafter(confidence[::7].astype(np.float64), 2.0)
    thresholds[::50] = 2.0
    reserved = rng.permutation(size).astype(np.int32)
    rows, survives = np.zeros(size, np.int32), np.zeros(size, np.uint8)
    at_rows, at_survives = buffers.put(rows), buffers.put(survives)
    buffers.device.decide(
        *(buffers.put(array) for array in (confidence, thresholds, reserved)),
        at_rows, at_survives, size, buffers.stream,
    )  # fmt: skip
    goes_on = confidence < thresholds  # in double
    np.testing.assert_array_equal(buffers.get(at_survives, survives), goes_on)
    np.testing.assert_array_equal(buffers.get(at_rows, rows), np.where(goes_on, reserved, -1))


def test_what_is_recorded_runs_at_every_launch_with_what_the_host_wrote_before(buffers: Buffers) -> None:
    device, stream = buffers.device, buffers.stream
    inbox, outbox = device.pin(64), device.pin(64)
    address, event = buffers.put(np.zeros(64, np.uint8)), device.event()

    def work() -> None:
        device.copy_in(address, inbox, 64, stream)
        device.copy_out(outbox, address, 64, stream)

    graph = device.capture(stream, work)
    for value in (1, 2, 3):
        inbox[:] = value
        device.launch(graph, stream)
        device.record(event, stream)
        device.wait(event)
        assert set(outbox.tolist()) == {value}
    device.destroy_graph(graph)
    device.destroy_event(event)
    device.unpin(inbox)
    device.unpin(outbox)


def test_work_that_cannot_be_recorded_leaves_the_stream_usable(buffers: Buffers) -> None:
    device, stream = buffers.device, buffers.stream
    with pytest.raises(CaptureFailed):
        device.capture(stream, lambda: device.synchronize(stream))
    with pytest.raises(CaptureFailed, match="of its own"):
        device.capture(stream, _complain)
    device.synchronize(stream)
    data = np.arange(64, dtype=np.uint8)
    np.testing.assert_array_equal(buffers.get(buffers.put(data), data), data)


def _complain() -> None:
    raise RuntimeError("of its own")


def test_too_much_memory_is_refused_and_nothing_else_is_wrong(buffers: Buffers) -> None:
    with pytest.raises(OutOfDeviceMemory):
        buffers.device.allocate(1 << 48)
    data = np.arange(64, dtype=np.uint8)
    np.testing.assert_array_equal(buffers.get(buffers.put(data), data), data)
    with pytest.raises(DeviceError):
        buffers.device.free(12345)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_torch_sees_the_memory_itself(buffers: Buffers, dtype: torch.dtype) -> None:
    place, data = CudaPlace(), np.zeros(4096, np.uint8)
    address = buffers.put(data)
    tensor = place.tensor(address, (2, 16), dtype)
    assert tensor.data_ptr() == address
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (2, 16))
    place.enter(buffers.stream)

    def fill() -> None:
        tensor.fill_(3)

    place.run(buffers.stream, fill)
    found = torch.from_numpy(buffers.get(address, data)).view(dtype)
    assert found[:32].tolist() == [3] * 32
    place.leave(buffers.stream)


def test_float32_is_no_less() -> None:
    place = CudaPlace()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    x, w = torch.randn(4, 32, 32, 32, generator=generator), torch.randn(64, 32, 3, 3, generator=generator)
    product = (a.to(place.device) @ b.to(place.device)).cpu().double()
    picture = torch.nn.functional.conv2d(x.to(place.device), w.to(place.device)).cpu().double()
    # TF32 would be off by about 1e-2.
    assert (product - a.double() @ b.double()).abs().max() < 1e-3
    assert (picture - torch.nn.functional.conv2d(x.double(), w.double())).abs().max() < 1e-3


def test_every_program_is_recorded(photo10: Bundle, rig_on_gpu: Rig) -> None:
    engine = rig_on_gpu.engine(photo10, largest=16)
    engine.warm_up()
    programs = [program for lane in engine._all_lanes for program in lane.programs.values()]
    assert len(programs) == 2 * 3 * 5
    assert all(program._graph is not None for program in programs)


def test_recorded_answers_are_the_plain_ones(photo10: Bundle, rig_on_gpu: Rig) -> None:
    """Bit by bit: the same kernels, on the same shapes."""
    engine, pixels = rig_on_gpu.engine(photo10, largest=16), images(photo10, 16)
    recorded = all_stages(engine, pixels)
    for lane in engine._all_lanes:
        for program in lane.programs.values():
            if program._graph is not None:
                rig_on_gpu.device.destroy_graph(program._graph)
                program._graph = None
    plain = all_stages(engine, pixels)
    np.testing.assert_array_equal(recorded.probabilities, plain.probabilities)


LOSE = """
import os, sys
from tests.server.engines.gpu.on_gpu_lost import lose
status = lose(sys.argv[1])
sys.stdout.flush()
os._exit(status)  # as the server ends
"""


def test_a_lost_device_is_noticed(small: Bundle) -> None:
    """In a process of its own, as it does not come back."""
    ended = subprocess.run(
        [sys.executable, "-c", LOSE, str(small.path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[4],
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "EngineLost" in ended.stdout
