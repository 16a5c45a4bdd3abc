"""Steady state: exact on plans drawn by hand, and its algebra on any."""

from __future__ import annotations

import dataclasses
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
from lem_kit.trace import Series, Trace

MS, SECOND = 1_000_000, 1_000_000_000


def stay(start: int, end: int, events: Sequence[tuple[int, int]] = (), error: str | None = None) -> Completion:
    """In ms."""
    return Completion(start * MS, start * MS, end * MS, tuple((t * MS, n) for t, n in events), 1, error=error)


def test_the_phases_of_a_run_with_a_ramp_and_a_drain() -> None:
    # One request every 100 ms until four are at work, replaced until 2000 ms, then ending one by one.
    plan = [stay(0, 1000), stay(100, 1100), stay(200, 1200), stay(300, 2000), stay(1000, 2100), stay(1100, 2200)]
    plan += [stay(1200, 2300)]
    phases = steady.phases_of_run(plan)
    assert phases == (0, 300 * MS, 2000 * MS, 2300 * MS, 4, steady.BY_REQUESTS)
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
    assert steady.phases_of_run(seamless, bridge_s=0)[:5] == (0, 0, 1000 * MS, 1000 * MS, 1), "never two at once"  # type: ignore[index]


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


def logged(*rows: tuple[int, int, int]) -> steady.StepLog:
    """Rows of (ms, requests in the batch, waiting)."""
    t_ns = array("q", [t * MS for t, _, _ in rows])
    batch, waiting = (Series(t_ns, array("d", [row[k] for row in rows])) for k in (1, 2))
    return steady.StepLog(batch, waiting)


# Six requests at once for two places. The first step has one of them, for the others were on their way; the batch is full
# from then on until the fifth has ended.
QUEUED = [stay(0, end, [(end, 3)]) for end in (100, 100, 200, 200, 300, 350)]
PLACES = logged((50, 1, 0), (100, 2, 4), (150, 2, 2), (200, 2, 2), (250, 2, 0), (300, 2, 0), (350, 1, 0))


def test_a_queue_in_the_engine_is_no_work_and_its_full_batch_is_the_full_load() -> None:
    found = steady.phases_of_run(QUEUED, steps=PLACES)
    assert found == (0, 50 * MS, 300 * MS, 350 * MS, 2, steady.BY_STEPS)
    assert steady.phases_of_run(QUEUED) == (0, 0, 100 * MS, 350 * MS, 6, steady.BY_REQUESTS), "six of six, while there were"
    assert steady.phases_of_run(QUEUED, share=0.5, steps=PLACES)[:5] == (0, 0, 350 * MS, 350 * MS, 2)  # type: ignore[index]
    assert steady.output_tokens_per_s(QUEUED, steps=PLACES) == pytest.approx(5 * 3 / 0.25)
    later = [dataclasses.replace(c, dispatch_ns=c.dispatch_ns + 400 * MS, done_ns=c.done_ns + 400 * MS) for c in QUEUED]
    twice = logged((-10, 9, 9), (0, 9, 9), *rows_of(PLACES), *rows_of(PLACES, 400), (760, 9, 9))
    assert steady.phases_of_run(QUEUED, steps=twice) == found, "steps before, after and at the begin are not of this repeat"
    assert steady.steady_window(later, steps=twice) == (450 * MS, 700 * MS)


