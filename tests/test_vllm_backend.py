"""The vLLM backend on the real engine, `make test-vllm`; what needs no engine is tested everywhere."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

import lem_kit as lem
from lem_kit import baseline, metrics, steady, store
from lem_kit.backends import _processes, _steps, vllm
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent

engine_here = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed in this environment: make test-vllm"
)
SMALL = {"dtype": "bfloat16", "enforce_eager": True, "kv_cache_memory_bytes": 2**28}


# --- without the engine -----------------------------------------------------------------------------------------------


class Front:
    """The part of the engine's front end that is tapped: `process_outputs` changes the state of each request, as there."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.processed = 0

    def process_outputs(
        self, engine_core_outputs: Any, engine_core_timestamp: float | None = None, iteration_stats: Any = None
    ) -> str:
        self.processed += 1
        for output in engine_core_outputs:
            state = self.request_states[output.request_id]
            state.stats.queued_ts, state.stats.scheduled_ts = 1.0, 1.5
            if output.finish:
                del self.request_states[output.request_id]
        return "processed"


def tapped(front: Any) -> tuple[_steps.Tap, _steps.Steps, str]:
    steps = _steps.Steps()
    tap = _steps.Tap(steps)
    tap.onto(front)
    return tap, steps, tap.timing


def output_of(ids: Any, finish: bool = False, name: str = "lem_kit-0") -> Any:
    return SimpleNamespace(request_id=name, new_token_ids=ids, finish=finish, finish_reason="length" if finish else None)


def told(work: Callable[[_steps.Row], None]) -> list[TokenEvent | Exception]:
    """What arrives in the caller's loop of a request of three prompt tokens."""

    async def collect() -> list[Any]:
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        work(_steps.Row("lem_kit-0", 7, [1, 2, 3], asyncio.get_running_loop(), inbox))
        await asyncio.sleep(0)
        return [inbox.get_nowait() for _ in range(inbox.qsize())]

    return asyncio.run(collect())


def test_the_tap_gives_the_engines_stamps_and_what_it_says_of_a_request() -> None:
    front = Front()
    tap, steps, timing = tapped(front)
    assert timing.startswith("engine")
    stats = SimpleNamespace(queued_ts=0.0, scheduled_ts=0.0, num_preemptions=2)
    front.request_states["inner-id"] = SimpleNamespace(external_req_id="lem_kit-0", stats=stats, num_cached_tokens=0)

    def work(row: _steps.Row) -> None:
        tap.rows[row.name] = row
        for ids, stamp, finish in (([5], 2.0, False), ([6, 7], 2.25, True)):
            assert front.process_outputs([output_of(ids, finish, "inner-id")], stamp) == "processed"
            row.took(len(ids))
        row.end(SimpleNamespace(outputs=[SimpleNamespace(finish_reason="length")]))

    first, second, last = told(work)
    assert first == TokenEvent(
        7, 1, 2_000_000_000, "engine", prompt_tokens=3, cached_tokens=0, queued_ns=1_000_000_000, scheduled_ns=1_500_000_000
    )
    assert second == TokenEvent(7, 2, 2_250_000_000, "engine")
    assert isinstance(last, TokenEvent) and (last.n_tokens, last.finish_reason, last.preemptions) == (0, "length", 2)
    assert (steps.t_ns, steps.finished) == (2_250_000_000, 1)


