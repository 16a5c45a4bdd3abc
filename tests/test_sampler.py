"""The sampler: what it writes down, whom it waits for, and that it lets go of everything."""

from __future__ import annotations

import itertools
import math
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from conftest import FakeClock

from lem_kit import sampler as sampler_module
from lem_kit.energy import Reading, SourceError
from lem_kit.errors import LemError
from lem_kit.sampler import LONGEST_WAIT_S, Sampler
from lem_kit.trace import Domain, Series, Trace


class Meter:
    def __init__(self, name: str, clock: Callable[[], int], interval_s: float = 0.0) -> None:
        self.name, self.interval_s, self._clock = name, interval_s, clock
        self.domains: Mapping[str, Domain] = {"gpu0": Domain("gpu", "counter", refresh_s=0.0)}
        self.problem: Exception | None = None
        self.gate = threading.Event()  # a read waits until it is set
        self.gate.set()
        self.reading = threading.Event()
        self.failures: dict[str, str] = {}
        self.reads = 0
        self.closed = False

    def read(self) -> dict[str, Reading]:
        self.reads += 1
        self.reading.set()
        self.gate.wait()
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
    said = ("broken", "source_failed", "off the bus")
    assert [f[1:] for f in sampler.trace.failures] == [said] * 2, "at most once a second"
    assert len(sampler.trace.counters["sound:gpu0"].t_ns) == 5 and len(sampler.trace.counters["broken:gpu0"].t_ns) == 1
    sampler.stop()


def test_each_failing_source_is_written_down_again_after_a_second(clock: FakeClock) -> None:
    """Two dead sources must not silence each other: a window learns from its own seconds why it knows nothing."""
    one, two = Meter("one", clock), Meter("two", clock)
    one.problem = two.problem = OSError("gone")
    sampler = Sampler([one, two], 0.05, clock)
    for _ in range(50):
        sampler.sample()
        clock.advance(0.05)
    assert [name for _, name, _, _ in sampler.trace.failures] == ["one", "two"] * 3
    one.problem = OSError("gone for good")
    sampler.sample()
    assert sampler.trace.failures[-1][1:] == ("one", "source_failed", "gone for good"), "news is written at once"
    sampler.stop()


def test_a_domain_that_fails_is_written_down_beside_those_that_answer(clock: FakeClock) -> None:
    meter = Meter("m", clock)
    meter.failures = {"gpu1": "fell off the bus"}
    sampler = Sampler([meter], 0.05, clock)
    sampler.sample()
    assert sampler.trace.failures == [(clock(), "m:gpu1", "source_failed", "fell off the bus")]
    assert list(sampler.trace.counters) == ["m:gpu0"]
    sampler.stop()


def broken_gauges() -> dict[str, float]:
    raise RuntimeError("no thermometer")