def rows_of(log: steady.StepLog, later_ms: int = 0) -> list[tuple[int, int, int]]:
    return [
        (t // MS + later_ms, int(batch), int(waiting))
        for t, batch, waiting in zip(log.batch.t_ns, log.batch.value, log.waiting.value)
    ]


def test_a_place_that_is_empty_until_the_next_request_is_there_is_no_end_of_the_full_load() -> None:
    """A closed loop of two. Steps of 30 ms: a request that follows one misses the step that has begun, and the batch is one
    short for longer than any bridge."""
    loop = [stay(0, 90), stay(0, 150), stay(91, 210), stay(151, 270)]
    short = logged((30, 2, 0), (60, 2, 0), (90, 2, 0), (120, 1, 0), (150, 2, 0), (180, 1, 0), (210, 2, 0), (240, 1, 0))
    assert steady.phases_of_run(loop, steps=short) == (0, 0, 210 * MS, 270 * MS, 2, steady.BY_STEPS)


def test_requests_that_the_engine_took_out_of_its_batch_are_not_at_work() -> None:
    four = [stay(0, 300), stay(0, 300), stay(0, 340), stay(0, 400)]
    squeezed = logged((100, 4, 0), (200, 2, 2), (300, 2, 2), (340, 2, 0), (400, 1, 0))
    assert steady.phases_of_run(four, steps=squeezed) == (0, 0, 100 * MS, 400 * MS, 4, steady.BY_STEPS)
    assert steady.phases_of_run(four)[:5] == (0, 0, 300 * MS, 400 * MS, 4)  # type: ignore[index]
    assert steady.steady_window(four, share=0.5, steps=squeezed) == (0, 340 * MS)


def test_a_log_that_is_not_of_these_requests_or_empty_changes_nothing() -> None:
    for log in (logged(), logged((500, 2, 0)), logged((50, 0, 0), (100, 0, 6)), logged((50, 64, 0), (100, 64, 9))):
        assert steady.phases_of_run(QUEUED, steps=log) == steady.phases_of_run(QUEUED)
    gauges = {"e:engine.batch_requests": PLACES.batch, "a:g.temperature_c": PLACES.waiting}
    assert steady.step_log(Trace(gauges=gauges)) is None and steady.step_log(Trace()) is None, "it does not tell who waited"
    gauges["e:engine.waiting_requests"] = PLACES.waiting
    assert steady.step_log(Trace(gauges=gauges)) == PLACES
    assert steady.step_log(Trace(gauges=gauges).between(60 * MS, 210 * MS)) == PLACES.between(60 * MS, 210 * MS)
    assert steady.step_log(Trace(gauges=dict.fromkeys(gauges, Series()))) is None


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


@given(STAYS, st.integers(1, 4), st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_with_a_log_it_is_the_longest_time_with_a_full_batch(
    asked: list[tuple[int, int]], places: int, share: float
) -> None:
    """An engine that serves in order of arrival, step by step of a millisecond; nobody is on the way for any time."""
    at_work: list[list[int]] = []  # per step: who is in the batch; then the number of those who wait
    waits: list[int] = []
    left = dict(enumerate(length for _, length in asked))
    ends = {}
    in_order = sorted(left, key=lambda i: asked[i][0])
    while left:
        there = [i for i in in_order if i in left and asked[i][0] <= len(at_work)]
        at_work.append(there[:places])
        waits.append(len(there[places:]))
        for i in at_work[-1]:
            left[i] -= 1
            if not left[i]:
                del left[i]
                ends[i] = len(at_work)
    plan = [stay(asked[i][0], ends[i]) for i in ends]
    log = logged(*((k + 1, len(batch), n) for k, (batch, n) in enumerate(zip(at_work, waits))))
    found = steady.phases_of_run(plan, share, bridge_s=0, steps=log)
    peak = max(map(len, at_work))
    assert found is not None and (found.peak, found.method) == (peak, steady.BY_STEPS)
    full = [len(batch) >= share * peak for batch in at_work]
    longest = max(len(list(group)) for is_full, group in itertools.groupby(full) if is_full)
    assert found.drain_ns - found.steady_ns == longest * MS
    assert all(full[found.steady_ns // MS : found.drain_ns // MS])
    without = steady.phases_of_run(plan, share, bridge_s=0)
    assert without is not None and (found.begin_ns, found.end_ns) == (without.begin_ns, without.end_ns)
    assert any(waits) or found[:5] == without[:5], "without a queue the log changes nothing"


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
