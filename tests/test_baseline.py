"""Idle baselines and net energy, with exact numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from typing import Any

import pytest

from lem_kit import baseline, metrics
from lem_kit.errors import LemError
from lem_kit.jupyter import card
from lem_kit.measurement import REASONS, Energy, Measurement, Repeat
from lem_kit.statistics import student_t
from lem_kit.trace import Domain, Series, Trace

SECOND = 1_000_000_000
KEY = "nvml:gpu0"


def counted(watts: list[float], label: str = "H100 GPU-1", degrees: list[float] | None = None) -> Trace:
    """A counter of exact age, read every 50 ms, whose power is `watts` second by second."""
    series, joules = Series(), 0.0
    for k in range(20 * len(watts) + 1):
        series.append(k * SECOND // 20, joules)
        joules += watts[min(k // 20, len(watts) - 1)] / 20
    gauges = {}
    if degrees:
        gauges["nvml:gpu0.temperature_c"] = Series(
            array("q", [k * SECOND for k in range(len(degrees))]), array("d", degrees)
        )
    return Trace({KEY: series}, gauges, {KEY: Domain("gpu", "counter", refresh_s=0.0, label=label)})


def idle(watts: list[float], kind: str = "bare", half_j: float = 0.0, **more: Any) -> Measurement:
    energy = {KEY: Energy("nvml", "gpu0", "counter", "gpu", sum(watts), half_j)}
    started = more.pop("started_at", "2026-11-24T10:00:00.000+00:00")
    return Measurement(
        "idle", "idle", "idle", "ok", started, 0, len(watts) * SECOND, energy,
        config={"seconds": len(watts), "baseline": kind}, trace=counted(watts, **more),
    )  # fmt: skip


def work(joules: float = 1000.0, seconds: int = 4, half_j: float = 3.0, **more: Any) -> Measurement:
    trace = more.pop("trace", counted([joules / seconds] * seconds))
    energy = {KEY: Energy("nvml", "gpu0", "counter", "gpu", joules, half_j)}
    return Measurement(
        "work", "window", "w", "ok", "2026-11-24T11:00:00.000+00:00", 0, seconds * SECOND, energy, trace=trace, **more
    )


def test_a_baseline_is_mean_power_with_the_spread_between_its_seconds() -> None:
    found = baseline.of(idle([60.0, 62.0, 61.0, 61.0], half_j=0.4, degrees=[30.0, 31.0, 32.0, 33.0]))
    power = found["power_w"][KEY]
    assert power["watts"] == pytest.approx(61)
    spread = student_t(3) * math.sqrt(2 / 3) / math.sqrt(4)
    assert power["half_width"] == pytest.approx(math.hypot(spread, 0.4 / 4), rel=0.01)
    assert found["temperature_c"] == {"nvml:gpu0.temperature_c": 31.5}
    assert (found["kind"], found["run_id"], found["labels"]) == ("bare", "idle", {KEY: "H100 GPU-1"})
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_domain_that_is_not_known_is_in_no_baseline() -> None:
    m = idle([60.0])
    unknown = dataclasses.replace(m, energy={KEY: Energy("nvml", "gpu0", "counter", "gpu", None, None, ("no_reading",))})
    assert baseline.of(unknown)["power_w"] == {}
    assert metrics.net_energy_j(work(), unknown) is None


def test_net_is_gross_less_idle_power_times_time() -> None:
    net = metrics.net_energy_j(work(1000.0, 4, 3.0), idle([60.0, 60.0], half_j=2.0))
    assert net is not None and net.value == pytest.approx(1000 - 60 * 4)
    # 2 J in 2 s are 1 W of doubt about the idle power, over 4 s; no spread between its seconds.
    assert net.half_width == pytest.approx(math.hypot(3, 1.0 * 4), rel=1e-3)
    assert (net.keys, net.method, net.scopes) == ((KEY,), "counter", ("gpu",))


def test_net_is_of_the_repeats_alone_and_its_spread_is_theirs() -> None:
    """A repeat that took longer idled longer: 100 J in 1 s and 160 J in 2 s are both 40 J above 60 W."""
    spans = [(0, 1, 100.0), (2, 4, 160.0)]
    repeats = tuple(
        Repeat(a * SECOND, b * SECOND, {KEY: Energy("nvml", "gpu0", "counter", "gpu", joules, 0.5)})
        for a, b, joules in spans
    )
    net = metrics.net_energy_j(work(999.0, 5, repeats=repeats), idle([60.0, 60.0]))
    assert net is not None and net.value == pytest.approx(260 - 60 * 3)
    assert net.half_width == pytest.approx(math.hypot(0.5, 0.5), rel=1e-3), "nothing between repeats, 60 J in gross"
    gross = metrics.energy_j(work(999.0, 5, repeats=repeats))
    assert gross is not None and gross.half_width > 500


def test_net_may_be_negative_and_is_not_clamped() -> None:
    net = metrics.net_energy_j(work(100.0, 4), idle([60.0]))
    assert net is not None and net.value == pytest.approx(-140)


def test_the_most_specific_baseline_of_the_session_is_used_unless_another_is_named() -> None:
    kinds = {kind: baseline.of(idle([watts], kind)) for kind, watts in (("bare", 50.0), ("context", 60.0), ("engine", 70.0))}
    m = work(baselines=kinds)
    values = {name: metrics.net_energy_j(m, name) for name in (None, "engine", "context", "bare")}
    found = {name: net.value for name, net in values.items() if net is not None}
    assert found == pytest.approx({None: 720, "engine": 720, "context": 760, "bare": 800})
    less = work(baselines={kind: kinds[kind] for kind in ("bare", "context")})
    assert metrics.net_energy_j(less).value == pytest.approx(760)  # type: ignore[union-attr]
    assert metrics.net_energy_j(less, "engine") is None and metrics.net_energy_j(work()) is None
    assert metrics.net_energy_j(m, idle([10.0])).value == pytest.approx(960)  # type: ignore[union-attr]


def test_a_baseline_that_does_not_know_all_of_the_gross_figure_gives_no_net() -> None:
    m = work()
    both = dataclasses.replace(m, energy={**m.energy, "rapl:dram": Energy("rapl", "dram", "counter", "dram", 5.0, 0.1)})
    assert metrics.energy_j(both) is not None and metrics.net_energy_j(both, idle([60.0])) is None


def codes(m: Measurement, found: Measurement) -> list[str]:
    given = metrics.net_energy_doubts(m, found)
    assert set(given) <= set(REASONS)
    return given


def test_what_speaks_against_a_baseline() -> None:
    warm = work(trace=counted([250.0] * 4, degrees=[41.0, 50.0, 60.0, 70.0]))
    assert codes(work(), idle([60.0, 60.0])) == []
    assert codes(work(), idle([60.0, 60.0], label="H100 GPU-2")) == ["baseline_stale"]
    assert codes(work(), idle([60.0, 60.0], started_at="2026-11-23T10:00:00.000+00:00")) == ["baseline_stale"]
    # The coldest instant of the work counts: a run heats its own board.
    assert codes(warm, idle([60.0, 60.0], degrees=[31.5, 32.5])) == []
    assert codes(warm, idle([60.0, 60.0], degrees=[30.0, 30.0])) == ["baseline_temperature"]
    assert codes(work(), idle([60.0, 60.0], half_j=13.0)) == ["baseline_unsteady"]
    assert codes(work(), idle([60.0, 60.0], half_j=11.0)) == []
    assert codes(work(), idle([40.0, 80.0])) == ["baseline_unsteady"]


def test_a_domain_outside_the_total_does_not_make_a_baseline_unsteady() -> None:
    found = baseline.of(idle([60.0, 60.0]))
    found["power_w"]["codecarbon:cpu"] = {"watts": 5.0, "half_width": 5.0}
    m = work()
    with_model = dataclasses.replace(
        m,
        baselines={"bare": found},
        energy={**m.energy, "codecarbon:cpu": Energy("codecarbon", "cpu", "model", "cpu", 5.0, 5.0, ("modelled",))},
    )
    assert metrics.net_energy_j(with_model) is not None and metrics.net_energy_doubts(with_model) == []


def test_a_doubted_baseline_says_so_where_its_figure_is_read() -> None:
    doubted = work(baselines={"bare": baseline.of(idle([60.0, 60.0], label="H100 GPU-2"))})
    assert metrics.summary(doubted)["net_energy_doubts"] == "baseline_stale"
    assert REASONS["baseline_stale"] in card.text(doubted)
    trusted = work(baselines={"bare": baseline.of(idle([60.0, 60.0]))})
    assert metrics.summary(trusted)["net_energy_doubts"] == "" and "baseline_stale" not in card.text(trusted)
    assert metrics.summary(work())["net_energy_doubts"] is None


def test_an_engine_in_other_processes_is_neither_bare_nor_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lem_kit.baseline.RESIDENT", {object()})
    assert baseline.kind_now(None) == baseline.kind_now("engine") == "engine"
    for kind in ("bare", "context"):
        with pytest.raises(LemError, match=f"kind='{kind}'.*before it is loaded"):
            baseline.kind_now(kind)
