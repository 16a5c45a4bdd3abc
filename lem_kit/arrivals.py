"""Arrivals: when each request is handed to the engine, and together with whom. `lem_kit.traffic` has them for users.

The one idea: an open-loop schedule is a list of instants, drawn from a seed before anything runs and kept in the record; a
closed loop has none, for there the engine decides.

Not covered: sending (`traffic`), the files of traces (`traces`).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import numbers
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from . import traces
from .errors import LemError, nearest, shown
from .measurement import Request

# Between these lies every rate, time and shape that means something; beyond them sums of floats overflow, or never end.
LEAST, MOST = 1e-9, 1e9


class Submit(Protocol):
    """Hand over the requests of these indices together, now, and come back when they are finished. `sched_ns` is when the
    plan wanted that; now unless given."""

    def __call__(self, group: Sequence[int], sched_ns: int | None = None) -> Awaitable[None]: ...


class Arrivals(Protocol):
    """A plan of arrivals. `overlapping` plans need an engine that takes requests while it works on others.

    `schedule(count)` is when each request is wanted, in seconds from the start; None where that depends on the engine.
    `drive` calls `submit`, and awaits it where it wants requests finished.
    """

    @property
    def overlapping(self) -> bool: ...

    def describe(self) -> dict[str, Any]: ...

    def schedule(self, count: int) -> Sequence[float] | None: ...

    async def drive(self, count: int, submit: Submit) -> None: ...


@dataclass(frozen=True)
class Batches:
    """Groups of `size` requests, each group when the one before is finished."""

    size: int = 1
    overlapping = False

    def __post_init__(self) -> None:
        _whole("batches() takes", self.size)

    def describe(self) -> dict[str, Any]:
        return {"arrivals": "batches", "size": self.size}

    def schedule(self, count: int) -> None:
        return None

    async def drive(self, count: int, submit: Submit) -> None:
        for start in range(0, count, self.size):
            await submit(range(start, min(start + self.size, count)))


@dataclass(frozen=True)
class TokenBatches:
    """Groups in order, each as long as its padded tokens stay within `budget`: rows x (longest prompt + tokens to generate).

    `requests` are those that will be run; a group ends also where they differ in what a static batch shares. LemError for
    prompts of text, whose tokens only the engine can count, and for a request that is longer than the budget by itself.
    """

    budget: int
    requests: Sequence[Request] = field(repr=False)
    _ends: tuple[int, ...] = field(init=False, repr=False)
    overlapping = False

    def __post_init__(self) -> None:
        _whole("token_batches() takes a budget of", self.budget)
        _requests("token_batches()", self.requests)
        ends: list[int] = []
        group: list[Request] = []
        for i, request in enumerate(self.requests):
            if request.prompt_token_ids is None:
                raise LemError(
                    "token_batches() needs prompt_token_ids: how many tokens a text has, only the engine can say."
                )
            if (alone := len(request.prompt_token_ids) + request.max_new_tokens) > self.budget:
                raise LemError(
                    f"Request {i} takes {alone} tokens by itself: give token_batches() a budget of at least that."
                )
            if group and not self._fits([*group, request]):
                ends.append(i)
                group = []
            group.append(request)
        object.__setattr__(self, "_ends", (*ends, len(self.requests)))

    def _fits(self, group: list[Request]) -> bool:
        longest = max(len(request.prompt_token_ids or ()) for request in group) + group[0].max_new_tokens
        shared = [(request.max_new_tokens, request.fixed_length, request.options) for request in group]
        return shared.count(shared[0]) == len(group) and longest * len(group) <= self.budget

    @property
    def size(self) -> int:
        """Requests in the first group."""
        return self._ends[0]

    def describe(self) -> dict[str, Any]:
        return {"arrivals": "token_batches", "token_budget": self.budget}

    def schedule(self, count: int) -> None:
        if count not in self._ends:
            raise LemError(
                f"token_batches() was made for {len(self.requests)} requests and is to send {count}: give it those."
            )

    async def drive(self, count: int, submit: Submit) -> None:
        for start, end in itertools.pairwise((0, *self._ends)):
            if start < count:
                await submit(range(start, end))


@dataclass(frozen=True)
class Concurrency:
    """A closed loop: `concurrency` requests at work at any time, the next one when one of them is finished."""

    concurrency: int

    def __post_init__(self) -> None:
        _whole("concurrency() takes", self.concurrency)

    @property
    def overlapping(self) -> bool:
        return self.concurrency > 1

    def describe(self) -> dict[str, Any]:
        return {"arrivals": "concurrency", "concurrency": self.concurrency}

    def schedule(self, count: int) -> None:
        return None

    async def drive(self, count: int, submit: Submit) -> None:
        waiting = iter(range(count))

        async def one_by_one() -> None:
            for i in waiting:
                await submit([i])

        await all_of(one_by_one() for _ in range(min(self.concurrency, count)))


class Schedule:
    """An open loop: every request at its instant, whatever the engine does; at most `concurrency` at work, if given.

    `draw(count)` gives the instants in seconds; they are kept to the nanosecond. A request that waits for one of the
    `concurrency` places keeps the instant that the plan wanted, so the wait is in its schedule delay.
    """

    overlapping = True

    def __init__(
        self, facts: dict[str, Any], draw: Callable[[int], Iterable[float]], concurrency: int | None = None
    ) -> None:
        if concurrency is not None:
            _whole("concurrency= takes", concurrency)
            facts = {**facts, "concurrency": concurrency}
        self.concurrency = concurrency
        self._facts = facts
        # Drawn once for a count, which `traffic.check` sees to before the run: while something is measured it costs nothing.
        self._drawn = functools.lru_cache(maxsize=1)(lambda count: tuple(round(t, 9) for t in draw(count)))

    def describe(self) -> dict[str, Any]:
        return dict(self._facts)

    def schedule(self, count: int) -> Sequence[float]:
        return self._drawn(count)

    async def drive(self, count: int, submit: Submit) -> None:
        offsets_s = self.schedule(count)
        slots = asyncio.Semaphore(self.concurrency or count)
        due = [asyncio.get_running_loop().create_future() for _ in offsets_s]

        async def pace() -> None:
            await asyncio.sleep(0)  # until all of them wait: to begin thousands takes longer than their first gaps
            start_ns = time.monotonic_ns()
            for offset_s, ready in zip(offsets_s, due):
                sched_ns = start_ns + round(offset_s * 1e9)
                while (wait_ns := sched_ns - time.monotonic_ns()) > 0:
                    await asyncio.sleep(wait_ns / 1e9)
                await slots.acquire()
                ready.set_result(sched_ns)

        async def one(i: int) -> None:
            sched_ns = await due[i]
            try:
                await submit([i], sched_ns)
            finally:
                slots.release()

        await all_of([pace(), *(one(i) for i in range(count))])


batches, token_batches, concurrency = Batches, TokenBatches, Concurrency


def burst(concurrency: int | None = None) -> Schedule:
    """Every request at once; the engine's own scheduler decides."""
    return Schedule({"arrivals": "burst"}, lambda count: [0.0] * count, concurrency)


