"""When to read a counter next, so that few calls tell exactly when it was updated.

The one idea: a call into the driver takes milliseconds and its locks disturb what is measured, so a counter is not polled.
It is watched closely until its updates are seen to keep to a period; from then on it is read about once per update. Two
walls are kept around the instant of the next update, and two around the period:

    a call that shows the old value   raises the lower wall to the beginning of the call
    one that shows the new value      lowers the upper wall to the end of the call
    both walls, and those around an early update n periods ago, confine the period to their distance / n

Calls are aimed at the middle between the walls, and every third at the lower one, so that both stay known; where walls are
to come together soon, with their own middle, so that either answer moves one far. Every sixteenth ends before the update:
of a call that meets one it is not known which value it saw, and one that is sure tells it for those beside it. After a call
that took so long that an update was passed over, the next ones tell nothing about the walls until one is surely after its
update.

Where samples of power tell what is between, a counter is read at each update only around the edges of windows, and seldom
else (`apart_ns`): on a real board each reading computes for milliseconds. Such a visit reads once, surely between two
updates; when the walls have come apart, and in one of seven visits whatever they are, it also reads at the next update, so
that a counter that has left its grid is found out. Not if it left it by little: what comes a tenth of a period late or
early is taken for its jitter, and where it is seen, the walls are moved to hold it.

Not covered: counters that are updated more often than the sampler's interval, or whose age is known; they are read at the
interval.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from statistics import median

from .staircase import MOST_JITTER, Grid, brackets, period_ns
from .trace import Series

WATCH_NS = 10_000_000  # distance of calls while the period is looked for
WATCHED_NS = 2_000_000_000  # a counter that shows no period for so long is read at the interval
NEEDED = 6  # updates seen before a period is believed
AGAIN_NS = 1_000_000  # after a call that came too early; then twice that, and so on
MOST_TRIES = 7
EARLY_EVERY = 3
SURE_EVERY = 16
LOOK_BACK = 512  # readings in which a period is looked for: they hold 2 * NEEDED updates of any that WATCHED_NS can show
NARROW = 0.8  # part of a period that a call may take, with the time to the one before, while the period is looked for
VERY_NARROW = 0.25  # the same for calls at the interval, which may seem to have a period of their own
STOOD = 60  # a counter that did not change in so many calls, and then does, is watched again
DRIFT = 1e-7  # how much the period may change from one update to the next
# For so many periods after the edge of a window every update is read: more would make its energy no more exact.
CLOSE = 1.0
# Walls are near enough if they are so much of a period apart, or so many calls; for visits they may come to be so much more.
NEAR, NEAR_CALLS, FAR = 0.04, 1.5, 0.25
MOST_EVIDENCE = 3  # updates read in a visit to bring the walls together
TRUST = 20  # updates in a row that kept their time, `NEAR` a period, before any is left out
TEST_EVERY = 4  # of them, the call before which no update may come
CHECK_EVERY = 6  # visits, after which one also looks whether the counter still keeps its time


class Pace:
    """For one counter. Call `after` when it was read; it returns when to read next (ns). `apart_ns`: how long it need not be
    read where no window begins or ends; 0 to have every update read. Call `near` for each such edge."""

    def __init__(self, interval_ns: int, apart_ns: int = 0) -> None:
        self.period_ns: float | None = None
        self.period_half_ns = 0.0
        self.apart_ns = apart_ns
        self.slack_ns = 0  # by how much the next reading may come before or after the instant that was asked for
        self._interval_ns = interval_ns
        self._close_until_ns = 0
        self._evidence = 0  # updates read one after another
        self._kept_time = 0  # so many did in a row
        self._visits = 0  # since the last that looked whether they still do
        self._skipped = False  # an update came between the last call and the walls
        self._since_ns: int | None = None
        self._expects = False  # a period is believed
        self._walls = (0.0, 0.0)  # around the update that the next call is to see
        self._expected = (0.0, 0.0)  # the same, before any call at it
        self._periods = (0.0, 0.0)
        self._anchor = (0.0, 0.0)  # around an early update
        self._passed = 0  # periods between that one and the next
        self._seen = ((0.0, 0.0), 0)  # walls around the update seen last, and the periods passed at it
        self._tries = 0
        self._calls = 0
        self._took_ns = 0  # the last call
        self._sure = True  # the value that the last call showed is that of the update before the walls
        self._fast = False  # updated more often than it is to be read: its age is known then, which is enough

    @property
    def grid(self) -> Grid | None:
        """Where the updates are expected, phase_ns being that of the next call's; None while no period is believed."""
        if not self._expects or self.period_ns is None:
            return None
        low, high = self._walls
        return Grid((low + high) / 2, self.period_ns, (high - low) / 2)

    @property
    def seen(self) -> tuple[int, int] | None:
        """When the update was that was seen last, and within what (ns); None while updates are not trusted to keep time."""
        (low, high), _ = self._seen
        return (round((low + high) / 2), math.ceil((high - low) / 2)) if self._kept_time >= TRUST else None

    def after(self, series: Series, now_ns: int) -> int:
        """`series` holds all readings of the counter, the last of them just made."""
        self.slack_ns = 0
        if self._since_ns is None:
            self._since_ns = now_ns
        changed = len(series.value) > 1 and series.value[-1] != series.value[-2]
        self._calls += 1
        if not self._expects:
            watching = now_ns - self._since_ns < WATCHED_NS and not self._fast
            if changed and not watching and _stood(series):
                self._since_ns, self._fast, watching = now_ns, False, True
            if self._fast or not (changed and self._begin(series, NARROW if watching else VERY_NARROW)):
                return now_ns + (min(WATCH_NS, self._interval_ns) if watching and not self._fast else self._interval_ns)
            return self._next(now_ns)
        low, high = self._walls
        ended_ns = series.t_ns[-1]
        self._took_ns = series.took_ns[-1] if series.took_ns else 0
        began_ns = ended_ns - self._took_ns
        if self._skipped and not changed:  # updates went by, and it did not move
            self._lose()
            return now_ns + WATCH_NS
        if not self._sure:  # what is new may be of an update before, so it moves no wall
            before = ended_ns <= low and began_ns >= high - self._periods[0]
            self._sure, self._skipped = before or began_ns >= high, self._skipped and not before
            if ended_ns > low:
                return self._next(now_ns)
            return max(now_ns + AGAIN_NS, int((low + high) / 2) if before else int(high) + AGAIN_NS)
        if changed:
            self._close_in(low, min(high, ended_ns))
        else:
            self._close_in(max(low, began_ns), high)
        if not self._expects:
            return now_ns + WATCH_NS
        if not changed:
            return self._again(now_ns)
        return self._next(now_ns)

    def near(self, edge_ns: int, now_ns: int, due_ns: int) -> int:
        """A window begins or ends at `edge_ns`: when to read next, `due_ns` being what was planned."""
        self.slack_ns = 0
        if not self._expects or self.period_ns is None:
            return due_ns
        self._close_until_ns = edge_ns + int(CLOSE * self.period_ns)
        if due_ns - now_ns <= self.period_ns:
            return due_ns
        (low, high), longest = self._seen[0], self._periods[1]
        passed_ns = int((now_ns - low) / longest) * longest
        # An update that may be due just now is read as soon as it is surely over.
        aim = self._aim(int(low + passed_ns) - 1 if passed_ns and now_ns < high + passed_ns else now_ns)
        low, high = self._walls
        between = high - self._periods[0] <= now_ns and now_ns + 2 * self._took_ns + AGAIN_NS < low
        return now_ns if between and not self._sure else aim  # now, if surely the update before is the last

    def _begin(self, series: Series, narrow: float) -> bool:
        """Whether the last changes keep to a period; if so, the walls are set."""
        start = max(bisect_left(series.t_ns, self._since_ns or 0), len(series.t_ns) - LOOK_BACK)
        found = brackets(series.part(start, len(series.t_ns)))[-2 * NEEDED :]
        period: float | None = period_ns(found)
        if len(found) < NEEDED or period is None:
            return False
        if period < self._interval_ns:
            self.period_ns, self._fast = period, True
            return False
        if median(b.hi_ns - b.lo_ns for b in found) > narrow * period:  # it may be the period of the calls
            return False
        last, found = found[-1], [b for b in found if b.hi_ns - b.lo_ns <= narrow * period]
        if len(found) < NEEDED or found[-1] is not last:  # of a call that took long it is not known which update it saw
            return False
        first, low, high = found[0], 0.0, float("inf")
        for b in found[1:]:
            n = round((b.lo_ns + b.hi_ns - first.lo_ns - first.hi_ns) / 2 / period)
            if n > 0:
                low, high = max(low, (b.lo_ns - first.hi_ns) / n), min(high, (b.hi_ns - first.lo_ns) / n)
        if low > high or high > low * 1.5:
            return False
        self._anchor, self._periods = (float(first.lo_ns), float(first.hi_ns)), (low, high)
        self._passed = round((last.lo_ns + last.hi_ns - first.lo_ns - first.hi_ns) / 2 / period)
        self._walls = (float(last.lo_ns), float(last.hi_ns))
        self._expects = True
        self._tell()
        return True

    def _close_in(self, low: float, high: float) -> None:
        """New walls. Where they cross, an update missed its time: a little, and they meet half-way; or the grid is lost."""
        period = sum(self._periods) / 2
        missed, near = max(low - self._expected[1], self._expected[0] - high), self._near_ns()
        if missed > MOST_JITTER * period:
            self._lose()
            return
        self._kept_time = 0 if missed > near else self._kept_time + (high - low <= near)
        if low > high:
            low, high = (low + high) / 2 - (low - high), (low + high) / 2 + (low - high)
        shortest, longest = self._periods
        n = self._passed
        drift = DRIFT * max(n - self._seen[1], 1)
        shortest, longest = shortest * (1 - drift), longest * (1 + drift)
        seen = ((low - self._anchor[1]) / n, (high - self._anchor[0]) / n) if n > 0 else (shortest, longest)
        if max(shortest, seen[0]) > min(longest, seen[1]):  # it drifts, or was wrong
            shortest, longest = min(shortest, seen[0]), max(longest, seen[1])
            self._anchor, self._passed = (low, high), 0
            self._walls, self._periods = (low, high), (shortest, longest)
            self._tell()
            return
        shortest, longest = max(shortest, seen[0]), min(longest, seen[1])
        if high - low < (self._anchor[1] - self._anchor[0]) / 2:  # known better than the early one ever was
            self._anchor, self._passed = (low, high), 0
        self._walls, self._periods = (low, high), (shortest, longest)
        self._tell()

    def _lose(self) -> None:
        self._expects, self._since_ns, self._tries, self._sure, self._skipped = False, None, 0, True, False
        self._kept_time = 0

    def _tell(self) -> None:
        self.period_ns = sum(self._periods) / 2
        self.period_half_ns = (self._periods[1] - self._periods[0]) / 2

    def _again(self, now_ns: int) -> int:
        """The call came too early."""
        self._tries += 1
        if self._tries > MOST_TRIES:
            self._lose()
            return now_ns + WATCH_NS
        return max(now_ns + (AGAIN_NS << (self._tries - 1)), int((self._walls[0] + self._walls[1]) / 2))

    def _next(self, now_ns: int) -> int:
        """Aim at an update after the one just seen."""
        self._tries = 0
        self._seen = (self._walls, self._passed)
        return self._aim(now_ns)

    def _aim(self, now_ns: int) -> int:
        """At the update after the one seen last; at a later one if that is past, or need not be read."""
        (low, high), passed = self._seen
        shortest, longest = self._periods
        periods = max(int((now_ns - low) / longest) + 1, self._stride(now_ns))
        self._sure = self._sure and periods == 1
        checking = periods == 1 and self._visits >= CHECK_EVERY
        self._visits = self._visits + 1 if periods > 1 else 0 if checking else self._visits
        self._evidence, self._skipped = (self._evidence + 1, False) if periods == 1 else (0, True)
        self._walls = self._expected = (low + periods * shortest, high + periods * longest)
        self._passed = passed + periods
        low, high = self._walls
        if not self._sure:
            if high - low >= shortest:  # no call can tell which update it saw, now or ever
                self._lose()
                return now_ns + WATCH_NS
            if low < self._close_until_ns:
                return int(high) + AGAIN_NS  # surely after the update
            self.slack_ns = int((low + shortest - high) / 4)
            return int((high + low + shortest) / 2)  # long after it, for a driver is slow to answer just then
        if self._calls % SURE_EVERY == 1:
            return int(low) - self._took_ns - AGAIN_NS  # surely before it
        if self.apart_ns and self._kept_time < TRUST and self._calls % TEST_EVERY == 1:
            checking = True
        if checking:  # so that one too early is seen
            return int(low - self._near_ns()) - self._took_ns - AGAIN_NS
        if self.apart_ns and high - low > self._near_ns():
            return int((low + high - self._took_ns) / 2)  # the call's middle at theirs: either answer moves a wall the most
        aim: float = low if self._calls % EARLY_EVERY == 0 else (low + high) / 2
        return int(aim)

    def _stride(self, now_ns: int) -> int:
        """How many periods after the update seen last the next one to be read is."""
        low, high = self._seen[0]
        shortest, longest = self._periods
        period = (shortest + longest) / 2
        if now_ns < self._close_until_ns or self._kept_time < TRUST:
            return 1
        if self._visits >= CHECK_EVERY or (high - low > self._near_ns() and self._evidence < MOST_EVIDENCE):
            return 1
        room = (FAR * period - (high - low)) / max(longest - shortest, 1.0)
        return max(int(min(self.apart_ns / period, room)), 1)

    def _near_ns(self) -> float:
        return max(NEAR * sum(self._periods) / 2, NEAR_CALLS * self._took_ns)


def _stood(series: Series) -> bool:
    """Whether the counter stood still for some calls before the last one."""
    before = series.value[-STOOD - 1 : -1]
    return len(before) == STOOD and before[0] == before[-1]
