"""The NVML source: real nvidia-ml-py above, a simulated driver library below, every joule known."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_nvml import (
    FUNCTION_NOT_FOUND,
    Board,
    Const,
    Fault,
    Machine,
    Mig,
    Process,
    Square,
    boards,
    denied,
    error,
    lost,
    reset,
    unsupported,
)

from lem_kit.energy import EnergySource, SourceError, open_source
from lem_kit.energy.nvml import FIELD_ERROR, GAUGES_EVERY_S, SAMPLED_EVERY_S, SAMPLES_ERROR, NvmlSource
from lem_kit.errors import LemError, Unavailable
from lem_kit.measurement import REASONS

pynvml = pytest.importorskip("pynvml")

SECOND = 1_000_000_000


class Clock:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def machine(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two boards: 200 W and 100 W, both refreshed every 100 ms."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    first = Board("GPU-aaaa-1", name="NVIDIA Simulated H100", sm_mhz=1980, utilization=75, temperature_c=51, reasons=4)
    second = Board("GPU-bbbb-2", Const(100.0), name="NVIDIA Simulated A100")
    first.memory_reserved = 0
    with boards([first, second], clock) as machine:
        yield machine
    assert machine.sessions == 0, "a source was left open"


def with_mig(machine: Machine) -> None:
    machine.boards[1].mig_mode, machine.boards[1].migs = 1, (Mig("MIG-1234"),)
    machine.apply()


def opened(visible: str | None = None) -> EnergySource:
    return open_source("nvml" if visible is None else f"nvml={visible}")


def made(clock: Clock, visible: str | None = None) -> NvmlSource:
    """A source on the same clock as the boards."""
    pynvml.nvmlInit()
    return NvmlSource(pynvml, visible, clock)


def reason(argument: str | None = None) -> str:
    with pytest.raises(Unavailable) as caught:
        opened(argument)
    return str(caught.value)


def test_the_counter_is_a_staircase_of_joules(machine: Machine, clock: Clock) -> None:
    pynvml.nvmlInit()
    source = NvmlSource(pynvml, None, clock)
    assert source.read() == {"gpu0": (0, 1000.0, 0), "gpu1": (0, 1000.0, 0)}
    clock.now_ns = 99_000_000
    assert source.read()["gpu0"].joules == 1000.0
    clock.now_ns = 2 * SECOND + 50_000_000
    assert source.read()["gpu0"] == (clock.now_ns, 1400.0, 0)
    assert source.read_one("gpu1") == (clock.now_ns, 1200.0, 0)
    source.close()


def test_domains_say_what_they_are(machine: Machine) -> None:
    source = opened()
    domain = source.domains["gpu1"]
    assert (domain.scope, domain.method, domain.refresh_s, domain.resolution_j) == ("gpu", "counter", None, 0.001)
    assert domain.label == "NVIDIA Simulated A100 GPU-bbbb-2" and domain.limit_w == 700.0
    integral = source.integrals["nvml_power:gpu1"]  # type: ignore[attr-defined]
    assert (integral.scope, integral.method, integral.gauge, integral.means) == (
        "gpu",
        "integral",
        "nvml:gpu1.power_w",
        True,
    )
    assert integral.relative_error == SAMPLES_ERROR and integral.limit_w == 700.0
    source.close()


@pytest.mark.parametrize(
    ("visible", "domains"),
    [
        ("0,1", ["gpu0", "gpu1"]),
        ("1", ["gpu1"]),
        (" 1 , 0 ", ["gpu1", "gpu0"]),
        ("0x1", ["gpu0"]),
        ("1;0", ["gpu1"]),
        ("0,7", ["gpu0"]),
        ("1,7,0", ["gpu1"]),
        ("0,GPU-bbbb-2", ["gpu0"]),
        ("0,-1,1", ["gpu0"]),
        ("GPU-bbbb-2", ["gpu1"]),
        ("GPU-b", ["gpu1"]),
    ],
)
def test_visible_devices_choose(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str, domains: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    source = opened()
    assert list(source.domains) == domains
    source.close()


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_devices_are_not_read(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "hides every GPU" in reason() and f"CUDA_VISIBLE_DEVICES={visible!r}" in reason()


@pytest.mark.parametrize(
    "visible", ["2", "7", "banana", "GPU-", "GPU-cccc", "MIG-unknown", "7,0", "None", "9" * 5000, "\u0663"]
)
def test_a_wrong_device_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert repr(visible.split(",")[0]) in reason()


def test_of_a_device_that_stands_there_twice_cuda_makes_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    assert "'0,0': GPU 0 stands there twice" in reason()


def test_what_cuda_stumbles_over_is_told_and_what_it_shows_is_read(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7,0")
    source = opened()
    told = source.describe()["skipped"]["CUDA_VISIBLE_DEVICES"]
    assert told == "'1,7,0': '7' names no GPU that answers, and CUDA shows only what stands before it"
    source.close()
    assert reason("1,7,0").startswith("NVML: '1,7,0': '7' names no GPU"), "who asks for a GPU by hand is to have it"


def test_the_argument_replaces_visible_devices(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    source = opened("1")
    assert list(source.domains) == ["gpu1"]
    source.close()


@pytest.mark.parametrize("visible", ["MIG-1234", "MIG-GPU-bbbb-2/7/0"])
def test_a_mig_instance_is_read_as_its_parent(machine: Machine, visible: str) -> None:
    with_mig(machine)
    source = opened(visible)
    assert source.domains["gpu1"].label.endswith("(parent GPU, not this instance)")
    assert source.domains["gpu1"].scope == "gpu"
    source.close()


def test_a_board_in_mig_mode_says_so(machine: Machine) -> None:
    with_mig(machine)
    source = opened()
    assert source.domains["gpu1"].label.endswith("(whole GPU, all its MIG instances)")
    integral = source.integrals["nvml_power:gpu1"]  # type: ignore[attr-defined]
    assert source.domains["gpu1"].reasons == integral.reasons == ("mig_parent_scope",)
    assert source.domains["gpu0"].reasons == ()
    source.close()


POWER = ("nvmlDeviceGetSamples", "field:186", "nvmlDeviceGetPowerUsage")


@pytest.mark.parametrize("fault", [unsupported(), denied()], ids=["unsupported", "denied"])
def test_a_board_without_counter_is_left_out_with_its_reason(machine: Machine, fault: list[Fault]) -> None:
    """Its power is still integrated; where that is missing, too, there is nothing to read."""
    machine.boards[0].fail(fault)
    source = opened()
    assert list(source.domains) == list(source.read()) == ["gpu1"]
    assert list(source.integrals) == ["nvml_power:gpu0", "nvml_power:gpu1"]  # type: ignore[attr-defined]
    assert "GPU-aaaa-1" in source.describe()["skipped"]["gpu0"]  # type: ignore[attr-defined]
    source.close()
    for board in machine.boards:
        board.fail([*fault, *unsupported(*POWER)])
    assert "GPU-aaaa-1" in reason() and "GPU-bbbb-2" in reason()


def test_a_dead_board_does_not_hide_the_others(machine: Machine) -> None:
    machine.boards[0].fail(lost())
    source = opened()
    assert list(source.domains) == ["gpu1"]
    assert "GPU 0 does not answer: GPU is lost" in source.describe()["skipped"]["gpu0"]  # type: ignore[attr-defined]
    source.close()


def test_losing_one_gpu_keeps_the_other_and_losing_all_raises(machine: Machine) -> None:
    source = opened()
    machine.boards[0].fail(lost())
    assert list(source.read()) == ["gpu1"]
    assert source.failures == {  # type: ignore[attr-defined]
        "gpu0": "NVML: GPU 0 (NVIDIA Simulated H100, GPU-aaaa-1) gave no energy reading: GPU is lost"
    }
    assert not any(name.startswith("gpu0") for name in source.gauges())  # type: ignore[attr-defined]
    machine.boards[1].fail(lost())
    with pytest.raises(LemError, match=r"GPU 0 .* lost; NVML: GPU 1 .* lost"):
        source.read()
    machine.boards[0].mend()
    assert list(source.read()) == ["gpu0"]
    source.close()


def test_a_counter_reset_is_shown_as_it_is(machine: Machine, clock: Clock) -> None:
    source = opened("0")
    clock.now_ns = SECOND
    machine.boards[0].fail(reset())
    clock.now_ns += SECOND
    assert source.read()["gpu0"].joules == 200.0
    source.close()


def test_gauges(machine: Machine, clock: Clock) -> None:
    source = made(clock, "0")
    often = {
        "gpu0.temperature_c": 51.0,
        "gpu0.sm_utilization": 0.75,
        "gpu0.sm_clock_hz": 1.98e9,
        "gpu0.throttle_reasons": 4.0,
        "gpu0.throttled": 0.0,
        "gpu0.power_capped": 1.0,
    }
    slow = {
        "gpu0.memory_utilization": 0.37, "gpu0.memory_clock_hz": 2.619e9, "gpu0.memory_used_bytes": 3 * 2**30,
        "gpu0.power_average_w": 200.0,
    }  # fmt: skip
    clock.now_ns = 5 * SECOND
    machine.boards[0].memory_utilization = 37
    machine.apply()
    assert source.gauges() == {**often, **slow}
    clock.now_ns += SECOND // 2
    assert source.gauges() == often, "what takes long is asked once a second"
    assert source.describe()["power_from"] == {"gpu0": "samples of the driver"}
    assert source.describe()["power_average_from"] == {"gpu0": "average field, GPU scope"}
    source.close()


@pytest.mark.parametrize(
    ("bits", "throttled", "capped"),
    [(0, 0, 0), (1, 0, 0), (4, 0, 1), (8, 1, 0), (0x20, 1, 0), (0x40, 1, 0), (0x80, 1, 0), (0x44, 1, 1)],
)
def test_reasons_for_low_clocks(machine: Machine, bits: int, throttled: int, capped: int) -> None:
    machine.boards[0].reasons = bits
    machine.apply()
    source = opened("0")
    values = source.gauges()  # type: ignore[attr-defined]
    assert (values["gpu0.throttled"], values["gpu0.power_capped"]) == (throttled, capped)
    source.close()


def test_an_unsupported_gauge_is_asked_once(machine: Machine) -> None:
    machine.boards[0].fail(unsupported("nvmlDeviceGetUtilizationRates"))
    source = opened("0")
    for _ in range(3):
        assert not any("utilization" in name for name in source.gauges())  # type: ignore[attr-defined]
    assert machine.calls["nvmlDeviceGetUtilizationRates"] == 2, "once for each of two gauges"
    source.close()


def test_an_old_driver_gives_power_and_temperature_the_old_way(machine: Machine) -> None:
    machine.boards[0].fail(unsupported("nvmlDeviceGetSamples", f"field:{pynvml.NVML_FI_DEV_POWER_INSTANT}"))
    machine.boards[0].fail(error(FUNCTION_NOT_FOUND, "nvmlDeviceGetTemperatureV"))
    source = opened("0")
    values = source.gauges()  # type: ignore[attr-defined]
    assert (values["gpu0.power_w"], values["gpu0.temperature_c"]) == (200.0, 51.0)
    said = source.describe()["power_from"]["gpu0"]  # type: ignore[attr-defined]
    assert said.startswith("nvmlDeviceGetPowerUsage, a mean of 1 s")
    integral = source.integrals["nvml_power:gpu0"]  # type: ignore[attr-defined]
    assert (integral.means, integral.relative_error) == (False, FIELD_ERROR)
    source.close()


def test_power_of_a_board_without_samples_is_of_the_instant(machine: Machine) -> None:
    machine.boards[0].fail(unsupported("nvmlDeviceGetSamples"))
    source = opened("0")
    assert source.gauges()["gpu0.power_w"] == 200.0  # type: ignore[attr-defined]
    assert source.describe()["power_from"] == {"gpu0": "instant field, GPU scope"}  # type: ignore[attr-defined]
    assert source.samples() == {} and source.gauges_interval_s == 0.0  # type: ignore[attr-defined]
    source.close()


def test_no_gauge_is_left_out_by_a_pass_that_comes_a_little_early(machine: Machine, clock: Clock) -> None:
    clock.now_ns = 10 * SECOND
    source = made(clock, "0")
    for _ in range(3):
        assert "gpu0.memory_used_bytes" in source.gauges()
        clock.now_ns += round((GAUGES_EVERY_S - 0.002) * SECOND)
    source.close()


def test_samples_are_the_means_that_the_driver_kept_on_our_clock(
    machine: Machine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: clock.now_ns + machine.wall_ns)
    machine.boards[0].draw(Square(100.0, 300.0, 0.4), 0)
    clock.now_ns = 10 * SECOND
    source = made(clock, "0")
    assert source.gauges_interval_s == GAUGES_EVERY_S and source.samples_interval_s == SAMPLED_EVERY_S
    points = source.samples()["gpu0.power_w"]
    assert len(points) == 119
    for t_ns, watts in points:
        assert t_ns % 20_000_000 == 0 and watts == machine.boards[0].power_w(t_ns - 10_000_000)
    assert clock.now_ns - 25_000_000 < points[-1][0] <= clock.now_ns
    assert source.samples() == {"gpu0.power_w": []}, "nothing new"
    clock.now_ns += SECOND // 5
    new = source.samples()["gpu0.power_w"]
    assert [t for t, _ in new] == [points[-1][0] + k * 20_000_000 for k in range(1, 11)]
    source.close()


def test_a_board_that_tells_the_power_of_its_module_only_is_a_module(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grace Hopper: then it holds the CPU and its memory, too."""
    machine.boards[0].module_scope = 1
    machine.apply()
    both = opened("0")
    assert both.domains["gpu0"].scope == "gpu", "a board that tells both is read as the GPU"
    both.close()
    values = pynvml.nvmlDeviceGetFieldValues

    def of_the_module(handle: object, asked: list[tuple[int, int]]) -> object:
        if asked[0][1] == pynvml.NVML_POWER_SCOPE_GPU:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return values(handle, asked)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetFieldValues", of_the_module)
    source = opened("0")
    integral = source.integrals["nvml_power:gpu0"]  # type: ignore[attr-defined]
    assert source.domains["gpu0"].scope == integral.scope == "module"
    assert source.gauges()["gpu0.power_average_w"] == 200.0  # type: ignore[attr-defined]
    assert source.describe()["power_average_from"] == {"gpu0": "average field, module scope"}  # type: ignore[attr-defined]
    source.close()


