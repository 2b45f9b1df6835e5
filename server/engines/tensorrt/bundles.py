"""The plans of a whole bundle: built by `dvt build`, opened by whoever serves."""

from __future__ import annotations

import hashlib
import logging
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.bundle.manifest import Bundle, TensorSpec
from server.documents import cause
from server.engines.tensorrt.api import TensorRT, import_tensorrt, is_rtx
from server.engines.tensorrt.gpus import Gpu, find_gpu
from server.engines.tensorrt.network import FLAGS, BuildFailed, Built, build_plan, logger_of
from server.engines.tensorrt.plans import Choices, Origin, PlanFolder, Record, Unfit, folder_name
from server.engines.tensorrt.stage import TensorRTStage, last_error
from server.errors import BundleError

log = logging.getLogger(__name__)

PRECISIONS = ("fp16", "bf16")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
ANSWERS = ("probabilities", "confidence")  # what is asked of a stage besides what the next one reuses


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage after `build_plans`."""

    stage: int
    file: Path
    record: Record
    why: str | None  # it was built; None: it was there


def choose(
    batch_sizes: Sequence[int] = BATCH_SIZES, *, optimization_level: int = 3, workspace_bytes: int | None = None
) -> Choices:
    """What plans are built with; the level and no workspace limit are TensorRT's own defaults."""
    return Choices(
        batch_sizes=tuple(sorted(set(batch_sizes))),
        optimization_level=optimization_level,
        workspace_bytes=workspace_bytes,
        flags=FLAGS,
    )


def plans_path(bundle: Bundle, trt: TensorRT, gpu: Gpu, cache: Path | None = None) -> Path:
    """`BUNDLE/engines/<gpu>-<version>`. Below a `cache`, which may be that of many bundles, by the bundle's version."""
    root = bundle.path / "engines" if cache is None else cache / bundle.manifest.version
    return root / folder_name(_tied_to(trt, gpu).name, trt.__name__, trt.__version__)


def build_plans(
    bundle: Bundle,
    *,
    trt: TensorRT,
    gpu: Gpu,
    choices: Choices | None = None,
    cache: Path | None = None,
    force: bool = False,
    progress: Callable[[float], None] = lambda _: None,
    waiting: Callable[[], None] = lambda: None,
) -> list[StagePlan]:
    """Build the plans that are missing or do not fit; `force`: all. Without `choices`, plans that were built with any
    will do, and others are built with the defaults. Raises BundleError, in one line.

    `progress` is told how many stages are done, in parts of stages, from another thread. `waiting` is called where
    another process builds in the same folder; what it built is then used.
    """
    check_precision(bundle)
    path = plans_path(bundle, trt, gpu, cache)
    origins = [origin_of(bundle, number, trt, gpu) for number in range(1, len(bundle.manifest.stages) + 1)]
    # Where all is there nobody waits for who builds, and nothing is written: the folder may be read-only.
    if not force and path.is_dir():
        with suppress(Unfit), PlanFolder(path) as folder:
            return [_there(path, folder.read(origin, choices)[0]) for origin in origins]
    try:
        folder = PlanFolder(path, create=True)
    except BundleError as error:
        raise BundleError(f"{error}; plans can be put elsewhere: --cache, or DVT_ENGINE_DIR") from None
    plans = []
    with folder, folder.locked(waiting):
        for done, origin in enumerate(origins):
            why = "asked for" if force else None
            try:
                plan = _there(path, folder.read(origin, choices)[0])
            except Unfit as error:
                why = why or str(error)
            if why is not None:

                def tell(part: float, done: int = done) -> None:
                    progress(done + part)

                with_these = choices or choose()
                built = _build(bundle, origin, trt, gpu, with_these, folder.timings(), tell)
                record = folder.publish(origin, with_these, built.plan, built.seconds)
                if built.timing_cache:
                    folder.publish_timings(built.timing_cache)
                plan = replace(_there(path, record), why=why)
            plans.append(plan)
            progress(done + 1)
    return plans


def _there(path: Path, record: Record) -> StagePlan:
    return StagePlan(record.origin.stage, path / f"stage{record.origin.stage}.plan", record, None)


def _build(
    bundle: Bundle,
    origin: Origin,
    trt: TensorRT,
    gpu: Gpu,
    choices: Choices,
    timing_cache: bytes,
    progress: Callable[[float], None],
) -> Built:
    file = bundle.stage_path(origin.stage)
    try:
        graph = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: {cause(error)}") from None
    if hashlib.sha256(graph).hexdigest() != origin.graph:
        raise BundleError(f"{file}: has changed since the bundle was read")
    inputs, outputs = tensors_of(bundle, origin.stage)
    try:
        return build_plan(
            trt,
            graph,
            gpu=gpu,
            inputs=inputs,
            outputs=outputs,
            batch_sizes=choices.batch_sizes,
            optimization_level=choices.optimization_level,
            workspace_bytes=choices.workspace_bytes,
            timing_cache=timing_cache,
            progress=progress,
        )
    except BuildFailed as error:
        raise BundleError(
            f"{file}: {trt.__name__} {trt.__version__} builds no engine for {gpu.name}: {error}"
        ) from None


