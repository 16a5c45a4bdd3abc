"""The NVML source: real nvidia-ml-py above, a simulated driver library below, every joule known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_nvml import FUNCTION_NOT_FOUND, Board, Const, Fault, Machine, Mig, boards, denied, error, lost, reset, unsupported

from lem_kit.energy import EnergySource, open_source
from lem_kit.energy.nvml import NvmlSource
from lem_kit.errors import LemError, Unavailable

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


def reason(argument: str | None = None) -> str:
    with pytest.raises(Unavailable) as caught:
        opened(argument)
    return str(caught.value)


def test_the_counter_is_a_staircase_of_joules(machine: Machine, clock: Clock) -> None:
    pynvml.nvmlInit()
    source = NvmlSource(pynvml, None, clock)
    assert {k: tuple(v) for k, v in source.read().items()} == {"gpu0": (0, 1000.0), "gpu1": (0, 1000.0)}
    clock.now_ns = 99_000_000
    assert source.read()["gpu0"].joules == 1000.0
    clock.now_ns = 2 * SECOND + 50_000_000
    assert source.read()["gpu0"] == (clock.now_ns, 1400.0)
    assert source.read()["gpu1"] == (clock.now_ns, 1200.0)
    source.close()


def test_domains_say_what_they_are(machine: Machine) -> None:
    source = opened()
    domain = source.domains["gpu1"]
    assert (domain.scope, domain.method, domain.refresh_s, domain.resolution_j) == ("gpu", "counter", None, 0.001)
    assert domain.label == "NVIDIA Simulated A100 GPU-bbbb-2"
    source.close()


@pytest.mark.parametrize(
    ("visible", "domains"),
    [
        ("0,1", ["gpu0", "gpu1"]),
        ("1", ["gpu1"]),
        (" 1 , 0 ", ["gpu1", "gpu0"]),
        ("0,0", ["gpu0"]),
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


@pytest.mark.parametrize("visible", ["2", "banana", "GPU-", "GPU-cccc", "MIG-unknown", "0,7"])
def test_a_wrong_device_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert repr(visible.split(",")[-1]) in reason()


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
    source.close()


@pytest.mark.parametrize("fault", [unsupported(), denied()], ids=["unsupported", "denied"])
def test_a_board_without_counter_is_left_out_with_its_reason(machine: Machine, fault: list[Fault]) -> None:
    machine.boards[0].fail(fault)
    source = opened()
    assert list(source.domains) == list(source.read()) == ["gpu1"]
    assert "GPU-aaaa-1" in source.describe()["skipped"]["gpu0"]  # type: ignore[attr-defined]
    source.close()
    machine.boards[1].fail(fault)
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


def test_gauges(machine: Machine) -> None:
    source = opened("0")
    assert source.gauges() == {  # type: ignore[attr-defined]
        "gpu0.power_w": 200.0,
        "gpu0.temperature_c": 51.0,
        "gpu0.sm_utilization": 0.75,
        "gpu0.sm_clock_hz": 1.98e9,
        "gpu0.memory_used_bytes": 3 * 2**30,
        "gpu0.throttle_reasons": 4.0,
    }
    assert source.describe()["instantaneous_power_gauge"] == ["gpu0"]  # type: ignore[attr-defined]
    source.close()


def test_an_unsupported_gauge_is_asked_once(machine: Machine) -> None:
    machine.boards[0].fail(unsupported("nvmlDeviceGetUtilizationRates"))
    source = opened("0")
    for _ in range(3):
        assert "gpu0.sm_utilization" not in source.gauges()  # type: ignore[attr-defined]
    assert machine.calls["nvmlDeviceGetUtilizationRates"] == 1
    source.close()


def test_an_old_driver_gives_power_and_temperature_the_old_way(machine: Machine) -> None:
    machine.boards[0].fail(unsupported(f"field:{pynvml.NVML_FI_DEV_POWER_INSTANT}"))
    machine.boards[0].fail(error(FUNCTION_NOT_FOUND, "nvmlDeviceGetTemperatureV"))
    source = opened("0")
    source.gauges()  # type: ignore[attr-defined]
    values = source.gauges()  # type: ignore[attr-defined]
    assert (values["gpu0.power_w"], values["gpu0.temperature_c"]) == (200.0, 51.0)
    assert source.describe()["instantaneous_power_gauge"] == []  # type: ignore[attr-defined]
    source.close()


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
        "compute_capability": "9.0",
    }
    assert facts["bystanders"] == ["GPU 0 (NVIDIA Simulated H100, GPU-aaaa-1)"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in facts["device_order"]
    source.close()


def test_nothing_but_cheap_calls_in_the_loop(machine: Machine) -> None:
    source = opened("0")
    machine.forget_calls()
    source.read()
    source.gauges()  # type: ignore[attr-defined]
    assert machine.calls == {
        "nvmlDeviceGetTotalEnergyConsumption": 1,
        "nvmlDeviceGetFieldValues": 1,
        "nvmlDeviceGetTemperatureV": 1,
        "nvmlDeviceGetUtilizationRates": 1,
        "nvmlDeviceGetClockInfo": 1,
        "nvmlDeviceGetMemoryInfo": 1,
        "nvmlDeviceGetCurrentClocksEventReasons": 1,
    }
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
