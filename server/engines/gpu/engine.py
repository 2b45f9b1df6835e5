"""An engine on a GPU: lanes, one graph a batch, and reuse state that never leaves the device.

Theory of operation
-------------------
A *lane* is what one batch in flight needs for itself: a stream, an event, page-locked memory on the host, staging
memory and activations on the device. There are as many lanes as batches run at once; two, so that the host fills one
while the other computes. A lane belongs to one thread at a time.

A *program* is one stage at one batch size in one lane, every tensor at an address that never changes:

1. one copy in: thresholds, rows to read, rows to write, pixels
2. the rows of state that the batch reads, gathered from the store into the stage's inputs
3. the stage
4. who survives: confidence < threshold, row by row, compared in double
5. the survivors' state, scattered to the rows that were reserved for them
6. one copy out: probabilities, confidence, who survived

All of it is one CUDA graph, recorded once: the host fills the page-locked memory, launches, and sleeps until the event.
Where a stage cannot be recorded the same is put on the stream call by call.

A batch runs in the smallest size that holds it. Rows that only fill it up read a row of zeros, have threshold 0, which
no confidence is below, and so leave nothing. A batch larger than the largest size runs in parts.

Nothing is synchronised between streams, and nothing needs to be: a row is given to another batch only after the host
has waited for the one that read or wrote it last.

When a batch fails the lane is waited for, so that nothing of it still writes, before its rows are given back. A stream
that cannot even be waited for is one whose device is lost (CUDA's sticky errors): the engine then refuses everything,
and the process should end, since within it the device does not come back.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from server.bundle.manifest import Bundle, TensorSpec
from server.core import EngineLost, Floats, Pixels, Slot, StageBatch, StageOutput
from server.engines.gpu.device import ALIGNMENT, CaptureFailed, Device, Host, OutOfDeviceMemory
from server.engines.gpu.pool import Loan, SlotPool
from server.engines.gpu.stage import Context, Stage
from server.errors import BundleError

log = logging.getLogger(__name__)

Number = TypeVar("Number", bound=np.generic)

LANES = 2
LARGEST_BATCH = 64
STORE_SHARE = 0.5  # of the memory that is free when everything else has its own: the most that reuse state may take

ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two, and the largest."""
    return (*(2**n for n in range(largest.bit_length()) if 2**n < largest), largest)


def row_bytes(spec: TensorSpec) -> int:
    """Of one row of a batch. Raises BundleError for a tensor of another kind than rows of fixed size."""
    _, *sizes = spec.shape
    if spec.dtype not in ITEM_BYTES or any(isinstance(size, str) for size in sizes):
        raise BundleError(f"a GPU does not take tensors of {spec.dtype} {list(spec.shape)}")
    return ITEM_BYTES[spec.dtype] * math.prod(int(size) for size in sizes)


class _Closes(Protocol):
    def close(self) -> None: ...


