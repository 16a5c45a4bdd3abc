"""Session: opens the energy sources, measures windows, keeps every Measurement.

    with lem.Session("data/try") as session:
        session.idle(10)
        with session.window("tokenise") as window: ...
        m = session.run(backend, lem.prompts.synthetic(32, 128, 64), lem.traffic.batches(4))

The one idea: a window is two instants. Its energy is looked up in the sampler's trace afterwards, so windows may nest and
overlap, and a nested window costs the one around it nothing: only the outermost waits for the counters' next update.

Not covered: how a window's energy is found (`curve`), net of a baseline (`metrics.net_energy_j`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from . import baseline, environment, metrics, prompts, store, traffic, validity
from . import warmup as warmup_policy
from .backends import Backend
from .comparison import Comparison, in_turns
from .course import Course
from .curve import energy_between
from .energy import EnergySource, describe, open_sources, remarks
from .errors import LemError
from .measurement import Completion, Energy, Kind, Measurement, Repeat, Request, Status, jsonable
from .sampler import Sampler
from .statistics import RepeatUntil, relative_half_width, repeat_until
from .trace import Domain, Series, Trace

# A record keeps the trace a little beyond its window, so that what a counter did around the edges can be looked at again.
BEFORE_NS, AFTER_NS = 10_000_000_000, 1_000_000_000
FEW_REQUESTS = 30
NOTICED_S = 0.5  # a wait that is shorter is not worth a word
LONGEST_START_S = 3.0  # so long a window waits for a source that is still starting,
LATEST_START_S = 15.0  # unless the session has been open for so long
FIRST_READINGS_NS = 1_000_000_000  # after this a counter that stands still is one that does
WARM_REQUESTS = 8  # of a plan without batches

_innermost: ContextVar[Window | None] = ContextVar("lem_kit_window", default=None)

# Each is told of every outermost window before it opens, and what it returns is called when the window has ended. Both are
# outside the window; an exception in either is dropped.
watchers: list[Callable[[Session, Window], Callable[[], None]]] = []


@dataclasses.dataclass
class Span:
    """Two instants, and how many output tokens came out between them if someone knows."""

    t0_ns: int
    t1_ns: int | None = None
    output_tokens: int | None = None


class Window:
    """What `Session.window` hands to its block. Set `output_tokens` if you know them; `repeat()` marks a repetition."""

    def __init__(self, session: Session, label: str, kind: Kind, run_id: str | None, config: Mapping[str, Any]) -> None:
        self._started_s, self._drawn = time.time(), os.urandom(3)
        self.label = self._named = label
        self.kind = kind
        self._run_id = run_id
        self.config = dict(config)
        self.output_tokens: int | None = None
        self.parent = _around()
        self.owner = current_owner()
        self.abandoned = False  # ended from outside, with `Session.abandon`
        self.span: Span = Span(session._clock())
        self.repeats: list[Span] = []
        self.status: Status = "ok"
        self.reasons: list[str] = []
        self.facts: dict[str, Any] = {}  # further fields of the Measurement
        self.gauges: dict[str, Series] = {}  # of the trace, besides what the sampler read
        self.progress: traffic.Progress | None = None
        self.watching: list[Callable[[], None]] = []
        self._session = session
        self._measurement: Measurement | None = None
        self._before = self._after = session._surroundings()
        self._meter_ns = (session._sampler.busy_ns, session._sampler.cpu_ns)

    @property
    def started_at(self) -> str:
        """When it was opened, in UTC; formatted when it is asked for, and not in the user's time."""
        started = datetime.datetime.fromtimestamp(self._started_s, datetime.timezone.utc)
        return started.isoformat(timespec="milliseconds")

    @property
    def run_id(self) -> str:
        """As 20261126T093015-label-1f2e3d, unless it was given."""
        if self._run_id is not None:
            return self._run_id
        stamp = self.started_at[:19].replace("-", "").replace(":", "")
        return f"{stamp}-{re.sub(r'[^A-Za-z0-9]+', '-', self._named).strip('-')[:40] or 'window'}-{self._drawn.hex()}"

    @contextlib.contextmanager
    def repeat(self) -> Iterator[Span]:
        """One repetition inside this window, with a figure of its own. A repetition that raises is not kept."""
        span = Span(self._session.instant())
        yield span
        span.t1_ns = self._session.instant()
        self.repeats.append(span)

    def so_far(self, wait: bool = False) -> Measurement:
        """While the block runs: a record, which is not kept, of the repeats whose ends the counters have told by now; of all
        that have ended where it may `wait` for them, as a window does at its end."""
        if wait:
            self._session._sampler.settle(self._session._clock())
        return self._session._so_far(self)

    @property
    def measurement(self) -> Measurement:
        """The record. LemError while the block is still running."""
        if self.span.t1_ns is None:
            raise LemError(f"The window '{self.label}' is still open: its measurement exists when its block has ended.")
        with self._session._finishing:
            return self._measurement or self._session._finish(self, self.span.t1_ns)


