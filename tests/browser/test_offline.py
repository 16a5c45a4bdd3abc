"""An exported report and an exported notebook, opened with the network off: figures are drawn and nothing is asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import NARROW, PICTURES, ROOT, WIDE, environment

pytestmark = pytest.mark.browser


def lem(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-c", "import sys, lem_kit.cli; sys.exit(lem_kit.cli.main())", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def open_offline(page: Any, file: Path, name: str) -> None:
    """Open the file without a network and take its picture. Whatever else it asks for fails the test."""
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.context.set_offline(True)
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for width, suffix in ((WIDE, ""), (NARROW, "-narrow")):
        page.set_viewport_size(width)
        page.wait_for_timeout(300)  # plotly draws again for the new width
        page.screenshot(path=PICTURES / f"{name}{suffix}.png", full_page=True)
        spare = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert spare <= 0, f"at {width['width']} pixels {spare} are cut off"
    page.set_viewport_size(WIDE)
    elsewhere = [url for url in asked if not url.startswith(("data:", "blob:")) and url != file.as_uri()]
    assert not elsewhere and not problems


def figures(page: Any) -> int:
    """Figures that are on the page with something drawn in them."""
    return int(page.locator(".js-plotly-plot", has=page.locator(".trace")).count())


def test_a_report_needs_no_network(page: Any, tmp_path: Path) -> None:
    study = tmp_path / "study"
    for run in (ROOT / "data/example").glob("batch_size=*"):
        shutil.copytree(run, study / run.name)
    lem(tmp_path, "report", str(study))
    assert (study / "report.html").stat().st_size < 6_000_000
    open_offline(page, study / "report.html", "report")
    assert figures(page) >= 1


def test_an_exported_notebook_needs_no_network(page: Any, tmp_path: Path) -> None:
    lem(tmp_path, "export", str(ROOT / "notebooks/01_first_measurement.ipynb"), "--html", str(tmp_path / "first.html"))
    open_offline(page, tmp_path / "first.html", "exported")
    assert page.get_by_text("sum of squares (window, ok)").count() == 1
    assert page.locator("img").first.evaluate("image => image.complete && image.naturalWidth") == 300


def test_figures_of_a_report_fit_a_phone(page: Any, tmp_path: Path) -> None:
    """Two comparisons and two power traces, with nothing of their texts or legends cut off."""
    lem(tmp_path, "export", str(ROOT / "notebooks/report.ipynb"), "--html", str(tmp_path / "phone.html"))
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto((tmp_path / "phone.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 4")
    page.wait_for_timeout(500)  # plotly draws again for the width
    assert figures(page) == 4
    page.screenshot(path=PICTURES / "phone.png", full_page=True)
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
            const right = plot.getBoundingClientRect().right + 1
            return [...plot.querySelectorAll('text')].filter(t => t.getBoundingClientRect().right > right)
                .map(t => t.textContent)
        })"""
    )
    assert cut == []
