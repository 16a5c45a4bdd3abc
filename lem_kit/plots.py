"""Several measurements in one plotly figure: energies side by side, ratios of a comparison, latencies of every request.

The one idea: nothing looks like more than it is. A modelled figure is hatched, an unknown one is named, and what does not
cover the same hardware never shares an axis. Figures are of plain lists, so that JupyterLab draws them in a notebook that it
does not trust and a reviewer can read them. Not covered: one measurement over time (`timeline`), tables (`report`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from . import flops, metrics, phases
from .comparison import Comparison
from .errors import LemError, Unavailable, nearest
from .measurement import Measurement
from .ratios import LATENCIES, RATES, Ratio
from .report import names

# Okabe and Ito's colours, which stay apart for colour-blind readers. A model's bars are hatched as well.
COLOURS = {"counter": "#0072B2", "integral": "#009E73", "model": "#E69F00", None: "#666666"}
_HATCH = {"shape": "/", "fgcolor": "white", "fillmode": "overlay", "size": 10, "solidity": 0.3}
LINE_LETTERS = 50  # of a caption, which plotly does not wrap: what a phone has room for
_AXIS = {"gridcolor": "#E5E9F0", "zerolinecolor": "#C8D0DC", "automargin": True, "title": {"standoff": 10}}
_LOOK = {
    "paper_bgcolor": "white", "plot_bgcolor": "white", "font": {"color": "#2A3F5F"}, "xaxis": _AXIS, "yaxis": _AXIS,
}  # fmt: skip
# Title and axis of the usual metrics; others are shown by their names, which hold the unit.
_WORDS = {
    "energy_j": ("Energy", "J"),
    "energy_j_per_repeat": ("Energy per repeat", "J"),
    "net_energy_j": ("Energy above idle", "J"),
    "j_per_output_token": ("Energy per output token", "J per output token"),
    "j_per_input_token": ("Energy per input token", "J per input token"),
    "j_per_total_token": ("Energy per token, input and output", "J per token"),
    "j_per_request": ("Energy per request", "J per request"),
    "output_tokens_per_j": ("Output tokens per joule", "tokens per J"),
    "mean_power_w": ("Mean power", "W"),
    "output_tokens_per_s": ("Output tokens per second", "tokens/s"),
    "requests_per_s": ("Requests per second", "requests/s"),
    "ttft_s_p50": ("Time to first token, median", "s"),
    "tpot_s_p50": ("Time per output token, median", "s"),
}


def plot_compare(runs: Iterable[Measurement] | Comparison, metric: str = "j_per_output_token") -> Any:
    """Measurements side by side, as bars with 95 % intervals; or what `lem.compare` found, as ratios with theirs.

    `metric`: a column of `lem.frame`; of a comparison all ratios are shown. A run that does not know it is named in the
    caption; runs whose energies do not cover the same hardware have an axis each. LemError for a metric that there is none
    of, or that is not a number.
    """
    if isinstance(runs, Comparison):
        return _ratios(runs)
    runs = _measurements(runs)
    rows = [_bar(m, metric) for m in runs]
    known = [(name, m, row) for name, m, row in zip(names(runs), runs, rows) if row is not None]
    groups = [[k for k in known if k[2]["covers"] == s] for s in dict.fromkeys(k[2]["covers"] for k in known)] or [[]]
    title, unit = _WORDS.get(metric, (metric, metric))
    figure, height = _stacked([[name for name, _, _ in group] for group in groups])
    told: set[str | None] = set()
    for number, group in enumerate(groups, 1):
        for method in (*metrics.PREFERENCE, None):
            these = [(i, name, m, row) for i, (name, m, row) in enumerate(group) if row["method"] == method]
            if these:
                figure.add_bar(**_bars(these, method, method not in told), row=number, col=1)
                told.add(method)
        covers = f"; covers {group[0][2]['covers']}" if group and group[0][2]["covers"] else ""
        figure.update_xaxes(title=plain(unit + covers), rangemode="tozero", row=number, col=1)
    lines = _absent(runs, rows)
    if len(groups) > 1:
        lines.append("What is covered differs: compare within an axis, not across.")
    if known and all(row["half"] is None for _, _, row in known):
        lines.append("No interval is known for this metric.")
    return styled(figure, title, lines, height, legend=bool(told - {None}), left=16)


def _stacked(groups: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """A subplot below the other for each group, with a line for each of its names above y = 0, 1, 2 ...; and its height."""
    labels = [[textwrap.wrap(name, LINE_LETTERS, max_lines=2, placeholder=" …") for name in group] for group in groups]
    each = 30 + 17 * max((len(lines) for group in labels for lines in group), default=1)
    heights = [each * max(len(group), 1) for group in groups]
    height = sum(heights) + 64 * (len(groups) - 1)
    figure = subplots(rows=len(groups), cols=1, row_heights=heights, vertical_spacing=64 / height if len(groups) > 1 else 0)
    for number, group in enumerate(labels, 1):
        figure.update_yaxes(
            range=[len(group) - 0.65, -0.75], showticklabels=False, showgrid=False, zeroline=False, row=number
        )
        for i, lines in enumerate(group):
            figure.add_annotation(
                text="<br>".join(map(plain, lines)), x=0, xref="x domain", y=i - 0.2, xanchor="left", yanchor="bottom",
                align="left", showarrow=False, font={"size": 12}, row=number, col=1,
            )  # fmt: skip
    return figure, height


def _measurements(runs: Any) -> list[Measurement]:
    found = [runs] if isinstance(runs, Measurement) else list(runs) if isinstance(runs, Iterable) else []
    if not found or not all(isinstance(m, Measurement) for m in found):
        raise LemError(
            "plot_compare() takes a list of measurements, list(lem_kit.store.runs(FOLDER)), or what lem_kit.compare gives."
        )
    return found


def _bar(m: Measurement, metric: str) -> dict[str, Any] | None:
    """Value, half-width, method and coverage of a metric; None where it is not known."""
    row = metrics.summary(m)
    if metric not in row:
        row |= {**phases.summary(m), **flops.summary(m)}
    if metric not in row:
        raise LemError(f"There is no metric '{metric}': {nearest(metric, row)}")
    value = row[metric]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LemError(f"'{metric}' is no number: {value!r}. Give a column of lem_kit.frame that is one.")
    of_energy = f"{metric}_half_width" in row
    return {
        "value": value,
        "half": row[f"{metric}_half_width"] if of_energy else None,
        "method": row["energy_method"] if of_energy else None,
        "covers": row["energy_scopes"] if of_energy else "",
        "keys": row["energy_keys"] if of_energy else "",
    }


def _bars(these: Sequence[tuple[int, str, Measurement, dict[str, Any]]], method: str | None, first: bool) -> dict[str, Any]:
    """One trace: the runs whose figure was found in this way."""
    halves = [row["half"] for *_, row in these]
    return {
        "name": metrics.METHODS[method] if method else "",
        "legendgroup": method or "",
        "showlegend": first and method is not None,
        "orientation": "h",
        "x": [row["value"] for *_, row in these],
        "y": [i for i, *_ in these],
        "error_x": {"type": "data", "array": halves, "thickness": 2, "width": 6} if any(halves) else None,
        "marker": {"color": COLOURS[method], "pattern": _HATCH if method == "model" else None},
        "width": 0.34,
        "hovertext": [_hover(name, m, row) for _, name, m, row in these],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "text": ["" if m.valid or row["half"] is None else "NOT VALID" for *_, m, row in these],
        "textposition": "inside",
        "insidetextanchor": "start",
    }


def _hover(name: str, m: Measurement, row: dict[str, Any]) -> str:
    lines = [name, metrics.quantity(row["value"], row["half"], "")]
    if row["method"]:
        lines += [f"{metrics.METHODS[row['method']]}: {row['keys']}", f"covers {row['covers']}"]
        lines += [f"NOT VALID: {', '.join(metrics.verdict(m))}"] if not m.valid else []
    return "<br>".join(plain(line) for line in lines)


def _absent(runs: Sequence[Measurement], rows: Sequence[Any]) -> list[str]:
    missing = [
        f"{name} ({', '.join(metrics.verdict(m))})" if not m.valid else name
        for name, m, row in zip(names(runs), runs, rows)
        if row is None
    ]
    return [f"Not known: {'; '.join(missing)}"] if missing else []


def _ratios(found: Comparison) -> Any:
    """A row for each ratio: a point with its interval beside the line at 1, hollow where there is no interval."""
    a, b = found.names
    known = [r for r in found.ratios if r.ratio is not None]
    model = any(d.code in ("modelled", "other_method") for d in found.differences)
    others = [r.metric for r in known if r.metric not in RATES and r.metric not in LATENCIES]
    figure = subplots(rows=1, cols=1)
    kinds = (
        ("energy, MODELLED" if model else "energy", COLOURS["model"] if model else COLOURS["counter"], others),
        ("rate", COLOURS["integral"], RATES),
        ("latency", "#CC79A7", LATENCIES),
    )
    for name, colour, of in kinds:
        these = [(r, r.ratio or 0.0) for r in known if r.metric in of]
        if these:
            spread = [(max((r.high or x) - x, 0.0), max(x - (r.low or x), 0.0)) for r, x in these]
            hollow = ["diamond-open" if r.low is None else "diamond" if "MODELLED" in name else "circle" for r, _ in these]
            figure.add_scatter(
                x=[x for _, x in these], y=[plain(r.told) for r, _ in these], name=name, mode="markers",
                error_x={
                    "type": "data", "array": [up for up, _ in spread], "arrayminus": [down for _, down in spread],
                    "thickness": 2, "width": 6,
                },
                marker={"size": 11, "color": colour, "symbol": hollow},
                hovertext=["<br>".join(map(plain, _ratio_lines(r, a, b))) for r, _ in these],
                hovertemplate="%{hovertext}<extra></extra>",
            )  # fmt: skip
    figure.add_vline(x=1, line={"color": "#444", "dash": "dash", "width": 1})
    ends = [x for r in known for x in (r.low, r.ratio, r.high) if x]
    far = bool(ends) and max(*ends, 1) / min(*ends, 1) > 4
    figure.update_xaxes(title=plain(f"ratio {b} / {a}"), type="log" if far else "linear")
    figure.update_yaxes(autorange="reversed", automargin=True)
    lines = [found.verdict, *(f"{d.code}: {d.told}" for d in found.differences)]
    lines += ["Hollow: no interval is known."] if any(r.low is None for r in known) else []
    return styled(figure, f"{b} against {a}", lines, 90 + 34 * max(len(known), 2))


def _ratio_lines(r: Ratio, a: str, b: str) -> list[str]:
    each = [f"{a}: {r.a:.4g}, {b}: {r.b:.4g}"] if r.a is not None and r.b is not None else []
    return [r.told, f"{b} / {a}: {r.shown}", *each, f"from {r.from_}" if r.from_ else r.why]


def plot_latency(runs: Sequence[Measurement]) -> Any:
    """TTFT and TPOT of every request that completed, in milliseconds: median, quartiles and the points themselves."""
    told = names(runs)
    figure, height = _stacked([told, told])
    kinds = ((metrics.ttft_s, "time to first token, ms"), (metrics.tpot_s, "time per output token, ms"))
    for number, (metric, title) in enumerate(kinds, 1):
        for i, m in enumerate(runs):
            samples = [round(1e3 * value, 4) for value in metrics.values(m, metric)]
            if samples:
                figure.add_box(
                    x=_spread(samples, 200), y=[i] * min(len(samples), 200), name=plain(told[i]), orientation="h",
                    width=0.4, boxpoints="all", pointpos=0, jitter=0.6, showlegend=False,
                    line={"color": "#444", "width": 1.5}, fillcolor="rgba(0,0,0,0.05)",
                    marker={"color": "#0072B2", "size": 4, "opacity": 0.5},
                    hovertemplate="%{x:.4g} ms<extra></extra>", row=number, col=1,
                )  # fmt: skip
        figure.update_xaxes(title=title, rangemode="tozero", row=number, col=1)
    silent = [name for name, m in zip(told, runs) if not metrics.values(m, metrics.ttft_s)]
    lines = [f"No latency is known of: {'; '.join(silent)}."] if silent else []
    if any(len(metrics.values(m, metrics.ttft_s)) > 200 for m in runs):
        lines.append("Of more than 200 requests, 200 in even steps from the fastest to the slowest.")
    return styled(figure, "Latency of each request", lines, height, legend=False, left=16)


def _spread(samples: list[float], most: int) -> list[float]:
    """At most so many of the samples, evenly by rank with both ends: the quartiles stay where they are."""
    ordered = sorted(samples)
    return samples if len(samples) <= most else [ordered[k * (len(ordered) - 1) // (most - 1)] for k in range(most)]


# --- style, for all figures ---------------------------------------------------------------------------------------------


def subplots(**layout: Any) -> Any:
    """`make_subplots`; Unavailable where plotly is not there."""
    try:
        from plotly.subplots import make_subplots
    except ModuleNotFoundError as error:
        raise Unavailable("Figures need plotly: pip install 'lem_kit[notebook]'") from error
    return make_subplots(**layout)


def plain(text: object) -> str:
    """A text as plotly shows it letter by letter: it reads some HTML and, between dollar signs, TeX."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("$", "&#36;")


