"""How requests are sent: the one loop that hands them to an engine and keeps what comes back.

The one idea: arrivals decide *when* and *together with whom* a request is handed over; `send` does the rest, for every
engine alike. Stamps are made by the events themselves, so how late this loop is woken does not enter them; how late it hands
a request over would, so that is watched (`LoopLag`) and reported (`metrics.schedule_delay_s`).

Not covered: warm-up (`session`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import threading
import time
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .arrivals import (  # noqa: F401 (users find them here)
    Arrivals,
    all_of,
    batches,
    burst,
    concurrency,
    constant,
    gamma,
    poisson,
    ramp,
    token_batches,
    trace,
)
from .backends import Backend
from .errors import LemError, shown
from .measurement import Completion, Request, TokenEvent
from .turns import turns  # noqa: F401

Result = TypeVar("Result")
LONGEST_KEPT = 10_000  # entries of a schedule that a record keeps as they are
TICK_S = 0.02  # how often the loop's lag is looked at: seldom enough to cost nothing


def listed(requests: Iterable[Request]) -> list[Request]:
    """The requests as a list. LemError for what is no list of them."""
    found = list(requests) if isinstance(requests, Iterable) else None
    if found is None or not all(isinstance(request, Request) for request in found):
        raise LemError(f"A run takes a list of requests, of lem.prompts for one: got {shown(requests)}.")
    return found


def check(backend: Backend, requests: Sequence[Request], arrivals: Arrivals) -> None:
    """Raises LemError where this cannot be run, before anything is. Draws the schedule."""
    if not requests:
        raise LemError("There is nothing to run: the list of requests is empty. See lem.prompts for ways to make one.")
    if arrivals.overlapping and not backend.concurrent:
        raise LemError(
            f"Backend '{backend.name}' works on one batch at a time, so queueing under {arrivals.describe()['arrivals']} "
            "arrivals would be an artefact of ours. Use arrivals=lem.traffic.batches(size)."
        )
    arrivals.schedule(len(requests))


def plan(arrivals: Arrivals, count: int) -> dict[str, Any]:
    """What a record keeps of a plan for `count` requests: its description and, for an open loop, "schedule_s", the instants
    in seconds; of more than 10,000 only the SHA-256, and seed or file give them again."""
    schedule_s = list(arrivals.schedule(count) or ())
    if not any(schedule_s):
        return arrivals.describe()
    if len(schedule_s) <= LONGEST_KEPT:
        return {**arrivals.describe(), "schedule_s": schedule_s}
    return {**arrivals.describe(), "schedule_sha256": hashlib.sha256(json.dumps(schedule_s).encode()).hexdigest()}


@dataclass
class Progress:
    """How far a run has come, for those who watch: `send` writes it, others read it, and nobody locks it.

    Counts are over all repeats. `output_tokens_at_most` is what may come out in all; it shrinks where a request ends early.
    `schedule_s`: the run takes at least so long, for its last request is wanted only then; 0 for a closed loop.
    """

    requests: int = 0
    output_tokens_at_most: int = 0
    schedule_s: float = 0.0
    requests_done: int = 0
    output_tokens: int = 0

    @classmethod
    def of(cls, requests: Sequence[Request], arrivals: Arrivals, repeats: int) -> Progress:
        last_s = max(arrivals.schedule(len(requests)) or (), default=0.0)
        return cls(len(requests) * repeats, repeats * sum(r.max_new_tokens for r in requests), repeats * last_s)

    def finished(self, request: Request, completion: Completion) -> None:
        self.requests_done += 1
        if not request.fixed_length or completion.error:
            self.output_tokens_at_most -= request.max_new_tokens - completion.output_tokens


async def send(
    backend: Backend,
    requests: Sequence[Request],
    arrivals: Arrivals,
    repeat: int = 0,
    progress: Progress | None = None,
    done: dict[int, Completion] | None = None,
) -> list[Completion]:
    """Send every request as `arrivals` plans; return the completions in the order of `requests`. `progress` is kept up to
    date, and so is `done`, the completions by the place of their requests: where this is cancelled, or raises, it holds all
    that were handed over, and those that had not ended have the error "interrupted".

    An exception of the engine becomes the `error` of the requests it hit; a LemError (bad input) passes through.
    """
    done = {} if done is None else done
    progress = progress or Progress()

    async def submit(group: Sequence[int], sched_ns: int | None = None) -> None:
        wanted_ns = time.monotonic_ns() if sched_ns is None else sched_ns
        if len(group) == 1 or not backend.concurrent:
            await together(list(group), wanted_ns)  # without a task of its own, which would hand it over a turn later
        else:
            await all_of(together([i], wanted_ns) for i in group)

    async def together(group: list[int], sched_ns: int) -> None:
        seen = [_Seen() for _ in group]
        error: str | None = "interrupted"  # until it ends in a way of its own
        stream: Any = None
        dispatch_ns = time.monotonic_ns()
        try:
            stream = backend.generate([requests[i] for i in group])
            async for event in stream:
                seen[event.index].take(event)
                progress.output_tokens += event.n_tokens
            error = None
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            if isinstance(problem, LemError):
                raise
        finally:
            try:
                if hasattr(stream, "aclose"):
                    await stream.aclose()  # whatever ended the loop above, the engine's work on these requests ends too
            finally:
                done_ns = time.monotonic_ns()
                for i, of_one in zip(group, seen):
                    done[i] = of_one.completion(sched_ns, dispatch_ns, done_ns, error, repeat)
                    progress.finished(requests[i], done[i])

    with _older_objects_left_alone():
        await arrivals.drive(len(requests), submit)
    return [done[i] for i in range(len(requests))]


@contextlib.contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Meanwhile the garbage collector does not look through what was there before: beside a loaded torch that holds up every
    thread for a quarter of a second, and it costs microseconds to keep it from it."""
    mine = gc.get_freeze_count() == 0  # else its user has done so, and knows when to end it
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


