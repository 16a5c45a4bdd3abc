"""A board whose true energy is known in closed form, read by a real Sampler on a clock that is turned by hand.

Much faster than `fake_nvml`, which is read in real time: hundreds of windows of a session of half a minute in a second. What
is simulated stands at the border: a counter refreshed by its own clock, calls that take time, samples of power.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from conftest import FakeClock

from lem_kit.energy import EnergySource, Reading
from lem_kit.sampler import LATE_SAMPLE_S, LATE_SAMPLES_S, LONGEST_WAIT_S, Sampler
from lem_kit.session import AFTER_NS, BEFORE_NS
from lem_kit.trace import Domain, Trace

LONGEST_WAIT_NS = int(LONGEST_WAIT_S * 1e9)
Wave = Callable[[float], float]  # seconds -> joules since 0


def constant(watts: float = 200) -> Wave:
    return lambda t: watts * t


def sine(mean: float = 200, swing: float = 150, period_s: float = 0.83) -> Wave:
    w = 2 * math.pi / period_s
    return lambda t: mean * t + swing / w * (1 - math.cos(w * t))


def steps(*parts: tuple[float, float]) -> Wave:
    """A load that goes through (seconds, watts) again and again."""
    period, total = sum(s for s, _ in parts), sum(s * p for s, p in parts)

    def joules(t: float) -> float:
        laps, rest = divmod(t, period)
        sum_j = laps * total
        for seconds, watts in parts:
            sum_j += watts * min(max(rest, 0.0), seconds)
            rest -= seconds
        return sum_j

    return joules


def square(low: float = 70, high: float = 300, period_s: float = 0.83, duty: float = 0.5) -> Wave:
    return steps((period_s * duty, high), (period_s * (1 - duty), low))


WAVES: Mapping[str, Wave] = {
    "constant": constant(),
    "square": square(),
    "sine": sine(),
    "bursts": steps((0.08, 350), (0.6, 220), (0.29, 70)),
    "locked": steps((0.03, 300), (0.07, 70)),
    "decode": steps((0.01, 400), (0.012, 150)),
}


class Board:
    """One GPU. `refresh_s`: of its counter; `sample_s`: of its power samples, None for none; `call_s`: how long a call to
    the counter takes; `slow`: the share of calls that take 0.2 s; `jitter_s`: how late an update comes at most;
    `own_look`: whether all calls look at the counter after the same part of their time, which is the board's own;
    `stamp_s`: how late every fifth sample is stamped at most; `seldom`: whether it says that its counter may be read seldom,
    if it has samples; `offset_w`: what its counter counts beside the load, and its domain says so."""

    name = "sim"

    def __init__(
        self,
        wave: Wave,
        clock: FakeClock,
        *,
        refresh_s: float = 0.1,
        sample_s: float | None = 0.02,
        call_s: tuple[float, float] = (0.0024, 0.006),
        jitter_s: float = 0.0,
        slow: float = 0.0,
        own_look: bool = False,
        stamp_s: float = 0.0,
        seldom: bool = True,
        offset_w: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._wave, self._clock, self._draw = wave, clock, random.Random(seed)
        self._refresh_s, self._sample_s, self._call_s, self._jitter_s = refresh_s, sample_s, call_s, jitter_s
        self._slow, self._stamp_s, self._offset_w = slow, stamp_s, offset_w
        self._phase_s = self._draw.uniform(0, refresh_s)
        self._sample_phase_s = self._draw.uniform(0, sample_s or 1)
        self._gauge_phase_s = random.Random(f"gauge {seed}").uniform(0, 0.1)
        self._look = self._draw.random() if own_look else None
        self._told = -1
        self.domains = {"gpu0": Domain("gpu", "counter", None, 0.001, offset_w=offset_w)}
        self.integrals = {
            "sim_power:gpu0": Domain("gpu", "integral", None, 0.001, gauge="sim:gpu0.power_w", means=sample_s is not None)
        }
        self.gauges_interval_s, self.samples_interval_s = 0.2, 0.9
        self.sampled = {"gpu0"} if sample_s and seldom else set()
        if sample_s:
            self.samples = self._samples
        else:
            self.gauges, self.gauges_interval_s = self._instant, 0.0

    def seconds(self, t_ns: float) -> float:
        return t_ns / 1e9 - 900

    def true_j(self, t0_ns: int, t1_ns: int) -> float:
        return self._wave(self.seconds(t1_ns)) - self._wave(self.seconds(t0_ns))

    def read(self) -> dict[str, Reading]:
        return {"gpu0": self.read_one("gpu0")}

    def read_one(self, domain: str) -> Reading:
        began, took = self._clock(), self._draw.uniform(*self._call_s)
        if self._slow and self._draw.random() < self._slow:
            took = 0.2
        seen_s = self.seconds(began) + took * (self._draw.random() if self._look is None else self._look)
        k = math.floor((seen_s - self._phase_s) / self._refresh_s)
        updated = k * self._refresh_s + self._phase_s
        if self._jitter_s:
            late = random.Random(k).uniform(0, self._jitter_s)
            if updated + late > seen_s:
                k -= 1
                late = random.Random(k).uniform(0, self._jitter_s)
            updated = k * self._refresh_s + self._phase_s + late
        self._clock.advance(took)
        counted = self._wave(updated) + self._offset_w * updated
        return Reading(self._clock(), round(counted, 3), self._clock() - began)

    def _samples(self) -> dict[str, list[tuple[int, float]]]:
        assert self._sample_s is not None
        now_s = self.seconds(self._clock()) - 0.003
        newest = math.floor((now_s - self._sample_phase_s) / self._sample_s)
        points = []
        for k in range(max(self._told + 1, newest - 118), newest + 1):
            end = k * self._sample_s + self._sample_phase_s
            mean = (self._wave(end) - self._wave(end - self._sample_s)) / self._sample_s
            late_s = random.Random(k).uniform(0.3, 1) * self._stamp_s if k % 5 == 0 else 0.0
            points.append((round((end + late_s + 900) * 1e9), mean))
        self._told = newest
        return {"gpu0.power_w": points}

    def _instant(self) -> dict[str, float]:
        """The mean of the last 25 ms, updated every 100 ms, as an H100's instant field."""
        end = math.floor((self.seconds(self._clock()) - self._gauge_phase_s) / 0.1) * 0.1 + self._gauge_phase_s
        return {"gpu0.power_w": (self._wave(end) - self._wave(end - 0.025)) / 0.025}

    def close(self) -> None: ...


