"""The command line: help that teaches, errors of one line, exit status 0, 1 or 2."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from server import commands, process
from server.__main__ import add, build
from server.bundle.manifest import EMBEDDED, Preprocessing
from server.commands import parse_target
from server.engines.gpu.probe import visible_gpus
from server.engines.onnx import OnnxEngine
from server.errors import BadImage, BundleError, ImageTooLarge, UnsupportedMediaType
from server.frontend import images
from server.process import hush

Run = Callable[..., tuple[int, str, str]]


COMMANDS = (
    *("serve", "calibrate", "profile", "batch", "classify", "budget", "bench"),
    *("train", "import", "evaluate", "export"),
)


@pytest.mark.parametrize("columns", ["", "80", "60"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_no_line_of_help_is_cut_or_too_wide(
    dvt: Run, command: list[str], columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = dvt(*command, "--help")
    lines = [
        line for line in out.splitlines() if not line.startswith(("    dvt ", "    DVT_", "    torchrun ", "Usage: "))
    ]
    assert [line for line in lines if line.endswith(("...", "…")) or len(line) > int(columns or 80)] == []
    assert command or all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", [[], ["serve"], ["profile"], ["batch"], ["classify"], ["budget"], ["bench"]])
def test_help_explains_and_shows_examples(dvt: Run, command: list[str]) -> None:
    status, out, _ = dvt(*command, "--help")
    assert status == 0
    assert f"dvt {command[0] if command else 'serve'}" in out


@pytest.mark.parametrize("command", [commands.serve, commands.build, commands.profile, commands.calibrate])
def test_a_bundle_that_may_not_be_read_is_left_to_who_says_so_in_one_line(command: Callable[..., None]) -> None:
    # typer would say it with three lines of usage. (Root may read every folder, so none is tried here.)
    (argument,) = get_type_hints(command, include_extras=True)["bundle"].__metadata__
    assert not argument.readable


def test_all_commands_of_the_server_are_there(dvt: Run) -> None:
    _, out, _ = dvt("--help")
    for command in ("serve", "profile", "classify", "budget", "bench"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("arguments", "status", "cause"),
    [
        (["classify", "no-such.jpg"], 1, "no-such.jpg: no such file"),
        (["budget", "--url", "http://127.0.0.1:1"], 1, "no server answers at http://127.0.0.1:1"),
        (["budget", "--url", "nonsense"], 1, "nonsense"),
        (["budget", "fast"], 2, "fast is no target"),
        (["budget", "gmacs=x"], 2, "x is not a number"),
        (["budget", "gmacs=1,2"], 2, "one number"),
        (["budget", "gmacs=nan"], 2, "nan is no number that a budget can be"),
        (["budget", "gmacs=1e999"], 2, "1e999 is no number that a budget can be"),
        (["budget", "gmacs=never"], 2, "never is not a number"),
        (["classify", "x" * 5000], 1, "file name too long"),
        (["classify", "/dev/null"], 1, "/dev/null: is not a file"),
        (["classify", "/"], 1, "/: is a folder; name the images in it: /*"),
        (["serve", "\x1b[31mred\n", "--port", "0"], 2, "\\x1b[31mred\\n: no such folder"),
        (["budget", "--hold", "cost"], 2, "--hold needs a TARGET"),
        (["budget", "gmacs=1", "--hold", "x"], 2, "cost or quality"),
        (["budget", "--mix"], 2, "--mix goes with gmacs=N"),
        (["budget", "accuracy=0.5", "--mix"], 2, "--mix goes with gmacs=N"),
        (["budget", "--preview"], 2, "--preview needs a TARGET"),
        (["serve", "no-such-folder", "--port", "0"], 2, "no-such-folder: no such folder"),
        (["serve", "--port", "70000"], 2, "DVT_PORT"),
        (["profile", "no-such-folder"], 1, "no-such-folder: no such folder"),
    ],
)
def test_what_a_user_can_cause_is_one_line(dvt: Run, arguments: list[str], status: int, cause: str) -> None:
    code, out, err = dvt(*arguments)
    assert (code, out) == (status, "")
    assert cause in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["serve", "--port", "x"], ["nonsense"], ["classify"], ["classify", "--nonsense"]]
)
def test_what_is_no_command_line_is_status_2(dvt: Run, arguments: list[str]) -> None:
    status, _, err = dvt(*arguments)
    assert status == 2
    assert "Error: " in err
    assert "Traceback" not in err


def test_a_bad_setting_stops_the_start_by_name(dvt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVT_MAX_PIXELS", "many")
    status, _, err = dvt("serve")
    assert status == 2
    assert "DVT_MAX_PIXELS='many'" in err
    assert err.count("\n") == 1


def test_targets_are_read_as_they_are_written() -> None:
    assert parse_target("gmacs=0.03") == {"gmacs": 0.03}
    assert parse_target("accuracy=0.74") == {"accuracy": 0.74}
    assert parse_target("thresholds=0.9,0.7") == {"thresholds": [0.9, 0.7]}
    assert parse_target("thresholds=never,0.7") == {"thresholds": [2.0, 0.7]}
    assert parse_target("latency_ms=25") == {"latency_ms": 25}
    for wrong in ("watts=3", "gmacs", "gmacs=x", "latency_ms=1,2"):
        with pytest.raises(click.UsageError):
            parse_target(wrong)


async def test_classify_and_budget_ask_a_running_server(
    listening: Any, dvt: Run, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    cat, dog, broken = tmp_path / "cat.png", tmp_path / "dog.png", tmp_path / "broken.png"
    cat.write_bytes(photo(255, klass=3))
    dog.write_bytes(photo(10, 255, klass=5))
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    async with listening() as here:
        url = ("--url", f"http://127.0.0.1:{here.port}")

        async def ask(*arguments: str) -> tuple[int, str, str]:
            return await asyncio.to_thread(dvt, *arguments, *url)

        status, out, err = await ask("classify", str(cat), str(dog))
        assert (status, err) == (0, "")
        head, *rows = out.splitlines()
        assert head == "image    label   probability  exit    GMAC      ms"
        assert [row[:42] for row in rows[:2]] == [
            "cat.png  label3      100.0 %     1  0.0100",
            "dog.png  label5      100.0 %     2  0.0300",
        ]
        assert rows[2:] == ["", "2 images: 2 answered, 1 at exit 1, 1 at exit 2, mean 0.02 GMAC"]

        status, out, _ = await ask("classify", str(cat), "--top-k", "3")
        head, first, *others = out.splitlines()
        assert re.fullmatch(r"cat.png  label3      100.0 %     1  0.0100 +[0-9.]+", first)
        assert others == ["         label0        0.0 %", "         label1        0.0 %"]

        status, out, _ = await ask("classify", str(cat), str(dog), "--json")
        documents = [json.loads(line) for line in out.splitlines()]
        assert [document["image"] for document in documents] == [str(cat), str(dog)]
        assert [document["results"][0]["exit"] for document in documents] == [1, 2]

        status, out, err = await ask("classify", str(broken))
        assert (status, out) == (1, "")
        assert f"{broken}: " in err
        assert "bad_image" in err

        status, out, _ = await ask("budget", "thresholds=0.2,0.3", "--json")
        assert json.loads(out)["thresholds"] == [0.2, 0.3, 0.0]
        status, out, _ = await ask("budget")
        assert "thresholds  0.2,0.3,0" in out
        assert "no images under this budget yet" in out
        await ask("classify", str(cat))
        assert "observed    1 images" in (await ask("budget"))[1]

        status, out, _ = await ask("budget", "gmacs=0.03", "--mix")
        assert status == 0
        assert re.search(r"^mix         [0-9.]+ % of the requests by thresholds ", out, re.MULTILINE) is not None, out
        status, out, _ = await ask("budget", "gmacs=0.05", "--preview")
        assert status == 0
        assert "target      gmacs=0.05, hold cost" in out
        assert "estimated for the last" in out
        assert "at present  accuracy" in out
        assert "target      gmacs=0.03" in (await ask("budget"))[1], "nothing was applied"

        status, _, err = await ask("budget", "gmacs=0.000001")
        assert status == 1
        assert re.search(
            r"^Error: .* \(budget_infeasible\); feasible: cost 0.01 to 0.0[0-9]+ GMAC, accuracy 0.[0-9]+ to 0.[0-9]+$",
            err,
        )
        status, out, _ = await ask("budget")
        assert err.rpartition("feasible: ")[2] == out.rpartition("feasible    ")[2]

        await ask("budget", "thresholds=never,0.3")
        status, out, _ = await ask("budget")
        assert "target      thresholds=never,0.3," in out
        assert "thresholds  never,0.3,0" in out


def test_without_torch_and_onnx_the_command_still_explains_itself() -> None:
    """In a process of its own, where those cannot be imported."""
    script = (
        "import sys; sys.modules.update({'torch': None, 'onnx': None, 'onnxruntime': None});"
        "from server.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout


def test_a_package_that_cannot_be_imported_shows_and_says_what_to_install() -> None:
    app = build()
    add(app, EntryPoint("distil", "no_such_library.commands:register", "dvt.commands"))
    assert "distil" in CliRunner().invoke(app, ["--help"]).output
    with pytest.raises(click.ClickException, match=r"needs no_such_library: pip install 'dvt-serve\[export\]'"):
        CliRunner().invoke(app, ["distil", "anything", "--at", "all"], catch_exceptions=False)


def test_other_packages_bring_commands_by_entry_point() -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.callback()(lambda: None)
    add(app, EntryPoint("mine", "server.commands:register", "dvt.commands"))
    assert "classify" in CliRunner().invoke(app, ["--help"]).output


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk, behind its first."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def in_format(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


EXIF = b"II*\0\x08\0\0\0\x02\0" + b"\x0e\x01\x02\0\xff\xff\0\0\xff\0\0\0" + b"\x12\x01\x03\0\x01"
PHOTO = Image.linear_gradient("L").resize((24, 24))
NOISY = [
    with_chunk(in_format(PHOTO, "PNG"), b"eXIf", EXIF),  # a description beyond the file, an entry cut short
    with_chunk(in_format(PHOTO, "PNG"), b"acTL", bytes(8)),  # an animation of no frames
    in_format(PHOTO.convert("RGB"), "WEBP", exif=EXIF),
    in_format(PHOTO.convert("CMYK"), "JPEG", exif=b"Exif\0\0" + EXIF),
    in_format(PHOTO.convert("P"), "PNG", transparency=bytes(range(256))),
    in_format(PHOTO.convert("P"), "GIF", transparency=3),
    in_format(PHOTO, "BMP"),
]


def heard(file: bytes) -> list[str]:
    """What decoding a file tells the log and the standard error."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.DEBUG + 1)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hush()
            with contextlib.suppress(BadImage, ImageTooLarge, UnsupportedMediaType):
                images.decode(file, None, Preprocessing(8, (8, 8)), images.ImageLimits())
        return [*(record.getMessage() for record in records), *(str(warning.message) for warning in caught)]
    finally:
        logging.getLogger().removeHandler(handler)


