"""What our own kernels are worth on a GPU: stages with and without them, as they are and compiled.

    python -m benchmarks.gpu_fused --bundles build/gpu --minutes 8 --out

`--bundles` holds MODEL-fp16 and MODEL-alone-fp16 for every one of `--models`: bundles, or what
`benchmarks.seeded_graphs strip` leaves of them. Times are of recorded graphs, the two forms in turn. Parts run in
processes of their own: one that fails, or is out of time, leaves a line that says so, and the rest goes on. What takes
a compiler comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Card
from benchmarks.harness import RESULTS, Options, command_line, failure, machine, versions
from benchmarks.seeded_graphs import fill
from server.bundle.manifest import MANIFEST, Bundle
from server.engines.gpu import fusions, torch_stage
from server.engines.gpu.torch_compile import compiler

MODELS = ("t2t-vit-14", "t2t-vit-12")
MIXES = ((0.46, 0.30, 0.24), (0.70, 0.17, 0.13), (0.80, 0.13, 0.07))
ALONE = 0  # the backbone, among numbers of stages
TOP = 12  # kernels that are shown
RESULT = "@ "  # begins a line of a part's that is for the file


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.part:
        _run_part(options)
        return 0
    until = time.monotonic() + 60 * options.minutes
    figures: dict[str, Any] = {}
    document = {
        "benchmark": "gpu_fused",
        "command": options.command,
        "machine": machine(),
        "versions": {**versions(), "torch": torch.__version__},
        "figures": figures,
    }
    parts = ["kernels", *(f"{how} {model}" for how in ("plain", "compiled") for model in options.models)]
    ended: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [f"{model}{kind}-fp16" for model in options.models for kind in ("", "-alone")]:
            _say(f"{name}: {_prepared(options.bundles / name, Path(folder) / name)}")
        for part in (part for part in parts if part.startswith(tuple(options.only))):
            ended[part] = _follow(options, part, Path(folder), until, figures)
            _say(f"{part}: {ended[part]}")
            _write(options, {**document, "parts": ended})
    for model in options.models:
        for how in ("plain", "compiled"):
            _ratios(figures, model, how)
    _write(options, {**document, "parts": ended})
    return 0 if set(ended.values()) == {"done"} else 1


def _parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_fused", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundles", type=Path, required=True, help="folder of the bundles, see above")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="(default %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so (default all)")
    parser.add_argument("--device", default="cuda", help="cpu: to see that every part runs (default %(default)s)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder where torch's compiler keeps and finds what it makes")
    parser.add_argument("--attention", default="", help="another row of the kernel's table, for whole stages")
    parser.add_argument("--mlp", default="", help="likewise")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="write gpu_fused.json there, as it goes")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.command = command_line("gpu_fused", sys.argv[1:] if arguments is None else arguments)
    return options


def _say(line: str) -> None:
    print(line, flush=True)


def _write(options: Options, document: Mapping[str, Any]) -> None:
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu_fused.json").write_text(json.dumps(document, indent=1) + "\n")


def _prepared(source: Path, out: Path) -> str:
    try:
        if any(source.glob("*.gz")):
            fill(source, out)
            return "filled"
        if not (source / MANIFEST).exists():
            return "is not there"
        out.symlink_to(source.resolve())
    except Exception as error:
        return failure(error)
    return "linked"


def _follow(options: Options, part: str, folder: Path, until: float, figures: dict[str, Any]) -> str:
    """Run a part in a process, show what it says, take in what is for the file."""
    left = until - time.monotonic()
    if left <= 0:
        return "left out: the minutes were over"
    _say(f"-- {part} [{left:.0f} s left]")
    command = [sys.executable, "-m", "benchmarks.gpu_fused", "--part", part, "--bundles", str(folder)]
    for name in ("batch", "seconds", "device", "backend", "attention", "mlp"):
        command += [f"--{name}", str(getattr(options, name))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        late = threading.Timer(left, process.kill)
        late.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(RESULT):
                    figures |= json.loads(line.removeprefix(RESULT))
                else:
                    _say(f"   {line.rstrip()}")
        finally:
            late.cancel()
        status = process.wait()
    if status and time.monotonic() >= until:
        return "ended: the minutes were over"
    return "done" if status == 0 else f"its process ended with {status}"


def _ratios(figures: Mapping[str, Any], model: str, how: str) -> None:
    """Over the backbone, of a cascade whose survivors fill batches again."""
    for form in ("unfused", "fused"):
        times = [figures.get(f"{model} {number} {how}", {}).get(f"{form}_ms") for number in (ALONE, 1, 2, 3)]
        if None in times:
            continue
        alone, first, second, third = times
        ratios = [alone / (first + (mix[1] + mix[2]) * second + mix[2] * third) for mix in MIXES]
        shown = ", ".join(
            f"{'/'.join(f'{share:.0%}'.rstrip('%') for share in mix)} {ratio:.2f}"
            for mix, ratio in zip(MIXES, ratios, strict=True)
        )
        _say(f"{model} {how} {form}: over the backbone at {shown}")
        figures[f"{model} {how} {form} ratios"] = ratios  # type: ignore[index]


# -- a part, in its process


def _run_part(options: Options) -> None:
    how, _, model = options.part.partition(" ")
    card = Card(options.device)
    if card.cuda:
        torch_stage.CudaPlace(tf32=True)  # sets what the engine sets
    _say(card.facts)
    if not fusions.run_on(card.device):
        raise SystemExit("our own kernels do not run here")
    from server.engines.gpu import kernels

    with (
        torch.inference_mode(),
        kernels.tiles("ATTENTION_TILES", options.attention or kernels.ATTENTION_TILES),
        kernels.tiles("RELATION_MLP_TILES", options.mlp or kernels.RELATION_MLP_TILES),
    ):
        if how == "kernels":
            _kernels(card, options)
        else:
            _model(card, options, model, how == "compiled")


def _result(name: str, **values: Any) -> None:
    _say(RESULT + json.dumps({name: values}))


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _say(f"{what}: {failure(error)}")


class Here:
    """Torch on one device (`torch_stage.Place`): an address is a number of a list."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: list[Tensor] = []

    def tensor(self, address: int, shape: torch_stage.Shape, dtype: torch.dtype) -> Tensor:
        found = self.tensors[address]
        assert (tuple(found.shape), found.dtype) == (shape, dtype)
        return found

    def run(self, stream: int, work: torch_stage.Work) -> None:  # noqa: ARG002
        then = work()
        if then is not None:
            then()

    def enter(self, stream: int) -> None: ...

    def leave(self, stream: int) -> None: ...


