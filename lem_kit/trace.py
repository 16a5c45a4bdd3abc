"""Readings over time, and the energy between two instants with its uncertainty.

The one idea: a hardware counter is a staircase. It stands still, then jumps by the energy of the last refresh period. A
reading tells its value, but not when it was last updated, so readings are first turned into *knots*: values with the
interval of time in which the counter took them. The energy at any instant is interpolated between knots, and the knots
around a window's two edges say how wrong that may be.

Not covered: gain and offset errors of the sensor itself, which no software can see (about 5 %, up to 13 % on some GPU
boards: Yang et al., "Accurate and Convenient Energy Measurements for GPUs", SC24), and delay inside the sensor.
"""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, NamedTuple

# How much of a trace around a window is looked at for its energy. Bounds the work for one repetition of a long window.
NEARBY_NS = 10_000_000_000


class Domain(NamedTuple):
    """What a source says of one of its domains.

    `refresh_s`: the counter is at most this old when read; None when that is unknown and must be seen from its jumps.
    `resolution_j`: smallest step. `relative_error`: half-width of the error that no repetition shows, as a fraction of the
    energy; used by models, 0 for counters, whose gain error is stated in `docs/method.md` instead. `reasons` go into every
    Energy of this domain. `label` is for people.
    """

    scope: str
    method: Literal["counter", "integral", "model"]
    refresh_s: float | None = None
    resolution_j: float = 0.0
    relative_error: float = 0.0
    reasons: tuple[str, ...] = ()
    label: str = ""


@dataclass
class Series:
    """One column: instants (ns, increasing) and values."""

    t_ns: array[int] = field(default_factory=lambda: array("q"))
    value: array[float] = field(default_factory=lambda: array("d"))

    def append(self, t_ns: int, value: float) -> None:
        t_ns, value = int(t_ns), float(value)  # before either column grows: they must stay of one length
        self.t_ns.append(t_ns)
        self.value.append(value)

    def between(self, start_ns: int, end_ns: int) -> Series:
        lo, hi = bisect_left(self.t_ns, start_ns), bisect_right(self.t_ns, end_ns)
        return Series(self.t_ns[lo:hi], self.value[lo:hi])


@dataclass
class Trace:
    """Columns of readings: `counters` in joules keyed "source:domain", `gauges` keyed "source:domain.quantity_unit".

    `failures` are (t_ns, source or "source:domain", sentence). Only the sampler appends; a record holds a slice.
    """

    counters: dict[str, Series] = field(default_factory=dict)
    gauges: dict[str, Series] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    interval_s: float = 0.05

    def between(self, start_ns: int, end_ns: int) -> Trace:
        """A copy of what was read from `start_ns` to `end_ns`, both included."""
        return Trace(
            {key: series.between(start_ns, end_ns) for key, series in self.counters.items()},
            {key: series.between(start_ns, end_ns) for key, series in self.gauges.items()},
            dict(self.domains),
            [failure for failure in self.failures if start_ns <= failure[0] <= end_ns],
            self.interval_s,
        )


class Knot(NamedTuple):
    """The counter took `joules` at some instant in (t_ns - half_ns, t_ns + half_ns]."""

    t_ns: float
    half_ns: float
    joules: float


def knots(series: Series, refresh_s: float | None) -> list[Knot]:
    """The instants at which the counter is known to have been updated.

    With a known refresh period every reading is one, at most that period old; but a value that has not changed for less
    than that period is no news, since it may be the old one still. Without, only a *change* of value tells that an update
    happened since the reading before; the first reading then becomes a knot one median period before the first change, if
    that is where it must have been.
    """
    t, v = series.t_ns, series.value
    if refresh_s is not None:
        refresh_ns = refresh_s * 1e9
        known: list[Knot] = []
        told = 0  # the reading of the latest knot
        for i in range(len(t)):
            changed = i > 0 and v[i] != v[i - 1]
            if i == 0 or changed or t[i] - t[told] >= refresh_ns:
                half_ns = min(refresh_ns, t[i] - t[i - 1]) / 2 if changed else refresh_ns / 2
                known.append(Knot(t[i] - half_ns, half_ns, v[i]))
                told = i
        return known
    found = [Knot((t[i] + t[i - 1]) / 2, (t[i] - t[i - 1]) / 2, v[i]) for i in range(1, len(t)) if v[i] != v[i - 1]]
    if len(found) >= 3:
        before = found[0].t_ns - _period_ns(found)
        if before < t[0]:
            found.insert(0, Knot(before, found[0].half_ns, v[0]))
    return found


