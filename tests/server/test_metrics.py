"""Metrics say what happened, in base units, with labels from closed sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from server.budget.audit import AuditState
from server.budget.confidence_sequence import Interval
from server.budget.controller import BudgetState, Feasible, Observed, Prediction, Quantiles
from server.budget.drift import DriftState
from server.budget.fleet import FleetState
from server.budget.loops import KAPPA
from server.budget.sample import Estimate
from server.bundle.frontier import FrontierRow
from server.bundle.profile import LatencyProfile, LiveProfile
from server.core import ImageResult, Mix
from server.frontend.front import Figures
from server.metrics import OUTLINE_STEPS, SOURCES, Metrics, _outline


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model="fake", version="1", release="0", stage_gmacs=(0.01, 0.03, 0.08))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def result(exit_: int, degraded: bool = False) -> ImageResult:
    return ImageResult(
        np.zeros(2, np.float32), exit_, 0.9, degraded, queue_s=0.002, compute_s=0.004, confidences=(0.9,) * exit_
    )


UNSAID = Interval(None, None, None)
UNPREDICTED = Prediction(None, None, None)
FRONTIER = [FrontierRow((0.5, 0.5, 0.0), 0.5 + i / 1000, None, 0.01 + i / 10_000, (1.0, 0.0, 0.0)) for i in range(300)]
UNKNOWN = Observed(0, None, None, Quantiles(None, None))


def state(
    target: dict[str, Any],
    observed: Observed = UNKNOWN,
    row: int | None = None,
    mix: Mix | None = None,
    predicted: Prediction = UNPREDICTED,
) -> BudgetState:
    return BudgetState(
        version=4,
        target=target,
        hold="cost",
        clamped=False,
        thresholds=(0.9, 0.7, 0.0),
        mix=mix,
        predicted=predicted,
        observed=observed,
        feasible=Feasible((0.01, 0.08), (0.5, 0.9), None),
        row=row,
        pressure=0.25,
    )


def test_mean_batch_fill_is_one_division(metrics: Metrics) -> None:
    metrics.batch_finished(2, 8, 0.1, 0, 0.4)
    metrics.batch_finished(2, 4, 0.1, 0, 0.2)
    images, batches = (value(metrics, name, stage="2") for name in ("dvt_batch_images_total", "dvt_batches_total"))
    assert images is not None
    assert batches is not None
    assert images / batches == 6
    waited = value(metrics, "dvt_waited_seconds_total", stage="2")
    assert waited is not None
    assert waited / images == pytest.approx(0.05)


def test_engine_time_of_abandoned_rows_is_their_share_of_the_batch(metrics: Metrics) -> None:
    metrics.batch_finished(1, 4, 0.2, 1, 0.0)
    assert value(metrics, "dvt_engine_seconds_total", stage="1") == pytest.approx(0.2)
    assert value(metrics, "dvt_abandoned_engine_seconds_total", stage="1") == pytest.approx(0.05)


def test_images_count_by_exit_and_cost_what_their_exit_costs(metrics: Metrics) -> None:
    metrics.image_finished(result(1))
    metrics.image_finished(result(3, degraded=True))
    assert value(metrics, "dvt_images_total", exit="1", degraded="false") == 1
    assert value(metrics, "dvt_images_total", exit="3", degraded="true") == 1
    assert value(metrics, "dvt_image_macs_total") == pytest.approx(0.09e9)
    assert value(metrics, "dvt_queue_seconds_sum") == pytest.approx(0.004)


def test_series_exist_before_their_first_event(metrics: Metrics) -> None:
    assert value(metrics, "dvt_images_total", exit="2", degraded="true") == 0
    assert value(metrics, "dvt_images_abandoned_total", reason="disconnect") == 0
    assert value(metrics, "dvt_batches_total", stage="3") == 0
    assert value(metrics, "dvt_refused_total", code="engine_failed") == 0
    assert value(metrics, "dvt_requests_total", route="/classify", status="503", priority="low", hurried="true") == 0


def test_requests_count_by_priority_where_it_is_known(metrics: Metrics) -> None:
    metrics.request_finished("/classify", 503, 0.01, "low", "false")
    metrics.request_finished("/classify", 503, 0.01)
    for priority, hurried in (("low", "false"), ("", "")):
        labels = {"route": "/classify", "status": "503", "priority": priority, "hurried": hurried}
        assert value(metrics, "dvt_requests_total", **labels) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60, unique=True))
def test_the_frontier_is_drawn_by_few_rows_both_ends_among_them(costs: list[float]) -> None:
    frontier = [FrontierRow((0.5, 0.0), cost, None, cost, (1.0, 0.0)) for cost in sorted(costs)]
    outline = _outline(frontier)
    assert {0, len(frontier) - 1} <= outline.keys()
    assert len(outline) <= OUTLINE_STEPS + 1
    assert all(frontier[row] is point for row, point in outline.items())


def test_what_others_own_is_read_when_asked(metrics: Metrics) -> None:
    slots = 0
    metrics.watch(
        executors=2,
        batch_sizes=(16, 8, 4),
        frontier=FRONTIER,
        held_gmacs=lambda: 0.03,
        queue_depths=lambda: {1: 5, 2: 0, 3: 2},
        slots_in_use=lambda: slots,
        figures=lambda: Figures(connections=2, requests=7, held_bytes=100, decode_age_s=0.0, decodes_stalled=0),
        front_ends=lambda: 3,
        budget=lambda: state(
            {"latency_ms": 25.0, "quantile": 0.9},
            Observed(200, 0.03, (0.5, 0.25, 0.25), Quantiles(6.0, 20.0)),
            row=7,
            mix=Mix((0.95, 0.8, 0.0), 0.4),
            predicted=Prediction(0.8, 0.031, (0.6, 0.3, 0.1)),
        ),
        ready=lambda: True,
        running=lambda: (2.5, 1),
        profile=lambda: LiveProfile(LatencyProfile.lines([0.001, 0.0, 0.0], [0.002, 0.003, 0.004])),
        kappa=lambda: 1.5,
        arrival_rate=lambda: 12.5,
        audit=lambda: AuditState(
            images=2,
            chosen=8,
            represented=7,
            audited_ratio=0.25,
            pending=5,
            agreement=Interval(0.97, 0.9, 1.0),
            accuracy_gap=Interval(0.01, 0.004, 0.02),
            confidence=0.95,
            since_start=Estimate(8, 2, 7, 0.25, UNSAID, UNSAID),
        ),
        drift=lambda: DriftState(9000, 0.25, (4.5, -1.0, 0.0), True, ("psi", "exit_fractions")),
        fleet=lambda: FleetState("configmap", 5, 4, "last_known", None, None, 2.5, "no", None),
    )
    slots = 3
    assert value(metrics, "dvt_arrival_rate") == 12.5
    assert value(metrics, "dvt_pressure") == 0.25
    assert value(metrics, "dvt_slots_in_use") == 3
    assert value(metrics, "dvt_queue_depth", stage="3") == 2
    assert value(metrics, "dvt_threshold", exit="2") == 0.7
    assert (value(metrics, "dvt_mix_threshold", exit="1"), value(metrics, "dvt_mix_share")) == (0.95, 0.4)
    assert (value(metrics, "dvt_budget_version"), value(metrics, "dvt_budget_row")) == (4, 7)
    assert value(metrics, "dvt_budget_target", kind="latency_seconds") == 0.025
    assert value(metrics, "dvt_budget_target", kind="quantile") == 0.9
    assert value(metrics, "dvt_budget_observed_images") == 200
    assert value(metrics, "dvt_budget_observed_gmacs") == 0.03
    assert value(metrics, "dvt_budget_observed_exit_ratio", exit="2") == 0.25
    assert value(metrics, "dvt_budget_observed_latency_seconds", quantile="0.5") == 0.006
    assert value(metrics, "dvt_budget_observed_latency_seconds", quantile="0.99") == 0.02
    assert (value(metrics, "dvt_executors"), value(metrics, "dvt_max_batch_size", stage="2")) == (2, 8)
    assert value(metrics, "dvt_budget_held_gmacs") == 0.03
    assert (value(metrics, "dvt_budget_predicted_accuracy"), value(metrics, "dvt_budget_predicted_gmacs")) == (
        0.8,
        0.031,
    )
    assert value(metrics, "dvt_budget_predicted_exit_ratio", exit="2") == 0.3
    assert value(metrics, "dvt_latency_kappa") == 1.5
    assert value(metrics, "dvt_ready") == 1
    assert value(metrics, "dvt_oldest_run_seconds", threads="executor") == 2.5
    assert value(metrics, "dvt_stalled_threads", threads="executor") == 1
    assert value(metrics, "dvt_stalled_threads", threads="decode") == 0
    assert value(metrics, "dvt_profile_fixed_seconds", stage="1") == pytest.approx(0.001)
    assert value(metrics, "dvt_profile_image_seconds", stage="3") == pytest.approx(0.004)
    assert (value(metrics, "dvt_audits_pending"), value(metrics, "dvt_audit_ratio")) == (5, 0.25)
    assert [value(metrics, "dvt_audit_agreement", bound=b) for b in ("mean", "low", "high")] == [0.97, 0.9, 1.0]
    assert [value(metrics, "dvt_audit_accuracy_gap", bound=b) for b in ("mean", "low", "high")] == [0.01, 0.004, 0.02]
    assert (value(metrics, "dvt_drift_psi"), value(metrics, "dvt_drift_alarm")) == (0.25, 1)
    assert value(metrics, "dvt_drift_z", exit="2") == -1
    assert (value(metrics, "dvt_policy_generation"), value(metrics, "dvt_policy_applied")) == (5, 4)
    assert value(metrics, "dvt_policy_sync_age_seconds") == 2.5
    assert {s: value(metrics, "dvt_policy_source", source=s) for s in SOURCES} == {
        "store": 0, "last_known": 1, "seed": 0, "default": 0, "replica": 0
    }  # fmt: skip


def test_what_is_not_known_yet_has_no_value(metrics: Metrics) -> None:
    metrics.watch(
        executors=2,
        batch_sizes=(16, 8, 4),
        frontier=FRONTIER,
        held_gmacs=lambda: None,
        queue_depths=dict,
        slots_in_use=lambda: 0,
        figures=lambda: Figures(connections=2),
        front_ends=lambda: 0,
        budget=lambda: state({"thresholds": [0.9, 0.7]}),
        ready=lambda: True,
        running=lambda: (0.0, 0),
        profile=lambda: None,
        kappa=lambda: 1.17,
        arrival_rate=lambda: 0.0,
        audit=lambda: AuditState(0, 0, 0, None, 0, UNSAID, UNSAID, 0.95, Estimate(0, 0, 0, None, UNSAID, UNSAID)),
        drift=lambda: DriftState(0, None, None, False, ()),
        fleet=lambda: FleetState("file", 4, 4, "store", None, None, None, None, None),
    )
    with_samples = {family.name for family in metrics.registry.collect() if family.samples}
    assert not with_samples & {
        "dvt_audit_agreement", "dvt_audit_ratio", "dvt_budget_target", "dvt_budget_row", "dvt_budget_observed_gmacs",
        "dvt_budget_observed_exit_ratio", "dvt_budget_observed_latency_seconds", "dvt_mix_threshold", "dvt_mix_share",
        "dvt_latency_kappa", "dvt_budget_held_gmacs", "dvt_budget_predicted_accuracy", "dvt_budget_predicted_gmacs",
        "dvt_budget_predicted_exit_ratio",
    }  # fmt: skip
    assert value(metrics, "dvt_budget_observed_images") == 0
    assert value(metrics, "dvt_audit_accuracy_gap", bound="mean") is None
    assert value(metrics, "dvt_drift_psi") is None
    assert value(metrics, "dvt_drift_z", exit="1") is None
    assert value(metrics, "dvt_drift_alarm") == 0


def test_audits_are_counted_as_images_and_as_what_they_stand_for(metrics: Metrics) -> None:
    for _ in range(8):
        metrics.audit_chosen()
    metrics.audit_dropped("full")
    metrics.audited(agreement=1.0, stands_for=1)
    metrics.audited(agreement=0.0, stands_for=5)
    assert value(metrics, "dvt_audits_chosen_total") == 8
    assert value(metrics, "dvt_audited_images_total") == 2
    assert value(metrics, "dvt_audit_disagreements_total") == 1
    assert value(metrics, "dvt_audit_represented_total") == 6
    assert value(metrics, "dvt_audit_represented_disagreements_total") == 5
    assert value(metrics, "dvt_audits_dropped_total", reason="full") == 1


def test_the_text_is_what_prometheus_parses_and_every_metric_is_explained(metrics: Metrics) -> None:
    metrics.request_finished("/classify", 200, 0.01)
    metrics.request_refused("overloaded")
    metrics.decoded(0.001)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert {"dvt_requests", "dvt_refused", "dvt_build_info", "process_cpu_seconds"} <= families.keys()
    for name, family in families.items():
        assert family.documentation, name
        assert name.startswith(("dvt_", "process_"))


async def scrape(served: Any) -> dict[tuple[str, ...], float]:
    """What Prometheus reads of a server: values by name and label values."""
    text = (await served.http.get("/metrics")).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: dict[tuple[str, ...], float], name: str) -> dict[tuple[str, ...], float]:
    """One metric's values by label values."""
    return {key[1:]: value for key, value in samples.items() if key[0] == name}


