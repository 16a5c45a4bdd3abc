"""When a counter was really updated: from readings to knots.

The one idea: a hardware counter is a staircase. It stands still, then jumps by the energy of its last refresh period. A
reading tells the value but not its age; a *change* between two readings tells that an update happened between the beginning
of the one call and the end of the other (calls can take 20 ms). Most counters are refreshed by a clock, so their updates lie
on a grid `phase + k * period`, and all brackets together confine that grid far better than any bracket confines its update.

    1. k of each bracket by the period that is known or seen; outwards from the narrowest bracket, so that no k is guessed.
    2. The middle of the periods for which the brackets leave common room for the phase, which then is in the middle of it.
    3. No room (updates that do not keep to a grid): every update is only known to lie in its own bracket.

An H100's counter keeps to a grid of 100.00 ms within 2 ms (`docs/method.md`).

Not covered: the energy between the knots (`curve`), when to read (`pace`).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from .trace import Series

# Brackets needed before a grid is believed, and how far they may miss a common phase, as a fraction of the period.
LEAST_BRACKETS = 4
MOST_JITTER = 0.1
# Between sure knots so many periods apart, one that is not sure is left out.
MOST_MISSED = 5
# A bracket tells nothing about the grid if it is wider than so many periods.
WIDEST = 1.5
WIDEST_BESIDE = 0.5  # or than so many, beside an instant of it that is known: then it could only be counted wrongly
# A better period moves no update by more than so much of one, or its k might be another; what is open can reach further.
SURE_OF_K, ALL_OPEN = 0.25, 1.0
STEPS = 24  # of a search for a period, each of which leaves two thirds of what was open, or half


class Knot(NamedTuple):
    """The counter took `joules` at some instant in (t_ns - half_ns, t_ns + half_ns]."""

    t_ns: float
    half_ns: float
    joules: float


def without(found: list[Knot], offset_w: float) -> list[Knot]:
    """What remains of a counter that counts `offset_w` too much. Differences count, as ever."""
    return [knot._replace(joules=knot.joules - offset_w * knot.t_ns / 1e9) for knot in found] if offset_w else found


class Grid(NamedTuple):
    """Updates happen at phase_ns + k * period_ns, for whole k; `half_ns` is the doubt about the phase, and `period_half_ns`
    that about the period, where it was found with the phase."""

    phase_ns: float
    period_ns: float
    half_ns: float
    period_half_ns: float = 0.0

    def last_before(self, t_ns: float) -> int:
        """The k of the last update at or before `t_ns`."""
        return int((t_ns - self.phase_ns) // self.period_ns)

    def at(self, k: int) -> float:
        return self.phase_ns + k * self.period_ns


class Bracket(NamedTuple):
    """Reading `i` was the first to show a new value: an update happened in (lo_ns, hi_ns]."""

    i: int
    lo_ns: int
    hi_ns: int


def brackets(series: Series) -> list[Bracket]:
    """One for each reading that differs from the one before."""
    t, v, took = series.t_ns, series.value, series.took_ns
    changed = [i for i in range(1, len(t)) if v[i] != v[i - 1]]
    return [Bracket(i, t[i - 1] - (took[i - 1] if took else 0), t[i]) for i in changed]


def period_ns(found: Sequence[Bracket]) -> float | None:
    """Median distance of successive changes; None for fewer than three of them."""
    if len(found) < 3:
        return None
    return median(b.lo_ns + b.hi_ns - a.lo_ns - a.hi_ns for a, b in itertools.pairwise(found)) / 2


def fit_grid(
    found: Sequence[Bracket],
    period: float | None = None,
    known: bool = False,
    shortest_call_ns: float = 0.0,
    update: tuple[int, int] | None = None,
) -> Grid | None:
    """The grid that the brackets agree on; None if they are too few or do not agree.

    `period` (ns) is a first guess; where it is `known` from a longer time, it is kept if the brackets allow it. `update` is
    an instant of the grid that is known from then, too, and within what (ns). Nobody knows when inside a call the counter is
    looked at, so room that is smaller than the shortest call shows jitter, not knowledge.
    """
    import numpy as np

    period = period or period_ns(found)
    if period is None or period <= 0:
        return None
    # A value that is new since more updates than one may be that of any of them.
    widest = WIDEST if update is None else WIDEST_BESIDE
    found = [b for b in found if b.hi_ns - b.lo_ns < widest * period]
    if known and update is not None:
        found.append(Bracket(-1, update[0] - update[1], update[0] + update[1]))
    elif len(found) < LEAST_BRACKETS:
        return None
    lo, hi = (np.array([getattr(b, name) for b in found], dtype=np.float64) for name in ("lo_ns", "hi_ns"))
    reference = int(np.argmin(hi - lo))
    origin = hi[reference]
    lo, hi = lo - origin, hi - origin
    k, period_half = np.rint(hi / period), 0.0
    room, middle = _room(lo, hi, k, period)
    if known and room < 0.0:  # not known well enough for how far apart these are, but well enough to count the periods
        closer, half, widest_room = _middle_period(lo, hi, k, period)
        if widest_room > room:
            period, period_half, room = closer, half, widest_room
            middle = _room(lo, hi, k, period)[1]
    if not (known and room >= -MOST_JITTER * period):
        for reach in (4, 16, 64, 1 << 40):
            k = np.rint(hi / period)
            near = np.abs(k) <= reach
            last = bool(np.all(near))
            period, period_half, room = _middle_period(lo[near], hi[near], k[near], period, ALL_OPEN if last else SURE_OF_K)
            if last:
                break
        middle = _room(lo, hi, k, period)[1]
    if room < -MOST_JITTER * period or not (known or _one_each(lo, hi, middle, period)):
        return None
    return Grid(float(origin) + middle, float(period), max(room, shortest_call_ns, -room) / 2, period_half)


def _one_each(lo: Any, hi: Any, phase: float, period: float) -> bool:
    """Whether every bracket can hold an update of its own: a period that only fits how often the counter was read cannot."""
    import numpy as np

    earliest, latest = (lo - phase) / period - MOST_JITTER, (hi - phase) / period + MOST_JITTER
    last = -np.inf
    for first, end in zip(np.ceil(earliest), np.floor(latest)):
        last = max(first, last + 1)
        if last > end:
            return False
    return True


def _room(lo: Any, hi: Any, k: Any, period: float) -> tuple[float, float]:
    """How much room the brackets leave for the phase, and its middle. Where they leave none, one in twenty may miss on
    either side: a call now and then returns what it found long before it ended."""
    low, high = lo - k * period, hi - k * period
    lowest, highest = float(low.max()), float(high.min())
    slack = len(low) // 20
    if highest < lowest and slack:
        low.partition(-1 - slack)
        high.partition(slack)
        lowest, highest = float(low[-1 - slack]), float(high[slack])
    return highest - lowest, (highest + lowest) / 2


def _middle_period(lo: Any, hi: Any, k: Any, period: float, beyond: float = SURE_OF_K) -> tuple[float, float, float]:
    """The middle of the periods that the brackets leave room for, half of how far those reach, and the most room that one of
    them has: looked for in what cannot change any k, and its ends as far as moves the outermost update by `beyond` periods.
    The room is a concave function of the period, often as wide for many. Where no period has room, the brackets are taken to
    be wider by what they miss."""
    reach = max(float(abs(k).max()), 1.0)
    a, b = period * (1 - SURE_OF_K / reach), period * (1 + SURE_OF_K / reach)
    for _ in range(STEPS):
        third = (b - a) / 3
        if _room(lo, hi, k, a + third)[0] < _room(lo, hi, k, b - third)[0]:
            a += third
        else:
            b -= third
    best = (a + b) / 2
    room = _room(lo, hi, k, best)[0]
    needed, ends = min(0.0, 2 * room), []
    for end in (period * (1 - beyond / reach), period * (1 + beyond / reach)):
        inside = best
        for _ in range(STEPS):
            if _room(lo, hi, k, (inside + end) / 2)[0] >= needed:
                inside = (inside + end) / 2
            else:
                end = (inside + end) / 2
        ends.append(inside)
    return sum(ends) / 2, (ends[1] - ends[0]) / 2, room


def knots(
    series: Series, refresh_s: float | None, period_s: float | None = None, update: tuple[int, int] | None = None
) -> tuple[list[Knot], Grid | None]:
    """The instants at which the counter is known to have been updated, and the grid they were found on, if there is one.

    With a known refresh period (`refresh_s`) every reading is a knot, at most that period old; but a value that has not
    changed for less than that period is no news. Otherwise `period_s` is a first guess of the period, and `update` an
    instant of the grid and its doubt (ns).
    """
    if refresh_s is not None:
        return _aged(series, refresh_s * 1e9), None
    found = brackets(series)
    if not found:
        return [], None
    shortest = min(series.took_ns, default=0)
    grid = fit_grid(found, period_s * 1e9 if period_s else None, period_s is not None, shortest, update)
    if grid is None and period_s and series.t_ns[-1] - series.t_ns[0] > 1.25e9 * period_s * len(series.t_ns):
        return _aged(series, period_s * 1e9), None  # read more rarely than it is updated
    if grid is None:
        loose = [Knot((b.lo_ns + b.hi_ns) / 2, (b.hi_ns - b.lo_ns) / 2, series.value[b.i]) for b in found]
        period = period_ns(found)
        if period and loose[0].t_ns - period < series.t_ns[0]:  # where the first reading's value must have come from
            loose.insert(0, Knot(loose[0].t_ns - period, loose[0].half_ns, series.value[0]))
        return loose, None
    if grid.half_ns > grid.period_ns / 4:  # the phase is not known: only the age of a value is
        return _aged(series, grid.period_ns), None
    return _on_grid(series, grid), grid


def _aged(series: Series, refresh_ns: float) -> list[Knot]:
    t, v = series.t_ns, series.value
    known: list[Knot] = []
    told = 0  # the reading of the latest knot
    for i in range(len(t)):
        changed = i > 0 and v[i] != v[i - 1]
        if i == 0 or changed or t[i] - t[told] >= refresh_ns:
            half_ns = min(refresh_ns, t[i] - t[i - 1]) / 2 if changed else refresh_ns / 2
            known.append(Knot(t[i] - half_ns, half_ns, v[i]))
            told = i
    return known


def _on_grid(series: Series, grid: Grid) -> list[Knot]:
    """A value comes from the last update before its call, or from one that the call met, and so for each call that shows
    it; each new one comes from a later update than the one before. Where that leaves several updates, it is told by knots
    around it that are sure."""
    t, v, took = series.t_ns, series.value, series.took_ns
    rows: list[list[int]] = []  # reading, and the first and last update that its value may come from
    for i in range(len(t)):
        before = grid.last_before(t[i] - (took[i] if took else 0))
        after = grid.last_before(t[i])
        if i > 0 and v[i] == v[i - 1]:
            if rows and before <= rows[-1][2] and after >= rows[-1][1]:  # both calls saw the same update
                rows[-1][1:] = max(rows[-1][1], before), min(rows[-1][2], after)
            continue
        if rows and before <= rows[-1][1]:
            before = rows[-1][1] + 1
        if before > after and before <= grid.last_before(t[i] + MOST_JITTER * grid.period_ns):
            after = before  # it came a little before its time
        if before <= after:
            rows.append([i, before, after])
    for row, later in zip(rows[-2::-1], rows[:0:-1]):
        row[2] = max(min(row[2], later[2] - 1), row[1])
    sure = [before for _, before, after in rows if before == after]
    known = []
    for i, before, after in rows:
        j = bisect_left(sure, before)
        beside = sure[max(j - 1, 0) : j + 1]
        if before == after or len(beside) < 2 or beside[1] - beside[0] > MOST_MISSED:
            half_ns = grid.half_ns + (after - before) * grid.period_ns / 2
            known.append(Knot((grid.at(before) + grid.at(after)) / 2, half_ns, v[i]))
    return known
