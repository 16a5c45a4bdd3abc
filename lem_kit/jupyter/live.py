"""The live view of a long window: power, temperature, tokens, progress and time, below the cell that waits for it.

The one idea: the view is a widget (`ipywidgets.HTML`) whose value is set twice a second. When the window has ended, its
output is emptied and the widget closed with all that belongs to it, so that no state of it can be saved. What is left in the
file is an output that holds nothing, which nbval, too, takes for nothing. Where the kernel has no ipywidgets, or its client
names no cell, the output itself is sent again instead.

A thread of its own draws it from what the sampler and `traffic.send` have written, takes no lock and prints nothing; its
messages name the cell that they belong to. The user's thread only starts and ends it.

Not covered: what was measured (`card`). A warm-up is not in a window, so it is not seen.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import itertools
import math
import os
import sys
import threading
import time
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from .. import metrics, session
from ..measurement import Energy
from ..samples import on_line
from ..session import Session, Window
from ..trace import Domain, Trace

AFTER_S = 1.0  # a window that is over by then is not worth a look
EVERY_S = 0.5
# How the power is drawn: over 1.5 times the window's age within these bounds, so that what was before is seen, too.
# A step is never so short that the doubt about when a counter was updated would be drawn as peaks.
SHORTEST_S, LONGEST_S, STEPS, SHORTEST_STEP_S = 10.0, 60.0, 40, 0.5
POWER_OVER_S = 1.0
OLD_S = 10.0  # older than this a reading says nothing about now
LEAVE_AFTER_S = 1.0  # a channel that hangs is waited for so long
SETTLED = 0.05  # the share of a run after which its pace says something about the rest

VIEW_KIND = "application/vnd.jupyter.widget-view+json"
STILL = "This front end shows no widgets, so this stands still until the window has ended."

Publish = Callable[[str, dict[str, Any]], None]
Course = tuple[list[int], list[float]]


def enable() -> None:
    """Let every long window in this process have a view where `wanted`. May be called twice."""
    if watch not in session.watchers:
        session.watchers.append(watch)


def disable() -> None:
    """Undo `enable`."""
    if watch in session.watchers:
        session.watchers.remove(watch)


def watch(of: Session, window: Window) -> Callable[[], None]:
    """Start the view of a window that is about to open; the function returned ends it."""
    kernel = kernel_here()
    if kernel is None or not wanted(parent := kernel.get_parent()):
        return lambda: None

    def publish(kind: str, content: dict[str, Any]) -> None:
        kernel.session.send(kernel.iopub_socket, kind, content=content, parent=parent, ident=kernel._topic("display_data"))

    widgets: Any = None
    if _names_cell(parent):  # what else is made to show it may keep the state of widgets that are closed, as nbclient does
        with contextlib.suppress(ImportError):
            import ipywidgets  # here, so that no measured window pays for it

            widgets = ipywidgets
    view = View(of, window, publish, AFTER_S, EVERY_S, widgets)
    view.start()
    return view.end


def wanted(parent: Mapping[str, Any]) -> bool:
    """Whether the request that a kernel works on comes from a front end at which somebody sits.

    JupyterLab and Notebook 7 name the cell ("cellId") in the metadata of their requests. Nothing that runs notebooks by
    itself does: nbclient (and with it nbconvert, papermill and `jupyter execute`), nbval, `jupyter run`; nor does a console.
    LEM_KIT_NONINTERACTIVE, which `notebooks.execute` sets, says no whatever the request says; LEM_KIT_LIVE=0 or 1 decides
    alone.
    """
    asked = os.environ.get("LEM_KIT_LIVE", "").strip()
    if asked in ("0", "1"):
        return asked == "1"
    if os.environ.get("LEM_KIT_NONINTERACTIVE"):
        return False
    return _names_cell(parent)


def _names_cell(parent: Mapping[str, Any]) -> bool:
    typed = parent.get("header", {}).get("msg_type") == "execute_request"
    return typed and "cellId" in (parent.get("metadata") or {})


def kernel_here() -> Any:
    """The kernel that this process is; None where it is none."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None


