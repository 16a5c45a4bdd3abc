"""Steady state: when a warm-up is over, and which part of a run had its full load.

The one idea: nothing is trimmed by rule of thumb. Settled is a test on the latest step latencies, drifting one on a gauge;
and the steady part of a run is found from its own requests, with every token credited to the instant at which it came.

    concurrency(t)   requests between dispatch and done
    steady           the longest time at or above `share` of the highest concurrency; dips below `bridge_s` do not end it
    ramp, drain      what comes before, and after

Concurrency is what was handed over: an engine that queues a burst works at full load for longer than this sees, so measure
its steady state with a closed loop. Not covered: what to do about it (`session`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .errors import LemError
from .measurement import Completion
from .statistics import student_t
from .trace import Series


def settled(step_latencies_s: Sequence[float], window: int = 10, most_cv: float = 0.05, most_slope: float = 0.05) -> bool:
    """Whether the last `window` step latencies neither scatter nor go anywhere.

        cv    = standard deviation (n - 1) / mean                            <= most_cv
        slope = |least-squares slope per step| * (window - 1) / mean         <= most_slope: the change across the window

    False while there are fewer than `window` of them.
    """
    latest = list(step_latencies_s)[-window:]
    if len(latest) < max(window, 2):
        return False
    mean = sum(latest) / len(latest)
    if not (math.isfinite(mean) and mean > 0):
        return False
    cv = math.sqrt(sum((x - mean) ** 2 for x in latest) / (len(latest) - 1)) / mean
    slope = slope_of(range(len(latest)), latest)
    return cv <= most_cv and abs(slope) * (len(latest) - 1) / mean <= most_slope


def level(step_latencies_s: Sequence[float], window: int = 6) -> bool:
    """Whether the last `window` step latencies, however they scatter, go nowhere that the scatter does not explain.

        |slope| <= t(window - 2) * s / sqrt(sum((i - mean i)^2))        s: spread around the least-squares line

    False while there are fewer than `window` of them.
    """
    latest = list(step_latencies_s)[-window:]
    if len(latest) < max(window, 3) or not all(math.isfinite(x) for x in latest):
        return False
    n, mean = len(latest), sum(latest) / len(latest)
    slope = slope_of(range(n), latest)
    rest = sum((x - mean - slope * (i - (n - 1) / 2)) ** 2 for i, x in enumerate(latest))
    return abs(slope) <= student_t(n - 2) * math.sqrt(rest / (n - 2) / sum((i - (n - 1) / 2) ** 2 for i in range(n)))


def drifting(series: Series, most_per_s: float, over_s: float = 10.0) -> bool | None:
    """Whether a gauge (temperature, power) rose or fell faster than `most_per_s` of its units per second during its last
    `over_s` seconds: |least-squares slope| > most_per_s. None with fewer than three readings there, or when they cover less
    than half of that time: then it is not known."""
    if not series.t_ns:
        return None
    latest = series.between(series.t_ns[-1] - round(over_s * 1e9), series.t_ns[-1])
    seconds = [(t - latest.t_ns[0]) / 1e9 for t in latest.t_ns]
    if len(seconds) < 3 or seconds[-1] < over_s / 2:
        return None
    return abs(slope_of(seconds, latest.value)) > most_per_s


def slope_of(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through the points."""
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y))
    return over / sum((a - x_mean) ** 2 for a in x)


class Phases(NamedTuple):
    """The instants (ns) that bound ramp, steady state and drain. `peak`: the highest concurrency."""

    begin_ns: int
    steady_ns: int
    drain_ns: int
    end_ns: int
    peak: int

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """From and to of "ramp", "steady" and "drain", ns. Ramp and drain may be empty."""
        return {
            "ramp": (self.begin_ns, self.steady_ns),
            "steady": (self.steady_ns, self.drain_ns),
            "drain": (self.drain_ns, self.end_ns),
        }


def phases_of_run(completions: Iterable[Completion], share: float = 0.9, bridge_s: float = 0.01) -> Phases | None:
    """Ramp, steady state and drain of one repeat, from its first dispatch to its last request's end; None without requests.

    `bridge_s`: a closed loop is below its concurrency for the instant between one request's end and the next one's dispatch,
    and that does not end a steady state. LemError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise LemError(f"share= is a part of the peak concurrency, above 0 and at most 1: got {share}.")
    stays = [(c.dispatch_ns, c.done_ns) for c in completions if c.done_ns > c.dispatch_ns]
    if not stays:
        return None
    changes = sorted([(t0, 1) for t0, _ in stays] + [(t1, -1) for _, t1 in stays])  # at one instant, ends come first
    levels: list[tuple[int, int]] = []  # (instant, concurrency from then on)
    at_work = 0
    for t_ns, change in changes:
        at_work += change
        levels.append((t_ns, at_work))
    peak = max(level for _, level in levels)
    full = [(a[0], b[0]) for a, b in itertools.pairwise(levels) if a[1] >= share * peak]
    joined: list[tuple[int, int]] = []
    for start, end in full:
        if joined and start - joined[-1][1] <= bridge_s * 1e9:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    steady_ns, drain_ns = max(joined, key=lambda span: span[1] - span[0])
    return Phases(changes[0][0], steady_ns, drain_ns, changes[-1][0], peak)


def steady_window(completions: Iterable[Completion], share: float = 0.9, bridge_s: float = 0.01) -> tuple[int, int] | None:
    """From and to of the steady state (`phases_of_run`), ns."""
    phases = phases_of_run(completions, share, bridge_s)
    return phases.spans["steady"] if phases else None


def output_tokens_between(completions: Iterable[Completion], start_ns: int, end_ns: int) -> int:
    """Output tokens that came after `start_ns` and up to `end_ns`: adjacent spans share none. A request that an edge cuts
    counts with its tokens inside."""
    return sum(n for c in completions for t_ns, n in c.events if start_ns < t_ns <= end_ns)


def output_tokens_per_s(completions: Sequence[Completion], share: float = 0.9, bridge_s: float = 0.01) -> float | None:
    """Output throughput of the steady state, tokens/s; None without one. (sglang's benchmark: steady-state throughput.)"""
    window = steady_window(completions, share, bridge_s)
    if window is None or window[1] <= window[0]:
        return None
    return output_tokens_between(completions, *window) / ((window[1] - window[0]) / 1e9)
