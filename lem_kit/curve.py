"""Energy between two instants, with its uncertainty.

The one idea: between two knots of a counter the energy is known but not its course. The course is taken from power samples
where they are dense enough, scaled so that each cell keeps the counter's energy; else the power is taken to be steady there.
What that leaves open at the two edges of a window, how far samples and counter differ from cell to cell, and the doubt about
the instants of the knots, is the interval.

Not covered: gain and offset errors of the sensor itself, which no software can see (about 5 %, up to 13 % on some GPU
boards: Yang et al., "Accurate and Convenient Energy Measurements for GPUs", SC24).
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
# A counter that shows one value for so many periods is stuck.
STUCK_PERIODS = 5


class Between(NamedTuple):
    """`joules` and `uncertainty_j` are None together, and then `reasons` (codes of `measurement.REASONS`) says why."""

    joules: float | None
    uncertainty_j: float | None
    reasons: tuple[str, ...]


class Edge(NamedTuple):
    """Energy at an instant. `shape_j`: doubt about the course around it; `timing_ns`: doubt about when the knots were;
    `powers`: lowest and highest power (J/ns) that such a shift may count at this edge."""

    joules: float
    shape_j: float
    timing_ns: float
    powers: tuple[float, float]
    extrapolated: bool = False


def energy_between(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> Between:
    """Energy in joules that domain `key` saw from `t0_ns` to `t1_ns`, with the half-width of its 95 % interval in joules.

        E(t)   = E_a + (E_b - E_a) * S(a, t) / S(a, b)    S: the power's course between the knots a and b around t
        shape  = spread * f * (1 - f) * T                 f: how far t lies in the piece of length T that S cannot resolve
        timing = |P(t1) - P(t0)| * h                      when one grid gives all knots: a shift moves both edges alike
               = hypot(P(t0) * h0, P(t1) * h1)            otherwise; h: half-widths of the knots' instants
        beyond = 1.96 rms(counter - samples) over cells   with samples, less what shape allows
        n      = sqrt(shape(t0)^2 + shape(t1)^2 + 2 beyond^2 + timing^2) + resolution
        u      = sqrt(n^2 + (relative_error * E)^2)

    `spread` is the range of the powers around t: a load that switches between two powers a and b inside a piece makes
    interpolation wrong by at most |a - b| f (1 - f) T. See `docs/method.md` for how often the interval holds the truth.
    """
    domain = trace.domains[key]
    if domain.gauge is not None:
        return integral_between(trace, key, t0_ns, t1_ns)
    everything = trace.counters.get(key, Series())
    near = 10 * NEARBY_NS // 3
    series = everything.between(t0_ns - near, t1_ns + near)
    t = series.t_ns
    if not t or t[0] > t0_ns + trace.interval_s * 1e9:
        return _unknown(_failure(trace, key, t) or "source_starting")
    if t[-1] < t1_ns:
        return _unknown(_failure(trace, key, t) or "no_reading")
    first, last = max(bisect_right(t, t0_ns) - 1, 0), bisect_left(t, t1_ns)
    rising = _rising(series, first, last)
    if rising is None:
        return _unknown("counter_went_back")
    course = Course(trace, key, rising, t0_ns, t1_ns)
    edges = [course.edge(t_ns) for t_ns in (t0_ns, t1_ns)]
    steps = domain.refresh_s is None or domain.refresh_s > 0.0  # else it has no period that it could miss
    if steps and course.period_ns and _stuck(series.part(first, last + 1), STUCK_PERIODS * course.period_ns, t0_ns, t1_ns):
        return _unknown("counter_stuck")
    if edges[0] is None or edges[1] is None:
        return _unknown("not_advancing")
    joules = edges[1].joules - edges[0].joules
    if joules <= 0.0:  # hardware that runs uses energy: no change means that the counter did not tell
        return _unknown("too_short")
    reasons = list(domain.reasons)
    mean_w = joules / (t1_ns - t0_ns) * 1e9
    if domain.limit_w is not None and mean_w > 1.5 * domain.limit_w:
        return _unknown("implausible")
    if edges[0].extrapolated or edges[1].extrapolated:
        reasons.append("edge_extrapolated")
    if t1_ns - t0_ns < course.period_ns:
        reasons.append("shorter_than_refresh")
    stamps = [t0_ns, *t[first + 1 : last], t1_ns]
    gap_ns = max(10 * trace.interval_s * 1e9, 2.5 * course.period_ns)
    if any(b - a > gap_ns for a, b in itertools.pairwise(stamps)):
        reasons.append("sampling_gap")
    noise = math.hypot(edges[0].shape_j, edges[1].shape_j, course.timing_j(edges[0], edges[1], joules)) + domain.resolution_j
    if noise > joules:
        reasons.append("unresolved")
    return Between(joules, math.hypot(noise, domain.relative_error * joules), tuple(reasons))


def _unknown(reason: str) -> Between:
    return Between(None, None, (reason,))


def _failure(trace: Trace, key: str, t: Sequence[int]) -> str | None:
    """The code that the source gave when it failed while it gave none of the readings `t`."""
    names = (key, key.partition(":")[0])
    for when, name, code, _ in trace.failures:
        if name in names and not (t and t[0] <= when <= t[-1]):
            return code
    return None


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
    return series.part(start, end)


def _stuck(series: Series, longest_ns: float, t0_ns: int, t1_ns: int) -> bool:
    """Whether the counter was read again and again inside the window without a change for longer than `longest_ns`."""
    t, v = series.t_ns, series.value
    since, seen = t0_ns, 0
    for i in range(1, len(t)):
        if v[i] != v[i - 1]:
            since, seen = t[i], 0
            continue
        seen += 1
        if seen >= 3 and min(t[i], t1_ns) - since > longest_ns:
            return True
    return False


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
        known = grid is not None and grid.period_ns == trace.period_s.get(key, 0.0) * 1e9
        self._stretch = trace.period_half_s.get(key, 0.0) / trace.period_s[key] if known else 0.0
        if grid is not None and not known:
            self._stretch = grid.half_ns / NEARBY_NS
        self.period_ns = grid.period_ns if grid else median(gaps) if gaps else 0.0
        self._aged = domain.refresh_s is not None
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
                if (
                    b.joules > a.joules and not doubtful and self._dense(a, b)
                ):  # after a reset it says nothing of the samples
                    whole = samples.sum_to(b.t_ns) - samples.sum_to(a.t_ns)
                    shapes = [samples.around(int(knot.t_ns))[1] / 1.96 for knot in (a, b)]
                    rows.append((b.joules - a.joules, b.t_ns - a.t_ns, whole, shapes[0] ** 2 + shapes[1] ** 2))
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
        powers = [_power(found[i], found[i + 1]) for i in nearby] or [_power(found[-2], found[-1])]
        if k < 0 or k == len(found) - 1:
            return self._beyond(found[0] if k < 0 else found[-1], powers[0] if k < 0 else powers[-1], powers, t_ns)
        a, b = found[k], found[k + 1]
        half_ns = a.half_ns if grid else ((b.t_ns - t_ns) * a.half_ns + (t_ns - a.t_ns) * b.half_ns) / (b.t_ns - a.t_ns)
        seen = self._samples.t_ns
        first, end = bisect_left(seen, t_ns - int(3 * self.period_ns)), bisect_right(seen, t_ns + int(3 * self.period_ns))
        powers += [watts * 1e-9 for watts in self._samples.watts[first:end]]
        edge = self._sampled(a, b, t_ns, half_ns) or self._interpolated(found, k, t_ns, half_ns, powers)
        if (
            grid and (apart_ns := max(a.half_ns, b.half_ns) - grid.half_ns) > 0.0
        ):  # one of several updates, and only this knot
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
            if inside and self._sampled(a, b, int(inside[0]), 0.0) is not None:
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

    def _interpolated(self, found: Sequence[Knot], k: int, t_ns: int, half_ns: float, powers: Sequence[float]) -> Edge:
        """A steady power inside the cell, or a step from the power of the cell before to that of the cell after."""
        a, b = found[k], found[k + 1]
        length_ns = b.t_ns - a.t_ns
        f = (t_ns - a.t_ns) / length_ns
        power = _power(a, b)
        spread = max(powers) - min(powers) + 0.1 * power
        joules = a.joules + f * (b.joules - a.joules)
        stepped = self._step(found, k)
        if stepped is not None:
            left, right, at = stepped
            left_ns = min(f, at) * length_ns
            joules = a.joules + left * left_ns + right * (f * length_ns - left_ns)
            power = left if f < at else right
        elif 0 < k < len(found) - 2:
            left, right = _power(found[k - 1], a), _power(b, found[k + 2])
            if (power - left) * (power - right) > 0.0:  # a peak or a dip inside the cell is steeper than it shows
                spread *= PEAK
        return Edge(joules, spread * f * (1 - f) * length_ns, half_ns, (power, power))

    def _step(self, found: Sequence[Knot], k: int) -> tuple[float, float, float] | None:
        """Powers left and right of a step inside cell `k`, and where it is; None where there is none."""
        levels = [_power(*found[i : i + 2]) if 0 <= i < len(found) - 1 else None for i in range(k - 2, k + 3)]
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


def _power(a: Knot, b: Knot) -> float:
    return (b.joules - a.joules) / (b.t_ns - a.t_ns)


def integral_between(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> Between:
    """Energy in joules from sampled power, cut at the window's two edges, with the half-width of its 95 % interval.

    values that are means since the one before:  pieces of steady power;  u = both edges' pieces (`Samples.around`) and, with
                                                 a counter beside, 1.96 rms(counter - samples) over its cells
    values of an instant:                        trapezoids;              u = hypot(1.96 s T / sqrt(n), r d)
    s^2 = mean((P_j+1 - P_j)^2) / 2 over the n values: what the power does between one and the next, and a value misses
    d: the shortest time from one new value to the next, by which it may be late at an edge; r: their range near the window
    """
    domain = trace.domains[key]
    near = trace.gauges.get(domain.gauge or "", Series()).between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)
    t, p = near.t_ns, near.value
    device = (domain.gauge or key).rpartition(".")[0]
    if not t or t[0] > t0_ns:
        return _unknown(_failure(trace, device, t) or "source_starting")
    step_ns = median(b - a for a, b in itertools.pairwise(t)) if len(t) > 2 else math.inf
    if t1_ns - t[-1] > 3 * step_ns:
        return _unknown(_failure(trace, device, t) or "no_reading")
    first, end = bisect_right(t, t0_ns) - 1, min(bisect_left(t, t1_ns) + 1, len(t))
    if end - first < 3:
        return _unknown("too_short")
    if domain.limit_w is not None and max(p[first:end]) > 3 * domain.limit_w:
        return _unknown("implausible")
    if domain.means:
        samples = Samples(near)
        joules = samples.sum_to(t1_ns) - samples.sum_to(t0_ns)
        noise = math.hypot(samples.around(t0_ns)[1], samples.around(t1_ns)[1])
        if device in trace.counters:  # the counter of the same device shows what the samples miss
            series = trace.counters[device].between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)
            course = Course(trace, device, series, t0_ns, t1_ns)
            noise = math.hypot(noise, 1.96 * course.unexplained_j)
    else:
        points = [
            (t0_ns, _line(t, p, t0_ns)),
            *zip(t[first + 1 : end - 1], p[first + 1 : end - 1]),
            (t1_ns, _line(t, p, t1_ns)),
        ]
        joules = sum((pa + pb) / 2 * (tb - ta) * 1e-9 for (ta, pa), (tb, pb) in itertools.pairwise(points))
        noise = _missed_j(near, first, end, (t1_ns - t0_ns) / 1e9)
    if joules <= 0.0:
        return _unknown("too_short")
    reasons = list(domain.reasons)
    if max(b - a for a, b in itertools.pairwise(t[first:end])) > max(10 * trace.interval_s * 1e9, 5 * step_ns):
        reasons.append("sampling_gap")
    if noise > joules:
        reasons.append("unresolved")
    return Between(joules, math.hypot(noise + domain.resolution_j, domain.relative_error * joules), tuple(reasons))


def _line(t: Sequence[int], p: Sequence[float], t_ns: int) -> float:
    j = bisect_left(t, t_ns)
    if j in (0, len(t)):
        return p[min(j, len(t) - 1)]
    return p[j - 1] + (p[j] - p[j - 1]) * (t_ns - t[j - 1]) / (t[j] - t[j - 1])


def _missed_j(series: Series, first: int, end: int, seconds: float) -> float:
    """What values of single instants, some of them repeated, may have missed of a window that they lie around."""
    t, p = series.t_ns, series.value
    jumps = [(b - a) ** 2 for a, b in itertools.pairwise(p[first:end])]
    between = 1.96 * math.sqrt(sum(jumps) / (2 * len(jumps))) * seconds / math.sqrt(len(jumps))
    news = [j for j in range(1, len(p)) if p[j] != p[j - 1]]
    if len(news) < 2:
        return between
    late_ns = min(t[b] - t[a] for a, b in itertools.pairwise(news))
    near = series.between(t[first] - 3 * late_ns, t[end - 1] + 3 * late_ns).value
    return math.hypot(between, (max(near) - min(near)) * late_ns * 1e-9)


def mean_power_w(trace: Trace, key: str) -> list[tuple[int, float]]:
    """Power as the domain shows it: (t_ns, watts). Of a counter, at the middle of each pair of knots.

    When an update was only seen to happen between two readings, a knot is passed over until the pair is four times as far
    apart as the doubt about its instants; otherwise that doubt would be drawn as peaks of power. Where the counter went back
    there is no power.
    """
    domain = trace.domains[key]
    if domain.gauge is not None:
        series = trace.gauges.get(domain.gauge, Series())
        return list(zip(series.t_ns, series.value))
    found, _ = knots(trace.counters.get(key, Series()), domain.refresh_s, trace.period_s.get(key))
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
