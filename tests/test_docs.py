"""The documentation names every setting, metric, error code and command that there is."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from server import errors
from server.__main__ import build
from server.budget.controller import TARGETS
from server.commands import parse_target
from server.frontend.routes import parse_ask
from server.metrics import Metrics
from server.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def kinds(base: type[errors.ServeError] = errors.ServeError) -> Iterator[type[errors.ServeError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def families() -> list[str]:
    metrics = Metrics(model="m", version="v", release="r", stage_gmacs=(1.0, 2.0))
    samples = {"counter": "_total"}
    return [family.name + samples.get(family.type, "") for family in metrics.registry.collect()]


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    (row,) = re.findall(rf"^\| `{PREFIX}{name.upper()}` \| (.*?) \| (.*) \|$", (DOCS / "settings.md").read_text(), re.M)
    default, meaning = row
    assert meaning == Settings.model_fields[name].description
    value = Settings.model_fields[name].default
    if isinstance(value, int | float | str):
        assert default == f"`{value:g}`" if isinstance(value, float) else default == f"`{value}`"


def test_no_setting_is_documented_that_is_not_there() -> None:
    for name in re.findall(rf"`{PREFIX}([A-Z_]+)`", (DOCS / "settings.md").read_text() + (DOCS / "api.md").read_text()):
        assert name.lower() in Settings.model_fields or name in ("URL", "CONTROL_TOKEN"), name


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_every_error_is_documented_with_its_status(kind: type[errors.ServeError]) -> None:
    assert f"\n| {kind.status} | `{kind.code}` |" in (DOCS / "api.md").read_text()


@pytest.mark.parametrize("name", [name for name in families() if not name.startswith("process_")])
def test_every_metric_is_documented(name: str) -> None:
    assert f"`{name}`" in (DOCS / "api.md").read_text()


def test_no_metric_is_documented_that_is_not_there() -> None:
    assert set(re.findall(r"`(dvt_[a-z_]+)`", (DOCS / "api.md").read_text() + (DOCS / "fleet.md").read_text())) <= set(
        families()
    )


def test_every_query_parameter_is_described_on_the_page_and_in_the_document() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_ask(b"nothing=1", top_k=1, timeout_ms=1, max_timeout_ms=1, exits=3)
    known = set(re.findall("[a-z_]+", caught.value.detail.partition("there are")[2])) - {"and"}
    document = json.loads((DOCS / "openapi.json").read_text())["paths"]["/classify"]["post"]["parameters"]
    assert {parameter["name"] for parameter in document if parameter["in"] == "query"} == known
    (table,) = re.findall(r"^\| Query \| Meaning \|\n(.*?)\n\n", (DOCS / "api.md").read_text(), re.M | re.S)
    assert set(re.findall(r"^\| `(.*?)` ", table, re.M)) == known


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_described_and_the_command_line_takes_it(target: str) -> None:
    assert f'`{{"{target}": ' in (DOCS / "api.md").read_text()
    assert f'"{target}":' in (DOCS / "openapi.json").read_text()
    assert target in parse_target(f"{target}=0.5")


def test_the_picture_of_the_rooms_is_their_order() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:rooms"]["layers"].split("\n")
    (picture,) = re.findall(r"^```\n(.*?)^```", (DOCS / "architecture.md").read_text(), re.M | re.S)
    drawn = [re.split(r" {3,}", line)[0] for line in picture.splitlines()]
    assert [line.split() for line in drawn] == [re.findall("[a-z_]+", layer) for layer in layers if layer]


def test_every_file_that_the_architecture_names_exists() -> None:
    text = (DOCS / "architecture.md").read_text()
    table = text.partition("## Where do I change")[2]
    named = re.findall(r"`([\w./]+\.(?:py|md|json|toml|txt)|\.importlinter)`", table)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).is_file(), name
    for rooms in re.findall(r"^\d\. \*\*.*?\*\* \((.*?)\)", text, re.M):  # `frontend/edge`, `routes`: one room
        room, *modules = re.findall("[a-z_]+", rooms)
        assert (ROOT / "server" / room).is_dir(), room
        for module in modules:
            assert (ROOT / "server" / room / f"{module}.py").is_file(), f"{room}/{module}"


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text() for page in (*DOCS.glob("*.md"), *ROOT.glob("README.md")))
    for command in get_command(build()).commands:  # type: ignore[attr-defined]
        assert f"dvt {command}" in text, command
