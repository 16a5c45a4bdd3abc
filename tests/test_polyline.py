"""One lookup for many instants: what `energy_between` says of windows, and parts that add up."""

from __future__ import annotations

import random
from array import array

import pytest
from conftest import FakeClock
from simulated_runs import KEY, ns, steady_counter
from simulation import WAVES, Board, recorded

from lem_kit import polyline
from lem_kit.curve import energy_between
from lem_kit.trace import Domain, Series, Trace

SECOND = 1_000_000_000


@pytest.mark.parametrize("sample_s", [0.02, None], ids=["samples", "counter"])
@pytest.mark.parametrize("key", [KEY, "sim_power:gpu0"])
def test_it_gives_the_energies_of_windows(key: str, sample_s: float | None) -> None:
    clock, draw = FakeClock(), random.Random(2)
    trace = recorded(Board(WAVES["bursts"], clock, sample_s=sample_s), clock, 20)
    for _ in range(20):
        t0 = ns(103 + 5 * draw.random())
        t1 = t0 + round(draw.uniform(0.3, 8) * 1e9)
        line = polyline.between(trace, key, t0, t1)
        found = energy_between(trace, key, t0, t1)
        assert line is not None and found.joules is not None
        assert line.at(t1) - line.at(t0) == pytest.approx(found.joules, rel=1e-9)
    # Windows inside: of a counter they have knots from fits of their own; a straight line takes the place of trapezoids.
    inside = energy_between(trace, key, t0 + 10**8, t1 - 10**8)
    assert inside.joules is not None and inside.uncertainty_j is not None
    assert abs(line.at(t1 - 10**8) - line.at(t0 + 10**8) - inside.joules) < 0.5 * inside.uncertainty_j


def test_a_long_window_is_made_of_many_courses() -> None:
    clock = FakeClock()
    board = Board(WAVES["sine"], clock)
    trace = recorded(board, clock, 70)
    t0, t1 = ns(103.01), ns(168.02)
    line = polyline.between(trace, KEY, t0, t1)
    assert line is not None
    assert line.t_ns[0] < 0 and line.t_ns[-1] > t1 - t0, "from before the window to after it"
    assert line.at(t1) - line.at(t0) == pytest.approx(energy_between(trace, KEY, t0, t1).joules, abs=0.5)
    for start in range(t0, t1 - SECOND, 3 * SECOND):
        end = start + SECOND
        wide = energy_between(trace, KEY, start, end).uncertainty_j
        assert wide is not None and wide < 1.1
        assert line.at(end) - line.at(start) == pytest.approx(board.true_j(start, end), abs=wide)


def test_where_the_counter_does_not_tell_there_is_no_line() -> None:
    t = [k * SECOND // 10 for k in range(61)]
    back = [5.0 * (k if k < 30 else k - 30) for k in range(61)]
    trace = Trace(
        {KEY: Series(array("q", t), array("d", back))}, {}, {KEY: Domain("gpu", "counter"), "a:b": Domain("gpu", "counter")}
    )
    assert polyline.between(trace, KEY, SECOND, 5 * SECOND) is None
    assert polyline.between(trace, "a:b", SECOND, 5 * SECOND) is None
    still = Trace({KEY: Series(array("q", t), array("d", [1.0] * 61))}, {}, {KEY: Domain("gpu", "counter")})
    assert polyline.between(still, KEY, SECOND, 5 * SECOND) is None
    gauge = Trace({}, {"a:b.power_w": Series()}, {"a:b": Domain("gpu", "integral", gauge="a:b.power_w")})
    assert polyline.between(gauge, "a:b", SECOND, 5 * SECOND) is None
    assert polyline.between(steady_counter({KEY: 100.0}, 2), KEY, ns(103), ns(103)) is None, "no length, no energy"


def test_an_end_that_no_update_followed_is_extrapolated_as_in_a_window() -> None:
    trace = Trace({KEY: Series()}, {}, {KEY: Domain("gpu", "counter")})
    for k in range(40):
        trace.counters[KEY].append(k * SECOND // 20, 20.0 * (k // 2))  # 20 J every 100 ms
    t0, t1 = SECOND // 2 + 7, 19 * SECOND // 10 + SECOND // 25
    line, found = polyline.between(trace, KEY, t0, t1), energy_between(trace, KEY, t0, t1)
    assert line is not None and found.joules is not None
    assert line.at(t1) - line.at(t0) == pytest.approx(found.joules, rel=1e-9)