async def test_requests_are_counted_and_answers_timed_by_priority(served: Any, photo: Callable[..., bytes]) -> None:
    await served.classify(photo(255), params={"priority": "low"})
    await served.classify(photo(255))
    await served.classify(photo(255), params={"priority": "none"})
    samples = await scrape(served)
    assert [samples["dvt_answer_seconds_count", name] for name in ("high", "normal", "low")] == [0, 1, 1]
    finished = {key: n for key, n in of(samples, "dvt_requests_total").items() if "/classify" in key and n}
    assert finished == {
        ("false", "low", "/classify", "200"): 1,
        ("false", "normal", "/classify", "200"): 1,
        ("", "", "/classify", "422"): 1,
    }


@pytest.mark.parametrize(
    ("default", "asked", "hurried"), [(1000, 499, "true"), (1000, 500, "false"), (200, 200, "false")]
)
async def test_who_allows_less_time_than_is_promised_is_told_apart(
    serve: Any, photo: Callable[..., bytes], default: int, asked: int, hurried: str
) -> None:
    async with serve(timeout_ms=default) as served:
        await served.classify(photo(255), params={"timeout_ms": asked})
        labels = {"route": "/classify", "status": "200", "priority": "normal", "hurried": hurried}
        assert await served.metric("dvt_requests_total", **labels) == 1


