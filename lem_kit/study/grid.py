"""What a study file asks for.

    notebook: experiment_transformers     # a notebook beside this file or one of lem_kit's
    parameters: {output_tokens: 64}       # the same in every run
    grid: {batch_size: [1, 4]}            # every combination of these, in the order written
    kernel: python3                       # optional

The one idea: a run's folder is named after its parameters, with a digest of all of them, so that a study which is started
again finds what it has done, and one that was changed does not mistake old runs for its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import notebooks
from ..errors import LemError, Unavailable, nearest

# A notebook gets these from the runner; a study file does not set them.
OWN = ("folder", "run_id")


@dataclass(frozen=True)
class Planned:
    """One run to be made."""

    run_id: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A study file that was read and checked against its notebook."""

    notebook: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, list[Any]] = field(default_factory=dict)
    kernel: str | None = None

    def plan(self, overrides: Mapping[str, Any] | None = None) -> list[Planned]:
        """The runs, in order. `overrides` take the place of parameters, and of grid entries of the same name."""
        overrides = dict(overrides or {})
        grid = {name: values for name, values in self.grid.items() if name not in overrides}
        fixed = {**self.parameters, **overrides}
        notebooks.check_parameters(self.notebook, fixed)
        planned = []
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values))
            parameters = {**fixed, **point}
            planned.append(Planned(run_id(self.notebook.stem, parameters, {**overrides, **point}), parameters))
        return planned


def run_id(notebook: str, parameters: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    """The name of a run's folder: what is `shown`, for people, then a digest of the notebook's name and all parameters."""
    text = json.dumps([notebook, parameters], sort_keys=True)
    return f"{_name(shown)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _name(point: Mapping[str, Any]) -> str:
    """ "batch_size=4,model=tiny-llama" as far as a folder's name allows; the digest beside it tells the rest."""
    text = ",".join(f"{key}={value}" for key, value in point.items()) or "run"
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", text).lstrip("._=,+-")[:120] or "run"


def read(path: str | Path) -> Study:
    """Read and check a study file. LemError, in one sentence, for whatever is wrong with it; nothing is run or written."""
    path = Path(path)
    asked = parse(path)
    known = ("notebook", "parameters", "grid", "kernel")
    for name in asked:
        if name not in known:
            raise LemError(f"{path} has an entry '{name}' that studies do not know: {nearest(str(name), known)}")
    name, kernel = asked.get("notebook"), asked.get("kernel")
    if not isinstance(name, str) or Path(name).name != name:
        raise LemError(f"{path} needs a line `notebook: NAME` with the name of a notebook, not a path: got {name!r}.")
    if kernel is not None and not isinstance(kernel, str):
        raise LemError(f"{path}: kernel is the name of a Jupyter kernel: got {kernel!r}.")
    parameters, grid = asked.get("parameters") or {}, asked.get("grid") or {}
    for title, entry in (("parameters", parameters), ("grid", grid)):
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise LemError(f"{path}: {title} must map names of notebook parameters to values: got {entry!r}.")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise LemError(f"{path}: grid entry '{key}' needs a list of at least one value: got {values!r}.")
        if key in parameters:
            raise LemError(f"{path}: '{key}' stands in parameters and in grid: leave it in one of the two.")
    for key in (*parameters, *grid):
        if key in OWN:
            raise LemError(f"{path}: '{key}' is set by the runner: remove it, and choose the folder with --out.")
    notebook = notebooks.find(name, beside=path.parent)
    for value_of in (parameters, *({key: value} for key, values in grid.items() for value in values)):
        notebooks.check_parameters(notebook, value_of)
    return Study(notebook, parameters, grid, kernel)


def parse(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds; LemError if it holds none."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise Unavailable("Reading a study file needs pyyaml: pip install 'lem_kit[notebook]'") from error
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LemError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LemError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(asked, dict):
        raise LemError(f"{path} must be a YAML mapping with at least `notebook: NAME`.")
    return asked
