"""Measuring runs real batches of survivors, as many at once as the server will, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from typer.testing import CliRunner

from server.__main__ import build
from server.app import create_app
from server.bundle.manifest import Bundle
from server.bundle.profile import LatencyProfile, StageCost
from server.calibration.profiling import as_table, identify, measure, profile_at_start
from server.core import Engine, StageBatch, StageOutput
from server.engines import load_engine
from server.engines.fake import FakeEngine
from server.errors import BundleError
from server.settings import Settings

FIXED = (0.004, 0.002, 0.0)
PER_IMAGE = (0.001, 0.003, 0.006)


class Timed(FakeEngine):
    """A batch moves the clock by a_i + b_i*n; every seventh takes twice as long."""

    def __init__(self, max_batch_sizes: Sequence[int] = (8, 4, 4), *, slower: float = 1.0) -> None:
        super().__init__(max_batch_sizes=max_batch_sizes)
        self.now = 1000.0
        self._slower = slower

    def clock(self) -> float:
        return self.now

    def run(self, batch: StageBatch) -> StageOutput:
        output = super().run(batch)
        seconds = FIXED[batch.stage - 1] + PER_IMAGE[batch.stage - 1] * len(batch.pixels)
        self.now += self._slower * seconds * (2 if len(self.batches) % 7 == 0 else 1)
        return output

    def sizes(self, stage: int) -> list[int]:
        return [len(batch.pixels) for batch in self.batches if batch.stage == stage]


def test_ctrl_c_ends_it_without_the_rest_of_the_time() -> None:
    class Interrupted(Timed):
        def run(self, batch: StageBatch) -> StageOutput:
            if threading.current_thread() is not threading.main_thread() and not self.closed:
                self.closed = True
                signal.raise_signal(signal.SIGINT)  # Python gives it to the main thread
            return super().run(batch)

    engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        measure(engine, seconds=1e5, concurrency=2, clock=engine.clock)
    assert engine.now < 1e5


def test_the_line_that_the_engine_follows_is_found_whatever_stalls() -> None:
    engine = Timed()
    stages = measure(engine, seconds=20, clock=engine.clock)
    for stage, fixed, per_image in zip(stages, FIXED, PER_IMAGE, strict=True):
        assert stage.linear
        assert (stage.fixed, stage.per_image) == (pytest.approx(fixed, abs=1e-6), pytest.approx(per_image, abs=1e-6))
        assert all(p99 == pytest.approx(2 * p50) for p50, p99 in zip(stage.p50, stage.p99, strict=True))


def test_a_stage_is_measured_up_to_what_pays_or_twice_of_it_and_with_no_more_than_the_stage_before() -> None:
    engine = Timed((8, 4, 16))
    stages = measure(engine, seconds=20, clock=engine.clock)
    assert [stage.batches for stage in stages] == [(1, 2, 4, 8), (1, 2, 4), (1, 2, 4)]
    stages = measure(engine, seconds=20, beyond=2, clock=engine.clock)
    assert [stage.batches for stage in stages] == [(1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)]


def test_sizes_take_turns_so_that_a_noisy_second_hits_all_of_them() -> None:
    engine = Timed()
    measure(engine, seconds=20, clock=engine.clock)
    sizes = engine.sizes(1)
    assert sizes == [1, 2, 4, 8] * (len(sizes) // 4) + [1, 2, 4, 8][: len(sizes) % 4]
    assert len(sizes) > 4 * 5


def test_it_takes_the_time_it_was_given_and_leaves_out_what_would_need_more() -> None:
    for seconds in (2.0, 20.0):
        engine = Timed((256, 256, 256))
        began = engine.now
        stages = measure(engine, seconds=seconds, clock=engine.clock)
        assert seconds <= engine.now - began <= 1.3 * seconds
        assert stages[0].batches[-1] == {2.0: 16, 20.0: 96}[seconds]
        assert min(Counter(engine.sizes(1)).values()) >= 3


def test_a_few_rounds_are_enough_at_a_start() -> None:
    engine = Timed()
    stages = measure(engine, seconds=20, sizes=(1, 4, 8, 16), rounds=5, clock=engine.clock)
    assert stages[0].batches == (1, 4, 8)
    assert Counter(engine.sizes(1)) == {1: 5, 4: 5, 8: 5}


def test_of_two_runs_the_one_that_did_not_stall_counts() -> None:
    engine = Timed((8, 8, 8))  # the second round is the seventh to the twelfth batch: each size stalls at most once
    for stage, fixed, per_image in zip(
        measure(engine, seconds=20, sizes=(1, 8), rounds=2, clock=engine.clock), FIXED, PER_IMAGE, strict=True
    ):
        assert (stage.fixed, stage.per_image) == (pytest.approx(fixed, abs=1e-6), pytest.approx(per_image, abs=1e-6))


def test_an_engine_that_is_too_slow_for_it_is_still_measured() -> None:
    engine = Timed(slower=1000)
    stages = measure(engine, seconds=1, clock=engine.clock)
    assert [stage.batches for stage in stages] == [(1,)] * 3
    assert [stage.p50[0] for stage in stages] == pytest.approx([5, 5, 6])


def test_as_many_batches_run_at_once_as_executors_will_and_states_are_theirs() -> None:
    class Together(FakeEngine):
        def __init__(self) -> None:
            super().__init__()
            self.barrier = threading.Barrier(3, timeout=30)

        def run(self, batch: StageBatch) -> StageOutput:
            if batch.stage == 1:
                self.barrier.wait()  # three meet, or it breaks
            return super().run(batch)

    engine = Together()
    stages = measure(engine, seconds=1e9, concurrency=3, beyond=2, rounds=2)
    assert [stage.batches for stage in stages] == [(1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)]
    assert engine.slots_in_use == 0


def test_no_state_stays_behind_also_where_the_engine_fails() -> None:
    engine = Timed()
    measure(engine, seconds=1, clock=engine.clock)
    assert engine.slots_in_use == 0

    class Fails(Timed):
        def run(self, batch: StageBatch) -> StageOutput:
            self.fail_next = int(len(self.batches) > 40 and batch.stage == 2)
            return super().run(batch)

    for concurrency in (1, 3):
        engine = Fails()
        with pytest.raises(RuntimeError, match="told to fail"):
            measure(engine, seconds=1e9, concurrency=concurrency)
        assert engine.slots_in_use == 0


def test_two_real_engines_measured_here_have_one_identity(micro_bundle: Path) -> None:
    bundle = Bundle.load(micro_bundle)
    engines: list[Engine] = [load_engine(bundle), load_engine(bundle, max_batch_sizes=(4, 4, 4))]
    first, second = (identify(bundle, engine, 2) for engine in engines)
    assert first == second
    assert first.model == bundle.manifest.version
    assert first.runtime.startswith("onnxruntime ")
    assert first.device
    assert identify(bundle, engines[0], 3).misfit(first) == "concurrency 3, not 2"
    for engine in engines:
        engine.close()


def test_the_command_measures_and_writes_into_the_bundle(micro_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(micro_bundle, copy)
    (copy / "profile.json").write_text("broken, and about to be replaced")
    answer = CliRunner().invoke(build(), ["profile", str(copy), "--seconds", "1", "--executors", "1", "--json"])
    assert answer.exit_code == 0
    profile = Bundle.load(copy).profile
    assert profile is not None
    assert profile == LatencyProfile.from_json(answer.stdout)
    assert json.loads(answer.stdout)["identity"]["concurrency"] == 1
    assert all(s > 0 for stage in profile.stages for s in stage.p50)
    assert (copy / "profile.json").stat().st_mode & 0o777 == 0o644
    table = as_table(profile)
    assert "1 at once" in table
    assert table.count("ms a batch + ") == 3


def test_what_a_user_can_cause_is_one_line(tmp_path: Path) -> None:
    answer = CliRunner().invoke(build(), ["profile", str(tmp_path / "nowhere")])
    assert answer.exit_code == 1
    assert isinstance(answer.exception, click.ClickException)
    assert answer.exception.message == f"{tmp_path / 'nowhere'}: no such folder"


def test_a_profile_that_is_broken_stops_the_load_by_name_and_one_of_another_machine_does_not(
    bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    bundle = Bundle.load(copy)
    assert bundle.profile is None
    engine = FakeEngine()
    here = identify(bundle, engine, 2)
    stages = LatencyProfile.lines([0.001] * 3, [0.001] * 3).stages
    assert bundle.write_profile(LatencyProfile(stages, here)).profile == Bundle.load(copy).profile
    with pytest.raises(BundleError, match=r"profile\.json: has 2 stages, the manifest has 3"):
        bundle.write_profile(LatencyProfile(stages[:2], here))
    (copy / "profile.json").write_text('{"format_version": 7}')
    with pytest.raises(BundleError, match=r"profile\.json: format version 7, this server reads 1"):
        Bundle.load(copy)
    (copy / "profile.json").unlink()
    (copy / "profile.json").symlink_to(copy / "frontier.json")
    with pytest.raises(BundleError, match=r"profile\.json: is a symbolic link"):
        Bundle.load(copy)


def test_a_profile_that_cannot_be_written_is_named_and_leaves_nothing_behind(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    bundle = Bundle.load(copy)
    (copy / "profile.json").mkdir()
    before = sorted(copy.iterdir())
    stages = LatencyProfile.lines([0.001] * 3, [0.001] * 3).stages
    with pytest.raises(BundleError, match=r"profile\.json: is a directory"):
        bundle.write_profile(LatencyProfile(stages, identify(bundle, FakeEngine(), 2)))
    assert sorted(copy.iterdir()) == before


class TestAtTheStart:
    """`profile_at_start`, and what a server makes of it."""

    def test_a_profile_that_was_measured_here_is_used_as_it_is(self, bundle: Bundle) -> None:
        engine = FakeEngine()
        kept = LatencyProfile(LatencyProfile.lines([0.001] * 3, [0.001] * 3).stages, identify(bundle, engine, 2))
        kept_by = replace(bundle, profile=kept)
        assert profile_at_start(kept_by, engine, executors=2, seconds=9) is kept
        assert profile_at_start(kept_by, engine, executors=2, seconds=0) is kept
        assert engine.batches == []

    def test_one_that_was_measured_elsewhere_is_measured_anew_and_the_log_says_why(
        self, bundle: Bundle, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        engine = FakeEngine()
        there = replace(identify(bundle, engine, 2), device="Another CPU")
        kept_by = replace(bundle, profile=LatencyProfile(LatencyProfile.lines([1] * 3, [1] * 3).stages, there))
        profile = profile_at_start(kept_by, engine, executors=2, seconds=9)
        assert profile is not None
        assert profile.identity == identify(bundle, engine, 2)
        assert profile.seconds(1, 4) < 1
        assert "measured with device Another CPU, not none" in caplog.text
        assert profile_at_start(kept_by, engine, executors=2, seconds=0) is None

    @pytest.mark.parametrize(("executors", "runs"), [(1, 2), (2, 2), (3, 3)])
    def test_each_size_is_run_twice_and_by_every_thread(self, bundle: Bundle, executors: int, runs: int) -> None:
        engine = FakeEngine(max_batch_sizes=(16, 4, 4))
        assert profile_at_start(bundle, engine, executors=executors, seconds=1e5) is not None
        sizes = Counter((batch.stage, len(batch.pixels)) for batch in engine.batches)
        assert sizes == dict.fromkeys([(1, 1), (1, 4), (1, 16), (2, 1), (2, 4), (3, 1), (3, 4)], runs)

    async def test_a_server_knows_what_batches_take_follows_it_and_says_it(
        self, serve: Any, engine: FakeEngine, photo: Callable[..., bytes]
    ) -> None:
        async with serve(profile_seconds=9) as served:
            live = served.service.machine.profile
            believed = live.seconds(1, 1)
            assert 0 < believed < 1
            assert engine.slots_in_use == 0
            rows = (await served.http.get("/frontier")).json()["rows"]
            assert all(row["ms"] > 0 for row in rows)
            for stage in "123":
                assert await served.metric("dvt_profile_image_seconds", stage=stage) >= 0
            served.service.batch_finished(1, 1, 1000 * believed, 0, 0.0)
            assert live.seconds(1, 1) > believed
            assert (await served.classify(photo(255))).status_code == 200

    async def test_an_engine_that_cannot_be_measured_is_served_all_the_same(
        self, serve: Any, engine: FakeEngine, photo: Callable[..., bytes], caplog: pytest.LogCaptureFixture
    ) -> None:
        engine.fail_next = 1
        async with serve(profile_seconds=9) as served:
            assert served.service.machine.profile is None
            assert (await served.http.get("/frontier")).json()["rows"][0]["ms"] is None
            assert (await served.classify(photo(255))).status_code == 200
        assert "no latency profile: the engine failed while it was measured (RuntimeError: told to fail)" in caplog.text

    async def test_batches_are_as_large_as_the_kept_profile_says_that_they_pay(self, bundle: Bundle) -> None:
        engine = FakeEngine()
        p50 = ((0.010, 0.020, 0.040), (0.010, 0.040, 0.160), (0.010, 0.020, 0.080))
        costs = tuple(StageCost((1, 4, 16), seconds, seconds) for seconds in p50)
        kept = replace(bundle, profile=LatencyProfile(costs, identify(bundle, engine, 2)))
        for given, sizes in ((None, (16, 1, 4)), ((3, 2, 1), (3, 2, 1))):
            settings = Settings(state_dir=None, executors=2, max_batch_sizes=given)
            assert create_app(settings, kept, engine).state.service.batch_sizes == sizes
        elsewhere = Settings(state_dir=None, executors=3)
        assert create_app(elsewhere, kept, engine).state.service.batch_sizes == engine.max_batch_sizes
