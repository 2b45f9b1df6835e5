"""MLServer: FastAPI in front, adaptive batching, a pool of inference processes."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import COMMON, Answer, Peer, Task, answer_in, free_port


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    """Its settings are files in a folder."""
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": task.workers,
    }
    model = {
        "name": "classify",
        "implementation": "classify.Classify",
        "max_batch_size": task.batch,
        "max_batch_time": task.window_ms / 1000,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    (folder / "classify.py").write_bytes((peer.servers / "classify.py").read_bytes())
    return [peer.environment / "bin" / "mlserver", "start", folder]


def body(jpeg: bytes) -> bytes:
    image = base64.b64encode(jpeg).decode()
    how = {"content_type": "base64"}
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": how, "data": [image]}
    return json.dumps({"inputs": [tensor]}).encode()


def read(body: bytes) -> Answer:
    return answer_in(json.loads(body)["outputs"][0]["data"][0])


PEER = Peer(
    name="mlserver",
    requirements=("mlserver==1.7.1", "uvloop==0.21.0", *COMMON, "numpy==2.4.6"),
    command=command,
    path="/v2/models/classify/infer",
    headers={"Content-Type": "application/json"},
    body=body,
    read=read,
    about=(
        "Version 1.7.1 starts no inference processes with uvloop 0.22 and later, so that is pinned below. A custom "
        "runtime with `max_batch_size` and `max_batch_time`, `parallel_workers` one a core, `debug` off. Images come "
        "as base64 by the content type of that name, answers as JSON in a BYTES tensor, by the Open Inference "
        "Protocol. It knows no timeouts. A bad image is answered with 200 and an error inside, as a batch has one "
        "answer. Cascade: within the batch, which shrinks."
    ),
)
