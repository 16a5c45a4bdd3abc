"""The TensorRT-LLM backend against a stand-in for the library: what lem_kit makes of what the library says.

Nothing here shows how the real library behaves; `fake_tensorrt_llm/tensorrt_llm/__init__.py` says what it was made from.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from fake_tensorrt_llm import H100, HERE, importable

import lem_kit as lem
from lem_kit import models, notebooks
from lem_kit.backends import _checkpoint, load_backend, needs, tensorrt_llm
from lem_kit.backends.fake import FakeSource
from lem_kit.errors import LemError, Unavailable
from lem_kit.measurement import Completion, Request, TokenEvent
from lem_kit.traffic import send

PROMPT = tuple(range(300, 310))
V100 = ("Tesla V100-SXM2-16GB", (7, 0))
A100 = ("NVIDIA A100-SXM4-80GB", (8, 0))


@pytest.fixture
def library() -> Iterator[Any]:
    with importable() as library:
        yield library
    workers = [thread for thread in threading.enumerate() if thread.name == "stand-in-worker"]
    for thread in workers:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in workers), "an executor was left running"


@pytest.fixture
def behaviour(library: Any) -> Any:
    return library.behaviour.BEHAVIOUR


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, with tiny-llama in it."""
    made = models.resolve("tiny-llama")
    monkeypatch.setenv("LEM_KIT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "cache/models" / Path(made).name)
    return tmp_path / "cache"


def generated(backend: Any, *requests: Request, stop_after: int | None = None) -> list[TokenEvent]:
    async def events() -> list[TokenEvent]:
        found: list[TokenEvent] = []
        stream = backend.generate(requests)
        async for event in stream:
            found.append(event)
            if len(found) == stop_after:
                break
        await stream.aclose()
        return found

    return asyncio.run(events())


def fixed(new_tokens: int = 10, **options: Any) -> Request:
    return Request(prompt_token_ids=PROMPT, max_new_tokens=new_tokens, fixed_length=True, options=options)


def widths(events: list[TokenEvent]) -> list[int]:
    return [event.n_tokens for event in events]


# --- what is needed around it -----------------------------------------------------------------------------------------


def test_the_needs_are_read_without_the_library() -> None:
    found = needs("tensorrt_llm")
    assert found.image == "nvcr.io/nvidia/tensorrt-llm/release:1.2.1" and found.package == "tensorrt_llm"
    assert found.compute_capability == (8, 0) and "memlock=-1" in found.container
    with importable() as library:
        assert set(found.parallel) <= library.TorchLlmArgs.model_fields.keys()
    assert (ROOT / "lem_kit/backends/tensorrt_llm.py").read_text().count("(8, 0)") == 1


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([V100], r"8\.0 or newer, and Tesla V100-SXM2-16GB has 7\.0: choose one with CUDA_VISIBLE_DEVICES"),
        ([], r"8\.0 or newer, and torch sees no GPU here"),
    ],
    ids=["too old", "none"],
)
def test_the_gpu_is_checked_before_the_library_is_imported(
    gpus: list[Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_llm, "_gpus", lambda: gpus)
    monkeypatch.syspath_prepend(str(HERE))
    with pytest.raises(LemError, match=words):
        load_backend("tensorrt_llm", "tiny-llama")
    assert "tensorrt_llm" not in sys.modules


def test_only_the_gpus_that_the_model_is_spread_over_count() -> None:
    with importable(A100, V100):
        backend = load_backend("tensorrt_llm", "tiny-llama")
        assert backend.describe()["effective"]["gpus"] == ["NVIDIA A100-SXM4-80GB (sm_80)"]
        backend.close()
        with pytest.raises(LemError, match="Tesla V100"):
            load_backend("tensorrt_llm", "tiny-llama", tensor_parallel_size=2)


def test_what_torch_sees_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tensorrt_llm._gpus() == []
    for name, value in {"is_available": True, "device_count": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: H100[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: H100[1])
    assert tensorrt_llm._gpus() == [H100]


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_llm, "_gpus", lambda: [H100])
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises((Unavailable, ModuleNotFoundError)):
        load_backend("tensorrt_llm", "tiny-llama")
    monkeypatch.delitem(sys.modules, "tensorrt_llm")
    with pytest.raises(Unavailable, match=r"needs the package tensorrt_llm: pip install 'lem_kit\[tensorrt_llm\]'"):
        load_backend("tensorrt_llm", "tiny-llama")


def test_telemetry_is_off_unless_asked_for(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, kept in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("TRTLLM_NO_USAGE_STATS", raising=False)
        if given is not None:
            monkeypatch.setenv("TRTLLM_NO_USAGE_STATS", given)
        load_backend("tensorrt_llm", "tiny-llama").close()
        assert os.environ["TRTLLM_NO_USAGE_STATS"] == kept


# --- engine arguments -------------------------------------------------------------------------------------------------


def test_what_is_in_force_is_told(library: Any) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama", max_batch_size=4, kv_cache_config={"free_gpu_memory_fraction": 0.5})
    facts = json.loads(json.dumps(backend.describe(), allow_nan=False))
    backend.close()
    assert (facts["engine"], facts["version"]) == ("tensorrt_llm", "1.2.1")
    assert facts["requested"] == {"max_batch_size": 4, "kv_cache_config": {"free_gpu_memory_fraction": 0.5}}
    effective = facts["effective"]
    assert effective["kv_cache_config"]["enable_block_reuse"] is False
    assert effective["kv_cache_config"]["free_gpu_memory_fraction"] == 0.5
    assert (effective["max_batch_size"], effective["return_perf_metrics"]) == (4, True)
    assert (effective["flavour"], effective["gpus"]) == ("pytorch", ["NVIDIA H100 80GB HBM3 (sm_90)"])
    assert abs(effective["engine_clock_offset_s"]) < 1e-4
    assert facts["model"] == {
        "name": "tiny-llama", "revision": None, "architecture": "LlamaForCausalLM", "parameters": 7_016_704,
        "dtype": "float32", "quantization": None, "context": 4096, "vocabulary": 4096, "layers": 8, "hidden_size": 256,
        "intermediate_size": 544, "heads": 4, "kv_heads": 2, "head_size": 64,
    }  # fmt: skip


def test_the_model_has_the_same_facts_as_elsewhere(library: Any) -> None:
    other, backend = load_backend("transformers", "tiny-llama"), load_backend("tensorrt_llm", "tiny-llama")
    assert backend.describe()["model"] == other.describe()["model"]
    backend.close()
    other.close()


def test_the_users_word_overrules_the_defaults(library: Any) -> None:
    given = library.KvCacheConfig(tokens_per_block=64)
    backend = load_backend("tensorrt_llm", "tiny-llama", kv_cache_config=given, return_perf_metrics=False)
    effective = backend.describe()["effective"]
    assert effective["kv_cache_config"]["enable_block_reuse"] is True and effective["return_perf_metrics"] is False
    assert effective["kv_cache_config"]["tokens_per_block"] == 64
    first, *_ = generated(backend, fixed(2))
    assert (first.queued_ns, first.scheduled_ns) == (None, None)
    backend.close()
    backend = load_backend("tensorrt_llm", "tiny-llama", kv_cache_config={"enable_block_reuse": True})
    assert backend.describe()["effective"]["kv_cache_config"]["enable_block_reuse"] is True
    backend.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_seq_length": 64}, "the engine argument 'max_seq_length': did you mean 'max_seq_len'"),
        ({"flavor": "engine"}, "the engine argument 'flavor': did you mean 'flavour'"),
        ({"flavour": "engin"}, "no flavour 'engin': did you mean 'engine'"),
        ({"quant_config": {}}, "'quant_config' is an argument of compiled engines: add flavour='engine'"),
        ({"kv_cache_config": {"enable_block_reus": 1}}, r"kv_cache_config\.enable_block_reus: Extra inputs are not perm"),
        ({"max_batch_size": "many"}, "cannot load 'tiny-llama' as asked: max_batch_size: "),
    ],
)
def test_wrong_arguments(library: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(LemError, match=words):
        load_backend("tensorrt_llm", "tiny-llama", **arguments)


def test_a_worker_that_cannot_load_tells_the_cause(library: Any, behaviour: Any) -> None:
    behaviour.load_failure = ValueError("Unsupported attention.\nAnd where.")
    with pytest.raises(LemError, match=r"^TensorRT-LLM cannot load 'tiny-llama' as asked: Unsupported attention\.$"):
        load_backend("tensorrt_llm", "tiny-llama")
    behaviour.load_failure = RuntimeError("Executor creation failed due to insufficient GPU memory.")
    with pytest.raises(LemError, match=r"out of memory \(Executor creation.*free_gpu_memory_fraction"):
        load_backend("tensorrt_llm", "tiny-llama")
    behaviour.load_failure = ImportError("libcudart.so.13: cannot open shared object file")
    with pytest.raises(LemError, match=r"libcudart\.so\.13"):
        load_backend("tensorrt_llm", "tiny-llama")


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_each_response_is_an_event_stamped_when_it_arrives(library: Any) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama")
    events = generated(backend, fixed(6))
    backend.close()
    assert widths(events) == [1] * 6 and {event.timing_source for event in events} == {"client"}
    assert [event.prompt_tokens for event in events] == [10, None, None, None, None, None]
    assert [event.cached_tokens for event in events] == [0, None, None, None, None, None]
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]
    first = events[0]
    assert first.queued_ns and first.scheduled_ns and first.queued_ns <= first.scheduled_ns < first.t_ns
    assert {event.scheduled_ns for event in events[1:]} == {None}


