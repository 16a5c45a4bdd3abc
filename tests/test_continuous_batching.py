"""The engine's own continuous batching behind the backend: tokens, stamps, arrivals, cancelling and failing."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lem_kit import models, traffic
from lem_kit.backends import COUNTERS, _continuous
from lem_kit.backends.transformers import Transformers, load
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent
from lem_kit.session import Session

Config = getattr(transformers, "ContinuousBatchingConfig", None)
pytestmark = pytest.mark.skipif(Config is None, reason="this release of transformers has none that stamps tokens")
PAGE = "page_size" if Config and "page_size" in {f.name for f in dataclasses.fields(Config)} else "block_size"
SMALL = {"num_blocks": 32, "max_batch_tokens": 128}
LENGTHS = (4, 11, 7, 2)


def request(n: int, new: int = 12, **options: Any) -> Request:
    return Request(prompt_token_ids=tuple(range(300, 300 + n)), max_new_tokens=new, fixed_length=True, options=options)


@pytest.fixture(scope="module")
def backend() -> Iterator[Transformers]:
    loaded = load("tiny-llama", continuous_batching=SMALL)
    yield loaded
    loaded.close()


async def collected(backend: Transformers, *requests: Request) -> list[TokenEvent]:
    return [event async for event in backend.generate(requests)]


def outputs(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine hands over, from now on."""
    engine, seen = backend._continuous, []
    assert engine is not None
    hand_over = engine._hand_over
    monkeypatch.setattr(engine, "_hand_over", lambda name, out, end: (seen.append(out), hand_over(name, out, end))[1])
    return seen


