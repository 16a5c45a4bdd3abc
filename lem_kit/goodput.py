"""Goodput: the requests that were served as well as asked, per second, per joule, and as a share of all.

The one idea: a request is good when it meets every limit; one that failed is a miss, never left out. Limits are named as the
latencies are:

    goodput.per_s(m, ttft_s=0.5, tpot_s=0.05)

Not covered: limits on energy, the search for the highest rate that still meets them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from . import metrics
from .errors import LemError, nearest
from .measurement import Completion, Measurement

LIMITED: Mapping[str, Callable[[Completion], Any]] = {
    "ttft_s": metrics.ttft_s,
    "ttft_sched_s": metrics.ttft_sched_s,
    "tpot_s": metrics.tpot_s,
    "ntpot_s": metrics.ntpot_s,
    "itl_s": metrics.itl_s,
    "e2e_s": metrics.e2e_s,
    "e2e_sched_s": metrics.e2e_sched_s,
}


def meets(c: Completion, **limits: float) -> bool | None:
    """Whether a request completed with every latency at most its limit; of `itl_s`, each one. A request of one token has no
    time per further token and meets any limit on it. None when a latency was not observed and no other limit is missed.

    LemError for no limit, an unknown one, and one that is not above 0.
    """
    if not limits:
        raise LemError(f"Goodput needs at least one limit, in seconds: {', '.join(LIMITED)}.")
    for name, limit in limits.items():
        if name not in LIMITED:
            raise LemError(f"There is no latency '{name}' to limit: {nearest(name, LIMITED)}")
        if not (math.isfinite(limit) and limit > 0):
            raise LemError(f"The limit {name} is a number of seconds above 0: got {limit}.")
    if c.error is not None:
        return False
    verdicts = [_meets(c, LIMITED[name](c), limit) for name, limit in limits.items()]
    return False if False in verdicts else None if None in verdicts else True


def _meets(c: Completion, value: float | list[float] | None, limit: float) -> bool | None:
    if value is None or value == []:
        return True if c.output_tokens == 1 else None  # several tokens in one event: their gaps were not seen
    return max(value) <= limit if isinstance(value, list) else value <= limit


def good_requests(m: Measurement, **limits: float) -> int | None:
    """Requests that meet every limit (`meets`), over all repeats; None without requests, or where one cannot be told."""
    verdicts = [meets(c, **limits) for c in m.completions]
    return sum(v is True for v in verdicts) if verdicts and None not in verdicts else None


def attainment(m: Measurement, **limits: float) -> float | None:
    """Good requests / all requests, failed ones included: between 0 and 1."""
    good = good_requests(m, **limits)
    return good / len(m.completions) if good is not None else None


def per_s(m: Measurement, **limits: float) -> float | None:
    """Goodput, 1/s: good requests / measured seconds. (vLLM bench: "request_goodput".)"""
    good = good_requests(m, **limits)
    return good / metrics.measured_s(m) if good is not None and metrics.measured_s(m) > 0 else None


def per_j(m: Measurement, **limits: float) -> metrics.Figure | None:
    """Good requests / gross energy, 1/J. A run without a good request has 0 per joule, and that is exact."""
    good, total = good_requests(m, **limits), metrics.energy_j(m)
    return metrics.inverse(total).scaled(good) if good is not None and total else None


def per_s_per_w(m: Measurement, **limits: float) -> metrics.Figure | None:
    """Goodput / mean power, (1/s) / W. The value of `per_j`, for both are of the same seconds; the interval is that of the
    power, which a repeat that takes longer does not widen."""
    goodput, power = per_s(m, **limits), metrics.mean_power_w(m)
    return metrics.inverse(power).scaled(goodput) if goodput is not None and power else None
