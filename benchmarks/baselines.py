"""What the server's policy is compared with. Every baseline runs on the server's own scheduler.

A contender turns a setup into the setup and the policy it runs with: some need other thresholds or another cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.virtual import Setup
from server.bundle.frontier import NEVER, Records
from server.bundle.profile import LatencyProfile
from server.cascade.scheduler import Policy, StageView, deepest_first

Contender = Callable[[Setup], tuple[Setup, Policy]]


def shallow_first(views: Sequence[StageView], now: float) -> int | None:
    """New images before survivors: the deeper stages starve under load."""
    del now
    return next((stage for stage, view in enumerate(views, start=1) if view.ready), None)


def largest_queue_first(views: Sequence[StageView], now: float) -> int | None:
    """The stage where the most wait; of equals the deepest."""
    del now
    stages = [(view.waiting, stage) for stage, view in enumerate(views, start=1) if view.ready]
    return max(stages)[1] if stages else None


class FixedDelay:
    """A first-stage batch starts once it is full or its head has waited `delay_s`; survivors run at once, the deepest
    first. What dynamic batching of most servers does."""

    def __init__(self, delay_s: float, full: int) -> None:
        self._delay_s, self._full = delay_s, full
        self._wake = math.inf

    def __call__(self, views: Sequence[StageView], now: float) -> int | None:
        self._wake = math.inf
        stage = deepest_first(views, now)
        if stage != 1 or views[0].ready >= self._full or now >= views[0].since + self._delay_s:
            return stage
        self._wake = views[0].since + self._delay_s
        return None

    def wake(self, now: float) -> float:
        """When to ask again, where nothing else happens before. A head that has gone meanwhile is not waited for."""
        return self._wake if self._wake > now else math.inf


def compacted(setup: Setup) -> tuple[Setup, Policy]:
    """A batch runs to completion without those that have left it."""
    return setup, deepest_first


def padded(setup: Setup) -> tuple[Setup, Policy]:
    """A batch runs to completion in its first size, as where batches cannot be formed anew. Who leaves is answered at
    once, and stages that none of a batch reaches are spared: padding at its best. One executor."""
    if setup.executors != 1:
        raise ValueError("the padded baseline runs on one executor")
    return replace(setup, padded=True), deepest_first


def no_exit(setup: Setup) -> tuple[Setup, Policy]:
    """All stages for all images."""
    never = (NEVER,) * (len(setup.thresholds) - 1)
    return replace(setup, thresholds=(*never, 0.0)), deepest_first


def static(setup: Setup) -> tuple[Setup, Policy]:
    """A model without exits that costs what the last stage alone costs, and is as often right."""
    records = Records(np.empty((0, setup.records.correct.shape[1]), np.float32), setup.records.correct[-1:])
    profile = LatencyProfile(setup.profile.stages[-1:])
    sizes = setup.max_batch_sizes[-1:]
    return replace(setup, profile=profile, records=records, thresholds=(0.0,), max_batch_sizes=sizes), deepest_first


def fixed_delay(share: float) -> Contender:
    """A delay of this share of the deadline."""

    def contender(setup: Setup) -> tuple[Setup, Policy]:
        return setup, FixedDelay(share * setup.deadline_s, setup.max_batch_sizes[0])

    return contender


def by_policy(policy: Policy) -> Contender:
    return lambda setup: (setup, policy)


DELAYS = (0.02, 0.05, 0.1, 0.2)  # shares of the deadline that are tried

BASELINES: dict[str, Contender] = {
    "compacted": compacted,
    "padded": padded,
    "largest queue": by_policy(largest_queue_first),
    "shallow first": by_policy(shallow_first),
    "no exit": no_exit,
}
"""Ways to serve the same cascade; so is `fixed_delay`, at the best of DELAYS."""
