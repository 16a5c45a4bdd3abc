"""Ways to decode, all through generate's own options: static cache, torch.compile, assisted; and what ends badly."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
import transformers

from lem_kit import models, traffic
from lem_kit.backends.transformers import Transformers, load
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent

PROMPT = tuple(range(300, 309))


@pytest.fixture(scope="module")
def backend() -> Iterator[Transformers]:
    loaded = load("tiny-llama")
    yield loaded
    loaded.close()


def events(backend: Transformers, *requests: Request) -> list[TokenEvent]:
    async def all_of() -> list[TokenEvent]:
        return [event async for event in backend.generate(requests)]

    return asyncio.run(all_of())


def request(new: int = 10, **options: Any) -> Request:
    return Request(prompt_token_ids=PROMPT, max_new_tokens=new, fixed_length=True, options=options)


class Watched:
    """What generate was given, what it gave, and which cache its forward pass worked on."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: dict[str, Any] = {}
        self.tokens: list[list[int]] = []
        self.caches: set[str] = set()
        generate, forward = model.generate, model.forward

        def generated(**options: Any) -> Any:
            self.options = options
            out = generate(**options)
            self.tokens.append(out[0, len(PROMPT) :].tolist())
            return out

        @functools.wraps(forward)  # generate reads its signature
        def watched(*args: Any, **options: Any) -> Any:
            self.caches.add(type(options.get("past_key_values")).__name__)
            return forward(*args, **options)

        monkeypatch.setattr(model, "generate", generated)
        monkeypatch.setattr(model, "forward", watched)


