"""One thread per session that reads every source and gauge into a Trace.

The one idea: the user's thread never reads hardware. It takes a time stamp at a window's edge, asks the thread for an extra
pass, and later looks at the trace. A source that fails is written into the trace as a failure and tried again at the next
pass; nothing raised by a source leaves this thread. The thread also closes the sources when it ends, so that one that hangs
in a driver is never closed under it.

Not covered: where a window's energy comes from (`trace.energy_between`).
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

from .energy import EnergySource, Reading
from .errors import LemError
from .trace import Series, Trace, refresh_period_s

# A window's end waits at most this long for a counter's next update, however slow the counter.
LONGEST_WAIT_S = 0.25
# `stop` waits this long for a source that is being read or closed.
LONGEST_STOP_S = 30.0
# A source that goes on failing is written down this often.
REPEAT_FAILURE_NS = 1_000_000_000


class Sampler:
    """Reads `sources` every `interval_s` into `trace`. `start` begins the thread, `stop` ends it and closes the sources.

    LemError for two sources of one name, since their readings would be taken for one counter's; they are closed then.
    """

    def __init__(
        self, sources: Iterable[EnergySource], interval_s: float = 0.05, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.sources = list(sources)
        self.interval_s = interval_s
        self.trace = Trace(interval_s=interval_s)
        self.busy_ns = 0  # time spent inside `sample`: the meter's own share
        self._clock = clock
        self._due_ns: dict[str, int] = {}
        self._unclosed: list[str] = []
        self._said: dict[str, tuple[str, int]] = {}
        self._passes = 0
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._force = True
        self._stopping = False
        self._thread: threading.Thread | None = None
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            self._close()
            raise LemError(f"Two energy sources are named {', '.join(twice)}, so their figures could not be told apart.")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="lem-sampler", daemon=True)
        self._thread.start()

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
            self.sample()
            self._wake.wait(self.interval_s)
        self._close()

    def sample(self) -> None:
        """One pass over the sources that are due. The thread calls this; tests may instead."""
        started = self._clock()
        with self._changed:
            force, self._force = self._force, False
        for source in self.sources:
            if force or started >= self._due_ns.get(source.name, 0):
                self._due_ns[source.name] = started + int(getattr(source, "interval_s", 0.0) * 1e9)
                self._read(source)
        with self._changed:
            self._passes += 1
            self.busy_ns += self._clock() - started
            self._changed.notify_all()

    def _read(self, source: EnergySource) -> None:
        try:
            self._note_readings(source, source.read())
            for domain, sentence in getattr(source, "failures", {}).items():
                self._failed(f"{source.name}:{domain}", sentence)
            self._note_gauges(source, getattr(source, "gauges", dict)())
        except Exception as error:  # whatever a driver throws belongs into the trace, not into the user's cell
            self._failed(source.name, str(error) or type(error).__name__)

    def _note_readings(self, source: EnergySource, readings: Mapping[str, Reading]) -> None:
        with self._changed:
            for domain, reading in readings.items():
                key = f"{source.name}:{domain}"
                self.trace.domains.setdefault(key, source.domains[domain])
                series = self.trace.counters.get(key, Series())
                if not series.t_ns or reading.t_ns > series.t_ns[-1]:  # an instant is read once; later it is no news
                    series.append(*reading)
                self.trace.counters[key] = series  # only now: a series in the trace holds at least one reading

    def _note_gauges(self, source: EnergySource, gauges: Mapping[str, float]) -> None:
        with self._changed:
            now = self._clock()
            for name, value in gauges.items():
                if math.isfinite(value):
                    self.trace.gauges.setdefault(f"{source.name}:{name}", Series()).append(now, value)

    def _failed(self, name: str, sentence: str) -> None:
        now = self._clock()
        with self._changed:
            before, said_ns = self._said.get(name, ("", 0))
            if before == sentence and now - said_ns < REPEAT_FAILURE_NS:
                return  # said just now: a dead device must not fill the record
            self._said[name] = (sentence, now)
            self.trace.failures.append((now, name, sentence))

    def edge(self) -> int:
        """The instant now, with an extra pass on its way: call it where a window opens."""
        now = self._clock()
        self._request_pass()
        return now

    def _request_pass(self) -> None:
        with self._changed:
            self._force = True
        self._wake.set()

    def settle(self, t_ns: int) -> None:
        """Block until every source was read after `t_ns`, and every stepping counter seen to step, if it does so soon.

        Waits one refresh period of the slowest counter, `LONGEST_WAIT_S` in all at most. Without a thread it makes one
        pass itself.
        """
        if self._thread is None:
            self.sample()
            return
        give_up_s = time.monotonic() + LONGEST_WAIT_S
        self._request_pass()
        with self._changed:
            passes = self._passes
            # The pass under way may have begun before t_ns; the one after it did not.
            self._changed.wait_for(lambda: self._passes >= passes + 2 or self._all_after(t_ns), LONGEST_WAIT_S)
            waits = [self._refresh_s(key) for key in self.trace.counters if self._stepping(key)]
            if waits:
                longest_s = min(1.2 * max(waits) + self.interval_s, max(give_up_s - time.monotonic(), 0.0))
                self._changed.wait_for(lambda: self._stepped_after(t_ns), longest_s)

    def _all_after(self, t_ns: int) -> bool:
        counters = self.trace.counters.values()
        return bool(counters) and all(series.t_ns[-1] >= t_ns for series in counters)

    def _stepping(self, key: str) -> bool:
        series = self.trace.counters[key]
        return self.trace.domains[key].refresh_s is None and series.value[0] != series.value[-1]

    def _refresh_s(self, key: str) -> float:
        recent = self.trace.counters[key]
        return refresh_period_s(Series(recent.t_ns[-64:], recent.value[-64:])) or LONGEST_WAIT_S

    def _stepped_after(self, t_ns: int) -> bool:
        """Every stepping counter has changed between two readings that were both taken after `t_ns`."""
        for key, series in self.trace.counters.items():
            first = bisect_left(series.t_ns, t_ns)
            if self._stepping(key) and (first == len(series.t_ns) or series.value[first] == series.value[-1]):
                return False
        return True

    def slice(self, start_ns: int, end_ns: int) -> Trace:
        """A copy of the trace between two instants."""
        with self._changed:
            return self.trace.between(start_ns, end_ns)
