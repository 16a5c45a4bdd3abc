"""Short questions to the simulated boards through nvidia-ml-py, for tests."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest


def handle(number: int = 0) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(number)


def counter_j(number: int = 0) -> float:
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle(number)) / 1000


def field(which: int, scope: int = 0, number: int = 0) -> Any:
    return pynvml.nvmlDeviceGetFieldValues(handle(number), [(which, scope)])[0]


def power_w(which: int, number: int = 0) -> float:
    answer = field(which, 0, number)
    assert answer.nvmlReturn == 0
    return answer.value.uiVal / 1000


def code(function: Any, *arguments: Any) -> int:
    with pytest.raises(pynvml.NVMLError) as caught:
        function(*arguments)
    return int(caught.value.value)
