"""Readings over time: columns of one length, slices that are copies, gauges summed up."""

from __future__ import annotations

import math
from array import array

import pytest

from lem_kit.trace import Domain, Series, Trace, gauge_summary


def column(*rows: tuple[int, float]) -> Series:
    return Series(array("q", [t for t, _ in rows]), array("d", [v for _, v in rows]))


def timed(n: int) -> Series:
    """Instants 0, 10, 20, ...; values 0.0, 0.5, 1.0, ...; calls that took 1, 2, 3, ..."""
    series = Series()
    for k in range(n):
        series.append(10 * k, k / 2, k + 1)
    return series


def test_a_row_is_appended_whole_or_not_at_all() -> None:
    series = Series()
    series.append(5, 1.5, 2)
    for row in ((None, 1.0, 1), (7, None, 1), ("x", 1.0, 1)):
        with pytest.raises((TypeError, ValueError)):
            series.append(*row)  # type: ignore[arg-type]
    assert (list(series.t_ns), list(series.value), list(series.took_ns)) == ([5], [1.5], [2])
    untimed = Series()
    untimed.append(5, 1.5)
    assert list(untimed.took_ns) == []


def test_both_ends_of_a_slice_are_included_and_calls_stay_with_their_readings() -> None:
    part = timed(6).between(10, 30)
    assert (list(part.t_ns), list(part.value), list(part.took_ns)) == ([10, 20, 30], [0.5, 1.0, 1.5], [2, 3, 4])
    assert list(timed(6).between(11, 19).t_ns) == [] and list(timed(6).between(-99, 999).t_ns) == [0, 10, 20, 30, 40, 50]
    assert list(column((1, 1.0), (2, 2.0)).between(2, 9).took_ns) == []


def test_a_part_counts_rows_from_the_end_as_far_as_there_are_any() -> None:
    assert list(timed(6).part(-2, 6).t_ns) == [40, 50]
    assert list(timed(3).part(-64, 3).t_ns) == [0, 10, 20], "more than there are: all of them"
    assert list(timed(6).part(1, 3).took_ns) == [2, 3]


def test_a_slice_of_a_trace_is_a_copy_with_what_was_said_in_it() -> None:
    failures = [(t, "m", "source_failed", "gone") for t in (5, 15, 35)]
    trace = Trace(
        {"m:g": timed(6)}, {"m:g.power_w": timed(6)}, {"m:g": Domain("gpu", "counter")}, failures, {"m:g": 0.1}, 0.02
    )
    part = trace.between(10, 30)
    assert part.failures == failures[1:2] and part.domains == trace.domains
    assert (part.period_s, part.interval_s) == ({"m:g": 0.1}, 0.02)
    assert list(part.counters["m:g"].t_ns) == list(part.gauges["m:g.power_w"].t_ns) == [10, 20, 30]
    part.counters["m:g"].append(99, 9.0, 9)
    part.period_s["m:g"] = 7.0
    part.failures.clear()
    assert len(trace.counters["m:g"].t_ns) == 6 and trace.period_s == {"m:g": 0.1} and len(trace.failures) == 3


def test_gauges_are_summed_up_inside_the_window() -> None:
    trace = Trace(gauges={"m:g.power_w": column((1, 1.0), (2, 2.0), (3, 6.0), (9, 99.0))})
    assert gauge_summary(trace, 1, 3) == {"m:g.power_w": {"min": 1.0, "mean": 3.0, "max": 6.0}}
    assert gauge_summary(trace, 4, 5) == {}


def test_only_later_numbers_are_added() -> None:
    series = column((5, 1.0))
    series.extend([(4, 9.0), (5, 9.0), (6, 2.0), (6, 9.0), (7, math.nan), (8, math.inf), (9, 3.0)])
    assert (list(series.t_ns), list(series.value), list(series.took_ns)) == ([5, 6, 9], [1.0, 2.0, 3.0], [])
    empty = Series()
    empty.extend([])
    assert not empty.t_ns


def test_a_part_of_a_trace_keeps_when_counters_were_updated() -> None:
    trace = Trace({"a:b": column((1, 1.0), (9, 2.0))}, updates={"a:b": (3, 1)})
    part = trace.between(5, 20)
    trace.updates.clear()
    assert part.updates == {"a:b": (3, 1)} and list(part.counters["a:b"].t_ns) == [9]
