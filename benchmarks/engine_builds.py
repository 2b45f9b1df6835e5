"""What building a bundle's TensorRT engines takes: seconds and bytes a stage, with one batch size and with several.

    python -m benchmarks.engine_builds BUNDLE... --target sm89 --out

Seconds are those of the CPU. With `--target` by TensorRT for RTX, ahead of time and without a GPU: no kernel is timed,
and no engine is run. Without it by the TensorRT that is installed, for the GPU at hand. Plans go to a folder that is
removed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import Options, Report, finish, parse
from server.bundle.manifest import Bundle
from server.engines.tensorrt.api import TensorRT, import_tensorrt
from server.engines.tensorrt.bundles import build_plans, choose
from server.engines.tensorrt.gpus import Gpu, find_gpu

SIZES = ("1", "16", "1,4,8,16")


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="bundles in half precision")
        parser.add_argument("--target", help="a compute capability, as sm89, for TensorRT for RTX")
        parser.add_argument("--sizes", nargs="+", default=SIZES, help="batch sizes of a plan (default %(default)s)")

    options = parse("engine_builds", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    trt = import_tensorrt("tensorrt_rtx" if options.target else None)
    gpu = Gpu.of_capability(options.target) if options.target else find_gpu()
    report = Report("engine_builds")
    report.add(
        "by", f"{trt.__name__} {trt.__version__} for {gpu.name}", runtime=trt.__name__, runtime_version=trt.__version__
    )
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    for path in options.bundles:
        bundle = Bundle.load(path, need_frontier=False)
        name = f"{bundle.manifest.name} {bundle.manifest.precision}"
        figures[name] = {}
        for sizes in options.sizes:
            stages = _build(bundle, trt, gpu, [int(size) for size in sizes.split(",")])
            figures[name][sizes] = stages
            shown = (f"{s['cpu_seconds']:5.1f} s {s['bytes'] / 2**20:5.1f} MiB" for s in stages)
            report.add(f"{name}, batches of {sizes}", "   ".join(shown))
    report.figures |= {"gpu": gpu.name, "builds": figures}
    return report


def _build(bundle: Bundle, trt: TensorRT, gpu: Gpu, sizes: list[int]) -> list[dict[str, float]]:
    """Stage by stage. The CPU's time beside the clock's: it says the same where others work beside it."""
    marks = [time.process_time()]

    def progress(done: float) -> None:
        if done == len(marks):  # another stage is through
            marks.append(time.process_time())

    with tempfile.TemporaryDirectory() as cache:
        plans = build_plans(bundle, trt=trt, gpu=gpu, choices=choose(sizes), cache=Path(cache), progress=progress)
    return [
        {"seconds": plan.record.seconds, "cpu_seconds": round(end - start, 2), "bytes": plan.record.size}
        for plan, (start, end) in zip(plans, pairwise(marks), strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
