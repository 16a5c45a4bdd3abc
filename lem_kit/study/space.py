"""The points that a search may measure.

    batch_size: [1, 2, 4, 8]                      # these; numbers that ascend are known to lie in this order
    concurrency: {low: 1, high: 64, log: true}    # whole numbers; alike in their logarithm
    engine_args.max_num_seqs: {low: 16, high: 256, step: 16}

The one idea: a point maps names, dotted where they lead into a notebook's parameter that is a mapping, to plain JSON. The
optimiser is told places in lists instead of values wherever it can be: it then knows which values lie between which, and a
value comes back as it was written. Not covered: dimensions that depend on one another.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import notebooks
from ..errors import LemError, nearest
from .grid import OWN

Point = dict[str, Any]
RANGE = ("low", "high", "step", "log")
LONGEST = 100_000  # values of a range that are counted out


@dataclass(frozen=True)
class Dimension:
    """One name and what it may be: `values`, or any number from `low` to `high` where that is None."""

    name: str
    values: Sequence[Any] | None
    ordered: bool = False
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def distribution(self) -> Any:
        """As the optimiser knows it: a number, or a place in `values`."""
        from optuna import distributions

        if self.values is None:
            return distributions.FloatDistribution(self.low, self.high, log=self.log)
        if self.log:
            return distributions.IntDistribution(int(self.low), int(self.high), log=True)
        if self.ordered:
            return distributions.IntDistribution(0, len(self.values) - 1)
        return distributions.CategoricalDistribution(range(len(self.values)))

    def value(self, told: Any) -> Any:
        """What the optimiser means."""
        return told if self.values is None or self.log else self.values[told]

    def told(self, value: Any) -> Any:
        """What the optimiser is told of a value; None where it lies outside."""
        if self.values is None:
            inside = isinstance(value, float | int) and not isinstance(value, bool) and self.low <= value <= self.high
            return float(value) if inside else None
        if isinstance(self.values, range):
            places = [self.values.index(value)] if type(value) is int and value in self.values else []
        else:
            places = [place for place, known in enumerate(self.values) if _text(known) == _text(value)]
        return None if not places else value if self.log else places[0]

    def draw(self, chance: random.Random) -> Any:
        if self.values is not None:
            return chance.choice(self.values)
        if self.log:
            return min(max(math.exp(chance.uniform(math.log(self.low), math.log(self.high))), self.low), self.high)
        return chance.uniform(self.low, self.high)


@dataclass(frozen=True)
class Space:
    """All combinations of its dimensions."""

    dimensions: tuple[Dimension, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dimensions)

    @property
    def size(self) -> int | None:
        """How many points there are; None where they cannot be counted."""
        counts = [len(d.values) for d in self.dimensions if d.values is not None]
        return math.prod(counts) if len(counts) == len(self.dimensions) else None

    def points(self) -> Iterator[Point]:
        """Every point of a space that has a size."""
        for values in itertools.product(*(d.values or () for d in self.dimensions)):
            yield dict(zip(self.names, values))

    def told(self, point: Mapping[str, Any]) -> dict[str, Any] | None:
        """A point as the optimiser knows it; None for one that is not of this space."""
        if set(point) != set(self.names):
            return None
        found = {d.name: d.told(point[d.name]) for d in self.dimensions}
        return None if None in found.values() else found

    def point(self, told: Mapping[str, Any]) -> Point:
        return {d.name: d.value(told[d.name]) for d in self.dimensions}

    def draw(self, chance: random.Random) -> Point:
        return {d.name: d.draw(chance) for d in self.dimensions}


def key(point: Mapping[str, Any]) -> str:
    """Equal for equal points alone: 1 and True are two values."""
    return _text(point)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def read(asked: Mapping[str, Any]) -> Space:
    """The space that names, lists and ranges describe. LemError for what is none."""
    if not isinstance(asked, Mapping) or not asked or not all(isinstance(name, str) and name for name in asked):
        raise LemError(
            f"A search needs a space, which maps names to lists or ranges, like {{batch_size: [1, 4]}}: {asked!r}."
        )
    for name in asked:
        if shadow := next((other for other in asked if other.startswith(f"{name}.")), None):
            raise LemError(f"'{shadow}' is a part of '{name}', and both stand in the space: leave one of them.")
    return Space(tuple(_dimension(name, entry) for name, entry in asked.items()))


def _dimension(name: str, entry: Any) -> Dimension:
    if isinstance(entry, Mapping):
        return _range(name, entry)
    if isinstance(entry, str) or not isinstance(entry, Sequence) or not entry:
        raise LemError(f"'{name}' needs a list of at least one value, or {{low: ..., high: ...}}: got {entry!r}.")
    try:
        texts = [json.dumps(value, sort_keys=True, allow_nan=False) for value in entry]
    except (TypeError, ValueError) as error:
        raise LemError(f"The values of '{name}' must be plain JSON without NaN: got {entry!r}.") from error
    if len(set(texts)) < len(texts):
        raise LemError(f"'{name}' has the same value twice: {entry!r}.")
    ordered = all(_is_number(value) for value in entry) and list(entry) == sorted(entry)
    return Dimension(name, tuple(entry), ordered)


def _range(name: str, entry: Mapping[str, Any]) -> Dimension:
    for word in entry:
        if word not in RANGE:
            raise LemError(f"The range of '{name}' has an entry '{word}': {nearest(str(word), RANGE)}")
    low, high, step, log = (entry.get(word) for word in RANGE)
    for word in ("low", "high", "step"):
        if not _is_number(entry.get(word)) and (word != "step" or step is not None):
            raise LemError(f"The range of '{name}' needs a number as its {word}: got {entry.get(word)!r}.")
    if not isinstance(log, bool | None):
        raise LemError(f"In the range of '{name}', log is true or false: got {log!r}.")
    assert low is not None and high is not None
    if not low < high:
        raise LemError(f"The range of '{name}' goes from low to high: {low!r} is not below {high!r}.")
    if log and (step is not None or low <= 0):
        raise LemError(f"The range of '{name}' can be logarithmic only above 0 and without a step: got {dict(entry)!r}.")
    if step is not None and not 0 < step <= high - low:
        raise LemError(f"The step of '{name}' must lie above 0 and within its range: got {step!r}.")
    whole = all(isinstance(number, int) for number in (low, high, step or 1))
    if not whole and step is None:
        return Dimension(name, None, True, float(low), float(high), bool(log))
    step = step or 1
    count = math.floor((high - low) / step + 1e-9) + 1
    if count > LONGEST:
        raise LemError(f"The range of '{name}' has {count:,} values: give it a larger step.")
    values = range(low, high + 1, step) if whole else tuple(float(f"{low + i * step:.12g}") for i in range(count))
    return Dimension(name, values, True, float(low), float(high), bool(log))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- parameters -------------------------------------------------------------------------------------------------------


def filled(fixed: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the point put in: "engine_args.max_num_seqs" into the mapping "engine_args"."""
    made = json.loads(json.dumps(dict(fixed)))
    for name, value in point.items():
        place, *inner = name.split(".")
        at = made
        for deeper in inner:
            at = at.setdefault(place, {})
            place = deeper
        at[place] = value
    return dict(made)


