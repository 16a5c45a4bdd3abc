"""What a search found: the cheapest point, what cannot be told apart from it, and why the others are not it.

The one idea: a point is cheapest only among those that met every limit, and only as far as the intervals of their energies
tell. Everything here is derived from the runs in the folder. Not covered: looking for points (`search`); what differs from
one start of an engine to the next, which one run per point does not see (`Confirmed` does).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import metrics, store
from ..comparison import Comparison, compare
from ..errors import LemError
from ..measurement import Measurement
from ..ratios import Ratio
from .limits import FAILED_REQUESTS, Limit, of_run, unsure

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Trial:
    """A point that was tried. `violated` says by how much a limit was missed (`limits.of_run`), `unsure` names the limits
    that lie inside the percentile's interval (`limits.unsure`), `doubts` are the codes of `metrics.verdict`, and `problem`
    is why it has no figure that could be compared."""

    run_id: str
    point: Mapping[str, Any]
    started_at: str
    figure: metrics.Figure | None = None  # J per output token
    measured: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    violated: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unsure: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    problem: str | None = None
    prompts_sha256: str | None = None

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.point.items())

    @property
    def feasible(self) -> bool:
        """Whether it has a figure and met every limit."""
        return self.problem is None and all(over <= 0 for over in self.violated.values())

    @property
    def j_per_output_token(self) -> str:
        return "–" if self.figure is None else self.figure.told("J")

    @property
    def violation(self) -> float:
        """By how much the limits are missed in all: the sum that the optimiser goes by."""
        return sum(over for over in self.violated.values() if over > 0)

    def missed(self, limits: Iterable[Limit]) -> list[str]:
        """A sentence for each limit that was missed."""
        said = []
        for limit in limits:
            value, over = self.measured.get(limit.name), self.violated.get(limit.name, 0.0)
            if over > 0 and value is None:
                said.append(f"{limit.name} is not known, for too few requests completed")
            elif over > 0:
                said.append(f"{limit.name} is {value:.4g} s, {100 * over:.3g} % above its limit of {limit.seconds:g} s")
        if (failed := self.violated.get(FAILED_REQUESTS, 0.0)) > 0:
            said.append(f"{100 * failed:.3g} % of the requests failed")
        return said


def judged(m: Measurement, point: Mapping[str, Any], limits: tuple[Limit, ...]) -> Trial:
    """What a run says about its point. LemError where it could not give a limited percentile (`limits.of_run`)."""
    trial = Trial(m.run_id, dict(point), m.started_at, prompts_sha256=m.config.get("prompts_sha256"))
    if m.status != "ok":
        told = " ".join((m.error or {}).get("message", "").split())
        return dataclasses.replace(trial, problem=f"{m.status}: {told or 'no reason was recorded'}")
    measured, violated = of_run(limits, m)
    trial = dataclasses.replace(trial, measured=measured, violated=violated, unsure=unsure(limits, m))
    doubts, figure = tuple(metrics.verdict(m)), metrics.j_per_output_token(m)
    problem = (
        f"its energy per output token is not known: {', '.join(doubts) or 'no output tokens'}" if figure is None else None
    )
    return dataclasses.replace(trial, figure=figure, doubts=doubts, problem=problem)


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, those with a problem whose energy is made of other parts than most have: one that lacks the CPU's joules
    would win for that alone."""
    counts = Counter(t.figure.keys for t in trials if t.figure)
    if len(counts) < 2:
        return list(trials)
    usual = max(counts, key=lambda keys: (counts[keys], keys))
    return [
        t
        if t.figure is None or t.figure.keys == usual
        else dataclasses.replace(
            t, problem=f"its energy is made of {', '.join(t.figure.keys)}, and that of most of {', '.join(usual)}"
        )
        for t in trials
    ]


@dataclass(frozen=True)
class Confirmed:
    """Two points, named by their run_id, measured again in turn. `comparison` is of the second against the first, by the
    pairs in their order; None where there can be none (`problem`). The figures of the search itself are left out: they were
    picked for being low."""

    first: str
    second: str
    pairs: int
    comparison: Comparison | None = None
    problem: str | None = None

    @property
    def ratio(self) -> Ratio | None:
        """J per output token of the second over the first."""
        return self.comparison["j_per_output_token"] if self.comparison else None

    @property
    def told_apart(self) -> bool:
        ratio = self.ratio
        return ratio is not None and ratio.low is not None and ratio.high is not None and not ratio.low <= 1 <= ratio.high

    @property
    def cheaper(self) -> str | None:
        """Which of the two these runs say is cheaper, where they tell them apart."""
        if not self.told_apart or self.ratio is None or self.ratio.ratio is None:
            return None
        return self.second if self.ratio.ratio < 1 else self.first


