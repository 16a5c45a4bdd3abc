"""Conversations turn by turn: a turn goes out after the one before it is done, and not sooner."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from conftest import FakeClock, run_at_once
from hypothesis import given, settings
from hypothesis import strategies as st

import lem_kit as lem
from lem_kit import prompts, traffic
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Request, TokenEvent


class Slow:
    """Works on a request for as many tenths of a second as it is to generate; fails on those of a bad temper."""

    name, concurrent = "slow", True

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.at_work = self.most = 0

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await asyncio.sleep(requests[0].max_new_tokens / 10)
            if requests[0].options.get("temper") == "bad":
                raise RuntimeError("no")
            yield TokenEvent(0, 1, self._clock())
        finally:
            self.at_work -= 1

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def clocked(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    monkeypatch.setattr(traffic.time, "monotonic_ns", clock)
    return clock


def sent(
    clock: FakeClock, plan: traffic.Arrivals, requests: list[Request]
) -> tuple[Slow, list[Completion], list[list[float]]]:
    engine, start_ns = Slow(clock), clock()
    done = run_at_once(traffic.send(engine, requests, plan), clock)
    return engine, done, [[(t - start_ns) / 1e9 for t in (c.sched_ns, c.dispatch_ns, c.done_ns)] for c in done]


def test_a_turn_waits_for_the_one_before_and_for_the_user(clocked: FakeClock) -> None:
    requests = prompts.conversations(3, 3, 4, 10)  # each turn takes a second
    engine, _, stamps = sent(clocked, traffic.turns(requests, concurrency=2, think_s=0.5), requests)
    # Two conversations go on side by side: turns at 0, 1.5 and 3; the third begins when one of them is over, at 4.
    starts = [0, 1.5, 3] * 2 + [4, 5.5, 7]
    assert [s[0] for s in stamps] == pytest.approx(starts, abs=1e-6)
    assert [s[1] for s in stamps] == pytest.approx(starts, abs=1e-6)
    assert [s[2] for s in stamps] == pytest.approx([t + 1 for t in starts], abs=1e-6)
    assert engine.most == 2


def test_conversations_may_stand_among_one_another_and_alone(clocked: FakeClock) -> None:
    talk, other = prompts.conversations(2, 2, 4, 10)[:2], prompts.conversations(2, 2, 4, 10)[2:]
    requests = [talk[0], other[0], *prompts.texts(["alone"], 10), other[1], talk[1]]
    _, _, stamps = sent(clocked, traffic.turns(requests), requests)
    assert [round(s[1]) for s in stamps] == [0, 2, 4, 3, 1], "one conversation after the other, in the order they begin"


def test_without_pauses_a_turn_goes_out_at_once(clocked: FakeClock) -> None:
    requests = prompts.conversations(1, 4, 4, 10)
    _, _, stamps = sent(clocked, traffic.turns(requests), requests)
    assert [s[1] for s in stamps] == pytest.approx([0, 1, 2, 3], abs=1e-6)


def test_a_turn_that_fails_is_a_miss_and_the_conversation_goes_on(clocked: FakeClock) -> None:
    requests = prompts.conversations(1, 3, 4, 10)
    requests[1:2] = prompts.asking(requests[1:2], {"temper": "bad"})
    _, done, stamps = sent(clocked, traffic.turns(requests), requests)
    assert [c.error for c in done] == [None, "RuntimeError: no", None]
    assert [s[1] for s in stamps] == pytest.approx([0, 1, 2], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(lasting=st.lists(st.integers(1, 4), min_size=1, max_size=6), concurrency=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_turn_is_ever_early(lasting: list[int], concurrency: int, seed: int) -> None:
    clock = FakeClock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic.time, "monotonic_ns", clock)
        requests = [
            Request(prompt="a", max_new_tokens=1 + (c + t) % 3, conversation=str(c), turn=t)
            for c, last in enumerate(lasting)
            for t in range(last)
        ]
        plan = traffic.turns(requests, concurrency, think_s=0.3, seed=seed)
        engine, done, _ = sent(clock, plan, requests)
    assert engine.most <= concurrency
    for (before, after), (asked, then) in zip(itertools.pairwise(done), itertools.pairwise(requests)):
        if asked.conversation == then.conversation:
            assert before.done_ns <= after.sched_ns <= after.dispatch_ns


def test_pauses_are_drawn_before_the_run() -> None:
    requests = prompts.texts(["a"] * 4000)
    plan = traffic.turns(requests, think_s=2.0, seed=1)
    assert plan._pauses_s == traffic.turns(requests, think_s=2.0, seed=1)._pauses_s
    assert plan._pauses_s != traffic.turns(requests, think_s=2.0, seed=2)._pauses_s
    # The mean and the standard deviation of an exponential distribution are equal; both known to 2 / sqrt(4000) here.
    assert statistics.mean(plan._pauses_s) == pytest.approx(2.0, rel=0.06)
    assert statistics.stdev(plan._pauses_s) == pytest.approx(2.0, rel=0.1)
    assert set(traffic.turns(requests, think_s=2.0)._pauses_s) == {2.0}


def test_the_record_says_which_turn_each_request_was() -> None:
    requests = prompts.conversations(2, 3, 4, 5)
    facts = {"arrivals": "turns", "concurrency": 2, "think_s": 1.0, "seed": None, "conversations": 2}
    assert traffic.plan(traffic.turns(requests, 2, 1), 6) == {**facts, "turn": [0, 1, 2, 0, 1, 2]}
    with pytest.raises(LemError, match="made for 6 requests and is to send 5"):
        traffic.check(Slow(FakeClock()), requests[:5], traffic.turns(requests))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"concurrency": 0}, r"turns\(concurrency=\) takes a whole number of at least 1: got 0"),
        ({"concurrency": True}, "got True"),
        ({"think_s": -1}, r"turns\(think_s=\) takes seconds from 0 to 1e[+]09: got -1"),
        ({"think_s": 10**400}, r"takes seconds from 0 to 1e[+]09: got"),
        ({"think_s": math.nan}, "got nan"),
        ({"think_s": math.inf}, "got inf"),
        ({"think_s": "1"}, "got '1'"),
        ({"seed": 1.5}, "seed= takes a whole number"),
    ],
)
def test_what_means_nothing_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(LemError, match=words):
        traffic.turns(prompts.texts(["a"]), **more)


def test_turns_out_of_order_are_named() -> None:
    one, two = prompts.conversations(1, 2, 4, 5)
    for wrong in ([two, one], [one, one]):
        with pytest.raises(
            LemError, match=r"Request 1 is turn 0 of 'conversation-0', after turn .*in the order of their turns"
        ):
            traffic.turns(wrong)
    with pytest.raises(LemError, match="Request 1 is turn None"):
        traffic.turns([Request(prompt="a", conversation="c"), Request(prompt="b", conversation="c")])


def test_one_at_a_time_needs_no_scheduler_of_the_engines() -> None:
    requests = prompts.conversations(2, 2, 4, 5)
    static = Slow(FakeClock())
    static.concurrent = False  # type: ignore[misc]
    traffic.check(static, requests, traffic.turns(requests))
    with pytest.raises(LemError, match=r"one batch at a time.*turns arrivals"):
        traffic.check(static, requests, traffic.turns(requests, concurrency=2))


def test_a_session_runs_conversations() -> None:
    requests = prompts.conversations(3, 3, 8, 4)
    with lem.Session(sources=[]) as session:
        engine = lem.load_backend("fake", "fake", ttft_s=0.004, tokens_per_s=2000)
        m = session.run(engine, requests, lem.traffic.turns(requests, concurrency=2, think_s=0.01), warmup=0)
    assert m.config["turn"] == [0, 1, 2] * 3 and len(m.completions) == 9
    assert [c.prompt_tokens for c in m.completions] == [len(r.prompt_token_ids or ()) for r in requests]
    for c, before in zip(m.completions[1:3], m.completions):
        assert c.sched_ns - before.done_ns == pytest.approx(10e6, abs=5e6) and c.dispatch_ns >= c.sched_ns
