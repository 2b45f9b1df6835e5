"""ONNX Runtime on the CPU: for each executor thread a session per stage, each run on one core.

One single-threaded run per core beats one run over all cores: small matrices leave little to split, and nobody waits
for the slowest thread. A stage in fp32 or int8 is bitwise equal at every batch size, so batching never changes an
answer. One in fp16, which is for calibrating without a GPU, need not be.

State between stages: what the next stage takes besides the image, copied row by row out of the batch's output when the
row survives. A view would save that copy (1-2 % of a stage's time), but the runtime's outputs lie in its arena, and a
single survivor would keep the whole batch's there; with copies the live state is at most slots times the size of one
row's state. The next batch gathers its rows into one contiguous input.

Both copies go to memory that is there already: each thread has one input of each name, as large as its largest batch,
and the rows that a batch has consumed are written over by the next survivors. The system hands out megabytes page by
page, which costs more than to copy them.
"""

from __future__ import annotations

import itertools
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from server.bundle.manifest import Bundle, StageSpec, TensorSpec
from server.core import Slot, StageBatch, StageOutput
from server.engines.slots import SlotTable
from server.errors import BundleError
from server.settings import usable_cores

BATCH_GMACS = 0.9
SESSIONS_BYTES = 256 * 1024 * 1024  # of graphs, all sessions together: pods have half a GiB for the engine

Tensor = NDArray[Any]
Bytes = NDArray[np.uint8]
State = tuple[Bytes, ...]  # one row of each tensor that the next stage takes besides the image

# Of a manifest, as the runtime calls them.
DTYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}


@dataclass(frozen=True, slots=True)
class _Stage:
    file: Path
    spec: StageSpec
    opened: tuple[int, int, int] | None  # the file's identity, before it was opened for the first time
    sessions: list[ort.InferenceSession]  # one, and behind the warm-up one for each thread where memory allows
    takes: tuple[str, ...]  # inputs besides the image, from the stage before
    leaves: tuple[str, ...]  # outputs for the stage after


