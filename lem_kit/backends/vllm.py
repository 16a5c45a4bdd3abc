"""vLLM: its asynchronous engine, on an event loop of its own.

The one idea: every keyword is the engine's and reaches it untouched, and every token has the stamp of the engine's core
(`_steps`), so that no latency holds how late the front end was woken, or that it merges what it could not hand over in time.
A release that has no place to take the stamps from has its tokens stamped when they are handed over (`timing_source`
"client"), and `describe()["effective"]["timing"]` says so.

lem_kit's own defaults, each to be overruled by an engine argument of that name: `enable_prefix_caching=False`, for a prompt
that is measured must be computed; `disable_log_stats=False`, for the engine's own instants; no bar while loading. Requests
are greedy and not turned into text unless their options say otherwise. Telemetry is off unless VLLM_NO_USAGE_STATS=0.

What the engine writes to its log goes to a file, which errors name, unless VLLM_LOGGING_CONFIG_PATH is set.

Not covered: several choices per prompt, beam search, pooling models; engines on other hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import gc
import inspect
import itertools
import os
import re
import secrets
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from .. import models
from ..energy import memory_used_bytes
from ..errors import LemError, Unavailable, nearest
from ..measurement import Request, TokenEvent, jsonable
from ..trace import Series
from . import RESIDENT, _checkpoint, _readback
from ._processes import Log, Process, ended, kill, memory_left, processes
from ._steps import Loop, Row, Steps, Tap, abandon

NEEDS = {
    "package": "vllm",
    "image": "vllm/vllm-openai:v0.32.0",
    "compute_capability": (7, 5),
    "parallel": ("tensor_parallel_size", "pipeline_parallel_size"),
}

_DEFAULTS = {"enable_prefix_caching": False, "disable_log_stats": False, "use_tqdm_on_load": False}
_OWN_OPTIONS = {"ignore_eos", "max_tokens", "min_tokens", "n", "output_kind", "prompt", "request_id", "sampling_params"}
# By these its processes are told from others that this one has started.
_OWN_PROCESSES = ("VLLM::", "multiprocessing.spawn", "multiprocessing.forkserver")
_log: Log | None = None  # of this process, settled when the engine's package is first imported


def load(model: str, **engine_args: Any) -> VLLM:
    """Start the engine: AsyncLLM of AsyncEngineArgs(model, **engine_args). It takes most of the GPU's memory until `close`.

    LemError for an argument that the engine does not know or rejects, and with the cause if it cannot start.
    """
    log = _settle_environment()
    import torch
    import vllm

    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: F401 (whether it is there)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("vllm."):
            raise
        raise Unavailable(f"vLLM {vllm.__version__} has no {error.name}", "pip install -U 'lem_kit[vllm]'") from error
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - {"model"}
    for name in engine_args:
        if name not in known:
            raise LemError(f"vLLM does not know the engine argument '{name}': {nearest(name, known)}")
    requested = _readback.requested(engine_args)
    path = models.resolve(model)
    asked = {**{name: value for name, value in _DEFAULTS.items() if name in known}, **engine_args}
    try:
        config = AsyncEngineArgs(model=path, **asked).create_engine_config()
    except ImportError:
        raise
    except Exception as error:  # it has no one class for what it rejects
        raise LemError(f"vLLM cannot load '{model}' as asked: {_sentence(error)}") from error
    facts = {"engine": "vllm", "version": vllm.__version__, "torch": torch.__version__, "requested": requested}
    backend = VLLM(log, facts)
    try:
        # No name here for the engine: some import keeps this frame, and the engine could never be freed.
        backend.start(config, bool(asked.get("disable_log_stats")))
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        facts["model"] = _checkpoint.facts(model, path, config.model_config.revision, dtype)
        facts["effective"] = _of_config(config, path, model)
    except BaseException as error:  # an interrupt must not leave an engine behind that nobody can close
        cause = backend.cause(error)
        backend.close()
        if not isinstance(error, Exception):
            raise
        raise LemError(f"vLLM could not start with '{model}': {cause}{log.hint()}") from error
    return backend


class VLLM:
    """A running engine. `generate` may be called from any event loop, the engine's work is on its own."""

    name = "vllm"
    concurrent = True

    def __init__(self, log: Log, facts: dict[str, Any]) -> None:
        self._log = log
        self._began = log.size()
        self._facts = facts
        self._loop = Loop()
        self._steps = Steps()
        self._tap = Tap(self._steps)
        self._names = (f"lem_kit-{number}" for number in itertools.count())
        self._engine: Any = None
        self._others = processes(_OWN_PROCESSES)
        self._used_before = memory_used_bytes()
        self._processes: set[Process] = set()
        self._starting: Future[Any] | None = None
        self._closed = False

    def start(self, config: Any, quiet: bool) -> None:
        """Once, before anything else; `close` whatever comes of it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        RESIDENT.add(self)
        self._starting = self._loop.begin(_started(config, self._steps, quiet))
        engine = self._engine = self._starting.result()
        self._processes = processes(_OWN_PROCESSES) - self._others
        self._sampling, self._delta = SamplingParams, RequestOutputKind.DELTA
        self._tap.onto(engine.output_processor)
        self._serve_options = _keywords(engine.generate) - _OWN_OPTIONS
        self._sampling_options = _keywords(SamplingParams) - _OWN_OPTIONS
        self._context = int(engine.model_config.max_model_len)
        self._vocabulary = int(engine.model_config.get_vocab_size())

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        """Each request joins the running batch by itself; its events come as the engine's steps do."""
        self._check_open()
        asked = [self._asked(request) for request in requests]
        text = any(request.prompt is not None for request in requests)  # the tokeniser must not hold up other requests
        rows = await asyncio.to_thread(self._encode, requests) if text else self._encode(requests)
        inbox: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        caller = asyncio.get_running_loop()
        work = [Row(next(self._names), index, ids, caller, inbox) for index, ids in enumerate(rows)]
        for row, said in zip(work, asked):
            self._loop.begin(self._serve(row, *said))
        at_work = len(work)
        try:
            while at_work:
                told = await inbox.get()
                if isinstance(told, Exception):
                    raise told
                at_work -= told.finish_reason is not None
                yield told
        finally:
            if at_work and self._engine is not None:
                await asyncio.wrap_future(self._loop.begin(abandon(work)))

    async def _serve(self, row: Row, sampling: Any, prompt: dict[str, Any], keywords: dict[str, Any]) -> None:
        """On the engine's loop: keep one request going, and say what became of it."""
        self._tap.rows[row.name] = row
        row.task = asyncio.current_task()
        try:
            output = None
            async for output in self._engine.generate(
                {**prompt, "prompt_token_ids": row.prompt}, sampling, row.name, **keywords
            ):
                row.took(len(output.outputs[0].token_ids))
            row.end(output)
        except asyncio.CancelledError:
            row.tell(LemError("This backend was closed while it was generating."))
        except Exception as error:
            row.tell(self._explained(error))
        finally:
            del self._tap.rows[row.name]

    def _asked(self, request: Request) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Sampling parameters, what goes beside the prompt, and keywords of the engine's `generate`. LemError for an option
        that neither knows, or that the engine rejects."""
        known = self._sampling_options | self._serve_options | {"cache_salt"}
        for name in request.options:
            if name in _OWN_OPTIONS:
                raise LemError(f"lem_kit sets the option '{name}' itself: use the fields of Request instead.")
            if name not in known:
                raise LemError(f"vLLM does not know the option '{name}': {nearest(name, known)}")
        options = {"temperature": 0.0, "detokenize": bool(request.options.get("stop")), **request.options}
        try:
            sampling = self._sampling(
                max_tokens=request.max_new_tokens,
                ignore_eos=request.fixed_length,
                output_kind=self._delta,
                **{name: value for name, value in options.items() if name in self._sampling_options},
            )
        except Exception as error:
            raise LemError(f"vLLM rejects the options of a request: {_sentence(error)}") from error
        prompt = {name: options[name] for name in ("cache_salt",) if name in options}
        return sampling, prompt, {name: value for name, value in options.items() if name in self._serve_options}

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids of each prompt. LemError for what the model cannot take."""
        rows = []
        for request in requests:
            ids: Sequence[int] = request.prompt_token_ids or ()
            if request.prompt is not None:
                if self._engine.tokenizer is None:
                    raise LemError("This engine was loaded with skip_tokenizer_init: give prompt_token_ids instead of text.")
                ids = self._engine.tokenizer(request.prompt).input_ids
            if max(ids) >= self._vocabulary:
                raise LemError(f"Token id {max(ids)} of a prompt is not one of the {self._vocabulary} that the model has.")
            if len(ids) + request.max_new_tokens > self._context:
                raise LemError(
                    f"{len(ids)} prompt tokens and {request.max_new_tokens} new ones are more than the engine's context of "
                    f"{self._context}: ask for less, or load with a larger max_model_len if the model allows it."
                )
            rows.append(list(ids))
        return rows

    def token_ids(self, request: Request) -> list[int]:
        """The ids that the engine makes of the prompt."""
        self._check_open()
        return self._encode([request])[0]

    def _check_open(self) -> None:
        if self._engine is None:
            raise LemError("This backend is closed: load it again with lem_kit.load_backend.")

    def cause(self, error: BaseException) -> str:
        """What the engine's own log says first of why, or else the error."""
        return self._log.cause(self._began) or _sentence(error)

    def _explained(self, error: Exception) -> Exception:
        """An error of the engine's in a sentence that says what to do."""
        if self._engine is None or getattr(self._engine, "errored", False):
            return RuntimeError(
                f"vLLM's engine process has died ({self.cause(error)}): load the model again.{self._log.hint()}"
            )
        if "ValidationError" in (kind.__name__ for kind in type(error).__mro__):
            return LemError(f"vLLM rejects a request: {_sentence(error)}")
        return error

    def describe(self) -> dict[str, Any]:
        return {**self._facts, "effective": {**self._facts["effective"], "timing": self._tap.timing}}

    def counters(self) -> dict[str, float]:
        """The running batch, the queue and the cache, as the engine logged them at its steps."""
        return self._steps.counters()

    def steps(self) -> dict[str, Series]:
        """The engine's log of its steps since the last call: requests in the batch and in the queue, share of the cache."""
        return self._steps.series()

    def close(self) -> None:
        """End the engine, wait until its processes are gone, and see whether the GPUs' memory has come back."""
        if self._closed:
            return
        self._closed = True
        while self._starting is not None and not self._starting.done():  # nothing but the end of its processes stops it
            kill(processes(_OWN_PROCESSES) - self._others)
            time.sleep(0.1)
        if self._engine is None and self._starting is not None and self._starting.exception() is None:
            self._engine = self._starting.result()
        with contextlib.suppress(Exception):  # of an engine that is dead already
            self._loop.call(_shut(self._engine))
        self._engine = self._starting = None
        RESIDENT.discard(self)
        self._loop.close()
        gc.collect()  # what is left of it would be shut down again when the interpreter ends, and complain
        left = ended(self._processes or processes(_OWN_PROCESSES) - self._others)
        if left:
            warnings.warn(f"vLLM left {len(left)} processes behind, which were killed: {left}.", stacklevel=2)
        for gpu, size in memory_left(self._used_before).items():
            warnings.warn(f"{gpu} has {size / 2**30:.1f} GiB more in use than before vLLM: see `nvidia-smi`.", stacklevel=2)
        self._log.clear()


