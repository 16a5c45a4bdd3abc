"""`%lem_status`: what is open, what is missing, and the remedy; escaped."""

from __future__ import annotations

import re
import time

import pytest
from IPython.core.interactiveshell import InteractiveShell
from ipython_shell import run

from lem_kit import jupyter
from lem_kit.energy import Reading
from lem_kit.errors import LemError
from lem_kit.jupyter.status import Status
from lem_kit.session import Session


def test_it_says_what_is_measured_and_with_what(metered: object, shell: InteractiveShell) -> None:
    run(shell, "clock.advance(1)")
    jupyter.session().baselines["bare"] = {
        "power_w": {"meter:gpu0": {"watts": 99.5, "half_width": 1.0}}, "started_at": "2026-01-01T00:00:00.000+00:00"
    }  # fmt: skip
    result, _ = run(shell, "%lem_status")
    text = repr(result.result)
    assert re.search(r"^  meter:gpu0 +gpu, measured by a counter$", text, re.M)
    assert "meter:gpu0 99.5 W, measured 2026-01-01" in text and "fake is a part of lem_kit." in text
    assert f"IPython {__import__('IPython').__version__}" in text
    assert list(result.result.tables) == ["Energy sources", "Session", "Kernel", "Backends", "Checks"]


def test_what_is_missing_comes_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEM_KIT_SOURCES", raising=False)
    with Session(sources=[]) as session:
        session.unavailable["nvml"] = "no driver: install <one>"
        status = Status.of(session, automatic=True)
    assert "nvml  not open: no driver: install <one>" in repr(status)
    assert "energy cannot be measured here; time and tokens can" in repr(status) and "every cell" in repr(status)
    page = status._repr_html_()
    assert "install &lt;one&gt;" in page and "<one>" not in page
    assert set(re.findall(r"<(\w+)", page)) <= {"table", "caption", "b", "tr", "th", "td", "code"}


def test_a_source_that_failed_to_start_is_not_starting() -> None:
    class Silent:
        name, domains, failure = "silent", {}, ""  # type: ignore[var-annotated]

        def read(self) -> dict[str, Reading]:
            if self.failure:
                raise LemError(self.failure)
            return {}

        def close(self) -> None: ...

    source = Silent()
    with Session(sources=[source]) as session:
        assert "silent  open, and still starting" in repr(Status.of(session, automatic=False))
        source.failure = "no licence"
        deadline = time.monotonic() + 5
        while session.starting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "silent  not open: no licence" in repr(Status.of(session, automatic=False))


def test_sources_that_are_chosen_by_name_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEM_KIT_SOURCES", "none")
    with Session() as session:
        assert "only what it names is opened: none" in repr(Status.of(session, automatic=False))
