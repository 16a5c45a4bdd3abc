"""Phases of a run: prefill against decode, and idle, ramp, steady state and drain.

The one idea: a phase is a set of instants that the requests' own events give, and its energy is that of those instants. An
energy that the meter cannot tell apart is not told: None, with the code that says why.

    prefill, decode   `split`: instants at which only the one or the other was at work; mixed ones by tokens, within bounds
    idle to drain     `loads`: windows of one run, each by `curve.energy_between`
    of each request   `per_request` (`attribution`)

Prefill begins when the engine schedules a request, where it tells (`Completion.prefill_ns`); else at dispatch, and then a
queue in the engine is in it. While a request was out of the engine's batch, where that is told (`Completion.preempted_ns`),
it was at neither, and what is then computed again is prefill. Not covered: what the engine did inside a step that holds
prompts and decoding requests, and what it found in its cache when it computed a request again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import baseline, metrics, shaping, steady
from .attribution import Shares, per_request  # noqa: F401 (users find them here)
from .curve import energy_between
from .measurement import Measurement, Repeat
from .metrics import Figure
from .statistics import stdev, student_t

LEAST_IDLE_NS = 200_000_000  # a shorter pause is not taken for idling


class Phase(NamedTuple):
    """Gross energy of one phase, J. `figure` is None where the window does not resolve it, and then `reasons` (codes of
    `measurement.REASONS`) says why. `method`: how it was found, for people."""

    figure: Figure | None
    reasons: tuple[str, ...]
    method: str


class Split(NamedTuple):
    """`mixed_j` is the energy of instants at which both phases were at work; each phase holds its share of it. `rest_j` is
    that while no request was at work. The two phases, resolved or not, and the rest are the total."""

    prefill: Phase
    decode: Phase
    mixed_j: float
    rest_j: float


class Load(NamedTuple):
    """A part of a run. `energy` (J) and `power` (W) are None where they are not known, and then `reasons` says why.
    `method`: who was counted as at work, for people."""

    seconds: float
    energy: Figure | None
    power: Figure | None
    output_tokens: int
    reasons: tuple[str, ...] = ()
    method: str = ""


def split(m: Measurement) -> Split | None:
    """Energy of prefill and of decode over the repeats. None without requests, or where the total or its course is unknown.

        E   = energy of the phase alone + q * E_mixed      q: its share of the tokens/s at work
        u   = hypot(t * se, uneven, timing, spread, total) + max(q, 1 - q) * E_mixed      with a model's own error besides
        se  = sqrt((seconds * se of P)^2 + sum f (1 - f) noise^2) over the pieces that the phase shares with another state
        uneven = sum of P / 10 * f (1 - f) * T over them: a power that moves within a state does so alike each time
        timing = shift * |sum over the phase's stretches of (power before - power after)|
        spread = that between repeats, as in `metrics.energy_j`;  total = the windows' own intervals * E / their energy

    Noise is of each piece by itself: with n batches it grows as sqrt(n), the energy as n. A phase whose u, less the model's
    error, exceeds half of E is not given: "phases_mixed" where the mixed part is to blame, else "phase_too_short".
    """
    total = metrics.energy_j(m)
    if total is None or not m.completions:
        return None
    found = shaping.states(m.completions, m.t0_ns, m.t1_ns)
    courses = shaping.courses(m, total.keys, found)
    parts = [_of_states(w, total.keys, courses, found) for w in m.repeats or (m,)] if courses else []
    known = [part for part in parts if part is not None]
    if courses is None or len(known) < len(parts):
        return None
    mixed_j = sum(part[shaping.MIXED] for part, _ in known)
    begin = "dispatch" if any(c.scheduled_ns is None for c in m.completions) else "schedule"
    phases = []
    for state in (shaping.PREFILL, shaping.DECODE):
        shared = [q if state == shaping.PREFILL else part[shaping.MIXED] - q for part, q in known]
        each = [part[state] + mine for (part, _), mine in zip(known, shared)]
        halves = [half for course in courses for half in _half_widths(course, found, state)]
        n = len(each)
        halves.append(student_t(n - 1) * stdev(each) * math.sqrt(n) if n > 1 else 0.0)
        halves.append(sum(each) * _own_share(m, total))
        bound = max(sum(shared), mixed_j - sum(shared))
        method = _method(courses, state, begin, mixed_j / total.value)
        phases.append(_phase(m, total, sum(each), math.hypot(*halves), bound, method))
    return Split(phases[0], phases[1], mixed_j, sum(part[shaping.NOTHING] for part, _ in known))


def _of_states(
    window: Repeat | Measurement, keys: Sequence[str], courses: Sequence[shaping.Shaped], found: shaping.States
) -> tuple[list[float], float] | None:
    """Joules of each state in one repeat, and those of the mixed one that are prefill's."""
    import numpy as np

    inside = found.t_ns[(found.t_ns > window.t0_ns) & (found.t_ns < window.t1_ns)]
    cuts = np.concatenate([[window.t0_ns], inside, [window.t1_ns]])
    at = np.searchsorted(found.t_ns, cuts[:-1], "right") - 1
    joules = np.zeros(len(at))
    for key, course in zip(keys, courses):
        steps = np.diff(course.line.at(cuts))
        if not steps.sum() > 0.0:
            return None
        joules += steps * ((window.energy[key].joules or 0.0) / steps.sum())
    code = found.code[at]
    prefill_j = (joules * found.prefill_share[at])[code == shaping.MIXED].sum()
    return np.bincount(code, joules, 6).tolist(), float(prefill_j)


