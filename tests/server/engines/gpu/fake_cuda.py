"""A CUDA device in the host's memory, as lazy as CUDA may be, that finds fault with every move CUDA would not forgive.

A stream does nothing until somebody waits for it, so whoever reads a result too early, or changes what is still to be
copied, is found out. Found out are:

- memory, streams, events and graphs that were freed, and addresses beyond what was allocated
- host memory that changes between a copy's launch and the copy
- two streams that touch the same memory, one of them writing, without the host having waited in between; of the reuse
  state, row by row
- rows read that nobody wrote
- a thread that waits, allocates or frees while it records
- a graph whose memory was freed after it was recorded

A fault is raised where it shows, and kept in `faults`, since an engine may well survive it.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engines.gpu import torch_stage
from server.engines.gpu.device import ALIGNMENT, CaptureFailed, DeviceError, Host, OutOfDeviceMemory

Span = tuple[int, int]  # from an address, so many bytes


class Fault(AssertionError):
    """Something that a real device would punish, or not even notice."""


@dataclass(slots=True)
class _Move:
    """Something that a stream is to do."""

    name: str
    act: Callable[[], None]
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    sent: Host | None = None  # host memory that it reads
    received: Host | None = None  # host memory that it writes
    stream: int = 0
    number: int = 0  # of all on its stream
    seen: bytes | None = None  # `sent` at launch
    waited: dict[int, int] = field(default_factory=dict)  # what of each stream the host had waited for, at launch


@dataclass(slots=True)
class _Graph:
    moves: list[_Move]
    memory: dict[int, int]  # allocations that it touches: address, and which of all that were ever there


class FakeCuda:
    """See the module's docstring. `memory`: bytes of the device."""

    name = "fake device"
    version = "fake CUDA"

    def __init__(self, memory: int = 1 << 30) -> None:
        self.faults: list[str] = []
        self.launches: list[str] = []  # "graph" or "plain", for every stage that was run
        self.refuse_capture = False
        self.break_next = 0  # so many next moves of a stage fail, and nothing else
        self.lost = False
        self.closed = False
        self._free = memory
        self._blocks: dict[int, tuple[int, NDArray[np.uint8], int]] = {}  # address: size, memory, which
        self._starts: list[int] = []
        self._freed: list[NDArray[np.uint8]] = []  # kept, so that no address comes twice
        self._pinned: dict[int, Host] = {}
        self._pending: dict[int, list[_Move]] = {}  # by stream
        self._done: dict[int, int] = {}  # by stream, moves that have been carried out
        self._sent: dict[int, int] = {}  # by stream, moves that were launched
        self._waited: dict[int, int] = {}
        self._events: dict[int, tuple[int, int] | None] = {}
        self._graphs: dict[int, _Graph] = {}
        self._recording: dict[int, tuple[int, list[_Move]]] = {}  # by stream: thread, moves
        self._writers: dict[tuple[int, int], _Move] = {}  # rows of the state: who wrote it last
        self._readers: dict[tuple[int, int], list[_Move]] = defaultdict(list)  # and who read it since
        self._cleared: set[int] = set()  # stores that began as zeros
        self._number = 1000
        self._lock = threading.RLock()

    # -- server.engines.gpu.device.Device

    def attach(self) -> None:
        self._alive()

    def free_memory(self) -> int:
        self._not_recording()
        return self._free

    def allocate(self, size: int) -> int:
        with self._lock:
            self._alive()
            self._not_recording()
            if size > self._free:
                raise OutOfDeviceMemory(f"{size} bytes of {self._free}")
            self._free -= size
            memory = np.full(size + ALIGNMENT, 0xA5, np.uint8)
            address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
            self._blocks[address] = size, memory, self._next()
            self._starts = sorted(self._blocks)
            return address

    def free(self, address: int) -> None:
        with self._lock:
            self._not_recording()
            if address not in self._blocks:
                self._fault(f"freed {address:#x}, which is not allocated")
            size, memory, _ = self._blocks.pop(address)
            for moves in self._pending.values():
                if any(_overlap(span, (address, size)) for move in moves for span in (*move.reads, *move.writes)):
                    self._fault("freed memory that a stream has still to use")
            self._free += size
            self._freed.append(memory)
            memory.fill(0xDD)
            self._starts = sorted(self._blocks)

    def pin(self, size: int) -> Host:
        with self._lock:
            self._alive()
            self._not_recording()
            host = np.zeros(size, np.uint8)
            self._pinned[host.ctypes.data] = host
            return host

    def unpin(self, host: Host) -> None:
        with self._lock:
            self._not_recording()
            if self._pinned.pop(host.ctypes.data, None) is None:
                self._fault("unpinned what is not pinned")

    def stream(self) -> int:
        with self._lock:
            self._alive()
            stream = self._next()
            self._pending[stream], self._done[stream], self._sent[stream], self._waited[stream] = [], 0, 0, 0
            return stream

    def destroy_stream(self, stream: int) -> None:
        with self._lock:
            if self._pending.pop(stream, [None]):
                self._fault("destroyed a stream that has still something to do")

    def synchronize(self, stream: int) -> None:
        with self._lock:
            self._alive()
            self._not_recording()
            self._carry_out(stream, self._sent[stream])

    def event(self) -> int:
        with self._lock:
            self._alive()
            event = self._next()
            self._events[event] = None
            return event

    def destroy_event(self, event: int) -> None:
        with self._lock:
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            self._alive()
            self._events[event] = stream, self._sent[stream]

    def wait(self, event: int) -> None:
        with self._lock:
            self._alive()
            self._not_recording()
            at = self._events[event]
            if at is None:
                self._fault("waited for an event that was never recorded")
            else:
                self._carry_out(*at)

    def copy_in(self, address: int, host: Host, size: int, stream: int) -> None:
        self._check_pinned(host, size)
        target = self.memory(address, size)
        self._do(
            stream,
            _Move(
                "copy in",
                lambda: np.copyto(target, host[:size]),
                writes=((address, size),),
                sent=host[:size],
            ),
        )

    def copy_out(self, host: Host, address: int, size: int, stream: int) -> None:
        self._check_pinned(host, size)
        source = self.memory(address, size)
        self._do(
            stream,
            _Move(
                "copy out",
                lambda: np.copyto(host[:size], source),
                reads=((address, size),),
                received=host[:size],
            ),
        )

    def clear(self, address: int, size: int, stream: int) -> None:
        target = self.memory(address, size)

        def act() -> None:
            target.fill(0)
            self._cleared.add(address)

        self._do(stream, _Move("clear", act, writes=((address, size),)))

    def gather(self, store: int, rows: int, batch: int, row_bytes: int, size: int, stream: int) -> None:
        source, number = self._store(store, row_bytes)
        index = self.memory(rows, 4 * size).view(np.int32)
        target = self.memory(batch, row_bytes * size).reshape(size, row_bytes)
        move = _Move("gather", lambda: None, reads=((rows, 4 * size),), writes=((batch, row_bytes * size),))

        def act(move: _Move) -> None:
            for at, row in enumerate(index.tolist()):
                if not 0 <= row < number:
                    self._fault(f"gathered row {row} of {number}")
                blank = row == number - 1
                writer = self._writers.get((store, row))
                if not blank:
                    if writer is None:
                        self._fault(f"gathered row {row}, which nobody wrote")
                    self._in_order(writer, move, f"row {row} was gathered")
                    self._readers[store, row].append(move)
                elif store not in self._cleared:
                    self._fault("gathered the blank row of a store that was not cleared")
                target[at] = source[row]

        self._do(stream, move, act)

    def scatter(self, batch: int, rows: int, store: int, row_bytes: int, size: int, stream: int) -> None:
        target, number = self._store(store, row_bytes)
        index = self.memory(rows, 4 * size).view(np.int32)
        source = self.memory(batch, row_bytes * size).reshape(size, row_bytes)
        move = _Move("scatter", lambda: None, reads=((rows, 4 * size), (batch, row_bytes * size)))

        def act(move: _Move) -> None:
            for at, row in enumerate(index.tolist()):
                if row < 0:
                    continue
                if row >= number - 1:
                    self._fault(f"scattered to row {row} of {number}, the last of which is blank")
                for reader in self._readers.pop((store, row), []):
                    self._in_order(reader, move, f"row {row} was scattered")
                if (writer := self._writers.get((store, row))) is not None:
                    self._in_order(writer, move, f"row {row} was scattered")
                self._writers[store, row] = move
                target[row] = source[at]

        self._do(stream, move, act)

    def decide(
        self, confidence: int, thresholds: int, reserved: int, rows: int, survives: int, size: int, stream: int
    ) -> None:
        confident = self.memory(confidence, 4 * size).view(np.float32)
        least = self.memory(thresholds, 8 * size).view(np.float64)
        there = self.memory(reserved, 4 * size).view(np.int32)
        targets = self.memory(rows, 4 * size).view(np.int32)
        flags = self.memory(survives, size)

        def act() -> None:
            flags[:] = confident.astype(np.float64) < least
            targets[:] = np.where(flags, there, -1)

        reads = ((confidence, 4 * size), (thresholds, 8 * size), (reserved, 4 * size))
        self._do(stream, _Move("decide", act, reads=reads, writes=((rows, 4 * size), (survives, size))))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        with self._lock:
            self._alive()
            self._not_recording()
            moves: list[_Move] = []
            self._recording[stream] = threading.get_ident(), moves
        try:
            if self.refuse_capture:
                raise DeviceError("told to refuse")
            work()
        except Fault:
            raise
        except Exception as error:
            raise CaptureFailed(str(error)) from error
        finally:
            with self._lock:
                del self._recording[stream]
        with self._lock:
            touched = {self._block(at) for move in moves for at, _ in (*move.reads, *move.writes)}
            graph = self._next()
            self._graphs[graph] = _Graph(moves, {start: self._blocks[start][2] for start in touched})
            return graph

    def launch(self, graph: int, stream: int) -> None:
        with self._lock:
            self._alive()
            if graph not in self._graphs:
                self._fault("launched a graph that was destroyed")
            recorded = self._graphs[graph]
            for start, which in recorded.memory.items():
                if start not in self._blocks or self._blocks[start][2] != which:
                    self._fault("launched a graph whose memory was freed")
            self.launches.append("graph")
            for move in recorded.moves:
                self._send(stream, replace(move))

    def destroy_graph(self, graph: int) -> None:
        with self._lock:
            del self._graphs[graph]

    def close(self) -> None:
        self.closed = True

    # -- for stages in the host's memory, and for tests

    def memory(self, address: int, size: int) -> NDArray[np.uint8]:
        """What lies there."""
        with self._lock:
            start = self._block(address)
            if address + size > start + self._blocks[start][0]:
                self._fault(f"{size} bytes at {address:#x} go beyond what was allocated")
            return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)

    def compute(
        self, stream: int, work: Callable[[], None], reads: Sequence[Span] = (), writes: Sequence[Span] = ()
    ) -> None:
        """What a stage does."""
        with self._lock:
            if stream not in self._recording:
                self.launches.append("plain")

        def act() -> None:
            if self.break_next > 0:
                self.break_next -= 1
                raise DeviceError("told to break")
            work()

        self._do(stream, _Move("stage", act, reads=tuple(reads), writes=tuple(writes)))

    @property
    def leaks(self) -> dict[str, int]:
        """What was not given back."""
        left = {
            "blocks": len(self._blocks),
            "pinned": len(self._pinned),
            "streams": len(self._pending),
            "events": len(self._events),
            "graphs": len(self._graphs),
        }
        return {what: number for what, number in left.items() if number}

    # -- inside

    def _do(self, stream: int, move: _Move, act: Callable[[_Move], None] | None = None) -> None:
        """`act` is told which move it is, as a graph repeats it."""
        with self._lock:
            self._alive()
            if stream not in self._pending:
                self._fault(f"a {move.name} on a stream that was destroyed")
            move.stream = stream
            if act is not None:
                move.act = _told(move, act)
            if stream in self._recording:
                thread, moves = self._recording[stream]
                if thread != threading.get_ident():
                    self._fault("another thread's work on a stream that is being recorded")
                moves.append(move)
            else:
                self._send(stream, move)

    def _send(self, stream: int, move: _Move) -> None:
        if isinstance(move.act, _told):
            move.act = _told(move, move.act.act)
        for other, pending in self._pending.items():
            if other == stream:
                continue
            for theirs in pending:
                ours_write = any(_overlap(a, b) for a in move.writes for b in (*theirs.reads, *theirs.writes))
                if ours_write or any(_overlap(a, b) for a in theirs.writes for b in move.reads):
                    self._fault(f"{move.name} and another stream's {theirs.name} use the same memory at a time")
        self._sent[stream] += 1
        move.number, move.waited, move.stream = self._sent[stream], dict(self._waited), stream
        if move.sent is not None:
            move.seen = move.sent.tobytes()
        if move.received is not None:
            move.received.fill(0x5A)  # who reads it now reads anything
        self._pending[stream].append(move)

    def _carry_out(self, stream: int, until: int) -> None:
        pending = self._pending[stream]
        while pending and pending[0].number <= until:
            move = pending.pop(0)
            self._done[stream] = move.number
            if move.sent is not None and move.sent.tobytes() != move.seen:
                self._fault("host memory changed before it was copied")
            move.act()
        self._waited[stream] = max(self._waited[stream], until)

    def _in_order(self, first: _Move, then: _Move, what: str) -> None:
        """Whether the second cannot begin before the first has ended."""
        if first.stream != then.stream and then.waited.get(first.stream, 0) < first.number:
            self._fault(f"{what} while another stream's {first.name} may still be under way")

    def _store(self, address: int, row_bytes: int) -> tuple[NDArray[np.uint8], int]:
        with self._lock:
            if address not in self._blocks:
                self._fault(f"{address:#x} is no store")
            size = self._blocks[address][0]
            return self.memory(address, size).reshape(-1, row_bytes), size // row_bytes

    def _block(self, address: int) -> int:
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._starts[at] + self._blocks[self._starts[at]][0]:
            self._fault(f"{address:#x} is not allocated")
        return self._starts[at]

    def _check_pinned(self, host: Host, size: int) -> None:
        if host.ctypes.data not in self._pinned or size > host.size:
            self._fault("a copy from or to host memory that is not pinned")

    def _not_recording(self) -> None:
        if any(thread == threading.get_ident() for thread, _ in self._recording.values()):
            self._fault("waited, allocated or freed while recording")

    def _alive(self) -> None:
        if self.lost:
            raise DeviceError("the device was lost")

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _fault(self, what: str) -> None:
        self.faults.append(what)
        raise Fault(what)


