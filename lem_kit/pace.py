"""When to read a counter next, so that few calls tell exactly when it was updated.

The one idea: a call into the driver takes milliseconds and its locks disturb what is measured, so a counter is not polled.
It is watched closely until its updates are seen to keep to a period; from then on it is read about once per update. Two
walls are kept around the instant of the next update, and two around the period:

    a call that shows the old value   raises the lower wall to the beginning of the call
    one that shows the new value      lowers the upper wall to the end of the call
    both walls, and those around an early update n periods ago, confine the period to their distance / n

Calls are aimed at the middle between the walls, and every third at the lower one, so that both stay known. A counter that is
updated more often than it is to be read is read at every second update or so. What such a call shows may be new and yet not
the value of the last update, so it moves no wall; every third is followed by one at the very next update, which does.

Not covered: counters whose age is known; they are read at the sampler's interval.
"""

from __future__ import annotations

from statistics import median

from .staircase import MOST_JITTER, Grid, brackets, period_ns
from .trace import Series

WATCH_NS = 10_000_000  # from the beginning of one call to that of the next while the period is looked for
WATCHED_NS = 2_000_000_000  # a counter that shows no period for so long is read at the interval
NEEDED = 6  # updates seen before a period is believed
AGAIN_NS = 1_000_000  # after a call that came too early; then twice that, and so on
MOST_TRIES = 7
MOST_DOUBT = 0.4  # distance of the walls, as a part of the period, beyond which no update is passed over
NARROW = 0.8  # part of a period that a call may take, with the time to the one before, while the period is looked for
VERY_NARROW = 0.25  # the same for calls at the interval, which may seem to have a period of their own
STOOD = 60  # a counter that did not change in so many calls, and then does, is watched again
EARLY_EVERY = 3
DRIFT = 1e-7  # how much the period may change from one update to the next


