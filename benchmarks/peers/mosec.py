"""mosec: a Rust front with dynamic batching, Python workers behind a socket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import COMMON, Peer, Task


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    del folder
    timeout = ["--timeout", str(round(1000 * task.timeout_s))]
    return [peer.python, peer.servers / "serve.py", "--port", str(port), "--address", "127.0.0.1", *timeout]


PEER = Peer(
    name="mosec",
    requirements=("mosec==0.9.8", *COMMON, "numpy==2.4.6"),
    command=command,
    path="/inference",
    about=(
        "One worker class, a process a core, `max_batch_size` and `max_wait_time` of the server's own batching. What "
        "is raised in `deserialize` or `forward` fails the whole batch, so a bad image is answered with 200 and an "
        "error inside. Cascade: within the worker's batch, which shrinks; a pipeline of workers cannot let a request "
        "leave early."
    ),
)
