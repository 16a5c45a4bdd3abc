"""Simulated NVIDIA boards under the real nvidia-ml-py: an object with the C library's function names takes its place.

The one idea: everything above the C call is the code that runs on real machines. A board draws a constant power, and its
counter shows the true energy as of its last refresh. Time comes from the clock given, so a test knows every joule.

Not covered: how a real counter accumulates inside, and what a call costs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

pynvml = pytest.importorskip("pynvml")

LOST, NO_SUPPORT, DENIED = pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION


@dataclass
class Board:
    """One GPU. `faults` maps a C function's name, or "*" for all, to the error that it returns."""

    uuid: str
    name: str = "NVIDIA Simulated H100"
    power_w: float = 200.0
    refresh_s: float = 0.1
    start_j: float = 1000.0
    mig_instances: tuple[str, ...] = ()
    reset_ns: int | None = None
    faults: dict[str, int] = field(default_factory=dict)

    def millijoules(self, now_ns: int) -> int:
        refresh_ns = round(self.refresh_s * 1e9)
        if self.reset_ns is not None and now_ns >= self.reset_ns:
            return round(self.power_w * ((now_ns - self.reset_ns) // refresh_ns) * self.refresh_s * 1000)
        return round((self.start_j + self.power_w * (now_ns // refresh_ns) * self.refresh_s) * 1000)


class Library:
    """Stands for the loaded libnvidia-ml.so.1. `calls` counts the calls by C name, `sessions` the open nvmlInits."""

    def __init__(self, boards: list[Board], clock: Callable[[], int]) -> None:
        self.boards = boards
        self.clock = clock
        self.calls: dict[str, int] = {}
        self.sessions = 0
        self.init_error = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        answer = getattr(type(self), f"_{name}", None)
        if answer is None:
            raise AttributeError(name)  # pynvml turns this into "Function Not Found", as for an old driver

        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name.startswith("nvmlDevice") and "Handle" not in name and name != "nvmlDeviceGetCount_v2":
                board = self._board(arguments[0])
                fault = board.faults.get(name, board.faults.get("*", 0))
                return fault or answer(self, board, *arguments[1:]) or 0
            return answer(self, *arguments) or 0

        return call

    def _board(self, handle: Any) -> Board:
        return self.boards[(ctypes.cast(handle, ctypes.c_void_p).value or 0) % 1000 - 1]

    def _nvmlInitWithFlags(self, flags: int) -> int:
        self.sessions += not self.init_error
        return self.init_error

    def _nvmlShutdown(self) -> int:
        self.sessions -= 1
        return 0 if self.sessions >= 0 else pynvml.NVML_ERROR_UNINITIALIZED

    def _nvmlErrorString(self, code: int) -> bytes:
        return {LOST: b"GPU is lost", NO_SUPPORT: b"Not Supported", DENIED: b"Insufficient Permissions"}.get(code, b"Error")

    def _nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> None:
        text.value = b"580.00.01"

    def _nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(self.boards)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        _point(handle, index.value + 1)
        return self.boards[index.value].faults.get("nvmlDeviceGetHandleByIndex_v2", 0)

    def _nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        for index, board in enumerate(self.boards):
            if uuid.value.decode() in board.mig_instances:
                _point(handle, 1000 + index + 1)
                return 0
        return int(pynvml.NVML_ERROR_NOT_FOUND)

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance: Any, handle: Any) -> None:
        _point(handle, (ctypes.cast(instance, ctypes.c_void_p).value or 0) - 1000)

    def _nvmlDeviceGetName(self, board: Board, text: Any, size: Any) -> None:
        text.value = board.name.encode()

    def _nvmlDeviceGetUUID(self, board: Board, text: Any, size: Any) -> None:
        text.value = board.uuid.encode()

    def _nvmlDeviceGetTotalEnergyConsumption(self, board: Board, millijoules: Any) -> None:
        millijoules._obj.value = board.millijoules(self.clock())

    def _nvmlDeviceGetPowerUsage(self, board: Board, milliwatts: Any) -> None:
        milliwatts._obj.value = round(board.power_w * 1000)

    def _nvmlDeviceGetFieldValues(self, board: Board, count: Any, values: Any) -> None:
        for value in values._obj:
            value.nvmlReturn = board.faults.get(f"field {value.fieldId}", 0)
            value.value.uiVal = round(board.power_w * 1000)

    def _nvmlDeviceGetTemperatureV(self, board: Board, temperature: Any) -> None:
        temperature._obj.temperature = 51

    def _nvmlDeviceGetTemperature(self, board: Board, sensor: Any, temperature: Any) -> None:
        temperature._obj.value = 51

    def _nvmlDeviceGetUtilizationRates(self, board: Board, rates: Any) -> None:
        rates._obj.gpu = 75

    def _nvmlDeviceGetClockInfo(self, board: Board, kind: Any, megahertz: Any) -> None:
        megahertz._obj.value = 1980

    def _nvmlDeviceGetMemoryInfo(self, board: Board, memory: Any) -> None:
        memory._obj.used = 3 * 2**30

    def _nvmlDeviceGetCurrentClocksEventReasons(self, board: Board, reasons: Any) -> None:
        reasons._obj.value = 0x4

    def _nvmlDeviceGetMigMode(self, board: Board, current: Any, pending: Any) -> int:
        current._obj.value = bool(board.mig_instances)
        return 0

    def _nvmlDeviceGetPciInfo_v3(self, board: Board, info: Any) -> None:
        info._obj.busId = b"00000000:%02X:00.0" % (self.boards.index(board) + 1)

    def _nvmlDeviceGetEnforcedPowerLimit(self, board: Board, milliwatts: Any) -> None:
        milliwatts._obj.value = 700_000

    def _nvmlDeviceGetPersistenceMode(self, board: Board, mode: Any) -> None:
        mode._obj.value = 1

    def _nvmlDeviceGetCudaComputeCapability(self, board: Board, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = 9, 0


def _point(handle: Any, address: int) -> None:
    ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.c_void_p(address)


@contextmanager
def simulated(boards: list[Board], clock: Callable[[], int]) -> Iterator[Library]:
    """Put `boards` under nvidia-ml-py, and what was there back afterwards."""
    library = Library(boards, clock)
    before, cached = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
    pynvml.nvmlLib = library
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield library
    finally:
        pynvml.nvmlLib = before
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(cached)
