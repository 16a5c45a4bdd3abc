"""Warming up until nothing moves any more: the policy, once, for every engine.

The one idea: the same shapes with other contents, round after round, until the step latency of the last rounds neither
scatters nor goes anywhere and the power and temperature of the GPU have stopped moving; or until the cap, and the record
then says so. A host that is not steady scatters for ever (by 20 % from round to round beside an H100 with neighbours): then
it is enough that more rounds go nowhere, and the record says that, too. There is no pause between the warm-up and the
window: a GPU that idles cools down and lowers its clocks.

Not covered: what is sent in a round (`Session.run`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from .latency import itl_s
from .measurement import Completion
from .steady import drifting, level, settled
from .trace import Trace

LEAST_ROUNDS = 3
LEVEL_ROUNDS = 6  # enough where they only scatter
MOST_ROUNDS = 12
MOST_S = 30.0
OVER_S = 3.0  # what is looked at of power and temperature
MOST_POWER_SLOPE = 0.05  # per second, as a part of the power
MOST_TEMPERATURE_SLOPE_C = 0.5  # per second


def step_latency_s(done: Sequence[Completion]) -> float | None:
    """Median inter-token latency of a round, s; of requests with a single event, the median time to it."""
    gaps = [gap for c in done for gap in itl_s(c)]
    firsts = [(c.events[0][0] - c.dispatch_ns) / 1e9 for c in done if c.events]
    return median(gaps or firsts) if gaps or firsts else None


def moving(trace: Trace) -> bool:
    """Whether power or temperature of a device is still going somewhere; what is not known does not move."""
    for key, series in trace.gauges.items():
        if key.endswith(".temperature_c") and drifting(series, MOST_TEMPERATURE_SLOPE_C, OVER_S):
            return True
        if key.endswith(".power_w") and series.value:
            recent = series.between(series.t_ns[-1] - round(OVER_S * 1e9), series.t_ns[-1]).value
            if drifting(series, MOST_POWER_SLOPE * sum(recent) / len(recent), OVER_S):
                return True
    return False


def until_settled(
    one_round: Callable[[int], Sequence[Completion]], trace: Callable[[], Trace], clock: Callable[[], float] = time.monotonic
) -> tuple[list[Completion], str | None]:
    """Rounds (called with their number) until they have settled, and the reason code where they did not, or only scatter."""
    done: list[Completion] = []
    steps: list[float] = []
    began = clock()
    for number in range(MOST_ROUNDS):
        latest = one_round(number)
        done += latest
        if (step := step_latency_s(latest)) is not None:
            steps.append(step)
        calm, scattered = settled(steps, window=LEAST_ROUNDS), level(steps, window=LEVEL_ROUNDS)
        if (calm or scattered) and not moving(trace()):
            return done, None if calm else "latency_scatters"
        if clock() - began > MOST_S:
            break
    return done, "warmup_not_settled"