class Session:
    """Energy sources opened once, one sampler thread, and the measurements made with them.

    `folder`: where each Measurement is saved, in a folder of its own; None keeps them in `measurements` only. `sources`:
    names ("name" or "name=argument") or open sources; None opens every one that can be opened, or those in LEM_KIT_SOURCES.
    `unavailable` maps the rest to the reason. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        sources: Iterable[str | EnergySource] | None = None,
        interval_s: float = 0.05,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if not 0.001 <= interval_s <= 60:
            raise LemError(f"interval_s must lie between 0.001 and 60 seconds: got {interval_s}.")
        given = None if sources is None else list(sources)
        names = None if given is None else [s for s in given if isinstance(s, str)]
        opened, self.unavailable = open_sources(names)
        opened += [s for s in given or [] if not isinstance(s, str)]
        self.folder = None if folder is None else Path(folder)
        self.measurements: list[Measurement] = []
        self.baselines: dict[str, dict[str, Any]] = {}
        self._finishing = threading.RLock()
        self._finisher = ThreadPoolExecutor(1, "lem-finish")  # its thread starts with the first window that does not wait
        self._environment = environment.describe()
        self._clock = clock
        self._closed = False
        self._opened_s = time.monotonic()
        self._turn: dict[str, Any] = {}  # what `compare` has to say of the measurement that it asks for
        self.open_windows: list[Window] = []  # whose blocks have not ended
        self._waiting: list[Window] = []  # closed, but not looked up yet
        self._sampler = Sampler(opened, interval_s, clock)
        self._sampler.start()

    @property
    def sources(self) -> list[str]:
        """Names of the sources that are open."""
        return [source.name for source in self._sampler.sources]

    @property
    def domains(self) -> dict[str, Domain]:
        """What the open sources say of their domains by now, by "source:domain"."""
        found: dict[str, Domain] = {}
        for source in self._sampler.sources:
            found |= {f"{source.name}:{name}": domain for name, domain in source.domains.items()}
            found |= getattr(source, "integrals", {})
        return found

    @property
    def starting(self) -> list[str]:
        """Names of the open sources that are still starting: they have given no reading yet, and no failure, or not two from
        which it could be told whether their counters count."""
        return [name for name, failure in self.silent.items() if failure is None]

    @property
    def silent(self) -> dict[str, str | None]:
        """The open sources that have told nothing yet, with what they failed with; None for one that is starting."""
        trace, now_ns = self._sampler.trace, self._clock()
        counters, told = dict(trace.counters), set()
        for key, series in counters.items():
            if series.value[0] != series.value[-1] or now_ns - series.t_ns[0] > FIRST_READINGS_NS:
                told.add(key.partition(":")[0])
        counted = {key.partition(":")[0] for key in counters}
        told |= {key.partition(":")[0] for key in list(trace.gauges)} - counted
        silent = [name for name in self.sources if name not in told]
        failed = {name.partition(":")[0]: sentence for _, name, _, sentence in list(trace.failures)} if silent else {}
        return {name: failed.get(name) for name in silent}

    def wait_for_sources(self, tell: Callable[[list[str]], object] | None = None) -> list[str]:
        """Wait until no source is starting any more; the names of those that still are after 3 seconds. What has not started
        15 seconds after the session was opened is waited for no longer. `tell` is called with the names once this takes a
        time that one notices. A window that is not inside another, and ends waiting for the counters, begins with this."""
        began_s = time.monotonic()
        until_s = min(began_s + LONGEST_START_S, self._opened_s + LATEST_START_S)
        while (names := self.starting) and self._sampler.running and (now_s := time.monotonic()) < until_s:
            if tell and now_s > began_s + NOTICED_S:
                tell(names)
                tell = None
            time.sleep(0.01)
        return names

    @property
    def trace(self) -> Trace:
        """Everything read since the session was opened. It grows: read it, do not keep it."""
        return self._sampler.trace

    def instant(self) -> int:
        """Now, after the GPU has finished what torch has queued; the sampler reads once more as soon as it can."""
        torch = sys.modules.get("torch")  # a measured cell must not pay for an import, so only if it is there already
        cuda = getattr(torch, "cuda", None)
        if cuda is not None and cuda.is_initialized():
            cuda.synchronize()
        return self._sampler.edge()

    @contextlib.contextmanager
    def window(
        self,
        label: str = "window",
        *,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        kind: Kind = "window",
        wait: bool = True,
    ) -> Iterator[Window]:
        """Measure the block. Its exception is recorded and raised again; the record is saved in either case.

        The outermost window waits before it begins for sources that are still starting (`wait_for_sources`), and at its end
        for the counters' next update, one refresh period at most. With `wait=False` it does neither, and the measurement
        completes itself; `measurement` waits for what is still missing.
        """
        if self._closed:
            raise LemError("This session is closed: open another one with lem_kit.Session().")
        if not isinstance(label, str) or not label:
            raise LemError(f"A window's label is a text that is not empty: got {label!r}.")
        if wait and _around() is None:
            self.wait_for_sources()
        self._check_run_id(run_id)
        window = Window(self, label, kind, run_id, jsonable({**(config or {}), **self._turn}))
        token = _innermost.set(window)
        self.open_windows.append(window)
        try:
            for watch in watchers if window.parent is None else ():
                with contextlib.suppress(Exception):
                    window.watching.append(watch(self, window))
            window.span.t0_ns = self.instant()
            yield window
        except BaseException as error:
            if window in self.open_windows:
                interrupted = isinstance(error, (KeyboardInterrupt, asyncio.CancelledError))
                window.status = "interrupted" if interrupted else "failed"
                window.reasons.append(window.status)
                window.facts["error"] = {"type": type(error).__name__, "message": str(error)}
            raise
        finally:
            with contextlib.suppress(ValueError):  # the block began in another context: a notebook's cells may be several
                _innermost.reset(token)
            if window in self.open_windows:
                self._end(window)
                if window.parent is None and not wait:
                    self._finisher.submit(self._finish_behind)
                elif window.parent is None:
                    self._finish_after(window)

    def _surroundings(self) -> validity.Surroundings:
        """What else runs on the host is looked at where that is in a figure."""
        domains = (domain for source in self._sampler.sources for domain in source.domains.values())
        shared = any(domain.scope in ("cpu", "dram") and domain.method != "model" for domain in domains)
        return validity.surroundings("/proc" if shared else None)

    def _end(self, window: Window) -> None:
        try:
            window.span.t1_ns = self.instant()
        except Exception:  # a GPU that died cannot be waited for; the window still ended
            window.span.t1_ns = self._clock()
        finally:  # also where waiting for the GPU is interrupted
            window.span.t1_ns = window.span.t1_ns or self._clock()
            window._after = self._surroundings()
            self.open_windows.remove(window)
            self._waiting.append(window)
            for ended in window.watching:
                with contextlib.suppress(Exception):
                    ended()

    def abandon(self, window: Window) -> Measurement | None:
        """End an open window whose block never will, as `interrupted`; what its block does later changes nothing. None for a
        window that has ended."""
        if window not in self.open_windows:
            return None
        window.status, window.abandoned = "interrupted", True
        window.reasons.append(window.status)
        window.facts["error"] = {"type": "LeftOpen", "message": "the block never ended"}
        self._end(window)
        return window.measurement

    def idle(self, seconds: float, kind: str | None = None, label: str = "idle") -> Measurement:
        """Do nothing for `seconds` and measure that: a baseline, kept by its kind for net energies of this session.

        `kind`: "bare" (this process does not use CUDA), "context" (CUDA runs, no model; it is started if need be) or
        "engine" (the model is loaded and waits); None: what this process looks like. LemError where the kind is not true.
        """
        with self.idling(seconds, kind, label) as window:
            threading.Event().wait(seconds)
        return window.measurement

    @contextlib.contextmanager
    def idling(self, seconds: float, kind: str | None = None, label: str = "idle") -> Iterator[Window]:
        """As `idle`, where the block does the waiting."""
        if not 0 < seconds <= 86_400:
            raise LemError(f"idle() takes a number of seconds above 0: got {seconds}.")
        kind = baseline.kind_now(kind)
        with self.window(label, kind="idle", config={"seconds": seconds, "baseline": kind}) as window:
            yield window
        found = baseline.of(window.measurement)
        if found["power_w"] or kind not in self.baselines:
            self.baselines[kind] = found

    def run(
        self,
        backend: Backend,
        requests: Sequence[Request],
        arrivals: traffic.Arrivals | None = None,
        *,
        label: str = "run",
        repeats: int | RepeatUntil = 1,
        warmup: int | None = None,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> Measurement:
        """Send `requests` to `backend` as `arrivals` plans (one at a time unless given), `repeats` times, and measure that.

        `repeats` may be `lem_kit.repeat_until(...)`: until energy per output token is known so well, or the rate of output
        tokens where no energy is measured; `config["repeat_until"]` says which, and `interval_not_reached` that it was not.

        Before, rounds of the plan's first batch with other contents, outside the window and kept in the record: `warmup`
        of them, or until latency, power and temperature have settled (`warmup.until_settled`).
        LemError for input that cannot be run, for a warm-up that fails, and, after saving, when every request failed.
        """
        arrivals = arrivals or traffic.batches(1)
        requests = traffic.listed(requests)
        traffic.check(backend, requests, arrivals)
        until = repeats if isinstance(repeats, RepeatUntil) else None
        most = repeats.max_repeats if isinstance(repeats, RepeatUntil) else repeats
        for name, value, least in (("repeats", most, 1), ("warmup", 0 if warmup is None else warmup, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LemError(f"{name} must be a whole number of at least {least}: got {value!r}.")
        self._check_run_id(run_id)
        # Before the warm-up: nothing may come between that and the run.
        ids_sha256 = prompts.ids_digest(requests, getattr(backend, "token_ids", None))
        self.wait_for_sources()
        warm, doubt = self._warm_up(backend, requests[: getattr(arrivals, "size", WARM_REQUESTS)], warmup)
        asked = {
            **(config or {}),
            **traffic.plan(arrivals, len(requests)),
            "requests": len(requests),
            "repeats": most,
            **({"repeat_until": {**dataclasses.asdict(until), "judged_by": None}} if until else {}),
            "warmup": warmup,
            "prompts_sha256": prompts.digest(requests),
            **({"prompt_ids_sha256": ids_sha256} if ids_sha256 else {}),
        }
        described = jsonable(backend.describe())
        for forget in (getattr(backend, name, dict) for name in ("counters", "steps")):
            forget()  # what it holds by now is of the warm-up
        with self.window(label, config=asked, run_id=run_id, kind="run") as window, _listening(backend, window):
            window.facts.update(backend=described, warmup=tuple(warm))
            window.progress = traffic.Progress.of(requests, arrivals, most)
            if doubt:
                window.reasons.append(doubt)
            completions = _send_repeats(window, backend, requests, arrivals, most, until)
            errors = [c.error for c in completions if c.error is not None]
            if len(errors) == len(completions):
                where = f" The record is in {self.folder / window.run_id}." if self.folder else ""
                raise LemError(f"Every request failed, the first with {errors[0].rstrip('.')}.{where}")
        return window.measurement

    def compare(
        self,
        a: Callable[[], Measurement],
        b: Callable[[], Measurement],
        *,
        until: RepeatUntil | None = None,
        names: tuple[str, str] = ("A", "B"),
        allow: Iterable[str] = (),
    ) -> Comparison:
        """Call `a` and `b`, which make one Measurement each, in turns (a b, b a, ...) and compare the pairs, `until` their
        ratio is known well enough (`lem_kit.repeat_until()` unless given).

            session.compare(lambda: session.run(small, requests), lambda: session.run(large, requests))

        Each record tells of its turn: `compare_id`, `compare_name`, `compare_pair`, `compare_turn`, and `compare_after`, the
        run before it in its pair. An interrupt leaves those that were made in `measurements`. LemError as `lem_kit.compare`,
        for what is mistyped before anything is measured.
        """

        def tell(facts: dict[str, Any]) -> None:
            self._turn = facts

        return in_turns((a, b), tell, repeat_until() if until is None else until, names, allow)

    def _warm_up(self, backend: Backend, requests: list[Request], rounds: int | None) -> tuple[list[Completion], str | None]:
        together = traffic.burst() if backend.concurrent else traffic.batches(len(requests))

        def one_round(number: int) -> list[Completion]:
            others = prompts.disguised(requests, seed=number)
            done = traffic.run_blocking(traffic.send(backend, others, together, repeat=-1))
            if error := next((c.error for c in done if c.error is not None), None):
                raise LemError(f"The warm-up failed, so nothing was measured: {error.rstrip('.')}.")
            return done

        if rounds is None:
            recent_ns = round(2e9 * warmup_policy.OVER_S)
            return warmup_policy.until_settled(
                one_round, lambda: self._sampler.slice(self._clock() - recent_ns, self._clock())
            )
        return [c for number in range(rounds) for c in one_round(number)], None

    def _check_run_id(self, run_id: str | None) -> None:
        if run_id is None:  # a window makes its own
            return
        store.check_run_id(run_id)
        if self.folder and (self.folder / run_id / store.RECORD).exists():
            raise LemError(f"{self.folder / run_id} already holds a measurement: choose another run_id, or remove it.")

    def _finish_after(self, outermost: Window) -> None:
        try:
            self._finish_waiting()
        except LemError as error:
            if outermost.status == "ok":
                raise
            warnings.warn(str(error), stacklevel=4)  # the block's own exception is the one to see

    def _finish_behind(self) -> None:
        """As `_finish_waiting`, where nobody is there to raise to."""
        try:
            self._finish_waiting()
        except Exception as error:  # a full disk, say; the measurement is kept in memory
            warnings.warn(f"{type(error).__name__}: {error}", stacklevel=2)

    def _finish_waiting(self) -> None:
        """Look up every window that has ended."""
        with self._finishing:
            for window in list(self._waiting):
                _ = window.measurement

    def _finish(self, window: Window, t1_ns: int) -> Measurement:
        """Wait for the counters, look the window up in the trace, save."""
        self._waiting.remove(window)
        self._sampler.settle(t1_ns)
        trace = self._sampler.slice(window.span.t0_ns - BEFORE_NS, t1_ns + AFTER_NS)
        trace.gauges.update(window.gauges)
        opened = {source.name: describe(source) for source in self._sampler.sources}
        reasons = list(window.reasons)
        if not opened:
            reasons.append("no_source")
        trace.domains.update(self.domains)
        silent = self.silent
        for source in self._sampler.sources:
            if not source.domains and not getattr(source, "integrals", {}) and silent.get(source.name) is None:
                reasons.append("source_starting")
            reasons += remarks(source)
        reasons += validity.of_gauges(trace, window.span.t0_ns, t1_ns)
        seconds = (t1_ns - window.span.t0_ns) / 1e9
        reasons += validity.between(window._before, window._after, seconds)
        spent_ns = (self._sampler.busy_ns - window._meter_ns[0], self._sampler.cpu_ns - window._meter_ns[1])
        meter = {name: ns / 1e9 / seconds for name, ns in zip(("call_share", "cpu_share"), spent_ns)} if seconds > 0 else {}
        measurement = Measurement(
            run_id=window.run_id,
            kind=window.kind,
            label=window.label,
            status=window.status,
            started_at=window.started_at,
            t0_ns=window.span.t0_ns,
            t1_ns=t1_ns,
            energy=energy(trace, window.span.t0_ns, t1_ns),
            repeats=_repeats(window, trace),
            output_tokens=window.output_tokens,
            config=jsonable(window.config),
            sources=jsonable(opened),
            unavailable={**self.unavailable, **{name: failure for name, failure in silent.items() if failure}},
            environment={**self._environment, "versions": environment.loaded_versions()},
            reasons=tuple(dict.fromkeys(reasons)),
            baselines={} if window.kind == "idle" else dict(self.baselines),
            meter=meter,
            parent=window.parent.run_id if window.parent else None,
            trace=trace,
            **window.facts,
        )
        self.measurements.append(measurement)
        window._measurement = measurement  # from here on it is not lost, whatever the disk says
        if self.folder is not None:
            store.save(measurement, self.folder)
        return measurement

    def _so_far(self, window: Window) -> Measurement:
        now_ns = self._clock()
        trace = self._sampler.slice(window.span.t0_ns - BEFORE_NS, now_ns)
        trace.domains.update(self.domains)
        told_ns = min((series.t_ns[-1] for series in trace.counters.values() if series.t_ns), default=now_ns)
        repeats = tuple(r for r in _repeats(window, trace) if r.t1_ns <= told_ns)
        facts = (window.run_id, window.kind, window.label, window.status, window.started_at, window.span.t0_ns, now_ns)
        return Measurement(*facts, energy(trace, window.span.t0_ns, now_ns), repeats=repeats, trace=trace)

    def close(self) -> None:
        """Stop the sampler and close the sources. May be called twice."""
        self._closed = True
        try:
            self._finish_waiting()
        finally:
            self._finisher.shutdown()
            self._sampler.stop()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        missing = "".join(f"\n  {name}: not open: {reason}" for name, reason in self.unavailable.items())
        kept = f"saved in {self.folder}" if self.folder else "kept in memory"
        return f"Session: {', '.join(self.sources) or 'no source'}; {len(self.measurements)} measurements, {kept}{missing}"


def _around() -> Window | None:
    """The window that one which is opened now would be inside."""
    window = _innermost.get()
    while window is not None and window.span.t1_ns is not None:  # left open once, and ended from outside
        window = window.parent
    return window


def current_owner() -> asyncio.Task[Any] | threading.Thread:
    """Who opens a window that is opened now: the task that runs, or else the thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop is running
        return threading.current_thread()


