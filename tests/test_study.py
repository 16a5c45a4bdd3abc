"""Studies: what a file may say, the plan it makes, running, resuming, failing. The last test is the whole path for real."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

import lem_kit as lem
from lem_kit import export, notebooks, study
from lem_kit.errors import LemError

FAKE_CELLS = (
    "import lem_kit as lem\n"
    "if broken:\n    raise ValueError('broken on purpose')\n"
    "engine = lem.load_backend('fake', 'fake', ttft_s=0.001, tokens_per_s=2000)\n"
    "with lem.Session(folder, sources=[engine.source]) as session:\n"
    "    session.run(engine, lem.prompts.synthetic(4, 8, tokens), lem.traffic.batches(size), run_id=run_id,"
    " config={'batch_size': size})"
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a small notebook on the fake engine."""
    parameters = 'size: int = 1\ntokens: int = 3\nbroken: bool = False\nfolder: str = ""\nrun_id: str = ""'
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(FAKE_CELLS)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "small.ipynb")
    return tmp_path


def written(here: Path, text: str) -> Path:
    file = here / "study.yaml"
    file.write_text(text)
    return file


def test_a_plan_is_every_combination_in_order(here: Path) -> None:
    asked = study.read(
        written(here, "notebook: small\nparameters: {tokens: 5}\ngrid: {size: [2, 1], broken: [false, true]}")
    )
    plan = asked.plan()
    assert [p.parameters for p in plan] == [
        {"tokens": 5, "size": size, "broken": broken} for size in (2, 1) for broken in (False, True)
    ]
    assert plan[0].run_id.startswith("size=2,broken=False-")
    assert asked.plan() == plan
    other = asked.plan({"tokens": 6})
    assert len({p.run_id for p in plan + other}) == 8
    assert [p.parameters["size"] for p in asked.plan({"size": 9})] == [9, 9]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notebook: [", "is not a YAML file"),
        ("just text", "must be a YAML mapping"),
        ("grid: {size: [1]}", "notebook: NAME"),
        ("notebook: ../small", "not a path"),
        ("notebook: smal", "did you mean 'small'"),
        ("notebook: small\nparameter: {}", "did you mean 'parameters'"),
        ("notebook: small\nparameters: {siez: 1}", "did you mean 'size'"),
        ("notebook: small\nparameters: {size: .nan}", "plain JSON"),
        ("notebook: small\nparameters: {size: 2026-01-01}", "plain JSON"),
        ("notebook: small\nparameters: 3", "must map names"),
        ("notebook: small\ngrid: {size: 3}", "needs a list"),
        ("notebook: small\ngrid: {size: []}", "needs a list"),
        ("notebook: small\ngrid: {size: [1]}\nparameters: {size: 1}", "in one of the two"),
        ("notebook: small\nparameters: {run_id: x}", "set by the runner"),
        ("notebook: small\nkernel: 3", "Jupyter kernel"),
    ],
)
def test_a_malformed_study_is_one_sentence(here: Path, text: str, words: str) -> None:
    with pytest.raises(LemError) as caught:
        study.read(written(here, text))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_study_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LemError, match="Cannot read "):
        study.read(tmp_path / "none.yaml")


def test_run_resume_and_repair(here: Path) -> None:
    asked = study.read(written(here, "notebook: small\ngrid: {size: [2, 1], broken: [true]}"))
    lines: list[str] = []
    outcomes = study.run(asked, here / "out", say=lines.append)
    assert [o.ok for o in outcomes] == [False, False]
    assert "ValueError: broken on purpose" in (outcomes[0].problem or "") and "broken on purpose" in lines[0]

    mended = study.read(written(here, "notebook: small\ngrid: {size: [2, 1]}"))
    first, second = study.run(mended, here / "out")
    assert first.ok and second.ok and first.measurement is not None
    assert first.measurement == lem.load(here / "out" / first.planned.run_id)
    executed = here / "out" / first.planned.run_id / "notebook.ipynb"
    assert json.loads(executed.read_text())["metadata"]["papermill"]["parameters"]["size"] == 2

    (here / "out" / second.planned.run_id / "run.json").unlink()  # as if the kernel had been killed
    again = study.run(mended, here / "out")
    assert again[0].seconds is None and again[1].seconds is not None and all(o.ok for o in again)


def test_a_notebook_that_saves_nothing_is_not_a_success(here: Path) -> None:
    notebook = nbformat.read(here / "small.ipynb", as_version=4)
    notebook.cells[1].source = "1 + 1"
    nbformat.write(notebook, here / "small.ipynb")
    (outcome,) = study.run(study.read(written(here, "notebook: small")), here / "out")
    assert not outcome.ok and "without saving run" in (outcome.problem or "")


def test_a_kernel_that_dies_is_a_problem_of_its_run(here: Path) -> None:
    notebook = nbformat.read(here / "small.ipynb", as_version=4)
    notebook.cells[1].source = "import os; os._exit(1)"
    nbformat.write(notebook, here / "small.ipynb")
    (outcome,) = study.run(study.read(written(here, "notebook: small")), here / "out")
    assert not outcome.ok and "was cut off" in (outcome.problem or "")
    assert lem.load(here / "out" / outcome.planned.run_id).error == {"type": "LemError", "message": outcome.problem}


def test_unknown_notebooks_and_parameters_name_the_nearest() -> None:
    with pytest.raises(LemError, match="did you mean 'experiment_transformers'"):
        notebooks.find("experiment_transfomers")
    with pytest.raises(LemError, match="did you mean 'batch_size'"):
        notebooks.check_parameters(notebooks.find("experiment_transformers"), {"batchsize": 1})


def test_the_whole_path_from_a_study_file_to_an_offline_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real notebook, real kernel, real engine, real model; the meter is a recording."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LEM_KIT_SOURCES", f"replay={ROOT / 'data/example/power.csv'}")
    asked = study.read(ROOT / "data/studies/demo.yaml")
    small = {"requests": 4, "input_tokens": 16, "output_tokens": 8, "repeats": 2}
    outcomes = study.run(asked, tmp_path / "demo", small)
    assert [o.problem for o in outcomes] == [None, None]
    for outcome, batch_size in zip(outcomes, (1, 4)):
        m = outcome.measurement
        assert m is not None and m.status == "ok" and m.config["batch_size"] == batch_size
        assert [c.output_tokens for c in m.completions] == [8] * 8 and all(len(c.events) == 8 for c in m.completions)
        assert [c.prompt_tokens for c in m.completions] == [16] * 8
        assert m.backend is not None and m.backend["model"]["name"] == "tiny-llama"
        assert m.energy["replay:gpu0"].joules and "replayed" in m.energy["replay:gpu0"].reasons
    rows = lem.frame(tmp_path / "demo")
    assert sorted(rows["config.batch_size"]) == [1, 4] and (rows["j_per_output_token"] > 0).all()
    page = export.report(tmp_path / "demo").read_text()
    assert page.count("Plotly.newPlot") == 4 and "batch_size=4" in page and "replay:gpu0" in page
