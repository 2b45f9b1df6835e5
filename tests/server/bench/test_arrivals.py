"""Arrival times: the rate that was asked for, as bursty as was asked for, and traces read as they stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench import arrivals

SECONDS = 2000.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: arrivals.poisson(10, SECONDS, 1),
        lambda: arrivals.renewal(10, SECONDS, 1, cv=4),
        lambda: arrivals.mmpp(10, SECONDS, 1, dwell_s=5),
        lambda: arrivals.step(10, SECONDS, 1, factor=1, start_s=0),
        lambda: arrivals.steps([5, 15], SECONDS, 1),
        lambda: arrivals.evenly(10, SECONDS, 1),
    ],
    ids=["poisson", "gamma", "mmpp", "step", "steps", "evenly"],
)
def test_arrivals_rise_within_the_length_at_the_mean_rate(make):
    times = make()
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0
    assert times[-1] < SECONDS
    assert len(times) / SECONDS == pytest.approx(10, rel=0.1)
    assert np.array_equal(times, make()), "the same seed, other arrivals"


@pytest.mark.parametrize("cv", [1, 2, 8])
def test_gaps_vary_as_asked(cv):
    gaps = np.diff(arrivals.renewal(10, 20_000, 2, cv=cv))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_an_mmpp_comes_in_bursts():
    def dispersion(times):  # variance over mean of the counts per second; 1 for Poisson
        counts = np.bincount(times.astype(int))
        return counts.var() / counts.mean()

    assert dispersion(arrivals.poisson(10, SECONDS, 3)) == pytest.approx(1, abs=0.2)
    assert dispersion(arrivals.mmpp(10, SECONDS, 3, dwell_s=5)) > 3


def test_a_step_raises_the_rate_for_a_while():
    times = arrivals.step(10, 300, 4, factor=3, start_s=100, end_s=200)
    before, during, after = (np.sum((times >= at) & (times < at + 100)) / 100 for at in (0, 100, 200))
    assert before == pytest.approx(10, rel=0.15)
    assert during == pytest.approx(30, rel=0.15)
    assert after == pytest.approx(10, rel=0.15)


@given(
    rates=st.lists(st.floats(0, 200), min_size=1, max_size=8).filter(lambda rates: max(rates) > 1),
    seconds=st.floats(0.5, 20),
    seed=st.integers(0, 2**32),
)
def test_every_step_has_its_own_rate(rates, seconds, seed):
    times = arrivals.steps(rates, seconds, seed)
    assert np.all(np.diff(times) >= 0)
    assert not len(times) or 0 <= times[0] <= times[-1] <= seconds
    counts = np.histogram(times, np.linspace(0, seconds, len(rates) + 1))[0]
    expected = np.array(rates) * seconds / len(rates)
    assert np.all(np.abs(counts - expected) <= 6 * np.sqrt(expected) + 6)  # six sigma of a Poisson count
    assert np.array_equal(times, arrivals.steps(rates, seconds, seed))


@given(rate=st.floats(0.5, 300), seconds=st.floats(1, 20), seed=st.integers(0, 2**32))
def test_poisson_gaps_are_exponential(rate, seconds, seed):
    times = arrivals.poisson(rate, seconds, seed)
    assert abs(len(times) - rate * seconds) <= 6 * np.sqrt(rate * seconds) + 6
    assert not len(times) or times[-1] < seconds
    if len(times) > 500:  # a memoryless process: as spread as it is long
        gaps = np.diff(times)
        assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.35)


def test_even_arrivals_are_even():
    assert arrivals.evenly(4, 1, 9).tolist() == [0, 0.25, 0.5, 0.75]


def test_what_is_no_process_is_refused():
    for make in (
        lambda: arrivals.poisson(0, 1, 0),
        lambda: arrivals.poisson(1, float("inf"), 0),
        lambda: arrivals.renewal(1, 1, 0, cv=0),
        lambda: arrivals.mmpp(1, 1, 0, share=1, dwell_s=1),
        lambda: arrivals.step(1, 1, 0, factor=-1, start_s=0),
    ):
        with pytest.raises(ValueError, match=r"must be above 0|needs"):
            make()


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_of_times_begins_at_0_in_order(tmp_path):
    path = write(tmp_path, "id,at\nb,12.5\na,10\nc,14\n")
    assert arrivals.read_trace(path, time="at").tolist() == [0, 2.5, 4]


def test_dates_are_times_too(tmp_path):
    path = write(tmp_path, "at\n2021-01-31T00:00:00+00:00\n2021-01-31 00:00:01.5+00:00\n")
    assert arrivals.read_trace(path, time="at").tolist() == [0, 1.5]


def test_bare_numbers_are_times(tmp_path):
    assert arrivals.read_trace(write(tmp_path, "3\n1\n\n2.5\n"), time="timestamp").tolist() == [0, 1.5, 2]


def test_json_lines_are_read_by_name(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 5, "path": "/x"}\n{"at": "7.5"}\n')
    assert arrivals.read_trace(path, time="at").tolist() == [0, 2.5]
    path.write_text('{"at": 5}\n{"when": 6}\n')
    with pytest.raises(ValueError, match=r"trace.jsonl, line 2: no time"):
        arrivals.read_trace(path, time="at")


@given(st.binary(max_size=60))
def test_any_file_is_a_trace_or_refused_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("trace")
    for name in ("x.csv", "x.jsonl"):
        (folder / name).write_bytes(content)
        told = ""
        try:
            assert np.all(np.isfinite(arrivals.read_trace(folder / name, time="at")))
        except ValueError as error:
            told = str(error)
        assert "\n" not in told


def test_counts_are_spread_over_their_interval(tmp_path):
    path = write(tmp_path, "minute,invocations\n60,3\n120,0\n180,2\n")
    times = arrivals.read_trace(path, time="minute", count="invocations")
    assert np.histogram(times, [0, 60, 120, 180])[0].tolist() == [3, 0, 2]
    one = write(tmp_path, "minute,invocations\n0,4\n")
    assert arrivals.read_trace(one, time="minute", count="invocations", interval_s=2).max() < 2


def test_a_trace_can_be_rescaled_to_a_rate(tmp_path):
    path = write(tmp_path, "minute,invocations\n0,30\n60,90\n")
    plain = arrivals.read_trace(path, time="minute", count="invocations")
    scaled = arrivals.read_trace(path, time="minute", count="invocations", rate=100)
    assert np.allclose(scaled, plain / 100)  # it was one a second


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("at\n1\n", {"time": "when"}, "no column 'when' among at"),
        ("", {"time": "at"}, "no column 'at'"),
        ("at\n", {"time": "at"}, "no line"),
        ("at\n1\nnoon\n", {"time": "at"}, "line 3"),
        ("at,n\n1,2\n2\n", {"time": "at", "count": "n"}, "line 3"),
        ("at,n\n1,2.5\n", {"time": "at", "count": "n"}, "line 2"),
        ("at,n\n1,0\n2,0\n", {"time": "at", "count": "n"}, "no arrivals"),
        ("at,n\n1,2\n", {"time": "at", "count": "n"}, "one interval only"),
        ("at\n5\n5\n", {"time": "at", "rate": 2.0}, "one moment"),
        ("at\n5\n6\n", {"time": "at", "rate": 0.0}, "above 0"),
    ],
)
def test_a_trace_that_cannot_be_read_says_where(tmp_path, text, options, says):
    with pytest.raises(ValueError, match=says):
        arrivals.read_trace(write(tmp_path, text), **options)
