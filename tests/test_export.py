"""One HTML file: figures drawn, plotly.js once, nothing loaded from outside, no text that can break out; and CSV."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

import lem_kit as lem
from lem_kit import cli, export
from lem_kit.errors import LemError
from lem_kit.export import offline

EVIL = "</script><script>alert(1)</script><!--"
# What makes a browser fetch something: an element's address, a style sheet's, a script's.
FETCHES = re.compile(
    r"""<(?!a\b)[a-z][^>]*\s(?:src|href|srcset|data|poster)\s*=\s*["']?\s*(?:https?:)?//"""
    r"""|@import|url\(\s*["']?(?:https?:)?//|\b(?:fetch|import)\s*\(\s*["'`]https?:|\bfrom\s+["']https?:""",
    re.IGNORECASE,
)


def notebook(folder: Path, figures: int = 2, text: str = "# Title", html: str | None = None) -> Path:
    data = {"data": [{"type": "bar", "x": [EVIL], "y": [1.5]}], "layout": {"height": 300}}
    outputs = [
        nbformat.v4.new_output("display_data", data={offline.PLOTLY: json.loads(json.dumps(data)), "text/plain": "figure"})
        for _ in range(figures)
    ]
    if html is not None:
        outputs.append(nbformat.v4.new_output("display_data", data={"text/html": html}))
    cell = nbformat.v4.new_code_cell("secret = 'the code'", outputs=outputs, execution_count=1)
    path = folder / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), cell]), path)
    return path


def own(page: str) -> str:
    """The page without the library, which names addresses (of map tiles) that our figures never use."""
    assert page.count(offline._library()) <= 1
    return page.replace(offline._library(), "")


def test_figures_are_drawn_and_the_library_is_there_once(tmp_path: Path) -> None:
    page = export.html(notebook(tmp_path), tmp_path / "n.html", title="<My> page").read_text()
    assert own(page).count("Plotly.newPlot(") == 2
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    assert "alert(1)</script>" not in page and "&lt;My&gt; page" in page
    assert (tmp_path / "n.html").stat().st_size < 6_000_000


def test_the_encoding_is_named_before_the_library(tmp_path: Path) -> None:
    page = export.html(notebook(tmp_path), tmp_path / "n.html").read_bytes()
    assert b'charset="utf-8"' in page[:1024] or b"charset=utf-8" in page[:1024]
    assert 0 < page.index(b"plotly.js v") < page.index(b"</head>")


def test_a_page_without_figures_has_no_library(tmp_path: Path) -> None:
    page = export.html(notebook(tmp_path, figures=0), tmp_path / "n.html").read_text()
    assert "plotly.js v" not in page and len(page) < 500_000


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = own(export.html(notebook(tmp_path), tmp_path / "n.html").read_text())
    assert "<script" in page and not FETCHES.search(page)
    assert not re.search(r"cdn|unpkg|googleapis", page)
    assert "Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'" in page


def test_what_a_notebook_would_load_is_not_loaded_and_its_links_stay(tmp_path: Path) -> None:
    text = "[a link](https://example.org/page) ![a picture](https://example.org/a.png)"
    html = (
        "<script src='https://example.org/x.js'></script><link rel=stylesheet href=//example.org/x.css>"
        '<img alt="two" srcset="https://example.org/b.png 2x" src="http://example.org/b.png">'
        "<iframe src='https://example.org'></iframe><a target='_blank' href='https://example.org/out'>out</a>"
    )
    page = own(export.html(notebook(tmp_path, text=text, html=html), tmp_path / "n.html").read_text())
    assert not FETCHES.search(page)
    assert 'href="https://example.org/page"' in page and 'href="https://example.org/out"' in page
    assert "a picture" in page and page.count("data-not-loaded-") == 6


def test_widgets_leave_their_texts(tmp_path: Path) -> None:
    document = nbformat.read(notebook(tmp_path, figures=0), as_version=4)
    document.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}}
    shown = {offline.WIDGET: {"model_id": "1", "version_major": 2, "version_minor": 0}, "text/plain": "a bar at 100 %"}
    document.cells[1].outputs = [nbformat.v4.new_output("display_data", data=shown)]
    nbformat.write(document, tmp_path / "w.ipynb")
    page = export.html(tmp_path / "w.ipynb", tmp_path / "w.html").read_text()
    assert "a bar at 100 %" in page and "widget-view" not in page and not FETCHES.search(page)