def test_a_static_cache_is_used_and_changes_no_token(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(backend._model, monkeypatch)
    assert len(events(backend, request())) == 10 and watched.caches == {"DynamicCache"}
    watched.caches.clear()
    assert len(events(backend, request(cache_implementation="static"))) == 10
    assert watched.options["cache_implementation"] == "static" and watched.caches == {"StaticCache"}
    assert watched.tokens[0] == watched.tokens[1] and len(watched.tokens[0]) == 10


def test_graphs_compiled_in_another_thread_do_not_end_ours(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 has it, which makes their state for the thread that imports the module; 2.13 makes it where it lacks."""
    from torch._inductor import cudagraph_trees as trees

    ours = trees.get_container(0)  # in this thread, whichever imported the module

    def get_obj(local: Any, name: str) -> Any:
        assert hasattr(local, name)
        return getattr(local, name)

    monkeypatch.setattr(trees, "get_obj", get_obj)
    kept: list[Any] = []

    def generated(**options: Any) -> Any:
        kept.append(trees.get_container(0))
        return generate(**options)

    generate = backend._model.generate
    monkeypatch.setattr(backend._model, "generate", generated)
    assert len(events(backend, request(3))) == len(events(backend, request(3))) == 3
    assert kept[0] is kept[1] and kept[0] is not ours


def test_compile_config_compiles_and_changes_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a compiler that only counts: the option has reached the model when it has been handed a graph."""
    small_llama.save(tmp_path / "model")
    backend = load(str(tmp_path / "model"))
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    tokens: list[list[int]] = []
    generate = backend._model.generate

    def generated(**options: Any) -> Any:
        out = generate(**options)
        tokens.append(out[0, len(PROMPT) :].tolist())
        return out

    monkeypatch.setattr(backend._model, "generate", generated)
    events(backend, request(6))
    assert graphs == []
    config = transformers.CompileConfig(backend=counting, mode=None)
    config._compile_all_devices = True  # by itself the engine compiles on accelerators only
    found = events(backend, request(6, cache_implementation="static", compile_config=config))
    assert graphs and sum(e.n_tokens for e in found) == 6
    assert tokens[0] == tokens[1]
    compiled = len(graphs)
    events(backend, request(6, cache_implementation="static", compile_config=config))
    assert len(graphs) == compiled, "the same shape again compiles nothing: a warm-up of the same shapes is enough"
    backend.close()
    torch._dynamo.reset()


class Sizes(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
    """Tokens per step of generate itself."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def put(self, value: Any) -> None:
        self.steps.append(value.numel())

    def end(self) -> None:
        self.steps = self.steps[1:]  # the prompt


def bare_steps(**options: Any) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama")).eval()
    sizes = Sizes()
    fixed = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=sizes, **fixed, **options)
    assert out.shape[1] == len(PROMPT) + 30 == len(PROMPT) + sum(sizes.steps)
    return sizes.steps


def draft() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama")).eval()


# There, a draft model and fixed_length exclude each other: the engine says so.
five = pytest.mark.skipif(transformers.__version__ < "5", reason="release 4 has no assisted decoding of a fixed length")


@five
def test_an_assistant_by_name_gives_events_of_several_tokens(backend: Transformers) -> None:
    expected = bare_steps(assistant_model=draft())
    assert max(expected) > 1 and sum(expected) == 30
    found = events(backend, request(30, assistant_model="tiny-llama"))
    assert [e.n_tokens for e in found] == expected
    assert [e.prompt_tokens for e in found if e.prompt_tokens] == [len(PROMPT)] and found[-1].finish_reason == "length"
    (assistant,) = backend.describe()["assistants"]
    assert assistant["name"] == "tiny-llama" and assistant["parameters"] == 7_016_704 and assistant["dtype"] == "float32"
    loaded = backend._assistants["tiny-llama"]
    events(backend, request(3, assistant_model="tiny-llama"))
    assert backend._assistants["tiny-llama"] is loaded and len(backend.describe()["assistants"]) == 1


@five
def test_an_assistant_given_when_loading_is_every_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("tiny-llama", assistant_model=draft(), dtype="float32")
    watched = Watched(backend._model, monkeypatch)
    found = events(backend, request(30))
    assert len(found) < 30 and sum(e.n_tokens for e in found) == 30
    assert watched.options["assistant_model"] is backend._assistant
    assert backend.describe()["assistants"][0]["architecture"] == "LlamaForCausalLM"
    with pytest.raises(LemError, match="one request at a time"):
        events(backend, request(), request())
    backend.close()


def test_prompt_lookup_gives_events_of_several_tokens(backend: Transformers) -> None:
    expected = bare_steps(prompt_lookup_num_tokens=3)
    assert max(expected) > 1
    found = events(backend, request(30, prompt_lookup_num_tokens=3))
    assert [e.n_tokens for e in found] == expected and {e.timing_source for e in found} == {"client"}
    with pytest.raises(LemError, match="one request at a time"):
        events(backend, request(prompt_lookup_num_tokens=3), request(prompt_lookup_num_tokens=3))


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_is_the_requests_error_with_its_remedy(
    backend: Transformers, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(backend._model, "generate", broken)
        asked = [request(7), request(7)]
        done = traffic.run_blocking(traffic.send(backend, asked, traffic.batches(2)))
    for completion in done:
        assert completion.error is not None and completion.error.startswith("MemoryError: out of memory (")
        assert "send fewer requests together" in completion.error and "\n" not in completion.error
        assert "2, padded to 9 + 7 tokens" in completion.error
    assert len(events(backend, request(3))) == 3


def test_any_other_error_of_the_engine_passes_as_it_is(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("the seventh layer is missing")

    monkeypatch.setattr(backend._model, "generate", broken)
    (done,) = traffic.run_blocking(traffic.send(backend, [request()], traffic.batches(1)))
    assert done.error == "RuntimeError: the seventh layer is missing"


def test_counters_are_peaks_since_the_last_call_summed_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("tiny-llama")
    assert backend.counters() == {}, "no GPU holds weights"
    backend._facts["effective"]["weight_bytes"] = {"cpu": 5, "cuda:0": 7, "cuda:1": 9}
    peaks = {"cuda:0": 100, "cuda:1": 30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda gpu: 2 * peaks[gpu])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: peaks.update({gpu: 1}))
    assert backend.counters() == {"peak_memory_bytes": 130.0, "peak_reserved_memory_bytes": 260.0}
    assert backend.counters() == {"peak_memory_bytes": 2.0, "peak_reserved_memory_bytes": 4.0}
    backend.close()
