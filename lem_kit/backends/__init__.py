"""The backend seam: an engine that turns requests into token events, and nothing else.

A backend is one file in this folder, found by its name. It has a function

    load(model: str, **engine_args) -> Backend

and a literal `NEEDS` with what `Needs` asks for, which is read without importing the file, for the engine may live in
another environment.

Engine arguments go through untouched; one the engine does not know is a LemError that names the nearest valid one. A
backend holds no stopwatch, no warm-up, no retry and no progress bar: `traffic` and `session` do, once for all engines.

Not covered here: when requests are sent (`traffic`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import LemError, Unavailable, nearest
from ..measurement import Request, TokenEvent

# Names that `Backend.counters` may give, and what they mean.
COUNTERS: Mapping[str, str] = {
    "peak_memory_bytes": "peak of device memory in use by tensors, summed over the devices of the model",
    "peak_reserved_memory_bytes": "the same of the memory that the engine's allocator held",
    "batch_requests_mean": "requests in the running batch, mean over looks at which there was one",
    "batch_requests_max": "requests in the running batch, most seen at a look",
    "waiting_requests_max": "requests that had no place in the running batch, most seen at a look",
    "kv_cache_used_max": "share of the cache for keys and values that was taken, most seen at a look",
    "requests_without_engine_stamps": "requests stamped by the client because the engine lost its own stamps",
}

# Engines that hold a model in processes of their own, from when they are loaded until they are closed: this process may look
# as if it had none. Each adds and removes itself.
RESIDENT: set[object] = set()


@runtime_checkable
class Backend(Protocol):
    """What a backend promises. `tests/test_backend_contract.py` holds every file of this folder to it.

    `generate(requests)` takes one or more requests that are submitted together and yields the events of all of them as the
    engine hands them over, which may be when a request is finished if the engine stamps them itself; for an engine without a
    scheduler they form one static batch. `concurrent` says whether several
    `generate` calls may run at once; where False, open-loop arrivals are refused. Closing the iterator early stops the
    work. `describe` returns strict-JSON facts: at least "engine", "version", "model" (with "parameters", "dtype",
    "vocabulary" where known), "requested" and "effective" engine configuration. `close` frees the model and may be
    called twice.

    Optional: `counters() -> dict[str, float]`, what only the engine can see of the time since the last call of it, with
    units in the names. A caller asks once before and once after what it measures. What is not observed is left out. Names
    in use, in `backends.COUNTERS`. And `steps() -> dict[str, Series]`, what the engine logged of each of its steps
    since the last call, under names of its own with their units; a record keeps it with the gauges of its trace, and finds
    the steady state by `batch_requests` and `waiting_requests`. And
    `token_ids(request) -> Sequence[int]`, the ids that the engine makes of a request's prompt; nothing runs, and it is asked
    before anything does.
    """

    name: str
    concurrent: bool

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]: ...

    def describe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Needs:
    """What an engine needs around it.

    `package` is what `import` calls it, None for a backend that needs nothing. `image` is the engine's official container
    image; `container` further options for running it. `compute_capability` is the oldest GPU architecture that it runs on.
    `parallel` names the engine arguments that spread a model over processes, which then meet in /dev/shm when their product
    is above 1.
    """

    package: str | None = None
    image: str | None = None
    container: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    parallel: tuple[str, ...] = ()


@functools.cache
def needs(name: str) -> Needs:
    """What the backend `name` needs, whether or not its engine is installed here. LemError if there is no such backend."""
    _check(name)
    tree = ast.parse(Path(__path__[0], f"{name}.py").read_text(encoding="utf-8"))
    for line in tree.body:
        if isinstance(line, ast.Assign) and [getattr(target, "id", None) for target in line.targets] == ["NEEDS"]:
            return Needs(**ast.literal_eval(line.value))
    return Needs()


def backend_names() -> list[str]:
    """Names of the backend files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load_backend(name: str, model: str, **engine_args: Any) -> Backend:
    """Load `model` in the engine `name`; `engine_args` pass through untouched.

    Raises LemError for an unknown backend, model or argument, or where `preflight` finds that the engine cannot run, and
    Unavailable when its library is not installed. A library that is installed but broken shows its own traceback.
    """
    from .. import preflight  # which reads `needs`

    _check(name)
    preflight.refuse(name, engine_args)
    try:
        module = importlib.import_module(f"{__name__}.{name}")
        backend: Backend = module.load(model, **engine_args)
    except ModuleNotFoundError as error:
        if error.name not in (name, "torch"):
            raise
        raise Unavailable(f"Backend '{name}' needs the package {error.name}: pip install 'lem_kit[{name}]'") from error
    return backend


def _check(name: str) -> None:
    if name not in backend_names():
        raise LemError(f"There is no backend '{name}': {nearest(name, backend_names())}")
