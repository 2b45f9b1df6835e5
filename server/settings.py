"""Every setting of the server, read once at the start from `DVT_*` environment variables.

Nobody else touches the environment, and nothing here changes afterwards. A bad value stops the start with one line
that names the setting. Names carry their unit.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "DVT_"
LOG_LEVELS = ("debug", "info", "warning", "error")
POLICY_STORES = ("file", "configmap")
ENGINES = ("auto", "onnx", "tensorrt", "torch-cuda", "onnx-cuda")


class SettingsError(Exception):
    """A setting that cannot be used. The message is one line and names it."""


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: the smaller of its CPU affinity and its cgroup quota (v2 or v1), at least 1.

    `os.cpu_count()` counts the machine's cores, which in a container is far too many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas(cgroup, membership))]))


def _quotas(cgroup: Path, membership: Path) -> list[float]:
    """Of the process's own group and of all above it: each of them counts.

    In a container the own group is the root of what is mounted, whatever `membership` calls it; under systemd, or where
    the container sees the machine's groups, it lies below.
    """
    try:
        lines = [line.split(":", 2) for line in os.fsdecode(membership.read_bytes()).splitlines()]
    except OSError:
        lines = []
    paths = {controllers: path for _, controllers, path in (line for line in lines if len(line) == 3)}
    v1 = next((path for controllers, path in paths.items() if "cpu" in controllers.split(",")), "/")
    found = [_quota_v2(folder / "cpu.max") for folder in _down(cgroup, paths.get("", "/"))]
    found += [_quota_v1(folder) for folder in _down(cgroup / "cpu", v1)]
    return [quota for quota in found if quota]


def _down(root: Path, path: str) -> Iterator[Path]:
    """The folders from a root down along a path. One that leads out of it, as a namespace may show, is none."""
    yield root
    parts = [part for part in path.split("/") if part]
    if ".." not in parts:
        for part in parts:
            yield (root := root / part)


def _quota_v2(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def default_state_dir() -> Path | None:
    """`$XDG_STATE_HOME/dvt-serve`, by default `~/.local/state/dvt-serve` (XDG base directory specification). None, in
    memory only, for a user without a home, as containers have."""
    base = os.environ.get("XDG_STATE_HOME") or ""
    try:
        # The specification says that a relative path is to be ignored.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "dvt-serve"
    except RuntimeError:
        return None


def is_loopback(host: str) -> bool:
    """Whether who listens on this address or name is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")


