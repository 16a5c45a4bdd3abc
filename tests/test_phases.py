"""Prefill and decode within their intervals, unbiased and averaging; unresolved phases that say why; loads of one run."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_runs import KEY, batches, closed_loop, following, measured, ns, request, run_of, steady_counter, true_j
from simulation import Wave, square

import lem_kit as lem
from lem_kit import bands, metrics, phases, shaping, steady
from lem_kit.curve import energy_between
from lem_kit.measurement import REASONS, Completion, Measurement
from lem_kit.trace import Domain, Series, Trace

BEGIN = 103.0


def end_s(completions: list[Completion]) -> float:
    return max(c.done_ns for c in completions) / 1e9 - 900 + 0.01


def static(n: int, seed: int, noise: float = 0.1, sample_s: float | None = None, **shape: Any) -> tuple[Measurement, Wave]:
    """A run of `n` static batches on a board whose power follows them."""
    done = batches(random.Random(seed), n, **shape)
    wave = following(done, noise, seed)
    return run_of(wave, done, BEGIN - 0.01, end_s(done), sample_s=sample_s, seed=seed + 50), wave


def truth(m: Measurement, wave: Wave) -> list[float]:
    """Energy of prefill and of decode, of instants at which nothing else was at work."""
    found = shaping.states(m.completions, m.t0_ns, m.t1_ns)
    steps = np.diff(true_j(wave, found.t_ns))
    return [float(steps[found.code[:-1] == state].sum()) for state in (shaping.PREFILL, shaping.DECODE)]


def known(phase: phases.Phase) -> metrics.Figure:
    assert phase.figure is not None and phase.reasons == ()
    return phase.figure


def test_steady_power_is_split_by_time() -> None:
    done = [request(BEGIN + 1, *((BEGIN + 1.5 + 0.25 * k, 1) for k in range(5)), prompt=p) for p in (10, 90)]
    found = phases.split(measured(steady_counter({KEY: 100.0}, 4), done, BEGIN, BEGIN + 4))
    assert found is not None
    prefill, decode = known(found.prefill), known(found.decode)
    assert (prefill.value, decode.value, found.rest_j) == pytest.approx((50, 100, 250))
    assert found.mixed_j == 0 and prefill.half_width < 1 and (prefill.keys, prefill.scopes) == ((KEY,), ("gpu",))
    assert (
        found.prefill.method.startswith("dispatch to first event, in 1")
        and "0% of the energy is of mixed" in found.prefill.method
    )


def test_a_queue_in_the_engine_is_no_prefill_where_the_engine_tells() -> None:
    told = request(BEGIN + 1, *((BEGIN + 1.5 + 0.25 * k, 1) for k in range(5)), prompt=10)
    told = dataclasses.replace(told, queued_ns=told.dispatch_ns, scheduled_ns=told.dispatch_ns + 300_000_000)
    found = phases.split(measured(steady_counter({KEY: 100.0}, 4), [told], BEGIN, BEGIN + 4))
    assert found is not None and known(found.prefill).value == pytest.approx(20) and found.rest_j == pytest.approx(280)
    assert found.prefill.method.startswith("schedule to first event")
    shares = phases.per_request(measured(steady_counter({KEY: 100.0}, 4), [told], BEGIN, BEGIN + 4))
    assert shares is not None and shares.joules[0] == pytest.approx(120) and shares.unattributed_j == pytest.approx(280)


def test_a_preempted_request_is_at_neither_and_what_it_computes_again_is_prefill() -> None:
    span = ns(BEGIN + 2), ns(BEGIN + 2.75)
    told = request(BEGIN + 1, *((BEGIN + t, 1) for t in (1.5, 2.0, 3.0, 3.5)), prompt=10, preempted_ns=(span,))
    trace = steady_counter({KEY: 100.0}, 5)
    found = phases.split(measured(trace, [told], BEGIN, BEGIN + 4))
    assert found is not None and found.mixed_j == 0
    assert known(found.prefill).value == pytest.approx(50 + 25) and known(found.decode).value == pytest.approx(50 + 50)
    assert found.rest_j == pytest.approx(100 + 75 + 50), "three quarters of a second with nobody at work"
    # Beside 8 tokens/s of another's decode: while it is out all is decode; then 12 tokens in 0.25 s beside 8/s.
    other = request(BEGIN + 0.5, *((BEGIN + 1 + 0.125 * k, 1) for k in range(21)))
    states = shaping.states([told, other], ns(BEGIN), ns(BEGIN + 4))
    at = np.searchsorted(states.t_ns, [ns(BEGIN + t) for t in (1.2, 1.7, 2.5, 2.8, 3.2)], "right") - 1
    mixed, decode = shaping.MIXED, shaping.DECODE
    assert states.code[at].tolist() == [mixed, decode, decode, mixed, decode]
    assert states.prefill_share[at[[0, 3]]] == pytest.approx([20 / 28, 48 / 56])
    # In the middle of its prefill, and again in the middle of the second try.
    early = dataclasses.replace(told, preempted_ns=((ns(BEGIN + 1.1), ns(BEGIN + 1.2)), (ns(BEGIN + 1.3), ns(BEGIN + 1.4))))
    again = phases.split(measured(trace, [early], BEGIN, BEGIN + 4))
    assert again is not None and known(again.prefill).value == pytest.approx(30) and again.rest_j == pytest.approx(170)


def test_mixed_instants_are_shared_by_tokens_within_bounds() -> None:
    # Decode of 10 tokens/s all along, beside it a prompt of 15 tokens for half a second: 30 tokens/s. 50 J of 4 s are mixed.
    long = request(BEGIN, *((BEGIN + 0.5 + 0.1 * k, 1) for k in range(36)), prompt=100)
    done = [long, request(BEGIN + 2, (BEGIN + 2.5, 1), prompt=15)]
    m = measured(steady_counter({KEY: 100.0}, 5), done, BEGIN, BEGIN + 4)
    found = phases.split(m)
    assert found is not None and found.mixed_j == pytest.approx(50)
    prefill, decode = found.prefill, known(found.decode)
    assert decode.value == pytest.approx(300 + 12.5) and found.rest_j == pytest.approx(0, abs=1e-9)
    assert 37.4999 < decode.half_width < 38, "wholly prefill's, or wholly decode's"
    assert known(prefill).value == pytest.approx(50 + 37.5) and 37.4999 < known(prefill).half_width < 38
    unknown = [done[0], dataclasses.replace(done[1], prompt_tokens=None)]
    assert known(phases.split(dataclasses.replace(m, completions=unknown)).decode).value == pytest.approx(300 + 25)  # type: ignore[union-attr]


def test_a_request_that_gave_no_event_may_have_been_in_either() -> None:
    done = [request(BEGIN + 1, (BEGIN + 2, 1), (BEGIN + 3, 1)), request(BEGIN + 3, done_s=BEGIN + 3.5, error="oh")]
    found = phases.split(measured(steady_counter({KEY: 100.0}, 4), done, BEGIN, BEGIN + 4))
    assert found is not None and found.mixed_j == pytest.approx(50) and known(found.decode).value == pytest.approx(125)
    failed = [request(BEGIN + 1, (BEGIN + 2, 1), (BEGIN + 3, 1), done_s=BEGIN + 3.25, error="oh")]
    found = phases.split(measured(steady_counter({KEY: 100.0}, 4), failed, BEGIN, BEGIN + 4))
    assert found is not None and found.mixed_j == pytest.approx(25), "and after its last event"


@pytest.mark.parametrize("sample_s", [0.02, None], ids=["samples", "counter"])
@pytest.mark.parametrize("ttft_s", [0.02, 0.2])
def test_the_intervals_hold_the_truth(ttft_s: float, sample_s: float | None) -> None:
    held: list[bool] = []
    errors: list[float] = []
    for seed in range(10):
        m, wave = static(5, seed, 0.05, sample_s, ttft_s=ttft_s)
        found, true = phases.split(m), truth(m, wave)
        assert found is not None
        figures = [known(found.prefill), known(found.decode)]
        held += [abs(f.value - j) <= f.half_width for f, j in zip(figures, true)]
        errors += [f.value / j - 1 for f, j in zip(figures, true)]
        assert figures[0].half_width < (0.05 if ttft_s > 0.1 else 0.35) * true[0]
        assert figures[1].half_width < 0.03 * true[1]
        assert sum(f.value for f in figures) + found.rest_j == pytest.approx(metrics.energy_j(m).value)  # type: ignore[union-attr]
    assert sum(held) >= 19
    assert abs(float(np.mean(errors[::2]))) < (0.01 if ttft_s > 0.1 else 0.06), "a fifth of a period is not smeared"


def test_many_short_repeats_average() -> None:
    """A prefill of a fifth of the counter's period, in a load that is noisy besides."""
    relative = []
    for n in (8, 32):
        halves = []
        for seed in range(3):
            m, wave = static(n, seed, 0.1, ttft_s=0.02, steps=15)
            figure = known(phases.split(m).prefill)  # type: ignore[union-attr]
            assert abs(figure.value - truth(m, wave)[0]) <= figure.half_width
            halves.append(figure.half_width / figure.value)
        relative.append(float(np.median(halves)))
    assert 0.35 < relative[1] / relative[0] < 0.8, "four times the batches, half the error where it is the batches'"


