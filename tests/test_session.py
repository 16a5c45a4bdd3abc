"""Windows, nesting, repeats, idle, runs and failures, with exact joules from a counter that the test turns."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FakeClock

import lem_kit as lem
from lem_kit import baseline, metrics, session, store
from lem_kit.energy import EnergySource, Reading
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent
from lem_kit.sampler import Sampler
from lem_kit.trace import Domain, Series


class Meter:
    """A counter that is exact at every read: `power_w` since the clock's start. `fail` makes it raise."""

    name = "meter"

    def __init__(self, clock: Callable[[], int], power_w: float = 100.0) -> None:
        self.domains: Mapping[str, Domain] = {"gpu0": Domain("gpu", "counter", refresh_s=0.0)}
        self.fail: Exception | None = None
        self.closed = 0
        self._clock, self._power_w = clock, power_w

    def read(self) -> dict[str, Reading]:
        if self.fail:
            raise self.fail
        return {"gpu0": Reading(self._clock(), self._power_w * self._clock() / 1e9)}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers without a thread: a pass happens where a window's edge or end asks for one."""
    monkeypatch.setattr(Sampler, "start", lambda self: self.sample())
    monkeypatch.setattr(Sampler, "edge", lambda self: (self.sample(), self._clock())[1])


def opened(clock: FakeClock, *sources: EnergySource, folder: Path | None = None) -> lem.Session:
    return lem.Session(folder, sources=list(sources), clock=clock)


@pytest.mark.usefixtures("by_hand")
def test_a_window_is_exact(clock: FakeClock) -> None:
    with opened(clock, Meter(clock)) as s:
        clock.advance(1)
        with s.window("work") as window:
            clock.advance(2.5)
    energy = window.measurement.energy["meter:gpu0"]
    assert energy.joules == pytest.approx(250.0, abs=1e-6)
    assert window.measurement.duration_s == 2.5
    assert (energy.method, energy.scope, energy.reasons) == ("counter", "gpu", ())
    assert s.measurements == [window.measurement]


@pytest.mark.usefixtures("by_hand")
def test_nested_windows_and_repeats_add_up(clock: FakeClock) -> None:
    with opened(clock, Meter(clock)) as s, s.window("outer") as outer:
        for seconds in (1, 2):
            with outer.repeat() as span:
                clock.advance(seconds)
            span.output_tokens = 10
        with s.window("inner") as inner:
            clock.advance(0.5)
    assert [r.energy["meter:gpu0"].joules for r in outer.measurement.repeats] == pytest.approx([100, 200])
    assert inner.measurement.energy["meter:gpu0"].joules == pytest.approx(50)
    assert outer.measurement.energy["meter:gpu0"].joules == pytest.approx(350)
    assert (inner.measurement.parent, outer.measurement.parent) == (outer.run_id, None)
    assert metrics.output_tokens(outer.measurement) == 20


@pytest.mark.usefixtures("by_hand")
def test_a_source_that_fails_inside_a_window_is_unknown_not_zero(clock: FakeClock) -> None:
    broken, sound = Meter(clock), Meter(clock, 10.0)
    sound.name = "other"
    with opened(clock, broken, sound) as s:
        clock.advance(1)
        with s.window() as window:
            clock.advance(1)
            broken.fail = OSError("the bus is gone")
    energy = window.measurement.energy
    assert (energy["meter:gpu0"].joules, energy["meter:gpu0"].reasons) == (None, ("source_failed",))
    assert energy["other:gpu0"].joules == pytest.approx(10)
    assert "the bus is gone" in str(window.measurement.trace.failures)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("error", "status"),
    [(ZeroDivisionError("oh"), "failed"), (KeyboardInterrupt(), "interrupted")],
    ids=["failed", "interrupted"],
)
def test_an_exception_is_recorded_saved_and_raised_again(
    clock: FakeClock, tmp_path: Path, error: BaseException, status: str
) -> None:
    with opened(clock, Meter(clock), folder=tmp_path) as s, pytest.raises(type(error)), s.window("bad") as window:
        clock.advance(1)
        raise error
    m = lem.load(tmp_path / window.run_id)
    assert (m.status, m.reasons) == (status, (status,))
    assert m.error == {"type": type(error).__name__, "message": str(error)}
    assert m.energy["meter:gpu0"].joules == pytest.approx(100)


