"""One run in the JSON that vLLM's `bench serve --save-result --save-detailed` writes, for the tools that read it.

The one idea: keys and definitions are theirs (release 0.32), so that figures of both stand in one table; energies, which
that format lacks, are under a key of their own, "lem_kit", with method, interval and coverage. What was not seen is null,
and what does not exist here (texts, the tokenizer, an HTTP endpoint) is null or absent.

    ttft, latency   first, last event - dispatch; there the hand-over is an HTTP request, here a call
    itl             gaps between events, whatever number of tokens they bring
    tpot            (latency - ttft) / (output tokens - 1); requests of more than one token
    mean, median, std (of the population), p99: over requests that completed, NumPy's; gaps are pooled

Theirs is the p99 of however few samples; "lem_kit" names the ones with fewer than ten samples beyond. Several repeats are
one benchmark: seconds and requests are sums. Where an event brings several tokens, the peak counts tokens, and theirs
events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .. import metrics
from ..errors import LemError
from ..measurement import Completion, Measurement, jsonable

_UNLIMITED = ("burst", "concurrency")  # plans without a rate: "inf" there


def result(m: Measurement) -> dict[str, Any]:
    """The result as strict JSON. LemError for a measurement without requests."""
    if not m.completions:
        raise LemError(f"{m.run_id} has no requests, and a serving benchmark's result is about nothing else.")
    done = [c for c in m.completions if c.error is None]
    seconds = metrics.measured_s(m)
    inputs = [c.prompt_tokens for c in done]
    total_input = sum(n for n in inputs if n is not None) if None not in inputs else None
    total_output = sum(c.output_tokens for c in done)
    peak, concurrent = _peaks(done)
    per_s = 1 / seconds if seconds > 0 else None
    return {
        **_setup(m),
        "duration": seconds,
        "completed": len(done),
        "failed": len(m.completions) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": _times(len(done), per_s),
        "request_goodput": None,
        "output_throughput": _times(total_output, per_s),
        "total_token_throughput": _times(None if total_input is None else total_input + total_output, per_s),
        **_detailed(m.completions),
        "max_output_tokens_per_s": peak,
        "max_concurrent_requests": concurrent,
        **_statistics(done),
        "lem_kit": _own(m, done),
    }


def _times(count: float | None, per_s: float | None) -> float | None:
    return None if count is None or per_s is None else count * per_s


def _setup(m: Measurement) -> dict[str, Any]:
    backend, plan = m.backend or {}, m.config.get("arrivals")
    burstiness = {"poisson": 1.0, "gamma": m.config.get("burstiness")}.get(str(plan))
    return {
        "date": _date(m.started_at),
        "endpoint_type": None,
        "backend": backend.get("engine"),
        "label": m.label,
        "model_id": (backend.get("model") or {}).get("name"),
        "tokenizer_id": None,
        "num_prompts": len(m.completions),
        "request_rate": "inf" if plan in _UNLIMITED else m.config.get("rate_per_s"),
        "burstiness": burstiness,
        "max_concurrency": m.config.get("size") if plan == "batches" else m.config.get("concurrency"),
    }


def _date(started_at: str) -> str | None:
    try:
        return datetime.fromisoformat(started_at).strftime("%Y%m%d-%H%M%S")
    except ValueError:
        return None


def _detailed(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """One entry per request, failed ones included: what was seen of them."""
    return {
        "input_lens": [c.prompt_tokens for c in completions],
        "output_lens": [c.output_tokens if c.error is None else 0 for c in completions],
        "ttfts": [metrics.ttft_s(c) for c in completions],
        "itls": [metrics.icl_s(c) for c in completions],
        "latencies": [metrics.e2e_s(c) if c.error is None else None for c in completions],
        "start_times": [c.dispatch_ns / 1e9 for c in completions],
        "queue_times": [metrics.schedule_delay_s(c) for c in completions],
        "errors": [c.error or "" for c in completions],
    }


def _samples(done: Sequence[Completion]) -> dict[str, list[float]]:
    seen = [c for c in done if c.events]
    first, last = ([f(c) or 0.0 for c in seen] for f in (metrics.ttft_s, metrics.e2e_s))
    return {
        "ttft": first,
        "tpot": [(b - a) / (c.output_tokens - 1) for a, b, c in zip(first, last, seen) if c.output_tokens > 1],
        "itl": [gap for c in seen for gap in metrics.icl_s(c)],
        "e2el": last,
    }


def _statistics(done: Sequence[Completion]) -> dict[str, float | None]:
    import numpy as np

    found: dict[str, float | None] = {}
    for name, samples in _samples(done).items():
        known = np.array(samples) * 1e3 if samples else None
        found[f"mean_{name}_ms"] = None if known is None else float(known.mean())
        found[f"median_{name}_ms"] = None if known is None else float(np.median(known))
        found[f"std_{name}_ms"] = None if known is None else float(known.std())
        found[f"p99_{name}_ms"] = None if known is None else float(np.percentile(known, 99))
    return found


def _peaks(done: Sequence[Completion]) -> tuple[float | None, int | None]:
    """Most output tokens in one second, and most requests that touched one second, of seconds counted from the first
    dispatch; each repeat by itself."""
    import numpy as np

    tokens_per_s, concurrent = [], []
    for repeat in {c.repeat for c in done if c.events}:
        mine = [c for c in done if c.repeat == repeat and c.events]
        start = min(c.dispatch_ns for c in mine)
        stamps = np.array([e for c in mine for e in c.events], dtype=np.int64)
        tokens_per_s.append(np.bincount((stamps[:, 0] - start) // 1_000_000_000, stamps[:, 1]).max())
        begin = np.array([c.dispatch_ns - start for c in mine]) // 1_000_000_000
        end = np.array([c.events[-1][0] - start for c in mine]) // 1_000_000_000
        changes = np.bincount(begin, minlength=end.max() + 2) - np.bincount(end + 1, minlength=end.max() + 2)
        concurrent.append(np.cumsum(changes).max())
    return (float(max(tokens_per_s)), int(max(concurrent))) if tokens_per_s else (None, None)


def _own(m: Measurement, done: Sequence[Completion]) -> dict[str, Any]:
    """What their format has no key for."""
    total, per_token = metrics.energy_j(m), metrics.j_per_output_token(m)
    few = [f"p99_{name}_ms" for name, samples in _samples(done).items() if samples and len(samples) < 1000]
    energies = {
        key: {
            "joules": e.joules, "half_width_j": e.uncertainty_j, "method": metrics.METHODS[e.method], "covers": e.scope,
            "reasons": list(e.reasons),
        }
        for key, e in m.energy.items()
    }  # fmt: skip
    return {
        "run_id": m.run_id,
        "version": m.environment.get("lem_kit"),
        "repeats": max(len(m.repeats), 1),
        "arrivals": m.config.get("arrivals"),
        "timing_source": sorted({c.timing_source for c in m.completions}),
        "energy_j": _figure(total),
        "j_per_output_token": _figure(per_token),
        "mean_power_w": _figure(metrics.mean_power_w(m)),
        "not_valid": metrics.verdict(m),
        "reasons": metrics.reasons(m),
        "energy_of_whole_window": energies,
        "percentiles_of_few_samples": few,
        "precision": metrics.precision(m),
        "prompts_sha256": jsonable(m.config.get("prompts_sha256")),
    }


def _figure(figure: metrics.Figure | None) -> Mapping[str, Any] | None:
    if figure is None:
        return None
    return {
        "value": figure.value if math.isfinite(figure.value) else None,
        "half_width_95": figure.half_width if math.isfinite(figure.half_width) else None,
        "method": metrics.METHODS[figure.method],
        "sources": list(figure.keys),
        "covers": list(figure.scopes),
    }
