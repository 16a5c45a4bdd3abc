"""NVIDIA boards: the total-energy counter of every GPU that this process may see.

The one idea: the driver counts millijoules for each board since it was loaded (Volta and newer). Whether a board has the
counter is asked of the board, never guessed from its name. The counter is refreshed every 20 to 100 ms, at instants that
nobody states, so `refresh_s` is None and its jumps are watched instead.

`open_source("1,2")` chooses GPUs as CUDA_VISIBLE_DEVICES would, and takes its place.

Not covered: the share of one MIG instance (the hardware counts per board), the sensor's gain and offset, and boards
without the counter (Pascal and older, most vGPUs, Jetson), which are left out with their reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import LemError, Unavailable
from ..trace import Domain
from . import EnergySource, Reading


def open_source(argument: str | None = None) -> EnergySource:
    """Open the boards that `argument`, or else CUDA_VISIBLE_DEVICES, names; all of them if neither is given."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise Unavailable("NVML: the package nvidia-ml-py is not installed: pip install 'lem_kit[nvml]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unavailable(_no_driver(pynvml, error)) from None
    try:
        return NvmlSource(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES") if argument is None else argument)
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        raise Unavailable(f"NVML: the driver does not list its GPUs ({error}): look at what `nvidia-smi` says") from None
    except BaseException:
        pynvml.nvmlShutdown()
        raise


def _no_driver(nvml: Any, error: Exception) -> str:
    if isinstance(error, nvml.NVMLError_LibraryNotFound):
        return (
            "NVML: no NVIDIA driver here (libnvidia-ml.so.1 is not found). "
            "If the machine has an NVIDIA GPU: `nvidia-smi`; in a container: start it with --gpus all"
        )
    return f"NVML: the NVIDIA driver does not answer ({error}): look at what `nvidia-smi` says, or sudo modprobe nvidia"


class _Board(NamedTuple):
    number: int  # in NVML's order, that of the PCI bus, which need not be CUDA's
    handle: Any
    name: str
    uuid: str

    def __str__(self) -> str:
        return f"GPU {self.number} ({self.name}, {self.uuid})"


class NvmlSource:
    """Counters and gauges of the chosen boards. `failures` holds a sentence for each board that the last read missed."""

    name = "nvml"

    def __init__(self, nvml: Any, wanted: str | None, clock: Callable[[], int] = time.monotonic_ns) -> None:
        domains: dict[str, Domain] = {}
        self.domains: Mapping[str, Domain] = domains
        self.failures: dict[str, str] = {}
        self._nvml = nvml
        self._clock = clock
        self._boards: dict[str, _Board] = {}
        self._open = True
        everyone, skipped = _boards(nvml)
        chosen = _choose(nvml, everyone, wanted)
        for board, note in chosen:
            key = f"gpu{board.number}"
            try:
                nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle)
            except nvml.NVMLError as error:
                skipped[key] = f"{board} has no energy counter that this process can read: {error}"
                continue
            self._boards[key] = board
            if not note and (_or_none(nvml, nvml.nvmlDeviceGetMigMode, board.handle) or [0])[0]:
                note = "whole GPU, all its MIG instances"
            label = f"{board.name} {board.uuid}" + (f" ({note})" if note else "")
            domains[key] = Domain("gpu", "counter", refresh_s=None, resolution_j=0.001, label=label)
        if not self._boards:
            raise Unavailable("NVML: " + ("; ".join(skipped.values()) or "the driver is here, but no GPU"))
        self._ways = {(key, gauge): list(ways) for key in self._boards for gauge, ways in _GAUGES.items()}
        seen = {board.uuid for board, _ in chosen}
        self._facts: dict[str, Any] = {
            "driver_version": nvml.nvmlSystemGetDriverVersion(),
            "gpus": {key: _facts(nvml, board) for key, board in self._boards.items()},
            "bystanders": [str(board) for board in everyone if board.uuid not in seen],
            "skipped": skipped,
            "device_order": _order_remark(everyone, wanted),
        }

    def read(self) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        self.failures = {}
        for key, board in self._boards.items():
            try:
                millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle)
            except self._nvml.NVMLError as error:
                self.failures[key] = f"NVML: {board} gave no energy reading: {error}"
            else:
                readings[key] = Reading(self._clock(), millijoules / 1000)
        if not readings:
            raise LemError("; ".join(self.failures.values()) or "NVML: this source is closed")
        return readings

    def gauges(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for (key, gauge), ways in self._ways.items():
            if key in self.failures or not ways:
                continue
            try:
                values[f"{key}.{gauge}"] = ways[0](self._nvml, self._boards[key].handle)
            except (self._nvml.NVMLError, AttributeError) as error:
                if _will_never_work(self._nvml, error):
                    del ways[0]  # the next tick takes the next way, or none: a dead query must not be asked every tick
        return values

    def describe(self) -> dict[str, Any]:
        instant = [key for key in self._boards if self._ways[key, "power_w"][:1] == [_power_instant_w]]
        return {**self._facts, "instantaneous_power_gauge": instant}

    def close(self) -> None:
        if self._open:
            self._open = False
            self._boards, self._ways = {}, {}
            self._nvml.nvmlShutdown()


def _boards(nvml: Any) -> tuple[list[_Board], dict[str, str]]:
    """Every board that answers, and why the others do not: one dead GPU must not hide its neighbours."""
    boards: list[_Board] = []
    silent: dict[str, str] = {}
    for number in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            boards.append(_Board(number, handle, nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)))
        except nvml.NVMLError as error:
            silent[f"gpu{number}"] = f"GPU {number} does not answer: {error}"
    return boards, silent


