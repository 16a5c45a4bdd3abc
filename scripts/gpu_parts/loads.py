"""Loads that draw power on command: a chain of matrix products, or nothing where there is no CUDA.

The one idea: what the host knows of a load is when it was asked to begin and when the GPU had finished, so each burst ends
with a synchronisation and the share of time it really took is given back.
"""

from __future__ import annotations

import random
import time
from typing import Any

now = time.monotonic_ns


class Products:
    """bfloat16 products of two square matrices on CUDA device 0."""

    def __init__(self, torch: Any, size: int = 4096) -> None:
        self._torch = torch
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        self._x = torch.randn(size, size, device="cuda", dtype=dtype)
        self._y = self._x @ self._x
        torch.cuda.synchronize()
        self.name = f"{str(dtype).removeprefix('torch.')} product of {size} x {size} matrices"

    def work(self, count: int) -> None:
        for _ in range(count):
            self._torch.mm(self._x, self._x, out=self._y)
        self._torch.cuda.synchronize()

    def until(self: Any, t_ns: int) -> None:
        while now() < t_ns:
            self.work(2)

    def count_for(self: Any, seconds: float) -> int:
        """How many products take so long, once the clocks have settled."""
        self.until(now() + 300_000_000)
        began = now()
        self.work(200)
        return max(1, round(200 * seconds * 1e9 / (now() - began)))


class Sums:
    """Sums of two large vectors on CUDA device 0: the memory works and the board stays below its power limit, so that the
    same work costs the same energy, as it does not where a limit governs the clocks (products of matrices on an H100)."""

    def __init__(self, torch: Any, elements: int = 1 << 27) -> None:
        self._torch = torch
        self._x, self._y, self._z = (torch.ones(elements, device="cuda", dtype=torch.float16) for _ in range(3))
        torch.cuda.synchronize()
        self.name = f"sum of two vectors of {elements >> 20} Mi half floats"

    def work(self, count: int) -> None:
        for _ in range(count):
            self._torch.add(self._x, self._y, out=self._z)
        self._torch.cuda.synchronize()

    until, count_for = Products.until, Products.count_for


class Nothing:
    """Takes the time of a load and draws nothing: for machines without CUDA, where only the script is tried."""

    name = "none (torch.cuda is not available)"

    def work(self, count: int) -> None:
        time.sleep(count * 1e-3)

    def until(self, t_ns: int) -> None:
        time.sleep(max(t_ns - now(), 0) / 1e9)

    def count_for(self, seconds: float) -> int:
        return max(1, round(seconds * 1e3))


def square(load: Any, period_s: float, duty: float, seconds: float) -> float:
    """Bursts of `duty` of each period, in step with CLOCK_MONOTONIC; returns the share of time that bursts took."""
    start = due = now()
    busy_ns = 0
    while due < start + int(seconds * 1e9):
        began = now()
        load.until(due + int(period_s * duty * 1e9))
        busy_ns += now() - began
        due += int(period_s * 1e9)
        sleep_until(due)
    return busy_ns / (now() - start)


def sleep_until(t_ns: int) -> None:
    time.sleep(max(t_ns - now() - 300_000, 0) / 1e9)
    while now() < t_ns:
        pass


def pause(draw: random.Random, least_s: float = 0.03, most_s: float = 0.13) -> None:
    """A break of random length, so that what follows begins at no fixed phase of a counter."""
    time.sleep(draw.uniform(least_s, most_s))