def _send_repeats(
    window: Window,
    backend: Backend,
    requests: Sequence[Request],
    arrivals: traffic.Arrivals,
    most: int,
    until: RepeatUntil | None,
) -> list[Completion]:
    """Send all requests in each repeat, `most` times or until enough is known; the window gets what came, as it comes."""
    completions: list[Completion] = []
    known_well = False
    lag = traffic.LoopLag()
    for number in range(most):
        done: dict[int, Completion] = {}
        try:
            with window.repeat() as span:
                sending = traffic.send(backend, requests, arrivals, number, window.progress, done)
                sent = traffic.run_blocking(lag.during(sending))
        except BaseException:
            rest = tuple(done[i] for i in sorted(done))
            window.facts |= {"broken_off" if window.repeats else "completions": rest, "loop_lag_s": lag.worst_s}
            window.reasons += _doubts(completions if window.repeats else rest, arrivals, len(requests))
            raise
        completions += sent
        span.output_tokens = sum(c.output_tokens for c in sent)
        window.facts.update(completions=tuple(completions), loop_lag_s=lag.worst_s)
        if until and (known_well := _known_well(window, until)):
            break
    if until and not known_well:
        window.reasons.append("interval_not_reached")
    window.reasons += _doubts(completions, arrivals, len(requests))
    return completions