def constant(rate_per_s: float, concurrency: int | None = None) -> Schedule:
    """Equal gaps of 1 / rate, the first request at 0."""
    rate = _positive("rate_per_s", rate_per_s)
    facts = {"arrivals": "constant", "rate_per_s": rate}
    return Schedule(facts, lambda count: (k / rate for k in range(count)), concurrency)


def poisson(rate_per_s: float, seed: int = 0, normalize: bool = False, concurrency: int | None = None) -> Schedule:
    """A Poisson process: independent, exponential gaps of mean 1 / rate.

    `normalize` stretches the schedule so that the last request comes at exactly count / rate, as vLLM's benchmark does:
    less scatter between seeds, but the gaps are then no longer independent.
    """
    rate = _positive("rate_per_s", rate_per_s)
    facts = {"arrivals": "poisson", "rate_per_s": rate, "seed": _seed(seed), "normalize": bool(normalize)}
    return Schedule(facts, lambda count: _gamma(count, rate, 1.0, seed, normalize), concurrency)


def gamma(
    rate_per_s: float, burstiness: float, seed: int = 0, normalize: bool = False, concurrency: int | None = None
) -> Schedule:
    """Independent gamma gaps of mean 1 / rate and shape `burstiness`: 1 is Poisson, less comes in bursts, more is evener.
    The name is that of vLLM's benchmark, and so is `normalize` (see `poisson`)."""
    rate, shape = _positive("rate_per_s", rate_per_s), _positive("burstiness", burstiness)
    facts = {
        "arrivals": "gamma", "rate_per_s": rate, "burstiness": shape, "seed": _seed(seed), "normalize": bool(normalize),
    }  # fmt: skip
    return Schedule(facts, lambda count: _gamma(count, rate, shape, seed, normalize), concurrency)