class View(threading.Thread):
    """Draws one window until it has ended: in a panel of `widgets`, the module of ipywidgets, or else in an output."""

    def __init__(
        self, of: Session, window: Window, publish: Publish, after_s: float, every_s: float, widgets: Any = None
    ) -> None:
        super().__init__(name="lem-live", daemon=True)
        self._of = of
        self._window = window
        self._publish = publish
        self._after_s, self._every_s = after_s, every_s
        self._ended = threading.Event()
        self._transient = {"display_id": uuid.uuid4().hex}
        self._widgets, self._panel = widgets, None

    def run(self) -> None:
        shown, wait_s = False, self._after_s
        while not self._ended.wait(wait_s) and self._window.span.t1_ns is None:
            wait_s = self._every_s
            with contextlib.suppress(Exception):  # a view that cannot be drawn or sent is none of the user's business
                self._draw(bundle(self._of, self._window, time.monotonic_ns()), shown)
                shown = True
        if shown:
            with contextlib.suppress(Exception):
                self._send("update_display_data", {})
        if self._panel is not None:
            with contextlib.suppress(Exception):
                close(self._panel)

    def _draw(self, data: Mapping[str, Any], shown: bool) -> None:
        html = data["text/html"]
        if self._panel is not None:
            self._panel.value = html
        elif self._widgets is not None:
            self._panel = self._widgets.HTML(html)
        if not shown and self._panel is not None:
            model = {"version_major": 2, "version_minor": 0, "model_id": self._panel.model_id}
            data = {**data, VIEW_KIND: model, "text/html": f"{html}<p>{STILL}</p>"}
        if not shown or self._panel is None:
            self._send("update_display_data" if shown else "display_data", data)

    def _send(self, kind: str, data: Mapping[str, Any]) -> None:
        self._publish(kind, {"data": dict(data), "metadata": {}, "transient": self._transient})

    def end(self) -> None:
        """Remove the view. Waits until that message is on its way, for it is to be there before the card; not for ever."""
        self._ended.set()
        self.join(LEAVE_AFTER_S)


def close(widget: Any) -> None:
    """Close a widget and those that it is made with, which would stay in the front end, and be saved, without it."""
    for part in (widget, widget.layout, widget.style):
        part.close()


# --- what is shown ----------------------------------------------------------------------------------------------------


def bundle(of: Session, window: Window, now_ns: int) -> dict[str, str]:
    """The view as HTML and as one line of text. It says when it was drawn: one that a dead kernel left behind is old."""
    elapsed_s = (now_ns - window.span.t0_ns) / 1e9
    at = datetime.datetime.now().strftime("%H:%M:%S")
    state = f"{window.kind}, measuring: {duration(elapsed_s)} at {at}"
    power = power_now(of.trace, of.domains, now_ns, elapsed_s)
    rows = [("power", power.words if power else "not known" + ("" if of.sources else ": no source is open"))]
    if warm := temperatures(of.trace, now_ns):
        rows.append(("temperature", warm))
    rows += progress_rows(window, elapsed_s, now_ns)
    pictures = {"power": power.picture if power else "", "progress": bar(window, elapsed_s)}
    cells = "".join(
        f'<tr><th align="left" valign="top">{escape(name)}&emsp;</th><td>{escape(value)} {pictures.get(name, "")}</td></tr>'
        for name, value in rows
    )
    html = f"<b>{escape(window.label)}</b> ({escape(state)})<table>{cells}</table>"
    text = "; ".join(f"{name} {value}" for name, value in rows)
    return {"text/html": html, "text/plain": f"{window.label} ({state}): {text}"}