def test_requests_that_arrive_while_others_run_give_the_tokens_of_generate(
    backend: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = outputs(backend, monkeypatch)
    asked = [request(n, new) for n, new in zip(LENGTHS, (40, 12, 12, 12))]

    async def late(i: int) -> list[TokenEvent]:
        await asyncio.sleep(0.03 * i)
        return await collected(backend, asked[i])

    async def all_of() -> list[list[TokenEvent]]:
        return await asyncio.gather(*(late(i) for i in range(4)))

    before = time.monotonic_ns()
    found = asyncio.run(all_of())
    after = time.monotonic_ns()
    bare = transformers.AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama")).eval()
    for events, one in zip(found, asked):
        ids = torch.tensor([one.prompt_token_ids])
        options = {"max_new_tokens": one.max_new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = bare.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
        assert expected in [output.generated_tokens for output in seen]
        assert [e.n_tokens for e in events] == [1] * one.max_new_tokens
        assert events[0].prompt_tokens == ids.shape[1] and events[-1].finish_reason == "length"
        assert {e.timing_source for e in events} == {"engine"}
        stamps = [before, *(e.t_ns for e in events), after]
        assert stamps == sorted(set(stamps)), "one clock, and a stamp of its own for each token"
    assert found[1][0].t_ns < found[0][-1].t_ns, "the second request began while the first was at work"


def test_an_open_loop_runs_on_it_and_is_refused_without(backend: Transformers) -> None:
    assert backend.concurrent
    asked = [request(n, 5) for n in (3, 5, 8, 4, 6, 2)]
    arrivals = traffic.poisson(rate_per_s=50, seed=1)
    traffic.check(backend, asked, arrivals)
    done = traffic.run_blocking(traffic.send(backend, asked, arrivals))
    assert [c.output_tokens for c in done] == [5] * 6 and {c.timing_source for c in done} == {"engine"}
    assert [c.prompt_tokens for c in done] == [3, 5, 8, 4, 6, 2] and {c.error for c in done} == {None}
    assert all(c.dispatch_ns < c.events[0][0] <= c.events[-1][0] < c.done_ns for c in done)
    static = load("tiny-llama")
    with pytest.raises(LemError, match="one batch at a time"):
        traffic.check(static, asked, arrivals)
    static.close()


def test_a_session_measures_it(backend: Transformers) -> None:
    with Session(sources=()) as session:
        m = session.run(backend, [request(n, 4) for n in LENGTHS], traffic.burst())
    assert [c.output_tokens for c in m.completions] == [4] * 4 and m.status == "ok"
    assert m.backend is not None and m.backend["effective"]["continuous_batching"]["num_blocks"] == 32


def test_what_is_in_force_is_recorded(backend: Transformers) -> None:
    effective = backend.describe()["effective"]
    assert effective["continuous_batching"]["allow_block_sharing"] is False
    assert effective["continuous_batching"].get("auto_switch_to_flash", False) is False
    assert effective["continuous_batching"]["num_blocks"] == 32
    assert effective["attn_implementation_as_loaded"] == "sdpa"
    assert effective["attn_implementation"] == backend._model.config._attn_implementation in ("sdpa", "paged|sdpa")
    assert backend.describe()["requested"]["continuous_batching"] == SMALL


def test_a_switch_of_the_attention_shows() -> None:
    """Eager attention has no paged form of its own name; the engine changes the model, and the record says so."""
    backend = load("tiny-llama", continuous_batching=SMALL, attn_implementation="eager")
    effective = backend.describe()["effective"]
    assert (effective["attn_implementation_as_loaded"], effective["attn_implementation"]) == ("eager", "paged|eager")
    backend.close()


def test_the_end_of_sequence_ends_a_request_and_counts(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = outputs(backend, monkeypatch)
    asyncio.run(collected(backend, request(11)))
    free = seen[0].generated_tokens
    stop = next(token for token in free[1:] if token != free[0])
    one = Request(prompt_token_ids=tuple(range(300, 311)), max_new_tokens=12, options={"eos_token_id": stop})
    events = asyncio.run(collected(backend, one))
    assert len(events) == free.index(stop) + 1 and events[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1.0}, "does not know the option 'temprature'"),
        ({"do_sample": True}, "takes no 'do_sample' per request.*when loading"),
        ({"max_new_tokens": 3}, "fields of Request"),
    ],
)
def test_options_that_the_engine_has_for_all_requests_only(
    backend: Transformers, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(LemError, match=words):
        asyncio.run(collected(backend, Request(prompt="a", options=options)))
    assert len(asyncio.run(collected(backend, request(3, 2, do_sample=False)))) == 2, "what is in force may be said"


def test_what_does_not_fit_is_said_before_anything_runs(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = outputs(backend, monkeypatch)
    with pytest.raises(LemError, match=r"5 prompt tokens and 4092 new ones.*context of 4096"):
        asyncio.run(collected(backend, request(5, 4092)))
    with pytest.raises(LemError, match="vocabulary of 4096"):
        asyncio.run(collected(backend, Request(prompt_token_ids=(4096,))))
    assert seen == []


def scheduled(backend: Transformers) -> set[str]:
    engine = backend._continuous
    assert engine is not None
    scheduler = engine.manager.batch_processor.scheduler
    return {*scheduler.active_requests, *scheduler.waiting_requests}


def until(true: Any, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(true())


def test_leaving_early_cancels_that_request_and_no_other(backend: Transformers) -> None:
    async def leave() -> tuple[TokenEvent, list[TokenEvent]]:
        other = asyncio.ensure_future(collected(backend, request(4, 30)))
        stream = backend.generate([request(4, 3000, streaming=True)])
        first = await anext(stream)
        assert len(scheduled(backend)) == 2
        await stream.aclose()  # type: ignore[attr-defined]
        return first, await other

    first, other = asyncio.run(leave())
    assert first.n_tokens >= 1 and first.timing_source == "engine" and len(other) == 30
    assert until(lambda: not scheduled(backend)) and backend._continuous is not None and not backend._continuous._waiting


def test_a_cancelled_task_cancels_its_request(backend: Transformers) -> None:
    async def cancel() -> None:
        task = asyncio.ensure_future(collected(backend, request(4, 3000)))
        while not scheduled(backend):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert until(lambda: not scheduled(backend))
    assert len(asyncio.run(collected(backend, request(4, 3)))) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_evicted_requests_are_whole_and_never_stamped_by_guess(streaming: bool) -> None:
    """Three requests of 60 tokens in a cache of 128: the engine evicts, computes again, and forgets stamps."""
    backend = load("tiny-llama", continuous_batching={"num_blocks": 8, "max_batch_tokens": 64, PAGE: 16})

    async def all_of() -> list[list[TokenEvent]]:
        return await asyncio.gather(*(collected(backend, request(10, 50, streaming=streaming)) for _ in range(3)))

    before = time.monotonic_ns()
    found = asyncio.run(all_of())
    assert [sum(e.n_tokens for e in events) for events in found] == [50] * 3
    assert all(e.t_ns > before for events in found for e in events)
    unstamped = [events for events in found if events[0].timing_source == "client"]
    if streaming:  # every token was handed over with its stamp, before the engine forgot it
        assert not unstamped and [len(events) for events in found] == [50] * 3
    else:
        assert unstamped and all([e.n_tokens for e in events] == [50] for events in unstamped)
    assert backend.counters()["requests_without_engine_stamps"] == len(unstamped)
    backend.close()


def output(tokens: list[int], stamps: list[float] | None, finished: bool = True, error: str | None = None) -> Any:
    return SimpleNamespace(
        generated_tokens=tokens, timestamps=stamps, prompt_ids=[1, 2, 3], error=error, is_finished=lambda: finished
    )


def test_stamps_are_taken_only_where_they_can_be_told_apart() -> None:
    row = _continuous._Row(2, {9})
    assert row.events(output([5, 6], [1.0, 1.5], finished=False)) == [
        TokenEvent(2, 1, 1_000_000_000, "engine", 3),
        TokenEvent(2, 1, 1_500_000_000, "engine"),
    ]
    assert row.events(output([5, 6], [1.0, 1.5], finished=False)) == []
    # After an eviction the stamps begin anew; the last one is still that of the last token.
    assert row.events(output([5, 6, 9], [2.0])) == [TokenEvent(2, 1, 2_000_000_000, "engine", finish_reason="stop")]
    for stamps in ([2.0], [1.0, 2.0, 3.0, 4.0], None):
        (event,) = _continuous._Row(0, set()).events(output([5, 6, 7], stamps))
        assert (event.n_tokens, event.timing_source, event.finish_reason) == (3, "client", "length")
    (event,) = _continuous._Row(0, set()).events(output([5], [1.0], error="it broke"))
    assert event.finish_reason is None


def test_another_clock_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_continuous, "_ONE_CLOCK", False)
    (event,) = _continuous._Row(0, set()).events(output([5, 6], [1.0, 2.0]))
    assert (event.n_tokens, event.timing_source) == (2, "client")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("the seventh layer is missing"), "RuntimeError: the seventh layer is missing"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "MemoryError: out of memory"),
    ],
)
def test_an_engine_error_is_the_requests_error(raised: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("tiny-llama", continuous_batching=SMALL)
    forward, calls = backend._model.forward, 0

    @functools.wraps(forward)
    def broken(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise raised
        return forward(*args, **options)

    monkeypatch.setattr(backend._model, "forward", broken)
    asked = [request(4), request(5)]
    first = traffic.run_blocking(traffic.send(backend, asked, traffic.burst()))
    assert all((c.error or "").startswith(expected) for c in first)
    assert first[0].events, "what came before it is kept"
    assert ("fewer requests" in (first[0].error or "")) == expected.startswith("MemoryError")
    (later,) = traffic.run_blocking(traffic.send(backend, asked[:1], traffic.burst()))
    assert (later.error is not None and "loop has ended" in later.error) or "out of memory" in (later.error or "")
    backend.close()


def test_closing_stops_the_engines_thread_and_ends_what_runs_with_a_sentence() -> None:
    before = set(threading.enumerate())
    backend = load("tiny-llama", continuous_batching=SMALL)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before), "else the interpreter could not end"

    async def closed_half_way() -> None:
        async for _ in backend.generate([request(4, 3000, streaming=True)]):
            await asyncio.to_thread(backend.close)

    with pytest.raises(LemError, match="closed while"):
        asyncio.run(closed_half_way())
    backend.close()
    left = {thread for thread in set(threading.enumerate()) - before if not thread.name.startswith("asyncio")}
    assert not left
    with pytest.raises(LemError, match="closed"):
        asyncio.run(collected(backend, request(3)))


def test_counters_tell_the_occupancy_since_the_last_call(backend: Transformers) -> None:
    backend.counters()
    asyncio.run(collected(backend, *(request(4, 60) for _ in range(3))))
    found = backend.counters()
    assert found["batch_requests_max"] == 3.0 and 1.0 <= found["batch_requests_mean"] <= 3.0
    assert found["waiting_requests_max"] <= 3.0 and found["requests_without_engine_stamps"] == 0.0
    # A block holds 256 tokens: one for each request, of 32.
    assert found["kv_cache_used_max"] == pytest.approx(3 / 32)
    assert found.keys() <= COUNTERS.keys() and not any("memory" in name for name in found), "there is no GPU to ask"
    assert backend.counters() == {"requests_without_engine_stamps": 0.0}


def test_sampling_is_chosen_for_all_requests_when_loading() -> None:
    """And per request where the engine has been told to make it adjustable."""
    sampling = transformers.GenerationConfig(do_sample=True, temperature=0.8, top_k=5, eos_token_id=2)
    batching = {**SMALL, "per_request_processors": True}
    backend = load("tiny-llama", continuous_batching=batching, generation_config=sampling)
    assert backend._continuous is not None and backend._continuous.manager.generation_config.do_sample is True
    assert backend.describe()["effective"]["generation"]["do_sample"] is True
    assert len(asyncio.run(collected(backend, request(4, 3, temperature=2.5, top_k=7)))) == 3
    backend.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"continuous_batching": {"num_block": 3}}, "'num_block': did you mean 'num_blocks'"),
        ({"continuous_batching": 8}, "True or a dict"),
        ({"continuous_batching": True, "assistant_model": "tiny-llama"}, "no assisted decoding"),
        ({"continuous_batching": SMALL, "generation_config": transformers.GenerationConfig(num_beams=2)}, "no num_beams"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(LemError, match=words):
        load("tiny-llama", **arguments)


def test_a_release_without_it_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformers.__dict__, "ContinuousBatchingConfig", None)
    with pytest.raises(LemError, match=r"needs transformers 5\.17 or newer"):
        load("tiny-llama", continuous_batching=True)


def test_the_keywords_of_ours_are_none_of_the_engines() -> None:
    from lem_kit.backends.transformers import _OUR_KEYWORDS, _engine_keywords

    assert not set(_OUR_KEYWORDS) & _engine_keywords(None)
