"""Which stage an idle device runs next: from what waits, and from what batches cost. Decides only, no clock, no I/O.

Theory of operation
-------------------
A batch of n images takes c_i(n) seconds at stage i, so a stage runs n / c_i(n) images a second, and more in larger
batches as long as a batch has a fixed cost. A batch is *ripe* at RIPE of the best that its stage can reach.

- While batches can hold all that comes, run to completion is best: the deepest stage that has work. Every image pays
  the fixed costs of one cycle through the stages, and one cycle takes in all that arrived during the one before.
- Once more waits at the first stage than its batches take, cycles no longer grow with the load: then capacity is what
  full batches give. Survivors wait until they are ripe, the deepest ripe stage runs, and if none is, the ripest. The
  switch is at BOUND of a full first-stage batch: halfway through a cycle that much has come of a next batch that fills.
  Where a full batch through every stage takes longer than requests may, there is no time to gather, and no need: what
  can still be answered in time fits into a batch.
- Survivors that are left to ripen are urgent, and go first, when their head could not make its deadline behind the
  other work. A head that cannot make it anyway is not.

It needs no rate and no mix of exits; it never idles while anything can run. Where large batches are hardly faster an
image than small ones, as on CPUs, every batch is ripe and both regimes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.cascade.scheduler import Seconds, StageView

RIPE = 0.95
BOUND = 0.5
SHARED = 0.8  # of the best speed: where an executor would else be idle, what that costs more is nobody's time


class DeepestRipe:
    """A scheduler's policy. Stages count from 1, times are monotonic seconds."""

    def __init__(self, seconds: Seconds, max_batch_sizes: Sequence[int]) -> None:
        """`seconds` is asked again for every urgency; how ripe a batch is, is worked out here and now: it does not
        change where a whole stage gets slower."""
        self._seconds = seconds
        self._sizes = tuple(max_batch_sizes)
        self._ripeness = [_ripeness(seconds, stage, size) for stage, size in enumerate(self._sizes, start=1)]

    def __call__(self, views: Sequence[StageView], now: float) -> int | None:
        able = [stage for stage in range(len(views), 0, -1) if views[stage - 1].ready]  # the deepest first
        if not able:
            return None
        if views[0].waiting <= BOUND * self._sizes[0] or self._cycle() > views[0].deadline - views[0].since:
            return able[0]
        ripeness = {stage: self._ripeness[stage - 1][views[stage - 1].ready] for stage in able}
        chosen = next((stage for stage in able if ripeness[stage] >= RIPE), max(able, key=ripeness.__getitem__))
        busy = self._seconds(chosen, views[chosen - 1].ready)
        return next((stage for stage in able if stage > chosen and self._urgent(views, stage, now, busy)), chosen)

    def ripe(self, stage: int, images: int) -> bool:
        return self._ripeness[stage - 1][images] >= RIPE

    @property
    def shares(self) -> list[int]:
        """By stage, the fewest images that are worth an executor that would else be idle."""
        return [next(n for n in range(1, len(speeds)) if speeds[n] >= SHARED) for speeds in self._ripeness]

    def _cycle(self) -> float:
        """Seconds of a full batch through every stage."""
        return sum(self._seconds(stage, size) for stage, size in enumerate(self._sizes, start=1))

    def _urgent(self, views: Sequence[StageView], stage: int, now: float, busy: float) -> bool:
        """Whether the stage's head makes its deadline now and not after `busy` seconds of other work."""
        ready = views[stage - 1].ready
        left = sum(
            self._seconds(later, min(ready, self._sizes[later - 1])) for later in range(stage, len(self._sizes) + 1)
        )
        return left <= views[stage - 1].deadline - now < left + busy


def _ripeness(seconds: Seconds, stage: int, size: int) -> list[float]:
    """By the number of images, from 0: the speed in such a batch over the best of all batches up to `size`."""
    costs = [seconds(stage, images) for images in range(1, size + 1)]
    if min(costs) <= 0:
        return [1.0] * (size + 1)
    speed = [0.0, *(images / s for images, s in enumerate(costs, start=1))]
    best = max(speed)
    return [one / best for one in speed]
