"""Plays the API server of Kubernetes, as far as ConfigMaps go: one counter of revisions, compare-and-set by
resourceVersion, lists, watches from a revision on with bookmarks and 410, bearer tokens, verbs that are denied.

What it holds outlives a `restart`, as etcd does. It can refuse connections (`stop`), be half open (`silence`: takes
everything in and answers nothing), be slow, and lose the answers to writes that it has done.

As a program it obeys lines on stdin, and says on stdout where it listens and what it has obeyed: `serve`, `stop`,
`silence`, `restart`, `put {"data": ...}` of the one ConfigMap, `quit`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import time
from collections import Counter
from datetime import datetime
from typing import Any

from aiohttp import web

Object = dict[str, Any]
NAMESPACE, NAME = "serving", "dvt-policy"


class ApiServer:
    """`async with ApiServer() as api:`; it listens on 127.0.0.1."""

    def __init__(self) -> None:
        self.port = 0
        self.revision = 1000
        self.objects: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, str, Object]] = []
        self.written: list[Object] = []  # all that ever was, whatever is forgotten
        self.compacted = 0
        self.tokens: set[str] | None = None  # that are taken; None: any, and none
        self.denied: set[str] = set()  # verbs
        self.silent = False
        self.delay_s = 0.0
        self.lose_answers = (
            ""  # to writes that are done: "cut", by a connection that ends, or "hang", by none that comes
        )
        self.bookmark_s = 60.0
        self.asked: Counter[str] = Counter()  # by verb
        self._lost = 0  # times that all connections were
        self._changed = asyncio.Event()
        self._never = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ApiServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        if self._runner is not None:
            return
        app = web.Application(client_max_size=4 * 2**20)
        collection = "/api/v1/namespaces/{namespace}/configmaps"
        app.router.add_get(collection, self._collection)
        app.router.add_get(f"{collection}/{{name}}", self._get)
        app.router.add_put(f"{collection}/{{name}}", self._put)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Connections are cut, new ones refused."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            self._wake()
            await runner.cleanup()

    async def restart(self) -> None:
        """What was written is there again; what was watched is forgotten."""
        await self.stop()
        self.compact()
        await self.start()

    def compact(self) -> None:
        self.compacted, self.history = self.revision, []

    # -- what `kubectl` would do

    def write(self, data: Any, name: str = NAME, namespace: str = NAMESPACE) -> Object:
        """Create the ConfigMap, or replace its data."""
        old = self.objects.get((namespace, name))
        metadata = {
            "name": name,
            "namespace": namespace,
            "uid": "u",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "dvt"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Release", "name": "dvt", "uid": "r"}],
            "managedFields": [{"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:data": {".": {}}}}],
        }
        subject = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata if old is None else old["metadata"]}
        return self._store(
            {**subject, **({} if data is None else {"data": data})}, "ADDED" if old is None else "MODIFIED"
        )

    def edit(self, **data: str | None) -> Object:
        """Change single keys; None takes one away."""
        now = {**(self.read().get("data") or {}), **data}
        return self.write({key: value for key, value in now.items() if value is not None})

    def delete(self, name: str = NAME, namespace: str = NAMESPACE) -> None:
        gone = self.objects.pop((namespace, name))
        self._record(gone, "DELETED")

    def read(self, name: str = NAME, namespace: str = NAMESPACE) -> Object:
        return self.objects[namespace, name]

    def stamp(self) -> Any:
        return json.loads(self.read()["data"]["stamp"])

    def budget(self) -> Any:
        return json.loads(self.read()["data"]["budget"])

    # -- what it answers

    def _store(self, subject: Object, kind: str) -> Object:
        place = subject["metadata"]["namespace"], subject["metadata"]["name"]
        return self._record(subject, kind, place)

    def _record(self, subject: Object, kind: str, place: tuple[str, str] | None = None) -> Object:
        self.revision += 1
        subject = copy.deepcopy(subject)
        subject["metadata"]["resourceVersion"] = str(self.revision)
        if place is not None:
            self.objects[place] = subject
        self.history.append((self.revision, kind, subject))
        self.written.append(subject)
        self._wake()
        return subject

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def silence(self) -> None:
        """Half open: what is asked from now on is not answered until `silent` is false again, and what is watched on
        connections of now is never heard of again."""
        self.silent, self._lost = True, self._lost + 1

    async def _let_in(self, request: web.Request, verb: str) -> web.Response | None:
        self.asked[verb] += 1
        if self.silent:
            await self._never.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return _status(401, "Unauthorized")
        if verb in self.denied:
            return _status(403, f'configmaps "{NAME}" is forbidden: User "sa" cannot {verb} resource "configmaps"')
        return None

    async def _collection(self, request: web.Request) -> web.StreamResponse:
        watch = request.query.get("watch") in ("true", "True", "1")
        if (refused := await self._let_in(request, "watch" if watch else "list")) is not None:
            return refused
        field, _, name = request.query.get("fieldSelector", "").partition("=")
        assert field in ("", "metadata.name")
        namespace = request.match_info["namespace"]
        if watch:
            return await self._watch(request, namespace, name)
        items = [o for (where, called), o in self.objects.items() if where == namespace and name in ("", called)]
        head = {"apiVersion": "v1", "kind": "ConfigMapList", "metadata": {"resourceVersion": str(self.revision)}}
        return web.json_response({**head, "items": items})

    async def _watch(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        sent = int(request.query.get("resourceVersion", "0"))
        ends = time.monotonic() + int(request.query.get("timeoutSeconds", "1800"))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if sent > self.revision:
            ahead = f"Too large resource version: {sent}, current: {self.revision}"
            await response.write(_line("ERROR", {"kind": "Status", "code": 504, "reason": "Timeout", "message": ahead}))
            return response
        if sent < self.compacted:
            gone = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}
            await response.write(_line("ERROR", gone))
            return response
        lost = self._lost
        while self._runner is not None:
            changed = self._changed
            if self._lost > lost:
                await changed.wait()  # for the end of the server
                continue
            for revision, kind, subject in list(self.history):
                if revision > sent:
                    sent = revision
                    where = subject["metadata"]["namespace"], subject["metadata"]["name"]
                    if where[0] == namespace and name in ("", where[1]):
                        await response.write(_line(kind, subject))
            wait_s = min(ends - time.monotonic(), self.bookmark_s)
            if wait_s <= 0:
                break
            try:
                async with asyncio.timeout(max(wait_s, 0.05)):
                    await changed.wait()
            except TimeoutError:
                if self.bookmark_s < ends - time.monotonic():
                    head = {"kind": "ConfigMap", "apiVersion": "v1"}
                    await response.write(_line("BOOKMARK", {**head, "metadata": {"resourceVersion": str(sent)}}))
        return response

    async def _get(self, request: web.Request) -> web.Response:
        if (refused := await self._let_in(request, "get")) is not None:
            return refused
        found = self.objects.get((request.match_info["namespace"], request.match_info["name"]))
        return _status(404, "not found") if found is None else web.json_response(found)

    async def _put(self, request: web.Request) -> web.Response:
        subject = await request.json()
        if (refused := await self._let_in(request, "update")) is not None:
            return refused
        place = request.match_info["namespace"], request.match_info["name"]
        old = self.objects.get(place)
        if old is None:
            return _status(404, f'configmaps "{place[1]}" not found')
        seen = subject["metadata"].get("resourceVersion")
        if seen and seen != old["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified; please apply your changes to the latest version")
        if any(not isinstance(value, str) for value in (subject.get("data") or {}).values()):
            return _status(400, "json: cannot unmarshal into Go struct field ConfigMap.data of type string")
        datetime.fromisoformat(subject["metadata"]["creationTimestamp"])
        theirs = {key: subject["metadata"].get(key) for key in ("labels", "annotations", "ownerReferences")}
        kept = {**old["metadata"], **theirs}
        metadata = {key: value for key, value in kept.items() if value is not None}
        now = self._store({**subject, "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, "MODIFIED")
        if self.lose_answers == "hang":
            await self._never.wait()
        if self.lose_answers == "cut":
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(now)


def _status(code: int, message: str) -> web.Response:
    return web.json_response(
        {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}, status=code
    )


def _line(kind: str, subject: Object) -> bytes:
    return json.dumps({"type": kind, "object": subject}).encode() + b"\n"


async def _obey() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    api = ApiServer()
    api.write(None)
    await api.start()
    print(api.port, flush=True)
    while line := (await reader.readline()).decode().strip():
        order, _, rest = line.partition(" ")
        match order:
            case "serve":
                api.silent = False
                api._wake()
                await api.start()
            case "stop":
                await api.stop()
            case "silence":
                api.silence()
            case "restart":
                await api.restart()
            case "put":
                api.edit(**json.loads(rest))
            case "quit":
                break
        print(order, flush=True)
    await api.stop()


if __name__ == "__main__":
    asyncio.run(_obey())
