"""The budget of a fleet in one ConfigMap of Kubernetes, through its official client (the extra `kubernetes`).

Two keys of its `data` are ours. `budget` is what people may write by hand: the body of a PUT /budget. `stamp` is ours
alone: the version that this budget has, the model that it is for, who set it and when, and a digest of `budget`, by
which a budget that was edited without us is known. Compare-and-set is Kubernetes' own, by resourceVersion; those are
numbers that grow with every write, so of two sights one is known to be the later.

The client's own Watch is not used: it makes a TLS context for every watch, which holds the event loop up, and takes a
line that is not JSON for an event. A watch is told to end after WATCH_S and given up WAIT_S later, since nothing else
ends one whose link is half open. There are no retries here: whoever follows the store knows when to ask again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from server.budget.store import Held, Policy, Refusal, StoreMoved, parse_budget, read_policy, write_policy
from server.documents import SOUND_INTEGER, shown
from server.errors import StoreUnavailable

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from kubernetes.aio.client import ApiClient, Configuration, CoreV1Api

log = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_S = 30.0
WAIT_S = 5.0  # for one answer, and for the end of a watch that is overdue
BUDGET, STAMP = "budget", "stamp"

Connect = Callable[[], Awaitable["ApiClient"]]


class NoCluster(Exception):
    """There is no access to an API server as things are. The message is one line."""


def in_cluster(account: Path = ACCOUNT) -> Connect:
    """By the pod's service account. Raises NoCluster where there is none."""
    from kubernetes.aio.client import ApiClient, Configuration
    from kubernetes.aio.config import ConfigException
    from kubernetes.aio.config.incluster_config import InClusterConfigLoader

    token, ca = account / "token", account / "ca.crt"
    try:
        InClusterConfigLoader(str(token), str(ca), try_refresh_token=False).load_and_set(Configuration())
    except (ConfigException, OSError, ValueError) as error:
        raise NoCluster(f"there is no service account of a pod: {error}") from None

    async def connect() -> ApiClient:
        configuration = Configuration()
        InClusterConfigLoader(str(token), str(ca), try_refresh_token=False).load_and_set(configuration)
        follow_token(configuration, token)
        return ApiClient(configuration)

    return connect


def by_kubeconfig(file: Path) -> Connect:
    """As `kubectl` does: for whoever is not in a pod."""
    from kubernetes.aio.client import ApiClient, Configuration
    from kubernetes.aio.config import load_kube_config

    async def connect() -> ApiClient:
        configuration = Configuration()
        await load_kube_config(str(file), client_configuration=configuration, persist_config=False)
        return ApiClient(configuration)

    return connect


def follow_token(configuration: Configuration, file: Path) -> None:
    """Read the token anew for every request: the kubelet replaces it, and the old one is not taken for long. It is a
    file in memory, and a request is a rare thing here."""

    def read(configuration: Configuration) -> None:
        try:
            configuration.api_key["BearerToken"] = f"Bearer {file.read_text().strip()}"
        except (OSError, ValueError) as error:
            detail = f"the token of the service account cannot be read: {_line(error)}"
            raise StoreUnavailable(detail, reason="denied") from None

    read(configuration)
    configuration.refresh_api_key_hook = read  # type: ignore[assignment]  # which is declared as None


def account_namespace(account: Path = ACCOUNT) -> str | None:
    with suppress(OSError):
        return (account / "namespace").read_text().strip() or None
    return None


@dataclass(eq=False, slots=True)
class _Link:
    """A client of the API server. One that was given up is closed behind the last request that uses it: a watch that
    is denied must not take the ground from under a PUT."""

    client: ApiClient
    given_up: bool = False
    users: int = 0

    async def close_if_unused(self) -> None:
        if self.given_up and not self.users:
            with suppress(Exception):
                await self.client.close()


