"""Metrics: pure functions from a Measurement to a number, each with formula, unit and source; those of one request, from
`latency`, are here too.

Definitions version 1. Denominators and units stand in the names. A metric that was not observed is None.

Not covered here: goodput (`goodput`), steady-state windows (`steady`), FLOPs (`flops`), energy by phase and by request
(`phases`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import baseline as baselines
from .backends import COUNTERS
from .hardware import gpu_utilization, peak_memory_used_bytes, peak_power_w, precision, quantization  # noqa: F401 (as below)
from .latency import (  # noqa: F401 (users find them here)
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
    prefill_s,
    queue_s,
    schedule_delay_s,
    tpot_s,
    ttft_s,
    ttft_sched_s,
    values,
)
from .measurement import Completion, Energy, Measurement, Repeat, both_figures
from .statistics import stdev, student_t

DEFINITIONS_VERSION = 1

# Methods from best to worst. A modelled figure enters a total only where asked for.
PREFERENCE = ("counter", "integral", "model")
# How each is told to a person.
METHODS = {
    "counter": "measured by a counter",
    "integral": "integrated from measured power",
    "model": "MODELLED, not measured",
}


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


def total_tokens(m: Measurement) -> int | None:
    """Input plus output tokens."""
    n_in, n_out = input_tokens(m), output_tokens(m)
    return n_in + n_out if n_in is not None and n_out is not None else None


def completed_requests(m: Measurement) -> int | None:
    """Requests that completed without error; None for a measurement without requests."""
    return sum(c.error is None for c in m.completions) if m.completions else None


def measured_s(m: Measurement) -> float:
    """Seconds inside the repeats, or of the whole window where there are none."""
    return sum(r.duration_s for r in m.repeats) if m.repeats else m.duration_s


def output_tokens_per_s(m: Measurement) -> float | None:
    """Output throughput, tokens/s: output tokens / measured seconds. (vLLM bench "output_throughput"; there without the
    tokens of failed requests, which were generated, cost energy and count here.)"""
    tokens = output_tokens(m)
    return tokens / measured_s(m) if tokens is not None and measured_s(m) > 0 else None


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


class Figure(NamedTuple):
    """A number with the half-width of its 95 % interval and where it came from."""

    value: float
    half_width: float
    keys: tuple[str, ...]  # "source:domain" of every part
    method: str  # the worst method among the parts
    scopes: tuple[str, ...]

    def scaled(self, factor: float) -> Figure:
        return self._replace(value=self.value * factor, half_width=self.half_width * factor)


def chosen(energy: Mapping[str, Energy], allow_model: bool = False) -> list[Energy]:
    """The energies that make up a total: per scope, all known domains of the one best source (counter, then integral).

    Sources are never added to each other within a scope, since they see the same hardware. Modelled figures are left out
    unless `allow_model`. A counter that was never seen to count is no source; one that missed this window still is, and
    leaves its scope unknown, so that what a total is made of does not change from window to window.
    """
    parts: list[Energy] = []
    methods = PREFERENCE if allow_model else PREFERENCE[:-1]
    known = [e for e in energy.values() if e.method in methods and e.reasons != ("not_advancing",)]
    for scope in sorted({e.scope for e in known}):
        here = [e for e in known if e.scope == scope]
        sources = {e.source for e in here}
        best = min(sources, key=lambda s: (min(methods.index(e.method) for e in here if e.source == s), s))
        of_best = [e for e in here if e.source == best]
        if all(e.joules is not None for e in of_best):  # half of the GPUs is not the total of the GPUs
            parts.extend(of_best)
    return parts


def energy_j(m: Measurement, allow_model: bool | None = None) -> Figure | None:
    """Gross energy, J, over the repeats (or the whole window), with interval; None if no chosen source knows it.

    With repeats, the half-width is that of their sum: n * hypot(t * s / sqrt(n), sqrt(sum u_i^2) / n), s being the spread
    between repeats and t Student's 97.5 % quantile, so that it covers both what differs from run to run and what the
    meter adds. A model's relative error does not average out and is added at its full size. `allow_model` None: only
    when nothing was measured.
    """
    if allow_model is None:
        return energy_j(m, False) or energy_j(m, True)
    return _summed_j(m, allow_model, {})


def _summed_j(m: Measurement, allow_model: bool, idle_w: Mapping[str, float]) -> Figure | None:
    """As `energy_j`, of what each repeat used above `idle_w` by "source:domain"."""
    windows: Sequence[Repeat | Measurement] = m.repeats or (m,)
    per_window = [chosen(w.energy, allow_model) for w in windows]
    keys = tuple(sorted(e.key for e in per_window[0]))
    if not keys or any(tuple(sorted(e.key for e in parts)) != keys for parts in per_window):
        return None
    sums = [  # `chosen` leaves no None
        sum((e.joules or 0.0) - idle_w.get(e.key, 0.0) * window.duration_s for e in parts)
        for window, parts in zip(windows, per_window)
    ]
    flat = [e for parts in per_window for e in parts]
    systematic = [_systematic_j(m, e) for e in flat]
    noise = [max((e.uncertainty_j or 0.0) ** 2 - s**2, 0.0) for e, s in zip(flat, systematic)]
    n = len(sums)
    spread = student_t(n - 1) * stdev(sums) * math.sqrt(n) if n > 1 else 0.0
    half = math.sqrt(spread**2 + sum(noise) + sum(systematic) ** 2)
    worst = max((e.method for e in per_window[0]), key=PREFERENCE.index)
    return Figure(sum(sums), half, keys, worst, tuple(sorted({e.scope for e in per_window[0]})))


def _systematic_j(m: Measurement, e: Energy) -> float:
    """A model's error: the same in every repeat, and perhaps in every domain, so these add up as they are."""
    return (e.joules or 0.0) * m.trace.domains[e.key].relative_error if e.key in m.trace.domains else 0.0


