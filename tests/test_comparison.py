"""Ratios with intervals against known numbers, what forbids a comparison, and pairs that are made in turns."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lem_kit as lem
from lem_kit import comparable, statistics
from lem_kit.comparison import Comparison
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Energy, Measurement, Repeat
from lem_kit.trace import Domain, Trace

SECOND = 1_000_000_000
IDS = itertools.count()  # no two measurements are one
BOARD = {"nvml": {"gain_error": 0.05, "gpus": {"gpu0": {"name": "H100", "uuid": "GPU-1", "power_limit_w": 700.0}}}}


def measured(
    joules: Sequence[float] = (100.0,),
    tokens: int = 50,
    half: float = 0.5,
    seconds: float = 1.0,
    method: Any = "counter",
    lengths: Sequence[int] = (),
    wait_s: Callable[[int], float] = lambda i: 0.1,
    **more: Any,
) -> Measurement:
    """One repeat for each of `joules`; in each, requests of `lengths` with a TTFT of `wait_s`."""
    length_ns = round(seconds * SECOND)

    def energy(value: float) -> dict[str, Energy]:
        return {"nvml:gpu0": Energy("nvml", "gpu0", method, "gpu", value, half, ())}

    repeats = tuple(Repeat(k * length_ns, (k + 1) * length_ns, energy(e), tokens) for k, e in enumerate(joules))
    completions = tuple(
        Completion(
            i,
            i,
            2 * SECOND,
            ((i + round(wait_s(i) * SECOND), 1), (i + round((wait_s(i) + 0.5) * SECOND), n - 1)),
            8,
            repeat=k,
        )
        for k in range(len(joules))
        for i, n in enumerate(lengths)
    )
    facts: dict[str, Any] = {
        "config": {"prompts_sha256": "p", "arrivals": "batches", "size": 1},
        "sources": BOARD,
        "environment": {"cpu": "a CPU"},
        "trace": Trace(domains={"nvml:gpu0": Domain("gpu", method, relative_error=1.0 if method == "model" else 0.0)}),
    }
    return Measurement(
        f"r{next(IDS)}", "run", "l", "ok", "", 0, len(joules) * length_ns, energy(sum(joules)), repeats, completions,
        **{**facts, **more},
    )  # fmt: skip


def pairs(ratio: float, scatter: Sequence[float], drift: Sequence[float]) -> tuple[list[Measurement], list[Measurement]]:
    """By meters that leave nothing in doubt."""
    a = [measured([100.0 * d], half=0) for d in drift]
    b = [measured([100.0 * d * ratio * s], half=0) for d, s in zip(drift, scatter)]
    return a, b


def once_more(m: Measurement) -> Measurement:
    """Another measurement that saw the same."""
    return dataclasses.replace(m, run_id=f"r{next(IDS)}")


def test_pairs_that_drift_together_are_known_as_well_as_their_ratio() -> None:
    """Both double within six pairs; their ratio is 0.9, give or take 1 %."""
    scatter = [1.01, 0.99, 1.0, 1.01, 0.99, 1.0]
    found = lem.compare(*pairs(0.9, scatter, [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]), names=("eager", "compiled"))
    logs = [math.log(0.9 * s) for s in scatter]
    half = 2.571 * statistics.stdev(logs) / math.sqrt(6)
    ratio = found["j_per_output_token"]
    assert ratio.ratio == pytest.approx(math.exp(sum(logs) / 6)) and ratio.from_ == "6 pairs"
    assert (ratio.low, ratio.high) == pytest.approx((ratio.ratio * math.exp(-half), ratio.ratio * math.exp(half)))
    told = "compiled took 10 % less energy per output token than eager: "
    assert found.verdict == told + "ratio compiled / eager 0.9000 [0.8916, 0.9085], from 6 pairs."
    assert found.differences == ()


def test_one_pair_has_the_intervals_of_its_figures() -> None:
    alone = lem.compare(measured([100.0], half=3.0), measured([80.0], half=3.2))["j_per_output_token"]
    assert alone.ratio == pytest.approx(0.8) and "meters' intervals alone" in alone.from_
    assert alone.high == pytest.approx(0.8 * math.exp(math.hypot(0.03, 0.04)))
    repeated = lem.compare(measured([100.0, 101.0, 99.0], half=0), measured([80.0, 81.0, 79.0], half=0))
    assert repeated["j_per_output_token"].from_ == "3 and 3 repeats of one run each"
    spread = [4.303 * 1.0 / math.sqrt(3) / mean for mean in (100, 80)]
    assert repeated["j_per_output_token"].low == pytest.approx(0.8 * math.exp(-math.hypot(*spread)))
    rate = repeated["output_tokens_per_s"]
    assert rate.ratio == 1 and rate.low is None and "do not scatter in any digit" in rate.why
    assert repeated["mean_power_w"].ratio == pytest.approx(0.8)


def test_what_one_run_cannot_show_has_no_interval() -> None:
    found = lem.compare(measured(), measured(seconds=2.0))
    rate = found["output_tokens_per_s"]
    assert rate.ratio == 0.5 and rate.low is None and "one run each" in rate.why
    silent = [dataclasses.replace(m, energy={}, repeats=(), output_tokens=50) for m in (measured(), measured(seconds=2.0))]
    found = lem.compare(*silent)
    assert found["j_per_output_token"].ratio is None
    assert (
        found.verdict.startswith("Energy cannot be compared: an energy is not known") and "with no interval" in found.verdict
    )


def test_no_difference_says_how_large_one_may_still_be() -> None:
    found = lem.compare(measured([100.0], half=2.0), measured([101.0], half=2.0))
    assert found.verdict.startswith(
        "No difference in energy per output token was shown, and none above 3.9 % is likely in this one pair: "
    )


@given(
    st.lists(st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)), min_size=2, max_size=8),
    st.floats(0.1, 10),
)
def test_the_other_way_round_is_the_inverse_and_units_do_not_matter(values: list[tuple[float, float]], unit: float) -> None:
    a, b = ([measured([100 * v[side]]) for v in values] for side in (0, 1))
    there, back = lem.compare(a, b)["j_per_output_token"], lem.compare(b, a)["j_per_output_token"]
    assert there.ratio == pytest.approx(1 / back.ratio)  # type: ignore[operator]
    assert (there.low is None) == (back.low is None), "an interval that says nothing is none, either way"
    if there.low and back.low:
        assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))  # type: ignore[operator]
    scaled = lem.compare(*([measured([100 * v[side] * unit], half=0.5 * unit) for v in values] for side in (0, 1)))
    assert scaled["j_per_output_token"][4:7] == pytest.approx(there[4:7])
    same = lem.compare(a, [once_more(m) for m in a])["j_per_output_token"]
    meters = [math.hypot(*[0.5 / (100 * v[0])] * 2) for v in values]
    assert same.ratio == 1 and same.high == pytest.approx(math.exp(math.hypot(*meters) / len(meters)))


def test_digits_are_those_that_the_interval_leaves() -> None:
    precise = lem.compare(measured(half=0.01), measured([100.2], half=0.01))
    assert (
        "0.2 % more energy per output token than A in this one pair: ratio B / A 1.00200 [1.00186, 1.00214]"
        in precise.verdict
    )
    assert "B took 1100 % more" in lem.compare(measured(), measured([1200.0], half=6)).verdict
    unsure = lem.compare(measured(half=70.0), measured([110.0], half=70.0))
    assert "but a large one may be there in this one pair: ratio B / A 1.1 [0.4, 2.8]" in unsure.verdict, unsure.verdict


def test_an_interval_that_says_nothing_is_none() -> None:
    lost = lem.compare(measured(half=100.0), measured())
    assert lost["j_per_output_token"].low is None and "reaches 0" in lost.verdict
    wild = lem.compare([measured(), measured()], [measured([10.0]), measured([1000.0])])
    assert wild["j_per_output_token"].low is None and "scatter" in wild["j_per_output_token"].why
    json.dumps(wild._repr_mimebundle_()[1], allow_nan=False)


def test_paired_intervals_hold_the_truth() -> None:
    """Runs that drift by half and scatter by 2 % each; the truth is 0.95."""
    draw = random.Random(0)
    held = 0
    for _ in range(200):
        drift = [1 + 0.5 * draw.random() for _ in range(6)]
        a, b = pairs(0.95, [draw.gauss(1, 0.03) for _ in drift], drift)
        ratio = lem.compare(a, b)["j_per_output_token"]
        held += ratio.low <= 0.95 <= ratio.high  # type: ignore[operator]
    assert 182 <= held <= 198


def with_config(m: Measurement, **config: Any) -> Measurement:
    return dataclasses.replace(m, config={**m.config, **config})


@pytest.mark.parametrize(
    ("b", "code"),
    [
        (with_config(measured(), prompts_sha256="q"), "other_prompts"),
        (with_config(measured(), prompt_ids_sha256="2"), "other_prompt_ids"),
        (dataclasses.replace(measured(), kind="window"), "other_kind"),
        (dataclasses.replace(measured(), config={"arrivals": "batches", "size": 1}), "prompts_half_known"),
    ],
)
def test_what_forbids_every_comparison(b: Measurement, code: str) -> None:
    a = with_config(measured(), prompt_ids_sha256="1") if code == "other_prompt_ids" else measured()
    with pytest.raises(LemError, match=rf"cannot be compared: .*allow=\['{code}'\]"):
        lem.compare(a, b)
    found = lem.compare(a, b, allow=[code])
    assert code in [d.code for d in found.differences] and found["j_per_output_token"].ratio == 1
    with pytest.raises(LemError, match="other_prompts"):
        lem.compare(a, b, allow=["other_promts"])
    with pytest.raises(LemError, match="as many measurements of each: got 1 and 2"):
        lem.compare(a, [b, b])


def test_other_models_make_other_tokens_by_right() -> None:
    a, b = (
        dataclasses.replace(with_config(measured(), prompt_ids_sha256=name), backend={"model": {"name": name}})
        for name in ("small", "large")
    )
    (told,) = lem.compare(a, b).differences
    assert told.code == "other_model" and "(small / large)" in told.told


def test_energies_of_other_things_are_not_set_against_each_other() -> None:
    host = {"rapl:package-0": Energy("rapl", "package-0", "counter", "cpu", 30.0, 0.1, ())}
    both = dataclasses.replace(measured(), energy={**measured().energy, **host}, repeats=())
    found = lem.compare(measured(), dataclasses.replace(both, output_tokens=50))
    assert found["j_per_output_token"].ratio is None and "cover different things (gpu / cpu, gpu)" in found.verdict
    assert found["j_per_output_token"].a == 2.0 and found["seconds_per_repeat"].ratio == 1
    mixed = lem.compare(measured(), measured(method="model"))
    assert mixed["j_per_output_token"].ratio is None and "the other modelled" in mixed.verdict


def modelled(joules: float, error: float) -> Measurement:
    """By a model that may be off by that share."""
    trace = Trace(domains={"nvml:gpu0": Domain("gpu", "model", relative_error=error)})
    return measured([joules], method="model", half=error * joules, trace=trace)


def test_a_models_error_is_in_no_scatter() -> None:
    found = lem.compare([modelled(100.0, 0.3) for _ in range(5)], [modelled(50.0, 0.4) for _ in range(5)])
    ratio = found["j_per_output_token"]
    assert ratio.low == pytest.approx(0.5 * math.exp(-0.5)) and "method may be off by" in ratio.from_
    assert "modelled" in [d.code for d in found.differences]
    lost = lem.compare([modelled(100.0, 1.0) for _ in range(5)], [modelled(50.0, 0.4) for _ in range(5)])
    assert lost["j_per_output_token"].low is None and lost["j_per_output_token"].why == "an energy's interval reaches 0"


def test_several_pairs_know_no_more_than_their_meters() -> None:
    """The reviewed case: 100 ± 60 J and 90 ± 60 J, twice, gave [0.9, 0.9]."""
    sides = [[measured([joules], half=60.0) for _ in range(2)] for joules in (100.0, 90.0)]
    ratio = lem.compare(*sides)["j_per_output_token"]
    one = math.hypot(60 / 100, 60 / 90)
    assert ratio.high == pytest.approx(0.9 * math.exp(one / math.sqrt(2))), "edges are other ones in each run"
    assert ratio.from_ == "2 pairs and their meters' intervals" and "No difference" in lem.compare(*sides).verdict
    scattered = lem.compare(
        [measured([x], half=3.0) for x in (100, 102, 98)], [measured([x], half=4.0) for x in (90, 90, 91)]
    )
    logs = [math.log(y / x) for x, y in ((100, 90), (102, 90), (98, 91))]
    meters = math.hypot(3 / 100, 4 / 90, 3 / 102, 4 / 90, 3 / 98, 4 / 91) / 3
    half = math.hypot(4.303 * statistics.stdev(logs) / math.sqrt(3), meters)
    found = scattered["energy_j_per_repeat"]
    assert math.log(found.high / found.ratio) == pytest.approx(half)  # type: ignore[operator]
    lost = lem.compare([measured([100.0]), measured([101.0], half=101.0)], [measured([90.0]), measured([91.0])])
    assert lost["j_per_output_token"].low is None and "reaches 0" in lost.verdict


def test_what_samples_of_power_miss_may_be_the_same_in_every_pair() -> None:
    sides = [[measured([j], half=j / 20, method="integral") for j in (base, base * 1.001)] for base in (100.0, 90.0)]
    ratio = lem.compare(*sides)["j_per_output_token"]
    assert ratio.high == pytest.approx(0.9 * math.exp(math.hypot(0.05, 0.05)), rel=1e-6) and "method" in ratio.from_


def test_pairs_under_a_coarse_counter_hold_the_truth() -> None:
    """About 20 J under steps of 1 J, two pairs: the readings often agree by luck, and their scatter alone would hold the
    truth in 45 of 100."""
    draw = random.Random(2)

    def read(joules: float) -> Measurement:
        phase = draw.random()
        return measured([math.floor(joules * draw.gauss(1, 0.001) + phase) - math.floor(phase)], half=1.0)

    held = 0
    for _ in range(200):
        ratio = lem.compare([read(20.2), read(20.2)], [read(19.1), read(19.1)])["energy_j_per_repeat"]
        held += ratio.low <= 19.1 / 20.2 <= ratio.high  # type: ignore[operator]
    assert held >= 190


def test_repeats_in_the_runs_of_pairs_scatter_once() -> None:
    """The spread between the two repeats of a run is in the scatter of pairs: Student's 12.7 of it is not added."""
    a, b = [[measured([j - 2, j + 2], half=0.3) for j in (base, base + 0.1)] for base in (100.0, 90.0)]
    ratio = lem.compare(a, b)["j_per_output_token"]
    meters = [math.hypot(0.3, 0.3) / (2 * j) for j in (100.0, 100.1, 90.0, 90.1)]
    half = math.hypot(
        12.706 * statistics.stdev([math.log(90 / 100), math.log(90.1 / 100.1)]) / math.sqrt(2), math.hypot(*meters) / 2
    )
    assert math.log(ratio.high / ratio.ratio) == pytest.approx(half)  # type: ignore[operator]


