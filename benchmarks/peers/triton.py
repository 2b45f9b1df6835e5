"""NVIDIA Triton Inference Server: the server binary and its Python backend, as the wheel of PyTriton brings them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import COMMON, SERVERS, Answer, Peer, Task, answer_in, free_port
from server.bundle.manifest import MANIFEST

_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    """Its models are folders with a configuration each."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    wheel = peer.environment / "lib" / python / "site-packages" / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(wheel / "backends", backends)
    stub = wheel / "python_backend_stubs" / python.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    models = folder / "models"
    files = [("image", "TYPE_STRING", [1])]
    answers = [("answer", "TYPE_STRING", [1])]
    queue = {
        "timeout_action": "REJECT",
        "default_timeout_microseconds": round(1e6 * task.timeout_s),
        "max_queue_size": 0,
    }
    batching: dict[str, Any] = {"max_queue_delay_microseconds": round(1000 * task.window_ms)}
    first = {**batching, "default_queue_policy": queue}
    _model(models, peer, "classify", "classify" if task.mode == "full" else "cascade", task, files, answers, first)
    loads = ["classify"]
    stages = json.loads((task.bundle / MANIFEST).read_text())["stages"] if task.mode == "cascade" else []
    for number, stage in enumerate(stages, start=1):
        outputs = [entry for entry in _tensors(stage["outputs"]) if entry[0] != "logits"]
        loads.append(f"stage{number}")
        _model(models, peer, loads[-1], "stage", task, _tensors(stage["inputs"]), outputs, batching)
    libraries = wheel.parent.parent / "nvidia_pytriton.libs"
    return [
        *("env", f"LD_LIBRARY_PATH={libraries}"),
        wheel / "bin" / "tritonserver",
        *("--model-repository", models, "--backend-directory", backends),
        *("--http-address", "127.0.0.1", "--http-port", str(port), "--allow-grpc", "false"),
        *("--metrics-port", str(free_port()), "--model-control-mode", "explicit"),
        *(f"--load-model={name}" for name in loads),
    ]


def read(body: bytes) -> Answer:
    """The answer's header is JSON; where it asks for binary data these follow, with their length in front."""
    header, _, data = body.partition(b"}]}")
    del header
    return answer_in(data[4:].decode())


def _tensors(specs: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
    return [(name, _TYPES[spec["dtype"]], spec["shape"][1:] or [1]) for name, spec in specs.items()]


def _model(
    models: Path,
    peer: Peer,
    name: str,
    kind: str,
    task: Task,
    inputs: Iterable[tuple[str, str, list[int]]],
    outputs: Iterable[tuple[str, str, list[int]]],
    batching: dict[str, Any],
) -> None:
    (models / name / "1").mkdir(parents=True)
    for file in (peer.servers / kind / "model.py", SERVERS / "cascade.py"):  # PYTHONPATH does not reach the backend
        shutil.copy(file, models / name / "1")
    config = {
        "name": name,
        "backend": "python",
        "max_batch_size": task.batch,
        "input": [{"name": n, "data_type": t, "dims": d} for n, t, d in inputs],
        "output": [{"name": n, "data_type": t, "dims": d} for n, t, d in outputs],
        "instance_group": [{"count": task.workers, "kind": "KIND_CPU"}],
        "dynamic_batching": batching,
    }
    (models / name / "config.pbtxt").write_text(protobuf_text(config))


def protobuf_text(message: dict[str, Any], indent: str = "") -> str:
    """As Triton reads its configurations. Words in capitals are names of constants."""
    lines = []
    for key, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                lines.append(f"{indent}{key} {{\n{protobuf_text(item, indent + '  ')}{indent}}}\n")
            else:
                constant = isinstance(item, str) and item.isupper()
                lines.append(f"{indent}{key}: {item if constant else json.dumps(item)}\n")
    return "".join(lines)


PEER = Peer(
    name="triton",
    requirements=("nvidia-pytriton==0.7.0", *COMMON, "numpy==1.26.4"),
    command=command,
    path="/v2/models/classify/infer",
    headers={"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"},
    read=read,
    about=(
        "Triton 2.51's own binary and Python backend, without ONNX Runtime's backend, which is in no wheel: the "
        "stages run in the Python backend, an instance a core. Images are posted as they are (a raw binary request). "
        "Dynamic batching, a queue policy that rejects who has waited for the deadline. Cascade: business logic "
        "scripting as documented, an asynchronous model that calls a model for each stage, all of them batched by "
        "Triton. State goes through shared memory between processes; a request's answer waits for those of its first "
        "batch."
    ),
)
