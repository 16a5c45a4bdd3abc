"""How a Measurement looks in a notebook and in a terminal.

The one idea: JupyterLab strips style, script and inline SVG from a notebook it does not trust, which every executed copy is;
tables, details and images by data URI stay. So the card is made of those. Every text that comes from a user is escaped. The
record travels in the output's metadata, where nbval does not compare it. Not covered: figures (`report`).
"""

from __future__ import annotations

import base64
from html import escape
from typing import Any, NamedTuple

from .. import baseline, flops, metrics
from ..curve import mean_power_w
from ..measurement import REASONS, Energy, Measurement, jsonable

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48


def mimebundle(m: Measurement) -> tuple[dict[str, str], dict[str, Any]]:
    """The card as text and HTML, with the record as metadata."""
    shown = Shown(_rows(m), _notes(m), _powers(m))
    return {"text/plain": text(m, shown), "text/html": html(m, shown)}, {"lem_kit": record(m)}


class Shown(NamedTuple):
    """What both forms of a card are made of; looked up once, for a user waits for the card."""

    rows: list[tuple[str, str]]
    notes: list[str]
    powers: list[float]


def record(m: Measurement) -> dict[str, Any]:
    """What a program may want from a card, small and strict JSON. The whole record is what `store.save` writes."""
    kept = ("schema_version", "run_id", "kind", "label", "status", "started_at", "duration_s", "output_tokens", "config")
    energies = {
        key: {"joules": e.joules, "uncertainty_j": e.uncertainty_j, "method": e.method} for key, e in m.energy.items()
    }
    return {
        **{name: jsonable(getattr(m, name)) for name in kept},
        "energy": energies,
        "reasons": metrics.reasons(m),
        "unavailable": dict(m.unavailable),
    }


def _rows(m: Measurement) -> list[tuple[str, str]]:
    """Name and text of every figure that is known."""
    rows = []
    if precision := metrics.precision(m):
        rows.append(("model", f"{((m.backend or {}).get('model') or {}).get('name')}, {precision}"))
    total = metrics.energy_j(m)
    if total is None:
        rows.append(("energy", "not known"))
    else:
        covers = f"{metrics.METHODS[total.method]}: {', '.join(total.keys)}; covers {', '.join(total.scopes)}"
        rows.append(("energy", f"{total.told('J')} ({covers})"))
    if len(m.repeats) > 1 and (each := metrics.energy_j_per_repeat(m)):
        rows.append(("per repeat", f"{each.told('J')} ({len(m.repeats)} repeats)"))
    if net := metrics.net_energy_j(m):
        kind = (baseline.chosen(m) or {}).get("kind")
        note = "; below idle: the baseline was none" if net.value + net.half_width < 0 else ""
        rows.append(("net of idle", f"{net.told('J')} (baseline: {kind}{note})"))
    elif why := metrics.net_energy_absent(m):
        rows.append(("net of idle", f"not known: {why}"))
    if per_token := metrics.j_per_output_token(m):
        rows.append(("per output token", per_token.told("J")))
    if (power := metrics.mean_power_w(m)) and power.resolved:  # else it says no more than the energy
        rows.append(("mean power", power.told("W")))
    for key, apart in metrics.agreement(m.energy).items():
        rows.append(("two figures", f"{key} and its integrated power differ by {100 * abs(apart):.2g} %"))
    rows.append(("time", f"{metrics.measured_s(m):.4g} s"))
    rows += _unfinished_rows(m)
    if (tokens := metrics.output_tokens(m)) is not None:
        rate = metrics.output_tokens_per_s(m)
        rows.append(("output tokens", f"{tokens}" + (f" ({rate:.4g} tokens/s)" if rate else "")))
    for name, metric in (("TTFT", metrics.ttft_s), ("TPOT", metrics.tpot_s)):
        middle = metrics.percentile(metrics.values(m, metric), 50)
        if middle is not None:
            rows.append((f"{name} median", f"{middle * 1e3:.4g} ms"))
    return rows + _hardware_rows(m)


def _unfinished_rows(m: Measurement) -> list[tuple[str, str]]:
    """Of a measurement that did not end well: what the figures are of."""
    rows = []
    if m.status != "ok" and m.repeats:
        ended, asked = len(m.repeats), m.config.get("repeats", m.config.get("repeat"))
        rows.append(
            (
                "repeats",
                f"{ended}{f' of {asked}' if asked else ''} ended; the figures are of {'it' if ended == 1 else 'them'}",
            )
        )
    if m.status != "ok" and m.completions:
        begun = len(m.completions) + len(m.broken_off)
        rows.append(("requests", f"{metrics.completed_requests(m)} completed of {begun} that were sent"))
    return rows


def _hardware_rows(m: Measurement) -> list[tuple[str, str]]:
    """What was reached beside the ceiling that it is a share of, and the memory that it took; where they are known."""
    rows = []
    for name, share, unit, of in (
        ("MFU", flops.mfu(m), "TFLOP/s", 1e12),
        ("decode bandwidth", flops.bandwidth_share(m), "GB/s", 1e9),
    ):
        if share:
            gpus = f"{len(share.gpus)} x {share.gpus[0]}" if len(set(share.gpus)) == 1 else ", ".join(share.gpus)
            reached = f"{share.achieved / of:.3g} of {share.ceiling / of:.5g} {unit}"
            rows.append((name, f"{100 * share.value:.2g} % ({reached}, {gpus}; found from: {share.method})"))
    if (peak := m.counters.get("peak_memory_bytes")) is not None:
        rows.append(("peak memory", f"{peak / 1e9:.4g} GB"))
    if (used := m.counters.get("kv_cache_used_max")) is not None:
        rows.append(("KV cache", f"{100 * used:.3g} % in use at most"))
    if (batch := m.counters.get("batch_requests_mean")) is not None:
        rows.append(("running batch", f"{batch:.3g} requests on average"))
    return rows


