"""What lem_kit itself costs: the same work with and without a sampler, in turns.

The one idea: pairs. Each pair is a stretch of work with the sources open and one without, in alternating order, so that what
drifts on the machine meets both alike; the ratio of their speeds is the cost, and its spread over the pairs the interval.

Not covered: the cost of streaming tokens out of an engine (`benchmarks/overhead.py`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from .errors import LemError
from .session import Session
from .statistics import stdev, student_t

SETTLE_S = 1.5  # a source is read more closely until its counter's period is known


class Overhead(NamedTuple):
    """`share`: time lost to the sampler as a part of the work's time (negative: noise), with the half-width of its 95 %
    interval; `sources` that were open, and the sampler thread's own share of a CPU core."""

    share: float
    half_width: float
    pairs: int
    cpu_share: float
    sources: list[str]
    work: str


def measure(pairs: int = 8, stretch_s: float = 1.0, work: Callable[[], None] | None = None) -> Overhead:
    """Run `work` (by default small matrix products on the GPU that torch uses, else arithmetic on one core) in `pairs` pairs
    of stretches. LemError for fewer than two pairs."""
    if pairs < 2 or not stretch_s > 0:
        raise LemError(f"The overhead needs at least two pairs of stretches that last: got {pairs} of {stretch_s} s.")
    name, step = ("the given work", work) if work is not None else _default_work()
    _speed(step, stretch_s)
    losses: list[float] = []
    cpu: list[float] = []
    sources: list[str] = []
    for pair in range(pairs):
        speeds: dict[bool, float] = {}
        for watched in (True, False) if pair % 2 else (False, True):
            if not watched:
                time.sleep(SETTLE_S)  # the machine has rested as long in both cases
                speeds[watched] = _speed(step, stretch_s)
                continue
            with Session() as session:
                sources = session.sources
                time.sleep(SETTLE_S)
                with session.window("overhead", wait=False) as window:
                    speeds[watched] = _speed(step, stretch_s)
                cpu.append(window.measurement.meter.get("cpu_share", math.nan))
        losses.append(speeds[False] / speeds[True] - 1)
    half = student_t(len(losses) - 1) * stdev(losses) / math.sqrt(len(losses))
    return Overhead(sum(losses) / len(losses), half, pairs, sum(cpu) / len(cpu), sources, name)


def _speed(step: Callable[[], None], seconds: float) -> float:
    """Steps per second."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        step()
        count += 1
    return count / spent


def _default_work() -> tuple[str, Callable[[], None]]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        x = torch.randn(1024, 1024, device="cuda", dtype=torch.float16)

        def product() -> None:
            for _ in range(20):
                torch.mm(x, x)
            torch.cuda.synchronize()

        return "small matrix products on the GPU, one synchronisation in 20", product

    def arithmetic() -> None:
        sum(i * i for i in range(2_000))

    return "arithmetic in Python, one core", arithmetic
