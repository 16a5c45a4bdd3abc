"""Metrics: pure functions from a Measurement to a number, each with formula, unit and source; those of one request
(`latency`), of the energy as a whole (`totals`) and of the hardware (`hardware`) are here too.

Definitions version 1. Denominators and units stand in the names. A metric that was not observed is None.

Not covered here: goodput (`goodput`), the parts of a run (`steady`), FLOPs (`flops`), energy by phase and by request
(`phases`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import steady
from .backends import COUNTERS
from .hardware import (  # noqa: F401 (as below)
    gpu_utilization,
    kv_cache_used_mean,
    peak_memory_used_bytes,
    peak_power_w,
    precision,
    quantization,
)
from .latency import (  # noqa: F401 (users find them here)
    by_request,
    decode_s,
    dispatch_lag_s,
    dispatched_late,
    e2e_s,
    e2e_sched_s,
    icl_s,
    itl_s,
    mean,
    ntpot_s,
    percentile,
    percentile_interval,
    percentiles,
    prefill_s,
    queue_s,
    schedule_delay_s,
    tpot_s,
    ttft_s,
    ttft_sched_s,
    values,
)
from .measurement import Completion, Measurement
from .totals import (  # noqa: F401 (as above)
    AGAINST,
    METHODS,
    PREFERENCE,
    Figure,
    agreement,
    chosen,
    energy_delay_js,
    energy_j,
    energy_j_per_repeat,
    inverse,
    mean_power_w,
    measured_s,
    net_energy_absent,
    net_energy_doubts,
    net_energy_j,
    quantity,
    reasons,
    unresolved,
    verdict,
)

DEFINITIONS_VERSION = 1
PERCENTILES = (50, 90, 95, 99)


# --- counts and rates -------------------------------------------------------------------------------------------------


def output_tokens(m: Measurement) -> int | None:
    """Output tokens of the measurement: counted from events, or else what `--tokens` said, over all repeats."""
    if m.completions:
        return sum(c.output_tokens for c in m.completions)
    if m.repeats and m.output_tokens is None:
        counts = [r.output_tokens for r in m.repeats]
        return sum(n for n in counts if n is not None) if None not in counts else None
    return m.output_tokens


def input_tokens(m: Measurement) -> int | None:
    """Prompt tokens as the engine counted them, over all repeats; None if one is unknown."""
    counts = [c.prompt_tokens for c in m.completions]
    return sum(n for n in counts if n is not None) if counts and None not in counts else None


def cached_tokens(m: Measurement) -> int | None:
    """Prompt tokens that the engine found in its cache and did not compute; None if it does not tell of one request."""
    counts = [c.cached_tokens for c in m.completions]
    return sum(n for n in counts if n is not None) if counts and None not in counts else None


def total_tokens(m: Measurement) -> int | None:
    """Input plus output tokens."""
    n_in, n_out = input_tokens(m), output_tokens(m)
    return n_in + n_out if n_in is not None and n_out is not None else None


def completed_requests(m: Measurement) -> int | None:
    """Requests that completed without error; None for a measurement without requests."""
    return sum(c.error is None for c in m.completions) if m.completions else None


def output_tokens_per_s(m: Measurement) -> float | None:
    """Output throughput, tokens/s: output tokens / measured seconds. (vLLM bench "output_throughput"; there without the
    tokens of failed requests, which were generated, cost energy and count here.)"""
    tokens = output_tokens(m)
    return tokens / measured_s(m) if tokens is not None and measured_s(m) > 0 else None


def total_tokens_per_s(m: Measurement) -> float | None:
    """Total throughput, tokens/s: (prompt + output tokens) / measured seconds. (vLLM bench: "total_token_throughput".)"""
    tokens = total_tokens(m)
    return tokens / measured_s(m) if tokens is not None and measured_s(m) > 0 else None


def steady_output_tokens_per_s(m: Measurement, share: float = 0.9) -> float | None:
    """Output throughput of the steady state, tokens/s: output tokens that came in it / its seconds, over all repeats
    (`steady.of_repeats`). None without requests, or where a repeat has none."""
    tokens = time_ns = 0
    for done, run in steady.of_repeats(m, share):
        if run is None:
            return None
        start_ns, end_ns = run.spans["steady"]
        tokens, time_ns = tokens + steady.output_tokens_between(done, start_ns, end_ns), time_ns + end_ns - start_ns
    return tokens / (time_ns / 1e9) if time_ns > 0 else None


def concurrency_mean(m: Measurement) -> float | None:
    """Requests at work, mean over the measured seconds: sum of (done - dispatch) over all requests, failed ones included, /
    measured seconds (Little 1961). Seen from outside: the engine's own batch is `batch_requests_mean`, where it tells."""
    if not m.completions or not measured_s(m) > 0:
        return None
    return sum(c.done_ns - c.dispatch_ns for c in m.completions) / 1e9 / measured_s(m)


