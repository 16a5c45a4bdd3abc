"""What lem_kit does before and after every cell: `%lem_auto` measures it, and no window stays open behind one that failed.

The one idea: a window belongs to the cell that opened it. One that is still open when its cell has ended with an exception
has nobody left to end it; while it was open, every later window would be taken for a part of it.

Not covered: windows of background tasks and threads, which outlive the cell that started them, and those that a cell that
ended well keeps open for a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import threading
from html import escape
from typing import Any

from IPython.display import display

from .. import metrics
from ..measurement import Measurement
from ..session import Session, Window, current_owner
from .card import record
from .cell import prompt_interrupts

# A cell that measures itself, or that only talks to lem_kit.
_OWN = re.compile(r"^\s*(\w+\s*=\s*)?%{1,2}(measure_energy|lem_auto|lem_status|(re|un)?load_ext)\b", re.MULTILINE)
_LABEL = 60


class Cells:
    """Hooks of one shell: `before` and `after` each cell. While `automatic`, every cell is measured."""

    def __init__(self, session: Session, automatic: bool = False) -> None:
        self.automatic = automatic
        self._session = session
        self._info: Any = None  # IPython's, of the cell that runs; not of those that it runs itself
        self._owner: asyncio.Task[Any] | threading.Thread | None = None
        self._earlier: list[Window] = []
        self._left: list[Window] = []
        self._manager: contextlib.ExitStack | None = None
        self._window: Window | None = None

    @property
    def running(self) -> bool:
        """Whether a cell runs now."""
        return self._info is not None

    def before(self, info: Any) -> None:
        """IPython's pre_run_cell."""
        if self.running or threading.current_thread() is not threading.main_thread():
            return
        self._info, self._owner = info, current_owner()
        self._close_left()
        self._earlier = list(self._session.open_windows)
        if self.automatic and not _OWN.search(info.raw_cell):
            stack = contextlib.ExitStack()
            window = self._session.window(_label(info.raw_cell), config={"lem_auto": True})
            self._manager, self._window = stack, stack.enter_context(window)
            stack.enter_context(prompt_interrupts())

    def after(self, result: Any) -> None:
        """IPython's post_run_cell; `result` is None where IPython itself failed."""
        if not self.running or threading.current_thread() is not threading.main_thread():
            return
        if result is not None and result.info.raw_cell != self._info.raw_cell:  # a cell that the cell ran
            return
        self._info = None
        error = None if result is None else result.error_before_exec or result.error_in_exec
        if result is None or error is not None:
            if self._own_open():
                _end_task(self._owner)
            self._left = self._own_open()
            self._close_left()
        self._earlier, self._owner = [], None
        manager, window, self._manager, self._window = self._manager, self._window, None, None
        if manager is None or window is None:
            return
        if error is None:
            manager.__exit__(None, None, None)
        else:
            with contextlib.suppress(type(error)):
                manager.__exit__(type(error), error, error.__traceback__)
        if result is not None and result.error_before_exec:  # nothing ran
            self._session.measurements.remove(window.measurement)
        else:
            _show(window.measurement)

    def _own_open(self) -> list[Window]:
        """Windows that the cell opened itself and did not close."""
        own = [window for window in self._session.open_windows if window.owner is self._owner]
        return [window for window in own if window not in self._earlier and window is not self._window]

    def _close_left(self) -> None:
        while self._left:
            window = self._left.pop()
            if self._session.abandon(window) is not None:
                told = f"lem_kit: the window '{window.label}' was left open by a cell that did not end well."
                print(f"{told} It is closed, and its record, '{window.run_id}', says 'interrupted'.", file=sys.stderr)


def _end_task(task: asyncio.Task[Any] | threading.Thread | None) -> None:
    """Cancel a cell that a console has left in the middle of an `await`: it would go on when the next cell awaits."""
    if isinstance(task, asyncio.Task) and not task.done() and not task.get_loop().is_running():
        task.cancel()
        task.get_loop().run_until_complete(asyncio.wait([task], timeout=1.0))


def _label(source: str) -> str:
    """The first line of a cell that says something."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith("#")), lines[0] if lines else "cell")
    return first if len(first) <= _LABEL else f"{first[: _LABEL - 1]}…"


def line(m: Measurement) -> str:
    """The card in one line."""
    total, power = metrics.energy_j(m), metrics.mean_power_w(m)
    parts = [f"{metrics.measured_s(m):.4g} s"]
    if total is None:
        parts.insert(0, f"energy not known ({', '.join(metrics.reasons(m)[:2]) or 'no reading'})")
    else:
        parts.insert(0, f"{total.told('J')} ({metrics.METHODS[total.method]}, covers {', '.join(total.scopes)})")
    if power is not None and power.resolved:  # else it says no more than the energy
        parts.append(power.told("W"))
    status = "" if m.status == "ok" else f" [{m.status}]"
    return f"⚡ {m.label}{status}: {', '.join(parts)}"


def _show(m: Measurement) -> None:
    told = line(m)
    display({"text/plain": told, "text/html": f"<p>{escape(told)}</p>"}, metadata={"lem_kit": record(m)}, raw=True)