def energy_j_per_repeat(m: Measurement) -> Figure | None:
    """Gross energy per repeat, J, with interval."""
    total = energy_j(m)
    return total.scaled(1 / max(len(m.repeats), 1)) if total else None


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


def net_energy_j(m: Measurement, baseline: Measurement | str | None = None) -> Figure | None:
    """Net energy, J: gross energy - idle power * measured seconds; negative where the baseline was no baseline.

    `baseline`: an idle Measurement, or the kind of one taken in the same session ("engine", "context", "bare"); the most
    specific there is by default. None without one, or where it does not know all that the gross figure is made of. The
    half-width is that of `energy_j` with the spread between repeats of their *net* energies, since a repeat that took longer
    idled longer; joined with the baseline's own times the seconds. `net_energy_doubts` tells what speaks against it.
    """
    measured = energy_j(m, False) is not None
    total, found = energy_j(m), baselines.chosen(m, baseline)
    if total is None or found is None or any(key not in found["power_w"] for key in total.keys):
        return None
    idle = {key: found["power_w"][key] for key in total.keys}
    net = _summed_j(m, not measured, {key: power["watts"] for key, power in idle.items()})
    if net is None:
        return None
    seconds = measured_s(m)
    return net._replace(half_width=math.hypot(net.half_width, *(p["half_width"] * seconds for p in idle.values())))


def net_energy_doubts(m: Measurement, baseline: Measurement | str | None = None) -> list[str]:
    """Codes that speak against the baseline of `net_energy_j`; none where there is no such figure."""
    total, found = energy_j(m), baselines.chosen(m, baseline)
    if total is None or found is None or net_energy_j(m, baseline) is None:
        return []
    return baselines.reasons(m, found, total.keys)


def output_tokens_per_j(m: Measurement) -> Figure | None:
    """Output tokens / gross energy, tokens per J, the inverse of `j_per_output_token`."""
    per_token = j_per_output_token(m)
    return inverse(per_token) if per_token else None


def energy_delay_js(m: Measurement) -> Figure | None:
    """Energy-delay product, J s: energy per repeat x seconds per repeat (Horowitz et al. 1994). Halving the time at the same
    energy halves it, so it compares settings that trade one for the other; only for the same requests."""
    each = energy_j_per_repeat(m)
    return each.scaled(measured_s(m) / max(len(m.repeats), 1)) if each else None