def ramp(
    start_per_s: float,
    end_per_s: float,
    over_s: float,
    shape: Literal["linear", "exponential"] = "linear",
    seed: int | None = 0,
    concurrency: int | None = None,
) -> Schedule:
    """A rate that goes from `start_per_s` to `end_per_s` within `over_s` seconds and then stays: a Poisson process of that
    rate, or, with `seed=None`, requests spaced by it evenly.

        N(t) = requests expected until t           (the integral of the rate)
        t_k  = N^-1(k-th arrival of a process of rate 1)
    """
    a, b, over = (
        _positive("start_per_s", start_per_s), _positive("end_per_s", end_per_s), _positive("over_s", over_s),
    )  # fmt: skip
    if shape not in tuple(_RAMPS):
        raise LemError(f"There is no ramp of shape {shape!r}: {nearest(str(shape), _RAMPS)}")
    if seed is not None:
        _seed(seed)
    facts = {
        "arrivals": "ramp", "start_per_s": a, "end_per_s": b, "over_s": over, "shape": shape, "seed": seed,
    }  # fmt: skip

    def draw(count: int) -> Iterator[float]:
        unit = range(count) if seed is None else _gamma(count, 1.0, 1.0, seed, False)
        until_end, inverse = _RAMPS[shape](a, b, over)
        return (inverse(n) if n < until_end else over + (n - until_end) / b for n in unit)

    return Schedule(facts, draw, concurrency)


def trace(path: str | Path, format: str | None = None, time_scale: float = 1.0, concurrency: int | None = None) -> Schedule:
    """The arrivals of a recorded trace (formats: `traces`), the first at 0, times `time_scale`: 0.5 is twice as fast.

    LemError, with the number of the line, for what cannot be read, and for a trace that is shorter than the run.
    """
    scale = _positive("time_scale", time_scale)
    format = traces.detect(path) if format is None else format
    first = next(traces.read(path, format)).at_s
    facts = {"arrivals": "trace", "trace": Path(path).name, "format": format, "time_scale": scale}

    def draw(count: int) -> list[float]:
        rows = list(itertools.islice(traces.read(path, format), count))
        if len(rows) < count:
            raise LemError(f"{path} holds {len(rows)} arrivals, and there are {count} requests: send {len(rows)} or fewer.")
        return [(row.at_s - first) * scale for row in rows]

    return Schedule(facts, draw, concurrency)


async def all_of(works: Iterable[Awaitable[None]]) -> None:
    """Await all of them; when one raises, cancel the others and wait for them, so that none works on unseen."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _gamma(count: int, rate: float, shape: float, seed: int, normalize: bool) -> list[float]:
    random_ = random.Random(seed)
    found = list(itertools.accumulate(random_.gammavariate(shape, 1 / (rate * shape)) for _ in range(count)))
    if normalize and found[-1] <= 0:
        raise LemError(
            f"All {count} gaps of burstiness={shape:g} came out as 0, which cannot be stretched: leave normalize out."
        )
    return [t / found[-1] * (count / rate) for t in found] if normalize else found


def _linear(a: float, b: float, over_s: float) -> tuple[float, Callable[[float], float]]:
    """N(over_s), and the inverse of N(t) = a t + (b - a) t^2 / (2 over_s)."""
    return (a + b) / 2 * over_s, lambda n: 2 * n / (a + math.sqrt(a * a + 2 * (b - a) * n / over_s))


def _exponential(a: float, b: float, over_s: float) -> tuple[float, Callable[[float], float]]:
    """N(over_s), and the inverse of N(t) = (e^(g t) - 1) a / g with growth g = ln(b / a) / over_s."""
    growth = math.log(b / a) / over_s
    if growth == 0:
        return a * over_s, lambda n: n / a
    return (b - a) / growth, lambda n: math.log1p(n * growth / a) / growth


_RAMPS = {"linear": _linear, "exponential": _exponential}


def _whole(who: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LemError(f"{who} a whole number of at least 1: got {shown(value)}.")


def _positive(name: str, value: Any) -> float:
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not known or not LEAST <= value <= MOST:  # before it is made a float, which 10**400 cannot be
        raise LemError(f"{name}= takes a number from {LEAST:g} to {MOST:g}: got {shown(value)}.")
    return float(value)


def _requests(who: str, value: Any) -> None:
    """LemError unless `value` can be gone through again and again, and holds requests."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not listed or not all(isinstance(item, Request) for item in value):
        raise LemError(f"{who} takes the list of requests that will be run: got {shown(value)}.")


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise LemError(f"seed= takes a whole number, so that the schedule can be drawn again: got {shown(seed)}.")
    return seed
