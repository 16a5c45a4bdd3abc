"""The magics in a real IPython shell: value, names, options, tracebacks, records. Joules come from a counter that the test
turns; what only a kernel does is in `test_kernel_cells`."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from ipython_shell import Meter, run

import lem_kit as lem
from lem_kit import jupyter, metrics, session, store
from lem_kit.energy import Reading
from lem_kit.errors import LemError
from lem_kit.jupyter.options import UNTIL
from lem_kit.measurement import Measurement


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


def test_braces_of_the_tokens_are_pythons_own(shell: InteractiveShell) -> None:
    """Else the set of two equal numbers would become a pair of them, before the cell has run."""
    run(shell, "n, name = 5, 'a b'")
    for option in ('--tokens "len({n, n})"', "--tokens='len({n, n})'", "--tokens len({n,n})"):
        run(shell, f'%%measure_energy --label "of {{name}}" {option} -o m --repeat {{n - 3}}\npass')
        assert [r.output_tokens for r in shell.user_ns["m"].repeats] == [1, 1] and shell.user_ns["m"].label == "of a b"
    run(shell, "%%measure_energy --label {unknown} -o m\npass")
    assert shell.user_ns["m"].label == "{unknown}"


def test_braces_of_a_statement_are_pythons_own(shell: InteractiveShell) -> None:
    result, _ = run(shell, "n = 2\ndef f(k):\n    v = %measure_energy --repeat {k} -o m len({n, k, 5})\n    return v\nf(3)")
    assert result.result == 3 and len(shell.user_ns["m"].repeats) == 3


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
        ("--bogus", "there is no option --bogus: there are: --baseline, --interval"),
        ("--warmups 3", "there is no option --warmups: did you mean '--warmup'?"),
        ("-o m x = 3", "'x = 3' belongs to no option; the code to measure begins on the next line"),
        ("--repeat 0", "--repeat must be at least 1"),
        ("--repeat many", "--repeat takes a whole number: got 'many'"),
        ("--warmup 1.5", "--warmup takes a whole number: got '1.5'"),
        ("--interval much", "--interval takes a number: got 'much'"),
        ("--baseline x=1", "--baseline takes a number: got 'x=1'; the code to measure begins on the next line"),
        ("--repeat", "--repeat needs a value behind it"),
        ("--quiet=3", "--quiet takes no value: got '3'"),
        ("--repeat 2 --label a --repeat=3", "--repeat is given twice"),
        ("-o a --output b", "-o is given twice"),
        ("-ob -oc", "-o is given twice"),
        ("--warmup -1", "--warmup must not be negative"),
        ("-o 2x", "name of a variable"),
        ("-o for", "name of a variable"),
        ("--baseline 0", "--baseline takes a number of seconds above 0: got 0"),
        ("--baseline nan", "--baseline takes a number of seconds above 0: got nan"),
        ("--interval 2", "--interval is a share of the energy, 0.02 for 2 %: got 2"),
        ("--interval 0", "--interval is a share of the energy, 0.02 for 2 %: got 0"),
        ("--interval 0.1 --repeat 1", "--repeat must be at least 2 with it"),
        ("--tokens 'a +'", "not a Python expression"),
        ("--label ''", "--label must not be empty"),
        ("--label ' '", "--label must not be empty"),
        ("--save ''", "--save must not be empty"),
        ('--label "open', 'a quotation mark in the options is not closed: --label "open'),
        ("--label don't", "a quotation mark in the options is not closed: --label don't"),
        ("--label a\\", "the options end in a backslash"),
    ],
)
def test_wrong_options_are_a_real_error_before_the_cell_runs(shell: InteractiveShell, line: str, words: str) -> None:
    result, shown = run(shell, f"%%measure_energy {line}\nran = True")
    assert type(result.error_in_exec).__name__ == "MeasureUsageError"
    assert words in str(result.error_in_exec) and "%measure_energy?" in shown
    assert "ran" not in shell.user_ns and jupyter.session().measurements == [] and shown.count("\n") <= 1


@pytest.mark.parametrize("expression", ["nothing_there", "'many'", "2.5", "-1", "None", "True"])
def test_tokens_that_cannot_be_counted_lose_nothing(shell: InteractiveShell, expression: str) -> None:
    result, _ = run(shell, f'%%measure_energy -o m --tokens "{expression}"\nran = True')
    assert type(result.error_in_exec).__name__ == "MeasureUsageError" and "is kept" in str(result.error_in_exec)
    m = shell.user_ns["m"]
    assert shell.user_ns["ran"] and m.output_tokens is None and "tokens_unknown" in m.reasons and m.status == "ok"


@pytest.mark.parametrize("body", ["x = (1", "ran = 1\n\nfor", "import asyncio\nawait asyncio.sleep(0)\nx = = 1"])
def test_a_syntax_error_is_told_as_without_the_magic(shell: InteractiveShell, body: str) -> None:
    """With the user's lines and nothing of ours; nothing has run."""
    result, shown = run(shell, f"%%measure_energy -o m\n{body}")
    plain, _ = run(shell, f"# nothing\n{body}")
    assert isinstance(result.error_before_exec, SyntaxError)
    assert (result.error_before_exec.lineno, result.error_before_exec.msg) == (
        plain.error_before_exec.lineno, plain.error_before_exec.msg
    )  # fmt: skip
    assert "magics.py" not in shown and jupyter.session().measurements == [] and not {"ran", "m"} & shell.user_ns.keys()


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("# NBVAL_SKIP\n%%measure_energy\nran = 1", "%%measure_energy must be the first line of its cell"),
        ("1 + 1\n%%measure_energy\nran = 1", "%%measure_energy must be the first line of its cell"),
        ("%%measure_energy --repeat 2", "nothing to measure: the cell is empty below %%measure_energy"),
        ("%measure_energy --repeat 2", "nothing to measure: %measure_energy [options] statement"),
        ("%measure_energy x = = 1", "'x = = 1' is not Python: invalid syntax"),
        ("%%measure_energy\nran = 1\n%%measure_energy\n2", "a cell is measured once"),
        ("%%measure_energy\n\n%%measure_energy\nran = 1", "a cell is measured once"),
        ("%%measure_energy\n%%measure_energy\nimport asyncio\nawait asyncio.sleep(ran := 1)", "a cell is measured once"),
        (
            "get_ipython().run_cell_magic('measure_energy', '', 'import asyncio\\nawait asyncio.sleep(0)')",
            "code that awaits",
        ),
        ("%lem_auto maybe", "%lem_auto takes 'on' or 'off': got 'maybe'"),
        ("%lem_status now", "%lem_status takes nothing: got 'now'"),
    ],
)
def test_misuse_is_one_clear_error_and_nothing_runs(shell: InteractiveShell, cell: str, words: str) -> None:
    result, shown = run(shell, cell)
    assert type(result.error_in_exec).__name__ == "MeasureUsageError" and words in str(result.error_in_exec)
    assert "MeasureUsageError" in shown and len(shown.strip().splitlines()) == 1
    assert "ran" not in shell.user_ns and jupyter.session().measurements == []


