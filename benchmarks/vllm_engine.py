"""lem_kit beside vLLM's own benchmarks, on one model, prompts and lengths, in turns: `make bench-vllm`.

    python benchmarks/vllm_engine.py [--model NAME] [--pairs N] [--json FILE.json]

Throughput: rounds of the same requests, all at once, through lem_kit, through what `vllm bench throughput` runs, with the
engine for offline work and with the asynchronous one (its own functions are called), and, one batch at a time, through what
`vllm bench latency` repeats. Each way has an engine of its own, loaded once; rounds of two ways come in pairs, in random
order, and only ratios within pairs are averaged: 1 costs nothing.

Latency: TTFT and TPOT of lem_kit's requests, against what the engine's own request metrics say of the very same ones.

Not covered: `vllm bench serve`, which measures a server through its HTTP port.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from overhead import interval, paired, through_lem_kit

import lem_kit as lem
from lem_kit import metrics, models, traffic
from lem_kit.backends import _steps, load_backend

ENGINE = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 2**28}
ENGINE |= {"enable_prefix_caching": False, "disable_log_stats": False}
PROMPT, NEW = 64, 64


def samples(requests: list[Any]) -> list[Any]:
    from vllm.benchmarks.datasets import SampleRequest

    return [
        SampleRequest(
            prompt={"prompt_token_ids": list(r.prompt_token_ids)}, prompt_len=PROMPT, expected_output_len=r.max_new_tokens
        )
        for r in requests
    ]


def offline(llm: Any, requests: list[Any]) -> Callable[[], int]:
    from vllm.benchmarks.throughput import _run_vllm_requests

    asked = samples(requests)

    def work() -> int:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            _, outputs = _run_vllm_requests(llm, asked, 1, True, False, False, False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return work


@contextlib.contextmanager
def asynchronous(path: str) -> Iterator[Callable[[list[Any]], Callable[[], int]]]:
    """The engine that `vllm bench throughput --async-engine` uses, on a loop of its own."""
    from vllm.benchmarks.throughput import _run_vllm_async_requests
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    loop, names = _steps.Loop(), itertools.count()

    async def start() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=path, **ENGINE))

    engine = loop.call(start())

    def of(requests: list[Any]) -> Callable[[], int]:
        asked = samples(requests)

        def work() -> int:
            loop.call(_run_vllm_async_requests(engine, asked, 1, True, False, f"round-{next(names)}-"))
            return len(asked) * NEW  # it keeps no output

        return work

    try:
        yield of
    finally:

        async def stop() -> None:
            engine.shutdown()

        loop.call(stop())
        loop.close()


def compared(name: str, ours: Callable[[], int], theirs: Callable[[], int], tokens: int, pairs: int) -> dict[str, Any]:
    costs = paired(ours, theirs, tokens, pairs)
    ratio = interval([their.seconds / our.seconds for our, their in costs])
    rate = tokens / statistics.median(their.seconds for _, their in costs)
    print(
        f"{name:<56} {rate:8.0f} tokens/s theirs;  ours / theirs {ratio[0]:.4f} [{ratio[1]:.4f}, {ratio[2]:.4f}]", flush=True
    )
    return {"name": name, "their_tokens_per_s": rate, "ratio": ratio, "pairs": pairs}


def latencies(backend: Any, requests: list[Any], arrivals: Any) -> list[dict[str, Any]]:
    """Medians over the same requests as lem_kit and as the engine's metrics give them."""
    theirs: list[Any] = []
    end = _steps.Row.end

    def noting(row: Any, output: Any) -> None:
        m = output.metrics
        tpot_s = (m.last_token_ts - m.first_token_ts) / (m.num_generation_tokens - 1)
        theirs.append((m.first_token_latency, tpot_s))
        end(row, output)

    _steps.Row.end = noting  # type: ignore[method-assign]
    try:
        done = traffic.run_blocking(traffic.send(backend, requests, arrivals))
    finally:
        _steps.Row.end = end  # type: ignore[method-assign]
    ours = [(metrics.ttft_s(c), metrics.tpot_s(c)) for c in done]
    rows = []
    for i, name in enumerate(("TTFT", "TPOT")):
        mine, their = (statistics.median(values[i] for values in each) for each in (ours, theirs))
        label = f"{name}, {arrivals.describe()['arrivals']}"
        print(
            f"{label:<56} {1e3 * mine:8.3f} ms ours, {1e3 * their:.3f} ms the engine's;  ratio {mine / their:.4f}",
            flush=True,
        )
        rows.append({"name": label, "ours_s": mine, "engine_s": their, "requests": len(done)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backend: Any = load_backend("vllm", options.model, **ENGINE)
    from vllm import LLM

    path = models.resolve(options.model)
    many, one_batch = (lem.prompts.synthetic(n, PROMPT, NEW, seed=n, temperature=1.0) for n in (32, 8))  # theirs
    ours, ours_batch = (through_lem_kit(backend, asked, lem.traffic.burst()) for asked in (many, one_batch))
    rows = []
    llm = LLM(path, **ENGINE)
    rows.append(compared("32 at once / vllm bench throughput", ours, offline(llm, many), 32 * NEW, options.pairs))
    rows.append(compared("8 at once / vllm bench latency", ours_batch, offline(llm, one_batch), 8 * NEW, options.pairs))
    llm.llm_engine.engine_core.shutdown()
    with asynchronous(path) as theirs:
        name = "32 at once / vllm bench throughput --async-engine"
        rows.append(compared(name, ours, theirs(many), 32 * NEW, options.pairs))
    workload = lem.prompts.synthetic(100, PROMPT, NEW, seed=1)
    rows += latencies(backend, workload, lem.traffic.concurrency(4))
    rows += latencies(backend, workload, lem.traffic.poisson(rate_per_s=8, seed=0))
    backend.close()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"model": options.model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