@pytest.mark.usefixtures("by_hand")
def test_a_disk_that_is_full_does_not_hide_the_users_exception(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LemError("no space left")

    monkeypatch.setattr(store, "save", full)
    with opened(clock, Meter(clock), folder=tmp_path) as s:
        with pytest.warns(UserWarning, match="no space left"), pytest.raises(ZeroDivisionError), s.window():
            raise ZeroDivisionError
        with pytest.raises(LemError, match="no space left"), s.window():
            clock.advance(1)
    assert len(s.measurements) == 2


@pytest.mark.usefixtures("by_hand")
def test_an_open_window_has_no_measurement(clock: FakeClock) -> None:
    with opened(clock) as s, s.window("long") as window, pytest.raises(LemError, match="'long' is still open"):
        _ = window.measurement
    assert window.measurement.reasons == ("no_source",)
    assert metrics.energy_j(window.measurement) is None


def test_a_closed_session_says_so_and_has_closed_its_sources(clock: FakeClock) -> None:
    meter = Meter(clock)
    s = lem.Session(sources=[meter])
    s.close()
    s.close()
    assert meter.closed == 1
    with pytest.raises(LemError, match="closed"), s.window():
        raise AssertionError("the block must not run")


def test_idle_is_a_measurement() -> None:
    engine = lem.load_backend("fake", "fake", idle_power_w=40)
    with lem.Session(sources=[engine.source]) as s:
        m = s.idle(0.2)
        assert s.baselines == {"bare": baseline.of(m)}
    assert (m.kind, m.config, m.baselines) == ("idle", {"seconds": 0.2, "baseline": "bare"}, {})
    assert m.energy["fake:board"].joules == pytest.approx(40 * m.duration_s, rel=1e-3)
    with pytest.raises(LemError, match="above 0"):
        s.idle(0)


def test_run_counts_every_token_and_joule(tmp_path: Path) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.02, tokens_per_s=500, power_w=200, idle_power_w=0)
    with lem.Session(tmp_path, sources=[engine.source]) as s:
        m = s.run(
            engine, lem.prompts.synthetic(4, 8, 10), lem.traffic.batches(2), repeats=2, warmup=1, config={"batch_size": 2}
        )
    assert [c.output_tokens for c in m.completions] == [10] * 8
    assert [c.repeat for c in m.completions] == [0] * 4 + [1] * 4
    assert [c.repeat for c in m.warmup] == [-1] * 2
    assert metrics.output_tokens(m) == 80 and metrics.input_tokens(m) == 64
    # Two batches per repeat, each busy for its planned 0.02 + 9 / 500 s at 200 W; only the board's power is counted.
    planned_j = 4 * 200 * (0.02 + 9 / 500)
    assert sum(r.energy["fake:board"].joules or 0 for r in m.repeats) == pytest.approx(planned_j, rel=0.02)
    assert m.config["arrivals"] == "batches" and m.config["batch_size"] == 2
    assert "few_requests" in m.reasons
    assert lem.load(tmp_path / m.run_id) == m
    assert session.energy(m.trace, m.t0_ns, m.t1_ns) == m.energy


def test_an_open_loop_is_kept_with_its_schedule(tmp_path: Path) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.06, tokens_per_s=500)
    with lem.Session(tmp_path, sources=[]) as s:
        m = s.run(engine, lem.prompts.synthetic(5, 8, 3), lem.traffic.poisson(200, seed=4), warmup=0)
    schedule_s = m.config["schedule_s"]
    start_ns = m.completions[0].sched_ns - round(schedule_s[0] * 1e9)
    assert [c.sched_ns - start_ns for c in m.completions] == [round(t * 1e9) for t in schedule_s]
    assert m.config["arrivals"] == "poisson" and m.config["seed"] == 4
    assert m.loop_lag_s is not None and m.loop_lag_s > 0
    assert lem.load(tmp_path / m.run_id) == m


def test_a_loop_that_is_held_up_is_told() -> None:
    class Rude:
        """Keeps the loop to itself for 20 ms before each first token."""

        name, concurrent = "rude", True

        async def generate(self, requests: Sequence[lem.Request]) -> AsyncIterator[TokenEvent]:
            time.sleep(0.02)
            yield TokenEvent(0, 1)

        def describe(self) -> dict[str, object]:
            return {}

        def close(self) -> None:
            pass

    with lem.Session(sources=[]) as s:
        m = s.run(Rude(), lem.prompts.synthetic(6, 4, 1), lem.traffic.constant(100), warmup=0)
        assert "dispatch_late" in m.reasons and m.loop_lag_s is not None and m.loop_lag_s > 0.015
        m = s.run(Rude(), lem.prompts.synthetic(3, 4, 1), lem.traffic.batches(), warmup=0)
        assert "dispatch_late" not in m.reasons, "a closed loop wants a request when it can have it"


def test_bad_runs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=1000)
    one = lem.prompts.synthetic(1, 4, 2)
    with lem.Session(tmp_path, sources=[]) as s:
        for asked, words in (
            (lambda: s.run(engine, []), "empty"),
            (lambda: s.run(engine, one, repeats=0), "repeats"),
            (lambda: s.run(engine, one, warmup=-1), "warmup"),
            (lambda: s.run(engine, one, run_id="../out"), "cannot name a folder"),
            (lambda: s.run(engine, [lem.Request(prompt="a", options={"nonsense": 1})]), "nonsense"),
        ):
            with pytest.raises(LemError, match=words):
                asked()
        assert list(tmp_path.iterdir()) == []
        s.run(engine, one, run_id="once")
        with pytest.raises(LemError, match="already holds"):
            s.run(engine, one, run_id="once")


