"""That an engine's processes are gone, and with them what they held: on simulated GPUs, under the real nvidia-ml-py."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from conftest import FakeClock

pytest.importorskip("pynvml")
pytest.importorskip("psutil")
from fake_nvml import boards, h100, lost

from lem_kit import energy
from lem_kit.backends import _processes

GIB = 2**30


def test_memory_that_has_come_back_is_not_left(clock: FakeClock) -> None:
    with boards([h100(memory_used=3 * GIB, memory_reserved=0), h100(memory_used=GIB, memory_reserved=0)], clock) as machine:
        before = energy.memory_used_bytes()
        assert sorted(before.values()) == [GIB, 3 * GIB] and all(gpu.startswith("GPU-") for gpu in before)
        machine.boards[1].memory_used = GIB + 63 * 2**20
        machine.apply()
        assert _processes.memory_left(before, patience_s=0) == {}, "a driver's own"
    assert machine.sessions == 0


def test_memory_that_stays_is_named_with_its_gpu_and_waited_for(clock: FakeClock) -> None:
    with boards([h100(memory_used=3 * GIB, memory_reserved=0), h100(memory_used=GIB, memory_reserved=0)], clock) as machine:
        before = energy.memory_used_bytes()
        machine.boards[1].memory_used = 5 * GIB
        machine.apply()
        (left,) = _processes.memory_left(before, patience_s=0.05).items()
        assert before[left[0]] == GIB and left[1] == 4 * GIB

        def free() -> None:
            machine.boards[1].memory_used = GIB
            machine.apply()

        timer = threading.Timer(0.3, free)
        timer.start()
        assert _processes.memory_left(before, patience_s=10) == {}, "it was on its way"
        timer.join()


def test_a_gpu_that_does_not_answer_is_left_out(clock: FakeClock) -> None:
    with boards([h100(), h100(memory_used=GIB, memory_reserved=0)], clock) as machine:
        before = energy.memory_used_bytes()
        machine.boards[0].faults.extend(lost())
        machine.apply()
        assert list(energy.memory_used_bytes().values()) == [GIB] and _processes.memory_left(before, patience_s=0) == {}


def test_only_processes_with_a_mark_count_and_those_that_stay_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processes, "_ENDS_S", 0.3)
    code = "import time; time.sleep(60)"
    mine, other = (subprocess.Popen([sys.executable, "-c", f"{code} # {mark}"]) for mark in ("MARK-1", "other"))
    try:
        found = _processes.processes(("MARK-1",))
        assert {process.pid for process in found} == {mine.pid}
        assert _processes.ended(found) == [mine.pid] and mine.wait(10) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