async def test_the_waits_for_all_stages_are_the_waits_of_the_images(serve: Any, photo: Callable[..., bytes]) -> None:
    async with serve(audit_fraction=1) as served:
        await asyncio.gather(*(served.classify(photo(10, 255)) for _ in range(9)))
        while (task := served.service.audit._task) is not None:
            await asyncio.wait([task])
        samples = await scrape(served)
        assert samples["dvt_batch_images_total", "3"] == 9, "of audits, whose waits are nobody's"
        waits = of(samples, "dvt_waited_seconds_total")
        assert set(waits) == {("1",), ("2",), ("3",)}
        assert sum(waits.values()) == pytest.approx(samples["dvt_queue_seconds_sum",])


class TestTheLiveBudget:
    """The metrics say what GET /budget says."""

    async def test_a_target_of_another_kind_replaces_the_series(self, serve: Any) -> None:
        async with serve(profile_seconds=9) as served:
            assert of(await scrape(served), "dvt_budget_target") == {}, "thresholds are metrics of their own"
            for target, series in (
                ({"gmacs": 0.03}, {("gmacs",): 0.03}),
                ({"accuracy": 0.5}, {("accuracy",): 0.5}),
                ({"latency_ms": 60_000, "quantile": 0.9}, {("latency_seconds",): 60, ("quantile",): 0.9}),
                ({"gmacs": 0.04}, {("gmacs",): 0.04}),
            ):
                budget = (await served.http.put("/budget", json=target)).json()
                samples = await scrape(served)
                assert of(samples, "dvt_budget_target") == series
                assert samples["dvt_budget_row",] == budget["row"]
                assert samples["dvt_budget_predicted_gmacs",] == budget["predicted"]["gmacs"]
                assert samples["dvt_budget_predicted_accuracy",] == budget["predicted"]["accuracy"]
                held = target.get("gmacs", budget["predicted"]["gmacs"])
                assert samples["dvt_budget_held_gmacs",] == pytest.approx(held)
                assert samples["dvt_budget_version",] == budget["version"]

    async def test_what_is_observed_appears_with_the_first_image_and_goes_with_a_new_budget(
        self, served: Any, photo: Callable[..., bytes]
    ) -> None:
        names = ("gmacs", "exit_ratio", "latency_seconds")
        samples = await scrape(served)
        assert not any(of(samples, f"dvt_budget_observed_{name}") for name in names)
        await served.classify(photo(255))
        await served.classify(photo(10, 255))
        observed = (await served.http.get("/budget")).json()["observed"]
        samples = await scrape(served)
        assert samples["dvt_budget_observed_images",] == 2
        assert samples["dvt_budget_observed_gmacs",] == observed["gmacs"] == pytest.approx(0.02)
        assert of(samples, "dvt_budget_observed_exit_ratio") == {("1",): 0.5, ("2",): 0.5, ("3",): 0}
        assert of(samples, "dvt_budget_observed_latency_seconds") == {
            ("0.5",): pytest.approx(observed["latency_ms"]["p50"] / 1000),
            ("0.99",): pytest.approx(observed["latency_ms"]["p99"] / 1000),
        }
        await served.http.put("/budget", json={"gmacs": 0.03})
        samples = await scrape(served)
        assert samples["dvt_budget_observed_images",] == 0
        assert not any(of(samples, f"dvt_budget_observed_{name}") for name in names)

    async def test_a_mixed_budget_shows_both_sets_of_thresholds_while_it_lasts(self, served: Any) -> None:
        body = {"gmacs": 0.03, "mix": True, "hold": "quality"}
        budget = (await served.http.put("/budget", json=body)).json()
        samples = await scrape(served)
        for name, thresholds in (
            ("dvt_threshold", budget["thresholds"]),
            ("dvt_mix_threshold", budget["mix"]["thresholds"]),
        ):
            assert of(samples, name) == {(str(i),): threshold for i, threshold in enumerate(thresholds, start=1)}
        assert 0 < samples["dvt_mix_share",] == budget["mix"]["share"] < 1
        assert of(samples, "dvt_budget_held_gmacs") == {}, "thresholds stay"
        await served.http.put("/budget", json={"gmacs": 0.03})
        samples = await scrape(served)
        assert of(samples, "dvt_mix_threshold") == of(samples, "dvt_mix_share") == {}

    async def test_the_intervals_of_the_audits(self, serve: Any, photo: Callable[..., bytes]) -> None:
        async with serve(audit_fraction=1) as served:
            assert of(await scrape(served), "dvt_audit_agreement") == {}
            for last in (10, 255, 255):  # the last exit gives another class, and twice the same
                await served.classify(photo(255, 255, last, klass=3))
            while (task := served.service.audit._task) is not None:
                await asyncio.wait([task])
            audit = (await served.http.get("/budget")).json()["audit"]
            samples = await scrape(served)
            for name, interval in (("agreement", audit["agreement"]), ("accuracy_gap", audit["accuracy_gap"])):
                assert of(samples, f"dvt_audit_{name}") == {(bound,): limit for bound, limit in interval.items()}
            assert 0 < samples["dvt_audit_agreement", "mean"] < 1
            assert samples["dvt_audits_chosen_total",] == samples["dvt_audit_represented_total",] == 3
            assert samples["dvt_audit_ratio",] == audit["audited_ratio"] == 1

    async def test_kappa_is_what_latency_budgets_reckon_with(self, serve: Any, served: Any) -> None:
        assert of(await scrape(served), "dvt_latency_kappa") == {}, "without a profile nobody reckons with it"
        async with serve(profile_seconds=9) as profiled:
            assert (await scrape(profiled))["dvt_latency_kappa",] == KAPPA
            profiled.service.machine.tail.kappa = 2.5
            assert (await scrape(profiled))["dvt_latency_kappa",] == 2.5