def styled(figure: Any, title: str, lines: Sequence[str], height: int, legend: bool = True, left: int = 56) -> Any:
    """Give the figure its title, with the lines as a caption under it, and so much height besides `height`, that of what is
    drawn, that they and the legend fit on a phone, too."""
    head = textwrap.shorten(title, 2 * LINE_LETTERS, placeholder=" …")
    heads = textwrap.wrap(head, LINE_LETTERS * 2 // 3)
    told = [part for line in lines for part in textwrap.wrap(line, LINE_LETTERS)]
    above = 26 + 21 * (len(heads) + len(told))
    entries = sum(trace.showlegend is not False for trace in figure.data) if legend else 0
    height += above + 48 + 12 * entries + (10 if entries else 0)
    caption = f"<span style='font-size:12px;color:#555'>{'<br>'.join(map(plain, told))}</span>" if told else ""
    figure.layout.template = {"layout": _LOOK}  # plotly's own is longer than most figures
    return figure.update_layout(
        height=height, font={"size": 12}, hovermode="closest", showlegend=legend,
        margin={"l": left, "r": 16, "t": above, "b": 48},
        title={
            "text": "<br>".join([*map(plain, heads), *([caption] if caption else [])]),
            "font": {"size": 16}, "x": 0, "xanchor": "left", "pad": {"l": 10}, "y": 1 - 16 / height, "yanchor": "top",
        },
        legend={
            "orientation": "h", "font": {"size": 12}, "tracegroupgap": 0, "x": 0, "xanchor": "left",
            "y": 0, "yref": "container", "yanchor": "bottom",
        },
    )  # fmt: skip