def _opened(
    card: Card,
    options: Options,
    bundle: Bundle,
    number: int,
    given: Mapping[str, Tensor],
    fuse: bool,
    compile_: torch_stage.Compile | None,
) -> tuple[torch_stage.TorchContext, dict[str, Tensor]]:
    """A stage that has run once, and what it gives."""
    spec, place = bundle.manifest.stages[number - 1], Here(card.device)
    stage = torch_stage.TorchStage(bundle.stage_path(number), spec, place, (options.batch,), compile_, fuse)
    names = [*spec.inputs, *(name for name in spec.outputs if name != "logits")]  # as the engine asks
    for name in names:
        tensor = {**spec.inputs, **spec.outputs}[name]
        shape, dtype = torch_stage._shape(tensor, options.batch), torch_stage.DTYPES[tensor.dtype]
        place.tensors.append(given[name] if name in given else torch.zeros(shape, dtype=dtype, device=card.device))
    context = stage.context(options.batch, {name: at for at, name in enumerate(names)}, 0, 0)
    context.enqueue()
    card.synchronize()
    return context, {name: tensor for name, tensor in zip(names, place.tensors, strict=True) if name not in given}


def _model(card: Card, options: Options, model: str, compiled: bool) -> None:
    how = "compiled" if compiled else "plain"
    compile_ = compiler(options.cache, options.backend) if compiled else None
    bundles = {
        number: Bundle.load(options.bundles / f"{model}{kind}-fp16", verify=False, need_frontier=False)
        for number, kind in ((ALONE, "-alone"), (1, ""))
    }
    size = bundles[1].manifest.preprocessing.size
    pixels = torch.randint(0, 256, (options.batch, *size, 3), dtype=torch.uint8, device=card.device)
    states = _states(card, options, bundles[1], pixels)
    # The stages first, with our kernels first: a compiler takes its time.
    for number in (*range(1, len(bundles[1].manifest.stages) + 1), ALONE):
        bundle = bundles[min(number, 1)]
        given = {"image": pixels, **(states[number - 1] if number else {})}
        said: dict[str, dict[str, Tensor]] = {}
        works: dict[str, Callable[[], object]] = {}
        contexts = []
        values: dict[str, Any] = {}
        for form in ("fused", "unfused") if number else ("unfused",):  # alone there is nothing of ours
            with _going_on(f"{model} {number} {how} {form}"):
                began = time.monotonic()
                context, gives = _opened(card, options, bundle, max(number, 1), given, form == "fused", compile_)
                contexts.append(context)
                context.enqueue()
                card.synchronize()
                said[form] = {name: tensor.float().clone() for name, tensor in gives.items()}
                values[f"{form}_opened_s"] = round(time.monotonic() - began, 1)
                works[form] = card.graph(context.enqueue)
                _say(f"{model} {number} {how} {form}: open after {values[f'{form}_opened_s']} s")
        with _going_on(f"{model} {number} {how}: times"):
            for form, spread in card.compare(works, options.seconds).items() if works else ():
                values |= {f"{form}_ms": spread.median, f"{form}_spread_ms": [spread.least, spread.most]}
                _say(f"{model} {number} {how} {form}: {spread}")
        if not number and "unfused_ms" in values:
            values["fused_ms"] = values["unfused_ms"]
        if len(said) == 2:
            values["apart"] = {
                name: float((tensor - said["unfused"][name]).abs().max()) for name, tensor in said["fused"].items()
            }
            _say(f"{model} {number} {how}: apart {values['apart']}")
        _result(f"{model} {number} {how}", **values)
        if compiled or not card.cuda:
            with _going_on(f"{model} {number} {how}: kernels"):
                _result(f"{model} {number} {how} kernels", **_top(card, contexts[0]))
        works.clear()
        for context in contexts:
            context.close()


