"""Settings come from the environment, are frozen, and a bad one stops the start by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings, SettingsError, read_settings, usable_cores


def test_the_environment_sets_what_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVT_PORT", "9000")
    monkeypatch.setenv("DVT_HOST", "0.0.0.0")
    settings = read_settings({"host": "127.0.0.1"})
    assert (settings.host, settings.port) == ("127.0.0.1", 9000)


def test_nothing_changes_after_the_start() -> None:
    with pytest.raises(ValidationError):
        read_settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DVT_PORT", "x"),
        ("DVT_PORT", "70000"),
        ("DVT_MAX_IMAGES", "0"),
        ("DVT_TIMEOUT_MS", "-1"),
        ("DVT_MAX_BATCH_SIZES", "8,x"),
        ("DVT_MAX_BATCH_SIZES", "8,0,4"),
        ("DVT_LOG_LEVEL", "loud"),
        ("DVT_HOST", ""),
    ],
)
def test_a_bad_value_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert f"{name}=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVT_PORT", "x")
    monkeypatch.setenv("DVT_TOP_K", "0")
    with pytest.raises(SettingsError, match=r"DVT_PORT=.*DVT_TOP_K="):
        read_settings()


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("DVT_TIMEOUT_MS", "50000", "DVT_MAX_TIMEOUT_MS"),
        ("DVT_MAX_IMAGES", "1000", "DVT_MAX_QUEUED_IMAGES"),
        ("DVT_MAX_BODY_BYTES", "1000000000", "DVT_MAX_HELD_BYTES"),
    ],
)
def test_two_that_do_not_fit_together_are_both_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, other: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}.*{other}"):
        read_settings()


def test_batch_sizes_are_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVT_MAX_BATCH_SIZES", "16, 8,4")
    assert read_settings().max_batch_sizes == (16, 8, 4)
    monkeypatch.setenv("DVT_MAX_BATCH_SIZES", "")
    assert read_settings().max_batch_sizes is None


def test_state_goes_where_the_user_keeps_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert read_settings().state_dir == tmp_path / "dvt-serve"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert read_settings().state_dir == Path.home() / ".local" / "state" / "dvt-serve"
    monkeypatch.setenv("DVT_STATE_DIR", "")
    assert read_settings().state_dir is None


def test_cores_are_those_that_may_be_used(tmp_path: Path) -> None:
    free = usable_cores(tmp_path)  # no quota there
    assert free >= 1
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == free
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cores(tmp_path) == 1


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6, 7})


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("above", ["", "system.slice"])
@pytest.mark.parametrize(
    ("file", "quota", "line"),
    [
        ("cpu.max", "200000 100000", "0::/system.slice/dvt.service"),
        ("cpu/cpu.cfs_quota_us", "200000", "4:cpu,cpuacct:/system.slice/dvt.service"),
    ],
)
def test_a_quota_counts_wherever_it_stands_above_the_process(
    tmp_path: Path, file: str, quota: str, line: str, above: str
) -> None:
    groups, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text(f"5:memory:/elsewhere\n{line}\nbroken\n")
    name = Path(file)
    own, one_above = (groups / name.parent / folder for folder in ("system.slice/dvt.service", above))
    own.mkdir(parents=True)
    for folder, value in ((own, "600000 100000" if name.name == "cpu.max" else "600000"), (one_above, quota)):
        (folder / name.name).write_text(value)
        (folder / "cpu.cfs_period_us").write_text("100000")
    assert usable_cores(groups, membership) == 2
    membership.write_text("0::/../../another\n4:cpu:/../../another\n")  # as a namespace shows what lies outside of it
    assert usable_cores(groups, membership) == (8 if above else 2)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("150000", 1), ("250000", 2), ("9900000", 8), ("max", 8)])
def test_a_part_of_a_core_is_no_core(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    assert usable_cores(tmp_path, tmp_path / "none") == cores


def test_every_name_with_a_unit_says_it() -> None:
    units = {"_s", "_ms", "_bytes"}
    for name in Settings.model_fields:
        if "timeout" in name or "delay" in name or "body" in name or "header" in name:
            assert any(name.endswith(unit) for unit in units), name


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.4.5", "::1", "[::1]", "localhost", "LOCALHOST.", "a.localhost"])
def test_a_server_for_this_machine_alone_asks_for_no_token(host: str) -> None:
    assert read_settings({"host": host}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example.org"])
def test_one_that_others_reach_wants_a_token_or_to_be_told(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"\A[^\n]*DVT_HOST={re.escape(host)}[^\n]*DVT_OPEN_CONTROL=true[^\n]*\Z"):
        read_settings({"host": host})
    assert read_settings({"host": host, "control_token_file": tmp_path / "token"}).control_token_file
    assert read_settings({"host": host, "open_control": "true"}).open_control
