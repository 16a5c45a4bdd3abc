"""`%%measure_energy` and `%measure_energy`: run a cell or a statement in a measurement window and show what it cost;
`%lem_auto` does it for every cell, and `%lem_status` says what can be measured.

The one idea: the magic compiles the cell itself and runs it in the user's namespace, so that the cell's value, its names and
its exceptions (with the user's own lines) are what they would be without the magic. An exception is recorded and raised
again; nothing is swallowed. A cell that awaits goes the same way, in the kernel's own event loop (`cell`).

Not covered: a cell that awaits inside another magic that runs it (`%%capture`, `%%time`): IPython itself cannot do that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, needs_local_scope, no_var_expand

from ..session import Window
from .cell import MISPLACED, Cell, compiled, prompt_interrupts
from .measured import Measured, waited_for
from .options import MeasureUsageError, expanded, expression, folder, parsed, split_statement, with_options


@magics_class
class MeasureMagics(Magics):
    """Registered by `%load_ext lem_kit`."""

    @with_options
    @no_var_expand
    @needs_local_scope
    @line_cell_magic
    def measure_energy(self, line: str, cell: str | None = None, local_ns: dict[str, Any] | None = None) -> Any:
        """Measure the energy of a cell, `%%measure_energy [options]` as its first line, or of a statement:
        `%measure_energy [options] statement`. Its value is the value of what was measured. In the options, but not in
        --tokens, {name} and $name become the values of your variables.
        """
        __tracebackhide__ = True  # between the magic's line and the user's own lines there is nothing to see
        code, measured = self._prepared(line, cell, local_ns)
        if code.waits:
            self.refuse_await()
        measured.session.wait_for_sources(waited_for)
        if measured.baseline_s:
            with measured.session.idling(measured.baseline_s):
                threading.Event().wait(measured.baseline_s)
        for _ in range(measured.options.warmup):
            code.run()
        value = None
        try:
            with measured.window() as turns:
                for turn in turns:
                    with turn:
                        value = code.run()
        finally:
            measured.keep()
        measured.complain()
        return value

    async def measure_awaiting(self, line: str, cell: str, statement: bool = False) -> Any:
        """As `measure_energy`, for what awaits: cells are rewritten to a call of this."""
        __tracebackhide__ = True
        code, measured = self._prepared(line, cell, None, statement)
        with prompt_interrupts():
            await _beside(lambda: measured.session.wait_for_sources(waited_for))
            if measured.baseline_s:
                with measured.session.idling(measured.baseline_s):
                    await asyncio.sleep(measured.baseline_s)
            for _ in range(measured.options.warmup):
                await code.run_awaiting()
            value = None
            try:
                with measured.window(wait=False) as turns:
                    for turn in turns:
                        with turn:
                            value = await code.run_awaiting()
            finally:
                try:
                    await _ended(measured.opened)
                finally:
                    measured.keep()
        measured.complain()
        return value

    def _prepared(
        self, line: str, cell: str | None, local_ns: dict[str, Any] | None, statement: bool = False
    ) -> tuple[Cell, Measured]:
        """What is to run, compiled, and what is to be done around it. Everything that can be wrong is found here."""
        from . import session

        __tracebackhide__ = True
        parser = type(self).measure_energy.parser
        if cell is None:
            line, cell = split_statement(parser, line)
            statement = True
        names = local_ns if local_ns is not None else self.shell.user_ns
        line = expanded(line, {**self.shell.user_ns, **names})  # the options alone: `{n}` in a statement is a set
        options = parsed(parser, line)
        tokens = expression(options.tokens)
        code = compiled(self.shell, line, cell, statement, names)
        options.save = folder(options.save)
        return code, Measured(session(), self.shell, options, tokens, names)

    def refuse_await(self) -> None:
        """Say why a cell that awaits cannot be measured where it stands."""
        __tracebackhide__ = True
        raise MeasureUsageError(
            "code that awaits can be measured where %%measure_energy is the first line of a cell, or %measure_energy all of "
            "it, with %autoawait on; not inside %%capture, %%time, run_cell_magic or a function (--quiet hides the card)"
        )

    def refuse_empty(self) -> None:
        """Say that there is nothing below `%%measure_energy`."""
        __tracebackhide__ = True
        raise MeasureUsageError("nothing to measure: the cell is empty below %%measure_energy")

    @line_magic(MISPLACED)
    def misplaced(self, line: str) -> None:
        """Said where `%%measure_energy` is not the first line of a cell."""
        __tracebackhide__ = True
        raise MeasureUsageError("%%measure_energy must be the first line of its cell: put comments and code below it")

    @line_magic
    def lem_auto(self, line: str) -> None:
        """Measure every cell that follows: `%lem_auto on`, and `%lem_auto off`. Alone it says which it is."""
        from . import cells, session

        word = line.strip()
        if word not in ("on", "off", ""):
            raise MeasureUsageError(f"%lem_auto takes 'on' or 'off': got {word!r}", "lem_auto")
        if word:
            cells().automatic = word == "on"
        if cells().automatic:
            session().wait_for_sources(waited_for)
        print(f"lem_kit measures {'every cell' if cells().automatic else 'cells with %%measure_energy only'}.")

    @line_magic
    def lem_status(self, line: str) -> Any:
        """What is measured in this notebook, with which libraries, and why the rest is missing."""
        from . import cells, session
        from .status import Status

        if line.strip():
            raise MeasureUsageError(f"%lem_status takes nothing: got {line.strip()!r}", "lem_status")
        return Status.of(session(), cells().automatic)


async def _ended(window: Window | None) -> None:
    """Wait until the window's measurement is complete."""
    __tracebackhide__ = True
    if window is not None:
        await _beside(lambda: window.measurement)


async def _beside(wait: Callable[[], object]) -> None:
    """Call what waits; other tasks of the loop go on meanwhile."""
    __tracebackhide__ = True
    with contextlib.suppress(RuntimeError):  # no asyncio: then nobody waits before the measurement is asked for
        await asyncio.get_running_loop().run_in_executor(None, wait)