def test_a_string_that_looks_like_the_magic_is_one(shell: InteractiveShell) -> None:
    result, _ = run(shell, "%%measure_energy -o m\ntext = '''\n%%measure_energy\n'''\nlen(text)")
    assert result.result == 18 and shell.user_ns["m"].status == "ok"


def test_nested_cells_are_nested_windows(shell: InteractiveShell) -> None:
    run(shell, "%%measure_energy -o outer\nget_ipython().run_cell_magic('measure_energy', '-o inner', 'z = 1')")
    assert shell.user_ns["inner"].parent == shell.user_ns["outer"].run_id
    run(shell, "%%measure_energy -o outer\n%measure_energy -o inner y = 2")
    assert shell.user_ns["inner"].parent == shell.user_ns["outer"].run_id and shell.user_ns["y"] == 2


# --- await ------------------------------------------------------------------------------------------------------------


def test_a_cell_that_awaits_has_its_value_names_and_options(shell: InteractiveShell) -> None:
    shell.user_ns["n"] = 2
    cell = (
        "import asyncio\n\nasync def numbers():\n    for i in range(3):\n        await asyncio.sleep(0)\n        yield i\n"
    )
    result, shown = run(
        shell,
        f"%%measure_energy -o m --repeat {{n}} --warmup 1 --tokens len(x) --label waits\n{cell}"
        "%time y = 1\nx = [i async for i in numbers()]\nawait asyncio.sleep(0.01, sum(x))",
    )
    assert result.success and result.result == 3 and shell.user_ns["x"] == [0, 1, 2] and shell.user_ns["_"] == 3
    m = shell.user_ns["m"]
    assert (m.label, [r.output_tokens for r in m.repeats], m.status) == ("waits", [3, 3], "ok")
    assert all(r.duration_s >= 0.01 for r in m.repeats) and "waits (window, ok)" in shown
    result, _ = run(shell, "%%measure_energy\nawait asyncio.sleep(0, 5);")
    assert result.success and result.result is None
    result, _ = run(shell, "%%measure_energy\nx = await asyncio.sleep(0, 6)\nx + 1")
    assert result.result == 7
    result, _ = run(shell, "%measure_energy --label line await asyncio.sleep(0, 'line')")
    assert result.result == "line" and jupyter.session().measurements[-1].label == "line"


