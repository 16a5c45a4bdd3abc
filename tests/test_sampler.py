"""The sampler: what it writes down, whom it waits for, and that it lets go of everything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest
from conftest import FakeClock

from lem_kit.energy import Reading
from lem_kit.sampler import LONGEST_WAIT_S, Sampler
from lem_kit.trace import Domain


class Meter:
    def __init__(self, name: str, clock: Callable[[], int], interval_s: float = 0.0) -> None:
        self.name, self.interval_s, self._clock = name, interval_s, clock
        self.domains: Mapping[str, Domain] = {"gpu0": Domain("gpu", "counter", refresh_s=0.0)}
        self.problem: Exception | None = None
        self.block_s = 0.0
        self.reads = 0
        self.closed = False

    def read(self) -> dict[str, Reading]:
        self.reads += 1
        time.sleep(self.block_s)
        if self.problem:
            raise self.problem
        return {"gpu0": Reading(self._clock(), self._clock() / 1e9)}

    def gauges(self) -> dict[str, float]:
        return {"gpu0.power_w": 7.0}

    def close(self) -> None:
        self.closed = True


def test_a_pass_reads_everything_that_is_due(clock: FakeClock) -> None:
    quick, slow = Meter("quick", clock), Meter("slow", clock, interval_s=0.5)
    sampler = Sampler([quick, slow], 0.05, clock)
    for _ in range(11):
        sampler.sample()
        clock.advance(0.05)
    assert (quick.reads, slow.reads) == (11, 2)
    assert list(sampler.trace.counters) == ["quick:gpu0", "slow:gpu0"]
    assert list(sampler.trace.counters["slow:gpu0"].value) == [1000.0, 1000.5]
    assert list(sampler.trace.gauges["quick:gpu0.power_w"].value) == [7.0] * 11
    sampler.edge()
    sampler.sample()
    assert slow.reads == 3, "an edge reads the slow ones too"
    sampler.stop()
    assert quick.closed and slow.closed


def test_a_source_that_fails_is_written_down_and_tried_again(clock: FakeClock) -> None:
    broken, sound = Meter("broken", clock), Meter("sound", clock)
    sampler = Sampler([broken, sound], 0.05, clock)
    broken.problem = OSError("off the bus")
    for _ in range(4):
        sampler.sample()
        clock.advance(0.4)
    broken.problem = None
    sampler.sample()
    assert [f[1:] for f in sampler.trace.failures] == [("broken", "off the bus")] * 2, "at most once a second"
    assert len(sampler.trace.counters["sound:gpu0"].t_ns) == 5 and len(sampler.trace.counters["broken:gpu0"].t_ns) == 1
    sampler.stop()


def test_an_instant_is_written_once(clock: FakeClock) -> None:
    sampler = Sampler([Meter("m", clock)], 0.05, clock)
    sampler.sample()
    sampler.sample()
    assert len(sampler.trace.counters["m:gpu0"].t_ns) == 1
    sampler.stop()


def test_every_source_is_closed_even_if_one_cannot_be(clock: FakeClock) -> None:
    first, bad, last = (Meter(name, clock) for name in ("first", "bad", "last"))

    def cannot() -> None:
        raise OSError("stuck")

    bad.close = cannot  # type: ignore[method-assign]
    sampler = Sampler([first, bad, last], 0.05, clock)
    with pytest.warns(UserWarning, match="'bad' could not be closed: stuck"):
        sampler.stop()
    assert first.closed and last.closed and sampler.sources == []


def test_the_thread_samples_settles_and_ends() -> None:
    meter = Meter("m", time.monotonic_ns)
    sampler = Sampler([meter], 0.005)
    sampler.start()
    assert "lem-sampler" in [thread.name for thread in threading.enumerate()]
    edge = sampler.edge()
    sampler.settle(edge)
    assert sampler.trace.counters["m:gpu0"].t_ns[-1] >= edge
    sampler.stop()
    sampler.stop()
    assert "lem-sampler" not in [thread.name for thread in threading.enumerate()] and meter.closed


def test_a_source_that_hangs_does_not_hang_the_window() -> None:
    meter = Meter("m", time.monotonic_ns)
    sampler = Sampler([meter], 0.005)
    sampler.start()
    sampler.settle(sampler.edge())
    meter.block_s = 1.5
    time.sleep(0.05)
    started = time.monotonic()
    sampler.settle(sampler.edge())
    assert time.monotonic() - started < 4 * LONGEST_WAIT_S
    sampler.stop()


def test_a_slice_is_a_copy(clock: FakeClock) -> None:
    sampler = Sampler([Meter("m", clock)], 0.05, clock)
    for _ in range(5):
        sampler.sample()
        clock.advance(1)
    part = sampler.slice(1_001_000_000_000, 1_003_000_000_000)
    assert list(part.counters["m:gpu0"].value) == [1001.0, 1002.0, 1003.0]
    sampler.sample()
    assert len(part.counters["m:gpu0"].value) == 3 and part.domains == sampler.trace.domains
    sampler.stop()


def test_its_own_share_is_known() -> None:
    sampler = Sampler([Meter("m", time.monotonic_ns)], 0.01)
    sampler.start()
    time.sleep(0.3)
    sampler.stop()
    assert 0 < sampler.busy_ns < 0.1 * 300_000_000


@pytest.mark.parametrize("problem", [OSError(), RuntimeError("x")])
def test_a_failure_always_has_words(clock: FakeClock, problem: Exception) -> None:
    meter = Meter("m", clock)
    meter.problem = problem
    sampler = Sampler([meter], 0.05, clock)
    sampler.sample()
    assert sampler.trace.failures[0][2] in ("OSError", "x")
    sampler.stop()