class Moody:
    """Gives a request up after one token where its prompt says so."""

    name, concurrent = "moody", True

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        for index, request in enumerate(requests):
            yield TokenEvent(index, 1, prompt_tokens=1)
            if request.prompt == "bad":
                raise RuntimeError("out of memory")
            yield TokenEvent(index, 1, finish_reason="stop")

    def describe(self) -> dict[str, object]:
        return {"engine": "moody"}

    def close(self) -> None: ...


@pytest.mark.parametrize("plan", [None, lem.traffic.burst(), lem.traffic.concurrency(3), lem.traffic.poisson(20_000)])
def test_requests_that_fail_stay_in_the_record_as_misses_and_the_others_go_on(
    plan: lem.traffic.Arrivals | None, tmp_path: Path
) -> None:
    asked = ["bad" if k % 5 == 0 else "good" for k in range(30)]
    with lem.Session(tmp_path, sources=[]) as s:
        m = s.run(Moody(), lem.prompts.texts(asked), plan, warmup=0)
    assert m.status == "ok" and "requests_failed" in m.reasons and "few_requests" not in m.reasons
    assert [c.error for c in m.completions] == ["RuntimeError: out of memory" if p == "bad" else None for p in asked]
    assert (metrics.completed_requests(m), metrics.output_tokens(m)) == (24, 24 * 2 + 6), "tokens that came were made"
    assert len(metrics.values(m, metrics.ttft_s)) == 24, "a failed request has no latency"
    assert lem.goodput.attainment(m, ttft_s=60) == 24 / 30, "and is a miss"
    assert not m.valid and lem.load(tmp_path / m.run_id) == m


class Interrupting(Moody):
    """Interrupts the notebook in the middle of request number `at`, counted from 1 over all repeats, and never ends."""

    def __init__(self, at: int) -> None:
        self.left = at

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        self.left -= 1
        yield TokenEvent(0, 1, prompt_tokens=1)
        if self.left == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            while True:
                await asyncio.sleep(0.01)
        yield TokenEvent(0, 1, finish_reason="stop")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_keeps_what_was_done(tmp_path: Path) -> None:
    with lem.Session(tmp_path, sources=[]) as s:
        with pytest.raises(KeyboardInterrupt):
            s.run(Interrupting(3), lem.prompts.texts(["a"] * 5), warmup=0, run_id="cut")
        (m,) = s.measurements
    assert (m.status, m.repeats) == ("interrupted", ())
    assert set(m.reasons) == {"interrupted", "requests_failed", "few_requests", "no_source"}
    assert [(c.error, c.output_tokens) for c in m.completions] == [(None, 2), (None, 2), ("interrupted", 1)]
    assert (metrics.completed_requests(m), metrics.output_tokens(m)) == (2, 5)
    assert metrics.output_tokens_per_s(m) == 5 / m.duration_s, "of the whole window, as the tokens"
    assert len(metrics.values(m, metrics.ttft_s)) == 2
    assert lem.load(tmp_path / "cut") == m


@pytest.mark.usefixtures("interruptible")
def test_a_repeat_that_was_interrupted_is_kept_apart_from_those_that_were_not(tmp_path: Path) -> None:
    """What is measured are the repeats, so the tokens of another must not be held against their joules and seconds."""
    with lem.Session(tmp_path, sources=[]) as s:
        with pytest.raises(KeyboardInterrupt):
            s.run(Interrupting(5), lem.prompts.texts(["a"] * 2), repeats=4, warmup=0, run_id="cut")
        (m,) = s.measurements
    assert len(m.repeats) == 2 and [c.repeat for c in m.completions] == [0, 0, 1, 1]
    assert all(c.error is None for c in m.completions)
    assert [(c.repeat, c.error, c.output_tokens) for c in m.broken_off] == [(2, "interrupted", 1)]
    assert metrics.output_tokens_per_s(m) == 8 / metrics.measured_s(m)
    assert lem.load(tmp_path / "cut") == m


def test_what_is_no_list_of_requests_is_told() -> None:
    with lem.Session(sources=[]) as s:
        for bad in (None, "abc", 7, [1], {"a": 1}):
            with pytest.raises(LemError, match="takes a list of requests"):
                s.run(Moody(), bad, warmup=0)  # type: ignore[arg-type]


