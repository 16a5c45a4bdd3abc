"""How tokens are seen as a GPU generates them, without waiting for them.

The one idea: generate asks its stopping criteria once per step, when the tokens of that step are in its sequences. One of
them is ours: it keeps the new tokens and says that nothing is to stop. A streamer would be handed them on the host, for
which generate first waits until the device has made them, and only then launches what is left of the step.

Nothing waits: a copy of the new tokens into pinned memory is put on the stream and an event behind it, and both are
looked at when the next step comes, which is after generate has waited for this one anyway. An event has an instant on the
device's clock (`DeviceClock`). All of it happens in the generating thread and outside of the forward pass, so that it can
meet no capture of a CUDA graph.

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
        new = sequences[:, -1 if self._length is None else self._length :]
        self._length = sequences.shape[1]
        self._steps.seen.extend(self._clock.note(new))
        return self._never

    def returned(self, length: int | None) -> None:
        """generate has come back with sequences of this length; None if that is not known.

        A release that learns one step late whether to stop has computed one step more and does not return it."""
        noted = self._clock.rest()
        too_long = length is not None and self._length is not None and self._length > length
        self._steps.seen.extend(noted[:-1] if too_long else noted)


class _Noted(NamedTuple):
    """A step whose tokens may still be on their way. `recorded_ns`: the host's instant before its event was recorded."""

    event: Any
    tokens: Any
    recorded_ns: int
    anchor: _Anchor


class _Anchor(NamedTuple):
    """An event, and the host's instant at which it was over."""

    event: Any
    t_ns: int


class DeviceClock:
    """When tokens were there on the device, on the host's clock.

        anchor  = (an event on the idle stream, the host's instant of it), at first and again after each second
        t       = anchor.t_ns + elapsed(anchor.event, the event behind the copy of the step's tokens)
        stamp   = t, but not before the event was recorded, nor after it was first seen to be over, nor before the last stamp

    An anchor is taken between two looks at the host's clock, and is their middle: they are 0.05 ms apart at most, unless the
    host was disturbed in each of five tries. Until the next one, after a second or after the step if that takes longer, the
    clocks drift by tens of ppm: 0.05 ms in a second. So a stamp is known to 0.1 ms, and the time between two stamps of one
    anchor to a microsecond (`elapsed_time` resolves 0.5 us). It is when the copy was over, some microseconds after the
    token was there. An anchor waits for the device: once a second what a streamer costs at each step.

    `new_event` makes an event that keeps the time, `stream` is what generate works on, `host_like` makes pinned memory for a
    tensor. Events and memory of a step are used again when it has been handed over.
    """

    def __init__(
        self,
        new_event: Callable[[], Any],
        stream: Any,
        host_like: Callable[[Any], Any],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._new_event, self._stream, self._host_like, self._now_ns = new_event, stream, host_like, now_ns
        self._noted: deque[_Noted] = deque()
        self._free: list[tuple[Any, Any]] = []
        self._last_ns = 0
        self._anchor = self._anchored()

    def note(self, new: Any) -> list[tuple[int, Tokens]]:
        """Keep the tokens of a step, on the device still. What is complete of the steps before comes back."""
        found = self._complete()
        event, tokens = self._free.pop() if self._free else (self._new_event(), None)
        if tokens is None or tokens.shape != new.shape:
            tokens = self._host_like(new)
        tokens.copy_(new, non_blocking=True)
        recorded_ns = self._now_ns()
        event.record(self._stream)
        self._noted.append(_Noted(event, tokens, recorded_ns, self._anchor))
        if recorded_ns - self._anchor.t_ns >= ANCHOR_NS:
            self._anchor = self._anchored()
        return found

    def rest(self) -> list[tuple[int, Tokens]]:
        """Wait for all that was noted."""
        if self._noted:
            self._noted[-1].event.synchronize()
        return self._complete()

    def _complete(self) -> list[tuple[int, Tokens]]:
        """In the order of the steps, which is the stream's."""
        found = []
        while self._noted and self._noted[0].event.query():
            seen_ns = self._now_ns()
            event, tokens, recorded_ns, anchor = self._noted.popleft()
            t_ns = anchor.t_ns + round(1e6 * anchor.event.elapsed_time(event))
            self._last_ns = max(min(max(t_ns, recorded_ns), seen_ns), self._last_ns)
            found.append((self._last_ns, tokens.flatten().tolist()))
            self._free.append((event, tokens))
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
