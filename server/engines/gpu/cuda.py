"""The first CUDA device, through NVIDIA's own bindings. Nobody else here calls CUDA, but torch and the other libraries
that run stages: they share this device's primary context.

Runtime API, but for the launch of kernels, which the bindings offer in the driver API alone. Every return code is
looked at. All calls let other Python threads run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc, runtime

from server.engines.gpu.device import CaptureFailed, DeviceError, Host, OutOfDeviceMemory

# A row is moved in the widest words that divide it; all tensors begin at multiples of 256 bytes, so words are aligned.
# One block of threads takes a part of one row: blockIdx.y is the row, as many blocks of x as the row is long.
KERNELS = r"""
template <typename Word>
__device__ void move(Word* to, const Word* from, long long words) {
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; at < words; at += stride) {
    to[at] = from[at];
  }
}

#define ROWS(NAME, WORD)                                                                              \
  extern "C" __global__ void gather_##NAME(const WORD* store, const int* rows, WORD* batch,          \
                                           long long words) {                                         \
    move(batch + blockIdx.y * words, store + rows[blockIdx.y] * words, words);                        \
  }                                                                                                   \
  extern "C" __global__ void scatter_##NAME(const WORD* batch, const int* rows, WORD* store,         \
                                            long long words) {                                        \
    const int row = rows[blockIdx.y];                                                                 \
    if (row >= 0) move(store + row * words, batch + blockIdx.y * words, words);                       \
  }

ROWS(16, uint4)
ROWS(4, unsigned int)
ROWS(1, unsigned char)