def inverse(figure: Figure) -> Figure:
    """1 / figure, with the same relative half-width (first order: good while that is small)."""
    return figure._replace(value=1 / figure.value, half_width=figure.half_width / figure.value**2)


def mean_power_w(m: Measurement) -> Figure | None:
    """Mean power, W: energy / duration of the same interval. Between repeats, what counts is the spread of E - P * t (the
    ratio estimator's residuals): a repeat that takes longer at the same power has no other power."""
    total, seconds = energy_j(m), measured_s(m)
    if total is None or not seconds > 0:
        return None
    watts = total.value / seconds
    residual = _summed_j(m, energy_j(m, False) is None, {total.keys[0]: watts})
    return residual._replace(value=watts, half_width=residual.half_width / seconds) if residual else None


def agreement(energy: Mapping[str, Energy]) -> dict[str, float]:
    """Integrated power / counter - 1 for each device that has both, keyed by the counter's "source:domain"."""
    return {counter.key: integral_j / counter_j - 1 for counter, _, counter_j, integral_j in both_figures(energy)}


def quantity(value: float, half_width: float | None, unit: str) -> str:
    """ "12.34 ± 0.42 J": as many digits as the interval leaves meaning, which are two of its own."""
    if half_width is None or not half_width > 0:
        return f"{value:.4g} {unit}".strip()
    digits = max(0, 1 - math.floor(math.log10(half_width)))
    if digits > 7:
        return f"{value:.3e} ± {half_width:.1e} {unit}".strip()
    return f"{value:.{digits}f} ± {half_width:.{digits}f} {unit}".strip()


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
        "output_tokens": output_tokens(m),
        "output_tokens_per_s": output_tokens_per_s(m),
        "requests_per_s": requests_per_s(m),
        "planned_requests_per_s": planned_requests_per_s(m),
        "achieved_requests_per_s": achieved_requests_per_s(m),
        "preemptions": preemptions(m),
        "loop_lag_s": m.loop_lag_s,
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
        "ttft_s": ttft_s, "itl_s": itl_s, "tpot_s": tpot_s, "e2e_s": e2e_s, "decode_s": decode_s,
        "queue_s": queue_s, "prefill_s": prefill_s,
        "schedule_delay_s": schedule_delay_s, "ttft_sched_s": ttft_sched_s, "e2e_sched_s": e2e_sched_s,
    }  # fmt: skip
    for name, metric in latencies.items():
        samples = values(m, metric)
        row[f"{name}_mean"] = mean(samples)
        for q in (50, 90, 99):
            row[f"{name}_p{q}"] = percentile(samples, q)
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


# Codes that leave a measurement's total without its meaning. The others are remarks.
AGAINST = frozenset(
    ("no_source", "failed", "interrupted", "source_failed", "gpu_lost", "no_permission", "no_reading", "not_advancing",
     "too_short", "unresolved", "counter_went_back", "counter_stuck", "implausible", "sampling_gap", "sources_disagree",
     "other_gpu_in_use", "foreign_process", "host_shared", "throttled", "requests_failed"),
)  # fmt: skip


def verdict(m: Measurement) -> list[str]:
    """The codes that make this measurement invalid; empty for a valid one. Sources outside the total do not count."""
    total = energy_j(m)
    windows = [m.energy, *(r.energy for r in m.repeats)]
    parts = [energy[key] for energy in windows for key in (total.keys if total else energy) if key in energy]
    codes = [*m.reasons, *(code for e in parts for code in e.reasons)]
    if m.repeats and total:  # the gaps between repeats belong to the whole window only
        codes = [*m.reasons, *(code for r in m.repeats for key in total.keys for code in r.energy[key].reasons)]
    found = [code for code in dict.fromkeys(codes) if code in AGAINST]
    return found or ([] if total else ["no_source" if not m.energy else "no_reading"])


def reasons(m: Measurement) -> list[str]:
    """Every reason code that touches this record, its own first, then those of its energies."""
    codes = list(m.reasons)
    for e in m.energy.values():
        codes.extend(e.reasons)
    return list(dict.fromkeys(codes))