class _Seen:
    """What has come of one request. Events are kept as pairs of numbers, which the garbage collector does not look through:
    half a million objects that it does hold up the loop for tens of milliseconds."""

    __slots__ = ("events", "facts", "timing_sources")
    FACTS = ("prompt_tokens", "cached_tokens", "finish_reason", "queued_ns", "scheduled_ns", "preemptions", "preempted_ns")

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.timing_sources: set[str] = set()
        self.facts: dict[str, Any] = {}

    def take(self, event: TokenEvent) -> None:
        if event.n_tokens:
            self.events.append((event.t_ns, event.n_tokens))
            self.timing_sources.add(event.timing_source)
        for name in self.FACTS:
            if (value := getattr(event, name)) is not None:
                self.facts.setdefault(name, value)

    def completion(self, sched_ns: int, dispatch_ns: int, done_ns: int, error: str | None, repeat: int) -> Completion:
        if error is None and not self.events:
            error = "the engine returned no token"
        return Completion(
            sched_ns=sched_ns,
            dispatch_ns=dispatch_ns,
            done_ns=done_ns,
            events=tuple(self.events),
            prompt_tokens=self.facts.pop("prompt_tokens", None),
            # Instants of two clocks make no latency of the engine's.
            timing_source="engine" if self.timing_sources == {"engine"} else "client",
            error=error,
            repeat=repeat,
            **self.facts,
        )


class LoopLag:
    """Watches the event loop while it works. `worst_s` is by how much a sleep of `TICK_S` overran at worst, in seconds: for
    so long at least nothing could be handed over. None until the first has ended."""

    def __init__(self) -> None:
        self.worst_s: float | None = None
        self._due_ns = 0

    async def during(self, work: Awaitable[Result]) -> Result:
        """Await the work, watching."""
        ticker = asyncio.ensure_future(self._tick())
        try:
            return await work
        finally:
            self._look()  # the loop may have been held up until this moment
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            self._due_ns = time.monotonic_ns() + round(TICK_S * 1e9)
            await asyncio.sleep(TICK_S)
            self._look()

    def _look(self) -> None:
        late_s = (time.monotonic_ns() - self._due_ns) / 1e9
        if self._due_ns and late_s > 0:
            self.worst_s = max(self.worst_s or 0.0, late_s)


_loop: asyncio.AbstractEventLoop | None = None
_loop_thread: threading.Thread | None = None
_loop_lock = threading.Lock()


def run_blocking(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on the process's one background loop and wait for it.

    One loop for the life of the process, because engines tie their output task to the loop they were first used on; a
    background one, because a notebook's own loop is already running. An interrupt cancels the work and waits for it.
    """
    global _loop, _loop_thread
    with _loop_lock:
        if _loop is None or _loop_thread is None or not _loop_thread.is_alive():  # a forked child has no thread but its own
            _loop = asyncio.new_event_loop()
            _loop_thread = threading.Thread(target=_loop.run_forever, name="lem-loop", daemon=True)
            _loop_thread.start()
        loop = _loop
    ended = threading.Event()
    tasks: list[asyncio.Task[Result]] = []

    def begin() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(lambda _: ended.set())

    def give_up() -> None:
        if tasks:
            tasks[0].cancel()
        else:  # the interrupt came before it was begun
            work.close()
            ended.set()

    try:
        loop.call_soon_threadsafe(begin)
        ended.wait()
        return tasks[0].result()
    except BaseException:
        if not ended.is_set():  # whatever was scheduled before is done before: nothing can begin after this
            loop.call_soon_threadsafe(give_up)
            ended.wait(timeout=30)  # the engine stops at its next token; a hung engine must not hang the notebook
        raise
