"""What a person sees in JupyterLab, in a real browser: cards, the live view, an interrupt, a notebook opened again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lem_kit.jupyter import live

from .conftest import ROOT, Lab, Notebook, environment

pytestmark = pytest.mark.browser


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def assert_clean(notebook: Any) -> None:
    """Nothing of a widget and nothing of a view is in the file."""
    assert "widgets" not in notebook["metadata"] or not any(
        saved["state"] for saved in notebook["metadata"]["widgets"].values()
    )
    for output in outputs(notebook):
        assert not any("widget" in kind for kind in output.get("data", {}))
        assert "measuring:" not in str(output)


def test_the_first_notebook_runs_from_the_menu(page: Any, lab: Lab) -> None:
    path = lab.folder / "01_first_measurement.ipynb"
    shutil.copy(ROOT / "notebooks" / path.name, path)
    notebook = Notebook(page, lab, path)
    notebook.menu("Edit", "Clear Outputs of All Cells")
    notebook.run_all()
    card = notebook.output(1)
    assert "sum of squares" in card.inner_text() and "measured by a counter: replay:gpu0" in card.inner_text()
    card.scroll_into_view_if_needed()
    notebook.picture("first-measurement")
    saved = notebook.save()
    assert_clean(saved)
    assert not any(output["output_type"] == "error" for output in outputs(saved))
    assert sum("lem_kit" in output.get("metadata", {}) for output in outputs(saved)) >= 3
    assert not notebook.problems


SLEEPS = """
import time
print("before")
with session.window("a blocking cell") as window:
    time.sleep(4.2)
    print("after")
