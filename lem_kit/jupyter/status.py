"""`%lem_status`: what is measured in this notebook, with which libraries, and what mends what is missing.

The one idea: it says of this kernel what `lem doctor` says of a machine, from the same checks, and of the session that is
open instead of sources that would open. Not covered: what a measurement found (`card`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from html import escape

from .. import environment, metrics, preflight
from ..backends import backend_names
from ..session import Session

# Besides the engines: a figure depends on the versions of these, where they are loaded.
_KERNEL = ("ipykernel", "IPython", "torch", "numpy")


@dataclass(frozen=True)
class Status:
    """Rows (a name, what there is, the remedy where there is one) by the title of their table."""

    tables: dict[str, list[tuple[str, str, str]]]

    @classmethod
    def of(cls, session: Session, automatic: bool) -> Status:
        return cls(
            {
                "Energy sources": _sources(session),
                "Session": _session(session, automatic),
                "Kernel": _kernel(),
                "Backends": _backends(),
                "Checks": [
                    (check.name, f"{check.state}: {check.finding}" if check.remedy else check.finding, check.remedy or "")
                    for check in preflight.run()
                ],
            }
        )

    def __repr__(self) -> str:
        lines = []
        for title, rows in self.tables.items():
            width = max((len(name) for name, _, _ in rows), default=0)
            told = [f"  {name:<{width}}  {what}" + (f" Remedy: {remedy}" if remedy else "") for name, what, remedy in rows]
            lines += [title, *told]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = []
        for title, rows in self.tables.items():
            cells = "".join(
                f"<tr><th>{escape(name)}</th><td>{escape(what)}</td><td>{f'<code>{escape(remedy)}</code>' if remedy else ''}"
                "</td></tr>"
                for name, what, remedy in rows
            )
            parts.append(f"<table><caption><b>{escape(title)}</b></caption>{cells}</table>")
        return "".join(parts)


def _sources(session: Session) -> list[tuple[str, str, str]]:
    """The domains of what is open, and what each counts; then what is not open."""
    domains = session.domains
    rows = [
        (key, f"{domain.label + ', ' if domain.label else ''}{domain.scope}, {metrics.METHODS[domain.method]}", "")
        for key, domain in sorted(domains.items())
    ]
    told = {key.partition(":")[0].removesuffix("_power") for key in domains}
    starting = "open, and still starting; what it measures is known when it has"
    rows += [
        (name, f"not open: {failure}" if failure else starting, "")
        for name, failure in session.silent.items()
        if failure or name not in told
    ]
    for name, reason in session.unavailable.items():
        rows.append((name, f"not open: {reason}", ""))
    asked = os.environ.get("LEM_KIT_SOURCES")
    if asked:
        everything = "del os.environ['LEM_KIT_SOURCES'], then %reload_ext lem_kit, for all there are"
        rows.append(("LEM_KIT_SOURCES", f"only what it names is opened: {asked}", everything))
    elif not session.sources:
        rows.append(("none", "energy cannot be measured here; time and tokens can", ""))
    return rows


def _session(session: Session, automatic: bool) -> list[tuple[str, str, str]]:
    failed = sum(m.status != "ok" for m in session.measurements)
    count = f"{len(session.measurements)}" + (f", {failed} of them failed or interrupted" if failed else "")
    rows = [("measurements", count, ""), ("measured", "every cell" if automatic else "cells with %%measure_energy", "")]
    for kind, found in session.baselines.items():
        watts = ", ".join(f"{key} {power['watts']:.4g} W" for key, power in found["power_w"].items()) or "power not known"
        rows.append((f"baseline '{kind}'", f"{watts}, measured {found['started_at']}", ""))
    if not session.baselines:
        rows.append(("baseline", "none, so figures are gross", "%%measure_energy --baseline"))
    if session.open_windows:
        rows.append(("open windows", ", ".join(window.label for window in session.open_windows), ""))
    return rows


def _kernel() -> list[tuple[str, str, str]]:
    facts = environment.describe()
    versions = environment.loaded_versions()
    cpus = f"{facts['cpu'] or facts['machine']}, {facts['cpus_allowed'] or facts['cpu_count']} CPUs"
    loaded = ", ".join(f"{name} {versions[name]}" for name in (*_KERNEL, *backend_names()) if name in versions)
    return [
        ("lem_kit", str(facts["lem_kit"]), ""),
        ("interpreter", f"{sys.executable}, Python {facts['python']}", ""),
        ("machine", f"{cpus}, {facts['os']}", ""),
        ("loaded", loaded, ""),
    ]


def _backends() -> list[tuple[str, str, str]]:
    found = [(name, preflight.engine(name)) for name in backend_names()]
    return [(name, check.finding, check.remedy or "") for name, check in found]