def test_the_stand_in_has_the_trap_of_one_object_that_changes(library: Any, behaviour: Any) -> None:
    """Kept for later, every response looks like the last one: so this test would fail for a backend that kept them."""
    behaviour.tokens_per_step = (1, 3, 2)
    backend: Any = load_backend("tensorrt_llm", "tiny-llama")

    async def kept() -> list[Any]:
        sampling = library.SamplingParams(max_tokens=8, ignore_eos=True)
        return [output async for output in backend._llm.generate_async(list(PROMPT), sampling, streaming=True)]

    responses = asyncio.run(kept())
    assert len({id(response) for response in responses}) == 1
    assert [len(response.outputs[0].token_ids_diff) for response in responses] == [2, 2, 2, 2]
    assert widths(generated(backend, fixed(8))) == [1, 3, 2, 2]
    backend.close()


@pytest.mark.parametrize(
    ("interval", "per_step", "expected"),
    [(4, (1,), [1, 3, 4, 2]), (1, (1, 4, 4), [1, 4, 4, 1]), (3, (2,), [2, 4, 4])],
    ids=["stream_interval", "speculation", "both"],
)
def test_tokens_that_come_together(
    library: Any, behaviour: Any, interval: int, per_step: tuple[int, ...], expected: list[int]
) -> None:
    behaviour.tokens_per_step = per_step
    backend = load_backend("tensorrt_llm", "tiny-llama", stream_interval=interval)
    assert widths(generated(backend, fixed(10))) == expected
    backend.close()


