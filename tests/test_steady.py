"""Steady state: exact on plans drawn by hand, and its algebra on any."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem_kit import steady
from lem_kit.errors import LemError
from lem_kit.measurement import Completion
from lem_kit.trace import Series

MS, SECOND = 1_000_000, 1_000_000_000


def stay(start: int, end: int, events: Sequence[tuple[int, int]] = (), error: str | None = None) -> Completion:
    """In ms."""
    return Completion(start * MS, start * MS, end * MS, tuple((t * MS, n) for t, n in events), 1, error=error)


def test_the_phases_of_a_run_with_a_ramp_and_a_drain() -> None:
    # One request every 100 ms until four are at work, replaced until 2000 ms, then ending one by one.
    plan = [stay(0, 1000), stay(100, 1100), stay(200, 1200), stay(300, 2000), stay(1000, 2100), stay(1100, 2200)]
    plan += [stay(1200, 2300)]
    phases = steady.phases_of_run(plan)
    assert phases == (0, 300 * MS, 2000 * MS, 2300 * MS, 4)
    assert phases is not None and list(phases.spans) == ["ramp", "steady", "drain"]
    assert phases.spans["drain"] == (2000 * MS, 2300 * MS)
    assert steady.steady_window(plan, share=0.75) == (200 * MS, 2100 * MS)
    assert steady.steady_window(plan, share=0.1) == (0, 2300 * MS)
    assert steady.steady_window(reversed(plan)) == (300 * MS, 2000 * MS)


def test_a_closed_loops_dips_do_not_end_its_steady_state() -> None:
    loop = [stay(0, 500), stay(505, 1000), stay(1003, 1500)]
    assert steady.steady_window(loop) == (0, 1500 * MS)
    assert steady.steady_window(loop, bridge_s=0.004) == (505 * MS, 1500 * MS)
    assert steady.steady_window(loop, bridge_s=0) in ((0, 500 * MS), (505 * MS, 1000 * MS), (1003 * MS, 1500 * MS))
    seamless = [stay(0, 500), stay(500, 1000)]
    assert steady.phases_of_run(seamless, bridge_s=0) == (0, 0, 1000 * MS, 1000 * MS, 1), "never two at once"


def test_a_run_without_requests_has_no_phases() -> None:
    assert steady.phases_of_run([]) is None and steady.steady_window([]) is None and steady.output_tokens_per_s([]) is None
    for share in (0, -0.1, 1.1, math.nan):
        with pytest.raises(LemError, match="above 0 and at most 1"):
            steady.phases_of_run([stay(0, 1)], share)


def test_tokens_count_where_they_came() -> None:
    # Two at work from 100 to 500 ms; of six and four tokens, five and two came in that time.
    plan = [stay(0, 500, [(90, 1), (200, 2), (500, 3)]), stay(100, 700, [(300, 2), (501, 1), (700, 1)])]
    assert steady.steady_window(plan) == (100 * MS, 500 * MS)
    assert steady.output_tokens_between(plan, 100 * MS, 500 * MS) == 7
    assert steady.output_tokens_per_s(plan) == pytest.approx(7 / 0.4)
    assert steady.output_tokens_between(plan, 200 * MS, 300 * MS) == 2, "a token at the start was made before it"
    failed = [stay(0, 500, [(90, 1), (200, 2)], error="oh")]
    assert steady.output_tokens_between(failed, 0, 500 * MS) == 3, "tokens that were made were made"


STAYS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=12)


@given(STAYS, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_the_steady_state_is_the_longest_time_at_full_load(pairs: list[tuple[int, int]], share: float) -> None:
    phases = steady.phases_of_run([stay(a, a + b) for a, b in pairs], share, bridge_s=0)
    assert phases is not None
    level = [sum(a <= t < a + b for a, b in pairs) for t in range(100)]  # concurrency in each millisecond
    full = [n >= share * max(level) for n in level]
    longest = max(len(list(group)) for is_full, group in itertools.groupby(full) if is_full)
    assert phases.peak == max(level)
    assert phases.drain_ns - phases.steady_ns == longest * MS
    assert all(full[phases.steady_ns // MS : phases.drain_ns // MS])
    assert phases.begin_ns <= phases.steady_ns < phases.drain_ns <= phases.end_ns


@given(STAYS, st.lists(st.integers(0, 100), max_size=4))
def test_adjacent_spans_share_no_token_and_lose_none(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    plan = [stay(a, a + b, [(t, 1 + t % 3) for t in range(a + 1, a + b + 1, 2)]) for a, b in pairs]
    edges = sorted({-1, 101, *cuts})
    parts = [steady.output_tokens_between(plan, a * MS, b * MS) for a, b in itertools.pairwise(edges)]
    assert sum(parts) == sum(c.output_tokens for c in plan)


def test_settled_means_neither_scatter_nor_slope() -> None:
    flat = [0.1 + 0.001 * (-1) ** k for k in range(10)]
    assert steady.settled(flat) and steady.settled([9.0, 5.0, *flat]), "only the latest count"
    assert not steady.settled(flat[:9]) and steady.settled(flat[:9], window=9)
    assert not steady.settled([0.1, 0.2] * 5), "scatter"
    rising = [1 + 0.01 * k for k in range(10)]  # 8.6 % from first to last, with a cv of 2.9 %
    assert not steady.settled(rising) and steady.settled(rising, most_slope=0.09)
    assert not steady.settled(rising, most_slope=0.08) and not steady.settled(rising, most_slope=0.09, most_cv=0.028)
    for nothing in ([], [0.0] * 10, [math.nan] * 10, [-1.0] * 10):
        assert not steady.settled(nothing)


def gauge(*points: tuple[float, float]) -> Series:
    return Series(array("q", [round(t * SECOND) for t, _ in points]), array("d", [v for _, v in points]))


def test_drifting_is_a_slope_over_the_last_seconds() -> None:
    warming = gauge(*[(t, 40 + 0.5 * t) for t in range(21)])
    assert steady.drifting(warming, 0.4) is True and steady.drifting(warming, 0.6) is False
    cooling = gauge(*[(t, 90 - 0.5 * t) for t in range(21)])
    assert steady.drifting(cooling, 0.4) is True
    then_flat = gauge(*[(t, min(60.0, 40 + 2.0 * t)) for t in range(31)])
    assert steady.drifting(then_flat, 0.01) is False and steady.drifting(then_flat, 0.01, over_s=30) is True
    assert steady.drifting(gauge(), 1) is None and steady.drifting(gauge((0, 1), (9, 1)), 1) is None
    assert steady.drifting(gauge((0, 1), (1, 1), (4.9, 1)), 1) is None, "less than half of ten seconds"
    assert steady.drifting(gauge((0, 1), (1, 1), (5, 1)), 1) is False


@given(st.floats(-5, 5), st.floats(-100, 100), st.lists(st.floats(0, 1000), min_size=2, max_size=20, unique=True))
def test_the_line_through_points_of_a_line_is_that_line(slope: float, start: float, x: list[float]) -> None:
    if max(x) - min(x) > 0.01:
        assert steady.slope_of(x, [start + slope * t for t in x]) == pytest.approx(slope, abs=1e-6)
