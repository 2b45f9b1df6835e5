"""Kustomizations as the API server would get them, and how a kubelet reads them."""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
Object = dict[str, Any]

UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 0.001}


@functools.cache
def kubectl() -> str:
    """Beside the interpreter, where the development packages put it; else one that the machine has."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("there is no kubectl for this system on PyPI, and none is installed")
    return found


@functools.cache
def _render(folder: Path) -> str:
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization, for the caller to change."""
    return [each for each in yaml.load_all(_render(folder), yaml.CSafeLoader) if each]


def compose(folder: Path, overlay: str, components: Sequence[str] = (), more: str = "") -> list[Object]:
    """An overlay with components, as a user's own kustomization in `folder` would have them."""
    near = os.path.relpath(KUBERNETES, folder.resolve())  # a kustomization takes no absolute path
    lines = ["namespace: dvt-serve", f"resources: [{near}/{overlay}]"]
    lines += [f"components: [{', '.join(f'{near}/components/{each}' for each in components)}]"] if components else []
    (folder / "kustomization.yaml").write_text("\n".join([*lines, more]) + "\n")
    return render(folder)


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def pods(objects: Sequence[Object]) -> Iterator[tuple[Object, Object]]:
    """Every Deployment, and the spec of its pods. There are no other kinds that make pods."""
    known = {"Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "Pod", "ReplicaSet"}
    assert {each["kind"] for each in objects} & known <= {"Deployment"}
    for each in of_kind(objects, "Deployment"):
        yield each, each["spec"]["template"]["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def server(pod: Object) -> Object:
    (found,) = pod["containers"]
    return dict(found)


def quantity(text: str | int | float) -> float:
    digits = str(text).rstrip("kMGTiKm")
    return float(digits) * UNITS[str(text)[len(digits) :]]


def environment(objects: Sequence[Object], container: Object) -> dict[str, str]:
    """What the kubelet sets: envFrom in order, then env, which wins. Secrets play no part in ours."""
    maps = {each["metadata"]["name"]: each.get("data", {}) for each in of_kind(objects, "ConfigMap")}
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= maps[source["configMapRef"]["name"]] if "configMapRef" in source else {}
    for one in container.get("env", []):
        match one.get("valueFrom", {}):
            case {"resourceFieldRef": {"resource": resource}}:
                kind, _, name = resource.partition(".")
                values[one["name"]] = str(math.ceil(quantity(container["resources"].get(kind, {}).get(name, 0))))
            case {"fieldRef": {"fieldPath": path}}:
                values[one["name"]] = path
            case _:
                values[one["name"]] = one["value"]
    return values


def labels(deployment: Object) -> Object:
    return dict(deployment["spec"]["template"]["metadata"]["labels"])


def selects(selector: Object, of: Object) -> bool:
    """`matchLabels` or a Service's plain selector; the empty one selects all."""
    wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    return wanted.items() <= of.items()
