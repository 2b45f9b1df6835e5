"""Bundles whose weights are a recipe: a big model travels as a few hundred kilobytes, and is filled where it arrives.

    python -m benchmarks.seeded_graphs export t2t-vit-14 build/t2t-vit-14       # a bundle with seeded weights
    python -m benchmarks.seeded_graphs strip build/t2t-vit-14 small/t2t-vit-14  # its weights become recipes
    python -m benchmarks.seeded_graphs fill small/t2t-vit-14 build/again        # a bundle again, elsewhere

For benchmarks, where only the cost of a model counts: exporting takes minutes and needs the exporter, filling takes
seconds and needs numpy and onnx. Every big tensor is replaced by normal numbers of its own mean and deviation, so that
activations stay as large as they were; the same recipe gives the same numbers everywhere. Tensors that are mostly
zeros, as the matrices of the upsampling, are structure and travel as they are. `strip` also serves for a trained model
that must not be handed on: its weights are gone.

A recipe is a tensor that ONNX calls external, with the location `seeded-normal` and the keys `mean`, `std` and `seed`:
a loader that does not know it says that the file is missing. Graphs are gzipped.

`export --alone` writes the backbone of a variant, the finest grid without reuse. A bundle has at least two stages: its
second one is the same graph again, and is not meant to be run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from server.bundle.manifest import MANIFEST, Bundle, Preprocessing, StageSpec, write_manifest

LOCATION = "seeded-normal"
LEAST = 4096  # elements: smaller tensors, biases and norms, stay
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def strip(bundle: Bundle, out: Path) -> int:
    """Write the bundle with recipes for weights; the bytes of all files. `out` must not exist."""
    out.mkdir(parents=True)
    files = sorted({stage.file for stage in bundle.manifest.stages})
    for number, file in enumerate(files):
        model = onnx.load(bundle.path / file)
        for index, tensor in enumerate(model.graph.initializer):
            _strip(tensor, seed=1000 * number + index)
        (out / f"{file}.gz").write_bytes(gzip.compress(model.SerializeToString(deterministic=True), mtime=0))
    (out / MANIFEST).write_text((bundle.path / MANIFEST).read_text())
    return sum(file.stat().st_size for file in out.iterdir())


def fill(folder: Path, out: Path) -> Bundle:
    """Write the bundle of a stripped one. It has a version of its own and no frontier. `out` must not exist."""
    out.mkdir(parents=True)
    document = json.loads((folder / MANIFEST).read_text())
    files = sorted({stage["file"] for stage in document["stages"]})

    def write(file: str) -> None:
        model = filled(folder / f"{file}.gz")
        onnx.save(model, out / file)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, files))
    return _with_manifest(out, document)


def filled(file: Path) -> onnx.ModelProto:
    """One stripped graph, with numbers for its recipes."""
    model = onnx.ModelProto.FromString(gzip.decompress(file.read_bytes()))
    for tensor in model.graph.initializer:
        _fill(tensor)
    return model


def _strip(tensor: TensorProto, seed: int) -> None:
    if tensor.data_type not in FLOATS or int(np.prod(tensor.dims)) < LEAST:
        return
    values = numpy_helper.to_array(tensor).astype(np.float64)
    if np.count_nonzero(values) < values.size / 2 or not values.std() > 0:
        return
    recipe = {"location": LOCATION, "mean": f"{values.mean():.6g}", "std": f"{values.std():.6g}", "seed": str(seed)}
    name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in recipe.items():
        tensor.external_data.add(key=key, value=value)


def _fill(tensor: TensorProto) -> None:
    recipe = {entry.key: entry.value for entry in tensor.external_data}
    if recipe.get("location") != LOCATION:
        return
    values: NDArray[np.float32] = np.random.default_rng(int(recipe["seed"])).standard_normal(
        tuple(tensor.dims), dtype=np.float32
    )
    values *= np.float32(recipe["std"])
    values += np.float32(recipe["mean"])
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(values.astype(kind), name))


def _with_manifest(out: Path, document: dict[str, Any]) -> Bundle:
    """bundle.json of a stripped bundle, for the graphs that lie in `out` now."""
    p = document["preprocessing"]
    stages = [
        StageSpec.of(out, s["file"], inputs=s["inputs"], outputs=s["outputs"], grid=s["grid"], gmacs=s["gmacs"])
        for s in document["stages"]
    ]
    write_manifest(
        out,
        name=document["name"],
        labels=document["labels"],
        preprocessing=Preprocessing(p["resize"], tuple(p["crop"])),
        stages=stages,
        precision=document["precision"],
        criterion=document["criterion"],
        provenance={"weights": "seeded, not trained"},
    )
    return Bundle.load(out, verify=False, need_frontier=False)


def export_alone(variant: str, precision: str, out: Path) -> Bundle:
    """The backbone of a variant: its finest grid, no reuse; a bundle of the one graph twice. `out` must not exist."""
    # Heavy, and an extra of the distribution.
    import torch

    from export.stage import StageGraph
    from export.to_onnx import write_onnx
    from model.config import VARIANTS
    from model.dvt import DVT
    from model.flops import cumulative_macs

    torch.manual_seed(0)
    model = DVT(replace(VARIANTS[variant], grids=VARIANTS[variant].grids[-1:])).eval()
    graph = StageGraph(model, 1, precision=precision)
    out.mkdir(parents=True)
    write_onnx(graph, out / "alone.onnx")
    (macs,) = cumulative_macs(model)
    config = model.config
    tensors = {
        name: {key: {"dtype": dtype, "shape": shape} for key, (dtype, shape) in shapes.items()}
        for name, shapes in (("inputs", graph.inputs()), ("outputs", graph.outputs()))
    }
    stage = {"file": "alone.onnx", "grid": (config.grids[0],) * 2, **tensors}
    document = {
        "name": f"{config.name}-alone",
        "labels": [str(number) for number in range(config.num_classes)],
        "preprocessing": {"resize": config.resize, "crop": (config.image_size,) * 2},
        "stages": [{**stage, "gmacs": round(times * macs / 1e9, 9)} for times in (1, 2)],
        "precision": precision,
        "criterion": "max_probability",
    }
    return _with_manifest(out, document)


def export(variant: str, precision: str, out: Path) -> Bundle:
    """The cascade of a variant. `out` must not exist."""
    from export.write import export_model, seeded_model

    return export_model(seeded_model(variant), out, {"weights": "seeded, not trained"}, precision=precision)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.seeded_graphs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write a bundle with seeded weights")
    exporting.add_argument("variant", help="a row of model.config.VARIANTS")
    exporting.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default %(default)s)"
    )
    exporting.add_argument("--alone", action="store_true", help="the backbone instead of the cascade")
    for name, what in (("strip", "replace weights by recipes"), ("fill", "replace recipes by weights")):
        commands.add_parser(name, help=what).add_argument("source", type=Path, metavar="FOLDER")
    for command in commands.choices.values():
        command.add_argument("out", type=Path, help="the folder to write; it must not exist")
    options = parser.parse_args(arguments)
    if options.command == "strip":
        size = strip(Bundle.load(options.source, need_frontier=False), options.out)
        print(f"{options.out}: {size / 2**20:.2f} MiB")
        return 0
    if options.command == "fill":
        bundle = fill(options.source, options.out)
    else:
        bundle = (export_alone if options.alone else export)(options.variant, options.precision, options.out)
    manifest = bundle.manifest
    costs = ", ".join(f"{cost:.4f}" for cost in manifest.stage_gmacs)
    print(f"{options.out}: {manifest.name} {manifest.precision}, {costs} GMAC")
    return 0


if __name__ == "__main__":
    sys.exit(main())
