"""The commands of the server: `dvt serve`, what prepares a bundle for it, and its clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import click
import typer
from tqdm import tqdm

from server import process
from server.bench.command import bench
from server.client import DEFAULT_URL, Client, ClientError, ImageError, Model, Refused
from server.settings import Settings, SettingsError, read_settings
from server.terminal import Table, Tally, printable

if TYPE_CHECKING:
    from server.bundle.manifest import Bundle

log = logging.getLogger(__name__)

Url = Annotated[
    str, typer.Option("--url", envvar="DVT_URL", metavar="URL", help="The server to ask.", show_default=True)
]
NEVER = 2.0  # the threshold that nobody reaches, as the server writes it
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        envvar="DVT_ENGINE",
        metavar="auto|onnx|tensorrt|torch-cuda|onnx-cuda",
        help="What runs the stages.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document a line, for scripts.")]


def register(app: typer.Typer) -> None:
    """Add the commands of the server."""
    # Short helps of their own: those made of a docstring are cut.
    app.command("serve", short_help="Serve a bundle over HTTP.")(serve)
    app.command("calibrate", short_help="Solve a bundle's thresholds on labelled images.")(calibrate)
    app.command("build", short_help="Build a bundle's TensorRT engines.")(build)
    app.command("profile", short_help="Measure what a bundle's batches take here.")(profile)
    app.command("batch", short_help="Classify folders of images here, without a server.")(batch)
    app.command("classify", short_help="Classify images with a running server.")(classify)
    app.command("budget", short_help="Show or set a running server's budget.")(budget)
    app.command("bench", short_help="Load a running server, and report how it does.")(bench)


def serve(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="BUNDLE", readable=False, help="Folder of a bundle; by default the embedded model."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.  [default: 8000]")] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="auto|onnx|tensorrt|torch-cuda|onnx-cuda", help="What runs the stages.  [default: auto]"),
    ] = None,
    frontends: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Processes for HTTP and decoding, beside the engine's.  [default: 0, none]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load, warm up, and exit: is all in order?")] = False,
) -> None:
    """Serve a bundle over HTTP.

    Every setting is also an environment variable DVT_<NAME> (see docs/settings.md); an option wins over it.

    \b
    Examples:
      dvt serve
      dvt serve my-bundle --port 9000
      DVT_CONTROL_TOKEN_FILE=token dvt serve my-bundle --host 0.0.0.0
      dvt serve my-bundle --engine torch-cuda
      dvt serve my-bundle --engine torch-cuda --frontends 4
      dvt serve my-bundle --dry-run
    """
    given = {"bundle": bundle, "host": host, "port": port, "engine": engine, "frontends": frontends}
    try:
        settings = read_settings({name: value for name, value in given.items() if value is not None})
        start(settings, dry_run)
    except SettingsError as error:
        raise _Refused(str(error)) from None


def start(settings: Settings, dry_run: bool) -> None:
    """Build the server and run it. Raises SettingsError, or ClickException for a bundle that cannot be served."""
    process.raise_descriptor_limit()
    process.log_to_stderr(settings.log_level)
    process.hush()
    if not dry_run:
        process.hear_stop(lambda _: process.leave(0))  # until there is a server to stop
    with process.importing():  # heavy, here and below: kept away from the other commands, and from --help
        from server.bundle.manifest import EMBEDDED, Bundle
        from server.core import Engine
        from server.engines import load_engine
        from server.errors import BundleError, EngineUnavailable
        from server.frontend import address

    def open_engine() -> tuple[Bundle, Engine]:
        """Warm, so that all that can be wrong with it is known."""
        try:
            bundle = Bundle.load(settings.bundle or EMBEDDED)
            settings.check_batch_sizes(len(bundle.manifest.stages))
            engine = load_engine(
                bundle,
                engine=settings.engine,
                max_batch_sizes=settings.max_batch_sizes,
                executors=settings.executors,
                max_slots=settings.max_slots,
                engine_dir=settings.engine_dir,
                build_engines=settings.build_engines,
            )
            log.info("the engine is %s: %s on %s", engine.name, engine.runtime, engine.device)
            engine.warm_up()
        except (BundleError, EngineUnavailable) as error:
            raise _Refused(str(error)) from None
        except ModuleNotFoundError as error:
            raise click.ClickException(f"no engine: {error}; install one: pip install 'dvt-serve[cpu]'") from None
        return bundle, engine

    if dry_run:
        bundle, engine = open_engine()
        from server.app import create_app

        # It leaves the stored budget to the servers that may be running.
        create_app(settings.model_copy(update={"state_dir": None, "policy_store": "file"}), bundle, engine)
        engine.close()
        click.echo(f"{_described(bundle)}: in order")
        return
    # The address first: that it is taken should be said at once, not after the engine was loaded.
    with address.bind(settings) as socket:
        # A start is as long as both: what Python imports takes one core, what the runtime does all others.
        with ThreadPoolExecutor(1, thread_name_prefix="open") as beside:
            opening = beside.submit(open_engine)
            with process.importing():
                from server.app import create_app
                from server.frontend import listener
            bundle, engine = opening.result()
        if settings.state_dir is None:
            log.info("budgets are kept in memory only, until this process ends: DVT_STATE_DIR names no folder")
        app = create_app(settings, bundle, engine)
        url = address.url_of(socket)

        def started() -> None:
            process.settle()
            process.say(
                f"Serving {_described(bundle)}\n"
                f"Listening on {url}   (docs: {url}/docs, stop: Ctrl-C)\n"
                f"Try: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {url}/classify"
            )

        ended_well = listener.run(app, settings, socket, started)
        if not ended_well:
            log.critical("the server failed")
        process.leave(0 if ended_well else 1)


def _described(bundle: Bundle) -> str:
    manifest = bundle.manifest
    return f"{manifest.name} {manifest.version}: {len(manifest.stages)} exits, {len(manifest.labels)} classes"


def calibrate(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", readable=False, help="The bundle; its frontier.json is replaced.")
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image folder: IMAGES/<label>/<file>.")],
    held_out: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Take only the slice that training with the same fraction left out; 1 takes all."
        ),
    ] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, every class by its share.")] = None,
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(help="Certify which operating points lose at most this much accuracy, 0.01: a point."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="How sure the certificate is to be.")] = 0.95,
    engine: EngineName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")] = False,
) -> None:
    """Solve the thresholds of BUNDLE on labelled images, through its exported engine.

    Use images that training did not see, and not those that you will report figures on. With --max-accuracy-loss, half
    of them solve, and the other half tests from which cost on the loss against the last exit stays within it.

    \b
    Examples:
      dvt calibrate bundles/photo10 photo10/train --held-out 0.08
      dvt calibrate bundles/photo10 fresh-photos --limit 5000
      dvt calibrate bundles/photo10 fresh-photos --max-accuracy-loss 0.01 --confidence 0.95
    """
    # Heavy, as above.
    from server.calibration import calibrate as calibration
    from server.errors import BundleError, EngineUnavailable, ServeError

    promise = None
    if max_accuracy_loss is not None:
        if not (0 < max_accuracy_loss < 1 and 0 < confidence < 1):
            raise click.UsageError("--max-accuracy-loss and --confidence lie between 0 and 1, both excluded")
        promise = calibration.Promise(max_accuracy_loss, confidence)
    try:
        frontier = calibration.calibrate_folder(bundle, images, held_out, limit, promise, engine)
    except (BundleError, EngineUnavailable, calibration.CalibrationError, ServeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(calibration.as_json(frontier) if as_json else calibration.as_table(frontier))


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", readable=False, help="A bundle in half precision.")],
    cache: Annotated[
        Path | None,
        typer.Option(
            envvar="DVT_ENGINE_DIR",
            metavar="FOLDER",
            help="Where the plans go, in a folder for this bundle.  [default: BUNDLE/engines]",
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Sizes that batches are filled up to.  [default: 1,2,4,8,16,32,64]"),
    ] = None,
    optimization_level: Annotated[
        int, typer.Option(min=0, max=5, help="How hard TensorRT looks for the fastest kernels.")
    ] = 3,
    workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="Most memory that a kernel may use.  [default: the GPU's]")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(metavar="tensorrt|tensorrt_rtx", help="By default what is installed, in this order.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="sm89", help="With tensorrt_rtx: build for this compute capability, without a GPU."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build also what is there and fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")] = False,
) -> None:
    """Build the TensorRT engines of BUNDLE for the GPU at hand; what is there and fits is left alone.

    Of several GPUs it is the first one; CUDA_VISIBLE_DEVICES says which that is.

    \b
    Examples:
      dvt build bundles/photo10-fp16
      dvt build bundles/photo10-fp16 --batch-sizes 1,4,16 --optimization-level 5
      dvt build bundles/photo10-fp16 --cache /var/cache/dvt
      dvt build bundles/photo10-fp16 --runtime tensorrt_rtx --target sm89
    """
    # Heavy, as above.
    from server.bundle.manifest import Bundle
    from server.engines.tensorrt import api, bundles
    from server.engines.tensorrt.gpus import Gpu, find_gpu

    try:
        choices = bundles.choose(
            _batch_sizes(batch_sizes) if batch_sizes else bundles.BATCH_SIZES,
            optimization_level=optimization_level,
            workspace_bytes=workspace_mib and workspace_mib * 2**20,
        )
        if runtime is not None and runtime not in api.MODULES:
            raise click.UsageError(f"--runtime is {' or '.join(api.MODULES)}, not {runtime}")
        # The frontier says nothing about engines, and may not be there yet.
        loaded = Bundle.load(bundle, need_frontier=False)
        bundles.check_precision(loaded)
        trt = api.import_tensorrt(runtime or ("tensorrt_rtx" if target else None))
        if target and not api.is_rtx(trt):
            raise click.UsageError("--target goes with --runtime tensorrt_rtx: TensorRT builds for the GPU at hand")
        try:
            gpu = Gpu.of_capability(target) if target else find_gpu()
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        with tqdm(
            total=len(loaded.manifest.stages),
            desc="stages",
            disable=as_json or not _is_terminal(sys.stderr),
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}",
        ) as bar:

            def progress(done: float) -> None:
                bar.update(max(0.0, done - bar.n))  # within a stage TensorRT looks back now and then

            def waiting() -> None:
                with bar.external_write_mode(sys.stderr):
                    click.echo("Another process builds in the same folder; waiting for it", err=True)

            plans = bundles.build_plans(
                loaded, trt=trt, gpu=gpu, choices=choices, cache=cache, force=force, progress=progress, waiting=waiting
            )
    except ModuleNotFoundError as error:
        package = "tensorrt-rtx" if error.name == "tensorrt_rtx" else "'dvt-serve[gpu-trt]'"
        raise click.ClickException(f"no TensorRT: {error}; install it: pip install {package}") from None
    except KeyboardInterrupt:
        process.leave(130)  # the builder's thread may take long to end, and leaves nothing that counts
    summary = bundles.summary(loaded, trt, gpu, choices, plans)
    click.echo(json.dumps(summary) if as_json else bundles.as_table(summary))


def _batch_sizes(text: str) -> list[int]:
    """Raises click.UsageError."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--batch-sizes are whole numbers, as 1,2,4,8; {text} is not") from None
    if not 1 <= min(sizes) <= max(sizes) <= 4096 or len(set(sizes)) > 16:
        raise click.UsageError(f"--batch-sizes are at most 16 numbers from 1 to 4096; {text} is not")
    return sizes


