"""Every file of lem_kit/backends keeps what `Backend` promises. The files are discovered.

A new backend needs an entry in `LOADED`, with the smallest model that it can run here, to pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import fake_tensorrt_llm
import pytest
from conftest import ROOT

from lem_kit.backends import COUNTERS, Backend, backend_names, load_backend, needs
from lem_kit.energy import source_names
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent

LOADED: dict[str, Callable[[], Backend]] = {
    "fake": lambda: load_backend("fake", "fake", ttft_s=0.002, tokens_per_s=2000),
    "tensorrt_llm": lambda: load_backend("tensorrt_llm", "tiny-llama"),
    "transformers": lambda: load_backend("transformers", "tiny-llama"),
    # What follows the file's name is a further way to load it.
    "transformers, continuous batching": lambda: load_backend(
        "transformers", "tiny-llama", continuous_batching={"num_blocks": 32, "max_batch_tokens": 128}
    ),
    "vllm": lambda: load_backend("vllm", "tiny-llama", dtype="bfloat16", enforce_eager=True, kv_cache_memory_bytes=2**28),
}
REQUESTS = [Request(prompt_token_ids=tuple(range(300, 300 + n)), max_new_tokens=6, fixed_length=True) for n in (3, 9, 5)]


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    """TensorRT-LLM needs a GPU: where it is not installed, a stand-in for it and for what torch sees of GPUs is in place."""
    with contextlib.ExitStack() as place:
        if importlib.util.find_spec("tensorrt_llm") is None:
            place.enter_context(fake_tensorrt_llm.importable())
        yield


def need(name: str) -> None:
    """Skip where the engine is not installed: each has an environment, and a target of the Makefile, of its own."""
    package = needs(name).package
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed in this environment: make test-{name}")


@pytest.fixture(params=sorted({*backend_names(), *LOADED}), scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Loaded once for all tests of this file, which come to it one after another."""
    assert request.param in LOADED, f"backend '{request.param}' has no entry in LOADED"
    need(request.param.split(",")[0])
    if "continuous" in request.param and not hasattr(importlib.import_module("transformers"), "ContinuousBatchingConfig"):
        pytest.skip("this release of transformers has no continuous batching that stamps tokens")
    loaded = LOADED[request.param]()
    yield loaded
    loaded.close()


async def collected(backend: Backend, requests: list[Request], stop_after: int | None = None) -> list[TokenEvent]:
    events = []
    stream = backend.generate(requests)
    async for event in stream:
        events.append(event)
        if len(events) == stop_after:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return events


def test_is_a_backend_of_its_files_name(backend: Backend, request: pytest.FixtureRequest) -> None:
    assert isinstance(backend, Backend)
    assert backend.name == request.node.callspec.params["backend"].split(",")[0] and isinstance(backend.concurrent, bool)
    assert (package := needs(backend.name).package) is None or importlib.util.find_spec(package) is not None