def test_a_last_response_without_a_token_still_tells_the_end(library: Any, behaviour: Any) -> None:
    behaviour.last_response_is_empty = True
    backend = load_backend("tensorrt_llm", "tiny-llama")
    events = generated(backend, fixed(3))
    assert widths(events) == [1, 1, 1, 0] and events[-1].finish_reason == "length"
    backend.close()


def test_a_fixed_length_ignores_the_end_of_sequence(library: Any, behaviour: Any) -> None:
    behaviour.eos_after = 4
    backend = load_backend("tensorrt_llm", "tiny-llama")
    free = Request(prompt_token_ids=PROMPT, max_new_tokens=9)
    assert [(len(found), found[-1].finish_reason) for found in (generated(backend, free), generated(backend, fixed(9)))] == [
        (4, "stop"),
        (9, "length"),
    ]
    backend.close()


def test_a_stop_word_counts_for_it_was_computed(library: Any) -> None:
    """The library cuts it off its output unless told otherwise, and the last response would look empty."""
    backend = load_backend("tensorrt_llm", "tiny-llama")
    asked = Request(prompt_token_ids=PROMPT, max_new_tokens=9, options={"stop_token_ids": [1003]})
    assert widths(generated(backend, asked)) == [1, 1, 1, 1]
    cut = Request(
        prompt_token_ids=PROMPT, options={"stop_token_ids": [1003], "include_stop_str_in_output": False}, max_new_tokens=9
    )
    assert widths(generated(backend, cut)) == [1, 1, 1, 0]
    backend.close()