class _Layout:
    """Where things lie in a block of memory, one after the other."""

    def __init__(self) -> None:
        self.size = 0

    def place(self, size: int) -> int:
        """The offset of so many bytes."""
        offset = self.size
        self.size = -(-(offset + size) // ALIGNMENT) * ALIGNMENT
        return offset


@dataclass(frozen=True, slots=True)
class _Places:
    """Offsets in a lane's memory, for one stage at one size. What is copied in comes first, then what is copied out;
    these two parts are on the host as well."""

    thresholds: int
    sources: int
    reserved: int
    image: int
    inbox: int  # bytes
    probabilities: int
    confidence: int
    survives: int
    outbox: int  # bytes
    targets: int
    tensors: Mapping[str, int]  # state, in and out
    size: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the engine knows of a stage, whatever the size."""

    number: int
    stage: Stage
    takes: Mapping[str, int]  # inputs besides the image, and the bytes of a row
    leaves: Mapping[str, int]  # outputs for the stage after
    last: bool

    def places(self, size: int) -> _Places:
        inbox = _Layout()
        thresholds, sources, reserved = inbox.place(8 * size), inbox.place(4 * size), inbox.place(4 * size)
        image = inbox.place(size * row_bytes(self.stage.inputs["image"]))
        outbox = _Layout()
        probabilities = outbox.place(size * row_bytes(self.stage.outputs["probabilities"]))
        confidence, survives = outbox.place(4 * size), outbox.place(size)
        rest = _Layout()
        rest.size = inbox.size + outbox.size
        targets = rest.place(4 * size)
        tensors = {name: rest.place(size * row) for name, row in {**self.takes, **self.leaves}.items()}
        start = inbox.size
        return _Places(
            thresholds, sources, reserved, image, inbox.size,
            start + probabilities, start + confidence, start + survives, outbox.size,
            targets, tensors, rest.size,
        )  # fmt: skip


class _Store:
    """The state at one boundary, on the device: for every tensor so many rows, and one more of zeros that is never
    written."""

    def __init__(self, device: Device, tensors: Mapping[str, int], rows: int, stream: int) -> None:
        self.blank = rows
        self.addresses: dict[str, int] = {}
        with ExitStack() as taken:
            for name, row in tensors.items():
                size = (rows + 1) * row
                self.addresses[name] = device.allocate(size)
                taken.callback(device.free, self.addresses[name])
                device.clear(self.addresses[name], size, stream)
            self._taken = taken.pop_all()

    def close(self) -> None:
        self._taken.close()


class _Lane:
    """What one batch in flight has for itself."""

    def __init__(self, device: Device, block: int, arena: int, inbox: int, outbox: int) -> None:
        """Sizes in bytes."""
        self.programs: dict[tuple[int, int], _Program] = {}  # by stage and size
        with ExitStack() as taken:
            self.stream = device.stream()
            taken.callback(device.destroy_stream, self.stream)
            self.event = device.event()
            taken.callback(device.destroy_event, self.event)
            self.block, self.arena = (self._allocate(device, size, taken) for size in (block, arena))
            self.inbox, self.outbox = (self._pin(device, size, taken) for size in (inbox, outbox))
            self._taken = taken.pop_all()

    def close(self) -> None:
        for program in self.programs.values():
            program.close()
        self.programs.clear()
        self._taken.close()

    @staticmethod
    def _allocate(device: Device, size: int, taken: ExitStack) -> int:
        address = device.allocate(size) if size else 0
        if size:
            taken.callback(device.free, address)
        return address

    @staticmethod
    def _pin(device: Device, size: int, taken: ExitStack) -> Host:
        host = device.pin(size)
        taken.callback(device.unpin, host)
        return host


class _Program:
    """One stage at one size in one lane. See the module's docstring."""

    def __init__(
        self, device: Device, plan: _Plan, size: int, lane: _Lane, before: _Store | None, after: _Store | None
    ) -> None:
        self._device, self._plan, self._size, self._lane = device, plan, size, lane
        self._before, self._after = before, after
        self._places = places = plan.places(size)
        self._blank = before.blank if before is not None else 0
        inbox, outbox = lane.inbox, lane.outbox
        self._thresholds = _view(inbox, places.thresholds, np.float64, (size,))
        self._sources = _view(inbox, places.sources, np.int32, (size,))
        self._reserved = _view(inbox, places.reserved, np.int32, (size,))
        self._image = _view(inbox, places.image, np.uint8, _shape(plan.stage.inputs["image"], size))
        start = places.inbox
        classes = _shape(plan.stage.outputs["probabilities"], size)
        self._probabilities = _view(outbox, places.probabilities - start, np.float32, classes)
        self._confidence = _view(outbox, places.confidence - start, np.float32, (size,))
        self._survives = _view(outbox, places.survives - start, np.uint8, (size,))
        self._context = self._open()
        self._graph: int | None = None
        try:
            self._prepare()
        except BaseException:
            with suppress(Exception):
                self._device.synchronize(lane.stream)  # it may have begun; and a lost device is left alone
                self.close()
            raise

    def run(
        self, pixels: Sequence[Pixels], thresholds: Sequence[float], sources: Sequence[int], reserved: Sequence[int]
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Probabilities, confidence, and who survived."""
        n = len(pixels)
        np.stack(pixels, out=self._image[:n])  # the one copy that the host makes
        self._fill(thresholds, sources, reserved)
        self._go()
        return self._probabilities[:n].copy(), self._confidence[:n].copy(), self._survives[:n].astype(np.bool_)

    def _fill(self, thresholds: Sequence[float], sources: Sequence[int], reserved: Sequence[int]) -> None:
        for view, values, rest in (
            (self._thresholds, thresholds, 0.0),
            (self._sources, sources, self._blank),
            (self._reserved, reserved, -1),
        ):
            view[: len(values)] = values
            view[len(values) :] = rest

    def _go(self) -> None:
        device, lane = self._device, self._lane
        if self._graph is not None:
            device.launch(self._graph, lane.stream)
        else:
            self._enqueue()
        device.record(lane.event, lane.stream)
        device.wait(lane.event)

    def _enqueue(self) -> None:
        device, plan, places, size = self._device, self._plan, self._places, self._size
        block, stream = self._lane.block, self._lane.stream
        device.copy_in(block, self._lane.inbox, places.inbox, stream)
        if self._before is not None:
            for name, row in plan.takes.items():
                store = self._before.addresses[name]
                device.gather(store, block + places.sources, block + places.tensors[name], row, size, stream)
        self._context.enqueue()
        device.decide(
            block + places.confidence,
            block + places.thresholds,
            block + places.reserved,
            block + places.targets,
            block + places.survives,
            size,
            stream,
        )
        if self._after is not None:
            for name, row in plan.leaves.items():
                store = self._after.addresses[name]
                device.scatter(block + places.tensors[name], block + places.targets, store, row, size, stream)
        device.copy_out(self._lane.outbox, block + places.inbox, places.outbox, stream)

    def _open(self) -> Context:
        places, block = self._places, self._lane.block
        addresses = {name: block + offset for name, offset in places.tensors.items()}
        addresses |= {
            "image": block + places.image,
            "probabilities": block + places.probabilities,
            "confidence": block + places.confidence,
        }
        return self._plan.stage.context(self._size, addresses, self._lane.arena, self._lane.stream)

    def _prepare(self) -> None:
        """Run it once plainly, record it, run that once: the next run is as fast as all that follow."""
        self._image[:] = 0
        self._fill((), (), ())
        self._go()
        if not self._context.capturable:
            return
        try:
            self._graph = self._device.capture(self._lane.stream, self._enqueue)
        except CaptureFailed as error:
            log.warning(
                "stage %d runs call by call at batch size %d, as it cannot be recorded: %s",
                self._plan.number,
                self._size,
                error,
            )
            return
        self._go()

    def close(self) -> None:
        if self._graph is not None:
            self._device.destroy_graph(self._graph)
        self._context.close()


class GpuEngine:
    """Owns the lanes, the stores and the stages; see `core.Engine` for the contract. `executors` lanes.

    Raises BundleError for stages that do not fit together, OutOfDeviceMemory where they do not fit on the device.
    """

    own_cores = False

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        stages: Sequence[Stage],
        *,
        name: str,
        runtime: str,
        executors: int = LANES,
        max_slots: int = 256,
    ) -> None:
        manifest = bundle.manifest
        self.name, self.runtime, self.device = name, runtime, device.name
        self.num_stages = len(manifest.stages)
        self.num_classes = len(manifest.labels)
        self.input_size = manifest.preprocessing.size
        self.executors = executors
        self._device = device
        self._stages: tuple[Stage, ...] = tuple(stages)
        self._closed = False
        self._plans = _plans(stages)
        self._lock = threading.Lock()  # of making programs
        self._lost: Exception | None = None
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
        self._all_lanes: list[_Lane] = []
        self._stores: list[_Store] = []
        device.attach()
        try:
            for _ in range(executors):
                self._all_lanes.append(self._lane())
            largest = max(stage.batch_sizes[-1] for stage in stages)
            # As many as may wait, and all that run: a survivor always finds a row.
            rows = self._rows_that_fit(max_slots + executors * largest)
            stream = self._all_lanes[0].stream
            for plan in self._plans[:-1]:
                self._stores.append(_Store(device, plan.leaves, rows, stream))
            device.synchronize(stream)
        except BaseException:
            self.close()
            raise
        for lane in self._all_lanes:
            self._lanes.put(lane)
        self._pool = SlotPool(len(self._stores), rows)
        self.max_slots: int | None = rows
        # Whoever runs a batch of these in every lane, as calibrating does, always finds rows.
        self.max_batch_sizes = tuple(min(stage.batch_sizes[-1], rows // executors) for stage in stages)

    @property
    def slots_in_use(self) -> int:
        return len(self._pool)

    def run(self, batch: StageBatch) -> StageOutput:
        """Raises EngineLost where nothing will run any more."""
        plan, size = self._plans[batch.stage - 1], len(batch.pixels)
        handed = size if batch.stage > 1 else 0
        if not size or len(batch.thresholds) != size or len(batch.slots) != handed:
            raise ValueError(f"{size} images, {len(batch.thresholds)} thresholds, {len(batch.slots)} states")
        loan = self._pool.lend(batch.stage, batch.slots, size)
        try:
            with self._lane_of_its_own() as lane:
                probabilities, confidence, survives = self._run(lane, plan, batch, loan)
        except BaseException:
            self._pool.abandon(loan)
            raise
        return StageOutput(probabilities, confidence, self._pool.settle(loan, survives.tolist()))

    def free(self, slots: Sequence[Slot]) -> None:
        self._pool.free(slots)

    def warm_up(self) -> None:
        """Make every program of every lane, one after the other in this thread: nothing is made while batches run."""
        lanes = [self._lanes.get() for _ in self._all_lanes]
        try:
            self._device.attach()
            for lane in lanes:
                for plan in self._plans:
                    for size in reversed(plan.stage.batch_sizes):  # the largest takes the memory that all others use
                        self._program(lane, plan, size)
        finally:
            for lane in lanes:
                self._lanes.put(lane)

    def close(self) -> None:
        """May be called twice. A lost device takes nothing back; it is left to the end of the process, since libraries
        do not expect that, and end it less kindly."""
        if self._lost is not None:
            return
        with suppress(Exception):
            self._device.attach()
        closing: list[_Closes] = [*self._all_lanes, *self._stores, *self._stages]
        if not self._closed:
            closing.append(self._device)
        self._closed = True
        self._all_lanes, self._stores, self._stages, self._plans = [], [], (), []
        for part in closing:
            with suppress(Exception):
                part.close()

    def _run(self, lane: _Lane, plan: _Plan, batch: StageBatch, loan: Loan) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        largest = plan.stage.batch_sizes[-1]
        parts = []
        for start in range(0, len(batch.pixels), largest):
            part = slice(start, start + largest)
            pixels = batch.pixels[part]
            size = next(size for size in plan.stage.batch_sizes if size >= len(pixels))
            program = self._program(lane, plan, size)
            parts.append(program.run(pixels, batch.thresholds[part], loan.sources[part], loan.reserved[part]))
        if len(parts) == 1:
            return parts[0]
        probabilities, confidence, survives = map(np.concatenate, zip(*parts, strict=True))
        return probabilities, confidence, survives

    @contextmanager
    def _lane_of_its_own(self) -> Iterator[_Lane]:
        if self._lost is not None:
            raise EngineLost(f"the device was lost: {self._lost}") from self._lost
        lane = self._lanes.get()
        try:
            self._device.attach()
            yield lane
        except BaseException as error:  # Ctrl-C, too: nothing of the batch may still write when its rows are given back
            try:
                self._device.synchronize(lane.stream)
            except Exception as lost:
                self._lost = lost
                raise EngineLost(f"the device is lost: {lost}") from error
            raise
        finally:
            self._lanes.put(lane)

    def _program(self, lane: _Lane, plan: _Plan, size: int) -> _Program:
        """It is made at its first use. Not by two threads at once: what records one lane should be left alone."""
        key = plan.number, size
        if key not in lane.programs:
            before = self._stores[plan.number - 2] if plan.number > 1 else None
            after = None if plan.last else self._stores[plan.number - 1]
            with self._lock:
                lane.programs[key] = _Program(self._device, plan, size, lane, before, after)
        return lane.programs[key]

    def _lane(self) -> _Lane:
        places = [plan.places(size) for plan in self._plans for size in plan.stage.batch_sizes]
        arena = max(plan.stage.arena_bytes(size) for plan in self._plans for size in plan.stage.batch_sizes)
        return _Lane(
            self._device,
            max(place.size for place in places),
            arena,
            max(place.inbox for place in places),
            max(place.outbox for place in places),
        )

    def _rows_that_fit(self, wanted: int) -> int:
        row = sum(sum(plan.leaves.values()) for plan in self._plans)
        if row == 0:
            return wanted
        free = self._device.free_memory()
        rows = min(wanted, int(STORE_SHARE * free) // row - 1)  # one of each store is the blank one
        if rows < self.executors:
            raise OutOfDeviceMemory(f"{free / 2**20:.0f} MiB are free, and the state of an image takes {row} bytes")
        if rows < wanted:
            log.warning("the device's memory holds the state of %d images at once, not of %d", rows, wanted)
        return rows


def _plans(stages: Sequence[Stage]) -> list[_Plan]:
    takes = [{n: row_bytes(spec) for n, spec in sorted(stage.inputs.items()) if n != "image"} for stage in stages]
    plans = []
    for number, (stage, leaves) in enumerate(zip(stages, [*takes[1:], {}], strict=True), start=1):
        for name in ("probabilities", "confidence"):
            if stage.outputs[name].dtype != "float32":
                raise BundleError(f"stage {number}: `{name}` is {stage.outputs[name].dtype}, not float32")
        for name in leaves:
            ours, theirs = stage.outputs[name], stages[number].inputs[name]
            if (ours.dtype, ours.shape[1:]) != (theirs.dtype, theirs.shape[1:]):
                raise BundleError(f"`{name}` leaves stage {number} as {ours}, and the next one takes {theirs}")
        plans.append(_Plan(number, stage, takes[number - 1], leaves, last=number == len(stages)))
    return plans


def _shape(spec: TensorSpec, size: int) -> tuple[int, ...]:
    return (size, *(int(one) for one in spec.shape[1:]))


def _view(host: Host, offset: int, dtype: type[Number], shape: tuple[int, ...]) -> NDArray[Number]:
    size = np.dtype(dtype).itemsize * math.prod(shape)
    return host[offset : offset + size].view(dtype).reshape(shape)
