"""How near the exported stages come to what a core can multiply, and what they give beside an older export.

    taskset -c 0,1 python -m benchmarks.cpu_peak --out

Variants with seeded weights are exported as `dvt export` does, and each stage is run in batches of the size that pays.
Its speed is that of the model's own work: MACs as `dvt flops` counts them, twice, over the time. The core's peak is the
fastest product of large matrices, of ONNX Runtime or of PyTorch, at the shapes of the stage's linear layers. Both are
run in turn, by one thread, then by two at once, as two executors do.

`--before FOLDER` has bundles of the same names from an older revision, which are run in the same turns:

    git worktree add build/old REVISION && cd build/old
    python -m benchmarks.build_bundle --variant t2t-vit-12 --bundle FOLDER/t2t-vit-12

Time is the thread's CPU time: others on the machine do not count, but for the caches that they take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import ROOT, Options, Report, finish, parse
from export.write import export_model, seeded_model
from model.config import DVTConfig, variant
from server.bundle.manifest import Bundle
from server.engines.onnx import largest_batch_that_pays, open_session, own_gmacs

TARGETS = {"t2t-vit-12": (0.70, 0.75, 0.78)}
PRODUCT_S = 0.005  # how long a product is repeated for one timing
RESIDENT = """
import sys
from pathlib import Path
from server.bundle.manifest import Bundle
from server.engines import load_engine
load_engine(Bundle.load(Path(sys.argv[1]), need_frontier=False)).warm_up()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS:")))
"""

Run = Callable[[], object]
Seconds = Mapping[str, float]


def main(arguments: list[str] | None = None) -> int:
    options = parse("cpu_peak", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(mix=(0.46, 0.30, 0.24))  # the paper's, of T2T-ViT-12 at its knee
    names = ("t2t-vit-12", "t2t-vit-14", "photo10")
    parser.add_argument("--variants", nargs="+", default=names, help=f"rows of model.config.VARIANTS (default {names})")
    parser.add_argument("--before", type=Path, help="folder of older bundles, each named like its variant")
    parser.add_argument("--rounds", type=int, default=15, help="(default %(default)s)")


def measure(options: Options) -> Report:
    torch.set_num_threads(1)
    report = Report("cpu_peak", figures={"variants": list(options.variants), "rounds": options.rounds})
    with tempfile.TemporaryDirectory() as folder:
        for name in options.variants:
            bundles = {"now": export_model(seeded_model(name), Path(folder) / name, {})}
            if options.before is not None:
                bundles["before"] = Bundle.load(options.before / name, need_frontier=False)
            _measure_variant(report, name, bundles, options)
    return report


def _measure_variant(report: Report, name: str, bundles: Mapping[str, Bundle], options: Options) -> None:
    key = name.replace("-", "_")
    parity = bundles["now"].manifest.parity or {}
    worst = max(parity["max_logit_difference"])
    report.add(f"{name}: logits", f"within {worst:.1e} of PyTorch's", **{f"{key}_logits": worst})
    report.must_be_zero(f"{name}: rows that depend on their batch", int(not parity["batch_invariant"]))
    config, stage_gmacs = variant(name), bundles["now"].manifest.stage_gmacs
    reach = 1 - np.concatenate(([0.0], np.cumsum(options.mix)[:-1]))  # of all images, those that come to a stage
    for threads in (1, 2):
        image_seconds: dict[str, list[float]] = defaultdict(list)
        for number, macs in enumerate(own_gmacs(stage_gmacs), start=1):
            batch = largest_batch_that_pays(macs)
            runs: dict[str, Run] = {which: _stage(b, number, batch) for which, b in bundles.items()}
            products = _products(config, number, batch)
            seconds = _in_turns({**runs, **{what: run for what, (run, _) in products.items()}}, options.rounds, threads)
            speeds = {what: flops / seconds[what] / 1e9 for what, (_, flops) in products.items()}
            fastest = max(speeds, key=lambda what: speeds[what])
            at = f"{key}_stage{number}_threads{threads}"
            for which in runs:
                image_seconds[which].append(seconds[which] / batch)
                gflops = 2 * macs * batch / seconds[which]
                share = gflops / speeds[fastest]
                target = TARGETS.get(name, ())[number - 1 : number]
                wanted = f" (target {target[0]:.2f})" if target and which == "now" else ""
                report.add(
                    f"{name}, stage {number} in batches of {batch}, threads {threads}: {which}",
                    f"{share:.3f} of the peak{wanted}, {gflops:.1f} of {speeds[fastest]:.1f} GFLOP/s a core, "
                    f"{1e3 * seconds[which] / batch:.2f} ms an image",
                    **{f"{at}_{which}_of_peak": share, f"{at}_{which}_gflops": gflops},
                )
            report.figures |= {f"{at}_batch": batch, f"{at}_peak_gflops": speeds[fastest], f"{at}_peak_of": fastest}
        for which, each in image_seconds.items():
            rate = threads / float(np.dot(reach, each))
            report.add(
                f"{name}, images/s at the mix, threads {threads}: {which}",
                f"{rate:.1f}",
                **{f"{key}_threads{threads}_{which}_images_s": rate},
            )
    for which, bundle in bundles.items():
        memory = _resident_mb(bundle)
        what = f"{name}, memory of an engine that is warm: {which}"
        report.add(what, f"{memory:.0f} MB", **{f"{key}_{which}_resident_mb": memory})


def _stage(bundle: Bundle, number: int, batch: int) -> Run:
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for name, spec in bundle.manifest.stages[number - 1].inputs.items():
        shape = [batch if isinstance(size, str) else size for size in spec.shape]
        pixels = spec.dtype == "uint8"
        feeds[name] = rng.integers(0, 256, shape, np.uint8) if pixels else rng.standard_normal(shape, np.float32)
    return _by_session(bundle.stage_path(number), feeds)


def _by_session(graph: Path | bytes, feeds: Mapping[str, Any]) -> Run:
    """Each thread has its own, as the engine's have."""
    own = threading.local()

    def run() -> None:
        if not hasattr(own, "session"):
            own.session = open_session(graph)
        own.session.run(None, feeds)

    return run


