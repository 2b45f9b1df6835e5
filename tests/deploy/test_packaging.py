"""What images are made of, read without building one. (What they do: `make image-test`.)"""

from __future__ import annotations

import re
import shutil
import socketserver
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy" / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
TENSORRT = ("tensorrt-cu13", "tensorrt-cu13-bindings")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pins(file: Path) -> dict[str, str]:
    """By canonical name."""
    text = re.sub(r"\s*\\\n\s*", " ", file.read_text())
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line.partition(" --hash")[0])
            found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def wanted(image: str) -> list[Requirement]:
    named = PROJECT["project"]["dependencies"] + EXTRAS["cpu"] + (EXTRAS["gpu-trt"] if image == "gpu" else [])
    return [requirement for text in named if (requirement := Requirement(text)).name not in TENSORRT]


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_an_image_installs_what_the_project_asks_for_in_the_versions_that_the_tests_ran_with(image: str) -> None:
    locked, tested = pins(LOCKS / f"{image}.txt"), pins(ROOT / "constraints.txt")
    for requirement in wanted(image):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    others = {name for name, version in locked.items() if tested.get(name) != version}
    assert others <= {"colorama"}  # of click, on Windows


@pytest.mark.parametrize("file", sorted(LOCKS.glob("*.txt")), ids=lambda file: file.stem)
def test_every_file_that_is_installed_has_a_hash_and_no_index_is_named(file: Path) -> None:
    text = file.read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=sha256:[0-9a-f]{64}\b)", text, re.M)
    if file.stem != "without-tensorrt":
        assert all("--hash=" in block for block in re.split(r"\n(?=[a-z])", text)[1:])


def test_no_image_has_what_only_training_and_tests_need() -> None:
    for image in ("cpu", "gpu"):
        names = pins(LOCKS / f"{image}.txt").keys()
        assert names.isdisjoint({"torch", "onnx", "pytest", "setuptools", "pip", "onnxruntime-gpu"})
    assert not any("nvidia" in name or "cuda" in name or "tensorrt" in name for name in pins(LOCKS / "cpu.txt"))


def test_the_parts_of_tensorrt_are_of_one_version_that_the_project_takes() -> None:
    locked = pins(LOCKS / "tensorrt.txt")
    assert tuple(sorted(locked)) == TENSORRT
    assert len(set(locked.values())) == 1
    (asked,) = (Requirement(text) for text in EXTRAS["gpu-trt"] if text.startswith("tensorrt"))
    assert asked.specifier.contains(locked["tensorrt-cu13"])
    inputs = [
        Requirement(line) for line in (LOCKS / "tensorrt.in").read_text().splitlines() if not line.startswith("#")
    ]
    assert {requirement.specifier for requirement in inputs} == {asked.specifier}


def test_what_builds_the_wheel_is_what_the_project_says() -> None:
    lines = (LOCKS / "build.in").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == PROJECT["build-system"]["requires"]


def test_all_that_is_copied_into_an_image_is_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = [line[1:] for line in ignored if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
    sources = {source.rstrip("/") for line in copied for source in line.split()}
    assert sources == set(let_through)
    assert all((ROOT / source).exists() for source in sources)


def test_an_image_has_one_user_who_is_not_root_and_no_tag_that_moves() -> None:
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.M) == ["65532:65532"]
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert set(bases) == {"${PYTHON_IMAGE}", "build", "scratch"}
    assert re.search(r"^ARG PYTHON_IMAGE=docker\.io/library/python:3\.\d+-slim-\w+$", DOCKERFILE, re.M)
    assert "TOKEN" not in DOCKERFILE


# -- deploy/compose.yaml


def composition() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return document


@pytest.mark.parametrize("name", list(composition()["services"]))
def test_no_service_may_do_more_than_it_must(name: str) -> None:
    service = composition()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add"} & service.keys()
    tag = service["image"].rpartition(":")[2].rstrip("}")
    assert tag not in ("", "latest")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_server_is_asked_for_a_token_that_nobody_ships() -> None:
    document = composition()
    environment = document["services"]["dvt"]["environment"]
    assert environment["DVT_CONTROL_TOKEN_FILE"] == "/run/secrets/control-token"
    assert "DVT_OPEN_CONTROL" not in environment
    file = document["secrets"]["control-token"]["file"].removeprefix("./")
    assert f"/deploy/{file}" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_server_is_given_the_time_that_it_takes_to_drain() -> None:
    from server.settings import Settings

    fields = Settings.model_fields
    least = fields["drain_delay_s"].default + fields["drain_timeout_s"].default + 10
    assert float(composition()["services"]["dvt"]["stop_grace_period"].removesuffix("s")) > least


def test_every_setting_of_the_composition_is_one() -> None:
    from server.settings import PREFIX, Settings

    text = (ROOT / "deploy" / "compose.yaml").read_text() + DOCKERFILE
    for name in re.findall(rf"\b{PREFIX}([A-Z_]+)\b(?=[:=])", text):
        assert name.lower() in Settings.model_fields or name == "IMAGE", name


def test_prometheus_and_grafana_find_what_they_are_given() -> None:
    services = composition()["services"]
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["static_configs"] == [{"targets": ["dvt:8000"]}]
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dvt.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_takes_its_configuration() -> None:
    file = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- deploy/healthcheck.py


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that gives this answer to whatever is asked."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.server.asked = self.rfile.readline()  # type: ignore[attr-defined]
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
    assert server.asked == b"GET /readyz HTTP/1.0\r\n"  # type: ignore[attr-defined]


def health(**environment: str) -> tuple[int, str]:
    script = [sys.executable, str(ROOT / "deploy" / "healthcheck.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", ""])
def test_a_server_that_is_ready_is_healthy(host: str) -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as port:
        proxy = "http://127.0.0.1:1"  # is not asked
        assert health(DVT_HOST=host, DVT_PORT=str(port), http_proxy=proxy, HTTP_PROXY=proxy) == (0, "")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP/1.1 503 Service Unavailable"),
        (b"", "no answer"),
        (b"200\r\n", "200"),
        (b"\xff\xfe 2000 \r\n", "\xff\xfe 2000 "),
    ],
)
def test_any_other_answer_is_one_line(answer: bytes, why: str) -> None:
    with answering(answer) as port:
        assert health(DVT_PORT=str(port), PYTHONIOENCODING="utf-8") == (1, f"not ready: {why}\n")


def test_no_server_is_one_line() -> None:
    status, said = health(DVT_PORT="1")
    assert status == 1
    assert re.fullmatch(r"no server answers at 127\.0\.0\.1:1: .+\n", said)