def profile(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", readable=False, help="The bundle; its profile.json is replaced.")
    ],
    executors: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Batches to run at once, as DVT_EXECUTORS.  [default: the usable cores, 2 on a GPU]"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="Time to measure for.")] = 20.0,
    engine: EngineName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")] = False,
) -> None:
    """Measure what batches of BUNDLE take on this machine, by stage and size.

    The server uses the profile where model, runtime, machine and executors are those that it was measured with, and
    otherwise measures a short one as it starts. Measure while nothing else runs.

    \b
    Examples:
      dvt profile bundles/photo10
      dvt profile bundles/photo10 --executors 8 --seconds 60
      dvt profile bundles/photo10 --json | jq .stages[0].p50
    """
    # Heavy, as above.
    from server.calibration import profiling
    from server.errors import BundleError, EngineUnavailable, ServeError

    try:
        measured = profiling.profile_bundle(bundle, executors=executors, seconds=seconds, engine=engine)
    except (BundleError, EngineUnavailable, ServeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(measured.to_json().rstrip() if as_json else profiling.as_table(measured))


def batch(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES", help="Image folders and files; - takes names from stdin, one a line."),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where answers go, .jsonl or .csv; - is stdout.")
    ],
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Folder of a bundle; by default the embedded model.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TARGET",
            help="gmacs=N, accuracy=N or thresholds=N,N.  [default: what a new server starts with]",
        ),
    ] = None,
    engine: EngineName = "auto",
    top_k: Annotated[int, typer.Option(min=1, help="Classes per image; in .csv it is one.")] = 5,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with FILE: images that have a line are skipped.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew, also where FILE is there.")] = False,
    decode_threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that decode images.  [default: the usable cores]")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            envvar="DVT_ENGINE_DIR", metavar="FOLDER", help="Where TensorRT's plans are.  [default: BUNDLE/engines]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as one JSON document, for scripts.")] = False,
) -> None:
    """Classify folders of images in this process, without a server.

    One line an image, in order; of a bad image the line says what is wrong with it, and the exit status is 1 in the
    end. Until all are done, FILE is called FILE.part; whatever ends a run, --resume goes on with it. Thresholds stay
    as the budget makes them.

    \b
    Examples:
      dvt batch photos -o answers.jsonl
      dvt batch photos -o answers.jsonl --resume
      dvt batch photos -o answers.csv --bundle my-bundle --budget gmacs=0.04
      dvt batch - -o - < names.txt | jq .predictions[0].label
    """
    # Heavy, as above.
    from server.errors import BundleError, EngineUnavailable, ServeError
    from server.offline.answers import AnswerFile, Csv, JsonLines, OutputError, StandardOutput
    from server.offline.batch import classify_files
    from server.offline.cascade import Cascade
    from server.offline.files import FolderError, image_files

    if resume and (force or output == "-"):
        raise click.UsageError(f"--resume does not go with {'--force' if force else '--output -'}")
    if "-" in images and len(images) > 1:
        raise click.UsageError("- stands for all names: it does not go with others")
    process.hush()
    try:
        with Cascade.open(
            bundle,
            engine=engine,
            target=None if target is None else parse_target(target),
            decode_threads=decode_threads,
            engine_dir=cache,
        ) as cascade:
            form = (Csv if output.endswith(".csv") else JsonLines)(cascade.bundle, cascade.point.thresholds, top_k)
            hidden = as_json or not _is_terminal(sys.stderr)
            total = None if hidden or images == ["-"] else sum(1 for _ in image_files(images))
            files = (
                (os.fsdecode(name) for line in sys.stdin.buffer if (name := line.rstrip(b"\n")))
                if images == ["-"]
                else image_files(images)
            )
            with (
                contextlib.closing(
                    StandardOutput(form)
                    if output == "-"
                    else AnswerFile(Path(output), form, resume=resume, force=force)
                ) as answers,
                tqdm(total=total, unit="image", desc="images", disable=hidden, file=sys.stderr) as bar,
            ):

                def failed(image: str, error: ServeError) -> None:
                    with bar.external_write_mode(sys.stderr):
                        click.echo(printable(f"Error: {image}: {error.detail} ({error.code})"), err=True)

                summary = classify_files(cascade, files, answers, failed=failed, advance=bar.update)
                if not summary.images and not summary.skipped:
                    raise click.ClickException(f"no images in {', '.join(images)}")
                answers.finish()
    except (BundleError, EngineUnavailable, FolderError, OutputError) as error:
        raise click.ClickException(str(error)) from None
    except ServeError as error:
        spans = _spans(error.extra.get("feasible"))
        raise click.ClickException(f"{error.detail}{spans and '; feasible: '}{spans}") from None
    click.echo(json.dumps(summary.as_json()) if as_json else summary, err=output == "-")
    if summary.failed or summary.failed_before:
        raise typer.Exit(1)