def taken(parameters: Mapping[str, Any], names: Sequence[str]) -> Point | None:
    """The point that is in these parameters: `filled` undone. None where one of its names is not there."""
    point = {}
    for name in names:
        at: Any = parameters
        for place in name.split("."):
            if not isinstance(at, Mapping) or place not in at:
                return None
            at = at[place]
        point[name] = at
    return point


def fixed_for(notebook: Path, space: Space, given: Mapping[str, Any]) -> dict[str, Any]:
    """What every point shares: `given`, and of the notebook's own mappings those that the space leads into. LemError for a
    name that the notebook does not have, or that is set twice."""
    known = notebooks.parameters(notebook)
    for name in (*given, *space.names):
        base = name.partition(".")[0] if name not in given else name
        if base in OWN:
            raise LemError(f"'{base}' is set by the search: remove it, and choose the folder with folder= or --out.")
        if base not in known:
            raise LemError(f"Notebook '{notebook.stem}' has no parameter '{base}': {nearest(base, known)}")
    notebooks.check_parameters(notebook, given)
    fixed = dict(given)
    for name in space.names:
        base, dot, _ = name.partition(".")
        if not dot:
            continue
        if base not in fixed:
            fixed[base] = default(known[base])
        if not isinstance(fixed[base], Mapping):
            raise LemError(f"'{name}' leads into parameter '{base}', which is no mapping but {fixed[base]!r}.")
    check_fixed(space, fixed)
    return fixed


def check_fixed(space: Space, fixed: Mapping[str, Any]) -> None:
    """LemError where a name is in the space and among the fixed parameters."""
    for name in space.names:
        at: Any = fixed
        for place in name.split("."):
            if not isinstance(at, Mapping):
                raise LemError(f"'{name}' leads into a parameter that is no mapping but {at!r}.")
            if place not in at:
                break
            at = at[place]
        else:
            raise LemError(f"'{name}' stands in parameters and in the space: leave it in one of the two.")


def default(parameter: Mapping[str, Any]) -> Any:
    """The value that a notebook gives a parameter; None where it is no plain value."""
    try:
        return ast.literal_eval(parameter["default"])
    except (ValueError, SyntaxError):
        return None
