"""Requests that join and leave a running batch one by one, as the engine's own scheduler decides.

The one idea: the engine's loop stamps each token itself and hands a request over once, when it is finished. One thread
waits for that; so observing costs the engine one reading of its clock per token, and wakes nobody in between.

It is written against the continuous batching manager of Hugging Face, which the backend makes and passes in. A manager
that evicts a request to make room computes it again and forgets the stamps of its first tokens: those are then not
invented, the whole request is stamped where it arrives here and says so (`timing_source` "client").

Not covered: what a request may ask for, and how the manager is configured (the backend).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import LemError
from ..measurement import TokenEvent

LOOK_S = 0.1  # how often the engine's occupancy is looked at; nothing of latency depends on it
# The engine stamps with perf_counter, everything else here is monotonic: one clock on Linux and macOS.
_ONE_CLOCK = time.get_clock_info("perf_counter").implementation == time.get_clock_info("monotonic").implementation


class Asked(NamedTuple):
    """One request: its token ids, the ids that end it, and keywords of the manager's `add_request`."""

    prompt: Sequence[int]
    stop_ids: Collection[int]
    keywords: Mapping[str, Any]


class Continuous:
    """A running manager. `manager` is one that has not been started; it belongs to this object from here on."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self._numbers = itertools.count()
        self._waiting: dict[str, Callable[[Any], None]] = {}  # request id -> hands its results to the call that asked
        self._occupancy = _Occupancy()
        self._closed = False
        manager.warmup()  # makes the cache and captures graphs, where there are any; else the first request would pay for it
        # The manager's thread inherits that it is a daemon: an interpreter that ends must not wait for it.
        start = threading.Thread(target=manager.start, daemon=True)
        start.start()
        start.join()
        self._thread = threading.Thread(target=self._collect, name="lem_kit-continuous", daemon=True)
        self._thread.start()

    async def generate(self, asked: Sequence[Asked]) -> AsyncIterator[TokenEvent]:
        """The events of these requests. RuntimeError when the engine fails one of them; the others are then cancelled."""
        results: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def arrived(output: Any) -> None:
            loop.call_soon_threadsafe(results.put_nowait, output)

        rows: dict[str, _Row] = {}
        try:
            for index, (prompt, stop_ids, keywords) in enumerate(asked):
                name = f"lem_kit-{next(self._numbers)}"
                rows[name] = _Row(index, stop_ids)
                self._waiting[name] = arrived  # before the engine has it: whatever becomes of it now, an answer comes
                added = self.manager.add_request(prompt, request_id=name, record_timestamps=True, **keywords)
                if added is None:
                    raise RuntimeError(self._end())
            while rows:
                output = await results.get()
                if self._closed:
                    raise LemError("This backend was closed while it was generating.")
                if isinstance(output, str):
                    raise RuntimeError(output)
                for event in rows[output.request_id].events(output):
                    self._occupancy.unstamped += event.timing_source == "client"
                    yield event
                if output.error is not None:
                    raise RuntimeError(output.error)
                if output.is_finished():
                    del rows[output.request_id]
        finally:
            for name in rows:
                if self._waiting.pop(name, None) and not self._closed:
                    self.manager.cancel_request(name)

    def counters(self) -> dict[str, float]:
        """See `Backend.counters`."""
        occupancy, self._occupancy = self._occupancy, _Occupancy()
        return occupancy.counters()

    def close(self) -> None:
        """Stop at the next token; what was running ends with an error."""
        self._closed = True
        self.manager.stop(block=True, hard_stop=True)
        self._thread.join()
        self.manager.destroy()

    def _collect(self) -> None:
        """In a thread: hand over what the manager has finished, until it ends."""
        looked = 0.0
        while True:
            output = self.manager.get_result(timeout=LOOK_S)
            if output is not None:
                self._hand_over(output.request_id, output, output.is_finished())
            elif not self.manager.is_running():
                break
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                with contextlib.suppress(Exception):  # the engine works on it meanwhile: a look that fails is one look less
                    self._occupancy.look(self.manager.batch_processor)
        while (output := self.manager.get_result(timeout=0)) is not None:
            self._hand_over(output.request_id, output, output.is_finished())
        for name in list(self._waiting):
            self._hand_over(name, self._end(), True)

    def _hand_over(self, name: str, output: Any, finished: bool) -> None:
        arrived = self._waiting.pop(name, None) if finished else self._waiting.get(name)
        if arrived is not None:  # else its call has left
            with contextlib.suppress(RuntimeError):  # the caller's event loop is closed
                arrived(output)

    def _end(self) -> str:
        reason = self.manager.background_thread_status.fatal_error
        return f"the engine's loop has ended ({reason or 'it was stopped'}): load the model again."


class _Row:
    """How far one request has come."""

    def __init__(self, index: int, stop_ids: Collection[int]) -> None:
        self._index = index
        self._stop_ids = stop_ids
        self._seen = 0

    def events(self, output: Any) -> list[TokenEvent]:
        """The tokens that are new in `output`: one event each with the engine's stamps, or one for all without."""
        tokens, stamps = output.generated_tokens, output.timestamps or ()
        count = len(tokens) - self._seen
        if count <= 0:
            return []
        first = self._seen == 0
        self._seen = len(tokens)
        facts: list[dict[str, Any]] = [{} for _ in range(count)]
        # There are fewer stamps than tokens after an eviction; the last ones still belong to the last tokens.
        known = _ONE_CLOCK and count <= len(stamps) <= len(tokens)
        if not known:
            facts = [{}]
        if first:
            facts[0]["prompt_tokens"] = len(output.prompt_ids)
        if output.is_finished() and output.error is None:
            facts[-1]["finish_reason"] = "stop" if tokens[-1] in self._stop_ids else "length"
        if not known:
            return [TokenEvent(self._index, count, **facts[0])]
        times = (round(stamp * 1e9) for stamp in stamps[-count:])
        return [TokenEvent(self._index, 1, t_ns, "engine", **fact) for t_ns, fact in zip(times, facts)]


class _Occupancy:
    """What was seen of the engine's batch and cache since the last report, at looks LOOK_S apart that found it at work."""

    def __init__(self) -> None:
        self.unstamped = 0
        self._looks = self._running = self._running_max = self._waiting_max = 0
        self._cache_used_max = 0.0

    def look(self, processor: Any) -> None:
        running = len(processor.scheduler.active_requests)
        if not running:
            return
        self._looks += 1
        self._running += running
        self._running_max = max(self._running_max, running)
        self._waiting_max = max(self._waiting_max, len(processor.scheduler.waiting_requests))
        cache = processor.cache
        if hasattr(cache, "compute_free_capacity"):
            free = cache.compute_free_capacity()
        else:  # release 5.17
            free = cache.get_num_free_blocks() / cache.num_blocks
        self._cache_used_max = max(self._cache_used_max, 1.0 - free)

    def counters(self) -> dict[str, float]:
        found = {"requests_without_engine_stamps": float(self.unstamped)}
        if self._looks:
            found["batch_requests_mean"] = self._running / self._looks
            found["batch_requests_max"] = float(self._running_max)
            found["waiting_requests_max"] = float(self._waiting_max)
        if self._cache_used_max:
            found["kv_cache_used_max"] = self._cache_used_max
        return found
