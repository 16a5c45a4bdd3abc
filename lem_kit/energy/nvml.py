"""NVIDIA boards: the total-energy counter and the power of every GPU that this process may see.

The one idea: two figures for each board, from two roads out of the driver. `nvml:gpuN` is the counter of millijoules
(Volta and newer); whether a board has it is asked of the board, and whether it counts is seen. `nvml_power:gpuN` is the
integral of power: of the samples that the driver keeps (one every 20 ms on an H100, each a mean over the time since the
one before), or else of the power that it shows. `describe()["power_from"]` says which, because they differ: the "instant"
power of an A100 or H100 looks at 25 of every 100 ms, and nvmlDeviceGetPowerUsage is a mean of the last second on most. The
average field stands beside them as a gauge, `gpuN.power_average_w`; no energy is made of it.

`open_source("1,2")` chooses GPUs as CUDA_VISIBLE_DEVICES would, and takes its place; all must be there. LEM_KIT_CALIBRATION
names a JSON file {"GPU-...": {"gain": 0.95, "offset_w": -1.2}}: what that board's sensor shows is gain * true power +
offset_w.

Not covered: the share of one MIG instance (the hardware counts per board), fans and process lists in the loop (they hold
the driver's locks for milliseconds).
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..check import Check
from ..errors import LemError, Unavailable
from ..trace import Domain
from . import EnergySource, Reading, SourceError
from ._boards import Board, all_boards, chosen, foreign_processes, no_driver, or_none, order_remark, own_devices
from ._gpu_checks import checks

# The gain of a board's sensor is off by so much (Yang, Adamek and Armour, SC24: 5 % typical, 13 % at most). It is the same
# in every run on one board, so it is stated beside the interval and not in it.
GAIN_ERROR = 0.05
# Against the counter, integrals of samples were within 1 % on an H100, but off by up to 24 % under loads in step with the
# samples, as decoding can be.
SAMPLES_ERROR = 0.1
# The instant field looks at a quarter of the time: it showed 0.55 to 2.2 times the power of such loads (docs/gpu.md).
FIELD_ERROR = 1.2
GAUGES_EVERY_S = 1.0
SAMPLED_EVERY_S = 1.2  # how often a board is asked for the samples of its power that it keeps (2.4 s of them on an H100)
SLOW_INTERVAL_NS = 900_000_000  # less than the above, since a pass may come early by the time that the one before took
INSTALL = "pip install 'lem_kit[nvml]'"


def open_source(argument: str | None = None) -> EnergySource:
    """Open the boards that `argument`, or else CUDA_VISIBLE_DEVICES, names; all of them if neither is given."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise Unavailable("NVML: the package nvidia-ml-py is not installed", INSTALL) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        finding, remedy = no_driver(pynvml, error)
        raise Unavailable(f"NVML: {finding}", remedy) from None
    try:
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES") if argument is None else argument
        return NvmlSource(pynvml, wanted, strict=argument is not None)
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        raise Unavailable(f"NVML: the driver does not list its GPUs ({error})", "look at what `nvidia-smi` says") from None
    except BaseException:
        pynvml.nvmlShutdown()
        raise