def _half_widths(course: shaping.Shaped, found: shaping.States, state: int) -> tuple[float, float, float]:
    """What noise, unevenness and timing leave open of a state's energy in one domain, J (`split`)."""
    divided = course.several & (course.seconds[:, state] > 0)
    seconds = course.seconds[divided, state]
    f = seconds / course.seconds[divided].sum(axis=1)
    variance = seconds.sum() ** 2 * course.covariance[state, state] + (f * (1 - f)).sum() * course.noise_j**2
    uneven = (course.joules[divided] / 10 * f * (1 - f)).sum()
    before, after = found.code[:-1], found.code[1:]
    entered, left = before[(after == state) & (before != state)], after[(before == state) & (after != state)]
    timing = abs(course.power_w[entered].sum() - course.power_w[left].sum()) * course.line.shift_ns * 1e-9
    return course.t * math.sqrt(variance), float(uneven), float(timing)


def _own_share(m: Measurement, total: Figure) -> float:
    """What the meter leaves open of the total, as a part of it; without what a model's error adds."""
    parts = [window.energy[key] for window in m.repeats or (m,) for key in total.keys]
    models = [m.trace.domains[e.key].relative_error * (e.joules or 0.0) for e in parts]
    return math.sqrt(sum(max((e.uncertainty_j or 0.0) ** 2 - x**2, 0.0) for e, x in zip(parts, models))) / total.value


def _phase(m: Measurement, total: Figure, value: float, noise: float, bound: float, method: str) -> Phase:
    if not (value > 0 and noise + bound <= value / 2):
        return Phase(None, ("phases_mixed" if bound > noise else "phase_too_short",), method)
    model = value * max(m.trace.domains[key].relative_error for key in total.keys)
    return Phase(total._replace(value=value, half_width=math.hypot(noise + bound, model), model_half=model), (), method)


def _method(courses: Sequence[shaping.Shaped], state: int, begin: str, mixed: float) -> str:
    pieces = sum(int((course.seconds[:, state] > 0).sum()) for course in courses)
    divided = sum(int((course.several & (course.seconds[:, state] > 0)).sum()) for course in courses)
    span = f"{begin} to first event" if state == shaping.PREFILL else "first to last event"
    return (
        f"{span}, in {pieces} pieces that the meter resolves; {divided} of them hold another state, too, and are divided by "
        f"fitted powers; {mixed:.0%} of the energy is of mixed instants and shared by tokens"
    )


# --- partial load -----------------------------------------------------------------------------------------------------


