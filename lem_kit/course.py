"""The course of a counter's energy around the edges of a window, and of sampled power.

The one idea: between two knots of a counter the energy is known but not its course. The course is taken from power samples
where they are dense enough, scaled so that each cell keeps the counter's energy; else the power is taken to be steady there,
or to step. What that leaves open at an edge, how far samples and counter differ from cell to cell, and the doubt about the
instants of the knots, is what an interval is made of. None of it is larger than the cells around show, where they show it.

Not covered: windows, and what makes a figure worthless (`curve`); when a counter was updated (`staircase`); the course of
the samples themselves (`samples`).
"""

from __future__ import annotations

import itertools
import math
import operator
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from statistics import median
from typing import NamedTuple

from .samples import SEEN_AFTER, Samples, step
from .staircase import Grid, Knot, knots, without
from .statistics import student_t
from .trace import Series, Trace

# How much of a trace around an edge is looked at for its knots. Bounds the work for one repetition of a long window.
NEARBY_NS = 3_000_000_000
# Power samples shape a cell when at least this many of them lie in it.
DENSE = 3
# Fewer cells than this tell nothing about how far counter and samples differ.
LEAST_CELLS = 8
# Cells are of one length if none is so many times longer than another.
AS_LONG = 2.0
# The cells of a counter that is read seldom are sought so many times further around: a few must show how far counter and
# samples differ.
FURTHER = 5
# A cell of it that differs from the samples in it by more than such a part is not believed.
CONTRADICTED = 0.3
FEW_CELLS = 3
# How many times `samples.HIDDEN` is believed at most, since where updates and samples come together the ends of the cells
# show nothing of it: power that alternates between nothing and twice its mean, which is a range of 40 twentieths.
MOST_HIDDEN = 40.0
# How far samples of power and updates of the counter may be apart in time.
LAG_NS = 3_000_000
# A sample of so many times the most that the device can draw for long is none.
IMPLAUSIBLE = 3.0
# Work that begins and ends with a window of fewer periods of the counter fills one cell or none, so that neither edge shows.
FEW_PERIODS = 3.0
# Powers of cells that differ by less than such a part are the same.
ALIKE = 0.001
# Power readings that differ by more than such a part from what the counter beside them counts are in step with the load.
IN_STEP = 0.1
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
    sampled: bool = False


class Unseen(NamedTuple):
    """What the cells of a counter show of the doubt that samples of power leave, as standard deviations.

    `joules`: how far a cell is off beyond what the steps between samples allow, as the root of the mean square; `ns`: how
    far one in two is, at its own power. Both are of the two ends of a cell together. `hidden`: how many times `HIDDEN` a
    sample may hide, by what the ends of the cells show of it: nearly nothing where the load is quiet between samples, and
    more than once where it alternates faster than they come.
    """

    joules: float = 0.0
    ns: float = 0.0
    hidden: float = 1.0


class Cell(NamedTuple):
    """A cell in which counter and samples can be compared. `joules` and `sampled_j`: what they say of it; `steps_j` and
    `hidden_j`: what its two ends leave open."""

    start_ns: float
    joules: float
    ns: float
    sampled_j: float
    steps_j: float
    hidden_j: float


