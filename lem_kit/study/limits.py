"""Limits on percentiles of latencies, and by how much a run misses them.

    {"ttft_s_p99": 0.5, "tpot_s_p90": 0.05}

The one idea: a percentile that so few requests cannot give is refused before anything runs, with the number that would. A
limit is held against the percentile as measured; whether it lies inside the percentile's interval is said beside it. Not
covered: how far another run of the same point would have been from it; goodput (`goodput`), which asks each request for
itself.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import latency, metrics
from ..errors import LemError, nearest
from ..goodput import LIMITED
from ..latency import enough
from ..measurement import Measurement

FAILED_REQUESTS = "failed_requests"
# Per request: one value of each latency but for this, of which there is one for every token after the first.
PER_TOKEN = "itl_s"
ROUNDS = 200  # draws for an interval of which only the side of a limit is asked; half a million gaps take a second or two


class Limit(NamedTuple):
    """`name` is "ttft_s_p99": the latency and its percentile, at most `seconds`."""

    name: str
    latency: str
    q: float
    seconds: float

    @property
    def needed(self) -> int:
        """The fewest values of the latency of which `metrics.percentile` gives this percentile."""
        count = 1 if self.q == 50 else math.floor(1000 / min(self.q, 100 - self.q))
        return next(n for n in itertools.count(count) if enough(n, self.q))

    def of(self, m: Measurement) -> float | None:
        """The percentile of the requests that completed; None where they are too few."""
        return metrics.percentile(metrics.values(m, LIMITED[self.latency]), self.q)


def read(asked: Mapping[str, Any]) -> tuple[Limit, ...]:
    """Limits by name. LemError for a latency that does not exist, no percentile, and no number of seconds above 0."""
    if not isinstance(asked, Mapping):
        raise LemError(f"Limits map percentiles of latencies to seconds, like {{ttft_s_p50: 0.5}}: got {asked!r}.")
    found = []
    for name, seconds in asked.items():
        parts = re.fullmatch(r"(\w+)_p(\d+(?:\.\d+)?)", str(name))
        if parts is None or not 0 < float(parts[2]) < 100:
            raise LemError(f"The limit '{name}' is no percentile of a latency: write it like ttft_s_p99 or tpot_s_p50.")
        if parts[1] not in LIMITED:
            raise LemError(f"There is no latency '{parts[1]}' to limit: {nearest(parts[1], LIMITED)}")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise LemError(f"The limit {name} is a number of seconds above 0: got {seconds!r}.")
        found.append(Limit(str(name), parts[1], float(parts[2]), float(seconds)))
    return tuple(found)


def check(limits: tuple[Limit, ...], known: Mapping[str, list[Any]]) -> None:
    """LemError where a run of `known["requests"]` requests, sent `known["repeats"]` times, cannot give a percentile. Each
    lists what it may be; what is not known is not held against anything, `of_run` will tell."""
    numbers = {name: min(v) for name, v in known.items() if v and all(type(x) is int for x in v)}
    if "requests" not in numbers:
        return
    repeats = numbers.get("repeats", 1)
    for limit in limits:
        each = numbers.get("output_tokens", 0) - 1 if limit.latency == PER_TOKEN else 1
        if each > 0 and numbers["requests"] * repeats * each < limit.needed:
            asked = f"{numbers['requests']} requests" + (f" × {repeats} repeats" if repeats > 1 else "")
            raise LemError(
                f"{limit.name} needs {math.ceil(limit.needed / each):,} requests, so that ten lie beyond it, and a run has "
                f"{asked}: raise requests or repeats, or limit {limit.latency}_p50."
            )


def of_run(limits: tuple[Limit, ...], m: Measurement) -> tuple[dict[str, float | None], dict[str, float]]:
    """The limited percentiles of a run, and by how much it violates each limit: percentile / limit - 1, and the share of
    requests that failed; at most 0 is met. A percentile that failed requests have left without values is violated by 1.

    LemError where no request failed and it is withheld all the same: no other run of the search would have it.
    """
    failed = sum(c.error is not None for c in m.completions)
    measured = {limit.name: limit.of(m) for limit in limits}
    violated = {FAILED_REQUESTS: failed / len(m.completions) if m.completions else 0.0}
    for limit in limits:
        value = measured[limit.name]
        if value is None and not failed:
            count = len(metrics.values(m, LIMITED[limit.latency]))
            raise LemError(
                f"Run {m.run_id} has {count:,} values of {limit.latency}, and {limit.name} needs {limit.needed:,}: send "
                f"more requests, or set another limit. The run is kept."
            )
        violated[limit.name] = 1.0 if value is None else value / limit.seconds - 1
    return measured, violated


def unsure(limits: tuple[Limit, ...], m: Measurement) -> tuple[str, ...]:
    """The names of the limits that lie inside the 95 % interval of their percentile (`latency.percentile_interval`), so that
    other requests of the same kind might have decided otherwise. Where there is no interval, there is no name."""
    found = []
    for limit in limits:
        interval = latency.percentile_interval(m, LIMITED[limit.latency], limit.q, rounds=ROUNDS)
        if interval is not None and interval[0] <= limit.seconds < interval[1]:
            found.append(limit.name)
    return tuple(found)
