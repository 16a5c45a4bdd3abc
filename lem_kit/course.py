"""The course of a counter's energy around the edges of a window, and of sampled power.

The one idea: between two knots of a counter the energy is known but not its course. The course is taken from power samples
where they are dense enough, scaled so that each cell keeps the counter's energy; else the power is taken to be steady there,
or to step. What that leaves open at an edge, how far samples and counter differ from cell to cell, and the doubt about the
instants of the knots, is what an interval is made of.

Not covered: windows, and what makes a figure worthless (`curve`); when a counter was updated (`staircase`).
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
# A change of power is a step when it is so many times larger than the changes beside it.
STEEP = 3.0
# How much a burst inside one cell of the counter may exceed what the cell's mean power shows of it.
PEAK = 3.0


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
        # How wrong the period may be: as the sampler knows it, or as the readings nearby confine it.
        half_s, period_s = trace.period_half_s.get(key), trace.period_s.get(key)
        self._stretch = grid.half_ns / NEARBY_NS if grid else 0.0
        if grid and half_s is not None and period_s is not None and grid.period_ns == period_s * 1e9:
            self._stretch = half_s / period_s
        self.period_ns = grid.period_ns if grid else median(gaps) if gaps else 0.0
        if domain.refresh_s is not None:
            self.period_ns = max(self.period_ns, domain.refresh_s * 1e9)
        gauge = trace.gauges.get(f"{key}.power_w", Series()).between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)
        self._samples = Samples(gauge)
        self.unexplained_j, self._unexplained_ns = self._disagreement()

    def _disagreement(self) -> tuple[float, float]:
        """How far samples and counter differ from cell to cell beyond what the shapes of the pieces allow: updates that come
        out of time, and a course too quick for the samples. In J as the root of the mean square; and in ns, at the power of
        the cell, what half of the cells stay below, as a standard deviation. 0 where there are too few cells."""
        samples, rows = self._samples, []
        for found, grid in self._sides:
            for a, b in itertools.pairwise(found):
                doubtful = grid is not None and max(a.half_ns, b.half_ns) > grid.half_ns
                was_reset = b.joules <= a.joules  # then the counter says nothing of the samples
                if not was_reset and not doubtful and self._dense(a, b):
                    whole = samples.sum_to(b.t_ns) - samples.sum_to(a.t_ns)
                    shapes = [samples.around(int(knot.t_ns))[1] / 1.96 for knot in (a, b)]
                    rows.append((b.joules - a.joules, b.t_ns - a.t_ns, whole, shapes[0] ** 2 + shapes[1] ** 2))
        total = sum(whole for _, _, whole, _ in rows)
        if len(rows) < LEAST_CELLS or total <= 0.0:
            return 0.0, 0.0
        scale = sum(joules for joules, _, _, _ in rows) / total
        squares = [(joules - scale * whole) ** 2 - scale**2 * shape for joules, _, whole, shape in rows]
        times = [abs(joules - scale * whole) * length_ns / joules for joules, length_ns, whole, _ in rows]
        return math.sqrt(max(sum(squares) / len(squares), 0.0)), 1.48 * median(times)

    def _dense(self, a: Knot, b: Knot) -> bool:
        """Whether power was sampled often enough between two knots to tell its course there."""
        t = self._samples.t_ns
        first, end = bisect_right(t, a.t_ns), bisect_left(t, b.t_ns)
        return end - first >= DENSE and first > 0 and end < len(t) and t[first] - t[first - 1] <= (b.t_ns - a.t_ns) / 2

    def timing_j(self, first: Edge, last: Edge, joules: float) -> float:
        """What the doubt about the knots' instants makes of the window's energy."""
        if len(self._sides) == 1 and self._sides[0][1] is not None:
            half_ns = max(first.timing_ns, last.timing_ns)
            (low0, high0), (low1, high1) = first.powers, last.powers
            shift = 0.95 * max(high1 - low0, high0 - low1) * half_ns  # of all knots alike
            return math.hypot(shift, joules * self._stretch)  # and of the period
        return math.hypot(first.powers[1] * first.timing_ns, last.powers[1] * last.timing_ns)

    def edge(self, t_ns: int) -> Edge | None:
        """Energy at an instant; None where the counter does not tell."""
        found, grid = self._sides[0 if t_ns < self._middle else -1]
        if len(found) < 2 or found[-1].joules == found[0].joules:
            return None
        k = bisect_right([knot.t_ns for knot in found], t_ns) - 1
        nearby = range(max(k - 3, 0), min(k + 4, len(found) - 1))
        powers = [joules_per_ns(found[i], found[i + 1]) for i in nearby] or [joules_per_ns(found[-2], found[-1])]
        if k < 0 or k == len(found) - 1:
            return self._beyond(found[0] if k < 0 else found[-1], powers[0] if k < 0 else powers[-1], powers, t_ns)
        a, b = found[k], found[k + 1]
        half_ns = a.half_ns if grid else ((b.t_ns - t_ns) * a.half_ns + (t_ns - a.t_ns) * b.half_ns) / (b.t_ns - a.t_ns)
        seen = self._samples.t_ns
        first, end = bisect_left(seen, t_ns - int(3 * self.period_ns)), bisect_right(seen, t_ns + int(3 * self.period_ns))
        powers += [watts * 1e-9 for watts in self._samples.watts[first:end]]
        edge = self._sampled(a, b, t_ns, half_ns, grid is not None) or self._interpolated(found, k, t_ns, half_ns, powers)
        apart_ns = max(a.half_ns, b.half_ns) - grid.half_ns if grid else 0.0
        if grid and apart_ns > 0.0:  # a knot that may be of one of several updates
            return edge._replace(timing_ns=grid.half_ns, shape_j=math.hypot(edge.shape_j, max(powers) * apart_ns))
        return edge

    def points(self) -> tuple[list[tuple[float, float]], float]:
        """Knots, and the samples that shape the cells between them (ns, J), from one to the next of which the course is
        straight; and how far all of them may lie beside their true instants, alike (ns)."""
        (found, grid), samples = self._sides[0], self._samples
        points: list[tuple[float, float]] = []
        for k, (a, b) in enumerate(itertools.pairwise(found)):
            points.append((a.t_ns, a.joules))
            inside = samples.breaks_ns(a.t_ns, b.t_ns)
            if inside and self._sampled(a, b, int(inside[0]), 0.0, True) is not None:
                start, end = samples.sum_to(a.t_ns), samples.sum_to(b.t_ns)
                scale = (b.joules - a.joules) / (end - start)
                points += ((t_ns, a.joules + scale * (samples.sum_to(t_ns) - start)) for t_ns in inside)
            elif (stepped := self._step(found, k)) is not None:
                left, _, at = stepped
                points.append((a.t_ns + at * (b.t_ns - a.t_ns), a.joules + left * at * (b.t_ns - a.t_ns)))
        points += ((knot.t_ns, knot.joules) for knot in found[-1:])
        knots_ns = grid.half_ns if grid else median(knot.half_ns for knot in found) if found else 0.0
        return points, knots_ns + (LAG_NS if len(points) > len(found) else 0)

    def _beyond(self, knot: Knot, power: float, powers: Sequence[float], t_ns: int) -> Edge | None:
        distance_ns = t_ns - knot.t_ns
        if abs(distance_ns) > 3 * self.period_ns + 2 * knot.half_ns:
            return None
        shape = max(powers) * (abs(distance_ns) + knot.half_ns)
        # Within the age of a reading there is nothing to extrapolate: the counter is as fresh as it gets.
        far = abs(distance_ns) > 2 * knot.half_ns
        return Edge(knot.joules + power * distance_ns, shape, 0.0, (power, power), far)

    def _sampled(self, a: Knot, b: Knot, t_ns: int, half_ns: float, on_grid: bool) -> Edge | None:
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
        # On a grid, what a cell shows is the doubt about both of its ends, and an instant inside it has a part of each.
        f = min(max((t_ns - a.t_ns) / (b.t_ns - a.t_ns), 0.0), 1.0)
        part = math.sqrt((f**2 + (1 - f) ** 2) / 2) if on_grid else 1.0
        shape = math.hypot(scale * piece_j, abs(power * scale - mean) * LAG_NS, 1.96 * unexplained_j * part)
        levels = [level * scale for level in (power, samples.around(int(a.t_ns))[0], samples.around(int(b.t_ns))[0])]
        here = a.joules + scale * (samples.sum_to(t_ns) - samples.sum_to(a.t_ns))
        return Edge(here, shape, half_ns, (min(levels), max(levels)))

    def _interpolated(self, found: Sequence[Knot], k: int, t_ns: int, half_ns: float, powers: Sequence[float]) -> Edge:
        """A steady power inside the cell, or a step from the power of the cell before to that of the cell after."""
        a, b = found[k], found[k + 1]
        length_ns = b.t_ns - a.t_ns
        f = (t_ns - a.t_ns) / length_ns
        power = joules_per_ns(a, b)
        spread = max(powers) - min(powers) + 0.1 * power
        joules = a.joules + f * (b.joules - a.joules)
        stepped = self._step(found, k)
        if stepped is not None:
            left, right, at = stepped
            left_ns = min(f, at) * length_ns
            joules = a.joules + left * left_ns + right * (f * length_ns - left_ns)
            power = left if f < at else right
        elif 0 < k < len(found) - 2:
            left, right = joules_per_ns(found[k - 1], a), joules_per_ns(b, found[k + 2])
            if (power - left) * (power - right) > 0.0:  # a peak or a dip inside the cell is steeper than it shows
                spread *= PEAK
        return Edge(joules, spread * f * (1 - f) * length_ns, half_ns, (power, power))

    def _step(self, found: Sequence[Knot], k: int) -> tuple[float, float, float] | None:
        """Powers left and right of a step inside cell `k`, and where it is; None where there is none."""
        levels = [joules_per_ns(*found[i : i + 2]) if 0 <= i < len(found) - 1 else None for i in range(k - 2, k + 3)]
        before, left, power, right, after = levels
        if right is None and self._samples.t_ns and self._samples.t_ns[-1] > found[k + 1].t_ns:
            right = self._samples.watts[-1] * 1e-9  # the cell after is not over: what the sensor shows stands for it
        if left is None or power is None or right is None:
            return None
        at = step(left if before is None else before, left, power, right, right if after is None else after)
        return None if at is None else (left, right, at)


def step(before: float, left: float, mean: float, right: float, after: float) -> float | None:
    """Where in a piece of power `mean` the load stepped from the power of the piece to the left to that of the piece to the
    right (0 to 1), so that the piece keeps its energy; None where it is no step. (Harten's subcell resolution, 1989.)

    Work begins and ends with steps, at the very instants where windows do: a steady power inside such pieces would take the
    same part from every window.
    """
    jump = right - left
    if abs(jump) <= STEEP * max(abs(left - before), abs(after - right)) or (mean - left) * (right - mean) <= 0.0:
        return None
    return (right - mean) / jump


class Samples:
    """Power as means since the sample before: a course of energy that is straight in each piece."""

    def __init__(self, series: Series) -> None:
        self.t_ns, self.watts = series.t_ns, series.value
        t, p = self.t_ns, self.watts
        steps = ((t[j] - t[j - 1]) * 1e-9 * p[j] for j in range(1, len(t)))
        self._sums = array("d", itertools.accumulate(steps, initial=0.0))

    def sum_to(self, t_ns: float) -> float:
        """Joules up to an instant; the last sample speaks for what follows it, too."""
        t, p = self.t_ns, self.watts
        j = min(bisect_left(t, t_ns), len(t) - 1)
        if 2 <= j < len(t) - 2 and (at := step(*p[j - 2 : j + 3])) is not None:
            piece_ns = t[j] - t[j - 1]
            left_ns = min(t_ns - t[j - 1], at * piece_ns)
            return self._sums[j - 1] + (p[j - 1] * left_ns + p[j + 1] * (t_ns - t[j - 1] - left_ns)) * 1e-9
        return self._sums[j] - p[j] * (t[j] - t_ns) * 1e-9

    def breaks_ns(self, start_ns: float, end_ns: float) -> list[float]:
        """Instants between two others, in order, at which the course has another slope: those of the samples, and steps."""
        t, p = self.t_ns, self.watts
        first, end = bisect_right(t, start_ns), bisect_left(t, end_ns)
        found: list[float] = list(t[first:end])
        for j in range(max(first, 2), min(end + 1, len(t) - 2)):
            at = step(*p[j - 2 : j + 3])
            found += [] if at is None else [t[j - 1] + at * (t[j] - t[j - 1])]
        return sorted(t_ns for t_ns in found if start_ns < t_ns < end_ns)

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


def joules_per_ns(a: Knot, b: Knot) -> float:
    """Mean power between two knots."""
    return (b.joules - a.joules) / (b.t_ns - a.t_ns)


def on_line(t: Sequence[int], p: Sequence[float], t_ns: int) -> float:
    """Value at an instant on the line through the points; beyond them, that of the nearest."""
    j = bisect_left(t, t_ns)
    if j in (0, len(t)):
        return p[min(j, len(t) - 1)]
    return p[j - 1] + (p[j] - p[j - 1]) * (t_ns - t[j - 1]) / (t[j] - t[j - 1])
