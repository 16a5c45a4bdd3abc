"""Every metric with exact numbers, and what it does when something was not observed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem_kit import metrics
from lem_kit.backends import COUNTERS
from lem_kit.measurement import REASONS, Completion, Energy, Measurement, Repeat
from lem_kit.trace import Domain, Series, Trace

MS = 1_000_000
SECOND = 1_000 * MS


def completion(
    *events: tuple[int, int], prompt: int | None = 8, error: str | None = None, dispatch: int = 100
) -> Completion:
    """Events in (ms, tokens)."""
    return Completion(0, dispatch * MS, 5 * SECOND, tuple((t * MS, n) for t, n in events), prompt, error=error)


ONE = completion((300, 1), (340, 1), (420, 2))


def energy(key: str, joules: float | None, half: float = 1.0, method: Any = "counter", scope: str = "gpu") -> Energy:
    source, _, domain = key.partition(":")
    return Energy(
        source, domain, method, scope, joules, None if joules is None else half, () if joules is not None else ("x",)
    )


def measured(
    energies: Sequence[Energy] = (),
    completions: Sequence[Completion] = (),
    repeats: Sequence[Sequence[Energy]] = (),
    **more: Any,
) -> Measurement:
    spans = tuple(Repeat(k * SECOND, (k + 1) * SECOND, {e.key: e for e in parts}, 10) for k, parts in enumerate(repeats))
    return Measurement(
        "r", "run", "l", "ok", "", 0, 4 * SECOND, {e.key: e for e in energies}, spans, tuple(completions), **more
    )  # fmt: skip


def test_latencies_of_one_request() -> None:
    assert metrics.ttft_s(ONE) == pytest.approx(0.2)
    assert metrics.e2e_s(ONE) == pytest.approx(0.32)
    assert metrics.tpot_s(ONE) == pytest.approx(0.12 / 3)
    assert metrics.icl_s(ONE) == pytest.approx([0.04, 0.08])
    assert metrics.itl_s(ONE) == pytest.approx([0.04, 0.04, 0.04])
    assert metrics.ntpot_s(ONE) == pytest.approx(0.32 / 4)


def test_latencies_from_the_schedule() -> None:
    late = dataclasses.replace(ONE, sched_ns=60 * MS)  # wanted at 60 ms, handed over at 100 ms
    assert metrics.schedule_delay_s(late) == pytest.approx(0.04)
    assert metrics.ttft_sched_s(late) == pytest.approx(0.24) and metrics.ttft_s(late) == pytest.approx(0.2)
    assert metrics.e2e_sched_s(late) == pytest.approx(0.36) and metrics.decode_s(late) == pytest.approx(0.12)
    assert [f(completion()) for f in (metrics.ttft_sched_s, metrics.e2e_sched_s, metrics.decode_s)] == [None] * 3


def test_what_the_engine_tells_of_queue_and_prefill() -> None:
    told = dataclasses.replace(
        ONE, queued_ns=120 * MS, scheduled_ns=180 * MS, preemptions=2, timing_source="engine"
    )  # handed over at 100 ms, first token at 300 ms
    assert metrics.queue_s(told) == pytest.approx(0.06) and metrics.prefill_s(told) == pytest.approx(0.12)
    assert told.prefill_ns == 180 * MS and ONE.prefill_ns == 100 * MS
    for untold in (ONE, dataclasses.replace(told, scheduled_ns=None)):
        assert metrics.queue_s(untold) is None and metrics.prefill_s(untold) is None
    assert metrics.prefill_s(dataclasses.replace(told, timing_source="client")) is None, "two clocks"
    row = metrics.summary(measured(completions=[told, ONE], counters={"kv_cache_used_max": 0.5}))
    assert (row["queue_s_mean"], row["preemptions"], row["kv_cache_used_max"]) == (pytest.approx(0.06), 2, 0.5)
    assert metrics.preemptions(measured(completions=[ONE])) is None


def sent(sched: int, dispatch: int, done: int, ttft: int = 100, **more: Any) -> Completion:
    """Instants in ms."""
    return Completion(sched * MS, dispatch * MS, done * MS, (((dispatch + ttft) * MS, 1),), 8, **more)


def test_the_lag_of_the_sending_loop_is_not_the_wait_for_a_place() -> None:
    # Two places; the third request waits for the first (done at 500), the fourth for the second (done at 900).
    done = [sent(0, 1, 500), sent(10, 10, 900), sent(20, 503, 1000), sent(30, 905, 1200), sent(1500, 1507, 1600)]
    assert metrics.dispatch_lag_s(done, 2) == pytest.approx([0.001, 0.0, 0.003, 0.005, 0.007])
    assert metrics.dispatch_lag_s(done) == pytest.approx([metrics.schedule_delay_s(c) for c in done])
    again = [sent(5000, 5002, 5500, repeat=1)]
    assert metrics.dispatch_lag_s(again + done, 2) == pytest.approx([0.001, 0.0, 0.003, 0.005, 0.007, 0.002])
    assert metrics.dispatch_lag_s([]) == []


def test_a_run_is_late_when_its_lag_exceeds_a_tenth_of_its_ttft() -> None:
    fair = [sent(0, 0, 200)] * 99
    assert not metrics.dispatched_late([*fair, sent(0, 10, 200)]), "a tenth of 100 ms, and of one request only"
    assert metrics.dispatched_late([*fair, *[sent(0, 11, 200)] * 2])
    assert not metrics.dispatched_late([sent(0, 9, 500)]) and metrics.dispatched_late([sent(0, 11, 500)])
    assert not metrics.dispatched_late([sent(0, 11, 500, ttft=200)])
    assert not metrics.dispatched_late([completion(error="oh")]) and not metrics.dispatched_late([])


def test_planned_and_achieved_rates() -> None:
    done = [sent(0, 0, 9), sent(100, 150, 9), sent(200, 250, 9), sent(0, 0, 9, repeat=1), sent(200, 350, 9, repeat=1)]
    m = measured(completions=done, config={"schedule_s": [0.0, 0.1, 0.2]})
    assert metrics.planned_requests_per_s(m) == pytest.approx(3 / 0.4)
    assert metrics.achieved_requests_per_s(m) == pytest.approx(3 / 0.6)
    assert metrics.planned_requests_per_s(measured(completions=done, config={"schedule_sha256": "x"})) is not None
    assert metrics.achieved_requests_per_s(measured(completions=done)) is None, "a closed loop has no rate of its own"
    assert metrics.planned_requests_per_s(measured(completions=done[:1], config=m.config)) is None
    assert metrics.planned_requests_per_s(measured(config=m.config)) is None


def test_what_was_not_observed_is_none() -> None:
    nothing, single = completion(), completion((300, 1))
    assert [f(nothing) for f in (metrics.ttft_s, metrics.e2e_s, metrics.tpot_s, metrics.ntpot_s)] == [None] * 4
    assert metrics.tpot_s(single) is None and metrics.itl_s(single) == [] and metrics.ttft_s(single) == pytest.approx(0.2)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 8)), min_size=1, max_size=40))
def test_inter_token_latencies_add_up_to_the_rest_of_the_latency(gaps: list[tuple[int, int]]) -> None:
    events, t = [], 100
    for gap, n in gaps:
        t += gap
        events.append((t, n))
    c = completion(*events)
    assert sum(metrics.itl_s(c)) + (metrics.ttft_s(c) or 0) == pytest.approx(metrics.e2e_s(c))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.floats(0, 100))
def test_percentiles_are_numpys_and_withheld_when_weak(samples: list[float], q: float) -> None:
    found = metrics.percentile(samples, q)
    if q != 50 and len(samples) * min(q, 100 - q) / 100 < 10:
        assert found is None
    else:
        assert found == pytest.approx(float(np.percentile(samples, q, method="linear")), rel=1e-12, abs=1e-9)
    assert metrics.percentiles(samples, (50, q)) == [metrics.percentile(samples, 50), found]


@pytest.mark.parametrize(("q", "needed"), [(50, 1), (75, 40), (90, 100), (95, 200), (99, 1000), (99.9, 10_000), (5, 200)])
def test_a_percentile_needs_ten_samples_beyond_it(q: float, needed: int) -> None:
    assert metrics.percentile(list(range(needed - 1)), q) is None
    assert metrics.percentile(list(range(needed)), q) == pytest.approx(float(np.percentile(range(needed), q)))


def test_an_interval_on_a_percentile_is_over_requests() -> None:
    """Each request has gaps of one length, so that twelve requests are twelve samples, however many gaps they have."""
    same = [completion(*((300 + gap * k, 1) for k in range(200))) for gap in range(10, 130, 10)]
    m = measured(completions=same)
    interval = metrics.percentile_interval(m, metrics.itl_s, 50)
    assert interval == pytest.approx((0.04, 0.09), abs=0.0101), "five requests of twelve, give or take two"
    assert metrics.percentile_interval(measured(completions=same[:9]), metrics.itl_s, 50) is None, "too few to draw from"
    assert metrics.percentile_interval(m, metrics.ttft_s, 50) == pytest.approx((0.2, 0.2)), "all alike"
    assert metrics.percentile_interval(m, metrics.ttft_s, 90) is None, "withheld"
    assert metrics.percentile_interval(measured(completions=same[:1]), metrics.ttft_s, 50) is None
    assert metrics.percentile_interval(measured(), metrics.ttft_s, 50) is None


def test_requests_are_drawn_with_what_resembles_them() -> None:
    """Twelve requests are no more when each is sent three times, and those of a static batch are one."""
    once = [completion((300 + 10 * k, 1)) for k in range(12)]
    again = [dataclasses.replace(c, repeat=k) for k in range(3) for c in once]
    alone, thrice = (metrics.percentile_interval(measured(completions=done), metrics.ttft_s, 50) for done in (once, again))
    assert alone is not None and thrice == pytest.approx(alone, abs=0.006)
    fours = [dataclasses.replace(completion((300 + 10 * k, 1)), dispatch_ns=k // 4) for k in range(48)]
    batched = measured(completions=fours, config={"arrivals": "batches", "size": 4})
    plain = metrics.percentile_interval(measured(completions=fours), metrics.ttft_s, 50)
    grouped = metrics.percentile_interval(batched, metrics.ttft_s, 50)
    assert plain is not None and grouped is not None and grouped[1] - grouped[0] > plain[1] - plain[0]
    few = measured(completions=fours[:36], config={"arrivals": "batches", "size": 4})
    assert metrics.percentile_interval(few, metrics.ttft_s, 50) is None, "nine batches"


def test_counts_and_rates() -> None:
    failed = completion((200, 1), prompt=None, error="oh")
    m = measured(completions=[ONE, ONE, failed])
    assert (metrics.output_tokens(m), metrics.input_tokens(m), metrics.completed_requests(m)) == (9, None, 2)
    assert metrics.output_tokens_per_s(m) == pytest.approx(9 / 4) and metrics.requests_per_s(m) == pytest.approx(2 / 4)
    assert metrics.values(m, metrics.ttft_s) == pytest.approx([0.2, 0.2]), "a failed request has no latency"
    whole = measured(completions=[ONE, ONE])
    assert (metrics.input_tokens(whole), metrics.total_tokens(whole)) == (16, 24)
    cell = measured(repeats=[[], []])
    assert metrics.output_tokens(cell) == 20 and metrics.measured_s(cell) == 2.0 and metrics.completed_requests(cell) is None


def test_throughput_of_the_steady_state_is_of_all_repeats() -> None:
    def at_work(start: int, end: int, *events: int, repeat: int = 0) -> Completion:
        return Completion(start * MS, start * MS, end * MS, tuple((t * MS, 2) for t in events), 8, repeat=repeat)

    # Two at work from 100 to 500 ms, with 3 events in that time, and from 2000 to 2100 ms, with one.
    done = [at_work(0, 500, 90, 200, 500), at_work(100, 700, 300, 501, 700)]
    done += [at_work(2000, 2100, 2050, repeat=1), at_work(2000, 2300, 2200, repeat=1)]
    m = measured(completions=done)
    assert metrics.steady_output_tokens_per_s(m) == pytest.approx(2 * 4 / 0.5)
    assert metrics.steady_output_tokens_per_s(m, share=0.5) == pytest.approx(2 * 8 / 1.0)
    assert metrics.concurrency_mean(m) == pytest.approx((0.5 + 0.6 + 0.1 + 0.3) / 4)
    row = metrics.summary(m)
    assert (row["steady_output_tokens_per_s"], row["concurrency_mean"]) == (pytest.approx(16), pytest.approx(0.375))
    assert metrics.steady_output_tokens_per_s(measured()) is None and metrics.concurrency_mean(measured()) is None
    never = dataclasses.replace(done[0], repeat=2, done_ns=0)
    assert metrics.steady_output_tokens_per_s(measured(completions=[*done, never])) is None


def test_prompt_tokens_from_a_cache_are_counted_where_the_engine_tells_of_all() -> None:
    told = [dataclasses.replace(ONE, cached_tokens=n) for n in (0, 5)]
    m = measured(completions=told)
    assert metrics.cached_tokens(m) == 5 and metrics.input_tokens(m) == 16
    assert metrics.total_tokens_per_s(m) == pytest.approx((16 + 8) / 4)
    assert metrics.cached_tokens(measured(completions=[*told, ONE])) is None and metrics.cached_tokens(measured()) is None
    assert metrics.total_tokens_per_s(measured(completions=[completion((200, 1), prompt=None)])) is None


def test_a_row_has_every_latency_and_withholds_weak_percentiles() -> None:
    row = metrics.summary(measured(completions=[ONE] * 200))
    # Gaps of 40 and 80 ms between events; of the 80 ms, two tokens have 40 each.
    assert [row[f"icl_s_{of}"] for of in ("mean", "p50", "p90")] == pytest.approx([0.06, 0.06, 0.08])
    assert [row[f"itl_s_{of}"] for of in ("mean", "p50", "p95")] == pytest.approx([0.04] * 3)
    assert row["ntpot_s_p50"] == pytest.approx(0.32 / 4) and row["ttft_s_p95"] == pytest.approx(0.2)
    assert row["ttft_s_p99"] is None and row["queue_s_mean"] is None


def test_a_total_has_one_source_per_scope_counter_before_integral_before_model() -> None:
    parts = [
        energy("nvml:gpu0", 100), energy("nvml:gpu1", 50), energy("other:gpu0", 999, method="integral"),
        energy("model:cpu", 7, method="model", scope="cpu"), energy("rapl:dram", 5, scope="dram"),
    ]  # fmt: skip
    total = metrics.energy_j(measured(parts))
    assert total is not None
    assert total.value == 155 and total.keys == ("nvml:gpu0", "nvml:gpu1", "rapl:dram") and total.scopes == ("dram", "gpu")
    assert total.half_width == pytest.approx(math.sqrt(3)) and total.method == "counter"
    with_model = metrics.energy_j(measured(parts), allow_model=True)
    assert with_model is not None and with_model.value == 162 and with_model.method == "model"


def test_half_of_the_gpus_is_not_the_total_of_the_gpus() -> None:
    m = measured([energy("nvml:gpu0", 100), energy("nvml:gpu1", None), energy("rapl:dram", 5, scope="dram")])
    total = metrics.energy_j(m)
    assert total is not None and total.scopes == ("dram",)
    assert metrics.energy_j(measured([energy("nvml:gpu0", None)])) is None
    assert metrics.energy_j(measured()) is None


def test_a_model_counts_only_when_nothing_was_measured() -> None:
    model = energy("model:cpu", 7, method="model", scope="cpu")
    assert metrics.energy_j(measured([model])).method == "model"  # type: ignore[union-attr]
    assert metrics.energy_j(measured([model, energy("nvml:gpu0", 1)])).keys == ("nvml:gpu0",)  # type: ignore[union-attr]


def test_repeats_bring_their_spread() -> None:
    m = measured([energy("a:g", 99)], repeats=[[energy("a:g", j, 0.3)] for j in (10.0, 12.0, 11.0)])
    total = metrics.energy_j(m)
    assert total is not None and total.value == 33
    assert total.half_width == pytest.approx(math.hypot(4.303 * 1.0 * math.sqrt(3), 0.3 * math.sqrt(3)))
    each = metrics.energy_j_per_repeat(m)
    assert each is not None and each.value == 11 and each.half_width == pytest.approx(total.half_width / 3)
    assert metrics.energy_j(measured(repeats=[[energy("a:g", 1)], [energy("a:g", None)]])) is None


def test_a_models_error_does_not_average_out() -> None:
    trace = Trace(
        domains={"m:cpu": Domain("cpu", "model", relative_error=1.0), "m:ram": Domain("dram", "model", relative_error=0.5)}
    )
    parts = [energy("m:cpu", 10, 10, "model", "cpu"), energy("m:ram", 20, 10, "model", "dram")]
    total = metrics.energy_j(measured(repeats=[parts, parts, parts, parts], trace=trace))
    assert total is not None and total.value == 120 and total.half_width == pytest.approx(4 * (10 + 10))


def test_energy_by_denominator() -> None:
    m = measured([energy("a:g", 48.0, 2.4)], [ONE, ONE, completion(error="oh", prompt=8)])
    for metric, value in (
        (metrics.j_per_output_token, 48 / 8), (metrics.j_per_input_token, 48 / 24), (metrics.j_per_total_token, 48 / 32),
        (metrics.j_per_request, 48 / 2), (metrics.mean_power_w, 48 / 4),
    ):  # fmt: skip
        figure = metric(m)
        assert figure is not None and figure.value == pytest.approx(value)
        assert figure.half_width == pytest.approx(value * 0.05)
    assert metrics.j_per_output_token(measured([energy("a:g", 48.0)])) is None
    assert metrics.j_per_output_token(measured([energy("a:g", 48.0)], output_tokens=0)) is None


def test_tokens_per_joule_and_energy_delay() -> None:
    m = measured([energy("a:g", 48.0, 2.4)], [ONE, ONE])
    figure = metrics.output_tokens_per_j(m)
    assert figure is not None and figure.value == pytest.approx(8 / 48)
    assert figure.half_width == pytest.approx(8 / 48 * 0.05) and figure.keys == ("a:g",)
    product = metrics.energy_delay_js(m)
    assert product is not None and product[:2] == pytest.approx((48 * 4, 2.4 * 4))
    parts = [energy("a:g", 10.0, 0.3)]
    product = metrics.energy_delay_js(measured([energy("a:g", 99.0)], repeats=[parts, parts, parts]))
    assert product is not None and product.value == pytest.approx(10 * 1), "of one repeat, however many there were"
    assert metrics.output_tokens_per_j(measured(parts)) is None and metrics.energy_delay_js(measured()) is None


def test_peak_power_is_of_each_domain() -> None:
    gauge = Series(array("q", [0, SECOND, 9 * SECOND]), array("d", [5.0, 7.0, 99.0]))
    m = measured(trace=Trace(gauges={"a:g.power_w": gauge, "a:g.temperature_c": gauge}))
    assert metrics.peak_power_w(m) == {"a:g": 7.0} and metrics.peak_power_w(measured()) == {}


def test_what_a_driver_told_of_use_and_memory_is_of_each_domain() -> None:
    share = Series(array("q", [0, SECOND, 9 * SECOND]), array("d", [0.5, 1.0, 0.0]))
    used = Series(array("q", [0, SECOND, 9 * SECOND]), array("d", [4e9, 3e9, 9e9]))
    m = measured(trace=Trace(gauges={"a:g.sm_utilization": share, "a:g.memory_used_bytes": used}))
    assert metrics.gpu_utilization(m) == {"a:g": 0.75} and metrics.peak_memory_used_bytes(m) == {"a:g": 4e9}
    steps = Series(array("q", [0, SECOND, 9 * SECOND]), array("d", [0.25, 0.5, 0.9]))
    logged = measured(trace=Trace(gauges={"e:engine.kv_cache_used": steps}))
    assert metrics.kv_cache_used_mean(logged) == metrics.summary(logged)["kv_cache_used_mean"] == 0.375
    assert metrics.kv_cache_used_mean(m) is None
    row = metrics.summary(m)
    assert (row["gpu_utilization.a:g"], row["peak_memory_used_bytes.a:g"]) == (0.75, 4e9)
    assert metrics.gpu_utilization(measured()) == metrics.peak_memory_used_bytes(measured()) == {}


def test_what_the_engine_counted_has_a_column_each_and_none_where_it_did_not() -> None:
    row = metrics.summary(measured(counters={"peak_memory_bytes": 2.5e9, "batch_requests_mean": 3.5}))
    assert (row["peak_memory_bytes"], row["batch_requests_mean"], row["kv_cache_used_max"]) == (2.5e9, 3.5, None)
    assert COUNTERS.keys() <= metrics.summary(measured()).keys()


@pytest.mark.parametrize(
    ("model", "effective", "quantization", "precision"),
    [
        ({"dtype": "bfloat16", "quantization": None}, {}, None, "bfloat16"),
        ({"dtype": None}, {}, None, None),
        ({"dtype": "float16", "quantization": "awq"}, {}, "awq", "float16, awq"),
        ({"dtype": "float16", "quantization": {"quant_method": "gptq", "bits": 4}}, {}, "gptq 4 bit", "float16, gptq 4 bit"),
        (
            {"dtype": "bfloat16", "quantization": {"quant_method": "bitsandbytes", "load_in_8bit": True, "bits": None}},
            {},
            "bitsandbytes 8 bit",
            "bfloat16, bitsandbytes 8 bit",
        ),
        ({"dtype": "bfloat16", "quantization": {"group": 1}}, {}, "quantised", "bfloat16, quantised"),
        ({"dtype": "bfloat16", "quantization": {"quant_algo": None, "group_size": 128}}, {}, None, "bfloat16"),
        ({"dtype": "bfloat16"}, {"model_config": {"quantization": "fp8"}, "seed": 1}, "fp8", "bfloat16, fp8"),
        ({"dtype": "bfloat16"}, {"quant_config": {"quant_algo": "FP8", "group_size": 128}}, "FP8", "bfloat16, FP8"),
        ({"dtype": "bfloat16"}, {"quant_config": {"quant_algo": None, "group_size": 128}}, None, "bfloat16"),
    ],
)
def test_the_precision_is_that_of_the_model_as_loaded(
    model: dict[str, Any], effective: dict[str, Any], quantization: str | None, precision: str | None
) -> None:
    m = measured(backend={"engine": "e", "model": model, "effective": effective})
    assert (metrics.quantization(m), metrics.precision(m)) == (quantization, precision)
    row = metrics.summary(m)
    assert (row["dtype"], row["quantization"]) == (model["dtype"], quantization)
    assert metrics.precision(measured()) is None


@pytest.mark.parametrize(
    "m",
    [
        measured(),
        measured([energy("a:g", None)]),
        measured([energy("a:g", 4.0)], [ONE], config={"batch_size": 1, "nested": {"a": 1}}, reasons=("few_requests",)),
        measured(repeats=[[energy("a:g", 4.0)]]),
    ],
)
def test_a_row_is_strict_json_with_the_same_columns(m: Measurement) -> None:
    row = json.loads(json.dumps(metrics.summary(m), allow_nan=False))
    assert {k for k in row if not k.startswith("config.")} == set(metrics.summary(measured()))
    if not m.energy and not m.repeats:
        assert row["energy_j"] is None and row["mean_power_w"] is None
    assert 0.0 not in (row["energy_j"], row["j_per_output_token"])


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (12.3456, 0.42, "12.35 ± 0.42 J"), (1234.5, 30.0, "1234 ± 30 J"), (1234.5, 4000.0, "1234 ± 4000 J"),
        (0.00123456, 0.000012, "0.001235 ± 0.000012 J"), (1.5e-9, 2e-10, "1.500e-09 ± 2.0e-10 J"),
        (12.3456, None, "12.35 J"), (12.3456, 0.0, "12.35 J"), (12.3456, math.nan, "12.35 J"),
    ],
)  # fmt: skip
def test_a_quantity_has_the_digits_that_its_interval_leaves(value: float, half: float | None, text: str) -> None:
    assert metrics.quantity(value, half, "J") == text


def test_reasons_are_told_once_the_records_own_first() -> None:
    parts = [Energy("a", d, "counter", "gpu", None, None, ("no_reading", "x")) for d in ("g0", "g1")]
    assert metrics.reasons(measured(parts, reasons=("failed", "x"))) == ["failed", "x", "no_reading"]


def test_a_source_that_knows_half_gives_no_total_to_another_of_its_scope() -> None:
    parts = [energy("nvml:gpu0", None), energy("sampled:gpu0", 40, method="integral")]
    assert metrics.energy_j(measured(parts)) is None, "which source counts does not depend on what it happened to see"
    integral = metrics.energy_j(measured(parts[1:]))
    assert integral is not None and integral.method == "integral"


def test_repeats_of_other_sources_make_no_sum() -> None:
    assert metrics.energy_j(measured(repeats=[[energy("a:g", 1)], [energy("b:g", 1)]])) is None
    assert metrics.energy_j(measured([energy("a:g", 1)], repeats=[[]])) is None


def test_one_repeat_has_the_meters_interval_only() -> None:
    total = metrics.energy_j(measured(repeats=[[energy("a:g", 10.0, 0.3), energy("a:h", 10.0, 0.4)]]))
    assert total is not None and total.half_width == pytest.approx(0.5)


def test_unknown_tokens_give_no_figure_per_token() -> None:
    spans = tuple(Repeat(k * SECOND, (k + 1) * SECOND, {"a:g": energy("a:g", 4.0)}, n) for k, n in enumerate((10, None)))
    m = Measurement("r", "window", "l", "ok", "", 0, 2 * SECOND, {}, spans)
    assert metrics.output_tokens(m) is None and metrics.output_tokens_per_s(m) is None
    assert metrics.j_per_output_token(m) is None and metrics.energy_j(m) is not None
    assert metrics.output_tokens(measured(output_tokens=7, repeats=[[]])) == 7


def test_when_every_request_failed_nothing_is_divided_by_none() -> None:
    m = measured([energy("a:g", 4.0)], [completion(error="oh", prompt=None)])
    assert metrics.completed_requests(m) == 0 and metrics.requests_per_s(m) == 0.0
    assert (
        metrics.j_per_request(m) is None
        and metrics.j_per_output_token(m) is None
        and metrics.values(m, metrics.ttft_s) == []
    )


def test_a_window_of_no_length_has_no_rates() -> None:
    m = Measurement("r", "window", "l", "ok", "", 5, 5, {"a:g": energy("a:g", 1.0)}, output_tokens=3)
    assert metrics.output_tokens_per_s(m) is None and metrics.mean_power_w(m) is None and metrics.requests_per_s(m) is None


def test_repeats_of_one_power_have_one_power_however_long_they_take() -> None:
    spans = tuple(Repeat(0, t * SECOND, {"a:g": energy("a:g", 50.0 * t, 0.3)}) for t in (1, 2, 4))
    power = metrics.mean_power_w(Measurement("r", "window", "l", "ok", "", 0, 7 * SECOND, {}, spans))
    assert power is not None and power.value == 50 and power.half_width == pytest.approx(0.3 * math.sqrt(3) / 7)


def test_a_repeat_that_takes_longer_idles_longer_and_net_energy_knows() -> None:
    """Idle at 100 W; each repeat adds 50 J whatever its length. Gross energies scatter by 100 J, net ones not at all."""
    baseline = {"power_w": {"nvml:gpu0": {"watts": 100.0, "half_width": 0.5}}}
    m = measured(baselines={"engine": baseline})
    starts = (0, 1, 3, 6)  # seconds: repeats of 1, 2 and 3 s
    repeats = tuple(
        Repeat(a * SECOND, b * SECOND, {"nvml:gpu0": energy("nvml:gpu0", 100.0 * (b - a) + 50.0, 2.0)}, 10)
        for a, b in itertools.pairwise(starts)
    )
    m = dataclasses.replace(m, repeats=repeats)
    gross, net = metrics.energy_j(m), metrics.net_energy_j(m)
    assert gross is not None and net is not None
    assert gross.value == 750.0 and gross.half_width == pytest.approx(
        math.hypot(4.303 * 100 * math.sqrt(3), 2 * math.sqrt(3))
    )
    assert net.value == 150.0 and net.half_width == pytest.approx(math.hypot(2 * math.sqrt(3), 0.5 * 6))
    assert net.keys == ("nvml:gpu0",) and net.method == "counter"
    wrong = {"power_w": {"nvml:gpu1": {"watts": 100.0, "half_width": 0.5}}}
    assert metrics.net_energy_j(dataclasses.replace(m, baselines={"engine": wrong})) is None


# --- counter against integral, and the verdict --------------------------------------------------------------------------


def test_agreement_is_of_devices_that_have_both_figures() -> None:
    parts = [
        energy("nvml:gpu0", 100), energy("nvml_power:gpu0", 103, method="integral"),
        energy("nvml:gpu1", None), energy("nvml_power:gpu1", 50, method="integral"),
        energy("nvml:gpu2", 40), energy("nvml_power:gpu2", None, method="integral"),
        energy("nvml_power:gpu3", 40, method="integral"), energy("rapl:dram", 5, scope="dram"),
    ]  # fmt: skip
    assert metrics.agreement({e.key: e for e in parts}) == {"nvml:gpu0": pytest.approx(0.03)}
    assert metrics.agreement({}) == {}


def doubted(key: str, *reasons: str, joules: float | None = 10.0, **more: Any) -> Energy:
    return dataclasses.replace(energy(key, joules, **more), reasons=reasons)


@pytest.mark.parametrize(
    ("m", "codes"),
    [
        (measured([energy("nvml:gpu0", 10)]), []),
        (measured([energy("nvml:gpu0", 10)], reasons=("few_requests", "thermal_drift", "power_capped")), []),
        (measured([doubted("nvml:gpu0", "shorter_than_refresh", "edge_extrapolated")]), []),
        (measured([energy("nvml:gpu0", 10)], reasons=("foreign_process", "failed")), ["foreign_process", "failed"]),
        (measured([doubted("nvml:gpu0", "sources_disagree")]), ["sources_disagree"]),
        (measured([doubted("nvml:gpu0", "gpu_lost", joules=None)]), ["gpu_lost"]),
        (measured([doubted("nvml:gpu0", "implausible", joules=None), energy("nvml:gpu1", 5)]), ["implausible"]),
        (measured(), ["no_source"]), (measured(reasons=("source_starting",)), ["source_starting"]),
        (measured([doubted("nvml:gpu0", "source_starting", joules=None)]), ["source_starting"]),
        (measured([energy("nvml:gpu0", 10)], reasons=("source_starting",)), []),
        (measured([doubted("nvml:gpu0", "x", joules=None)]), ["no_reading"]),
        # A source outside the total is not asked.
        (measured([energy("nvml:gpu0", 10), doubted("nvml_power:gpu0", "implausible", joules=None, method="integral")]), []),
        (measured([energy("nvml:gpu0", 10), doubted("m:cpu", "too_short", joules=None, method="model", scope="cpu")]), []),
    ],
)  # fmt: skip
def test_the_verdict_names_what_leaves_the_total_without_its_meaning(m: Measurement, codes: list[str]) -> None:
    assert metrics.verdict(m) == codes and m.valid == (not codes)
    assert metrics.summary(m)["valid"] == m.valid


def test_gaps_between_repeats_do_not_speak_against_them() -> None:
    fine = [[energy("nvml:gpu0", 5)], [energy("nvml:gpu0", 6)]]
    assert metrics.verdict(measured([doubted("nvml:gpu0", "sampling_gap")], repeats=fine)) == []
    gap = [[energy("nvml:gpu0", 5)], [doubted("nvml:gpu0", "sampling_gap")]]
    assert metrics.verdict(measured([energy("nvml:gpu0", 11)], repeats=gap)) == ["sampling_gap"]
    lost = [[energy("nvml:gpu0", 5)], [doubted("nvml:gpu0", "gpu_lost", joules=None)]]
    assert metrics.verdict(measured([energy("nvml:gpu0", 11)], repeats=lost)) == ["gpu_lost"]


def test_codes_of_the_verdict_are_explained() -> None:
    assert set(REASONS) > metrics.AGAINST
