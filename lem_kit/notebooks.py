"""The notebooks that come with lem_kit: finding one by name, and executing it with parameters by papermill.

The one idea: a batch is the notebook a person would open. An unknown parameter is an error here, where papermill would only
warn and run anyway. Not covered: what a study runs and in which order (`study`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import LemError, Unavailable, nearest


def find(name: str, beside: Path | None = None) -> Path:
    """The notebook of that name: in `beside`, in ./notebooks, or among those that come with lem_kit.

    LemError with the closest name if there is none. A name is not a path: it cannot lead out of these folders.
    """
    package = Path(__file__).parent
    folders = [f for f in (beside, Path("notebooks"), package.parent / "notebooks", package / "notebooks") if f is not None]
    known = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.ipynb"))}
    name = name.removesuffix(".ipynb")
    if name not in known:
        raise LemError(f"There is no notebook '{name}': {nearest(name, known)}")
    return known[name]


def parameters(path: Path) -> dict[str, Any]:
    """Parameters of a notebook by name, as papermill reads them from the cell tagged "parameters"."""
    papermill = _papermill()
    with _quiet():
        return dict(papermill.inspect_notebook(str(path)))


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """LemError for a parameter that the notebook does not have, or that JSON (and so a notebook) cannot hold."""
    known = parameters(path)
    for name, value in given.items():
        if name not in known:
            raise LemError(f"Notebook '{path.stem}' has no parameter '{name}': {nearest(name, known)}")
        if not _is_json(value):
            raise LemError(f"Parameter '{name}' of notebook '{path.stem}' must be plain JSON without NaN: got {value!r}.")


def execute(path: Path, output: Path, values: Mapping[str, Any], kernel: str | None = None) -> float:
    """Run the notebook with these parameters, write the executed copy to `output`, return the seconds it took.

    The kernel is that of this interpreter unless named. An exception in a cell leaves the copy with its traceback and is
    raised again as LemError; a kernel that dies is one too.
    """
    papermill = _papermill()
    check_parameters(path, values)
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with _quiet():
            papermill.execute_notebook(
                str(path),
                str(output),
                parameters=dict(values),
                kernel_name=kernel or "python3",
                progress_bar=False,
                autosave_cell_every=0,  # a save in the middle of a measured cell would be measured with it
                store_widget_state=False,
                extra_arguments=["--IPKernelApp.log_level=40"],  # its warning about TCP on loopback tells users nothing
            )
    except papermill.PapermillExecutionError as error:
        raise LemError(f"Notebook '{path.stem}' failed: {error.ename}: {error.evalue} (see {output})") from error
    except (RuntimeError, TimeoutError) as error:  # a dead kernel, a start that took too long
        raise LemError(f"Notebook '{path.stem}' was cut off: {type(error).__name__}: {error} (see {output})") from error
    return time.monotonic() - started


def _papermill() -> Any:
    try:
        import papermill
    except ModuleNotFoundError as error:
        raise Unavailable("Executing notebooks needs papermill: pip install 'lem_kit[notebook]'") from error
    return papermill


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Papermill's chatter is not the user's; the renderer is the one whose output survives in a notebook; nobody looks at
    it as it runs."""
    logger, ours = logging.getLogger("papermill"), ("PLOTLY_RENDERER", "LEM_KIT_NONINTERACTIVE")
    before = {name: os.environ.get(name) for name in ours}
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["PLOTLY_RENDERER"] = before["PLOTLY_RENDERER"] or "plotly_mimetype"
    os.environ["LEM_KIT_NONINTERACTIVE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_json(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, tuple)
