"""Energy between two instants: exact on known staircases, intervals that hold the truth, unknowns that stay unknown."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lem_kit.measurement import REASONS, Energy
from lem_kit.trace import Domain, Series, Trace, energy_between, gauge_summary, mean_power_w, refresh_period_s

MS = 1_000_000
SECOND = 1_000 * MS
KEY = "meter:gpu0"


def trace_of(readings: list[tuple[int, float]], domain: Domain | None = None) -> Trace:
    series = Series(array("q", [t for t, _ in readings]), array("d", [v for _, v in readings]))
    return Trace({KEY: series}, {}, {KEY: domain or Domain("gpu", "counter")}, interval_s=0.05)


def staircase(
    joules: Callable[[float], float], seconds: float, refresh_s: float = 0.1, every_s: float = 0.05, phase_s: float = 0.0
) -> Trace:
    """A counter that takes the true energy every `refresh_s` and is read every `every_s`."""
    readings = []
    for k in range(int(seconds / every_s)):
        t = k * every_s + 1e-4
        updated = math.floor((t - phase_s) / refresh_s) * refresh_s + phase_s
        readings.append((round(t * 1e9), joules(max(updated, 0.0))))
    return trace_of(readings)


def test_a_steady_load_is_exact_at_any_offset() -> None:
    trace = staircase(lambda t: 200 * t, 5, phase_s=0.03)
    assert refresh_period_s(trace.counters[KEY]) == pytest.approx(0.1)
    for start, end in ((1.0, 3.0), (1.037, 2.911), (1.5, 1.73)):
        found = energy_between(trace, KEY, round(start * 1e9), round(end * 1e9))
        assert found.joules == pytest.approx(200 * (end - start), abs=200 * 0.05)
        assert found.uncertainty_j is not None and abs((found.joules or 0) - 200 * (end - start)) <= found.uncertainty_j
        assert found.reasons == ()


def test_a_counter_of_known_age_is_exact() -> None:
    trace = trace_of([(k * 50 * MS, 3.0 * k) for k in range(41)], Domain("cpu", "counter", refresh_s=0.0, resolution_j=0.5))
    found = energy_between(trace, KEY, 500 * MS, 1_525 * MS)
    assert found.joules == pytest.approx(60 * 1.025)
    # Between two readings of a steady load only a tenth of the power is doubted: 0.1 * 60 W * 0.5 * 0.5 * 50 ms.
    assert found.uncertainty_j == pytest.approx(0.1 * 60 * 0.25 * 0.05 + 0.5)


def test_a_models_error_is_in_the_interval() -> None:
    domain = Domain("cpu", "model", refresh_s=0.0, relative_error=1.0, reasons=("modelled",))
    found = energy_between(trace_of([(k * 50 * MS, 1.0 * k) for k in range(41)], domain), KEY, 0, SECOND)
    assert found.joules == pytest.approx(20) and found.uncertainty_j == pytest.approx(20, rel=0.01)
    assert found.reasons == ("modelled",)


@pytest.mark.parametrize("period_s", [None, 0.4, 1.0, 3.0], ids=["steady", "400ms", "1s", "3s"])
def test_the_interval_holds_the_truth(period_s: float | None) -> None:
    """In at least 93 of 100 random windows, for a steady load and for square waves, counter 100 ms, read every 50 ms."""

    def joules(t: float) -> float:
        if period_s is None:
            return 250 * t
        whole, part = divmod(t, period_s)
        return (whole * 0.5 * period_s + min(part, 0.5 * period_s)) * 400 + t * 60

    draw = random.Random(0)
    held, halves, errors = 0, [], []
    for _ in range(400):
        trace = staircase(joules, 8, phase_s=draw.uniform(0, 0.1))
        start, length = draw.uniform(1, 3), draw.choice([0.23, 0.5, 1.0, 2.5])
        found = energy_between(trace, KEY, round(start * 1e9), round((start + length) * 1e9))
        assert found.joules is not None and found.uncertainty_j is not None
        error = abs(found.joules - (joules(start + length) - joules(start)))
        held += error <= found.uncertainty_j
        halves.append(found.uncertainty_j)
        errors.append(error)
    print(
        f"{period_s}: held {held / 4:.1f} %, median half-width {median(halves):.2f} J, median error {median(errors):.2f} J"
    )
    assert held >= 0.93 * 400
    assert median(halves) < 0.2 * 250, "an interval that holds everything says nothing"


UNKNOWN: dict[str, tuple[Trace, str]] = {
    "nothing was ever read": (Trace({}, {}, {KEY: Domain("gpu", "counter")}), "source_starting"),
    "the first reading came late": (trace_of([(2 * SECOND + k * 100 * MS, 5.0 * k) for k in range(20)]), "source_starting"),
    "readings end before the window": (trace_of([(k * 100 * MS, 5.0 * k) for k in range(15)]), "no_reading"),
    "a single reading": (trace_of([(SECOND, 5.0)]), "no_reading"),
    "stuck": (trace_of([(k * 100 * MS, 5.0) for k in range(40)]), "not_advancing"),
    "stuck at zero": (trace_of([(k * 100 * MS, 0.0) for k in range(40)]), "not_advancing"),
    "stuck since long before": (trace_of([(k * 50 * MS, 5.0 * min(k, 4)) for k in range(80)]), "not_advancing"),
    "went back": (trace_of([(k * 100 * MS, 5.0 * (k if k < 15 else k - 15)) for k in range(40)]), "counter_went_back"),
    "not a number": (trace_of([(k * 100 * MS, math.nan if k == 15 else 5.0 * k) for k in range(40)]), "counter_went_back"),
    "known age, no change": (
        trace_of([(k * 50 * MS, 5.0 * (k >= 70)) for k in range(80)], Domain("gpu", "counter", 0.0)), "too_short",
    ),
}  # fmt: skip
failed = trace_of([(k * 100 * MS, 5.0 * k) for k in range(15)])
failed.failures.append((1_500 * MS, "meter", "gone"))
UNKNOWN["the source failed inside"] = (failed, "source_failed")


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_is_none_with_its_reason_and_never_zero(case: str) -> None:
    trace, reason = UNKNOWN[case]
    found = energy_between(trace, KEY, SECOND, 3 * SECOND)
    assert found == (None, None, (reason,)) and reason in REASONS


def test_an_energy_cannot_be_unknown_without_a_reason() -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        Energy("a", "b", "counter", "gpu", None, None)
    with pytest.raises(ValueError, match="together"):
        Energy("a", "b", "counter", "gpu", 1.0, None)


def test_gaps_and_edges_are_named() -> None:
    readings = [(k * 50 * MS, 10.0 * (k // 2)) for k in range(81) if not 30 <= k < 60]
    assert "sampling_gap" in energy_between(trace_of(readings), KEY, SECOND, 3_500 * MS).reasons
    short = energy_between(staircase(lambda t: 200 * t, 5), KEY, 2 * SECOND, 2 * SECOND + 20 * MS)
    assert "shorter_than_refresh" in short.reasons and "unresolved" in short.reasons and short.joules
    last = trace_of([(k * 50 * MS, 10.0 * min(k // 2, 20)) for k in range(46)])
    assert "edge_extrapolated" in energy_between(last, KEY, SECOND, 2_200 * MS).reasons


@given(
    st.lists(st.floats(0.01, 50), min_size=30, max_size=60),
    st.lists(st.floats(0.2, 2.3), min_size=3, max_size=3),
    st.sampled_from([None, 0.0, 0.02]),
    st.integers(-(10**12), 10**12),
)
def test_windows_side_by_side_add_up_and_time_has_no_origin(
    steps: list[float], cuts: list[float], refresh_s: float | None, shift_ns: int
) -> None:
    a, b, c = (round(cut * 1e9) for cut in sorted(cuts))
    assume(b - a > MS and c - b > MS)
    readings, total = [], 0.0
    for k, step in enumerate(steps):
        total += step
        readings.append((k * 100 * MS, total))
    domain = Domain("gpu", "counter", refresh_s)
    trace = trace_of(readings, domain)
    parts = [energy_between(trace, KEY, *edges).joules for edges in ((a, b), (b, c), (a, c))]
    assume(None not in parts)
    assert (parts[0] or 0) + (parts[1] or 0) == pytest.approx(parts[2])
    moved = trace_of([(t + shift_ns, v) for t, v in readings], domain)
    assert energy_between(moved, KEY, a + shift_ns, c + shift_ns).joules == pytest.approx(parts[2], rel=1e-6)


def test_power_is_drawn_without_peaks_of_doubt() -> None:
    points = mean_power_w(staircase(lambda t: 200 * t, 5, phase_s=0.049), KEY)
    assert len(points) > 10 and all(watts == pytest.approx(200, rel=0.26) for _, watts in points)
    assert mean_power_w(trace_of([]), KEY) == []


def test_gauges_are_summed_up_inside_the_window() -> None:
    trace = Trace(gauges={"m:g.power_w": Series(array("q", [1, 2, 3, 9]), array("d", [1.0, 2.0, 6.0, 99.0]))})
    assert gauge_summary(trace, 1, 3) == {"m:g.power_w": {"min": 1.0, "mean": 3.0, "max": 6.0}}
    assert gauge_summary(trace, 4, 5) == {}
