"""Running a study: papermill over its notebook, one run after another, into one folder.

The one idea: the notebook saves its own measurement into the folder and under the run_id that it is given; the runner only
asks the store whether it is there and whole. What is complete is not run again; what failed is. A run that fails does not
stop the others. Not covered yet: leases of GPUs, several machines.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import notebooks, store
from ..errors import LemError
from ..measurement import Measurement
from .grid import Planned, Study

NOTEBOOK = "notebook.ipynb"


@dataclass(frozen=True)
class Outcome:
    """What became of one planned run: its measurement, or the sentence that says why there is none."""

    planned: Planned
    measurement: Measurement | None
    problem: str | None = None
    seconds: float | None = None  # None: it was complete already

    @property
    def ok(self) -> bool:
        return self.measurement is not None and self.measurement.status == "ok"


def run(
    study: Study,
    folder: str | Path,
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Make every run of the study that `folder` does not hold yet. `say` gets a line about each when it is over."""
    folder = Path(folder)
    plan = study.plan(overrides)
    outcomes = []
    for number, planned in enumerate(plan, 1):
        outcome = _one(study, folder, planned)
        outcomes.append(outcome)
        spent = "complete already" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
        say(f"[{number}/{len(plan)}] {planned.run_id}: {outcome.problem or spent}")
    return outcomes


def _one(study: Study, folder: Path, planned: Planned) -> Outcome:
    place = folder / planned.run_id
    done = _complete(place)
    if done is not None and done.status == "ok":
        return Outcome(planned, done)
    if place.exists():
        shutil.rmtree(place)  # cut off or failed: nothing in it is a result, and two tries must not mix
    values = {**planned.parameters, "folder": str(folder), "run_id": planned.run_id}
    problem, seconds = None, 0.0
    try:
        seconds = notebooks.execute(study.notebook, place / NOTEBOOK, values, study.kernel)
    except LemError as error:
        problem = str(error)
    done = _complete(place)
    if done is None and problem is None:
        problem = f"Notebook '{study.notebook.stem}' ended without saving run {planned.run_id} into {folder}."
    return Outcome(planned, done, problem, seconds)


def _complete(place: Path) -> Measurement | None:
    try:
        return store.load(place)
    except LemError:
        return None
