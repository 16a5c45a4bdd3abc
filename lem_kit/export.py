"""Executed notebooks as one HTML file that needs no network, and the report of a study as such a file.

The one idea: a notebook keeps its figures as data; here each becomes a drawing, with plotly.js once in the file. Not covered
yet: other formats (BoAmps, vLLM bench JSON, CSV).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import notebooks, store
from .errors import LemError, Unavailable

PLOTLY = "application/vnd.plotly.v1+json"
# Addresses that nbconvert's template would load; an offline file has none of them.
_ADDRESSES = (
    "jquery_url",
    "mathjax_url",
    "mermaid_js_url",
    "require_js_url",
    "widget_renderer_url",
    "html_manager_semver_range",
)
# The template's drawing of mermaid diagrams would be loaded from elsewhere, and it has no switch.
_MERMAID = re.compile(r'<script type="module">(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>', re.DOTALL)


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
        from nbconvert import HTMLExporter
    except ModuleNotFoundError as error:
        raise Unavailable("Exporting needs nbconvert: pip install 'lem_kit[notebook]'") from error
    try:
        document = nbformat.read(str(notebook), as_version=4)
    except OSError as error:
        raise LemError(f"Cannot read the notebook {notebook}: {error.strerror}. Check the path.") from error
    except Exception as error:  # nbformat's own errors have no common ancestor
        raise LemError(f"{notebook} is not a notebook: {str(error).splitlines()[0]}") from error
    exporter = HTMLExporter(exclude_input=not code, exclude_input_prompt=True, exclude_output_prompt=True)
    for name in _ADDRESSES:
        if exporter.has_trait(name):
            setattr(exporter, name, "")
    draw_figures(document)
    document.metadata["title"] = title or Path(notebook).stem
    body, _ = exporter.from_notebook_node(document)
    body = _MERMAID.sub("", body)
    target = Path(target)
    target.write_text(body, encoding="utf-8")
    return target


def draw_figures(document: Any) -> None:
    """In place: every plotly output of the notebook becomes HTML that draws it; the first one brings plotly.js."""
    number = 0
    for cell in document.cells:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).pop(PLOTLY, None)
            if figure is None:
                continue
            library = "" if number else _library()
            place = f"lem-figure-{number}"
            config = {"responsive": True, "displayModeBar": False}
            call = ", ".join(_script_json(part) for part in (figure.get("data", []), figure.get("layout", {}), config))
            height = figure.get("layout", {}).get("height", 450)
            output["data"]["text/html"] = (
                f'{library}<div id="{place}" style="height:{int(height)}px;width:100%"></div>'
                f'<script>Plotly.newPlot("{place}", {call});</script>'
            )
            number += 1


def _library() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element."""
    return (
        json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )
