"""TensorRT-LLM: requests join its running batch through `generate_async`, and each response is one event.

The one idea: the engine tells of a request by one object that every response changes. It is read the moment a response is
there, and that is when its tokens are stamped (`timing_source` "client"): the engine stamps the first and the last alone.
Its own instants of arrival and first scheduling are kept where its clock is found to be this process's when loading.

lem_kit's own defaults, each to be overruled by the engine argument or option of that name: no reuse of cached blocks, for a
prompt that is measured must be computed; `return_perf_metrics`, for the engine's instants; for compiled engines a cache that
knows weights and GPU (`enable_build_cache`); greedy, not turned into text, and with stop words counted, for they were
computed. Telemetry is off unless TRTLLM_NO_USAGE_STATS=0.

One keyword of `load` is lem_kit's, the rest are the engine's:
    flavour   "pytorch" (default), or "engine": compiled ahead, from a checkpoint or as a folder that holds an engine

Not covered: several sequences per prompt, beam search, disaggregated serving. A worker that raises without ending leaves the
engine waiting for ever, which cannot be seen from here: interrupt the cell.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import time
import warnings
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from .. import models
from ..errors import LemError, nearest
from ..measurement import Request, TokenEvent, jsonable
from . import RESIDENT, _readback

NEEDS = {
    "package": "tensorrt_llm",
    "image": "nvcr.io/nvidia/tensorrt-llm/release:1.2.1",
    "container": ("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
    "compute_capability": (8, 0),
    "parallel": ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"),
}

WATCH_S = 2.0  # how often a call that waits looks whether the executor is still there
STATS_S = 0.2  # how long the engine's log is waited for; what comes later is told the next time
ONE_CLOCK_S = 0.001  # two readings of one clock differ by less
_ARGUMENTS = {"pytorch": "TorchLlmArgs", "engine": "TrtLlmArgs"}
_MODULES = {"pytorch": "tensorrt_llm", "engine": "tensorrt_llm._tensorrt_engine"}
_OWN_OPTIONS = {"ignore_eos", "inputs", "max_tokens", "sampling_params", "streaming"}
_ONE_SEQUENCE = {"n": 1, "best_of": 1, "use_beam_search": False}
_SAMPLING = {"temperature", "top_k", "top_p", "top_p_min", "top_p_decay", "min_p"}
_NOT_TOLD = {"model", "tokenizer", "mpi_session", "workspace", "enable_build_cache"}  # objects, and folders of this machine
_NOT_BUILT_IN = {"enable_build_cache", "kv_cache_config", "return_perf_metrics"}  # no part of what is compiled
_LACK = re.compile(r"out of memory|insufficient gpu memory|not enough memory", re.IGNORECASE)
_REMEDY = "lower max_batch_size, max_num_tokens or kv_cache_config's free_gpu_memory_fraction, or use a smaller dtype."


def load(model: str, **engine_args: Any) -> TensorRTLLM:
    """Start the engine: LLM(model, **engine_args). It takes most of the GPU's memory until `close`.

    LemError for a GPU that it cannot use, for an argument that it does not know or rejects, and with the cause if it cannot
    load the model.
    """
    requested = _readback.requested(engine_args)
    flavour = engine_args.pop("flavour", "pytorch")
    if flavour not in _MODULES:
        raise LemError(f"TensorRT-LLM has no flavour {flavour!r}: {nearest(str(flavour), _MODULES)}")
    parallel: Any = NEEDS["parallel"]
    gpus = _usable_gpus(math.prod(engine_args.get(name, 1) for name in parallel))
    os.environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")  # read by the library
    library = importlib.import_module("tensorrt_llm")
    llmapi = importlib.import_module("tensorrt_llm.llmapi")
    from . import _checkpoint  # here, for it needs what only the engine's installation brings

    if importlib.util.find_spec(_MODULES[flavour]) is None:
        raise LemError(
            f"TensorRT-LLM {library.__version__} compiles no engines: releases 1.0 to 1.2 do. Install one of them, or leave "
            "out flavour='engine'."
        )
    _check_names(engine_args, flavour, llmapi)
    path, revision, key = models.resolve(model), engine_args.get("revision"), None
    keywords = _with_defaults(engine_args, getattr(llmapi, _ARGUMENTS[flavour]).model_fields)
    compiled = "build_config" in _checkpoint.config(path, revision)
    if compiled and flavour != "engine":
        raise LemError(f"The folder '{model}' holds a compiled engine: add flavour='engine', or give a checkpoint.")
    if flavour == "engine" and not compiled and engine_args.get("enable_build_cache", True) is True:
        path = str(_checkpoint.downloaded(path, revision))
        key = build_key(_checkpoint.digest(Path(path)), keywords, library.__version__, gpus)
        keywords["enable_build_cache"] = llmapi.BuildCacheConfig(cache_root=models.cache_folder() / "engines" / key)
    try:
        llm = importlib.import_module(_MODULES[flavour]).LLM(model=path, **keywords)
    except ImportError:  # an installation that is broken shows itself
        raise
    except Exception as error:
        raise LemError(f"TensorRT-LLM cannot load '{model}' as asked: {_cause(error)}.") from error
    facts = {
        "engine": "tensorrt_llm",
        "version": library.__version__,
        "model": _checkpoint.facts(model, path, revision, engine_args.get("dtype", "auto")),
        "requested": requested,
        "effective": {
            "flavour": flavour,
            "gpus": gpus,
            "timing": "client: stamped when a response arrives",
            "engine_clock_offset_s": _clock_offset_s(),
            "build_cache_key": key,
            **_effective(llm.args),
        },
    }
    return TensorRTLLM(llm, llmapi.SamplingParams, facts)


class TensorRTLLM:
    """A running engine. Its executor is in processes of its own; what is awaited here are their responses."""

    name = "tensorrt_llm"
    concurrent = True

    def __init__(self, llm: Any, sampling: Any, facts: dict[str, Any]) -> None:
        args, build = llm.args, getattr(llm.args, "build_config", None)
        self._llm = llm
        RESIDENT.add(self)
        self._sampling = sampling
        self._facts = facts
        self._compiled = facts["effective"]["flavour"] == "engine"
        offset_s = facts["effective"]["engine_clock_offset_s"]
        self._one_clock = offset_s is not None and abs(offset_s) < ONE_CLOCK_S
        self._context = args.max_seq_len or getattr(build, "max_seq_len", None) or facts["model"]["context"] or math.inf
        limits = [None if args.enable_chunked_prefill else args.max_num_tokens]
        limits.append(getattr(build, "max_input_len", None) if self._compiled else None)
        self._longest_prompt = min(limit or math.inf for limit in limits)
        self._call_options = _public(inspect.signature(llm.generate_async).parameters)
        self._sampling_options = _public(field.name for field in dataclasses.fields(sampling) if field.init)
        self._used = False

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        """Each request joins the running batch by itself; its events come as the engine's responses do."""
        self._check_open()
        asked = [self._asked(request) for request in requests]
        prompts = [await self._prompt(request, sampling) for request, (sampling, _) in zip(requests, asked)]
        arrived: asyncio.Queue[TokenEvent | Exception | None] = asyncio.Queue()
        outputs: list[Any] = []
        tasks = [asyncio.create_task(self._watch(arrived))]
        try:
            for index, (ids, (sampling, keywords)) in enumerate(zip(prompts, asked)):
                outputs.append(self._submitted(ids, sampling, keywords))
                tasks.append(asyncio.create_task(self._follow(index, len(ids), outputs[-1], arrived)))
            at_work = len(outputs)
            while at_work:
                what = await arrived.get()
                if isinstance(what, Exception):
                    raise what
                if what is None:
                    at_work -= 1
                else:
                    yield what
        finally:
            for output in outputs:
                if not output.finished:
                    with contextlib.suppress(Exception):  # an executor that is gone has nothing to abort
                        output.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, index: int, prompt_tokens: int, output: Any, arrived: asyncio.Queue[Any]) -> None:
        """Hand on the responses to one request, None after the last one, or what went wrong."""
        facts: dict[str, Any] = {"prompt_tokens": prompt_tokens}
        instants: dict[str, int] = {}
        try:
            async for _ in output:
                choice = output.outputs[0]
                if facts and not self._compiled:  # compiled engines leave it at 0 whatever they reuse
                    facts["cached_tokens"] = getattr(output, "cached_tokens", None)
                if not instants:
                    facts.update(instants := self._instants(getattr(choice, "request_perf_metrics", None)))
                reason = choice.finish_reason if output.finished else None
                if reason in ("cancelled", "timeout"):
                    raise RuntimeError(f"the engine gave it up ({reason})")
                arrived.put_nowait(TokenEvent(index, len(choice.token_ids_diff), finish_reason=reason, **facts))
                facts = {}
        except Exception as error:
            arrived.put_nowait(self._explained(error))
        else:
            arrived.put_nowait(None)

    def _instants(self, metrics: Any) -> dict[str, int]:
        """When the engine took the request and first scheduled it, ns on this process's clock; {} where it does not tell."""
        timing = getattr(metrics, "timing_metrics", None)
        if timing is None or not self._one_clock or not timing.first_scheduled_time:
            return {}
        stamps = {"queued_ns": timing.arrival_time, "scheduled_ns": timing.first_scheduled_time}
        return {name: _ns(stamp) for name, stamp in stamps.items() if stamp}

    async def _watch(self, arrived: asyncio.Queue[Any]) -> None:
        """The engine tells a call that its executor is gone with the next response, which then never comes."""
        while (reason := self._gone()) is None:
            await asyncio.sleep(WATCH_S)
        arrived.put_nowait(self._explained(RuntimeError(reason)))

    def _gone(self) -> str | None:
        """Why the executor works no more; None while it does. Its queue of errors is private, so it may be absent."""
        executor = getattr(self._llm, "_executor", None)
        for error in list(getattr(getattr(executor, "_error_queue", None), "queue", ())):
            return _sentence(error)
        return "it has shut down" if executor is None or executor.is_shutdown() else None

    def _asked(self, request: Request) -> tuple[Any, dict[str, Any]]:
        """Sampling parameters, and further keywords of `generate_async`. LemError for an option that neither knows, or that
        the engine rejects."""
        options = dict(request.options)
        known = self._sampling_options | self._call_options
        for name, value in options.items():
            if name in _OWN_OPTIONS:
                raise LemError(f"lem_kit sets the option '{name}' itself: use the fields of Request instead.")
            if name not in known:
                raise LemError(f"TensorRT-LLM does not know the option '{name}': {nearest(name, known)}")
            if name in _ONE_SEQUENCE and value not in (None, _ONE_SEQUENCE[name]):
                raise LemError(f"{name} must be {_ONE_SEQUENCE[name]}: tokens are counted for one sequence per request.")
        keywords = {name: options.pop(name) for name in self._call_options & options.keys()}
        defaults: dict[str, Any] = {"detokenize": bool(options.get("stop")), "include_stop_str_in_output": True}
        if not _SAMPLING & options.keys():
            defaults["top_k"] = 1
        try:
            sampling = self._sampling(
                max_tokens=request.max_new_tokens, ignore_eos=request.fixed_length, **{**defaults, **options}
            )
        except (TypeError, ValueError) as error:
            raise LemError(f"TensorRT-LLM rejects the options of a request: {_sentence(error)}") from error
        return sampling, keywords

    async def _prompt(self, request: Request, sampling: Any) -> list[int]:
        """Token ids of the prompt. LemError for what the model or the engine cannot take; it would cut the output short."""
        if request.prompt is None:
            ids = list(request.prompt_token_ids or ())
        elif self._llm.tokenizer is None:
            raise LemError("This engine was loaded with skip_tokenizer_init: give prompt_token_ids, or load it without.")
        else:  # in a thread, for the tokeniser must not hold up other requests
            ids, _ = await asyncio.to_thread(self._llm.input_processor, {"prompt": request.prompt}, sampling)
        vocabulary = self._facts["model"]["vocabulary"] or math.inf
        if max(ids) >= vocabulary:
            raise LemError(f"A prompt holds the token id {max(ids)}, and the model's vocabulary ends below {vocabulary}.")
        if len(ids) > self._longest_prompt:
            raise LemError(
                f"A prompt of {len(ids)} tokens is longer than the {self._longest_prompt} that this engine takes at once: "
                "load with a larger max_num_tokens (compiled: and max_input_len), or with enable_chunked_prefill=True."
            )
        if len(ids) + request.max_new_tokens > self._context:
            raise LemError(
                f"A prompt of {len(ids)} tokens with {request.max_new_tokens} new ones exceeds this engine's sequences of "
                f"{self._context}: shorten either, or load with a larger max_seq_len if the model allows it."
            )
        return ids

    def _submitted(self, ids: list[int], sampling: Any, keywords: dict[str, Any]) -> Any:
        self._used = True
        try:
            return self._llm.generate_async(ids, sampling, streaming=True, **keywords)
        except (TypeError, ValueError) as error:
            raise LemError(f"TensorRT-LLM refuses a request: {_sentence(error)}") from error
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        """An error of the engine's in one sentence that says what to do."""
        if self._llm is None:
            return LemError("This backend was closed while it was generating.")
        if self._gone() is not None:
            return RuntimeError(f"TensorRT-LLM's executor has died ({_sentence(error)}): load the model again.")
        if _LACK.search(str(error)):
            return MemoryError(f"TensorRT-LLM ran out of memory ({_sentence(error)}): send fewer requests, or {_REMEDY}")
        return RuntimeError(f"TensorRT-LLM failed on a request: {_sentence(error)}.")

    def _check_open(self) -> None:
        if self._llm is None:
            raise LemError("This backend is closed: load it again with lem_kit.load_backend.")

    def describe(self) -> dict[str, Any]:
        return self._facts

    def counters(self) -> dict[str, float]:
        """The running batch and the cache, as the engine logged its steps; with enable_iter_perf_stats=True alone."""
        logs = getattr(getattr(self._llm, "args", None), "enable_iter_perf_stats", False)
        if not (logs and self._used) or self._gone():
            return {}
        try:
            steps = self._llm.get_stats(timeout=STATS_S)
        except Exception:  # a worker that ends meanwhile takes them along
            return {}
        batches = [(step.get("inflightBatchingStats") or {}).get("numScheduledRequests", 0) for step in steps]
        caches = [step.get("kvCacheStats") or {} for step in steps]
        used = [cache["usedNumBlocks"] / cache["maxNumBlocks"] for cache in caches if cache.get("maxNumBlocks")]
        found = {"kv_cache_used_max": float(max(used))} if used else {}
        if running := [count for count in batches if count]:
            found["batch_requests_mean"] = sum(running) / len(running)
            found["batch_requests_max"] = float(max(running))
        return found

    def close(self) -> None:
        """End the executor, which gives the GPU's memory back."""
        RESIDENT.discard(self)
        llm, self._llm = self._llm, None
        if llm is not None:
            with contextlib.suppress(Exception):  # of an executor that is gone already
                llm.shutdown()


def build_key(weights: str, keywords: Mapping[str, Any], version: str, gpus: Sequence[str]) -> str:
    """Sixteen hexadecimal digits for all that a compiled engine depends on: weights, options, library and GPUs."""
    options = {name: _plain(value) for name, value in keywords.items() if name not in _NOT_BUILT_IN}
    facts = json.dumps([version, options, weights, list(gpus)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of each GPU that torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


def _usable_gpus(count: int) -> list[str]:
    """The first `count` GPUs, as text; LemError where the engine does not run on them. Its library is not imported yet."""
    oldest: Any = NEEDS["compute_capability"]
    wanted = f"TensorRT-LLM needs an NVIDIA GPU of compute capability {oldest[0]}.{oldest[1]} or newer"
    seen = _gpus()
    if not seen:
        raise LemError(f"{wanted}, and torch sees no GPU here: run it where there is one, or use another backend.")
    for name, capability in seen[:count]:
        if capability < oldest:
            found = ".".join(map(str, capability))
            raise LemError(f"{wanted}, and {name} has {found}: choose one with CUDA_VISIBLE_DEVICES, or another backend.")
    return [f"{name} (sm_{major}{minor})" for name, (major, minor) in seen[:count]]


def _check_names(engine_args: Mapping[str, Any], flavour: str, llmapi: Any) -> None:
    """LemError for an engine argument of the other flavour or of none."""
    fields = {name: set(getattr(getattr(llmapi, kind, None), "model_fields", ())) for name, kind in _ARGUMENTS.items()}
    known = fields[flavour] - {"model"}
    for name in engine_args.keys() - known:
        if name in fields["engine"]:
            raise LemError(f"'{name}' is an argument of compiled engines: add flavour='engine', or leave it out.")
        raise LemError(f"TensorRT-LLM does not know the engine argument '{name}': {nearest(name, known | {'flavour'})}")


def _with_defaults(engine_args: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    keywords = {"return_perf_metrics": True, **engine_args} if "return_perf_metrics" in known else dict(engine_args)
    given = keywords.get("kv_cache_config", {})
    if isinstance(given, Mapping):  # the engine takes a dict for its KvCacheConfig; one that is made already is left alone
        keywords["kv_cache_config"] = {"enable_block_reuse": False, **given}
    return keywords


def _clock_offset_s() -> float | None:
    """How far the clock of the engine's stamps is from time.monotonic at least, s; None where it cannot be read."""
    try:
        now = importlib.import_module("tensorrt_llm.bindings").steady_clock_now
        before_ns, stamp_ns, after_ns = time.monotonic_ns(), _ns(now()), time.monotonic_ns()
        return (stamp_ns - min(max(stamp_ns, before_ns), after_ns)) / 1e9
    except (ImportError, AttributeError):
        return None


def _ns(stamp: timedelta) -> int:
    return stamp // timedelta(microseconds=1) * 1000


def _effective(args: Any) -> dict[str, Any]:
    """What the engine says that it runs with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of its fields say that they are deprecated when they are read
        return {name: _plain(getattr(args, name)) for name in type(args).model_fields if name not in _NOT_TOLD}


def _plain(value: Any) -> Any:
    """As JSON; the engine's parts of configuration as what they hold."""
    dump = getattr(value, "model_dump", None) or getattr(value, "to_dict", None)
    return jsonable(dump() if dump and not isinstance(value, type) else value)


def _cause(error: BaseException) -> str:
    """The first of a chain of errors, in which a worker's is the cause of those that say only that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"out of memory ({_sentence(error)}): {_REMEDY}" if _LACK.search(str(error)) else _sentence(error)


def _sentence(error: BaseException) -> str:
    """One line that says what is wrong, and where if the engine's check of its arguments tells."""
    if told := error.errors() if hasattr(error, "errors") else ():
        return f"{'.'.join(map(str, told[0]['loc']))}: {told[0]['msg']}"
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _public(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")} - _OWN_OPTIONS
