"""How a point of a search becomes a run in a folder, and how the point is found again in the run.

The one idea: a run's name ends in a digest of all its parameters, so a run that says it is of a point can be held to it,
whoever made it: this search, one that was cut off, or a study. Not covered: which point is next (`search`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import notebooks, store
from ..errors import LemError, nearest
from ..measurement import Measurement, jsonable
from . import runner, space
from .grid import Planned, Study, run_id
from .space import Point, Space


@dataclass(frozen=True)
class Work:
    """How points become runs in a folder. `run` makes one and returns its Measurement, saved or not, or raises; `title`
    and all parameters name it."""

    title: str
    fixed: Mapping[str, Any]
    folder: Path
    run: Callable[[Planned], Measurement]

    def planned(self, point: Mapping[str, Any], suffix: str = "") -> Planned:
        parameters = space.filled(self.fixed, point)
        return Planned(run_id(self.title, parameters, point) + suffix, parameters)

    def make(self, point: Mapping[str, Any], suffix: str = "") -> Measurement:
        """The run of this point, saved. One that raises becomes a record that says so, and is not made again."""
        planned = self.planned(point, suffix)
        place = self.folder / planned.run_id
        if (place / store.RECORD).exists() and (done := store.load(place)).status != "interrupted":
            return done
        if place.exists():
            shutil.rmtree(place)  # cut off: nothing in it is a result, and two tries must not mix
        t0_ns = time.monotonic_ns()
        try:
            m = self.run(planned)
        except Exception as error:
            m = runner.failed(planned.run_id, planned.parameters, error, t0_ns)
        if not isinstance(m, Measurement):
            raise LemError(f"measure= must return a Measurement, as Session.run does: got {type(m).__name__}.")
        if not (place / store.RECORD).exists():
            if (self.folder / m.run_id / store.RECORD).exists():
                raise LemError(
                    f"measure= saved its measurement in {self.folder}, as the search will: open a Session without it."
                )
            m = dataclasses.replace(
                m, run_id=planned.run_id, config={**m.config, **jsonable(planned.parameters), **jsonable(point)}
            )
            store.save(m, self.folder)
        return m

    def point_of(self, m: Measurement, names: Sequence[str]) -> Point | None:
        """The point that a run of the folder was made for, whoever made it; None if it is none of this search."""
        flat = {name: m.config[name] for name in names} if all(name in m.config for name in names) else None
        executed = _executed_with(self.folder / m.run_id)
        for point in (flat, space.taken(m.config, names), space.taken(executed, names)):
            if point is not None and self.planned(point).run_id.rsplit("-", 1)[1] == m.run_id.rsplit("-", 1)[-1]:
                return point
        return None


def _executed_with(place: Path) -> Mapping[str, Any]:
    """The parameters that papermill noted in a run's notebook; none where there is none."""
    try:
        record = json.loads((place / runner.NOTEBOOK).read_text(encoding="utf-8"))
        found = record["metadata"]["papermill"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, Mapping) else {}


def by_notebook(
    notebook: str | Path, asked: Space, given: dict[str, Any], folder: Path, kernel: str | None
) -> tuple[Work, dict[str, list[Any]]]:
    """And the notebook's own values of its parameters."""
    path = notebook if isinstance(notebook, Path) else notebooks.find(notebook)
    if not path.is_file():
        raise LemError(f"There is no notebook {path}: check the path, or give the name of one that comes with lem_kit.")
    if kernel is not None:
        from jupyter_client.kernelspec import KernelSpecManager

        if kernel not in (known := KernelSpecManager().find_kernel_specs()):
            raise LemError(f"There is no Jupyter kernel '{kernel}': {nearest(kernel, known)}")
    fixed = space.fixed_for(path, asked, given)
    study = Study(path, fixed, kernel=kernel)
    defaults = {name: [space.default(parameter)] for name, parameter in notebooks.parameters(path).items()}
    return Work(path.stem, fixed, folder, lambda planned: runner.make(study, folder, planned).measurement), defaults


def by_callable(measure: Callable[[dict[str, Any]], Measurement], asked: Space, given: dict[str, Any], folder: Path) -> Work:
    if not callable(measure):
        raise LemError(f"measure= takes the parameters of a point and returns a Measurement: {measure!r} cannot be called.")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LemError(f"parameters name the runs and must be plain JSON without NaN: got {given!r}.") from error
    space.check_fixed(asked, given)
    return Work("measure", given, folder, lambda planned: measure(copy.deepcopy(dict(planned.parameters))))