def _period_ns(found: list[Knot]) -> float:
    return median(b.t_ns - a.t_ns for a, b in itertools.pairwise(found))


def refresh_period_s(series: Series) -> float | None:
    """Median time between the counter's changes, in seconds; None if it changed fewer than three times."""
    found = knots(series, None)
    return _period_ns(found) / 1e9 if len(found) >= 3 else None


class Between(NamedTuple):
    """`joules` and `uncertainty_j` are None together, and then `reasons` (codes of `measurement.REASONS`) says why."""

    joules: float | None
    uncertainty_j: float | None
    reasons: tuple[str, ...]


def energy_between(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> Between:
    """Energy in joules that counter `key` saw from `t0_ns` to `t1_ns`, with the half-width of its 95 % interval in joules.

        E(t)  = interpolated between the knots on either side of t
        u(t)  = sqrt(shape^2 + timing^2)         for each edge of the window
        shape = spread * f * (1 - f) * T         T: time between the two knots, f: how far t lies between them
        timing = P * ((1 - f) * h_a + f * h_b)   P: mean power between them, h: half-widths of their instants
        n     = sqrt(u(t0)^2 + u(t1)^2) + resolution
        u     = sqrt(n^2 + (relative_error * E)^2)

    `spread` is the range of the mean powers between the nearest knots plus a tenth of P: a load that switches between two
    powers a and b inside one refresh period makes interpolation wrong by at most |a - b| f (1 - f) T. The two half-widths
    are added as they are, since readings that slowly drift against the counter's updates miss both by the same.
    A load that varies so fast that its powers do not show between knots can exceed the interval: of windows over square
    waves of 1.2 to 2 refresh periods it holds the truth in 30 to 90 %, the less the finer the readings.
    """
    domain = trace.domains[key]
    series = trace.counters.get(key, Series()).between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)
    t = series.t_ns
    if not t or t[0] > t0_ns + trace.interval_s * 1e9:
        return _unknown("source_failed" if _failed_outside(trace, key, t) else "source_starting")
    if t[-1] < t1_ns:
        return _unknown("source_failed" if _failed_outside(trace, key, t) else "no_reading")
    first, last = max(bisect_right(t, t0_ns) - 1, 0), bisect_left(t, t1_ns)
    stamps = [t0_ns, *t[first + 1 : last], t1_ns]
    rising = _rising(series, first, last)
    if rising is None:
        return _unknown("counter_went_back")

    found = knots(rising, domain.refresh_s)
    if len(found) < 2 or found[-1].joules == found[0].joules:
        return _unknown("not_advancing")
    period_ns = _period_ns(found)
    edges = [_at(found, t, period_ns) for t in (t0_ns, t1_ns)]
    if edges[0] is None or edges[1] is None:
        return _unknown("not_advancing")
    joules = edges[1].joules - edges[0].joules
    if joules <= 0.0:  # hardware that runs uses energy: no change means that the counter did not tell
        return _unknown("too_short")
    reasons = list(domain.reasons)
    if edges[0].extrapolated or edges[1].extrapolated:
        reasons.append("edge_extrapolated")
    if t1_ns - t0_ns < (period_ns if domain.refresh_s is None else domain.refresh_s * 1e9):
        reasons.append("shorter_than_refresh")
    gap_ns = max(10 * trace.interval_s * 1e9, 2 * period_ns)
    if any(b - a > gap_ns for a, b in itertools.pairwise(stamps)):
        reasons.append("sampling_gap")
    noise = math.hypot(edges[0].u_j, edges[1].u_j) + domain.resolution_j
    if noise > joules:
        reasons.append("unresolved")
    uncertainty = math.hypot(noise, domain.relative_error * joules)
    return Between(joules, uncertainty, tuple(reasons))


