"""The executor: a thread in the place of the worker process, which gives every request of its batch a token per step."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from queue import Empty, Queue
from typing import Any, Literal

from .behaviour import BEHAVIOUR
from .bindings import steady_clock_now

FIRST_TOKEN = 1000
BLOCKS = 64  # of the cache for keys and values


class RequestError(RuntimeError):
    """What went wrong with one request."""


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "timeout", "cancelled"] | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: Any = None
    additional_generation_outputs: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    _last_token_ids_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]


class RequestOutput:
    """One object for a request from its first response to the last: each `__anext__` changes it and returns it again."""

    def __init__(self, request_id: int, ids: list[int], sampling: Any, executor: Executor) -> None:
        self.request_id = request_id
        self.prompt_token_ids = ids
        self.sampling_params = sampling
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.outputs = [CompletionOutput(0)]
        self._executor = executor
        self._done = False
        self._loop = asyncio.get_running_loop()
        self._responses: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._executor.abort_request(self.request_id)

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        self._handle(await self._responses.get())
        return self

    def _respond(self, response: Any) -> None:
        """In the executor's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._responses.put_nowait, response)

    def _handle(self, response: Any) -> None:
        if isinstance(response, str):
            raise RequestError(response)
        self._executor._handle_background_error()
        choice = self.outputs[0]
        self._done, self.cached_tokens = response.is_final, response.cached_tokens
        self.decoding_iter = response.iteration
        choice._last_token_ids_len = len(choice.token_ids)
        choice.token_ids.extend(response.tokens)
        choice.request_perf_metrics = response.metrics
        if self._done:
            choice.finish_reason = response.reason
            if response.stop_words and not self.sampling_params.include_stop_str_in_output:
                choice.token_ids = choice.token_ids[:-1]


@dataclass
class Row:
    """A request in the worker."""

    output: RequestOutput
    max_tokens: int
    stop_ids: tuple[int, ...]
    interval: int
    arrival: timedelta | None
    widths: Iterator[int]
    made: int = 0
    sent: int = 0
    iteration: int = 0
    scheduled: timedelta = timedelta(0)
    first: timedelta = timedelta(0)


