"""The command `dvt`: one application, filled by every entry point of the group `dvt.commands`.

Each package of the distribution brings its own commands, so that `server` imports neither `model` nor `export`. A
package whose libraries are not installed (torch, onnx) still shows, and says what to install.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys

if os.getpid() == 1:  # in a container: to that process the kernel gives no signal that it has not asked for
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

gc.disable()  # see `process.importing`
try:
    from contextlib import suppress
    from importlib.metadata import EntryPoint, entry_points
    from typing import Annotated, NoReturn

    import click
    import typer

    from server import commands, process
    from server.errors import BundleError, EngineUnavailable
    from server.terminal import printable
except KeyboardInterrupt:  # all this takes half a second, in which one may have thought better of it
    print("Interrupted", file=sys.stderr)
    sys.exit(130)
gc.freeze()
gc.enable()

GROUP = "dvt.commands"

# Which extra of the distribution brings a library that is missing.
EXTRAS = {
    "onnxruntime": "cpu",
    "cuda": "gpu-torch",
    "tensorrt": "gpu-trt",
    "aiohttp": "bench",
    "kubernetes": "kubernetes",
}
DEFAULT_EXTRA = "export"  # torch, onnx and what belongs to them


def build() -> typer.Typer:
    """The application with every command there is."""
    app = typer.Typer(
        name="dvt",
        help="Serve, train, export and steer Dynamic Vision Transformers.\n\nStart with: dvt serve",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # errors are one plain line
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
        ] = False,
    ) -> None:
        pass

    commands.register(app)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.value != "server.commands:register":
            add(app, entry)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from server import release

        click.echo(f"dvt-serve {release()}")
        raise typer.Exit


def add(app: typer.Typer, entry: EntryPoint) -> None:
    """Let the package behind an entry point register its commands; one that cannot be imported says why."""
    try:
        register = entry.load()
    except ModuleNotFoundError as error:
        missing = error

        def unavailable() -> None:
            raise click.ClickException(_install(missing))

        takes_anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        unavailable.__doc__ = short = f"Not installed: {_install(missing)}"
        app.command(entry.name, short_help=short, context_settings=takes_anything)(unavailable)
        return
    register(app)


def _install(error: ModuleNotFoundError) -> str:
    library = (error.name or "").partition(".")[0]
    return f"needs {library}: pip install 'dvt-serve[{EXTRAS.get(library, DEFAULT_EXTRA)}]'"


def main() -> None:
    """Run `dvt`. Exit status 0: done; 1: failed; 2: it was told something that it cannot do; 130: Ctrl-C."""
    process.open_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: labels and names may be more than it can encode
    try:
        build()(prog_name="dvt")
    except click.ClickException as error:  # typer brings a click of its own, and passes on what is not its own
        _fail(error.format_message(), error.exit_code)
    except (BundleError, EngineUnavailable) as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:  # a command that imports its libraries only when it runs
        if error.name is None or error.name.partition(".")[0] in ("server", "model", "export"):
            raise
        _fail(_install(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _fail(f"{error.filename or 'the output'}: {str(error.strerror).lower()}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, status: int) -> NoReturn:
    with suppress(OSError):  # nobody reads it, or the disk is full: the status tells
        click.echo(f"Error: {printable(message)}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