@pytest.mark.parametrize("half", [0.0, 0.5])
def test_without_any_scatter_nothing_is_certain(half: float) -> None:
    sides = [[measured([joules], half=half) for _ in range(3)] for joules in (100.0, 90.0)]
    found = lem.compare(*sides)
    rate, ratio = found["output_tokens_per_s"], found["j_per_output_token"]
    assert rate.ratio == 1 and rate.low is None and "do not scatter" in rate.why
    assert (ratio.low is None) == (half == 0) and "[1, 1]" not in repr(found) and "none above 0 %" not in repr(found)


def test_one_measurement_is_no_several() -> None:
    a, b = measured(), measured([90.0])
    again = dataclasses.replace(a, label="loaded once more")
    for sides, words in (
        (([a] * 3, [b] * 3), "A 1 and A 2 are one and the same measurement, "),
        ((a, a), "A and B are one"),
        (([a, b], [measured(), again]), "A 1 and B 2 are one"),
    ):
        with pytest.raises(LemError, match=words):
            lem.compare(*sides)
    elsewhere = dataclasses.replace(b, run_id=a.run_id, started_at="2026-01-01T00:00:00+00:00")
    assert lem.compare(a, elsewhere)["j_per_output_token"].ratio == pytest.approx(0.9), "one run_id in two folders"


