"""Steady state: when a warm-up is over, and which part of a run had its full load.

The one idea: nothing is trimmed by rule of thumb. Settled is a test on the latest step latencies, drifting one on a gauge;
and the steady part of a run is found from its own requests, with every token credited to the instant at which it came.

    at work (t)      requests between dispatch and done, less those that the engine's log of its steps shows waiting
    full             the most at work at once; with a log, the most that were in the engine's batch at a step
    steady           the longest time at or above `share` of full; dips below `bridge_s` do not end it. With a log it begins
                     with the first step whose batch was that full, or later
    ramp, drain      what comes before, and after

The batch alone would not do: in a closed loop each place stands empty for the one or two steps that it takes to send the
next request, and those who are on their way are no end of the full load. Without a log, an engine that queues a burst works
at full load for longer than this sees: measure its steady state with a closed loop.

Not covered: what to do about it (`session`); an engine whose batch shrinks for want of cache, of which only the fullest time
is called steady.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .errors import LemError
from .measurement import Completion, Measurement
from .statistics import student_t
from .trace import Series, Trace


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


class StepLog(NamedTuple):
    """What an engine logged at the end of each of its steps: requests in its batch, and those that waited for a place."""

    batch: Series
    waiting: Series

    def between(self, start_ns: int, end_ns: int) -> StepLog:
        return StepLog(self.batch.between(start_ns, end_ns), self.waiting.between(start_ns, end_ns))


def step_log(trace: Trace) -> StepLog | None:
    """The steps of a record's engine (`backends.Backend.steps`); None where it logged none, or not both columns."""
    for key, batch in trace.gauges.items():
        source, _, quantity = key.rpartition(".")
        waiting = trace.gauges.get(f"{source}.waiting_requests")
        if quantity == "batch_requests" and batch.t_ns and waiting is not None and waiting.t_ns == batch.t_ns:
            return StepLog(batch, waiting)
    return None


BY_REQUESTS = "requests between dispatch and done"
BY_STEPS = "requests between dispatch and done, less those that waited at the engine's steps"


class Phases(NamedTuple):
    """The instants (ns) that bound ramp, steady state and drain. `peak`: what full load was, in requests. `method`: who was
    counted as at work, for people."""

    begin_ns: int
    steady_ns: int
    drain_ns: int
    end_ns: int
    peak: int
    method: str = BY_REQUESTS

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """From and to of "ramp", "steady" and "drain", ns. Ramp and drain may be empty."""
        return {
            "ramp": (self.begin_ns, self.steady_ns),
            "steady": (self.steady_ns, self.drain_ns),
            "drain": (self.drain_ns, self.end_ns),
        }


def phases_of_run(
    completions: Iterable[Completion], share: float = 0.9, bridge_s: float = 0.01, steps: StepLog | None = None
) -> Phases | None:
    """Ramp, steady state and drain of one repeat, from its first dispatch to its last request's end; None without requests.

    `bridge_s`: a closed loop is below its concurrency for the instant between one request's end and the next one's dispatch,
    and that does not end a steady state. `steps`: the engine's own (`step_log`), of which those during the repeat count;
    where there are none, or the requests never fill the batch that they tell of, the requests alone are counted. LemError
    for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise LemError(f"share= is a part of the peak concurrency, above 0 and at most 1: got {share}.")
    stays = [(c.dispatch_ns, c.done_ns) for c in completions if c.done_ns > c.dispatch_ns]
    if not stays:
        return None
    begin_ns, end_ns = min(t0_ns for t0_ns, _ in stays), max(t1_ns for _, t1_ns in stays)
    logged = steps.between(begin_ns + 1, end_ns) if steps else None
    if logged and (peak := int(max(logged.batch.value, default=0))):
        first = next(i for i, batch in enumerate(logged.batch.value) if batch >= share * peak)
        since_ns = logged.batch.t_ns[first - 1] if first else begin_ns
        found = _longest(_at_work(stays, logged.waiting), share * peak, bridge_s, since_ns)
        if found is not None:
            return Phases(begin_ns, *found, end_ns, peak, BY_STEPS)
    levels = _at_work(stays)
    peak = max(level for _, level in levels)
    found = _longest(levels, share * peak, bridge_s, begin_ns)
    assert found is not None, "the peak is one of the levels"
    return Phases(begin_ns, *found, end_ns, peak)


def _at_work(stays: Sequence[tuple[int, int]], waiting: Series | None = None) -> list[tuple[int, int]]:
    """Each instant (ns) at which the number of requests at work changes, and what it then is."""
    changes: Counter[int] = Counter()
    for t0_ns, t1_ns in stays:
        changes[t0_ns] += 1
        changes[t1_ns] -= 1
    if waiting is not None:  # a row is of the time since the row before, the first since the begin; the last also to the end
        changes[min(changes)] -= int(waiting.value[0])
        for t_ns, (now, then) in zip(waiting.t_ns, itertools.pairwise(waiting.value)):
            changes[t_ns] += int(now - then)
    instants = sorted(changes)
    return list(zip(instants, itertools.accumulate(changes[t_ns] for t_ns in instants)))


def _longest(levels: Sequence[tuple[int, int]], least: float, bridge_s: float, since_ns: int) -> tuple[int, int] | None:
    """From and to (ns) of the longest time with `least` at work, not before `since_ns`."""
    joined: list[tuple[int, int]] = []
    for (start, level), (end, _) in itertools.pairwise(levels):
        start = max(start, since_ns)
        if level < least or start >= end:
            continue
        if joined and start - joined[-1][1] <= bridge_s * 1e9:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return max(joined, key=lambda span: span[1] - span[0], default=None)


def of_repeats(
    m: Measurement, share: float = 0.9, bridge_s: float = 0.01
) -> Iterator[tuple[list[Completion], Phases | None]]:
    """The requests of each repeat, and its phases (`phases_of_run`), by the engine's own steps where the record has them."""
    steps = step_log(m.trace)
    for repeat in sorted({c.repeat for c in m.completions}):
        mine = [c for c in m.completions if c.repeat == repeat]
        yield mine, phases_of_run(mine, share, bridge_s, steps)


def steady_window(
    completions: Iterable[Completion], share: float = 0.9, bridge_s: float = 0.01, steps: StepLog | None = None
) -> tuple[int, int] | None:
    """From and to of the steady state (`phases_of_run`), ns."""
    phases = phases_of_run(completions, share, bridge_s, steps)
    return phases.spans["steady"] if phases else None


def output_tokens_between(completions: Iterable[Completion], start_ns: int, end_ns: int) -> int:
    """Output tokens that came after `start_ns` and up to `end_ns`: adjacent spans share none. A request that an edge cuts
    counts with its tokens inside."""
    return sum(n for c in completions for t_ns, n in c.events if start_ns < t_ns <= end_ns)


def output_tokens_per_s(
    completions: Sequence[Completion], share: float = 0.9, bridge_s: float = 0.01, steps: StepLog | None = None
) -> float | None:
    """Output throughput of the steady state, tokens/s; None without one. (sglang's benchmark: steady-state throughput.)"""
    window = steady_window(completions, share, bridge_s, steps)
    if window is None or window[1] <= window[0]:
        return None
    return output_tokens_between(completions, *window) / ((window[1] - window[0]) / 1e9)