def confirmed(first: Trial, second: Trial, pairs: Sequence[tuple[Measurement, Measurement]]) -> Confirmed:
    """What pairs of runs, of two or more, say about two points. A search sets points against each other whose prompts
    differ, and remarks on it; so do the pairs."""
    found = Confirmed(first.run_id, second.run_id, len(pairs))
    try:
        comparison = compare(*zip(*pairs), names=(first.name, second.name), allow=("other_prompts", "other_prompt_ids"))
    except LemError as error:
        return dataclasses.replace(found, problem=str(error))
    ratio = next((r for r in comparison.ratios if r.metric == "j_per_output_token"), None)
    if ratio is None or ratio.ratio is None:
        return dataclasses.replace(found, problem=(ratio and ratio.why) or "their energy per output token is not known")
    return dataclasses.replace(found, comparison=comparison)


@dataclass(frozen=True)
class SearchResult:
    """`history` holds every point that was tried, in order; `stopped` says why there are no more."""

    folder: Path
    limits: tuple[Limit, ...]
    history: tuple[Trial, ...]
    stopped: str
    confirmed: Confirmed | None = None

    @property
    def candidates(self) -> list[Trial]:
        """Feasible points, cheapest first: those whose measurement is valid, or all where none is."""
        feasible = [t for t in self.history if t.feasible and t.figure]
        found = [t for t in feasible if not t.doubts] or feasible
        return sorted(found, key=lambda t: (t.figure.value if t.figure else math.inf, t.run_id))

    @property
    def best(self) -> Trial | None:
        """The cheapest point; None where none met the limits. Of two that were measured again (`confirm`), the one that
        those runs say is cheaper, where they tell them apart."""
        found = self.candidates
        if self.confirmed is not None and self.confirmed.cheaper is not None:
            found = [t for t in found if t.run_id == self.confirmed.cheaper] or found
        return found[0] if found else None

    @property
    def tied(self) -> tuple[Trial, ...]:
        """The other candidates whose intervals overlap the best one's: these measurements cannot tell them apart from it.
        Of two that were measured again, those runs alone decide."""
        best, again = self.best, self.confirmed

        def alike(t: Trial) -> bool:
            assert best is not None and best.figure and t.figure
            if again is not None and again.comparison is not None and {best.run_id, t.run_id} == {again.first, again.second}:
                return not again.told_apart
            return abs(t.figure.value - best.figure.value) <= t.figure.half_width + best.figure.half_width

        return tuple(t for t in self.candidates if t is not best and alike(t)) if best else ()

    @property
    def nearest(self) -> Trial | None:
        """Of the points that were measured, the one that violates the limits least in all."""
        known = [t for t in self.history if t.problem is None]
        return min(known, key=lambda t: t.violation, default=None)

    @property
    def trials(self) -> pd.DataFrame:
        """`lem.frame` of the trials, in order, after columns for the point ("point.NAME"), whether it is feasible, by how
        much it violates each limit ("over.LIMIT") and its problem."""
        import pandas as pd

        rows = [
            {
                "run_id": t.run_id,
                **{f"point.{name}": value for name, value in t.point.items()},
                "feasible": t.feasible,
                **{f"over.{name}": over for name, over in t.violated.items()},
                "problem": t.problem,
            }
            for t in self.history
        ]
        if not rows:
            return pd.DataFrame()
        return pd.DataFrame(rows).merge(store.frame(self.folder), on="run_id", how="left")

    # --- what a person sees -------------------------------------------------------------------------------------------

    def sentences(self) -> list[str]:
        """What was found, in words."""
        best, nearest = self.best, self.nearest
        if best is None and nearest is None:
            last = f" The last: {self.history[-1].name}: {self.history[-1].problem}" if self.history else ""
            said = [f"No point of {len(self.history)} could be measured.{last}"]
        elif best is None and nearest is not None:
            said = [
                f"No point of {len(self.history)} met the limits. Nearest: {nearest.name}: "
                f"{'; '.join(nearest.missed(self.limits))}."
            ]
        elif best is not None:
            said = [f"Cheapest of {len(self.history)} points: {best.name}: {best.j_per_output_token} per output token."]
            said += self._remarks(best)
        return [*said, f"Stopped: {self.stopped}. The runs are in {self.folder}."]

    def _remarks(self, best: Trial) -> list[str]:
        said = []
        if self.tied:
            names = "; ".join(f"{t.name} ({t.j_per_output_token})" for t in self.tied)
            said.append(f"Cannot be told apart from it by these measurements: {names}.")
        if len(self.candidates) > 1 and not (self.confirmed and self.confirmed.comparison):
            further = "points further away may be as cheap" if self.tied else "another point may be as cheap all the same"
            said.append(
                f"Each interval is of one run and does not hold what differs from one start of the engine to the next, so "
                f"{further}: confirm= measures the two cheapest again."
            )
        said += [f"It is within {name}, but not surely: the limit lies inside the interval." for name in best.unsure]
        if best.doubts:
            against = ", ".join(best.doubts)
            said.append(f"No point that met the limits has a valid measurement; against this one speaks: {against}.")
        elif best.figure:
            cheaper = [
                t for t in self.history if t.feasible and t.doubts and t.figure and t.figure.value < best.figure.value
            ]
            said += [
                f"Passed over with a lower figure, since the measurement is not valid ({', '.join(t.doubts)}): {t.name}."
                for t in cheaper
            ]
        if best.figure and best.figure.method == "model":
            said.append("All of this energy is MODELLED, not measured.")
        if len({t.prompts_sha256 for t in self.candidates}) > 1:
            said.append("The points were not sent the same requests, so they differ in more than their configuration.")
        return said + ([self._confirmation(self.confirmed)] if self.confirmed else [])

    def _confirmation(self, again: Confirmed) -> str:
        if again.comparison is None:
            names = {t.run_id: t.name for t in self.history}
            who = f"{names.get(again.first, again.first)} and {names.get(again.second, again.second)}"
            return f"{who}, measured again, cannot be compared: {again.problem}".rstrip(".") + "."
        notes = "; ".join(d.told for d in again.comparison.differences)
        told = f"Measured again in {again.pairs} pairs: {again.comparison.verdict}"
        return f"{told} To be noted: {notes}." if notes else told

    def table(self) -> list[dict[str, str]]:
        """One row of text per point, the cheapest first, then those that missed a limit by how little, then the others."""
        order = {t.run_id: place for place, t in enumerate(self.candidates)}
        tied = {t.run_id for t in self.tied}

        def place(t: Trial) -> tuple[int, float]:
            if t.run_id in order:
                return (0, order[t.run_id])
            return (2, 0.0) if t.problem else (1, t.violation)

        def verdict(t: Trial) -> str:
            if t.problem or not t.feasible:
                return t.problem or "; ".join(
                    f"{name} over by {100 * v:.3g} %{', but not surely' if name in t.unsure else ''}"
                    for name, v in t.violated.items()
                    if v > 0
                )
            said = "best" if t is self.best else "not told apart from the best" if t.run_id in tied else "dearer"
            within = f"within {' and '.join(t.unsure)}, but not surely" if t.unsure else ""
            doubts = f"not valid: {', '.join(t.doubts)}" if t.doubts else ""
            return ", ".join(filter(None, (said if t.run_id in order else "", within, doubts)))

        rows = []
        for t in sorted(self.history, key=place):
            latencies = {
                f"{limit.name} ≤ {limit.seconds:g} s": "–" if (v := t.measured.get(limit.name)) is None else f"{v:.4g}"
                for limit in self.limits
            }
            point = {name: str(value) for name, value in t.point.items()}
            rows.append({**point, "J per output token": t.j_per_output_token, **latencies, "verdict": verdict(t)})
        return rows

    def __repr__(self) -> str:
        rows = self.table()
        if not rows:
            return "\n".join(self.sentences())
        cells = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells]
        return "\n".join([*self.sentences(), "", *lines])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = self.table()
        head = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row.values()) + "</tr>" for row in rows)
        said = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.sentences())
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
        return {"text/plain": repr(self), "text/html": f"<div>{said}{table}</div>"}
