"""Follows a store that many replicas share, and ends this replica's own budget when its time is over.

The one place of the budget that has a clock and tasks. A store is read, then watched from there; whatever goes wrong,
it is read again after a pause that grows to PAUSE_S and is drawn by lot, so that a fleet whose API server comes back
does not fall upon it at once. Requests are served by the last good budget meanwhile: nothing here is waited for, but at
the start, for FIRST_S.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from server.budget.controller import BudgetController, BudgetState, IfMatch, Source, Target
from server.budget.store import Held, PolicyStore, Refusal
from server.errors import StoreUnavailable

log = logging.getLogger(__name__)

FIRST_S = 5.0  # that a start waits for the store
FIRST_PAUSE_S, PAUSE_S = 0.2, 10.0  # the first pause at most, and the longest
BRIEF_S = 0.9  # a watch that ends sooner is none: it would be asked for again and again
EXPIRES_S, LONGEST_S = 600, 7 * 86400  # of a replica's own budget, where nobody says, and at most


class Counters(Protocol):
    def policy_error(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class FleetState:
    """`fleet` in the body of GET and PUT /budget."""

    store: str
    generation: int  # the version of what the store holds
    applied: int  # of the fleet's budget that is in force, or will be after this replica's own
    source: Source
    set_at: str | None  # when that was asked for
    expires_in_s: float | None  # of this replica's own budget
    synced_s_ago: float | None  # since the store was last heard of; None: never, or it is this server's alone
    error: str | None  # why it cannot be heard of
    refused: Refusal | None  # why what the store holds is not in force


class Fleet:
    def __init__(
        self,
        budget: BudgetController,
        store: PolicyStore,
        counters: Counters,
        clock: Callable[[], float],
        lot: Callable[[float, float], float] = random.uniform,
        first_s: float = FIRST_S,
    ) -> None:
        self._budget = budget
        self._store = store
        self._counters = counters
        self._clock = clock
        self._lot = lot
        self._first_s = first_s
        self._task: asyncio.Task[None] | None = None
        self._synced_at: float | None = None
        self._error: StoreUnavailable | None = None
        self._failures = 0  # since it was last followed for longer than a moment
        self._news = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self._expires_at = 0.0

    async def start(self) -> None:
        """Follow the store from now on. Waits a moment to have heard of it."""
        if not self._store.shared:
            return
        self._task = asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(self._first_s):
                while self._synced_at is None:
                    await self.news()
        except TimeoutError:
            log.warning("the fleet's budget is not known yet: this server begins with the %s one", self._budget.source)

    async def stop(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._store.disconnect()

    async def news(self) -> None:
        """Until the store is next heard of, or could not be."""
        await self._news.wait()

    def put_here(self, target: Target, hold: str, if_match: IfMatch, *, mix: bool, expires_s: float) -> BudgetState:
        """A budget of this replica's alone, for so long. Raises as BudgetController.put_here."""
        state = self._budget.put_here(target, hold, if_match, mix=mix)
        if self._expiry is not None:
            self._expiry.cancel()
        self._expires_at = self._clock() + expires_s
        self._expiry = asyncio.get_running_loop().call_later(expires_s, self._expire)
        return state

    def _expire(self) -> None:
        self._expiry = None
        self._budget.end_here()
        log.info("this server's own budget has ended: the fleet's is in force, version %d", self._budget.point.version)

    def state(self) -> FleetState:
        applied, policy = self._budget.fleet
        return FleetState(
            store=self._store.name,
            generation=self._budget.generation,
            applied=applied,
            source=self._budget.source,
            set_at=(policy.at or None) if policy is not None else None,
            expires_in_s=None if self._expiry is None else round(max(0.0, self._expires_at - self._clock()), 1),
            synced_s_ago=None if self._synced_at is None else round(max(0.0, self._clock() - self._synced_at), 3),
            error=None if self._error is None else self._error.detail,
            refused=self._budget.refused,
        )

    async def _follow(self) -> None:
        listed = False
        while True:
            began = self._clock()
            steady: asyncio.TimerHandle | None = None
            try:
                if not listed:
                    await self._take(None)
                    listed = True
                async with aclosing(self._store.watch()) as sights:
                    async for held in sights:
                        if steady is None:
                            steady = asyncio.get_running_loop().call_later(BRIEF_S, self._recovered)
                        if held is None:
                            self._heard()
                        else:
                            await self._take(held)
                if self._clock() - began < BRIEF_S:
                    raise StoreUnavailable("the API server ends the watch at once", reason="other")
                self._heard()  # it ended as it should
                self._recovered()
                continue
            except StoreUnavailable as error:
                self._failed(error)
            except Exception as error:  # nothing may end this but the server's end
                log.exception("the fleet's budget cannot be followed")
                self._failed(StoreUnavailable(f"{type(error).__name__}: {error}", reason="other"))
            finally:
                if steady is not None:
                    steady.cancel()
            listed = False
            pause_s = self._lot(0.0, min(PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._failures, 10)))
            self._failures += 1
            await asyncio.sleep(pause_s)

    async def _take(self, held: Held | None) -> None:
        """What the watch tells, or what is there when one asks."""
        before = self._budget.fleet
        if held is None:
            await self._budget.look()
        else:
            self._budget.take(held)
        await self._budget.mend()
        self._heard()
        version, policy = self._budget.fleet
        if (version, policy) != before and policy is not None:
            log.info(
                "the fleet's budget is version %d: target %s, hold %s, mix %s; set %s by %s",
                version,
                dict(policy.target),
                policy.hold,
                policy.mix,
                policy.at or "at some time",
                policy.by or "somebody",
            )

    def _heard(self) -> None:
        self._synced_at = self._clock()
        self._tell()

    def _recovered(self) -> None:
        """It can be followed, for longer than a moment."""
        self._failures = 0
        if self._error is not None:
            self._error = None
            log.warning("the fleet's budget is followed again")
            self._tell()

    def _failed(self, error: StoreUnavailable) -> None:
        reason: str = error.extra.get("reason", "other")
        self._counters.policy_error(reason)
        if reason == "expired":  # as happens where a watch was away for long; it is read anew
            log.debug("%s", error.detail)
        elif self._error is None or self._error.detail != error.detail:
            log.warning("the fleet's budget cannot be followed, the last one stays in force: %s", error.detail)
            self._error = error
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
