"""The JSON of vLLM's serving benchmark: its keys, its definitions, nulls where nothing was seen, and our doubt beside."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_report import SECOND, run

import lem_kit as lem
from lem_kit.errors import LemError
from lem_kit.export import serving
from lem_kit.measurement import Completion, Measurement, Repeat

MS = 1_000_000
# What `bench serve --save-result --save-detailed` writes, release 0.32, but for texts, audio, probes and speculation.
KEYS = [
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls",
    "latencies", "start_times", "queue_times", "errors", "max_output_tokens_per_s", "max_concurrent_requests",
    *(f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for what in ("mean", "median", "std", "p99")),
]  # fmt: skip


def done(start_ms: float, first_ms: float, gaps_ms: list[float], **facts: Any) -> Completion:
    stamps = [first_ms, *(first_ms + sum(gaps_ms[: k + 1]) for k in range(len(gaps_ms)))]
    events = tuple((round(t * MS), 1) for t in stamps)
    begin = round(start_ms * MS)
    return Completion(begin, begin, events[-1][0], events, facts.pop("prompt_tokens", 5), **facts)


def served(*completions: Completion, **changes: Any) -> Measurement:
    return dataclasses.replace(run(1, 20.0), completions=completions, t1_ns=4 * SECOND, **changes)


TWO = (done(0, 100, [50, 50, 100]), done(500, 700, [1500, 500], prompt_tokens=7))


def test_exact_values() -> None:
    found = serving.result(served(*TWO))
    assert list(found) == [*KEYS, "lem_kit"]
    assert (found["duration"], found["completed"], found["failed"], found["num_prompts"]) == (4.0, 2, 0, 2)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 7)
    rates = [found[key] for key in ("request_throughput", "output_throughput", "total_token_throughput")]
    assert rates == [0.5, 1.75, 4.75]
    assert found["ttfts"] == [0.1, 0.2] and found["latencies"] == pytest.approx([0.3, 2.2])
    assert found["itls"] == [pytest.approx([0.05, 0.05, 0.1]), [1.5, 0.5]] and found["output_lens"] == [4, 3]
    assert found["mean_ttft_ms"] == pytest.approx(150) and found["std_ttft_ms"] == pytest.approx(50)
    assert found["mean_tpot_ms"] == pytest.approx((200 / 3 + 1000) / 2)
    assert found["median_itl_ms"] == pytest.approx(100) and found["p99_ttft_ms"] == pytest.approx(199)
    # Seconds are counted from the first dispatch: 4 + 1 tokens in the first, 1 each at 2.2 and 2.7; both requests touch it.
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (5.0, 2)


def test_failed_requests_keep_what_was_seen_and_count_in_no_latency() -> None:
    cut = dataclasses.replace(done(0, 100, [50]), error="engine died")
    silent = Completion(0, 0, SECOND, (), None, error="refused")
    found = serving.result(served(*TWO, cut, silent))
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 2, 7)
    assert found["errors"] == ["", "", "engine died", "refused"] and found["output_lens"][2:] == [0, 0]
    assert found["ttfts"][2:] == [0.1, None] and found["latencies"][2:] == [None, None] and found["itls"][3] == []
    assert found["mean_ttft_ms"] == pytest.approx(150)


def test_what_was_not_seen_is_null() -> None:
    silent = dataclasses.replace(run(1, None), completions=(Completion(0, 0, SECOND, (), None, error="refused"),))
    found = serving.result(silent)
    nulls = [key for key in KEYS if "_ms" in key] + ["request_goodput", "max_output_tokens_per_s", "max_concurrent_requests"]
    assert all(found[key] is None for key in nulls)
    assert found["lem_kit"]["energy_j"] is None and found["lem_kit"]["not_valid"] == ["source_failed"]
    unknown = serving.result(served(dataclasses.replace(TWO[0], prompt_tokens=None)))
    assert unknown["total_input_tokens"] is None and unknown["total_token_throughput"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("config", "rate", "burstiness", "concurrency"),
    [
        ({"arrivals": "burst"}, "inf", None, None),
        ({"arrivals": "concurrency", "concurrency": 8}, "inf", None, 8),
        ({"arrivals": "batches", "size": 4}, None, None, 4),
        ({"arrivals": "constant", "rate_per_s": 2.0}, 2.0, None, None),
        ({"arrivals": "poisson", "rate_per_s": 2.0, "concurrency": 3}, 2.0, 1.0, 3),
        ({"arrivals": "gamma", "rate_per_s": 2.0, "burstiness": 0.5}, 2.0, 0.5, None),
        ({}, None, None, None),
    ],
)
def test_the_traffic_is_told_in_their_words(config: Any, rate: Any, burstiness: Any, concurrency: Any) -> None:
    found = serving.result(served(*TWO, config=config))
    assert [found[key] for key in ("request_rate", "burstiness", "max_concurrency")] == [rate, burstiness, concurrency]


def test_energy_stands_beside_with_method_interval_and_coverage() -> None:
    own = serving.result(served(*TWO))["lem_kit"]
    assert own["energy_j"] == {
        "value": 20.0, "half_width_95": 0.5, "method": "measured by a counter", "sources": ["meter:gpu0"], "covers": ["gpu"],
    }  # fmt: skip
    assert own["j_per_output_token"]["value"] == pytest.approx(20 / 7) and own["not_valid"] == []
    assert own["percentiles_of_few_samples"] == ["p99_ttft_ms", "p99_tpot_ms", "p99_itl_ms", "p99_e2el_ms"]
    model = serving.result(dataclasses.replace(run(1, 5.0, "model")))["lem_kit"]
    assert model["energy_j"]["method"] == "MODELLED, not measured"
    assert model["energy_of_whole_window"]["meter:gpu0"]["method"] == "MODELLED, not measured"


def test_repeats_are_one_benchmark_and_peaks_are_of_one_repeat() -> None:
    repeats = tuple(Repeat(k * SECOND, (k + 1) * SECOND, {}) for k in range(2))
    found = serving.result(served(TWO[0], dataclasses.replace(TWO[0], repeat=1), repeats=repeats))
    assert (found["duration"], found["num_prompts"], found["lem_kit"]["repeats"]) == (2.0, 2, 2)
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (4.0, 1)


def test_a_window_is_no_serving_benchmark() -> None:
    with pytest.raises(LemError, match="has no requests"):
        serving.result(dataclasses.replace(run(1, 1.0), completions=()))


@pytest.mark.parametrize("path", sorted((ROOT / "data/example").glob("*/*poisson*")), ids=lambda path: path.name[16:])
def test_a_recorded_run(path: Any) -> None:
    found = serving.result(lem.load(path))
    assert found["completed"] == 28 and found["request_rate"] == pytest.approx(4.7758, abs=1e-4)
    assert found["p99_ttft_ms"] == pytest.approx(float(np.percentile(found["ttfts"], 99)) * 1e3)


def test_vllms_own_code_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Needs vLLM: `make test-vllm`."""
    serve = pytest.importorskip("vllm.benchmarks.serve", reason="needs vLLM (make test-vllm)")
    draw = random.Random(0)
    requests = []
    for k in range(300):
        start = 20 * k
        gaps = [draw.uniform(5, 40) for _ in range(draw.randrange(0, 60))]
        failed = "lost" if k % 50 == 7 else None
        requests.append(done(start, start + draw.uniform(30, 300), gaps, prompt_tokens=draw.randrange(1, 99), error=failed))
    ours = serving.result(served(*requests))
    outputs = [
        serve.RequestFuncOutput(
            success=c.error is None, latency=ours["latencies"][i] or 0.0, ttft=ours["ttfts"][i], itl=ours["itls"][i],
            output_tokens=c.output_tokens, prompt_len=c.prompt_tokens, start_time=c.dispatch_ns / 1e9,
            error=c.error or "",
        )
        for i, c in enumerate(requests)
    ]  # fmt: skip
    theirs, lengths = serve.calculate_metrics([], outputs, 4.0, None, [99.0], {})
    same = {
        "completed": theirs.completed, "failed": theirs.failed, "total_input_tokens": theirs.total_input,
        "total_output_tokens": theirs.total_output, "request_throughput": theirs.request_throughput,
        "output_throughput": theirs.output_throughput, "total_token_throughput": theirs.total_token_throughput,
        "max_output_tokens_per_s": theirs.max_output_tokens_per_s, "max_concurrent_requests": theirs.max_concurrent_requests,
    }  # fmt: skip
    for name in ("ttft", "tpot", "itl", "e2el"):
        same |= {f"{what}_{name}_ms": getattr(theirs, f"{what}_{name}_ms") for what in ("mean", "median", "std")}
        same[f"p99_{name}_ms"] = getattr(theirs, f"percentiles_{name}_ms")[0][1]
    assert {key: ours[key] for key in same} == pytest.approx(same, rel=1e-9) and ours["output_lens"] == lengths