def _doubts(completions: Sequence[Completion], arrivals: traffic.Arrivals, count: int) -> list[str]:
    """Codes for what the completions of a run, `count` requests to a repeat, tell against its figures."""
    codes = ["requests_failed"] if any(c.error is not None for c in completions) else []
    if 0 < len(completions) < FEW_REQUESTS:
        codes.append("few_requests")
    open_loop = arrivals.schedule(count) is not None
    if open_loop and metrics.dispatched_late(completions, getattr(arrivals, "concurrency", None)):
        codes.append("dispatch_late")
    return codes


def _known_well(window: Window, until: RepeatUntil) -> bool:
    """Whether the repeats so far are enough. What a model may be off by is no matter of repeats and left out."""
    if len(window.repeats) < until.min_repeats:
        return False
    so_far = window.so_far()
    total = metrics.energy_j(so_far, False)
    # A counter that is slower than the repeats has not told yet; one that was never seen to count will not tell.
    told = any(e.method != "model" and e.reasons != ("not_advancing",) for e in so_far.energy.values())
    judged = window.config["repeat_until"]
    judged["judged_by"] = "j_per_output_token" if told else "output_tokens_per_s"
    if not told:
        share = relative_half_width([(r.output_tokens or 0) / (r.t1_ns - r.t0_ns) for r in window.repeats if r.t1_ns])
    elif total is None or len(so_far.repeats) < until.min_repeats:
        return False
    else:
        share = total.half_width / total.value
    return share <= until.interval


