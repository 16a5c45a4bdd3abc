"""Two configurations against each other: ratios with intervals, and a verdict in plain words.

    lem.compare(m_eager, m_compiled)                     # two measurements
    lem.compare([a1, a2, a3], [b1, b2, b3])              # pairs, made in turns: `Session.compare` makes them

The one idea: a comparison says what was found, how sure that is, and what stands against it, in this order. Not covered: how
a ratio and its interval are found (`ratios`), whether the two may be compared at all (`comparable`).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from . import comparable, statistics
from .comparable import Difference
from .errors import LemError, nearest
from .measurement import Measurement
from .ratios import ENERGY, LATENCIES, RATES, Pairs, Ratio, gains, of_energy, of_latency, of_rate, of_shares, systematic


class Matched(NamedTuple):
    """The requests that both answered at the same length: how many of how many, their latencies, and their energy where it
    can be shared among requests (`phases.per_request`)."""

    requests: int
    of: int
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `comparison["j_per_output_token"]` is one Ratio; `verdict` a sentence; `differences` what stands
    against it; `matched` the requests of equal length, where lengths differ; `a` and `b` the measurements themselves."""

    names: tuple[str, str]
    ratios: tuple[Ratio, ...]
    differences: tuple[Difference, ...]
    matched: Matched | None = None
    a: tuple[Measurement, ...] = field(default=(), repr=False)
    b: tuple[Measurement, ...] = field(default=(), repr=False)

    def __getitem__(self, metric: str) -> Ratio:
        known = {ratio.metric: ratio for ratio in self.ratios}
        if metric not in known:
            raise LemError(f"This comparison has no metric '{metric}': {nearest(metric, known)}")
        return known[metric]

    @property
    def verdict(self) -> str:
        """What it comes to, in words, by the first metric of the list that is known, and the codes of what to mind."""
        mind = ", ".join(d.code for d in self.differences if d.forbids != "energy")
        return self._result + (f" Mind: {mind}." if mind else "")

    @property
    def _result(self) -> str:
        a, b = self.names
        main = next((r for r in self.ratios if r.ratio is not None), None)
        lost = self.ratios[0].why if self.ratios and self.ratios[0].ratio is None else ""
        before = f"Energy cannot be compared: {lost}. " if lost else ""
        if main is None or main.ratio is None:
            return before + "Nothing that is known of both could be compared."
        if main.low is None or main.high is None:
            return f"{before}{b} / {a}, {main.told}: {main.shown}, with no interval: {main.why}."
        interval = f"ratio {b} / {a} {main.shown}, from {main.from_}"
        if main.low <= 1 <= main.high:
            most = max(main.high - 1, 1 - main.low)
            unlikely = f", and none above {_percent(most)} is likely" if most < 1 else ", but a large one may be there"
            return f"{before}No difference in {main.told} was shown{unlikely}: {interval}."
        change = f"{_percent(abs(main.ratio - 1))} {'less' if main.ratio < 1 else 'more'}"
        verb = "gave" if main.metric.endswith("_per_s") else "took"
        return f"{before}{b} {verb} {change} {main.told} than {a}: {interval}."

    def __repr__(self) -> str:
        from .jupyter import compared

        return compared.text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        from .jupyter import compared

        return compared.mimebundle(self)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def compare(
    a: Measurement | Iterable[Measurement],
    b: Measurement | Iterable[Measurement],
    *,
    names: tuple[str, str] = ("A", "B"),
    allow: Iterable[str] = (),
    tolerance: int = 0,
) -> Comparison:
    """b against a: two measurements, or as many of each, which are pairs in their order.

    `allow`: codes of `comparable.DIFFERENCES` that shall forbid nothing here. `tolerance`: output tokens by which a request
    may differ and still be matched. LemError where nothing can be compared: other prompts, a failed measurement, and the
    like; energies that cannot be are left out, with the reason in their place.
    """
    permitted = _permitted(names, allow)
    for given in (a, b):
        if isinstance(given, str) or not isinstance(given, Measurement | Iterable):
            raise LemError(f"compare() compares measurements: got {given!r}. lem.load() reads one that was saved.")
    sides = [[m] if isinstance(m, Measurement) else list(m) for m in (a, b)]
    if not sides[0] or len(sides[0]) != len(sides[1]):
        raise LemError(
            f"compare() takes as many measurements of each: got {len(sides[0])} and {len(sides[1])}. They are pairs in "
            "their order: leave out those that have no partner."
        )
    found = [d._replace(forbids="nothing") if d.code in permitted else d for d in comparable.differences(*sides)]
    if against := [d for d in found if d.forbids == "all"]:
        told = "; ".join(d.told for d in against)
        codes = ", ".join(repr(d.code) for d in against)
        raise LemError(f"These cannot be compared: {told}. If that is meant, say allow=[{codes}].")
    no_energy = "; ".join(d.told for d in found if d.forbids == "energy")
    pairs = list(zip(*sides))
    ratios = [of_energy(name, pairs, no_energy) for name in ENERGY]
    ratios += [of_rate(name, pairs) for name in RATES]
    everything = [comparable.first_repeat(m) for side in sides for m in side[:1]]
    requests = all(everything)
    if requests:
        ratios += [of_latency(name, pairs) for name in LATENCIES]
    matched = None
    if requests and any(d.code == "other_output_lengths" for d in found):
        matched = _matched(pairs, tolerance, not no_energy)
    shown = tuple(r for r in ratios if r.ratio is not None or r.why)
    return Comparison((names[0], names[1]), shown, tuple(found), matched, tuple(sides[0]), tuple(sides[1]))