NOW = Reading(1, 2.0)
NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "no gauge": ({"gauges": broken_gauges}, "no thermometer"),
    "a gauge without a number": ({"gauges": lambda: {"gpu0.power_w": None}}, "must be real number"),
    "a domain not described": ({"read": lambda: {"gpu7": NOW}}, "gpu7"),
    "a reading without a number": ({"read": lambda: {"gpu0": Reading(1, None)}}, "NoneType"),  # type: ignore[arg-type]
    "a reading without an instant": ({"read": lambda: {"gpu0": Reading(None, 1.0)}}, "NoneType"),  # type: ignore[arg-type]
    "no reading at all": ({"read": lambda: None}, "NoneType"),
    "failures that are none": ({"failures": 3}, "items"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nothing_a_source_does_ends_the_thread(case: str) -> None:
    """It is a failure in the trace; what else was read in the pass stands, and columns stay of one length."""
    attributes, words = NONSENSE[case]
    odd, sound = Meter("odd", time.monotonic_ns), Meter("sound", time.monotonic_ns)
    for name, value in attributes.items():
        setattr(odd, name, value)
    sampler = Sampler([odd, sound], 0.005)
    sampler.start()
    for _ in range(2):
        edge = sampler.edge()
        sampler.settle(edge)
        assert sampler.trace.counters["sound:gpu0"].t_ns[-1] >= edge
    sampler.stop()
    assert words in next(sentence for _, name, _, sentence in sampler.trace.failures if name == "odd")
    assert all(s.t_ns and len(s.t_ns) == len(s.value) for s in sampler.trace.counters.values())
    assert ("odd:gpu0" in sampler.trace.counters) == ("read" not in attributes), "gauges that fail cost no energy"


def test_a_gauge_that_is_no_number_is_left_out(clock: FakeClock) -> None:
    meter = Meter("m", clock)
    meter.gauges = lambda: {"gpu0.power_w": float("nan"), "gpu0.temperature_c": 41.0}  # type: ignore[method-assign]
    sampler = Sampler([meter], 0.05, clock)
    sampler.sample()
    assert list(sampler.trace.gauges) == ["m:gpu0.temperature_c"]
    sampler.stop()


def test_two_sources_of_one_name_are_refused_and_closed(clock: FakeClock) -> None:
    meters = [Meter("m", clock), Meter("m", clock), Meter("other", clock)]
    with pytest.raises(LemError, match="named m,"):
        Sampler(meters, 0.05, clock)
    assert all(meter.closed for meter in meters)


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


def hanging() -> tuple[Sampler, Meter]:
    """A running sampler whose source is stuck in a read until its gate is opened."""
    meter = Meter("m", time.monotonic_ns)
    sampler = Sampler([meter], 0.005)
    sampler.start()
    sampler.settle(sampler.edge())
    meter.gate.clear()
    meter.reading.clear()
    assert meter.reading.wait(10)
    return sampler, meter


def test_a_source_that_hangs_does_not_hang_the_window() -> None:
    sampler, meter = hanging()
    edge = sampler.edge()
    sampler.settle(edge)  # would not return, were it to wait for the reading
    assert sampler.trace.counters["m:gpu0"].t_ns[-1] < edge
    meter.gate.set()
    sampler.stop()
    assert meter.closed


def test_a_source_that_hangs_does_not_hang_the_end_and_is_not_closed_under_its_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "LONGEST_STOP_S", 0.01)
    sampler, meter = hanging()
    for _ in range(2):
        with pytest.warns(UserWarning, match="does not answer"):
            sampler.stop()
        assert not meter.closed
    meter.gate.set()
    monkeypatch.setattr(sampler_module, "LONGEST_STOP_S", 30.0)
    sampler.stop()
    assert meter.closed and sampler.sources == []


def test_the_thread_closes_every_source_even_if_one_cannot_be() -> None:
    first, bad, last = (Meter(name, time.monotonic_ns) for name in ("first", "bad", "last"))

    def cannot() -> None:
        raise OSError("stuck")

    bad.close = cannot  # type: ignore[method-assign]
    sampler = Sampler([first, bad, last], 0.005)
    sampler.start()
    with pytest.warns(UserWarning, match="'bad' could not be closed: stuck"):
        sampler.stop()
    assert first.closed and last.closed and sampler.sources == []