def test_only_a_measured_cell_that_awaits_is_rewritten(shell: InteractiveShell) -> None:
    assert shell.transform_cell("%%measure_energy\nx = 1").startswith("get_ipython().run_cell_magic('measure_energy', ''")
    assert "run_cell_magic('measure_energy'" in shell.transform_cell("%%measure_energy\nasync def f():\n    await g()"), (
        "a function that awaits is no cell that does"
    )
    assert shell.transform_cell("%%measure_energy\nawait f()").startswith("await get_ipython()")
    assert "run_cell_magic('capture'" in shell.transform_cell("%%capture\n%%measure_energy\nawait f()")
    for _ in range(2):
        lem.load_ipython_extension(shell)
    named = [hook for hook in shell.input_transformers_cleanup if getattr(hook, "__name__", "") == "lem_kit_cells"]
    assert len(named) == 1, "loading again adds nothing"
    run(shell, "%autoawait off")
    result, _ = run(shell, "%%measure_energy\nimport asyncio\nawait asyncio.sleep(0)")
    assert "with %autoawait on" in str(result.error_in_exec)


def test_an_exception_of_a_cell_that_awaits_is_the_users_own(shell: InteractiveShell) -> None:
    cell = "import asyncio\n\ndef broken():\n    return 1 / 0\n\nawait asyncio.sleep(0)\nbroken()"
    result, shown = run(shell, f"\n%%measure_energy -o m\n{cell}")
    assert isinstance(result.error_in_exec, ZeroDivisionError) and shell.user_ns["m"].status == "failed"
    frames = traceback.extract_tb(result.error_in_exec.__traceback__)
    assert [(f.lineno, f.name) for f in frames[-2:]] == [(9, "<module>"), (6, "broken")]
    assert "return 1 / 0" in (frames[-1].line or "") and "magics.py" not in shown


