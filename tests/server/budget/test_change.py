"""A change is heard soon; streams that have not changed stay silent, also where images come in runs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from server.budget.change import BATCH, LOOK, Change

SAMPLES = 10**9  # calibration that makes no error


def stream(images: int, seed: int, correlation: float = 0.0, shift: float = 0.0) -> NDArray[np.bool_]:
    """(images,) of which half, without a shift, are above 0: signs of an AR(1) process."""
    rng = np.random.default_rng(seed)
    latent, state = np.empty(images), rng.normal()
    fresh = np.sqrt(1 - correlation**2)
    for at, noise in enumerate(rng.normal(size=images).tolist()):
        state = correlation * state + fresh * noise
        latent[at] = state
    return latent > shift


def looks(change: Change, values: NDArray[np.bool_], share: float = 0.5) -> list[float]:
    """z at every look."""
    found = []
    residuals = values - share
    batches = np.stack([residuals, residuals**2], axis=1).reshape(-1, BATCH, 2).sum(axis=1)
    for number, batch in enumerate(batches, start=1):
        change.add(batch[:, None])
        if number % LOOK == 0:
            z = change.z()
            assert z is not None
            found.append(float(z[0]))
    return found


def test_it_says_nothing_before_the_shortest_span_is_full() -> None:
    change = Change(2, SAMPLES)
    for _ in range(LOOK):
        assert change.z() is None
        change.add(np.zeros((2, 2)))
    assert change.z() is not None


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.98])
def test_a_stream_that_has_not_changed_stays_silent(correlation: float) -> None:
    loudest = [np.abs(looks(Change(1, SAMPLES), stream(60_000, seed, correlation))).max() for seed in range(5)]
    assert max(loudest) < 5
    assert min(loudest) > 1, "it is not deaf either"


@pytest.mark.parametrize(("shift", "sign"), [(0.5, -1), (-0.5, 1)])
def test_a_change_is_heard_within_a_thousand_images_however_long_nothing_had_happened(shift: float, sign: int) -> None:
    for before in (5_000, 60_000):
        change = Change(1, SAMPLES)
        assert max(map(abs, looks(change, stream(before, 1)))) < 5
        assert sign * looks(change, stream(1_000, 2, shift=shift))[-1] > 5


def test_a_change_in_a_stream_of_runs_is_heard_later() -> None:
    change = Change(1, SAMPLES)
    looks(change, stream(40_000, 1, 0.9))
    heard = np.array(looks(change, stream(10_000, 2, 0.9, shift=0.5))) < -5
    assert heard.any()
    assert heard.argmax() >= 2


def test_a_change_that_is_over_is_forgotten() -> None:
    change = Change(1, SAMPLES)
    assert looks(change, stream(10_000, 1, shift=0.5))[-1] < -5
    assert abs(looks(change, stream(12_000, 2))[-1]) < 5


def test_what_calibration_could_not_know_is_no_change() -> None:
    """Of 1,000 images 47 % are as likely as not to be half of all."""
    values = stream(10_000, 3)
    assert max(map(abs, looks(Change(1, SAMPLES), values, share=0.45))) > 5
    assert max(map(abs, looks(Change(1, 1_000), values, share=0.45))) < 4


def test_a_few_rare_images_in_a_row_are_no_change() -> None:
    change = Change(1, SAMPLES)
    values = np.zeros(30_000, dtype=np.bool_)
    values[::500] = True
    values[-4:] = True
    assert max(map(abs, looks(change, values, share=0.002))) < 4


def test_what_never_varies_divides_by_nothing() -> None:
    assert looks(Change(1, 1_000), np.zeros(2_000, dtype=np.bool_), share=0.0) == [0.0] * 4
    change = Change(0, 1_000)
    for _ in range(LOOK):
        change.add(np.zeros((2, 0)))
    assert change.z() is not None
