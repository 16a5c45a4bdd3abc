"""When a warm-up is over: rounds whose latencies are given, on a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lem_kit import warmup
from lem_kit.measurement import Completion
from lem_kit.steady import level
from lem_kit.trace import Series, Trace

MS = 1_000_000

# Medians of decoding steps (ms), round by round, beside an H100: the host lent its cores to others.
H100_HOST = [13.26, 17.93, 15.82, 14.73, 10.05, 10.84, 17.36, 10.92, 12.21, 16.41, 18.17, 11.25]


def rounds_of(latencies_ms: list[float]) -> Iterator[list[Completion]]:
    for ms in latencies_ms:
        events = tuple((round(k * ms * MS), 1) for k in range(4))
        yield [Completion(0, 0, events[-1][0], events, 8, repeat=-1)]


def warmed(latencies_ms: list[float], trace: Trace | None = None, seconds: float = 0.1) -> tuple[int, str | None]:
    """How many rounds there were, and what was said."""
    rounds, now_s = rounds_of(latencies_ms), 0.0

    def one_round(number: int) -> list[Completion]:
        nonlocal now_s
        now_s += seconds
        return next(rounds)

    done, doubt = warmup.until_settled(one_round, lambda: trace or Trace(), lambda: now_s)
    return len(done), doubt


def test_three_rounds_alike_are_enough() -> None:
    assert warmed([40.0, 12.0, 12.1, 11.9, 12.0]) == (4, None)


def test_rounds_that_only_scatter_end_it_and_it_is_said() -> None:
    assert warmed(H100_HOST) == (6, "latency_scatters")


def test_rounds_that_become_faster_go_on_to_the_cap() -> None:
    assert warmed([100 * 0.8**k for k in range(12)]) == (12, "warmup_not_settled")
    assert warmed([100 * 0.8**k for k in range(12)], seconds=11.0) == (3, "warmup_not_settled")


def test_a_gpu_that_warms_up_is_waited_for() -> None:
    hot = Series()
    for k in range(40):
        hot.append(k * 100 * MS, 40.0 + 0.1 * k)  # 1 C per second
    assert warmed([12.0] * 12, Trace(gauges={"nvml:gpu0.temperature_c": hot})) == (12, "warmup_not_settled")


def test_level_is_a_slope_within_its_own_doubt() -> None:
    assert level([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert not level([1.0, 2.0, 3.0, 4.0, 5.0, 6.1])
    assert not level([1.0, 2.0, 1.0, 2.0, 1.0])
    # Slope 0.9 per step; s = 0.95, and 2.776 * 0.95 / sqrt(17.5) = 0.63.
    assert not level([1.0, 3.0, 2.0, 5.0, 4.0, 6.0])
    assert level([9.0, 1.0, 3.0, 2.0, 5.0, 4.0, 2.0], window=6)


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_level(strange: float) -> None:
    assert not level([1.0, 2.0, 1.0, strange, 1.0, 2.0])