class Course:
    """The energy of one counter around a window: knots near each edge, and what shapes the cells between them."""

    def __init__(self, trace: Trace, key: str, series: Series, t0_ns: int, t1_ns: int) -> None:
        domain, period_s = trace.domains[key], trace.period_s.get(key)
        rarely = key in trace.updates
        near_ns = FURTHER * NEARBY_NS if rarely else NEARBY_NS
        spans = [(t0_ns - near_ns, t1_ns + near_ns)]
        if t1_ns - t0_ns > 4 * NEARBY_NS and not rarely:  # the two ends of a long window know nothing of each other
            spans = [(t - NEARBY_NS, t + NEARBY_NS) for t in (t0_ns, t1_ns)]
        self._middle = (t0_ns + t1_ns) / 2 if len(spans) == 2 else math.inf
        known = (domain.refresh_s, period_s, trace.updates.get(key))
        self._sides: list[tuple[list[Knot], Grid | None]] = []
        for start, end in spans:
            found, grid = knots(series.between(start, end), *known)
            self._sides.append((without(found, domain.offset_w), grid))
        further = self._sides
        if rarely:  # what is far away tells how far counter and samples differ, but makes no grid better here
            found, grid = knots(series.between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS), *known)
            if grid and found[0].t_ns <= t0_ns:
                self._sides = [(without(found, domain.offset_w), grid)]
        gaps = [b.t_ns - a.t_ns for found, _ in self._sides for a, b in itertools.pairwise(found)]
        grid = self._sides[0][1]
        # How wrong the period may be: as the sampler knows it, or as the readings nearby confine it.
        half_s = trace.period_half_s.get(key)
        self._stretch = grid.period_half_ns / grid.period_ns if grid else 0.0
        if grid and half_s is not None and period_s is not None and grid.period_ns == period_s * 1e9:
            self._stretch = half_s / period_s
        self.period_ns = grid.period_ns if grid else median(gaps) if gaps else 0.0
        if domain.refresh_s is not None:
            self.period_ns = max(self.period_ns, domain.refresh_s * 1e9)
        self.short, self._few = t1_ns - t0_ns < self.period_ns, t1_ns - t0_ns < FEW_PERIODS * self.period_ns
        gauge = trace.gauges.get(f"{key}.power_w", Series()).between(t0_ns - near_ns, t1_ns + near_ns)
        self._samples = Samples(gauge)
        seen = self._samples.t_ns
        # Work that no sample lies inside of shows in its two ends only as their mean with the rest.
        self._brief = self.short and bool(seen) and (t1_ns - t0_ns) * (len(seen) - 1) < 2 * (seen[-1] - seen[0])
        # Where samples are missing for longer than half a period, or cannot be: how many such places are up to each of them.
        most_w = IMPLAUSIBLE * domain.limit_w if domain.limit_w is not None else math.inf
        bad = (b - a > self.period_ns / 2 or w > most_w for a, b, w in zip(seen, seen[1:], gauge.value[1:]))
        self._holes = array("l", itertools.accumulate(bad, initial=0))
        self._in_step = self._differ(gauge)
        self._cells = self._compared(further)
        self._least_cells = FEW_CELLS if rarely else LEAST_CELLS

    def _differ(self, gauge: Series) -> bool:
        """Whether the power that was read is another than the counter counted in that time."""
        every = [knot for found, _ in self._sides for knot in found]
        if not every:
            return False
        shown = gauge.between(int(every[0].t_ns), int(every[-1].t_ns)).value
        counted_j = every[-1].joules - every[0].joules
        shown_j = sum(shown) / max(len(shown), 1) * (every[-1].t_ns - every[0].t_ns) * 1e-9
        return bool(shown) and abs(shown_j - counted_j) > IN_STEP * counted_j

    def _compared(self, sides: Sequence[tuple[list[Knot], Grid | None]]) -> list[Cell]:
        samples, cells = self._samples, []
        for found, grid in sides if len(samples.t_ns) > DENSE else ():
            sums, ends = [samples.sum_to(knot.t_ns) for knot in found], [samples.around(int(knot.t_ns)) for knot in found]
            for i, (a, b) in enumerate(itertools.pairwise(found)):
                doubtful = grid is not None and max(a.half_ns, b.half_ns) > grid.half_ns
                was_reset = b.joules <= a.joules  # then the counter says nothing of the samples
                if not was_reset and not doubtful and self.sampled(a.t_ns, b.t_ns):
                    steps, hidden = (math.hypot(ends[i][j], ends[i + 1][j]) / 1.96 for j in (1, 2))
                    cells.append(Cell(a.t_ns, b.joules - a.joules, b.t_ns - a.t_ns, sums[i + 1] - sums[i], steps, hidden))
        return cells

    def unseen(self, long_ns: float = 0.0) -> Unseen:
        """From how far samples and counter differ from cell to cell, for cells of such a length, or of one period. Few cells
        agree by chance, so it is wider for few (Student); too few tell nothing. Where few are of that length, others speak:
        what samples miss in a cell grows as the root of its length at most, or not at all where it is at the ends."""
        long_ns = max(long_ns, self.period_ns)
        cells = [c for c in self._cells if c.ns <= AS_LONG * long_ns and long_ns <= AS_LONG * c.ns]
        if len(cells) < self._least_cells:
            cells = self._cells
        total = sum(c.sampled_j for c in cells)
        if len(cells) < self._least_cells or total <= 0.0:
            return Unseen() if self._least_cells == LEAST_CELLS else Unseen(hidden=MOST_HIDDEN)
        scale = sum(c.joules for c in cells) / total
        off = [abs(c.joules - scale * c.sampled_j) * math.sqrt(max(long_ns / c.ns, 1.0)) for c in cells]
        square = sum(off_j**2 for off_j in off)
        joules = math.sqrt(max(square - sum((scale * c.steps_j) ** 2 for c in cells), 0.0) / len(cells))
        ns = median(off_j * c.ns / c.joules for off_j, c in zip(off, cells))
        # Few cells with a step in them must not speak for the others, nor half of them for a load that is never quiet.
        hidden_j = [max(scale * c.hidden_j, 1e-9) for c in cells]
        hidden = min(1.48 * median(map(operator.truediv, off, hidden_j)), math.sqrt(square) / math.hypot(*hidden_j))
        wider = student_t(len(cells)) / 1.96
        return Unseen(wider * joules, wider * 1.48 * ns, min(wider * hidden, MOST_HIDDEN))

    @cached_property
    def _counted_per_sampled(self) -> float:
        """What the counter counts where samples show a joule; 1 where no cell tells."""
        ratios = [c.joules / c.sampled_j for c in self._cells if c.sampled_j > 0.0]
        return median(ratios) if ratios else 1.0

    def contradicted_j(self, t0_ns: int, t1_ns: int) -> float:
        """Energy that a counter which is read seldom has too much or too little in cells inside a window, by the samples in
        them: it may have been set back, or have stood, where nobody saw it."""
        if self._least_cells == LEAST_CELLS:
            return 0.0
        scale = self._counted_per_sampled
        inside = [c for c in self._cells if c.start_ns < t1_ns and c.start_ns + c.ns > t0_ns]
        off = [(abs(c.joules - scale * c.sampled_j), c) for c in inside if c.ns > AS_LONG * self.period_ns]
        return (1 + CONTRADICTED) * sum(off_j for off_j, c in off if off_j > CONTRADICTED * scale * c.sampled_j)

    def sampled(self, start_ns: float, end_ns: float, least: int = DENSE) -> bool:
        """Whether power was sampled often enough between two instants (`least` times and once) to tell its course. The last
        sample of all may end a little before: whoever waited for it knew the later instant no better."""
        t = self._samples.t_ns
        first, end = bisect_right(t, start_ns), min(bisect_left(t, end_ns), len(t) - 1)
        near_enough = end - first >= least and first > 0 and t[end] >= end_ns - LAG_NS
        return near_enough and self._holes[end] == self._holes[first - 1]

    def shapes_j(self, first: Edge, last: Edge) -> float:
        """What the doubt about the course at both edges makes of the window's energy: it adds up where one peak, which no
        sample shows and no cell that it fills, may be the cause of both."""
        if self._few and not (first.sampled or last.sampled):
            return first.shape_j + last.shape_j
        if self._brief and first.sampled and last.sampled:
            return PEAK * (first.shape_j + last.shape_j)
        return math.hypot(first.shape_j, last.shape_j)

    def timing_j(self, first: Edge, last: Edge, joules: float) -> float:
        """What the doubt about the knots' instants makes of the window's energy."""
        if len(self._sides) == 1 and self._sides[0][1] is not None:
            half_ns = max(first.timing_ns, last.timing_ns)
            (low0, high0), (low1, high1) = first.powers, last.powers
            shift = 0.95 * max(high1 - low0, high0 - low1) * half_ns  # of all knots alike
            return math.hypot(shift, joules * self._stretch)  # and of the period
        a, b = (max(edge.powers[1] * edge.timing_ns, 0.0) for edge in (first, last))
        return a + b - math.sqrt(0.2 * a * b)  # holds 95 % of the sum of two doubts that may be anywhere in their ranges

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
        if grid and len(self._sides) == 2:  # else the doubt about the period is told for the window as a whole
            half_ns += grid.period_half_ns * abs(t_ns - grid.phase_ns) / grid.period_ns
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
        """The course inside the cell from the samples of power in it; None if they are too few to tell.

        Samples give each part of the cell its share of what the counter counted in it. Where they end before it does, they
        count onwards from its beginning, as many joules of the counter for one of theirs as in other cells.
        """
        samples, last_ns = self._samples, self._samples.t_ns[-1] if self._samples.t_ns else 0
        whole_cell = self.sampled(a.t_ns, b.t_ns)
        onward = not whole_cell and bool(self._cells) and on_grid and t_ns < last_ns
        onward = onward and self.sampled(a.t_ns, last_ns, SEEN_AFTER - 1)
        if not (whole_cell or onward):
            return None
        whole = samples.sum_to(b.t_ns) - samples.sum_to(a.t_ns)
        joules = b.joules - a.joules
        if whole <= 0.0:
            return None
        scale = self._counted_per_sampled if onward else joules / whole
        power, steps_j, hidden_j = samples.around(t_ns)
        mean = joules / (b.t_ns - a.t_ns)
        unseen = self.unseen(min(t_ns - a.t_ns, b.t_ns - t_ns))
        cell_j = max(unseen.joules, power * scale * unseen.ns)
        # On a grid, what a cell shows is the doubt about both of its ends, and an instant inside it has a part of each.
        f = min(max((t_ns - a.t_ns) / (b.t_ns - a.t_ns), 0.0), 1.0)
        part = math.sqrt((f**2 + (1.0 if onward else 1 - f) ** 2) / 2) if on_grid else 1.0
        unseen_j = max(1.96 * cell_j * part, scale * unseen.hidden * hidden_j)
        # What the counter has more or less may all be of where samples do not tell the end; or is, as a step makes it there.
        untold_j = 0.0 if samples.resolved(b.t_ns) else abs(joules - self._counted_per_sampled * whole)
        (began, *open_j), began_j = samples.around(int(a.t_ns)), 0.0
        if onward:
            near = samples.watts[bisect_left(samples.t_ns, a.t_ns - self.period_ns) :]
            untold_j = max(untold_j - scale * (max(near) - min(near)) * 1e-9 * (b.t_ns - last_ns), 0.0)
            began_j = scale * math.hypot(open_j[0], unseen.hidden * open_j[1])
        shape = math.hypot(scale * steps_j, abs(power * scale - mean) * LAG_NS, unseen_j, f * untold_j, began_j)
        levels = [level * scale for level in (power, began, samples.around(int(b.t_ns))[0])]
        here = a.joules + scale * (samples.sum_to(t_ns) - samples.sum_to(a.t_ns))
        return Edge(here, shape, half_ns, (min(levels), max(levels)), sampled=True)

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
        elif self._in_step or self._peak(found, k):  # what is inside the cell is steeper than its mean power shows
            spread *= PEAK
        doubt = max(spread * f * (1 - f), self._unfinished(found, k, f) + 0.1 * power * f * (1 - f))
        return Edge(joules, doubt * length_ns, half_ns, (power, power))

    def _unfinished(self, found: Sequence[Knot], k: int, f: float) -> float:
        """How far the energy up to `f` of cell `k` may be off (as power, over its length) where no later cell shows what the
        load stepped to: it may have gone on as in the cell before up to there, and have done the rest in what was left."""
        if k + 2 < len(found):
            return 0.0
        power = joules_per_ns(*found[k : k + 2])
        if k == 0:  # nor does one before
            return power * max(f, 1 - f)
        before = joules_per_ns(*found[k - 1 : k + 1])
        return min((before - power) * f, power * (1 - f)) if power < before else (power - before) * f

    def _peak(self, found: Sequence[Knot], k: int) -> bool:
        """Whether cell `k` has more power, or less, than cells on both sides of it. For a short window these are two on each
        side, since an update that falls into a short peak shows it in two cells."""
        reach = 2 if self.short else 1
        cells = range(max(k - reach, 0), min(k + reach + 1, len(found) - 1))
        powers = [joules_per_ns(found[i], found[i + 1]) for i in cells]
        before, power, after = powers[: k - cells[0]], powers[k - cells[0]], powers[k - cells[0] + 1 :]
        if self.short and len(after) < reach:
            after += before  # what comes next is not known: it may be as it was
        if not before or not after:
            return False
        return max(min(before), min(after)) < (1 - ALIKE) * power or min(max(before), max(after)) > (1 + ALIKE) * power

    def _step(self, found: Sequence[Knot], k: int) -> tuple[float, float, float] | None:
        """Powers left and right of a step inside cell `k`, and where it is; None where there is none."""
        levels = [joules_per_ns(*found[i : i + 2]) if 0 <= i < len(found) - 1 else None for i in range(k - 2, k + 3)]
        before, left, power, right, after = levels
        if right is None and not self.short and self._samples.t_ns and self._samples.t_ns[-1] > found[k + 1].t_ns:
            right = self._samples.watts[-1] * 1e-9  # the cell after is not over: what the sensor shows stands for it
        if left is None or power is None or right is None:
            return None
        at = step(left if before is None else before, left, power, right, right if after is None else after)
        return None if at is None else (left, right, at)


def joules_per_ns(a: Knot, b: Knot) -> float:
    """Mean power between two knots."""
    return (b.joules - a.joules) / (b.t_ns - a.t_ns)