def test_fewer_than_thirty_requests_are_said_to_be_few() -> None:
    with lem.Session(sources=[]) as s:
        few = s.run(Moody(), lem.prompts.texts(["good"] * 29), lem.traffic.burst(), warmup=0)
    assert "few_requests" in few.reasons
    pictured = few._repr_mimebundle_()[0]
    for kind in ("text/plain", "text/html"):
        assert "few_requests" in pictured[kind] and "fewer than 30 requests" in pictured[kind]


def test_a_warm_up_that_fails_is_an_error_and_a_run_that_fails_is_kept(tmp_path: Path) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=1000, fail_after=1)
    with lem.Session(tmp_path, sources=[]) as s:
        with pytest.raises(LemError, match=r"warm-up failed.*as fail_after asked\.$"):
            s.run(engine, lem.prompts.synthetic(1, 4, 3))
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(LemError, match=r"Every request failed.*as fail_after asked\. The record is in"):
            s.run(engine, lem.prompts.synthetic(1, 4, 3), warmup=0, run_id="bad")
    m = lem.load(tmp_path / "bad")
    assert m.status == "failed" and "requests_failed" in m.reasons and m.completions[0].error


class Counting:
    """An engine that counts the tokens since it was last asked, and may die."""

    name, concurrent = "counting", True

    def __init__(self) -> None:
        self.tokens, self.asked, self.dead, self.late = 0.0, 0, False, Series()

    async def generate(self, requests: Sequence[lem.Request]) -> AsyncIterator[TokenEvent]:
        if self.dead:
            raise RuntimeError("the engine is gone")
        for index in range(len(requests)):
            self.tokens += 1
            event = TokenEvent(index, 1)
            self.late.append(event.t_ns, self.tokens)
            yield event

    def steps(self) -> dict[str, Series]:
        """Told late: the caller has no way to make it forget what it has not logged yet."""
        return {"batch_requests": self.late}

    def counters(self) -> dict[str, float]:
        self.asked += 1
        if self.dead and self.asked > 3:
            raise RuntimeError("the engine is gone")
        found, self.tokens = {"batch_requests_max": self.tokens}, 0.0
        return found

    def describe(self) -> dict[str, object]:
        return {}

    def close(self) -> None: ...


def test_what_the_engine_counts_is_of_the_measured_time_alone(tmp_path: Path) -> None:
    engine, requests = Counting(), lem.prompts.synthetic(3, 4, 1)
    with lem.Session(tmp_path, sources=[]) as s:
        m = s.run(engine, requests, lem.traffic.burst(), repeats=2, warmup=4)
        assert m.counters == {"batch_requests_max": 6.0} and engine.asked == 2, "without the warm-up, over both repeats"
        assert lem.load(tmp_path / m.run_id).counters == m.counters
        steps = m.trace.gauges["counting:engine.batch_requests"]
        assert len(engine.late.t_ns) == 18 and list(steps.t_ns) == [t for c in m.completions for t, _ in c.events]
        assert metrics.summary(m)["batch_requests_max"] == 6.0
        engine.dead = True
        with pytest.raises(LemError, match="Every request failed"):  # and not what its counters raise
            s.run(engine, requests, warmup=0, run_id="dead")
    assert lem.load(tmp_path / "dead").counters == {}


def test_an_engine_that_counts_nothing_has_no_counters() -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=1000)
    with lem.Session(sources=[]) as s:
        m = s.run(engine, lem.prompts.synthetic(1, 4, 2), warmup=0)
    assert m.counters == {} and metrics.summary(m)["peak_memory_bytes"] is None