def loads(m: Measurement, share: float = 0.9) -> dict[str, Load] | None:
    """Energy and mean power of "idle", "ramp", "steady" and "drain", over all repeats. None without requests or a total.

    Ramp, steady and drain are those of `steady.phases_of_run`, by the engine's own steps where the record has them; idle is
    the rest of the window, in pauses of at least 0.2 s. A run without one has the power of the session's idle baseline
    there, if any, and no energy. The half-widths are those of `energy_between`, in quadrature over spans and domains; a
    model's error is added whole.
    """
    total = metrics.energy_j(m)
    if total is None or not m.completions:
        return None
    spans: dict[str, list[tuple[int, int]]] = {"idle": [], "ramp": [], "steady": [], "drain": []}
    tokens = dict.fromkeys(spans, 0)
    methods: list[str] = []
    pause_ns = m.t0_ns
    for mine, found in steady.of_repeats(m, share):
        if found is None:
            return None
        methods.append(found.method)
        for name, span in found.spans.items():
            spans[name].append(span)
            tokens[name] += steady.output_tokens_between(mine, *span)
        spans["idle"].append((pause_ns, found.begin_ns))
        pause_ns = found.end_ns
    spans["idle"] = [s for s in (*spans["idle"], (pause_ns, m.t1_ns)) if s[1] - s[0] >= LEAST_IDLE_NS]
    parts = {name: _load(m, total, [s for s in spans[name] if s[1] > s[0]], tokens[name]) for name in spans}
    parts = {name: part._replace(method="; ".join(dict.fromkeys(methods))) for name, part in parts.items()}
    known = baseline.chosen(m)
    if not spans["idle"] and known is not None and all(key in known["power_w"] for key in total.keys):
        powers = [known["power_w"][key] for key in total.keys]
        half = math.hypot(*(p["half_width"] for p in powers))
        own = sum(p["watts"] * m.trace.domains[key].relative_error for key, p in zip(total.keys, powers))
        power = total._replace(value=sum(p["watts"] for p in powers), half_width=half, model_half=own)
        parts["idle"] = parts["idle"]._replace(power=power)
    return parts


def _load(m: Measurement, total: Figure, spans: Sequence[tuple[int, int]], tokens: int) -> Load:
    seconds = sum(t1_ns - t0_ns for t0_ns, t1_ns in spans) / 1e9
    value = noise = own = 0.0
    reasons: list[str] = []
    unknown = not spans
    for t0_ns, t1_ns in spans:
        for key in total.keys:
            part = energy_between(m.trace, key, t0_ns, t1_ns)
            reasons += part.reasons
            if part.joules is None or part.uncertainty_j is None:
                unknown = True
                continue
            error = m.trace.domains[key].relative_error * part.joules
            value, own = value + part.joules, own + error
            noise += max(part.uncertainty_j**2 - error**2, 0.0)
    codes = tuple(dict.fromkeys(reasons)) if spans else ("too_short",)
    if unknown:
        return Load(seconds, None, None, tokens, codes)
    energy = total._replace(value=value, half_width=math.sqrt(noise + own**2), model_half=own)
    return Load(seconds, energy, energy.scaled(1 / seconds), tokens, codes)


def steady_j_per_output_token(m: Measurement, share: float = 0.9) -> Figure | None:
    """Gross energy of the steady state / output tokens that came in it, J per token."""
    found = loads(m, share)
    full = found["steady"] if found else None
    return full.energy.scaled(1 / full.output_tokens) if full and full.energy and full.output_tokens else None


def summary(m: Measurement) -> Mapping[str, Any]:
    """Columns of `lem.frame`. Unknown is None."""
    parts = split(m)
    figures = {
        "prefill_j": parts.prefill.figure if parts else None,
        "decode_j": parts.decode.figure if parts else None,
        "steady_j_per_output_token": steady_j_per_output_token(m),
    }
    row: dict[str, Any] = {}
    for name, figure in figures.items():
        row[name] = figure.value if figure else None
        row[f"{name}_half_width"] = figure.half_width if figure else None
    return row
