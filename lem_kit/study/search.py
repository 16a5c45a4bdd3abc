"""The cheapest configuration: fewest joules per output token under limits on latencies.

    lem.search({"batch_size": [1, 2, 4, 8]}, {"ttft_s_p50": 0.5}, notebook="experiment_transformers", folder="data/search")

The one idea: the folder of runs is all there is to know. Each point is an ordinary run of a study, and the optimiser is
built anew from the runs before each next point, so that a search that was cut off goes on as if it had not been, and runs
that a study made count as well. Not covered: several machines; the highest rate that still meets limits, where every rate
below meets them too, so that a bisection needs fewer runs than this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import notebooks, store
from ..errors import LemError, Unavailable, nearest
from ..measurement import Measurement
from . import limits as limiting
from . import space as spaces
from .found import SearchResult, Trial, comparable, confirmed, judged
from .grid import parse
from .limits import Limit
from .space import Space
from .work import Work, by_callable, by_notebook

STARTUP = 5  # points at random before the optimiser has an opinion
PROPOSALS = 32  # asked for before a point is drawn from those that are left
GIVE_UP = 5  # if so many points come first and none has a figure, the next ones will not either


def search(
    space: Mapping[str, Any],
    limits: Mapping[str, float] | None = None,
    *,
    folder: str | Path,
    notebook: str | Path | None = None,
    measure: Callable[[dict[str, Any]], Measurement] | None = None,
    parameters: Mapping[str, Any] | None = None,
    kernel: str | None = None,
    trials: int = 30,
    timeout_s: float | None = None,
    confirm: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Look for the point with the fewest joules per output token that meets every limit.

    `space`: names to lists of values, or to ranges {low, high, step or log}; a dotted name leads into a parameter that is a
    mapping ("engine_args.max_num_seqs"). `limits`: seconds by percentile of a latency of `goodput` ("ttft_s_p99"). A failed
    request misses them too.

    Each point is a run in `folder`: of `notebook` by papermill, in a fresh process of `kernel`, or of `measure`, a callable
    that takes the parameters of a point (dotted names nested) and returns a Measurement, which the search saves. All share
    `parameters`. Runs that the folder holds already count.

    It stops when it has tried `trials` points in all, when every point of the space has been tried, before the first point
    that would begin after `timeout_s` seconds, or when none of the first five has a figure. No point is measured twice, but
    for `confirm`: so many pairs of runs (2 or more) of the two cheapest points, in turn. `seed` and the folder decide what
    is tried next. `say` gets a line about each point.

    LemError, before anything runs, for what cannot be searched, such as a percentile that takes more requests.
    """
    begun = time.monotonic()
    asked, limited, place = spaces.read(space), limiting.read(limits or {}), Path(folder)
    _check(trials, timeout_s, confirm, seed)
    if (notebook is None) == (measure is None):
        raise LemError("A search measures its points by notebook= or by measure=: give one of the two.")
    if notebook is not None:
        work, defaults = by_notebook(notebook, asked, dict(parameters or {}), place, kernel)
    else:
        assert measure is not None
        work, defaults = by_callable(measure, asked, dict(parameters or {}), place), {}
    limiting.check(limited, {**defaults, **{k: [v] for k, v in work.fixed.items()}, **_spanned(asked)})
    optuna = _optuna()
    history = _history(work, asked, limited)
    if history:
        say(f"{len(history)} points were tried before.")
    total = min(trials, asked.size or trials)
    while (stopped := _over(history, asked, trials, begun, timeout_s)) is None:
        point = _next(optuna, history, asked, limited, seed)
        if point is None:
            stopped = "no further point was found that has not been tried"
            break
        m = work.make(point)
        history.append(judged(m, point, limited))
        say(f"[{len(history)}/{total}] {_line(history[-1], limited)}")
        if history[-1].figure is None and "no_source" in history[-1].doubts:
            raise LemError(f"No meter was open in run {m.run_id}, so no point can be cheapest: see `lem doctor`.")
    result = SearchResult(place, limited, tuple(comparable(_in_order(history))), stopped)
    return _confirmed(result, work, limited, confirm, say) if confirm else result


