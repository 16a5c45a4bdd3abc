"""What leaves lem_kit: notebooks and reports as offline HTML, records as energy reports, benchmark results and CSV.

    report, html          one HTML file that asks for nothing (`offline`)
    write_boamps          one run as a BoAmps energy report (`boamps`)
    write_serving_json    one run as vLLM's `bench serve --save-result` writes it (`serving`)
    write_csv             a folder of runs as a table, the columns of `lem.frame`

The one idea: what is exported says as much of its doubt as the record does. Where a format has no place for the method, the
interval and what is covered, they stand in its remarks; what lem_kit cannot know is left out or null, and never filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import notebooks, store
from ..errors import LemError, Unavailable
from ..measurement import Measurement


def report(folder: str | Path) -> Path:
    """Execute the report notebook on a folder of runs and write `folder`/report.html, whose path is returned.

    LemError if the folder holds no complete run, or the notebook fails.
    """
    folder = Path(folder)
    if not any(True for _ in store.runs(folder)):
        raise LemError(f"{folder} holds no complete run to report on: make some with `lem study run FILE --out {folder}`.")
    executed = folder / "report.ipynb"
    notebooks.execute(notebooks.find("report"), executed, {"folder": str(folder)})
    return html(executed, folder / "report.html", title=f"lem_kit: {folder.name}", code=False)


def html(notebook: str | Path, target: str | Path, title: str | None = None, code: bool = True) -> Path:
    """Write an executed notebook as one HTML file without any outside address. `code=False` leaves the code cells out."""
    try:
        import nbformat

        from .offline import OfflineHTMLExporter
    except ModuleNotFoundError as error:
        raise Unavailable("Exporting needs nbconvert: pip install 'lem_kit[notebook]'") from error
    try:
        document = nbformat.read(str(notebook), as_version=4)
    except OSError as error:
        raise LemError(f"Cannot read the notebook {notebook}: {error.strerror}. Check the path.") from error
    except Exception as error:  # nbformat's own errors have no common ancestor
        raise LemError(f"{notebook} is not a notebook: give a file that Jupyter has saved.") from error
    exporter = OfflineHTMLExporter(exclude_input=not code, exclude_input_prompt=True, exclude_output_prompt=True)
    document.metadata["title"] = title or Path(notebook).stem
    body, _ = exporter.from_notebook_node(document)
    return _written(target, body)


def write_boamps(run: Measurement | str | Path, target: str | Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write a measurement (or the run folder of one) as a BoAmps energy report. `facts`: what only you know
    (`boamps.report`)."""
    from . import boamps

    return _written(target, _strict(boamps.report(_measurement(run), facts)))


def write_serving_json(run: Measurement | str | Path, target: str | Path) -> Path:
    """Write a run (or the run folder of one) as vLLM's `bench serve --save-result --save-detailed` writes its own
    (`serving.result`)."""
    from . import serving

    return _written(target, _strict(serving.result(_measurement(run))))


def write_csv(folder: str | Path, target: str | Path) -> Path:
    """Write a folder of runs, or one run, as CSV: a row per run and the columns of `lem.frame`. Unknown is empty; method,
    intervals and coverage have columns of their own."""
    place = Path(folder)
    rows = store.frame([store.load(place)] if (place / store.RECORD).exists() else place)
    if rows.empty:
        raise LemError(f"{folder} holds no complete run to write: make some with `lem study run FILE --out {folder}`.")
    return _written(target, rows.to_csv(index=False))


def _measurement(run: Measurement | str | Path) -> Measurement:
    return run if isinstance(run, Measurement) else store.load(run)


def _strict(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _written(target: str | Path, text: str) -> Path:
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LemError(f"Cannot write {target}: {error.strerror}. Check the folder.") from error
    return Path(target)