def _gain_note(m: Measurement) -> list[str]:
    """What no interval covers: it cancels between runs on one device, and only there."""
    found = {name: facts["gain_error"] for name, facts in m.sources.items() if facts.get("gain_error")}
    total = metrics.energy_j(m)
    used = {key.partition(":")[0].removesuffix("_power") for key in total.keys} if total else set()
    return [
        f"gain: the sensor behind {name} may be off by about {100 * error:.0f} %, alike in every run on this device"
        for name, error in found.items()
        if name in used
    ]


def _energy_text(e: Energy) -> str:
    if e.joules is None or e.uncertainty_j is None:
        return "not known"
    return (metrics.unresolved if "unresolved" in e.reasons else metrics.quantity)(e.joules, e.uncertainty_j, "J")


def _notes(m: Measurement) -> list[str]:
    against = metrics.verdict(m)
    verdict = [f"NOT VALID: {', '.join(against)}"] if against else []
    codes = metrics.reasons(m) + metrics.net_energy_doubts(m)
    told = [f"{code}: {REASONS.get(code, 'no description')}" for code in codes]
    return verdict + told + _gain_note(m)


def _powers(m: Measurement) -> list[float]:
    """Power over the window in `_WIDTH` steps or fewer, from the energies that make up the total; empty if unknown, or too
    short to have a course."""
    total = metrics.energy_j(m)
    if total is None or m.duration_s < m.trace.interval_s:
        return []
    step_ns = (m.t1_ns - m.t0_ns) / _WIDTH
    sums = [0.0] * _WIDTH
    for key in total.keys:
        points = mean_power_w(m.trace, key)
        if not points:
            return []
        i = 0
        for step in range(_WIDTH):
            middle = m.t0_ns + (step + 0.5) * step_ns
            while i + 1 < len(points) and abs(points[i + 1][0] - middle) <= abs(points[i][0] - middle):
                i += 1
            sums[step] += points[i][1]
    return sums


def text(m: Measurement, shown: Shown | None = None) -> str:
    """The card for a terminal."""
    rows, notes, powers = shown or Shown(_rows(m), _notes(m), _powers(m))
    width = max(len(name) for name, _ in rows)
    lines = [f"{m.label} ({m.kind}, {m.status})"]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    if powers:
        top = max(powers)
        bars = "".join(_BARS[round(w / top * 7)] if top > 0 else _BARS[0] for w in powers)
        lines.append(f"  {'power':<{width}}  {bars} (0 to {top:.4g} W)")
    lines += [f"  note  {note}" for note in notes]
    lines += (
        [f"  not open  {name}: {reason}" for name, reason in m.unavailable.items()] if metrics.energy_j(m) is None else []
    )
    return "\n".join(lines)


def html(m: Measurement, shown: Shown | None = None) -> str:
    """The card for a notebook, trusted or not."""
    told, doubts, powers = shown or Shown(_rows(m), _notes(m), _powers(m))
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in told)
    picture = _picture(powers)
    each = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(_energy_text(e))}</td><td>{escape(metrics.METHODS[e.method])}</td>"
        f"<td>{escape(e.scope)}</td><td>{escape(', '.join(e.reasons))}</td></tr>"
        for key, e in m.energy.items()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in doubts)
    missing = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in m.unavailable.items())
    missing = f"<p>Not open:</p><ul>{missing}</ul>" if missing else ""
    known = metrics.energy_j(m) is not None
    return (
        f"<table><caption><b>{escape(m.label)}</b> ({escape(m.kind)}, {escape(m.status)})</caption>{rows}{picture}</table>"
        + (f"<ul>{notes}</ul>" if notes else "")
        + ("" if known else missing)
        + "<details><summary>sources</summary>"
        + "<table><tr><th>source</th><th>energy</th><th>method</th><th>covers</th><th>reasons</th></tr>"
        + f"{each}</table>"
        + (missing if known else "")
        + f"<p>run {escape(m.run_id)}</p></details>"
    )


def _picture(powers: list[float]) -> str:
    """A table row with the power over time as an image, from 0 W to its maximum."""
    if not powers or max(powers) <= 0:
        return ""
    top = max(powers)
    points = " ".join(f"{i * 300 / (len(powers) - 1):.1f},{42 - 40 * max(w, 0.0) / top:.1f}" for i, w in enumerate(powers))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="44" viewBox="0 0 300 44">'
        f'<polyline points="0,42 {points} 300,42" fill="#cfe3f7" stroke="#1f77b4" stroke-width="1.5"/></svg>'
    )
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="power over time" src="data:image/svg+xml;base64,{data}">'
    return f"<tr><th>power</th><td>{image} 0 to {top:.4g} W</td></tr>"