def test_reused_tokens_are_told_where_the_engine_counts_them(library: Any, behaviour: Any) -> None:
    behaviour.cached_tokens = 8
    backend = load_backend("tensorrt_llm", "tiny-llama", kv_cache_config={"enable_block_reuse": True})
    assert generated(backend, fixed(2))[0].cached_tokens == 8
    backend.close()


@pytest.mark.parametrize("offset_s", [0.5, -3600.0])
def test_instants_on_another_clock_are_not_kept(library: Any, behaviour: Any, offset_s: float) -> None:
    behaviour.clock_offset_s = offset_s
    backend = load_backend("tensorrt_llm", "tiny-llama")
    assert backend.describe()["effective"]["engine_clock_offset_s"] == pytest.approx(offset_s, abs=0.01)
    first = generated(backend, fixed(2))[0]
    assert (first.queued_ns, first.scheduled_ns) == (None, None) and first.prompt_tokens == 10
    backend.close()


def test_a_clock_that_cannot_be_read_is_unknown(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm.bindings", None)
    backend = load_backend("tensorrt_llm", "tiny-llama")
    assert backend.describe()["effective"]["engine_clock_offset_s"] is None
    assert generated(backend, fixed(2))[0].scheduled_ns is None
    backend.close()


def test_requests_of_one_call_run_together_and_keep_their_own_settings(library: Any) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama")
    events = generated(backend, fixed(3), Request(prompt="energy of a joule", max_new_tokens=5), fixed(7, temperature=0.7))
    by_request = [[event for event in events if event.index == index] for index in range(3)]
    assert [sum(widths(found)) for found in by_request] == [3, 5, 7]
    assert [found[0].prompt_tokens for found in by_request] == [10, 6, 10]
    backend.close()


# --- options ----------------------------------------------------------------------------------------------------------


def test_greedy_and_without_text_unless_told_otherwise(library: Any) -> None:
    backend: Any = load_backend("tensorrt_llm", "tiny-llama")
    sampling, keywords = backend._asked(fixed(3))
    assert sampling.greedy and sampling.top_k == 1 and not sampling.detokenize and keywords == {}
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.end_id) == (3, True, None)
    sampling, keywords = backend._asked(fixed(3, temperature=0.7, stop="end", cache_salt="a"))
    assert not sampling.greedy and sampling.top_k is None and sampling.detokenize and keywords == {"cache_salt": "a"}
    backend.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 0.5}, "the option 'temprature': did you mean 'temperature'"),
        ({"max_tokens": 3}, "lem_kit sets the option 'max_tokens' itself"),
        ({"_stream_interval": 3}, "does not know the option '_stream_interval'"),
        ({"_postproc_params": 3}, "does not know the option '_postproc_params'"),
        ({"n": 2, "temperature": 1.0}, "n must be 1"),
        ({"use_beam_search": True}, "use_beam_search must be False"),
        ({"top_p": 3.0}, "rejects the options of a request: require 0 <= top_p <= 1, got top_p=3.0"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(library: Any, options: dict[str, Any], words: str) -> None:
    backend: Any = load_backend("tensorrt_llm", "tiny-llama")
    with pytest.raises(LemError, match=words):
        generated(backend, fixed(3), fixed(3, **options))
    assert next(backend._llm._executor._ids) == 1, "no request was handed over"
    backend.close()


@pytest.mark.parametrize(
    ("arguments", "request_", "words"),
    [
        (
            {},
            Request(prompt_token_ids=(1, 4096), max_new_tokens=1),
            "the token id 4096, and the model's vocabulary ends below",
        ),
        ({"max_seq_len": 16}, fixed(7), "10 tokens with 7 new ones exceeds this engine's sequences of 16"),
        ({}, Request(prompt_token_ids=PROMPT, max_new_tokens=4087), "exceeds this engine's sequences of 4096"),
        ({"max_num_tokens": 8}, fixed(1), "A prompt of 10 tokens is longer than the 8 .* larger max_num_tokens"),
        ({"skip_tokenizer_init": True}, Request(prompt="a", max_new_tokens=1), "loaded with skip_tokenizer_init"),
        ({"skip_tokenizer_init": True}, Request(prompt_token_ids=(1,), max_new_tokens=1), "refuses a request: tokenizer is"),
    ],
)
def test_requests_that_the_engine_cannot_take(
    library: Any, arguments: dict[str, Any], request_: Request, words: str
) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama", **arguments)
    with pytest.raises(LemError, match=words):
        generated(backend, request_)
    backend.close()


def test_the_longest_that_fits_is_whole(library: Any) -> None:
    """The library itself would cut a longer one short without a word."""
    backend = load_backend("tensorrt_llm", "tiny-llama", max_seq_len=16, max_num_tokens=8, enable_chunked_prefill=True)
    assert sum(widths(generated(backend, fixed(6)))) == 6
    backend.close()


# --- ends -------------------------------------------------------------------------------------------------------------


def test_leaving_early_aborts_what_is_not_finished(library: Any, behaviour: Any) -> None:
    backend: Any = load_backend("tensorrt_llm", "tiny-llama")
    generated(backend, fixed(1), fixed(500), stop_after=6)
    assert behaviour.aborted == [2] and not backend._llm._executor._rows
    assert sum(widths(generated(backend, fixed(3)))) == 3 and behaviour.aborted == [2]
    backend.close()


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (
            "CUDA out of memory. Tried to allocate 2 GiB.\nmore",
            MemoryError,
            r"ran out of memory \(CUDA out of memory. Tried to",
        ),
        ("the kernel failed\nmore", RuntimeError, r"^TensorRT-LLM failed on a request: the kernel failed\.$"),
    ],
    ids=["memory", "other"],
)
def test_an_error_of_one_request_is_one_sentence(
    library: Any, behaviour: Any, failure: str, kind: type[Exception], words: str
) -> None:
    behaviour.fail_after, behaviour.failure = 3, failure
    backend = load_backend("tensorrt_llm", "tiny-llama")
    with pytest.raises(kind, match=words) as caught:
        generated(backend, fixed(6))
    assert "\n" not in str(caught.value)
    behaviour.fail_after = None
    assert sum(widths(generated(backend, fixed(6)))) == 6, "the engine goes on"
    backend.close()


