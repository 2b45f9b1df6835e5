"""The server with one part exchanged, to be compared with the server as it is. Started by `harness.Server`.

    python -m benchmarks.serve_with BUNDLE --policy fixed-delay:5 --steady --sleep 5,5,5/1,2,4

--policy   server (what it would run), deepest-first, or fixed-delay:MS (a first-stage batch starts once it is full or
           its head has waited so long)
--steady   no controller acts: the thresholds stay, whatever the load
--sleep    in place of the model an engine that sleeps: milliseconds a batch and an image, by stage; the confidences are
           in the images (server.engines.fake)
"""

from __future__ import annotations

import argparse
import asyncio
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.baselines import FixedDelay
from server.app import create_app
from server.bundle.manifest import Bundle
from server.bundle.profile import LatencyProfile
from server.cascade.scheduler import Policy, deepest_first
from server.core import Engine, StageBatch, StageOutput
from server.engines import load_engine
from server.engines.fake import FakeEngine
from server.frontend import address, listener
from server.service import Service
from server.settings import read_settings

SLEEP_BATCH = 32  # largest batch of the engine that sleeps


class SleepEngine(FakeEngine):
    """Takes as long as a profile states, one batch at a time, and keeps no record."""

    def __init__(self, bundle: Bundle, profile: LatencyProfile) -> None:
        stages = len(profile.stages)
        super().__init__(
            num_stages=stages,
            num_classes=len(bundle.manifest.labels),
            input_size=bundle.preprocessing.crop,
            max_batch_sizes=(SLEEP_BATCH,) * stages,
        )
        self._profile = profile
        self._device = threading.Lock()

    def run(self, batch: StageBatch) -> StageOutput:
        with self._device:
            until = time.perf_counter() + self._profile.seconds(batch.stage, len(batch.pixels))
            output = super().run(batch)
            self.batches.clear()
            time.sleep(max(0.0, until - time.perf_counter()))
            return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--policy", default="server")
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("--sleep", type=sleeping)
    options = parser.parse_args()
    settings = read_settings({"port": 0})
    bundle = Bundle.load(options.bundle)
    engine: Engine = SleepEngine(bundle, options.sleep) if options.sleep else load_engine(bundle)
    app = create_app(settings, bundle, engine)
    service: Service = app.state.service
    if options.policy != "server":
        _exchange_policy(service, options.policy, engine.max_batch_sizes[0])
    if options.steady:
        service.budget.tick = lambda *_: None  # type: ignore[method-assign]
    with address.bind(settings) as socket:
        url = address.url_of(socket)
        listener.run(app, settings, socket, lambda: print(f"Listening on {url}", flush=True))


def sleeping(text: str) -> LatencyProfile:
    """`5,5,5/1,2,4`: milliseconds a batch and an image, by stage."""
    fixed, per_image = ([float(ms) / 1000 for ms in part.split(",")] for part in text.split("/"))
    return LatencyProfile.lines(fixed, per_image)


def _exchange_policy(service: Service, name: str, full: int) -> None:
    kind, _, delay_ms = name.partition(":")
    policy: Policy = deepest_first
    if kind == "fixed-delay":
        policy = FixedDelay(float(delay_ms) / 1000, full)
        _wake(service, policy)
    elif kind != "deepest-first":
        raise SystemExit(f"no policy {name!r}")
    learn = service.scheduler.learn
    service.scheduler.learn = lambda seconds, *_: learn(seconds, policy)  # type: ignore[method-assign]


def _wake(service: Service, policy: FixedDelay) -> None:
    """A policy that waits on purpose wants to be asked again, which the server's own never does."""
    batcher: Any = service.batcher
    step: Callable[[], None] = batcher._step

    def step_and_wake() -> None:
        step()
        at = policy.wake(service.clock())
        if at < math.inf:
            asyncio.get_running_loop().call_at(at, step)

    batcher._step = step_and_wake


if __name__ == "__main__":
    main()
