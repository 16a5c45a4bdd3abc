"""Shares of requests: exact by tokens, equal to the window's energy to the last digit, within their intervals."""

from __future__ import annotations

import dataclasses
import math
import random
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runs import KEY, closed_loop, following, measured, ns, request, run_of, steady_counter, true_j

from lem_kit import attribution, metrics, phases
from lem_kit.measurement import Completion, Energy, Measurement, Repeat
from lem_kit.trace import Domain, Series, Trace

BEGIN = 103.0


def shares(*completions: Completion, watts: float = 100.0, seconds: float = 4.0) -> attribution.Shares:
    """In a window of so many seconds at a power that never changes."""
    m = measured(steady_counter({KEY: watts}, seconds), completions, BEGIN, BEGIN + seconds)
    found = phases.per_request(m)
    assert found is not None
    assert math.fsum([*found.joules, found.unattributed_j]) == metrics.energy_j(m).value  # type: ignore[union-attr]
    return found


def at(dispatch_s: float, *events: tuple[float, int], **more: object) -> Completion:
    more = {"done_s": BEGIN + more.pop("done_s"), **more} if "done_s" in more else more  # type: ignore[operator]
    return request(BEGIN + dispatch_s, *((BEGIN + t, n) for t, n in events), **more)  # type: ignore[arg-type]


def test_power_is_shared_by_tokens() -> None:
    found = shares(at(1, (1.5, 1), (2.0, 2), (2.5, 2), prompt=10), at(1, (1.5, 1), (2.0, 1), (2.5, 1), (3.0, 1), prompt=40))
    # 50 J of prefill 1 : 4, then 100 J of decode 2 : 1, then 50 J for the second alone.
    assert found.joules == pytest.approx([10 + 200 / 3, 40 + 100 / 3 + 50])
    assert found.unattributed_j == pytest.approx(200)
    assert (found.keys, found.method, found.scopes) == ((KEY,), "counter", ("gpu",))


def test_prefill_beside_decode_is_shared_by_tokens_per_second() -> None:
    # From 1.5 to 2 s: 90 tokens of a prompt in 0.5 s beside 10 in 0.5 s.
    found = shares(at(1, (1.5, 1), (2.0, 10)), at(1.5, (2.0, 1), prompt=90))
    assert found.joules == pytest.approx([50 + 5, 45]) and found.unattributed_j == pytest.approx(300)


def test_cached_tokens_are_not_processed() -> None:
    found = shares(at(1, (2, 1), prompt=40, cached_tokens=30), at(1, (2, 1), prompt=30))
    assert found.joules == pytest.approx([25, 75])
    assert shares(at(1, (2, 1), prompt=40, cached_tokens=40), at(1, (2, 1), prompt=3)).joules == pytest.approx([25, 75])


def test_a_prompt_of_unknown_length_gets_an_equal_part() -> None:
    found = shares(at(1, (2, 1), prompt=None), at(1, (2, 1), prompt=10), at(1, (2, 1), prompt=30))
    assert found.joules == pytest.approx([100 / 3, 200 / 3 / 4, 200 / 3 * 3 / 4])
    assert shares(at(1, (2, 1), prompt=None), at(1, (2, 1), prompt=None)).joules == pytest.approx([50, 50])


def test_a_failed_request_is_at_work_to_its_end_and_another_is_not() -> None:
    failed = at(1, (1.5, 1), prompt=10, done_s=2.0, error="oh")
    assert shares(failed).joules == pytest.approx([100])
    assert shares(dataclasses.replace(failed, error=None)).joules == pytest.approx([50]), "what follows is nobody's"
    silent = at(1, prompt=None, done_s=3.0, error="oh")
    found = shares(silent, at(2, (3, 1), prompt=10))
    assert found.joules == pytest.approx([150, 50])


def test_tokens_that_came_at_one_instant_share_the_gap_before_it() -> None:
    found = shares(at(1, (1.5, 1), (2.0, 1), (2.0, 2)), at(1, (1.5, 1), (1.5, 4), (2.0, 1)))
    assert found.joules == pytest.approx([25 + 37.5, 25 + 12.5]), "3 : 1; those beside the first event are no decode"
    assert shares(at(1, (1, 1), (2, 1))).joules == pytest.approx([100]), "an event at dispatch"
    assert shares(at(1, (1, 1))).joules == [0.0] and shares(at(1, (1, 1))).half_width == [0.0]


def out(*spans: tuple[float, float]) -> tuple[tuple[int, int], ...]:
    return tuple((ns(BEGIN + a), ns(BEGIN + b)) for a, b in spans)


BESIDE = at(1, (1.5, 1), (2.0, 1), (2.5, 1), (3.0, 1))  # two tokens per second


