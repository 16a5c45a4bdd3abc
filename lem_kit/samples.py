"""The course of power between samples of it.

The one idea: a sample is the mean since the sample before, so energy is straight in each piece; where one piece lies between
a steady power before and another after it, the load stepped inside it.

Samples of an H100 are due every 20.00 ms, and one in five is stamped 3 to 10 ms late (`docs/gpu.md`). Its power is that of
the time until it was due, so the stamps are put on their grid.

Not covered: which part of a counter's energy it is (`course`), power of an instant (`curve`).
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from .trace import Series

# How much more or less than a sample of power says there may be inside it, as a part of it, where nothing tells.
HIDDEN = 0.05
# A change of power is a step when it is so many times larger than the changes beside it.
STEEP = 3.0
# So many samples after an instant, the one around it and two more, tell whether the load stepped there.
SEEN_AFTER = 3
# Stamps are put on a grid if there are so many, and at least half of them lie on it, to such a part of its period. A sample
# that comes later than another part of it may be of another time.
LEAST_STAMPS = 20
ON_GRID = 0.02
LATEST = 0.7


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
        self.t_ns, self.watts = on_time(series.t_ns), series.value
        t, p = self.t_ns, self.watts
        steps = ((t[j] - t[j - 1]) * 1e-9 * p[j] for j in range(1, len(t)))
        self._sums = array("d", itertools.accumulate(steps, initial=0.0))

    def sum_to(self, t_ns: float) -> float:
        """Joules up to an instant; the last sample speaks for what follows it, too."""
        t, p = self.t_ns, self.watts
        j = min(bisect_left(t, t_ns), len(t) - 1)
        if 2 <= j <= len(t) - SEEN_AFTER and (at := step(*p[j - 2 : j + 3])) is not None:
            piece_ns = t[j] - t[j - 1]
            left_ns = min(t_ns - t[j - 1], at * piece_ns)
            return self._sums[j - 1] + (p[j - 1] * left_ns + p[j + 1] * (t_ns - t[j - 1] - left_ns)) * 1e-9
        return self._sums[j] - p[j] * (t[j] - t_ns) * 1e-9

    def resolved(self, t_ns: float) -> bool:
        """Whether a step in the piece around an instant would be seen."""
        return bisect_left(self.t_ns, t_ns) <= len(self.t_ns) - SEEN_AFTER

    def breaks_ns(self, start_ns: float, end_ns: float) -> list[float]:
        """Instants between two others, in order, at which the course has another slope: those of the samples, and steps."""
        t, p = self.t_ns, self.watts
        first, end = bisect_right(t, start_ns), bisect_left(t, end_ns)
        found: list[float] = list(t[first:end])
        for j in range(max(first, 2), min(end, len(t) - SEEN_AFTER) + 1):
            at = step(*p[j - 2 : j + 3])
            found += [] if at is None else [t[j - 1] + at * (t[j] - t[j - 1])]
        return sorted(t_ns for t_ns in found if start_ns < t_ns < end_ns)

    def around(self, t_ns: int) -> tuple[float, float, float]:
        """Power (J/ns) at an instant; and how much energy (J) the piece around it may have elsewhere than assumed: by the
        range of it and its neighbours, with a margin where power is not steady; and by what no sample shows (`HIDDEN`)."""
        t, p = self.t_ns, self.watts
        j = min(max(bisect_left(t, t_ns), 1), len(t) - 1)
        piece_ns = t[j] - t[j - 1]
        f = min(max((t_ns - t[j - 1]) / piece_ns, 0.0), 1.0)
        spread, hidden = max(p[j - 1 : j + 2]) - min(p[j - 1 : j + 2]), HIDDEN * p[j]
        if j == len(t) - 1:  # a step half-way in the last one goes twice as far as its mean
            spread *= 2
        around_j_per_w = 1e-9 * f * (1 - f) * piece_ns
        return p[j] * 1e-9, (spread + min(spread, hidden)) * around_j_per_w, hidden * around_j_per_w


def on_time(stamps: array[int]) -> array[int]:
    """Instants at which samples were due (ns), from their stamps, of which some come late and none early. The same stamps
    where they keep to no grid."""
    import numpy as np

    if len(stamps) < LEAST_STAMPS:
        return stamps
    t = np.array(stamps, dtype=np.int64) - stamps[0]
    period = float(np.median(np.diff(t)))
    for reach in (1, 4, 16, 64, 256):  # so many apart tell it well enough to count those that are four times as far apart
        if reach < len(t) / 2:
            apart = t[reach:] - t[:-reach]
            period = float(np.median(apart / np.maximum(np.rint(apart / period), 1)))
    late = np.sort(t % period)
    twice = np.concatenate([late, late + period])
    alike = np.searchsorted(twice, late + ON_GRID * period) - np.arange(len(late))
    first = int(np.argmax(alike))
    if alike[first] < len(t) / 2:
        return stamps
    phase = float(np.median(twice[first : first + alike[first]]))
    late = (t - phase + ON_GRID * period) % period - ON_GRID * period
    due = np.where(late < LATEST * period, np.rint(t - late).astype(np.int64), t)
    return array("q", (due + stamps[0]).tolist()) if np.all(np.diff(due) > 0) else stamps


def on_line(t: Sequence[int], p: Sequence[float], t_ns: int) -> float:
    """Value at an instant on the line through the points; beyond them, that of the nearest."""
    j = bisect_left(t, t_ns)
    if j in (0, len(t)):
        return p[min(j, len(t) - 1)]
    return p[j - 1] + (p[j] - p[j - 1]) * (t_ns - t[j - 1]) / (t[j] - t[j - 1])