def waits(monkeypatch: pytest.MonkeyPatch, sampler: Sampler) -> list[tuple[bool, float]]:
    """What `settle` waits for: whether it was so already, and how long it would wait; it does not wait here."""
    seen: list[tuple[bool, float]] = []

    def wait_for(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        seen.append((predicate(), timeout or 0.0))
        return predicate()

    monkeypatch.setattr(sampler._changed, "wait_for", wait_for)
    monkeypatch.setattr(sampler, "_thread", threading.current_thread())  # as if one ran; the test samples in its place
    return seen


def test_settle_waits_one_refresh_period_for_a_stepping_counter(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter("m", clock)
    meter.domains = {"gpu0": Domain("gpu", "counter")}
    meter.read = lambda: {"gpu0": Reading(clock(), 20.0 * (clock() // 100_000_000))}  # type: ignore[method-assign]
    sampler = Sampler([meter], 0.05, clock)
    for _ in range(21):
        sampler.sample()
        clock.advance(0.05)
    edge = clock()
    seen = waits(monkeypatch, sampler)
    sampler.settle(edge)
    assert [met for met, _ in seen] == [False, False]
    assert seen[0][1] == pytest.approx(1.2 * 0.1 + 2 * 0.05), "1.2 refresh periods and two intervals"
    assert seen[1][1] <= 0.05, "and not long for the gauges"
    for _ in range(4):
        sampler.sample()
        clock.advance(0.05)
    sampler.settle(edge)
    assert seen[2][0]
    assert all(0 < longest <= LONGEST_WAIT_S for _, longest in seen)
    monkeypatch.undo()
    sampler.stop()


def test_settle_waits_for_a_reading_that_began_after_it_also_of_a_source_that_fails(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, sound = Meter("silent", clock), Meter("sound", clock)
    sampler = Sampler([silent, sound], 0.05, clock)
    inside: list[int] = []

    def fails() -> dict[str, Reading]:
        clock.advance(0.01)
        inside.append(clock())
        clock.advance(0.01)
        raise OSError("gone")

    silent.read = fails  # type: ignore[method-assign]
    sampler.sample()
    met: list[bool] = []

    def wait_for(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        if len(met) < 3:
            for _ in range(3):
                met.append(predicate())
                clock.advance(0.02)
                sampler.sample()
        return True

    monkeypatch.setattr(sampler._changed, "wait_for", wait_for)
    monkeypatch.setattr(sampler, "_thread", threading.current_thread())
    sampler.settle(inside[0])
    assert met == [False, False, True], "the call that was under way does not count, the next one does, failed or not"
    monkeypatch.undo()
    sampler.stop()


def test_settle_without_a_thread_reads_at_once(clock: FakeClock) -> None:
    meter = Meter("m", clock)
    sampler = Sampler([meter], 0.05, clock)
    sampler.settle(sampler.edge())
    assert meter.reads == 1
    sampler.stop()
    sampler.settle(sampler.edge())
    assert meter.reads == 1


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


def test_slices_are_whole_while_the_thread_writes() -> None:
    meters = [Meter(f"m{i}", time.monotonic_ns) for i in range(4)]
    sampler = Sampler(meters, 0.0001)
    sampler.start()
    for _ in range(200):
        part: Trace = sampler.slice(0, time.monotonic_ns())
        for series in (*part.counters.values(), *part.gauges.values()):
            assert len(series.t_ns) == len(series.value) and list(series.t_ns) == sorted(series.t_ns)
        assert set(part.counters) <= set(part.domains)
    sampler.stop()


def test_its_own_share_is_known(clock: FakeClock) -> None:
    meter = Meter("m", clock)

    def read() -> dict[str, Reading]:
        clock.advance(0.002)
        return {"gpu0": Reading(clock(), 1.0)}

    meter.read = read  # type: ignore[method-assign]
    sampler = Sampler([meter], 0.05, clock)
    for _ in range(3):
        sampler.sample()
        clock.advance(0.05)
    assert sampler.busy_ns == 6_000_000
    sampler.stop()


@pytest.mark.parametrize("problem", [OSError(), RuntimeError("x")])
def test_a_failure_always_has_words(clock: FakeClock, problem: Exception) -> None:
    meter = Meter("m", clock)
    meter.problem = problem
    sampler = Sampler([meter], 0.05, clock)
    sampler.sample()
    assert sampler.trace.failures[0][3] in ("OSError", "x")
    sampler.stop()


class Paced(Meter):
    """A counter of 20 J every 100 ms whose calls take 3 ms, read one by one; and power samples every 20 ms."""

    gauges_interval_s, samples_interval_s = 0.2, 0.3

    def __init__(self, clock: FakeClock) -> None:
        super().__init__("paced", clock)
        self.domains = {"gpu0": Domain("gpu", "counter"), "gpu1": Domain("gpu", "counter")}
        self.called: list[tuple[int, str]] = []
        self.sides: list[int] = []
        self.fetched: list[int] = []
        self.lost: set[str] = set()
        self._time = clock

    def read_one(self, domain: str) -> Reading:
        self.called.append((self._time(), domain))
        if domain in self.lost:
            raise SourceError("fell off the bus", "gpu_lost")
        self._time.advance(0.003)
        return Reading(self._time(), 20.0 * (self._time() // 100_000_000), 3_000_000)

    def gauges(self) -> dict[str, float]:
        self.sides.append(self._time())
        return {"gpu0.temperature_c": 41.0}

    def samples(self) -> dict[str, list[tuple[int, float]]]:
        self.fetched.append(self._time())
        newest = self._time() // 20_000_000
        return {"gpu0.power_w": [(k * 20_000_000, 200.0) for k in range(newest - 14, newest + 1)]}


def turned(sampler: Sampler, clock: FakeClock, seconds: float) -> int:
    """How often it woke in that time."""
    end, wakings = clock() + round(seconds * 1e9), 0
    while clock() < end:
        due = sampler.sample()
        clock.now_ns = max(due, clock() + 50_000)
        wakings += 1
    return wakings


def test_each_counter_that_is_read_alone_gets_a_pace_and_a_period(clock: FakeClock) -> None:
    meter = Paced(clock)
    sampler = Sampler([meter], 0.05, clock)
    turned(sampler, clock, 10)
    assert meter.reads == 0, "never all at once"
    assert sampler.trace.period_s == pytest.approx({"paced:gpu0": 0.1, "paced:gpu1": 0.1}, rel=1e-3)
    late = [t for t, domain in meter.called if domain == "gpu0" and t > 1_005 * 10**9]
    assert 50 <= len(late) <= 80, "about one call for each update in five seconds"
    assert set(sampler.trace.counters["paced:gpu0"].took_ns) == {3_000_000}
    assert len(meter.sides) == pytest.approx(10 / 0.2, abs=3), "gauges at an interval of their own"
    assert len(meter.fetched) == pytest.approx(10 / 0.3, abs=3), "and so the samples"
    sampler.stop()


def test_samples_are_waited_for_until_they_tell_the_course_around_an_edge(clock: FakeClock) -> None:
    """The one in which the window ends, and two after it; none where they are too few for the counter's cells."""
    meter = Paced(clock)
    meter.sampled = {"gpu0"}  # type: ignore[attr-defined]
    sampler = Sampler([meter], 0.05, clock)
    turned(sampler, clock, 8)
    series = sampler.trace.gauges["paced:gpu0.power_w"]
    edge_ns = series.t_ns[-8]

    def told(last: int) -> bool:
        sampler.trace.gauges["paced:gpu0.power_w"] = series.part(0, len(series.t_ns) - 7 + last)
        return sampler._sampled(edge_ns)

    assert [told(n) for n in range(6)] == [False, False, False, True, True, True]
    few = range(edge_ns - 400_000_000, edge_ns, 40_000_000)
    sampler.trace.gauges["paced:gpu0.power_w"] = Series(array("q", few), array("d", [200.0] * 10))
    assert sampler._sampled(edge_ns)
    sampler.stop()


def test_what_is_infinitely_seldom_is_never_asked_for(clock: FakeClock) -> None:
    meter = Paced(clock)
    meter.gauges_interval_s = math.inf
    sampler = Sampler([meter], 0.05, clock)
    turned(sampler, clock, 2)
    assert meter.fetched and not meter.sides
    sampler.stop()


def test_a_source_that_is_read_seldom_wakes_nobody_between(clock: FakeClock) -> None:
    meter = Meter("slow", clock, interval_s=1.0)
    meter.gauges_interval_s = math.inf  # type: ignore[attr-defined]
    sampler = Sampler([meter], 0.05, clock)
    assert turned(sampler, clock, 10) == meter.reads == 10
    sampler.stop()


def test_what_may_be_late_waits_for_a_waking_of_another(clock: FakeClock) -> None:
    quick, slow = Meter("quick", clock), Meter("slow", clock, interval_s=1.02)
    sampler = Sampler([quick, slow], 0.05, clock)
    assert turned(sampler, clock, 10) == quick.reads == 200 and slow.reads == 10
    sampler.stop()


def test_what_may_be_done_early_is_done_at_a_waking_of_another(clock: FakeClock) -> None:
    meter = Paced(clock)
    meter.sampled = {"gpu0"}  # type: ignore[attr-defined]
    sampler = Sampler([meter], 0.05, clock)
    turned(sampler, clock, 8)
    job = next(job for job in sampler._jobs if job.domain == "gpu0")
    assert job.pace is not None
    while not (job.pace.slack_ns and job.due_ns - clock() > 500_000_000):
        clock.now_ns = max(sampler.sample(), clock() + 50_000)
    due_ns, slack_ns = job.due_ns, job.pace.slack_ns
    calls = [t for t, domain in meter.called if domain == "gpu0"]
    clock.now_ns = due_ns - slack_ns - 5_000_000
    assert due_ns < sampler.sample() + slack_ns + 60_000_000
    assert [t for t, domain in meter.called if domain == "gpu0"] == calls
    clock.now_ns = due_ns - slack_ns
    sampler.sample()
    assert [t for t, domain in meter.called if domain == "gpu0"][len(calls) :] == [due_ns - slack_ns]
    sampler.stop()


def test_a_sample_that_is_no_number_is_left_out(clock: FakeClock) -> None:
    meter = Paced(clock)
    meter.samples = lambda: {"gpu0.power_w": [(10, 200.0), (20, float("nan")), (30, 210.0)], "gpu1.power_w": []}  # type: ignore
    sampler = Sampler([meter], 0.05, clock)
    sampler.sample()
    assert list(sampler.trace.gauges["paced:gpu0.power_w"].t_ns) == [10, 30]
    assert "paced:gpu1.power_w" not in sampler.trace.gauges, "a series in the trace holds at least one reading"
    sampler.stop()


def test_samples_that_overlap_are_written_once(clock: FakeClock) -> None:
    sampler = Sampler([Paced(clock)], 0.05, clock)
    turned(sampler, clock, 2)
    t_ns = list(sampler.trace.gauges["paced:gpu0.power_w"].t_ns)
    assert t_ns == sorted(set(t_ns)) and len(t_ns) == pytest.approx(2 / 0.02, abs=15)
    assert len({b - a for a, b in itertools.pairwise(t_ns)}) == 1
    sampler.stop()


def test_a_domain_that_fails_alone_has_its_code_and_is_tried_again(clock: FakeClock) -> None:
    meter = Paced(clock)
    sampler = Sampler([meter], 0.05, clock)
    turned(sampler, clock, 1)
    meter.lost = {"gpu1"}
    turned(sampler, clock, 2)
    said = [(name, code) for _, name, code, _ in sampler.trace.failures]
    assert set(said) == {("paced:gpu1", "gpu_lost")} and len(said) <= 3
    count, last_ns = len(sampler.trace.counters["paced:gpu1"].t_ns), sampler.trace.counters["paced:gpu0"].t_ns[-1]
    assert clock() - last_ns < 0.2e9, "its neighbour is read as before"
    meter.lost = set()
    turned(sampler, clock, 1)
    assert len(sampler.trace.counters["paced:gpu1"].t_ns) > count
    sampler.stop()