@pytest.mark.parametrize("quiet", [False, True])
def test_a_console_that_is_interrupted_in_an_await_ends_the_cell(
    shell: InteractiveShell, quiet: bool, request: pytest.FixtureRequest
) -> None:
    """IPython leaves it pending there, to go on when the next cell awaits."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    options = "--quiet" if quiet else ""
    result, shown = run(shell, f"%%measure_energy -o m {options}\nimport asyncio\nawait asyncio.sleep(20)\nlate = True")
    m = shell.user_ns["m"]
    assert isinstance(result.error_in_exec, KeyboardInterrupt) and m.status == "interrupted" and 0.2 < m.duration_s < 5
    assert ("cell (window, interrupted)" in shown) is not quiet and jupyter.session().open_windows == []
    run(shell, "%%measure_energy -o m\nawait asyncio.sleep(1)")
    assert "late" not in shell.user_ns and m.parent is None


def test_what_a_cell_imports_from_the_future_holds_in_those_after_it(shell: InteractiveShell) -> None:
    run(shell, "%%measure_energy\nfrom __future__ import annotations\nx = 1")
    result, _ = run(shell, "def f(x: unknown_name): pass")
    assert result.success


@pytest.mark.parametrize("head", ["", "%%measure_energy\n"])
def test_a_stop_iteration_stays_one(shell: InteractiveShell, head: str) -> None:
    result, _ = run(shell, f"{head}next(iter([]))")
    assert isinstance(result.error_in_exec, StopIteration)


# --- a line -----------------------------------------------------------------------------------------------------------


def test_a_statement_is_measured_where_it_stands(shell: InteractiveShell) -> None:
    result, shown = run(shell, "v = %measure_energy -o m --label 'a b' --repeat 2 print('two  spaces') or 7\nv")
    assert result.result == 7 and "two  spaces" in shown and len(shell.user_ns["m"].repeats) == 2
    result, _ = run(shell, "def f(n):\n    k = 3\n    v = %measure_energy --tokens k -o m n + k\n    return v\nf(4)")
    assert result.result == 7 and shell.user_ns["m"].output_tokens == 3
    result, shown = run(shell, "def g(n):\n    %measure_energy --quiet n / 0\ng(4)")
    assert isinstance(result.error_in_exec, ZeroDivisionError) and "magics.py" not in shown and "g(4)" in shown
    result, _ = run(shell, "%measure_energy --quiet 5;")
    assert result.result is None


# --- options ----------------------------------------------------------------------------------------------------------


def test_quiet_shows_no_card(shell: InteractiveShell) -> None:
    _, shown = run(shell, "%%measure_energy -o m --quiet\nx = 1")
    assert shown == "" and jupyter.session().measurements == [shell.user_ns["m"]]


def test_joules_of_a_cell_are_exact(metered: FakeClock, shell: InteractiveShell) -> None:
    run(shell, "clock.advance(1)")
    _, shown = run(shell, "%%measure_energy -o m --repeat 2 --tokens 50\nclock.advance(2)")
    m = shell.user_ns["m"]
    assert metrics.energy_j(m).value == pytest.approx(400) and metrics.j_per_output_token(m).value == pytest.approx(4)
    assert "400 J (measured by a counter: meter:gpu0; covers gpu)" in shown


def test_counting_tokens_costs_the_figures_nothing(metered: FakeClock, shell: InteractiveShell) -> None:
    run(shell, "clock.advance(1)")
    for options in ("", "--repeat 2"):
        run(shell, f"%%measure_energy {options} -o m --tokens 'clock.advance(5) or 50'\nclock.advance(2)")
        m = shell.user_ns["m"]
        n = max(len(m.repeats), 1)
        assert metrics.energy_j(m).value == pytest.approx(200 * n) and metrics.measured_s(m) == pytest.approx(2 * n)
        assert metrics.output_tokens(m) == 50 * n


def test_a_baseline_is_measured_once_in_a_while_and_gives_net_energy(
    metered: FakeClock, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            metered.advance(timeout or 0)
            return True

    monkeypatch.setattr(jupyter.magics.threading, "Event", Waiting)
    run(shell, "clock.advance(1)")
    _, shown = run(shell, "%%measure_energy -o m --baseline 4\nclock.advance(2)")
    m, session = shell.user_ns["m"], jupyter.session()
    assert [(found.kind, found.duration_s) for found in session.measurements] == [("idle", 4), ("window", 2)]
    assert metrics.net_energy_j(m).value == pytest.approx(0, abs=1e-6) and "net of idle" in shown
    run(shell, "%%measure_energy -o m --baseline 4\nclock.advance(2)")
    run(shell, "%%measure_energy -o m --baseline\nclock.advance(2)")
    kinds = [(found.kind, found.duration_s) for found in session.measurements[2:]]
    assert kinds == [("window", 2), ("idle", 5), ("window", 2)], "one that was shorter is no substitute"
    session.baselines["bare"]["started_at"] = "2020-01-01T00:00:00.000+00:00"
    run(shell, "%%measure_energy -o m --baseline 4\nclock.advance(2)")
    assert session.measurements[-2].kind == "idle", "nor one that is old"


class Starting(Meter):
    """Knows nothing of its domains until `ready` is set, or for 0.8 s."""

    def __init__(self) -> None:
        super().__init__(time.monotonic_ns)
        self.ready, self._later = threading.Event(), self.domains
        self._until = time.monotonic() + 0.8
        self.domains = {}

    def read(self) -> dict[str, Reading]:
        if not self.ready.is_set() and time.monotonic() < self._until:
            return {}
        self.domains = self._later
        return super().read()


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's meter needs 0.8 s to start. Before `shell` in a test's arguments."""
    monkeypatch.setattr(jupyter, "Session", lambda: lem.Session(sources=[Starting()]))


