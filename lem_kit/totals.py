"""The energy of a measurement: what makes up its total, with which interval, and whether it can be believed.

The one idea: sources that see the same hardware are never added up. A total takes one source for each scope, the best that
there is, and carries the names of its parts, the worst of their methods and the half-width of a 95 % interval.

Not covered: energy by denominator (`metrics`, which has these functions too), by phase and by request (`phases`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import baseline as baselines
from .measurement import Energy, Measurement, Repeat, both_figures
from .statistics import stdev, student_t

# Methods from best to worst. A modelled figure enters a total only where asked for.
PREFERENCE = ("counter", "integral", "model")
# How each is told to a person.
METHODS = {
    "counter": "measured by a counter",
    "integral": "integrated from measured power",
    "model": "MODELLED, not measured",
}


def measured_s(m: Measurement) -> float:
    """Seconds inside the repeats, or of the whole window where there are none."""
    return sum(r.duration_s for r in m.repeats) if m.repeats else m.duration_s


class Figure(NamedTuple):
    """A number with the half-width of its 95 % interval and where it came from."""

    value: float
    half_width: float
    keys: tuple[str, ...]  # "source:domain" of every part
    method: str  # the worst method among the parts
    scopes: tuple[str, ...]
    model_half: float = 0.0  # of the half-width, what a model's own error is: alike in every window, whatever its length

    def scaled(self, factor: float) -> Figure:
        return self._replace(
            value=self.value * factor, half_width=self.half_width * factor, model_half=self.model_half * factor
        )

    @property
    def resolved(self) -> bool:
        """Whether the interval, without a model's own error, stays clear of 0."""
        return self.half_width**2 - self.model_half**2 < self.value**2

    def told(self, unit: str) -> str:
        """ "12.34 ± 0.42 J", or "not resolved (below 1.9 J)"."""
        of = quantity if self.resolved else unresolved
        return of(self.value, self.half_width, unit)


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
    return Figure(sum(sums), half, keys, worst, tuple(sorted({e.scope for e in per_window[0]})), sum(systematic))


def _systematic_j(m: Measurement, e: Energy) -> float:
    """A model's error: the same in every repeat, and perhaps in every domain, so these add up as they are."""
    return (e.joules or 0.0) * m.trace.domains[e.key].relative_error if e.key in m.trace.domains else 0.0


def energy_j_per_repeat(m: Measurement) -> Figure | None:
    """Gross energy per repeat, J, with interval."""
    total = energy_j(m)
    return total.scaled(1 / max(len(m.repeats), 1)) if total else None


def energy_delay_js(m: Measurement) -> Figure | None:
    """Energy-delay product, J s: energy per repeat x seconds per repeat (Horowitz et al. 1994). Halving the time at the same
    energy halves it, so it compares settings that trade one for the other; only for the same requests."""
    each = energy_j_per_repeat(m)
    return each.scaled(measured_s(m) / max(len(m.repeats), 1)) if each else None


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


def net_energy_absent(m: Measurement) -> str | None:
    """Why there is no `net_energy_j`, where the energy is known and a baseline was measured, or asked for; else None."""
    total, found = energy_j(m), baselines.chosen(m)
    if total is None or net_energy_j(m) is not None or m.kind == "idle":
        return None
    if found is None:
        return "no baseline was measured" if m.config.get("baseline") else None
    why = found.get("unknown", {})
    silent = [f"{key} ({', '.join(why[key])})" if key in why else key for key in total.keys if key not in found["power_w"]]
    return f"the baseline ({found['kind']}) tells no power of {', '.join(silent)}"


def net_energy_doubts(m: Measurement, baseline: Measurement | str | None = None) -> list[str]:
    """Codes that speak against the baseline of `net_energy_j`; none where there is no such figure."""
    total, found = energy_j(m), baselines.chosen(m, baseline)
    if total is None or found is None or net_energy_j(m, baseline) is None:
        return []
    return baselines.reasons(m, found, total.keys)


def inverse(figure: Figure) -> Figure:
    """1 / figure, with the same relative half-width (first order: good while that is small)."""
    return figure.scaled(1 / figure.value**2)._replace(value=1 / figure.value)


def mean_power_w(m: Measurement) -> Figure | None:
    """Mean power, W: energy / duration of the same interval. Between repeats, what counts is the spread of E - P * t (the
    ratio estimator's residuals): a repeat that takes longer at the same power has no other power."""
    total, seconds = energy_j(m), measured_s(m)
    if total is None or not seconds > 0:
        return None
    watts = total.value / seconds
    residual = _summed_j(m, energy_j(m, False) is None, {total.keys[0]: watts})
    return residual.scaled(1 / seconds)._replace(value=watts) if residual else None


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


def unresolved(value: float, half_width: float, unit: str) -> str:
    """A figure whose interval reaches 0: only its bounds are known."""
    low, high = (
        f"{bound:.{0 if abs(bound) >= 100 else 2}{'f' if abs(bound) >= 100 else 'g'}}"
        for bound in (value - half_width, value + half_width)
    )
    bounds = f"below {high}" if value > 0 else f"between {low} and {high}"
    return f"not resolved ({f'{bounds} {unit}'.strip()})"


# --- the verdict ------------------------------------------------------------------------------------------------------

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
    if found or total:
        return found
    starting = any("source_starting" in told for told in (m.reasons, *(e.reasons for e in m.energy.values())))
    return ["source_starting" if starting else "no_reading" if m.energy else "no_source"]


def reasons(m: Measurement) -> list[str]:
    """Every reason code that touches this record, its own first, then those of its energies."""
    codes = list(m.reasons)
    for e in m.energy.values():
        codes.extend(e.reasons)
    return list(dict.fromkeys(codes))