def test_the_tap_hears_when_a_request_was_preempted() -> None:
    def happened(*what: tuple[str, float]) -> list[Any]:
        return [SimpleNamespace(type=SimpleNamespace(name=name), timestamp=t) for name, t in what]

    def ended(*each: list[Any], count: int) -> Any:
        front = Front()
        tap, _, _ = tapped(front)
        stats = SimpleNamespace(num_preemptions=count)
        front.request_states["lem_kit-0"] = SimpleNamespace(stats=stats, num_cached_tokens=0)

        def work(row: _steps.Row) -> None:
            tap.rows[row.name] = row
            for k, events in enumerate(each):
                output = output_of([5])
                output.events = events
                front.process_outputs([output], 2.0 + k)
                row.took(1)
            row.end(SimpleNamespace(outputs=[SimpleNamespace(finish_reason="length")]))

        return told(work)[-1]

    first = happened(("QUEUED", 1.0), ("SCHEDULED", 1.5))
    assert ended(first, [], count=0).preempted_ns == ()
    twice = happened(("PREEMPTED", 2.1), ("SCHEDULED", 2.5), ("PREEMPTED", 2.75)), happened(("SCHEDULED", 3.5))
    spans = ((2_100_000_000, 2_500_000_000), (2_750_000_000, 3_500_000_000))
    assert ended(first, *twice, count=2).preempted_ns == spans
    assert ended(first, twice[0], count=2).preempted_ns == spans[:1], "it ended while it was out"
    assert ended(first, [], count=1).preempted_ns is None, "more than was heard of: not known"


def test_tokens_that_no_step_told_are_stamped_here_and_keep_their_count() -> None:
    def work(row: _steps.Row) -> None:
        row.took(1)
        row.took(3)

    first, second = told(work)
    assert isinstance(first, TokenEvent) and isinstance(second, TokenEvent)
    assert (first.n_tokens, first.timing_source, first.prompt_tokens) == (1, "client", 3)
    assert (second.n_tokens, second.timing_source, second.prompt_tokens) == (3, "client", None)


@pytest.mark.parametrize("stamp", [None, 0.0, 1e9])
def test_a_stamp_of_another_clock_is_not_believed(stamp: float | None) -> None:
    front = Front()
    tap, steps, _ = tapped(front)
    front.request_states["lem_kit-0"] = SimpleNamespace(stats=SimpleNamespace())

    def work(row: _steps.Row) -> None:
        tap.rows[row.name] = row
        front.process_outputs([output_of([5])], stamp)

    assert told(work) == [] and steps.t_ns == 0 and tap.timing.startswith("client")


def test_another_front_end_is_left_alone() -> None:
    other = SimpleNamespace(process_outputs=lambda outputs: outputs, request_states={})
    assert tapped(other)[2].startswith("client") and other.process_outputs(3) == 3
    assert tapped(SimpleNamespace())[2].startswith("client")


def test_a_tap_that_fails_is_unhooked_and_the_engine_goes_on() -> None:
    front = Front()
    tap, _, _ = tapped(front)
    for name in ("lem_kit-0", "other"):
        front.request_states[name] = SimpleNamespace(stats=SimpleNamespace(num_preemptions=0), num_cached_tokens=0)

    def work(row: _steps.Row) -> None:
        tap.rows[row.name] = row
        tap.rows["other"] = _steps.Row("other", 8, [1, 2], row.caller, row.inbox)
        with pytest.warns(UserWarning, match="cannot be read any more"):
            assert front.process_outputs([output_of([5]), output_of(5, name="other")], 2.0) == "processed"
        assert front.process_outputs == free
        row.took(1)
        tap.rows["other"].took(1)

    free = Front.process_outputs.__get__(front)
    whole, broken = told(work)
    assert isinstance(whole, TokenEvent) and isinstance(broken, TokenEvent), "each token is told once"
    assert (whole.index, whole.n_tokens, whole.timing_source, whole.prompt_tokens) == (7, 1, "engine", 3)
    assert (broken.index, broken.n_tokens, broken.timing_source, broken.prompt_tokens) == (8, 1, "client", 2)
    assert front.processed == 1 and tap.timing.startswith("client: the engine's stamps could not be read")


def test_a_request_that_is_given_up_is_an_error() -> None:
    aborted = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="abort")])
    (problem,) = told(lambda row: row.end(aborted))
    assert isinstance(problem, RuntimeError) and "abort" in str(problem)