def _choose(nvml: Any, boards: Sequence[_Board], wanted: str | None) -> list[tuple[_Board, str]]:
    """The boards that a CUDA_VISIBLE_DEVICES of `wanted` leaves visible, each with a note for its label."""
    if wanted is None:
        return [(board, "") for board in boards]
    chosen: dict[str, tuple[_Board, str]] = {}
    for name in (part.strip() for part in wanted.split(",")):
        if name in ("", "-1"):
            break  # CUDA sees nothing from the first invalid entry on; these two are used on purpose
        board, note = _named(nvml, boards, name)
        chosen[board.uuid] = (board, note)
    if not chosen:
        raise Unavailable(f"NVML: CUDA_VISIBLE_DEVICES={wanted!r} hides every GPU: unset CUDA_VISIBLE_DEVICES")
    return list(chosen.values())


def _named(nvml: Any, boards: Sequence[_Board], name: str) -> tuple[_Board, str]:
    is_mig = name.startswith("MIG-")
    uuid = _parent_uuid(nvml, name) if is_mig else name
    if name.isdecimal():
        found = [board for board in boards if board.number == int(name)]
    else:
        found = [board for board in boards if uuid.startswith("GPU-") and board.uuid.startswith(uuid)]
    if len(found) == 1:
        return found[0], "parent GPU, not this instance" if is_mig else ""
    fault = f"fits {len(found)} GPUs" if found else "names no GPU that answers"
    raise Unavailable(f"NVML: {name!r} (in CUDA_VISIBLE_DEVICES) {fault}: `nvidia-smi -L` lists them")


def _parent_uuid(nvml: Any, name: str) -> str:
    """The board of a MIG instance: "MIG-<uuid>", or "MIG-GPU-<uuid>/<instance>/<instance>" with drivers before 470."""
    if name.startswith("MIG-GPU-"):
        return name.removeprefix("MIG-").partition("/")[0]
    try:
        instance = nvml.nvmlDeviceGetHandleByUUID(name)
        return str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)))
    except nvml.NVMLError:
        return ""


def _order_remark(boards: Sequence[_Board], wanted: str | None) -> str:
    order = os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    by_number = wanted is not None and wanted.strip()[:1].isdecimal()
    if by_number and order != "PCI_BUS_ID" and len({board.name for board in boards}) > 1:
        return (
            "GPU numbers were taken in PCI bus order, but CUDA numbers the fastest first: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return "PCI bus"


def _facts(nvml: Any, board: _Board) -> dict[str, Any]:
    questions: dict[str, Callable[[Any], Any]] = {
        "pci_bus_id": lambda handle: nvml.nvmlDeviceGetPciInfo(handle).busId,
        "power_limit_w": lambda handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "persistence_mode": lambda handle: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "compute_capability": lambda handle: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
    }
    answers = {fact: _or_none(nvml, ask, board.handle) for fact, ask in questions.items()}
    return {"name": board.name, "uuid": board.uuid, **answers}


def _or_none(nvml: Any, ask: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return ask(handle)
    except nvml.NVMLError:
        return None


def _will_never_work(nvml: Any, error: Exception) -> bool:
    """Whether a query fails for good: the board, the driver, the package or the user's rights lack it."""
    codes = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_PERMISSION", "INVALID_ARGUMENT", "ARGUMENT_VERSION_MISMATCH")
    never = {getattr(nvml, f"NVML_ERROR_{code}") for code in codes}
    return isinstance(error, AttributeError) or getattr(error, "value", None) in never


def _power_instant_w(nvml: Any, handle: Any) -> float:
    field = nvml.nvmlDeviceGetFieldValues(handle, [(nvml.NVML_FI_DEV_POWER_INSTANT, nvml.NVML_POWER_SCOPE_GPU)])[0]
    if field.nvmlReturn != nvml.NVML_SUCCESS:  # each field has its own verdict; the call itself succeeds regardless
        raise nvml.NVMLError(field.nvmlReturn)
    return float(field.value.uiVal / 1000)


# What to read beside the counter, and how: the ways are tried in order and the first that the driver knows is kept. The
# second ones serve older drivers, which lack the first; power falls back to a reading that is a 1 s average on new boards.
# No process lists and no fan here: they take the driver's locks for milliseconds.
_GAUGES: Mapping[str, tuple[Callable[[Any, Any], float], ...]] = {
    "power_w": (_power_instant_w, lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1000),
    "temperature_c": (
        lambda n, h: float(n.nvmlDeviceGetTemperatureV(h, n.NVML_TEMPERATURE_GPU)),
        lambda n, h: float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
    ),
    "sm_utilization": (lambda n, h: n.nvmlDeviceGetUtilizationRates(h).gpu / 100,),
    "sm_clock_hz": (lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM) * 1e6,),
    "memory_used_bytes": (lambda n, h: float(n.nvmlDeviceGetMemoryInfo(h).used),),
    "throttle_reasons": (
        lambda n, h: float(n.nvmlDeviceGetCurrentClocksEventReasons(h)),
        lambda n, h: float(n.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
    ),
}
