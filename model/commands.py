"""`dvt train` and `dvt import`."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import click
import typer


def register_train(app: typer.Typer) -> None:
    app.command("train", short_help="Train a DVT on an image folder.")(train)


def register_import(app: typer.Typer) -> None:
    app.command("import", short_help="Read a published checkpoint.")(import_)


def train(
    data: Annotated[Path, typer.Argument(metavar="IMAGES", help="Image folder: IMAGES/<class>/<file>.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for checkpoints and metrics.jsonl.")],
    recipe: Annotated[str, typer.Option(help="Row of the recipe table: a variant and how to train it.")] = "photo10",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change one field of the recipe; may be given again."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT, to the same loss curve.")] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Begin with these weights, or with a plain ViT of timm's or Hugging Face's; it decides the variant.",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="With --from: what it lacks, or has in another shape, begins anew, not heads alone."
        ),
    ] = False,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="All exits learn from its answers too, by the share distillation: best the ViT of --from.",
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads of a ViT that does not tell them itself.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch; by default all cores.")] = None,
    loaders: Annotated[int, typer.Option(min=0, help="Processes that load images; 0: the training process.")] = 0,
    minutes: Annotated[
        float, typer.Option(min=0, help="End with the epoch that is running after so long; --resume goes on.")
    ] = math.inf,
    graph: Annotated[
        bool, typer.Option("--graph", help="Record the training step as a CUDA graph; on a single GPU.")
    ] = False,
) -> None:
    """Train a DVT on an image folder: all exits at once, by the sum of their losses.

    A slice of IMAGES is held out (field held_out); `dvt calibrate` finds it by the same fraction. OUT gets
    last.safetensors to resume from, model.safetensors (averaged weights) to evaluate and export, and metrics.jsonl.
    On several GPUs or machines torchrun starts it. Photographs of few pixels train faster with in_memory: they are
    decoded once and augmented in batches, on the device.

    \b
    Examples:
      dvt train photo10/train runs/photo10 --graph
      dvt train photo10/train runs/photo10 --resume
      dvt train photo10/train runs/short --set epochs=5 --set lr=1e-3 --set variant.grids=4,8
      dvt train cifar10/train runs/cifar --recipe fine-tune --from t2t-vit-12.safetensors
      dvt train photo10/train runs/two --from photo10.safetensors --set variant.grids=4,8
      dvt train pets/train runs/pets --recipe from-vit --from vit.safetensors --teacher vit.safetensors
      torchrun --nproc-per-node 8 -m server train imagenet/train runs/t2t
    """
    import torch

    from model.recipes import RECIPES
    from model.train import train as run

    if recipe not in RECIPES:
        raise click.UsageError(f"no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    if fresh and start is None:
        raise click.UsageError("--fresh says what may begin anew with --from")
    parsed = parse_changes(changes or [], RECIPES[recipe])
    if threads:
        torch.set_num_threads(threads)
    try:
        chosen = replace(RECIPES[recipe], **parsed)
        click.echo(run(data, out, chosen, resume, loaders, start, graph, minutes, fresh, teacher, heads))
    except (ValueError, OSError, FloatingPointError) as error:
        raise click.ClickException(said(error)) from None


def import_(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A published .pth.tar, or one of the authors' training script.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, .safetensors; must not exist.")],
    labels: Annotated[
        Path | None, typer.Option(help="Text file with one class name a line, in the order of the classes.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Channel means that the images were normalised with, R,G,B (0 to 1).")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Channel standard deviations, R,G,B.")] = None,
    resize: Annotated[int | None, typer.Option(help="Short side before the centre crop, in pixels.", min=1)] = None,
) -> None:
    """Read the paper's checkpoints, or those of its authors' training script, into ours.

    Sizes, grids, reuses and the number of classes are read off the tensors. No code in the file is run. Of a training
    run the averaged weights are taken. Statistics of ImageNet are assumed where neither the file nor an option tells.

    \b
    Examples:
      dvt import t2t-vit-12.pth.tar t2t-vit-12.safetensors
      dvt import cifar.pth.tar cifar.safetensors --labels names.txt --mean 0.491,0.482,0.447 --std 0.247,0.243,0.262
    """
    from model.checkpoint import save_model
    from model.flops import cumulative_macs
    from model.published import import_checkpoint

    if out.exists():
        raise click.ClickException(f"{out} is there already")
    changes: dict[str, Any] = {}
    try:
        if labels is not None:
            changes["labels"] = tuple(labels.read_text(encoding="utf-8").splitlines())
        changes |= {name: triple(name, text) for name, text in (("mean", mean), ("std", std)) if text is not None}
        changes |= {"resize": resize} if resize is not None else {}
        model, header = import_checkpoint(checkpoint, **changes)
        save_model(out, model, **header)
    except (ValueError, OSError) as error:
        raise click.ClickException(said(error)) from None
    config = model.config
    click.echo(f"{out}: {config.name}, {config.num_classes} classes, weights from {header['imported']['from']}")
    for number, (grid, macs) in enumerate(zip(config.grids, cumulative_macs(model), strict=True), start=1):
        click.echo(f"  exit {number}: {grid}x{grid} tokens, {macs / 1e9:.4g} GMAC so far")
    click.echo(f"next: dvt export {out} BUNDLE")


def said(error: Exception) -> str:
    """In one line; of a file that cannot be had, as everywhere: its name, then the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {str(error.strerror).lower()}"
    return str(error)


def triple(name: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v <= 1 for v in values) or (name == "std" and 0 in values):
        raise click.UsageError(f"--{name} {text}: expected three numbers from 0 to 1, such as 0.485,0.456,0.406")
    return values


def parse_changes(changes: list[str], recipe: Any) -> dict[str, Any]:
    """FIELD=VALUE texts, each value of the type that the recipe's field has; variant.FIELD is one of its variant's."""
    from model.config import variant

    known = {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name != "changes"}
    known |= {"drop_path": 0.0, "mean": (0.0,), "std": (0.0,)}
    config = variant(recipe.variant)
    known |= {f"variant.{field.name}": getattr(config, field.name) for field in fields(config)}
    values: dict[str, Any] = {"changes": dict(recipe.changes)}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known:
            shown = [name for name in known if not name.startswith("variant.")]
            raise click.UsageError(
                f"--set {change}: expected FIELD=VALUE with one of {', '.join(shown)}, or variant.FIELD"
            )
        value = _value(text, known[name])
        if value is None:
            raise click.UsageError(f"--set {change}: not {_words(known[name])}")
        if name.startswith("variant."):
            values["changes"][name.removeprefix("variant.")] = value
        else:
            values[name] = value
    return values


def _value(text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`; None where it is not one."""
    try:
        match like:
            case bool():
                return {"true": True, "false": False}.get(text.lower())
            case tuple():
                return tuple(type(like[0])(part) for part in text.split(","))
        return type(like)(text)
    except ValueError:
        return None


def _words(like: Any) -> str:
    match like:
        case bool():
            return "true or false"
        case tuple():
            return f"a list of {type(like[0]).__name__}, separated by commas"
    return type(like).__name__