def test_a_request_has_no_share_while_it_is_preempted_and_computes_all_again() -> None:
    told = ((1.5, 1), (2.0, 1), (3.0, 1))
    alone = shares(at(1, *told, prompt=10, preempted_ns=out((2.0, 2.5))))
    assert alone.joules == pytest.approx([150]) and alone.unattributed_j == pytest.approx(250)
    assert shares(at(1, *told, prompt=10, preempted_ns=())) == shares(at(1, *told, prompt=10)), "never"
    for since in (1.8, 2.0):  # a token that comes later is of a step that had begun
        found = shares(at(1, *told, prompt=30, preempted_ns=out((since, 2.5))), BESIDE)
        # Prefill 1 : 1, decode 1 : 1, nothing, then 30 + 2 tokens beside 1.
        assert found.joules == pytest.approx([25 + 25 + 50 * 32 / 33, 25 + 25 + 50 + 50 / 33])
    unknown = shares(at(1, *told, prompt=None, preempted_ns=out((2.0, 2.5))), BESIDE)
    assert unknown.joules == pytest.approx([25 + 25 + 25, 25 + 25 + 50 + 25])


def test_what_a_preemption_cut_short_is_an_equal_part() -> None:
    told = ((1.5, 1), (2.0, 1), (3.0, 1))
    twice = shares(at(1, *told, preempted_ns=out((2.1, 2.2), (2.4, 2.6))), BESIDE)
    assert twice.joules == pytest.approx([25 + 25 + 5 + 0 + 10 + 40 * 80 / 82, 50 + 5 + 10 + 10 + 20 + 40 * 2 / 82])
    early = shares(at(1, (2.0, 1), (2.5, 1), prompt=30, cached_tokens=20, preempted_ns=out((1.2, 1.5))), BESIDE)
    assert early.joules == pytest.approx([10 + 50 * 60 / 62 + 25, 10 + 30 + 50 * 2 / 62 + 25 + 50])
    never = shares(at(1, (1.5, 1), (2.0, 1), preempted_ns=out((2.1, 2.4))), BESIDE)
    assert never.joules == pytest.approx([50, 150]), "after its last event it is at nothing anyway"


def test_a_preemption_adds_the_doubt_about_its_instants() -> None:
    trace = steady_counter({KEY: 100.0}, 4)
    trace.domains[KEY] = Domain("gpu", "counter", 0.05)
    m = measured(trace, [at(1, (1.5, 1), (2.03, 1), (3.0, 1), preempted_ns=())], BEGIN, BEGIN + 4)
    taken = dataclasses.replace(m, completions=(dataclasses.replace(m.completions[0], preempted_ns=out((2.03, 2.47))),))
    (plain,), (doubted,) = (phases.per_request(run).half_width for run in (m, taken))  # type: ignore[union-attr]
    assert doubted > plain


def test_several_domains_add_up() -> None:
    trace = steady_counter({"a:gpu0": 100.0, "a:gpu1": 60.0}, 4)
    m = measured(trace, [at(1, (1.5, 1), (2, 3)), at(3, (3.5, 1))], BEGIN, BEGIN + 4)
    found = phases.per_request(m)
    assert found is not None and found.keys == ("a:gpu0", "a:gpu1")
    assert found.joules == pytest.approx([160, 80]) and found.unattributed_j == pytest.approx(400)


def test_each_repeat_is_shared_by_itself_and_its_gaps_are_in_none() -> None:
    repeats = [(BEGIN, BEGIN + 1), (BEGIN + 2, BEGIN + 4)]
    done = [at(0, (0.5, 1)), dataclasses.replace(at(2, (3, 1)), repeat=1)]
    trace = steady_counter({KEY: 100.0}, 4)
    m = measured(trace, done, BEGIN, BEGIN + 4, repeats)
    found = phases.per_request(m)
    assert found is not None and found.joules == pytest.approx([50, 100]) and found.unattributed_j == pytest.approx(150)
    stray = measured(trace, [*done, dataclasses.replace(done[0], repeat=2)], BEGIN, BEGIN + 4, repeats)
    assert phases.per_request(stray) is None, "the total does not hold it"
    empty = measured(trace, done[:1], BEGIN, BEGIN + 4, repeats)
    assert phases.per_request(empty).unattributed_j == pytest.approx(250)  # type: ignore[union-attr]


def test_what_is_not_known_is_not_shared() -> None:
    trace = steady_counter({KEY: 100.0}, 4)
    assert phases.per_request(measured(trace, [], BEGIN, BEGIN + 4)) is None
    nothing = Trace({}, {}, {KEY: Domain("gpu", "counter")})
    assert phases.per_request(measured(nothing, [at(1, (2, 1))], BEGIN, BEGIN + 4)) is None
    known = measured(trace, [at(1, (2, 1))], BEGIN, BEGIN + 4)
    assert phases.per_request(dataclasses.replace(known, trace=nothing)) is None, "a total without its course"


gaps = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 5)), max_size=12)
requests = st.lists(
    st.tuples(st.integers(0, 3_000), st.none() | st.integers(1, 500), gaps, st.booleans(), st.integers(0, 1)),
    min_size=1, max_size=12,
)  # fmt: skip
outs = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 2_000), st.integers(0, 600)), max_size=8)
increments = st.lists(st.integers(1, 60), min_size=60, max_size=60)


