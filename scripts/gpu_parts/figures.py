"""Pure functions of the check: update periods, ratios with intervals, and how often intervals hold what they should."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lem_kit import staircase
from lem_kit.statistics import stdev, student_t
from lem_kit.trace import Series


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def refresh(began_ns: Sequence[int], ended_ns: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """How often a polled value changes: number of changes, 5th, 50th and 95th percentile of their distances, and the period
    of the grid that they keep to with its doubt; ms. None where there are too few changes."""
    series = Series()
    for began, ended, value in zip(began_ns, ended_ns, values):
        series.append(ended, value, ended - began)
    found = staircase.brackets(series)
    facts: dict[str, Any] = {"changes": len(found), "p5_ms": None, "p50_ms": None, "p95_ms": None}
    if len(found) > 2:
        middles = np.array([(b.lo_ns + b.hi_ns) / 2 for b in found])
        facts.update(zip(("p5_ms", "p50_ms", "p95_ms"), (np.percentile(np.diff(middles), [5, 50, 95]) / 1e6).round(3)))
        facts = {name: None if value is None else float(value) for name, value in facts.items()}
        facts["changes"] = len(found)
    grid = staircase.fit_grid(found)
    facts["grid_ms"] = grid.period_ns / 1e6 if grid else None
    facts["grid_phase_half_ms"] = grid.half_ns / 1e6 if grid else None
    return facts


def smallest_step(values: Sequence[int]) -> int | None:
    """Greatest common divisor of all changes of a counter: the unit it counts in, or a multiple."""
    steps = np.diff(np.asarray(values, dtype=np.int64))
    steps = steps[steps > 0]
    return int(np.gcd.reduce(steps)) if len(steps) else None


def spread(samples_s: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum of call times, us."""
    p50, p95, most = (np.percentile(samples_s, [50, 95, 100]) * 1e6).round(1)
    return {"p50_us": float(p50), "p95_us": float(p95), "max_us": float(most)}


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Geometric mean of a/b over pairs, with Student's 95 % interval of the mean logarithm; None for fewer than two."""
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    if len(logs) < 2:
        return None
    mean, half = sum(logs) / len(logs), student_t(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def ratio(a: float, half_a: float, b: float, half_b: float) -> Interval:
    """a/b of two independent figures with the half-widths of their intervals, to first order."""
    value = a / b
    half = abs(value) * math.hypot(half_a / a, half_b / b)
    return Interval(value, value - half, value + half, 2)


Calls = Sequence[tuple[int, int]]  # began, ended


def delays_s(tokens_ns: Sequence[int], calls_ns: Calls, others_ns: Calls = (), beside: int = 1) -> list[float]:
    """How much longer the steps that a call met took, together, than as many of the mean of the `beside` steps before and
    after them; of calls with neighbours that met no other call, nor one of `others_ns`, nor they themselves one of these.
    Neighbours share what drifts on a host, so that little of it is left."""
    edges = np.asarray(tokens_ns, dtype=np.int64)
    took = np.diff(edges) / 1e9

    def met(calls: Calls) -> Any:
        """Of each call the first and the last step: -1 before the first token, len(took) after the last."""
        return np.searchsorted(edges, np.asarray(calls, dtype=np.int64).reshape(-1, 2), side="right") - 1

    def times_met(calls: Calls) -> Any:
        """Of each step the number of calls."""
        first, last = met(calls).T + 1
        changes = np.zeros(len(took) + 3, dtype=np.int64)
        np.add.at(changes, first, 1)
        np.add.at(changes, last + 1, -1)
        return np.cumsum(changes)[1 : len(took) + 1]

    here, there = times_met(calls_ns), times_met(others_ns)
    found = []
    for first, last in met(calls_ns):
        before, after = slice(first - beside, first), slice(last + 1, last + 1 + beside)
        if first < beside or last + beside >= len(took) or here[before].any() or here[after].any():
            continue
        if (here[first : last + 1] > 1).any() or there[first - beside : last + 1 + beside].any():
            continue
        steps = took[first : last + 1]
        found.append(float(steps.sum() - len(steps) * (took[before].mean() + took[after].mean()) / 2))
    return found


def call_delay_s(
    tokens_ns: Iterable[Sequence[int]], calls_ns: Calls, apart_ns: int = 20_000_000, beside: int = 1
) -> Interval | None:
    """By how much a call lengthens the steps that it meets, with its 95 % interval; None for fewer than two such calls.

    A long step meets a call more easily than a short one. So the same is asked about calls that never were, half-way between
    those that were, and their mean is subtracted."""
    never = []
    for (began, ended), (following, _) in itertools.pairwise(calls_ns):
        if following - ended > ended - began + apart_ns:
            middle, half = (ended + following) // 2, (ended - began) // 2
            never.append((middle - half, middle + half))
    real, unreal = [], []
    for tokens in tokens_ns:
        real += delays_s(tokens, calls_ns, beside=beside)
        unreal += delays_s(tokens, never, calls_ns, beside)
    if min(len(real), len(unreal)) < 2:
        return None
    value = sum(real) / len(real) - sum(unreal) / len(unreal)
    half_s = 1.96 * math.hypot(stdev(real) / math.sqrt(len(real)), stdev(unreal) / math.sqrt(len(unreal)))
    return Interval(value, value - half_s, value + half_s, len(real))


def detrended(values: Sequence[float]) -> list[float]:
    """The values without the straight line through them, at their mean: a slow drift is no error of the meter."""
    y = np.asarray(values, dtype=float)
    if len(y) < 3:
        return [float(v) for v in y]
    x = np.arange(len(y)) - (len(y) - 1) / 2
    return [float(v) for v in y - x * (x @ y) / (x @ x)]


def covered(values: Sequence[float], half_widths: Sequence[float], reference: float) -> dict[str, Any]:
    """How often value +- half-width holds `reference`: share with Wilson's 95 % interval; standard deviation and median
    half-width in percent of the reference; and the root mean square of error / half-width, times 1.96: 1 where half-widths
    are as wide as errors are large, less where they are wider."""
    n = len(values)
    errors = np.abs(np.asarray(values) - reference)
    half = np.asarray(half_widths)
    inside = int((errors <= half).sum())
    z = 1.96
    centre = (inside + z * z / 2) / (n + z * z)
    reach = z / (n + z * z) * math.sqrt(inside * (n - inside) / n + z * z / 4)
    return {
        "windows": n,
        "inside": inside,
        "share": inside / n,
        "share_low": max(0.0, centre - reach),
        "share_high": min(1.0, centre + reach),
        "sd_percent": 100 * stdev(list(values)) / reference if n > 1 else None,
        "worst_percent": float(100 * errors.max() / reference),
        "half_width_percent": float(100 * np.median(half) / reference),
        "rms_error_over_sigma": float(1.96 * np.sqrt(np.mean((errors / half) ** 2))),
    }