def _permitted(names: tuple[str, str], allow: Iterable[str]) -> set[str]:
    """The codes that are allowed. LemError for others, and where there are not two names."""
    if isinstance(names, str) or len(names) != 2:
        raise LemError(f"names= takes two names, as ('eager', 'compiled'): got {names!r}.")
    permitted = {allow} if isinstance(allow, str) else set(allow)
    for code in permitted:
        if code not in comparable.DIFFERENCES:
            raise LemError(f"There is no difference '{code}' to allow: {nearest(code, comparable.DIFFERENCES)}")
    return permitted


def _matched(pairs: Pairs, tolerance: int, allow_energy: bool) -> Matched:
    """Of the requests that were answered at the same length in every measurement."""
    lengths = [
        [c.output_tokens if c.error is None else None for c in comparable.first_repeat(m)] for pair in pairs for m in pair
    ]
    alike = {
        i
        for i, row in enumerate(zip(*lengths))
        if None not in row and max(n for n in row if n is not None) - min(n for n in row if n is not None) <= tolerance
    }
    ratios = [of_latency(name, pairs, alike) for name in LATENCIES]
    if allow_energy and alike:
        ratios.insert(0, of_shares(pairs, alike))
    return Matched(len(alike), max(map(len, lengths)), tuple(r for r in ratios if r.ratio is not None))


# --- in turns ---------------------------------------------------------------------------------------------------------


def in_turns(
    make: Callable[[int, dict[str, Any]], Measurement],
    until: statistics.RepeatUntil,
    names: tuple[str, str],
    allow: Iterable[str],
) -> Comparison:
    """Make pairs, a b and then b a, so that whatever drifts meets both alike, until the ratio is known well enough.

    `make` takes the side, 0 or 1, and what the record shall tell of its turn.
    """
    sides: tuple[list[Measurement], list[Measurement]] = ([], [])
    allow, mark = _permitted(names, allow), uuid.uuid4().hex[:8]
    while True:
        number, other = len(sides[0]) + 1, None
        for place, side in enumerate((0, 1) if number % 2 else (1, 0)):
            facts = {"id": mark, "name": names[side], "pair": number, "turn": 2 * number - 1 + place, "after": other}
            made = make(side, {f"compare_{name}": value for name, value in facts.items()})
            if not isinstance(made, Measurement):
                raise LemError(f"{names[side]} is a function that returns a Measurement: it returned {type(made).__name__}.")
            if any(made is earlier for known in sides for earlier in known):
                raise LemError(f"{names[side]} is a function that measures anew each time: it returned {made.run_id} again.")
            sides[side].append(made)
            other = made.run_id
        found = compare(*sides, names=names, allow=allow)
        if number < until.min_repeats or (number < until.max_repeats and number % 2):  # drift drops out of whole a b b a
            continue
        main = next((r for r in found.ratios if r.ratio is not None), None)
        if main and main.low and main.high and math.log(main.high / main.low) / 2 <= until.interval:
            return found
        wide = f"after {number} pairs the interval is wider than ± {100 * until.interval:g} %"
        pairs = list(zip(*sides))
        if main and main.metric in ENERGY and math.hypot(systematic(pairs), gains(pairs)) > until.interval:
            wide += ", which what the method or two boards may be off by alone exceeds: more pairs change nothing"
        elif number < until.max_repeats:
            continue
        return replace(found, differences=(*found.differences, Difference("interval_not_reached", "nothing", wide)))
