"""The course of energy around the two edges of a window: where a counter stood at an instant between its updates.

The one idea: between two knots of a counter the energy is known but not its course. The course is taken from power samples
where they are dense enough, scaled so that each cell keeps the counter's energy; else from the mean powers of the cells
around it. How far samples and counter differ from cell to cell tells what both leave out.

Not covered: when the counter was updated (`staircase`), windows and their reasons (`curve`).
"""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .staircase import Grid, Knot, knots
from .trace import Series, Trace

# How much of a trace around an edge is looked at for its knots. Bounds the work for one repetition of a long window.
NEARBY_NS = 3_000_000_000
# Power samples shape a cell when at least this many of them lie in it.
DENSE = 3
# Fewer cells than this tell nothing about how far counter and samples differ.
LEAST_CELLS = 8
# How far samples of power and updates of the counter may be apart in time.
LAG_NS = 3_000_000
# What 95 % of all grids that the brackets allow stay below, as a part of the most that they allow.
MOST_LIKELY = 0.95


class Edge(NamedTuple):
    """Energy at an instant. `shape_j`: doubt about the course around it; `timing_ns`: doubt about when the knots were;
    `powers`: lowest and highest power (J/ns) that such a shift may count at this edge."""

    joules: float
    shape_j: float
    timing_ns: float
    powers: tuple[float, float]
    extrapolated: bool = False


class Course:
    """The energy of one counter around a window: knots near each edge, and what shapes the cells between them."""

    def __init__(self, trace: Trace, key: str, series: Series, t0_ns: int, t1_ns: int) -> None:
        domain = trace.domains[key]
        spans = [(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)]
        if t1_ns - t0_ns > 4 * NEARBY_NS:  # the two ends of a long window know nothing of each other
            spans = [(t - NEARBY_NS, t + NEARBY_NS) for t in (t0_ns, t1_ns)]
        self._middle = (t0_ns + t1_ns) / 2 if len(spans) == 2 else math.inf
        self._sides: list[tuple[list[Knot], Grid | None]] = []
        for start, end in spans:
            self._sides.append(knots(series.between(start, end), domain.refresh_s, trace.period_s.get(key)))
        gaps = [b.t_ns - a.t_ns for found, _ in self._sides for a, b in itertools.pairwise(found)]
        grid = self._sides[0][1]
        self.period_ns = grid.period_ns if grid else median(gaps) if gaps else 0.0
        self._edges_ns = (t0_ns, t1_ns)
        if domain.refresh_s is not None:
            self.period_ns = max(self.period_ns, domain.refresh_s * 1e9)
        gauge = trace.gauges.get(f"{key}.power_w", Series()).between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)
        self._samples = Samples(gauge)
        self.unexplained_j, self._unexplained_ns = self._disagreement()

    def _disagreement(self) -> tuple[float, float]:
        """How far samples and counter differ from cell to cell beyond what the shapes of the pieces allow: updates that come
        out of time, and a course too quick for the samples. In J as the root of the mean square; and in ns, at the power of
        the cell, what half of the cells stay below, as a standard deviation."""
        samples = self._samples
        if len(samples.t_ns) < DENSE:
            return 0.0, 0.0
        rows = []
        for every, _ in self._sides:
            surest = median(knot.half_ns for knot in every) if every else 0.0
            found = [knot for knot in every if knot.half_ns <= 2 * surest]
            sums = [(samples.sum_to(knot.t_ns), (samples.around(int(knot.t_ns))[1] / 1.96) ** 2) for knot in found]
            for (a, b), (before, after) in zip(itertools.pairwise(found), itertools.pairwise(sums)):
                if self._dense(a, b):
                    rows.append((b.joules - a.joules, b.t_ns - a.t_ns, after[0] - before[0], before[1] + after[1]))
        total = sum(whole for _, _, whole, _ in rows)
        if len(rows) < LEAST_CELLS or total <= 0.0:
            return 0.0, 0.0
        scale = sum(joules for joules, _, _, _ in rows) / total
        squares = [(joules - scale * whole) ** 2 - scale**2 * shape for joules, _, whole, shape in rows]
        times = [abs(joules - scale * whole) * length_ns / joules for joules, length_ns, whole, _ in rows if joules > 0.0]
        return math.sqrt(max(sum(squares) / len(squares), 0.0)), 1.48 * median(times)

    def _dense(self, a: Knot, b: Knot) -> bool:
        """Whether power was sampled often enough between two knots to tell its course there."""
        t = self._samples.t_ns
        first, end = bisect_right(t, a.t_ns), bisect_left(t, b.t_ns)
        return end - first >= DENSE and first > 0 and end < len(t) and t[first] - t[first - 1] <= (b.t_ns - a.t_ns) / 2

    def timing_j(self, first: Edge, last: Edge, joules: float) -> float:
        """What the doubt about the knots' instants makes of the window's energy."""
        grid = self._sides[0][1]
        if len(self._sides) == 1 and grid is not None:
            apart = [(a, b) for a, b in zip(*(grid.apart_ns(t) for t in self._edges_ns))]
            shifts = [largest_shift(first.powers, a, last.powers, b) for a, b in apart]
            return MOST_LIKELY * max(shifts)
        return math.hypot(first.powers[1] * first.timing_ns, last.powers[1] * last.timing_ns)

    def edge(self, t_ns: int) -> Edge | None:
        """Energy at an instant; None where the counter does not tell."""
        found, grid = self._sides[0 if t_ns < self._middle else -1]
        if len(found) < 2 or found[-1].joules == found[0].joules:
            return None
        k = bisect_right([knot.t_ns for knot in found], t_ns) - 1
        nearby = range(max(k - 3, 0), min(k + 4, len(found) - 1))
        powers = [power_between(found[i], found[i + 1]) for i in nearby] or [power_between(found[-2], found[-1])]
        if k < 0 or k == len(found) - 1:
            return self._beyond(found[0] if k < 0 else found[-1], powers[0] if k < 0 else powers[-1], powers, t_ns)
        a, b = found[k], found[k + 1]
        half_ns = a.half_ns if grid else ((b.t_ns - t_ns) * a.half_ns + (t_ns - a.t_ns) * b.half_ns) / (b.t_ns - a.t_ns)
        seen = self._samples.t_ns
        first, end = bisect_left(seen, t_ns - int(3 * self.period_ns)), bisect_right(seen, t_ns + int(3 * self.period_ns))
        powers += [watts * 1e-9 for watts in self._samples.watts[first:end]]
        return self._sampled(a, b, t_ns, half_ns) or interpolated(a, b, t_ns, half_ns, powers)

    def _beyond(self, knot: Knot, power: float, powers: Sequence[float], t_ns: int) -> Edge | None:
        distance_ns = t_ns - knot.t_ns
        if abs(distance_ns) > 3 * self.period_ns + 2 * knot.half_ns:
            return None
        shape = max(powers) * (abs(distance_ns) + knot.half_ns)
        # Within the age of a reading there is nothing to extrapolate: the counter is as fresh as it gets.
        far = abs(distance_ns) > 2 * knot.half_ns
        return Edge(knot.joules + power * distance_ns, shape, 0.0, (power, power), far)

    def _sampled(self, a: Knot, b: Knot, t_ns: int, half_ns: float) -> Edge | None:
        """The course inside the cell from the samples of power in it; None if they are too few to tell."""
        samples = self._samples
        if not self._dense(a, b):
            return None
        whole = samples.sum_to(b.t_ns) - samples.sum_to(a.t_ns)
        joules = b.joules - a.joules
        if whole <= 0.0:
            return None
        scale = joules / whole
        power, piece_j = samples.around(t_ns)
        mean = joules / (b.t_ns - a.t_ns)
        unexplained_j = max(self.unexplained_j, power * scale * self._unexplained_ns)
        shape = math.hypot(scale * piece_j, abs(power * scale - mean) * LAG_NS, 1.96 * unexplained_j)
        levels = [level * scale for level in (power, samples.around(int(a.t_ns))[0], samples.around(int(b.t_ns))[0])]
        here = a.joules + scale * (samples.sum_to(t_ns) - samples.sum_to(a.t_ns))
        return Edge(here, shape, half_ns, (min(levels), max(levels)))


