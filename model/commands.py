"""`dvt train`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import click
import typer


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    data: Annotated[Path, typer.Argument(metavar="IMAGES", help="Image folder: IMAGES/<class>/<file>.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for checkpoints and metrics.jsonl.")],
    recipe: Annotated[str, typer.Option(help="Row of the recipe table: a variant and how to train it.")] = "photo10",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change one field of the recipe; may be given again."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT, to the same loss curve.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch; by default all cores.")] = None,
    loaders: Annotated[int, typer.Option(min=0, help="Processes that load images; 0: the training process.")] = 0,
) -> None:
    """Train a DVT on an image folder: all exits at once, by the sum of their losses.

    A slice of IMAGES is held out (field held_out); `dvt calibrate` finds it by the same fraction. OUT gets
    last.safetensors to resume from, model.safetensors (averaged weights) to evaluate and export, and metrics.jsonl.
    On several GPUs or machines: torchrun --nproc-per-node 8 -m server train ...

    \b
    Examples:
      dvt train photo10/train runs/photo10
      dvt train photo10/train runs/photo10 --resume
      dvt train photo10/train runs/short --set epochs=5 --set lr=1e-3
    """
    import torch

    from model.train import RECIPES
    from model.train import train as run

    if recipe not in RECIPES:
        raise click.UsageError(f"no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    chosen = replace(RECIPES[recipe], **_parse(changes or [], RECIPES[recipe]))
    if threads:
        torch.set_num_threads(threads)
    try:
        click.echo(run(data, out, chosen, resume=resume, num_workers=loaders))
    except (ValueError, OSError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from None


def _parse(changes: list[str], recipe: Any) -> dict[str, Any]:
    """FIELD=VALUE texts, each value of the type that the recipe's field has."""
    known = {field.name: type(getattr(recipe, field.name)) for field in fields(recipe)}
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known:
            raise click.UsageError(f"--set {change}: expected FIELD=VALUE with one of {', '.join(known)}")
        try:
            values[name] = known[name](text)
        except ValueError:
            raise click.UsageError(f"--set {change}: not {known[name].__name__}") from None
    return values
