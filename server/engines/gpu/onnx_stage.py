"""Stages by ONNX Runtime's CUDA provider, bound to the runtime's addresses, on its streams.

What it enqueues is not recorded into graphs: its own recording wants streams and memory of its own. A session has one
stream for all its runs, so there is one session a stream, with weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from server.bundle.manifest import Bundle, StageSpec
from server.errors import BundleError, EngineUnavailable

RUNTIME = f"onnxruntime {ort.__version__}"
PROVIDER = "CUDAExecutionProvider"
DTYPES = {"uint8": np.uint8, "float16": np.float16, "float32": np.float32}  # of a manifest


def load(bundle: Bundle, batch_sizes: Sequence[Sequence[int]]) -> list[OnnxStage]:
    """All stages of a bundle, each for its batch sizes. Raises EngineUnavailable where the provider is not there, and
    BundleError."""
    if PROVIDER not in ort.get_available_providers():
        raise EngineUnavailable(
            f"the engine onnx-cuda needs ONNX Runtime for CUDA, onnxruntime {ort.__version__} is for CPUs: "
            "pip uninstall onnxruntime, then pip install 'dvt-serve[gpu-ort]'"
        )
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN from the wheels that are installed beside it
        ort.preload_dlls()
    return [
        OnnxStage(bundle.stage_path(number), spec, sizes)
        for number, (spec, sizes) in enumerate(zip(bundle.manifest.stages, batch_sizes, strict=True), start=1)
    ]


class OnnxStage:
    """See `stage.Stage`."""

    def __init__(self, file: Path, spec: StageSpec, batch_sizes: Sequence[int]) -> None:
        self.inputs, self.outputs, self.batch_sizes = spec.inputs, spec.outputs, tuple(batch_sizes)
        for name, tensor in {**spec.inputs, **spec.outputs}.items():
            if tensor.dtype not in DTYPES:
                raise BundleError(f"{file}: `{name}` is of {tensor.dtype}; known here are {', '.join(DTYPES)}")
        self._file = file
        self._sessions: dict[int, ort.InferenceSession] = {}  # by stream

    def arena_bytes(self, batch_size: int) -> int:  # noqa: ARG002
        return 0  # it has an allocator of its own

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> OnnxContext:  # noqa: ARG002
        if stream not in self._sessions:
            self._sessions[stream] = _open(self._file, stream)
        session = self._sessions[stream]
        binding = session.io_binding()
        for name, address in addresses.items():
            spec = self.inputs.get(name) or self.outputs[name]
            bind = binding.bind_input if name in self.inputs else binding.bind_output
            shape = [batch_size, *(int(size) for size in spec.shape[1:])]
            bind(name, "cuda", 0, DTYPES[spec.dtype], shape, address)
        return OnnxContext(session, binding)

    def close(self) -> None:
        self._sessions.clear()


class OnnxContext:
    """See `stage.Context`."""

    capturable = False

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        self._session, self._binding = session, binding
        self._options = ort.RunOptions()
        # The runtime waits by an event of its own, for everything that it has put on the stream.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def close(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()


def _open(file: Path, stream: int) -> ort.InferenceSession:
    """Raises EngineUnavailable where it would run on the CPU: the library falls back to it without a word."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    cuda = {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "has_user_compute_stream": "1",
        "use_tf32": "0",
    }
    try:
        session = ort.InferenceSession(file, options, providers=[(PROVIDER, cuda)])
    except Exception as error:
        raise BundleError(f"{file}: cannot be loaded by ONNX Runtime: {error}") from error
    if session.get_providers()[0] != PROVIDER:
        raise EngineUnavailable(
            "the engine onnx-cuda cannot use the GPU: ONNX Runtime fell back to the CPU; are CUDA 13 and cuDNN 9 here?"
        )
    session.disable_fallback()
    return session
