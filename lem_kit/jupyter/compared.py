"""How a Comparison looks in a notebook and in a terminal: tables and lists only, every text escaped, as a card is.

Not covered: figures (`lem.plot_compare`).
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..ratios import Ratio

SHOWN = 5  # pairs whose run ids are told


def mimebundle(found: Comparison) -> tuple[dict[str, str], dict[str, Any]]:
    """Text and HTML, with the figures as metadata."""
    rows = [ratio._asdict() for ratio in found.ratios]
    return {"text/plain": text(found), "text/html": html(found)}, {"lem_kit": {"verdict": found.verdict, "ratios": rows}}


def unit(metric: str) -> str:
    """The unit that stands in a metric's name."""
    if metric.endswith("_per_s"):
        return "1/s"
    parts = metric.split("_")
    return "J" if "j" in parts else "W" if "w" in parts else "s"


def _table(found: Comparison) -> list[tuple[str, str, str, str]]:
    def number(r: Ratio, value: float | None) -> str:
        return "–" if value is None else f"{value:.4g} {unit(r.metric)}"

    def interval(r: Ratio) -> str:
        if r.ratio is None:
            return f"not compared: {r.why}"
        if r.low is None or r.high is None:
            return f"{r.shown}, no interval: {r.why}"
        return f"{r.shown}, from {r.from_}"

    rows = [(r.told, number(r, r.a), number(r, r.b), interval(r)) for r in found.ratios]
    if found.matched:
        of = found.matched.told
        rows += [(f"{r.told}, of {of}", number(r, r.a), number(r, r.b), interval(r)) for r in found.matched.ratios]
    return rows


def _notes(found: Comparison) -> list[str]:
    """What stands against it, and which measurements these are, as far as that can be read."""
    notes = [f"{d.code}: {d.told}" for d in found.differences]
    if 0 < len(found.a) <= SHOWN:
        sides = zip(found.names, (found.a, found.b))
        return [*notes, "; ".join(f"{name}: {', '.join(m.run_id for m in side)}" for name, side in sides)]
    return notes


def text(found: Comparison) -> str:
    """The comparison for a terminal."""
    head = ("", *found.names, f"{found.names[1]} / {found.names[0]}")
    rows = [head, *_table(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip() for row in rows]
    return "\n".join([found.verdict, *lines, *(f"note  {note}" for note in _notes(found))])


def html(found: Comparison) -> str:
    """The comparison for a notebook, trusted or not: tables and lists only, every text escaped."""
    a, b = map(escape, found.names)
    head = f"<tr><th></th><th>{a}</th><th>{b}</th><th>{b} / {a}</th></tr>"
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _table(found))
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(found))
    return f"<p><b>{escape(found.verdict)}</b></p><table>{head}{rows}</table>" + (f"<ul>{notes}</ul>" if notes else "")