def test_windows_in_threads_have_no_parent_of_another_thread(clock: FakeClock) -> None:
    with lem.Session(sources=[]) as s:
        found: list[str | None] = []

        def work() -> None:
            with s.window("in a thread") as window:
                pass
            found.append(window.measurement.parent)

        with s.window("outer"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert found == [None]


# --- windows that do not wait -------------------------------------------------------------------------------------------


class Stepping(Meter):
    """20 J every 100 ms of the real clock, whose age is unknown."""

    def __init__(self) -> None:
        super().__init__(time.monotonic_ns)
        self.domains = {"gpu0": Domain("gpu", "counter")}

    def read(self) -> dict[str, Reading]:
        joules = 20.0 * (time.monotonic_ns() // 100_000_000)
        return {"gpu0": Reading(time.monotonic_ns(), joules)}  # stamped when the call is over, as a source has to


def test_a_window_that_does_not_wait_completes_itself_and_is_the_same(tmp_path: Path) -> None:
    with lem.Session(tmp_path, sources=[Stepping()]) as s:
        time.sleep(1.0)
        with s.window("behind", wait=False) as window:
            time.sleep(0.3)
        ended = time.monotonic()
        assert window.run_id not in [m.run_id for m in s.measurements], "not looked up yet"
        m = window.measurement  # waits for the counter's next update
        assert time.monotonic() - ended < 1
        found = m.energy["meter:gpu0"]  # one interval in twenty may miss
        assert found.joules == pytest.approx(200 * m.duration_s, abs=0.1 + (found.uncertainty_j or 0))
        assert m.energy["meter:gpu0"].reasons == () and window.measurement is m
    assert s.measurements == [m] and lem.load(tmp_path / m.run_id) == m


def test_windows_that_do_not_wait_are_all_there_when_the_session_is_closed() -> None:
    s = lem.Session(sources=[Stepping()])
    for k in range(5):
        with s.window(f"w{k}", wait=False), s.window("inner"):
            pass
    s.close()
    assert sorted(m.label for m in s.measurements) == ["inner"] * 5 + [f"w{k}" for k in range(5)]


@pytest.mark.usefixtures("by_hand")
def test_a_full_disk_behind_a_window_is_a_warning_and_loses_nothing(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = opened(clock, Meter(clock), folder=tmp_path)
    monkeypatch.setattr(store, "save", full_disk)
    with pytest.warns(UserWarning, match="no space left"):
        with s.window("behind", wait=False) as window:
            clock.advance(1)
        s._finisher.submit(lambda: None).result()  # after it
    assert s.measurements == [window.measurement] and window.measurement.energy["meter:gpu0"].joules == pytest.approx(100)
    s.close()


def full_disk(*_: object) -> None:
    raise LemError("no space left")


# --- sources that start slowly ------------------------------------------------------------------------------------------


class Starting(Meter):
    """Knows nothing of its domains until it has started, `after_s` seconds from now, or fails then."""

    def __init__(self, after_s: float, problem: Exception | None = None) -> None:
        super().__init__(time.monotonic_ns)
        self.ready_ns, self._later = time.monotonic_ns() + round(after_s * 1e9), dict(self.domains)
        self.domains, self.problem = {}, problem

    def read(self) -> dict[str, Reading]:
        if time.monotonic_ns() < self.ready_ns:
            return {}
        if self.problem:
            raise self.problem
        self.domains = self._later
        return super().read()


class Other(Meter):
    name = "other"

    def __init__(self) -> None:
        super().__init__(time.monotonic_ns)


def test_a_window_waits_for_a_source_that_is_starting() -> None:
    with lem.Session(sources=[Starting(0.3)]) as s:
        assert s.starting == ["meter"]
        with s.window("first") as window:
            time.sleep(0.1)
        m = window.measurement
        assert s.starting == [] and m.energy["meter:gpu0"].joules == pytest.approx(100 * m.duration_s, rel=0.05)
        assert m.reasons == () and 0.1 <= m.duration_s < 0.25, "and what it waited is not in the window"


def test_a_source_that_does_not_come_is_waited_for_no_longer_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LONGEST_START_S", 0.1)
    monkeypatch.setattr(session, "LATEST_START_S", 0.15)
    began = time.monotonic()
    with lem.Session(sources=[Starting(60)]) as s:
        for k in range(9):
            with s.window(f"w{k}") as window, s.window("inside"):
                pass
    assert 0.15 <= time.monotonic() - began < 1
    assert window.measurement.reasons == ("source_starting",) and metrics.verdict(window.measurement) == ["source_starting"]


def test_a_window_in_which_a_source_starts_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LONGEST_START_S", 0.0)
    with lem.Session(sources=[Starting(0.2)]) as s, s.window("first") as window:
        time.sleep(0.6)
    m = window.measurement
    assert m.energy["meter:gpu0"].reasons == ("source_starting",) and metrics.verdict(m) == ["source_starting"]


class Seldom(Starting):
    """Is read so seldom that a window may hold nothing but its first reading."""

    interval_s = 0.3


def test_a_short_window_after_the_start_does_not_take_a_counter_for_one_that_stands_still() -> None:
    with lem.Session(sources=[Seldom(0.1)]) as s:
        with s.window("first") as window:
            pass
        assert "not_advancing" not in window.measurement.energy["meter:gpu0"].reasons


def test_a_counter_that_stands_still_is_waited_for_once() -> None:
    meter = Meter(lambda: time.monotonic_ns(), power_w=0.0)
    with lem.Session(sources=[meter]) as s:
        began = time.monotonic()
        for _ in range(3):
            with s.window("w") as window:
                pass
        assert time.monotonic() - began < 2
    assert window.measurement.energy["meter:gpu0"].reasons == ("not_advancing",)


def test_a_source_that_fails_to_start_is_not_said_to_be_starting() -> None:
    began = time.monotonic()
    with lem.Session(sources=[Starting(0.1, LemError("no licence")), Other()]) as s:
        with s.window("first") as window:
            time.sleep(0.3)
        assert s.starting == []
    m = window.measurement
    assert m.unavailable == {"meter": "no licence"} and m.reasons == () and m.valid
    assert time.monotonic() - began < 1.5


def test_a_baseline_of_nothing_does_not_take_the_place_of_one() -> None:
    meter = Starting(0)
    with lem.Session(sources=[meter]) as s:
        s.idle(0.2)
        known = s.baselines["bare"]
        assert known["power_w"]["meter:gpu0"]["watts"] == pytest.approx(100, rel=0.05) and known["unknown"] == {}
        meter.fail = RuntimeError("gone")
        nothing = s.idle(0.2)
        assert baseline.of(nothing)["power_w"] == {} and baseline.of(nothing)["unknown"] == {"meter:gpu0": ["source_failed"]}
        assert s.baselines["bare"] is known


# --- baselines ----------------------------------------------------------------------------------------------------------


class Cuda:
    """torch.cuda as far as a session looks at it."""

    def __init__(self, running: bool = False, holding: int = 0, available: bool = True) -> None:
        self.running, self.holding, self.available, self.synchronized = running, holding, available, 0

    def is_initialized(self) -> bool:
        return self.running

    def is_available(self) -> bool:
        return self.available

    def init(self) -> None:
        self.running = True

    def synchronize(self) -> None:
        self.synchronized += 1

    def memory_allocated(self) -> int:
        return self.holding


def with_cuda(monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None) -> None:
    if cuda is None:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("cuda", "asked", "found"),
    [
        (None, None, "bare"), (Cuda(), None, "bare"), (Cuda(running=True), None, "context"),
        (Cuda(running=True, holding=9), None, "engine"), (Cuda(), "bare", "bare"), (Cuda(), "context", "context"),
        (Cuda(running=True), "context", "context"), (Cuda(running=True, holding=9), "engine", "engine"),
    ],
)  # fmt: skip
def test_an_idle_baseline_is_of_the_kind_that_the_process_is_in(
    monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None, asked: str | None, found: str
) -> None:
    with_cuda(monkeypatch, cuda)
    with lem.Session(sources=[]) as s:
        m = s.idle(0.01, kind=asked)
        assert m.config["baseline"] == found and list(s.baselines) == [found]
        with s.window() as window:
            pass
        assert list(window.measurement.baselines) == [found]
    if asked == "context":
        assert cuda is not None and cuda.running, "it was started, as asked"


@pytest.mark.parametrize(
    ("cuda", "asked", "words"),
    [
        (Cuda(running=True), "bare", "CUDA runs in this process already"),
        (Cuda(running=True, holding=9), "context", "holds GPU memory"),
        (None, "context", "needs torch"), (Cuda(available=False), "context", "needs torch"),
        (None, "bear", "did you mean 'bare'"),
    ],
)  # fmt: skip
def test_a_kind_of_idle_that_is_not_true_is_refused(
    monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None, asked: str, words: str
) -> None:
    with_cuda(monkeypatch, cuda)
    with lem.Session(sources=[]) as s:
        with pytest.raises(LemError, match=words):
            s.idle(0.01, kind=asked)
        assert s.measurements == [] and s.baselines == {}


@pytest.mark.usefixtures("by_hand")
def test_net_energy_is_above_the_sessions_own_baseline(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(clock, 50.0)
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: clock.advance(timeout or 0))
    with opened(clock, meter) as s:
        s.idle(4)
        assert s.baselines["bare"]["power_w"]["meter:gpu0"]["watts"] == pytest.approx(50)
        meter._power_w, offset = 200.0, 150 * clock() / 1e9
        monkeypatch.setattr(meter, "read", lambda: {"gpu0": Reading(clock(), 200.0 * clock() / 1e9 - offset)})
        with s.window() as window:
            clock.advance(2)
    net = metrics.net_energy_j(window.measurement)
    assert net is not None and net.value == pytest.approx(2 * 150)


# --- what the record says of its surroundings ---------------------------------------------------------------------------


@pytest.mark.usefixtures("by_hand")
def test_remarks_of_a_source_are_reasons_of_the_record(clock: FakeClock) -> None:
    meter = Meter(clock)
    meter.remarks = lambda: {"gpu0": ["foreign_process"], "gpu1": ["foreign_process"]}  # type: ignore[attr-defined]
    with opened(clock, meter) as s:
        with s.window() as window:
            clock.advance(1)
        assert window.measurement.reasons == ("foreign_process",) and not window.measurement.valid
        meter.remarks = broken_remarks  # type: ignore[attr-defined]
        with s.window() as window:
            clock.advance(1)
        assert window.measurement.reasons == () and window.measurement.valid


def broken_remarks() -> dict[str, list[str]]:
    raise RuntimeError("the library is gone")


@pytest.mark.usefixtures("by_hand")
def test_the_meters_own_share_is_in_the_record(clock: FakeClock) -> None:
    class Slow(Meter):
        def read(self) -> dict[str, Reading]:
            clock.advance(0.02)
            return super().read()

    with opened(clock, Slow(clock)) as s, s.window() as window:
        clock.advance(1)
    assert window.measurement.meter["call_share"] == pytest.approx(0.02 * 2 / 1.04, rel=0.5)
    assert window.measurement.meter["cpu_share"] >= 0


@pytest.mark.usefixtures("by_hand")
def test_counter_and_integral_that_disagree_say_so(clock: FakeClock) -> None:
    class Twofold(Meter):
        integrals: Mapping[str, Domain] = {"meter_power:gpu0": Domain("gpu", "integral", gauge="meter:gpu0.power_w")}
        watts = 100.0

        def gauges(self) -> dict[str, float]:
            return {"gpu0.power_w": self.watts}

    for watts, reasons in ((100.0, ()), (130.0, ("sources_disagree",))):
        meter = Twofold(clock)
        meter.watts = watts
        with opened(clock, meter) as s, s.window() as window:
            for _ in range(20):
                clock.advance(0.1)
                s._sampler.sample()
        energy = window.measurement.energy
        assert energy["meter:gpu0"].reasons == energy["meter_power:gpu0"].reasons == reasons
        assert metrics.agreement(energy) == {"meter:gpu0": pytest.approx(watts / 100 - 1)}
        assert window.measurement.valid == (not reasons)


@pytest.mark.usefixtures("by_hand")
def test_a_window_whose_block_never_ends_is_ended_from_outside_once(clock: FakeClock) -> None:
    with opened(clock, Meter(clock)) as s:
        manager = s.window("left")
        window = manager.__enter__()
        clock.advance(2)
        assert s.open_windows == [window]
        m = s.abandon(window)
        assert m is not None and (m.status, m.reasons, m.duration_s) == ("interrupted", ("interrupted",), 2.0)
        assert m.energy["meter:gpu0"].joules == pytest.approx(200) and s.open_windows == []
        clock.advance(1)
        with s.window("next") as later:  # in the context in which the one that was left is still the innermost
            clock.advance(1)
        assert later.measurement.parent is None
        assert not manager.__exit__(ValueError, ValueError("late"), None)  # which leaves the exception to whoever raised it
        assert window.measurement == m and s.abandon(window) is None
        assert [found.label for found in s.measurements] == ["left", "next"]


@pytest.mark.usefixtures("by_hand")
def test_an_interrupt_while_the_gpu_is_waited_for_leaves_no_window_open(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with opened(clock, Meter(clock)) as s:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(s, "instant", interrupted)
            with s.window("at its begin"):
                pass
        with s.window("after") as window, monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), s.window("end"):
            clock.advance(1)
            patch.setattr(s, "instant", interrupted)
        assert s.open_windows == [] and window.measurement.parent is None
        assert [(m.label, m.status, m.duration_s) for m in s.measurements] == [
            ("at its begin", "interrupted", 0), ("end", "ok", 1), ("after", "ok", 1)
        ]  # fmt: skip


def test_a_window_may_begin_in_one_context_and_end_in_another() -> None:
    with lem.Session(sources=[]) as s:
        manager = s.window("two contexts")
        contextvars.copy_context().run(manager.__enter__)
        manager.__exit__(None, None, None)
        assert [m.status for m in s.measurements] == ["ok"]


@pytest.mark.usefixtures("by_hand")
def test_what_is_known_so_far_holds_the_repeats_that_have_ended(clock: FakeClock) -> None:
    with opened(clock, Meter(clock)) as s:
        clock.advance(1)
        with s.window("work") as window:
            for seconds in (1, 2):
                with window.repeat():
                    clock.advance(seconds)
                found = window.so_far()
                assert found.repeats[-1].energy["meter:gpu0"].joules == pytest.approx(100 * seconds)
            clock.advance(1)
            with window.repeat():
                clock.advance(1)
                assert len(window.so_far().repeats) == 2
        assert s.measurements == [window.measurement] and len(window.measurement.repeats) == 3


def test_what_is_known_so_far_may_wait_for_the_counters() -> None:
    stepping = Meter(lambda: time.monotonic_ns() // 60_000_000 * 60_000_000)
    stepping.domains = {"gpu0": Domain("gpu", "counter")}
    with lem.Session(sources=[stepping]) as s:
        time.sleep(0.5)
        with s.window("work") as window:
            with window.repeat():
                time.sleep(0.07)
            assert len(window.so_far(wait=True).repeats) == 1


@pytest.mark.usefixtures("by_hand")
def test_idling_leaves_the_waiting_to_its_block(clock: FakeClock) -> None:
    with opened(clock, Meter(clock)) as s:
        clock.advance(1)
        with s.idling(5, "bare"):
            clock.advance(5)
        assert s.baselines["bare"]["power_w"]["meter:gpu0"]["watts"] == pytest.approx(100)


def test_a_counter_slower_than_the_repeats_is_waited_for() -> None:
    """It tells of a millisecond's work only every 0.3 s; that no repeat is known yet is no reason to judge by the rate."""

    class Slow(Meter):
        def read(self) -> dict[str, Reading]:
            told_ns = self._clock() // 300_000_000 * 300_000_000
            return {"gpu0": Reading(self._clock(), self._power_w * told_ns / 1e9)}

    meter = Slow(time.monotonic_ns)
    meter.domains = {"gpu0": Domain("gpu", "counter", refresh_s=0.3)}
    engine, requests = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=10_000), lem.prompts.synthetic(1, 4, 2)
    with lem.Session(sources=[meter]) as s:
        time.sleep(0.7)
        m = s.run(engine, requests, warmup=0, repeats=lem.repeat_until(0.05, max_repeats=20))
    assert m.config["repeat_until"]["judged_by"] == "j_per_output_token"
    assert len(m.repeats) == 20 and "interval_not_reached" in m.reasons


def test_repeats_until_the_figure_is_known() -> None:
    engine, requests = lem.load_backend("fake", "fake", ttft_s=0.02, tokens_per_s=1000), lem.prompts.synthetic(2, 4, 5)
    with lem.Session(sources=[Meter(time.monotonic_ns)]) as s:
        m = s.run(engine, requests, warmup=0, repeats=lem.repeat_until(0.5, max_repeats=9))
        assert 5 <= len(m.repeats) < 9, "as soon as the meter has told about five"
        assert "interval_not_reached" not in m.reasons
        assert m.config["repeat_until"] == {
            "interval": 0.5, "max_repeats": 9, "min_repeats": 5, "judged_by": "j_per_output_token",
        }  # fmt: skip
        m = s.run(engine, requests, warmup=0, repeats=lem.repeat_until(1e-9, max_repeats=3, min_repeats=2))
        assert len(m.repeats) == 3 and "interval_not_reached" in m.reasons
    with lem.Session(sources=[]) as s:
        # A busy machine adds 5 ms to one of two repeats, and Student's factor is 12.7: so they are long.
        slow = lem.load_backend("fake", "fake", ttft_s=0.2, tokens_per_s=1000)
        m = s.run(slow, requests, warmup=0, repeats=lem.repeat_until(0.9, max_repeats=9, min_repeats=2))
        assert len(m.repeats) == 2 and m.config["repeat_until"]["judged_by"] == "output_tokens_per_s"


def test_a_record_holds_a_digest_of_the_ids_where_they_are_known() -> None:
    spoken = lem.prompts.texts(["two words", "and three more"], 3, fixed_length=True)
    with lem.Session(sources=[]) as session:
        engine = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=5000)
        unknown = session.run(engine, spoken, warmup=0)
        assert "prompt_ids_sha256" not in unknown.config, "nobody told the ids of a text"
        given = lem.prompts.synthetic(3, 5, 2)
        assert session.run(engine, given, warmup=0).config["prompt_ids_sha256"] == lem.prompts.ids_digest(given)
        open_then: list[int] = []

        def token_ids(request: Request) -> list[int]:
            open_then.append(len(session.open_windows))
            return [1, *map(len, (request.prompt or "").split())]

        engine.token_ids = token_ids  # type: ignore[attr-defined]
        known = session.run(engine, spoken, warmup=0)
    assert open_then == [0, 0], "they are asked for outside of what is measured"
    assert known.config["prompt_ids_sha256"] == lem.prompts.ids_digest(
        [Request(prompt_token_ids=(1, 3, 5)), Request(prompt_token_ids=(1, 3, 5, 4))]
    )
    assert known.config["prompts_sha256"] == unknown.config["prompts_sha256"]


def test_two_ways_to_make_ids_of_a_text_are_seen() -> None:
    """As a doubled BOS, or the template of another model, would be."""
    transformers = pytest.importorskip("transformers")
    spoken = lem.prompts.texts(["The kettle sings."], 2, fixed_length=True)
    backend = lem.load_backend("transformers", "tiny-llama")
    with lem.Session(sources=[]) as session:
        one = session.run(backend, spoken, warmup=0)
        doubled = [Request(prompt="<s>The kettle sings.", max_new_tokens=2, fixed_length=True)]
        two = session.run(backend, doubled, warmup=0)
    backend.close()
    ids = transformers.AutoTokenizer.from_pretrained(lem.models.resolve("tiny-llama"))("The kettle sings.").input_ids
    as_given = lem.prompts.ids_digest([Request(prompt_token_ids=tuple(ids))])
    assert one.config["prompt_ids_sha256"] == as_given
    assert two.config["prompt_ids_sha256"] == lem.prompts.ids_digest([Request(prompt_token_ids=(ids[0], *ids))])
