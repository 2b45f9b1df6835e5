"""One budget for a fleet: replicas on one ConfigMap, and whatever can happen to it and to the API server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import certifi
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes.aio.client import ApiClient, ApiException, Configuration, CoreV1Api, V1ConfigMap, V1ObjectMeta

from server.budget.configmap import (
    ConfigMapStore,
    NoCluster,
    account_namespace,
    by_kubeconfig,
    follow_token,
    in_cluster,
)
from server.budget.controller import BudgetController
from server.budget.fleet import Fleet
from server.budget.store import Policy, StoreMoved, write_policy
from server.bundle.frontier import Frontier
from server.calibration.sweep import sweep
from server.errors import StoreConflict, StoreUnavailable, VersionMismatch
from tests.server.budget.api_server import NAME, NAMESPACE, ApiServer

LIMIT_S = 20.0  # for whatever is waited for
REAL = {name: value for name, value in os.environ.items() if name.startswith("DVT_TEST_")}  # before it is emptied


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    rng = np.random.default_rng(0)
    confidence = rng.random((3, 2000), dtype=np.float32)
    return sweep(confidence[:2], rng.random((3, 2000)) < confidence, (0.5, 1.1, 2.3), key="k")


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as api:
        api.write(None)
        yield api


class Replica:
    """What one server of the fleet has of the budget."""

    def __init__(self, frontier: Frontier, api: ApiServer, model: str = "photo10", **options: Any) -> None:
        self.errors: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

        async def connect() -> ApiClient:
            return ApiClient(Configuration(host=api.url))

        seed, first_s = options.pop("seed", None), options.pop("first_s", 5.0)
        known = {
            "name": NAME, "namespace": NAMESPACE, "connect": connect, "watch_s": 30.0, "wait_s": 5.0, **options
        }  # fmt: skip
        self.store = ConfigMapStore(model=model, **known)
        self.budget = BudgetController(
            frontier, self.store, seed=seed, on_refusal=lambda reason: self.refusals.update([reason])
        )
        lots = random.Random(0)

        def lot(low: float, high: float) -> float:
            return lots.uniform(low, high) / 20  # the same pauses as ever, but for their length

        self.fleet = Fleet(self.budget, self.store, self, time.monotonic, lot, first_s)

    def policy_error(self, reason: str) -> None:
        self.errors[reason] += 1

    @property
    def version(self) -> int:
        return self.budget.point.version

    @property
    def is_troubled(self) -> bool:
        state = self.fleet.state()
        return state.error is not None or state.refused is not None

    async def until(self, condition: Callable[[], bool]) -> None:
        """What the store brings makes it true."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not condition():
                    await self.fleet.news()
        except TimeoutError:
            raise AssertionError(f"it did not come about: {self.fleet.state()}") from None


Join = Callable[..., Any]


@pytest.fixture
async def join(frontier: Frontier, api: ApiServer) -> AsyncIterator[Join]:
    """`await join(3)`: so many replicas, started."""
    async with AsyncExitStack() as stack:

        async def start(count: int = 1, **options: Any) -> list[Replica]:
            replicas = [Replica(frontier, api, **options) for _ in range(count)]
            for replica in replicas:
                stack.push_async_callback(replica.fleet.stop)
                await replica.fleet.start()
            return replicas

        yield start


# --- what it is for


async def test_a_put_at_any_replica_reaches_all_under_one_version(join: Join, api: ApiServer) -> None:
    before = api.read()["metadata"]
    replicas = await join(3)
    assert [replica.version for replica in replicas] == [1, 1, 1]
    for number, replica in enumerate(replicas):
        version = 2 + number
        state = await replica.budget.put({"gmacs": 1.0 + number / 10}, by="10.0.0.1", at="2026-01-01T00:00:00+00:00")
        assert state.version == version
        for other in replicas:
            await other.until(lambda other=other, version=version: other.version == version)
            assert other.budget.state() == state
            assert other.fleet.state().source == "store"
    assert api.budget() == {"gmacs": 1.2, "hold": "cost"}
    stamp = api.stamp()
    assert (stamp["version"], stamp["model"], stamp["by"]) == (4, "photo10", "10.0.0.1")
    assert api.read()["metadata"] == {**before, "resourceVersion": str(api.revision)}, "what is not ours stays"


async def test_a_put_is_one_round_trip(join: Join, api: ApiServer) -> None:
    (replica,) = await join()
    await replica.budget.put({"gmacs": 1.0})
    before = api.asked.copy()
    await replica.budget.put({"gmacs": 1.2}, if_match=replica.version)
    assert {verb: api.asked[verb] - before[verb] for verb in ("list", "get", "update")} == {
        "list": 0,
        "get": 0,
        "update": 1,
    }


