"""Running a study: papermill over its notebook, one run after another, into one folder.

The one idea: the notebook saves its own measurement into the folder and under the run_id that it is given; the runner only
asks the store whether it is there and whole. What is complete is not run again; what failed is. A run that fails does not
stop the others; if it leaves no record, it gets one that says why. Not covered yet: leases of GPUs, several machines.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import environment, notebooks, store
from ..errors import LemError
from ..measurement import Measurement, jsonable
from .grid import Planned, Study

NOTEBOOK = "notebook.ipynb"


@dataclass(frozen=True)
class Outcome:
    """What became of one planned run: its measurement, which may be of a failure, and a sentence if something was wrong."""

    planned: Planned
    measurement: Measurement
    problem: str | None = None
    seconds: float | None = None  # None: it was complete already

    @property
    def ok(self) -> bool:
        return self.measurement.status == "ok"


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
        outcome = make(study, folder, planned)
        outcomes.append(outcome)
        spent = "complete already" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
        say(f"[{number}/{len(plan)}] {planned.run_id}: {outcome.problem or spent}")
    return outcomes


def make(study: Study, folder: Path, planned: Planned) -> Outcome:
    """Make this one run, unless `folder` holds it complete and without a failure."""
    place = folder / planned.run_id
    done = _complete(place)
    if done is not None and done.status == "ok":
        return Outcome(planned, done)
    if place.exists():
        shutil.rmtree(place)  # cut off or failed: nothing in it is a result, and two tries must not mix
    values = {**planned.parameters, "folder": str(folder), "run_id": planned.run_id}
    problem, t0_ns = None, time.monotonic_ns()
    try:
        notebooks.execute(study.notebook, place / NOTEBOOK, values, study.kernel)
    except LemError as error:
        problem = str(error)
    done = _complete(place)
    if done is None:
        problem = problem or f"Notebook '{study.notebook.stem}' ended without saving run {planned.run_id} into {folder}."
        done = failed(planned.run_id, planned.parameters, LemError(problem), t0_ns)
        store.save(done, folder)
    return Outcome(planned, done, problem, (time.monotonic_ns() - t0_ns) / 1e9)


def failed(run_id: str, config: Mapping[str, Any], error: Exception, t0_ns: int) -> Measurement:
    """The record of a run that began at `t0_ns` and left none of its own."""
    t1_ns = time.monotonic_ns()
    began = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=(t1_ns - t0_ns) / 1e9)
    return Measurement(
        run_id=run_id,
        kind="run",
        label=run_id,
        status="failed",
        started_at=began.isoformat(timespec="milliseconds"),
        t0_ns=t0_ns,
        t1_ns=t1_ns,
        energy={},
        error={"type": type(error).__name__, "message": str(error)},
        config=jsonable(config),
        environment=environment.describe(),
        reasons=("failed",),
    )


def _complete(place: Path) -> Measurement | None:
    try:
        return store.load(place)
    except LemError:
        return None
