"""Runs for `metrics.py`, made of random numbers that are the same each time: no engine takes part.

plain    no failure, one token per event, the window from the first dispatch to the last token: nothing to differ about
mixed    failures with and without tokens, single tokens, several tokens per event, cached prefixes, late dispatch
large    1,000 requests of 500 tokens, with a counter and a gauge of power
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from lem_kit.measurement import Completion, Measurement, Repeat
from lem_kit.session import energy
from lem_kit.trace import Domain, Series, Trace


def run_of(done: Sequence[Completion], t0_ns: int, t1_ns: int, trace: Trace | None = None) -> Measurement:
    trace = trace or Trace()
    found = energy(trace, t0_ns, t1_ns)
    spans = (Repeat(t0_ns, t1_ns, found, sum(c.output_tokens for c in done)),)
    return Measurement("run", "run", "", "ok", "", t0_ns, t1_ns, found, spans, completions=tuple(done), trace=trace)


def plain(count: int = 1_200, places: int = 16, tick_ns: int = 10**9 // 512) -> Measurement:
    """A closed loop. Every instant is a multiple of 1/512 s: exact in nanoseconds and in floating point, so that a token on
    the edge of a window is there for everybody."""
    draw, free, done = random.Random(0), [512] * places, []
    for _ in range(count):
        place = min(range(places), key=free.__getitem__)
        sent = free[place]
        stamps = [sent + draw.randint(20, 90)]
        for _ in range(draw.randint(1, 40)):
            stamps.append(stamps[-1] + draw.randint(3, 20))
        free[place] = stamps[-1]
        events = tuple((t * tick_ns, 1) for t in stamps)
        done.append(Completion(sent * tick_ns, sent * tick_ns, events[-1][0], events, draw.randint(8, 500), cached_tokens=0))
    return run_of(done, 512 * tick_ns, max(free) * tick_ns)


def mixed(count: int = 1_300, rate_per_s: float = 40.0) -> Measurement:
    """An open loop with all that a run may have."""
    draw, done, t_ns = random.Random(1), [], 10**9
    for i in range(count):
        t_ns += round(draw.expovariate(rate_per_s) * 1e9)
        sent = t_ns + round(draw.expovariate(2000) * 1e9)
        error = "the engine gave up" if draw.random() < 0.05 else None
        events, stamp = [], sent + round(draw.lognormvariate(-2.5, 0.4) * 1e9)
        for _ in range(0 if error and i % 2 else 1 if draw.random() < 0.05 else draw.randint(2, 60)):
            events.append((stamp, draw.choice((1, 1, 2, 4))))
            stamp += round(draw.lognormvariate(-3.4, 0.3) * 1e9)
        if len(events) == 1:
            events = [(events[0][0], 1)]
        end = (events[-1][0] if events else sent) + draw.randint(10_000, 400_000)
        prompt, cached = (draw.randint(32, 900), 16 * draw.choice((0, 0, 1, 2))) if events else (None, None)
        done.append(Completion(t_ns, sent, end, tuple(events), prompt, cached_tokens=cached, error=error))
    return run_of(done, 5 * 10**8, max(c.done_ns for c in done) + 10**8)


def large(requests: int = 1_000, tokens: int = 500, places: int = 32) -> Measurement:
    """A closed loop for about five minutes, with a counter and a gauge of power."""
    draw, free, done = random.Random(0), [10**15] * places, []
    for _ in range(requests):
        place = min(range(places), key=free.__getitem__)
        sent = free[place]
        stamps = [sent + round(draw.uniform(0.05, 0.2) * 1e9)]
        for _ in range(tokens - 1):
            stamps.append(stamps[-1] + round(draw.uniform(0.018, 0.022) * 1e9))
        free[place] = stamps[-1] + 200_000
        events = tuple((t, 1) for t in stamps)
        facts = {"cached_tokens": 0, "queued_ns": sent + 1000, "scheduled_ns": sent + 2000, "preemptions": 0}
        done.append(Completion(sent, sent, stamps[-1] + 100_000, events, 512, "engine", **facts))
    t0_ns, t1_ns = 10**15, max(free)
    t_ns = array("q", range(t0_ns - 3 * 10**9, t1_ns + 10**9, 50_000_000))
    counter = Series(t_ns, array("d", (300 * (t - t_ns[0]) / 1e9 for t in t_ns)))
    power = Series(t_ns, array("d", (300 + draw.gauss(0, 5) for _ in t_ns)))
    domains = {"sim:gpu0": Domain("gpu", "counter", 0.1, 0.001)}
    return run_of(done, t0_ns, t1_ns, Trace({"sim:gpu0": counter}, {"sim:gpu0.power_w": power}, domains))