def test_the_log_of_steps_is_counted_once_and_kept_by_column() -> None:
    steps = _steps.Steps()
    assert steps.counters() == {}
    for t_ns, running, waiting, used in ((100, 1, 0, 0.25), (200, 3, 2, 0.5), (200, 9, 9, 0.9), (300, 0, 1, 0.125)):
        steps.t_ns, steps.finished = t_ns, 1 if t_ns == 300 else 0
        steps.record(SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=used))
    found = steps.series()
    assert [list(series.t_ns) for series in found.values()] == [[100, 200, 300]] * 3, "stamps of a trace increase"
    assert list(found["batch_requests"].value) == [1, 3, 1], "the one that the step ended, too"
    assert list(found["kv_cache_used"].value) == [0.25, 0.5, 0.125]
    assert steps.counters() == {
        "batch_requests_mean": 14 / 4, "batch_requests_max": 9.0, "waiting_requests_max": 9.0, "kv_cache_used_max": 0.9,
    }  # fmt: skip
    assert steps.counters() == {} and not steps.series()["batch_requests"].t_ns


def test_the_cause_in_a_log_is_the_first_exception_since(tmp_path: Any) -> None:
    log = _processes.Log(tmp_path / "vllm-1.log")
    assert log.cause() is None and log.size() == 0
    log.path.write_text("RuntimeError: of an earlier engine\n")  # type: ignore[union-attr]
    began = log.size()
    with (tmp_path / "vllm-1.log").open("a") as file:
        file.write("2026 ERROR 12 core: EngineCore failed to start.\nTraceback (most recent call last):\n  File x\n")
        file.write("torch.OutOfMemoryError: CUDA out of memory.\n\nRuntimeError: Engine core initialization failed.\n")
    assert log.cause(began) == "torch.OutOfMemoryError: CUDA out of memory."
    assert str(log.path) in log.hint() and "log" in _processes.Log(None).hint()
    log.clear()
    log.remove_empty()
    assert not list(tmp_path.iterdir())


def test_a_sentence_of_an_error() -> None:
    pydantic = "1 validation error for ModelConfig\n  Value error, there is no such dtype [type=value_error, ...]\n more"
    assert vllm._sentence(ValueError(pydantic)) == "there is no such dtype"
    named = "1 validation error for CacheConfig\nblock_size\n  Input should be 1 or 8 [type=literal_error, ...]\n more"
    assert vllm._sentence(ValueError(named)) == "block_size: Input should be 1 or 8"
    assert vllm._sentence(KeyError()) == "KeyError" and vllm._sentence(OSError("a\nb")) == "a"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="the real one is here")
def test_a_release_without_the_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("vllm")
    old.__version__, old.__path__ = "0.1.2", []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", old)
    monkeypatch.setattr(vllm, "_settle_environment", lambda: _processes.Log(None))
    with pytest.raises(LemError, match=r"vLLM 0\.1\.2 has no vllm\.engine.*pip install -U 'lem_kit\[vllm\]'"):
        vllm.load("tiny-llama")


# --- with it ----------------------------------------------------------------------------------------------------------