def test_one_short_prefill_in_a_noisy_load_is_not_resolved() -> None:
    m, _ = static(1, 3, 0.15, ttft_s=0.005)
    found = phases.split(m)
    assert found is not None and found.prefill.figure is None and found.prefill.reasons == ("phase_too_short",)
    assert found.decode.figure is not None and "phase_too_short" in REASONS


def test_a_phase_that_always_meets_the_counter_alike_is_hardly_resolved() -> None:
    """20 ms of prefill in every 100 ms of a counter of 100 ms: but for the two ends, nothing tells its power."""
    done = [request(s := BEGIN + 0.1 * k, (s + 0.02, 1), (s + 0.1, 1)) for k in range(40)]
    m = run_of(following(done, 0.02), done, BEGIN, BEGIN + 4, sample_s=None)
    figure = known(phases.split(m).prefill)  # type: ignore[union-attr]
    assert 0.3 < figure.half_width / figure.value < 0.5
    assert abs(figure.value - truth(m, following(done, 0.02))[0]) < figure.half_width
    noisy = phases.split(run_of(following(done, 0.08), done, BEGIN, BEGIN + 4, sample_s=None))
    assert noisy is not None and (noisy.prefill.figure, noisy.prefill.reasons) == (None, ("phase_too_short",))


def test_where_all_is_mixed_nothing_is_resolved() -> None:
    done = closed_loop(random.Random(0), 24, 3)
    found = phases.split(run_of(following(done), done, BEGIN, end_s(done)))
    assert found is not None and found.prefill.figure is None and found.prefill.reasons == ("phases_mixed",)
    assert "phases_mixed" in REASONS and "of mixed instants" in found.prefill.method