async def test_a_replica_that_comes_later_finds_it(join: Join) -> None:
    (first,) = await join()
    await first.budget.put({"gmacs": 1.0}, "quality")
    (late,) = await join()
    assert late.budget.state() == first.budget.state()


async def test_if_match_is_judged_by_what_the_store_holds_not_by_what_this_replica_has_heard(
    join: Join, frontier: Frontier, api: ApiServer
) -> None:
    (first,) = await join()
    deaf = Replica(frontier, api)  # it follows nothing
    await deaf.budget.look()
    await first.budget.put({"gmacs": 1.0})
    with pytest.raises(VersionMismatch) as refused:
        await deaf.budget.put({"gmacs": 2.0}, if_match=1)
    assert refused.value.extra == {"version": 2}
    await first.budget.put({"gmacs": 1.1})
    assert (await deaf.budget.put({"gmacs": 2.0}, if_match=3)).version == 4
    await first.until(lambda: first.version == 4)
    assert (await deaf.budget.put({"gmacs": 1.9}, if_match="*")).version == 5
    await deaf.fleet.stop()


async def test_of_many_that_name_the_same_version_one_gets_through(join: Join, api: ApiServer) -> None:
    replicas = await join(4)
    outcomes = await asyncio.gather(
        *(replica.budget.put({"gmacs": 1.0 + n / 10}, if_match=1) for n, replica in enumerate(replicas)),
        return_exceptions=True,
    )
    won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(won) == 1
    assert sum(isinstance(outcome, VersionMismatch) for outcome in outcomes) == 3
    assert api.budget()["gmacs"] == won[0].target["gmacs"]