@pytest.mark.parametrize("body", ["time.sleep(0.2)", "await asyncio.sleep(0.2)"])
def test_the_first_cell_waits_for_a_source_that_is_starting_and_says_so_once(
    starting: None, shell: InteractiveShell, body: str
) -> None:
    cell = f"%%measure_energy -o m --interval 0.5 --repeat 3 --baseline 0.3\nimport asyncio, time\n{body}"
    with capture_output() as first:
        shell.run_cell(cell, store_history=True)
    assert first.stderr == "lem_kit: waiting for meter, which is still starting; 3 s at most.\n"
    m = shell.user_ns["m"]
    assert m.valid and len(m.repeats) == 3 and "source_starting" not in m.reasons
    assert metrics.net_energy_j(m) is not None, "the baseline, too, has waited"
    with capture_output() as then:
        shell.run_cell("%%measure_energy\n1", store_history=True)
    assert then.stderr == ""


def test_automatic_measuring_begins_with_what_is_open(starting: None, shell: InteractiveShell) -> None:
    with capture_output() as captured:
        shell.run_cell("%lem_auto on", store_history=True)
    assert "waiting for meter" in captured.stderr and jupyter.session().starting == []


def test_a_baseline_of_sources_that_were_starting_is_measured_again(
    starting: None, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONGEST_START_S", 0.0)
    jupyter.session()._sampler.sources[0]._until += 60  # type: ignore[attr-defined]
    _, shown = run(shell, "%%measure_energy -o m --baseline 0.2\nimport time; time.sleep(0.1)")
    assert "source_starting" in shown and "NOT VALID: source_starting" in shown
    jupyter.session()._sampler.sources[0].ready.set()  # type: ignore[attr-defined]
    monkeypatch.undo()
    _, shown = run(shell, "%%measure_energy -o m --baseline 0.2\ntime.sleep(0.1)")
    assert [found.kind for found in jupyter.session().measurements] == ["idle", "window"] * 2
    assert metrics.net_energy_j(shell.user_ns["m"]) is not None
    run(shell, "%%measure_energy -o m --baseline 0.2\ntime.sleep(0.1)")
    assert len(jupyter.session().measurements) == 5, "now it is fresh"


def test_why_there_is_no_net_energy_is_said(metered: FakeClock, shell: InteractiveShell) -> None:
    run(shell, "clock.advance(1)")
    known = {"kind": "bare", "run_id": "gone", "started_at": now(), "temperature_c": {}, "labels": {}}
    jupyter.session().baselines["bare"] = {**known, "power_w": {}, "unknown": {"meter:gpu0": ["too_short"]}}
    _, shown = run(shell, "%%measure_energy -o m\nclock.advance(2)")
    assert "net of idle  not known: the baseline (bare) tells no power of meter:gpu0 (too_short)\n" in shown
    jupyter.session().baselines["bare"] = {**known, "power_w": {}}  # of a record that is older than its reasons
    _, shown = run(shell, "%%measure_energy -o m\nclock.advance(2)")
    assert "net of idle  not known: the baseline (bare) tells no power of meter:gpu0\n" in shown
    jupyter.session().baselines.clear()
    _, shown = run(shell, "%%measure_energy -o m\nclock.advance(2)")
    assert "net of idle" not in shown, "nobody asked"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat()


def test_a_baseline_without_a_meter_is_not_waited_for(shell: InteractiveShell) -> None:
    run(shell, "%%measure_energy -o m --baseline 60\nx = 1")
    assert [m.kind for m in jupyter.session().measurements] == ["window"]


@pytest.mark.parametrize(
    ("options", "seconds", "repeats", "told"),
    [
        ("--interval 0.01", "1", UNTIL.min_repeats, False),
        ("--interval 0.01", "1 + len(runs) % 2", UNTIL.max_repeats, True),
        ("--interval 0.01 --repeat 7", "1 + len(runs) % 2", 7, True),
        ("--interval 0.01 --repeat 2", "1", 2, False),
        ("--interval 0.5", "1 + len(runs) % 2", UNTIL.min_repeats, False),
        ("--interval 0.25", "1 + len(runs) % 2", 11, False),
    ],
)
def test_repeats_go_on_until_the_interval_is_narrow_enough(
    metered: FakeClock, shell: InteractiveShell, options: str, seconds: str, repeats: int, told: bool
) -> None:
    run(shell, "clock.advance(1)\nruns = []")
    _, shown = run(shell, f"%%measure_energy -o m {options}\nruns.append(1)\nclock.advance({seconds})")
    m = shell.user_ns["m"]
    total = metrics.energy_j(m)
    assert len(m.repeats) == repeats
    assert (total.half_width > m.config["interval"] * total.value) is told is ("interval_not_reached" in shown)


def test_an_interval_of_what_cannot_be_known_repeats_nothing(shell: InteractiveShell) -> None:
    _, shown = run(shell, "%%measure_energy -o m --interval 0.02\nx = 1")
    assert len(shell.user_ns["m"].repeats) == 1
    assert "interval_not_reached: repeating ended with an interval that is wider than was asked for, or not known" in shown


def test_a_folder_that_cannot_be_written_is_told_before_the_cell_runs(
    shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below", "nul\0", f"{'long' * 80}"):
        result, shown = run(shell, f"%%measure_energy --save '{tmp_path}/{place}'\nran = 1")
        assert type(result.error_in_exec).__name__ == "MeasureUsageError" and "options.py" not in shown
        assert "cannot be written to: " in str(result.error_in_exec) and "ran" not in shell.user_ns
    result, _ = run(shell, "%%measure_energy --save ~nobody-of-that-name/x\nran = 1")
    assert "--save ~nobody-of-that-name/x cannot be written to: " in str(result.error_in_exec)
    for place in ("a/b", "a"):  # as yet missing, and there
        assert run(shell, f"%%measure_energy --save {tmp_path / place}\nran = 1")[0].success
    run(shell, f"%%measure_energy --save {tmp_path / 'c'}\nx = = 1")
    run(shell, f"%%measure_energy --save {tmp_path / 'c/d'} --warmup 1\n1 / 0")
    assert not (tmp_path / "c").exists(), "nothing was measured"


def test_a_disk_that_fills_up_while_the_cell_runs_loses_nothing(
    shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_put", full)
    result, shown = run(shell, f"%%measure_energy -o m --save {tmp_path / 'new'}\nran = 1")
    assert type(result.error_in_exec).__name__ == "MeasureUsageError" and "store.py" not in shown
    assert "No space left on device" in str(result.error_in_exec)
    assert shell.user_ns["ran"] and shell.user_ns["m"].status == "ok"


def test_records_are_saved_where_the_cell_began(
    shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run(shell, "%%measure_energy -o m --save runs\nimport os; os.chdir('elsewhere')")
    assert lem.load(tmp_path / "runs" / shell.user_ns["m"].run_id) == shell.user_ns["m"]


def test_help_and_lsmagic_know_the_magics(shell: InteractiveShell) -> None:
    text = shell.find_cell_magic("measure_energy").__doc__
    for option in ("--output NAME", "--repeat N", "--baseline", "--interval SHARE", "0.02 for 2 %;", "--quiet"):
        assert option in text
    assert {"measure_energy", "lem_auto", "lem_status"} <= shell.magics_manager.lsmagic()["line"].keys()


def test_loading_twice_keeps_the_session_and_unloading_undoes_everything(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> tuple[Any, ...]:
        hooks = {name: [f for f in found if "IPython" not in f.__module__] for name, found in shell.events.callbacks.items()}
        mine = [m for m in shell.magics_manager.registry["MeasureMagics"].magics["line"] if shell.find_line_magic(m)]
        return hooks, list(shell.input_transformers_cleanup), list(shell.Completer.custom_matchers), mine

    before, session = state(), jupyter.session()
    run(shell, "%lem_auto on")
    lem.load_ipython_extension(shell)
    assert jupyter.session() is session and jupyter.cells().automatic
    assert [len(part) for part in state()] == [len(part) for part in before]
    lem.unload_ipython_extension(shell)
    with pytest.raises(LemError, match="load_ext lem_kit"):
        jupyter.session()
    assert "measure_energy" not in shell.magics_manager.magics["cell"]
    hooks, transformers, matchers, mine = state()
    assert not any(hooks.values()) and mine == [] and "lem_kit" not in f"{transformers}{matchers}"
    lem.load_ipython_extension(shell)
    assert not jupyter.cells().automatic
