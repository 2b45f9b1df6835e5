"""Where a budget is kept: disks that are full, slow, damaged or shared."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from server.budget.store import FileStore, Held, MemoryStore, Policy, StateInUse, StoreMoved
from server.errors import StoreUnavailable


def again(store: FileStore) -> FileStore:
    """As the next process finds it."""
    store.close()
    return FileStore(store.path)


@pytest.mark.parametrize("text", ["", '{"version": 9', "{}"])
def test_after_a_power_failure_the_last_policy_that_was_synced_counts(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path / "budget.json")
    store.save(Policy(3, {"gmacs": 1.0}, "cost"))
    store.sync(Policy(3, {"gmacs": 1.0}, "cost"))
    (tmp_path / "budget.json.new").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert again(store).recall() == Policy(3, {"gmacs": 1.0}, "cost")
    assert "budget.json.new" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_a_store_that_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    store = FileStore(tmp_path / "file" / "budget.json")
    with pytest.raises(StoreUnavailable, match="could not be stored"):
        store.save(Policy(1, {"gmacs": 1.0}, "cost"))


def test_a_policy_is_whole_also_after_a_longer_one(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "budget.json")
    longer, shorter = Policy(9, {"thresholds": [0.123456789] * 5}, "quality"), Policy(10, {"gmacs": 1.0}, "cost")
    for policy in (longer, shorter, longer):
        store.save(policy)
        assert store.recall() == policy  # nothing was synced
    store.sync(longer)
    store.save(shorter)
    assert again(store).recall() == shorter


def test_a_write_of_which_only_a_part_arrives_is_a_save_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "budget.json")
    store.save(Policy(1, {"gmacs": 1.0}, "cost"))
    store.sync(Policy(1, {"gmacs": 1.0}, "cost"))
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    with pytest.raises(StoreUnavailable, match="only a part"):
        store.save(Policy(2, {"gmacs": 2.0}, "cost"))
    assert again(store).recall() == Policy(1, {"gmacs": 1.0}, "cost")
    assert (tmp_path / "budget.json.new").read_bytes() == b""


def test_a_save_that_fails_leaves_the_policy_before_it_and_no_litter(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "budget.json")
    store.save(Policy(1, {"gmacs": 1.0}, "cost"))
    with pytest.raises(ValueError, match="JSON"):
        store.save(Policy(2, {"gmacs": float("nan")}, "cost"))
    assert store.recall() == Policy(1, {"gmacs": 1.0}, "cost")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["budget.json.lock", "budget.json.new"]
    store.sync(Policy(1, {"gmacs": 1.0}, "cost"))
    assert json.loads((tmp_path / "budget.json").read_text()) == {
        "version": 1,
        "target": {"gmacs": 1.0},
        "hold": "cost",
        "mix": False,
        "by": "",
        "at": "",
    }


def test_a_disk_that_is_full_leaves_the_policy_before(tmp_path: Path) -> None:
    """A real short write: the kernel takes as many bytes as a file may have here."""
    code = """
        import resource, signal, sys
        from server.budget.store import FileStore, Policy
        from server.errors import StoreUnavailable
        store = FileStore(sys.argv[1])
        store.save(Policy(1, {"gmacs": 1.0}, "cost"))
        store.sync(Policy(1, {"gmacs": 1.0}, "cost"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            store.save(Policy(2, {"thresholds": [0.123456789] * 20}, "quality"))
        except StoreUnavailable as error:
            print(error.detail)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "budget.json")], capture_output=True, text=True
    )
    assert run.stdout == "the budget could not be stored: only a part of it was written\n", run.stderr
    assert FileStore(tmp_path / "budget.json").recall() == Policy(1, {"gmacs": 1.0}, "cost")


def test_a_state_has_one_owner_until_it_stops_or_dies(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    first = FileStore(path)
    with pytest.raises(StateInUse, match="belongs to another server"):
        FileStore(path)
    first.close()
    first.close()
    code = "import sys; from server.budget.store import FileStore; s = FileStore(sys.argv[1]); print(1); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StateInUse):
            FileStore(path)
        other.kill()
    FileStore(path).close()


@pytest.mark.parametrize("in_the_way", ["fifo", "folder", "loop", "dangling"])
def test_what_is_no_file_is_not_read_and_nobody_waits_for_it(tmp_path: Path, in_the_way: str) -> None:
    path = tmp_path / "budget.json"
    if in_the_way == "fifo":
        os.mkfifo(path)
    elif in_the_way == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if in_the_way == "loop" else tmp_path / "nowhere")
    store = FileStore(path)
    if in_the_way == "dangling":
        assert store.recall() is None
    else:
        with pytest.raises(StoreUnavailable):
            store.recall()


def test_the_next_server_waits_for_one_that_stops(tmp_path: Path) -> None:
    first = FileStore(tmp_path / "budget.json")
    first.save(Policy(7, {"gmacs": 1.0}, "cost"))
    threading.Timer(0.1, first.close).start()
    assert FileStore(tmp_path / "budget.json", wait_s=60).recall() == Policy(7, {"gmacs": 1.0}, "cost")


@pytest.mark.parametrize(("text", "version"), [('{"version": 41, "target"', 41), ('{"version": 1e9', 0), ("", 0)])
def test_the_number_of_a_damaged_policy_is_not_given_to_another(tmp_path: Path, text: str, version: int) -> None:
    (tmp_path / "budget.json").write_text(text)
    with pytest.raises(StoreUnavailable) as refused:
        FileStore(tmp_path / "budget.json").recall()
    assert refused.value.extra == {"version": version}


def test_a_folder_that_is_read_only_is_no_reason_not_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    with caplog.at_level(logging.WARNING):
        store = FileStore(tmp_path / "file" / "state" / "budget.json")
    assert "budgets cannot be stored" in caplog.text
    with pytest.raises(StoreUnavailable):
        store.save(Policy(1, {"gmacs": 1.0}, "cost"))


@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_what_is_no_longer_there_is_not_replaced(tmp_path: Path, kind: str) -> None:
    store = FileStore(tmp_path / "budget.json") if kind == "file" else MemoryStore()
    nothing = await store.load()
    assert nothing == Held(mark=0)
    first = await store.compare_and_set(Policy(2, {"gmacs": 1.0}, "cost"), nothing)
    with pytest.raises(StoreMoved):
        await store.compare_and_set(Policy(2, {"gmacs": 2.0}, "cost"), nothing)
    assert (await store.load()) == first
    assert (await store.compare_and_set(Policy(3, {"gmacs": 2.0}, "cost"), first)).version == 3
    assert [held async for held in store.watch()] == [], "nobody else writes"


def test_who_and_when_outlive_the_process_and_make_no_other_policy(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "budget.json")
    store.save(Policy(2, {"gmacs": 1.0}, "cost", by="10.0.0.1", at="2026-01-01T00:00:00+00:00"))
    found = again(store).recall()
    assert found == Policy(2, {"gmacs": 1.0}, "cost")
    assert (found.by, found.at) == ("10.0.0.1", "2026-01-01T00:00:00+00:00")
