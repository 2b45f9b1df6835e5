"""Volumes as a kubelet mounts them, and what the pods' user, 65532, finds there."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from server.budget.store import FileStore, Policy
from server.engines.tensorrt.plans import PlanFolder
from server.errors import BundleError, StoreUnavailable
from server.frontend.control_token import ControlToken
from tests.deploy.rendered import KUBERNETES, pods, render
from tests.server.engines.tensorrt.test_plans import CHOICES, ORIGIN, PLAN

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

OTHER = 12345


@contextmanager
def as_the_pod() -> Iterator[None]:
    """User, group and supplementary group (fsGroup) as the manifests say."""
    ((_, pod),) = pods(render(KUBERNETES / "overlays" / "nvidia-gpu"))
    context = pod["securityContext"]
    groups, umask = os.getgroups(), os.umask(0o022)
    os.setgroups([context["fsGroup"]])
    os.setegid(context["runAsGroup"])
    os.seteuid(context["runAsUser"])
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        os.umask(umask)


@pytest.fixture
def volume() -> Iterator[Path]:
    """The root of a volume, as it comes: root's, and for nobody else to write to."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to others
        os.chmod(folder, 0o755)
        yield Path(folder)


def given_to_the_group(volume: Path) -> None:
    """What fsGroup does to the root of a volume: to that alone with OnRootMismatch, and to that of an emptyDir."""
    os.chown(volume, 0, 65532)
    os.chmod(volume, 0o2775)


def plans_in(volume: Path) -> Path:
    """As `dvt build` names it."""
    return volume / "0123456789ab" / "nvidia-l4-11.4.0.106"


def build(volume: Path) -> None:
    with PlanFolder(plans_in(volume), create=True) as folder, folder.locked(lambda: None):
        folder.publish(ORIGIN, CHOICES, PLAN, seconds=1)


def test_plans_of_a_pod_are_used_by_the_next_one(volume: Path) -> None:
    given_to_the_group(volume)
    with as_the_pod():
        build(volume)
    given_to_the_group(volume)  # mounted again
    with as_the_pod(), PlanFolder(plans_in(volume)) as folder:
        assert folder.read(ORIGIN)[1] == PLAN


def test_a_mount_that_opens_all_files_to_the_group_is_why_it_is_on_root_mismatch(volume: Path) -> None:
    given_to_the_group(volume)
    with as_the_pod():
        build(volume)
    for path in volume.rglob("*"):  # fsGroupChangePolicy: Always
        path.chmod(path.stat().st_mode | 0o060)
    with as_the_pod(), pytest.raises(BundleError, match="can be written to by others"):
        PlanFolder(plans_in(volume))


def test_a_volume_that_is_not_given_to_the_group_is_said_by_name(volume: Path) -> None:
    with as_the_pod(), pytest.raises(BundleError, match=rf"{volume}.*: permission denied"):
        build(volume)


def test_plans_of_somebody_else_are_refused_and_left_as_they_are(volume: Path) -> None:
    given_to_the_group(volume)
    with as_the_pod():
        build(volume)
    os.chown(plans_in(volume), OTHER, OTHER)
    with as_the_pod(), pytest.raises(BundleError, match="belongs to user 12345"):
        build(volume)
    os.chown(plans_in(volume), 65532, 65532)
    with as_the_pod(), PlanFolder(plans_in(volume)) as folder:
        assert folder.read(ORIGIN)[1] == PLAN


@pytest.fixture
def full(volume: Path) -> Iterator[Path]:
    """A file system with room for one plan and next to nothing more."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", volume], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    given_to_the_group(volume)
    yield volume
    subprocess.run(["umount", "--lazy", volume], check=True)


def test_on_a_full_volume_the_plans_that_were_there_are_kept(full: Path) -> None:
    with as_the_pod():
        build(full)
        with PlanFolder(plans_in(full)) as folder, folder.locked(lambda: None):
            with pytest.raises(BundleError, match=r"it has 200000 bytes: no space left on device"):
                folder.publish(ORIGIN, CHOICES, bytes(200_000), seconds=1)
            assert folder.read(ORIGIN)[1] == PLAN


def test_on_a_full_volume_the_budget_that_was_there_is_kept(full: Path) -> None:
    with as_the_pod():
        store = FileStore(full / "policy.json")
        store.save(Policy(1, {"gmacs": 0.05}, "cost"))
        store.sync(Policy(1, {"gmacs": 0.05}, "cost"))
        fill(full)
        with pytest.raises(StoreUnavailable):
            store.save(Policy(2, {"thresholds": [0.5] * 2000}, "cost"))
        store.close()
        after = FileStore(full / "policy.json")
        assert after.recall() == Policy(1, {"gmacs": 0.05}, "cost")
        after.close()


def fill(volume: Path) -> None:
    descriptor = os.open(volume / "junk", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while os.write(descriptor, bytes(4096)):
            pass
    os.close(descriptor)


def test_the_token_is_read_by_the_pods_group_and_by_nobody_else(volume: Path) -> None:
    ((_, pod),) = pods(render(KUBERNETES / "overlays" / "cpu"))
    (secret,) = (each["secret"] for each in pod["volumes"] if "secret" in each)
    token = volume / "token"
    token.write_text("first")
    os.chown(token, 0, 65532)
    token.chmod(secret["defaultMode"])
    with as_the_pod():
        ControlToken(token)
    os.seteuid(OTHER)
    try:
        with pytest.raises(ValueError, match="permission denied"):
            ControlToken(token)
    finally:
        os.seteuid(0)
