"""The backend seam: an engine that turns requests into token events, and nothing else.

A backend is one file in this folder, found by its name. It has a function

    load(model: str, **engine_args) -> Backend

Engine arguments go through untouched; one the engine does not know is a LemError that names the nearest valid one. A
backend holds no stopwatch, no warm-up, no retry and no progress bar: `traffic` and `session` do, once for all engines.

Not covered here: when requests are sent (`traffic`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, runtime_checkable

from ..errors import LemError, Unavailable, nearest
from ..measurement import Request, TokenEvent


@runtime_checkable
class Backend(Protocol):
    """What a backend promises. `tests/test_backend_contract.py` holds every file of this folder to it.

    `generate(requests)` takes one or more requests that are submitted together and yields the events of all of them as the
    engine emits them; for an engine without a scheduler they form one static batch. `concurrent` says whether several
    `generate` calls may run at once; where False, open-loop arrivals are refused. Closing the iterator early stops the
    work. `describe` returns strict-JSON facts: at least "engine", "version", "model" (with "parameters", "dtype",
    "vocabulary" where known), "requested" and "effective" engine configuration. `close` frees the model and may be
    called twice.
    """

    name: str
    concurrent: bool

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]: ...

    def describe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def backend_names() -> list[str]:
    """Names of the backend files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load_backend(name: str, model: str, **engine_args: Any) -> Backend:
    """Load `model` in the engine `name`; `engine_args` pass through untouched.

    Raises LemError for an unknown backend, model or argument, and Unavailable when the engine's library is not installed.
    A library that is installed but broken shows its own traceback.
    """
    if name not in backend_names():
        raise LemError(f"There is no backend '{name}': {nearest(name, backend_names())}")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
        backend: Backend = module.load(model, **engine_args)
    except ModuleNotFoundError as error:
        if error.name not in (name, "torch"):
            raise
        raise Unavailable(f"Backend '{name}' needs the package {error.name}: pip install 'lem_kit[{name}]'") from error
    return backend
