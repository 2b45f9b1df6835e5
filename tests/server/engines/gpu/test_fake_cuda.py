"""The fake device finds fault with what it says it does: else the tests on it would show nothing."""

from __future__ import annotations

import numpy as np
import pytest

from server.engines.gpu.device import CaptureFailed
from tests.server.engines.gpu.fake_cuda import FakeCuda, Fault


@pytest.fixture
def device() -> FakeCuda:
    return FakeCuda(memory=1 << 20)


def test_nothing_happens_before_somebody_waits(device: FakeCuda) -> None:
    stream, event, host, address = device.stream(), device.event(), device.pin(8), device.allocate(8)
    host[:] = 7
    device.copy_in(address, host, 8, stream)
    back = device.pin(8)
    device.copy_out(back, address, 8, stream)
    device.record(event, stream)
    assert set(back.tolist()) != {7}
    device.wait(event)
    assert set(back.tolist()) == {7}


def test_host_memory_that_changes_too_early(device: FakeCuda) -> None:
    stream, host, address = device.stream(), device.pin(8), device.allocate(8)
    device.copy_in(address, host, 8, stream)
    host[3] = 1
    with pytest.raises(Fault, match="changed before it was copied"):
        device.synchronize(stream)


def test_memory_that_is_freed_under_a_graph_or_a_stream(device: FakeCuda) -> None:
    stream, address = device.stream(), device.allocate(8)
    graph = device.capture(stream, lambda: device.clear(address, 8, stream))
    device.free(address)
    again = device.allocate(8)
    assert again != address
    with pytest.raises(Fault, match="whose memory was freed"):
        device.launch(graph, stream)
    device.clear(again, 8, stream)
    with pytest.raises(Fault, match="still to use"):
        device.free(again)


def test_two_streams_in_the_same_memory(device: FakeCuda) -> None:
    one, other, address = device.stream(), device.stream(), device.allocate(512)
    device.compute(one, lambda: None, writes=[(address, 256)])
    device.compute(other, lambda: None, writes=[(address + 256, 256)])
    with pytest.raises(Fault, match="at a time"):
        device.compute(other, lambda: None, reads=[(address + 100, 1)])
    device.synchronize(one)
    device.compute(other, lambda: None, reads=[(address + 100, 1)])


def test_waiting_allocating_and_freeing_while_recording(device: FakeCuda) -> None:
    stream, address = device.stream(), device.allocate(8)
    for work in (
        lambda: device.synchronize(stream),
        lambda: device.allocate(8),
        lambda: device.free(address),
        lambda: device.pin(8),
    ):
        with pytest.raises(Fault, match="while recording"):
            device.capture(stream, work)  # type: ignore[arg-type]
    with pytest.raises(CaptureFailed):
        device.capture(stream, lambda: 1 / 0)  # type: ignore[arg-type, return-value]


def test_what_is_recorded_does_not_run(device: FakeCuda) -> None:
    stream, address, ran = device.stream(), device.allocate(8), []
    graph = device.capture(stream, lambda: device.compute(stream, lambda: ran.append(1), writes=[(address, 8)]))
    device.synchronize(stream)
    assert not ran
    for _ in range(2):
        device.launch(graph, stream)
    device.synchronize(stream)
    assert ran == [1, 1]


def store(device: FakeCuda, stream: int) -> tuple[int, int, int]:
    """A cleared one of three rows of four bytes, and one blank; a batch of one row; an index that says 1."""
    address, batch, rows, host = device.allocate(16), device.allocate(4), device.allocate(4), device.pin(4)
    host.view(np.int32)[0] = 1
    device.clear(address, 16, stream)
    device.copy_in(rows, host, 4, stream)
    device.clear(batch, 4, stream)
    device.synchronize(stream)
    return address, batch, rows


def test_a_row_that_nobody_wrote(device: FakeCuda) -> None:
    stream = device.stream()
    address, batch, rows = store(device, stream)
    device.gather(address, rows, batch, 4, 1, stream)
    with pytest.raises(Fault, match="which nobody wrote"):
        device.synchronize(stream)


def test_a_row_that_another_stream_may_still_be_writing(device: FakeCuda) -> None:
    one, other = device.stream(), device.stream()
    address, batch, rows = store(device, one)
    more, again = device.allocate(4), device.allocate(4)
    host = device.pin(4)
    host.view(np.int32)[0] = 1
    device.copy_in(again, host, 4, other)
    device.scatter(batch, rows, address, 4, 1, one)
    device.gather(address, again, more, 4, 1, other)  # the host has not waited for the first stream
    device.synchronize(one)
    with pytest.raises(Fault, match="may still be under way"):
        device.synchronize(other)


def test_addresses_beyond_what_was_allocated(device: FakeCuda) -> None:
    stream, address, host = device.stream(), device.allocate(8), device.pin(16)
    with pytest.raises(Fault, match="beyond"):
        device.copy_in(address, host, 16, stream)
    with pytest.raises(Fault, match="not allocated"):
        device.memory(address + 8, 1)
    with pytest.raises(Fault, match="not pinned"):
        device.copy_in(address, np.zeros(8, np.uint8), 8, stream)
