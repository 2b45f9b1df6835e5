"""Rendered pods as real processes: the container's command and environment, its probes, its volumes as a kubelet makes
them. What a cluster adds is in docs/kubernetes.md."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.bundle.manifest import EMBEDDED, Bundle, Manifest, StageSpec, write_manifest
from tests.deploy.rendered import KUBERNETES, ROOT, Object, environment, pods, render, server
from tests.server.engines.tensorrt.half_graphs import half_graph
from tests.server.engines.tensorrt.tiny_bundle import write_bundle

START_S = 60.0
EXAMPLE = (ROOT / "docs" / "example.jpg").read_bytes()
MINUS_M = {"dvt": ["-m", "server"]}  # the command that is installed, without relying on where


def mounted(folder: Path, files: Mapping[str, str]) -> None:
    """Files of a Secret as a kubelet writes them, at first and anew: a folder for each version behind the link ..data,
    which is replaced in one step, and links through it."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..{time.monotonic_ns()}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_text(content)
    (folder / "..data_tmp").symlink_to(version.name)
    os.replace(folder / "..data_tmp", folder / "..data")
    for name in files:
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(f"..data/{name}")
    for old in folder.glob("..[0-9]*"):
        if old != version:
            shutil.rmtree(old)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Pod:
    """One container, started; `settings` stand in for what an overlay would merge. It listens on loopback alone."""

    def __init__(self, objects: list[Object], container: Object, folder: Path, **settings: str) -> None:
        self.container = container
        self.folder = folder
        self.port = free_port()
        values = environment(objects, container)
        for mount in container["volumeMounts"]:
            (folder / mount["name"]).mkdir(exist_ok=True)
        values = {name: self._here(value) for name, value in values.items()}
        values |= {"DVT_HOST": "127.0.0.1", "DVT_PORT": str(self.port), **settings}
        (program, *arguments) = (
            values.get(word[2:-1], word) if word[:2] == "$(" else word for word in container["command"]
        )
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *MINUS_M[program], *arguments],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **values},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def _here(self, value: str) -> str:
        """A path in a volume, where it lies on this machine."""
        for mount in self.container["volumeMounts"]:
            where = mount["mountPath"]
            if value == where or value.startswith(f"{where}/"):
                return f"{self.folder / mount['name']}{value.removeprefix(where)}"
        return value

    def ask(self, path: str, **options: Any) -> httpx.Response:
        return httpx.request(options.pop("method", "GET"), f"http://127.0.0.1:{self.port}{path}", timeout=10, **options)

    def probe(self, kind: str) -> bool:
        """As the kubelet asks: any status from 200 to 399 will do."""
        try:
            return 200 <= self.ask(self.container[f"{kind}Probe"]["httpGet"]["path"]).status_code < 400
        except httpx.TransportError:
            return False

    def probe_until_ready_or_ended(self, meanwhile: Callable[[], object] = lambda: None) -> bool:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.probe("startup"):
                return True
            meanwhile()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
                return False
        raise TimeoutError(self.log.read_text())

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


