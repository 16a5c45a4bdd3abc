"""lem_kit inside IPython and Jupyter: the `%%measure_energy` magic and the card that a Measurement is shown as.

The one idea: `%load_ext lem_kit` opens one Session for the notebook, so that sources which start slowly are ready when the
first cell is measured. Not covered yet: a live view, and cells with top-level `await`.
"""

from __future__ import annotations

import atexit
from typing import Any

from ..errors import LemError
from ..session import Session

_session: Session | None = None


def session() -> Session:
    """The notebook's session, opened by `%load_ext lem_kit`. LemError before that."""
    if _session is None:
        raise LemError("No session is open in this notebook: run `%load_ext lem_kit` first.")
    return _session


def load(shell: Any) -> None:
    """Open the notebook's session and register the magic. Loading again keeps the session and its measurements."""
    global _session
    from .magics import MeasureMagics

    if _session is None:
        _session = Session()
        atexit.register(_close)
    shell.register_magics(MeasureMagics(shell))


def unload(shell: Any) -> None:
    """Close the session and remove the magic."""
    shell.magics_manager.magics["cell"].pop("measure_energy", None)
    atexit.unregister(_close)
    _close()


def _close() -> None:
    global _session
    if _session is not None:
        _session.close()
        _session = None
