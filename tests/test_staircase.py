"""When a counter was updated: brackets, a grid from exact numbers, knots, and no grid where there is none."""

from __future__ import annotations

import random

import pytest

from lem_kit.staircase import Bracket, Grid, Knot, brackets, fit_grid, knots, period_ns
from lem_kit.trace import Series

MS = 1_000_000
PHASE_NS, PERIOD_NS = 1_234_567_890, 100 * MS


def read_at(instants_ms: list[float], took_ms: float = 0.0, late_ms: float = 0.0) -> Series:
    """A counter of 20 J per update, updated at PHASE_NS + k * PERIOD_NS (each late by up to `late_ms`), read when each call
    ends; it tells what it found in the middle of the call."""
    series, draw = Series(), random.Random(1)
    late_ns = [draw.uniform(0, late_ms) * MS for _ in range(1000)]
    for t_ms in instants_ms:
        found = PHASE_NS + round((t_ms - took_ms / 2) * MS)
        k = (found - PHASE_NS) // PERIOD_NS
        k -= PHASE_NS + k * PERIOD_NS + late_ns[k] > found
        series.append(PHASE_NS + round(t_ms * MS), 20.0 * k, round(took_ms * MS))
    return series


def around_updates(n: int, before_ms: float, after_ms: float, took_ms: float = 0.0) -> list[float]:
    """Two calls for each of `n` updates: one ends shortly before it, one after."""
    return [100 * k + ms for k in range(1, n + 1) for ms in (-before_ms, after_ms + took_ms)]


def misplaced_ns(grid: Grid) -> float:
    """How far the grid's update nearest to the 20th true one is from it."""
    t = PHASE_NS + 20 * PERIOD_NS
    return min(abs(grid.at(grid.last_before(t) + step) - t) for step in (0, 1))


def test_a_bracket_reaches_from_the_beginning_of_one_call_to_the_end_of_the_next() -> None:
    series = Series()
    for row in ((100, 5.0, 30), (200, 5.0, 30), (300, 6.0, 40), (400, 7.0, 10)):
        series.append(*row)
    assert brackets(series) == [Bracket(2, 170, 300), Bracket(3, 260, 400)]
    series.took_ns = Series().took_ns
    assert brackets(series) == [Bracket(2, 200, 300), Bracket(3, 300, 400)]
    assert brackets(Series()) == [] and brackets(series.part(0, 2)) == []


def test_the_period_is_the_median_distance_of_changes() -> None:
    found = [Bracket(k, 100 * k, 100 * k + 10) for k in (1, 2, 3, 7)]
    assert period_ns(found) == 100 and period_ns(found[:2]) is None


def test_a_grid_is_found_to_within_what_the_brackets_leave_open() -> None:
    grid = fit_grid(brackets(read_at(around_updates(40, 1.0, 0.5))))
    assert grid is not None
    assert grid.period_ns == pytest.approx(PERIOD_NS, rel=1e-4)
    # 1 ms before each update the old value, 0.5 ms after it the new one: 1.5 ms are open, half of that to either side.
    assert grid.half_ns == pytest.approx(0.75 * MS, rel=0.02)
    assert misplaced_ns(grid) == pytest.approx(0.25 * MS, rel=0.1)


def test_calls_that_take_20_ms_still_tell() -> None:
    """What a call found is as old as its beginning at most: the bracket is wider by the call, and the grid lies in it."""
    grid = fit_grid(brackets(read_at(around_updates(40, 3.0, 1.0, took_ms=20.0), took_ms=20.0)))
    assert grid is not None
    assert grid.half_ns == pytest.approx((3 + 20 + 1 + 20) / 2 * MS, rel=0.02)
    assert misplaced_ns(grid) <= grid.half_ns


def test_a_grid_holds_the_truth_whenever_the_counter_is_read() -> None:
    """Also where calls pass over updates, so that a value may be new and yet not that of the last one."""
    found = 0
    for seed in range(40):
        draw = random.Random(seed)
        took_ms = draw.choice([0.0, 3.0, 6.0])
        instants, k = [], 1
        while k < 60:
            instants += [100 * k - draw.uniform(0, 8)] * (draw.random() < 0.4) + [100 * k + took_ms + draw.uniform(0, 8)]
            k += draw.choice([1, 1, 1, 2, 5])
        grid = fit_grid(brackets(read_at(instants, took_ms)), PERIOD_NS * 1.0002, known=draw.random() < 0.5)
        if grid is not None:
            found += 1
            assert misplaced_ns(grid) <= grid.half_ns + 0.02 * 40 * MS, seed  # 40 periods, each wrong by 0.02 ms
    assert found >= 30


def test_a_known_period_is_kept_where_the_brackets_allow_it() -> None:
    found = brackets(read_at(around_updates(40, 1.0, 1.0)))
    for period in (100.04 * MS, 99.97 * MS):
        kept = fit_grid(found, period, known=True)
        assert kept is not None and kept.period_ns == period
    other = fit_grid(found, 100.4 * MS, known=True)
    assert other is not None and other.period_ns == pytest.approx(PERIOD_NS, rel=1e-3), "what does not fit is not kept"


def test_the_phase_is_never_known_better_than_a_call_tells() -> None:
    """Nobody knows when inside a call the counter is looked at: brackets that leave less room than that show jitter."""
    for before_ms, after_ms in ((0.2, 0.2), (1.0, 0.1)):
        grid = fit_grid(brackets(read_at(around_updates(40, before_ms, after_ms))), PERIOD_NS, True, 3.0 * MS)
        assert grid is not None and grid.half_ns == pytest.approx(1.5 * MS)


