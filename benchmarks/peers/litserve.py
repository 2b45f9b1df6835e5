"""LitServe: FastAPI in front, worker processes behind a ZeroMQ queue."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import COMMON, Peer, Task


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    del task, folder, port
    return [peer.python, peer.servers / "serve.py"]


def body(jpeg: bytes) -> bytes:
    return b'{"image": "' + base64.b64encode(jpeg) + b'"}'


PEER = Peer(
    name="litserve",
    requirements=("litserve==0.2.19", *COMMON, "numpy==2.4.6"),
    command=command,
    path="/predict",
    headers={"Content-Type": "application/json"},
    body=body,
    about=(
        "A `LitAPI` with `max_batch_size` and `batch_timeout`, a worker a core, `fast_queue` (ZeroMQ), one API server. "
        "It takes JSON or forms but no plain bytes, so images come as base64, as in its documentation. An exception in "
        "`decode_request` fails the whole batch, so a bad image is kept as a value until `encode_response`. Cascade: "
        "within the worker's batch, which shrinks."
    ),
)