def test_repeats_bring_their_spread_and_leave_out_the_gaps() -> None:
    done = [
        request(BEGIN + 2 * k + 0.2, (BEGIN + 2 * k + 0.7, 1), (BEGIN + 2 * k + 1.2 + 0.1 * k, 1), repeat=k)
        for k in range(3)
    ]
    spans = [(BEGIN + 2 * k, BEGIN + 2 * k + 1.5) for k in range(3)]
    found = phases.split(measured(steady_counter({KEY: 100.0}, 7), done, BEGIN, BEGIN + 6, spans))
    assert found is not None
    decode = known(found.decode)
    assert decode.value == pytest.approx(180) and found.rest_j == pytest.approx(450 - 180 - 150)
    assert decode.half_width == pytest.approx(4.303 * 10 * math.sqrt(3), rel=0.01) and known(found.prefill).half_width < 1


def test_a_models_error_is_in_the_figure_and_not_in_its_way() -> None:
    trace = steady_counter({KEY: 100.0}, 4)
    trace.domains[KEY] = Domain("cpu", "model", 0.0, relative_error=1.0, reasons=("modelled",))
    done = [request(BEGIN + 1, (BEGIN + 2, 1), (BEGIN + 3, 1))]
    prefill = known(phases.split(measured(trace, done, BEGIN, BEGIN + 4)).prefill)  # type: ignore[union-attr]
    assert prefill.method == "model" and prefill.half_width == pytest.approx(100, rel=0.01)


def test_what_is_not_known_is_none() -> None:
    done = [request(BEGIN + 1, (BEGIN + 2, 1), (BEGIN + 3, 1))]
    trace = steady_counter({KEY: 100.0}, 4)
    m = measured(trace, done, BEGIN, BEGIN + 4)
    nothing = Trace({}, {}, {KEY: Domain("gpu", "counter")})
    for lacking in (measured(trace, [], BEGIN, BEGIN + 4), measured(nothing, done, BEGIN, BEGIN + 4)):
        assert phases.split(lacking) is None and phases.loads(lacking) is None
        assert set(phases.summary(lacking).values()) == {None}
    assert phases.split(dataclasses.replace(m, trace=nothing)) is None
    single = [request(BEGIN + 1, (BEGIN + 2, 1))]
    found = phases.split(measured(trace, single, BEGIN, BEGIN + 4))
    assert found is not None and found.decode == (None, ("phase_too_short",), found.decode.method), "there was none"


