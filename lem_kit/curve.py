"""Energy between two instants, with its uncertainty.

The one idea: what a meter leaves open of a window is at its two edges. A counter's energy there, and the doubt about it, is
told by its `course`; of sampled power by the values around. Whatever makes the figure worthless gives None and a reason.

Not covered: gain and offset errors of the sensor itself, which no software can see (about 5 %, up to 13 % on some GPU
boards: Yang et al., "Accurate and Convenient Energy Measurements for GPUs", SC24).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .course import IMPLAUSIBLE, NEARBY_NS, Course, Unseen, joules_per_ns
from .samples import Samples, on_line
from .staircase import knots, without
from .trace import Series, Trace

# A counter that shows one value for so many periods is stuck.
STUCK_PERIODS = 5
# Shorter pieces of a course are of samples and updates that all but coincide: they would be drawn as peaks of power.
SHORT_NS = 1_000_000


class Between(NamedTuple):
    """`joules` and `uncertainty_j` are None together, and then `reasons` (codes of `measurement.REASONS`) says why."""

    joules: float | None
    uncertainty_j: float | None
    reasons: tuple[str, ...]


def energy_between(trace: Trace, key: str, t0_ns: int, t1_ns: int, courses: dict[str, Course] | None = None) -> Between:
    """Energy in joules that domain `key` saw from `t0_ns` to `t1_ns`, with the half-width of its 95 % interval in joules.
    `courses`: what was found of the counters so far, for those that ask for several domains between the same two instants.

        E(t)   = E_a + (E_b - E_a) * S(a, t) / S(a, b)    S: the power's course between the knots a and b around t
        steps  = spread * f * (1 - f) * T                 f: how far t lies in the piece of length T that S cannot resolve
        timing = |P(t1) - P(t0)| * h                      when one grid gives all knots: a shift moves both edges alike
               = a + b - sqrt(a * b / 5)                  otherwise; a, b = P(t) * h at the edges; h: half-widths of knots
        cells  = 1.96 rms(counter - samples) over cells   with samples, less what the steps allow
        ends   = cells * sqrt((g^2 + (1 - g)^2) / 2)      g: how far t lies in its cell, whose two ends share that doubt;
                                                          (g^2 + 1) where E(t) = E_a + c S(a, t), c as in other cells
        hidden = m * 0.05 * P(t) * f * (1 - f) * T        m: how many times that the ends of the cells differ by
        untold = g * |counter - samples|                  of the last cell, where the samples do not tell its end
        n      = sqrt(sum over t0, t1 of (steps^2 + max(ends, hidden)^2 + untold^2) + timing^2) + resolution
        u      = sqrt(n^2 + (relative_error * E)^2)

    `spread` is the range of the powers around t: a load that switches between two powers a and b inside a piece makes
    interpolation wrong by at most |a - b| f (1 - f) T. Without samples it is wider by a tenth of the power, and three times
    as wide in a peak of the counter or where power readings beside it show another power than it counts; the last cell has
    also what the load may have done after the window, and the edges of a window of less than three periods add up. With
    samples those of one that is shorter than two of them do, three times over. See `docs/method.md` for how often
    the interval holds the truth.
    """
    domain = trace.domains[key]
    if domain.gauge is not None:
        return integral_between(trace, key, t0_ns, t1_ns, courses)
    series = around(trace, key, t0_ns, t1_ns)
    t = series.t_ns
    if not t or t[0] > t0_ns + trace.interval_s * 1e9:
        return _unknown(_failure(trace, key, t) or "source_starting")
    if t[-1] < t1_ns:
        return _unknown(_failure(trace, key, t) or "no_reading")
    first, last = max(bisect_right(t, t0_ns) - 1, 0), bisect_left(t, t1_ns)
    rising = rising_part(series, first, last)
    if rising is None:
        return _unknown("counter_went_back")
    course = Course(trace, key, rising, t0_ns, t1_ns)
    if courses is not None:
        courses[key] = course
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
    if any(b - a > gap_ns and not course.sampled(a, b) for a, b in itertools.pairwise(stamps)):
        reasons.append("sampling_gap")
    shape_j, timing_j = course.shapes_j(edges[0], edges[1]), course.timing_j(edges[0], edges[1], joules)
    contradicted_j = course.contradicted_j(t0_ns, t1_ns)
    if contradicted_j:
        reasons.append("sources_disagree")
    noise = math.hypot(shape_j, timing_j) + domain.resolution_j + contradicted_j
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


def around(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> Series:
    """What a window's energy is told from: what was read near it, or everything of a counter that is read seldom."""
    near, everything = 10 * NEARBY_NS // 3, trace.counters.get(key, Series())
    return everything if key in trace.updates else everything.between(t0_ns - near, t1_ns + near)


def rising_part(series: Series, first: int, last: int) -> Series | None:
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


def integral_between(trace: Trace, key: str, t0_ns: int, t1_ns: int, courses: dict[str, Course] | None = None) -> Between:
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
    if domain.limit_w is not None and max(p[first:end]) > IMPLAUSIBLE * domain.limit_w:
        return _unknown("implausible")
    if domain.means:
        samples = Samples(near)
        joules = samples.sum_to(t1_ns) - samples.sum_to(t0_ns)
        unseen = Unseen()
        if device in trace.counters:  # the counter of the same device shows what the samples miss
            beside = (courses or {}).get(device)
            beside = beside or Course(trace, device, around(trace, device, t0_ns, t1_ns), t0_ns, t1_ns)
            unseen = beside.unseen()
        ends = [samples.around(t_ns) for t_ns in (t0_ns, t1_ns)]
        missed_j = max(1.96 * unseen.joules, unseen.hidden * math.hypot(*(hidden_j for _, _, hidden_j in ends)))
        noise = math.hypot(*(steps_j for _, steps_j, _ in ends), missed_j)
    else:
        points = [
            (t0_ns, on_line(t, p, t0_ns)),
            *zip(t[first + 1 : end - 1], p[first + 1 : end - 1]),
            (t1_ns, on_line(t, p, t1_ns)),
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
    """Power as the domain shows it: (t_ns, watts). Of a counter, at the middle of each pair of knots; of one that is read
    seldom, of each piece of its course.

    When an update was only seen to happen between two readings, a knot is passed over until the pair is four times as far
    apart as the doubt about its instants; otherwise that doubt would be drawn as peaks of power. Where the counter went back
    there is no power.
    """
    domain = trace.domains[key]
    if domain.gauge is not None:
        series = trace.gauges.get(domain.gauge, Series())
        return list(zip(series.t_ns, series.value))
    series = trace.counters.get(key, Series())
    points: list[tuple[int, float]] = []
    if key in trace.updates and series.t_ns:
        pieces, _ = Course(trace, key, series, series.t_ns[0], series.t_ns[-1]).points()
        for (start, before), (end, after) in itertools.pairwise(pieces):
            if end - start > SHORT_NS and after >= before:
                points.append((int((start + end) / 2), (after - before) / (end - start) * 1e9))
        return points
    found = without(knots(series, domain.refresh_s, trace.period_s.get(key))[0], domain.offset_w)
    if not found:
        return points
    a = found[0]
    for b in found[1:]:
        if not b.joules >= a.joules:  # also when one of them is not a number
            a = b
        elif b.t_ns > a.t_ns and b.t_ns - a.t_ns >= 4 * (a.half_ns + b.half_ns):
            points.append((int((a.t_ns + b.t_ns) / 2), joules_per_ns(a, b) * 1e9))
            a = b
    return points
