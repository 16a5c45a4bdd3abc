"""An engine that only keeps time: tokens at a chosen rate, and a board of a chosen power beside it.

The one idea: every instant is planned when the requests arrive, so latencies, rates and joules are known before they are
measured. It is for tests, for notebooks that must run anywhere, and for trying a traffic pattern before a GPU is booked.

    busy      = the union, over all generate calls, of [arrival, last planned token]
    joules(t) = idle_power_w * (t - load) + (power_w - idle_power_w) * seconds of busy before t

Not covered: queueing and the slowing of calls by one another (`batch_slowdown` acts inside one call), text, sampling.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from ..energy import Reading
from ..errors import LemError, nearest
from ..measurement import Request, TokenEvent
from ..trace import Domain


def load(model: str = "fake", **engine_args: Any) -> Fake:
    """Engine arguments are those of `Fake`; `model` is only a name."""
    known = list(inspect.signature(Fake).parameters)[1:]
    for name in engine_args:
        if name not in known:
            raise LemError(f"The fake engine does not know the argument '{name}': {nearest(name, known)}")
    backend = Fake(model, **engine_args)
    backend.requested = {name: value for name, value in engine_args.items() if name != "clock"}
    return backend


class Fake:
    """Token k of a request is planned at

        arrival + ttft_s + k * (1 + batch_slowdown * (requests in the call - 1)) / tokens_per_s

    `eos_after`: a request that is not of fixed length stops after so many tokens. `fail_after`: the call raises when a
    request has given so many tokens. `clock` returns nanoseconds and is shared by the tokens and `source`.
    """

    name = "fake"
    concurrent = True

    def __init__(
        self,
        model: str = "fake",
        *,
        ttft_s: float = 0.05,
        tokens_per_s: float = 100.0,
        power_w: float = 200.0,
        idle_power_w: float = 50.0,
        batch_slowdown: float = 0.0,
        fail_after: int | None = None,
        eos_after: int | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings: dict[str, Any] = {
            "ttft_s": ttft_s,
            "tokens_per_s": tokens_per_s,
            "power_w": power_w,
            "idle_power_w": idle_power_w,
            "batch_slowdown": batch_slowdown,
            "fail_after": fail_after,
            "eos_after": eos_after,
        }
        for name, value in self._settings.items():
            least = 1 if name in ("fail_after", "eos_after") else 0
            if value is not None and not (math.isfinite(value) and value >= least and (value or name != "tokens_per_s")):
                raise LemError(f"The fake engine cannot run with {name}={value}: give a number that has a meaning there.")
        self.requested = dict(self._settings)
        self._model = model
        self._clock = clock
        self.source = FakeSource(power_w, idle_power_w, clock)

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        for request in requests:
            for name in request.options:
                raise LemError(f"The fake engine samples nothing and has no option '{name}': leave Request.options empty.")
        fail_after = self._settings["fail_after"]
        counts = [self._length(request) for request in requests]
        longest = max(counts) if fail_after is None else min(max(counts), fail_after)
        step_s = (1 + self._settings["batch_slowdown"] * (len(requests) - 1)) / self._settings["tokens_per_s"]
        offsets_ns = [round((self._settings["ttft_s"] + k * step_s) * 1e9) for k in range(longest)]
        interval = self.source.begin(offsets_ns[-1])
        try:
            for k, offset_ns in enumerate(offsets_ns):
                t_ns = interval[0] + offset_ns
                wait_ns = t_ns - self._clock()
                await asyncio.sleep(max(wait_ns, 0) / 1e9)
                for index, request in enumerate(requests):
                    if k < counts[index]:
                        yield self._event(index, request, k, counts[index], t_ns)
                if fail_after == k + 1 and fail_after < max(counts):
                    raise RuntimeError(f"The fake engine failed after {fail_after} tokens, as fail_after asked.")
        finally:
            self.source.end(interval)

    def _length(self, request: Request) -> int:
        eos_after = self._settings["eos_after"]
        return request.max_new_tokens if request.fixed_length or not eos_after else min(eos_after, request.max_new_tokens)

    def _event(self, index: int, request: Request, k: int, count: int, t_ns: int) -> TokenEvent:
        prompt_tokens = finish_reason = None
        if k == 0:
            prompt_tokens = len(request.prompt_token_ids or (request.prompt or "").split())
        if k == count - 1:
            finish_reason = "length" if count == request.max_new_tokens else "stop"
        return TokenEvent(index, 1, t_ns, "engine", prompt_tokens, finish_reason=finish_reason)

    def describe(self) -> dict[str, Any]:
        from .. import __version__

        return {
            "engine": "fake",
            "version": __version__,
            "model": {"name": self._model, "parameters": None, "dtype": None, "vocabulary": None},
            "requested": dict(self.requested),
            "effective": dict(self._settings),
        }

    def close(self) -> None:
        """There is nothing to free."""


class FakeSource:
    """The energy of the board that `Fake` does not have. Exact at every read; safe to read from another thread."""

    name = "fake"

    def __init__(self, power_w: float, idle_power_w: float, clock: Callable[[], int]) -> None:
        self.domains: Mapping[str, Domain] = {
            "board": Domain("simulated", "model", refresh_s=0.0, reasons=("simulated",), label="simulated board")
        }
        self._power_w = power_w
        self._idle_power_w = idle_power_w
        self._clock = clock
        self._lock = threading.Lock()
        self._origin_ns = self._counted_ns = clock()
        self._busy_ns = 0
        self._live: list[list[int]] = []  # [start, planned end] of calls that are not over at _counted_ns

    def begin(self, length_ns: int) -> list[int]:
        """A call begins now and is planned to take so long."""
        with self._lock:
            now = self._count()
            interval = [now, now + length_ns]
            self._live.append(interval)
            return interval

    def end(self, interval: list[int]) -> None:
        """The call is over: if before its planned end, its power stops now."""
        with self._lock:
            interval[1] = min(interval[1], self._count())

    def read(self) -> dict[str, Reading]:
        with self._lock:
            now = self._count()
            joules = self._idle_power_w * (now - self._origin_ns) / 1e9
            return {"board": Reading(now, joules + (self._power_w - self._idle_power_w) * self._busy_ns / 1e9)}

    def _count(self) -> int:
        """Add the busy time since the last count; what is over is then forgotten, so a long session stays quick to read."""
        now, since = self._clock(), self._counted_ns
        for start, end in sorted(self._live):
            since = max(since, start)
            if min(end, now) > since:
                self._busy_ns += min(end, now) - since
                since = min(end, now)
        self._counted_ns = now
        self._live = [interval for interval in self._live if interval[1] > now]
        return now

    def describe(self) -> dict[str, Any]:
        return {"power_w": self._power_w, "idle_power_w": self._idle_power_w}

    def close(self) -> None:
        """There is nothing to free."""