def test_a_calibration_undoes_gain_and_offset(
    machine: Machine, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "boards.json"
    file.write_text(json.dumps({"GPU-aaaa-1": {"gain": 0.8, "offset_w": 10.0}}))
    monkeypatch.setenv("LEM_KIT_CALIBRATION", str(file))
    monkeypatch.setattr(time, "time_ns", lambda: clock.now_ns + machine.wall_ns)
    clock.now_ns = 5 * SECOND
    source = made(clock)
    before = source.read()
    clock.now_ns += 10 * SECOND
    after = source.read()
    # The sensor shows 0.8 P + 10 W = 200 W.
    assert after["gpu0"].joules - before["gpu0"].joules == pytest.approx(200 / 0.8 * 10)
    assert source.domains["gpu0"].offset_w == pytest.approx(10 / 0.8), "taken off where energy is told"
    assert after["gpu1"].joules - before["gpu1"].joules == pytest.approx(100 * 10), "another board"
    assert source.samples()["gpu0.power_w"][-1][1] == pytest.approx((200 - 10) / 0.8)
    assert source.gauges()["gpu0.power_average_w"] == pytest.approx((200 - 10) / 0.8)
    gpus = source.describe()["gpus"]
    assert (gpus["gpu0"]["calibration"], gpus["gpu1"]["calibration"]) == ({"gain": 0.8, "offset_w": 10.0}, None)
    source.close()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"GPU-aaaa-1": 3}', '{"GPU-aaaa-1": {"gain": 9}}', '{"GPU-aaaa-1": {"gain": "x"}}']
)
def test_a_calibration_that_cannot_be_read_is_an_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "boards.json"
    file.write_text(text)
    for name in (file, tmp_path / "nothing.json"):
        monkeypatch.setenv("LEM_KIT_CALIBRATION", str(name))
        with pytest.raises(LemError, match=r'cannot be used: .*"gain": 1\.0'):
            opened()
    assert machine.sessions == 0


