"""The simulated boards: truth against numerical integration, sensors against truth, other processes."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock
from fake_nvml import (
    UNSUPPORTED,
    Board,
    Const,
    Machine,
    Sine,
    Square,
    Steps,
    Wave,
    a100,
    ada,
    alias,
    boards,
    h100,
    library,
    llm_bursts,
    v100,
    zero,
)

pynvml = pytest.importorskip("pynvml")

from fake_nvml.ask import code, counter_j, field, handle, power_w  # noqa: E402

SECOND = 1_000_000_000
WAVES = (
    Const(123.4),
    Square(70, 300, 0.83, 0.5, 0.11),
    Square(70, 300, 0.83, 0.2),
    Sine(200, 90, 0.7, 0.2),
    llm_bursts(0.05),
    alias(),
    Steps(((0.013, 0.0), (0.001, 500.0))),
)
ids = [type(wave).__name__.lower() for wave in WAVES]


def test_structures_are_those_of_nvidia_ml_py() -> None:
    for line in library().fake_nvml_layout().decode().splitlines():
        structure, part, number = line.split()
        theirs = getattr(pynvml, structure)
        assert int(number) == (ctypes.sizeof(theirs) if part == "." else getattr(theirs, part).offset), line


@pytest.mark.parametrize("wave", WAVES, ids=ids)
@pytest.mark.parametrize("start_ns", [-3_123_456_789, 0, 987_654_321_012_345])
def test_closed_forms_are_the_integral_of_the_power(wave: Wave, start_ns: int) -> None:
    step_ns, steps = 100_000, 12_347
    middles = range(start_ns + step_ns // 2, start_ns + steps * step_ns, step_ns)
    numerical_j = sum(map(wave.power_w, middles)) * step_ns / 1e9
    # A jump of 500 W inside a step of 0.1 ms is placed wrong by at most half of it: 25 mJ each, partly cancelling.
    assert wave.energy_j(start_ns, start_ns + steps * step_ns) == pytest.approx(numerical_j, abs=0.06)


@pytest.mark.parametrize("wave", WAVES, ids=ids)
def test_the_library_and_python_agree_on_the_truth(nvml: Machine, wave: Wave) -> None:
    board = nvml.boards[0]
    board.draw(wave, 500 * SECOND)
    board.draw(Const(10.0), 800 * SECOND)
    board.draw(wave, 800 * SECOND + 1)
    chance = random.Random(1)
    for _ in range(300):
        begin = chance.randrange(0, 1_000_000 * SECOND) if chance.random() < 0.5 else chance.randrange(499, 801) * SECOND
        end = begin + chance.randrange(0, 3 * SECOND)
        theirs = library().fake_nvml_energy_j(0, begin, end)
        assert board.energy_j(begin, end) == pytest.approx(theirs, abs=2e-6)
        assert board.power_w(begin) == pytest.approx(library().fake_nvml_power_w(0, begin), abs=1e-9)


def test_the_counter_is_a_staircase_of_the_truth(nvml: Machine, clock: FakeClock) -> None:
    board = nvml.boards[1]
    board.counter_phase_s, board.start_j = 0.037, 5.0
    nvml.apply()
    for _ in range(200):
        clock.advance(0.0173)
        updated_ns = (clock.now_ns - 37_000_000) // 100_000_000 * 100_000_000 + 37_000_000
        assert counter_j(1) == pytest.approx(5.0 + board.energy_j(0, updated_ns), abs=0.0005001)
        assert field(83, 0, 1).value.ullVal == field(191, 0, 1).value.ullVal == round(1000 * counter_j(1))


def test_counter_gain_and_resolution(nvml: Machine) -> None:
    nvml.boards[0].counter_gain, nvml.boards[0].resolution_mj = 0.95, 1000
    nvml.apply()
    assert counter_j() == 1000 + 0.95 * 200 * 1000
    nvml.boards[0].start_j = 1000.4
    nvml.apply()
    assert counter_j() == 1000 + 0.95 * 200 * 1000


def test_jitter_moves_refreshes_but_loses_nothing(nvml: Machine, clock: FakeClock) -> None:
    nvml.boards[0].counter_jitter_s, nvml.boards[0].start_j = 0.002, 0.0
    nvml.apply()
    clock.advance(0.05)
    late_s = []
    seen = counter_j()
    for _ in range(30_000):
        clock.advance(0.0001)
        if counter_j() != seen:
            seen = counter_j()
            updated_s = seen / 200  # what a counter of 200 W shows is when it was updated
            late_s.append(updated_s - round(updated_s, 1))
            assert 0 <= clock.now_ns / 1e9 - updated_s <= 0.000106
    assert len(late_s) == 30
    assert -0.002 <= min(late_s) < -0.0008 and 0.0008 < max(late_s) <= 0.002


def test_the_powers_look_at_their_windows_only(nvml: Machine, clock: FakeClock) -> None:
    board = nvml.boards[1]
    for _ in range(100):
        clock.advance(0.0173)
        updated_ns = clock.now_ns // 100_000_000 * 100_000_000
        assert power_w(186, 1) == pytest.approx(board.energy_j(updated_ns - 25_000_000, updated_ns) / 0.025, abs=0.0006)
        assert power_w(185, 1) == pytest.approx(board.energy_j(updated_ns - SECOND, updated_ns), abs=0.0006)
        assert pynvml.nvmlDeviceGetPowerUsage(handle(1)) == round(1000 * power_w(185, 1))


def test_a_load_in_step_with_the_sensor_is_not_seen_by_it(nvml: Machine, clock: FakeClock) -> None:
    nvml.boards[0].draw(alias(70, 300), 0)
    clock.advance(5)
    assert power_w(186) == 70.0
    assert power_w(185) == pytest.approx(139.0, abs=1e-3)
    assert counter_j() == pytest.approx(1000 + 139 * 1005, abs=1e-3)


def test_scopes_are_those_of_an_h100(nvml: Machine) -> None:
    answers = {(f, s): field(f, s).nvmlReturn for f in (185, 186) for s in range(4)}
    supported = {key for key, answer in answers.items() if answer == 0}
    assert supported == {(185, 0), (185, 2), (186, 0)}
    assert {answers[key] for key in set(answers) - supported} == {UNSUPPORTED}
    assert field(12345).nvmlReturn == UNSUPPORTED
    nvml.boards[0].module_scope = 1
    nvml.apply()
    assert field(186, 1).value.uiVal == 200_000


def test_samples_are_past_means_with_wall_clock_stamps(nvml: Machine, clock: FakeClock) -> None:
    board = nvml.boards[1]
    clock.advance(0.0111)
    kind, samples = pynvml.nvmlDeviceGetSamples(handle(1), pynvml.NVML_TOTAL_POWER_SAMPLES, 0)
    assert (kind, len(samples)) == (pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, 119)
    at_ns = [sample.timeStamp * 1000 - nvml.wall_offset_ns for sample in samples]
    assert {b - a for a, b in itertools.pairwise(at_ns)} == {20_000_000}
    assert at_ns[-1] == 1000 * SECOND
    for t_ns, sample in zip(at_ns, samples):
        assert sample.sampleValue.uiVal == pytest.approx(board.energy_j(t_ns - 20_000_000, t_ns) / 20e-6, abs=0.6)
    clock.advance(0.0113)  # the next sample lies 2.4 ms back: it is not there yet
    newest = samples[-1].timeStamp
    assert code(pynvml.nvmlDeviceGetSamples, handle(1), 0, newest) == pynvml.NVML_ERROR_NOT_FOUND
    clock.advance(0.0201)
    later = pynvml.nvmlDeviceGetSamples(handle(1), 0, newest)[1]
    assert [sample.timeStamp - newest for sample in later] == [20_000, 40_000]


@pytest.mark.parametrize(
    ("make", "refresh_s", "instant", "average"),
    [
        (h100, 0.1, (25, 100), True),
        (a100, 0.1, (25, 100), False),
        (v100, 0.02, (10, 20), False),
        (ada, 0.1, (100, 100), True),
    ],
)
def test_presets(clock: FakeClock, make: Any, refresh_s: float, instant: tuple[int, int], average: bool) -> None:
    with boards([make(wave=Square(0, 100, 3.3))], clock):
        pynvml.nvmlInit()
        seen = set()
        for _ in range(1000):
            clock.advance(0.001)
            seen.add(counter_j())
            window_ns, updated_ns = instant[0] * 1_000_000, clock.now_ns // (instant[1] * 1_000_000) * instant[1] * 1_000_000
            true_w = Square(0, 100, 3.3).energy_j(updated_ns - window_ns, updated_ns) / (window_ns / 1e9)
            assert power_w(186) == pytest.approx(true_w, abs=0.0006)
        assert len(seen) in (round(1 / refresh_s), round(1 / refresh_s) + 1)
        assert (field(185).nvmlReturn == 0) is average
        usage = pynvml.nvmlDeviceGetPowerUsage(handle())
        assert usage == round(1000 * power_w(185 if average else 186))
        pynvml.nvmlShutdown()


READ = """
import sys, time, pynvml
pynvml.nvmlInit()
for line in sys.stdin:
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = time.monotonic_ns()
    print(before, pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu), time.monotonic_ns(), flush=True)