class Executor:
    def __init__(self, args: Any) -> None:
        self._args = args
        self._error_queue: Queue[Exception] = Queue()
        self._iter_stats: Queue[dict[str, Any]] = Queue()
        self.doing_shutdown = False
        self._ids = itertools.count(1)
        self._rows: dict[int, Row] = {}
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._ended = threading.Event()
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="stand-in-worker", daemon=True)
        self._thread.start()

    def is_shutdown(self) -> bool:
        return self.doing_shutdown

    def shutdown(self) -> None:
        self.doing_shutdown = True
        self._ended.set()
        self._work.set()
        self._thread.join()

    def generate_async(self, ids: list[int], sampling: Any, arrival: timedelta | None) -> RequestOutput:
        output = RequestOutput(next(self._ids), ids, sampling, self)
        room = (self._args.max_seq_len or 1 << 30) - len(ids)  # the library, too, asks for less without a word to the caller
        widths = itertools.chain(BEHAVIOUR.tokens_per_step, itertools.repeat(BEHAVIOUR.tokens_per_step[-1]))
        stop_ids = tuple(sampling.stop_token_ids or ())
        interval = getattr(self._args, "stream_interval", 1)
        with self._lock:
            self._rows[output.request_id] = Row(output, min(sampling.max_tokens, room), stop_ids, interval, arrival, widths)
        self._work.set()
        self._handle_background_error()
        return output

    def abort_request(self, request_id: int) -> None:
        BEHAVIOUR.aborted.append(request_id)
        with self._lock:
            self._rows.pop(request_id, None)

    def get_stats(self, timeout: float) -> list[dict[str, Any]]:
        found = []
        with_limit = time.monotonic() + timeout
        while True:
            try:
                found.append(self._iter_stats.get(timeout=max(0.0, min(0.01, with_limit - time.monotonic()))))
            except Empty:
                return found

    def _handle_background_error(self) -> None:
        if not self._error_queue.empty():
            error = self._error_queue.get()
            self.doing_shutdown = True
            self._ended.set()
            self._work.set()
            raise error

    def _run(self) -> None:
        while not self._ended.is_set():
            self._work.wait()
            with self._lock:
                batch = list(self._rows.values())[: self._args.max_batch_size or 2048]
                if not batch:
                    self._work.clear()
                    continue
            for row in batch:
                row.scheduled = row.scheduled or steady_clock_now()
            time.sleep(BEHAVIOUR.step_s)
            self._steps += 1
            if self._steps == BEHAVIOUR.die_after:
                self._die(batch)
                return
            self._note(batch)
            for row in batch:
                self._step(row)

    def _die(self, batch: list[Row]) -> None:
        self._error_queue.put(RuntimeError("MPI worker 0 ended: CUDA error: an illegal memory access\nand its traceback"))
        if BEHAVIOUR.death == "told":
            for row in batch:
                row.output._respond(types.SimpleNamespace(tokens=[]))

    def _step(self, row: Row) -> None:
        sampling = row.output.sampling_params
        row.iteration += 1
        row.first = row.first or steady_clock_now()
        stopped, reason, stop_words = False, None, False
        for _ in range(next(row.widths)):
            row.made += 1
            stop_words = FIRST_TOKEN + row.made - 1 in row.stop_ids
            ended = not sampling.ignore_eos and row.made == BEHAVIOUR.eos_after
            if stop_words or ended:
                stopped, reason = True, "stop"
            elif row.made >= row.max_tokens:
                stopped, reason = True, "length"
            if stopped:
                break
        if row.made >= (BEHAVIOUR.fail_after or 1 << 30):
            self._drop(row)
            row.output._respond(BEHAVIOUR.failure)
            return
        if not (stopped or row.iteration == 1 or row.iteration % row.interval == 0):
            return
        tokens = [FIRST_TOKEN + k for k in range(row.sent, row.made)]
        row.sent = row.made
        if stopped and BEHAVIOUR.last_response_is_empty:
            row.output._respond(self._response(row, tokens, False, None, False))
            tokens = []
        if stopped:
            self._drop(row)
        row.output._respond(self._response(row, tokens, stopped, reason, stop_words))

    def _drop(self, row: Row) -> None:
        with self._lock:
            self._rows.pop(row.output.request_id, None)

    def _response(self, row: Row, tokens: list[int], final: bool, reason: str | None, stop_words: bool) -> Any:
        metrics = None
        if row.output.sampling_params.return_perf_metrics:
            timing = types.SimpleNamespace(
                arrival_time=row.arrival or timedelta(0),
                first_scheduled_time=row.scheduled,
                first_token_time=row.first,
                last_token_time=steady_clock_now() if final else timedelta(0),
            )
            metrics = types.SimpleNamespace(timing_metrics=timing, kv_cache_metrics=None, speculative_decoding=None)
        return types.SimpleNamespace(
            tokens=tokens,
            is_final=final,
            reason=reason,
            stop_words=stop_words,
            iteration=row.iteration,
            cached_tokens=BEHAVIOUR.cached_tokens,
            metrics=metrics,
        )

    def _note(self, batch: list[Row]) -> None:
        """Statistics of one iteration, with the names of IterationStats as JSON."""
        if not getattr(self._args, "enable_iter_perf_stats", False):
            return
        size = self._args.kv_cache_config.tokens_per_block
        used = sum(-(-(len(row.output.prompt_token_ids) + row.made) // size) for row in batch)
        self._iter_stats.put(
            {
                "iter": self._steps,
                "iterLatencyMS": BEHAVIOUR.step_s * 1e3,
                "numActiveRequests": len(batch),
                "numQueuedRequests": 0,
                "gpuMemUsage": 40_560_164_864,
                "inflightBatchingStats": {"numScheduledRequests": len(batch), "numPausedRequests": 0},
                "kvCacheStats": {"maxNumBlocks": BLOCKS, "usedNumBlocks": used, "freeNumBlocks": BLOCKS - used},
            }
        )
