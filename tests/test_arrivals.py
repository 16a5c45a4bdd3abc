"""Arrival plans: their instants are those asked for, and requests are handed over at them."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FakeClock, run_at_once
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import lem_kit as lem
from lem_kit import prompts, traffic
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Request, TokenEvent

Schedules = Callable[[float, int], Any]
RATES = st.floats(0.01, 1000)
SEEDED: dict[str, Schedules] = {
    "poisson": lambda rate, seed: traffic.poisson(rate, seed),
    "normalised": lambda rate, seed: traffic.poisson(rate, seed, normalize=True),
    "gamma": lambda rate, seed: traffic.gamma(rate, 0.3, seed),
    "ramp": lambda rate, seed: traffic.ramp(rate, 3 * rate, 20 / rate, seed=seed),
    "exponential ramp": lambda rate, seed: traffic.ramp(3 * rate, rate, 20 / rate, "exponential", seed),
}


@pytest.mark.parametrize("kind", SEEDED)
@given(rate=RATES, seed=st.integers(0, 2**31), count=st.integers(1, 60))
def test_a_schedule_is_sorted_and_the_same_for_the_same_seed(kind: str, rate: float, seed: int, count: int) -> None:
    plan = SEEDED[kind](rate, seed)
    offsets = plan.schedule(count)
    assert len(offsets) == count and offsets[0] >= 0 and list(offsets) == sorted(offsets)
    assert offsets == SEEDED[kind](rate, seed).schedule(count)
    assert plan.describe() == SEEDED[kind](rate, seed).describe()
    if count > 10 and rate < 100:
        assert offsets != SEEDED[kind](rate, seed + 1).schedule(count)


@given(rate=RATES, count=st.integers(1, 100))
def test_constant_means_equal_gaps(rate: float, count: int) -> None:
    assert traffic.constant(rate).schedule(count) == pytest.approx([k / rate for k in range(count)], abs=1e-9)


@given(rate=RATES, seed=st.integers(0, 1000), burstiness=st.floats(0.1, 10), count=st.integers(1, 60))
def test_a_normalised_schedule_ends_where_it_was_expected_to(rate: float, seed: int, burstiness: float, count: int) -> None:
    for plan in (traffic.poisson(rate, seed, normalize=True), traffic.gamma(rate, burstiness, seed, normalize=True)):
        assert plan.schedule(count)[-1] == pytest.approx(count / rate, abs=1e-9)


@pytest.mark.parametrize("burstiness", [None, 0.25, 1.0, 4.0])
def test_gaps_have_the_distribution_asked_for(burstiness: float | None) -> None:
    plan = traffic.poisson(8.0, seed=3) if burstiness is None else traffic.gamma(8.0, burstiness, seed=3)
    gaps = np.diff([0.0, *plan.schedule(5000)])
    wanted = stats.expon(scale=1 / 8) if burstiness is None else stats.gamma(burstiness, scale=1 / (8 * burstiness))
    assert stats.kstest(gaps, wanted.cdf).pvalue > 0.05
    assert stats.kstest(gaps, stats.expon(scale=1 / 7).cdf).pvalue < 1e-6, "and the test can tell another rate"
    assert gaps.mean() == pytest.approx(1 / 8, rel=4 * wanted.std() * 8 / math.sqrt(5000))


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_a_ramp_is_a_poisson_process_of_its_rate(shape: Any) -> None:
    """Its arrivals, put through the rate's own integral, are a Poisson process of rate 1."""
    a, b, over = 2.0, 30.0, 200.0
    offsets = np.array(traffic.ramp(a, b, over, shape, seed=5).schedule(6000))
    growth = math.log(b / a) / over
    inside = np.minimum(offsets, over)
    expected = a * inside + (b - a) * inside**2 / (2 * over) if shape == "linear" else a * np.expm1(growth * inside) / growth
    expected += b * (offsets - inside)
    assert (offsets > over).sum() > 1000 and (offsets < over).sum() > 1000
    assert stats.kstest(np.diff([0.0, *expected]), stats.expon.cdf).pvalue > 0.05