class Settings(BaseSettings):
    """Frozen. `DVT_<NAME>` in the environment sets `<name>`; arguments (from the command line) win over it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    # Where it listens
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    backlog: int = Field(2048, ge=1, le=65535, description="Connections that may wait to be accepted.")
    frontends: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that speak HTTP and decode, beside one that runs the cascade; 0: all in one process.",
    )
    max_header_bytes: int = Field(
        65536, ge=1024, description="Largest request line and headers together; more is refused."
    )
    header_timeout_s: float = Field(
        10.0, gt=0, le=600, description="Time for a connection to send a complete request header."
    )
    keep_alive_timeout_s: float = Field(
        75.0, gt=0, le=3600, description="Time for which an idle keep-alive connection stays open."
    )
    send_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="Time for a client to take what was sent; then the connection is dropped."
    )
    max_connections: int = Field(
        4096,
        ge=1,
        description="Connections open at once; beyond them, who has owed bytes the longest is dropped for a new one.",
    )
    allowed_hosts: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="What requests may call the server in `Host`, e.g. `dvt.example.org,*.internal,10.0.0.0/8`, `*`; "
        "by default the names of this machine where it listens on a loopback address, else any.",
    )

    # What it serves
    bundle: Path | None = Field(None, description="Folder of the bundle to serve; by default the embedded one.")
    engine: str = Field(
        "auto",
        description="What runs the stages: `onnx` (on the CPU), `tensorrt`, `torch-cuda`, `onnx-cuda`, or `auto`: the "
        "best that is there.",
    )
    executors: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Batches that run at once, a thread each; by default one per usable core, and 2 on a GPU.",
    )
    max_batch_sizes: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        None, description="Largest batch per stage, e.g. `16,8,4`; by default what pays by `dvt profile` or the engine."
    )
    profile_seconds: float = Field(
        1.0,
        ge=0,
        le=60,
        description="At most so many seconds of the start go to measuring batches, each size twice, where the bundle "
        "has no profile for this machine; 0 measures none: then there are no latency budgets, no brownout and no early "
        "refusals.",
    )
    engine_dir: Path | None = Field(
        None,
        description="Folder for TensorRT's plans, of any number of bundles; by default `engines` in the bundle's. Also "
        "for what torch compiled, which by default is kept for this run only.",
    )
    build_engines: bool = Field(
        False,
        description="At the start, which then takes minutes: build TensorRT's plans that are missing or do not fit, "
        "which else stop it; compile the stages of `torch-cuda`, which else run as they are.",
    )
    state_dir: Path | None = Field(
        default_factory=default_state_dir,
        description="Folder, on a local disk, where the budget is kept across restarts; empty: in memory only.",
    )

    # Where the budget is kept
    policy_store: str = Field(
        "file",
        description="Where the budget is kept: `file`, in `DVT_STATE_DIR`, or `configmap`, one of Kubernetes that all "
        "replicas share (the extra `kubernetes`).",
    )
    policy_configmap: str | None = Field(None, description="Name of that ConfigMap.")
    policy_namespace: str | None = Field(None, description="Its namespace; by default that of the pod.")
    policy_kubeconfig: Path | None = Field(
        None, description="A kubeconfig that says where the API server is; by default the pod's service account does."
    )
    policy_seed: Path | None = Field(
        None, description="File with a budget, as the body of `PUT /budget`, that stands until one is set."
    )

    # How much it takes in
    max_queued_images: int = Field(
        512, ge=1, description="Images that may wait, all stages; more are refused with 503."
    )
    max_slots: int = Field(
        256, ge=1, description="Images that may be between two stages at once, their reuse state kept in memory."
    )
    max_requests: int = Field(
        1024, ge=1, description="Classification requests in the server at once, from header to answer."
    )
    max_held_bytes: int = Field(
        512 * 2**20, ge=1, description="Bytes of request bodies in memory at once, all requests."
    )
    max_images: int = Field(64, ge=1, le=4096, description="Images in one request.")
    max_body_bytes: int = Field(32 * 2**20, ge=1, description="Largest request body.")
    max_pixels: int = Field(
        25_000_000, ge=1, description="Largest image in pixels, judged from its header before decoding."
    )
    max_aspect: float = Field(20.0, ge=1, description="Largest ratio of an image's long side to its short side.")
    min_side: int = Field(1, ge=1, description="Smallest side of an image in pixels.")
    decode_threads: int = Field(
        default_factory=usable_cores,
        ge=1,
        le=256,
        description="Threads that decode images; by default the usable cores.",
    )
    max_queued_decodes: int = Field(
        256, ge=1, description="Images that may wait for a decoding thread; more are refused with 503."
    )

    # How long it waits
    timeout_ms: float = Field(1000.0, gt=0, description="Time for an answer where the request names none.")
    max_timeout_ms: float = Field(30_000.0, gt=0, description="Largest `timeout_ms` that a request may name.")
    body_timeout_s: float = Field(30.0, gt=0, le=3600, description="Time for a request body to arrive; then 408.")
    min_body_bytes_per_s: float = Field(
        1024.0, ge=0, description="Bytes a second, over five seconds, that a body must come at; else 408."
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        le=600,
        description="After SIGTERM: not ready, but serving, for so long (a load balancer looks away).",
    )
    drain_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="After that: time for accepted requests to be answered."
    )

    stall_timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Time for a batch in the engine, or 20 times what such a batch is believed to take, or for an "
        "image in a decoding thread; then `/livez` and `/readyz` answer 503 until it comes back.",
    )

    # What it answers
    top_k: int = Field(5, ge=1, description="Predictions per image where the request names no `top_k`.")
    audit_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the requests of which an image is held against the last exit, behind the answer; 0 "
        "audits none.",
    )
    control_token_file: Path | None = Field(
        None, description="File with a bearer token that `PUT /budget` then asks for; by default none is asked."
    )
    open_control: bool = Field(
        False,
        description="Where other machines are let in and no token is set: start all the same, so that whoever reaches "
        "the server may change its budget.",
    )
    log_level: str = Field("info", description="One of `debug`, `info`, `warning`, `error`.")

    @field_validator("max_batch_sizes", "allowed_hosts", mode="before")
    @classmethod
    def _comma_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(value.split(",")) if value.strip() else None
        return value

    @field_validator("max_batch_sizes")
    @classmethod
    def _positive(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and min(value) < 1:
            raise ValueError("every batch size must be at least 1")
        return value

    @field_validator(
        "bundle",
        "engine_dir",
        "state_dir",
        "control_token_file",
        "policy_configmap",
        "policy_namespace",
        "policy_kubeconfig",
        "policy_seed",
        mode="before",
    )
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("policy_store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if value not in POLICY_STORES:
            raise ValueError(f"must be one of {', '.join(POLICY_STORES)}")
        return value

    @field_validator("policy_configmap", "policy_namespace")
    @classmethod
    def _name_of_kubernetes(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", value):
            raise ValueError("is no name that Kubernetes gives: a-z, 0-9, '-' and '.'")
        return value

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"must be one of {', '.join(ENGINES)}")
        return value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.lower() not in LOG_LEVELS:
            raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
        return value.lower()

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        for smaller, larger in (
            ("timeout_ms", "max_timeout_ms"),
            ("max_images", "max_queued_images"),  # else a full request could never be taken
            ("max_images", "max_queued_decodes"),
            ("max_body_bytes", "max_held_bytes"),
        ):
            low, high = getattr(self, smaller), getattr(self, larger)
            if low > high:
                names = f"{PREFIX}{smaller.upper()} ({low:g}), {PREFIX}{larger.upper()} ({high:g})"
                raise ValueError(f"the first of {names} must not be above the second")
        if self.policy_store == "configmap" and self.policy_configmap is None:
            raise ValueError("DVT_POLICY_STORE=configmap needs DVT_POLICY_CONFIGMAP, the name of the ConfigMap")
        if not (is_loopback(self.host) or self.control_token_file or self.open_control):
            raise ValueError(
                f"DVT_HOST={self.host} lets other machines in, and whoever reaches it could change the budget: set "
                "DVT_CONTROL_TOKEN_FILE, or DVT_OPEN_CONTROL=true where that is meant"
            )
        return self

    def check_batch_sizes(self, stages: int) -> None:
        """Raises SettingsError for other than one size for each stage."""
        sizes = self.max_batch_sizes
        if sizes is not None and len(sizes) != stages:
            raise SettingsError(
                f"bad setting DVT_MAX_BATCH_SIZES: {len(sizes)} sizes, but the model has {stages} stages"
            )


def read_settings(arguments: Mapping[str, Any] | None = None) -> Settings:
    """The settings from the environment, with `arguments` on top. Raises SettingsError."""
    try:
        return Settings(**(arguments or {}))
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(item) for item in error.errors())) from None


def _sentence(item: Any) -> str:
    reason = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:  # a rule between settings names them itself
        return f"bad settings: {reason}"
    name = str(item["loc"][0])
    return f"bad setting {PREFIX}{name.removeprefix(PREFIX.lower()).upper()}={item['input']!r}: {reason}"
