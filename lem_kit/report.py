"""Stored runs as tables and figures: what `notebooks/report.ipynb` shows, and what a notebook of your own may use.

The one idea: a modelled figure looks different from a measured one wherever it appears, and an unknown one is named as
absent instead of drawn as zero. Not covered: files (`store`, `export`), the numbers themselves (`metrics`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import flops, metrics
from .curve import mean_power_w
from .measurement import REASONS, Measurement

if TYPE_CHECKING:
    import pandas as pd

ABSENT = "–"
# Okabe and Ito's colours, which stay apart for colour-blind readers. A model's bars are hatched as well.
COLOURS = {"counter": "#0072B2", "integral": "#009E73", "model": "#E69F00"}
MOST_LANES = 64


def names(runs: Sequence[Measurement]) -> list[str]:
    """A short name for each run: the settings in which they differ, or else the label; made unique by the run_id."""
    facts = [
        {"model": ((m.backend or {}).get("model") or {}).get("name"), "backend": (m.backend or {}).get("engine"), **m.config}
        for m in runs
    ]
    plain = [{k: v for k, v in f.items() if isinstance(v, str | int | float) and k != "prompts_sha256"} for f in facts]
    differing = [k for k in dict.fromkeys(k for f in plain for k in f) if len({f.get(k) for f in plain}) > 1]
    if "batch_size" in differing and "size" in differing:  # the notebook's word and the arrival plan's for the same thing
        differing.remove("size")
    found = [", ".join(f"{k}={f[k]}" for k in differing if k in f) or m.label for f, m in zip(plain, runs)]
    count = Counter(found)
    return [name if count[name] == 1 else f"{name} ({m.run_id})" for name, m in zip(found, runs)]


def table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """One readable row per run, units in the column names. Numbers are text here; `lem_kit.frame` has them as numbers."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        per_token, power = metrics.j_per_output_token(m), metrics.mean_power_w(m)
        rows.append(
            {
                "run": name,
                "status": m.status,
                "J per output token": ABSENT if per_token is None else metrics.quantity(*per_token[:2], ""),
                "method": ABSENT if per_token is None else per_token.method,
                "covers": ABSENT if per_token is None else ", ".join(per_token.scopes),
                "mean power, W": ABSENT if power is None else metrics.quantity(*power[:2], ""),
                "TTFT median, ms": _ms(m, metrics.ttft_s),
                "TPOT median, ms": _ms(m, metrics.tpot_s),
                "output tokens/s": _number(metrics.output_tokens_per_s(m)),
                "output tokens": _number(metrics.output_tokens(m)),
            }
        )
    return pd.DataFrame(rows)


def _ms(m: Measurement, metric: Any) -> str:
    middle = metrics.percentile(metrics.values(m, metric), 50)
    return _number(None if middle is None else middle * 1e3)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def hardware_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """What each run got out of the hardware: FLOP/s and bytes/s beside the ceilings that they are shares of, and memory."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        found, counters = flops.summary(m), m.counters
        rows.append(
            {
                "run": name,
                "precision": metrics.precision(m) or ABSENT,
                "TFLOP/s": _scaled(found["flop_per_s"], 1e-12),
                "FLOPs from": found["flop_method"] or ABSENT,
                "peak TFLOP/s": _scaled(found["peak_flop_per_s"], 1e-12),
                "MFU, %": _scaled(found["mfu"], 100),
                "decode GB/s": _scaled(found["decode_bytes_per_s"], 1e-9),
                "peak GB/s": _scaled(found["peak_bytes_per_s"], 1e-9),
                "bandwidth, %": _scaled(found["bandwidth_share"], 100),
                "peaks from": found["peak_source"] or ABSENT,
                "weights, GB": _scaled(found["weight_bytes"], 1e-9),
                "peak memory, GB": _scaled(counters.get("peak_memory_bytes"), 1e-9),
                "KV cache used, %": _scaled(counters.get("kv_cache_used_max"), 100),
                "running batch": _number(counters.get("batch_requests_mean")),
            }
        )
    return pd.DataFrame(rows)


def _scaled(value: float | None, factor: float) -> str:
    return _number(None if value is None else value * factor)


def energy_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """Every source and domain of every run: energy, how it was found, what it covers, why it is absent or doubtful."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        for key, e in m.energy.items():
            known = e.joules is not None
            rows.append(
                {
                    "run": name,
                    "source": key,
                    "energy, J": metrics.quantity(e.joules, e.uncertainty_j, "") if e.joules is not None else ABSENT,
                    "method": metrics.METHODS[e.method] if known else ABSENT,
                    "covers": e.scope,
                    "reasons": ", ".join(e.reasons) or ABSENT,
                }
            )
    for source, reason in {pair: None for m in runs for pair in m.unavailable.items()}:
        missing = [name for name, m in zip(names(runs), runs) if m.unavailable.get(source) == reason]
        who = "every run" if len(missing) == len(runs) else ", ".join(missing)
        rows.append(
            {"run": who, "source": source} | dict.fromkeys(("energy, J", "method", "covers"), ABSENT) | {"reasons": reason}
        )
    return pd.DataFrame(rows)