def test_an_even_ramp_is_exact() -> None:
    # Linear from 1/s to 3/s over 4 s: N(t) = t + t^2 / 4, so N(2) = 3 and N(4) = 8; after that 3 requests each second.
    offsets = traffic.ramp(1, 3, 4, seed=None).schedule(12)
    assert (offsets[0], offsets[3], offsets[8], offsets[11]) == pytest.approx((0.0, 2.0, 4.0, 5.0))
    # Exponential from 1/s to 4/s over 2 ln 4 s: the growth is 1/2, so N(t) = 2 (e^(t/2) - 1); N(2 ln 2) = 2.
    offsets = traffic.ramp(1, 4, 2 * math.log(4), "exponential", seed=None).schedule(11)
    assert (offsets[2], offsets[6], offsets[10]) == pytest.approx(
        (2 * math.log(2), 2 * math.log(4), 2 * math.log(4) + 1), abs=1e-6
    )
    for shape in ("linear", "exponential"):
        assert traffic.ramp(2, 2, 3, shape, None).schedule(9) == traffic.constant(2).schedule(9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [0, -1, math.nan, math.inf, "4", True, None, 1e-320, 1e308, 10**400, pytest.param(10**5000, id="huge")]
)
def test_rates_that_mean_nothing_are_refused(bad: Any) -> None:
    for make in (
        lambda: traffic.constant(bad), lambda: traffic.poisson(bad), lambda: traffic.gamma(bad, 1),
        lambda: traffic.gamma(1, bad), lambda: traffic.ramp(bad, 1, 1), lambda: traffic.ramp(1, bad, 1),
        lambda: traffic.ramp(1, 1, bad), lambda: traffic.trace("x.csv", time_scale=bad),
    ):  # fmt: skip
        with pytest.raises(LemError, match=r"takes a number from 1e-09 to 1e[+]09: got") as told:
            make()
        assert len(str(told.value)) < 120


def test_other_arguments_that_mean_nothing_are_refused() -> None:
    for bad in (0, -1, 1.5, True, "2"):
        for make in (traffic.batches, traffic.concurrency, traffic.burst):
            with pytest.raises(LemError, match=r"takes a whole number of at least 1: got"):
                make(bad)  # type: ignore[operator]
    for seed in (None, 1.5, True):
        with pytest.raises(LemError, match="seed= takes a whole number"):
            traffic.poisson(1, seed)  # type: ignore[arg-type]
    with pytest.raises(LemError, match="did you mean 'linear'"):
        traffic.ramp(1, 2, 3, "lineal")  # type: ignore[arg-type]
    with pytest.raises(LemError, match=r"no ramp of shape \[\]: there are: exponential, linear"):
        traffic.ramp(1, 2, 3, [])  # type: ignore[arg-type]
    with pytest.raises(LemError, match="leave normalize out"):
        traffic.gamma(1, 1e-9, normalize=True).schedule(2)


@pytest.mark.parametrize("make", [traffic.turns, lambda requests: traffic.token_batches(100, requests)])
@pytest.mark.parametrize("bad", [None, "abc", 7, [1, 2], iter(prompts.synthetic(2, 4, 4)), {"a": 1}])
def test_a_plan_for_given_requests_takes_a_list_of_them(make: Callable[[Any], Any], bad: Any) -> None:
    with pytest.raises(LemError, match=r"\(\) takes the list of requests that will be run: got "):
        make(bad)


@given(shape=st.sampled_from(["linear", "exponential"]), powers=st.tuples(*[st.floats(-9, 9)] * 3), count=st.integers(1, 9))
def test_no_ramp_that_is_accepted_fails_when_it_is_drawn(shape: Any, powers: tuple[float, ...], count: int) -> None:
    offsets = traffic.ramp(*(min(max(10**p, 1e-9), 1e9) for p in powers), shape).schedule(count)
    assert all(math.isfinite(t) and t >= 0 for t in offsets)