def _check(trials: int, timeout_s: float | None, confirm: int, seed: int) -> None:
    for name, value, least in (("trials", trials, 1), ("confirm", confirm, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (name == "confirm" and value == 1):
            kind = "0, or a whole number of at least 2" if name == "confirm" else f"a whole number of at least {least}"
            raise LemError(f"{name} must be {kind}: got {value!r}.")
    if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s > 0):
        raise LemError(f"timeout_s must be a number of seconds above 0: got {timeout_s!r}.")


def _spanned(asked: Space) -> dict[str, list[Any]]:
    """What each dimension may be, from its least value on."""
    return {d.name: list(d.values)[:1] if d.ordered and d.values else list(d.values or ()) for d in asked.dimensions}


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise Unavailable("Searching needs Optuna: pip install 'lem_kit[search]'") from error
    return optuna


def _history(work: Work, asked: Space, limits: tuple[Limit, ...]) -> list[Trial]:
    """The trials that the folder holds, in the order in which they were made."""
    if not work.folder.exists():
        return []
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about runs that were cut off: they are made again when their turn comes
        for m in store.runs(work.folder):
            point = work.point_of(m, asked.names) if m.status != "interrupted" else None
            if point is not None and asked.told(point) is not None:
                found[spaces.key(point)] = judged(m, point, limits)
    return _in_order(found.values())


def _in_order(trials: Any) -> list[Trial]:
    return sorted(trials, key=lambda t: (t.started_at, t.run_id))


def _over(history: Sequence[Trial], asked: Space, trials: int, begun: float, timeout_s: float | None) -> str | None:
    """Why no further point is tried; None while one is."""
    if asked.size is not None and len(history) >= asked.size:
        return "every point of the space was tried"
    if len(history) >= trials:
        return f"{trials} points were tried"
    if len(history) >= GIVE_UP and all(t.problem is not None for t in history):
        return f"none of the first {len(history)} points has a figure; to try one again, remove its folder"
    if timeout_s is not None and time.monotonic() - begun >= timeout_s:
        return f"{timeout_s:g} s have passed"
    return None


def _next(optuna: Any, history: Sequence[Trial], asked: Space, limits: tuple[Limit, ...], seed: int) -> spaces.Point | None:
    """The point to try next, by Optuna's TPE on what was tried; it follows from the set of trials and the seed alone. None
    where no untried one was found."""
    number = int(hashlib.sha256(f"{seed}:{len(history)}".encode()).hexdigest()[:8], 16)
    tried = {spaces.key(t.point) for t in history}
    dimensions = {d.name: d.distribution() for d in asked.dimensions}
    with _quiet(optuna):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=number, n_startup_trials=STARTUP))
        for trial in comparable(_in_order(history)):
            study.add_trial(_told(optuna, trial, asked, dimensions))
        for _ in range(PROPOSALS):  # those asked for and not answered keep the sampler away from where they lie
            point = asked.point(study.ask(dimensions).params)
            if spaces.key(point) not in tried:
                return point
    chance = random.Random(number)
    if asked.size is not None and asked.size <= spaces.LONGEST:
        return chance.choice([p for p in asked.points() if spaces.key(p) not in tried])
    draws = (asked.draw(chance) for _ in range(1000))
    return next((point for point in draws if spaces.key(point) not in tried), None)


def _told(optuna: Any, trial: Trial, asked: Space, dimensions: Mapping[str, Any]) -> Any:
    """A trial as Optuna keeps it. One without a figure is told as pruned and infinitely far from feasible: a failed one, the
    sampler would forget, and propose its neighbours again."""
    states = optuna.trial.TrialState
    where = {"params": asked.told(trial.point), "distributions": dict(dimensions)}
    if trial.problem is not None or trial.figure is None:
        return optuna.trial.create_trial(state=states.PRUNED, constraints={"problem": math.inf}, **where)
    return optuna.trial.create_trial(value=trial.figure.value, constraints=dict(trial.violated), **where)


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """A line of Optuna's for each study of ours would drown what is said about points."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _line(trial: Trial, limits: tuple[Limit, ...]) -> str:
    if trial.problem is not None:
        return f"{trial.name}: {trial.problem}"
    said = "; ".join(trial.missed(limits)) or ("meets the limits" if limits else "")
    return f"{trial.name}: {trial.j_per_output_token} per output token" + (f"; {said}" if said else "")


def _confirmed(
    result: SearchResult, work: Work, limits: tuple[Limit, ...], pairs: int, say: Callable[[str], None]
) -> SearchResult:
    """The two cheapest points measured again, each other pair in the other order, so that a drift falls on both alike."""
    if len(result.candidates) < 2:
        return result
    two = result.candidates[:2]
    again: dict[str, list[Measurement]] = {t.run_id: [] for t in two}
    for number in range(1, pairs + 1):
        for trial in two if number % 2 else two[::-1]:
            m = work.make(trial.point, f"-again{number}")
            again[trial.run_id].append(m)
            say(f"[again {number}/{pairs}] {_line(judged(m, trial.point, limits), limits)}")
    return dataclasses.replace(result, confirmed=confirmed(two[0], two[1], list(zip(*again.values()))))


def read(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of `search` that a YAML file gives. `overrides` take the place of parameters, and of entries of the
    space. LemError for what is no such file; what it asks for, `search` checks."""
    path = Path(path)
    asked = parse(path)
    known = ("notebook", "parameters", "space", "limits", "kernel", "trials", "timeout_s", "confirm", "seed")
    for name in asked:
        if name not in known:
            raise LemError(f"{path} has an entry '{name}' that searches do not know: {nearest(str(name), known)}")
    name, overrides = asked.pop("notebook", None), dict(overrides or {})
    if not isinstance(name, str) or Path(name).name != name:
        raise LemError(f"{path} needs a line `notebook: NAME` with the name of a notebook, not a path: got {name!r}.")
    parameters, points = asked.pop("parameters", None) or {}, asked.pop("space", None) or {}
    for title, entry in (("parameters", parameters), ("space", points)):
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise LemError(f"{path}: {title} must map names of notebook parameters to values: got {entry!r}.")
    points = {key: value for key, value in points.items() if key.partition(".")[0] not in overrides}
    given = {key: value for key, value in asked.items() if value is not None}
    notebook = notebooks.find(name, beside=path.parent)
    return {"space": points, "notebook": notebook, "parameters": {**parameters, **overrides}, **given}
