"""Tokens of an engine that works step by step in a process of its own, with the stamps that its core gives to each step.

The one idea: the front end of such an engine takes in one step after another, and drops the step's stamp while it hands the
tokens over to those who wait. Here its function for that is stood in for, so that a token has the engine's stamp however
late anybody was woken; and the loop that asked is woken once per step, however many requests there are.

It is written against the front end of one engine, which a backend makes and passes in. That function is no published
interface: it is used only where it looks as expected, and left alone when it fails.

Not covered: what a request asks for, starting and ending the engine (the backend).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
import warnings
from array import array
from collections.abc import Awaitable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from ..measurement import TokenEvent
from ..trace import Series


class Row:
    """One request: hands its events to the loop that asked."""

    def __init__(
        self, name: str, index: int, prompt: list[int], caller: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]
    ) -> None:
        self.name = name
        self.prompt = prompt
        self.caller = caller
        self.inbox = inbox
        self.task: asyncio.Task[None] | None = None
        self._index = index
        self._tapped = self._taken = 0
        self._facts: dict[str, Any] = {"prompt_tokens": len(prompt)}
        self._preemptions: int | None = None
        self._preempted: list[tuple[int, int]] = []
        self._out_ns: int | None = None

    def heard(self, events: Iterable[Any] | None) -> None:
        """What the scheduler did with it since its last output, in order."""
        for event in events or ():
            t_ns = round(event.timestamp * 1e9)
            if event.type.name == "PREEMPTED":
                self._out_ns = t_ns
            elif event.type.name == "SCHEDULED" and self._out_ns is not None:
                self._preempted.append((self._out_ns, t_ns))
                self._out_ns = None

    def stepped(self, n_tokens: int, t_ns: int, state: Any) -> TokenEvent:
        """The event of one step. `state` is the front end's of this request, one object that it changes all the time."""
        told, facts = getattr(state, "stats", None), self._facts
        if not self._tapped:
            facts = {**facts, "cached_tokens": getattr(state, "num_cached_tokens", None)}
            for ours, theirs in (("queued_ns", "queued_ts"), ("scheduled_ns", "scheduled_ts")):
                facts[ours] = round(getattr(told, theirs, 0.0) * 1e9) or None
        event = TokenEvent(self._index, n_tokens, t_ns, "engine", **facts)
        self._preemptions = getattr(told, "num_preemptions", None)
        self._tapped, self._facts = self._tapped + n_tokens, {}  # last: what fails above is told by `took`
        return event

    def took(self, n_tokens: int) -> None:
        """So many tokens were handed over; those that no step has told are stamped now."""
        self._taken += n_tokens
        if (missing := self._taken - self._tapped) > 0:
            self._tapped += missing
            facts, self._facts = self._facts, {}
            self.tell(TokenEvent(self._index, missing, **facts))

    def end(self, output: Any) -> None:
        reason = output.outputs[0].finish_reason if output is not None else None
        if reason in (None, "abort", "error"):
            self.tell(RuntimeError(f"the engine gave a request up ({reason or 'it said nothing of why'})."))
        else:
            # As many as it counts, or they are not known: where it hands over no events, for one.
            whole = len(self._preempted) + (self._out_ns is not None) == self._preemptions
            out = tuple(self._preempted) if whole else None
            self.tell(TokenEvent(self._index, 0, finish_reason=reason, preemptions=self._preemptions, preempted_ns=out))

    def tell(self, what: TokenEvent | Exception) -> None:
        _hand_over([(self, what)])


