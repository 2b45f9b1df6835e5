"""`dvt convert`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import click
import typer

from model.commands import parse_changes, said, triple


def register(app: typer.Typer) -> None:
    app.command("convert", short_help="Make a plain ViT into a calibrated bundle.")(convert)


def convert(
    vit: Annotated[
        Path,
        typer.Argument(metavar="VIT", help="A plain ViT of timm's or Hugging Face's: .safetensors, .pth, or a folder."),
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Image folder: IMAGES/<class>/<file>.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for all that is made; the bundle is OUT/bundle.")],
    test: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images to judge on; else half of the held-out slice.")
    ] = None,
    grids: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens a side at each exit.  [default: as 7,10,14 to 14]")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels a side.  [default: the ViT's]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="To train for.  [default: 30]")] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="End training with the epoch that is running after so long.")
    ] = math.inf,
    teacher: Annotated[
        bool, typer.Option("--teacher/--no-teacher", help="Whether all exits learn from the ViT's answers, too.")
    ] = True,
    precision: Annotated[str, typer.Option(metavar="fp32|fp16|bf16|int8", help="Of the bundle.")] = "fp32",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to train, calibrate and judge.")] = "auto",
    heads: Annotated[int | None, typer.Option(min=1, help="Where the ViT does not tell them itself.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Channel means that the ViT's images are normalised with, R,G,B (0 to 1).")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Channel standard deviations, R,G,B.")] = None,
    resize: Annotated[int | None, typer.Option(help="Short side before the centre crop, in pixels.", min=1)] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change one field of the recipe from-vit."),
    ] = None,
    loaders: Annotated[int, typer.Option(min=0, help="Processes that load images; 0: the training process.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")] = False,
) -> None:
    """Make a plain ViT and a folder of images into a calibrated bundle: train --from, export, calibrate, evaluate.

    Whatever ends it, the same command goes on with what is left. The last line says what it bought against the ViT
    alone, on images that neither training nor calibration saw. A ViT whose head knows other classes than IMAGES is
    trained alone first.

    \b
    Examples:
      dvt convert vit_small_patch16_224/ pets/train pets-dvt
      dvt convert dinov2-small/ pets/train pets-dvt --image-size 224 --grids 8,11,16 --test pets/test
      dvt serve pets-dvt/bundle
    """
    if precision not in ("fp32", "fp16", "bf16", "int8"):
        raise click.UsageError(f"--precision is fp32, fp16, bf16 or int8, not {precision}")
    if device not in ("auto", "cpu", "cuda"):
        raise click.UsageError(f"--device is auto, cpu or cuda, not {device}")
    from tqdm import tqdm

    from export.convert import STEPS, Bought, Wish, what_is_left
    from export.convert import convert as run
    from export.verify import VerificationError
    from model.recipes import RECIPES
    from server.calibration.calibrate import CalibrationError
    from server.errors import BundleError, EngineUnavailable, ServeError

    parsed: dict[str, Any] = parse_changes(changes or [], RECIPES["from-vit"])
    parsed |= {name: triple(name, text) for name, text in (("mean", mean), ("std", std)) if text is not None}
    if epochs is not None:
        parsed = {"warmup_epochs": min(2, epochs // 4)} | parsed | {"epochs": epochs}
    shown = sys.stderr.isatty() and not as_json
    try:
        recipe = replace(RECIPES["from-vit"], **parsed)
        wish = Wish(
            vit, images, out, recipe, test, _grids(grids), image_size, heads, resize, teacher,
            cast(Any, precision), cast(Any, device), minutes, loaders,
        )  # fmt: skip
        with tqdm(disable=not shown, bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining}") as bar:
            document = run(wish, bar, lambda line: tqdm.write(line, file=sys.stderr))
    except (
        ValueError, OSError, FloatingPointError, VerificationError, CalibrationError, BundleError, EngineUnavailable,
        ServeError,
    ) as error:  # fmt: skip
        left = [] if isinstance(error, FileExistsError) else what_is_left(out)
        rest = f" (left to do: {', '.join(left)})" if 0 < len(left) < len(STEPS) else ""
        raise click.ClickException(said(error) + rest) from None
    if as_json:
        click.echo(json.dumps(document))
        return
    for line in Bought.lines(document):
        click.echo(line)


def _grids(text: str | None) -> tuple[int, ...]:
    try:
        grids = tuple(int(part) for part in (text or "").split(",") if text)
    except ValueError:
        grids = (0,)
    if grids and (min(grids) < 1 or len(set(grids)) < 2 or sorted(set(grids)) != list(grids)):
        raise click.UsageError(f"--grids {text}: expected two numbers or more that rise, such as 7,10,14")
    return grids
