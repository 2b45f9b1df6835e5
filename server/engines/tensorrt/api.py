"""What is used of TensorRT's Python API, and nothing else: `tensorrt` 10.16 to 11.4 and `tensorrt_rtx` have all of it.

The module is handed in: `tensorrt`, `tensorrt_rtx`, in tests one that checks what it is told. Names are NVIDIA's own;
a test holds them, and the number of their arguments, against the real bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from server.errors import BundleError

MODULES = ("tensorrt", "tensorrt_rtx")
"""By preference."""

Shape = tuple[int, ...]


class IHostMemory(Protocol):
    nbytes: int  # and a buffer of so many bytes


class ITensor(Protocol):
    name: str
    dtype: Any
    shape: Iterable[int]  # -1: varies


class INetworkDefinition(Protocol):
    num_inputs: int
    num_outputs: int

    def get_input(self, index: int) -> ITensor: ...
    def get_output(self, index: int) -> ITensor: ...
    def unmark_output(self, tensor: ITensor) -> None: ...


class IOptimizationProfile(Protocol):
    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...


class ITimingCache(Protocol):
    def serialize(self) -> IHostMemory: ...


class IBuilderConfig(Protocol):
    builder_optimization_level: int
    max_aux_streams: int
    progress_monitor: Any
    num_compute_capabilities: int  # RTX only

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...
    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...  # RTX only


class Builder(Protocol):
    def create_network(self, flags: int) -> INetworkDefinition | None: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node_operator(self) -> str: ...
    def node_name(self) -> str: ...


class OnnxParser(Protocol):
    num_errors: int

    def parse(self, model: bytes) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class IExecutionContext(Protocol):
    """Beside these, `is_stream_capturable(stream)`, which only RTX has."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def infer_shapes(self) -> Sequence[str]: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    num_io_tensors: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Iterable[int]: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Iterable[int]]: ...
    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int: ...
    def create_execution_context(self, strategy: Any) -> IExecutionContext | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...


MakeBuilder = Callable[[Any], Builder]
MakeParser = Callable[[INetworkDefinition, Any], OnnxParser]
MakeRuntime = Callable[[Any], Runtime]


class TensorRT(Protocol):
    """The module."""

    __name__: str
    __version__: str
    ILogger: Any  # to derive from, as IProgressMonitor
    IProgressMonitor: Any
    Builder: MakeBuilder
    OnnxParser: MakeParser
    Runtime: MakeRuntime
    # Enumerations. Their members are told in ENUMERATED.
    NetworkDefinitionCreationFlag: Any
    MemoryPoolType: Any
    DataType: Any
    TensorIOMode: Any
    ExecutionContextAllocationStrategy: Any
    ComputeCapability: Any  # RTX only

    def __hash__(self) -> int: ...


ENUMERATED = {
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "MemoryPoolType": ("WORKSPACE",),
    "DataType": ("UINT8", "FLOAT", "HALF", "BF16"),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
}
RTX_ONLY = ("num_compute_capabilities", "set_compute_capability", "ComputeCapability")


def is_rtx(trt: TensorRT) -> bool:
    """Whether it is TensorRT for RTX: engines for a compute capability, built without a GPU and finished where they
    run. Of the API it only lacks timing caches."""
    return trt.__name__ == "tensorrt_rtx"


def import_tensorrt(name: str | None = None) -> TensorRT:
    """The module `name`, or the first of `MODULES` that is installed. Raises BundleError, in one line, and
    ModuleNotFoundError where there is none."""
    for module in (name,) if name else MODULES:
        try:
            return cast(TensorRT, import_module(module))
        except ModuleNotFoundError as error:
            if error.name != module:
                raise BundleError(f"{module} cannot be imported: {error}") from None
        except (ImportError, OSError, RuntimeError) as error:  # its libraries are missing, or of another machine
            first, *_ = str(error).splitlines() or [type(error).__name__]
            raise BundleError(f"{module} cannot be imported: {first}") from None
    missing = name or MODULES[0]
    raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
