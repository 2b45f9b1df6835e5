"""Metrics say what happened, in base units, with labels from closed sets."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.confidence_sequence import Interval
from server.core import ImageResult, OperatingPoint
from server.drift import DriftState
from server.metrics import Metrics
from server.profile import LatencyProfile, LiveProfile


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model="fake", version="1", release="0", stage_gmacs=(0.01, 0.03, 0.08))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def result(exit_: int, degraded: bool = False) -> ImageResult:
    return ImageResult(
        np.zeros(2, np.float32), exit_, 0.9, degraded, queue_s=0.002, compute_s=0.004, confidences=(0.9,) * exit_
    )


def test_mean_batch_fill_is_one_division(metrics: Metrics) -> None:
    metrics.batch_finished(2, 8, 0.1, 0)
    metrics.batch_finished(2, 4, 0.1, 0)
    images, batches = (value(metrics, name, stage="2") for name in ("dvt_batch_images_total", "dvt_batches_total"))
    assert images is not None
    assert batches is not None
    assert images / batches == 6


def test_engine_time_of_abandoned_rows_is_their_share_of_the_batch(metrics: Metrics) -> None:
    metrics.batch_finished(1, 4, 0.2, 1)
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


def test_what_others_own_is_read_when_asked(metrics: Metrics) -> None:
    slots = 0
    metrics.watch(
        queue_depths=lambda: {1: 5, 2: 0, 3: 2},
        slots_in_use=lambda: slots,
        requests_in_flight=lambda: 7,
        held_bytes=lambda: 100,
        point=lambda: OperatingPoint(4, (0.9, 0.7, 0.0)),
        ready=lambda: True,
        profile=lambda: LiveProfile(LatencyProfile.lines([0.001, 0.0, 0.0], [0.002, 0.003, 0.004])),
        arrival_rate=lambda: 12.5,
        pressure=lambda: 0.25,
        audits_pending=lambda: 5,
        accuracy_gap=lambda: Interval(0.01, 0.004, 0.02),
        drift=lambda: DriftState(9000, 0.25, (4.5, -1.0, 0.0), True, ("psi", "exit_fractions")),
    )
    slots = 3
    assert value(metrics, "dvt_arrival_rate") == 12.5
    assert value(metrics, "dvt_pressure") == 0.25
    assert value(metrics, "dvt_slots_in_use") == 3
    assert value(metrics, "dvt_queue_depth", stage="3") == 2
    assert value(metrics, "dvt_threshold", exit="2") == 0.7
    assert value(metrics, "dvt_budget_version") == 4
    assert value(metrics, "dvt_ready") == 1
    assert value(metrics, "dvt_profile_fixed_seconds", stage="1") == pytest.approx(0.001)
    assert value(metrics, "dvt_profile_image_seconds", stage="3") == pytest.approx(0.004)
    assert value(metrics, "dvt_audits_pending") == 5
    assert [value(metrics, "dvt_audit_accuracy_gap", bound=b) for b in ("mean", "low", "high")] == [0.01, 0.004, 0.02]
    assert (value(metrics, "dvt_drift_psi"), value(metrics, "dvt_drift_alarm")) == (0.25, 1)
    assert value(metrics, "dvt_drift_z", exit="2") == -1


def test_what_is_not_known_yet_has_no_value(metrics: Metrics) -> None:
    metrics.watch(
        queue_depths=dict,
        slots_in_use=lambda: 0,
        requests_in_flight=lambda: 0,
        held_bytes=lambda: 0,
        point=lambda: OperatingPoint(1, (0.5, 0.0)),
        ready=lambda: True,
        profile=lambda: None,
        arrival_rate=lambda: 0.0,
        pressure=lambda: 0.0,
        audits_pending=lambda: 0,
        accuracy_gap=lambda: Interval(None, None, None),
        drift=lambda: DriftState(0, None, None, False, ()),
    )
    assert value(metrics, "dvt_audit_accuracy_gap", bound="mean") is None
    assert value(metrics, "dvt_drift_psi") is None
    assert value(metrics, "dvt_drift_z", exit="1") is None
    assert value(metrics, "dvt_drift_alarm") == 0


def test_audits_are_counted_by_image(metrics: Metrics) -> None:
    metrics.audited(8, 3)
    metrics.audit_dropped("full", 64)
    assert value(metrics, "dvt_audited_images_total") == 8
    assert value(metrics, "dvt_audit_disagreements_total") == 3
    assert value(metrics, "dvt_audits_dropped_total", reason="full") == 64


def test_the_text_is_what_prometheus_parses_and_every_metric_is_explained(metrics: Metrics) -> None:
    metrics.request_finished("/classify", 200, 0.01)
    metrics.request_refused("overloaded")
    metrics.decoded(0.001)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert {"dvt_requests", "dvt_refused", "dvt_build_info", "process_cpu_seconds"} <= families.keys()
    for name, family in families.items():
        assert family.documentation, name
        assert name.startswith(("dvt_", "process_"))
