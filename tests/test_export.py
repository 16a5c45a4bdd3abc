"""One HTML file: figures drawn, plotly.js once, nothing loaded from outside, no text that can break out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from lem_kit import export
from lem_kit.errors import LemError

EVIL = "</script><script>alert(1)</script><!--"


def notebook(folder: Path, figures: int = 2) -> Path:
    data = {"data": [{"type": "bar", "x": [EVIL], "y": [1.5]}], "layout": {"height": 300}}
    outputs = [
        nbformat.v4.new_output("display_data", data={export.PLOTLY: json.loads(json.dumps(data)), "text/plain": "figure"})
        for _ in range(figures)
    ]
    cell = nbformat.v4.new_code_cell("secret = 'the code'", outputs=outputs, execution_count=1)
    path = folder / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell]), path)
    return path


def test_figures_are_drawn_and_the_library_is_there_once(tmp_path: Path) -> None:
    page = export.html(notebook(tmp_path), tmp_path / "n.html", title="<My> page").read_text()
    assert page.count("Plotly.newPlot(") - page.count("Plotly.newPlot(e") >= 2
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    assert "alert(1)</script>" not in page and "&lt;My&gt; page" in page
    assert (tmp_path / "n.html").stat().st_size < 6_000_000


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = export.html(notebook(tmp_path), tmp_path / "n.html").read_text()
    own = page.replace(export._library(), "")  # the library names addresses (of map tiles) that our figures never use
    assert "<script" in own and not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(\s*["']?https?:""", own)
    assert not re.search(r"cdn|unpkg|googleapis", own)


def test_code_may_be_left_out(tmp_path: Path) -> None:
    path = notebook(tmp_path, figures=0)
    assert "the code" in export.html(path, tmp_path / "a.html").read_text()
    assert "the code" not in export.html(path, tmp_path / "b.html", code=False).read_text()


def test_what_cannot_be_exported_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LemError, match="Cannot read the notebook"):
        export.html(tmp_path / "none.ipynb", tmp_path / "x.html")
    (tmp_path / "bad.ipynb").write_text("not json")
    with pytest.raises(LemError, match="is not a notebook"):
        export.html(tmp_path / "bad.ipynb", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_report_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(LemError, match="no folder"):
        export.report(tmp_path / "nowhere")
    with pytest.raises(LemError, match="no complete run"):
        export.report(tmp_path)
    assert list(tmp_path.iterdir()) == []