def recorded(source: EnergySource, clock: FakeClock, seconds: float) -> Trace:
    """What a sampler without a thread makes of `source` in that time, when no window begins or ends."""
    return recorded_windows(source, clock, seconds, ())[0]


def recorded_windows(
    source: EnergySource, clock: FakeClock, seconds: float, windows: Sequence[tuple[int, int]]
) -> tuple[Trace, list[Trace]]:
    """The same, and what a session keeps of it for each window (t0_ns, t1_ns) once its end has been waited for as
    `Sampler.settle` does it."""
    sampler = Sampler([source], 0.05, clock)
    sides = [job for job in sampler._jobs if job.side]
    end = clock.now_ns + seconds * 1e9
    edges = deque(sorted(edge for window in windows for edge in window))
    waiting = {number: (t0_ns, t1_ns, math.inf) for number, (t0_ns, t1_ns) in enumerate(windows)}
    slices: dict[int, Trace] = {}
    while clock.now_ns < end:
        due = max(sampler.sample(), clock.now_ns + 50_000)
        if edges and edges[0] <= due:
            clock.now_ns = max(edges.popleft(), clock.now_ns)
            sampler.edge()
            continue  # the thread is woken at an end, and looks soon at a beginning
        for number, (t0_ns, t1_ns, until_ns) in list(waiting.items()):
            if clock.now_ns < t1_ns or not (sampler._all_told(t1_ns) or clock.now_ns > t1_ns + LONGEST_WAIT_NS):
                continue
            for job in sides:
                sampler._do(job)
            until_ns = min(until_ns, clock.now_ns + LATE_SAMPLES_S * 1e9)
            waiting[number] = t0_ns, t1_ns, until_ns
            if sampler._sampled(t1_ns) or clock.now_ns > until_ns:
                slices[number] = sampler.slice(t0_ns - BEFORE_NS, t1_ns + AFTER_NS)
                del waiting[number]
            due = min(due, clock.now_ns + int(LATE_SAMPLE_S * 1e9))
        clock.now_ns = max(due, clock.now_ns)
    sampler.stop()
    for trace in (sampler.trace, *slices.values()):
        trace.domains.update(getattr(source, "integrals", {}))
    return sampler.trace, [slices[number] for number in range(len(windows))]