def open_tensorrt_stages(
    bundle: Bundle,
    *,
    max_batch_sizes: Sequence[int] | None = None,
    cache: Path | None = None,
    build: bool = False,
    module: str | None = None,
    trt: TensorRT | None = None,
    gpu: Gpu | None = None,
) -> list[TensorRTStage]:
    """The stages of a bundle on the first GPU, ready to make contexts, with the batch sizes that their plans were built
    for, as far as they are not above `max_batch_sizes`, stage by stage. The GPU must be the thread's current one.

    `build`: plans that are missing or do not fit are built with the defaults, which takes minutes; else they are
    refused, and the message says what to run. `module`: `tensorrt` or `tensorrt_rtx`, by default the first that is
    installed. `trt` and `gpu` are for tests. Raises BundleError, in one line, and ModuleNotFoundError where TensorRT is
    not installed.
    """
    check_precision(bundle)
    trt = trt or import_tensorrt(module)
    gpu = gpu or find_gpu()  # before the runtime, which would not survive that there is no driver
    if build:
        for stage in build_plans(bundle, trt=trt, gpu=gpu, cache=cache, waiting=_waiting(bundle)):
            if stage.why is not None:
                log.info("built stage %d in %.0f s: %s", stage.stage, stage.record.seconds, stage.why)
    path = plans_path(bundle, trt, gpu, cache)
    remedy = (
        f"dvt build {shlex.quote(str(bundle.path))}{'' if cache is None else f' --cache {shlex.quote(str(cache))}'}"
    )
    if not path.is_dir():
        raise BundleError(f"{path}: no plans for {trt.__name__} {trt.__version__} on {gpu.name}; run: {remedy}")
    try:
        runtime = trt.Runtime(logger_of(trt))
    except (TypeError, RuntimeError) as error:  # what its bindings make of a missing one
        raise BundleError(f"{trt.__name__} {trt.__version__} gives no runtime: {last_error(trt, error)}") from None
    stages = []
    with PlanFolder(path) as folder:
        for number in range(1, len(bundle.manifest.stages) + 1):
            try:
                record, plan = folder.read(origin_of(bundle, number, trt, gpu))
            except Unfit as error:
                raise BundleError(f"{error}; run: {remedy}") from None
            inputs, outputs = tensors_of(bundle, number)
            stages.append(
                TensorRTStage(
                    trt,
                    runtime,
                    path / f"stage{number}.plan",
                    plan,
                    inputs=inputs,
                    outputs=outputs,
                    batch_sizes=record.choices.batch_sizes,
                    largest=max_batch_sizes[number - 1] if max_batch_sizes else None,
                )
            )
    return stages


def summary(bundle: Bundle, trt: TensorRT, gpu: Gpu, choices: Choices, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """What `dvt build --json` prints."""
    return {
        "model": bundle.manifest.name,
        "version": bundle.manifest.version,
        "precision": bundle.manifest.precision,
        "runtime": trt.__name__,
        "runtime_version": trt.__version__,
        "gpu": gpu.name,
        "capability": "{}.{}".format(*gpu.capability),
        "folder": str(plans[0].file.parent),
        "batch_sizes": choices.batch_sizes,
        "stages": [
            {
                "stage": plan.stage,
                "built": plan.why is not None,
                "why": plan.why,
                "seconds": plan.record.seconds,
                "bytes": plan.record.size,
                "key": plan.record.key,
            }
            for plan in plans
        ],
    }


def as_table(summary: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = ["stage    plan         built in"]
    for stage in summary["stages"]:
        took = f"{stage['seconds']:8.1f} s" if stage["built"] else " was there"
        lines.append(f"{stage['stage']:5} {stage['bytes'] / 2**20:7.1f} MiB   {took}")
    sizes = ", ".join(map(str, summary["batch_sizes"]))
    lines.append(f"\n{summary['runtime']} {summary['runtime_version']}, {summary['gpu']}, batches of {sizes}")
    lines.append(summary["folder"])
    return "\n".join(lines)


def origin_of(bundle: Bundle, number: int, trt: TensorRT, gpu: Gpu) -> Origin:
    """What the plan of a stage must have been built from and for."""
    tied_to = _tied_to(trt, gpu)
    return Origin(
        stage=number,
        graph=bundle.manifest.stages[number - 1].sha256,
        precision=bundle.manifest.precision,
        outputs=tuple(sorted(tensors_of(bundle, number)[1])),
        runtime=trt.__name__,
        version=trt.__version__,
        platform=f"{sys.platform}-{platform.machine()}",
        gpu=tied_to.name,
        capability="{}.{}".format(*tied_to.capability),
    )


def tensors_of(bundle: Bundle, number: int) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
    """Inputs and outputs of a stage's engine: of the graph's outputs those that somebody wants. TensorRT wants an
    address for every one there is, and the logits would be computed for nobody."""
    stages = bundle.manifest.stages
    reused = stages[number].inputs.keys() - {"image"} if number < len(stages) else set()
    stage = stages[number - 1]
    return stage.inputs, {name: spec for name, spec in stage.outputs.items() if name in ANSWERS or name in reused}


def _tied_to(trt: TensorRT, gpu: Gpu) -> Gpu:
    """RTX builds for a compute capability, not for one GPU."""
    return Gpu.of_capability(gpu.sm) if is_rtx(trt) else gpu


def check_precision(bundle: Bundle) -> None:
    """Raises BundleError for a bundle that TensorRT builds nothing from."""
    if bundle.manifest.precision not in PRECISIONS:
        raise BundleError(
            f"{bundle.path}: TensorRT runs half precision, and this bundle is {bundle.manifest.precision}; "
            "export one for it: dvt export --precision fp16 (or bf16)"
        )


def _waiting(bundle: Bundle) -> Callable[[], None]:
    return lambda: log.info("%s: another process builds its plans; waiting for it", bundle.path)