def test_the_notebook_itself_is_not_changed() -> None:
    document = nbformat.read(ROOT / "notebooks/report.ipynb", as_version=4)
    before = json.dumps(document)
    offline.OfflineHTMLExporter().from_notebook_node(document)
    assert json.dumps(document) == before


def test_the_report_of_the_example_needs_nothing(tmp_path: Path) -> None:
    path = export.html(ROOT / "notebooks/report.ipynb", tmp_path / "r.html", code=False)
    page = path.read_text()
    assert len(re.findall(r"plotly\.js v\d", page)) == 1 and own(page).count("Plotly.newPlot(") == 4
    assert not FETCHES.search(own(page)) and path.stat().st_size < 6_000_000


def test_nbconvert_knows_the_exporter(tmp_path: Path) -> None:
    path = notebook(tmp_path)
    command = [sys.executable, "-m", "nbconvert", "--to", "lem_html", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, f"is lem_kit installed as it is now (pip install -e .)? {done.stderr[-800:]}"
    page = (tmp_path / "n.html").read_text()
    assert own(page).count("Plotly.newPlot(") == 2 and not FETCHES.search(own(page)) and "<title>n</title>" in page


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
    with pytest.raises(LemError, match="Cannot write"):
        export.html(notebook(tmp_path, figures=0), tmp_path / "no folder" / "x.html")


def test_a_report_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(LemError, match="no folder"):
        export.report(tmp_path / "nowhere")
    with pytest.raises(LemError, match="no complete run"):
        export.report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- other formats, from the command line -----------------------------------------------------------------------------

RUN = next((ROOT / "data/example").glob("batch_size=4*"))


def test_csv_has_the_columns_of_the_frame_with_method_interval_and_coverage(tmp_path: Path) -> None:
    assert cli.main(["export", str(ROOT / "data/example/h100"), "--csv", str(tmp_path / "all.csv")]) == 0
    rows, frame = pd.read_csv(tmp_path / "all.csv"), lem.frame(ROOT / "data/example/h100")
    assert list(rows.columns) == list(frame.columns) and len(rows) == len(frame)
    assert rows["j_per_output_token_half_width"].tolist() == pytest.approx(
        frame["j_per_output_token_half_width"].astype(float).tolist(), nan_ok=True
    )
    assert set(rows["energy_method"].dropna()) == {"counter"} and set(rows["energy_scopes"].dropna()) == {"gpu"}
    export.write_csv(RUN, tmp_path / "one.csv")
    (one,) = pd.read_csv(tmp_path / "one.csv").to_dict("records")
    assert (one["run_id"], one["energy_method"], one["energy_scopes"]) == (RUN.name, "model", "cpu, dram")


def test_every_format_is_written_as_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("b.json", "s.json", "c.csv")]
    options = [str(part) for pair in zip(("--boamps", "--serving-json", "--csv"), files) for part in pair]
    assert cli.main(["export", str(RUN), *options, "-p", "country=france"]) == 0
    assert capsys.readouterr().out.split() == [str(file) for file in files]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    energy, serving = (json.loads(file.read_text(), parse_constant=refuse) for file in files[:2])
    assert energy["environment"] == {"country": "france"} and serving["completed"] == 24


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["RUN"], "say what to write of it"),
        (["RUN", "--html", "x.html"], "or make a report in HTML with `lem report"),
        (["RUN", "--csv", "x.csv", "-p", "country=x"], "name the file to write with --boamps FILE"),
        (["RUN", "--boamps", "x.json", "-p", "cuontry=x"], "did you mean 'country'"),
        (["notebooks/report.ipynb", "--csv", "x.csv"], "is a notebook"),
        (["data/example", "--boamps", "x.json"], "holds 2 runs"),
        (["nowhere", "--csv", "x.csv"], "no run folder nowhere"),
        (["nowhere", "--serving-json", "x.json"], "no run folder nowhere"),
        (["nowhere"], "There is no notebook and no run folder nowhere"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["export", *(str(RUN) if word == "RUN" else word for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(ROOT.glob("x.*"))
