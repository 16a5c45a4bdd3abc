"""`%%measure_energy` in a real IPython shell: value, names, options, tracebacks, records. No meter is needed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import lem_kit as lem
from lem_kit import jupyter
from lem_kit.errors import LemError
from lem_kit.measurement import Measurement


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("LEM_KIT_SOURCES", "none")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    lem.load_ipython_extension(shell)
    yield shell
    lem.unload_ipython_extension(shell)
    InteractiveShell.clear_instance()


def run(shell: InteractiveShell, cell: str) -> tuple[Any, str]:
    with capture_output() as captured:
        result = shell.run_cell(cell, store_history=True)
    return result, captured.stdout + "".join(output.data["text/plain"] for output in captured.outputs)


def test_the_cells_value_and_names_are_what_they_would_be(shell: InteractiveShell) -> None:
    result, shown = run(shell, "%%measure_energy -o m --label work\nx = 6\nx * 7")
    assert result.success and result.result == 42
    assert shell.user_ns["x"] == 6
    m = shell.user_ns["m"]
    assert isinstance(m, Measurement) and (m.label, m.status, m.reasons) == ("work", "ok", ("no_source",))
    assert "work (window, ok)" in shown and "not known" in shown
    assert jupyter.session().measurements == [m]


def test_a_semicolon_silences_the_value_and_magics_work_inside(shell: InteractiveShell) -> None:
    result, _ = run(shell, "%%measure_energy\n%time y = 3\ny;")
    assert result.success and result.result is None and shell.user_ns["y"] == 3


def test_repeat_warmup_and_tokens(shell: InteractiveShell) -> None:
    shell.user_ns["runs"] = []
    result, _ = run(shell, '%%measure_energy -o m --repeat 3 --warmup 2 --tokens "len(runs)"\nruns.append(1)\nlen(runs)')
    assert result.result == 5
    assert [r.output_tokens for r in shell.user_ns["m"].repeats] == [3, 4, 5]
    result, _ = run(shell, '%%measure_energy -o m --tokens "2 * len(runs)"\npass')
    assert shell.user_ns["m"].output_tokens == 10


def test_python_variables_expand_in_the_magics_line(shell: InteractiveShell) -> None:
    shell.user_ns["n"] = 2
    run(shell, "%%measure_energy -o m --repeat {n}\npass")
    assert len(shell.user_ns["m"].repeats) == 2


def test_an_exception_is_the_users_own(shell: InteractiveShell, tmp_path: Path) -> None:
    result, shown = run(shell, f"%%measure_energy -o m --save {tmp_path}\n\ndef broken():\n    return 1 / 0\n\nbroken()")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    m = shell.user_ns["m"]
    assert m.status == "failed" and m.error == {"type": "ZeroDivisionError", "message": "division by zero"}
    assert lem.load(tmp_path / m.run_id) == m
    frames = traceback.extract_tb(result.error_in_exec.__traceback__)
    assert [(f.lineno, f.name) for f in frames[-2:]] == [(6, "<module>"), (4, "broken")]
    assert "return 1 / 0" in (frames[-1].line or "")
    assert "magics.py" not in shown and "division by zero" in shown


def test_an_interrupt_is_kept_and_raised_again(shell: InteractiveShell) -> None:
    run(shell, "%%measure_energy -o m\nraise KeyboardInterrupt")
    assert shell.user_ns["m"].status == "interrupted"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--repeat 0", "--repeat must be at least 1"),
        ("--repeat many", "invalid int value"),
        ("--warmup -1", "--warmup must not be negative"),
        ("-o 2x", "name of a variable"),
        ("--tokens 'a +'", "not a Python expression"),
        ("--label ''", "--label must not be empty"),
        ("--label 'open", "No closing quotation"),
    ],
)
def test_wrong_options_are_a_real_error_before_the_cell_runs(shell: InteractiveShell, line: str, words: str) -> None:
    result, shown = run(shell, f"%%measure_energy {line}\nran = True")
    assert type(result.error_in_exec).__name__ == "MeasureUsageError"
    assert words in str(result.error_in_exec) and "%measure_energy?" in shown
    assert "ran" not in shell.user_ns and jupyter.session().measurements == []


@pytest.mark.parametrize("expression", ["nothing_there", "'many'", "2.5", "-1", "None", "True"])
def test_tokens_that_cannot_be_counted_lose_nothing(shell: InteractiveShell, expression: str) -> None:
    result, _ = run(shell, f'%%measure_energy -o m --tokens "{expression}"\nran = True')
    assert type(result.error_in_exec).__name__ == "MeasureUsageError" and "is kept" in str(result.error_in_exec)
    m = shell.user_ns["m"]
    assert shell.user_ns["ran"] and m.output_tokens is None and "tokens_unknown" in m.reasons and m.status == "ok"


def test_a_syntax_error_and_an_await_measure_nothing(shell: InteractiveShell) -> None:
    result, _ = run(shell, "%%measure_energy\nx = (1")
    assert isinstance(result.error_in_exec, SyntaxError)
    result, _ = run(shell, "%%measure_energy\nimport asyncio\nawait asyncio.sleep(0)")
    assert "await" in str(result.error_in_exec)
    assert jupyter.session().measurements == []


def test_nested_cells_are_nested_windows(shell: InteractiveShell) -> None:
    run(shell, "%%measure_energy -o outer\nget_ipython().run_cell_magic('measure_energy', '-o inner', 'z = 1')")
    assert shell.user_ns["inner"].parent == shell.user_ns["outer"].run_id


def test_loading_twice_keeps_the_session_and_unloading_closes_it(shell: InteractiveShell) -> None:
    before = jupyter.session()
    lem.load_ipython_extension(shell)
    assert jupyter.session() is before
    lem.unload_ipython_extension(shell)
    with pytest.raises(LemError, match="load_ext lem_kit"):
        jupyter.session()
    assert "measure_energy" not in shell.magics_manager.magics["cell"]
    lem.load_ipython_extension(shell)