class _told:  # noqa: N801
    """A function that is told which move it is."""

    def __init__(self, move: _Move, act: Callable[[_Move], None]) -> None:
        self.move, self.act = move, act

    def __call__(self) -> None:
        self.act(self.move)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


class _Watching(TorchDispatchMode):
    """Notes the memory that operators allocate."""

    def __init__(self, made: list[weakref.ref[torch.UntypedStorage]]) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self._made.append(weakref.ref(tensor.untyped_storage()))
        return given


class HostPlace:
    """Torch on the fake device's memory: `server.engines.gpu.torch_stage.Place`."""

    device = torch.device("cpu")

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.inside: Counter[int] = Counter()  # by stream: contexts that are open
        self._made: list[weakref.ref[torch.UntypedStorage]] = []

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        return torch.from_numpy(self._cuda.memory(address, size)).view(dtype).view(shape)

    def run(self, stream: int, work: torch_stage.Work) -> None:
        """What earlier runs made is written over: there, recorded graphs compute."""
        self._cuda.compute(stream, partial(self._run, work))

    def _run(self, work: torch_stage.Work) -> None:
        for storage in filter(None, (ref() for ref in self._made)):
            storage.fill_(0xAB)
        self._made = []
        with _Watching(self._made):
            then = work()
        if then is not None:
            then()

    def enter(self, stream: int) -> None:
        self.inside[stream] += 1

    def leave(self, stream: int) -> None:
        self.inside[stream] -= 1
