"""The documentation names every setting, metric, error code and command that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from server import errors
from server.__main__ import build
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
    assert set(re.findall(r"`(dvt_[a-z_]+)`", (DOCS / "api.md").read_text())) <= set(families())


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text() for page in (*DOCS.glob("*.md"), *ROOT.glob("README.md")))
    for command in get_command(build()).commands:  # type: ignore[attr-defined]
        assert f"dvt {command}" in text, command
