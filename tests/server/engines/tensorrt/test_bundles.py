"""`dvt build` and whoever serves: what is built, what is kept, what is refused, and what two builders do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from server.bundle.manifest import EMBEDDED, Bundle
from server.engines.gpu.stage import Stage
from server.engines.tensorrt.bundles import StagePlan, build_plans, choose, open_tensorrt_stages, plans_path
from server.engines.tensorrt.gpus import Gpu
from server.engines.tensorrt.plans import PlanFolder
from server.errors import BundleError
from tests.server.engines.tensorrt.fake_tensorrt import FakeTensorRT
from tests.server.engines.tensorrt.tiny_bundle import H100, write_bundle

ROOT = Path(__file__).parents[4]
SIZES = (1, 2, 8)


def build(bundle: Bundle, trt: FakeTensorRT, gpu: Gpu = H100, **options: Any) -> list[StagePlan]:
    options.setdefault("choices", choose(SIZES))
    return build_plans(bundle, trt=trt, gpu=gpu, **options)


def whys(plans: list[StagePlan]) -> list[bool]:
    return [plan.why is not None for plan in plans]


def open_stages(bundle: Bundle, trt: FakeTensorRT, gpu: Gpu = H100, **options: Any) -> list[Any]:
    return list(open_tensorrt_stages(bundle, trt=trt, gpu=gpu, **options))


def test_each_stage_gets_a_plan_in_the_bundle_by_gpu_and_version(bundle: Bundle, trt: FakeTensorRT) -> None:
    plans = build(bundle, trt)
    folder = bundle.path / "engines" / "nvidia-h100-80gb-hbm3-11.4.0.106"
    assert [plan.file for plan in plans] == [folder / f"stage{stage}.plan" for stage in (1, 2, 3)]
    assert all(plan.file.read_bytes() for plan in plans)
    assert {p.name for p in folder.glob("*")} >= {"stage1.json", "stage2.json", "stage3.json", "timing.cache"}


def test_a_cache_holds_plans_of_many_bundles_and_leaves_the_bundle_alone(
    bundle: Bundle, trt: FakeTensorRT, tmp_path: Path
) -> None:
    other = write_bundle(tmp_path / "other", graphs=lambda stage: bundle.stage_path(stage).read_bytes() + b" ")
    cache = tmp_path / "cache"
    assert whys(build(bundle, trt, cache=cache)) == whys(build(other, trt, cache=cache)) == [True] * 3
    assert whys(build(bundle, trt, cache=cache)) == [False] * 3
    assert not (bundle.path / "engines").exists()
    assert len(open_stages(other, trt, cache=cache)) == 3


def test_the_network_is_strongly_typed_with_a_profile_for_each_size_and_no_streams_of_its_own(
    bundle: Bundle, trt: FakeTensorRT
) -> None:
    build(bundle, trt, choices=choose((8, 1, 2, 8), optimization_level=5, workspace_bytes=2**30))
    assert len(trt.builds) == 3
    for stage, built in enumerate(trt.builds, start=1):
        config = built.config
        assert (config.builder_optimization_level, config.max_aux_streams, config.workspace) == (5, 0, 2**30)
        assert [profile.shapes["image"] for profile in config.profiles] == [((n, 8, 8, 3),) * 3 for n in SIZES]
        if stage > 1:
            assert config.profiles[2].shapes[f"features_{stage - 1}"] == ((8, 4),) * 3


def test_an_engine_has_no_output_that_nobody_wants(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt)
    named = [{tensor.name for tensor in built.network.outputs} for built in trt.builds]
    answers = {"probabilities", "confidence"}
    assert named == [answers | {"features_1"}, answers | {"features_2"}, answers]
    assert [set(stage.outputs) for stage in open_stages(bundle, trt)] == named


def test_the_timing_cache_of_one_build_serves_the_next(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt)
    build(bundle, trt, force=True)
    contents = [built.config.timings.content for built in trt.builds]
    assert contents == [b"timings" + b" measured" * n for n in range(6)]


@pytest.mark.parametrize("content", [b"of another GPU", b"junk"])
def test_a_timing_cache_that_does_not_fit_is_left_aside(bundle: Bundle, trt: FakeTensorRT, content: bytes) -> None:
    with PlanFolder(plans_path(bundle, trt, H100), create=True) as folder:
        folder.publish_timings(content)
    assert whys(build(bundle, trt)) == [True] * 3
    assert trt.builds[0].config.timings.content == b"timings"


def test_what_fits_is_not_built_again_unless_asked_for(bundle: Bundle, trt: FakeTensorRT) -> None:
    first = build(bundle, trt)
    assert build(bundle, trt) == [StagePlan(p.stage, p.file, p.record, None) for p in first]
    assert whys(build(bundle, trt, force=True)) == [True] * 3
    assert [plan.why for plan in build(bundle, trt, force=True)] == ["asked for"] * 3


def truncate(folder: Path) -> None:
    os.truncate(folder / "stage2.plan", 9)


def swap(folder: Path) -> None:
    shutil.copy(folder / "stage1.plan", folder / "stage2.plan")


def link(folder: Path) -> None:
    (folder / "stage2.plan").rename(folder / "elsewhere")
    (folder / "stage2.plan").symlink_to(folder / "elsewhere")


def open_to_all(folder: Path) -> None:
    (folder / "stage2.plan").chmod(0o666)


def nonsense(folder: Path) -> None:
    (folder / "stage2.json").write_text("[[[[")


def gone(folder: Path) -> None:
    (folder / "stage2.json").unlink()


@pytest.mark.parametrize("spoil", [truncate, swap, link, open_to_all, nonsense, gone])
def test_a_spoilt_plan_is_refused_where_one_serves_and_built_again_where_one_builds(
    bundle: Bundle, trt: FakeTensorRT, spoil: Callable[[Path], None]
) -> None:
    folder = build(bundle, trt)[0].file.parent
    spoil(folder)
    with pytest.raises(BundleError, match=rf"stage2\.(plan|json): .*; run: dvt build {bundle.path}$") as caught:
        open_stages(bundle, trt)
    assert "\n" not in str(caught.value)
    assert whys(build(bundle, trt)) == [False, True, False]
    assert len(open_stages(bundle, trt)) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"choices": choose((1, 2, 16))}, "was built for batch sizes (1, 2, 8)"),
        ({"choices": choose(SIZES, optimization_level=4)}, "was built for optimization level 3"),
        ({"choices": choose(SIZES, workspace_bytes=2**20)}, "was built for workspace bytes None"),
    ],
)
def test_other_choices_make_other_plans(bundle: Bundle, trt: FakeTensorRT, options: dict[str, Any], says: str) -> None:
    build(bundle, trt)
    for plan in build(bundle, trt, **options):
        assert plan.why is not None
        assert says in plan.why


def test_whoever_serves_takes_the_batch_sizes_that_were_built(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt, choices=choose((3, 5), optimization_level=1))
    stages: list[Stage] = open_stages(bundle, trt)
    assert [stage.batch_sizes for stage in stages] == [(3, 5)] * 3
    assert whys(build_plans(bundle, trt=trt, gpu=H100)) == [False] * 3


def test_batch_sizes_that_are_not_wanted_are_left_aside(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt, choices=choose((2, 4, 8)))
    stages = open_stages(bundle, trt, max_batch_sizes=(8, 5, 1))
    assert [stage.batch_sizes for stage in stages] == [(2, 4, 8), (2, 4), (2,)]
    assert [stage.arena_bytes(stage.batch_sizes[-1]) for stage in stages] == [8000, 4000, 2000]
    assert {stage.runtime for stage in stages} == {"tensorrt 11.4.0.106"}


def test_plans_of_another_gpu_or_version_are_not_even_looked_at(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt)
    for other, gpu, who in (
        (FakeTensorRT("10.16.1.11"), H100, r"tensorrt 10\.16\.1\.11 on NVIDIA H100"),
        (FakeTensorRT(gpu="sm89"), Gpu("NVIDIA L4", (8, 9)), r"tensorrt 11\.4\.0\.106 on NVIDIA L4"),
    ):
        with pytest.raises(BundleError, match=rf"no plans for {who}.*; run: dvt build"):
            open_stages(bundle, other, gpu)


def test_a_plan_that_was_moved_into_the_folder_of_another_gpu_is_refused(bundle: Bundle, trt: FakeTensorRT) -> None:
    folder = build(bundle, trt)[0].file.parent
    other = FakeTensorRT(gpu="sm89")
    gpu = Gpu("NVIDIA L4", (8, 9))
    folder.rename(plans_path(bundle, other, gpu))
    with pytest.raises(BundleError, match="was built for gpu 'NVIDIA H100 80GB HBM3', and 'NVIDIA L4' is wanted"):
        open_stages(bundle, other, gpu)


def test_the_plans_of_an_older_graph_are_refused_and_built_again(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt)
    newer = write_bundle(bundle.path, graphs=lambda stage: (bundle.path / f"stage{stage}.onnx").read_bytes() + b"\n")
    with pytest.raises(BundleError, match="was built for graph"):
        open_stages(newer, trt)
    assert whys(build(newer, trt)) == [True] * 3


def test_whoever_serves_may_build_what_is_missing(bundle: Bundle, trt: FakeTensorRT) -> None:
    assert [stage.batch_sizes for stage in open_stages(bundle, trt, build=True)] == [(1, 2, 4, 8, 16, 32, 64)] * 3
    assert len(trt.builds) == 3
    open_stages(bundle, trt, build=True)
    assert len(trt.builds) == 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_that_is_not_in_half_precision_says_how_to_make_one(
    tmp_path: Path, trt: FakeTensorRT, precision: str
) -> None:
    bundle = write_bundle(tmp_path / "full", precision)
    for act in (build, open_stages):
        with pytest.raises(
            BundleError, match=rf"this bundle is {precision}; .*dvt export --precision fp16 \(or bf16\)$"
        ):
            act(bundle, trt)
    assert not (bundle.path / "engines").exists()


def test_what_tensorrt_cannot_build_is_told_with_its_reason_in_one_line(bundle: Bundle) -> None:
    trt = FakeTensorRT(refuse=["build_serialized_network"])
    with pytest.raises(BundleError) as caught:
        build(bundle, trt)
    assert str(caught.value) == (
        f"{bundle.path}/stage1.onnx: tensorrt 11.4.0.106 builds no engine for NVIDIA H100 80GB HBM3: "
        "Could not find any implementation for node {attention}"
    )


def test_a_builder_or_a_runtime_that_is_not_to_be_had_is_told_in_one_line(bundle: Bundle, trt: FakeTensorRT) -> None:
    build(bundle, trt)

    def none(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = trt.Runtime = none
    with pytest.raises(BundleError, match=r"builds no engine for .*: TypeError: pybind11"):
        build(bundle, trt, force=True)
    with pytest.raises(BundleError, match=r"tensorrt 11\.4\.0\.106 gives no runtime: pybind11"):
        open_stages(bundle, trt)


def test_where_all_is_there_nothing_is_written_and_nobody_waited_for(bundle: Bundle, trt: FakeTensorRT) -> None:
    """The folder may be read-only, and another process may just build something else in it."""
    path = build(bundle, trt)[0].file.parent
    before = {file.name: file.stat().st_mtime_ns for file in (path, *path.iterdir())}

    def waiting() -> None:
        raise AssertionError("waits")

    with PlanFolder(path) as folder, folder.locked(waiting):
        assert whys(build(bundle, trt, waiting=waiting)) == [False] * 3
        assert len(open_stages(bundle, trt, build=True)) == 3
    assert {file.name: file.stat().st_mtime_ns for file in (path, *path.iterdir())} == before


def test_a_graph_that_is_none_or_not_the_manifests_is_refused(tmp_path: Path, trt: FakeTensorRT) -> None:
    with pytest.raises(BundleError, match=r"stage1\.onnx: .*: cannot be parsed: Failed to parse the model\.$"):
        build(write_bundle(tmp_path / "one", graphs=lambda _: b"junk"), trt)
    other = write_bundle(tmp_path / "two").stage_path(2).read_bytes()
    with pytest.raises(BundleError, match="input `features_1` is in the graph and not in the manifest"):
        build(write_bundle(tmp_path / "three", graphs=lambda _: other), trt)


def test_a_graph_that_changed_since_it_was_checked_is_not_built(bundle: Bundle, trt: FakeTensorRT) -> None:
    bundle.stage_path(3).write_bytes(bundle.stage_path(2).read_bytes())
    with pytest.raises(BundleError, match=r"stage3\.onnx: has changed since the bundle was read"):
        build(bundle, trt)


def test_progress_goes_from_nothing_to_all_stages(bundle: Bundle, trt: FakeTensorRT) -> None:
    told: list[float] = []
    build(bundle, trt, progress=told.append)
    assert told == sorted(told)
    assert told[0] == 0.25
    assert told[-1] == 3
    assert {1.25, 2, 2.25} <= set(told)


def test_progress_that_fails_does_not_stop_the_build(bundle: Bundle, trt: FakeTensorRT) -> None:
    def fail(done: float) -> None:
        if done % 1:  # while TensorRT's code is on the stack
            raise RuntimeError("the terminal is gone")

    assert whys(build(bundle, trt, progress=fail)) == [True] * 3


def test_ctrl_c_ends_a_build_without_waiting_for_tensorrt_and_leaves_nothing(bundle: Bundle) -> None:
    gate = threading.Event()

    def building() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        gate.wait(30)

    trt = FakeTensorRT(building=building, endless=True)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, trt)
    assert [p.name for p in plans_path(bundle, trt, H100).iterdir()] == ["lock"]
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "tensorrt-builder":
            thread.join(30)  # it was told to stop, and would go on for long
    assert trt.builds == []
    assert [p.name for p in plans_path(bundle, trt, H100).iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_written_names_the_option(bundle: Bundle, trt: FakeTensorRT) -> None:
    (bundle.path / "engines").write_text("a file in its place")
    with pytest.raises(BundleError, match=r"plans can be put elsewhere: --cache, or DVT_ENGINE_DIR$"):
        build(bundle, trt)


def test_a_cache_is_named_in_what_to_run(bundle: Bundle, trt: FakeTensorRT, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"run: dvt build {bundle.path} --cache '{tmp_path}/my cache'$"):
        open_stages(bundle, trt, cache=tmp_path / "my cache")


def test_a_bundle_for_cpus_is_refused_before_anything_is_looked_for(dvt: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = dvt("build", str(EMBEDDED))
    assert (status, out) == (1, "")
    assert err == (
        f"Error: {EMBEDDED}: TensorRT runs half precision, and this bundle is fp32; "
        "export one for it: dvt export --precision fp16 (or bf16)\n"
    )


def test_where_no_tensorrt_is_installed_the_command_says_what_to_install(
    bundle: Bundle, dvt: Callable[..., tuple[int, str, str]]
) -> None:
    for module, package in (("tensorrt", "'dvt-serve[gpu-trt]'"), ("tensorrt_rtx", "tensorrt-rtx")):
        if find_spec(module) is None:
            status, out, err = dvt("build", str(bundle.path), "--runtime", module)
            assert (status, out) == (1, "")
            assert err == f"Error: no TensorRT: No module named '{module}'; install it: pip install {package}\n"


# --- other processes --------------------------------------------------------------------------------------------------

BUILDER = """
    import os, resource, signal, sys
    from server.bundle.manifest import EMBEDDED, Bundle
    from server.engines.tensorrt.bundles import build_plans, choose
    from server.errors import BundleError
    from tests.server.engines.tensorrt.fake_tensorrt import FakeTensorRT
    from tests.server.engines.tensorrt.tiny_bundle import H100

    path, most = sys.argv[1], int(sys.argv[2])
    if most:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def say(word):
        print(word, flush=True)

    def building():
        say("building")
        sys.stdin.readline()

    try:
        plans = build_plans(
            Bundle.load(path, need_frontier=False),
            trt=FakeTensorRT(building=building, padding=10_000),
            gpu=H100,
            choices=choose((1, 2, 8)),
            waiting=lambda: say("waiting"),
        )
    except BundleError as error:
        sys.exit(str(error))
    say("".join("built " if plan.why else "found " for plan in plans).strip())