window.measurement
"""


def test_the_live_view_moves_and_leaves_nothing(page: Any, lab: Lab, tmp_path: Path) -> None:
    path = lab.put("live.ipynb", "import lem_kit as lem\nsession = lem.Session()", SLEEPS)
    notebook = Notebook(page, lab, path)
    notebook.menu("Settings", "Save Widget State Automatically")
    notebook.run_all(wait=False)
    view = notebook.output(1)
    page.get_by_text("measuring:").wait_for()
    assert view.locator(".jupyter-widgets").count() == 1 and live.STILL not in view.inner_text()
    seen, pictures, until = set(), set(), time.monotonic() + 2.5
    while time.monotonic() < until:
        seen.add(view.inner_text())
        pictures.add(view.locator("img").get_attribute("src"))
        time.sleep(0.1)
    notebook.picture("live-view")
    elapsed = {match[1] for text in seen if (match := re.search(r"measuring: (\d+) s at \d\d:\d\d:\d\d", text))}
    power = {match[1] for text in seen if (match := re.search(r"power\s+(\d+) W, mean of the last second", text))}
    assert len(elapsed) >= 2 and len(power) >= 2 and len(pictures) >= 4, seen
    assert len(pictures) <= 7, "more often than twice a second"
    notebook.finished()
    page.get_by_text("a blocking cell (window, ok)").wait_for()
    assert "measuring:" not in view.inner_text()
    assert view.inner_text().split("\n")[0].strip() == "before" and "after" in view.inner_text()
    notebook.picture("live-view-card")
    saved = notebook.save()
    assert saved["metadata"]["widgets"], "it was asked to keep the state of widgets"
    assert_clean(saved)
    assert [o["data"] for o in saved["cells"][1]["outputs"] if o["output_type"] == "display_data"] == [{}]
    assert not notebook.problems
    assert_repeats(path, tmp_path)


def assert_repeats(path: Path, home: Path) -> None:
    """nbval runs the saved notebook again and finds the same outputs, though it has no view."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--nbval", "--nbval-current-env", str(path)]
    command += ["--nbval-sanitize-with", str(ROOT / "tests/nbval_sanitize.cfg")]
    done = subprocess.run(command, cwd=path.parent, env=environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


DIES = """
import os, signal, time
with session.window("a cell that kills its kernel"):
    time.sleep(2.6)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kernel_that_dies_leaves_a_view_that_says_how_old_it_is(page: Any, lab: Lab) -> None:
    path = lab.put("dies.ipynb", "import lem_kit as lem\nsession = lem.Session()", DIES, "6 * 7")
    notebook = Notebook(page, lab, path)
    notebook.run_all(wait=False)
    page.get_by_text("measuring:").wait_for()
    page.get_by_text("Kernel Restarting").wait_for()
    page.locator(".jp-Dialog-button", has_text="Ok").click()
    notebook.picture("killed")
    saved = notebook.save()
    [left] = [output for output in outputs(saved) if output["output_type"] == "display_data"]
    assert re.search(r"measuring: \d s at \d\d:\d\d:\d\d", str(left["data"]))
    page.locator(".jp-CodeCell").nth(2).click()
    notebook.menu("Run", "Run Selected Cell")
    notebook.output(2).get_by_text("42").wait_for()
    notebook = Notebook(page, lab, path)
    notebook.picture("killed-reopened")


RUNS = """
engine = lem.load_backend("fake", "fake", ttft_s=0.05, tokens_per_s=50, power_w=200, idle_power_w=50)
requests = lem.prompts.synthetic(12, input_tokens=32, output_tokens=60)
session.run(engine, requests, lem.traffic.concurrency(3), label="a <b>run</b> of requests", warmup=0)
"""


def test_a_run_shows_how_far_it_is(page: Any, lab: Lab) -> None:
    notebook = Notebook(page, lab, lab.put("run.ipynb", "import lem_kit as lem\nsession = lem.Session()", RUNS))
    notebook.run_all(wait=False)
    page.get_by_text("of 12 requests").wait_for()
    page.get_by_text("at this pace").wait_for()
    view = notebook.output(1).inner_text()
    notebook.picture("live-run")
    assert re.search(r"output tokens\s+\d+ \(\d+ tokens/s so far\)", view), view
    assert "a <b>run</b> of requests" in view
    page.get_by_text("a <b>run</b> of requests (run, ok)").wait_for()
    assert_clean(notebook.save())


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import time\ntime.sleep(60)", "KeyboardInterrupt"),
        ("import asyncio\nawait asyncio.sleep(60)", "CancelledError"),
    ],
    ids=["blocking", "awaiting"],
)
def test_an_interrupted_cell_has_a_card_and_the_next_one_runs(page: Any, lab: Lab, body: str, error: str) -> None:
    cells = ("%load_ext lem_kit", f"%%measure_energy -o m\n{body}", "%%measure_energy\n6 * 7")
    notebook = Notebook(page, lab, lab.put(f"{error}.ipynb", *cells))
    notebook.run_all(wait=False)
    page.get_by_text("measuring:").wait_for()
    began = time.monotonic()
    page.locator("[data-command='notebook:interrupt-kernel']").first.click()
    page.get_by_text("(window, interrupted)").wait_for()
    assert time.monotonic() - began < 5
    notebook.finished()
    output = notebook.output(1).inner_text()
    assert error in output and "measuring:" not in output
    notebook.picture(f"interrupted-{error}")
    page.locator(".jp-CodeCell").nth(2).click()
    notebook.menu("Run", "Run Selected Cell")
    page.get_by_text("cell (window, ok)").wait_for()
    saved = notebook.save()
    assert_clean(saved)
    assert saved["cells"][2]["outputs"][-1]["data"]["text/plain"] in ("42", ["42"])


FIGURE = "session.measurements[0].plot()"


def test_a_saved_notebook_shows_card_and_figure_untrusted(page: Any, lab: Lab) -> None:
    path = lab.put("trusted.ipynb", "import lem_kit as lem\nsession = lem.Session()", "session.idle(1.5)", FIGURE)
    notebook = Notebook(page, lab, path)
    notebook.run_all()
    saved = notebook.save()
    saved["metadata"]["sent"] = "by a colleague"  # so the server's signature of it is another
    (lab.folder / "untrusted.ipynb").write_text(json.dumps(saved), encoding="utf-8")
    notebook = Notebook(page, lab, lab.folder / "untrusted.ipynb")
    assert page.locator("[data-icon='ui-components:not-trusted']").count() == 1
    card = notebook.output(1)
    assert "idle (idle, ok)" in card.inner_text() and "measured by a counter" in card.inner_text()
    assert card.locator("img").first.evaluate("image => image.complete && image.naturalWidth") == 300
    drawn = notebook.output(2).locator("svg.main-svg, img.plot-img").first  # an image until somebody points at it
    drawn.wait_for()
    assert drawn.bounding_box()["width"] > 300
    notebook.picture("untrusted")