"""


def test_other_processes_see_the_same_board_and_its_changes(tmp_path: Path) -> None:
    board = h100(wave=Square(70, 300, 0.83), latencies=())
    machine = Machine([board])
    described = tmp_path / "boards"
    machine.write(described)
    child = subprocess.Popen(
        [sys.executable, "-c", READ], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**machine.environment(described), "PYTHONPATH": str(Path(pynvml.__file__).parent)},
    )  # fmt: skip
    assert child.stdin and child.stdout
    with child:

        def ask() -> tuple[int, float, int]:
            print(file=child.stdin, flush=True)
            before, mj, after = map(int, child.stdout.readline().split())  # type: ignore[union-attr]
            return before, mj / 1000, after

        before, joules, after = ask()
        refreshes = {t_ns // 100_000_000 * 100_000_000 for t_ns in (before, after)}
        assert any(math.isclose(joules, 1000 + board.energy_j(0, t), abs_tol=0.0006) for t in refreshes)
        board.fail(zero("counter"), from_ns=0)
        machine.write(described)
        assert ask()[1] == 0.0
        child.stdin.close()
    assert child.returncode == 0


def test_every_attribute_of_a_board_reaches_the_library() -> None:
    changed = Board()
    for one in dataclasses.fields(Board):
        if isinstance(getattr(changed, one.name), (int, float)):
            setattr(changed, one.name, getattr(changed, one.name) + 1)
    with boards([changed]):
        pass  # the library refuses a key that it does not know
    same = set(Board().lines(0)) & set(changed.lines(0))
    assert {line.split()[0] for line in same} <= {"board", "name", "uuid", "pci", "serial", "wave", "latency"}