def _unknown(reason: str) -> Between:
    return Between(None, None, (reason,))


def _failed_outside(trace: Trace, key: str, t: array[int]) -> bool:
    """Whether the source said that it failed while it gave none of the readings `t`."""
    names = (key, key.partition(":")[0])
    return any(name in names and not (t and t[0] <= when <= t[-1]) for when, name, _ in trace.failures)


def _rising(series: Series, first: int, last: int) -> Series | None:
    """The readings around those from `first` to `last` as far as the counter only rose; None if it did not between them.

    What a counter did before a reset must not speak for the window after it.
    """
    v = series.value
    breaks = [i for i in range(1, len(v)) if not (v[i - 1] <= v[i] and math.isfinite(v[i] - v[i - 1]))]
    if any(first < i <= last for i in breaks):
        return None
    start = max((i for i in breaks if i <= first), default=0)
    end = min((i for i in breaks if i > last), default=len(v))
    return Series(series.t_ns[start:end], v[start:end])


class _Edge(NamedTuple):
    joules: float
    u_j: float
    extrapolated: bool = False


def _at(found: list[Knot], t_ns: int, period_ns: float) -> _Edge | None:
    """Energy at an instant; None where the counter stood still for three periods, so that it cannot be told."""
    times = [knot.t_ns for knot in found]
    k = bisect_right(times, t_ns) - 1
    nearby = range(max(k - 3, 0), min(k + 4, len(found) - 1))
    powers = [_power(found[i], found[i + 1]) for i in nearby] or [_power(found[-2], found[-1])]
    if k < 0 or k == len(found) - 1:
        knot, power = (found[0], powers[0]) if k < 0 else (found[-1], powers[-1])
        distance_ns = t_ns - knot.t_ns
        if abs(distance_ns) > 3 * period_ns + 2 * knot.half_ns:
            return None
        reach = abs(distance_ns) + knot.half_ns
        # Within the age of a reading there is nothing to extrapolate: the counter is as fresh as it gets.
        return _Edge(knot.joules + power * distance_ns, max(powers) * reach, abs(distance_ns) > 2 * knot.half_ns)
    a, b = found[k], found[k + 1]
    length_ns = b.t_ns - a.t_ns
    f = (t_ns - a.t_ns) / length_ns
    power = _power(a, b)
    spread = max(powers) - min(powers) + 0.1 * power
    shape = spread * f * (1 - f) * length_ns
    timing = power * ((1 - f) * a.half_ns + f * b.half_ns)
    return _Edge(a.joules + f * (b.joules - a.joules), math.hypot(shape, timing))


def _power(a: Knot, b: Knot) -> float:
    return (b.joules - a.joules) / (b.t_ns - a.t_ns)


def mean_power_w(trace: Trace, key: str) -> list[tuple[int, float]]:
    """Power as the counter shows it: (t_ns, watts) at the middle of each pair of knots.

    When an update was only seen to happen between two readings, a knot is passed over until the pair is four times as far
    apart as the doubt about its instants; otherwise that doubt would be drawn as peaks of power. Where the counter went back
    there is no power.
    """
    found = knots(trace.counters[key], trace.domains[key].refresh_s)
    points: list[tuple[int, float]] = []
    if not found:
        return points
    a = found[0]
    for b in found[1:]:
        if not b.joules >= a.joules:  # also when one of them is not a number
            a = b
        elif b.t_ns > a.t_ns and b.t_ns - a.t_ns >= 4 * (a.half_ns + b.half_ns):
            points.append((int((a.t_ns + b.t_ns) / 2), _power(a, b) * 1e9))
            a = b
    return points


def gauge_summary(trace: Trace, t0_ns: int, t1_ns: int) -> Mapping[str, dict[str, Any]]:
    """Minimum, mean and maximum of each gauge inside the window; gauges without a reading there are left out."""
    summary = {}
    for key, series in trace.gauges.items():
        values = series.between(t0_ns, t1_ns).value
        if values:
            summary[key] = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
    return summary
