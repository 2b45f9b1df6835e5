"""The image, run as clusters run it: read-only, without capabilities, as a user that it does not know.

Opt-in: `make image-test` builds it and names it in IMAGE_UNDER_TEST, and what it consists of in SBOM_UNDER_TEST.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.bundle.manifest import EMBEDDED

IMAGE = os.environ.get("IMAGE_UNDER_TEST", "")
ROOT = Path(__file__).parents[2]
PODMAN = ("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs")
# As the restricted pod security standard wants it, and with nothing that can be written to.
RESTRICTED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"),
    *("--network=host", "--no-healthcheck", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"),
)
ANYBODY = "--user=1000660000:0"  # as OpenShift does it: not in /etc/passwd, and in group 0
OPEN = "--env=DVT_OPEN_CONTROL=true"
PATIENCE_S = 60.0
TOKEN = "token-of-a-test"

pytestmark = [pytest.mark.image, pytest.mark.skipif(not IMAGE, reason="runs the container image: make image-test")]


def podman(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PODMAN, *arguments], capture_output=True, text=True, timeout=120, check=False)


def run(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`dvt ARGUMENTS` in a container, to its end."""
    return podman("run", "--rm", *RESTRICTED, *options, IMAGE, *arguments)


def python(code: str, *options: str) -> str:
    done = podman("run", "--rm", *RESTRICTED, *options, "--entrypoint=python3", IMAGE, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Container:
    """`dvt serve` in a container of its own."""

    def __init__(self, *options: str, command: tuple[str, ...] = ("serve",)) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = f"dvt-{uuid.uuid4().hex[:12]}"
        named = ("--name", self.name, f"--env=DVT_PORT={self.port}")
        started = podman("run", "--detach", *named, *RESTRICTED, *options, IMAGE, *command)
        assert started.returncode == 0, started.stderr

    def ready(self) -> Container:
        self.until(lambda: self.status() == 200)
        return self

    def status(self) -> int | None:
        """Of /readyz; None where nobody answers."""
        try:
            return httpx.get(f"{self.url}/readyz").status_code
        except httpx.TransportError:
            return None

    def until(self, so: Callable[[], bool]) -> None:
        """Ask again and again, as long as it runs."""
        end = time.monotonic() + PATIENCE_S
        while not so():
            if time.monotonic() > end or self.state("Running") != "true":
                raise AssertionError(self.logs())

    def state(self, name: str) -> str:
        return podman("inspect", "--format", f"{{{{.State.{name}}}}}", self.name).stdout.strip()

    def logs(self) -> str:
        done = podman("logs", self.name)
        return done.stdout + done.stderr

    def signal(self, name: str) -> None:
        assert podman("kill", "--signal", name, self.name).returncode == 0

    def wait(self) -> int:
        return int(podman("wait", self.name).stdout)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        return podman("exec", self.name, *command)

    def remove(self) -> None:
        podman("rm", "--force", "--time", "0", self.name)


Start = Callable[..., Container]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Container] = []

    def start(*options: str, **named: Any) -> Container:
        started.append(Container(*options, **named))
        return started[-1]

    yield start
    for container in started:
        container.remove()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the control token is mounted, as a secret is."""
    file = tmp_path_factory.mktemp("secrets") / "token"
    file.write_text(TOKEN)
    opened(file.parent)
    return f"--volume={file}:/run/secrets/token:ro"


@pytest.fixture(scope="module")
def served(token: str) -> Iterator[Container]:
    """A server with a token, as any user, without a home, under a quota of one core."""
    options = (ANYBODY, token, "--env=DVT_CONTROL_TOKEN_FILE=/run/secrets/token", "--cpus=1")
    container = Container(*options, "--entrypoint=env", command=("-u", "HOME", "dvt", "serve"))
    yield container.ready()
    container.remove()


@pytest.fixture
def volume() -> Iterator[str]:
    name = f"dvt-{uuid.uuid4().hex[:12]}"
    podman("volume", "create", name)
    yield name
    podman("volume", "rm", "--force", name)


def opened(folder: Path) -> Path:
    """Readable by everybody, up to the root of what tests may write to."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in folder.parents:
        if path.stat().st_mode & 0o055 != 0o055 and path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o055)
    return folder