def test_another_process_on_the_board_is_remarked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {os.getpid(): os.getsid(0), 4242: 4242, 4243: os.getsid(0)}
    sid = os.getsid

    def getsid(pid: int) -> int:
        if pid in (0, os.getpid()):
            return sid(0)
        if pid not in others:
            raise ProcessLookupError
        return others[pid]

    monkeypatch.setattr(os, "getsid", getsid)
    source = opened("0")
    for pids, foreign in (
        ([], False), ([os.getpid()], False), ([os.getpid(), 4243], False), ([4242], True), ([os.getpid(), 4242], True),
        ([999_999], False), ([os.getpid(), 999_999], True),  # one that cannot be seen may be this process, two may not
    ):  # fmt: skip
        machine.boards[0].processes = [Process(pid) for pid in pids]
        machine.apply()
        assert source.remarks() == ({"gpu0": ["foreign_process"]} if foreign else {}), pids  # type: ignore[attr-defined]
    source.close()


def test_cuda_on_a_board_that_is_not_read_is_remarked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = ["aaaa-1"]
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: len(uuids),
        get_device_properties=lambda n: SimpleNamespace(uuid=uuids[n]),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    source = opened("0")
    assert source.remarks() == {}  # type: ignore[attr-defined]
    assert source.describe()["cuda_devices"] == {"cuda:0": "GPU-aaaa-1"}  # type: ignore[attr-defined]
    uuids[0] = "bbbb-2"
    assert source.remarks() == {"gpu0": ["other_gpu_in_use"]}  # type: ignore[attr-defined]
    source.close()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lost(), "gpu_lost"),
        (denied(), "no_permission"),
        (error(999, "nvmlDeviceGetTotalEnergyConsumption"), "source_failed"),
    ],
    ids=["lost", "denied", "unknown"],
)
def test_a_reading_that_fails_has_a_code(machine: Machine, fault: list[Fault], code: str) -> None:
    source = opened("0")
    machine.boards[0].fail(fault)
    with pytest.raises(SourceError, match=r"GPU 0 .* gave no energy reading") as caught:
        source.read_one("gpu0")  # type: ignore[attr-defined]
    assert caught.value.code == code and code in REASONS
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.read_one("gpu0")  # type: ignore[attr-defined]