def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP files.")],
    url: Url = DEFAULT_URL,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Classes per image.  [default: 1; with --json the server's]")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Images to ask for at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Classify image files with a running server.

    Rows come in the order of the images. What cannot be classified is told on stderr, and does not keep the others
    from it; the exit status is then 1.

    \b
    Examples:
      dvt classify cat.jpg
      dvt classify photos/*.jpg --top-k 3
      dvt classify cat.jpg --json | jq .results[0].exit
    """
    tally = Tally()
    try:
        asyncio.run(_classify(images, url, top_k, concurrency, as_json, tally))
    except ClientError as error:
        after = f", after {tally.images} of {len(images)} images" if tally.images else ""
        raise click.ClickException(f"{error}{after}") from None
    if tally.failures:
        raise typer.Exit(1)


async def _classify(
    images: list[Path], url: str, top_k: int | None, concurrency: int, as_json: bool, tally: Tally
) -> None:
    top_k = top_k if top_k or as_json else 1
    table: Table | None = None
    hidden = not _is_terminal(sys.stdout) and _is_terminal(sys.stderr)  # rows that nobody sees: a bar tells how far
    async with Client(url, concurrency=concurrency) as client, aclosing(client.classify_all(images, top_k)) as answers:
        with tqdm(total=len(images), unit="image", desc="images", disable=not hidden, file=sys.stderr) as bar:
            async for image, answer in answers:
                if isinstance(answer, ImageError):
                    tally.failed(answer)
                    with bar.external_write_mode(sys.stderr):
                        click.echo(printable(f"Error: {image}: {answer}"), err=True)
                    bar.update()
                    continue
                result = client.result(answer)
                if as_json:
                    click.echo(json.dumps({"image": str(image), **answer}))
                else:
                    if table is None:
                        table = _table(images, await client.model())
                        click.echo(table.head)
                    click.echo("\n".join(table.rows(image, result)))
                tally.answered(result)
                bar.update()
    if len(images) > 1 and not as_json:
        click.echo(f"\n{tally}" if table else tally)


def _table(images: list[Path], model: Model) -> Table:
    width = shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else None
    return Table(images, model, width=width, encoding=getattr(sys.stdout, "encoding", None) or "utf-8")


def _is_terminal(stream: TextIO | None) -> bool:
    """None stands for a stream that was closed before the start."""
    return stream is not None and stream.isatty()


def budget(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help="gmacs=N, accuracy=N, latency_ms=N or thresholds=N,N; without one, show the budget."
        ),
    ] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            metavar="cost|quality",
            help="cost: thresholds follow the traffic so that the cost stays. quality: they stay.",
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=0.999, help="Of latency_ms=N: the share of answers that are to be that fast.  [default: 0.99]"
        ),
    ] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="Meet gmacs=N exactly: requests are hashed onto two sets of thresholds.")
    ] = False,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="fleet|replica",
            help="fleet: all servers that share a store, for good. replica: the one that answers, for a while.  "
            "[default: fleet]",
        ),
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Of --scope replica: for how long.  [default: 600]"),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Only tell what TARGET would have done to the traffic of late.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show or set the budget of a running server; a change takes effect at once.

    \b
    Examples:
      dvt budget
      dvt budget gmacs=0.03
      dvt budget gmacs=0.05 --mix
      dvt budget gmacs=0.05 --preview
      dvt budget accuracy=0.74 --hold quality
      dvt budget latency_ms=25 --quantile 0.99
      dvt budget thresholds=0.9,0.7
      dvt budget gmacs=0.05 --scope replica --expires 600

    Where the server asks for a token, DVT_CONTROL_TOKEN gives it.
    """
    body = None if target is None else parse_target(target)
    if hold is not None:
        if body is None:
            raise click.UsageError("--hold needs a TARGET")
        if hold not in ("cost", "quality"):
            raise click.UsageError(f"--hold is cost or quality, not {hold}")
        body["hold"] = hold
    if quantile is not None:
        if body is None or "latency_ms" not in body:
            raise click.UsageError("--quantile goes with latency_ms=N")
        body["quantile"] = quantile
    if mix:
        if body is None or "gmacs" not in body:
            raise click.UsageError("--mix goes with gmacs=N")
        body["mix"] = True
    if preview and body is None:
        raise click.UsageError("--preview needs a TARGET")
    try:
        click.echo(asyncio.run(_budget(url, body, preview, _scope(scope, expires, body, preview), as_json)))
    except ClientError as error:
        spans = _spans(error.feasible) if isinstance(error, Refused) else ""
        raise click.ClickException(f"{error}{spans and '; feasible: '}{spans}") from None


def _scope(scope: str | None, expires: float | None, body: dict[str, Any] | None, preview: bool) -> dict[str, Any]:
    """The query of PUT /budget. Raises click.UsageError."""
    if scope is not None and (body is None or preview):
        raise click.UsageError("--scope goes with a TARGET that is set")
    if scope not in (None, "fleet", "replica"):
        raise click.UsageError(f"--scope is fleet or replica, not {scope}")
    if expires is not None and scope != "replica":
        raise click.UsageError("--expires goes with --scope replica")
    if expires is not None and not 0 < expires < math.inf:
        raise click.UsageError("--expires takes seconds, above 0")
    return {
        **({} if scope is None else {"scope": scope}),
        **({} if expires is None else {"expires_s": f"{Decimal(repr(expires)):f}"}),
    }


async def _budget(url: str, body: dict[str, Any] | None, preview: bool, params: dict[str, Any], as_json: bool) -> str:
    async with Client(url) as client:
        if body is None:
            state = await client.budget()
        else:
            state = await (client.preview_budget(body) if preview else client.set_budget(body, params))
        try:
            return json.dumps(state) if as_json else (_describe_preview if preview else _describe_budget)(state)
        except (LookupError, TypeError, ValueError, AttributeError):  # it is not what our servers answer
            raise client.not_ours("/budget/preview" if preview else "/budget") from None


def parse_target(text: str) -> dict[str, Any]:
    """`gmacs=0.03` as the body of PUT /budget. Raises click.UsageError."""
    name, equals, value = text.partition("=")
    if not equals or name not in ("gmacs", "accuracy", "thresholds", "latency_ms"):
        shown = "gmacs=0.03, accuracy=0.74, latency_ms=25 or thresholds=0.9,0.7"
        raise click.UsageError(f"{text} is no target; give {shown}")
    try:
        numbers = [NEVER if name == "thresholds" and part == "never" else float(part) for part in value.split(",")]
    except ValueError:
        raise click.UsageError(f"{value} is not a number; for example {name}=0.5") from None
    if not all(map(math.isfinite, numbers)):
        raise click.UsageError(f"{value} is no number that a budget can be; for example {name}=0.5")
    if name == "thresholds":
        return {name: numbers}
    if len(numbers) != 1:
        raise click.UsageError(f"{name} takes one number")
    return {name: numbers[0]}


def _describe_audited(audit: dict[str, Any]) -> str:
    return (
        f"{audit['images']} images for {audit['represented']} of {audit['chosen']} chosen requests, "
        f"agreement with the last exit {_interval(audit['agreement'])}, "
        f"accuracy gap {_interval(audit['accuracy_gap'])}"
    )


def _describe_budget(state: dict[str, Any]) -> str:
    observed, feasible, audit, drift = (state[name] for name in ("observed", "feasible", "audit", "drift"))
    lines = [f"version     {state['version']}", *_describe_target(state)]
    if (mix := state["mix"]) is not None:
        lines.append(
            f"mix         {100 * mix['share']:.1f} % of the requests by thresholds {_thresholds(mix['thresholds'])}"
        )
    if observed["images"]:
        latency = observed["latency_ms"]
        lines.append(
            f"observed    {observed['images']} images, {observed['gmacs']:.4g} GMAC, "
            f"exits {_percent(observed['exit_fractions'])}, p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms"
        )
    else:
        lines.append("observed    no images under this budget yet")
    if audit["images"]:
        lines.append(f"audited     {_describe_audited(audit)}")
    if (since := audit["since_start"])["chosen"] > audit["chosen"] and since["images"]:
        lines.append(f"all budgets {_describe_audited(since)}")
    if drift["alarm"]:
        lines.append(f"drift       the traffic is not that of the calibration: {', '.join(drift['reasons'])}")
    lines.append(f"feasible    {_spans(feasible)}")
    lines += _describe_fleet(state.get("fleet") or {})
    if state["pressure"]:
        lines.append(
            f"pressure    {state['pressure']:.0%} of the target's cost is given up, as the server is overloaded"
        )
    return "\n".join(lines)


def _describe_fleet(fleet: dict[str, Any]) -> list[str]:
    """Nothing where a server is alone and all is well; servers of earlier releases say nothing of it."""
    lines = []
    if (left := fleet.get("expires_in_s")) is not None:
        lines.append(f"replica     of this server alone for {left:.0f} s more, then version {fleet['applied']} again")
    if fleet.get("store") == "configmap":
        heard = fleet["synced_s_ago"]
        heard = "never heard of" if heard is None else f"heard of {heard:.0f} s ago"
        lines.append(f"fleet       version {fleet['generation']} in the ConfigMap, {heard}; here: {fleet['source']}")
    for trouble in (fleet.get("error"), (fleet.get("refused") or {}).get("detail")):
        if trouble is not None:
            lines.append(f"            {trouble}")
    return lines


def _describe_preview(preview: dict[str, Any]) -> str:
    lines, traffic = _describe_target(preview), preview["traffic"]
    if traffic is None:
        return "\n".join([*lines, "traffic     nothing to tell it from yet"])
    lines.append(f"traffic     {_prediction(traffic['target'])}, estimated for the last {traffic['images']} images")
    lines.append(f"            by thresholds {_thresholds(traffic['thresholds'])}")
    lines.append(f"at present  {_prediction(traffic['present'])}")
    return "\n".join(lines)


def _describe_target(state: dict[str, Any]) -> list[str]:
    target = ", ".join(
        f"{name}={_thresholds(value) if name == 'thresholds' else f'{value:g}'}"
        for name, value in state["target"].items()
    )
    clamped = " (clamped to the end of the frontier)" if state["clamped"] else ""
    return [
        f"target      {target}, hold {state['hold']}{clamped}",
        f"thresholds  {_thresholds(state['thresholds'])}",
        f"predicted   {_prediction(state['predicted'])}",
    ]


def _prediction(of: dict[str, Any]) -> str:
    if of["gmacs"] is None:
        return "unknown: the frontier was imported, without records of images"
    return f"accuracy {of['accuracy']:.4f}, {of['gmacs']:.4g} GMAC, exits {_percent(of['exit_fractions'])}"


_SPANS = (("gmacs", "cost", " GMAC"), ("accuracy", "accuracy", ""), ("latency_ms", "latency", " ms"))


def _spans(feasible: Any) -> str:
    """What budgets can be had, with units; "" for what says nothing of it. What is shown can be had, too: the lower
    ends are rounded up, and the upper ones down."""
    spans = []
    for member, name, unit in _SPANS:
        match feasible.get(member) if isinstance(feasible, dict) else None:
            case [int() | float() as low, int() | float() as high]:
                shown = [_rounded(low, ROUND_CEILING), _rounded(high, ROUND_FLOOR)]
                if Decimal(shown[0]) > Decimal(shown[1]):
                    shown = [str(low), str(high)]
                spans.append(f"{name} {shown[0]} to {shown[1]}{unit}")
            case [int() | float() as low, None]:
                spans.append(f"{name} from {_rounded(low, ROUND_CEILING)}{unit}")
    return ", ".join(spans)


def _rounded(number: float, rounding: str) -> str:
    """To four digits."""
    return f"{Context(prec=4, rounding=rounding).create_decimal(repr(number)).normalize():f}"


def _interval(of: dict[str, float]) -> str:
    return f"{of['mean']:.4f} ({of['low']:.4f} to {of['high']:.4f})"


def _thresholds(values: list[float]) -> str:
    return ",".join("never" if value == NEVER else f"{value:.4g}" for value in values)


def _percent(fractions: list[float]) -> str:
    return "/".join(f"{100 * fraction:.0f}" for fraction in fractions) + " %"


class _Refused(click.ClickException):
    """The start is refused for what it was told: exit status 2, like a bad option."""

    exit_code = 2
