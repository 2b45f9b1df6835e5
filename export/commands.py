"""`dvt export` and `dvt evaluate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import click
import typer

from model.commands import said

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]


def register_export(app: typer.Typer) -> None:
    app.command("export", short_help="Export a checkpoint as a verified bundle.")(export)


def register_evaluate(app: typer.Typer) -> None:
    app.command("evaluate", short_help="Measure a checkpoint or a bundle on images.")(evaluate)


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="model.safetensors of a training run.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder to write; must not exist.")],
    criterion: Annotated[
        str,
        typer.Option(
            metavar="max_probability|entropy|margin",
            help="What an exit's confidence is: the largest probability, 1 - entropy / log(classes), or the largest "
            "probability less the second.",
        ),
    ] = "max_probability",
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|fp16|bf16|int8",
            help="fp32: graphs for CPUs. fp16 or bf16: graphs for GPUs, whose attention, MLPs and state are in it. "
            "int8: graphs for CPUs, whose products with weights are in 8-bit integers; needs --images.",
        ),
    ] = "fp32",
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Image folder that finds the scales of int8, best the training's: its held-out slice is left alone.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as a bundle: one ONNX file per stage, run and compared with PyTorch.

    The bundle still wants thresholds before it can serve: dvt calibrate BUNDLE IMAGES. A published checkpoint brings
    thresholds along: those serve until then.

    \b
    Examples:
      dvt export runs/photo10/model.safetensors photo10-bundle
      dvt export runs/photo10/model.safetensors photo10-entropy --criterion entropy
      dvt export runs/photo10/model.safetensors photo10-fp16 --precision fp16
      dvt export runs/photo10/model.safetensors photo10-int8 --precision int8 --images photo10/train
    """
    if criterion not in ("max_probability", "entropy", "margin"):
        raise click.UsageError(f"--criterion is max_probability, entropy or margin, not {criterion}")
    if precision not in ("fp32", "fp16", "bf16", "int8"):
        raise click.UsageError(f"--precision is fp32, fp16, bf16 or int8, not {precision}")
    if precision == "int8" and images is None:
        raise click.UsageError("--precision int8 needs --images FOLDER: photos, best the training's, find its scales")
    if precision != "int8" and images is not None:
        raise click.UsageError(f"--images finds the scales of --precision int8; {precision} has none")
    from tqdm import tqdm

    from export.int8 import BundlePrecision
    from export.verify import VerificationError
    from export.write import export_checkpoint
    from server.bundle.frontier import Criterion
    from server.calibration.calibrate import CalibrationError

    notices: list[str] = []
    steps = 6 if precision == "int8" else 5
    with tqdm(total=steps, disable=as_json or not sys.stderr.isatty(), bar_format="{desc} {bar} {elapsed}") as bar:

        def progress(what: str) -> None:
            bar.set_description(what)
            bar.update()

        try:
            written = export_checkpoint(
                checkpoint,
                bundle,
                progress,
                cast(Criterion, criterion),
                notices.append,
                cast(BundlePrecision, precision),
                images,
            )
        except (ValueError, OSError, VerificationError, CalibrationError) as error:
            raise click.ClickException(said(error)) from None
    for notice in notices:
        click.echo(f"note: {notice}", err=True)
    manifest, imported = written.manifest, written.solved
    points = len(imported.rows) if imported else 0
    if as_json:
        head = {"path": str(written.path), "version": manifest.version, "precision": manifest.precision}
        click.echo(json.dumps({**head, "parity": dict(manifest.parity), "operating_points": points}))
        return
    click.echo(f"{written.path}: {manifest.name} {manifest.version} in {manifest.precision}")
    for number, stage in enumerate(manifest.stages, start=1):
        difference = manifest.parity["max_logit_difference"][number - 1]
        side = stage.grid[0]
        click.echo(
            f"  exit {number}: {side}x{side} tokens, {stage.gmacs:.4g} GMAC so far, logits within {difference:.1e}"
        )
    if imported:
        low, high = imported.rows[0].gmacs, imported.knee.gmacs
        click.echo(f"  {points} operating points of the checkpoint's own, {low:.4g} to {high:.4g} GMAC")
        click.echo(f"next: dvt serve {bundle}, or, for thresholds of your own: dvt calibrate {bundle} IMAGES")
    else:
        click.echo(f"next: dvt calibrate {bundle} IMAGES --held-out FRACTION")


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="CHECKPOINT|BUNDLE", help="A checkpoint file or a bundle folder.")],
    images: Annotated[
        Path | None, typer.Argument(metavar="IMAGES", help="Image folder to measure accuracy on.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Normalised inputs (B, 3, H, W), .npy; needs --logits.", metavar="X.npy")
    ] = None,
    logits: Annotated[
        Path | None, typer.Option(help="Where to write the logits, (exits, B, classes) float32.", metavar="OUT.npy")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write a page with plots into this folder; for a calibrated bundle.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            envvar="DVT_ENGINE",
            metavar="auto|onnx|tensorrt|torch-cuda|onnx-cuda",
            help="What runs the stages of a bundle.",
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy and MACs of every exit; or every exit's logits for given inputs.

    A bundle is run through its exported engines. For a calibrated one, also what its thresholds do to IMAGES at 25, 50
    and 75 % of the last exit's cost, and the area under the budget curve, next to the geometric family of thresholds.

    \b
    Examples:
      dvt evaluate runs/photo10/model.safetensors photo10/test
      dvt evaluate photo10-bundle photo10/test --report report
      dvt evaluate photo10-bundle --inputs x.npy --logits y.npy
    """
    if (inputs is None) != (logits is None):
        raise click.UsageError("--inputs and --logits go together")
    if images is None and inputs is None:
        raise click.UsageError("nothing to do: name an image folder, or --inputs and --logits")
    if report is not None and (images is None or not target.is_dir()):
        raise click.UsageError("--report needs a bundle and an image folder")
    try:
        if inputs is not None and logits is not None:
            _write_logits(target, inputs, logits)
        if images is not None:
            result = (
                _evaluate_bundle(target, images, engine) if target.is_dir() else _evaluate_checkpoint(target, images)
            )
            click.echo(json.dumps(result) if as_json else _table(result))
            if report is not None:
                click.echo(f"report: {_report(target, images, report, engine)}", err=True)
    except click.ClickException:
        raise
    except Exception as error:
        if not _users_fault(error):
            raise
        raise click.ClickException(said(error)) from None


def _users_fault(error: Exception) -> bool:
    from server.calibration.calibrate import CalibrationError
    from server.errors import BundleError, EngineUnavailable

    return isinstance(error, (ValueError, OSError, BundleError, EngineUnavailable, CalibrationError))


def _write_logits(target: Path, inputs: Path, out: Path) -> None:
    import numpy as np

    try:
        x = np.load(inputs, allow_pickle=False)
    except (ValueError, EOFError):  # numpy says to unpickle it
        x = None
    if not isinstance(x, np.ndarray):
        if x is not None:
            x.close()  # an archive of several
        raise ValueError(f"{inputs}: is not an .npy file of numbers")
    if target.is_dir():
        from export.logits import bundle_logits
        from server.bundle.manifest import Bundle

        y = bundle_logits(Bundle.load(target, need_frontier=False), x)
    else:
        import torch

        from model.checkpoint import load_model
        from model.evaluate import exit_logits

        model, _ = load_model(target)
        side = model.config.image_size
        if x.ndim != 4 or x.shape[1:] != (3, side, side):
            raise ValueError(f"inputs have shape {x.shape}, the model takes (B, 3, {side}, {side})")
        y = exit_logits(model, torch.from_numpy(x)).numpy()
    np.save(out, y.astype(np.float32), allow_pickle=False)


def _evaluate_checkpoint(path: Path, images: Path) -> dict[str, Any]:
    from model.checkpoint import load_model
    from model.data import Normalize, eval_loader, scan_image_folder
    from model.evaluate import exit_accuracy
    from model.flops import cumulative_macs

    model, _ = load_model(path)
    config = model.config
    labels, samples = scan_image_folder(images)
    if config.labels and labels != config.labels:
        raise ValueError(f"{images}: classes differ from the model's ({', '.join(config.labels)})")
    device = next(model.parameters()).device
    accuracy = exit_accuracy(
        model, eval_loader(samples, config.resize, config.image_size, 64), Normalize(config.mean, config.std, device)
    )
    return {
        "images": len(samples),
        "exit_accuracy": accuracy,
        "stage_gmacs": [macs / 1e9 for macs in cumulative_macs(model)],
    }


def _evaluate_bundle(path: Path, images: Path, engine: str) -> dict[str, Any]:
    from server.bundle.manifest import FRONTIER, Bundle
    from server.calibration.calibrate import read_image_folder, record
    from server.calibration.evaluate import evaluate
    from server.engines import load_engine

    bundle = Bundle.load(path, need_frontier=(path / FRONTIER).exists())
    examples = read_image_folder(images, bundle.manifest.labels)
    loaded = load_engine(bundle, engine=engine)
    try:
        records = record(bundle, loaded, examples, threads=loaded.executors, progress=sys.stderr.isatty())
    finally:
        loaded.close()
    if bundle.solved is None:
        return {
            "images": len(examples),
            "exit_accuracy": records.correct.mean(axis=1).tolist(),
            "stage_gmacs": list(bundle.manifest.stage_gmacs),
        }
    return asdict(evaluate(bundle.solved, records))


def _report(path: Path, images: Path, out: Path, engine: str) -> Path:
    from export.report import write_report
    from server.bundle.manifest import Bundle
    from server.calibration.calibrate import read_image_folder
    from server.engines import load_engine

    bundle = Bundle.load(path)
    examples = read_image_folder(images, bundle.manifest.labels)
    loaded = load_engine(bundle, engine=engine)
    try:
        return write_report(bundle, loaded, examples, out, progress=sys.stderr.isatty())
    finally:
        loaded.close()


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['images']} images", "exit   top-1     GMAC"]
    for number, (accuracy, gmacs) in enumerate(zip(report["exit_accuracy"], report["stage_gmacs"], strict=True), 1):
        lines.append(f"{number:>4} {accuracy:8.2%} {gmacs:#8.4g}")
    for title, key in (("calibrated thresholds", "points"), ("geometric thresholds", "geometric_points")):
        if report.get(key):
            lines += [title, "budget top-1     GMAC   leave at each exit"]
            for name, row in report[key].items():
                fractions = " ".join(f"{f:.2f}" for f in row["exit_fractions"])
                lines.append(f"{name:>5} {row['accuracy']:8.2%} {row['gmacs']:#8.4g}   {fractions}")
    if "area" in report:
        geometric = report["geometric_area"]
        compared = "" if geometric is None else f", geometric {geometric:.4f}"
        lines.append(f"area under the budget curve: {report['area']:.4f}{compared}")
    return "\n".join(lines)