"""


class Builder:
    """A process that builds, one line of ours at a time."""

    def __init__(self, bundle: Bundle, most: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(BUILDER), str(bundle.path), str(most)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> str:
        _, errors = self.process.communicate(timeout=30)
        return errors.strip()


@pytest.fixture
def builder(request: pytest.FixtureRequest) -> Callable[..., Builder]:
    def start(*arguments: Any, **options: Any) -> Builder:
        one = Builder(*arguments, **options)

        def end() -> None:
            one.process.kill()
            one.process.communicate()

        request.addfinalizer(end)
        return one

    return start


def test_of_two_builders_one_waits_and_uses_what_the_other_built(
    bundle: Bundle, trt: FakeTensorRT, builder: Callable[..., Builder]
) -> None:
    first, second = builder(bundle), None
    assert first.heard() == "building"
    second = builder(bundle)
    assert second.heard() == "waiting"
    for word in ("building", "building", "built built built"):
        first.go_on()
        assert first.heard() == word
    assert second.heard() == "found found found"
    assert first.end() == second.end() == ""
    assert len(open_stages(bundle, trt)) == 3


def test_a_builder_that_is_killed_leaves_the_lock_and_nothing_that_would_be_loaded(
    bundle: Bundle, trt: FakeTensorRT, builder: Callable[..., Builder]
) -> None:
    first = builder(bundle)
    assert first.heard() == "building"
    first.go_on()
    assert first.heard() == "building"  # the second stage
    second = builder(bundle)
    assert second.heard() == "waiting"
    first.process.kill()
    assert second.heard() == "building"  # the lock went with the process; the first stage is there
    with pytest.raises(BundleError, match=r"stage2\.json: is missing; run: dvt build"):
        open_stages(bundle, trt)
    second.go_on()
    assert second.heard() == "building"
    second.go_on()
    assert second.heard() == "found built built"
    assert len(open_stages(bundle, trt)) == 3


@pytest.mark.parametrize(("most", "name"), [(100, "stage1.json"), (8192, "stage1.plan")])
def test_a_disk_without_room_leaves_what_was_there(
    bundle: Bundle, trt: FakeTensorRT, builder: Callable[..., Builder], most: int, name: str
) -> None:
    """No file may grow beyond so many bytes: what a full disk is, to whoever writes."""
    build(bundle, trt)
    before = {p.name: p.read_bytes() for p in plans_path(bundle, trt, H100).iterdir()}
    write_bundle(bundle.path, graphs=lambda stage: (bundle.path / f"stage{stage}.onnx").read_bytes() + b" ")
    one = builder(bundle, most=most)
    assert one.heard() == "building"
    one.go_on()
    errors = one.end()
    assert one.process.returncode == 1
    assert re.fullmatch(rf".*/{name}: it has \d+ bytes: file too large", errors)
    assert {p.name: p.read_bytes() for p in plans_path(bundle, trt, H100).iterdir()} == before
