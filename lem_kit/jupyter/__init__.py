"""lem_kit inside IPython and Jupyter: the magics, the live view, and the card that a Measurement is shown as.

The one idea: `%load_ext lem_kit` opens one Session for the notebook, so that sources which start slowly are ready when the
first cell is measured. Whatever it changes in the shell it undoes when it is loaded again or unloaded.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import LemError
from ..session import Session

if TYPE_CHECKING:
    from .auto import Cells

_session: Session | None = None
_cells: Cells | None = None
_undo: list[Callable[[], object]] = []


def session() -> Session:
    """The notebook's session, opened by `%load_ext lem_kit`. LemError before that."""
    if _session is None:
        raise LemError("No session is open in this notebook: run `%load_ext lem_kit` first.")
    return _session


def cells() -> Cells:
    """What is done before and after each cell. LemError before `%load_ext lem_kit`."""
    session()
    assert _cells is not None
    return _cells


def load(shell: Any) -> None:
    """Open the notebook's session, register the magics and what goes with them. Loading again keeps the session, its
    measurements, and whether every cell is measured."""
    global _session, _cells
    from . import completion, live
    from .auto import Cells
    from .cell import rewriter
    from .magics import MeasureMagics

    automatic = _cells is not None and _cells.automatic
    _detach()
    if _session is None:
        _session = Session()
        atexit.register(_close)
    parser = MeasureMagics.measure_energy.parser
    _cells = Cells(_session, automatic)
    _attach(shell.input_transformers_cleanup, rewriter(shell, parser, lambda: _cells is not None and _cells.running))
    for event, hook in (("pre_run_cell", _cells.before), ("post_run_cell", _cells.after)):
        shell.events.register(event, hook)
        _undo.append(partial(shell.events.unregister, event, hook))
    _undo.append(completion.install(shell, parser))
    live.enable()
    _undo.append(live.disable)
    shell.register_magics(MeasureMagics(shell))
    for kind, names in MeasureMagics.magics.items():
        _undo.extend(partial(shell.magics_manager.magics[kind].pop, name, None) for name in names)


def unload(shell: Any) -> None:
    """Close the session and undo what `load` did."""
    global _cells
    _detach()
    _cells = None
    atexit.unregister(_close)
    _close()


def _attach(hooks: list[Any], hook: Any) -> None:
    hooks.append(hook)
    _undo.append(lambda: hooks.remove(hook))


def _detach() -> None:
    while _undo:
        _undo.pop()()


def _close() -> None:
    global _session
    if _session is not None:
        _session.close()
        _session = None
