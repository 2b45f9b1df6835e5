"""BentoML: Starlette workers, each with an adaptive dispatcher of its own."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import COMMON, Answer, Peer, Task, plain_answer


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    del task, folder
    serve = ["serve", "classify:Classify", "--working-dir", peer.servers]
    return [peer.environment / "bin" / "bentoml", *serve, "--host", "127.0.0.1", "--port", str(port)]


def body(jpeg: bytes) -> bytes:
    return b'{"images": ["' + base64.b64encode(jpeg) + b'"]}'


def read(body: bytes) -> Answer:
    return plain_answer(json.dumps(json.loads(body)[0]).encode())


PEER = Peer(
    name="bentoml",
    requirements=("bentoml==1.4.40", *COMMON, "numpy==2.4.6"),
    command=command,
    path="/classify",
    headers={"Content-Type": "application/json"},
    body=body,
    read=read,
    variables={"BENTOML_DO_NOT_TRACK": "True"},
    about=(
        "A `batchable` API with `max_batch_size`, a worker a core, access log off. `max_latency_ms` is the patience, "
        "as a dispatcher answers 503 where it expects to exceed it. Images come as base64 in JSON: a batchable API "
        "takes a list. One request cannot fail alone in a batch: a bad image is answered with 200 and an error "
        "inside. Its window is its own affair: the dispatcher learns it. Cascade: within the batch, which shrinks."
    ),
)
