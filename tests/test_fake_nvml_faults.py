"""The simulated boards: what is wrong with them, what they are, what calls cost."""

from __future__ import annotations

import time

import pytest
from conftest import FakeClock
from fake_nvml import (
    DENIED,
    FUNCTION_NOT_FOUND,
    LOST,
    UNSUPPORTED,
    Const,
    Latency,
    Machine,
    Mig,
    Process,
    back,
    boards,
    denied,
    error,
    frozen,
    garbage,
    h100,
    library,
    lost,
    reset,
    slow,
    spike,
    unsupported,
    wrap32,
    zero,
)

pynvml = pytest.importorskip("pynvml")

from fake_nvml.ask import code, counter_j, field, handle, power_w  # noqa: E402

SECOND = 1_000_000_000


def test_a_reset_starts_again_at_zero(nvml: Machine, clock: FakeClock) -> None:
    clock.advance(0.05)
    nvml.boards[0].fail(reset())
    assert counter_j() == 0.0
    clock.advance(0.3)
    assert counter_j() == pytest.approx(200 * 0.25)  # from the reset to the last refresh


def test_a_counter_that_goes_back(nvml: Machine, clock: FakeClock) -> None:
    before = counter_j()
    nvml.boards[0].fail(back(50))
    assert counter_j() == before - 50
    clock.advance(1)
    assert counter_j() == before + 150


def test_a_counter_of_32_bits_wraps(nvml: Machine, clock: FakeClock) -> None:
    nvml.boards[0].fail(wrap32(clock.now_ns + SECOND), from_ns=0)
    assert counter_j() == 2**32 / 1000 - 200
    clock.advance(1.5)
    assert counter_j() == 100.0


def test_frozen_sensors_stand_still_until_mended(nvml: Machine, clock: FakeClock) -> None:
    board = nvml.boards[1]
    before = counter_j(1), power_w(186, 1)
    fault = board.fail(frozen("counter"))
    clock.advance(0.51)
    assert counter_j(1) == before[0] and power_w(186, 1) != before[1]
    board.fail(frozen("power"))
    power = power_w(186, 1), power_w(185, 1)
    clock.advance(0.4)
    assert (power_w(186, 1), power_w(185, 1)) == power and counter_j(1) == before[0]
    board.mend(fault)
    clock.advance(0.1)
    assert counter_j(1) == pytest.approx(before[0] + board.energy_j(1000 * SECOND, 1001 * SECOND), abs=0.002)


def test_a_lost_gpu_answers_nothing_and_comes_back(nvml: Machine, clock: FakeClock) -> None:
    gpu = handle()
    nvml.boards[0].fail(lost())
    for function in (pynvml.nvmlDeviceGetTotalEnergyConsumption, pynvml.nvmlDeviceGetName, pynvml.nvmlDeviceGetPowerUsage):
        assert code(function, gpu) == LOST
    assert code(handle, 0) == LOST
    assert counter_j(1) > 0
    nvml.boards[0].mend()
    assert code(handle, 7) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert counter_j() == 1000 + 200 * 1000


def test_a_fault_can_be_planned(nvml: Machine, clock: FakeClock) -> None:
    nvml.boards[0].fail(error(pynvml.NVML_ERROR_TIMEOUT, "*"), clock.now_ns + SECOND, clock.now_ns + 2 * SECOND)
    gpu = handle()
    seen = []
    for _ in range(4):
        try:
            seen.append(pynvml.nvmlDeviceGetPowerUsage(gpu))
        except pynvml.NVMLError as fault:
            seen.append(str(fault))
        clock.advance(0.6)
    assert seen == [200_000, 200_000, "Timeout", "Timeout"]


def test_rights_support_and_missing_functions(nvml: Machine) -> None:
    board = nvml.boards[0]
    board.fail(denied())
    assert code(counter_j) == DENIED and field(83).nvmlReturn == field(191).nvmlReturn == DENIED
    assert power_w(186) == 200.0
    board.fail(unsupported("field:186"))
    assert field(186).nvmlReturn == UNSUPPORTED
    board.fail(error(FUNCTION_NOT_FOUND, "nvmlDeviceGetTemperatureV"))
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        pynvml.nvmlDeviceGetTemperatureV(handle(), 0)
    assert pynvml.nvmlDeviceGetTemperature(handle(), 0) == 40
    assert code(pynvml.nvmlDeviceSetPowerManagementLimit, handle(), 300_000) == DENIED


def test_absurd_readings(nvml: Machine, clock: FakeClock) -> None:
    board = nvml.boards[0]
    spiked = board.fail(spike())
    assert power_w(186) == power_w(185) == pynvml.nvmlDeviceGetPowerUsage(handle()) / 1000 == 1e6
    board.mend(spiked)
    clock.advance(0.1)
    assert power_w(186) == 200.0
    board.fail(zero("power"))
    board.fail(zero("counter"))
    assert (power_w(186), counter_j()) == (0.0, 0.0)
    board.fail(garbage("power"))
    board.fail(garbage("counter"))
    assert (round(1000 * power_w(186)), round(field(83).value.ullVal)) == (2**32 - 1, 2**64 - 1)


def test_a_slow_call_takes_its_time(nvml: Machine, clock: FakeClock) -> None:
    nvml.boards[0].fail(slow("nvmlDeviceGetTotalEnergyConsumption", 0.3))
    joules = counter_j()
    assert clock.now_ns == 1000 * SECOND + 300_000_000
    assert joules == 1000 + 200 * 1000.1  # read half-way through the call, at 1000.15 s