async def test_of_many_without_one_each_gets_a_version_or_is_told_that_it_has_none(join: Join, api: ApiServer) -> None:
    replicas = await join(3)
    outcomes = await asyncio.gather(
        *(replica.budget.put({"gmacs": 1.0 + n / 100}) for n in range(4) for replica in replicas),
        return_exceptions=True,
    )
    versions = [outcome.version for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(versions) == len(set(versions))
    assert all(isinstance(outcome, StoreConflict) for outcome in outcomes if isinstance(outcome, BaseException))
    assert api.stamp()["version"] == max(versions) == len(versions) + 1
    for replica in replicas:
        await replica.until(lambda replica=replica: replica.version == max(versions))


async def test_two_versions_of_a_model_share_it_and_one_that_cannot_serve_it_keeps_its_last(
    join: Join, api: ApiServer
) -> None:
    (replica,) = await join()
    rng = np.random.default_rng(1)
    confidence = rng.random((3, 500), dtype=np.float32)
    cheaper = sweep(confidence[:2], rng.random((3, 500)) < confidence, (0.1, 0.2, 0.4), key="other")
    canary = Replica(cheaper, api)
    await canary.fleet.start()
    try:
        await replica.budget.put({"accuracy": 0.5})
        await canary.until(lambda: canary.version == 2)
        last = canary.budget.point
        await canary.budget.put({"gmacs": 0.15})  # the others cannot go so low
        await replica.until(lambda: replica.refusals["unfit"] == 1)
        assert (replica.version, canary.version) == (2, 3)
        state = replica.fleet.state()
        assert (state.generation, state.applied) == (3, 2)
        assert state.refused is not None
        assert "costs 0.5 GMAC" in state.refused.detail
        assert last != canary.budget.point
        with pytest.raises(VersionMismatch):  # it would be lost
            await replica.budget.put({"gmacs": 1.0}, if_match=2)
        await replica.budget.put({"accuracy": 0.55}, if_match=3)
        await canary.until(lambda: canary.version == 4)
        assert replica.fleet.state().refused is None
    finally:
        await canary.fleet.stop()


# --- this replica alone


async def test_a_budget_of_one_replica_ends_by_itself_and_the_fleets_is_in_force_again(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = await join(2)
    await first.budget.put({"gmacs": 1.0})
    await second.until(lambda: second.version == 2)
    told: list[int] = []
    ended = asyncio.Event()
    second.budget.on_change(lambda point: (told.append(point.version), point.version > 0 and ended.set()))
    state = second.fleet.put_here({"gmacs": 2.0}, "cost", 2, mix=False, expires_s=0.2)
    assert (state.version, state.target) == (-1, {"gmacs": 2.0})
    assert second.fleet.state().source == "replica"
    assert first.version == 2
    answer = await second.budget.put({"gmacs": 1.5}, if_match=2)  # the fleet's: it is for the others, and for later
    assert (answer.version, answer.target, answer.observed.images) == (3, {"gmacs": 1.5}, 0)
    assert second.version == -1
    await first.until(lambda: first.version == 3)
    with caplog.at_level(logging.INFO):
        async with asyncio.timeout(LIMIT_S):
            await ended.wait()
    assert second.budget.state() == first.budget.state()
    assert second.fleet.state().expires_in_s is None
    assert "own budget has ended" in caplog.text
    assert second.fleet.put_here({"gmacs": 2.0}, "cost", None, mix=False, expires_s=60).version == -2


# --- what people do to a ConfigMap


async def test_a_budget_that_was_written_by_hand_gets_a_version_of_its_own_once(join: Join, api: ApiServer) -> None:
    replicas = await join(3)
    await replicas[0].budget.put({"gmacs": 1.0})
    api.edit(budget='{"accuracy": 0.55, "hold": "quality"}')
    for replica in replicas:
        await replica.until(lambda replica=replica: replica.version == 3)
        assert replica.budget.state().target == {"accuracy": 0.55}
    stamp = api.stamp()
    assert (stamp["version"], stamp["by"]) == (3, "hand")
    (late,) = await join()
    assert late.version == 3


async def test_the_first_budget_may_be_written_by_hand_also_where_there_is_no_stamp(join: Join, api: ApiServer) -> None:
    api.write({"budget": '{"gmacs": 1.0}', "note": "of another"})
    (replica,) = await join()
    await replica.until(lambda: replica.version == 2)
    assert api.read()["data"]["note"] == "of another"


NONSENSE = [
    "", "{", "null", "[]", '"x"', "{}", '{"gmacs": "x"}', '{"gmacs": 1, "accuracy": 0.5}', '{"gmac": 1.0}',
    '{"gmacs": NaN}', '{"gmacs": 1e999}', '{"gmacs": 1.0, "hold": []}', '{"gmacs": 1.0, "mix": 7}', "[" * 5000,
    '{"thresholds": [0.5]}', '{"thresholds": [5, 5]}', '{"gmacs": 1.0}\x00', "budget: {gmacs: 1}", '{"a":' * 900,
    '{"gmacs": -1}', '{"gmacs": ' + "9" * 400 + "}", "x" * 70_000, '{"latency_ms": 5}',
]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
async def test_nonsense_is_refused_once_and_the_last_good_budget_stays(
    join: Join, api: ApiServer, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (replica,) = await join(watch_s=1.0)
    await replica.budget.put({"gmacs": 1.0})
    good = replica.budget.point
    with caplog.at_level(logging.WARNING):
        api.edit(budget=text)
        await replica.until(lambda: sum(replica.refusals.values()) == 1)
        await replica.budget.look()
        await replica.budget.look()  # it is still there
    assert sum(replica.refusals.values()) == 1
    assert caplog.text.count("is not taken up, version 2 stays") == 1
    assert len(caplog.text) < 2000
    assert replica.budget.point == good
    assert replica.errors == Counter()
    state = await replica.budget.put({"gmacs": 1.5}, if_match=2)
    assert (state.version, replica.fleet.state().refused) == (3, None)


STAMPS = [
    "", "x", "[]", "{}", '{"version": "2"}', '{"version": -3}', '{"version": 1e3}', '{"version": 99999999999999999999}',
    '{"version": true}', '{"version": 2, "model": 7}', "[" * 9999,
]  # fmt: skip


@pytest.mark.parametrize("stamp", STAMPS, ids=range(len(STAMPS)))
async def test_a_stamp_that_is_damaged_is_made_anew(join: Join, api: ApiServer, stamp: str) -> None:
    (replica,) = await join()
    await replica.budget.put({"gmacs": 1.0})
    api.edit(stamp=stamp)
    await replica.until(lambda: replica.version == 3)
    assert api.stamp()["version"] == 3
    assert replica.budget.state().target == {"gmacs": 1.0}


async def test_data_that_is_no_data_is_an_error_and_nothing_breaks(join: Join, api: ApiServer) -> None:
    (replica,) = await join()
    await replica.budget.put({"gmacs": 1.0})
    for data in ([], "text", 7, {"budget": 7}, {"budget": None, "stamp": []}):
        written = api.write(data)
        await replica.until(lambda written=written: api.read() is not written or replica.is_troubled)
        assert replica.version == 2
    api.write({})
    await replica.until(lambda: "stamp" in (api.read().get("data") or {}))
    assert api.stamp()["version"] == 2


@pytest.mark.parametrize("how", ["emptied", "recreated"])
async def test_what_was_taken_away_is_stored_again(join: Join, api: ApiServer, how: str) -> None:
    replicas = await join(2)
    await replicas[0].budget.put({"gmacs": 1.0}, by="me")
    await replicas[1].until(lambda: replicas[1].version == 2)
    if how == "recreated":
        api.delete()
        for replica in replicas:
            await replica.until(lambda replica=replica: replica.errors["missing"] > 0)
            assert "was deleted" in str(replica.fleet.state().error) or "there is no" in str(
                replica.fleet.state().error
            )
            with pytest.raises(StoreUnavailable) as refused:
                await replica.budget.put({"gmacs": 2.0})
            assert refused.value.extra["reason"] == "missing"
            assert replica.version == 2
    api.write(None)
    await replicas[0].until(lambda: "stamp" in (api.read().get("data") or {}))
    assert (api.stamp()["version"], api.stamp()["by"], api.budget()) == (2, "me", {"gmacs": 1.0, "hold": "cost"})
    (late,) = await join()
    assert late.version == 2


async def test_a_store_that_went_back_is_followed_back_and_no_version_is_given_twice(
    join: Join, api: ApiServer
) -> None:
    """A cluster that was restored from a backup: everything in it is older than what is known here."""
    (replica,) = await join()
    await replica.budget.put({"gmacs": 1.0})
    backup = api.read()
    await replica.budget.put({"gmacs": 1.5})
    api.revision, api.objects = int(backup["metadata"]["resourceVersion"]), {(NAMESPACE, NAME): backup}
    await api.restart()
    await replica.until(lambda: replica.version == 2)
    assert (await replica.budget.put({"gmacs": 2.0})).version == 4


# --- two fleets


async def test_the_budget_of_another_model_is_refused_and_not_overwritten(
    join: Join, api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = await join(model="photo10")
    await one.budget.put({"gmacs": 1.0})
    with caplog.at_level(logging.WARNING):
        (two,) = await join(model="birds")
    assert two.refusals == Counter(other_model=1)
    assert "holds the budget of the model 'photo10', and this is 'birds'" in caplog.text
    assert (two.version, two.fleet.state().source) == (1, "default")
    with pytest.raises(StoreConflict, match="of its own"):
        await two.budget.put({"gmacs": 2.0})
    api.edit(budget='{"gmacs": 1.2}')  # by hand: it is still that of photo10
    await one.until(lambda: one.version == 3)
    assert api.stamp()["model"] == "photo10"
    assert two.version == 1


# --- the API server


async def test_without_an_api_server_it_serves_and_puts_are_refused_until_it_is_there(
    join: Join, api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    await api.stop()
    with caplog.at_level(logging.WARNING):
        (replica,) = await join(first_s=0.1)
        assert (replica.version, replica.fleet.state().source) == (1, "default")
        for _ in range(3):
            with pytest.raises(StoreUnavailable) as refused:
                await replica.budget.put({"gmacs": 1.0})
            assert refused.value.extra["reason"] == "unreachable"
        assert replica.version == 1
        await replica.until(lambda: replica.errors["unreachable"] >= 3)
        assert caplog.text.count("cannot be followed") == 1, "once, not at every try"
        await api.start()
        await replica.until(lambda: replica.fleet.state().error is None)
        assert "is followed again" in caplog.text
    assert (await replica.budget.put({"gmacs": 1.0})).version == 2


@pytest.mark.parametrize("how", ["stopped", "restarted", "half open", "cut"])
async def test_what_others_stored_while_the_api_server_was_away_is_found_when_it_is_back(
    join: Join, api: ApiServer, how: str
) -> None:
    (replica,) = await join(watch_s=1.0, wait_s=0.3)
    await replica.budget.put({"gmacs": 1.0})
    if how == "stopped":
        await api.stop()
    if how == "half open":
        api.silence()
    api.edit(budget='{"gmacs": 1.7}')
    if how in ("restarted", "cut"):
        await api.restart()
    if how == "half open":
        await replica.until(lambda: replica.errors["timeout"] > 0)
        with pytest.raises(StoreUnavailable) as refused:
            await replica.budget.put({"gmacs": 2.0})
        assert refused.value.extra["reason"] == "timeout"
        assert replica.version == 2
        api.silent = False
    if how == "stopped":
        await replica.until(lambda: replica.errors["unreachable"] > 0)
        await api.start()
    await replica.until(lambda: replica.version == 3)
    assert replica.budget.state().target == {"gmacs": 1.7}


async def test_a_watch_that_is_too_old_is_read_anew(
    join: Join, api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    (replica,) = await join(watch_s=1.0)
    for n in range(3):
        api.write({"x": str(n)}, name="another")  # its revisions are not told: the cursor of the watch stays behind
    api.compact()
    with caplog.at_level(logging.WARNING):
        await replica.until(lambda: replica.errors["expired"] > 0)
        api.edit(budget='{"gmacs": 1.7}')
        await replica.until(lambda: replica.version == 2)
    assert "cannot be followed" not in caplog.text


async def test_bookmarks_carry_a_watch_over_what_does_not_concern_it(join: Join, api: ApiServer) -> None:
    api.bookmark_s = 0.1
    (replica,) = await join(watch_s=1.0)
    for n in range(3):
        api.write({"x": str(n)}, name="another")
    watches = api.asked["watch"]
    await replica.until(lambda: api.asked["watch"] > watches)
    api.compact()
    api.edit(budget='{"gmacs": 1.7}')
    await replica.until(lambda: replica.version == 2)
    assert replica.errors["expired"] == 0
    assert api.asked["list"] == 1


@pytest.mark.parametrize("verb", ["list", "watch", "update"])
async def test_a_verb_that_is_denied_is_told_and_does_not_make_it_ask_without_end(
    join: Join, api: ApiServer, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    api.denied = {verb}
    with caplog.at_level(logging.WARNING):
        (replica,) = await join(first_s=0.1)
        if verb == "update":
            api.edit(budget='{"gmacs": 1.7}')
        await replica.until(lambda: replica.errors["denied"] >= 4)
    assert f"does not let this server {'read' if verb == 'list' else verb} the ConfigMap" in caplog.text
    assert caplog.text.count("cannot be followed") == 1
    assert api.asked[verb] < 8
    api.denied = set()
    api.edit(budget='{"gmacs": 1.8}')
    await replica.until(lambda: replica.version == 2)


async def test_a_write_whose_answer_is_lost_is_not_done_twice_and_known_for_what_it_is(
    join: Join, api: ApiServer
) -> None:
    (replica,) = await join(wait_s=0.3)
    await replica.budget.put({"gmacs": 1.0})
    api.lose_answers = "cut"  # the library below asks again by itself, and finds that somebody was first
    assert (await replica.budget.put({"gmacs": 1.5}, if_match=2, by="me", at="now")).version == 3
    api.lose_answers = "hang"
    with pytest.raises(StoreUnavailable, match="not known whether") as refused:
        await replica.budget.put({"gmacs": 1.6}, if_match=3, by="me", at="now")
    assert refused.value.extra["reason"] == "timeout"
    api.lose_answers = ""
    await replica.until(lambda: replica.version == 4)
    assert replica.budget.state().target == {"gmacs": 1.6}
    with pytest.raises(VersionMismatch):
        await replica.budget.put({"gmacs": 1.6}, if_match=3, by="me", at="later")
    assert api.stamp()["version"] == 4


async def test_a_token_that_is_rotated_is_followed(
    frontier: Frontier, api: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    api.tokens = {"first"}

    async def connect() -> ApiClient:
        configuration = Configuration(host=api.url)
        follow_token(configuration, file)
        return ApiClient(configuration)

    replica = Replica(frontier, api, connect=connect)
    await replica.fleet.start()
    try:
        await replica.budget.put({"gmacs": 1.0})
        api.tokens = {"second"}
        with pytest.raises(StoreUnavailable) as refused:
            await replica.budget.put({"gmacs": 1.1})
        assert refused.value.extra["reason"] == "denied"
        file.write_text("second\n")
        assert (await replica.budget.put({"gmacs": 1.1})).version == 3
        file.unlink()
        with pytest.raises(StoreUnavailable, match="the token of the service account cannot be read"):
            await replica.budget.put({"gmacs": 1.2})
        assert "first" not in caplog.text + str(refused.value)
        assert "second" not in caplog.text
    finally:
        await replica.fleet.stop()


async def test_a_watch_that_is_denied_leaves_the_ground_under_a_put_that_is_under_way(
    api: ApiServer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("good")
    api.tokens = {"good"}
    made: list[ApiClient] = []

    async def connect() -> ApiClient:
        configuration = Configuration(host=api.url)
        follow_token(configuration, file)
        made.append(ApiClient(configuration))
        return made[-1]

    store = ConfigMapStore(NAME, NAMESPACE, "m", connect)
    held = await store.load()
    api.delay_s = 0.5
    putting = asyncio.create_task(store.compare_and_set(Policy(held.version + 1, {"gmacs": 1.0}, "cost"), held))
    while not api.asked["update"]:
        await asyncio.sleep(0.001)
    api.delay_s = 0.0
    file.write_text("bad")
    with pytest.raises(StoreUnavailable):
        await anext(store.watch())
    assert not putting.done()
    assert (await putting).version == held.version + 1
    file.write_text("good")
    await store.load()
    assert len(made) == 2, "the next one connected anew"
    await store.disconnect()
    for client in made:
        assert client.rest_client.pool_manager.closed


LINES = [
    b"", b"\n", b"null\n", b"[]\n", b"<html>\n", b'{"type": "ADDED"}\n', b"\xff\xfe\n", b"x" * 6_000_000,
    b'{"type": "MODIFIED", "object": {"metadata": []}}\n', b'{"type": "ERROR", "object": {"code": "x"}}\n',
    b'{"type": "ERROR", "object": null}\n', b'{"type": 7, "object": 7}\n', b'{"type": "BOOKMARK", "object": {}}\n',
    b'{"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "zz"}, "data": {"budget": 5}}}\n',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
async def test_whatever_a_watch_says_it_is_read_anew_after_a_pause(frontier: Frontier, line: bytes) -> None:
    from aiohttp import web

    asked: Counter[str] = Counter()
    subject = {"metadata": {"name": NAME, "resourceVersion": "5"}, "data": None}

    async def answer(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            asked["list"] += 1
            return web.json_response({"metadata": {"resourceVersion": "5"}, "items": [subject]})
        asked["watch"] += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(line)
        return response

    app = web.Application()
    app.router.add_get("/api/v1/namespaces/{namespace}/configmaps", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api = ApiServer()
    api.port = runner.addresses[0][1]
    replica = Replica(frontier, api)
    await replica.fleet.start()
    try:
        await replica.until(lambda: asked["list"] >= 3)
        assert sum(replica.errors.values()) >= 2
        assert replica.version == 1
    finally:
        await replica.fleet.stop()
        await runner.cleanup()


# --- the start


async def test_the_start_goes_by_the_store_then_by_what_was_last_in_force_then_by_the_seed_then_by_the_default(
    join: Join, api: ApiServer, tmp_path: Path
) -> None:
    seed, known = Policy(1, {"gmacs": 1.9}, "quality"), tmp_path / "fleet.json"
    (replica,) = await join(last_known=known, seed=seed)
    assert (replica.version, replica.fleet.state().source, replica.budget.state().target) == (1, "seed", {"gmacs": 1.9})
    await replica.budget.put({"gmacs": 1.0})
    await replica.budget.close()  # it is on the disk
    await replica.fleet.stop()
    await api.stop()
    (again,) = await join(first_s=0.05, last_known=known, seed=seed)
    assert (again.version, again.fleet.state().source) == (2, "last_known")
    assert again.budget.state().target == {"gmacs": 1.0}
    await api.start()
    await again.until(lambda: again.fleet.state().source == "store")
    await again.budget.close()
    await again.fleet.stop()
    for damage in ("", "{", json.dumps({"version": 2})):
        known.write_text(damage)
        await api.stop()
        (damaged,) = await join(first_s=0.05, last_known=known, seed=seed)
        assert damaged.fleet.state().source == "seed"
        await api.start()
        await damaged.until(lambda damaged=damaged: damaged.version == 2)
        await damaged.budget.close()
        await damaged.fleet.stop()


async def test_a_last_known_file_that_cannot_be_written_costs_nothing_else(
    join: Join, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    (replica,) = await join(last_known=tmp_path / "file" / "fleet.json")
    with caplog.at_level(logging.WARNING):
        assert (await replica.budget.put({"gmacs": 1.0})).version == 2
        await replica.budget.close()
    assert "would not outlive" in caplog.text


def test_outside_a_pod_there_is_no_service_account(tmp_path: Path) -> None:
    with pytest.raises(NoCluster, match="no service account"):
        in_cluster(tmp_path)


async def test_in_a_pod_its_service_account_says_where_and_as_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert account_namespace(tmp_path) is None
    (tmp_path / "namespace").write_text("serving\n")
    (tmp_path / "token").write_text("one\n")
    shutil.copy(certifi.where(), tmp_path / "ca.crt")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert account_namespace(tmp_path) == "serving"
    client = await in_cluster(tmp_path)()
    configuration = client.configuration
    assert configuration.host == "https://[fd00::1]:443"
    assert configuration.verify_ssl
    assert await configuration.get_api_key_with_prefix("BearerToken") == "Bearer one"
    (tmp_path / "token").write_text("two\n")
    assert await configuration.get_api_key_with_prefix("BearerToken") == "Bearer two"
    await client.close()


async def test_a_kubeconfig_says_where_the_api_server_is(frontier: Frontier, api: ApiServer, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    replica = Replica(frontier, api, connect=by_kubeconfig(file))
    for text in ("", "[", "{}", "current-context: x"):
        file.write_text(text)
        with pytest.raises(StoreUnavailable) as refused:
            await replica.budget.put({"gmacs": 1.0})
        assert refused.value.extra["reason"] == "denied"
    file.write_text(kubeconfig(api.url, "s3cret"))
    api.tokens = {"s3cret"}
    assert (await replica.budget.put({"gmacs": 1.0})).version == 2
    api.tokens = {"other"}
    with pytest.raises(StoreUnavailable):
        await replica.budget.put({"gmacs": 1.1})
    file.write_text(kubeconfig(api.url, "other"))
    assert (await replica.budget.put({"gmacs": 1.1})).version == 3
    await replica.fleet.stop()


def kubeconfig(url: str, token: str = "") -> str:
    user: dict[str, Any] = {"token": token} if token else {}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": user}],
        }
    )


# --- whatever happens


@asynccontextmanager
async def a_fleet(frontier: Frontier, count: int) -> AsyncIterator[tuple[ApiServer, list[Replica]]]:
    async with ApiServer() as api:
        api.write(None)
        replicas = [Replica(frontier, api, watch_s=1.0, wait_s=0.2) for _ in range(count)]
        for replica in replicas:
            await replica.fleet.start()
        try:
            yield api, replicas
        finally:
            api.silent = False
            for replica in replicas:
                await replica.fleet.stop()


GMACS = st.floats(0.5, 2.0).map(lambda number: round(number, 3))
EVENTS = ["restart", "stop", "start", "silence", "speak", "compact", "lose", "keep", "empty"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 2), GMACS, st.booleans()),
        st.tuples(st.just("race"), GMACS, GMACS),
        st.tuples(st.just("edit"), GMACS),
        st.tuples(st.just("nonsense"), st.sampled_from(["", "{", '{"gmacs": "x"}'])),
        st.tuples(
            st.sampled_from(["restart", "stop", "start", "silence", "speak", "compact", "lose", "keep", "empty"])
        ),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_whatever_happens_all_come_to_what_was_stored_last_and_nothing_is_lost_unheard(
    frontier: Frontier, steps: list[tuple[Any, ...]]
) -> None:
    asyncio.run(live(frontier, steps))


async def live(frontier: Frontier, steps: list[tuple[Any, ...]]) -> None:
    async with a_fleet(frontier, 3) as (api, replicas):
        promised: dict[int, float] = {}  # what was answered with 200, by version

        async def put(replica: Replica, gmacs: float, conditional: bool) -> None:
            before = replica.budget.generation
            try:
                state = await replica.budget.put({"gmacs": gmacs}, if_match=before if conditional else None)
            except (StoreUnavailable, StoreConflict, VersionMismatch):
                return
            assert state.version not in promised
            assert not conditional or state.version == before + 1
            promised[state.version] = gmacs

        for step in steps:
            match step:
                case ("put", who, gmacs, conditional):
                    await put(replicas[who], gmacs, conditional)
                case ("race", one, two):
                    await asyncio.gather(put(replicas[0], one, True), put(replicas[1], two, True))
                case ("edit", gmacs):
                    api.edit(budget=json.dumps({"gmacs": gmacs}))
                case ("nonsense", text):
                    api.edit(budget=text)
                case ("restart",):
                    await api.restart()
                case ("stop",):
                    await api.stop()
                case ("start",):
                    await api.start()
                case ("silence",):
                    api.silence()
                case ("speak",):
                    api.silent = False
                case ("compact",):
                    api.compact()
                case ("lose",):
                    api.lose_answers = "cut"
                case ("keep",):
                    api.lose_answers = ""
                case ("empty",):
                    api.write(None)
        api.lose_answers, api.silent = "", False
        await api.start()
        api.edit(budget=json.dumps({"gmacs": 1.234}))
        for replica in replicas:
            await replica.until(lambda replica=replica: replica.budget.state().target == {"gmacs": 1.234})
        versions = {replica.version for replica in replicas}
        assert versions == {api.stamp()["version"]}
        assert api.budget()["gmacs"] == 1.234
        stored = stamped(api)
        for version, gmacs in promised.items():
            assert stored[version] == gmacs
            assert version <= api.stamp()["version"]


def stamped(api: ApiServer) -> dict[int, float]:
    """What was ever stored under a version that was meant for it. One version is one budget."""
    found: dict[int, float] = {}
    for data in (subject.get("data") or {} for subject in api.written):
        stamp = json.loads(data.get("stamp", "{}"))
        if stamp.get("of") == hashlib.sha256(data.get("budget", "").encode()).hexdigest()[:16]:
            gmacs = json.loads(data["budget"])["gmacs"]
            assert found.setdefault(stamp["version"], gmacs) == gmacs
    return found


# --- a real API server


@pytest.mark.skipif(
    "DVT_TEST_APISERVER" not in REAL,
    reason="NOT RUN against a real API server. DVT_TEST_APISERVER=<url> names one, with DVT_TEST_APISERVER_TOKEN where "
    "it asks for a token; a ConfigMap dvt-test-policy is made and deleted in its namespace default",
)
async def test_a_real_api_server_does_what_the_stand_in_does(frontier: Frontier) -> None:
    async def connect() -> ApiClient:
        configuration = Configuration(host=REAL["DVT_TEST_APISERVER"])
        configuration.verify_ssl = False
        if token := REAL.get("DVT_TEST_APISERVER_TOKEN"):
            configuration.api_key["BearerToken"] = f"Bearer {token}"
        return ApiClient(configuration)

    name, namespace = "dvt-test-policy", "default"
    client = await connect()
    core = CoreV1Api(client)

    async def edit(**data: str | None) -> None:
        await core.patch_namespaced_config_map(name, namespace, {"data": data})

    nowhere = ApiServer()  # never asked
    replicas = [
        Replica(frontier, nowhere, connect=connect, watch_s=2.0, name=name, namespace=namespace) for _ in range(3)
    ]
    first, second, third = replicas
    try:
        with suppress(ApiException):
            await core.delete_namespaced_config_map(name, namespace)
        with pytest.raises(StoreUnavailable, match="there is no ConfigMap"):
            await first.store.load()
        await core.create_namespaced_config_map(
            namespace, V1ConfigMap(metadata=V1ObjectMeta(name=name, labels={"app": "dvt"}))
        )
        for replica in replicas:
            await replica.fleet.start()
        assert (await first.budget.put({"gmacs": 1.0}, by="me")).version == 2
        for replica in replicas:
            await replica.until(lambda replica=replica: replica.version == 2)
        stale = await second.store.load()
        outcomes = await asyncio.gather(
            *(replica.budget.put({"gmacs": 1.1 + n / 10}, if_match=2) for n, replica in enumerate(replicas)),
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, VersionMismatch) for outcome in outcomes) == 2
        with pytest.raises(StoreMoved):
            await second.store.compare_and_set(Policy(9, {"gmacs": 1.0}, "cost"), stale)
        await edit(budget='{"gmacs": 1.7}')
        for replica in replicas:
            await replica.until(lambda replica=replica: replica.budget.state().target == {"gmacs": 1.7})
        assert {replica.version for replica in replicas} == {4}
        await edit(budget="nonsense")
        await third.until(lambda: third.refusals["nonsense"] == 1)
        watched = await core.read_namespaced_config_map(name, namespace)
        assert watched.metadata is not None
        assert watched.metadata.labels == {"app": "dvt"}
        await edit(budget=None, stamp=None)
        await first.until(lambda: first.fleet.state().refused is None)
        await third.until(lambda: third.fleet.state().refused is None)
        assert {replica.version for replica in replicas} == {4}
        await core.delete_namespaced_config_map(name, namespace)
        await second.until(lambda: second.errors["missing"] > 0)
        assert second.version == 4
    finally:
        for replica in replicas:
            await replica.fleet.stop()
        with suppress(ApiException):
            await core.delete_namespaced_config_map(name, namespace)
        await client.close()


def test_the_last_known_file_is_as_the_file_store_writes_it(tmp_path: Path) -> None:
    write_policy(tmp_path / "p.json", Policy(3, {"gmacs": 1.0}, "cost"))
    store = ConfigMapStore(NAME, NAMESPACE, "m", lambda: None, tmp_path / "p.json")  # type: ignore[arg-type, return-value]
    assert store.recall() == Policy(3, {"gmacs": 1.0}, "cost")
