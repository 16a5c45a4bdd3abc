"""Results as files: strict JSON, Markdown, the run folders in one archive, and the short table for the terminal."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem_kit import metrics
from lem_kit.measurement import Measurement, jsonable

from . import figures


def cell(value: Any) -> str:
    """A value as a table shows it: four significant digits, and a dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).replace("|", "/").replace("\n", " ")
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole run."""
    text = ["# GPU check", "", short(results), ""]
    for name, part in results["parts"].items():
        text += [f"## {name}", "", f"{part['status']} in {part.get('seconds', '?')} s. {part.get('why', '')}".strip(), ""]
        for note in part["notes"]:
            text += [f"* {note}"]
        for left in part["left_out"]:
            text += [f"* left out: {left['what']}: {left['why']}"]
        for title, rows in part["tables"].items():
            text += ["", f"### {title}", "", markdown_table(rows), ""]
        small = {key: value for key, value in part["facts"].items() if len(str(value)) < 300}
        if small:
            text += ["", *(f"* {key}: {value}" for key, value in small.items()), ""]
        if "doctor" in part["facts"]:
            text += ["", "```", *part["facts"]["doctor"], "```", ""]
        if "traceback" in part:
            text += ["", "```", part["traceback"].rstrip(), "```", ""]
    if results.get("agreement"):
        text += ["## Counter and integral", "", markdown_table(results["agreement"]), ""]
    return "\n".join(text) + "\n"


def agreement(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """How often counter and integral of a board disagree, and how far they are apart at most, by the first word of labels:
    every window and every repeat of it in which both are known."""
    found: dict[str, list[tuple[float, bool]]] = {}
    for m in measurements:
        for energy in (m.energy, *(r.energy for r in m.repeats)):
            for key, apart in metrics.agreement(energy).items():
                pair = apart, "sources_disagree" in energy[key].reasons
                found.setdefault(m.label.split()[0], []).append(pair)
    return [
        {
            "windows": of, "number": len(pairs), "disagree": sum(code for _, code in pairs),
            "farthest apart %": 100 * max(abs(apart) for apart, _ in pairs),
        }
        for of, pairs in found.items()
    ]  # fmt: skip


def short(results: Mapping[str, Any]) -> str:
    """The last thing that is printed: headlines, then what did not run."""
    rows = list(results["headlines"])
    for name, part in results["parts"].items():
        if part["status"] not in ("done", "running"):
            rows.append({"what": f"part {name}", "value": f"{part['status']}: {part.get('why', '')}"})
        if part["left_out"]:
            said = [f"{left['what']} ({left['why']})" for left in part["left_out"]]
            more = f"; and {len(said) - 4} more" if len(said) > 4 else ""
            rows.append({"what": f"left out of {name}", "value": "; ".join(said[:4]) + more})
    return markdown_table(rows) if rows else "Nothing was measured."


def against(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Repeatability between two runs of the check: J per output token and tokens/s of this one over the earlier one's, for
    every row that both have, with the interval that the rows' own intervals give."""
    found = []
    for part, table in (("inference", "inference"), ("precision", "number formats"), ("compile", "static cache")):
        rows, others = (run["parts"].get(part, {}).get("tables", {}).get(table, []) for run in (new, old))
        names = [name for name in ("format", "cache", "model", "batch", "pass") if any(name in row for row in rows)]
        for row in rows:
            other = next((o for o in others if all(o.get(name) == row.get(name) for name in names)), None)
            if other is None:
                continue
            energy = None
            if row["J/output token"] and other["J/output token"]:
                energy = figures.ratio(row["J/output token"], row["± gross"], other["J/output token"], other["± gross"])
            found.append(
                {
                    "what": ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None),
                    "J/token, this/earlier": energy.value if energy else None,
                    "low": energy.low if energy else None,
                    "high": energy.high if energy else None,
                    "tokens/s, this/earlier": row["output tokens/s"] / other["output tokens/s"],
                }
            )
    return found


def write(out: Path, results: Mapping[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(jsonable(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(markdown(results), encoding="utf-8")


def pack(out: Path) -> Path:
    """Put run folders and polls into one archive and remove them; returns the archive."""
    archive = out / "runs.tar.gz"
    folders = [folder for name in ("runs", "polls") if (folder := out / name).is_dir()]
    with tarfile.open(archive, "w:gz", compresslevel=6) as made:
        for folder in folders:
            made.add(folder, arcname=folder.name)
    for folder in folders:
        shutil.rmtree(folder)
    return archive