@given(st.sampled_from(NOISY), st.lists(st.tuples(st.integers(0, 300), st.sampled_from(b"\0\x01\x7f\xff")), max_size=4))
def test_images_are_decoded_in_silence_however_odd_they_are(file: bytes, odd: list[tuple[int, int]]) -> None:
    spoilt = bytearray(file)
    for place, byte in odd:
        spoilt[place % len(spoilt)] = byte
    assert heard(bytes(spoilt)) == []


def test_without_that_they_would_not_be() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images.decode(NOISY[0], None, Preprocessing(8, (8, 8)), images.ImageLimits())
    assert caught


def test_batch_sizes_that_do_not_fit_the_model_stop_the_start_in_one_line(
    dvt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVT_MAX_BATCH_SIZES", "1,2")
    status, _, said = dvt("serve", "--dry-run")
    assert (status, said) == (2, "Error: bad setting DVT_MAX_BATCH_SIZES: 2 sizes, but the model has 3 stages\n")


@pytest.mark.parametrize("command", [["serve", "--dry-run"], ["serve", "--port", "0"]])
def test_what_is_wrong_with_a_bundle_at_the_warm_up_is_said_in_one_line(
    dvt: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def replaced(_: OnnxEngine) -> None:
        raise BundleError("stage2.onnx: was replaced while the server started; start it again")

    monkeypatch.setattr(OnnxEngine, "warm_up", replaced)
    monkeypatch.setattr(process, "hear_stop", lambda _: None)
    status, _, said = dvt(*command)
    assert (status, said) == (2, "Error: stage2.onnx: was replaced while the server started; start it again\n")


@pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU")
@pytest.mark.parametrize("command", [["serve", "--dry-run"], ["profile", str(EMBEDDED)]])
def test_an_engine_that_is_not_there_ends_a_command_in_one_line(dvt: Run, command: list[str]) -> None:
    status, _, said = dvt(*command, "--engine", "torch-cuda")
    assert status == (2 if command[0] == "serve" else 1)
    assert said == "Error: the engine torch-cuda needs an NVIDIA GPU, and none is here; ask for --engine onnx\n"