def test_a_passing_fault_does_not_end_a_gauge(machine: Machine) -> None:
    source = opened("0")
    machine.boards[0].fail(error(pynvml.NVML_ERROR_TIMEOUT, "nvmlDeviceGetUtilizationRates"))
    assert "gpu0.sm_utilization" not in source.gauges()  # type: ignore[attr-defined]
    machine.boards[0].mend()
    assert source.gauges()["gpu0.sm_utilization"] == 0.75  # type: ignore[attr-defined]
    source.close()


def test_describe(machine: Machine) -> None:
    source = opened("1")
    facts = source.describe()  # type: ignore[attr-defined]
    assert facts["driver_version"] == "580.95.05"
    assert facts["gpus"]["gpu1"] == {
        "name": "NVIDIA Simulated A100",
        "uuid": "GPU-bbbb-2",
        "pci_bus_id": "00000000:02:00.0",
        "power_limit_w": 700.0,
        "persistence_mode": True,
        "mig_mode": False,
        "architecture": 9,
        "compute_capability": "9.0",
        "memory_bytes": 85_520_809_984,
        "pcie": "gen 5 x16",
        "nvlinks": 18,
        "calibration": None,
    }
    assert facts["topology"] == {} and facts["gain_error"] == 0.05
    assert facts["bystanders"] == ["GPU 0 (NVIDIA Simulated H100, GPU-aaaa-1)"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in facts["device_order"]
    source.close()


def test_nothing_but_cheap_calls_in_the_loop(machine: Machine, clock: Clock) -> None:
    source = made(clock, "0")
    clock.now_ns = 5 * SECOND
    often = {
        "nvmlDeviceGetTotalEnergyConsumption": 1, "nvmlDeviceGetSamples": 2, "nvmlDeviceGetTemperatureV": 1,
        "nvmlDeviceGetUtilizationRates": 1, "nvmlDeviceGetClockInfo": 1, "nvmlDeviceGetCurrentClocksEventReasons": 1,
    }  # fmt: skip
    once_a_second = {
        **often, "nvmlDeviceGetUtilizationRates": 2, "nvmlDeviceGetClockInfo": 2, "nvmlDeviceGetMemoryInfo": 1,
        "nvmlDeviceGetFieldValues": 1,
    }  # fmt: skip
    for expected in (once_a_second, often):
        machine.forget_calls()
        source.read_one("gpu0")
        source.gauges()
        source.samples()
        assert machine.calls == expected
        clock.now_ns += SECOND // 4
    source.close()


def test_boards_tell_how_they_are_connected(machine: Machine) -> None:
    source = opened()
    assert source.describe()["topology"] == {"gpu0-gpu1": "one NUMA node"}  # type: ignore[attr-defined]
    source.close()


def test_no_driver(machine: Machine) -> None:
    machine.init_error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    machine.apply()
    assert reason().startswith("NVML: no NVIDIA driver here")
    machine.init_error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    machine.apply()
    assert "does not answer" in reason()


def test_no_gpu_at_all(machine: Machine) -> None:
    machine.boards.clear()
    machine.apply()
    assert "no GPU" in reason()


def test_close_gives_the_library_back_once(machine: Machine) -> None:
    source = opened()
    assert machine.sessions == 1
    source.close()
    source.close()
    assert machine.sessions == 0
