"""The real builder: TensorRT for RTX makes engines ahead of time, on the CPU, through the same code and API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from server.bundle.manifest import Bundle
from server.engines.tensorrt.api import TensorRT, import_tensorrt
from server.engines.tensorrt.bundles import build_plans, choose, open_tensorrt_stages, plans_path
from server.engines.tensorrt.gpus import Gpu
from server.errors import BundleError
from tests.server.engines.tensorrt.half_graphs import attention_graph, half_graph
from tests.server.engines.tensorrt.tiny_bundle import write_bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: no real engine is built")

SM89 = Gpu.of_capability("sm89")
Dvt = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return import_tensorrt("tensorrt_rtx")


@pytest.fixture
def half(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "half", graphs=half_graph)


def test_every_stage_builds_with_a_profile_for_each_size(half: Bundle, rtx: TensorRT) -> None:
    told: list[float] = []
    plans = build_plans(half, trt=rtx, gpu=SM89, choices=choose((1, 4, 16)), progress=told.append)
    assert [plan.file.parent.name for plan in plans] == [f"sm89-rtx-{rtx.__version__}"] * 3
    assert all(plan.file.stat().st_size == plan.record.size > 1000 for plan in plans)
    assert max(told) == 3
    assert len(told) > 30  # its progress is told
    again = build_plans(half, trt=rtx, gpu=SM89, choices=choose((1, 4, 16)))
    assert [plan.why for plan in again] == [None] * 3


@pytest.mark.parametrize("target", ["sm75", "sm120"])
def test_any_gpu_of_a_capability_is_built_for(half: Bundle, rtx: TensorRT, target: str) -> None:
    gpu = Gpu("NVIDIA of some kind", Gpu.of_capability(target).capability)
    plans = build_plans(half, trt=rtx, gpu=gpu, choices=choose([1]))
    assert plans[0].file.parent.name.startswith(f"{target}-rtx-")
    assert {plan.record.origin.gpu for plan in plans} == {target}


def test_a_capability_that_it_does_not_know_is_refused(half: Bundle, rtx: TensorRT) -> None:
    with pytest.raises(BundleError, match=r"stage1\.onnx: .* builds no engine for NVIDIA H100: it knows no such"):
        build_plans(half, trt=rtx, gpu=Gpu("NVIDIA H100", (9, 0)))
    assert [p.name for p in plans_path(half, rtx, Gpu("NVIDIA H100", (9, 0))).iterdir()] == ["lock"]


def test_a_graph_for_cpus_is_refused_with_the_parsers_reason(tmp_path: Path, rtx: TensorRT) -> None:
    bundle = write_bundle(tmp_path / "attention", graphs=lambda _: attention_graph())
    with pytest.raises(BundleError, match=r"cannot be parsed: .*Attention nodes with one output") as caught:
        build_plans(bundle, trt=rtx, gpu=SM89)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("graph", [b"", b"junk", half_graph(2)[:-7]], ids=["empty", "junk", "cut"])
def test_what_is_no_graph_is_refused(tmp_path: Path, rtx: TensorRT, graph: bytes) -> None:
    with pytest.raises(BundleError, match=r"stage1\.onnx: tensorrt_rtx .* builds no engine for sm89: ") as caught:
        build_plans(write_bundle(tmp_path / "none", graphs=lambda _: graph), trt=rtx, gpu=SM89)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_says_another_type_than_the_graph_is_refused(half: Bundle, rtx: TensorRT) -> None:
    document = json.loads((half.path / "bundle.json").read_text())
    document["stages"][0]["outputs"]["features_1"]["dtype"] = "float32"
    document["stages"][1]["inputs"]["features_1"]["dtype"] = "float32"
    (half.path / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(
        BundleError, match=r"output `features_1` is DataType\.HALF \[-1, 4\], the manifest says float32"
    ):
        build_plans(Bundle.load(half.path, need_frontier=False), trt=rtx, gpu=SM89)


def test_without_a_driver_nobody_touches_the_runtime(half: Bundle) -> None:
    """It would not come back with an error: the process would end."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    with pytest.raises(BundleError, match="no NVIDIA driver on this machine"):
        open_tensorrt_stages(half, module="tensorrt_rtx")


# --- dvt build --------------------------------------------------------------------------------------------------------


def test_the_command_builds_what_is_missing_and_tells_it(half: Bundle, dvt: Dvt, tmp_path: Path) -> None:
    arguments = [
        "build",
        str(half.path),
        "--target",
        "sm89",
        "--batch-sizes",
        "4,1",
        "--cache",
        str(tmp_path / "plans"),
    ]
    status, out, err = dvt(*arguments)
    assert (status, err) == (0, "")
    assert "tensorrt_rtx" in out
    assert "batches of 1, 4" in out
    status, out, err = dvt(*arguments, "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert [stage["built"] for stage in document["stages"]] == [False] * 3
    assert document["batch_sizes"] == [1, 4]
    assert sorted(p.name for p in Path(document["folder"]).glob("*.plan")) == [f"stage{n}.plan" for n in (1, 2, 3)]
    status, out, _ = dvt(*arguments, "--json", "--force")
    assert [stage["why"] for stage in json.loads(out)["stages"]] == ["asked for"] * 3


def test_the_environment_names_the_cache(
    half: Bundle, dvt: Dvt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVT_ENGINE_DIR", str(tmp_path / "plans"))
    status, out, _ = dvt("build", str(half.path), "--target", "sm89", "--batch-sizes", "1", "--json")
    assert status == 0
    assert json.loads(out)["folder"].startswith(f"{tmp_path}/plans/{half.manifest.version}/sm89-rtx-")
    assert not (half.path / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--target", "sm90"], 1, "builds no engine for sm90: it knows no such compute capability"),
        (["--target", "ampere"], 2, "ampere is no compute capability; for example sm89"),
        (["--runtime", "onnx"], 2, "--runtime is tensorrt or tensorrt_rtx, not onnx"),
        (["--batch-sizes", "1,two"], 2, "--batch-sizes are whole numbers, as 1,2,4,8; 1,two is not"),
        (["--batch-sizes", "0,2"], 2, "--batch-sizes are at most 16 numbers from 1 to 4096; 0,2 is not"),
    ],
)
def test_what_cannot_be_done_is_one_line(half: Bundle, dvt: Dvt, arguments: list[str], status: int, says: str) -> None:
    code, out, err = dvt("build", str(half.path), *arguments)
    assert (code, out) == (status, "")
    assert says in err
    assert err.count("\n") == 1