def _products(config: DVTConfig, number: int, batch: int) -> dict[str, tuple[Run, float]]:
    """The products of a block's linear layers, by either library: what runs one, and its FLOPs."""
    rows = batch * (1 + config.grids[number - 1] ** 2)
    D, hidden = config.embed_dim, config.mlp_hidden
    widened = D + (config.reuse_dim if number > 1 else 0)
    runs: dict[str, tuple[Run, float]] = {}
    for K, N in ((D, 3 * D), (widened, hidden), (hidden, D)):
        flops = 2.0 * rows * K * N
        repeats = max(1, round(PRODUCT_S * 1e11 / flops))
        for library, one in (("onnxruntime", _onnx_product(rows, K, N)), ("torch", _torch_product(rows, K, N))):
            runs[f"{library} {rows}x{K}x{N}"] = (_repeated(one, repeats), flops * repeats)
    return runs


def _repeated(one: Run, times: int) -> Run:
    def run() -> None:
        for _ in range(times):
            one()

    return run


def _onnx_product(M: int, K: int, N: int) -> Run:
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [M, K])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [M, N])],
        [numpy_helper.from_array(rng.standard_normal((K, N), np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return _by_session(model.SerializeToString(), {"a": rng.standard_normal((M, K), np.float32)})


def _torch_product(M: int, K: int, N: int) -> Run:
    a, b = torch.randn(M, K), torch.randn(N, K)

    def run() -> None:
        with torch.inference_mode():
            torch.nn.functional.linear(a, b)

    return run


def _in_turns(runs: Mapping[str, Run], rounds: int, threads: int) -> Seconds:
    """The median CPU time of each, all run in changing order by so many threads at once."""
    names = list(runs)

    def walk(thread: int) -> list[tuple[str, float]]:
        taken = []
        for number in range(-1, rounds):
            first = (number + thread) % len(names)
            for name in names[first:] + names[:first]:
                began = time.thread_time()
                runs[name]()
                if number >= 0:  # one round warms up
                    taken.append((name, time.thread_time() - began))
        return taken

    with ThreadPoolExecutor(threads) as pool:
        samples: dict[str, list[float]] = defaultdict(list)
        for walked in pool.map(walk, range(threads)):
            for name, seconds in walked:
                samples[name].append(seconds)
    return {name: float(np.median(seconds)) for name, seconds in samples.items()}


def _resident_mb(bundle: Bundle) -> float:
    """Of a process that has the engine and nothing else."""
    command = [sys.executable, "-c", RESIDENT, str(bundle.path)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return int(run.stdout) / 1024


if __name__ == "__main__":
    sys.exit(main())
