"""Whole servers that share one budget, and one that has its own for a while."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from server.frontend import schemas
from server.frontend.routes import parse_scope
from server.settings import SettingsError, read_settings
from tests.server.budget.api_server import NAME, NAMESPACE, ApiServer

Dvt = Callable[..., tuple[int, str, str]]


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as api:
        api.write(None)
        yield api


@pytest.fixture
def shared(api: ApiServer, tmp_path: Path) -> dict[str, Any]:
    """The settings of a server of the fleet."""
    file = tmp_path / "kubeconfig"
    file.write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                "clusters": [{"name": "k", "cluster": {"server": api.url}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    place = {"policy_configmap": NAME, "policy_namespace": NAMESPACE, "policy_kubeconfig": file}
    return {"policy_store": "configmap", **place}


async def until(served: Any, version: int) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while (body := (await served.http.get("/budget")).json())["version"] != version:
            await served.service.fleet.news()
    return dict(body)


async def test_servers_that_share_a_store_answer_with_one_budget(serve: Any, shared: dict[str, Any]) -> None:
    async with serve(**shared) as one, serve(**shared) as two:
        etag = (await one.http.get("/budget")).headers["etag"]
        answer = await two.http.put("/budget", json={"gmacs": 0.05}, headers={"x-request-id": "r7"})
        assert answer.status_code == 200, answer.text
        body = await until(one, answer.json()["version"])
        schemas.Budget.model_validate(body, strict=True)
        assert (body["target"], body["fleet"]["source"]) == ({"gmacs": 0.05}, "store")
        assert body["fleet"]["generation"] == body["fleet"]["applied"] == body["version"]
        assert body["fleet"]["set_at"]
        assert (await one.http.put("/budget", json={"gmacs": 0.03}, headers={"if-match": etag})).status_code == 412
        assert await one.metric("dvt_policy_generation") == await two.metric("dvt_policy_generation")
        assert await one.metric("dvt_policy_source", source="store") == 1
        assert await one.metric("dvt_policy_sync_age_seconds") < 60


async def test_who_changed_it_is_stored_with_it(serve: Any, shared: dict[str, Any], api: ApiServer) -> None:
    async with serve(**shared) as served:
        await served.http.put("/budget", json={"gmacs": 0.05}, headers={"x-request-id": "r7"})
        assert api.stamp()["by"].endswith("request r7")
        assert api.stamp()["model"] == "fake-dvt"


async def test_without_the_api_server_a_put_is_503_and_all_else_goes_on(
    serve: Any, shared: dict[str, Any], api: ApiServer, photo: Any
) -> None:
    async with serve(**shared) as served:
        before = (await served.http.get("/budget")).json()
        await api.stop()
        answer = await served.http.put("/budget", json={"gmacs": 0.05})
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert answer.json()["reason"] == "unreachable"
        assert answer.headers["content-type"] == "application/problem+json"
        assert (await served.classify(photo(255))).status_code == 200
        assert (await served.http.get("/readyz")).status_code == 200
        after = (await served.http.get("/budget")).json()
        assert (after["version"], after["target"]) == (before["version"], before["target"])


async def test_the_budget_of_another_model_is_a_conflict(serve: Any, shared: dict[str, Any], api: ApiServer) -> None:
    api.write({"budget": '{"gmacs": 0.05}', "stamp": '{"version": 4, "model": "birds"}'})
    async with serve(**shared) as served:
        answer = await served.http.put("/budget", json={"gmacs": 0.05})
        assert (answer.status_code, answer.json()["code"]) == (409, "store_conflict")
        assert "birds" in answer.json()["detail"]
        body = (await served.http.get("/budget")).json()
        schemas.Budget.model_validate(body, strict=True)
        assert body["fleet"]["refused"]["reason"] == "other_model"
        assert await served.metric("dvt_policy_refused_total", reason="other_model") == 1


async def test_a_restart_without_the_api_server_goes_on_with_what_was_last_in_force(
    serve: Any, shared: dict[str, Any], api: ApiServer, tmp_path: Path
) -> None:
    settings = {**shared, "state_dir": tmp_path / "state"}
    async with serve(**settings) as served:
        version = (await served.http.put("/budget", json={"gmacs": 0.05})).json()["version"]
    await api.stop()
    async with serve(**settings) as served:
        body = (await served.http.get("/budget")).json()
        assert (body["version"], body["fleet"]["source"], body["fleet"]["synced_s_ago"]) == (
            version,
            "last_known",
            None,
        )
        assert body["fleet"]["error"]


async def test_a_servers_own_budget_has_an_end(serve: Any, photo: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with serve() as served:
        etag = (await served.http.get("/budget")).headers["etag"]
        ended = asyncio.Event()
        served.service.budget.on_change(lambda point: point.version > 0 and ended.set())
        with caplog.at_level(logging.INFO):
            answer = await served.http.put(
                "/budget?scope=replica&expires_s=0.3", json={"thresholds": [0.1, 0.1]}, headers={"if-match": etag}
            )
        body = answer.json()
        schemas.Budget.model_validate(body, strict=True)
        assert (body["version"], answer.headers["etag"]) == (-1, '"-1"')
        assert (body["fleet"]["source"], body["fleet"]["applied"]) == ("replica", int(etag.strip('"')))
        assert 0 < body["fleet"]["expires_in_s"] <= 0.3
        assert "of this server alone for 0.3 s" in caplog.text
        assert (await served.classify(photo(100))).json()["budget_version"] == -1
        assert await served.metric("dvt_policy_source", source="replica") == 1
        stale = await served.http.put("/budget?scope=replica", json={"gmacs": 0.05}, headers={"if-match": etag})
        assert stale.status_code == 412
        async with asyncio.timeout(20):
            await ended.wait()
        now = await served.http.get("/budget")
        assert now.headers["etag"] == etag
        assert now.json()["fleet"]["expires_in_s"] is None


async def test_a_servers_own_budget_is_forgotten_with_the_process(serve: Any, tmp_path: Path) -> None:
    async with serve(state_dir=tmp_path) as served:
        fleets = (await served.http.put("/budget", json={"gmacs": 0.03})).json()
        await served.http.put("/budget?scope=replica", json={"gmacs": 0.05})
        await served.http.put("/budget", json={"gmacs": 0.03})
    async with serve(state_dir=tmp_path) as served:
        policy = served.service.budget.fleet[1]
        assert policy is not None
        assert policy.version == fleets["version"] + 2  # the fixture has set another since


@pytest.mark.parametrize(
    "query",
    [
        "scope=all", "scope=", "expires_s=5", "scope=fleet&expires_s=5", "scope=replica&expires_s=0",
        "scope=replica&expires_s=-1", "scope=replica&expires_s=1e9", "scope=replica&expires_s=nan",
        "scope=replica&expires_s=604801", "scope=replica&scope=replica", "expires=5", "scope=replica&expires_s=",
    ],
)  # fmt: skip
async def test_a_scope_that_is_none_is_refused_and_changes_nothing(served: Any, query: str) -> None:
    before = (await served.http.get("/budget")).headers["etag"]
    answer = await served.http.put(f"/budget?{query}", json={"gmacs": 0.05})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["field"] in ("scope", "expires_s", "expires")
    assert (await served.http.get("/budget")).headers["etag"] == before


def test_a_scope_is_the_fleet_unless_it_is_said_and_has_a_time() -> None:
    assert parse_scope(b"") is None
    assert parse_scope(b"scope=fleet") is None
    assert parse_scope(b"scope=replica") == 600
    assert parse_scope(b"scope=replica&expires_s=12.5") == 12.5


async def test_a_seed_stands_until_a_budget_is_set(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed = tmp_path / "seed.json"
    for text, source in (
        ('{"gmacs": 0.05, "hold": "quality"}', "seed"),
        ("{", "default"),
        ('{"gmacs": 1e-9}', "default"),
    ):
        seed.write_text(text)
        service = None
        with caplog.at_level(logging.WARNING):
            async with serve(policy_seed=seed, state_dir=tmp_path / f"state-{source}-{len(text)}") as served:
                service = served.service
        assert service.budget.fleet[0] == 2, "the fixture has set one since"
        assert (source == "default") == ("seed" in caplog.text)
        caplog.clear()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy_store": "etcd"}, "DVT_POLICY_STORE='etcd': must be one of file, configmap"),
        ({"policy_store": "configmap"}, "needs DVT_POLICY_CONFIGMAP"),
        ({"policy_store": "configmap", "policy_configmap": "a,b"}, "DVT_POLICY_CONFIGMAP='a,b': is no name"),
        ({"policy_store": "configmap", "policy_configmap": "../x"}, "is no name"),
        ({"policy_store": "configmap", "policy_configmap": "x", "policy_namespace": "A"}, "DVT_POLICY_NAMESPACE='A'"),
    ],
)
def test_a_store_that_cannot_be_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")):
        read_settings(settings)


async def test_outside_a_cluster_a_fleet_needs_to_be_told_where_it_is(serve: Any) -> None:
    with pytest.raises(SettingsError, match="DVT_POLICY_NAMESPACE is needed"):
        async with serve(policy_store="configmap", policy_configmap=NAME):
            pass
    with pytest.raises(SettingsError, match="or set DVT_POLICY_KUBECONFIG"):
        async with serve(policy_store="configmap", policy_configmap=NAME, policy_namespace=NAMESPACE):
            pass


async def test_without_the_extra_it_says_what_to_install(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "kubernetes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(SettingsError, match=r"pip install 'dvt-serve\[kubernetes\]'"):
        async with serve(policy_store="configmap", policy_configmap=NAME, policy_namespace=NAMESPACE):
            pass


def test_a_server_imports_no_kubernetes_without_a_fleet_and_no_fastapi_before_its_document_is_asked_for() -> None:
    import subprocess

    code = (
        "import sys; import server.app;"
        "print([m for m in sys.modules if m.startswith(('kubernetes', 'aiohttp', 'fastapi'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--scope", "replica"), ("gmacs=0.03", "--scope", "all"), ("gmacs=0.03", "--expires", "5"),
        ("gmacs=0.03", "--scope", "replica", "--expires", "-1"), ("gmacs=0.03", "--scope", "replica", "--preview"),
        ("gmacs=0.03", "--scope", "replica", "--expires", "inf"),
    ],
)  # fmt: skip
def test_the_command_refuses_a_scope_that_makes_no_sense(dvt: Dvt, arguments: tuple[str, ...]) -> None:
    status, _, error = dvt("budget", *arguments)
    assert (status, error.startswith("Error: --")) == (2, True), error


async def test_the_command_sets_and_shows_a_budget_of_one_server(listening: Any, dvt: Dvt) -> None:
    async with listening() as here:
        url = f"http://127.0.0.1:{here.port}"
        arguments = ("gmacs=0.05", "--scope", "replica", "--expires", "600", "--url", url)
        status, said, error = await asyncio.to_thread(dvt, "budget", *arguments)
        assert status == 0, error
        assert said.startswith("version     -1\n")
        assert "of this server alone for 600 s more, then version 2 again" in said
        assert here.service.budget.point.version == -1