def preflight(argument: str | None, sys_root: Path, least: tuple[int, int] | None) -> list[Check]:
    """What is to be said of driver and GPUs before an engine is started; of those that CUDA shows, whatever is read."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return [Check("GPU", "warning", "The package nvidia-ml-py is not installed.", INSTALL)]
    return checks(pynvml, sys_root, least)


def memory_used_bytes() -> dict[str, int]:
    """Of every board that answers, by UUID. The driver is asked for it alone, and let go of."""
    import pynvml

    pynvml.nvmlInit()
    try:
        boards, _ = all_boards(pynvml, {})
        asked = {board.uuid: or_none(pynvml, pynvml.nvmlDeviceGetMemoryInfo, board.handle) for board in boards}
    finally:
        pynvml.nvmlShutdown()
    return {uuid: int(memory.used) for uuid, memory in asked.items() if memory is not None}


class NvmlSource:
    """Counters, power and gauges of the chosen boards. `failures` holds a sentence for each that the last read missed."""

    name = "nvml"

    def __init__(
        self, nvml: Any, wanted: str | None, clock: Callable[[], int] = time.monotonic_ns, strict: bool = False
    ) -> None:
        self.domains: Mapping[str, Domain] = {}
        self.integrals: Mapping[str, Domain] = {}
        self.failures: dict[str, str] = {}
        self._nvml = nvml
        self._clock = clock
        self._open = True
        self._latest: dict[str, int] = {}  # time stamp of the newest sample of each board, us of the driver's clock
        self._slow_ns = 0
        everyone, skipped = all_boards(nvml, _calibrations())
        read, fault = chosen(nvml, everyone, wanted, strict)
        if fault:
            skipped["CUDA_VISIBLE_DEVICES"] = f"{wanted!r}: {fault}, and CUDA shows only what stands before it"
        self._boards = {f"gpu{board.number}": board for board, _ in read}
        self._ways = {(key, gauge): list(ways) for key in self._boards for gauge, ways in _GAUGES.items()}
        self.sampled = {key for key, board in self._boards.items() if _has_samples(nvml, board)}
        domains: dict[str, Domain] = {}
        integrals: dict[str, Domain] = {}
        for board, note in read:
            key = f"gpu{board.number}"
            counter, integral = self._describe_domains(key, board, note, skipped)
            domains |= {key: counter} if counter else {}
            integrals |= {f"nvml_power:{key}": integral} if integral else {}
        self.domains, self.integrals = domains, integrals
        if not domains and not integrals:
            raise Unavailable("NVML: " + ("; ".join(skipped.values()) or "the driver is here, but no GPU"))
        # Samples hold every instant, so the other gauges need not be asked so often; without them power must be.
        self.samples_interval_s = SAMPLED_EVERY_S
        self.gauges_interval_s = GAUGES_EVERY_S if len(self.sampled) == len(self._boards) else 0.0
        seen = {board.uuid for board, _ in read}
        self._facts: dict[str, Any] = {
            "driver_version": nvml.nvmlSystemGetDriverVersion(),
            "gpus": {key: _facts(nvml, board) for key, board in self._boards.items()},
            "topology": _topology(nvml, list(self._boards.values())),
            "bystanders": [str(board) for board in everyone if board.uuid not in seen],
            "skipped": skipped,
            "device_order": order_remark(everyone, wanted),
            "gain_error": GAIN_ERROR,
        }

    def _describe_domains(
        self, key: str, board: Board, note: str, skipped: dict[str, str]
    ) -> tuple[Domain | None, Domain | None]:
        nvml = self._nvml
        if not note and (or_none(nvml, nvml.nvmlDeviceGetMigMode, board.handle) or [0])[0]:
            note = "whole GPU, all its MIG instances"
        reasons = ("mig_parent_scope",) if note else ()
        limit_w = or_none(nvml, lambda handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, board.handle)
        label = f"{board.name} {board.uuid}" + (f" ({note})" if note else "")
        scope = "module" if _is_module(nvml, board.handle) else "gpu"
        counter = integral = None
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle)
            offset_w = board.offset_w / board.gain
            counter = Domain(scope, "counter", None, 0.001, 0.0, reasons, label, limit_w=limit_w, offset_w=offset_w)
        except nvml.NVMLError as error:
            skipped[key] = f"{board} has no energy counter that this process can read: {error}"
        if key in self.sampled or self._ask(key, "power_w") is not None:
            means = key in self.sampled
            relative, gauge = SAMPLES_ERROR if means else FIELD_ERROR, f"nvml:{key}.power_w"
            integral = Domain(scope, "integral", None, 0.001, relative, reasons, f"{label}, power", gauge, means, limit_w)
        return counter, integral

    def read(self) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        self.failures = {}
        for key in self.domains:
            try:
                readings[key] = self.read_one(key)
            except SourceError as error:
                self.failures[key] = str(error)
        if self.failures and not readings:
            raise SourceError("; ".join(self.failures.values()))
        if not self._boards:
            raise SourceError("NVML: this source is closed")
        return readings

    def read_one(self, domain: str) -> Reading:
        """The counter of one board."""
        board = self._boards.get(domain)
        if board is None:
            raise SourceError("NVML: this source is closed")
        began_ns = self._clock()
        try:
            joules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle) / 1000
        except self._nvml.NVMLError as error:
            raise SourceError(f"NVML: {board} gave no energy reading: {error}", _code(self._nvml, error)) from None
        now_ns = self._clock()
        return Reading(now_ns, joules / board.gain, now_ns - began_ns)

    def gauges(self) -> dict[str, float]:
        values: dict[str, float] = {}
        with_slow = self._clock() - self._slow_ns >= SLOW_INTERVAL_NS
        if with_slow:
            self._slow_ns = self._clock()
        for key, gauge in self._ways:
            if (gauge in _SLOW and not with_slow) or (gauge == "power_w" and key in self.sampled):
                continue
            value = self._ask(key, gauge)
            if value is not None:
                values[f"{key}.{gauge}"] = value
            if value is not None and gauge == "throttle_reasons":
                values[f"{key}.throttled"] = float(bool(int(value) & _THROTTLED))
                values[f"{key}.power_capped"] = float(bool(int(value) & _POWER_CAPPED))
        return values

    def _ask(self, key: str, gauge: str) -> float | None:
        ways, board = self._ways[key, gauge], self._boards[key]
        while ways:
            try:
                value = ways[0](self._nvml, board.handle)
            except (self._nvml.NVMLError, AttributeError) as error:
                if not _will_never_work(self._nvml, error):
                    return None
                del ways[0]  # a dead query must not be asked every time
            else:
                return (value - board.offset_w) / board.gain if gauge.startswith("power") else value
        return None

    def samples(self) -> dict[str, list[tuple[int, float]]]:
        """Power since the last call, W. The driver stamps them with the wall clock, which is set against ours here."""
        found: dict[str, list[tuple[int, float]]] = {}
        for key in self.sampled & self._boards.keys():
            board = self._boards[key]
            offset_ns = self._clock() - time.time_ns()
            points = _read_samples(self._nvml, board.handle, self._latest.get(key, 0))
            if points:
                self._latest[key] = points[-1][0]
            found[f"{key}.power_w"] = [
                (us * 1000 + offset_ns, (watts - board.offset_w) / board.gain) for us, watts in points
            ]
        return found

    def describe(self) -> dict[str, Any]:
        power_from, average_from = (
            {key: _POWER_NAMES[ways[0]] if (ways := self._ways[key, gauge]) else "nothing" for key in self._boards}
            for gauge in ("power_w", "power_average_w")
        )
        power_from |= dict.fromkeys(self.sampled, "samples of the driver")
        return {**self._facts, "power_from": power_from, "power_average_from": average_from, "cuda_devices": own_devices()}

    def remarks(self) -> dict[str, list[str]]:
        """Other processes on a board, and a CUDA device in use that is not among the boards read."""
        found: dict[str, list[str]] = {}
        for key, board in self._boards.items():
            if foreign_processes(self._nvml, board.handle):
                found[key] = ["foreign_process"]
        uuids = {board.uuid for board in self._boards.values()}
        if any(uuid not in uuids for uuid in own_devices().values()):
            for key in self._boards:
                found.setdefault(key, []).append("other_gpu_in_use")
        return found

    def close(self) -> None:
        if self._open:
            self._open = False
            self._boards, self._ways, self.sampled = {}, {}, set()
            self._nvml.nvmlShutdown()


def _calibrations() -> dict[str, tuple[float, float]]:
    """(gain, offset in W) by UUID from the file that LEM_KIT_CALIBRATION names. LemError if it cannot be read as such."""
    name = os.environ.get("LEM_KIT_CALIBRATION")
    if not name:
        return {}
    try:
        entries = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
        found = {str(uuid): (float(e.get("gain", 1.0)), float(e.get("offset_w", 0.0))) for uuid, e in entries.items()}
        if any(not 0.5 < gain < 2.0 for gain, _ in found.values()):
            raise ValueError("a gain lies outside 0.5 to 2")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise LemError(
            f'LEM_KIT_CALIBRATION={name} cannot be used: {error}. It holds {{"GPU-uuid": {{"gain": 1.0, "offset_w": 0.0}}}}.'
        ) from None
    return found


def _facts(nvml: Any, board: Board) -> dict[str, Any]:
    questions: dict[str, Callable[[Any], Any]] = {
        "pci_bus_id": lambda handle: nvml.nvmlDeviceGetPciInfo(handle).busId,
        "power_limit_w": lambda handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "persistence_mode": lambda handle: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "mig_mode": lambda handle: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "architecture": nvml.nvmlDeviceGetArchitecture,
        "compute_capability": lambda handle: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "memory_bytes": lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "pcie": lambda handle: (
            f"gen {nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)} x{nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)}"
        ),
        "nvlinks": lambda handle: sum(or_none(nvml, _link(nvml, n), handle) == 1 for n in range(nvml.NVML_NVLINK_MAX_LINKS)),
    }
    answers = {fact: or_none(nvml, ask, board.handle) for fact, ask in questions.items()}
    calibration = {"gain": board.gain, "offset_w": board.offset_w} if (board.gain, board.offset_w) != (1.0, 0.0) else None
    return {"name": board.name, "uuid": board.uuid, **answers, "calibration": calibration}


def _link(nvml: Any, number: int) -> Callable[[Any], Any]:
    return lambda handle: nvml.nvmlDeviceGetNvLinkState(handle, number)


def _topology(nvml: Any, boards: Sequence[Board]) -> dict[str, str]:
    """How far the path between two boards goes: "gpu0-gpu1": "same board" ... "across the system"."""
    names = {0: "same board", 10: "one PCIe switch", 20: "several PCIe switches", 30: "one host bridge", 40: "one NUMA node"}
    found = {}
    for i, a in enumerate(boards):
        for b in boards[i + 1 :]:
            try:
                level = nvml.nvmlDeviceGetTopologyCommonAncestor(a.handle, b.handle)
            except (nvml.NVMLError, AttributeError):
                continue
            found[f"gpu{a.number}-gpu{b.number}"] = names.get(level, "across the system")
    return found


def _code(nvml: Any, error: Exception) -> str:
    codes = {nvml.NVML_ERROR_GPU_IS_LOST: "gpu_lost", nvml.NVML_ERROR_NO_PERMISSION: "no_permission"}
    return codes.get(getattr(error, "value", None), "source_failed")


def _will_never_work(nvml: Any, error: Exception) -> bool:
    """Whether a query fails for good: the board, the driver, the package or the user's rights lack it."""
    codes = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_PERMISSION", "INVALID_ARGUMENT", "ARGUMENT_VERSION_MISMATCH")
    never = {getattr(nvml, f"NVML_ERROR_{code}") for code in codes}
    return isinstance(error, AttributeError) or getattr(error, "value", None) in never


