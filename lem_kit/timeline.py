"""One measurement over time, as a plotly figure: what `Measurement.plot()` shows.

The one idea: the picture shows what was read and no more. A curve is thinned by keeping the least and the most of each
stretch, so no peak is lost; a source, a gauge or a phase that is not known is named in the caption, and not drawn as zero.

    power       of every counter (thick), integral (thin) and model (dotted, MODELLED), the window and its repeats shaded,
                phases as bands: prefill and decode where they hardly mix, or else idle, ramp, steady state and drain
    gauges      temperature and utilisation, where they were read
    requests    a lane each: until the first token, decoding, failed

Not covered: several measurements in one figure (`plots`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import bands, metrics
from .curve import mean_power_w
from .errors import LemError, shown
from .measurement import Completion, Measurement
from .plots import plain, styled, subplots
from .trace import Series

MOST_POINTS = 6000  # of all curves together
MOST_LANES = 64
# One for each device; Okabe and Ito's.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00")
_PIXELS = {"power": 190, "gauges": 75, "requests": 110}  # height of each row
_LOOK = {"counter": ("solid", 2.0, 1.0), "integral": ("solid", 1.0, 0.6), "model": ("dot", 2.0, 1.0)}  # dash, width, opacity
_BANDS = {
    "prefill": "#E69F00", "decode": "#56B4E9", "prefill and decode mixed": "#999999",
    "idle": "#BBBBBB", "ramp": "#F0E442", "steady": "#009E73", "drain": "#CC79A7",
}  # fmt: skip


Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """Seconds since the window opened, values; `thinned` where they are the extremes of stretches."""

    x: list[float]
    y: list[float]
    thinned: bool


def plot(m: Measurement, title: str | None = None) -> Any:
    """The figure of one measurement, under 300 kB whatever its length; Unavailable where plotly is not installed."""
    if title is not None and not isinstance(title, str):
        raise LemError(f"plot(title=) takes a text: got {shown(title)}.")
    powers = {key: points for key in m.trace.domains if (points := _seen(m, mean_power_w(m.trace, key)))}
    gauges = {key: points for key, series in m.trace.gauges.items() if (points := _gauge(m, key, series))}
    share = max(MOST_POINTS // max(len(powers) + len(gauges), 1), 40)
    lanes = (*m.completions, *m.broken_off)
    rows = ["power", *(["gauges"] if gauges else []), *(["requests"] if lanes else [])]
    figure = subplots(
        rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.05, row_heights=[_PIXELS[row] for row in rows],
        specs=[[{"secondary_y": row == "gauges"}] for row in rows],
    )  # fmt: skip
    phases = bands.of(m)
    thinned = _draw_powers(figure, m, powers, phases, share)
    lines = [_energy(m)]
    if gauges:
        thinned |= _draw_gauges(figure, m, gauges, share, rows.index("gauges") + 1)
    if lanes:
        lines += _draw_lanes(figure, m, lanes, rows.index("requests") + 1)
    lines += _no_lanes(m, len(lanes))
    if thinned:
        lines.append("Curves are thinned: the least and the most of each stretch are kept.")
    if m.completions and not phases:
        lines.append("Phases change too often to be shaded.")
    lines += _unknown(m, powers, gauges)
    figure.add_vrect(
        x0=0, x1=round(m.duration_s, 4), fillcolor="#000", opacity=0.04, line_width=0, layer="below",
        exclude_empty_subplots=False,
    )  # fmt: skip
    figure.update_xaxes(range=[-_margin_s(m), m.duration_s + _margin_s(m)])
    figure.update_xaxes(title="seconds since the window opened", row=len(rows), col=1)
    told = [] if m.valid else [f"NOT VALID: {', '.join(metrics.verdict(m))}."]
    return styled(figure, title or m.label, [*told, " ".join(lines)], sum(_PIXELS[row] for row in rows))


def _margin_s(m: Measurement) -> float:
    """How much to show before the window, and after it."""
    return min(max(0.15 * m.duration_s, 0.2), 1.0)


def _seen(m: Measurement, points: Iterable[tuple[int, float]]) -> Points:
    margin_ns = _margin_s(m) * 1e9
    return [(t, w) for t, w in points if m.t0_ns - margin_ns <= t <= m.t1_ns + margin_ns and math.isfinite(w)]


def _gauge(m: Measurement, key: str, series: Series) -> Points:
    """Temperature in °C and utilisation in %; empty for other gauges."""
    factor = {"temperature_c": 1.0, "sm_utilization": 100.0}.get(key.rpartition(".")[2])
    return [] if factor is None else _seen(m, ((t, v * factor) for t, v in zip(series.t_ns, series.value)))


def curve(m: Measurement, points: Points, most: int) -> Curve:
    """At most `most` of the points: of each of `most` / 2 equal stretches the least and the most, in order."""
    thinned = len(points) > most
    if thinned:
        start, end = points[0][0], points[-1][0]
        width = (end - start + 1) / (most // 2)
        kept = []
        for _, stretch in itertools.groupby(points, lambda point: int((point[0] - start) / width)):
            inside = list(stretch)
            low, high = min(inside, key=lambda p: p[1]), max(inside, key=lambda p: p[1])
            kept += sorted({low, high})
        points = kept
    return Curve([_s(m, t) for t, _ in points], [round(v, 3) for _, v in points], thinned)


def _s(m: Measurement, t_ns: int) -> float:
    return round((t_ns - m.t0_ns) / 1e9, 4)


# --- power --------------------------------------------------------------------------------------------------------------


def _draw_powers(figure: Any, m: Measurement, powers: Mapping[str, Points], phases: Sequence[Any], share: int) -> bool:
    drawn = {key: curve(m, points, share) for key, points in powers.items()}
    top = 1.08 * max((max(found.y) for found in drawn.values()), default=1.0) or 1.0
    _draw_spans(figure, m, phases, top)
    devices = list(dict.fromkeys(_device(key) for key in drawn))
    integrals = [key for key in drawn if m.trace.domains[key].method == "integral"]
    for key, found in drawn.items():
        domain = m.trace.domains[key]
        steps = "linear" if found.thinned or (domain.gauge and not domain.means) else "vh" if domain.means else "hvh"
        word = "MODELLED" if domain.method == "model" else domain.method
        dash, width, opacity = _LOOK[domain.method]
        figure.add_scatter(
            x=found.x, y=found.y, mode="lines" if len(found.x) > 1 else "markers",
            line={
                "shape": steps, "dash": dash, "width": width,
                "color": _rgba(_LINES[devices.index(_device(key)) % len(_LINES)], opacity),
            },
            hovertemplate=f"%{{x:.3f}} s: %{{y:.4g}} W<extra>{_literal(f'{key}, {word}')}</extra>",
            **{"name": plain(f"{key}, {word}"), **_together(key, integrals, "integrals of power")}, row=1, col=1,
        )  # fmt: skip
    figure.update_yaxes(title="power, W", range=[0, top], row=1, col=1)
    if not drawn:
        figure.update_yaxes(showticklabels=False, row=1, col=1)
        figure.add_annotation(text="no power was seen", showarrow=False, x=0.5, xref="x domain", y=0.5, yref="y domain")
    return any(found.thinned for found in drawn.values())


def _together(key: str, alike: Sequence[str], name: str) -> dict[str, Any]:
    """One entry in the legend for all of several curves; hovering still tells which is which."""
    if key not in alike or len(alike) < 2:
        return {}
    return {"name": f"{name}, {len(alike)} devices", "legendgroup": name, "showlegend": key == alike[0]}


def _device(key: str) -> str:
    """Counter and integral of one device have the same name but for the source's ending."""
    source, _, domain = key.partition(":")
    return f"{source.removesuffix('_power')}:{domain}"


def _literal(text: str) -> str:
    """A text inside a hover template, where %{...} would be filled in."""
    return plain(text).replace("%{", "%&#123;")


def _draw_spans(figure: Any, m: Measurement, phases: Sequence[Any], top: float) -> None:
    """Repeats and phases, from 0 to `top`: one trace each, which the legend can hide."""
    repeats = [(r.t0_ns, r.t1_ns) for r in m.repeats]
    told = f"{len(repeats):,} repeats" + (f", {bands.MOST_SPANS} shaded" if len(repeats) > bands.MOST_SPANS else "")
    named = [(told, "#000000", 0.07, repeats)] if len(repeats) > 1 else []
    named += [(text, _BANDS[name], 0.25, spans) for name, text, spans in phases]
    for text, colour, opacity, spans in named:
        step = -(-len(spans) // bands.MOST_SPANS)
        x = [corner for a, b in spans[::step] for corner in (_s(m, a), _s(m, a), _s(m, b), _s(m, b), None)]
        y = [0, top, top, 0, None] * (len(x) // 5)
        figure.add_scatter(
            x=x, y=y, name=plain(text), mode="lines", fill="toself", hoverinfo="skip", line={"width": 0},
            fillcolor=_rgba(colour, opacity), row=1, col=1,
        )  # fmt: skip


def _rgba(colour: str, opacity: float) -> str:
    return f"rgba({', '.join(str(int(part, 16)) for part in re.findall('..', colour[1:]))}, {opacity})"


# --- gauges -------------------------------------------------------------------------------------------------------------


def _draw_gauges(figure: Any, m: Measurement, gauges: Mapping[str, Points], share: int, row: int) -> bool:
    thinned = False
    devices = list(dict.fromkeys(key.rpartition(".")[0] for key in gauges))
    both = len({key.rpartition(".")[2] for key in gauges}) > 1
    for key, points in gauges.items():
        found = curve(m, points, share)
        thinned |= found.thinned
        device, _, quantity = key.rpartition(".")
        hot = quantity == "temperature_c"
        alike = [other for other in gauges if other.endswith(quantity)]
        name, unit = (f"{device} temperature", "°C") if hot else (f"{device} utilisation", "%")
        figure.add_scatter(
            x=found.x, y=found.y, mode="lines" if len(found.x) > 1 else "markers",
            line={
                "shape": "hv", "width": 1.5, "dash": "solid" if hot else "dot",
                "color": "#D55E00" if len(devices) == 1 and hot else _LINES[devices.index(device) % len(_LINES)],
            },
            hovertemplate=f"%{{x:.3f}} s: %{{y:.4g}} {unit}<extra>{_literal(name)}</extra>",
            **{"name": plain(name), **_together(key, alike, "temperature" if hot else "utilisation")},
            row=row, col=1, secondary_y=both and not hot,
        )  # fmt: skip
        axis: dict[str, Any] = {"title": unit, "nticks": 4}
        if not hot:
            axis |= {"range": [0, 105], "tickvals": [0, 50, 100], "showgrid": not both}
        figure.update_yaxes(**axis, row=row, col=1, secondary_y=both and not hot)
    degrees = [v for key, points in gauges.items() if key.endswith("temperature_c") for _, v in points]
    if degrees:  # a change of one degree is not to look like a jump
        figure.update_yaxes(range=[min(degrees) - 3, max(degrees) + 3], row=row, col=1, secondary_y=False)
    return thinned


# --- requests -----------------------------------------------------------------------------------------------------------


def _draw_lanes(figure: Any, m: Measurement, lanes: Sequence[Completion], row: int) -> list[str]:
    """A lane per request, of at most `MOST_LANES` in even steps; what is to be said of them."""
    n = len(lanes)
    shown = range(n) if n <= MOST_LANES else [k * n // MOST_LANES for k in range(MOST_LANES)]
    width = max(1.5, min(9.0, 70 / len(shown)))
    waiting: tuple[Any, Any, Any] = ([], [], [])
    decoding: tuple[Any, Any, Any] = ([], [], [])
    for i in shown:
        c = lanes[i]
        first = c.events[0][0] if c.events else c.done_ns
        _stretch(waiting, m, i, c.dispatch_ns, first, _wait_text(i, c))
        if len(c.events) > 1:
            _stretch(decoding, m, i, first, c.events[-1][0], _decode_text(i, c))
    for name, colour, (x, y, text) in (("until first token", "#AAAAAA", waiting), ("decoding", "#0072B2", decoding)):
        if x:
            figure.add_scatter(
                x=x, y=y, text=text, name=name, mode="lines", line={"color": colour, "width": width},
                hovertemplate="%{text}<extra></extra>", row=row, col=1,
            )  # fmt: skip
    lines = []
    for name, text, colour in (("failed", "{} failed: {}", "#CC0000"), ("interrupted", "{} interrupted", "#E69F00")):
        ended = [
            (i, c) for i, c in enumerate(lanes) if c.error is not None and (c.error == "interrupted") is (name != "failed")
        ]
        few = ended[:MOST_LANES]
        if ended:
            figure.add_scatter(
                x=[_s(m, c.done_ns) for _, c in few], y=[i for i, _ in few], name=name, mode="markers",
                text=[plain(f"request {text.format(i, (c.error or '')[:160])}") for i, c in few],
                marker={"symbol": "x", "size": 9, "color": colour}, hovertemplate="%{text}<extra></extra>", row=row, col=1,
            )  # fmt: skip
            verb = name if name == "failed" else f"{'was' if len(ended) == 1 else 'were'} {name}"
            marked = f", {MOST_LANES} of them marked" if len(ended) > MOST_LANES else ""
            lines.append(f"{len(ended):,} of {n:,} requests {verb}{marked}.")
    ticks = {"nticks": 5} if n > 5 else {"tickvals": list(range(n))}
    figure.update_yaxes(title="request", range=[n - 0.5, -0.5], tickformat=",d", row=row, col=1, **ticks)
    return lines + ([f"Lanes: {MOST_LANES} of {n:,} requests, in even steps."] if n > MOST_LANES else [])


def _no_lanes(m: Measurement, lanes: int) -> list[str]:
    """Of a run that did not end well: requests that it asked for and never handed over."""
    asked = m.config.get("requests"), m.config.get("repeats", 1)
    if m.status == "ok" or m.kind != "run" or not all(isinstance(n, int) for n in asked):
        return []
    planned = asked[0] * asked[1]
    return [f"{planned - lanes:,} of {planned:,} requests were never handed over: no lanes."] if planned > lanes else []


def _stretch(columns: tuple[Any, Any, Any], m: Measurement, lane: int, start: int, end: int, text: str) -> None:
    x, y, texts = columns
    x += [_s(m, start), _s(m, end), None]
    y += [lane, lane, None]
    texts += [text, text, None]


def _wait_text(i: int, c: Completion) -> str:
    wait, queue = metrics.ttft_s(c), metrics.queue_s(c)
    parts = [f"TTFT {1e3 * wait:.4g} ms" if wait is not None else "no token came"]
    parts += [f"in the engine's queue {1e3 * queue:.4g} ms"] if queue is not None else []
    parts += [f"prompt {c.prompt_tokens} tokens"] if c.prompt_tokens is not None else []
    return f"request {i}<br>{'<br>'.join(parts)}"


def _decode_text(i: int, c: Completion) -> str:
    step = metrics.tpot_s(c)
    each = f"<br>TPOT {1e3 * step:.4g} ms" if step is not None else ""
    return f"request {i}<br>{c.output_tokens} output tokens{each}"


# --- words --------------------------------------------------------------------------------------------------------------


def _energy(m: Measurement) -> str:
    total = metrics.energy_j(m)
    if total is None:
        return "Energy: not known."
    of = f" of {len(m.repeats)} repeats" if len(m.repeats) > 1 else ""
    energy = total.told("J")
    return f"{energy}{of}, {metrics.METHODS[total.method]}; covers {', '.join(total.scopes)}."


def _unknown(m: Measurement, powers: Mapping[str, Any], gauges: Mapping[str, Any]) -> list[str]:
    """What a reader might look for and does not find."""
    silent = [
        f"{key} ({', '.join(m.energy[key].reasons)})" if key in m.energy and m.energy[key].reasons else key
        for key in dict.fromkeys([*m.energy, *m.trace.domains])
        if key not in powers
    ]
    read = {key.rpartition(".")[2] for key in gauges}
    words = {"temperature_c": "temperature", "sm_utilization": "utilisation"}
    unread = [word for quantity, word in words.items() if quantity not in read]
    lines = [f"No power of: {', '.join(silent)}."] if silent else []
    lines += [f"Not read: {', '.join(unread)}."] if unread else []
    return lines + ([f"Not open: {', '.join(m.unavailable)}."] if m.unavailable else [])