class ConfigMapStore:
    """One named ConfigMap. It is not made here: who may make one may make any."""

    name: ClassVar[str] = "configmap"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        namespace: str,
        model: str,
        connect: Connect,
        last_known: Path | None = None,
        watch_s: float = WATCH_S,
        wait_s: float = WAIT_S,
    ) -> None:
        """`model`: the name of the bundle, whose budget this is, whatever its version. `last_known`: a file for what
        was last in force, for a start without the API server."""
        self._name, self._namespace = name, namespace
        self._model = model
        self._connect = connect
        self._last_known = last_known
        self._watch_s, self._wait_s = watch_s, wait_s
        self._link: _Link | None = None
        self._cursor = ""  # where the next watch begins

    def __str__(self) -> str:
        return f"ConfigMap {self._namespace}/{self._name}"

    def recall(self) -> Policy | None:
        if self._last_known is None:
            return None
        try:
            return read_policy(self._last_known)
        except FileNotFoundError:
            return None

    def sync(self, policy: Policy) -> None:
        if self._last_known is not None:
            write_policy(self._last_known, policy)

    async def load(self) -> Held:
        async with self._asking("read") as api, asyncio.timeout(self._wait_s):
            response = await api.list_namespaced_config_map_without_preload_content(
                self._namespace, field_selector=f"metadata.name={self._name}", _request_timeout=self._wait_s
            )
            document = await self._document(response, "read")
        try:
            items, cursor = document["items"] or [], str(document["metadata"]["resourceVersion"])
            found = [item for item in items if item["metadata"]["name"] == self._name]
        except (KeyError, TypeError):
            raise _strange(document) from None
        if not found:
            raise StoreUnavailable(f"there is no {self}: see docs/fleet.md", reason="missing")
        held = self._held(found[0])
        self._cursor = cursor
        return held

    async def watch(self) -> AsyncGenerator[Held | None]:
        # No asyncio.timeout here: it would strike at whatever the reader of the generator is at.
        async with self._asking("watch") as api:
            response = await api.list_namespaced_config_map_without_preload_content(
                self._namespace,
                field_selector=f"metadata.name={self._name}",
                resource_version=self._cursor,
                watch=True,
                allow_watch_bookmarks=True,
                timeout_seconds=max(1, round(self._watch_s)),
                _request_timeout=self._watch_s + self._wait_s,
            )
            try:
                if response.status != 200:
                    await self._document(response, "watch")
                yield None
                async for line in response.content:
                    if line.strip():
                        yield self._told(line)
            finally:
                response.close()  # of a watch that was left, nothing is worth reading

    def _told(self, line: bytes) -> Held | None:
        """What an event of the watch says of the ConfigMap; of a bookmark only that all is well."""
        try:
            event = orjson.loads(line)
            kind, subject = event["type"], event["object"]
            if kind == "ERROR":
                raise self._failure(int(subject.get("code") or 0), str(subject.get("message")), "watch")
            cursor = str(subject["metadata"]["resourceVersion"])
            held = None if kind == "BOOKMARK" else self._held(subject)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _strange(line) from None
        self._cursor = cursor
        if kind == "DELETED":
            raise StoreUnavailable(f"the {self} was deleted", reason="missing")
        return held

    async def compare_and_set(self, policy: Policy, seen: Held) -> Held:
        from kubernetes.aio.client import V1ConfigMap

        body = {"hold": policy.hold, **({"mix": True} if policy.mix else {}), **policy.target}
        budget = orjson.dumps(body).decode()
        stamp = {
            "version": policy.version,
            "model": self._model,
            "of": _digest(budget),
            "by": policy.by,
            "at": policy.at,
        }
        data = {**(seen.mark.get("data") or {}), BUDGET: budget, STAMP: orjson.dumps(stamp).decode()}
        subject = V1ConfigMap.from_dict({**seen.mark, "data": data})  # with the resourceVersion that was seen
        assert subject is not None, "it was made of a dict"
        async with self._asking("update") as api, asyncio.timeout(self._wait_s):
            response = await api.replace_namespaced_config_map_without_preload_content(
                self._name,
                self._namespace,
                subject,
                field_manager="dvt-serve",
                _request_timeout=self._wait_s,
            )
            document = await self._document(response, "update")
        return self._held(document)

    def close(self) -> None:
        pass  # it is nobody's alone, so there is nothing to give up

    async def disconnect(self) -> None:
        if (link := self._link) is not None:
            self._give_up(link)
            await link.close_if_unused()

    def _give_up(self, link: _Link) -> None:
        """Whoever asks next connects anew, with certificates and tokens as they are then."""
        link.given_up = True
        if self._link is link:
            self._link = None

    def _held(self, subject: Mapping[str, Any]) -> Held:
        """What a ConfigMap holds. Raises StoreUnavailable for what is none."""
        try:
            mark = str(subject["metadata"]["resourceVersion"])
            data = subject.get("data") or {}
            budget, stamp = data.get(BUDGET), data.get(STAMP)
        except (KeyError, TypeError, AttributeError):
            raise _strange(subject) from None
        order = int(mark) if re.fullmatch("[0-9]{1,18}", mark) else 0
        if budget is None:
            return Held(None, _stamp(stamp)[0], subject, order)
        version, model, digest, by, at = _stamp(stamp)

        def refuse(reason: str, detail: str) -> Held:
            return Held(None, version, subject, order, Refusal(reason, f"the {self} {detail}"))

        if model is not None and model != self._model:
            return refuse(
                "other_model",
                f"holds the budget of the model {shown(model)}, and this is {shown(self._model)}: give each a "
                "ConfigMap of its own",
            )
        try:
            if not isinstance(budget, str):
                raise ValueError("is no text")
            target, hold, mix = parse_budget(budget)
        except ValueError as error:
            return refuse("nonsense", f"holds no budget under {BUDGET!r}: {error}")
        if digest == _digest(budget) and version:
            return Held(Policy(version, target, hold, mix, by, at), version, subject, order)
        return Held(Policy(version, target, hold, mix, "hand"), version, subject, order, stamped=False)

    @asynccontextmanager
    async def _asking(self, verb: str) -> AsyncIterator[CoreV1Api]:
        """Whatever goes wrong is a StoreUnavailable that says what it was; nothing else comes out."""
        import aiohttp
        from kubernetes.aio.client import ApiException, CoreV1Api

        link = None
        try:
            if self._link is None:
                client = await self._access()
                link = _Link(client, given_up=self._link is not None)  # where another one was quicker: for this once
                self._link = self._link or link
            link = link or self._link
            link.users += 1
            yield CoreV1Api(link.client)
        except (StoreUnavailable, StoreMoved) as error:
            if link is not None and isinstance(error, StoreUnavailable) and error.extra.get("reason") == "denied":
                self._give_up(link)
            raise
        except ApiException as error:
            raise self._failure(int(error.status or 0), str(error.reason), verb) from None
        except TimeoutError:
            unknown = ": it is not known whether the budget was stored" if verb == "update" else ""
            raise StoreUnavailable(f"the API server does not answer{unknown}", reason="timeout") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            if link is not None and isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
                self._give_up(link)
            raise StoreUnavailable(f"the API server cannot be reached: {_why(error)}", reason="unreachable") from None
        except ValueError as error:  # a line without end
            raise StoreUnavailable(f"the API server's answer cannot be read: {_line(error)}", reason="other") from None
        finally:
            if link is not None:
                link.users -= 1
                await link.close_if_unused()

    async def _access(self) -> ApiClient:
        try:
            return await self._connect()
        except StoreUnavailable:
            raise
        except Exception as error:  # a file that somebody wrote is read by others' code
            raise StoreUnavailable(f"there is no access to an API server: {_line(error)}", reason="denied") from None

    async def _document(self, response: ClientResponse, verb: str) -> dict[str, Any]:
        content = await response.read()
        try:
            document = orjson.loads(content)
        except ValueError:
            document = None
        if response.status not in (200, 201):
            message = document.get("message") if isinstance(document, dict) else None
            raise self._failure(response.status, str(message or response.reason), verb)
        if not isinstance(document, dict):
            raise _strange(content)
        return document

    def _failure(self, status: int, message: str, verb: str) -> Exception:
        message = _line(message)
        match status:
            case 401 | 403:
                return StoreUnavailable(
                    f"the API server does not let this server {verb} the {self} ({status}): {message}", reason="denied"
                )
            case 404:
                return StoreUnavailable(f"there is no {self}: see docs/fleet.md", reason="missing")
            case 409 if verb == "update":
                return StoreMoved()
            case 410:
                return StoreUnavailable(f"the watch of the {self} is too old to go on with", reason="expired")
        return StoreUnavailable(f"the API server answers {status}: {message}", reason="other")


def _stamp(text: object) -> tuple[int, str | None, str, str, str]:
    """Version, model, digest, by whom, when; 0 and None where a stamp does not say so."""
    try:
        document = orjson.loads(text) if isinstance(text, str) else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return 0, None, "", "", ""
    version, model = document.get("version"), document.get("model")
    return (
        version if type(version) is int and 1 <= version < SOUND_INTEGER else 0,
        model if isinstance(model, str) else None,
        str(document.get("of")),
        str(document.get("by", ""))[:200],
        str(document.get("at", ""))[:40],
    )


def _digest(budget: str) -> str:
    return hashlib.sha256(budget.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _why(error: BaseException) -> str:
    """What the system said, without addresses: everybody may read it in GET /budget."""
    number = getattr(getattr(error, "os_error", error), "errno", None)
    return os.strerror(number).lower() if number else type(error).__name__


def _line(error: object) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _strange(answer: object) -> StoreUnavailable:
    return StoreUnavailable(f"the API server answers what is no ConfigMap: {shown(answer)}", reason="other")