def is_one_line(text: str) -> bool:
    return text.startswith("Error: ") and text.count("\n") == 1 and text.endswith("\n")


# -- what is in it


def test_it_is_not_root_and_only_what_runs_is_in_it() -> None:
    code = """
        import importlib.util, os
        print(os.getuid(), os.getgid(), *[name for name in ("torch", "pip", "setuptools", "pytest")
                                          if importlib.util.find_spec(name)])
    """
    assert python("if True:" + code).split() == ["65532", "65532"]


def test_its_list_of_parts_names_what_is_installed() -> None:
    parts = json.loads(Path(os.environ["SBOM_UNDER_TEST"]).read_text())
    assert parts["bomFormat"] == "CycloneDX"
    assert parts["metadata"]["component"]["name"] == "dvt-serve"
    listed = {part["name"].lower().replace("_", "-"): part["version"] for part in parts["components"]}
    code = "from importlib.metadata import distributions; print(*[f'{d.name}=={d.version}' for d in distributions()])"
    installed = dict(found.lower().replace("_", "-").split("==") for found in python(code).split())
    installed.pop("dvt-serve")
    assert {name: version for name, version in installed.items() if listed.get(name) != version} == {}


# -- how it serves


def test_it_classifies_as_any_user_without_a_home_in_a_read_only_root(served: Container) -> None:
    photo = (ROOT / "docs" / "example.jpg").read_bytes()
    answer = httpx.post(f"{served.url}/classify", content=photo, headers={"content-type": "image/jpeg"}).json()
    assert answer["results"][0]["predictions"][0]["label"] == "landscape"
    assert "in memory only" in served.logs()


def test_pools_are_as_large_as_the_quota(served: Container) -> None:
    assert httpx.get(f"{served.url}/model").json()["engine"]["executors"] == 1
    assert served.execute(
        "python3", "-c", "from server.settings import Settings as S; print(S().decode_threads)"
    ).stdout


def test_the_budget_moves_for_who_has_the_token(served: Container) -> None:
    assert httpx.put(f"{served.url}/budget", json={"gmacs": 0.05}).status_code == 401
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.put(f"{served.url}/budget", json={"gmacs": 0.05}, headers=headers).status_code == 200


def test_the_health_check_is_that_of_readiness(served: Container, start: Start) -> None:
    declared = json.loads(podman("image", "inspect", IMAGE).stdout)[0]["Healthcheck"]
    how, *command = declared["Test"]
    assert how == "CMD"
    assert served.execute(*command).returncode == 0
    leaving = start(OPEN, "--env=DVT_DRAIN_DELAY_S=600").ready()
    leaving.signal("TERM")
    leaving.until(lambda: leaving.status() == 503)
    checked = leaving.execute(*command)
    assert (checked.returncode, checked.stderr) == (1, "not ready: HTTP/1.1 503 Service Unavailable\n")


def test_without_a_token_it_says_what_to_set() -> None:
    refused = run("serve")
    assert refused.returncode == 2
    assert is_one_line(refused.stderr)
    assert "DVT_CONTROL_TOKEN_FILE" in refused.stderr
    assert "DVT_OPEN_CONTROL" in refused.stderr


# -- how it stops


def test_sigterm_drains(start: Start) -> None:
    container = start(OPEN).ready()
    photo = (ROOT / "docs" / "example.jpg").read_bytes()
    line = http.client.HTTPConnection("127.0.0.1", container.port, timeout=PATIENCE_S)
    line.putrequest("POST", "/classify")
    line.putheader("Content-Type", "image/jpeg")
    line.putheader("Content-Length", str(len(photo)))
    line.endheaders(photo[:1000])
    container.until(lambda: "\ndvt_held_bytes 1000.0" in httpx.get(f"{container.url}/metrics").text)
    container.signal("TERM")
    container.until(lambda: container.status() != 200)
    line.send(photo[1000:])
    answer = line.getresponse()
    assert answer.status == 200
    assert json.loads(answer.read())["results"][0]["predictions"][0]["label"] == "landscape"
    assert container.wait() == 0


