"""Sending requests: together as planned, in order, with failures that hit only whom they hit."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

import lem_kit as lem
from lem_kit import prompts, traffic
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent


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
    with pytest.raises(LemError, match="one batch at a time"):
        traffic.check(Engine(), prompts.texts(["a"]), lem.traffic.burst())
    for size in (0, -1, 1.5, True, "2"):
        with pytest.raises(LemError, match="whole number"):
            lem.traffic.batches(size)  # type: ignore[arg-type]


def test_it_runs_where_a_loop_is_running_already() -> None:
    async def in_a_notebook() -> int:
        return len(traffic.run_blocking(traffic.send(Engine(), prompts.texts(["a"]), lem.traffic.batches())))

    assert asyncio.run(in_a_notebook()) == 1


def test_an_interrupt_cancels_the_work_and_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.set()

    import concurrent.futures

    def interrupted(self: object, timeout: float | None = None) -> None:
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        traffic.run_blocking(work())
    assert ended.is_set()
