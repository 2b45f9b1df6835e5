"""Nothing is loaded but what we wrote ourselves, whole, for exactly this; why not is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.tensorrt.plans import Choices, Origin, PlanFolder, Record, Records, Unfit, folder_name, key_of
from server.errors import BundleError

ORIGIN = Origin(
    stage=1,
    graph="a" * 64,
    precision="fp16",
    outputs=("confidence", "probabilities"),
    runtime="tensorrt",
    version="11.4.0.106",
    platform="linux-x86_64",
    gpu="NVIDIA H100 80GB HBM3",
    capability="9.0",
)
CHOICES = Choices(batch_sizes=(1, 8), optimization_level=3, workspace_bytes=None, flags=("strongly_typed",))
PLAN = bytes(range(256)) * 8


def alone() -> None:
    raise AssertionError("nobody else builds here")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "nvidia-h100-11.4.0.106"


@pytest.fixture
def folder(path: Path) -> Iterator[PlanFolder]:
    with PlanFolder(path, create=True) as folder:
        with folder.locked(alone):
            folder.publish(ORIGIN, CHOICES, PLAN, seconds=1.5)
        yield folder


def refusal(folder: PlanFolder, origin: Origin = ORIGIN, choices: Choices | None = None) -> str:
    with pytest.raises(Unfit) as caught:
        folder.read(origin, choices)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder.path))
    return message


def test_what_was_published_is_read_as_it_was(folder: PlanFolder) -> None:
    record, plan = folder.read(ORIGIN, CHOICES)
    assert plan == PLAN
    assert (record.origin, record.choices, record.size, record.seconds) == (ORIGIN, CHOICES, len(PLAN), 1.5)
    assert folder.read(ORIGIN) == (record, plan)


def test_others_may_read_and_nobody_else_may_write(folder: PlanFolder) -> None:
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (folder.path, *folder.path.iterdir())}
    assert modes["stage1.plan"] == modes["stage1.json"] == 0o644
    assert not any(mode & 0o022 for mode in modes.values())
    assert modes["lock"] == 0o600  # who could open it could hold it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("graph", "b" * 64),
        ("precision", "bf16"),
        ("outputs", ("confidence",)),
        ("runtime", "tensorrt_rtx"),
        ("version", "10.16.1.11"),
        ("platform", "linux-aarch64"),
        ("gpu", "NVIDIA H200"),
        ("capability", "8.9"),
    ],
)
def test_a_plan_of_something_else_is_refused_with_what_differs(folder: PlanFolder, field: str, value: Any) -> None:
    wanted = ORIGIN.model_copy(update={field: value})
    assert f"was built for {field} {getattr(ORIGIN, field)!r}"[:60] in refusal(folder, wanted)
    assert key_of(wanted, CHOICES) != key_of(ORIGIN, CHOICES)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_sizes", (1, 16)), ("optimization_level", 5), ("workspace_bytes", 2**20), ("flags", ())],
)
def test_what_it_was_built_with_counts_only_where_that_is_asked(folder: PlanFolder, field: str, value: Any) -> None:
    other = CHOICES.model_copy(update={field: value})
    assert f"was built for {field.replace('_', ' ')}" in refusal(folder, choices=other)
    assert folder.read(ORIGIN)[1] == PLAN
    assert key_of(ORIGIN, other) != key_of(ORIGIN, CHOICES)


def test_a_stage_that_was_never_built_is_missing(folder: PlanFolder) -> None:
    assert "stage2.json: is missing" in refusal(folder, ORIGIN.model_copy(update={"stage": 2}))


def test_plans_that_were_swapped_between_stages_are_refused(folder: PlanFolder) -> None:
    second = ORIGIN.model_copy(update={"stage": 2, "graph": "b" * 64})
    folder.publish(second, CHOICES, PLAN[::-1], seconds=1)
    one, two = folder.path / "stage1.plan", folder.path / "stage2.plan"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert "stage1.plan: sha256 is" in refusal(folder)
    assert "stage2.plan: sha256 is" in refusal(folder, second)


def test_swapped_together_with_their_records_they_are_refused_too(folder: PlanFolder) -> None:
    second = ORIGIN.model_copy(update={"stage": 2})
    for kind in ("plan", "json"):
        shutil.copy(folder.path / f"stage1.{kind}", folder.path / f"stage2.{kind}")
    assert "was built for stage 1, and 2 is wanted" in refusal(folder, second)


@pytest.mark.parametrize("size", [0, 1, len(PLAN) - 1])
def test_a_plan_that_was_cut_is_refused(folder: PlanFolder, size: int) -> None:
    os.truncate(folder.path / "stage1.plan", size)
    assert f"has {size} bytes, its record says {len(PLAN)}" in refusal(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PlanFolder, Record]]:
    """For many examples: publishing waits for the disk."""
    with PlanFolder(tmp_path_factory.mktemp("published") / "plans", create=True) as folder:
        yield folder, folder.publish(ORIGIN, CHOICES, PLAN, seconds=1)


def records(*plans: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": 1, "plans": plans}


@settings(max_examples=50)
@given(at=st.integers(0, len(PLAN) - 1), by=st.integers(1, 255))
def test_a_plan_with_any_byte_changed_is_refused(published: tuple[PlanFolder, Record], at: int, by: int) -> None:
    folder, record = published
    damaged = bytearray(PLAN)
    damaged[at] ^= by
    (folder.path / "stage1.json").write_text(json.dumps(records(record.model_dump())))
    (folder.path / "stage1.plan").write_bytes(damaged)
    assert "sha256 is" in refusal(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=50)
@given(content=st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_record_of_nonsense_is_refused(published: tuple[PlanFolder, Record], content: bytes) -> None:
    folder, _ = published
    (folder.path / "stage1.json").write_bytes(content)
    refusal(folder)


@settings(max_examples=50)
@given(field=st.sampled_from([*Record.model_fields, "more"]), value=JSON)
def test_a_record_with_any_field_changed_is_refused(
    published: tuple[PlanFolder, Record], field: str, value: Any
) -> None:
    folder, record = published
    (folder.path / "stage1.plan").write_bytes(PLAN)
    changed = {**record.model_dump(), field: value}
    (folder.path / "stage1.json").write_text(json.dumps(records(changed)))
    if field == "seconds":  # says nothing of the plan: any number will do
        with suppress(Unfit):
            folder.read(ORIGIN)
    elif changed != record.model_dump():
        refusal(folder)


def test_a_record_that_is_not_what_its_key_says_is_refused(folder: PlanFolder) -> None:
    file = folder.path / "stage1.json"
    document = json.loads(file.read_text())
    document["plans"][0]["choices"]["batch_sizes"] = [1, 64]
    file.write_text(json.dumps(document))
    assert "its key does not follow" in refusal(folder)


def test_the_records_of_another_release_are_refused_by_their_format(folder: PlanFolder) -> None:
    (folder.path / "stage1.json").write_text('{"format_version": 2, "plan": "of another kind"}')
    assert "format version 2, this release reads 1" in refusal(folder)


def linked(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def huge(file: Path) -> None:
    os.truncate(file, 2**40)


@pytest.mark.parametrize("name", ["stage1.plan", "stage1.json"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (linked, "is a symbolic link"),
        (fifo, "is not a regular file"),
        (directory, "is not a regular file"),
        (huge, "is larger than"),
        (Path.unlink, "is missing"),
        (lambda file: file.chmod(0o664), r"can be written to by others (mode 0664)"),
        (lambda file: file.chmod(0o646), r"can be written to by others (mode 0646)"),
    ],
    ids=["link", "fifo", "directory", "huge", "missing", "group", "world"],
)
def test_a_file_that_is_not_plainly_ours_is_refused(
    folder: PlanFolder, spoil: Callable[[Path], Any], says: str, name: str
) -> None:
    spoil(folder.path / name)
    message = refusal(folder)
    assert f"{name}: {says}" in message


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o2775])
def test_a_folder_that_others_can_write_to_is_refused(path: Path, mode: int) -> None:
    path.mkdir(parents=True)
    path.chmod(mode)
    for create in (True, False):
        with pytest.raises(BundleError, match=rf"can be written to by others \(mode {mode:04o}\); plans are code"):
            PlanFolder(path, create=create)


def test_a_folder_that_is_a_link_or_none_is_refused(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to(tmp_path)
    with pytest.raises(BundleError, match="is a symbolic link"):
        PlanFolder(path, create=True)
    path.unlink()
    path.write_text("")
    with pytest.raises(BundleError, match="file exists"):
        PlanFolder(path, create=True)
    with pytest.raises(BundleError, match="not a directory"):
        PlanFolder(path)


root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@root
@pytest.mark.parametrize("name", ["stage1.plan", "stage1.json", "."])
def test_what_belongs_to_somebody_else_is_refused(folder: PlanFolder, name: str) -> None:
    os.chown(folder.path / name, 12345, -1)
    if name == ".":
        with pytest.raises(BundleError, match="belongs to user 12345, neither to this one"):
            PlanFolder(folder.path)
    else:
        assert f"{name}: belongs to user 12345, neither to this one (0) nor to root" in refusal(folder)


@root
def test_what_root_built_another_user_may_load_and_not_change() -> None:
    with tempfile.TemporaryDirectory() as open_to_all:  # tmp_path is not
        os.chmod(open_to_all, 0o755)
        path = Path(open_to_all) / "plans"
        with PlanFolder(path, create=True) as folder, folder.locked(alone):
            folder.publish(ORIGIN, CHOICES, PLAN, seconds=1)
        os.seteuid(12345)
        try:
            with PlanFolder(path) as theirs:
                assert theirs.read(ORIGIN)[1] == PLAN
                with pytest.raises(BundleError, match="permission denied"), theirs.locked(alone):
                    pass
                with pytest.raises(BundleError, match="permission denied"):
                    theirs.publish(ORIGIN, CHOICES, PLAN, seconds=1)
        finally:
            os.seteuid(0)


def test_a_link_is_never_written_through(folder: PlanFolder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    for name in ("stage1.plan", "stage1.json"):
        (folder.path / name).unlink()
        (folder.path / name).symlink_to(victim)
    (folder.path / "lock").unlink()
    (folder.path / "lock").symlink_to(victim)
    with pytest.raises(BundleError, match="lock: is a symbolic link"), folder.locked(alone):
        pass
    folder.publish(ORIGIN, CHOICES, PLAN, seconds=1)
    assert victim.read_text() == "untouched"
    assert folder.read(ORIGIN)[1] == PLAN


def test_what_was_left_half_written_goes_at_the_next_build(folder: PlanFolder) -> None:
    left = folder.path / ".stage1.plan.0123456789abcdef.new"
    left.write_bytes(PLAN[:100])
    with folder.locked(alone):
        pass
    assert sorted(p.name for p in folder.path.iterdir()) == ["lock", "stage1.json", "stage1.plan"]


def test_whichever_plan_lies_there_its_record_lies_beside_it(folder: PlanFolder) -> None:
    """After a crash between the two renames the old plan is used, and a new one can be published."""
    file = folder.path / "stage1.plan"
    old = folder.read(ORIGIN)
    newer = CHOICES.model_copy(update={"optimization_level": 5})
    folder.publish(ORIGIN, newer, PLAN[::-1], seconds=2)
    file.write_bytes(PLAN)
    assert folder.read(ORIGIN) == old
    assert "was built for optimization level 3, and 5 is wanted" in refusal(folder, choices=newer)
    folder.publish(ORIGIN, newer, PLAN * 2, seconds=3)
    file.write_bytes(PLAN)
    assert folder.read(ORIGIN) == old
    file.write_bytes(PLAN[::-1])
    assert "sha256" in refusal(folder) or "bytes" in refusal(folder)


def test_only_the_plan_before_is_remembered(folder: PlanFolder) -> None:
    for number in range(5):
        folder.publish(ORIGIN, CHOICES, bytes([number]) * 100, seconds=number)
    kept = Records.model_validate_json((folder.path / "stage1.json").read_bytes())
    assert [record.seconds for record in kept.plans] == [4, 3]


def test_who_reads_while_plans_are_replaced_finds_one_of_them_whole(folder: PlanFolder) -> None:
    """Another process publishes as fast as it can."""
    publisher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PUBLISHER), str(folder.path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
    )
    try:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == b"publishing\n"
        seen = set()
        while len(seen) < 20:
            assert publisher.poll() is None
            record, plan = folder.read(ORIGIN)
            assert len(plan) == record.size
            seen.add(record.sha256)
    finally:
        publisher.kill()
        publisher.communicate()


PUBLISHER = """
    import os, sys
    from pathlib import Path
    from server.engines.tensorrt.plans import PlanFolder
    from tests.server.engines.tensorrt.test_plans import CHOICES, ORIGIN

    with PlanFolder(Path(sys.argv[1])) as folder:
        print("publishing", flush=True)
        while True:
            folder.publish(ORIGIN, CHOICES, os.urandom(1000), seconds=1)
"""


def test_the_timing_cache_is_used_only_whole(folder: PlanFolder) -> None:
    assert folder.timings() == b""
    folder.publish_timings(b"timings\nof kernels")
    assert folder.timings() == b"timings\nof kernels"
    file = folder.path / "timing.cache"
    file.write_bytes(file.read_bytes()[:-1])
    assert folder.timings() == b""
    file.write_bytes(b"\xff\xfe")
    assert folder.timings() == b""
    folder.publish_timings(b"")
    file.chmod(0o666)
    assert folder.timings() == b""


@pytest.mark.parametrize(
    ("gpu", "runtime", "version", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "tensorrt", "11.4.0.106", "nvidia-h100-80gb-hbm3-11.4.0.106"),
        ("sm89", "tensorrt_rtx", "1.7.1.116", "sm89-rtx-1.7.1.116"),
        ("../../etc", "tensorrt", "1", "etc-1"),
        ("", "tensorrt", "1", "gpu-1"),
    ],
)
def test_the_folder_is_called_by_gpu_and_version(gpu: str, runtime: str, version: str, name: str) -> None:
    assert folder_name(gpu, runtime, version) == name