def test_updates_that_do_not_keep_to_a_grid_have_none() -> None:
    jittered = read_at([k * 3.0 for k in range(1, 1500)], late_ms=60.0)
    assert fit_grid(brackets(jittered)) is None
    assert fit_grid(brackets(read_at(around_updates(3, 1, 1)))) is None, "three updates make no grid"
    assert fit_grid([]) is None


def test_one_call_in_twenty_may_tell_what_it_found_long_before_it_ended() -> None:
    series = read_at(around_updates(40, 1.0, 1.0))
    late = series.t_ns[41]  # the new value of the 21st update, said to have been there 8 ms before it
    series.t_ns[41] = late - 8 * MS
    series.t_ns[40] -= 8 * MS
    grid = fit_grid(brackets(series))
    assert grid is not None and misplaced_ns(grid) < 0.5 * MS


def test_how_often_a_counter_is_read_is_not_taken_for_its_period() -> None:
    """Read every 51 ms a counter of 100 ms seems to be updated every 102 ms, but for one update in fifty."""
    assert fit_grid(brackets(read_at([51.0 * k + 7 for k in range(1, 160)]))) is None


def test_knots_lie_on_the_grid() -> None:
    series = read_at(around_updates(40, 1.0, 1.0))
    known, grid = knots(series, None)
    assert grid is not None and [k.joules for k in known] == [20.0 * k for k in range(41)]
    for k, knot in enumerate(known):
        assert knot.t_ns == pytest.approx(PHASE_NS + k * PERIOD_NS, abs=0.2 * MS)
        assert knot.half_ns == grid.half_ns


def test_a_missed_update_leaves_out_its_knot() -> None:
    instants = [t for t in around_updates(40, 1.0, 1.0) if not 1_910 < t < 2_150]
    known, _ = knots(read_at(instants), None)
    assert [k.joules for k in known] == [20.0 * k for k in range(41) if k != 20]


def test_without_a_grid_each_update_lies_in_its_bracket() -> None:
    series = read_at([k * 3.0 for k in range(1, 1500)], late_ms=60.0)
    known, grid = knots(series, None)
    assert grid is None and len(known) > 40
    found = brackets(series)
    assert [(k.t_ns, k.half_ns) for k in known[-40:]] == [
        ((b.lo_ns + b.hi_ns) / 2, (b.hi_ns - b.lo_ns) / 2) for b in found[-40:]
    ]


def test_read_more_rarely_than_updated_only_the_age_of_a_value_is_known() -> None:
    """20 ms counter, read every 60 ms just anywhere: each value is one period old at most."""
    series, draw = Series(), random.Random(3)
    for i in range(100):
        t = round((60 * i + draw.uniform(-9, 9)) * MS)
        series.append(t, 4.0 * (t // (20 * MS)), 1 * MS)
    known, _ = knots(series, None, 0.02)
    assert len(known) == 100
    for i, knot in enumerate(known):
        true_ns = series.t_ns[i] // (20 * MS) * 20 * MS
        assert abs(knot.t_ns - true_ns) <= knot.half_ns + 1 * MS and knot.half_ns <= 11 * MS


def test_a_counter_of_known_age_needs_no_grid() -> None:
    series = Series()
    for k in range(4):
        series.append(k * 50 * MS, 20.0 * (k // 2))
    known, grid = knots(series, 0.1)
    # A value is 100 ms old at most; one that is new since 50 ms ago, 50 ms; a repetition says nothing new.
    assert grid is None and known == [Knot(-50 * MS, 50 * MS, 0.0), Knot(75 * MS, 25 * MS, 20.0)]


def test_nothing_read_and_nothing_changed_have_no_knots() -> None:
    still = Series()
    for k in range(5):
        still.append(k, 7.0)
    assert knots(Series(), None) == ([], None) and knots(still, None) == ([], None)


def test_a_value_that_may_be_of_several_updates_is_placed_by_those_around_it_or_in_doubt() -> None:
    """Calls of 20 ms that straddle every update tell nothing by themselves; one after the update tells all before it."""
    grid_phase = around_updates(20, 1.0, 1.0)
    straddling = [100 * k + 10.0 for k in range(21, 31)]
    series = Series()
    for t_ms in [*grid_phase, *straddling]:
        long = t_ms >= 2_100
        found = PHASE_NS + round((t_ms - (9.0 if long else 0.0)) * MS)  # found 1 ms after the update
        series.append(PHASE_NS + round(t_ms * MS), 20.0 * ((found - PHASE_NS) // PERIOD_NS), 20 * MS if long else 0)
    known, grid = knots(series, None)
    assert grid is not None and [k.joules for k in known] == [20.0 * k for k in range(31)]
    assert all(knot.t_ns == pytest.approx(PHASE_NS + k * PERIOD_NS, abs=0.3 * MS) for k, knot in enumerate(known))
    late = series.part(len(series.t_ns) - 10, len(series.t_ns))  # without what was before, each is one update or the next
    alone, grid = knots(late, None, 0.1)
    assert len(alone) >= 9
    for knot in alone:
        assert abs(knot.t_ns - (PHASE_NS + knot.joules / 20 * PERIOD_NS)) <= knot.half_ns + 1 * MS


def test_beside_a_known_update_a_wide_bracket_is_not_counted_wrongly() -> None:
    """It reaches over more than one update, and ends well after the last of them."""
    series = read_at([*around_updates(3, 1.0, 1.0), 1306.0, 1454.0, 1505.0, 1599.0, 1601.0])
    grid = knots(series, None, PERIOD_NS / 1e9, (PHASE_NS + 16 * PERIOD_NS, MS))[1]
    assert grid is not None and grid.period_ns == PERIOD_NS
    assert misplaced_ns(grid) <= grid.half_ns <= 1.01 * MS
