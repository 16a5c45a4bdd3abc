"""How requests are sent, and the one loop that sends them and keeps what comes back.

The one idea: arrivals decide *when* and *together with whom* a request is handed to the engine; `send` does the rest, for
every engine alike. Stamps are made by the events themselves, so how late this loop is woken does not enter them.

Not covered yet: open-loop arrivals (Poisson, traces); warm-up (`session`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .backends import Backend
from .errors import LemError
from .measurement import Completion, Request, TokenEvent

Result = TypeVar("Result")
Submit = Callable[[Sequence[int]], Awaitable[None]]


class Arrivals(Protocol):
    """A plan of arrivals: `drive` calls `submit` with the indices of the requests to hand over together, and awaits it
    where it wants them finished. `open_loop` plans need an engine that takes requests while it works on others."""

    open_loop: bool

    def describe(self) -> dict[str, Any]: ...

    async def drive(self, count: int, submit: Submit) -> None: ...


@dataclass(frozen=True)
class Batches:
    """Groups of `size` requests, each group when the one before is finished."""

    size: int = 1
    open_loop = False

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise LemError(f"batches() takes a whole number of at least 1: got {self.size!r}.")

    def describe(self) -> dict[str, Any]:
        return {"arrivals": "batches", "size": self.size}

    async def drive(self, count: int, submit: Submit) -> None:
        for start in range(0, count, self.size):
            await submit(range(start, min(start + self.size, count)))


@dataclass(frozen=True)
class Burst:
    """Every request at once; the engine's own scheduler decides."""

    open_loop = True

    def describe(self) -> dict[str, Any]:
        return {"arrivals": "burst"}

    async def drive(self, count: int, submit: Submit) -> None:
        await _all(submit([i]) for i in range(count))


batches, burst = Batches, Burst


def check(backend: Backend, requests: Sequence[Request], arrivals: Arrivals) -> None:
    """Raises LemError where this cannot be run, before anything is."""
    if not requests:
        raise LemError("There is nothing to run: the list of requests is empty. See lem.prompts for ways to make one.")
    if arrivals.open_loop and not backend.concurrent:
        raise LemError(
            f"Backend '{backend.name}' works on one batch at a time, so queueing under {arrivals.describe()['arrivals']} "
            "arrivals would be an artefact of ours. Use arrivals=lem.traffic.batches(size)."
        )


async def send(backend: Backend, requests: Sequence[Request], arrivals: Arrivals, repeat: int = 0) -> list[Completion]:
    """Send every request as `arrivals` plans; return the completions in the order of `requests`.

    An exception of the engine becomes the `error` of the requests it hit; a LemError (bad input) passes through.
    """
    done: dict[int, Completion] = {}

    async def submit(group: Sequence[int]) -> None:
        parts = [[i] for i in group] if backend.concurrent else [list(group)]
        await _all(together(part, time.monotonic_ns()) for part in parts)

    async def together(group: list[int], sched_ns: int) -> None:
        events: dict[int, list[TokenEvent]] = {i: [] for i in group}
        error = None
        stream: Any = None
        dispatch_ns = time.monotonic_ns()
        try:
            stream = backend.generate([requests[i] for i in group])
            async for event in stream:
                events[group[event.index]].append(event)
        except LemError:
            raise
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        finally:
            if hasattr(stream, "aclose"):
                await stream.aclose()  # whatever ended the loop above, the engine's work on these requests ends too
        done_ns = time.monotonic_ns()
        for i in group:
            done[i] = _completion(events[i], sched_ns, dispatch_ns, done_ns, error, repeat)

    await arrivals.drive(len(requests), submit)
    return [done[i] for i in range(len(requests))]


async def _all(works: Iterable[Awaitable[None]]) -> None:
    """Await all of them; when one raises, cancel the others and wait for them, so that none works on unseen."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _completion(
    events: list[TokenEvent], sched_ns: int, dispatch_ns: int, done_ns: int, error: str | None, repeat: int
) -> Completion:
    def known(name: str) -> Any:
        return next((getattr(e, name) for e in events if getattr(e, name) is not None), None)

    if error is None and not any(e.n_tokens for e in events):
        error = "the engine returned no token"
    return Completion(
        sched_ns=sched_ns,
        dispatch_ns=dispatch_ns,
        done_ns=done_ns,
        events=tuple((e.t_ns, e.n_tokens) for e in events if e.n_tokens),
        prompt_tokens=known("prompt_tokens"),
        cached_tokens=known("cached_tokens"),
        finish_reason=known("finish_reason"),
        timing_source=events[0].timing_source if events else "client",
        error=error,
        repeat=repeat,
    )


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

    async def watched() -> Result:
        try:
            return await work
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(watched(), loop)
    try:
        return future.result()
    except BaseException:
        if not future.done():
            future.cancel()
            ended.wait(timeout=30)  # the engine stops at its next token; a hung engine must not hang the notebook
        raise
