"""Ray Serve: a proxy, replicas as actors, @serve.batch within each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import COMMON, Peer, Task


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    del task, folder, port
    return [peer.python, peer.servers / "serve.py"]


PEER = Peer(
    name="ray",
    requirements=("ray[serve]==2.60.0", *COMMON, "numpy==2.4.6"),
    command=command,
    path="/",
    variables={"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    about=(
        "Full model: one deployment, a replica a core, `@serve.batch`. Cascade: a composition of deployments, an "
        "ingress that decodes and one for each stage, a replica a core each, every one with its own `@serve.batch`: "
        "so survivors of one batch do meet those of others, but only within a replica. The state between stages "
        "travels with the requests. No dashboard; `max_ongoing_requests` is no limit, so that the batcher's queue is "
        "where requests wait."
    ),
)