extern "C" __global__ void decide(const float* confidence, const double* thresholds, const int* reserved,
                                  int* rows, unsigned char* survives, int size) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= size) return;
  const bool goes_on = static_cast<double>(confidence[at]) < thresholds[at];
  survives[at] = goes_on;
  rows[at] = goes_on ? reserved[at] : -1;
}
"""
WORDS = (16, 4, 1)  # bytes
THREADS = 256
PER_THREAD = 4  # words, about

_POINTERS_AND_LENGTH = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong)
_DECIDE = (*[ctypes.c_void_p] * 5, ctypes.c_int)


class CudaDevice:
    """See `device.Device`. Raises DeviceError where there is no device, or no driver for it."""

    def __init__(self) -> None:
        try:
            (count,) = _call(runtime.cudaGetDeviceCount)
        except Exception as error:  # the bindings raise errors of their own where a library is missing
            raise DeviceError(f"no CUDA device: {error}") from None
        if not count:
            raise DeviceError("no CUDA device")
        self.attach()
        _call(runtime.cudaFree, 0)  # makes the primary context, which the driver API then finds
        (properties,) = _call(runtime.cudaGetDeviceProperties, 0)
        self.name = properties.name.split(b"\0")[0].decode()
        self.capability = (int(properties.major), int(properties.minor))
        (of_runtime,), (of_driver,) = _call(runtime.cudaRuntimeGetVersion), _call(runtime.cudaDriverGetVersion)
        self.version = f"CUDA {_dotted(of_runtime)}, driver {_dotted(of_driver)}"
        try:
            binary = compile_kernels(self.capability)
        except DeviceError:
            raise
        except Exception as error:
            raise DeviceError(f"NVRTC cannot be loaded: {error}") from None
        (self._module,) = _call(driver.cuModuleLoadData, binary)
        self._kernels = {
            name: _call(driver.cuModuleGetFunction, self._module, name.encode())[0]
            for name in ("decide", *(f"{what}_{word}" for what in ("gather", "scatter") for word in WORDS))
        }

    def attach(self) -> None:
        _call(runtime.cudaSetDevice, 0)

    def free_memory(self) -> int:
        free, _ = _call(runtime.cudaMemGetInfo)
        return int(free)

    def allocate(self, size: int) -> int:
        (address,) = _call(runtime.cudaMalloc, size)
        return int(address)

    def free(self, address: int) -> None:
        _call(runtime.cudaFree, address)

    def pin(self, size: int) -> Host:
        (address,) = _call(runtime.cudaHostAlloc, size, runtime.cudaHostAllocDefault)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def unpin(self, host: Host) -> None:
        _call(runtime.cudaFreeHost, host.ctypes.data)

    def stream(self) -> int:
        (stream,) = _call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        return int(stream)

    def destroy_stream(self, stream: int) -> None:
        _call(runtime.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        _call(runtime.cudaStreamSynchronize, stream)

    def event(self) -> int:
        flags = runtime.cudaEventBlockingSync | runtime.cudaEventDisableTiming
        (event,) = _call(runtime.cudaEventCreateWithFlags, flags)
        return int(event)

    def destroy_event(self, event: int) -> None:
        _call(runtime.cudaEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        _call(runtime.cudaEventRecord, event, stream)

    def wait(self, event: int) -> None:
        _call(runtime.cudaEventSynchronize, event)

    def copy_in(self, address: int, host: Host, size: int, stream: int) -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _call(runtime.cudaMemcpyAsync, address, host.ctypes.data, size, kind, stream)

    def copy_out(self, host: Host, address: int, size: int, stream: int) -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call(runtime.cudaMemcpyAsync, host.ctypes.data, address, size, kind, stream)

    def clear(self, address: int, size: int, stream: int) -> None:
        _call(runtime.cudaMemsetAsync, address, 0, size, stream)

    def gather(self, store: int, rows: int, batch: int, row_bytes: int, size: int, stream: int) -> None:
        self._move_rows("gather", store, rows, batch, row_bytes, size, stream)

    def scatter(self, batch: int, rows: int, store: int, row_bytes: int, size: int, stream: int) -> None:
        self._move_rows("scatter", batch, rows, store, row_bytes, size, stream)

    def decide(
        self, confidence: int, thresholds: int, reserved: int, rows: int, survives: int, size: int, stream: int
    ) -> None:
        values = (confidence, thresholds, reserved, rows, survives, size)
        self._launch("decide", -(-size // THREADS), 1, stream, values, _DECIDE)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        # Thread local: what other threads do meanwhile, as to allocate, spoils nothing here.
        _call(runtime.cudaStreamBeginCapture, stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        failed: BaseException | None = None
        try:
            work()
        except BaseException as error:
            failed = error
        code, graph = runtime.cudaStreamEndCapture(stream)
        ended = code == runtime.cudaError_t.cudaSuccess
        try:
            if failed is not None:
                if not isinstance(failed, Exception):
                    raise failed
                raise CaptureFailed(str(failed)) from failed
            try:
                _check("cudaStreamEndCapture", code)
                (executable,) = _call(runtime.cudaGraphInstantiate, graph, 0)
            except DeviceError as error:
                raise CaptureFailed(str(error)) from None
        finally:
            if ended and int(graph):
                runtime.cudaGraphDestroy(graph)
        _call(runtime.cudaGraphUpload, executable, stream)
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        _call(runtime.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        _call(runtime.cudaGraphExecDestroy, graph)

    def close(self) -> None:
        _call(driver.cuModuleUnload, self._module)

    def _move_rows(
        self, what: str, source: int, rows: int, target: int, row_bytes: int, size: int, stream: int
    ) -> None:
        word = next(word for word in WORDS if row_bytes % word == 0)
        words = row_bytes // word
        blocks = -(-words // (THREADS * PER_THREAD))
        self._launch(f"{what}_{word}", blocks, size, stream, (source, rows, target, words), _POINTERS_AND_LENGTH)

    def _launch(
        self, name: str, blocks_x: int, blocks_y: int, stream: int, values: tuple[int, ...], types: tuple[Any, ...]
    ) -> None:
        _call(
            driver.cuLaunchKernel,
            self._kernels[name],
            *(blocks_x, blocks_y, 1),
            *(THREADS, 1, 1),
            0,  # shared memory
            stream,
            (values, types),
            0,  # extra
        )


def compile_kernels(capability: tuple[int, int]) -> bytes:
    """KERNELS for a device, as machine code. Needs no device. Raises DeviceError."""
    architecture = 10 * capability[0] + capability[1]
    (known,) = _call(nvrtc.nvrtcGetSupportedArchs)
    if architecture not in known:
        raise DeviceError(f"NVRTC {_dotted_nvrtc()} knows no device of compute capability {capability}")
    (program,) = _call(nvrtc.nvrtcCreateProgram, KERNELS.encode(), b"rows.cu", 0, [], [])
    try:
        options = [b"--gpu-architecture=sm_%d" % architecture, b"--std=c++17"]
        try:
            _call(nvrtc.nvrtcCompileProgram, program, len(options), options)
        except DeviceError as error:
            (length,) = _call(nvrtc.nvrtcGetProgramLogSize, program)
            text = b" " * length
            _call(nvrtc.nvrtcGetProgramLog, program, text)
            raise DeviceError(f"{error}: {text.decode(errors='replace')}") from None
        (length,) = _call(nvrtc.nvrtcGetCUBINSize, program)
        binary: bytes = b" " * length
        _call(nvrtc.nvrtcGetCUBIN, program, binary)  # writes into it
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _dotted(version: int) -> str:
    """1000 * major + 10 * minor, as CUDA counts."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _dotted_nvrtc() -> str:
    return ".".join(map(str, _call(nvrtc.nvrtcVersion)))


def _call(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The values beside its return code. Raises OutOfDeviceMemory and DeviceError."""
    code, *values = function(*arguments)
    _check(function.__name__, code)
    return tuple(values)


def _check(name: str, code: Any) -> None:
    if int(code) == 0:
        return
    error = OutOfDeviceMemory if code == runtime.cudaError_t.cudaErrorMemoryAllocation else DeviceError
    raise error(f"{name}: {code.name}")