async def abandon(rows: Iterable[Row]) -> None:
    """End the work on requests that nobody waits for, and wait until the engine has let go of them."""
    tasks = [row.task for row in rows if row.task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _hand_over(told: Sequence[tuple[Row, TokenEvent | Exception]]) -> None:
    """One wake-up of each loop, however many requests there are."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Row, Any]]] = {}
    for row, what in told:
        by_loop.setdefault(row.caller, []).append((row, what))
    for loop, mine in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(_put, mine)


def _put(told: Sequence[tuple[Row, TokenEvent | Exception]]) -> None:
    for row, what in told:
        row.inbox.put_nowait(what)


class Tap:
    """Stands in for `process_outputs` of the front end, which the engine's loop calls with each step."""

    def __init__(self, steps: Steps) -> None:
        self.rows: dict[str, Row] = {}
        self.timing = "client: this release hands over no stamps where lem_kit looks for them"  # in words, whose clock it is
        self._steps = steps

    def onto(self, processor: Any) -> None:
        """Take its place, where it looks as expected."""
        inner: Any = getattr(processor, "process_outputs", None)
        names = list(inspect.signature(inner).parameters) if callable(inner) else []
        if names[:2] != ["engine_core_outputs", "engine_core_timestamp"] or not hasattr(processor, "request_states"):
            return

        def outer(engine_core_outputs: Any, engine_core_timestamp: float | None = None, *args: Any, **more: Any) -> Any:
            states = [processor.request_states.get(one.request_id) for one in engine_core_outputs]
            done = inner(engine_core_outputs, engine_core_timestamp, *args, **more)
            try:
                self._step(engine_core_outputs, states, engine_core_timestamp)
            except Exception as error:  # the engine must not stop for it
                processor.process_outputs = inner
                self.timing = f"client: the engine's stamps could not be read ({error!r})"
                warnings.warn(
                    f"The engine's stamps cannot be read any more ({error!r}): tokens are stamped here.", stacklevel=2
                )
            return done

        processor.process_outputs = outer
        self.timing = "engine: stamped by its core at the end of each step"

    def _step(self, outputs: Iterable[Any], states: Iterable[Any], timestamp: float | None) -> None:
        t_ns = round((timestamp or 0.0) * 1e9)
        # Another host's clock, or none: `took` then stamps. A stamp of this host's is never in the future.
        if not 0 < t_ns <= time.monotonic_ns():
            self.timing = "client: the engine's stamps are not of this host's clock"
            return
        self._steps.t_ns = t_ns
        told: list[tuple[Row, TokenEvent | Exception]] = []
        try:
            for output, state in zip(outputs, states):
                self._steps.finished += output.finish_reason is not None
                row = self.rows.get(getattr(state, "external_req_id", None) or output.request_id)
                if row is not None:
                    row.heard(getattr(output, "events", None))
                if row is not None and output.new_token_ids:
                    told.append((row, row.stepped(len(output.new_token_ids), t_ns, state)))
        finally:
            _hand_over(told)


class Steps:
    """What the scheduler says at each step. Written on the engine's loop, read from any thread."""

    COLUMNS = ("batch_requests", "waiting_requests", "kv_cache_used")

    def __init__(self) -> None:
        self.t_ns = 0  # the stamp of the step at hand, 0 where there is none
        self.finished = 0  # requests that ended with it: the scheduler has forgotten them when it counts
        self._lock = threading.Lock()
        self._stamps, self._columns = self._empty()
        self._looks = self._running = 0
        self._highest: tuple[float, ...] = (0.0, 0.0, 0.0)

    def record(self, stats: Any) -> None:
        running = stats.num_running_reqs + self.finished
        waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)  # and those put off for a while
        row = (running, waiting, stats.kv_cache_usage)
        t_ns, self.t_ns, self.finished = self.t_ns or time.monotonic_ns(), 0, 0
        with self._lock:
            if not self._stamps or t_ns > self._stamps[-1]:
                self._stamps.append(t_ns)
                for column, value in zip(self._columns, row):
                    column.append(value)
            if running:
                self._looks, self._running = self._looks + 1, self._running + running
            self._highest = tuple(max(known, value) for known, value in zip(self._highest, row))

    def counters(self) -> dict[str, float]:
        with self._lock:
            looks, running, highest = self._looks, self._running, self._highest
            self._looks, self._running, self._highest = 0, 0, (0.0, 0.0, 0.0)
        if not looks:
            return {}
        names = ("batch_requests_max", "waiting_requests_max", "kv_cache_used_max")
        return {"batch_requests_mean": running / looks, **dict(zip(names, map(float, highest)))}

    def series(self) -> dict[str, Series]:
        with self._lock:
            stamps, columns = self._stamps, self._columns
            self._stamps, self._columns = self._empty()
        return {name: Series(stamps, column) for name, column in zip(self.COLUMNS, columns)}

    def _empty(self) -> tuple[array[int], list[array[float]]]:
        return array("q"), [array("d") for _ in self.COLUMNS]


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lem_kit-engine", daemon=True)
        self._thread.start()

    def begin(self, work: Awaitable[Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)  # type: ignore[arg-type]

    def call(self, work: Awaitable[Any]) -> Any:
        return self.begin(work).result()

    def close(self) -> None:
        async def stop() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.call(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
