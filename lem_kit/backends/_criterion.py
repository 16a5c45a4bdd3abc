"""How tokens are seen as a GPU generates them, without waiting for them.

The one idea: generate asks its stopping criteria once per step, when the tokens of that step are in its sequences. One of
them is ours: it keeps the new tokens and says that nothing is to stop. A streamer would be handed them on the host, for
which generate first waits until the device has made them, and only then launches what is left of the step.

Nothing waits: an event is put on the stream behind each step, which has an instant on the device's clock (`DeviceClock`),
and some times per second a copy of all tokens since the last one, into pinned memory. They are looked at when a later step
comes. All of it happens in the generating thread and outside of the forward pass, so that it can meet no capture of a CUDA
graph.

Not covered: assisted decoding, where some releases ask the criteria about candidates, too; CPUs, on which a streamer is a
little cheaper; what an engine is asked for.
Nothing here knows torch: tensors, events and streams come from the backend.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ._static import Steps, Stopped, Tokens

# Clocks of device and host drift apart by tens of ppm, so in a second by 0.05 ms at most.
ANCHOR_NS = 1_000_000_000
# Another thread may hold the interpreter when a wait is over, so an instant on both clocks is tried again until it is known
# to half of this; the best is taken if none is.
TRIES, CLOSE_NS = 5, 50_000
# Tokens are copied so seldom, since a copy costs the host several times what an event does.
COPY_NS = 50_000_000


class Criterion:
    """One of generate's stopping criteria, which stops nothing but a batch that was given up (`Stopped`).

    `never` is what it answers: False for each row, where the sequences are. The first step of a batch is one token of each
    row; a later one, as many as the sequences have grown by.
    """

    def __init__(self, steps: Steps, never: Any, clock: DeviceClock) -> None:
        self._steps = steps
        self._never = never
        self._clock = clock
        self._length: int | None = None
        steps.timing_source = "engine"

    def __call__(self, sequences: Any, scores: Any = None, **_: Any) -> Any:
        if self._steps.stop:
            raise Stopped
        length = sequences.shape[1]
        new, self._length = 1 if self._length is None else length - self._length, length
        if found := self._clock.note(sequences, new):
            self._steps.seen.extend(found)
        return self._never

    def returned(self, length: int | None) -> None:
        """generate has come back with sequences of this length; None if that is not known.

        A release that learns one step late whether to stop has computed one step more and does not return it."""
        noted = self._clock.rest()
        too_long = length is not None and self._length is not None and self._length > length
        self._steps.seen.extend(noted[:-1] if too_long else noted)


class _Step(NamedTuple):
    """`recorded_ns`: the host's instant before its event was recorded; `width`: new tokens of each row."""

    event: Any
    recorded_ns: int
    width: int
    anchor: _Anchor


class _Copy(NamedTuple):
    """Tokens that may still be on their way, row by row, and the steps that they are of."""

    event: Any
    tokens: Any
    steps: list[_Step]


class _Anchor(NamedTuple):
    """An event, and the host's instant at which it was over."""

    event: Any
    t_ns: int


class DeviceClock:
    """When tokens were there on the device, on the host's clock.

        anchor  = (an event on the idle stream, the host's instant of it), at first and again after each second
        t       = anchor.t_ns + elapsed(anchor.event, the event behind the step)
        stamp   = t, but not before the event was recorded, nor after it was seen to be over, nor before the last stamp

    An anchor is taken between two looks at the host's clock, and is their middle: they are 0.05 ms apart at most, unless the
    host was disturbed in each of five tries. Until the next one, after a second or after the step if that takes longer, the
    clocks drift by tens of ppm: 0.05 ms in a second. So a stamp is known to 0.1 ms, and the time between two stamps of one
    anchor to a microsecond (`elapsed_time` resolves 0.5 us). An anchor waits for the device: once a second what a streamer
    costs at each step.

    `new_event` makes an event that keeps the time, `stream` is what generate works on, `host_like` makes pinned memory for a
    tensor. Events are used again when they have told their instant.
    """

    def __init__(
        self,
        new_event: Callable[[], Any],
        stream: Any,
        host_like: Callable[[Any], Any],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._new_event, self._stream, self._host_like, self._now_ns = new_event, stream, host_like, now_ns
        self._steps: list[_Step] = []  # whose tokens are in the sequences alone
        self._sequences: Any = None  # the latest
        self._copies: deque[_Copy] = deque()
        self._free: list[Any] = []
        self._copy_due_ns = self._last_ns = 0
        self._anchor = self._anchored()

    def note(self, sequences: Any, width: int) -> list[tuple[int, Tokens]]:
        """A step has added so many tokens to each row. What is complete of the steps before comes back."""
        found = self._complete() if self._copies else []
        event = self._free.pop() if self._free else self._new_event()
        now_ns = self._now_ns()
        event.record(self._stream)
        self._steps.append(_Step(event, now_ns, width, self._anchor))
        self._sequences = sequences
        if now_ns >= self._copy_due_ns:
            self._copy()
            self._copy_due_ns = now_ns + COPY_NS
        if now_ns - self._anchor.t_ns >= ANCHOR_NS:
            self._anchor = self._anchored()
        return found

    def rest(self) -> list[tuple[int, Tokens]]:
        """Wait for all that was noted."""
        if self._steps:
            self._copy()
        if self._copies:
            self._copies[-1].event.synchronize()
        return self._complete()

    def _copy(self) -> None:
        new = self._sequences[:, -sum(step.width for step in self._steps) :]
        tokens, event = self._host_like(new), self._free.pop() if self._free else self._new_event()
        tokens.copy_(new, non_blocking=True)
        event.record(self._stream)
        self._copies.append(_Copy(event, tokens, self._steps))
        self._steps = []

    def _complete(self) -> list[tuple[int, Tokens]]:
        """In the order of the steps, which is the stream's."""
        found: list[tuple[int, Tokens]] = []
        while self._copies and self._copies[0].event.query():
            seen_ns = self._now_ns()
            event, tokens, steps = self._copies.popleft()
            rows, at = tokens.tolist(), 0
            for step in steps:
                t_ns = step.anchor.t_ns + round(1e6 * step.anchor.event.elapsed_time(step.event))
                self._last_ns = max(min(max(t_ns, step.recorded_ns), seen_ns), self._last_ns)
                found.append((self._last_ns, [token for row in rows for token in row[at : at + step.width]]))
                at += step.width
            self._free += [event, *(step.event for step in steps)]
        return found

    def _anchored(self) -> _Anchor:
        """The first try may have to wait for what is on the stream; the next find it idle."""
        tries = []
        for _ in range(TRIES):
            event, before_ns = self._new_event(), self._now_ns()
            event.record(self._stream)
            event.synchronize()
            tries.append((self._now_ns() - before_ns, before_ns, event))
            if tries[-1][0] <= CLOSE_NS:
                break
        took_ns, before_ns, event = min(tries, key=lambda one: one[0])
        return _Anchor(event, before_ns + took_ns // 2)
