"""Runs whose true energy is known: requests, a board whose power follows them, and the Measurement that was made of both."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from conftest import FakeClock
from simulation import Board, Wave, recorded_windows

from lem_kit.curve import energy_between
from lem_kit.measurement import Completion, Energy, Measurement, Repeat
from lem_kit.trace import Domain, Series, Trace

KEY = "sim:gpu0"
BEGIN_S = 103.0  # on the board's scale; the recording begins 3 s before


def ns(seconds: float) -> int:
    return round((seconds + 900) * 1e9)


def request(
    dispatch_s: float, *events: tuple[float, int], prompt: int | None = 30, done_s: float | None = None, **more: Any
) -> Completion:
    """Events in (s, tokens)."""
    last_s = events[-1][0] if events else dispatch_s
    stamped = tuple((ns(t), n) for t, n in events)
    return Completion(ns(dispatch_s), ns(dispatch_s), ns(done_s or last_s), stamped, prompt, **more)


def measured(
    trace: Trace,
    completions: Sequence[Completion],
    t0_s: float,
    t1_s: float,
    repeats: Sequence[tuple[float, float]] = (),
    **more: Any,
) -> Measurement:
    """With the energies that the trace gives."""

    def energy(a: int, b: int) -> dict[str, Energy]:
        parts = ((key, domain, key.partition(":")) for key, domain in trace.domains.items())
        return {
            key: Energy(source, name, domain.method, domain.scope, *energy_between(trace, key, a, b))
            for key, domain, (source, _, name) in parts
        }

    spans = [(ns(a), ns(b)) for a, b in (repeats or [(t0_s, t1_s)])]
    whole = ns(t0_s), ns(t1_s)
    return Measurement(
        "r", "run", "l", "ok", "", *whole, energy(*whole), tuple(Repeat(a, b, energy(a, b)) for a, b in spans),
        tuple(completions), trace=trace, **more,
    )  # fmt: skip


def run_of(
    wave: Wave,
    completions: Sequence[Completion],
    t0_s: float,
    t1_s: float,
    repeats: Sequence[tuple[float, float]] = (),
    **board: Any,
) -> Measurement:
    """On a simulated board, read as a session reads one; the counter alone makes the total."""
    clock = FakeClock()
    windows = [(ns(a), ns(b)) for a, b in ((t0_s, t1_s), *repeats)]
    trace = recorded_windows(Board(wave, clock, **board), clock, t1_s - 100 + 0.6, windows)[1][0]
    trace.domains.pop("sim_power:gpu0")
    return measured(trace, completions, t0_s, t1_s, repeats)


def steady_counter(watts: dict[str, float], seconds: float) -> Trace:
    """Counters of boards that always draw the same, read without any delay every 50 ms from `BEGIN_S` - 1 on."""
    t_s = np.arange(BEGIN_S - 1, BEGIN_S + seconds + 1, 0.05)
    counters = {key: Series() for key in watts}
    for key, w in watts.items():
        for t in t_s:
            counters[key].append(ns(t), w * (t - t_s[0]))
    return Trace(counters, {}, {key: Domain("gpu", "counter", 0.0) for key in watts})


def batches(
    draw: random.Random, n: int, ttft_s: float = 0.05, steps: int = 25, itl_s: float = 0.02, pause_s: float = 0.03
) -> list[Completion]:
    """`n` static batches of four, one after the other, all of the same length but for the prefill."""
    found: list[Completion] = []
    t = BEGIN_S + draw.random() * 0.1
    for _ in range(n):
        first = t + ttft_s * draw.uniform(0.9, 1.1)
        found += [request(t, *((first + itl_s * k, 1) for k in range(steps)), prompt=128)] * 4
        t = found[-1].done_ns / 1e9 - 900 + pause_s * draw.uniform(0.5, 1.5)
    return found


def closed_loop(draw: random.Random, places: int, seconds: float, think_s: float = 0.0) -> list[Completion]:
    """Each place sends its next request as soon as its last is done, or a little later."""
    found: list[Completion] = []
    for _ in range(places):
        t = BEGIN_S + draw.random() * 0.3
        while t < BEGIN_S + seconds:
            events, at = [], t + draw.uniform(0.05, 0.25)
            for _ in range(draw.randint(10, 60)):
                events.append((at, 1))
                at += 0.02 * draw.uniform(0.9, 1.1)
            found.append(request(t, *events, prompt=draw.randint(50, 500)))
            t = events[-1][0] + think_s * draw.random()
    return found


def following(completions: Sequence[Completion], noise: float = 0.0, seed: int = 0) -> Wave:
    """80 W, 300 W more while there is any prefill, 150 W more while there is any decode and 5 W for each request in it.
    `noise`: standard deviation, as a part of the power, of what it does besides (correlated over 50 ms)."""
    changes: list[tuple[float, int, int]] = []
    for c in completions:
        first, last = ((c.events[k][0] / 1e9 - 900) for k in (0, -1))
        changes += [(c.dispatch_ns / 1e9 - 900, 1, 0), (first, -1, 1), (last, 0, -1)]
    t, joules, watts = [0.0], [0.0], [80.0]
    prefill = decode = 0
    for at, more_prefill, more_decode in sorted(changes):
        joules.append(joules[-1] + watts[-1] * (at - t[-1]))
        t.append(at)
        prefill, decode = prefill + more_prefill, decode + more_decode
        watts.append(80 + (300 if prefill else 0) + (150 + 5 * decode if decode else 0))
    steps = np.array(t), np.array(joules), np.array(watts)

    def wave(s: float) -> float:
        k = int(np.searchsorted(steps[0], s, "right")) - 1
        return float(steps[1][k] + steps[2][k] * (s - steps[0][k]))

    if not noise:
        return wave
    grid = np.arange(100.0, t[-1] + 3, 0.002)
    random_w = np.random.default_rng(seed).standard_normal(len(grid))
    for i in range(1, len(grid)):
        random_w[i] = math.exp(-0.04) * random_w[i - 1] + math.sqrt(1 - math.exp(-0.08)) * random_w[i]
    noisy = np.cumsum(np.diff([wave(s) for s in grid], prepend=wave(100.0)) * (1 + noise * random_w))
    return lambda s: float(np.interp(s, grid, noisy))


def true_j(wave: Wave, instants_ns: Any) -> Any:
    return np.array([wave(int(t) / 1e9 - 900) for t in instants_ns])
