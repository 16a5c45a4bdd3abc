"""One static batch at a time, in one worker thread.

The one idea: the generating thread leaves behind an instant and the tokens of every row once per decoding step, nothing
more; the event loop collects them some times per second and makes TokenEvents of them, so that observing costs the
generating thread some microseconds per step and wakes nobody.

Not covered: how the generating thread comes by them (`_criterion`, or as a streamer by itself); what the engine is asked for
(the backend, which passes in the call to run); requests that arrive while others run (`_continuous`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ..errors import LemError
from ..measurement import TokenEvent

# When the event loop looks for new tokens; their instants are taken in the worker, not here. A thread that has slept works
# slowly at first, so to look seldom is cheap: 27 us a step when looking every 0.1 s, 12 us every 0.5 s (one row, steps of 9
# ms). But what is left when the last token has come is waited for: 12 ms then (64 rows, steps of 1.6 ms), and 1.2 ms when it
# looks again each time that about 250 tokens will be there.
LOOK_S, LONGEST_LOOK_S, TOKENS_A_LOOK = 0.02, 0.5, 250

Tokens = list[int]  # of one step: the new ones of the first row, as many of the next, and so on


class Static:
    """The one thread that runs a model, for the life of a backend: a new one per call would pay for its own start and for
    CUDA's. `name` is the thread's."""

    def __init__(self, name: str) -> None:
        self._steps = Steps()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Have the thread do something else in its turn."""
        return asyncio.wrap_future(self._worker.submit(work, *args))

    async def generate(
        self, run: Callable[[Steps], None], count: int, max_new_tokens: int, stop_ids: Collection[int]
    ) -> AsyncIterator[TokenEvent]:
        """The events of `count` rows while `run` generates them and tells the steps that it is given."""
        steps = self._steps = Steps()
        rows = [_Row(index, max_new_tokens, stop_ids) for index in range(count)]
        running = self.submit(run, steps)
        try:
            finished, look_s = False, LOOK_S
            while not finished:
                finished = bool((await asyncio.wait({running}, timeout=look_s))[0])
                look_s = min(max(look_s * TOKENS_A_LOOK / (len(steps.seen) * count or 1), LOOK_S), LONGEST_LOOK_S)
                while steps.seen:
                    t_ns, tokens = steps.seen.popleft()
                    width = len(tokens) // count  # 1, or more when assisted decoding accepts several tokens
                    for row in rows:
                        if not row.ended:
                            yield row.event(t_ns, tokens[row.index * width : (row.index + 1) * width], steps)
            running.result()
            if steps.stop:
                raise LemError("This backend was closed while it was generating.")
            for row in rows:
                if not row.begun:
                    raise LemError("The engine handed over no token: these options (a paged cache?) do not stream.")
                if not row.ended:  # by a criterion of the user's: stop_strings, max_time, ...
                    yield TokenEvent(row.index, 0, finish_reason="stop")
        finally:
            steps.stop = True
            if not running.done():
                await asyncio.wait({running})
            running.exception()  # seen, so that asyncio does not report it as lost when the caller left early

    def close(self) -> None:
        """Stop at the next token; what was running ends with an error."""
        self._steps.stop = True
        self._worker.shutdown(wait=True)


class Stopped(Exception):
    """Raised inside `generate` to leave it at the next token."""


class Steps:
    """What the generating thread leaves behind: an instant and the tokens of each decoding step.

    It is a streamer, too, for what the engine tells by no other means: the token is then on the host, and stamped there.
    """

    def __init__(self) -> None:
        self.seen: deque[tuple[int, Tokens]] = deque()
        self.prompt_tokens: list[int] = []
        self.timing_source: Literal["engine", "client"] = "client"
        self.stop = False
        self._prompt_pending = True

    def put(self, value: Any) -> None:
        t_ns = time.monotonic_ns()
        if self.stop:
            raise Stopped
        if self._prompt_pending:  # the first put is the prompt itself
            self._prompt_pending = False
        else:
            self.seen.append((t_ns, value.flatten().tolist()))

    def end(self) -> None:
        pass


class _Row:
    """How far one request has come."""

    def __init__(self, index: int, max_new_tokens: int, stop_ids: Collection[int]) -> None:
        self.index = index
        self.begun = self.ended = False
        self._missing = max_new_tokens
        self._stop_ids = stop_ids

    def event(self, t_ns: int, new: list[int], steps: Steps) -> TokenEvent:
        """The event of one step; what follows an end-of-sequence token is not output."""
        stop_at = next((i for i, token in enumerate(new) if token in self._stop_ids), None)
        n_tokens = len(new) if stop_at is None else stop_at + 1
        self._missing -= n_tokens
        reason = "stop" if stop_at is not None else None if self._missing > 0 else "length"
        facts = None if self.begun else steps.prompt_tokens[self.index]
        self.begun, self.ended = True, reason is not None
        return TokenEvent(self.index, n_tokens, t_ns, steps.timing_source, prompt_tokens=facts, finish_reason=reason)