def test_two_boards_have_two_gains() -> None:
    other = {"nvml": {"gain_error": 0.05, "gpus": {"gpu0": {"name": "H100", "uuid": "GPU-2", "power_limit_w": 500.0}}}}
    found = lem.compare(measured(half=0), measured(half=0, sources=other))
    ratio = found["j_per_output_token"]
    assert ratio.high == pytest.approx(math.exp(math.hypot(0.05, 0.05))) and "gain of two boards" in ratio.from_
    assert [d.code for d in found.differences] == ["other_gpu", "other_power_limit"]
    assert "H100 GPU-1 / H100 GPU-2" in found.differences[0].told and "700.0 / 500.0" in found.differences[1].told


def test_one_of_several_pairs_on_two_boards_is_enough_for_their_gain() -> None:
    other = {"nvml": {"gain_error": 0.05, "gpus": {"gpu0": {"name": "H100", "uuid": "GPU-2", "power_limit_w": 700.0}}}}
    a, b = [measured(half=0) for _ in range(3)], [measured(half=0), measured(half=0), measured(half=0, sources=other)]
    ratio = lem.compare(a, b)["j_per_output_token"]
    assert ratio.high == pytest.approx(math.exp(math.hypot(0.05, 0.05))) and "gain of two boards" in ratio.from_