def test_a_record_gives_the_same_figures_again(tmp_path: Path) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.1, tokens_per_s=50)
    with lem.Session(tmp_path, sources=[engine.source]) as session:
        m = session.run(engine, lem.prompts.synthetic(3, 20, 8), lem.traffic.concurrency(2), repeats=2, warmup=0)
    again = lem.load(tmp_path / m.run_id)
    for figure in (phases.per_request, phases.split, phases.loads):
        assert figure(again) == figure(m) is not None
    shares = phases.per_request(m)
    assert shares is not None and len(shares.joules) == 6 and min(shares.joules) > 200 * 0.1 / 2
    assert lem.frame(tmp_path)["decode_j"].tolist() == [phases.summary(m)["decode_j"]]


# --- partial load -----------------------------------------------------------------------------------------------------


def stairs() -> Measurement:
    """Half a second of nothing, two places filled one after the other, two seconds of both, one alone, half a second of
    nothing; 100 W."""
    first = request(BEGIN + 0.5, *((BEGIN + 1 + 0.5 * k, 1) for k in range(6)))  # to 3.5 s
    second = request(BEGIN + 1.5, *((BEGIN + 2 + 0.5 * k, 2) for k in range(6)))  # to 4.5 s
    return measured(steady_counter({KEY: 100.0}, 6), [first, second], BEGIN, BEGIN + 5)


def test_idle_ramp_steady_and_drain_are_windows_of_one_run() -> None:
    m = stairs()
    found = phases.loads(m)
    assert found is not None and list(found) == ["idle", "ramp", "steady", "drain"]
    assert [part.seconds for part in found.values()] == pytest.approx([1.0, 1.0, 2.0, 1.0])
    assert [part.energy.value for part in found.values() if part.energy] == pytest.approx([100, 100, 200, 100])
    assert [part.power.value for part in found.values() if part.power] == pytest.approx([100] * 4)
    assert [part.output_tokens for part in found.values()] == [0, 2, 4 + 8, 4]
    steadily = found["steady"]
    window = energy_between(m.trace, KEY, *steady.steady_window(m.completions))  # type: ignore[misc]
    assert steadily.energy is not None and steadily.energy[:2] == pytest.approx((window.joules, window.uncertainty_j))
    idle = [
        energy_between(m.trace, KEY, ns(a), ns(b)).uncertainty_j for a, b in ((BEGIN, BEGIN + 0.5), (BEGIN + 4.5, BEGIN + 5))
    ]
    assert found["idle"].energy.half_width == pytest.approx(math.hypot(*(u or 0.0 for u in idle)))  # type: ignore[union-attr]
    per_token = phases.steady_j_per_output_token(m)
    assert per_token is not None and per_token.value == pytest.approx(200 / 12)
    assert phases.loads(m, share=0.5)["steady"].seconds == pytest.approx(4.0)  # type: ignore[index]


def test_a_part_that_the_source_does_not_see_says_so() -> None:
    trace, tick = steady_counter({KEY: 100.0}, 6), 0.3
    trace.domains[KEY] = Domain("gpu", "counter")  # its updates must be seen
    series = trace.counters[KEY]
    for i in range(len(series.value)):
        series.value[i] = series.value[i] // (100 * tick) * 100 * tick  # 30 J at a time
    m = measured(trace, stairs().completions, BEGIN, BEGIN + 5)
    quick = dataclasses.replace(
        m, completions=tuple(dataclasses.replace(c, dispatch_ns=ns(BEGIN + 0.5)) for c in m.completions)
    )
    found = phases.loads(quick)
    assert found is not None
    assert found["ramp"] == phases.Load(0.0, None, None, 0, ("too_short",), steady.BY_REQUESTS), (
        "both at once: there is no ramp"
    )
    assert found["steady"].energy is not None
    broken = dataclasses.replace(
        m, completions=(m.completions[0], dataclasses.replace(m.completions[1], done_ns=ns(BEGIN + 9)))
    )
    lost = phases.loads(broken)
    assert lost is not None and (lost["drain"].energy, lost["drain"].power) == (None, None)
    assert lost["drain"].reasons == ("no_reading",) and lost["steady"].energy is not None


