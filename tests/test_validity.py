"""Each code that speaks for or against a window, from gauges, a /proc of our own, and two figures of one device."""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path

import pytest

from lem_kit import validity
from lem_kit.measurement import REASONS, Energy
from lem_kit.trace import Series, Trace
from lem_kit.validity import Surroundings

SECOND = 1_000_000_000
TICKS = os.sysconf("SC_CLK_TCK")


def proc(folder: Path, busy_s: float, idle_s: float = 100.0, children: str = "") -> str:
    """A /proc with so many seconds of the CPU: half of the busy ones the user's, the rest the system's; some of the idle
    ones waiting for a disk; and a guest's, which the user's already hold."""
    busy, idle = round(busy_s * TICKS), round(idle_s * TICKS)
    (folder / "stat").write_text(
        f"cpu  {busy // 2} 0 {busy - busy // 2} {idle - 7} 7 0 0 0 {busy // 2} 0\ncpu0 1 2 3\nintr 4\n"
    )
    task = folder / f"self/task/{os.getpid()}"
    task.mkdir(parents=True, exist_ok=True)
    (task / "children").write_text(children)
    return str(folder)


def test_surroundings_are_read_from_proc(tmp_path: Path) -> None:
    wall_ns = time.time_ns() - time.monotonic_ns()
    found = validity.surroundings(proc(tmp_path, 12.5))
    assert found.busy_s == pytest.approx(12.5, abs=1 / TICKS)
    own = os.times()
    assert found.own_s is not None and 0 < found.own_s <= own.user + own.system + own.children_user + own.children_system
    assert abs(found.wall_ns - wall_ns) < 50_000_000


def test_what_living_children_use_cannot_be_told(tmp_path: Path) -> None:
    assert validity.surroundings(proc(tmp_path, 1.0, children="4711 4712 ")).own_s is None


@pytest.mark.parametrize("text", [None, "", "cpu 1 2\n", "cpu a b c d e f g h\n"])
def test_without_a_proc_nothing_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        proc(tmp_path, 1.0)
        (tmp_path / "stat").write_text(text)
    found = validity.surroundings(str(tmp_path))
    assert found.own_s is found.busy_s is None
    assert validity.between(found, found, 1.0) == []


def test_this_machine_is_read_where_it_is_asked_for() -> None:
    found = validity.surroundings()
    assert (found.busy_s is not None) == Path("/proc/stat").exists()
    assert validity.surroundings(None)[1:] == (None, None)


BEFORE = Surroundings(10**18, 100.0, 10.0)


def test_a_wall_clock_that_was_set_is_told() -> None:
    for moved_ns, codes in ((0, []), (40_000_000, []), (60_000_000, ["clock_jump"]), (-(10**12), ["clock_jump"])):
        assert validity.between(BEFORE, BEFORE._replace(wall_ns=10**18 + moved_ns), 1.0) == codes


def test_a_host_that_others_keep_busy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four CPUs for 10 s are 40 s; a fifth of them are 8 s."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for busy_s, own_s, codes in ((9.0, 9.0, []), (7.5, 0.0, []), (8.5, 0.0, ["host_shared"]), (30.0, 25.0, [])):
        after = Surroundings(10**18, 100 + busy_s, 10 + own_s)
        assert validity.between(BEFORE, after, 10.0) == codes
    busy = Surroundings(10**18, 200.0, 10.0)
    assert validity.between(BEFORE, busy, 0.05) == [], "too short for a clock of hundredths of a second"
    assert validity.between(BEFORE._replace(own_s=None), busy, 10.0) == [], "what is not known speaks against nothing"


def gauges(**columns: list[float]) -> Trace:
    """One value per second, from 0 s on."""
    return Trace(
        gauges={
            f"nvml:gpu0.{name}": Series(array("q", [k * SECOND for k in range(len(values))]), array("d", values))
            for name, values in columns.items()
        }
    )


@pytest.mark.parametrize(
    ("trace", "codes"),
    [
        (gauges(throttled=[0, 0, 0]), []), (gauges(throttled=[0, 1, 0]), ["throttled"]),
        (gauges(power_capped=[0, 1, 1, 0]), []), (gauges(power_capped=[0, 1, 1, 1]), ["power_capped"]),
        (gauges(temperature_c=[40, 40, 41, 41, 42, 42, 42.9, 42.9]), []),
        (gauges(temperature_c=[40, 40, 41, 41, 42, 43, 43.2, 43.2]), ["thermal_drift"]),
        (gauges(temperature_c=[60, 60, 55, 55, 52, 50, 50, 50]), ["thermal_drift"]),
        (gauges(temperature_c=[40, 60, 60, 40, 40, 60, 60, 40]), []),
        (gauges(memory_c=[40, 90]), []), (Trace(), []), (gauges(throttled=[]), []),
        (gauges(throttled=[1] * 8, temperature_c=[40.0] * 4 + [50.0] * 4), ["throttled", "thermal_drift"]),
    ],
)  # fmt: skip
def test_gauges_inside_the_window_speak(trace: Trace, codes: list[str]) -> None:
    found = validity.of_gauges(trace, 0, 8 * SECOND)
    assert found == codes and set(found) <= set(REASONS)


def test_gauges_outside_the_window_say_nothing() -> None:
    trace = gauges(throttled=[1, 0, 0, 0, 1], temperature_c=[20, 40, 40, 40, 90])
    assert validity.of_gauges(trace, SECOND, 3 * SECOND) == []
    assert validity.of_gauges(gauges(temperature_c=[20, 40, 60]), 0, 2 * SECOND) == [], "too short to speak of drift"


def test_two_gpus_that_throttle_are_told_once() -> None:
    column = Series(array("q", [0]), array("d", [1.0]))
    both = Trace(gauges={"nvml:gpu0.throttled": column, "nvml:gpu1.throttled": column})
    assert validity.of_gauges(both, 0, SECOND) == ["throttled"]


def pair(integral_j: float | None, u_j: float = 1.0, reasons: tuple[str, ...] = ()) -> dict[str, Energy]:
    known = integral_j is not None
    return {
        "nvml:gpu0": Energy("nvml", "gpu0", "counter", "gpu", 100.0, 2.0),
        "nvml_power:gpu0": Energy(
            "nvml_power",
            "gpu0",
            "integral",
            "gpu",
            integral_j,
            u_j if known else None,
            reasons if known else ("no_reading",),
        ),
        "nvml:gpu1": Energy("nvml", "gpu1", "counter", "gpu", 50.0, 1.0),
        "rapl:dram": Energy("rapl", "dram", "counter", "dram", 500.0, 1.0),
    }


def test_counter_and_integral_disagree_beyond_both_intervals_only() -> None:
    for joules in (100.0, 102.9, 97.1, None):
        energies = pair(joules)
        assert validity.compared(energies) == energies
    for joules in (103.1, 96.9, 9.0):
        found = validity.compared(pair(joules, reasons=("mig_parent_scope",)))
        assert found["nvml:gpu0"].reasons == ("sources_disagree",)
        assert found["nvml_power:gpu0"].reasons == ("mig_parent_scope", "sources_disagree")
        assert found["nvml:gpu1"].reasons == found["rapl:dram"].reasons == ()
        assert (found["nvml:gpu0"].joules, found["nvml_power:gpu0"].joules) == (100.0, joules), "no figure is changed"


def test_an_integral_without_a_counter_has_nothing_to_disagree_with() -> None:
    alone = {"nvml_power:gpu0": Energy("nvml_power", "gpu0", "integral", "gpu", 9.0, 0.1)}
    assert validity.compared(alone) == alone and validity.compared({}) == {}