@pytest.mark.parametrize(
    ("plan", "other"),
    [
        ({"arrivals": "ramp", "start_per_s": 1.0, "end_per_s": 2.0}, {"end_per_s": 20.0}),
        ({"arrivals": "token_batches", "token_budget": 100}, {"token_budget": 9}),
        ({"arrivals": "poisson", "rate_per_s": 4.0, "schedule_s": [0.0, 1.0]}, {"schedule_s": [0.0, 2.0]}),
        ({"arrivals": "turns", "concurrency": 2, "think_s": 0.0}, {"think_s": 1.0}),
    ],
)
def test_another_plan_is_told_whatever_it_is(plan: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = with_config(measured(), **plan), with_config(measured(), **{**plan, **other})
    assert [d.code for d in lem.compare(a, b).differences] == ["other_arrivals"]
    assert lem.compare(a, once_more(a)).differences == ()


def test_every_plan_that_there_is_can_be_told_apart() -> None:
    t = lem.traffic
    grouped = t.token_batches(99, lem.prompts.synthetic(2, 4, 4))
    plans = [t.batches(2), grouped, t.concurrency(2), t.burst(), t.constant(4), t.poisson(4), t.gamma(4, 2), t.ramp(1, 4, 2)]
    known = [key for plan in plans for key in lem.traffic.plan(plan, 2)]
    assert set(known) - set(comparable.PLAN) <= {"seed"}, "the seed is in the schedule"


def test_tokens_stamped_by_engine_and_client_are_told_apart() -> None:
    a, b = measured(lengths=[3] * 12), measured(lengths=[3] * 12)
    b = dataclasses.replace(b, completions=tuple(dataclasses.replace(c, timing_source="engine") for c in b.completions))
    assert [d.code for d in lem.compare(a, b).differences] == ["other_timing"]


def test_lengths_of_every_pair_are_looked_at() -> None:
    a, b = [measured(lengths=[5, 5]) for _ in range(2)], [measured(lengths=[5, 5]), measured(lengths=[5, 9])]
    found = lem.compare(a, b)
    assert [d.code for d in found.differences] == ["other_output_lengths"] and "(1 of 2 requests)" in found.differences[
        0
    ].told
    assert (
        found.matched is not None and found.matched.requests == 1 and found.verdict.endswith("Mind: other_output_lengths.")
    )


def test_what_is_told_and_forbids_nothing() -> None:
    b = with_config(measured(lengths=[3]), size=4)
    failed = dataclasses.replace(b.completions[0], error="gone")
    b = dataclasses.replace(b, completions=(failed,), environment={"cpu": "another"}, reasons=("requests_failed",))
    codes = [d.code for d in lem.compare(measured(lengths=[3]), b).differences]
    assert codes == ["not_valid", "requests_failed", "other_machine", "other_arrivals"]
    cell = dataclasses.replace(measured(), kind="window", config={})
    found = lem.compare(cell, once_more(cell))
    assert [d.code for d in found.differences] == ["input_unknown"]
    assert found.verdict.startswith("If both did the same, which the records do not tell: No difference in energy")
    short, long = (dataclasses.replace(measured([75.0 * s], seconds=s), kind="idle", config={}) for s in (1.0, 3.0))
    found = lem.compare(short, long)
    assert found.differences == () and [r.metric for r in found.ratios] == ["mean_power_w"], "idle for as long as one likes"
    assert "No difference in mean power" in found.verdict


def test_latencies_are_drawn_by_request() -> None:
    draw = random.Random(1)
    waits = [0.1 + 0.05 * draw.random() for _ in range(40)]
    a = measured(lengths=[3] * 40, wait_s=lambda i: waits[i])
    found = lem.compare(a, measured(lengths=[3] * 40, wait_s=lambda i: 1.5 * waits[i]))
    ttft = found["ttft_s_p50"]
    assert (ttft.ratio, ttft.low, ttft.high) == pytest.approx((1.5, 1.5, 1.5)), "the same requests on both sides"
    assert ttft.from_ == "40 requests of one run each, without what differs from run to run"
    few = lem.compare(measured(lengths=[3] * 9), measured(lengths=[3] * 9))["ttft_s_p50"]
    assert few.ratio == 1 and few.low is None and few.why == "fewer than 10 requests or batches"


def waiting(m: Measurement, wait_s: Callable[[int], float]) -> Measurement:
    """The same with another TTFT for each completion."""
    moved = [
        (c, round(wait_s(i) * SECOND) - c.events[0][0]) for i, c in enumerate(m.completions)
    ]  # of a request that was dispatched at 0
    return dataclasses.replace(
        m, completions=tuple(dataclasses.replace(c, events=tuple((t + by, n) for t, n in c.events)) for c, by in moved)
    )


def test_the_same_request_again_is_no_new_request() -> None:
    """20 requests, ten times each; what a request gains by B scatters by 15 % from one to the next, and around 1. Drawing
    the 200 answers one by one would hold the truth in 59 of 100."""

    def held(trial: int) -> bool:
        draw = random.Random(trial)
        base, gain = [draw.lognormvariate(-2, 0.3) for _ in range(20)], [draw.gauss(1, 0.15) for _ in range(20)]
        plain = measured([100.0] * 10, lengths=[3] * 20)
        a = waiting(plain, lambda i: base[i % 20] * draw.gauss(1, 0.02))
        b = waiting(once_more(plain), lambda i: base[i % 20] * gain[i % 20] * draw.gauss(1, 0.02))
        ratio = lem.compare(a, b)["ttft_s_p50"]
        return ratio.low <= 1 <= ratio.high  # type: ignore[operator]

    assert sum(map(held, range(40))) >= 36


def test_a_request_that_only_one_answered_counts_on_neither_side() -> None:
    a = waiting(measured(lengths=[3] * 20), lambda i: 0.1 * (i + 1))
    lost = [dataclasses.replace(c, error="gone") if i >= 10 else c for i, c in enumerate(a.completions)]
    found = lem.compare(a, dataclasses.replace(once_more(a), completions=tuple(lost)))
    assert found["ttft_s_p50"].ratio == 1 and "requests_failed" in found.verdict, "the slow half failed: that is no gain"


def test_energy_of_matched_requests_is_their_share() -> None:
    """100 W throughout, one request after the other: each has its second, and the last of B takes four."""
    from array import array

    from lem_kit.trace import Series

    def run(lengths: Sequence[int]) -> Measurement:
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        done = tuple(
            Completion((e - n) * SECOND, (e - n) * SECOND, e * SECOND, ((((e - n) * SECOND) + 1, 1), (e * SECOND, n)), 8)
            for e, n in zip(ends, lengths)
        )
        t_ns = [k * SECOND // 10 for k in range(-10, 10 * ends[-1] + 11)]
        counter = Series(array("q", t_ns), array("d", [1e4 + 100 * t / 1e9 for t in t_ns]))
        trace = Trace({"nvml:gpu0": counter}, domains={"nvml:gpu0": Domain("gpu", "counter", refresh_s=0.0)})
        whole = {"nvml:gpu0": Energy("nvml", "gpu0", "counter", "gpu", 100.0 * ends[-1], 0.01, ())}
        return dataclasses.replace(
            measured(), repeats=(), completions=done, t1_ns=ends[-1] * SECOND, energy=whole, trace=trace
        )

    found = lem.compare(run([2] * 12), run([2] * 10 + [8] * 2)).matched
    assert found is not None and found.requests == 10
    shared = {r.metric: r for r in found.ratios}["j_per_output_token"]
    assert shared.a == pytest.approx(100 * 2 / 3, rel=1e-3) and shared.ratio == pytest.approx(1, rel=1e-3)
    assert shared.low is not None and "shared by tokens" in shared.told


def test_requests_of_other_lengths_are_matched() -> None:
    """Twelve requests; the four that the second engine answered at another length took it ten times as long."""
    a = measured(lengths=[5] * 12)
    b = measured(lengths=[5] * 8 + [9] * 4, wait_s=lambda i: 0.1 if i < 8 else 1.0)
    found = lem.compare(a, b)
    assert [d.code for d in found.differences] == ["other_output_lengths"] and found.matched is not None
    assert (found.matched.requests, found.matched.of) == (8, 12)
    assert {r.metric: r.ratio for r in found.matched.ratios}["ttft_s_p50"] == pytest.approx(1)
    wide = lem.compare(a, b, tolerance=4).matched
    assert wide is not None and wide.requests == 12
    assert "of the 8 of 12 requests of equal length" in repr(found), "latencies"
    assert "12 of 12 requests whose lengths differ by at most 4" in repr(lem.compare(a, b, tolerance=4))
    assert "given, too" not in found.differences[0].told, "no energy of the matched ones is known here"
    assert lem.compare(a, once_more(a)).matched is None


def test_lengths_of_every_repeat_are_looked_at() -> None:
    a, b = (measured([100.0, 100.0], lengths=[5, 5]) for _ in range(2))
    later = dataclasses.replace(b.completions[3], events=(*b.completions[3].events, (2 * SECOND, 7)))
    found = lem.compare(a, dataclasses.replace(b, completions=(*b.completions[:3], later)))
    assert [d.code for d in found.differences] == ["other_output_lengths"]
    assert found.matched is not None and found.matched.requests == 1


def test_it_is_shown_as_tables_with_every_text_escaped() -> None:
    found = lem.compare(measured(), measured([80.0]), names=("<b>x</b>", "y & z"))
    data, metadata = found._repr_mimebundle_()
    assert (
        "&lt;b&gt;x&lt;/b&gt;" in data["text/html"] and "<b>x" not in data["text/html"] and "y &amp; z" in data["text/html"]
    )
    assert not any(word in data["text/html"] for word in ("<style", "<script", "<svg", "style="))
    assert "2 J" in data["text/plain"] and "100 W" in data["text/plain"] and "50 1/s" in data["text/plain"]
    assert data["text/plain"] == repr(found) and data["text/plain"].startswith(found.verdict)
    json.dumps(metadata, allow_nan=False)
    with pytest.raises(LemError, match="did you mean"):
        found["j_per_output_tokn"]
    with pytest.raises(LemError, match="no metric '0'"):
        found[0]  # type: ignore[index]


def test_what_stands_against_many_is_told_in_a_line() -> None:
    a, b = ([measured([base + k]) for k in range(12)] for base in (100.0, 90.0))
    unknown = [dataclasses.replace(m, energy={}, repeats=(), reasons=("no_source",)) for m in b]
    found = lem.compare(a, unknown, names=("eager", "compiled"))
    assert found.verdict.startswith(
        "Energy cannot be compared: an energy is not known (compiled 1, compiled 2, compiled 3 and 9 more). "
    )
    assert "no_source: compiled 1, compiled 2, compiled 3 and 9 more" in repr(found) and b[0].run_id not in found.verdict
    few = lem.compare(a[:2], b[:2])
    assert f"note  A: {a[0].run_id}, {a[1].run_id}; B: {b[0].run_id}, {b[1].run_id}" in repr(few)
    assert a[1].run_id in few._repr_mimebundle_()[0]["text/html"]


def test_pairs_that_change_sides_are_told_apart() -> None:
    """Small against large, then large against small: as many of each on both sides."""
    small, large = ({"model": {"name": name}} for name in ("small", "large"))
    a = [measured(backend=each) for each in (small, large)]
    found = lem.compare(a, [measured(backend=each) for each in (large, small)])
    assert [d.code for d in found.differences] == ["other_model"] and "(small / large)" in found.differences[0].told


def test_pairs_that_cover_other_hardware_each_are_not_set_against_each_other() -> None:
    host = {"rapl:package-0": Energy("rapl", "package-0", "counter", "cpu", 30.0, 0.1, ())}
    plain = [dataclasses.replace(measured(), repeats=(), output_tokens=50) for _ in range(4)]
    more = [dataclasses.replace(m, energy={**m.energy, **host}) for m in plain[2:]]
    found = lem.compare([plain[0], more[0]], [more[1], plain[1]])
    assert found["j_per_output_token"].ratio is None and "(gpu / cpu, gpu)" in found.verdict


def test_figures_of_the_verdict_are_no_nearer_than_they_are() -> None:
    def told(joules: float, half: float = 0.001) -> str:
        return lem.compare(measured(half=0.001), measured([joules], half=half)).verdict

    assert told(0.4).startswith("B took more than 99 % less energy per output token")
    assert told(99.995, 0.0).startswith("B took 0.005 % less")
    unsure = lem.compare(measured(half=0.15), measured([100.04], half=0.15))
    assert "none above 0.26 % is likely" in unsure.verdict, "0.252 is above 0.25"


def test_a_measurement_that_failed_is_never_compared() -> None:
    broken = dataclasses.replace(measured(), status="interrupted")
    with pytest.raises(LemError, match=r"failed or was interrupted \(B 2\)\. Leave it out, with its partner"):
        lem.compare([measured(), measured()], [measured(), broken])
    with pytest.raises(LemError, match="'failed' cannot be allowed: the energy and the time of what was cut off"):
        lem.compare(measured(), broken, allow=["failed"])


class Made:
    """Measurements of given energies, one after the other; keeps who was asked."""

    def __init__(self, name: str, joules: Callable[[], float], order: list[str]) -> None:
        self.name, self.joules, self.order = name, joules, order

    def __call__(self) -> Measurement:
        self.order.append(self.name)
        return measured([self.joules()], half=0)


def in_turns(scatter: float, **until: Any) -> tuple[Comparison, str]:
    draw, order = random.Random(3), list[str]()
    a, b = (Made(name, lambda m=mean: draw.gauss(m, m * scatter), order) for name, mean in (("a", 100.0), ("b", 90.0)))
    with lem.Session(sources=[]) as session:
        found = session.compare(a, b, until=lem.repeat_until(**until))
    return found, "".join(order)


def test_turns_alternate_and_stop_when_the_ratio_is_known() -> None:
    found, order = in_turns(0.01, interval=0.02, max_repeats=30)
    ratio = found["j_per_output_token"]
    assert order.startswith("abbaabba") and 5 <= len(found.a) == len(found.b) < 30
    assert math.log(ratio.high / ratio.low) / 2 <= 0.02 and ratio.low < 0.9 < ratio.high  # type: ignore[operator]
    wild, order = in_turns(0.2, interval=0.01, max_repeats=6)
    assert len(order) == 12 and wild.differences[-1].code == "interval_not_reached"


def test_turns_end_after_whole_rounds_and_where_more_cannot_help() -> None:
    found, order = in_turns(0.0001, interval=0.02, max_repeats=30, min_repeats=3)
    assert order == "abbaabba", "three pairs would do, and a drift would not have dropped out"
    with lem.Session(sources=[]) as session:
        a, b = (lambda: modelled(100.0, 0.3)), (lambda: modelled(90.0, 0.3))
        found = session.compare(a, b, until=lem.repeat_until(0.02, max_repeats=30))
    assert len(found.a) == 6 and found.differences[-1].code == "interval_not_reached"
    assert "more pairs change nothing" in found.differences[-1].told and "interval_not_reached" in found.verdict
    with lem.Session(sources=[]) as session:
        found = session.compare(
            lambda: measured([100.0], half=100.0), lambda: measured([90.0]), until=lem.repeat_until(0.02)
        )
    assert len(found.a) == 6 and "one energy alone reaches 0: more pairs change nothing" in found.differences[-1].told
    with lem.Session(sources=[]) as session:  # 5 % of each run's joules are the meter's, whatever the pairs say
        a, b = (lambda: measured([100.0], half=5.0)), (lambda: measured([90.0], half=4.5))
        found = session.compare(a, b, until=lem.repeat_until(0.02))
    ratio = found["j_per_output_token"]
    assert len(found.a) == 14 and ratio.high == pytest.approx(0.9 * math.exp(0.05 * math.sqrt(2 / 14)))


def test_a_turn_that_measures_nothing_is_said() -> None:
    with lem.Session(sources=[]) as session, pytest.raises(LemError, match="returns a Measurement: it returned NoneType"):
        session.compare(lambda: measured(), lambda: None)  # type: ignore[arg-type, return-value]
    same = measured()
    with (
        lem.Session(sources=[]) as session,
        pytest.raises(LemError, match=rf"anew each time: it returned {same.run_id} again"),
    ):
        session.compare(lambda: same, lambda: same)


def test_each_record_tells_of_its_turn_and_an_interrupt_leaves_those_made(tmp_path: Path) -> None:
    engine, requests = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=1000), lem.prompts.synthetic(2, 4, 5)
    with lem.Session(tmp_path, sources=[]) as session:
        calls = iter(range(4))

        def once() -> Measurement:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return session.run(engine, requests, warmup=0)

        with pytest.raises(KeyboardInterrupt):
            session.compare(once, once, names=("slow", "fast"))
        assert "compare_pair" not in session.run(engine, requests, warmup=0).config
    runs = sorted(
        (m for m in lem.store.runs(tmp_path) if "compare_turn" in m.config), key=lambda m: m.config["compare_turn"]
    )
    told = [[m.config[f"compare_{k}"] for k in ("name", "pair", "turn", "after")] for m in runs]
    assert told == [["slow", 1, 1, None], ["fast", 1, 2, runs[0].run_id], ["fast", 2, 3, None]]
    assert len({m.config["compare_id"] for m in runs}) == 1


def test_each_pair_may_have_prompts_of_its_own() -> None:
    sides = [[with_config(measured([j + k]), prompts_sha256=str(k)) for k in range(3)] for j in (100.0, 90.0)]
    assert lem.compare(*sides)["j_per_output_token"].ratio == pytest.approx(0.9, rel=0.01)
    with pytest.raises(LemError, match="not given the same prompts"):
        lem.compare(sides[0], sides[1][::-1])


def test_what_is_not_known_of_repeats_is_not_taken_for_zero() -> None:
    """Their sum is known, what each made is not."""
    runs = [
        dataclasses.replace(
            m, output_tokens=150, repeats=tuple(dataclasses.replace(r, output_tokens=None) for r in m.repeats)
        )
        for m in (measured([100.0, 101.0, 99.0]), measured([80.0, 81.0, 79.0]))
    ]
    rate = lem.compare(*runs)["output_tokens_per_s"]
    assert rate.ratio == 1 and rate.low is None and rate.why == "the tokens of each repeat are not known"


def test_boards_are_the_same_in_any_order() -> None:
    two = [{"name": "H100", "uuid": f"GPU-{k}", "power_limit_w": 700.0 - k} for k in (1, 2)]
    left, right = (
        measured(sources={"nvml": {"gain_error": 0.05, "gpus": {f"gpu{k}": gpu for k, gpu in enumerate(gpus)}}})
        for gpus in (two, two[::-1])
    )
    found = lem.compare(left, right)
    assert found.differences == () and "gain" not in found["j_per_output_token"].from_
    assert found["j_per_output_token"].high == pytest.approx(math.exp(math.hypot(0.005, 0.005)))


def test_requests_of_a_static_batch_are_drawn_together() -> None:
    """They get their tokens together, so that 48 in batches of 4 are 12."""

    def batched(size: int, scale: float, requests: int = 48) -> Measurement:
        wait_s = [scale * (0.1 + 0.01 * (i // 4 * 7 % 12)) + scale**2 * 1e-6 * (i // 4 % 5) for i in range(requests)]
        m = measured(lengths=[3] * requests, wait_s=lambda i: wait_s[i])
        done = (
            dataclasses.replace(c, dispatch_ns=i // size, events=((c.events[0][0] - i + i // size, 1), *c.events[1:]))
            for i, c in enumerate(m.completions)
        )
        return with_config(dataclasses.replace(m, completions=tuple(done)), size=size)

    def width(size: int, other: int) -> float:
        found = lem.compare(batched(size, 1.0), batched(other, 1.5))["ttft_s_p50"]
        assert found.low is not None and found.high is not None and found.ratio == pytest.approx(1.5, rel=1e-4)
        assert found.from_ == "48 requests of one run each, without what differs from run to run"
        return found.high - found.low

    assert width(4, 4) == pytest.approx(0, abs=1e-4), "the same batches on both sides"
    assert width(1, 4) > width(1, 1) + 0.1, "other batches are not drawn as if each were known four times"
    few = lem.compare(batched(4, 1.0, 36), batched(4, 1.5, 36))["ttft_s_p50"]
    assert few.low is None and few.why == "fewer than 10 requests or batches"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ("eager",)}, "names= takes two names"),
        ({"names": "ab"}, "names= takes two names"),
        ({"names": None}, "names= takes two names"),
        ({"names": (1, 2)}, "names= takes two names"),
        ({"names": ("x", "x")}, "names= takes two names that differ"),
        ({"names": {"x", "y"}}, "names= takes two names"),
        ({"names": ("", "y")}, "names= takes two names"),
        ({"allow": "other_promts"}, "did you mean 'other_prompts'"),
        ({"allow": 3}, "allow= takes codes.*got 3"),
        ({"allow": None}, "allow= takes codes.*got None"),
        ({"allow": [["failed"]]}, "allow= takes codes"),
        ({"allow": ["failed"]}, "'failed' cannot be allowed"),
    ],
)
def test_what_is_mistyped_is_said_before_anything_is_measured(options: dict[str, Any], words: str) -> None:
    def never() -> Measurement:
        raise AssertionError("something was measured")

    with pytest.raises(LemError, match=words):
        lem.compare(measured(), measured(), **options)
    with lem.Session(sources=[]) as session, pytest.raises(LemError, match=words):
        session.compare(never, never, **options)


@pytest.mark.parametrize("until", [3, 0, 0.02, "0.02"])
def test_a_rule_that_is_none_is_said_before_anything_is_measured(until: Any) -> None:
    made = []
    with lem.Session(sources=[]) as session, pytest.raises(LemError, match=r"until= takes lem\.repeat_until"):
        session.compare(lambda: made.append(1), lambda: made.append(2), until=until)  # type: ignore[arg-type, return-value]
    assert made == []


def test_measurements_are_for_the_other_compare() -> None:
    m = measured()
    for a, b in ((m, measured()), (lambda: m, measured()), ([m], [measured()])):
        with lem.Session(sources=[]) as session, pytest.raises(LemError, match=r"lem\.compare\(a, b\) compares"):
            session.compare(a, b)  # type: ignore[arg-type]
    with lem.Session(sources=[]) as session:
        with session.window("w") as window:
            pass
        with pytest.raises(LemError, match=r"it returned Window, whose \.measurement is one"):
            session.compare(lambda: window, lambda: m)  # type: ignore[arg-type, return-value]
        with pytest.raises(LemError, match=r"its \.measurement is one"):
            lem.compare(window, m)  # type: ignore[arg-type]
    with (
        lem.Session(sources=[]) as session,
        pytest.raises(LemError, match="A is to be a function that returns a Measurement"),
    ):
        session.compare("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", ["x", -1, 1.5, True, None])
def test_a_tolerance_is_a_number_of_tokens(tolerance: Any) -> None:
    with pytest.raises(LemError, match="tolerance= takes a whole number of output tokens"):
        lem.compare(measured(), measured(), tolerance=tolerance)


@pytest.mark.parametrize(
    "wrong",
    [[1], {"a": 1}, [{"a": 1}], 3, None, ["data/a"], [None], range(10**6), Path("data/a")],
    ids=lambda x: repr(x)[:20],
)
def test_what_is_no_measurement_is_one_sentence(wrong: Any) -> None:
    with pytest.raises(LemError, match=r"compare\(\) compares measurements: got .{1,80}; lem\.load\(\)"):
        lem.compare(wrong, wrong)


def test_one_code_may_be_allowed_as_it_is_and_only_measurements_are_compared() -> None:
    assert lem.compare(measured(), with_config(measured(), prompts_sha256="q"), allow="other_prompts").differences
    with pytest.raises(LemError, match=r"compares measurements: got 'data/a'.*lem.load"):
        lem.compare("data/a", "data/b")  # type: ignore[arg-type]


def test_every_code_has_a_sentence_in_the_docs() -> None:
    from conftest import ROOT

    page = (ROOT / "docs/comparing.md").read_text()
    assert all(f"`{code}`" in page for code in comparable.DIFFERENCES)