@pytest.mark.parametrize("spins", [True, False])
def test_calls_cost_time_on_the_real_clock(spins: bool) -> None:
    cost = Latency("nvmlDeviceGetTotalEnergyConsumption", 0.003, 0.004, 0.005, 0.006, 0.006, spins)
    with boards([h100(latencies=(cost,), wave=Const(50.0))]):
        pynvml.nvmlInit()
        gpu = handle()
        began, burnt = time.perf_counter(), time.thread_time()
        for _ in range(5):
            pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        assert time.perf_counter() - began >= 0.015
        assert (time.thread_time() - burnt > 0.006) is spins
        pynvml.nvmlShutdown()


def test_mig_instances_have_a_parent_and_no_energy(nvml: Machine) -> None:
    nvml.boards[1].mig_mode, nvml.boards[1].migs = 1, (Mig("MIG-a", 7, 0, 1), Mig("MIG-b", 8, 0, 2, 20 * 2**30))
    nvml.apply()
    assert pynvml.nvmlDeviceGetMigMode(handle(1)) == [1, 1] and pynvml.nvmlDeviceGetMigMode(handle(0)) == [0, 0]
    instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle(1), 1)
    assert pynvml.nvmlDeviceGetUUID(instance) == "MIG-b" and pynvml.nvmlDeviceGetGpuInstanceId(instance) == 8
    assert pynvml.nvmlDeviceGetName(instance) == "NVIDIA H100 80GB HBM3 MIG 2g.20gb"
    parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(pynvml.nvmlDeviceGetHandleByUUID("MIG-a"))
    assert pynvml.nvmlDeviceGetIndex(parent) == 1
    assert code(pynvml.nvmlDeviceGetTotalEnergyConsumption, instance) == UNSUPPORTED
    assert code(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle(1), 2) == pynvml.NVML_ERROR_NOT_FOUND
    assert code(pynvml.nvmlDeviceGetHandleByUUID, "MIG-c") == pynvml.NVML_ERROR_NOT_FOUND


def test_what_a_board_is(nvml: Machine) -> None:
    nvml.boards[0].processes = (Process(17, 5 * 2**30), Process(18, graphics=True))
    nvml.apply()
    gpu = handle()
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByPciBusId("0000:02:00.0")) == 1
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(handle(1)))) == 1
    pci = pynvml.nvmlDeviceGetPciInfo(handle(1))
    assert (pci.busId, pci.busIdLegacy, pci.bus) == ("00000000:02:00.0", "0000:02:00.0", 2)
    assert pynvml.nvmlDeviceGetCudaComputeCapability(gpu) == (9, 0)
    assert pynvml.nvmlDeviceGetArchitecture(gpu) == pynvml.NVML_DEVICE_ARCH_HOPPER
    assert pynvml.nvmlDeviceGetPowerManagementLimitConstraints(gpu) == [200_000, 700_000]
    old, new = pynvml.nvmlDeviceGetMemoryInfo(gpu), pynvml.nvmlDeviceGetMemoryInfo(gpu, pynvml.nvmlMemory_v2)
    assert old.total == new.total == new.free + new.used + new.reserved and old.used == new.used + new.reserved
    assert [(p.pid, p.usedGpuMemory) for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)] == [(17, 5 * 2**30)]
    assert [p.pid for p in pynvml.nvmlDeviceGetGraphicsRunningProcesses(gpu)] == [18]
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle(1)) == []
    assert pynvml.nvmlDeviceGetTopologyCommonAncestor(gpu, handle(1)) == pynvml.NVML_TOPOLOGY_NODE
    assert pynvml.nvmlDeviceGetNvLinkState(gpu, 17) == 1
    assert pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM) == 1980
    assert pynvml.nvmlDeviceGetSupportedMemoryClocks(gpu) == [2619]
    assert pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu == 100
    assert pynvml.nvmlSystemGetDriverVersion() == "580.95.05"
    assert pynvml.nvmlDeviceGetTemperatureV(gpu, pynvml.NVML_TEMPERATURE_GPU) == 40


def test_calls_are_counted_and_need_a_session(nvml: Machine) -> None:
    gpu = handle()
    nvml.forget_calls()
    pynvml.nvmlDeviceGetPowerUsage(gpu)
    pynvml.nvmlDeviceGetPowerUsage(gpu)
    assert nvml.calls == {"nvmlDeviceGetPowerUsage": 2}
    pynvml.nvmlShutdown()
    assert nvml.sessions == 0
    assert code(pynvml.nvmlDeviceGetPowerUsage, gpu) == pynvml.NVML_ERROR_UNINITIALIZED
    nvml.init_error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    nvml.apply()
    assert code(pynvml.nvmlInit) == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    nvml.init_error = 0
    nvml.apply()
    pynvml.nvmlInit()


def test_without_boards_there_is_no_driver() -> None:
    library().fake_nvml_clear()
    assert library().nvmlInit_v2() == pynvml.NVML_ERROR_DRIVER_NOT_LOADED


def test_a_wrong_description_is_refused(nvml: Machine) -> None:
    nvml.boards[0].name = "x" * 200
    with pytest.raises(ValueError, match="xxx"):
        nvml.apply()
    nvml.boards[0].name = "short"
    nvml.apply()
    assert pynvml.nvmlDeviceGetName(handle()) == "short"