def test_idle_is_the_sessions_baseline_where_the_run_has_no_pause() -> None:
    m = stairs()
    kept = {"engine": {"power_w": {KEY: {"watts": 42.0, "half_width": 0.5}}}}
    tight = dataclasses.replace(m, t0_ns=ns(BEGIN + 0.4), t1_ns=ns(BEGIN + 4.6), repeats=(), baselines=kept)
    found = phases.loads(tight)
    assert found is not None and found["idle"].energy is None and found["idle"].seconds == 0
    assert found["idle"].power[:2] == (42.0, 0.5)  # type: ignore[index]
    without = phases.loads(dataclasses.replace(tight, baselines={}))
    nothing = phases.Load(0.0, None, None, 0, ("too_short",), steady.BY_REQUESTS)
    assert without is not None and without["idle"] == nothing


def test_the_engines_steps_say_where_its_batch_was_full() -> None:
    """Three requests at once for one place, one second each, at 100 W; steps of half a second, the last one 1.5 s long."""
    ends = (BEGIN + 1.5, BEGIN + 2.5, BEGIN + 4)
    done = [request(BEGIN + 0.5, (end - 0.5, 2), (end, 3)) for end in ends]
    m = measured(steady_counter({KEY: 100.0}, 6), done, BEGIN, BEGIN + 5)
    rows = ((1.0, 1, 2), (1.5, 1, 2), (2.0, 1, 1), (2.5, 1, 1), (4.0, 1, 0))
    for name, column in (("batch_requests", 1), ("waiting_requests", 2)):
        m.trace.gauges[f"e:engine.{name}"] = series = Series()
        for row in rows:
            series.append(ns(BEGIN + row[0]), row[column])
    found = phases.loads(m)
    assert found is not None and {part.method for part in found.values()} == {steady.BY_STEPS}
    assert [part.seconds for part in found.values()] == pytest.approx([1.5, 0, 3.5, 0])
    assert found["steady"].energy.value == pytest.approx(350) and found["steady"].output_tokens == 15  # type: ignore[union-attr]
    assert phases.summary(m)["steady_j_per_output_token"] == pytest.approx(350 / 15)
    assert metrics.steady_output_tokens_per_s(m) == pytest.approx(15 / 3.5)
    names = [(name, len(spans)) for name, _, spans in bands.of(m)]
    assert names == [("idle", 2), ("steady", 1)], "the figure shades what was measured"
    m.trace.gauges.clear()
    without = phases.loads(m)
    assert without is not None and [part.seconds for part in without.values()] == pytest.approx([1.5, 0, 1, 2.5])
    assert {part.method for part in without.values()} == {steady.BY_REQUESTS}
    assert metrics.steady_output_tokens_per_s(m) == pytest.approx(5 / 1.0)


def test_repeats_add_up() -> None:
    one = stairs()
    shift = 5 * 10**9
    again = [
        dataclasses.replace(
            c,
            dispatch_ns=c.dispatch_ns + shift,
            done_ns=c.done_ns + shift,
            events=tuple((t + shift, n) for t, n in c.events),
            repeat=1,
        )
        for c in one.completions
    ]
    spans = [(BEGIN, BEGIN + 5), (BEGIN + 5, BEGIN + 10)]
    m = measured(steady_counter({KEY: 100.0}, 11), [*one.completions, *again], BEGIN, BEGIN + 10, spans)
    found = phases.loads(m)
    assert found is not None and [part.seconds for part in found.values()] == pytest.approx([2, 2, 4, 2])
    assert found["steady"].energy.value == pytest.approx(400) and found["steady"].output_tokens == 24  # type: ignore[union-attr]


def test_the_columns_of_a_frame() -> None:
    row = phases.summary(stairs())
    assert list(row) == [
        f"{name}{end}" for name in ("prefill_j", "decode_j", "steady_j_per_output_token") for end in ("", "_half_width")
    ]
    assert row["steady_j_per_output_token"] == pytest.approx(200 / 12)
    # Half a second alone and half a second beside a decode of 2 tokens/s, with 60 tokens/s.
    assert row["prefill_j"] == pytest.approx(50 + 50 * 60 / 62)
    assert row["prefill_j_half_width"] == pytest.approx(50 * 60 / 62, rel=0.01)


def test_a_load_that_ignores_the_requests_costs_precision_and_no_truth() -> None:
    """A square wave of its own: powers that belong to no state only make the noise larger."""
    done = batches(random.Random(1), 6, ttft_s=0.2)
    m = run_of(square(), done, BEGIN - 0.01, end_s(done), sample_s=None)
    found = phases.split(m)
    assert found is not None
    for phase, true in zip(found[:2], truth(m, square())):
        assert phase.figure is None or abs(phase.figure.value - true) <= phase.figure.half_width
    assert found.decode.figure is not None and found.decode.figure.half_width > 0.02 * found.decode.figure.value