@contextlib.contextmanager
def _listening(backend: Backend, window: Window) -> Iterator[None]:
    """What the engine counts and logs during the block goes into the record, whatever ends the block."""
    counters, steps = getattr(backend, "counters", dict), getattr(backend, "steps", dict)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # of an engine that died: what it did not tell must not hide what happened
            window.facts["counters"] = jsonable(counters())
            # A last, empty step of the warm-up may be logged only after it has been asked to forget: that one is cut off.
            mine = {name: series.between(window.span.t0_ns, time.monotonic_ns()) for name, series in steps().items()}
            window.gauges.update({f"{backend.name}:engine.{name}": series for name, series in mine.items()})


def _repeats(window: Window, trace: Trace) -> tuple[Repeat, ...]:
    ended = [(r, r.t1_ns) for r in window.repeats if r.t1_ns is not None]
    return tuple(Repeat(r.t0_ns, t1_ns, energy(trace, r.t0_ns, t1_ns), r.output_tokens) for r, t1_ns in ended)


def energy(trace: Trace, t0_ns: int, t1_ns: int) -> dict[str, Energy]:
    """The energy of every domain of a trace between two instants; the stored trace of a record gives its stored energies."""
    found, courses = {}, dict[str, Course]()
    for key, domain in sorted(trace.domains.items()):  # a counter before the integral beside it
        source, _, name = key.partition(":")
        found[key] = Energy(source, name, domain.method, domain.scope, *energy_between(trace, key, t0_ns, t1_ns, courses))
    return validity.compared(found)
