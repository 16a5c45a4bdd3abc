"""Whose energy it was: a window's energy shared among the requests that were at work in it.

The one idea: at each instant the power is shared among the requests then at work, by the tokens that each has in the step.
So the shares of all requests and what fell in nobody's time are the window's energy, to the last digit.

    prefill  from its begin (`Completion.prefill_ns`) to the first event: the prompt's tokens, less cached ones, spread
             evenly over that time
    decode   from one event to the next: the later one's tokens, spread evenly over the gap
    out      while the engine had it out of its batch (`Completion.preempted_ns`): no share. What it then computes again, the
             prompt and the tokens so far, is spread evenly over the time until the next event
    unknown  a prompt of unknown length, the time after which a request failed: an equal part of the power for each of these,
             the rest by tokens
    nobody   no request between begin of prefill and last event: "unattributed"

Sharing is a convention, and the intervals say nothing about it: they hold the doubt about the energy at the instants between
which a request was at work. Not covered: prefill against decode of a whole run (`phases`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from . import metrics, shaping
from .measurement import Completion, Energy, Measurement


class Shares(NamedTuple):
    """`joules` and `half_width` (of their 95 % intervals) of each request, in the order of the measurement's completions.

    `math.fsum([*joules, unattributed_j])` is `metrics.energy_j(m).value`. `keys`, `method` and `scopes` are those of it.
    """

    joules: list[float]
    half_width: list[float]
    unattributed_j: float
    keys: tuple[str, ...]
    method: str
    scopes: tuple[str, ...]


class Rows(NamedTuple):
    """Stretches of time in which a request worked on tokens at one rate (per ns; NaN: unknown). One array each."""

    owner: Any
    start_ns: Any
    end_ns: Any
    rate: Any
    prefill: Any


def per_request(m: Measurement) -> Shares | None:
    """Energy of each request, J. None without requests, or where the total or its course is not known.

        E_i = sum over time of dE * w_i(t)      w_i = tokens/s of request i / tokens/s of all at work
        u_i = hypot(w_p * doubt(dispatch), (w_p - w_d) * doubt(first event), w_d * doubt(last event), E_i * u / E)

    w_p and w_d are its mean shares in prefill and in decode, u / E is the window's own interval, `doubt` the energy's at an
    instant (`shaping.Shaped.doubt_j`); those of a preemption count likewise. Each repeat is shared by itself; what rounding
    leaves goes to one of the parts.
    """
    import numpy as np

    total = metrics.energy_j(m)
    windows: list[tuple[int, int, Mapping[str, Energy]]]
    windows = [(r.t0_ns, r.t1_ns, r.energy) for r in m.repeats] or [(m.t0_ns, m.t1_ns, m.energy)]
    if total is None or not m.completions:
        return None
    repeat = np.array([c.repeat if m.repeats else 0 for c in m.completions])
    if repeat.min() < 0 or repeat.max() >= len(windows):
        return None
    courses = shaping.courses(m, total.keys, shaping.states(m.completions, m.t0_ns, m.t1_ns))
    if courses is None:
        return None
    joules, half = np.zeros(len(repeat)), np.zeros(len(repeat))
    nobodys = 0.0
    for number, window in enumerate(windows):
        mine = np.flatnonzero(repeat == number)
        found = _in_window([m.completions[i] for i in mine], window, total.keys, courses)
        if found is None:
            return None
        joules[mine], half[mine] = found[:2]
        nobodys += found[2]
    parts = _summing_to(total.value, [*joules.tolist(), nobodys])
    return Shares(parts[:-1], half.tolist(), parts[-1], total.keys, total.method, total.scopes)


def _summing_to(total: float, parts: list[float]) -> list[float]:
    """The parts, one of them replaced by what the others leave of the total: the largest for which the sum is then exact. It
    is not where that remainder lies half-way between two numbers."""
    for i in sorted(range(len(parts)), key=parts.__getitem__, reverse=True):
        rest = math.fsum([total, parts[i], *(-part for part in parts)])
        fitted = [*parts[:i], rest, *parts[i + 1 :]]
        if rest >= 0 and math.fsum(fitted) == total:
            return fitted
    return parts


def _in_window(
    completions: Sequence[Completion],
    window: tuple[int, int, Mapping[str, Energy]],
    keys: Sequence[str],
    courses: Sequence[shaping.Shaped],
) -> tuple[Any, Any, float] | None:
    """Joules and half-width of each request, and joules of nobody, in one window."""
    import numpy as np

    t0_ns, t1_ns, energy = window
    seen = [float(course.line.at(t1_ns) - course.line.at(t0_ns)) for course in courses]
    if not min(seen) > 0.0:
        return None
    scales = [(energy[key].joules or 0.0) / joules for key, joules in zip(keys, seen)]

    def at(instants: Any) -> Any:
        return sum(course.line.at(instants) * scale for course, scale in zip(courses, scales))

    rows = work(completions, t0_ns, t1_ns)
    cuts = np.sort(np.concatenate([rows.start_ns, rows.end_ns, [t0_ns, t1_ns]]))
    cuts = cuts[np.concatenate([[True], np.diff(cuts) > 0])]
    row_j, nobodys = _shared(rows, cuts, np.diff(at(cuts)))
    n = len(completions)
    joules = np.bincount(rows.owner, row_j, n)
    prefill_j = np.bincount(rows.owner[rows.prefill], row_j[rows.prefill], n)
    edges = [np.clip(instants, t0_ns, t1_ns) for instants in shaping.edges(completions)]
    e0, e1, e2 = (at(instants) for instants in edges)
    w0 = np.divide(prefill_j, e1 - e0, out=np.zeros(n), where=e1 > e0)
    w1 = np.divide(joules - prefill_j, e2 - e1, out=np.zeros(n), where=e2 > e1)
    again = shaping.redone(completions)
    variance = np.zeros(n)
    for key, course in zip(keys, courses):
        for instants, change in zip(edges, (w0, w0 - w1, w1)):
            variance += (change * course.doubt_j(instants)) ** 2
        for instants in (again.out_ns, again.back_ns):
            doubt = np.where(again.early, w0[again.owner], w1[again.owner]) * course.doubt_j(np.clip(instants, t0_ns, t1_ns))
            variance += np.bincount(again.owner, doubt**2, n)
        variance += ((energy[key].uncertainty_j or 0.0) / sum(seen) * joules) ** 2
    return joules, np.sqrt(variance), nobodys


def work(completions: Sequence[Completion], t0_ns: int, t1_ns: int) -> Rows:
    """What each request did when, inside a window. Tokens that came at one instant share the gap before it."""
    import numpy as np

    counts = np.array([len(c.events) for c in completions], dtype=np.int64)
    flat = chain.from_iterable(chain.from_iterable(c.events for c in completions))
    events = np.fromiter(flat, np.int64, 2 * counts.sum()).reshape(-1, 2)
    end, tokens = events[:, 0], events[:, 1].astype(np.float64)
    owner = np.repeat(np.arange(len(counts)), counts)
    first = (np.cumsum(counts) - counts)[counts > 0]
    opens = np.zeros(len(end), dtype=bool)
    opens[first] = True
    start = np.concatenate([end[:1], end[:-1]])
    tokens[~opens & (end == np.repeat(end[first], counts[counts > 0]))] = 0.0  # the first event's, which prefill made
    seen = [c for c in completions if c.events]
    start[first] = [c.prefill_ns for c in seen]
    tokens[first] = [math.nan if c.prompt_tokens is None else max(c.prompt_tokens - (c.cached_tokens or 0), 1) for c in seen]
    kept = np.flatnonzero(opens | (end > start))
    if len(kept):
        tokens = np.add.reduceat(tokens, kept)
    owner, start, end, opens = owner[kept], start[kept], end[kept], opens[kept]
    again = shaping.redone(completions)
    if len(again.owner):  # the stretch in which it was taken out ends there; how far it had come by then is not known
        rows = zip(np.searchsorted(owner, again.owner), np.searchsorted(owner, again.owner, "right"), again.back_ns)
        cut = [i + np.searchsorted(end[i:j], back_ns) for i, j, back_ns in rows]
        np.minimum.at(end, cut, again.out_ns)
        tokens[cut] = math.nan
        ours = (owner, start, end, tokens, opens)
        more = (again.owner, again.back_ns, again.until_ns, again.tokens, again.early)
        owner, start, end, tokens, opens = (np.concatenate(pair) for pair in zip(ours, more))
    failed = [(i, c.events[-1][0] if c.events else c.prefill_ns, c.done_ns) for i, c in enumerate(completions) if c.error]
    if failed:
        tail = np.array(failed, dtype=np.int64).T
        owner, start, end = (np.concatenate([a, b]) for a, b in zip((owner, start, end), tail))
        tokens = np.concatenate([tokens, np.full(len(failed), math.nan)])
        opens = np.concatenate([opens, np.zeros(len(failed), dtype=bool)])
    rate = np.divide(tokens, end - start, out=np.zeros(len(end)), where=end > start)
    start, end = np.clip(start, t0_ns, t1_ns), np.clip(end, t0_ns, t1_ns)
    inside = end > start
    return Rows(owner[inside], start[inside], end[inside], rate[inside], opens[inside])


def _shared(rows: Rows, cuts: Any, step_j: Any) -> tuple[Any, float]:
    """Joules of each row, and of nobody, when `step_j` was used between successive `cuts`."""
    import numpy as np

    i, j = np.searchsorted(cuts, rows.start_ns), np.searchsorted(cuts, rows.end_ns)
    known = np.isfinite(rows.rate)

    def at_work(which: Any, weight: Any) -> Any:
        changes = np.bincount(i[which], weight, len(cuts)) - np.bincount(j[which], weight, len(cuts))
        return np.cumsum(changes)[:-1]

    n, n_known = at_work(slice(None), None), at_work(known, None)
    rates = at_work(known, rows.rate[known])
    each = np.divide(step_j, n, out=np.zeros(len(n)), where=n > 0)
    per_token = np.divide(each * n_known, rates, out=np.zeros(len(n)), where=(n_known > 0) & (rates > 0))
    per_token, per_head = (np.concatenate([[0.0], np.cumsum(x)]) for x in (per_token, each))
    by_tokens = np.where(known, rows.rate, 0.0) * (per_token[j] - per_token[i])
    return np.where(known, by_tokens, per_head[j] - per_head[i]), float(step_j[n == 0].sum())