def _field(nvml: Any, handle: Any, field: int, scope: int) -> Any:
    found = nvml.nvmlDeviceGetFieldValues(handle, [(field, scope)])[0]
    if found.nvmlReturn != nvml.NVML_SUCCESS:  # each field has its own verdict; the call itself succeeds regardless
        raise nvml.NVMLError(found.nvmlReturn)
    return found.value.uiVal


def _power_instant_w(nvml: Any, handle: Any) -> float:
    return float(_field(nvml, handle, nvml.NVML_FI_DEV_POWER_INSTANT, nvml.NVML_POWER_SCOPE_GPU) / 1000)


def _power_module_w(nvml: Any, handle: Any) -> float:
    return float(_field(nvml, handle, nvml.NVML_FI_DEV_POWER_INSTANT, nvml.NVML_POWER_SCOPE_MODULE) / 1000)


def _average_w(nvml: Any, handle: Any) -> float:
    return float(_field(nvml, handle, nvml.NVML_FI_DEV_POWER_AVERAGE, nvml.NVML_POWER_SCOPE_GPU) / 1000)


def _average_module_w(nvml: Any, handle: Any) -> float:
    return float(_field(nvml, handle, nvml.NVML_FI_DEV_POWER_AVERAGE, nvml.NVML_POWER_SCOPE_MODULE) / 1000)


