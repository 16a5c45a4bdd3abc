"""When a counter is read: about once per update, with walls that hold the true one, and from the beginning when lost."""

from __future__ import annotations

import itertools
import random

import pytest

from lem_kit.pace import TRUST, Pace
from lem_kit.staircase import knots
from lem_kit.trace import Series

MS = 1_000_000
INTERVAL_NS = 50 * MS


class Counter:
    """Updated at phase + k * period (ms) of a clock that may drift or be stopped; a call takes `took_ms`, and tells what it
    found at some instant in it."""

    def __init__(
        self, period_ms: float = 100.0, phase_ms: float = 37.0, took_ms: float = 4.0, drift: float = 0.0, apart_ns: int = 0
    ) -> None:
        self.now_ns, self.series, self.pace = 10**12, Series(), Pace(INTERVAL_NS, apart_ns)
        self.calls_ns: list[int] = []  # when each call began
        self.grids: list[float] = []  # half-width of the expected update at each call; infinite while none is
        self.period_ns, self.took_ns, self.stopped_ns = period_ms * MS, round(took_ms * MS), 1 << 62
        self._phase_ns, self._drift, self._draw = 10**12 + phase_ms * MS, drift, random.Random(1)
        self.looks: float | None = None  # at which part of a call; at random unless given

    def updates_before(self, t_ns: float) -> int:
        elapsed = min(t_ns, self.stopped_ns) - self._phase_ns
        return int(elapsed * (1 + self._drift * elapsed / 1e9) // self.period_ns)

    def shift(self, ms: float) -> None:
        self._phase_ns += ms * MS

    def off_ns(self) -> float:
        """How far the update that is expected next lies from the nearest true one."""
        assert self.pace.grid is not None
        t = self.pace.grid.phase_ns
        elapsed = t - self._phase_ns
        k = elapsed * (1 + self._drift * elapsed / 1e9) / self.period_ns
        return (k - round(k)) * self.period_ns

    def call(self) -> int:
        began = self.now_ns
        self.calls_ns.append(began)
        looks = self._draw.random() if self.looks is None else self.looks
        value = 20.0 * self.updates_before(began + looks * self.took_ns)
        self.now_ns += self.took_ns
        self.series.append(self.now_ns, value, self.took_ns)
        due = self.pace.after(self.series, self.now_ns)
        self.grids.append(self.pace.grid.half_ns if self.pace.grid else float("inf"))
        return due

    def run(self, seconds: float) -> None:
        end = self.now_ns + round(seconds * 1e9)
        while self.now_ns < end:
            self.now_ns = max(self.call(), self.now_ns + 50_000)

    def calls_per_update(self, seconds: float) -> float:
        self.run(seconds)
        since = self.now_ns - round(seconds * 1e9)
        return sum(t >= since for t in self.calls_ns) / (seconds * 1e9 / self.period_ns)


@pytest.mark.parametrize("looks", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("took_ms", [2.5, 8.0])
def test_three_seconds_tell_which_update_a_call_saw(took_ms: float, looks: float | None) -> None:
    """Calls that all meet an update leave open which one; some must come when it is surely over."""
    counter = Counter(took_ms=took_ms)
    counter.looks = looks
    counter.run(40)
    t_ns, unknown = counter.series.t_ns, 0
    for start_ns in range(10**12 + 5 * 10**9, 10**12 + 36 * 10**9, 500 * MS):
        i, j = (next(i for i, t in enumerate(t_ns) if t >= edge_ns) for edge_ns in (start_ns, start_ns + 3 * 10**9))
        found, grid = knots(counter.series.part(i, j), None, (counter.pace.period_ns or 0) / 1e9)
        if grid is None:
            unknown += 1
            continue
        assert max(knot.half_ns for knot in found if knot.t_ns > start_ns + 1200 * MS) < 10 * MS
        for knot in found:
            true_ns = counter._phase_ns + round(knot.joules / 20) * counter.period_ns
            assert abs(true_ns - knot.t_ns) <= knot.half_ns + MS / 4
    assert unknown <= 2, "of 62"


@pytest.mark.parametrize("took_ms", [0.0, 4.0, 20.0])
def test_it_finds_the_period_and_then_reads_about_once_per_update(took_ms: float) -> None:
    counter = Counter(took_ms=took_ms)
    counter.run(3)
    found = next(i for i, half_ns in enumerate(counter.grids) if half_ns < float("inf"))
    assert counter.calls_ns[found] - 10**12 < 0.7e9, "six updates, watched closely"
    assert 1.0 <= counter.calls_per_update(20) <= (1.6 if took_ms == 4 else 1.9)
    assert counter.pace.grid is not None
    assert counter.pace.grid.period_ns == pytest.approx(counter.period_ns, rel=1.5e-3)
    # What is found may be of any instant of the call: nothing tells more than half of a call.
    assert abs(counter.off_ns()) <= counter.pace.grid.half_ns <= (took_ms / 2 + 1.5) * MS


def test_both_walls_hold_the_update_from_the_beginning_on() -> None:
    counter = Counter(took_ms=3.0)
    held = []
    for _ in range(900):
        counter.now_ns = max(counter.call(), counter.now_ns + 50_000)
        if counter.pace.grid is not None:
            held.append(abs(counter.off_ns()) <= counter.pace.grid.half_ns + 1_000)
    assert len(held) > 800 and sum(held) / len(held) > 0.99
    assert counter.grids[-1] < counter.grids[60] < float("inf"), "and they come closer"


def test_it_follows_a_clock_that_drifts() -> None:
    """A millionth per second, which is a lot for a crystal."""
    counter = Counter(drift=1e-6)
    counter.run(3)
    assert counter.calls_per_update(60) <= 1.5 and float("inf") not in counter.grids[100:]
    assert abs(counter.off_ns()) <= 3 * MS


def test_a_grid_that_moved_is_found_again() -> None:
    counter = Counter()
    counter.run(5)
    counter.shift(40)
    counter.run(6)
    assert counter.pace.grid is not None and abs(counter.off_ns()) <= 3 * MS
    assert counter.pace.grid.period_ns == pytest.approx(counter.period_ns, rel=3e-3)


def test_a_frozen_counter_is_read_at_the_interval_and_found_again_when_it_runs() -> None:
    counter = Counter()
    counter.run(5)
    counter.stopped_ns = counter.now_ns
    counter.run(4)
    assert counter.pace.grid is None
    calls = len(counter.calls_ns)
    counter.run(5)
    assert len(counter.calls_ns) - calls == pytest.approx(5 / 0.054, abs=2)
    counter.stopped_ns = 1 << 62
    counter.run(6)
    assert counter.pace.grid is not None and abs(counter.off_ns()) <= counter.pace.grid.half_ns + 0.1 * MS


@pytest.mark.parametrize(("period_ms", "took_ms"), [(10.0, 4.0), (1.0, 0.1), (20.0, 20.0)])
def test_a_counter_that_is_quicker_than_calls_can_tell_stays_at_the_interval(period_ms: float, took_ms: float) -> None:
    counter = Counter(period_ms=period_ms, took_ms=took_ms)
    counter.run(4)
    calls = len(counter.calls_ns)
    counter.run(10)
    assert set(counter.grids) == {float("inf")}
    # And its age is known: it is not updated more rarely than it was seen to be.
    assert counter.pace.period_ns is not None and counter.period_ns * 0.9 <= counter.pace.period_ns < INTERVAL_NS
    assert len(counter.calls_ns) - calls == pytest.approx(10 / (0.05 + took_ms / 1e3), rel=0.03)


def test_a_slow_counter_is_not_watched_for_ever() -> None:
    counter = Counter(period_ms=1000.0)
    counter.run(12)
    assert counter.pace.grid is not None and counter.calls_per_update(20) < 3.5


class Watched(Series):
    """A series that counts the rows that are asked of it."""

    rows = 0

    def part(self, first: int, end: int) -> Series:
        found = super().part(first, end)
        self.rows = max(self.rows, len(found.t_ns))
        return found


def test_a_counter_without_a_period_costs_no_more_the_longer_the_session_is() -> None:
    """Its updates keep no time, so a period is looked for at every change: in its last readings, not in all of them."""
    counter, draw = Counter(), random.Random(2)
    counter.series = series = Watched()
    for _ in range(400):
        counter.run(0.15)
        counter.shift(draw.uniform(-40, 40))
    assert counter.pace.grid is None and len(series.t_ns) > 1000
    assert 0 < series.rows <= 512


# --- read seldom --------------------------------------------------------------------------------------------------------


def test_a_trusted_counter_is_read_once_a_second() -> None:
    seldom, each = Counter(apart_ns=10**9), Counter()
    seldom.run(10)
    each.run(10)
    assert seldom.calls_per_update(60) < 0.3 and each.calls_per_update(60) >= 1.0
    calls = [t for t in seldom.calls_ns if t > 10**12 + 10 * 10**9]
    assert max(b - a for a, b in itertools.pairwise(calls)) < 1.2e9, "and no more rarely"


def test_no_update_is_left_out_before_so_many_kept_their_time() -> None:
    counter = Counter(apart_ns=10**9)
    for _ in range(1000):
        if counter.pace.seen is not None:
            break
        counter.now_ns = max(counter.call(), counter.now_ns + 50_000)
    values = counter.series.value
    assert counter.pace.seen is not None and values[-1] - values[0] >= 20.0 * TRUST
    assert max(b - a for a, b in itertools.pairwise(values)) == 20.0


@pytest.mark.parametrize("phase_ms", [7.0, 37.0, 81.0])
def test_when_it_was_updated_last_is_known_however_seldom_it_is_read(phase_ms: float) -> None:
    counter = Counter(phase_ms=phase_ms, apart_ns=10**9)
    counter.run(8)
    off = []
    for _ in range(200):
        counter.now_ns = max(counter.call(), counter.now_ns + 50_000)
        assert counter.pace.seen is not None and counter.pace.grid is not None
        t_ns, half_ns = counter.pace.seen
        update_ns = counter._phase_ns + round((t_ns - counter._phase_ns) / counter.period_ns) * counter.period_ns
        off.append(abs(update_ns - t_ns) - half_ns)
        assert half_ns < 30 * MS and t_ns - half_ns <= counter.now_ns
    assert max(off) < MS / 2


def test_an_update_soon_after_the_edge_of_a_window_is_read_and_known() -> None:
    counter = Counter(apart_ns=10**9)
    counter.run(8.0)
    due = counter.now_ns
    for share in (0.0, 0.2, 0.5, 0.8, 0.95):
        for _ in range(100):  # until it is read seldom
            counter.now_ns = max(due, counter.now_ns + 50_000)
            due = counter.call()
            if due - counter.now_ns >= 500 * MS:
                break
        edge_ns = counter.now_ns = counter.now_ns + round((3 + share) * counter.period_ns)
        due = counter.pace.near(edge_ns, edge_ns, due)
        assert due - edge_ns < 1.1 * counter.period_ns
        while counter.now_ns < edge_ns + 250 * MS:
            counter.now_ns = max(due, counter.now_ns + 50_000)
            due = counter.call()
        at = counter.updates_before(edge_ns)
        told = next(v for v in counter.series.value if v > 20.0 * at)
        assert told <= 20.0 * (at + 2), "the first after it; or the second, where it was too late for the first"
        near = counter.series.between(edge_ns - 10**9, counter.now_ns)
        found, grid = knots(near, None, (counter.pace.period_ns or 0) / 1e9, counter.pace.seen)
        assert grid is not None and grid.half_ns < 10 * MS
        after = next(knot for knot in found if knot.joules == told)
        assert abs(after.t_ns - counter._phase_ns - told / 20.0 * counter.period_ns) <= after.half_ns + MS / 4


def until_seldom(counter: Counter, due: int) -> int:
    """Read on until the next reading is half a second away; when that is."""
    for _ in range(100):
        counter.now_ns = max(due, counter.now_ns + 50_000)
        due = counter.call()
        if due - counter.now_ns >= 500 * MS:
            return due
    raise AssertionError("it is never read seldom")


@pytest.mark.parametrize("ms", [-3, -1, 0, 1, 3])
def test_an_update_that_may_be_due_at_an_edge_is_read_when_it_is_surely_over(ms: float) -> None:
    """And not the next one, 100 ms later: the cell around the edge would be two periods long and its end far away."""
    counter = Counter(apart_ns=10**9)
    counter.run(8.0)
    due = counter.now_ns
    for _ in range(5):
        due = until_seldom(counter, due)
        at = counter.updates_before(counter.now_ns) + 3
        edge_ns = counter.now_ns = round(counter._phase_ns + at * counter.period_ns + ms * MS)
        due = counter.pace.near(edge_ns, edge_ns, due)
        assert 0 < due - edge_ns < 12 * MS


def test_a_visit_may_be_early_or_late_and_still_is_between_two_updates() -> None:
    for part in (-1.0, 1.0):
        counter = Counter(apart_ns=10**9)
        counter.run(8.0)
        due = until_seldom(counter, counter.now_ns)
        slack_ns = counter.pace.slack_ns
        assert 15 * MS < slack_ns < 25 * MS
        counter.now_ns = due + round(part * slack_ns)
        assert counter.updates_before(counter.now_ns - 5 * MS) == counter.updates_before(counter.now_ns + 9 * MS)
        known = counter.pace.seen
        counter.call()
        assert counter.pace.seen is not None and counter.pace.seen != known
        due = until_seldom(counter, counter.now_ns)
        assert counter.pace.slack_ns
        counter.pace.near(counter.now_ns, counter.now_ns, due)
        assert counter.pace.slack_ns == 0, "near an edge the instants are exact"


def test_an_edge_is_nothing_to_a_counter_whose_period_is_not_known() -> None:
    pace = Pace(INTERVAL_NS, 10**9)
    assert pace.near(5, 7, 11) == 11


@pytest.mark.parametrize("ms", [20, -20, 45])
@pytest.mark.parametrize("seconds", [8.0, 8.4, 9.1, 11.9])
def test_a_counter_that_no_longer_keeps_its_time_is_read_at_each_update(seconds: float, ms: float) -> None:
    """Whenever it happens, and whether its updates come later or earlier: one in so many visits looks for it."""
    counter = Counter(apart_ns=10**9)
    counter.run(seconds)
    assert counter.pace.seen is not None
    counter.shift(ms)
    before = counter.now_ns
    while counter.pace.seen is not None and counter.now_ns < before + 15 * 10**9:
        counter.now_ns = max(counter.call(), counter.now_ns + 50_000)
    assert counter.pace.seen is None
    lost = counter.now_ns
    counter.run(1.5)
    assert sum(t > lost for t in counter.calls_ns) >= 13


@pytest.mark.parametrize("took_ms", [4.0, 15.0])
@pytest.mark.parametrize("stalled_ms", [300, 1000, 3000])
def test_a_stall_soon_after_the_period_was_found_is_got_over(took_ms: float, stalled_ms: float) -> None:
    """The walls are then more than a period apart, and no call could ever tell which update it saw."""
    for phase_ms in (3.0, 37.0, 61.0, 88.0):
        counter = Counter(phase_ms=phase_ms, took_ms=took_ms, apart_ns=10**9)
        while counter.pace.grid is None:
            counter.now_ns = max(counter.call(), counter.now_ns + 50_000)
        counter.now_ns += round(stalled_ms * MS)
        counter.run(12)
        assert counter.pace.grid is not None and counter.pace.grid.half_ns < took_ms * MS
        assert abs(counter.off_ns()) < took_ms * MS


def test_a_visit_comes_long_after_an_update() -> None:
    """A call of an H200's driver that begins within 13 ms of one waits until these are over, and computes meanwhile."""
    counter = Counter(apart_ns=10**9)
    counter.run(8)
    first = len(counter.calls_ns)
    counter.run(60)
    visits = [b for a, b in itertools.pairwise(counter.calls_ns[first:]) if b - a > 500 * MS]
    since_update = [(t - counter._phase_ns) % counter.period_ns / counter.period_ns for t in visits]
    assert len(visits) > 30 and min(since_update) > 0.4 and max(since_update) < 0.7


@pytest.mark.parametrize("looks", [0.1, 0.5, 0.9])
def test_calls_that_take_long_do_not_keep_it_from_being_read_seldom(looks: float) -> None:
    """Walls come together although each call is a twenty-fifth of a period long, and all look after the same part of it."""
    counter = Counter(apart_ns=10**9)
    counter.looks = looks
    counter.run(6)
    assert counter.pace.seen is not None
    assert counter.calls_per_update(10) < 0.35


def test_a_slow_call_among_the_first_does_not_spoil_the_walls() -> None:
    """Of its value it is not known which of three updates it comes from."""
    for slow in range(3, 60, 2):
        counter = Counter()
        for i in range(60):
            counter.took_ns = 230 * MS if i == slow else 4 * MS
            counter.now_ns = max(counter.call(), counter.now_ns + 50_000)
        counter.took_ns = 4 * MS
        counter.run(2)
        assert counter.pace.grid is not None and abs(counter.off_ns()) <= counter.pace.grid.half_ns + MS / 4, slow
