"""The energy of one domain at every instant of a window, for sums over many small parts of it.

The one idea: the course of energy that `curve` finds is straight between points: the counter's knots, and the power samples
that shape the cells between them. One lookup in them replaces one search per part, and what adjacent parts get adds up to
what both get together.

Not covered: the interval of a part (`attribution`, `phases`), whose energy that is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

from .course import NEARBY_NS, Course
from .curve import around, rising_part
from .samples import Samples, on_line
from .trace import Series, Trace

Points = list[tuple[float, float]]
SAME_NS = 10.0  # points closer than this are one


class Polyline(NamedTuple):
    """Energy at every instant: straight between points at `t_ns` (from `origin_ns`) and `joules` (from any origin), arrays.
    All points may lie up to `shift_ns` beside their true instants, alike."""

    origin_ns: int
    t_ns: Any
    joules: Any
    shift_ns: float

    def at(self, instants_ns: Any) -> Any:
        """Joules at each instant."""
        import numpy as np

        return np.interp(np.asarray(instants_ns) - self.origin_ns, self.t_ns, self.joules)


def between(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> Polyline | None:
    """The energy of domain `key` from `t0_ns` to `t1_ns` and a little beyond; None where `energy_between` knows none.

    The knots, samples and edges of `energy_between`; a window of more than 12 s is made of several courses, and its ends may
    then differ from those by part of the interval.
    """
    import numpy as np

    shift_ns = 0.0
    if trace.domains[key].gauge is not None:
        points = _of_gauge(trace, key, t0_ns, t1_ns)
    else:
        points, shift_ns = _of_counter(trace, key, t0_ns, t1_ns)
    if len(points) < 2:
        return None
    instants, joules = np.array(sorted(points)).T
    later = np.concatenate([[True], np.diff(instants) > SAME_NS])
    return Polyline(t0_ns, instants[later] - t0_ns, np.maximum.accumulate(joules[later]), shift_ns)


def _of_counter(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> tuple[Points, float]:
    chunk = 4 * NEARBY_NS
    series = around(trace, key, t0_ns, t1_ns)
    t = series.t_ns
    rising = rising_part(series, max(bisect_right(t, t0_ns) - 1, 0), bisect_left(t, t1_ns)) if t else None
    if rising is None:
        return [], 0.0
    points: Points = []
    shift_ns = 0.0
    for start in range(t0_ns, t1_ns, chunk):
        end = min(start + chunk, t1_ns)
        course = Course(trace, key, rising, start, end)
        found, beside_ns = course.points()
        if not found:
            return [], 0.0
        points += (p for p in found if (start <= p[0] or start == t0_ns) and (p[0] < end or end == t1_ns))
        for edge_ns in {t0_ns, t1_ns} & {start, end}:
            edge = course.edge(edge_ns)
            if edge is None:
                return [], 0.0
            if not found[0][0] <= edge_ns <= found[-1][0]:
                points.append((edge_ns, edge.joules))
        shift_ns = max(shift_ns, beside_ns)
    return points, shift_ns


def _of_gauge(trace: Trace, key: str, t0_ns: int, t1_ns: int) -> Points:
    domain = trace.domains[key]
    near = trace.gauges.get(domain.gauge or "", Series()).between(t0_ns - NEARBY_NS, t1_ns + NEARBY_NS)
    t, p = near.t_ns, near.value
    if len(t) < 2 or t[0] > t0_ns:
        return []
    if domain.means:
        samples = Samples(near)
        return [(t_ns, samples.sum_to(t_ns)) for t_ns in {*t, *samples.breaks_ns(t[0], t[-1]), t1_ns}]
    line = sorted({t_ns: on_line(t, p, t_ns) for t_ns in (*t, t0_ns, t1_ns)}.items())
    steps = ((pa + pb) / 2 * (tb - ta) * 1e-9 for (ta, pa), (tb, pb) in itertools.pairwise(line))
    return [(t_ns, joules) for (t_ns, _), joules in zip(line, itertools.accumulate(steps, initial=0.0))]
