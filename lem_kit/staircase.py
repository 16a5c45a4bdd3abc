"""When a counter was really updated: from readings to knots.

The one idea: a hardware counter is a staircase. It stands still, then jumps by the energy of its last refresh period. A
reading tells the value but not its age; a *change* between two readings tells that an update happened between the beginning
of the one call and the end of the other (calls can take 20 ms). Most counters are refreshed by a clock, so their updates lie
on a grid `phase + k * period`, and all brackets together confine that grid far better than any bracket confines its update.

    1. k of each bracket that is narrow enough to belong to one update, by the period that is known or seen; outwards from
       the narrowest, so that no k is guessed.
    2. The period for which the brackets leave the widest common room for the phase; the phase in the middle of that room.
    3. No room (updates that do not keep to a grid): every update is only known to lie in its own bracket.

An H100's counter keeps to a grid of 100.00 ms within 2 ms (`docs/method.md`).

Not covered: the energy between the knots (`curve`), when to read (`pace`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from .trace import Series

# Brackets needed before a grid is believed, and how far they may miss a common phase, as a fraction of the period.
LEAST_BRACKETS = 4
MOST_JITTER = 0.1
# A bracket tells nothing about the grid if it is wider than so many periods.
WIDEST = 1.5


class Knot(NamedTuple):
    """The counter took `joules` at some instant in (t_ns - half_ns, t_ns + half_ns]."""

    t_ns: float
    half_ns: float
    joules: float


class Grid(NamedTuple):
    """Updates happen at phase_ns + k * period_ns, for whole k; `half_ns` is the doubt about the phase, `room_ns` how far it
    may move at this very period. `corners`: (phase_ns, period_ns) of other grids that the brackets just allow."""

    phase_ns: float
    period_ns: float
    half_ns: float
    room_ns: float = 0.0
    corners: tuple[tuple[float, float], ...] = ()

    def last_before(self, t_ns: float) -> int:
        """The k of the last update at or before `t_ns`."""
        return int((t_ns - self.phase_ns) // self.period_ns)

    def at(self, k: int) -> float:
        return self.phase_ns + k * self.period_ns

    def apart_ns(self, t_ns: float) -> list[float]:
        """How much later each of the other grids has the update at `t_ns`."""
        k = (t_ns - self.phase_ns) / self.period_ns
        return [phase - self.phase_ns + k * (period - self.period_ns) for phase, period in self.corners]


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


def fit_grid(found: Sequence[Bracket], period: float | None = None, known: bool = False) -> Grid | None:
    """The grid that the brackets agree on; None if they are too few or do not agree.

    `period` (ns) is a first guess; where it is `known` from a longer time, it is kept if the brackets allow it.
    """
    import numpy as np

    period = period or period_ns(found)
    if period is None or period <= 0:
        return None
    # A value that is new since more updates than one may be that of any of them.
    found = [b for b in found if b.hi_ns - b.lo_ns < WIDEST * period]
    if len(found) < LEAST_BRACKETS:
        return None
    lo, hi = (np.array([getattr(b, name) for b in found], dtype=np.float64) for name in ("lo_ns", "hi_ns"))
    origin = float(hi[np.argmin(hi - lo)])
    lo, hi = lo - origin, hi - origin
    # All brackets, or else all but one in twenty on either side: a call now and then returns what it found long before.
    for slack in dict.fromkeys((0, len(found) // 20)):
        k, its_period = np.rint(hi / period), period
        room, middle = _room(lo, hi, k, period, slack)
        if not (known and room >= 0.0):
            k, its_period = _search(lo, hi, period, slack)
            room, middle = _room(lo, hi, k, its_period, slack)
        if room >= 0.0:
            break
    if room < -MOST_JITTER * its_period:
        return None
    best = _best_period(lo, hi, k, its_period, slack) if known else its_period
    widest = max(room, _room(lo, hi, k, best, slack)[0])
    border = _border(lo, hi, k, best, slack)
    if not known and (border is None or not _one_each(lo, hi, middle, its_period)):
        return None
    border = border or [(middle - widest / 2, its_period), (middle + widest / 2, its_period)]
    corners = tuple((origin + phase, p) for phase, p in border)
    return Grid(origin + middle, float(its_period), abs(widest) / 2, abs(room) / 2, corners)


def _search(lo: Any, hi: Any, period: float, slack: int) -> tuple[Any, float]:
    """k of each bracket and the period with the most room, outwards from the narrowest bracket."""
    import numpy as np

    for reach in (4, 16, 64, 1 << 40):
        k = np.rint(hi / period)
        near = np.abs(k) <= reach
        period = _best_period(lo[near], hi[near], k[near], period, slack if np.all(near) else 0)
        if np.all(near):
            break
    return np.rint(hi / period), period


def _border(lo: Any, hi: Any, k: Any, period: float, slack: int) -> list[tuple[float, float]] | None:
    """The border of all (phase, period) that the brackets allow, around a period that they do allow; None where it lies so
    far off that other k would be allowed as well."""
    import numpy as np

    reach = max(float(abs(k).max()), 1.0)
    ends: list[float] = []
    for far in (period * (1 - 0.5 / reach), period * (1 + 0.5 / reach)):
        inside = period
        if _room(lo, hi, k, far, slack)[0] >= 0.0:
            return None
        for _ in range(7):
            between = (inside + far) / 2
            inside, far = (between, far) if _room(lo, hi, k, between, slack)[0] >= 0.0 else (inside, between)
        ends.append(inside)
    border = []
    for p in np.linspace(ends[0], ends[1], 5):
        room, middle = _room(lo, hi, k, p, slack)
        border += [(middle - abs(room) / 2, float(p)), (middle + abs(room) / 2, float(p))]
    return border


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


def _room(lo: Any, hi: Any, k: Any, period: float, slack: int) -> tuple[float, float]:
    """How much room the brackets leave for the phase, less than none where they contradict each other, and its middle.
    `slack` of them may miss it on either side."""
    low, high = lo - k * period, hi - k * period
    if slack:
        low.partition(-1 - slack)
        high.partition(slack)
    lowest, highest = (float(low[-1 - slack]), float(high[slack])) if slack else (float(low.max()), float(high.min()))
    return highest - lowest, (highest + lowest) / 2


def _best_period(lo: Any, hi: Any, k: Any, period: float, slack: int) -> float:
    """The period with the most room, within what cannot change any k. The room is a concave function of the period."""
    reach = max(float(abs(k).max()), 1.0)
    a, b = period * (1 - 0.25 / reach), period * (1 + 0.25 / reach)
    for _ in range(16):
        third = (b - a) / 3
        if _room(lo, hi, k, a + third, slack)[0] < _room(lo, hi, k, b - third, slack)[0]:
            a += third
        else:
            b -= third
    return (a + b) / 2


def knots(series: Series, refresh_s: float | None, period_s: float | None = None) -> tuple[list[Knot], Grid | None]:
    """The instants at which the counter is known to have been updated, and the grid they were found on, if there is one.

    With a known refresh period (`refresh_s`) every reading is a knot, at most that period old; but a value that has not
    changed for less than that period is no news. Otherwise `period_s` is a first guess of the period.
    """
    if refresh_s is not None:
        return _aged(series, refresh_s * 1e9), None
    found = brackets(series)
    if not found:
        return [], None
    grid = fit_grid(found, period_s * 1e9 if period_s else None, known=period_s is not None)
    if grid is None and period_s is not None and median(b.hi_ns - b.lo_ns for b in found) >= WIDEST * period_s * 1e9:
        return _aged(series, period_s * 1e9), None  # read more rarely than it is updated: only the age of a value is known
    if grid is None:
        loose = [Knot((b.lo_ns + b.hi_ns) / 2, (b.hi_ns - b.lo_ns) / 2, series.value[b.i]) for b in found]
        period = period_ns(found)
        if period and loose[0].t_ns - period < series.t_ns[0]:  # where the first reading's value must have come from
            loose.insert(0, Knot(loose[0].t_ns - period, loose[0].half_ns, series.value[0]))
        return loose, None
    if grid.half_ns > grid.period_ns / 4:
        return _aged(series, grid.period_ns), None
    return _on_grid(series, grid), grid


def _aged(series: Series, refresh_ns: float) -> list[Knot]:
    """Values that were `refresh_ns` old at most when their call found them."""
    t, v, took = series.t_ns, series.value, series.took_ns
    known: list[Knot] = []
    told = 0  # the reading of the latest knot
    for i in range(len(t)):
        changed = i > 0 and v[i] != v[i - 1]
        if i == 0 or changed or t[i] - t[told] >= refresh_ns:
            oldest_ns = refresh_ns + (took[i] if took else 0)
            if changed:
                oldest_ns = min(oldest_ns, t[i] - t[i - 1] + (took[i - 1] if took else 0))
            known.append(Knot(t[i] - oldest_ns / 2, oldest_ns / 2, v[i]))
            told = i
    return known


def _on_grid(series: Series, grid: Grid) -> list[Knot]:
    """A value comes from the last update before its call, or from one that the call met: then the one that makes it new."""
    t, v, took = series.t_ns, series.value, series.took_ns
    rows: list[list[int]] = []  # reading, and the first and last update that its value may come from
    last: int | None = None  # the update that the value now showing came from
    for i in range(len(t)):
        if i > 0 and v[i] == v[i - 1]:
            continue
        before = grid.last_before(t[i] - (took[i] if took else 0) - grid.room_ns)
        after = grid.last_before(t[i] + grid.room_ns)
        if last is not None and after <= last < grid.last_before(t[i] + MOST_JITTER * grid.period_ns):
            after = last + 1  # it came a little before its time
        if last is not None and before <= last:
            before = last + 1
        if before <= after:
            rows.append([i, before, after])
            last = after if last is not None or before == after else None
    for row, later in zip(rows[-2::-1], rows[:0:-1]):  # what the first values may come from is told by those after them
        row[2] = max(min(row[2], later[2] - 1), row[1])
    return [
        Knot((grid.at(before) + grid.at(after)) / 2, grid.half_ns + (after - before) * grid.period_ns / 2, v[i])
        for i, before, after in rows
    ]