def test_sigterm_is_heard_before_there_is_a_server(start: Start) -> None:
    container = start(OPEN)
    status = Path("/proc", container.state("Pid"), "status")
    container.until(lambda: bool(caught_signals(status) >> (signal.SIGTERM - 1) & 1))  # Python itself is up
    container.signal("TERM")
    assert container.wait() in (0, 128 + signal.SIGTERM)
    assert "Listening" not in container.logs()


def caught_signals(status: Path) -> int:
    return int(re.findall(r"^SigCgt:\s+(\w+)$", status.read_text(), re.M)[0], 16)


# -- what is mounted


def test_a_bundle_may_be_mounted_read_only(start: Start, tmp_path: Path) -> None:
    bundle = opened(Path(shutil.copytree(EMBEDDED, tmp_path / "bundle")))
    container = start(OPEN, ANYBODY, f"--volume={bundle}:/bundle:ro", "--env=DVT_BUNDLE=/bundle").ready()
    assert httpx.get(f"{container.url}/model").json()["name"] == "photo10-dvt"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda bundle: (bundle / "bundle.json").write_text("{}"), "bundle.json"),
        (lambda bundle: (bundle / "stage2.onnx").write_bytes(b"broken"), "stage2.onnx"),
        (lambda bundle: bundle.chmod(0o700), "permission denied"),
    ],
    ids=["missing", "not one", "damaged", "unreadable"],
)
def test_a_bundle_that_cannot_be_served_is_one_line(tmp_path: Path, spoil: Callable[[Path], Any], why: str) -> None:
    opened(tmp_path)
    bundle = opened(Path(shutil.copytree(EMBEDDED, tmp_path / "bundles" / "mine")))
    opened(tmp_path)
    spoil(bundle)
    refused = run("serve", "/bundles/mine", options=(OPEN, f"--volume={tmp_path}/bundles:/bundles:ro"))
    assert refused.returncode == 2
    assert is_one_line(refused.stderr)
    assert why in refused.stderr


@pytest.mark.parametrize("user", ["--user=65532:65532", ANYBODY])
def test_a_budget_outlives_its_container_in_a_volume(start: Start, volume: str, user: str) -> None:
    options = (OPEN, user, f"--volume={volume}:/var/lib/dvt", "--env=DVT_STATE_DIR=/var/lib/dvt")
    first = start(*options).ready()
    assert httpx.put(f"{first.url}/budget", json={"gmacs": 0.07}).status_code == 200
    first.signal("TERM")
    assert first.wait() == 0
    second = start(*options).ready()
    assert httpx.get(f"{second.url}/budget").json()["target"] == {"gmacs": 0.07}


def test_a_volume_of_somebody_else_is_named_and_does_not_stop_the_start(start: Start, tmp_path: Path) -> None:
    opened(tmp_path)
    options = (OPEN, f"--volume={tmp_path}:/var/lib/dvt", "--env=DVT_STATE_DIR=/var/lib/dvt")
    container = start(*options).ready()
    assert "budgets cannot be stored: /var/lib/dvt: permission denied" in container.logs()
    assert httpx.put(f"{container.url}/budget", json={"gmacs": 0.07}).status_code == 503


def test_without_a_gpu_an_engine_for_one_is_one_line() -> None:
    refused = run("serve", "--engine", "tensorrt", options=(OPEN,))
    assert refused.returncode == 2
    assert refused.stderr == "Error: the engine tensorrt needs an NVIDIA GPU, and none is here; ask for --engine onnx\n"
