"""The benchmark's rows as markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
ORDER = ("lem_kit", "lem_kit power", "Zeus", "CodeCarbon", "CodeCarbon task")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _errors_percent(rows: Sequence[Row]) -> np.ndarray:
    return np.array([100 * (r["joules"] - r["truth_j"]) / r["truth_j"] for r in rows if r["joules"] is not None])


def _accuracy(rows: Sequence[Row]) -> str:
    """ "bias +- sd", then the share of windows with 0 J and of those without a figure."""
    if not rows:
        return ""
    errors = _errors_percent(rows)
    zeros = sum(r["joules"] == 0 for r in rows) / len(rows)
    absent = sum(r["joules"] is None for r in rows) / len(rows)
    cell = f"{errors.mean():+.1f} ± {errors.std():.1f}" if len(errors) else "none"
    cell += f", {100 * zeros:.0f} % zero" if zeros else ""
    return cell + (f", {100 * absent:.0f} % absent" if absent else "")


def _honesty(rows: Sequence[Row]) -> str:
    """Share of the windows with a figure whose 95 % interval holds the truth of what they say they are, and how wide that is
    for the error made."""
    told = [r for r in rows if r["joules"] is not None and r["uncertainty_j"] is not None]
    if not told:
        return ""
    error, u = (np.array([abs(r["joules"] - r["stated_j"]) for r in told]), np.array([r["uncertainty_j"] for r in told]))
    relative = 100 * np.median(u / np.array([r["truth_j"] for r in told]))
    exact = np.median(u) > 999 * np.median(error)  # then the error is that of rounding, and a ratio says nothing
    width = "> 999" if exact else f"{np.median(u) / np.median(error):.1f}"
    return f"{100 * np.mean(error <= u):.0f} %, {width}, ±{relative:.1f} %"


def longer_us(rows: Sequence[Row]) -> str:
    """By how much lem_kit's windows are longer than their blocks. An aligned load's begins only after its block."""
    windows = [r for r in rows if r["figure"] == "lem_kit" and r["wave"] != "aligned"]
    longer_s = [r["longer_s"] for r in windows if "longer_s" in r]  # not of one that failed
    return format(1e6 * np.median(longer_s), ".0f") if longer_s else "unknown"


def _pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _unique(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _figures(rows: Sequence[Row]) -> list[str]:
    return [name for name in ORDER if _pick(rows, figure=name)]


def _length(seconds: float) -> str:
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


def accuracy(rows: Sequence[Row], board: str) -> str:
    rows = _pick(rows, board=board)
    lengths = sorted(_unique(rows, "length_s"))
    lines = []
    for wave in _unique(rows, "wave"):
        for figure in _figures(rows):
            cells = [_accuracy(_pick(rows, wave=wave, figure=figure, length_s=length)) for length in lengths]
            lines.append([wave, figure, *cells])
    counts = [max(len(_pick(rows, wave=w, figure="Zeus", length_s=s)) for w in _unique(rows, "wave")) for s in lengths]
    head = [f"{_length(length)} (n = {n})" for length, n in zip(lengths, counts)]
    return table(["load", "tool", *head], lines)


def honesty(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if str(row.get("figure", "")).startswith("lem_kit")]
    lengths = sorted(_unique(rows, "length_s"))
    lines = [
        [board, wave, figure, *(_honesty(_pick(rows, board=board, wave=wave, figure=figure, length_s=s)) for s in lengths)]
        for board in _unique(rows, "board")
        for wave in _unique(_pick(rows, board=board), "wave")
        for figure in _figures(rows)
    ]
    return table(["board", "load", "figure", *map(_length, lengths)], lines)


def absences(rows: Sequence[Row]) -> str:
    """Why a tool gave no figure, with the number of windows."""
    counted: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row["joules"] is None:
            key = (row["board"], _length(row["length_s"]), row["figure"], ", ".join(row["reasons"]))
            counted[key] = counted.get(key, 0) + 1
    if not counted:
        return "Every tool gave a figure for every window."
    return table(["board", "window", "figure", "reason", "windows"], [[*key, str(n)] for key, n in sorted(counted.items())])


def costs(rows: Sequence[Row], background: Sequence[Row]) -> str:
    def milliseconds(values: Sequence[float]) -> str:
        if not values:
            return ""
        return f"{1000 * np.median(values):.2f} ({1000 * np.percentile(values, 95):.1f})"

    lines = []
    for board in _unique(rows, "board"):
        for tool in _unique(rows, "tool"):
            timed = [r for r in _pick(rows, board=board, tool=tool) if "begin_s" in r]
            shares = [100 * b["share"] for b in _pick(background, board=board, tool=tool)]
            cells = [milliseconds([r[key] for r in timed]) for key in ("begin_s", "end_s", "cpu_s")]
            lines.append([board, tool, *cells, f"{np.mean(shares):.2f} %" if shares else ""])
    head = ["board", "tool", "begin, ms", "end, ms", "CPU of a window's own thread, ms", "CPU of the background"]
    return table(head, lines)


def faults(rows: Sequence[Row]) -> str:
    def cell(row: Row) -> str:
        if row["joules"] is None:
            return f"no figure: {', '.join(row['reasons'])}"[:120].replace("|", "/")
        why = f" ({', '.join(row['reasons'])})" if row["reasons"] else ""
        interval = f" ± {row['uncertainty_j']:.0f}" if row.get("uncertainty_j") is not None else ""
        return f"{row['joules']:.0f}{interval} J of {row['truth_j']:.0f}{why}"

    figures = _figures(rows)
    lines = [
        [fault, *("; ".join(map(cell, _pick(rows, fault=fault, figure=figure))) for figure in figures)]
        for fault in _unique(rows, "fault")
    ]
    return table(["what happens", *figures], lines)


def sampler(cost: Sequence[Row]) -> str:
    def share(of: dict[str, float]) -> str:
        return f"{100 * sum(s for name, s in of.items() if 'lem' in name):.2f} %"

    lines = []
    for c in cost:
        begin_ms, end_ms = 1000 * np.median(c["not_waiting_s"], axis=0)
        shares = share(c["first"]), share(c["share"])
        lines.append([str(c["boards"]), ", ".join(c["sources"]), *shares, f"{begin_ms:.2f} + {end_ms:.2f}"])
    seconds = f"{cost[0]['seconds']:.0f} s"
    thread = f"CPU of the sampler's thread, first {seconds}"
    head = ["GPUs", "sources", thread, f"next {seconds}", "begin + end, wait=False, ms"]
    return table(head, lines)