class _Own(threading.local):
    """What a thread has for itself."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.number = next(numbers)  # of the thread, among those that run batches
        self.inputs: dict[str, Tensor] = {}


class OnnxEngine:
    """Owns the sessions and the reuse state. See `core.Engine` for the contract.

    Raises BundleError, naming the file, for a stage that cannot be loaded or does not fit its manifest, and for a
    bundle in bf16. One in fp16 runs, no faster than in fp32.
    """

    name = "onnx"
    own_cores = True
    max_slots: int | None = None

    def __init__(
        self, bundle: Bundle, *, max_batch_sizes: Sequence[int] | None = None, executors: int | None = None
    ) -> None:
        refuse_bfloat16(bundle)
        manifest = bundle.manifest
        self.num_stages = len(manifest.stages)
        self.num_classes = len(manifest.labels)
        self.input_size = manifest.preprocessing.size
        self.max_batch_sizes = tuple(max_batch_sizes or map(largest_batch_that_pays, own_gmacs(manifest.stage_gmacs)))
        self.runtime = f"onnxruntime {ort.__version__}"
        self.device = cpu_model()
        self.executors = executors or usable_cores()
        if len(self.max_batch_sizes) != self.num_stages:
            raise ValueError(f"{len(self.max_batch_sizes)} batch sizes for {self.num_stages} stages")
        takes = [tuple(sorted(stage.inputs.keys() - {"image"})) for stage in manifest.stages]
        files = [bundle.stage_path(number) for number in range(1, self.num_stages + 1)]
        identities = [_identity(file) for file in files]
        opened = _at_once(_open, zip(files, manifest.stages, strict=True), self.executors)
        self._stages = [
            _Stage(file, spec, identity, [session], taken, leaves)
            for file, spec, identity, session, taken, leaves in zip(
                files, manifest.stages, identities, opened, takes, [*takes[1:], ()], strict=True
            )
        ]
        self._graphs_bytes = sum(file.stat().st_size for file in files)
        self._table: SlotTable[State] = SlotTable()
        # Rows of each stage's state that nobody holds any more: at most those of two batches.
        self._spare: list[deque[State]] = [deque(maxlen=2 * size) for size in self.max_batch_sizes]
        self._own = _Own(itertools.count())
        self._warm = False

    @property
    def slots_in_use(self) -> int:
        return len(self._table)

    def run(self, batch: StageBatch) -> StageOutput:
        stage = self._stages[batch.stage - 1]
        states = self._table.read(batch.slots)
        feeds = {"image": self._stack("image", stage, [pixels.reshape(-1) for pixels in batch.pixels])}  # (B, H, W, 3)
        for position, name in enumerate(stage.takes):
            feeds[name] = self._stack(name, stage, [state[position] for state in states])
        session = stage.sessions[self._own.number % len(stage.sessions)]
        probabilities, confidence, *left = session.run(["probabilities", "confidence", *stage.leaves], feeds)
        survives = (confidence < np.asarray(batch.thresholds)).tolist()  # in double, as the thresholds are
        rows = [_rows(tensor) for tensor in left]
        kept = [self._keep(batch.stage, rows, row) if stays else None for row, stays in enumerate(survives)]
        slots = self._table.swap(batch.slots, kept)
        if states:
            self._spare[batch.stage - 2].extend(states)  # only once the table no longer has them
        return StageOutput(probabilities, confidence, slots)

    def _stack(self, name: str, stage: _Stage, rows: Sequence[Bytes]) -> Tensor:
        """The rows as one input, in this thread's memory: it holds until the thread's next batch."""
        inputs = self._own.inputs
        if name not in inputs or len(inputs[name]) < len(rows):
            inputs[name] = _zeros(stage.spec.inputs[name], len(rows))
        stacked = inputs[name][: len(rows)]
        for place, row in zip(_rows(stacked), rows, strict=True):
            _copy(row, place)
        return stacked

    def _keep(self, stage: int, left: Sequence[Bytes], row: int) -> State:
        """A copy of what the stage leaves of one row."""
        try:
            state = self._spare[stage - 1].pop()
        except IndexError:
            return tuple(rows[row].copy() for rows in left)
        for mine, rows in zip(state, left, strict=True):
            _copy(rows[row], mine)
        return state

    def free(self, slots: Sequence[Slot]) -> None:
        self._table.free(slots)

    def warm_up(self) -> None:
        """Open the sessions that threads have for themselves, and run every stage at its largest batch in all of them,
        so that the memory it needs is there, and alone.

        Raises BundleError where a graph is no longer the one that was loaded: no two threads may have different ones.
        """
        if self._warm:
            return
        count = sessions_that_pay(self._graphs_bytes, self.executors)

        def warm(stage: _Stage, size: int, number: int) -> ort.InferenceSession:
            session = stage.sessions[number] if number < len(stage.sessions) else _open_again(stage)
            session.run(None, {name: _zeros(spec, size) for name, spec in stage.spec.inputs.items()})
            return session

        # As they will run, on a core each; the dearest first, so that all are done at about the same time.
        stages = list(zip(self._stages, self.max_batch_sizes, strict=True))[::-1]
        warmed = _at_once(warm, ((stage, size, number) for stage, size in stages for number in range(count)), count)
        for at, (stage, _) in enumerate(stages):
            stage.sessions[:] = warmed[at * count : (at + 1) * count]
        self._warm = True

    def close(self) -> None:
        self._table.clear()
        self._stages.clear()
        self._own = _Own(itertools.count())
        for spare in self._spare:
            spare.clear()


def _at_once(
    function: Callable[..., ort.InferenceSession], arguments: Iterable[tuple[Any, ...]], threads: int
) -> list[ort.InferenceSession]:
    """What the function makes of each, in order. Raises what it raised for the first of those that it raised for."""
    with ThreadPoolExecutor(threads, thread_name_prefix="open") as pool:
        return list(pool.map(lambda each: function(*each), arguments))


def _rows(tensor: Tensor) -> Bytes:
    """(B, ...) -> (B, bytes of one row), the same memory."""
    return tensor.reshape(len(tensor), -1).view(np.uint8)


def _copy(row: Bytes, place: Bytes) -> None:
    """Not by numpy, which lets go of the interpreter's lock to copy: where the event loop is busy, it takes longer to
    have the lock back than to copy, and a batch has many rows."""
    place.data[:] = row.data


def largest_batch_that_pays(gmacs: float) -> int:
    """Of a stage that takes so many multiply-adds an image. In batches of two an image takes no longer than in larger
    ones, to a hundredth (photo10, T2T-ViT-12; one alone up to 12 % longer), and from 4 on the caches overflow where a
    stage is large. What larger batches save is their way to the thread and back, some tenths of a millisecond: so they
    hold what a core does in 20 ms. Where the bundle has a profile of the machine, the server goes by that."""
    return next((size for size in (2, 4, 8) if size * gmacs >= BATCH_GMACS), 16)


def sessions_that_pay(graphs_bytes: int, threads: int) -> int:
    """How often the graphs, of so many bytes together, are opened. Of a session that several threads run, one finds the
    memory of its activations in the other's cache: by chance, from one start of a server to the next, an image takes up
    to a quarter longer. With a session each it never does. Each has its own weights, so there is an end to it."""
    return max(1, min(threads, SESSIONS_BYTES // max(graphs_bytes, 1)))


def own_gmacs(stage_gmacs: Sequence[float]) -> list[float]:
    """Of each stage, from those up to its exit."""
    return [up_to - before for up_to, before in zip(stage_gmacs, (0.0, *stage_gmacs), strict=False)]


def cpu_model() -> str:
    """The model's name as Linux tells it, elsewhere what Python knows; at least the architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def refuse_bfloat16(bundle: Bundle) -> None:
    """Raises BundleError for what ONNX Runtime has no kernels for on CPUs, nor numpy a type."""
    for stage in bundle.manifest.stages:
        if any(spec.dtype == "bfloat16" for spec in (*stage.inputs.values(), *stage.outputs.values())):
            raise BundleError(
                f"{bundle.path}: is in bf16, which ONNX Runtime does not run on CPUs; "
                "run it on a GPU, or export it again with --precision fp32"
            )


