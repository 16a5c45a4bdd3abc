"""Latency: of one request, and of many; and whether the sending loop was to blame for it.

The one idea: every latency is a difference of stored instants, and says in its name or docstring of which. Percentiles are
NumPy's linear interpolation; one is withheld when fewer than ten samples lie beyond it, but for the median. Their intervals
are found by drawing requests again, never single gaps: those of one request resemble each other.

Not covered: rates and energy (`metrics`, which has these functions too).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from . import statistics
from .measurement import Completion, Measurement


def ttft_s(c: Completion) -> float | None:
    """Time to first token, s: first event - dispatch. (vLLM bench, AIPerf: same.)"""
    return (c.events[0][0] - c.dispatch_ns) / 1e9 if c.events else None


def e2e_s(c: Completion) -> float | None:
    """End-to-end latency, s: last event - dispatch."""
    return (c.events[-1][0] - c.dispatch_ns) / 1e9 if c.events else None


def tpot_s(c: Completion) -> float | None:
    """Time per output token after the first event, s: (last - first event) / (output tokens - those of the first event).

    Equals vLLM bench's TPOT when the first event carries one token, and AIPerf's "ITL". None for a single event.
    """
    if len(c.events) < 2:
        return None
    return (c.events[-1][0] - c.events[0][0]) / 1e9 / (c.output_tokens - c.events[0][1])


def icl_s(c: Completion) -> list[float]:
    """Inter-chunk latencies, s: gaps between successive events. (vLLM bench calls these "itl".)"""
    return [(b[0] - a[0]) / 1e9 for a, b in zip(c.events, c.events[1:])]


def itl_s(c: Completion) -> list[float]:
    """Inter-token latencies, s: each gap between events divided by the tokens of the later event, once per such token.

    (sglang's native benchmark: same.) Sums to e2e - ttft.
    """
    return [(b[0] - a[0]) / 1e9 / b[1] for a, b in zip(c.events, c.events[1:]) for _ in range(b[1])]


def ntpot_s(c: Completion) -> float | None:
    """Normalised time per output token, s: end-to-end latency / output tokens, prefill included. (GuideLLM's "TPOT".)"""
    latency = e2e_s(c)
    return latency / c.output_tokens if latency is not None else None


def decode_s(c: Completion) -> float | None:
    """Decode latency, s: last event - first event. What comes before is `ttft_s`: hand-over, `queue_s` and `prefill_s`."""
    return (c.events[-1][0] - c.events[0][0]) / 1e9 if c.events else None


def queue_s(c: Completion) -> float | None:
    """Time in the engine's queue, s: scheduled - queued, both on the engine's clock. None where the engine does not tell."""
    return None if c.queued_ns is None or c.scheduled_ns is None else (c.scheduled_ns - c.queued_ns) / 1e9


def prefill_s(c: Completion) -> float | None:
    """Prefill latency, s: first event - scheduled. None where the engine does not tell when it scheduled the request, or
    where the two instants are of different clocks."""
    if c.scheduled_ns is None or not c.events or c.timing_source != "engine":
        return None
    return (c.events[0][0] - c.scheduled_ns) / 1e9


def schedule_delay_s(c: Completion) -> float:
    """How long after the plan wanted it a request was handed over, s: dispatch - schedule. Where the plan has a cap on
    concurrency, the wait for a place is in it."""
    return (c.dispatch_ns - c.sched_ns) / 1e9


def ttft_sched_s(c: Completion) -> float | None:
    """Time to first token from the schedule, s: first event - schedule. What a user waits who comes when the plan says so,
    with no coordinated omission: a late hand-over counts."""
    return (c.events[0][0] - c.sched_ns) / 1e9 if c.events else None


def e2e_sched_s(c: Completion) -> float | None:
    """End-to-end latency from the schedule, s: last event - schedule."""
    return (c.events[-1][0] - c.sched_ns) / 1e9 if c.events else None


# --- distributions ----------------------------------------------------------------------------------------------------


def by_request(m: Measurement, metric: Callable[[Completion], Any]) -> list[Any]:
    """The metric of each request that completed: a number, or a list of those of its gaps. Without None and empty lists."""
    found = (metric(c) for c in m.completions if c.error is None)
    return [value for value in found if value is not None and value != []]


def values(m: Measurement, metric: Callable[[Completion], Any]) -> list[float]:
    """The metric over all requests that completed; lists are pooled, None left out."""
    return _pooled(by_request(m, metric))


def _pooled(each: Sequence[Any]) -> list[float]:
    if each and isinstance(each[0], list):
        return [gap for gaps in each for gap in gaps]
    return list(each)


def percentile(samples: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0-100), NumPy's linear method. None with fewer than ten samples beyond it, on the side of the
    nearer end; the median is given of any number. (p90 needs 100 samples, p95 200, p99 1,000.)"""
    return percentiles(samples, (q,))[0]


def percentiles(samples: Sequence[float], qs: Sequence[float]) -> list[float | None]:
    """As `percentile`, for several at once."""
    ordered = sorted(samples)
    return [_percentile(ordered, q) if enough(len(ordered), q) else None for q in qs]


def enough(samples: int, q: float) -> bool:
    """Whether so many samples give the q-th percentile: `percentile`."""
    return samples > 0 and (q == 50 or samples * min(q, 100 - q) / 100 >= 10 - 1e-9)


def _percentile(ordered: Sequence[float], q: float) -> float:
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentile_interval(
    m: Measurement,
    metric: Callable[[Completion], Any],
    q: float,
    *,
    level: float = 0.95,
    seed: int = 0,
    rounds: int = statistics.ROUNDS,
) -> tuple[float, float] | None:
    """Interval on a percentile of a latency of this run, by the bootstrap over requests
    (`statistics.bootstrap_percentile`), with all of their repeats, those of a static batch together: how far other requests
    of the same kind, in the same run, might have moved it. Not in it: what differs from run to run, and that requests
    which wait in one queue resemble each other. None where the percentile is withheld, and with fewer than ten requests
    or batches.
    """
    if not enough(len(values(m, metric)), q):
        return None
    return statistics.bootstrap_percentile(_independent(m, metric), q, seed=seed, level=level, rounds=rounds)


def _independent(m: Measurement, metric: Callable[[Completion], Any]) -> list[list[float]]:
    """The metric in groups that are independent of each other: the same request in a further repeat is no new one, and those
    of a static batch, which are handed over at one instant, get their tokens together."""
    groups = together(m)
    found: dict[int, list[float]] = {}
    for i, c in enumerate(m.completions):
        value = metric(c) if c.error is None else None
        if value is not None and value != []:
            found.setdefault(groups[i % len(groups)], []).extend(value if isinstance(value, list) else [value])
    return list(found.values())


def together(m: Measurement) -> list[int]:
    """For each request of a repeat, the first of its static batch, whose requests are handed over at one instant; itself
    where the plan has no batches."""
    first = [c.dispatch_ns for c in m.completions if c.repeat == m.completions[0].repeat]
    batches = str(m.config.get("arrivals", "")).endswith("batches")
    places = {instant: place for place, instant in reversed([*enumerate(first)])}
    return [places[instant] if batches else place for place, instant in enumerate(first)]


def mean(samples: Sequence[float]) -> float | None:
    return sum(samples) / len(samples) if samples else None


# --- the sending loop -------------------------------------------------------------------------------------------------


def dispatch_lag_s(completions: Sequence[Completion], concurrency: int | None = None) -> list[float]:
    """How late each request was handed over by fault of the sending loop alone, s: dispatch - the later of its schedule and,
    where a plan allows `concurrency` requests at work, the instant at which one of those before it was done."""
    lags: list[float] = []
    for repeat in sorted({c.repeat for c in completions}):
        at_work: list[int] = []
        for c in sorted((c for c in completions if c.repeat == repeat), key=lambda c: c.dispatch_ns):
            free_ns = heapq.heappop(at_work) if concurrency is not None and len(at_work) >= concurrency else c.sched_ns
            lags.append((c.dispatch_ns - max(c.sched_ns, free_ns)) / 1e9)
            heapq.heappush(at_work, c.done_ns)
    return lags


def dispatched_late(completions: Sequence[Completion], concurrency: int | None = None) -> bool:
    """Whether the 99th percentile of `dispatch_lag_s` exceeds a tenth of the median TTFT: the run is then no fair picture of
    its plan. Taken of few requests too, where it is nearly the worst one: that is reason enough for doubt."""
    waits = [wait for c in completions if c.error is None and (wait := ttft_s(c)) is not None]
    if not waits:
        return False
    return _percentile(sorted(dispatch_lag_s(completions, concurrency)), 99) > _percentile(sorted(waits), 50) / 10
