"""Idle baselines: what a machine draws before the work whose energy is wanted, and net energy above it.

The one idea: three kinds of idle cost different power and answer different questions: "bare" (no process of ours on the
GPU), "context" (CUDA is running, no model), "engine" (the model is loaded and waits). Gross energy is what was measured; net
is what is left above a baseline, and may be negative: then the baseline was not one, and hiding that would hide it.

    net   = E - P_idle * t
    u_net = sqrt(u^2 + (u_P * t)^2)           u: meter, and spread between repeats, of E - P_idle * t of each repeat;
                                              u_P: spread between seconds of idling, and the meter's own interval

Not covered: taking a baseline (`Session.idle`).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .backends import RESIDENT
from .curve import energy_between
from .errors import LemError, nearest
from .measurement import Measurement
from .statistics import stdev, student_t
from .trace import gauge_summary

KINDS = ("engine", "context", "bare")  # from the most to the least specific
LARGEST_TEMPERATURE_C = 10.0
LARGEST_SPREAD = 0.1


class Power(NamedTuple):
    """Watts with the half-width of their 95 % interval."""

    watts: float
    half_width: float


def kind_now(asked: str | None) -> str:
    """The kind of idle that this process is in; CUDA is started where "context" is asked for. LemError where it is not what
    was asked for, and cannot be made so."""
    if asked is not None and asked not in KINDS:
        raise LemError(f"idle() knows no kind '{asked}': {nearest(asked, KINDS)}")
    if RESIDENT and asked != "engine" and asked is not None:
        raise LemError(
            f"An engine holds its model in processes of its own: measure idle(kind='{asked}') before it is loaded."
        )
    if RESIDENT:
        return "engine"
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    running = cuda is not None and cuda.is_initialized()
    holding = running and cuda is not None and cuda.memory_allocated() > 0
    if asked == "bare" and running:
        raise LemError("CUDA runs in this process already: measure idle(kind='bare') before the first use of the GPU.")
    if asked == "context" and holding:
        raise LemError("This process holds GPU memory: measure idle(kind='context') before a model is loaded.")
    if asked == "context" and not running:
        if cuda is None or not cuda.is_available():
            raise LemError("idle(kind='context') needs torch, imported, with a GPU that it can use; kind='bare' does not.")
        cuda.init()
        cuda.synchronize()
    return asked or ("engine" if holding else "context" if running else "bare")


def of(idle: Measurement) -> dict[str, Any]:
    """The baseline that an idle Measurement gives, as strict JSON: power of each domain, or why it is unknown, temperatures,
    when and where."""
    parts = max(1, min(10, int(idle.duration_s)))
    edges = [idle.t0_ns + (idle.t1_ns - idle.t0_ns) * k // parts for k in range(parts + 1)]
    powers = {key: found for key in idle.energy if (found := _power(idle, key, edges)) is not None}
    gauges = gauge_summary(idle.trace, idle.t0_ns, idle.t1_ns)
    return {
        "kind": idle.config.get("baseline", "bare"),
        "run_id": idle.run_id,
        "started_at": idle.started_at,
        "power_w": {key: power._asdict() for key, power in powers.items()},
        "temperature_c": {key: g["mean"] for key, g in gauges.items() if key.endswith(".temperature_c")},
        "unknown": {key: list(e.reasons) for key, e in idle.energy.items() if key not in powers},
        "labels": {key: domain.label for key, domain in idle.trace.domains.items()},
    }


def _power(idle: Measurement, key: str, edges: Sequence[int]) -> Power | None:
    whole = idle.energy[key]
    if whole.joules is None or whole.uncertainty_j is None:
        return None
    spread = 0.0
    parts = [energy_between(idle.trace, key, a, b) for a, b in itertools.pairwise(edges)]
    watts = [part.joules / (b - a) * 1e9 for part, a, b in zip(parts, edges, edges[1:]) if part.joules is not None]
    if len(watts) > 1:
        spread = student_t(len(watts) - 1) * stdev(watts) / math.sqrt(len(watts))
    return Power(whole.joules / idle.duration_s, math.hypot(spread, whole.uncertainty_j / idle.duration_s))


def chosen(m: Measurement, baseline: Measurement | str | None = None) -> dict[str, Any] | None:
    """The baseline to use for `m`: the given one, the one of that kind in its session, or the most specific there is."""
    if isinstance(baseline, Measurement):
        return of(baseline)
    if baseline is not None:
        return m.baselines.get(baseline)
    return next((m.baselines[kind] for kind in KINDS if kind in m.baselines), None)


def reasons(m: Measurement, baseline: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Codes that speak against using `baseline` for the joules of `keys` in `m`: another device, day or temperature, or too
    much spread."""
    codes = []
    labels = {key: domain.label for key, domain in m.trace.domains.items()}
    other = any(labels.get(key, label) != label for key, label in baseline["labels"].items())
    if other or baseline["started_at"][:10] != m.started_at[:10]:
        codes.append("baseline_stale")
    gauges = gauge_summary(m.trace, m.t0_ns, m.t1_ns)
    apart = [abs(gauges[key]["min"] - degrees) for key, degrees in baseline["temperature_c"].items() if key in gauges]
    if apart and max(apart) > LARGEST_TEMPERATURE_C:
        codes.append("baseline_temperature")
    used = [baseline["power_w"][key] for key in keys if key in baseline["power_w"]]
    if any(p["half_width"] > LARGEST_SPREAD * p["watts"] for p in used):
        codes.append("baseline_unsteady")
    return codes