def test_events_are_complete_ordered_and_silent(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    events = asyncio.run(collected(backend, REQUESTS))
    for index, request in enumerate(REQUESTS):
        own = [e for e in events if e.index == index]
        assert sum(e.n_tokens for e in own) == request.max_new_tokens
        assert [e.t_ns for e in own] == sorted(e.t_ns for e in own)
        assert own[0].prompt_tokens == len(request.prompt_token_ids or ())
        assert own[-1].finish_reason == "length" and all(e.finish_reason is None for e in own[:-1])
        assert {e.timing_source for e in own} <= {"engine", "client"}
    assert {e.index for e in events} == {0, 1, 2}
    assert capfd.readouterr() == ("", "")


def test_text_prompts_are_counted_by_the_engine(backend: Backend) -> None:
    events = asyncio.run(collected(backend, [Request(prompt="energy of a joule", max_new_tokens=2, fixed_length=True)]))
    assert (events[0].prompt_tokens or 0) >= 4 and sum(e.n_tokens for e in events) == 2


def test_the_ids_told_before_a_run_are_those_that_run(backend: Backend) -> None:
    token_ids = getattr(backend, "token_ids", None)
    if token_ids is None:
        pytest.skip("this backend does not tell them: the method is optional")
    request = Request(prompt="energy of a joule", max_new_tokens=2, fixed_length=True)
    ids = list(token_ids(request))
    assert all(type(i) is int for i in ids) and len(set(ids)) > 2
    assert asyncio.run(collected(backend, [request]))[0].prompt_tokens == len(ids)
    assert list(token_ids(Request(prompt_token_ids=(300, 301)))) == [300, 301]
    with pytest.raises(LemError, match="1000000"):
        token_ids(Request(prompt_token_ids=(300,), max_new_tokens=1_000_000))


def test_leaving_early_stops_the_work_and_the_next_call_is_whole(backend: Backend) -> None:
    long = [Request(prompt_token_ids=(300, 301), max_new_tokens=120, fixed_length=True)]
    assert len(asyncio.run(collected(backend, long, stop_after=2))) == 2
    assert sum(e.n_tokens for e in asyncio.run(collected(backend, REQUESTS))) == 18


def test_describe_is_strict_json_with_the_agreed_keys(backend: Backend) -> None:
    facts = json.loads(json.dumps(backend.describe(), allow_nan=False))
    assert {"engine", "version", "model", "requested", "effective"} <= set(facts)
    assert facts["engine"] == backend.name and facts["model"]["name"]
    assert not re.search(r'"/(root|home|Users)/', json.dumps(facts))


@pytest.mark.parametrize("name", backend_names())
def test_an_unknown_argument_names_the_nearest(name: str) -> None:
    need(name)
    wrong = {"fake": {"tokens_pers": 3}, "transformers": {"atn_implementation": "sdpa"}}.get(name, {"max_modl_len": 1})
    model = {"fake": "fake"}.get(name, "tiny-llama")
    with pytest.raises(LemError, match=f"{next(iter(wrong))}.*(did you mean|there are)"):
        load_backend(name, model, **wrong)


def test_an_unknown_option_is_an_error_before_anything_runs(backend: Backend) -> None:
    with pytest.raises(LemError, match="temprature"):
        asyncio.run(collected(backend, [Request(prompt="a", options={"temprature": 1.0})]))


def test_counters_are_figures_of_agreed_names(backend: Backend) -> None:
    """Where there are any: the method is optional."""
    counters = getattr(backend, "counters", dict)
    counters()
    asyncio.run(collected(backend, REQUESTS))
    found = counters()
    assert found.keys() <= COUNTERS.keys() and all(type(value) is float for value in found.values())


def test_close_may_be_called_twice(backend: Backend) -> None:
    backend.close()
    backend.close()


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(LemError, match="did you mean 'transformers'"):
        load_backend("tranformers", "tiny-llama")


def test_each_plug_in_is_named_in_its_own_file_alone() -> None:
    """The yardstick: removing a backend or a source is removing one file. `models` builds checkpoints for transformers."""
    allowed = {("transformers", "models.py")}
    for folder, names in (("backends", backend_names()), ("energy", source_names())):
        for name in names:
            if name in ("fake", "replay"):  # ordinary words, and parts of every installation
                continue
            for path in (ROOT / "lem_kit").rglob("*.py"):
                if path != ROOT / "lem_kit" / folder / f"{name}.py" and (name, path.name) not in allowed:
                    assert not re.search(rf"\b{name}\b", path.read_text()), f"{name} is named in {path.relative_to(ROOT)}"


def missing(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    def no_such(module: str, *_: Any) -> None:
        raise ModuleNotFoundError(f"No module named '{library}'", name=library)

    monkeypatch.setattr(importlib, "import_module", no_such)
    return lambda: load_backend(name, "x")


def test_a_missing_library_says_how_to_get_it_and_a_broken_one_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LemError, match=r"pip install 'lem_kit\[transformers\]'"):
        missing("transformers", "transformers", monkeypatch)()
    with pytest.raises(ModuleNotFoundError):
        missing("transformers", "libcudart", monkeypatch)()