def _power_usage_w(nvml: Any, handle: Any) -> float:
    return float(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)


_POWER_NAMES: Mapping[Callable[[Any, Any], float], str] = {
    _power_instant_w: "instant field, GPU scope",
    _power_module_w: "instant field, module scope",
    _power_usage_w: "nvmlDeviceGetPowerUsage, a mean of 1 s on Ampere and later",
    _average_w: "average field, GPU scope",
    _average_module_w: "average field, module scope",
}


def _is_module(nvml: Any, handle: Any) -> bool:
    """Whether power is told for the module only (Grace Hopper): then it holds the CPU and its memory, too."""
    return or_none(nvml, lambda h: _power_instant_w(nvml, h), handle) is None and (
        or_none(nvml, lambda h: _power_module_w(nvml, h), handle) is not None
    )


def _has_samples(nvml: Any, board: Board) -> bool:
    """Whether the driver keeps samples of power, dense enough to be worth more than asking for power."""
    points = _read_samples(nvml, board.handle, 0)
    if len(points) < 5:
        return False
    return (points[-1][0] - points[0][0]) / (len(points) - 1) < 60_000  # us


def _read_samples(nvml: Any, handle: Any, after_us: int) -> list[tuple[int, float]]:
    """(driver's time stamp in us, W) of the samples newer than `after_us`; empty where the driver keeps none."""
    try:
        kind, found = nvml.nvmlDeviceGetSamples(handle, nvml.NVML_TOTAL_POWER_SAMPLES, after_us)
    except (nvml.NVMLError, AttributeError):  # "not found" when there is nothing new
        return []
    # At once out of its memory: there are 50 a second and board, and nvidia-ml-py's fields take five times as long.
    unpack = struct.Struct("=Qd" if kind == nvml.NVML_VALUE_TYPE_DOUBLE else "=QI4x").unpack_from
    return [(us, milliwatts / 1000) for us, milliwatts in map(unpack, found) if us > after_us]