class Samples:
    """Power as means since the sample before: a course of energy that is straight in each piece."""

    def __init__(self, series: Series) -> None:
        self.t_ns, self.watts = series.t_ns, series.value
        t, p = self.t_ns, self.watts
        steps = ((t[j] - t[j - 1]) * 1e-9 * p[j] for j in range(1, len(t)))
        self._sums = array("d", itertools.accumulate(steps, initial=0.0))

    def sum_to(self, t_ns: float) -> float:
        """Joules up to an instant; the last sample speaks for what follows it, too."""
        j = min(bisect_left(self.t_ns, t_ns), len(self.t_ns) - 1)
        return self._sums[j] - self.watts[j] * (self.t_ns[j] - t_ns) * 1e-9

    def around(self, t_ns: int) -> tuple[float, float]:
        """Power (J/ns) at an instant, and how much energy (J) the piece around it may have elsewhere than assumed.

        A piece hides how its power came about: by the range of it and its neighbours, and a twentieth of its own power.
        """
        t, p = self.t_ns, self.watts
        j = min(max(bisect_left(t, t_ns), 1), len(t) - 1)
        piece_ns = t[j] - t[j - 1]
        f = min(max((t_ns - t[j - 1]) / piece_ns, 0.0), 1.0)
        near = p[j - 1 : j + 2]
        spread = max(near) - min(near) + 0.05 * p[j]
        return p[j] * 1e-9, spread * 1e-9 * f * (1 - f) * piece_ns


def largest_shift(powers: tuple[float, float], a_ns: float, others: tuple[float, float], b_ns: float) -> float:
    """The largest change of energy between two edges when the knots around them move by `a_ns` and `b_ns`."""
    first, last = [p * a_ns for p in powers], [p * b_ns for p in others]
    return max(max(first) - min(last), max(last) - min(first))


def interpolated(a: Knot, b: Knot, t_ns: int, half_ns: float, powers: Sequence[float]) -> Edge:
    """A steady power inside the cell."""
    length_ns = b.t_ns - a.t_ns
    f = (t_ns - a.t_ns) / length_ns
    power = power_between(a, b)
    spread = max(powers) - min(powers) + 0.1 * power
    return Edge(a.joules + f * (b.joules - a.joules), spread * f * (1 - f) * length_ns, half_ns, (power, power))


def power_between(a: Knot, b: Knot) -> float:
    return (b.joules - a.joules) / (b.t_ns - a.t_ns)
