"""Stands in for the module `tensorrt`: the same names, no GPU, and a judge of every move.

A graph is a JSON document of tensors, and so is a plan. What TensorRT would leave undefined is refused here: wrong
order, missing addresses, memory that is too small or not aligned. Like TensorRT, it logs why and returns False or None.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

MAGIC = b"fake plan "
ALIGNMENT = 256


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class DataType(IntEnum):
    FLOAT, HALF, UINT8, BF16 = range(4)
    __str__ = Enum.__str__


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


TYPES = {"uint8": DataType.UINT8, "float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16}


def graph(inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> bytes:
    """A stage's file, of tensors as ["float16", "B", 4]."""
    return json.dumps({"inputs": inputs, "outputs": outputs}).encode()


class Memory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class FakeTensorRT:
    """The module. Keyword arguments are what it is to do otherwise."""

    __name__ = "tensorrt"
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
    MemoryPoolType = MemoryPoolType
    DataType = DataType
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger
    IProgressMonitor = IProgressMonitor

    def __init__(
        self,
        version: str = "11.4.0.106",
        gpu: str = "sm90",
        *,
        name: str = "tensorrt",
        refuse: Iterable[str] = (),
        arena: int = 1000,
        building: Callable[[], None] = lambda: None,
        endless: bool = False,
        padding: int = 0,
    ) -> None:
        self.__name__ = name
        self.__version__, self.gpu = version, gpu
        self.refuse = set(refuse)  # calls that fail, by name
        self.arena = arena  # bytes for each row
        self.building = building  # called in the middle of a build
        self.endless = endless  # a build ends only by being told to, or after ten seconds
        self.padding = padding  # bytes that a plan has for nothing
        self.builds: list[SimpleNamespace] = []
        self.contexts: list[Context] = []
        self.runs: list[tuple[int, int]] = []  # rows, stream
        self.Builder = lambda logger: Builder(self, logger)
        self.OnnxParser = Parser
        self.Runtime = lambda logger: Runtime(self, logger)


class Network:
    def __init__(self) -> None:
        self.inputs: list[SimpleNamespace] = []
        self.outputs: list[SimpleNamespace] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> SimpleNamespace:
        return self.inputs[index]

    def get_output(self, index: int) -> SimpleNamespace:
        return self.outputs[index]

    def unmark_output(self, tensor: SimpleNamespace) -> None:
        self.outputs.remove(tensor)


class Parser:
    num_errors = 0

    def __init__(self, network: Network, logger: Any) -> None:
        self.network, self.logger = network, logger

    def parse(self, model: bytes) -> bool:
        try:
            document = json.loads(model)
            for name in ("inputs", "outputs"):
                for tensor, (dtype, *shape) in document[name].items():
                    sizes = tuple(-1 if isinstance(size, str) else size for size in shape)
                    getattr(self.network, name).append(SimpleNamespace(name=tensor, dtype=TYPES[dtype], shape=sizes))
        except (ValueError, KeyError, TypeError):
            self.num_errors = 1
            self.logger.log(Severity.ERROR, "no graph")
            return False
        return True

    def get_error(self, index: int) -> Any:
        assert index == 0
        return SimpleNamespace(
            desc=lambda: "Failed to parse\nthe model.", node_name=lambda: "", node_operator=lambda: ""
        )


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.shapes[input] = (min, opt, max)


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> Memory:
        return Memory(self.content)


class Config:
    builder_optimization_level, max_aux_streams, progress_monitor = 3, 2, None

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.profiles: list[Profile] = []
        self.workspace: int | None = None
        self.timings: TimingCache | None = None

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return -1 if "add_optimization_profile" in self.trt.refuse else len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool == MemoryPoolType.WORKSPACE
        self.workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        return None if serialized_timing_cache == b"junk" else TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and not cache.content.startswith(b"timings"):
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timings


class Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Network | None:
        if flags != 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            self.logger.log(Severity.ERROR, "not strongly typed")
            return None
        return Network()

    def create_builder_config(self) -> Config:
        return Config(self.trt)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> Memory | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing", "Building engine", 2)
        assert monitor.step_complete("Timing", 0)
        self.trt.building()
        until = time.monotonic() + 10
        while self.trt.endless and monitor.step_complete("Timing", 0) and time.monotonic() < until:
            pass
        if not monitor.step_complete("Timing", 1):
            self.logger.log(Severity.ERROR, "Cancelled")
            return None
        monitor.phase_finish("Timing")
        monitor.step_complete("Building engine", 0)
        monitor.phase_finish("Building engine")
        if "build_serialized_network" in self.trt.refuse:
            self.logger.log(Severity.WARNING, "This may take long")
            self.logger.log(Severity.ERROR, "Could not find any implementation\nfor node {attention}")
            return None
        for profile in config.profiles:
            assert profile.shapes.keys() == {tensor.name for tensor in network.inputs}
        self.trt.builds.append(SimpleNamespace(config=config, network=network))
        assert config.timings is not None
        config.timings.content += b" measured" if config.timings.content else b"timings"
        modes = (("inputs", network.inputs), ("outputs", network.outputs))
        plan = {
            "version": self.trt.__version__,
            "gpu": self.trt.gpu,
            **{mode: {t.name: [int(t.dtype), *t.shape] for t in tensors} for mode, tensors in modes},
            "profiles": [profile.shapes for profile in config.profiles],
            "arena": self.trt.arena,
        }
        return Memory(MAGIC + json.dumps(plan).encode() + b" " * self.trt.padding)


class Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        if not serialized_engine.startswith(MAGIC):
            self.logger.log(Severity.ERROR, "Magic tag does not match")
            return None
        plan = json.loads(serialized_engine[len(MAGIC) :])
        for what, here in (("version", self.trt.__version__), ("gpu", self.trt.gpu)):
            if plan[what] != here:
                self.logger.log(Severity.ERROR, f"The engine plan file is of another {what}: {plan[what]}")
                return None
        return Engine(self.trt, self.logger, plan)


class Engine:
    def __init__(self, trt: FakeTensorRT, logger: Any, plan: dict[str, Any]) -> None:
        self.trt, self.logger, self.plan = trt, logger, plan
        self.tensors = {
            name: (mode, *spec)
            for mode, tensors in ((TensorIOMode.INPUT, "inputs"), (TensorIOMode.OUTPUT, "outputs"))
            for name, spec in plan[tensors].items()
        }

    num_io_tensors = property(lambda self: len(self.tensors))
    num_optimization_profiles = property(lambda self: len(self.plan["profiles"]))

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name][1])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][2:])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profiles"][profile_index][name]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        rows: int = self.plan["profiles"][profile_index]["image"][2][0]
        return rows * int(self.plan["arena"])

    def create_execution_context(self, strategy: Any) -> Context | None:
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        if "create_execution_context" in self.trt.refuse:
            self.logger.log(Severity.ERROR, "out of memory")
            return None
        context = Context(self)
        self.trt.contexts.append(context)
        return context


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.profile_stream = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def _no(self, why: str) -> bool:
        self.engine.logger.log(Severity.ERROR, why)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if "set_optimization_profile_async" in self.engine.trt.refuse:
            return self._no("profile refused")
        if self.profile is not None:
            return self._no("a profile was set before")
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._no("no such profile")
        self.profile, self.profile_stream = profile_index, stream_handle
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None:
            return self._no("no profile was set")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return self._no(f"{shape} is outside the profile")
        self.shapes[name] = shape
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors or "set_tensor_address" in self.engine.trt.refuse:
            return self._no(f"no tensor {name}")
        self.addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [
            name
            for name, spec in self.engine.tensors.items()
            if spec[0] == TensorIOMode.INPUT and name not in self.shapes
        ]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.profile is None or stream_handle != self.profile_stream:
            return self._no("the profile was set on another stream, or not at all")
        if self.infer_shapes():
            return self._no("shapes are missing")
        if missing := sorted(self.engine.tensors.keys() - self.addresses.keys()):
            return self._no(f"no address for {missing}")
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        address, size = self.memory or (0, 0)
        if needed and (address == 0 or size < needed):
            return self._no(f"{size} bytes of device memory, {needed} are needed")
        if wrong := [a for a in (address, *self.addresses.values()) if a % ALIGNMENT]:
            return self._no(f"not aligned: {wrong}")
        if stream_handle == 0:
            return self._no("the default stream")
        if "execute_async_v3" in self.engine.trt.refuse:
            return self._no("CUDA error 700:\nan illegal memory access was encountered")
        self.engine.trt.runs.append((self.shapes["image"][0], stream_handle))
        return True