def requests_per_s(m: Measurement) -> float | None:
    """Request throughput, 1/s: completed requests / measured seconds."""
    done = completed_requests(m)
    return done / measured_s(m) if done is not None and measured_s(m) > 0 else None


def planned_requests_per_s(m: Measurement) -> float | None:
    """Request rate of the schedule, 1/s: (requests - 1) / (last schedule - first), over all repeats. None for a plan without
    one: batches, a closed loop, a burst."""
    return _rate_per_s(m, lambda c: c.sched_ns)


def achieved_requests_per_s(m: Measurement) -> float | None:
    """Request rate at which the engine got them, 1/s: (requests - 1) / (last dispatch - first), over all repeats. To be held
    against `planned_requests_per_s`, and None where that is; the rate at which they were finished is `requests_per_s`."""
    return _rate_per_s(m, lambda c: c.dispatch_ns)


def _rate_per_s(m: Measurement, instant: Callable[[Completion], int]) -> float | None:
    if not {"schedule_s", "schedule_sha256"} & m.config.keys():
        return None
    repeats = [[instant(c) for c in m.completions if c.repeat == k] for k in {c.repeat for c in m.completions}]
    gaps, seconds = sum(len(r) - 1 for r in repeats), sum(max(r) - min(r) for r in repeats) / 1e9
    return gaps / seconds if seconds > 0 else None


# --- energy -----------------------------------------------------------------------------------------------------------


def _per(m: Measurement, denominator: float | None) -> Figure | None:
    total = energy_j(m)
    return total.scaled(1 / denominator) if total and denominator else None


def j_per_output_token(m: Measurement) -> Figure | None:
    """Gross energy / output tokens, J per token. The token counts are exact, so the interval is the energy's."""
    return _per(m, output_tokens(m))


def j_per_input_token(m: Measurement) -> Figure | None:
    """Gross energy / prompt tokens, J per token. All of the energy, decode included, over the prompt tokens."""
    return _per(m, input_tokens(m))


def j_per_total_token(m: Measurement) -> Figure | None:
    """Gross energy / (prompt + output tokens), J per token."""
    return _per(m, total_tokens(m))


def j_per_request(m: Measurement) -> Figure | None:
    """Gross energy / completed requests, J per request. Failed requests cost energy and count in the numerator alone."""
    return _per(m, completed_requests(m))


def output_tokens_per_j(m: Measurement) -> Figure | None:
    """Output tokens / gross energy, tokens per J, the inverse of `j_per_output_token`."""
    per_token = j_per_output_token(m)
    return inverse(per_token) if per_token else None


# --- a row ------------------------------------------------------------------------------------------------------------


def preemptions(m: Measurement) -> int | None:
    """How often the engine took a request out of its running batch to make room. None where it does not tell."""
    told = [c.preemptions for c in m.completions if c.preemptions is not None]
    return sum(told) if told else None