def reasons_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """The reason codes that occur, and what they mean."""
    import pandas as pd

    codes = dict.fromkeys(code for m in runs for code in metrics.reasons(m))
    return pd.DataFrame([{"code": code, "meaning": REASONS.get(code, ABSENT)} for code in codes])


def as_html(rows: pd.DataFrame) -> Any:
    """A table to display whole and without row numbers; every text is escaped."""
    import pandas as pd
    from IPython.display import HTML

    with pd.option_context("display.max_colwidth", None):
        return HTML(rows.to_html(index=False, justify="left", border=0))


def energy_figure(runs: Sequence[Measurement]) -> Any:
    """Bars of J per output token with their 95 % intervals; runs whose energy is unknown are named below."""
    import plotly.graph_objects as go

    figures = {name: metrics.j_per_output_token(m) for name, m in zip(names(runs), runs)}
    figure = go.Figure()
    for method in metrics.PREFERENCE:
        known = [(name, f) for name, f in figures.items() if f is not None and f.method == method]
        if known:
            figure.add_bar(
                name=metrics.METHODS[method],
                x=[name for name, _ in known],
                y=[f.value for _, f in known],
                error_y={"type": "data", "array": [f.half_width for _, f in known], "thickness": 2, "width": 8},
                marker={
                    "color": COLOURS[method],
                    "pattern": {"shape": "/" if method == "model" else "", "fgcolor": "white"},
                },
                width=0.5,
            )
    absent = [name for name, f in figures.items() if f is None]
    title = "Energy per output token" + (f"<br><sup>unknown: {_plain(', '.join(absent))}</sup>" if absent else "")
    figure.update_layout(title=title, showlegend=True)
    figure.update_yaxes(title="J per output token", rangemode="tozero")
    figure.update_xaxes(type="category")
    return _styled(figure, 420)


def latency_figure(runs: Sequence[Measurement]) -> Any:
    """TTFT and TPOT of every request, in milliseconds: median, quartiles and the points themselves."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=("Time to first token", "Time per output token"))
    for column, metric in enumerate((metrics.ttft_s, metrics.tpot_s), 1):
        for name, m in zip(names(runs), runs):
            samples = [1e3 * value for value in metrics.values(m, metric)]
            if samples:
                figure.add_box(
                    y=samples, name=name, boxpoints="all", pointpos=0, jitter=0.5, showlegend=False, row=1, col=column,
                    marker={"color": "#0072B2", "size": 5, "opacity": 0.6},
                    line={"color": "#444"}, fillcolor="rgba(0,0,0,0.05)",
                )  # fmt: skip
    figure.update_yaxes(title="ms", rangemode="tozero")
    return _styled(figure, 420)


def power_figure(m: Measurement, name: str | None = None) -> Any:
    """Power of each counter over time; below it one lane per request: waiting for the first token, then decoding."""
    from plotly.subplots import make_subplots

    done = m.completions[:MOST_LANES]
    heights = [0.6, 0.4] if done else [1.0]
    figure = make_subplots(rows=len(heights), cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    for key in m.trace.counters:
        points = [(t, w) for t, w in mean_power_w(m.trace, key) if m.t0_ns - 1e9 <= t <= m.t1_ns + 1e9]
        if points:
            seconds = [round((t - m.t0_ns) / 1e9, 4) for t, _ in points]
            method = m.trace.domains[key].method
            figure.add_scatter(
                x=seconds, y=[w for _, w in points], name=f"{key} ({method})", mode="lines",
                line={"shape": "hvh", "dash": "dot" if method == "model" else "solid"}, row=1, col=1,
            )  # fmt: skip
    figure.add_vrect(x0=0, x1=m.duration_s, fillcolor="#000", opacity=0.05, line_width=0)
    if done:
        for title, colour, ends in (("until first token", "#BBBBBB", (0, 1)), ("decoding", "#0072B2", (1, 2))):
            x: list[float | None] = []
            y: list[int | None] = []
            for lane, c in enumerate(done):
                if c.events:
                    stops = [(t - m.t0_ns) / 1e9 for t in (c.dispatch_ns, c.events[0][0], c.events[-1][0])]
                    x += [stops[ends[0]], stops[ends[1]], None]
                    y += [lane, lane, None]
            figure.add_scatter(x=x, y=y, mode="lines", name=title, line={"color": colour, "width": 4}, row=2, col=1)
        figure.update_yaxes(title="request", autorange="reversed", row=2, col=1)
    figure.update_yaxes(title="W", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="seconds since the window opened", row=len(heights), col=1)
    figure.update_layout(title=f"Power: {_plain(name or m.label)}")
    return _styled(figure, 480)


def _plain(text: str) -> str:
    """Plotly reads some HTML in its titles; a user's text has none."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _styled(figure: Any, height: int) -> Any:
    return figure.update_layout(
        template="plotly_white", height=height, font={"size": 14}, margin={"l": 70, "r": 20, "t": 80, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )  # fmt: skip
