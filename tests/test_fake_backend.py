"""The fake engine on a clock of our own: every instant and every joule is known before."""

from __future__ import annotations

import asyncio

import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from lem_kit.backends.fake import Fake, load
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent

PROMPT = Request(prompt_token_ids=(1, 2, 3), max_new_tokens=4)


@pytest.fixture
def engine(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Fake:
    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return load("fake", ttft_s=0.1, tokens_per_s=50, power_w=200, idle_power_w=50, clock=clock)


def generated(engine: Fake, requests: list[Request]) -> list[TokenEvent]:
    async def all_of_it() -> list[TokenEvent]:
        return [event async for event in engine.generate(requests)]

    return asyncio.run(all_of_it())


def test_every_instant_is_the_planned_one(engine: Fake, clock: FakeClock) -> None:
    began = clock.now_ns
    found = generated(engine, [PROMPT])
    assert [e.t_ns - began for e in found] == [100_000_000, 120_000_000, 140_000_000, 160_000_000]
    assert found[0].prompt_tokens == 3 and found[-1].finish_reason == "length" and found[0].timing_source == "engine"


def test_the_joules_are_power_times_time(engine: Fake, clock: FakeClock) -> None:
    clock.advance(1)
    before = engine.source.read()["board"].joules
    assert before == pytest.approx(50)
    generated(engine, [PROMPT])
    clock.advance(1)
    assert engine.source.read()["board"].joules - before == pytest.approx(0.16 * 200 + 1 * 50)
    assert engine.source.domains["board"].reasons == ("simulated",)


def test_calls_at_the_same_time_heat_the_board_once(engine: Fake, clock: FakeClock) -> None:
    source = engine.source
    start = source.read()["board"].joules
    one = source.begin(1_000_000_000)
    clock.advance(0.5)
    source.begin(1_000_000_000)
    clock.advance(2)
    source.end(one)
    assert source.read()["board"].joules - start == pytest.approx(1.5 * 200 + 1.0 * 50)


def test_two_overlapping_calls_of_generate_are_counted_once() -> None:
    """On the real event loop: the planned ends decide, so the joules are exact however late the loop wakes."""
    engine = load("fake", ttft_s=0.02, tokens_per_s=100, power_w=300, idle_power_w=100)
    request = Request(prompt="a", max_new_tokens=4)

    async def call() -> list[TokenEvent]:
        return [event async for event in engine.generate([request])]

    async def both() -> list[list[TokenEvent]]:
        return await asyncio.gather(call(), call())

    before = engine.source.read()["board"]
    one, two = asyncio.run(both())
    after = engine.source.read()["board"]
    busy_ns = max(one[-1].t_ns, two[-1].t_ns) - min(one[0].t_ns, two[0].t_ns) + 20_000_000
    expected = 100 * (after.t_ns - before.t_ns) / 1e9 + 200 * busy_ns / 1e9
    assert after.joules - before.joules == pytest.approx(expected, rel=1e-12)


def test_a_call_left_early_stops_heating_the_board(engine: Fake, clock: FakeClock) -> None:
    async def first_only() -> None:
        stream = engine.generate([PROMPT])
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(first_only())
    clock.advance(1)
    assert engine.source.read()["board"].joules == pytest.approx(0.1 * 200 + 1 * 50, rel=1e-12)


def test_batches_may_slow_each_step(clock: FakeClock, engine: Fake) -> None:
    slow = load("fake", ttft_s=0.1, tokens_per_s=50, batch_slowdown=0.5, clock=clock)
    began = clock.now_ns
    found = generated(slow, [PROMPT, PROMPT, PROMPT])
    assert found[-1].t_ns - began == 100_000_000 + 3 * 40_000_000


def test_it_can_stop_early_and_fail(clock: FakeClock, engine: Fake) -> None:
    stopping = load("fake", eos_after=2, clock=clock)
    assert [e.finish_reason for e in generated(stopping, [PROMPT])] == [None, "stop"]
    fixed = Request(prompt="a", max_new_tokens=4, fixed_length=True)
    assert len(generated(stopping, [fixed])) == 4
    with pytest.raises(RuntimeError, match="failed after 2 tokens"):
        generated(load("fake", fail_after=2, clock=clock), [PROMPT])


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), max_size=8), st.lists(st.floats(0.01, 1), min_size=1, max_size=8)
)
def test_readings_between_change_nothing(calls: list[tuple[float, float]], steps: list[float]) -> None:
    """The counter is the same whether it is read often or once: windows add up."""
    totals = []
    for often in (True, False):
        clock = FakeClock()
        source = load("fake", power_w=300, idle_power_w=20, clock=clock).source
        for _, length in calls:
            source.begin(round(length * 1e9))
        for step in steps:
            clock.advance(step)
            if often:
                source.read()
        totals.append(source.read()["board"].joules)
    assert totals[0] == pytest.approx(totals[1])
    busy = min(max([0.0, *(length for _, length in calls)]), sum(steps))
    assert totals[1] == pytest.approx(20 * sum(steps) + 280 * busy, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens_pers": 1}, "did you mean 'tokens_per_s'"),
        ({"tokens_per_s": 0}, "tokens_per_s=0"),
        ({"ttft_s": -1}, "ttft_s=-1"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(LemError, match=words):
        load("fake", **arguments)