def _states(card: Card, options: Options, bundle: Bundle, pixels: Tensor) -> list[dict[str, Tensor]]:
    """What each stage is given besides the image, by torch's own kernels."""
    states: list[dict[str, Tensor]] = [{}]
    for number, spec in enumerate(bundle.manifest.stages[1:], start=1):
        context, gives = _opened(card, options, bundle, number, {"image": pixels, **states[-1]}, False, None)
        states.append({name: gives[name] for name in spec.inputs if name != "image"})
        context.close()
    return states


def _top(card: Card, context: torch_stage.TorchContext) -> dict[str, float]:
    """Milliseconds by kernel, the longest."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if card.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(3):
            context.enqueue()
        card.synchronize()
    key = "self_device_time_total" if card.cuda else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, key))
    _say(f"kernels, {sum(getattr(row, key) for row in rows) / 3e3:.3f} ms:")
    top = {f"{row.key[:110]} x{row.count // 3}": getattr(row, key) / 3e3 for row in rows[:TOP]}
    for name, ms in top.items():
        _say(f"  {ms:8.3f} ms  {name}")
    return top


def _kernels(card: Card, options: Options) -> None:
    """Each way to cut the kernels up, on the shapes of T2T-ViT-14, against float64 on the first image."""
    from server.engines.gpu import kernels

    B, h, d, half = options.batch, 6, 64, torch.float16
    for name, queries, tokens, keys, n, biased, hands_on in (
        ("attention, stage 1", 56, 56, 50, 16, False, True),
        ("attention, stage 2", 104, 104, 101, 56, True, True),
        ("attention, stage 3", 200, 197, 197, 104, True, False),
    ):
        q, k, v = card.normal(B, queries, 3, h, d, dtype=half).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (q / 8).transpose(1, 2).contiguous().transpose(1, 2), k[:, :, :tokens], v[:, :, :tokens]
        relations = card.normal(B, 84, n, n, dtype=half) if biased else None
        up = (card.normal(queries, n).abs() / n).to(half)
        state = torch.zeros(B, 88, queries, tokens, dtype=half, device=card.device) if hands_on else None
        matrices = (up, up[:tokens]) if biased else (None, None)
        logits = q[:1].double() @ k[:1].double().transpose(2, 3)
        if relations is not None:
            logits += up.double() @ relations[:1, 6:12].double() @ up[:tokens].double().t()
        exact = (logits[..., :keys].softmax(-1) @ v[:1, :, :keys].double()).transpose(1, 2)

        def attend(q=q, k=k, v=v, keys=keys, relations=relations, matrices=matrices, state=state) -> Tensor:  # type: ignore[no-untyped-def]
            found: Tensor = kernels.attention(q, k, v, keys, relations, 6, *matrices, None, state, 1)
            return found

        _tiles(card, options, name, "ATTENTION_TILES", attend, exact)
        if state is not None:
            _say(f"{name}: logits off by {float((state[:1, 6:12].double() - logits).abs().max()):.2g}")
    for name, positions in (("relation MLP, stage 2", 56 * 56), ("relation MLP, stage 3", 104 * 104)):
        x = card.normal(B, 88, positions, dtype=half)
        first, second = (card.normal(256, 88) / 9).to(half), (card.normal(84, 256) / 16).to(half)
        exact = second.double() @ torch.nn.functional.gelu(first.double() @ x[:1].double())

        def mix(x=x, first=first, second=second) -> Tensor:  # type: ignore[no-untyped-def]
            found: Tensor = kernels.relation_mlp(x, first, second)
            return found

        _tiles(card, options, name, "RELATION_MLP_TILES", mix, exact)


def _tiles(card: Card, options: Options, name: str, table: str, work: Callable[[], Tensor], exact: Tensor) -> None:
    from server.engines.gpu import kernels

    works: dict[str, Callable[[], object]] = {}
    for tiles in kernels.names_of_tiles()[table]:
        with _going_on(f"{name}, {tiles}"), kernels.tiles(table, tiles):
            _say(f"{name}, {tiles}: off by {float((work()[:1].double() - exact).abs().max()):.2g}")
            if card.cuda:  # an interpreter's times say nothing
                works[tiles] = card.graph(work)
    with _going_on(name):
        found = card.compare(works, options.seconds) if works else {}
        for tiles, spread in found.items():
            _say(f"{name}, {tiles}: {spread}")
        _result(name, **{tiles: spread.median for tiles, spread in found.items()})


if __name__ == "__main__":
    sys.exit(main())