# --- starting it, and what is then in force ------------------------------------------------------------------------


async def _started(config: Any, steps: Steps, quiet: bool) -> Any:
    """On the loop that the engine is to live on. It logs its steps unless its own log of them is disabled."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Listener(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, *args: Any, **more: Any) -> None:
            if scheduler_stats is not None:
                steps.record(scheduler_stats)

        def log_engine_initialized(self) -> None: ...

    # Each of several engines would have a listener of its own, and what one of them says is not of all.
    listeners = None if quiet or config.parallel_config.data_parallel_size > 1 else [Listener]
    return AsyncLLM.from_vllm_config(config, stat_loggers=listeners, disable_log_stats=quiet)


async def _shut(engine: Any) -> None:
    if engine is not None:
        engine.shutdown()


def _of_config(config: Any, path: str, name: str) -> dict[str, Any]:
    """Every part of the engine's configuration that JSON can hold, without None, objects and this machine's folders."""
    told = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kept = {field.name: _plain(getattr(value, field.name, None)) for field in dataclasses.fields(value)}
            kept = {key: name if item == path else item for key, item in kept.items() if item is not None}
            kept = {key: "(not kept)" if _readback.is_secret(key) else item for key, item in kept.items()}
            told[part.name] = {key: item for key, item in kept.items() if not str(item).startswith("/")}
    return told


def _plain(value: Any) -> Any:
    """A scalar, or a flat collection of them; None for anything else."""
    if isinstance(value, enum.Enum):
        return value.name
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return jsonable(value) if all(isinstance(item, (bool, int, float, str)) for item in value.values()) else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return jsonable(value) if all(isinstance(item, (bool, int, float, str)) for item in value) else None
    return jsonable(value) if isinstance(value, (bool, int, float, str)) else None


def _keywords(function: Callable[..., Any]) -> set[str]:
    return {name for name in inspect.signature(function).parameters if not name.startswith("_")} - {"self", "skip_clone"}


def _settle_environment() -> Log:
    """What the engine reads from the environment when it is imported, where the user has not said otherwise."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not hasattr(sys.modules["__main__"], "__file__") or threading.active_count() > 1:
        # A notebook, or a process with other threads: a fork may copy a lock that one of them holds, and hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    global _log
    if _log is None:
        _log = Log(None)
        if "VLLM_LOGGING_CONFIG_PATH" not in os.environ and "vllm" not in sys.modules:
            # Process numbers repeat among containers, which may share this folder.
            _log = Log(models.cache_folder() / "logs" / f"vllm-{os.getpid()}-{secrets.token_hex(4)}.log")
            os.environ["VLLM_LOGGING_CONFIG_PATH"] = _log.settle("vllm", os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    return _log


def _sentence(error: BaseException) -> str:
    """The first line of an error that says something. Pydantic's begin with a count; a name may follow, and what it says
    ends with the value in brackets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        name = "" if " [type=" in lines[1] else f"{lines.pop(1).split('.')[0]}: "
        said, _, value = lines[1].removeprefix("Value error, ").partition(" [type=")
        given = re.search(r"input_value=([^,]{1,40}), input_type=(?:str|int|float)", value)
        lines = [f"{name}{said}{f' (got {given[1]})' if given else ''}"]
    return lines[0] if lines else type(error).__name__