class Pace:
    """For one counter. Call `after` when it was read; it returns when to read next (ns)."""

    def __init__(self, interval_ns: int) -> None:
        self.grid: Grid | None = None  # where the updates are expected, phase_ns being that of the next call's
        self._interval_ns = interval_ns
        self._since_ns: int | None = None
        self._walls = (0.0, 0.0)  # around the update that the next call is to see
        self._expected = (0.0, 0.0)  # the same, before any call at it
        self._periods = (0.0, 0.0)
        self._anchor = (0.0, 0.0)  # around an early update
        self._passed = 0  # periods between that one and the next
        self._tries = 0
        self._calls = 0
        self._aim_ns: int | None = None
        self._blind = 0  # calls that passed over updates
        self._sure = True  # the value now shown is that of the update before the walls

    def after(self, series: Series, now_ns: int) -> int:
        """`series` holds all readings of the counter, the last of them just made."""
        if self._since_ns is None:
            self._since_ns = now_ns
        changed = len(series.value) > 1 and series.value[-1] != series.value[-2]
        ended_ns = series.t_ns[-1]
        began_ns = ended_ns - (series.took_ns[-1] if series.took_ns else 0)
        self._calls += 1
        if self.grid is None:
            watching = now_ns - self._since_ns < WATCHED_NS
            if changed and not watching and self._stood(series):
                self._since_ns, watching = now_ns, True
            if not (changed and self._begin(series, NARROW if watching else VERY_NARROW)):
                closely = max(now_ns + AGAIN_NS, began_ns + WATCH_NS)
                return min(closely, now_ns + self._interval_ns) if watching else now_ns + self._interval_ns
            return self._next(now_ns, 1)
        low, high = self._walls
        if not self._sure:
            self._sure = ended_ns <= low or began_ns >= high
            if ended_ns > low:
                self._blind += 1
                return self._onwards(now_ns, follow=self._sure and self._blind % EARLY_EVERY == 0)
            return max(now_ns + AGAIN_NS, int((low + high) / 2))
        if changed:
            self._close_in(low, min(high, ended_ns))
        else:
            self._close_in(max(low, began_ns), high)
        if self.grid is None:
            return now_ns + WATCH_NS
        return self._onwards(now_ns) if changed else self._again(now_ns)

    def _onwards(self, now_ns: int, follow: bool = False) -> int:
        """On to the next update, or to a later one that comes about an interval from now."""
        aimed = self._aim_ns is not None and self._aim_ns > now_ns
        shortest, longest = self._periods
        period = (shortest + longest) / 2
        periods = max(1, round(self._interval_ns / period))
        doubt = self._walls[1] - self._walls[0] + periods * (longest - shortest)
        return self._next(now_ns, 1 if aimed or follow or doubt > MOST_DOUBT * period else periods)

    def _stood(self, series: Series) -> bool:
        """Whether the counter was seen to stand still for some calls before the last one."""
        before = series.value[-STOOD - 1 : -1]
        return len(before) == STOOD and before[0] == before[-1]

    def _begin(self, series: Series, narrow: float) -> bool:
        """Whether the last changes keep to a period; if so, the walls are set."""
        start = next((i for i, t in enumerate(series.t_ns) if t >= (self._since_ns or 0)), 0)
        found = brackets(series.part(start, len(series.t_ns)))[-2 * NEEDED :]
        period: float | None = period_ns(found)
        if len(found) < NEEDED or period is None or period < 1.5 * WATCH_NS:
            return False
        if median(b.hi_ns - b.lo_ns for b in found) > narrow * period:  # it may be the period of the calls
            return False
        first, last = found[0], found[-1]
        low, high = 0.0, float("inf")
        for b in found[1:]:
            n = round((b.hi_ns - first.hi_ns) / period)
            if n > 0:
                low, high = max(low, (b.lo_ns - first.hi_ns) / n), min(high, (b.hi_ns - first.lo_ns) / n)
        if low > high or high > low * 1.5:
            return False
        self._anchor, self._periods = (float(first.lo_ns), float(first.hi_ns)), (low, high)
        self._passed = round((last.hi_ns - first.hi_ns) / period)
        self._walls = (float(last.lo_ns), float(last.hi_ns))
        self._tell()
        return True

    def _close_in(self, low: float, high: float) -> None:
        """New walls. Where they cross, an update missed its time: by a little, and they meet half-way; or all is lost."""
        period = sum(self._periods) / 2
        if max(low - self._expected[1], self._expected[0] - high) > MOST_JITTER * period:
            self._lose()
            return
        if low > high:
            low, high = (low + high) / 2 - (low - high), (low + high) / 2 + (low - high)
        shortest, longest = self._periods
        n = self._passed
        shortest, longest = shortest * (1 - DRIFT), longest * (1 + DRIFT)
        if n > 0:
            shortest, longest = max(shortest, (low - self._anchor[1]) / n), min(longest, (high - self._anchor[0]) / n)
        if shortest > longest:  # it drifts: remember from here
            shortest, longest = period * (1 - 1e-4), period * (1 + 1e-4)
            self._anchor, self._passed = (low, high), 0
        self._walls, self._periods = (low, high), (shortest, longest)
        self._tell()

    def _lose(self) -> None:
        self.grid, self._since_ns, self._tries, self._aim_ns, self._sure = None, None, 0, None, True

    def _tell(self) -> None:
        low, high = self._walls
        self.grid = Grid((low + high) / 2, sum(self._periods) / 2, (high - low) / 2)

    def _again(self, now_ns: int) -> int:
        """The call came too early."""
        self._tries += 1
        if self._tries > MOST_TRIES:
            self._lose()
            return now_ns + WATCH_NS
        return max(now_ns + (AGAIN_NS << (self._tries - 1)), int((self._walls[0] + self._walls[1]) / 2))

    def _next(self, now_ns: int, periods: int) -> int:
        """Aim at the update so many periods after the one just seen, or a later one if that is past."""
        self._tries = 0
        low, high = self._walls
        shortest, longest = self._periods
        periods = max(periods, int((now_ns - low) / longest) + 1)
        self._walls = self._expected = (low + periods * shortest, high + periods * longest)
        self._passed += periods
        self._sure = self._sure and periods == 1
        self._tell()
        low, high = self._walls
        if not self._sure:  # surely after the update
            return int(high) + AGAIN_NS
        aim: float = low if self._calls % EARLY_EVERY == 0 else (low + high) / 2
        return int(aim)

    def aim(self, t_ns: int) -> bool:
        """See that the first update after `t_ns` is read, where not every one is. True: read the counter now as well."""
        if self.grid is None or self._interval_ns < 1.5 * self.grid.period_ns:
            return False
        self._aim_ns = t_ns + int(self.grid.period_ns)
        return True
