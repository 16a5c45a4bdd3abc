"""Broken hardware under the whole stack: a real session over the simulated driver library.

Each board of one machine gets a fault of its own in the middle of one window. Whatever happens, the user's block ends
without an exception, and each figure is unknown for its reason or has an interval that holds the truth; it is never 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from fake_nvml import Board, Const, Fault, back, boards, denied, error, frozen, garbage, h100, lost, reset, slow, spike, zero
from fake_nvml import wrap32 as wrap

import lem_kit as lem
from lem_kit import metrics
from lem_kit.measurement import REASONS, Energy, Measurement

pytest.importorskip("pynvml")

POWER_W = 200.0


class Case(NamedTuple):
    """A fault and, if it is mended before the window ends, after how long; why counter and integral are unknown then (one of
    several codes), or None where they are known. `unseen`: the counter, which is read about once a second inside a window,
    may have been read before and after it, and is then as right as if there had been none."""

    fault: list[Fault]
    mended_s: float | None = None
    counter: str | None = None
    integral: str | None = None
    unseen: bool = False


COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
STANDS = "counter_stuck not_advancing"
CASES = {
    "nothing": Case([]),
    "the counter starts again": Case(reset(), counter="counter_went_back"),
    "the counter falls": Case(back(150.0), counter="counter_went_back", unseen=True),  # by less than it rises in a second
    "the counter says 0": Case(zero("counter"), counter="counter_went_back"),
    "the counter says 0 for a while": Case(zero("counter"), 0.3, counter="counter_went_back", unseen=True),
    "the counter says nonsense": Case(garbage("counter"), counter=f"implausible {STANDS}"),  # the largest number there is
    "the counter says nonsense for a while": Case(garbage("counter"), 0.3, counter="counter_went_back", unseen=True),
    "the counter stands still": Case(frozen("counter"), counter=STANDS),
    "32 bits wrap": Case([], counter="counter_went_back"),  # the fault is made when the clock is known
    "power has a spike": Case(spike(), 0.1, integral="implausible"),
    "the counter is forbidden": Case(denied(), counter="no_permission"),
    "the counter times out": Case(error(10, COUNTER), counter="source_failed"),
    "the counter times out for a while": Case(error(10, COUNTER), 0.3),
    "a call takes long": Case(slow(COUNTER, 0.2), 0.1),
    "the GPU is lost": Case(lost(), counter="gpu_lost", integral="gpu_lost"),
    "the GPU is lost for a while": Case(lost(), 0.3),
}


class Seen(NamedTuple):
    board: Board
    counter: Energy
    integral: Energy
    true_j: float


@pytest.fixture(scope="module")
def measured() -> Iterator[tuple[Measurement, dict[str, Seen]]]:
    """One window of 2 s; the faults begin after 0.8 s."""
    machine_boards = {name: h100(wave=Const(POWER_W), latencies=()) for name in CASES}
    with pytest.MonkeyPatch.context() as patch, boards(list(machine_boards.values())) as machine:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with lem.Session(sources=["nvml"]) as session:
            time.sleep(1.2)
            with session.window("faulty") as window:
                time.sleep(0.8)
                began = [(machine_boards[name].fail(case.fault), case.mended_s, name) for name, case in CASES.items()]
                machine_boards["32 bits wrap"].fail(wrap(machine.now_ns()))
                start = time.monotonic()
                for faults, mended_s, name in sorted(
                    (found for found in began if found[1] is not None), key=lambda found: found[1] or 0.0
                ):
                    time.sleep(max(start + (mended_s or 0.0) - time.monotonic(), 0))
                    machine_boards[name].mend(faults)
                time.sleep(1.2 - 0.3)
            m = window.measurement
        found = {}
        for number, (name, board) in enumerate(machine_boards.items()):
            counter, integral = m.energy[f"nvml:gpu{number}"], m.energy[f"nvml_power:gpu{number}"]
            found[name] = Seen(board, counter, integral, board.energy_j(m.t0_ns, m.t1_ns))
        yield m, found
    assert machine.sessions == 0


@pytest.mark.parametrize("name", CASES)
def test_a_figure_is_unknown_for_its_reason_or_its_interval_holds_the_truth(
    measured: tuple[Measurement, dict[str, Seen]], name: str
) -> None:
    case, seen = CASES[name], measured[1][name]
    for figure, reason in ((seen.counter, case.counter), (seen.integral, case.integral)):
        assert set(figure.reasons) <= set(REASONS)
        if reason is not None and not (case.unseen and figure is seen.counter and figure.joules is not None):
            assert figure.joules is figure.uncertainty_j is None and len(figure.reasons) == 1, figure
            assert figure.reasons[0] in reason.split(), figure
            continue
        assert figure.joules is not None and figure.uncertainty_j is not None, figure
        assert abs(figure.joules - seen.true_j) <= figure.uncertainty_j + 1e-3, figure
        assert ("sources_disagree" in figure.reasons) == (name == "the counter falls" and figure is seen.counter)


def test_the_record_says_what_happened_and_is_not_valid(measured: tuple[Measurement, dict[str, Seen]]) -> None:
    m, seen = measured
    assert m.status == "ok" and not m.valid
    codes = {code for _, name, code, _ in m.trace.failures if name.startswith("nvml")}
    assert {"gpu_lost", "no_permission", "source_failed"} <= codes
    assert metrics.energy_j(m) is None, "half of the GPUs is not the total of the GPUs"
    assert seen["nothing"].counter.joules == pytest.approx(POWER_W * m.duration_s, rel=0.01)
