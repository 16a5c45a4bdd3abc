"""Quantiles and spread against a library that is trusted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem_kit.statistics import stdev, student_t

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("degrees", range(1, 31))
def test_students_t_is_the_two_sided_95_percent_quantile(degrees: int) -> None:
    assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=0.0006)


def test_beyond_the_table_it_is_a_little_wide_and_never_narrow() -> None:
    for degrees in (31, 60, 1_000_000):
        assert student_t(30) == student_t(degrees) >= stats.t.ppf(0.975, degrees)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_the_standard_deviation_is_that_of_a_sample(samples: list[float]) -> None:
    assert stdev(samples) == pytest.approx(float(np.std(samples, ddof=1)), rel=1e-6, abs=1e-6)
