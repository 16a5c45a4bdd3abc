"""Latency: of one request, and of many; and whether the sending loop was to blame for it.

The one idea: every latency is a difference of stored instants, and says in its name or docstring of which. Percentiles are
NumPy's linear interpolation; above the median one is withheld when fewer than ten samples lie beyond it.

Not covered: rates and energy (`metrics`, which has these functions too).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

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


def values(m: Measurement, metric: Callable[[Completion], Any]) -> list[float]:
    """The metric over all requests that completed; lists are pooled, None left out."""
    found: list[float] = []
    for c in m.completions:
        value = metric(c) if c.error is None else None
        if value is not None:
            found.extend(value if isinstance(value, list) else [value])
    return found


def percentile(samples: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0-100), NumPy's linear method. Above the median, None with fewer than ten samples beyond it."""
    if not samples or (q > 50 and len(samples) * (100 - q) / 100 < 10):
        return None
    return _percentile(samples, q)


def _percentile(samples: Sequence[float], q: float) -> float:
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


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
    return _percentile(dispatch_lag_s(completions, concurrency), 99) > _percentile(waits, 50) / 10
