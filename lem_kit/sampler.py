"""One thread per session that reads every source and gauge into a Trace.

The one idea: the user's thread never reads hardware. It takes a time stamp at a window's edge and later looks at the trace.
The thread keeps a short list of jobs with the instant at which each is due: a source, or one domain of a source whose calls
are slow, at the instants that its `Pace` chooses; the gauges and samples of each source at an interval of their own. A
source that fails is written into the trace as a failure and tried again; nothing raised by a source leaves this thread. The
thread also closes the sources when it ends, so that one that hangs in a driver is never closed under it.

Not covered: where a window's energy comes from (`curve.energy_between`), when a paced counter is read (`pace`).
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .energy import EnergySource, Reading, failure_code
from .errors import LemError
from .pace import Pace
from .samples import SEEN_AFTER
from .staircase import brackets, period_ns
from .trace import Series, Trace

# A window's end waits at most this long for a counter's next update, however slow the counter.
LONGEST_WAIT_S = 0.25
# `stop` waits this long for a source that is being read or closed.
LONGEST_STOP_S = 30.0
# Samples of power come some 20 ms late: they are asked for again for so long at most, so often.
LATE_SAMPLES_S, LATE_SAMPLE_S = 0.08, 0.008
SPARSE = 0.75  # where they are spread over a larger part of the counter's period, they are too few to tell its course
# A source that goes on failing is written down, and tried again, this often.
REPEAT_FAILURE_NS = 1_000_000_000
# Jobs that are due within this time are done in one waking.
TOGETHER_NS = 1_000_000
# So far apart are readings of a counter whose power is sampled, where no window begins or ends; and so often the thread
# looks whether one does: to wake it there would cost the user's thread its turn.
APART_NS = 1_000_000_000
LOOK_NS = 50_000_000
NEVER_NS = 1 << 62


@dataclass
class Job:
    """Something to read: the counters of a source, or of one `domain` of it; or else its "gauges" or "samples" (`side`)."""

    source: EnergySource
    interval_ns: int
    domain: str | None = None
    pace: Pace | None = None
    side: str = ""
    due_ns: int = 0
    begun_ns: int = 0  # when it was last begun
    told_ns: int = 0  # when the last one that has ended was begun, also if it failed
    wanted_ns: int = 0  # set by other threads: do it once more after this instant

    @property
    def slack_ns(self) -> tuple[int, int]:
        """How long before and after `due_ns` it may be done, so that it needs no waking of its own."""
        if self.pace is not None:
            return self.pace.slack_ns, self.pace.slack_ns
        return 0, LOOK_NS if self.interval_ns >= 10 * LOOK_NS else 0

    @cached_property
    def name(self) -> str:
        return self.source.name if self.domain is None else f"{self.source.name}:{self.domain}"


class Sampler:
    """Reads `sources` into `trace`, every `interval_s` where nothing else is said. `start` begins the thread, `stop` ends it
    and closes the sources.

    LemError for two sources of one name, since their readings would be taken for one counter's; they are closed then.
    """

    def __init__(
        self, sources: Iterable[EnergySource], interval_s: float = 0.05, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.sources = list(sources)
        self.interval_s = interval_s
        self.trace = Trace(interval_s=interval_s)
        self.busy_ns = 0  # time spent inside calls: the meter's own share
        self.cpu_ns = 0  # and what it computed in that time and between
        self._clock = clock
        self._jobs: list[Job] = []
        self._unclosed: list[str] = []
        self._said: dict[str, tuple[str, int]] = {}
        self._edge_ns = self._edge_known_ns = 0  # the latest edge of a window, and that of which the paces know
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            self._close()
            raise LemError(f"Two energy sources are named {', '.join(twice)}, so their figures could not be told apart.")
        for source in self.sources:
            self._jobs += self._plan(source)
        self._seldom = [job for job in self._jobs if job.pace is not None and job.pace.apart_ns]

    def _plan(self, source: EnergySource) -> list[Job]:
        interval_ns = int(max(getattr(source, "interval_s", 0.0), self.interval_s) * 1e9)
        jobs = [Job(source, interval_ns)]
        if hasattr(source, "read_one"):
            own_ns, sampled = int(self.interval_s * 1e9), getattr(source, "sampled", ())
            jobs = [
                Job(source, interval_ns, domain, Pace(own_ns, APART_NS if domain in sampled else 0))
                for domain in source.domains
            ]
        for side in ("gauges", "samples"):
            side_s = max(getattr(source, f"{side}_interval_s", 0.0), self.interval_s)
            if hasattr(source, side) and math.isfinite(side_s):
                jobs.append(Job(source, int(side_s * 1e9), side=side))
        return jobs

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="lem-sampler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None

    def stop(self) -> None:
        """End the thread and close every source. May be called twice.

        A source that hangs is waited for `LONGEST_STOP_S`; after that the thread is left to end by itself, with a warning.
        """
        self._stopping = True
        self._wake.set()
        if self._thread is None:
            self._close()
        else:
            self._thread.join(LONGEST_STOP_S)
            if self._thread.is_alive():
                warnings.warn("An energy source does not answer. It is left behind, and closed when it does.", stacklevel=2)
            else:
                self._thread = None
        while self._unclosed:
            warnings.warn(self._unclosed.pop(), stacklevel=2)

    def _close(self) -> None:
        while self.sources:
            source = self.sources.pop()
            try:
                source.close()
            except Exception as error:  # one that cannot be closed must not keep the others open
                self._unclosed.append(f"The energy source '{source.name}' could not be closed: {error}")

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.clear()
            due_ns = self.sample()
            self.cpu_ns = time.thread_time_ns()
            self._wake.wait(max(due_ns - self._clock(), 0) / 1e9)
        self._close()

    def sample(self) -> int:
        """Do every job that is due; return when the next one is (ns). The thread calls this; tests may instead."""
        now = self._clock()
        if (edge_ns := self._edge_ns) > self._edge_known_ns:
            self._edge_known_ns = edge_ns
            for job in self._seldom:
                assert job.pace is not None
                job.due_ns = job.pace.near(edge_ns, now, job.due_ns)
        done, next_ns = False, now + LOOK_NS if self._seldom or not self._jobs else NEVER_NS
        for job in self._jobs:
            early_ns, late_ns = job.slack_ns
            if (job.wanted_ns > job.begun_ns or job.due_ns - early_ns <= now + TOGETHER_NS) and not self._stopping:
                self._do(job)
                done, late_ns = True, job.slack_ns[1]
            next_ns = min(next_ns, job.due_ns + late_ns)
        if done:
            self._tell()
        return next_ns

    def _do(self, job: Job) -> None:
        began = job.begun_ns = self._clock()
        job.due_ns = began + job.interval_ns
        failed = False
        try:
            if job.side:
                self._note_side(job.source, job.side)
            elif job.domain is None:
                self._note_readings(job.source, job.source.read())
                for domain, sentence in getattr(job.source, "failures", {}).items():
                    self._failed(f"{job.source.name}:{domain}", "source_failed", sentence)
            else:
                reading: Reading = job.source.read_one(job.domain)  # type: ignore[attr-defined]
                self._note_readings(job.source, {job.domain: reading})
        except Exception as error:  # whatever a driver throws belongs into the trace, not into the user's cell
            failed = True
            self._failed(job.name, failure_code(error), str(error) or type(error).__name__)
        ended = self._clock()
        job.told_ns = began
        self.busy_ns += ended - began
        if job.pace is not None:
            series = self.trace.counters.get(job.name)
            if failed or series is None:
                job.due_ns = ended + REPEAT_FAILURE_NS // 2
            else:
                job.due_ns = job.pace.after(series, ended)
                if job.pace.period_ns is not None:
                    self.trace.period_s[job.name] = job.pace.period_ns / 1e9
                    self.trace.period_half_s[job.name] = job.pace.period_half_ns / 1e9
                if job.pace.apart_ns and (seen := job.pace.seen) is not None:
                    self.trace.updates[job.name] = seen
                else:
                    self.trace.updates.pop(job.name, None)

    def _note_readings(self, source: EnergySource, readings: Mapping[str, Reading]) -> None:
        with self._changed:
            for domain, reading in readings.items():
                key = f"{source.name}:{domain}"
                series = self.trace.counters.get(key)
                if series is None:
                    self.trace.domains.setdefault(key, source.domains[domain])
                    series = Series()
                if not series.t_ns or reading.t_ns > series.t_ns[-1]:  # an instant is read once; later it is no news
                    series.append(*reading)
                self.trace.counters[key] = series  # only now: a series in the trace holds at least one reading

    def _note_side(self, source: EnergySource, side: str) -> None:
        found: Mapping[str, Any] = getattr(source, side)()
        now = self._clock()
        with self._changed:
            for name, told in found.items():
                key = f"{source.name}:{name}"
                series = self.trace.gauges.get(key)
                if series is None:
                    series = Series()
                series.extend([(now, told)] if side == "gauges" else told)
                if series.t_ns:
                    self.trace.gauges[key] = series

    def _failed(self, name: str, code: str, sentence: str) -> None:
        now = self._clock()
        with self._changed:
            before, said_ns = self._said.get(name, ("", 0))
            if before == sentence and now - said_ns < REPEAT_FAILURE_NS:
                return  # said just now: a dead device must not fill the record
            self._said[name] = (sentence, now)
            self.trace.failures.append((now, name, code, sentence))

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def edge(self) -> int:
        """The instant now, with an extra reading on its way where one helps: call it where a window opens."""
        now = self._edge_ns = self._clock()
        urgent = [job for job in self._jobs if not job.side and (job.pace is None or job.pace.grid is None)]
        for job in urgent:
            job.wanted_ns = now
        if urgent:  # waking the thread costs the user's thread its turn
            self._wake.set()
        return now

    def settle(self, t_ns: int) -> None:
        """Block until every counter was read after `t_ns`, and every stepping one seen to step, if it does so soon; and
        until `SEEN_AFTER` samples of power lie behind `t_ns`, since the course there is known from no others.

        Waits one refresh period of the slowest counter and the calls themselves, `LONGEST_WAIT_S` in all at most; then 80 ms
        at most for samples, which mostly are there by then. Without a thread it does every job once itself.
        """
        if self._thread is None:
            for job in [] if self._stopping else self._jobs:  # a source that is closed is read no more
                self._do(job)
            return
        if not self._all_told(t_ns):
            self._edge_ns = max(self._edge_ns, t_ns)
            self._wake.set()
        with self._changed:
            self._changed.wait_for(lambda: self._all_told(t_ns), self._longest_wait_s())
        sides = [job for job in self._jobs if job.side]
        until = self._clock() + int(LATE_SAMPLES_S * 1e9)
        while sides:
            began = self._clock()
            for job in sides:
                job.wanted_ns = began
            self._wake.set()
            with self._changed:
                self._changed.wait_for(lambda: all(job.told_ns > began for job in sides), 0.05)  # noqa: B023 (at once)
            sides = [job for job in sides if job.side == "samples"]
            if self._sampled(t_ns) or self._clock() > until:
                break
            time.sleep(LATE_SAMPLE_S)

    def _sampled(self, t_ns: int) -> bool:
        """Whether samples of power tell the course around `t_ns` of the counters that are read seldom."""
        for job in self._seldom:
            newest = self.trace.gauges.get(f"{job.name}.power_w", Series()).t_ns[-SEEN_AFTER:]
            grid = job.pace.grid if job.pace else None
            if newest and grid and newest[0] <= t_ns and newest[-1] - newest[0] <= SPARSE * grid.period_ns:
                return False
        return True

    def _longest_wait_s(self) -> float:
        """A period of the slowest counter that steps, and an interval or two of reading."""
        keys = [key for source in self.sources for key in self._stepping(source)]
        parts = {key: self.trace.counters[key].part(-64, len(self.trace.counters[key].t_ns)) for key in keys}
        known = [self.trace.period_s.get(key) or (period_ns(brackets(part)) or 1e9) / 1e9 for key, part in parts.items()]
        return min(LONGEST_WAIT_S, 1.2 * max(known, default=0.0) + 2 * self.interval_s)

    def _all_told(self, t_ns: int) -> bool:
        """Whether every counter has told what it can about the energy up to `t_ns`."""
        return all(self._told(job, t_ns) for job in self._jobs if not job.side)

    def _told(self, job: Job, t_ns: int) -> bool:
        began = job.told_ns
        if self._said.get(job.name, ("", 0))[1] >= began > 0:
            return began >= t_ns  # it fails: there is nothing to wait for
        if job.pace is None:
            return began >= t_ns and all(self._stepped(key, t_ns) for key in self._stepping(job.source))
        series = self.trace.counters.get(job.name, Series())
        if (grid := job.pace.grid) is not None:
            update_ns = grid.at(grid.last_before(t_ns) + 1)
            last = len(series.t_ns) - 1
            while last > 0 and series.value[last] == series.value[last - 1]:
                last -= 1
            return bool(series.t_ns) and series.t_ns[last] >= update_ns - grid.half_ns
        never = bool(series.t_ns) and series.value[0] == series.value[-1]
        fast = job.pace.period_ns is not None and job.pace.period_ns < self.interval_s * 1e9
        return began >= t_ns if never or fast else self._stepped(job.name, t_ns)

    def _stepping(self, source: EnergySource) -> list[str]:
        """Counters of unknown age that were seen to change."""
        keys = [f"{source.name}:{name}" for name, domain in source.domains.items() if domain.refresh_s is None]
        found = {key: self.trace.counters[key].value for key in keys if key in self.trace.counters}
        return [key for key, value in found.items() if value[0] != value[-1]]

    def _stepped(self, key: str, t_ns: int) -> bool:
        """Whether the counter changed between two readings that were both taken after `t_ns`."""
        series = self.trace.counters[key]
        first = bisect_left(series.t_ns, t_ns)
        return first < len(series.t_ns) and series.value[first] != series.value[-1]

    def slice(self, start_ns: int, end_ns: int) -> Trace:
        """A copy of the trace between two instants."""
        with self._changed:
            return self.trace.between(start_ns, end_ns)
