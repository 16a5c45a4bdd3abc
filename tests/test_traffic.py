"""Sending requests: together as planned, in order, with failures that hit only whom they hit."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from conftest import FakeClock, run_at_once

import lem_kit as lem
from lem_kit import prompts, traffic
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Request, TokenEvent


class Engine:
    """Gives one event of its own stamp per request and remembers what was submitted together."""

    name = "engine"

    def __init__(self, concurrent: bool = False, problem: Exception | None = None) -> None:
        self.concurrent, self.problem = concurrent, problem
        self.groups: list[int] = []

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        self.groups.append(len(requests))
        for index in reversed(range(len(requests))):
            if self.problem and requests[index].prompt == "bad":
                raise self.problem
            yield TokenEvent(index, 2, t_ns=index, prompt_tokens=7 + index)
            yield TokenEvent(index, 0, finish_reason="stop")

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def sent(engine: Engine, requests: list[Request], arrivals: traffic.Arrivals) -> list[Any]:
    return asyncio.run(traffic.send(engine, requests, arrivals))


def test_a_static_batch_is_submitted_together_and_comes_back_in_order() -> None:
    engine = Engine()
    done = sent(engine, prompts.texts(["a", "b", "c", "d", "e"]), lem.traffic.batches(2))
    assert engine.groups == [2, 2, 1]
    assert [c.prompt_tokens for c in done] == [7, 8, 7, 8, 7]
    assert [c.events for c in done] == [((0, 2),), ((1, 2),)] * 2 + [((0, 2),)]
    assert all(c.finish_reason == "stop" and c.error is None and c.sched_ns <= c.dispatch_ns <= c.done_ns for c in done)


def test_an_engine_with_a_scheduler_gets_requests_one_by_one() -> None:
    engine = Engine(concurrent=True)
    assert len(sent(engine, prompts.texts(["a", "b", "c"]), lem.traffic.burst())) == 3
    assert engine.groups == [1, 1, 1]


def test_an_engines_failure_is_the_error_of_the_requests_it_hit() -> None:
    engine = Engine(problem=RuntimeError("out of memory"))
    done = sent(engine, prompts.texts(["a", "b", "bad", "d"]), lem.traffic.batches(2))
    assert [c.error for c in done] == [None, None, "RuntimeError: out of memory", "RuntimeError: out of memory"]
    assert done[3].events, "what came before the failure is kept"


def test_bad_input_passes_through_and_no_token_is_an_error() -> None:
    with pytest.raises(LemError, match="nonsense"):
        sent(Engine(problem=LemError("nonsense")), prompts.texts(["bad"]), lem.traffic.batches())

    class Mute(Engine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
            yield TokenEvent(0, 0)

    assert sent(Mute(), prompts.texts(["a"]), lem.traffic.batches())[0].error == "the engine returned no token"


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(LemError, match="empty"):
        traffic.check(Engine(), [], lem.traffic.batches())
    overlapping = (
        lem.traffic.burst(), lem.traffic.constant(1), lem.traffic.poisson(1), lem.traffic.gamma(1, 2),
        lem.traffic.ramp(1, 2, 3), lem.traffic.concurrency(2),
    )  # fmt: skip
    for arrivals in overlapping:
        with pytest.raises(LemError, match=f"one batch at a time.*{arrivals.describe()['arrivals']} arrivals"):
            traffic.check(Engine(), prompts.texts(["a"]), arrivals)
        traffic.check(Engine(concurrent=True), prompts.texts(["a"]), arrivals)
    traffic.check(Engine(), prompts.texts(["a"]), lem.traffic.concurrency(1))


def test_a_plan_is_kept_with_its_schedule_unless_that_is_very_long() -> None:
    assert traffic.plan(lem.traffic.batches(2), 3) == {"arrivals": "batches", "size": 2}
    assert traffic.plan(lem.traffic.concurrency(2), 3) == {"arrivals": "concurrency", "concurrency": 2}
    assert traffic.plan(lem.traffic.burst(), 3) == {"arrivals": "burst"}
    constant = lem.traffic.constant(4, concurrency=8)
    facts = {"arrivals": "constant", "rate_per_s": 4.0, "concurrency": 8}
    assert traffic.plan(constant, 3) == {**facts, "schedule_s": [0.0, 0.25, 0.5]}
    assert len(traffic.plan(constant, 10_000)["schedule_s"]) == 10_000
    (longer, other) = (traffic.plan(lem.traffic.poisson(4, seed), 10_001) for seed in (0, 1))
    assert "schedule_s" not in longer and longer["schedule_sha256"] != other["schedule_sha256"]


def test_how_late_the_loop_was_is_seen(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic.time, "monotonic_ns", clock)

    async def work(held_up_s: float) -> None:
        await asyncio.sleep(0.05)
        clock.advance(held_up_s)  # as code does that keeps the loop to itself
        await asyncio.sleep(0.05)

    lag = traffic.LoopLag()
    run_at_once(lag.during(asyncio.sleep(0.01)), clock)
    assert lag.worst_s is None, "it was not looked at yet"
    run_at_once(lag.during(work(0.3)), clock)
    assert lag.worst_s == pytest.approx(0.29), "of 0.3 s, the 0.01 s before the next look are not seen"
    run_at_once(lag.during(work(0.0)), clock)
    assert lag.worst_s == pytest.approx(0.29), "the worst stays"

    async def ends_held_up() -> None:
        await asyncio.sleep(0.03)
        clock.advance(0.5)

    run_at_once(lag.during(ends_held_up()), clock)
    assert lag.worst_s == pytest.approx(0.49)


def test_it_runs_where_a_loop_is_running_already() -> None:
    async def in_a_notebook() -> int:
        return len(traffic.run_blocking(traffic.send(Engine(), prompts.texts(["a"]), lem.traffic.batches())))

    assert asyncio.run(in_a_notebook()) == 1


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("after_s", [0.0, 0.05], ids=["at once", "later"])
def test_an_interrupt_cancels_the_work_and_waits_for_it(after_s: float) -> None:
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(after_s)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.set()

    for _ in range(20 if not after_s else 1):  # at once, the interrupt may come before anything waits for the work
        ended.clear()
        with pytest.raises(KeyboardInterrupt):
            traffic.run_blocking(work())
        assert ended.is_set()


def test_an_interrupt_before_the_work_begins_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    async def work() -> None:
        begun.append(True)

    traffic.run_blocking(asyncio.sleep(0))  # the loop is there
    loop = traffic._loop
    assert loop is not None
    schedule, calls = loop.call_soon_threadsafe, []

    def interrupted(call: Any, *arguments: Any) -> Any:
        calls.append(call)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return schedule(call, *arguments)

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    asked = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        traffic.run_blocking(work())
    assert begun == [] and time.monotonic() - asked < 5


class Endless(Engine):
    """Works until it is closed; the request "bad" fails when two others have begun, and "short" is done at once."""

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__(True, problem)
        self.begun: list[str | None] = []
        self.ended: list[str | None] = []
        self.at_work: Counter[str | None] = Counter()

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        (request,) = requests
        self.begun.append(request.prompt)
        try:
            while request.prompt != "bad" or len(self.begun) < 3:
                self.at_work[request.prompt] += 1
                yield TokenEvent(0, 1)
                if request.prompt == "short":
                    return
                await asyncio.sleep(0)
            if request.prompt == "bad":
                yield TokenEvent(0, 1)
            raise self.problem or RuntimeError
        finally:
            self.ended.append(request.prompt)


def test_bad_input_stops_the_work_on_the_other_requests() -> None:
    engine = Endless(LemError("nonsense"))

    async def scenario() -> list[str | None]:
        with pytest.raises(LemError, match="nonsense"):
            await traffic.send(engine, prompts.texts(["a", "bad", "c"]), lem.traffic.burst())
        return sorted(str(prompt) for prompt in engine.ended)  # before the loop ends, which would end them as well

    assert asyncio.run(scenario()) == ["a", "bad", "c"]


def test_cancelled_work_ends_in_the_engine_too() -> None:
    engine = Endless()

    async def scenario() -> list[str | None]:
        work = asyncio.ensure_future(traffic.send(engine, prompts.texts(["a", "b", "c"]), lem.traffic.burst()))
        while len(engine.begun) < 3:
            await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return engine.ended

    assert sorted(map(str, asyncio.run(scenario()))) == ["a", "b", "c"]


@pytest.mark.parametrize("problem", [None, LemError("nonsense")], ids=["cancelled", "bad input"])
def test_what_was_done_until_the_end_is_kept(problem: LemError | None) -> None:
    """Of the four, two are at work when the end comes, one has ended before, and one is not begun."""
    engine = Endless(problem)
    done: dict[int, Completion] = {}
    asked = prompts.texts(["short", "a", "bad" if problem else "b", "never"])

    async def scenario() -> None:
        work = asyncio.ensure_future(traffic.send(engine, asked, lem.traffic.concurrency(2), repeat=3, done=done))
        while len(engine.begun) < 3 or not (problem or engine.at_work["b"]):
            await asyncio.sleep(0)
        if problem is None:
            work.cancel()
        with pytest.raises((asyncio.CancelledError, LemError)):
            await work

    asyncio.run(scenario())
    assert sorted(done) == [0, 1, 2], "what was never handed over is not there"
    last = "LemError: nonsense" if problem else "interrupted"
    assert [done[i].error for i in range(3)] == [None, "interrupted", last]
    assert all(c.repeat == 3 and c.dispatch_ns <= c.events[0][0] <= c.events[-1][0] <= c.done_ns for c in done.values())
    assert done[0].output_tokens == 1 and done[1].output_tokens == engine.at_work["a"]


def test_an_engine_that_names_a_request_it_did_not_get_is_closed() -> None:
    closed = []

    class Confused(Engine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
            try:
                yield TokenEvent(5, 1)
            finally:
                closed.append(True)

    async def scenario() -> tuple[str | None, list[bool]]:
        (done,) = await traffic.send(Confused(), prompts.texts(["a"]), lem.traffic.batches())
        return done.error, list(closed)

    error, ended = asyncio.run(scenario())
    assert error is not None and error.startswith("IndexError") and ended == [True]


def test_an_engine_that_refuses_at_once_is_an_error_of_its_requests() -> None:
    class Refusing(Engine):
        def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
            raise RuntimeError("dead")

    done = sent(Refusing(), prompts.texts(["a", "b"]), lem.traffic.batches(2))
    assert [c.error for c in done] == ["RuntimeError: dead"] * 2


def test_the_fake_engine_is_sent_to_like_any_other() -> None:
    backend = lem.load_backend("fake", "fake", ttft_s=0.0, tokens_per_s=1e6)
    done = asyncio.run(traffic.send(backend, prompts.synthetic(3, 5, 4), lem.traffic.batches(2), repeat=7))
    assert [(c.output_tokens, c.prompt_tokens, c.repeat, c.timing_source) for c in done] == [(4, 5, 7, "engine")] * 3
    assert done[0].dispatch_ns <= done[2].dispatch_ns and done[1].done_ns <= done[2].sched_ns
    backend.close()


def test_one_loop_serves_the_process_and_a_dead_one_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def where() -> tuple[asyncio.AbstractEventLoop, str]:
        return asyncio.get_running_loop(), threading.current_thread().name

    loop, name = traffic.run_blocking(where())
    assert name == "lem-loop" and traffic.run_blocking(where())[0] is loop
    monkeypatch.setattr(traffic, "_loop_thread", threading.Thread())  # as in a forked child, where it does not run
    monkeypatch.setattr(traffic, "_loop", loop)
    fresh, _ = traffic.run_blocking(where())
    assert fresh is not loop
    fresh.call_soon_threadsafe(fresh.stop)


def test_what_the_work_raises_comes_out() -> None:
    async def broken() -> None:
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        traffic.run_blocking(broken())


def test_stamps_of_two_clocks_are_not_called_the_engines() -> None:
    class Told(Engine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
            for event in events:
                yield event

    def source(*told: TokenEvent) -> str:
        events[:] = told
        [done] = sent(Told(), prompts.texts(["a"]), lem.traffic.batches(1))
        return str(done.timing_source)

    events: list[TokenEvent] = []
    engine, end = TokenEvent(0, 1, 5, "engine"), TokenEvent(0, 0, 8, "client", finish_reason="length")
    assert source(engine, engine, end) == "engine", "the last one only tells the reason"
    assert source(engine, TokenEvent(0, 1, 7), end) == "client" and source() == "client"


def test_older_objects_are_left_to_themselves_while_requests_are_sent() -> None:
    """A full collection beside a loaded torch holds up every thread for a quarter of a second."""

    class Looking(Engine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
            frozen.append(gc.get_freeze_count())
            async for event in super().generate(requests):
                yield event

    frozen: list[int] = []
    assert gc.get_freeze_count() == 0
    bad = Looking(problem=RuntimeError("no"))
    sent(bad, prompts.texts(["a", "bad"]), lem.traffic.batches(1))
    assert min(frozen) > 1000 and gc.get_freeze_count() == 0, "and no longer, whatever happens"
    gc.freeze()
    try:
        sent(Looking(), prompts.texts(["a"]), lem.traffic.batches(1))
        assert gc.get_freeze_count() > 0, "what a user froze stays so"
    finally:
        gc.unfreeze()