Start = Callable[..., Pod]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start("a", DVT_BUNDLE=...)`: a pod of overlays/cpu, with a token, in a folder of its own by that name."""
    objects = render(KUBERNETES / "overlays" / "cpu")
    ((_, pod),) = pods(objects)
    root = tmp_path_factory.mktemp("pods")
    started = []

    def run(name: str, *, secret: Mapping[str, str] | None = None, **settings: str) -> Pod:
        (folder := root / name).mkdir(exist_ok=True)
        mounted(folder / "control", {"token": "first"} if secret is None else secret)
        started.append(Pod(objects, server(pod), folder, **{"DVT_DRAIN_DELAY_S": "0", **settings}))
        return started[-1]

    yield run
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def old(start: Start) -> Pod:
    """The version that serves while others are tried."""
    pod = start("old", DVT_TIMEOUT_MS="20000")  # it answers however busy the machine is
    assert pod.probe_until_ready_or_ended()
    return pod


def put(pod: Pod, token: str) -> int:
    headers = {"authorization": f"Bearer {token}"}
    return pod.ask("/budget", method="PUT", json={"gmacs": 0.05}, headers=headers).status_code


def classify(pod: Pod) -> int:
    headers = {"content-type": "image/jpeg"}
    return pod.ask("/classify", method="POST", content=EXAMPLE, headers=headers).status_code


def test_what_is_rendered_serves_and_its_probes_pass(old: Pod) -> None:
    assert all(old.probe(kind) for kind in ("startup", "readiness", "liveness"))
    assert classify(old) == 200
    assert old.ask("/model").json()["engine"]["executors"] == int(old.container["resources"]["requests"]["cpu"])
    assert old.ask("/budget", method="PUT", json={"gmacs": 0.05}).status_code == 401


def test_a_token_that_is_rotated_counts_without_a_restart_and_a_broken_one_does_not(old: Pod) -> None:
    control = old.folder / "control"
    assert put(old, "first") == 200
    mounted(control, {"token": "second\n"})
    assert (put(old, "first"), put(old, "second")) == (403, 200)
    mounted(control, {"token": ""})
    assert put(old, "second") == 200
    mounted(control, {"other": "third"})  # the key that is asked for is gone
    assert put(old, "second") == 200
    mounted(control, {"token": "third"})
    assert (put(old, "second"), put(old, "third")) == (403, 200)
    mounted(control, {"token": "first"})
    warned = [line for line in old.log.read_text().splitlines() if "the control token stays as it was" in line]
    assert len(warned) == 2
    assert not any(token in old.log.read_text() for token in ("first", "second", "third"))


def test_a_budget_outlives_the_container(start: Start) -> None:
    pod = start("budget")
    assert pod.probe_until_ready_or_ended()
    assert put(pod, "first") == 200
    assert pod.stop() == 0
    again = start("budget")
    assert again.probe_until_ready_or_ended()
    assert again.ask("/budget").json()["target"] == {"gmacs": 0.05}
    assert again.stop() == 0


def test_a_secret_without_the_key_stops_the_start_in_one_line(start: Start) -> None:
    pod = start("no-key", secret={"tokn": "first"})
    assert not pod.probe_until_ready_or_ended()
    assert pod.process.returncode == 2
    assert pod.log.read_text().splitlines()[-1].endswith("control/token': no such file or directory")


# --- bundles that fail verification -----------------------------------------------------------------------------------


def flip(bundle: Path) -> None:
    content = bytearray((bundle / "stage2.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "stage2.onnx").write_bytes(content)


def cut(bundle: Path) -> None:
    os.truncate(bundle / "stage3.onnx", 1000)


def of_another(bundle: Path) -> None:
    text = (bundle / "frontier.json").read_text()
    manifest = Manifest.model_validate_json((bundle / "bundle.json").read_text())
    (bundle / "frontier.json").write_text(text.replace(manifest.version, "0123456789ab"))


def link(bundle: Path) -> None:
    (bundle / "stage1.onnx").rename(bundle / "elsewhere")
    (bundle / "stage1.onnx").symlink_to("elsewhere")


def no_graph(bundle: Path) -> None:
    """Every hash is right: what was exported is no graph."""
    before = Manifest.model_validate_json((bundle / "bundle.json").read_text())
    (bundle / "stage1.onnx").write_bytes(b"no graph")
    stages = [
        StageSpec.of(bundle, s.file, inputs=s.inputs, outputs=s.outputs, grid=s.grid, gmacs=s.gmacs)
        for s in before.stages
    ]
    write_manifest(
        bundle,
        name=before.name,
        labels=before.labels,
        preprocessing=Bundle.load(EMBEDDED).preprocessing,
        stages=stages,
    )
    after = Bundle.load(bundle, need_frontier=False)
    after.write_frontier(replace(Bundle.load(EMBEDDED).frontier, key=after.manifest.frontier_key))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (flip, "stage2.onnx: sha256 is"),
        (cut, "stage3.onnx: sha256 is"),
        (of_another, "frontier.json: "),
        (link, "stage1.onnx: is a symbolic link"),
        (no_graph, "stage1.onnx"),
        (lambda bundle: (bundle / "bundle.json").unlink(), "bundle.json: no such file"),
        (lambda bundle: (bundle / "frontier.json").unlink(), "frontier.json: is missing"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=["flipped", "cut", "of-another", "link", "no-graph", "no-manifest", "no-frontier", "no-folder"],
)
def test_a_bundle_that_fails_verification_is_never_ready_and_the_version_before_serves_on(
    start: Start, old: Pod, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    """As an update does it with maxUnavailable 0: the old one goes when the new one is ready, and not before."""
    assert put(old, "first") == 200
    shutil.copytree(EMBEDDED, bundle := tmp_path / "bundle")
    spoil(bundle)
    new = start(tmp_path.name, DVT_BUNDLE=str(bundle))
    statuses: list[int] = []
    assert not new.probe_until_ready_or_ended(lambda: statuses.append(classify(old)))
    assert new.process.returncode == 2
    *_, last = new.log.read_text().splitlines()
    assert last.startswith("Error: ")
    assert says in last
    assert statuses
    assert set(statuses) == {200}
    assert old.ask("/budget").json()["target"] == {"gmacs": 0.05}


def test_the_bundle_put_right_it_becomes_ready(start: Start, tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, bundle := tmp_path / "bundle")
    flip(bundle)
    assert not start("spoiled", DVT_BUNDLE=str(bundle)).probe_until_ready_or_ended()
    shutil.copy(EMBEDDED / "stage2.onnx", bundle)
    assert start("mended", DVT_BUNDLE=str(bundle)).probe_until_ready_or_ended()


# --- what a GPU's pod says where there is none ------------------------------------------------------------------------


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a driver")
@pytest.mark.parametrize("kind", ["initContainers", "containers"])
def test_a_node_without_a_gpu_is_one_line_of_the_log(tmp_path: Path, kind: str) -> None:
    """The scheduler never brings it there; what would bring it is a device plugin that lies."""
    objects = render(KUBERNETES / "overlays" / "nvidia-l4")
    ((_, pod),) = pods(objects)
    bundle = write_bundle(tmp_path / "half", graphs=half_graph).path
    with_a_frontier = {"containers": str(EMBEDDED), "initContainers": str(bundle)}[kind]
    mounted(tmp_path / "control", {"token": "first"})
    one = Pod(objects, pod[kind][0], tmp_path, DVT_BUNDLE=with_a_frontier)
    assert one.process.wait(60) in (1, 2)
    *_, last = one.log.read_text().splitlines()
    assert last.startswith("Error: ")
    assert "no NVIDIA driver on this machine" in last or "needs an NVIDIA GPU, and none is here" in last