@settings(max_examples=60, deadline=None)
@given(requests, outs, increments, increments)
def test_the_shares_are_the_energy_to_the_last_digit(
    asked: list[tuple[int, int | None, list[tuple[int, int]], bool, int]],
    preempted: list[tuple[int, int, int]],
    first: list[int],
    second: list[int],
) -> None:
    step = 100_000_000
    done = []
    for dispatch, prompt, ticks, failed, repeat in asked:
        begin = t = (repeat * 2_000 + 1_500 + dispatch % 1_000) * 1_000_000
        events = []
        for gap, n in ticks:
            t = min(t + gap * 1_000_000, (repeat * 2_000 + 3_400) * 1_000_000)
            events.append((t, n))
        error = "oh" if failed or not events else None
        taken, since = [], begin
        for _, into, gone in sorted(p for p in preempted if p[0] == len(done)):
            since += into * 1_000_000
            taken.append((since, since + gone * 1_000_000))
            since = taken[-1][1]
        done.append(
            Completion(
                begin, begin, t + 1_000_000, tuple(events), prompt, error=error, repeat=repeat, preempted_ns=tuple(taken)
            )
        )
    domains = {"a:g0": Domain("gpu", "counter"), "a:g1": Domain("gpu", "counter", 0.0)}
    counters = {}
    for key, jumps in zip(domains, (first, second)):
        values = np.cumsum([0, *jumps]) * 0.7
        counters[key] = Series(array("q", [k * step for k in range(61)]), array("d", values.tolist()))
    trace = Trace(counters, {}, domains)

    def energy(a: int, b: int) -> dict[str, Energy]:
        from lem_kit.curve import energy_between

        return {k: Energy("a", k[2:], "counter", "gpu", *energy_between(trace, k, a, b)) for k in domains}

    spans = [(1_450_000_000, 3_420_000_000), (3_430_000_000, 5_500_000_000)]
    whole = spans[0][0], spans[1][1]
    m = Measurement(
        "r", "run", "l", "ok", "", *whole, energy(*whole), tuple(Repeat(a, b, energy(a, b)) for a, b in spans), tuple(done),
        trace=trace,
    )  # fmt: skip
    found, total = phases.per_request(m), metrics.energy_j(m)
    assert found is not None and total is not None
    assert math.fsum([*found.joules, found.unattributed_j]) == total.value
    assert min(found.joules) >= 0 and found.unattributed_j >= 0 and min(found.half_width) >= 0
    worked = [c.done_ns > c.dispatch_ns if c.error else c.events[-1][0] > c.dispatch_ns for c in done]
    assert all(w or j == 0 for j, w in zip(found.joules, worked))
    assert all(j > 0 or not w or c.preempted_ns for j, w, c in zip(found.joules, worked, done))


def true_shares(m: Measurement, wave: object) -> np.ndarray:
    rows = attribution.work(m.completions, m.t0_ns, m.t1_ns)
    cuts = np.unique(np.concatenate([rows.start_ns, rows.end_ns, [m.t0_ns, m.t1_ns]]))
    joules, _ = attribution._shared(rows, cuts, np.diff(true_j(wave, cuts)))  # type: ignore[arg-type]
    return np.bincount(rows.owner, joules, len(m.completions))


@pytest.mark.parametrize("places", [1, 4, 16])
@pytest.mark.parametrize("sample_s", [0.02, None], ids=["samples", "counter"])
def test_the_intervals_hold_the_truth_under_load_that_follows_the_requests(places: int, sample_s: float | None) -> None:
    held: list[bool] = []
    errors: list[float] = []
    for seed in range(3):
        done = closed_loop(random.Random(seed), places, 5, think_s=0.3 if places == 1 else 0.0)
        wave = following(done, noise=0.03, seed=seed)
        m = run_of(wave, done, BEGIN, BEGIN + 7, sample_s=sample_s, seed=seed + 50)
        found, truth = phases.per_request(m), true_shares(m, wave)
        assert found is not None
        held += (np.abs(np.array(found.joules) - truth) <= np.array(found.half_width)).tolist()
        errors += ((np.array(found.joules) - truth) / truth).tolist()
        assert np.median(np.array(found.half_width) / truth) < 0.06
    assert np.mean(held) >= 0.95
    assert abs(np.mean(errors)) < 0.005, "an edge between idle and work is not smeared over the counter's period"


def test_a_thousand_requests_of_many_tokens() -> None:
    draw = random.Random(0)
    done = []
    for _ in range(1000):
        t = BEGIN + 4 * draw.random()
        times = np.cumsum([t + 0.2, *(0.01 * draw.uniform(0.5, 1.5) for _ in range(499))])
        done.append(request(t, *((s, 1) for s in times.tolist()), prompt=128))
    m = measured(steady_counter({KEY: 300.0}, 12), done, BEGIN, BEGIN + 12)
    found = phases.per_request(m)
    assert found is not None and math.fsum([*found.joules, found.unattributed_j]) == metrics.energy_j(m).value  # type: ignore[union-attr]
    nobody_s = 12 - (max(c.events[-1][0] for c in done) - min(c.dispatch_ns for c in done)) / 1e9
    assert found.unattributed_j == pytest.approx(300 * nobody_s)
    assert ns(BEGIN) < done[0].dispatch_ns