def numbers(start: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def ask(backend: Any, *requests: Request, pause_s: float = 0.0) -> list[TokenEvent]:
    async def collect() -> list[TokenEvent]:
        found = []
        async for event in backend.generate(requests):
            found.append(event)
            await asyncio.sleep(pause_s)
        return found

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    backend = lem.load_backend("vllm", "tiny-llama", **SMALL, max_model_len=1024, max_num_seqs=8)
    yield backend
    processes = {process.pid for process in backend._processes}
    assert processes, "the engine runs in processes of its own"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that some were left, for one
        backend.close()
    assert not [pid for pid in processes if os.path.exists(f"/proc/{pid}")]


@engine_here
def test_stamps_are_the_engines_own(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last equal what the engine says of the request in the end, and so do queue and schedule."""
    finals: list[Any] = []
    end = _steps.Row.end
    monkeypatch.setattr(_steps.Row, "end", lambda row, output: (finals.append(output.metrics), end(row, output))[1])
    events = ask(engine, Request(prompt_token_ids=numbers(300, 9), max_new_tokens=12, fixed_length=True))
    (theirs,) = finals
    ours = [e for e in events if e.n_tokens]
    assert len(ours) == 12 and {(e.n_tokens, e.timing_source) for e in ours} == {(1, "engine")}
    assert ours[0].t_ns == round(theirs.first_token_ts * 1e9) and ours[-1].t_ns == round(theirs.last_token_ts * 1e9)
    assert ours[0].queued_ns == round(theirs.queued_ts * 1e9) and ours[0].scheduled_ns == round(theirs.scheduled_ts * 1e9)
    assert ours[0].cached_tokens == 0 and events[-1].preemptions == 0


@engine_here
def test_a_slow_consumer_loses_no_event(engine: Any) -> None:
    requests = [Request(prompt_token_ids=numbers(300 + i, 5), max_new_tokens=24, fixed_length=True) for i in range(3)]
    events = ask(engine, *requests, pause_s=0.02)
    assert [sum(e.index == i and e.n_tokens == 1 for e in events) for i in range(3)] == [24] * 3


@engine_here
def test_a_run_keeps_what_only_the_engine_sees(engine: Any, tmp_path: Any) -> None:
    with lem.Session(tmp_path, sources=[]) as session:
        workload = lem.prompts.synthetic(12, input_tokens=16, output_tokens=8)
        m = session.run(engine, workload, lem.traffic.poisson(rate_per_s=40, seed=0), warmup=1)
    m = store.load(tmp_path / m.run_id)
    assert [c.output_tokens for c in m.completions] == [8] * 12 and {c.timing_source for c in m.completions} == {"engine"}
    for c in m.completions:
        assert c.dispatch_ns < c.queued_ns <= c.scheduled_ns < c.events[0][0] <= c.done_ns  # type: ignore[operator]
        assert metrics.queue_s(c) >= 0 and metrics.prefill_s(c) > 0 and c.preemptions == 0  # type: ignore[operator]
    assert 1 <= m.counters["batch_requests_mean"] <= m.counters["batch_requests_max"] <= 8
    assert 0 < m.counters["kv_cache_used_max"] < 1
    steps = m.trace.gauges["vllm:engine.batch_requests"]
    assert max(steps.value) == m.counters["batch_requests_max"] and m.t0_ns < steps.t_ns[0] < m.t1_ns


@engine_here
def test_a_full_batch_with_a_queue_before_it_is_the_steady_state(engine: Any, tmp_path: Any) -> None:
    """24 requests at once for 8 places: full load lasts until the first ends that nobody follows."""
    lengths = [24 + 9 * (i % 5) for i in range(24)]
    workload = [
        Request(prompt_token_ids=numbers(300 + i, 16), max_new_tokens=n, fixed_length=True) for i, n in enumerate(lengths)
    ]
    with lem.Session(tmp_path, sources=[]) as session:
        m = session.run(engine, workload, lem.traffic.burst(), warmup=1)
    ((done, found),) = steady.of_repeats(store.load(tmp_path / m.run_id))
    without = steady.phases_of_run(done)
    assert found is not None and without is not None and (found.peak, without.peak) == (8, 24)
    assert (found.method, without.method) == (steady.BY_STEPS, steady.BY_REQUESTS)
    placed = sorted(c.scheduled_ns or 0 for c in done)
    assert found.drain_ns == min(c.done_ns for c in done if c.events[-1][0] > placed[-1])
    assert without.drain_ns < placed[-4] < found.drain_ns, "with a fifth of the requests still to come"
    assert found.steady_ns < placed[8], "full before a ninth is given a place"
    assert metrics.steady_output_tokens_per_s(m) == steady.output_tokens_per_s(done, steps=steady.step_log(m.trace))


@engine_here
def test_effective_configuration_is_the_engines(engine: Any) -> None:
    facts = engine.describe()
    assert facts["requested"] == {**SMALL, "max_model_len": 1024, "max_num_seqs": 8}
    effective = facts["effective"]
    assert effective["scheduler_config"]["max_num_seqs"] == 8 and effective["model_config"]["enforce_eager"] is True
    assert effective["cache_config"]["enable_prefix_caching"] is False and effective["cache_config"]["num_gpu_blocks"] > 0
    assert effective["model_config"]["model"] == "tiny-llama" and facts["model"]["dtype"] == "bfloat16"
    assert facts["model"]["parameters"] == 7016704 and facts["model"]["layers"] == 8
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1" and effective["timing"].startswith("engine")
    for kind in ("bare", "context"):
        with pytest.raises(LemError, match="processes of its own"):
            baseline.kind_now(kind)
    assert baseline.kind_now(None) == "engine"
    json.dumps(facts, allow_nan=False)


@engine_here
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(prompt_token_ids=numbers(300, 1020), max_new_tokens=5), "1020 prompt tokens and 5 new ones .*1024"),
        (Request(prompt_token_ids=(5000,)), "5000 .* 4096"),
        (Request(prompt="energy " * 2000), "more than the engine's context"),
        (Request(prompt="a", options={"max_tokens": 3}), "sets the option 'max_tokens' itself"),
        (Request(prompt="a", options={"top_k": -3}), "rejects the options.*top_k"),
        (Request(prompt="a", options={"temperatur": 1.0}), "did you mean 'temperature'"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_sentence(engine: Any, request_: Request, words: str) -> None:
    with pytest.raises(LemError, match=words):
        ask(engine, request_)
    assert sum(e.n_tokens for e in ask(engine, Request(prompt="a", max_new_tokens=2, fixed_length=True))) == 2


@engine_here
def test_options_reach_the_engine(engine: Any) -> None:
    """A stop string ends the request; a bias makes one token certain, and so does a list of tokens to stop at."""
    sure = {"logit_bias": {350: 100.0}}
    events = ask(engine, Request(prompt="a", max_new_tokens=9, options={**sure, "stop_token_ids": [350]}))
    assert sum(e.n_tokens for e in events) == 1 and events[-1].finish_reason == "stop"
    text = engine._engine.tokenizer.decode([350])
    events = ask(engine, Request(prompt="a", max_new_tokens=9, options={**sure, "stop": [text]}))
    assert events[-1].finish_reason == "stop" and sum(e.n_tokens for e in events) < 9


@engine_here
def test_leaving_early_frees_the_place(engine: Any) -> None:
    async def leave() -> None:
        stream = engine.generate([Request(prompt_token_ids=(300,), max_new_tokens=900, fixed_length=True)])
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    assert engine._engine.output_processor.get_num_unfinished_requests() == 0 and not engine._tap.rows


@engine_here
def test_what_is_shared_speculated_and_preempted_is_recorded() -> None:
    """Prefix caching on, four tokens guessed at a time, and a cache too small for four requests."""
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
    backend: Any = lem.load_backend(
        "vllm", "tiny-llama", **SMALL, max_model_len=512, block_size=32, num_gpu_blocks_override=18,
        enable_prefix_caching=True, speculative_config=guess,
    )  # fmt: skip
    try:
        prompt = numbers(300, 4) * 25
        one = Request(prompt_token_ids=prompt, max_new_tokens=64, fixed_length=True)
        assert ask(backend, one)[0].cached_tokens == 0
        events = ask(backend, one)
        assert events[0].cached_tokens == 96, "three of the prompt's blocks of 32 were kept"
        several = [e.n_tokens for e in events if e.n_tokens]
        assert sum(several) == 64 and max(several) > 1
        assert (
            ask(backend, Request(prompt_token_ids=prompt, max_new_tokens=2, options={"cache_salt": "x"}))[0].cached_tokens
            == 0
        )
        many = [Request(prompt_token_ids=numbers(500 + 9 * i, 60), max_new_tokens=150, fixed_length=True) for i in range(4)]
        events = ask(backend, *many)
        assert [sum(e.n_tokens for e in events if e.index == i) for i in range(4)] == [150] * 4
        assert sum(e.preemptions or 0 for e in events) > 0 and backend.counters()["kv_cache_used_max"] > 0.7
        for last in (e for e in events if e.preemptions is not None):
            stamps = [e.t_ns for e in events if e.index == last.index and e.n_tokens]
            assert last.preempted_ns is not None and len(last.preempted_ns) == last.preemptions
            for start, end in last.preempted_ns:
                assert start < end and stamps[0] < start and end < stamps[-1]
                assert sum(start < t_ns < end for t_ns in stamps) <= 1, "at most that of a step that had begun"
    finally:
        backend.close()


@engine_here
def test_an_interrupted_start_leaves_nothing_behind() -> None:
    """In a process of its own, which is interrupted as a notebook's kernel is."""
    code = """
import signal
import psutil
import lem_kit as lem
from lem_kit.backends import RESIDENT
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with interrupts ignored
    try:
        lem.load_backend('vllm', 'tiny-llama', dtype='bfloat16', enforce_eager=True, kv_cache_memory_bytes=2**28)
    except KeyboardInterrupt:
        print('left:', [p.pid for p in psutil.Process().children(True) if 'VLLM' in ' '.join(p.cmdline())], RESIDENT)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    mine = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any("VLLM" in " ".join(p.cmdline()) for p in mine.children(True)):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "left: [] set()" in process.communicate(timeout=60)[0]


@engine_here
def test_an_engine_that_dies_leaves_a_record_and_the_session_goes_on(tmp_path: Any) -> None:
    backend: Any = lem.load_backend("vllm", "tiny-llama", **SMALL)
    (core,) = [p.pid for p in backend._processes if "EngineCore" in command_line(p.pid)] or [None]
    assert core, "the engine's core has no name that is known here"
    with lem.Session(tmp_path, sources=[]) as session:
        workload = lem.prompts.synthetic(3, input_tokens=8, output_tokens=3000)
        killer = asyncio.new_event_loop().run_in_executor(None, lambda: (time.sleep(2.5), os.kill(core, signal.SIGKILL)))
        with pytest.raises(LemError, match=r"Every request failed.*engine process has died.*load the model again"):
            session.run(backend, workload, lem.traffic.burst(), warmup=0, run_id="killed")
        del killer
        with pytest.raises(LemError, match="has died"):
            session.run(backend, workload, lem.traffic.burst(), warmup=0)
        m = session.run(lem.load_backend("fake", "fake"), lem.prompts.synthetic(2, 8, 4), warmup=0)
    killed = store.load(tmp_path / "killed")
    assert killed.status == "failed" and "requests_failed" in killed.reasons
    assert all("vLLM's engine process has died" in (c.error or "") for c in killed.completions)
    assert all(c.events for c in killed.completions), "what had come by then is kept"
    assert m.status == "ok"
    backend.close()


def command_line(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().decode(errors="replace")


@engine_here
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "bfloat17"}, "cannot load 'tiny-llama' as asked: .*bfloat17"),
        ({"max_model_len": 8192}, "cannot load 'tiny-llama' as asked: .*max_model_len"),
        ({**SMALL, "num_gpu_blocks_override": 1, "max_model_len": 4096}, "could not start .*(KV cache|blocks).*Its log: "),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_start_says_why(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(LemError, match=words):
        lem.load_backend("vllm", "tiny-llama", **arguments)