def test_a_request_that_the_engine_gives_up_is_an_error(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = load_backend("tensorrt_llm", "tiny-llama")
    respond = library.executor.Executor._response

    def changed(self: Any, row: Any, tokens: Any, final: bool, reason: str | None, stop_words: bool) -> Any:
        return respond(self, row, tokens, final, reason and "timeout", stop_words)

    monkeypatch.setattr(library.executor.Executor, "_response", changed)
    with pytest.raises(RuntimeError, match=r"the engine gave it up \(timeout\)"):
        generated(backend, fixed(3))
    backend.close()


@pytest.mark.parametrize("death", ["told", "silent"])
def test_an_executor_that_dies_is_told_to_all_who_wait(
    library: Any, behaviour: Any, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    """The library wakes nobody when its worker ends, so a backend that only waits for responses would wait for ever."""
    monkeypatch.setattr(tensorrt_llm, "WATCH_S", 0.01)
    behaviour.die_after, behaviour.death = 4, death
    backend: Any = load_backend("tensorrt_llm", "tiny-llama", enable_iter_perf_stats=True)
    cause = r"TensorRT-LLM's executor has died \(MPI worker 0 ended: CUDA error: an illegal memory access\): load the model"
    with pytest.raises(RuntimeError, match=cause):
        generated(backend, fixed(6), fixed(6))
    with pytest.raises(RuntimeError, match="TensorRT-LLM's executor has died"):
        generated(backend, fixed(6))
    assert backend.counters() == {}
    backend.close()
    backend.close()


def test_closed_is_closed(library: Any) -> None:
    backend: Any = load_backend("tensorrt_llm", "tiny-llama")
    executor = backend._llm._executor
    backend.close()
    backend.close()
    assert executor.is_shutdown() and backend.counters() == {}
    with pytest.raises(LemError, match="This backend is closed"):
        generated(backend, fixed(1))


def test_closing_while_a_call_waits(library: Any, behaviour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_llm, "WATCH_S", 0.01)
    backend = load_backend("tensorrt_llm", "tiny-llama")
    threading.Timer(0.05, backend.close).start()
    with pytest.raises(LemError, match="closed while it was generating"):
        generated(backend, fixed(2000))


# --- counters ---------------------------------------------------------------------------------------------------------


def test_counters_come_from_the_engines_own_log(library: Any) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama", enable_iter_perf_stats=True)
    assert backend.counters() == {}
    generated(backend, fixed(4), fixed(8))
    # Ten prompt tokens and at most eight new ones are one block of 32 of the 64 for each request.
    assert backend.counters() == {
        "batch_requests_mean": pytest.approx(12 / 8), "batch_requests_max": 2.0, "kv_cache_used_max": 2 / 64
    }  # fmt: skip
    assert backend.counters() == {}
    backend.close()


def test_no_log_no_counters(library: Any) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama")
    generated(backend, fixed(4))
    assert backend.counters() == {}
    backend.close()


# --- compiled engines -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_an_engine_is_compiled_once(library: Any, behaviour: Any, cache: Path) -> None:
    quantised = {"flavour": "engine", "quant_config": {"quant_algo": "FP8"}, "max_batch_size": 4}
    for _ in range(2):
        backend = load_backend("tensorrt_llm", "tiny-llama", **quantised)
        facts = json.loads(json.dumps(backend.describe(), allow_nan=False))
        assert widths(generated(backend, fixed(3))) == [1, 1, 1]
        backend.close()
    assert behaviour.builds == 1
    key = facts["effective"]["build_cache_key"]
    assert [path.name for path in (cache / "engines").iterdir()] == [key] and len(key) == 16
    assert facts["effective"]["quant_config"]["quant_algo"] == "FP8"
    assert facts["effective"]["build_config"]["max_batch_size"] == 4
    assert facts["model"]["parameters"] == 7_016_704 and str(cache) not in json.dumps(facts)
    load_backend("tensorrt_llm", "tiny-llama", **{**quantised, "max_batch_size": 8}).close()
    assert behaviour.builds == 2


@pytest.mark.usefixtures("cache")
def test_an_engine_may_be_compiled_anew_or_into_a_cache_of_the_users(library: Any, behaviour: Any, tmp_path: Path) -> None:
    for _ in range(2):
        backend = load_backend("tensorrt_llm", "tiny-llama", flavour="engine", enable_build_cache=False)
        assert backend.describe()["effective"]["build_cache_key"] is None
        backend.close()
    assert behaviour.builds == 2
    own = library.llmapi.BuildCacheConfig(cache_root=tmp_path / "mine")
    load_backend("tensorrt_llm", "tiny-llama", flavour="engine", enable_build_cache=own).close()
    assert behaviour.builds == 3 and len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.usefixtures("cache")
def test_a_compiled_engine_tells_nothing_of_reuse_and_bounds_the_prompt(library: Any, behaviour: Any) -> None:
    behaviour.cached_tokens = 8
    backend = load_backend("tensorrt_llm", "tiny-llama", flavour="engine", max_input_len=12, max_seq_len=20)
    assert generated(backend, fixed(2))[0].cached_tokens is None
    with pytest.raises(LemError, match=r"13 tokens is longer than the 12 .*max_input_len"):
        generated(backend, Request(prompt_token_ids=range(300, 313), max_new_tokens=1))
    with pytest.raises(LemError, match="sequences of 20"):
        generated(backend, fixed(11))
    backend.close()


def test_a_folder_with_an_engine_is_loaded_as_it_is(library: Any, behaviour: Any, tmp_path: Path) -> None:
    checkpoint = Path(models.resolve("tiny-llama"))
    pretrained = {
        "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 4096, "num_hidden_layers": 8,
        "hidden_size": 256, "max_position_embeddings": 4096, "quantization": {"quant_algo": "W4A16_AWQ"},
    }  # fmt: skip
    build = {"max_seq_len": 16, "max_input_len": 12, "max_batch_size": 4, "max_num_tokens": 64}
    told = {"pretrained_config": pretrained, "build_config": build, "version": "1.2.1"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(LemError, match="holds a compiled engine: add flavour='engine'"):
        load_backend("tensorrt_llm", str(tmp_path))
    backend = load_backend("tensorrt_llm", str(tmp_path), flavour="engine", tokenizer=str(checkpoint))
    facts = backend.describe()
    assert behaviour.builds == 0 and facts["effective"]["build_cache_key"] is None
    assert facts["effective"]["build_config"]["max_batch_size"] == 4
    assert (facts["model"]["dtype"], facts["model"]["parameters"], facts["model"]["layers"]) == ("float16", None, 8)
    assert (
        facts["model"]["architecture"] == "LlamaForCausalLM" and facts["model"]["quantization"] == pretrained["quantization"]
    )
    assert sum(widths(generated(backend, fixed(6)))) == 6
    with pytest.raises(LemError, match="sequences of 16"):
        generated(backend, fixed(7))
    backend.close()


def test_a_release_without_compiled_engines() -> None:
    with importable(compiled=False), pytest.raises(LemError, match=r"1\.2\.1 compiles no engines: releases 1\.0 to 1\.2 do"):
        load_backend("tensorrt_llm", "tiny-llama", flavour="engine")


@pytest.mark.parametrize("part", ["version", "options", "weights", "gpu"])
def test_each_component_changes_the_key(part: str) -> None:
    facts: dict[str, Any] = {
        "weights": "aa", "keywords": {"max_batch_size": 4}, "version": "1.2.1", "gpus": ["NVIDIA H100 80GB HBM3 (sm_90)"]
    }  # fmt: skip
    changed = {
        "version": {"version": "1.2.0"},
        "options": {"keywords": {"max_batch_size": 8}},
        "weights": {"weights": "ab"},
        "gpu": {"gpus": ["NVIDIA A100-SXM4-80GB (sm_80)"]},
    }[part]
    assert tensorrt_llm.build_key(**facts) == tensorrt_llm.build_key(**facts)
    assert tensorrt_llm.build_key(**facts) != tensorrt_llm.build_key(**{**facts, **changed})
    running = {
        "keywords": {"max_batch_size": 4, "kv_cache_config": {"enable_block_reuse": False}, "return_perf_metrics": True}
    }
    assert tensorrt_llm.build_key(**facts) == tensorrt_llm.build_key(**{**facts, **running}), "it is the same engine"


def test_options_as_objects_are_told_by_what_they_hold(library: Any) -> None:
    def key(algorithm: str) -> str:
        keywords = {"quant_config": library.llmapi.QuantConfig(quant_algo=algorithm)}
        return tensorrt_llm.build_key("aa", keywords, "1.2.1", [])

    assert key("FP8") == key("FP8") != key("INT8")


def test_the_digest_of_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"aaaa")
    one = _checkpoint.digest(tmp_path)
    os.utime(weights, ns=(1, 1))
    assert _checkpoint.digest(tmp_path) == one, "without an index the content is what counts"
    weights.write_bytes(b"aaab")
    two = _checkpoint.digest(tmp_path)
    (tmp_path / "config.json").write_text('{"rope_theta": 2}')
    three = _checkpoint.digest(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    four = _checkpoint.digest(tmp_path)
    os.utime(weights, ns=(2, 2))
    five = _checkpoint.digest(tmp_path)
    (tmp_path / "notes.txt").write_text("not of the model")
    assert _checkpoint.digest(tmp_path) == five and len({one, two, three, four, five}) == 5


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = Path(models.resolve("tiny-llama"))
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(snapshot / "config.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(snapshot))
    assert _checkpoint.facts("some/model", "some/model")["parameters"] == 7_016_704
    assert _checkpoint.downloaded("some/model", "v1") == snapshot and asked[0][1]["revision"] == "v1"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    unknown = _checkpoint.facts("some/model", "some/model")
    assert unknown["name"] == "some/model" and {value for key, value in unknown.items() if key != "name"} == {None}


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_a_run_is_recorded(library: Any, tmp_path: Path) -> None:
    import time

    backend = load_backend("tensorrt_llm", "tiny-llama")
    workload = lem.prompts.synthetic(6, 16, 8, seed=1)
    with lem.Session(tmp_path, sources=[FakeSource(200, 50, time.monotonic_ns)]) as session:
        m = session.run(backend, workload, lem.traffic.poisson(200, seed=0), repeats=2, warmup=1, run_id="run")
    backend.close()
    again = lem.load(tmp_path / "run")
    assert m.status == again.status == "ok" and len(again.completions) == 12
    for c in again.completions:
        assert (c.output_tokens, c.prompt_tokens, c.cached_tokens, c.finish_reason, c.error) == (8, 16, 0, "length", None)
        assert c.timing_source == "client" and c.queued_ns is not None and c.scheduled_ns is not None
        assert c.dispatch_ns - 1000 <= c.queued_ns <= c.scheduled_ns < c.events[0][0] <= c.done_ns
    assert again.backend is not None and again.backend["effective"]["kv_cache_config"]["enable_block_reuse"] is False


def test_failed_requests_are_in_the_record(library: Any, behaviour: Any) -> None:
    backend = load_backend("tensorrt_llm", "tiny-llama")
    behaviour.fail_after = 5

    async def run() -> list[Completion]:
        return await send(backend, [fixed(4), fixed(6), fixed(3)], lem.traffic.concurrency(3))

    found = asyncio.run(run())
    assert [(c.output_tokens, c.error) for c in found] == [
        (4, None),
        (4, "RuntimeError: TensorRT-LLM failed on a request: the kernel failed."),
        (3, None),
    ]
    backend.close()


def test_an_engine_that_dies_leaves_a_record_and_a_session_that_goes_on(
    library: Any, behaviour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_llm, "WATCH_S", 0.01)
    behaviour.die_after, behaviour.death = 12, "silent"
    dying = load_backend("tensorrt_llm", "tiny-llama")
    with lem.Session(tmp_path, sources=[]) as session:
        m = session.run(dying, [fixed(8) for _ in range(3)], lem.traffic.batches(1), warmup=0, run_id="died")
        dying.close()
        assert [c.error is None for c in m.completions] == [True, False, False]
        assert "requests_failed" in m.reasons and m.completions[1].output_tokens == 3
        assert all("executor has died" in (c.error or "") for c in m.completions[1:])
        behaviour.die_after = None
        sound = load_backend("tensorrt_llm", "tiny-llama")
        after = session.run(sound, [fixed(8)], warmup=0, run_id="after")
        sound.close()
    assert after.status == "ok" and lem.load(tmp_path / "died").completions == m.completions


def test_the_notebook_runs_on_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is committed without outputs, for these would be of the stand-in. One cell more puts the stand-in in place."""
    monkeypatch.setenv("LEM_KIT_SOURCES", f"replay={ROOT / 'data/example/power.csv'}")
    notebook = nbformat.read(ROOT / "notebooks/experiment_tensorrt_llm.ipynb", as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    source = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport fake_tensorrt_llm\n"
    notebook.cells.insert(
        0, nbformat.v4.new_code_cell(source + "place = fake_tensorrt_llm.importable()\nplace.__enter__();")
    )
    nbformat.write(notebook, tmp_path / "copy.ipynb")
    values = {
        "model": "tiny-llama",
        "requests": 4,
        "concurrency": 2,
        "repeats": 1,
        "folder": str(tmp_path / "runs"),
        "run_id": "one",
    }
    notebooks.execute(tmp_path / "copy.ipynb", tmp_path / "done.ipynb", values)
    m = lem.load(tmp_path / "runs/one")
    assert m.status == "ok" and [c.output_tokens for c in m.completions] == [64] * 4
    assert m.backend is not None and m.backend["engine"] == "tensorrt_llm" and m.config["concurrency"] == 2
