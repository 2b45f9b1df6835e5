"""OpenVINO behind the face of an ONNX Runtime session, on one thread: another runtime's time on the same graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.verify import Tensors


class OpenVinoSession:
    """`hint`: f32, or bf16, which CPUs with such instructions multiply at twice the rate. Raises ImportError where
    OpenVINO is not installed; it is no dependency of ours."""

    def __init__(self, graph: Path, hint: str) -> None:
        import openvino

        properties = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        self._request: Any = openvino.Core().compile_model(graph, "CPU", properties).create_infer_request()

    def run(self, names: Sequence[str] | None, feeds: Tensors) -> list[Any]:
        """As ONNX Runtime's: copies of the outputs, all of them for None."""
        found = self._request.infer(feeds)
        return [found[name].copy() for name in names or [output.any_name for output in found]]
