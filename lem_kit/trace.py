"""Readings over time: what the sampler writes and a record keeps.

The one idea: nothing is computed here. A trace holds readings with their instants, and for a counter also how long the call
took, so that everything that is later said about energy can be computed again from it.

Not covered: when a counter was updated (`staircase`), the energy between two instants (`curve`).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# Beside the column of a counter in a stored trace: how long each of its calls took, in ns.
TOOK = "#took_ns"


class Domain(NamedTuple):
    """What a source says of one of its domains.

    `refresh_s`: the counter is at most this old when read; None when that is unknown and must be seen from its jumps.
    `resolution_j`: smallest step. `relative_error`: half-width of the error that no repetition shows, as a fraction of the
    energy; used by models, 0 for counters, whose gain error is stated in `docs/method.md` instead. `reasons` go into every
    Energy of this domain. `label` is for people. `gauge`: the trace's gauge in watts whose integral this domain is; None
    for a counter. `means`: that gauge's values are means since the value before, and not of an instant. `limit_w`: power
    that the device cannot exceed for long; a reading that says so is not believed. `offset_w`: power that the counter counts
    beside the device's, as a calibration says. It is taken off where energy is told, and not from readings: a counter whose
    readings move with the clock has no updates.
    """

    scope: str
    method: Literal["counter", "integral", "model"]
    refresh_s: float | None = None
    resolution_j: float = 0.0
    relative_error: float = 0.0
    reasons: tuple[str, ...] = ()
    label: str = ""
    gauge: str | None = None
    means: bool = False
    limit_w: float | None = None
    offset_w: float = 0.0


@dataclass
class Series:
    """One column: instants (ns, increasing) and values. `took_ns`: how long each reading's call took, up to its instant;
    empty where calls were not timed."""

    t_ns: array[int] = field(default_factory=lambda: array("q"))
    value: array[float] = field(default_factory=lambda: array("d"))
    took_ns: array[int] = field(default_factory=lambda: array("q"))

    def append(self, t_ns: int, value: float, took_ns: int | None = None) -> None:
        t_ns, value = int(t_ns), float(value)  # before any column grows: they must stay of one length
        self.t_ns.append(t_ns)
        self.value.append(value)
        if took_ns is not None:
            self.took_ns.append(took_ns)

    def extend(self, points: Iterable[tuple[int, float]]) -> None:
        """Of untimed readings those that are later than the last one, and numbers."""
        last_ns = self.t_ns[-1] if self.t_ns else -math.inf
        for t_ns, value in points:  # fifty a second and board: not by `append`, which takes ten times as long
            if t_ns > last_ns and math.isfinite(value):
                self.t_ns.append(t_ns)
                self.value.append(value)
                last_ns = t_ns

    def between(self, start_ns: int, end_ns: int) -> Series:
        return self.part(bisect_left(self.t_ns, start_ns), bisect_right(self.t_ns, end_ns))

    def part(self, first: int, end: int) -> Series:
        """Rows from `first` to before `end`; a negative `first` counts from the end, as far as there are rows."""
        first = max(first + len(self.t_ns), 0) if first < 0 else first
        return Series(self.t_ns[first:end], self.value[first:end], self.took_ns[first:end])


@dataclass
class Trace:
    """Columns of readings: `counters` in joules keyed "source:domain", `gauges` keyed "source:domain.quantity_unit".

    `failures` are (t_ns, source or "source:domain", reason code, sentence). `period_s`: the refresh period that the sampler
    found for a counter, within `period_half_s`; `updates`: when it was updated last, as far as the sampler knows, and within
    what (ns). Only the sampler appends; a record holds a slice.
    """

    counters: dict[str, Series] = field(default_factory=dict)
    gauges: dict[str, Series] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)
    failures: list[tuple[int, str, str, str]] = field(default_factory=list)
    period_s: dict[str, float] = field(default_factory=dict)
    interval_s: float = 0.05
    period_half_s: dict[str, float] = field(default_factory=dict)
    updates: dict[str, tuple[int, int]] = field(default_factory=dict)

    def between(self, start_ns: int, end_ns: int) -> Trace:
        """A copy of what was read from `start_ns` to `end_ns`, both included."""
        return Trace(
            {key: series.between(start_ns, end_ns) for key, series in self.counters.items()},
            {key: series.between(start_ns, end_ns) for key, series in self.gauges.items()},
            dict(self.domains),
            [failure for failure in self.failures if start_ns <= failure[0] <= end_ns],
            dict(self.period_s),
            self.interval_s,
            dict(self.period_half_s),
            dict(self.updates),
        )


def gauge_summary(trace: Trace, t0_ns: int, t1_ns: int) -> Mapping[str, dict[str, Any]]:
    """Minimum, mean and maximum of each gauge inside the window; gauges without a reading there are left out."""
    summary = {}
    for key, series in trace.gauges.items():
        values = series.between(t0_ns, t1_ns).value
        if values:
            summary[key] = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
    return summary