def duration(seconds: float) -> str:
    """ "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = max(round(seconds), 0)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Power(NamedTuple):
    """`words`: what it is now; `picture`: an image of what it was."""

    words: str
    picture: str


def power_now(trace: Trace, domains: Mapping[str, Domain], now_ns: int, elapsed_s: float) -> Power | None:
    """Mean power over the last second, W, of the sources that a card's total would be made of; None where nothing is known.

    A counter's power is taken from the samples of it, if there are any; else between readings at which it was seen to
    change, so it is right to about the sampling interval over a second. It is told with two digits.
    """
    sampled = {domain.gauge: domain for domain in domains.values() if domain.means}
    span_s = min(max(1.5 * elapsed_s, SHORTEST_S), LONGEST_S)
    since_ns = now_ns - round((span_s + OLD_S) * 1e9)
    courses = {key: course(trace, key, sampled.get(f"{key}.power_w", own), since_ns) for key, own in domains.items()}
    latest = {key: _latest_w(*found, now_ns) for key, found in courses.items()}
    energies = {key: _as_energy(key, domains[key], watts) for key, watts in latest.items()}
    parts = metrics.chosen(energies) or metrics.chosen(energies, allow_model=True)
    if not parts:
        return None
    total_w = sum(latest[e.key] or 0.0 for e in parts)
    scopes = ", ".join(sorted({e.scope for e in parts}))
    worst = max((e.method for e in parts), key=metrics.PREFERENCE.index)
    modelled = f"; {metrics.METHODS[worst]}" if worst == "model" else ""
    words = f"{float(f'{total_w:.2g}'):g} W, mean of the last second (covers {scopes}{modelled})"
    opened_ns, shown = now_ns - round(elapsed_s * 1e9), [courses[e.key] for e in parts]
    return Power(words, _picture(shown, now_ns - round(span_s * 1e9), opened_ns))


def course(trace: Trace, key: str, domain: Domain, since_ns: int) -> Course:
    """Instants (ns) and joules of a domain's latest part: of a counter where it was seen to change, of sampled power its
    integral.

    The sampler may be appending while this reads: what is not complete yet is left for the next time.
    """
    instants: list[int] = []
    joules: list[float] = []
    series = trace.counters.get(key) if domain.gauge is None else trace.gauges.get(domain.gauge)
    if series is None:
        return instants, joules
    end = min(len(series.t_ns), len(series.value))
    near = series.part(max(bisect_left(series.t_ns, since_ns, 0, end) - 1, 0), end)
    integral_j = 0.0
    for (t0_ns, before), (t1_ns, value) in itertools.pairwise(zip(near.t_ns, near.value)):
        if domain.gauge is not None:
            integral_j += (value if domain.means else (before + value) / 2) * (t1_ns - t0_ns) / 1e9
        elif value < before:  # a reset: what was before it is of no use any more
            instants, joules = [], []
        if domain.gauge is not None or value > before:
            instants.append(t1_ns)
            joules.append(value - domain.offset_w * t1_ns / 1e9 if domain.gauge is None else integral_j)
    return instants, joules


def _latest_w(instants: list[int], joules: list[float], now_ns: int) -> float | None:
    if len(instants) < 2 or instants[-1] < now_ns - OLD_S * 1e9:
        return None
    a = max(bisect_right(instants, instants[-1] - POWER_OVER_S * 1e9) - 1, 0)
    watts = (joules[-1] - joules[a]) / (instants[-1] - instants[a]) * 1e9
    return watts if 0 < watts < math.inf else None


def _as_energy(key: str, domain: Domain, watts: float | None) -> Energy:
    """What a domain gave in a second, so that the total is made by the rule that is used for every other."""
    source, _, name = key.partition(":")
    unknown = ("no_reading",) if watts is None else ()
    return Energy(source, name, domain.method, domain.scope, watts, None if watts is None else 0.0, unknown)


def _picture(courses: Sequence[Course], from_ns: int, opened_ns: int) -> str:
    """An image of their sum since `from_ns`, or since all are known: the window in colour, what was before it in grey."""
    begin_ns = max(from_ns, *(instants[0] for instants, _ in courses))
    end_ns = min(instants[-1] for instants, _ in courses)
    steps = max(min(STEPS, int((end_ns - begin_ns) / 1e9 / SHORTEST_STEP_S)), 2)
    edges = [begin_ns + (end_ns - begin_ns) * k // steps for k in range(steps + 1)]
    sums = [sum(on_line(*found, t_ns) for found in courses) for t_ns in edges]
    watts = [(b - a) * 1e9 * steps / (end_ns - begin_ns) for a, b in itertools.pairwise(sums)] if end_ns > begin_ns else []
    top = max(watts, default=0.0)
    if not 0 < top < math.inf:
        return ""
    line = " ".join(f"{k * 300 / (steps - 1):.0f},{42 - 40 * max(w, 0) / top:.1f}" for k, w in enumerate(watts))
    opened = min(max((opened_ns - begin_ns) / (end_ns - begin_ns) * 300, 0), 300)
    area = f'<polyline points="0,42 {line} 300,42" stroke-width="1.5"'
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="44" viewBox="0 0 300 44">'
        f'<clipPath id="w"><rect x="{opened:.0f}" width="300" height="44"/></clipPath>'
        f'{area} fill="#e8e8e8" stroke="#999"/>{area} fill="#cfe3f7" stroke="#1f77b4" clip-path="url(#w)"/></svg>'
    )
    data = base64.b64encode(svg.encode()).decode()
    words = f"0 to {float(f'{top:.2g}'):g} W, last {duration((end_ns - begin_ns) / 1e9)}"
    return f'<br><img alt="power over time" src="data:image/svg+xml;base64,{data}"> {words}'


def temperatures(trace: Trace, now_ns: int) -> str:
    """ "gpu0 54 °C, gpu1 61 °C": the latest of each device that tells; empty where none does."""
    found = []
    for key, series in sorted(trace.gauges.copy().items()):
        device, _, quantity = key.partition(":")[2].rpartition(".")
        if quantity == "temperature_c" and series.value and series.t_ns[-1] > now_ns - OLD_S * 1e9:
            found.append(f"{device} {series.value[-1]:.0f} °C")
    return ", ".join(found)


def progress_rows(window: Window, elapsed_s: float, now_ns: int) -> list[tuple[str, str]]:
    """How far the window is and, where that can be told, how long it will still take."""
    rows, run = [], window.progress
    repeats, done = window.config.get("repeat", 1), len(window.repeats)
    if window.kind == "idle":
        seconds = window.config["seconds"]
        rows.append(("progress", f"{duration(elapsed_s)} of {duration(seconds)}"))
        rows.append(("time left", duration(seconds - elapsed_s)))
    elif run is not None:
        rate = run.output_tokens / elapsed_s
        rows.append(("output tokens", f"{run.output_tokens} ({rate:.3g} tokens/s so far)"))
        rows.append(("progress", f"{run.requests_done} of {run.requests} requests"))
        rows += [("time left", words)] if (words := _run_left(run, elapsed_s)) else []
    elif repeats > 1:
        rows.append(("progress", f"{done} of {repeats} repeats"))
        if done and (ended_ns := window.repeats[-1].t1_ns):
            mean_s = (ended_ns - window.repeats[0].t0_ns) / 1e9 / done
            left_s = mean_s * (repeats - done) - (now_ns - ended_ns) / 1e9
            rows.append(("time left", f"about {duration(left_s)}, as the repeats before"))
    return rows


def bar(window: Window, elapsed_s: float) -> str:
    """The share of the window that is over, as HTML; empty where it cannot be told."""
    run, repeats = window.progress, window.config.get("repeat", 1)
    if window.kind == "idle":
        share = elapsed_s / window.config["seconds"] if window.config["seconds"] else 1.0
    elif run is not None:
        share = run.output_tokens / run.output_tokens_at_most if run.output_tokens_at_most else 0.0
    elif repeats > 1:
        share = len(window.repeats) / repeats
    else:
        return ""
    return f'<progress max="1" value="{min(share, 1.0):.3f}"></progress>'


def _run_left(run: Any, elapsed_s: float) -> str:
    """From the tokens that may still come, at the pace so far; empty while there is too little to go by."""
    if run.output_tokens < SETTLED * run.output_tokens_at_most:
        return f"at least {duration(run.schedule_s - elapsed_s)}, by the schedule" if run.schedule_s > elapsed_s else ""
    at_pace_s = elapsed_s * (run.output_tokens_at_most / run.output_tokens - 1) if run.output_tokens else 0.0
    return f"about {duration(max(at_pace_s, run.schedule_s - elapsed_s))} at this pace"
