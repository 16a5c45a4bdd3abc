"""The phases of a measurement as spans of time, for a figure's background.

The one idea: of the two ways to divide a run, the one that a reader can see: prefill and decode where they take turns, or
else how full the engine was. Their energy stands behind the name, or the code that says why it is not known. Not covered:
the energies themselves (`phases`), drawing (`timeline`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from . import metrics, phases, shaping, steady
from .measurement import Measurement

MOST_SPANS = 200  # of one phase: more are no bands but noise


def of(m: Measurement) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """Name, text for the legend and spans (ns) of each phase: prefill and decode where less than a tenth of the work is
    mixed, or else idle, ramp, steady state and drain. Empty without requests, or with too many spans to tell apart."""
    if not m.completions:
        return []
    found = _work(m)
    seconds = {name: sum(b - a for a, b in spans) for name, spans in found.items()}
    mixed = seconds.get("prefill and decode mixed", 0)
    if mixed > sum(seconds.values()) / 10 or max(map(len, found.values()), default=0) > MOST_SPANS:
        found = _load(m)
    if max(map(len, found.values()), default=0) > MOST_SPANS:
        return []
    told = _known(m, found)
    return [(name, f"{name}{told.get(name, '')}", spans) for name, spans in found.items() if spans]


def _work(m: Measurement) -> dict[str, list[tuple[int, int]]]:
    states = shaping.states(m.completions, m.t0_ns, m.t1_ns)
    names = {shaping.PREFILL: "prefill", shaping.DECODE: "decode", shaping.MIXED: "prefill and decode mixed"}
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in names.values()}
    stretches = itertools.groupby(range(len(states.code) - 1), lambda i: int(states.code[i]))
    for code, inside in stretches:
        at = list(inside)
        if code in names:
            found[names[code]].append((int(states.t_ns[at[0]]), int(states.t_ns[at[-1] + 1])))
    return found


def _load(m: Measurement) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {"idle": [], "ramp": [], "steady": [], "drain": []}
    pause_ns = m.t0_ns
    for _, run in steady.of_repeats(m):
        if run is not None:
            found["idle"].append((pause_ns, run.begin_ns))
            pause_ns = run.end_ns
            for name, span in run.spans.items():
                found[name].append(span)
    found["idle"].append((pause_ns, m.t1_ns))
    least = {"idle": phases.LEAST_IDLE_NS}
    return {name: [s for s in spans if s[1] - s[0] >= least.get(name, 1)] for name, spans in found.items()}


def _known(m: Measurement, found: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the phases' energy or power, or why it is not, to stand behind their names."""
    told = {}
    if "decode" in found and (split := phases.split(m)):
        for name, phase in (("prefill", split.prefill), ("decode", split.decode)):
            known = _quantity(phase.figure, "J") if phase.figure else f"energy not known, {', '.join(phase.reasons)}"
            told[name] = f": {known}"
    elif "steady" in found:
        for name, load in (phases.loads(m) or {}).items():
            told[name] = f": {_quantity(load.power, 'W')}" if load.power else ""
    return told


def _quantity(figure: metrics.Figure, unit: str) -> str:
    return figure.told(unit) + (", MODELLED" if figure.method == "model" else "")
