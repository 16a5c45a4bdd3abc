"""Every notebook runs and shows what it was committed with; and what a committed notebook must not hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Committed without outputs, for they need an engine that this environment does not have, and run by a test of their own.
ELSEWHERE = {
    "experiment_tensorrt_llm": "tests/test_tensorrt_llm_backend.py",
    "experiment_vllm": "tests/test_vllm_notebook.py",
}
RUN_HERE = [path for path in NOTEBOOKS if path.stem not in ELSEWHERE]


def nbval(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """pytest with nbval in a process of its own; the meter is a recording, so that every machine has one."""
    environment = {
        **os.environ,
        "LEM_KIT_SOURCES": f"replay={ROOT / 'data/example/power.csv'}",
        "PLOTLY_RENDERER": "plotly_mimetype",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--nbval-current-env", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_notebooks_show_what_they_were_committed_with() -> None:
    done = nbval("--nbval", "--nbval-sanitize-with", ROOT / "tests/nbval_sanitize.cfg", *RUN_HERE)
    cells = sum(cell.cell_type == "code" for path in RUN_HERE for cell in nbformat.read(path, as_version=4).cells)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"{cells} passed" in done.stdout, done.stdout


def test_wrong_use_of_the_magic_fails_a_lax_check(tmp_path: Path) -> None:
    wrong = (
        "%%measure_energy --bogus\n1",
        "%%measure_energy",
        "# a comment\n%%measure_energy\n1",
        "%%measure_energy\n%%measure_energy\n1",
        "%%measure_energy --tokens 'no_name'\n1",
        "%%measure_energy\nimport asyncio\nawait asyncio.sleep(0)\nx = = 1",
    )
    cells = [nbformat.v4.new_code_cell(source) for source in ("%load_ext lem_kit", *wrong)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "wrong.ipynb")
    done = nbval("--nbval-lax", tmp_path / "wrong.ipynb")
    assert done.returncode == 1 and f"{len(wrong)} failed, 1 passed" in done.stdout, done.stdout[-3000:]
    assert "MeasureUsageError" in done.stdout and "SyntaxError" in done.stdout


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}, and JupyterLab would not open it")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_hygiene(path: Path) -> None:
    notebook = strict(path)
    assert path.stat().st_size < 300_000
    assert "widgets" not in notebook["metadata"]
    shown = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and path.stem in ELSEWHERE:
            assert not cell["outputs"] and cell["execution_count"] is None, "outputs that no test compares"
        elif cell["cell_type"] == "code":
            assert cell["execution_count"] is not None, "a cell that was not run is not checked either"
            shown += bool(cell["outputs"])
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            assert not any("widget" in kind for output in cell["outputs"] for kind in output.get("data", {}))
    assert shown or path.stem in ELSEWHERE, "a notebook without outputs is compared with nothing"
    assert not re.search(r"(?<![\w.:/<])/(?:root|home|Users|tmp|work)/", path.read_text())


def test_every_notebook_is_run_by_a_test() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.ipynb"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    recorded = [name for name in tracked if name.startswith("data/example/")]  # the copies that a study has executed
    assert {ROOT / name for name in tracked if name not in recorded} <= set(NOTEBOOKS)
    assert all(f"{stem}.ipynb" in (ROOT / test).read_text() for stem, test in ELSEWHERE.items())
    for name in recorded:
        strict(ROOT / name)


def test_what_is_sanitised_is_only_what_differs_between_machines() -> None:
    """The rules on two cards: doubts about sampling and numbers go, the method and what is covered stay."""
    rules = re.findall("^regex: (.*)$\n^replace: (.*)$", (ROOT / "tests/nbval_sanitize.cfg").read_text(), re.MULTILINE)
    assert len(rules) == 11, "a pair that nbval does not see is no rule"

    def sanitised(text: str) -> str:
        for regex, replacement in rules:
            text = re.sub(regex, replacement, text)
        return text

    quiet = "cell\n  energy  1.5 ± 0.2 J (measured by a counter: replay:gpu0)\n  note  replayed: played back"
    busy = "cell\n  energy  9.25 ± 0.31 J (measured by a counter: replay:gpu0)\n  note  replayed: played back\n"
    busy = busy.rstrip() + "\n  power   ▁▅█▅ (0 to 31.2 W)\n  note  sampling_gap: readings are missing"
    assert sanitised(quiet).split() == sanitised(busy).split()
    assert "measured by a counter: replay:gpu0" in sanitised(busy)
    short = quiet.replace("1.5 ± 0.2 J", "not resolved (below 0.9 J)").replace(
        "\n  note", "\n  note  NOT VALID: unresolved\n  note"
    )
    long = quiet.replace("\n  note", "\n  mean power  3 ± 1 W\n  note")
    assert sanitised(short).split() == sanitised(long).split() == sanitised(quiet).split()
    assert sanitised("<ul><li>NOT VALID: unresolved</li></ul><td>unresolved</td>") == "<ul></ul><td></td>"
    assert sanitised("<li>NOT VALID: unresolved, failed</li>") == "<li>NOT VALID: unresolved, failed</li>"
    assert sanitised(quiet) != sanitised(quiet.replace("counter", "model"))
