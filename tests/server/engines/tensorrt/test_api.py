"""What the adapter uses is there in every TensorRT that it is for, under these names and with these arguments.

mypy holds the adapter against `api`, these tests hold `api` against what the real modules said of themselves (kept in
`api/*.json`, by `list_api`), and the kept against the real, where one is installed.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from server.engines.tensorrt import api
from server.errors import BundleError
from tests.server.engines.tensorrt import fake_tensorrt, list_api

KEPT = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "api").glob("*.json"))}
RELEASES = list(KEPT)
PROTOCOLS = [getattr(api, name) for name in list_api.CLASSES if name != "TensorRT"]
MADE = {"Builder": "logger", "OnnxParser": "network, logger", "Runtime": "logger"}  # what we call, and how


def members(protocol: type) -> dict[str, str | None]:
    """The functions with their arguments, and None for attributes."""
    functions = {
        name: ", ".join(list(inspect.signature(member).parameters)[1:])
        for name, member in vars(protocol).items()
        if not name.startswith("_") and inspect.isfunction(member)
    }
    return {**dict.fromkeys(protocol.__annotations__), **functions}


def accepts(overload: str, arguments: str) -> bool:
    """Whether a function may be called so: by these, in this order, the others having defaults."""
    there, here = (overload.split(", ") if overload else []), (arguments.split(", ") if arguments else [])
    first, rest = there[: len(here)], there[len(here) :]
    return [name.rstrip("=") for name in first] == here and all(name.endswith("=") for name in rest)


def test_the_releases_are_those_at_both_ends_of_what_is_supported() -> None:
    assert RELEASES == ["tensorrt-10.16.1.11", "tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.__name__)
def test_every_member_that_is_used_is_there(protocol: type, release: str) -> None:
    real = KEPT[release]["classes"][protocol.__name__]
    for name, arguments in members(protocol).items():
        if name in api.RTX_ONLY and not release.startswith("tensorrt_rtx"):
            continue
        assert name in real, f"{release} has no {protocol.__name__}.{name}"
        if arguments is None:
            assert real[name] is None, f"{protocol.__name__}.{name} is called in {release}"
        else:
            assert any(accepts(overload, arguments) for overload in real[name]), (name, arguments, real[name])


@pytest.mark.parametrize("release", RELEASES)
def test_what_is_made_or_derived_from_is_there(release: str) -> None:
    classes = KEPT[release]["classes"]
    for name, arguments in MADE.items():
        assert any(accepts(overload, arguments) for overload in classes[name]["__init__"])
    assert {"log", "ERROR", "INTERNAL_ERROR"} <= classes["ILogger"].keys()
    assert classes["IProgressMonitor"]["phase_start"] == ["phase_name, parent_phase, num_steps"]
    assert classes["IProgressMonitor"]["step_complete"] == ["phase_name, step"]
    assert classes["IProgressMonitor"]["phase_finish"] == ["phase_name"]


@pytest.mark.parametrize("release", RELEASES)
def test_every_value_that_is_used_is_there(release: str) -> None:
    for name, values in api.ENUMERATED.items():
        assert set(values) <= KEPT[release]["classes"][name].keys(), name


def test_nothing_is_used_that_is_not_told_of() -> None:
    used = {name for name, kind in api.TensorRT.__annotations__.items() if not name.startswith("__")}
    told = {*MADE, *list_api.BASES, *api.ENUMERATED, *api.RTX_ONLY}
    assert used <= told


@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("Builder", fake_tensorrt.Builder),
        ("IBuilderConfig", fake_tensorrt.Config),
        ("ICudaEngine", fake_tensorrt.Engine),
        ("IExecutionContext", fake_tensorrt.Context),
        ("IHostMemory", fake_tensorrt.Memory),
        ("INetworkDefinition", fake_tensorrt.Network),
        ("IOptimizationProfile", fake_tensorrt.Profile),
        ("ITimingCache", fake_tensorrt.TimingCache),
        ("OnnxParser", fake_tensorrt.Parser),
        ("Runtime", fake_tensorrt.Runtime),
    ],
)
def test_the_fake_offers_nothing_that_the_real_one_does_not(name: str, fake: type) -> None:
    for release, kept in KEPT.items():
        real: dict[str, Any] = kept["classes"][name]
        for member, function in vars(fake).items():
            if not member.startswith("_") and inspect.isfunction(function):
                arguments = ", ".join(list(inspect.signature(function).parameters)[1:])
                assert any(accepts(overload, arguments) for overload in real[member]), (release, member)


@pytest.mark.parametrize(("module", "called"), [("tensorrt_rtx", "tensorrt_rtx"), ("tensorrt_bindings", "tensorrt")])
def test_what_is_kept_is_what_the_real_module_says(module: str, called: str) -> None:
    real = list_api.load(module)
    if real is None:
        pytest.skip(f"{module} is not installed")
    found = list_api.listing(real)
    release = f"{called}-{found['version']}"
    if release not in KEPT:
        pytest.skip(f"{release} is installed, and what was kept is of {', '.join(RELEASES)}")
    assert found == KEPT[release]


def test_a_module_that_is_not_installed_is_named() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        api.import_tensorrt("tensorrt_of_nobody")
    assert caught.value.name == "tensorrt_of_nobody"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import nothing_that_is_there", "No module named 'nothing_that_is_there'"),
        (
            "raise ImportError('libnvinfer.so.11: cannot open shared object file\\nmore')",
            "libnvinfer.so.11: cannot open",
        ),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    name = f"tensorrt_broken_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match=f"{name} cannot be imported: {says}") as caught:
        api.import_tensorrt(name)
    assert "\n" not in str(caught.value)
