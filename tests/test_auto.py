"""`%lem_auto`, and windows that a cell which failed has left open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from ipython_shell import run

from lem_kit import jupyter
from lem_kit.jupyter import auto
from lem_kit.measurement import Measurement

LEFT = "manager = session().window('left')\nwindow = manager.__enter__()\n"


def measured() -> list[Measurement]:
    return jupyter.session().measurements


@pytest.fixture
def automatic(shell: InteractiveShell) -> InteractiveShell:
    _, shown = run(shell, "%lem_auto on")
    assert shown == "lem_kit measures every cell.\n" and measured() == []
    shell.user_ns["session"] = jupyter.session
    return shell


def test_every_cell_is_measured_and_shown_in_one_line(metered: Any, automatic: InteractiveShell) -> None:
    run(automatic, "clock.advance(1)")
    result, shown = run(automatic, "# first\n\nclock.advance(2)\n7")
    m = measured()[-1]
    assert result.result == 7 and (m.label, m.duration_s, m.config) == ("clock.advance(2)", 2.0, {"lem_auto": True})
    assert shown.splitlines()[-1] == ("⚡ clock.advance(2): 200 J (measured by a counter, covers gpu), 2 s, 100 W")


def test_a_cell_that_measures_itself_is_not_measured_twice(automatic: InteractiveShell) -> None:
    for cell in ("%%measure_energy --quiet\n1", "x = %measure_energy --quiet 1", "%lem_status", "%load_ext lem_kit"):
        run(automatic, cell)
    assert [m.label for m in measured()] == ["cell", "cell"]
    run(automatic, "text = 'measure_energy'")
    assert len(measured()) == 3
    _, shown = run(automatic, "%lem_auto off")
    assert "with %%measure_energy only" in shown and len(measured()) == 3
    run(automatic, "1")
    assert len(measured()) == 3
    assert run(automatic, "%lem_auto")[1] == shown


@pytest.mark.parametrize(
    ("cell", "status"),
    [
        ("1 / 0", "failed"),
        ("raise KeyboardInterrupt", "interrupted"),
        ("import asyncio\nawait asyncio.sleep(0)\n1 / 0", "failed"),
    ],
)
def test_a_cell_that_ends_badly_has_its_record(automatic: InteractiveShell, cell: str, status: str) -> None:
    result, shown = run(automatic, cell)
    assert not result.success and measured()[-1].status == status and f"[{status}]" in shown
    assert "auto.py" not in shown


def test_a_cell_that_did_not_run_has_none(automatic: InteractiveShell) -> None:
    _, shown = run(automatic, "x = = 1")
    assert measured() == [] and "⚡" not in shown


def test_cells_inside_a_cell_belong_to_it(automatic: InteractiveShell) -> None:
    run(automatic, "%%capture\nx = 1")
    run(automatic, "get_ipython().run_cell('1 / 0')\nget_ipython().run_cell('')\nwith session().window('part'): pass")
    assert [m.label for m in measured()] == ["%%capture", "part", "get_ipython().run_cell('1 / 0')"]
    assert measured()[1].parent == measured()[2].run_id
    assert [m.status for m in measured()] == ["ok"] * 3


def test_a_label_is_escaped_and_short(automatic: InteractiveShell) -> None:
    with_markup = f"'<script>alert(1)</script>', '{'x' * 100}'"
    from IPython.utils.capture import capture_output

    with capture_output() as captured:
        automatic.run_cell(with_markup)
    data = captured.outputs[-1].data
    assert "<script" not in data["text/html"] and "&lt;script" in data["text/html"] and len(measured()[-1].label) == 60
    assert captured.outputs[-1].metadata["lem_kit"]["run_id"] == measured()[-1].run_id
    assert auto._label("# only\n\n") == "# only"


# --- left open --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [True, False], ids=["auto", "plain"])
@pytest.mark.parametrize("waits", ["", "import asyncio\nawait asyncio.sleep(0)\n"], ids=["sync", "async"])
def test_a_window_that_a_failed_cell_left_open_is_closed(
    automatic: InteractiveShell, capsys: pytest.CaptureFixture[str], on: bool, waits: str
) -> None:
    jupyter.cells().automatic = on
    automatic.run_cell(f"{waits}{LEFT}1 / 0", store_history=True)
    assert "the window 'left' was left open by a cell that did not end well" in capsys.readouterr().err
    left = measured()[0]
    assert (left.label, left.status, left.error["type"]) == ("left", "interrupted", "LeftOpen")
    assert jupyter.session().open_windows == [] and len(measured()) == 1 + on
    run(automatic, "%%measure_energy -o m --quiet\n1")
    assert automatic.user_ns["m"].parent is None


def test_a_window_that_a_cell_keeps_open_on_purpose_stays_open(automatic: InteractiveShell) -> None:
    run(automatic, "%lem_auto off")
    run(automatic, LEFT)
    run(automatic, "1 / 0")
    assert [window.label for window in jupyter.session().open_windows] == ["left"]
    run(automatic, "manager.__exit__(None, None, None)")
    assert [(m.label, m.status) for m in measured()] == [("left", "ok")]


def test_a_background_thread_keeps_its_window(shell: InteractiveShell) -> None:
    shell.user_ns["session"] = jupyter.session
    work = "def work():\n    with session().window('work'):\n        begun.set()\n        going.wait(10)\n"
    start = "thread = threading.Thread(target=work)\nthread.start()\nbegun.wait(10)\n1 / 0"
    run(shell, f"import threading\nbegun, going = threading.Event(), threading.Event()\n{work}{start}")
    assert [window.label for window in jupyter.session().open_windows] == ["work"]
    run(shell, "going.set(); thread.join()")
    assert [(m.label, m.status) for m in measured()] == [("work", "ok")]


def test_a_background_task_keeps_its_window(shell: InteractiveShell) -> None:
    shell.user_ns["session"] = jupyter.session
    work = "async def work():\n    with session().window('work'):\n        await asyncio.sleep(0.05)\n"
    start = "task = asyncio.create_task(work())\nawait asyncio.sleep(0)\n1 / 0"
    result, _ = run(shell, f"import asyncio\n{work}{start}")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert [window.label for window in jupyter.session().open_windows] == ["work"]
    run(shell, "await task")
    assert [(m.label, m.status) for m in measured()] == [("work", "ok")]
    assert isinstance(shell.user_ns["task"], asyncio.Task)