# Asked once a second: the first takes up to 8 ms on a busy board, the last is a mean of 1 s, the others change little.
_SLOW = ("memory_used_bytes", "memory_utilization", "memory_clock_hz", "power_average_w")
# Bits of the reasons for low clocks that slow a board down against the user's will: hardware, heat, power brake.
_THROTTLED = 0x8 | 0x20 | 0x40 | 0x80
_POWER_CAPPED = 0x4


# What to read beside the counter, and how: the ways are tried in order and the first that the driver knows is kept. The
# second ones serve older drivers, which lack the first. No process lists and no fan here: they take the driver's locks.
_GAUGES: Mapping[str, tuple[Callable[[Any, Any], float], ...]] = {
    "power_w": (_power_instant_w, _power_module_w, _power_usage_w),
    "power_average_w": (_average_w, _average_module_w),
    "temperature_c": (
        lambda n, h: float(n.nvmlDeviceGetTemperatureV(h, n.NVML_TEMPERATURE_GPU)),
        lambda n, h: float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
    ),
    "sm_utilization": (lambda n, h: n.nvmlDeviceGetUtilizationRates(h).gpu / 100,),
    "sm_clock_hz": (lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM) * 1e6,),
    "memory_used_bytes": (lambda n, h: float(n.nvmlDeviceGetMemoryInfo(h).used),),
    "memory_utilization": (lambda n, h: n.nvmlDeviceGetUtilizationRates(h).memory / 100,),
    "memory_clock_hz": (lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM) * 1e6,),
    "throttle_reasons": (
        lambda n, h: float(n.nvmlDeviceGetCurrentClocksEventReasons(h)),
        lambda n, h: float(n.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
    ),
}