def summary(m: Measurement) -> dict[str, Any]:
    """One flat row of everything above: the row of `lem.frame`. Unknown is None."""
    row: dict[str, Any] = {
        "run_id": m.run_id,
        "kind": m.kind,
        "label": m.label,
        "status": m.status,
        "started_at": m.started_at,
        "duration_s": m.duration_s,
        "repeats": len(m.repeats),
        "backend": (m.backend or {}).get("engine"),
        "model": ((m.backend or {}).get("model") or {}).get("name"),
        "dtype": ((m.backend or {}).get("model") or {}).get("dtype"),
        "quantization": quantization(m),
        "requests": len(m.completions) or None,
        "completed_requests": completed_requests(m),
        "input_tokens": input_tokens(m),
        "cached_tokens": cached_tokens(m),
        "output_tokens": output_tokens(m),
        "output_tokens_per_s": output_tokens_per_s(m),
        "steady_output_tokens_per_s": steady_output_tokens_per_s(m),
        "total_tokens_per_s": total_tokens_per_s(m),
        "requests_per_s": requests_per_s(m),
        "planned_requests_per_s": planned_requests_per_s(m),
        "achieved_requests_per_s": achieved_requests_per_s(m),
        "concurrency_mean": concurrency_mean(m),
        "preemptions": preemptions(m),
        "loop_lag_s": m.loop_lag_s,
        "kv_cache_used_mean": kv_cache_used_mean(m),
        **dict.fromkeys(COUNTERS),
        **m.counters,
    }
    row |= _distributions(m) | _figures(m)
    total = energy_j(m)
    row["energy_method"] = total.method if total else None
    row["energy_keys"] = ", ".join(total.keys) if total else None
    row["energy_scopes"] = ", ".join(total.scopes) if total else None
    row |= {f"peak_power_w.{key}": watts for key, watts in peak_power_w(m).items()}
    row |= {f"gpu_utilization.{key}": share for key, share in gpu_utilization(m).items()}
    row |= {f"peak_memory_used_bytes.{key}": used for key, used in peak_memory_used_bytes(m).items()}
    net = net_energy_j(m)
    row["net_energy_j"] = net.value if net else None
    row["net_energy_j_half_width"] = net.half_width if net else None
    row["net_energy_doubts"] = ", ".join(net_energy_doubts(m)) if net else None
    row["valid"] = not verdict(m)
    row["reasons"] = ", ".join(reasons(m))
    for name, value in m.config.items():
        if not isinstance(value, dict | list):
            row[f"config.{name}"] = value
    return row


def _distributions(m: Measurement) -> dict[str, Any]:
    """Mean and percentiles of every latency."""
    row: dict[str, Any] = {}
    latencies: dict[str, Callable[[Completion], Any]] = {
        "ttft_s": ttft_s, "itl_s": itl_s, "icl_s": icl_s, "tpot_s": tpot_s, "ntpot_s": ntpot_s, "e2e_s": e2e_s,
        "decode_s": decode_s, "queue_s": queue_s, "prefill_s": prefill_s,
        "schedule_delay_s": schedule_delay_s, "ttft_sched_s": ttft_sched_s, "e2e_sched_s": e2e_sched_s,
    }  # fmt: skip
    for name, metric in latencies.items():
        samples = values(m, metric)
        row[f"{name}_mean"] = mean(samples)
        row |= {f"{name}_p{q}": found for q, found in zip(PERCENTILES, percentiles(samples, PERCENTILES))}
    return row


def _figures(m: Measurement) -> dict[str, Any]:
    """Energies and what is made of them, each with its half-width."""
    row: dict[str, Any] = {}
    figures: dict[str, Callable[[Measurement], Figure | None]] = {
        "energy_j": energy_j,
        "energy_j_per_repeat": energy_j_per_repeat,
        "j_per_output_token": j_per_output_token,
        "j_per_input_token": j_per_input_token,
        "j_per_total_token": j_per_total_token,
        "j_per_request": j_per_request,
        "output_tokens_per_j": output_tokens_per_j,
        "energy_delay_js": energy_delay_js,
        "mean_power_w": mean_power_w,
    }
    for name, of in figures.items():
        figure = of(m)
        row[name] = figure.value if figure else None
        row[f"{name}_half_width"] = figure.half_width if figure else None
    return row
