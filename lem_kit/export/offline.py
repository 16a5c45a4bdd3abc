"""Notebooks as HTML that needs no network: `jupyter nbconvert --to lem_html NOTEBOOK`, and what `lem export` uses.

The one idea: a notebook keeps its figures as data; here each becomes a drawing, with plotly.js once in the file, and the
file forbids its reader's browser to fetch anything. Links stay links. Not covered: formulas, which would need MathJax from
elsewhere and stay in TeX; pictures that a notebook shows from the web, which become their text.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from nbconvert.exporters import HTMLExporter

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
# Addresses that nbconvert's template would load; an offline file has none of them.
_ADDRESSES = (
    "html_manager_semver_range", "jquery_url", "jupyter_widgets_base_url", "mathjax_url", "mermaid_js_url",
    "mermaid_layout_elk_js_url", "require_js_url", "widget_renderer_url",
)  # fmt: skip
# The template's drawing of mermaid diagrams would be loaded from elsewhere, and it has no switch.
_MERMAID = re.compile(r'<script type="module">(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>', re.DOTALL)
# An attribute by which an element would load something from the web. Those of <a> lead there only when clicked.
_ELSEWHERE = re.compile(
    r"(<(?!a\b)[a-z][\w-]*\b[^>]*?\s)((?:src|srcset|href|data|poster|background|xlink:href)\s*=\s*[\"']?\s*(?:https?:)?//)",
    re.IGNORECASE,
)
# What a browser may use: what is in the file.
_POLICY = "default-src 'none'; " + "; ".join(
    ("script-src 'unsafe-inline'", "style-src 'unsafe-inline'", "img-src data: blob:", "font-src data:", "media-src data:")
)


class OfflineHTMLExporter(HTMLExporter):  # type: ignore[misc, unused-ignore]
    """nbconvert's HTML with figures drawn and without any outside address."""

    export_from_notebook = "HTML, offline (lem_kit)"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in _ADDRESSES:
            if self.has_trait(name):
                setattr(self, name, "")

    def from_notebook_node(self, nb: Any, resources: Any = None, **kw: Any) -> tuple[str, Any]:
        """The page and its resources; the notebook given is not changed."""
        shown = copy.deepcopy(nb)
        still(shown)
        number = draw_figures(shown)
        body, resources = super().from_notebook_node(shown, resources, **kw)
        return offline(str(body), bool(number)), resources


def still(document: Any) -> None:
    """In place: widgets, which a page without a kernel and a network cannot show, give way to their texts."""
    document.metadata.pop("widgets", None)
    for cell in document.cells:
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:
                output["data"].pop(WIDGET, None)


def draw_figures(document: Any) -> int:
    """In place: every plotly output of the notebook becomes HTML that draws it; returns how many there are."""
    number = 0
    for cell in document.cells:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).pop(PLOTLY, None)
            if figure is None:
                continue
            place = f"lem-figure-{number}"
            config = {"responsive": True, "displayModeBar": False}
            call = ", ".join(_script_json(part) for part in (figure.get("data", []), figure.get("layout", {}), config))
            height = figure.get("layout", {}).get("height", 450)
            output["data"]["text/html"] = (
                f'<div id="{place}" style="height:{int(height)}px;width:100%"></div>'
                f'<script>Plotly.newPlot("{place}", {call});</script>'
            )
            number += 1
    return number


def offline(page: str, figures: bool) -> str:
    """The page without what it would load from elsewhere, with plotly.js where there are figures."""
    page = _MERMAID.sub("", page)
    count = 1
    while count:  # an element may have several such attributes
        page, count = _ELSEWHERE.subn(r"\1data-not-loaded-\2", page)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    page = page.replace("<head>", f"<head>\n{policy}", 1)
    # Not before the encoding is named, which a browser looks for in the first thousand bytes.
    return page.replace("</head>", f"{_library()}\n</head>", 1) if figures else page


def _library() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element."""
    return (
        json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )
