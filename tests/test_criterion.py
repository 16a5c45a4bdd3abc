"""Tokens seen by a stopping criterion: what generate hands to it here, and a device's clock told on the host's.

There is no GPU here. `Device` is a border that cannot exist on this machine: a stream that works behind the host, with a
clock that runs at its own rate, whose events, like CUDA's, are over when what lies before them is. The rest is real.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from lem_kit import models
from lem_kit.backends._criterion import Criterion, DeviceClock
from lem_kit.backends._static import Static, Steps, Stopped

US, MS, S = 1000, 1_000_000, 1_000_000_000


class Device:
    """A host whose clock moves by a microsecond each time that it is looked at, and a stream that `work` keeps busy."""

    def __init__(self, ppm: float = 0.0) -> None:
        self.host_ns, self.idle_ns, self.rate = 5 * S, 0, 1 + ppm * 1e-6
        self.waits: list[int] = []  # for how long the host waited, each time
        self.held_ns: Iterator[int] = itertools.repeat(0)  # for how long another thread holds the host after a wait
        self.events = 0

    def now_ns(self) -> int:
        self.host_ns += US
        return self.host_ns

    def work(self, ns: int) -> int:
        """Put on the stream; the host's instant at which it will be done."""
        self.idle_ns = max(self.idle_ns, self.host_ns) + ns
        return self.idle_ns

    def event(self) -> Event:
        self.events += 1
        return Event(self)

    def clock(self) -> DeviceClock:
        return DeviceClock(self.event, self, lambda new: Pinned(self, new.shape), self.now_ns)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.done_ns = device, 0

    def record(self, stream: Any) -> None:
        assert stream is self.device
        self.done_ns = self.device.work(2 * US)

    def query(self) -> bool:
        return self.device.host_ns >= self.done_ns

    def synchronize(self) -> None:
        self.device.waits.append(max(self.done_ns - self.device.host_ns, 0))
        self.device.host_ns = max(self.device.host_ns, self.done_ns) + US + next(self.device.held_ns)

    def elapsed_time(self, other: Event) -> float:
        assert self.query() and other.query(), "CUDA raises where one is not over"
        return (other.done_ns - self.done_ns) * self.device.rate / 1e6


class Pinned:
    """Memory of the host that a copy on the stream fills: to read it before that is over would be to read anything."""

    def __init__(self, device: Device, shape: Any) -> None:
        self.device, self.shape, self.filled_ns = device, shape, 0

    def copy_(self, new: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking and new.shape == self.shape
        self.new, self.filled_ns = new.clone(), self.device.work(3 * US)

    def tolist(self) -> list[list[int]]:
        assert self.device.host_ns >= self.filled_ns
        return self.new.tolist()


def upto(step: int, rows: int = 2) -> torch.Tensor:
    """The sequences after a step: a prompt of three, and the number of each step."""
    return torch.tensor([-1, -2, -3, *range(step + 1)]).repeat(rows, 1)


def test_nothing_waits_and_steps_come_in_order_once_they_are_complete() -> None:
    """The first token at once, later ones together in the copies that follow."""
    device = Device()
    clock = device.clock()
    assert device.waits == [2 * US], "for the anchor, on the idle stream"
    done = []
    for step in range(4):  # queued behind one another: the host is ahead
        done.append(device.work(10 * MS))
        assert clock.note(upto(step), 1) == []
    device.host_ns = done[0] + 100 * US
    first = clock.note(upto(4), 1)
    assert [tokens for _, tokens in first] == [[0, 0]]
    device.host_ns += 60 * MS
    done += [device.idle_ns, device.work(10 * MS)]
    assert clock.note(upto(5), 1) == [], "now the others are copied"
    device.host_ns = device.idle_ns
    done.append(device.work(10 * MS))
    later = clock.note(upto(6), 1)
    assert [tokens for _, tokens in later] == [[k, k] for k in range(1, 6)] and len(device.waits) == 1
    rest = clock.rest()
    assert [tokens for _, tokens in rest] == [[6, 6]] and len(device.waits) == 2
    stamps = [t for t, _ in (*first, *later, *rest)]
    assert stamps == pytest.approx(done, abs=3 * US), "when they were there, and not when somebody looked"
    assert clock.rest() == []


def test_events_are_used_again() -> None:
    device = Device()
    clock = device.clock()
    for step in range(500):
        device.work(5 * MS)
        clock.note(upto(step), 1)
        device.host_ns = device.idle_ns  # as generate waits before each next step
    assert device.events <= 40, "one for the anchor, and those of the steps since the last copy but one"


@pytest.mark.parametrize("ppm", [-50.0, 50.0])
def test_drift_is_that_of_a_second(ppm: float) -> None:
    """Ten seconds of steps of 10 ms, of which drift alone would make 0.5 ms."""
    device = Device(ppm)
    clock = device.clock()
    found, done = [], []
    for step in range(1000):
        done.append(device.work(10 * MS))
        found += clock.note(upto(step), 1)
        device.host_ns = max(device.host_ns, device.idle_ns) + 200 * US
    found += clock.rest()
    errors = [t - truth for (t, _), truth in zip(found, done, strict=True)]
    assert max(map(abs, errors)) < 60 * US
    assert 10 <= sum(wait > MS for wait in device.waits) <= 11, "a wait for the device each second, and at no other step"
    assert [tokens[0] for _, tokens in found] == list(range(1000))


def test_an_anchor_is_the_try_that_was_disturbed_least() -> None:
    device = Device()
    device.held_ns = iter([4 * MS, 5 * MS, 3 * MS, 0, 0])  # another thread holds the interpreter
    clock = device.clock()
    truth = device.work(10 * MS)
    clock.note(upto(0), 1)
    device.host_ns = truth + MS
    ((t_ns, _),) = clock.note(upto(1), 1)
    assert abs(t_ns - truth) < 5 * US and len(device.waits) == 4


def test_a_stamp_stays_between_what_the_host_has_seen() -> None:
    """A clock that is off by a tenth, both ways: later than a token was seen, and earlier than it was asked for."""
    for ppm in (100_000.0, -100_000.0):
        device = Device(ppm)
        clock = device.clock()
        asked, found = [], []
        for step in range(400):
            asked.append(device.host_ns)
            device.work(5 * MS)
            found += [(t, device.host_ns) for t, _ in clock.note(upto(step), 1)]
            device.host_ns = device.idle_ns
        found += [(t, device.host_ns + MS) for t, _ in clock.rest()]
        assert all(first <= t <= seen for first, (t, seen) in zip(asked, found, strict=True))
        stamps = [t for t, _ in found]
        assert stamps == sorted(stamps)


def test_a_step_that_generate_took_back_is_no_token() -> None:
    """As releases do that learn one step late that all rows have ended."""
    steps, device = Steps(), Device()
    criterion = Criterion(steps, None, device.clock())
    sequences = torch.arange(12).reshape(1, 12)
    for length in (10, 11, 12):
        criterion(sequences[:, :length])
    criterion.returned(11)
    assert [tokens for _, tokens in steps.seen] == [[9], [10]] and steps.timing_source == "engine"
    steps = Steps()
    criterion = Criterion(steps, None, device.clock())
    for length in (10, 11, 12):
        criterion(sequences[:, :length])
    criterion.returned(None)
    assert [tokens for _, tokens in steps.seen] == [[9], [10], [11]]


def test_later_steps_are_as_many_tokens_as_came() -> None:
    steps = Steps()
    criterion = Criterion(steps, "never", Device().clock())
    sequences = torch.arange(20).reshape(2, 10)
    assert [criterion(sequences[:, :length], None) for length in (6, 9, 10)] == ["never"] * 3
    criterion.returned(10)
    assert [tokens for _, tokens in steps.seen] == [[5, 15], [6, 7, 8, 16, 17, 18], [9, 19]]
    steps.stop = True
    with pytest.raises(Stopped):
        criterion(sequences)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"return_dict_in_generate": True}])
def test_generate_tells_it_every_token(options: dict[str, Any]) -> None:
    """The real generate, to which it is a criterion like any other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama")).eval()
    ids = torch.arange(300, 321).reshape(3, 7)
    steps = Steps()
    criterion = Criterion(steps, torch.zeros(3, dtype=torch.bool), Device().clock())
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, min_new_tokens=9, do_sample=False,
        pad_token_id=0, stopping_criteria=transformers.StoppingCriteriaList([criterion]), **options,
    )  # fmt: skip
    sequences = getattr(out, "sequences", out)
    criterion.returned(sequences.shape[1])
    assert [len(tokens) for _, tokens in steps.seen] == [3] * 9
    assert [[tokens[row] for _, tokens in steps.seen] for row in range(3)] == sequences[:, 7:].tolist()
    stamps = [t for t, _ in steps.seen]
    assert stamps == sorted(stamps)


def test_events_say_whose_clock_it_is() -> None:
    def run(steps: Steps) -> None:
        steps.prompt_tokens = [3]
        criterion = Criterion(steps, None, Device().clock())
        for length in (4, 5):
            criterion(torch.zeros((1, length), dtype=torch.int64))
        criterion.returned(5)

    static = Static("test")

    async def events() -> list[Any]:
        return [event async for event in static.generate(run, 1, 2, ())]

    found = asyncio.run(events())
    static.close()
    assert [(e.n_tokens, e.timing_source, e.finish_reason) for e in found] == [(1, "engine", None), (1, "engine", "length")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_stamp_is_when_the_device_was_done() -> None:
    from lem_kit.backends.transformers import _device_clock

    device = torch.device("cuda", torch.cuda.current_device())
    clock = _device_clock(device)
    matrix = torch.ones(4096, 4096, device=device)
    sequences = upto(299, rows=8).to(device)
    stamps, seen = [], []
    for step in range(300):
        for _ in range(3):
            matrix = matrix @ matrix * 1e-4
        stamps += clock.note(sequences[:, : 3 + step + 1], 1)
        torch.cuda.synchronize(device)
        seen.append(time.monotonic_ns())
    stamps += clock.rest()
    late = [after - t for (t, _), after in zip(stamps, seen, strict=True)]
    assert [tokens for _, tokens in stamps] == [[step] * 8 for step in range(300)]
    assert min(late) > -100 * US and sorted(late)[150] < 300 * US