def open_session(graph: Path | bytes) -> ort.InferenceSession:
    """A graph, from a file or in memory, with the options that the engine runs it with.

    Raises the runtime's own exceptions, which have no common base but Exception.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the calling thread alone: the runtime starts none that could spin
    options.inter_op_num_threads = 1
    # Patterns plan memory per input shape, and batches come in every size. The arena stays: without patterns it stops
    # growing once the largest batch has run, and it is no slower than malloc.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return ort.InferenceSession(
        graph,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],  # its fused kernel is 10-20 % slower on CPU
    )


def _identity(file: Path) -> tuple[int, int, int] | None:
    """Another one for a file that was replaced or written to; None where there is none."""
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _open(file: Path, spec: StageSpec) -> ort.InferenceSession:
    try:
        str(file).encode()
        session = open_session(file)
    except UnicodeEncodeError:
        raise BundleError(f"{file}: the path is not UTF-8, and ONNX Runtime takes no other") from None
    except Exception as error:
        raise BundleError(f"{file}: cannot be loaded by ONNX Runtime: {error}") from error
    _compare(file, "input", spec.inputs, session.get_inputs(), all_named=True)
    _compare(file, "output", spec.outputs, session.get_outputs(), all_named=False)
    return session


def _open_again(stage: _Stage) -> ort.InferenceSession:
    session = _open(stage.file, stage.spec)
    if _identity(stage.file) != stage.opened:
        raise BundleError(f"{stage.file}: was replaced while the server started; start it again")
    return session


def _compare(
    file: Path, what: str, specs: Mapping[str, TensorSpec], found: Sequence[ort.NodeArg], *, all_named: bool
) -> None:
    """Check tensors of the graph against the manifest; `all_named`: it must name every tensor of the graph."""
    by_name = {tensor.name: tensor for tensor in found}
    if missing := specs.keys() - by_name.keys():
        raise BundleError(f"{file}: has no {what} `{min(missing)}`, the manifest names one")
    if all_named and (extra := by_name.keys() - specs.keys()):
        raise BundleError(f"{file}: has an {what} `{min(extra)}` that the manifest does not name")
    for name, spec in specs.items():
        tensor = by_name[name]
        if tensor.type != DTYPES.get(spec.dtype) or not _same_shape(spec.shape, tensor.shape):
            manifest = f"{spec.dtype} {list(spec.shape)}"
            raise BundleError(f"{file}: {what} `{name}` is {tensor.type} {tensor.shape}, the manifest says {manifest}")


def _same_shape(manifest: Sequence[int | str], graph: Sequence[int | str | None]) -> bool:
    """A size that varies must vary in the graph; a fixed one may be unknown there, where its inference gave up."""
    return len(manifest) == len(graph) and all(
        not isinstance(there, int) or there == here for here, there in zip(manifest, graph, strict=True)
    )


def _zeros(spec: TensorSpec, rows: int) -> Tensor:
    return np.zeros([rows if isinstance(size, str) else size for size in spec.shape], spec.dtype)