def test_a_trace_keeps_its_gaps_from_its_first_request(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"timestamp": {ms}, "input_length": 5, "output_length": 2}}\n' for ms in (500, 700, 1500)))
    plan = traffic.trace(path, time_scale=0.5)
    assert plan.schedule(3) == (0.0, 0.1, 0.5) and plan.schedule(2) == (0.0, 0.1)
    assert plan.describe() == {"arrivals": "trace", "trace": "t.jsonl", "format": "mooncake", "time_scale": 0.5}
    assert traffic.trace(path, "bailian").schedule(3) == (0.0, 200.0, 1000.0)
    with pytest.raises(LemError, match="holds 3 arrivals, and there are 4 requests"):
        traffic.check(lem.load_backend("fake", "fake"), prompts.texts(["a"] * 4), plan)


class Slow:
    """Works on each request for `seconds` of the clock; remembers how many it had at once."""

    name, concurrent = "slow", True

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self.at_work = self.most = 0

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        await asyncio.sleep(self._seconds)
        yield TokenEvent(0, 1, self._clock())
        self.at_work -= 1

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def sent(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Send `count` requests of `seconds` each: the engine, the completions, and their (sched, dispatch, done) in seconds."""
    monkeypatch.setattr(traffic.time, "monotonic_ns", clock)
    start_ns = clock()

    def run(plan: traffic.Arrivals, count: int, seconds: float) -> tuple[Slow, list[Completion], list[list[float]]]:
        engine = Slow(clock, seconds)
        done = run_at_once(traffic.send(engine, prompts.texts(["a"] * count), plan), clock)
        stamps = [[(t - start_ns) / 1e9 for t in (c.sched_ns, c.dispatch_ns, c.done_ns)] for c in done]
        return engine, done, stamps

    return run


def test_an_open_loop_does_not_wait_for_the_engine(sent: Any) -> None:
    engine, done, stamps = sent(traffic.constant(10), 5, 1.0)
    assert stamps == [pytest.approx([k / 10, k / 10, k / 10 + 1], abs=1e-8) for k in range(5)]
    assert engine.most == 5 and all(c.sched_ns <= c.dispatch_ns for c in done)


def test_poisson_requests_go_at_the_instants_of_the_record(sent: Any) -> None:
    plan = traffic.poisson(5, seed=1)
    _, _, stamps = sent(plan, 8, 0.3)
    assert [s[0] for s in stamps] == pytest.approx(traffic.plan(plan, 8)["schedule_s"], abs=1e-9)
    assert [s[1] for s in stamps] == pytest.approx([s[0] for s in stamps], abs=1e-8)


def test_the_clock_of_a_schedule_starts_when_everyone_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """To begin thousands of tasks takes tens of milliseconds, which would be the lag of the first of them."""
    waiting: list[int] = []

    def clock() -> int:
        states = [inspect.getcoroutinestate(task.get_coro()) for task in asyncio.all_tasks()]  # type: ignore[arg-type]
        waiting.append(states.count(inspect.CORO_SUSPENDED))
        return 0

    async def submit(group: Sequence[int], sched_ns: int | None = None) -> None:
        pass

    monkeypatch.setattr(traffic.time, "monotonic_ns", clock)
    asyncio.run(traffic.burst().drive(50, submit))
    assert waiting[0] >= 50


def test_a_cap_delays_requests_in_order_and_their_schedule_stays(sent: Any) -> None:
    engine, _, stamps = sent(traffic.constant(10, concurrency=2), 6, 1.0)
    assert engine.most == 2
    assert [s[0] for s in stamps] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-8)
    assert [s[1] for s in stamps] == pytest.approx([0, 0.1, 1, 1.1, 2, 2.1], abs=1e-8)
    engine, _, stamps = sent(traffic.burst(concurrency=3), 4, 1.0)
    assert engine.most == 3


def test_a_burst_is_handed_over_at_one_instant(sent: Any) -> None:
    engine, _, stamps = sent(traffic.burst(), 20, 1.0)
    assert stamps == [[0, 0, 1]] * 20 and engine.most == 20


def test_a_closed_loop_keeps_its_concurrency(sent: Any) -> None:
    engine, _, stamps = sent(traffic.concurrency(3), 7, 1.0)
    assert engine.most == 3
    assert [s[1] for s in stamps] == pytest.approx([0, 0, 0, 1, 1, 1, 2], abs=1e-8)
    assert [s[0] for s in stamps] == [s[1] for s in stamps], "the plan wants a request when a place is free"
    engine, _, _ = sent(traffic.concurrency(9), 2, 1.0)
    assert engine.most == 2


@pytest.mark.parametrize("plan", [traffic.constant(1000), traffic.concurrency(2), traffic.constant(1000, concurrency=1)])
def test_bad_input_ends_an_open_loop_too(plan: traffic.Arrivals, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic.time, "monotonic_ns", clock)

    class Picky(Slow):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
            if requests[0].prompt == "bad":
                raise LemError("nonsense")
            async for event in super().generate(requests):
                yield event

    async def scenario() -> set[str]:
        with pytest.raises(LemError, match="nonsense"):
            await traffic.send(Picky(clock, 0.01), prompts.texts(["a", "bad", *["c"] * 50]), plan)
        return {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}  # type: ignore[union-attr]

    start_ns = clock()
    assert run_at_once(scenario(), clock) == set(), "nothing works on unseen"
    assert (clock() - start_ns) / 1e9 < 0.03, "and nothing waited for the rest of the schedule"


def of_lengths(*lengths: tuple[int, int]) -> list[Request]:
    return [Request(prompt_token_ids=(1,) * prompt, max_new_tokens=new) for prompt, new in lengths]


def groups(plan: traffic.Arrivals, count: int) -> list[list[int]]:
    handed_over: list[list[int]] = []

    async def submit(group: Sequence[int], sched_ns: int | None = None) -> None:
        handed_over.append(list(group))

    asyncio.run(plan.drive(count, submit))
    return handed_over


def test_token_batches_are_as_long_as_their_padded_tokens_allow() -> None:
    # 2 x (6 + 4) = 20; a third of 2 would make 30. 12 + 4 is alone, for 2 x 16 is too much; then 3 + 4 twice, not thrice.
    requests = of_lengths((4, 4), (6, 4), (2, 4), (12, 4), (3, 4), (3, 4), (3, 4))
    plan = traffic.token_batches(20, requests)
    assert groups(plan, 7) == [[0, 1], [2], [3], [4, 5], [6]]
    assert plan.size == 2 and groups(plan, plan.size) == [[0, 1]], "a warm-up is the first group"
    assert not plan.overlapping and plan.describe() == {"arrivals": "token_batches", "token_budget": 20}
    assert groups(traffic.token_batches(10**6, requests), 7) == [list(range(7))]


def test_a_token_batch_ends_where_requests_do_not_share_what_a_batch_shares() -> None:
    assert groups(traffic.token_batches(100, of_lengths((4, 4), (4, 4), (4, 5), (4, 4))), 4) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("budget", "requests", "words"),
    [
        (10, of_lengths((4, 4), (7, 4)), "Request 1 takes 11 tokens by itself"),
        (10, prompts.texts(["a"]), "needs prompt_token_ids"),
        (0, of_lengths((1, 1)), "whole number of at least 1"),
    ],
)
def test_what_no_token_batch_can_hold_is_one_sentence(budget: int, requests: list[Request], words: str) -> None:
    with pytest.raises(LemError, match=words):
        traffic.token_batches(budget, requests)


def test_token_batches_are_for_the_requests_that_they_were_made_for() -> None:
    plan = traffic.token_batches(20, of_lengths((4, 4), (4, 4), (4, 4)))
    with pytest.raises(LemError, match="made for 3 requests and is to send 4"):
        plan.schedule(4)
