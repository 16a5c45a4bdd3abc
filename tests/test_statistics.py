"""Intervals that hold what they say: by simulation, at fixed seeds."""

from __future__ import annotations

import math
import time
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lem_kit as lem
from lem_kit import statistics
from lem_kit.errors import LemError


def test_students_t_is_that_of_the_tables() -> None:
    assert [statistics.student_t(n) for n in (1, 2, 10, 30, 1000)] == [12.706, 4.303, 2.228, 2.042, 2.042]
    assert statistics.student_t(2.9) == 4.303 and statistics.student_t(0.4) == 12.706
    stats = pytest.importorskip("scipy.stats")
    assert all(statistics.student_t(n) == pytest.approx(stats.t.ppf(0.975, n), abs=5e-4) for n in range(1, 31))


def test_beyond_the_table_it_is_a_little_wide_and_never_narrow() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (31, 60, 1_000_000):
        assert statistics.student_t(30) == statistics.student_t(degrees) >= stats.t.ppf(0.975, degrees)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_the_standard_deviation_is_that_of_a_sample(samples: list[float]) -> None:
    assert statistics.stdev(samples) == pytest.approx(float(np.std(samples, ddof=1)), rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0, 10), min_size=10, max_size=40), st.floats(0, 100))
def test_an_interval_lies_within_the_values_and_its_two_ways_agree(samples: list[float], q: float) -> None:
    fast = statistics.bootstrap_percentile(samples, q, rounds=50)
    lists = statistics.bootstrap_percentile([[x] for x in samples], q, rounds=50)
    plain = statistics.bootstrap(samples, lambda drawn: float(np.percentile(drawn, q)), rounds=50)
    uneven = [samples[i : i + i % 3] for i in range(len(samples))]  # some without a value
    mean = statistics.bootstrap(uneven, lambda drawn: sum(drawn) / len(drawn), rounds=50)
    assert statistics.bootstrap_mean(uneven, rounds=50) == pytest.approx(mean, abs=1e-9)
    assert fast is not None and plain is not None and lists is not None
    assert min(samples) - 1e-9 <= fast[0] <= fast[1] <= max(samples) + 1e-9
    assert fast == pytest.approx(plain, abs=1e-9) and fast == pytest.approx(lists, abs=1e-9)


def test_it_is_the_same_each_time_and_absent_for_few_requests() -> None:
    samples = [float(i % 7) for i in range(30)]
    assert statistics.bootstrap_percentile(samples, 50) == statistics.bootstrap_percentile(samples, 50)
    assert statistics.bootstrap_percentile(samples[:9], 50) is None
    assert statistics.bootstrap(samples[:9], max) is None and statistics.bootstrap_mean(samples[:9]) is None
    assert statistics.bootstrap_mean([[] for _ in range(20)]) is None
    assert statistics.bootstrap_percentile([[] for _ in range(20)], 50) is None, "requests of one token have no gap"


def test_gaps_of_one_request_are_not_drawn_one_by_one() -> None:
    """40 requests of 50 gaps; what a request's gaps share scatters by 20 %, they among themselves by 5 %. Truth: a median
    of 1. Drawing requests holds it in about 95 of 100; drawing gaps, as if each told something new, in far fewer."""
    draw = np.random.default_rng(0)
    held = {"requests": 0, "gaps": 0}
    for trial in range(200):
        requests = [list(draw.normal(shared, 0.05, 50)) for shared in draw.normal(1.0, 0.2, 40)]
        for name, samples in (("requests", requests), ("gaps", list(chain.from_iterable(requests)))):
            low, high = statistics.bootstrap_percentile(samples, 50, seed=trial, rounds=100) or (math.nan, math.nan)
            held[name] += low <= 1.0 <= high
    assert held["requests"] >= 180 and held["gaps"] < 80


def test_half_a_million_gaps_take_seconds_and_not_minutes() -> None:
    draw = np.random.default_rng(0)
    requests = [list(draw.exponential(0.02, 500)) for _ in range(1000)]
    began = time.process_time()
    found = statistics.bootstrap_percentile(requests, 99, rounds=100)
    assert found is not None and found[0] < 0.02 * math.log(100) < found[1]
    assert time.process_time() - began < 10


def stopped(draw: np.random.Generator, least: int, interval: float) -> tuple[float, float]:
    """Mean and half-width where repeating stops, of repeats that scatter by 3 % around 1."""
    values = list(draw.normal(1.0, 0.03, least))
    while True:
        half = statistics.student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        if half <= interval or len(values) == 30:
            return sum(values) / len(values), half
        values.append(draw.normal(1.0, 0.03))


def test_stopping_when_narrow_costs_coverage_and_least_repeats_bound_it() -> None:
    draw = np.random.default_rng(1)
    held = {}
    for least in (3, 5):
        found = [stopped(draw, least, 0.02) for _ in range(2000)]
        held[least] = sum(abs(mean - 1) <= half for mean, half in found) / len(found)
    assert 0.87 < held[3] < held[5] and held[5] >= 0.92, held


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"interval": 0}, "interval= is a share"),
        ({"interval": 1.5}, "interval= is a share"),
        ({"interval": math.nan}, "interval= is a share"),
        ({"interval": True}, "interval= is a share"),
        ({"max_repeats": 3}, "max_repeats= takes a whole number of at least 5"),
        ({"min_repeats": 1}, "min_repeats= takes a whole number of at least 2"),
        ({"max_repeats": 7.5}, "max_repeats="),
    ],
)
def test_what_no_repeating_can_mean(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(LemError, match=words):
        lem.repeat_until(**arguments)  # type: ignore[arg-type]
