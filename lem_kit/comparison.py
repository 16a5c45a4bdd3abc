"""Two configurations against each other: ratios with intervals, and a verdict in plain words.

    lem.compare(m_eager, m_compiled)                     # two measurements
    lem.compare([a1, a2, a3], [b1, b2, b3])              # pairs, made in turns: `Session.compare` makes them

The one idea: a comparison says what was found, how sure that is, and what stands against it, in this order. Not covered: how
a ratio and its interval are found (`ratios`), whether the two may be compared at all (`comparable`).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from . import comparable
from .comparable import Difference
from .errors import LemError, nearest, shown
from .measurement import Measurement
from .ratios import (
    ENERGY,
    LATENCIES,
    RATES,
    Pairs,
    Ratio,
    common,
    gains,
    of_energy,
    of_latency,
    of_rate,
    of_shares,
    reaches_0,
)
from .statistics import RepeatUntil


class Matched(NamedTuple):
    """The requests that both answered at lengths at most `tolerance` output tokens apart: how many of how many, their
    latencies, and their energy where it can be shared among requests (`phases.per_request`)."""

    requests: int
    of: int
    ratios: tuple[Ratio, ...]
    tolerance: int = 0

    @property
    def told(self) -> str:
        """Which requests these are, in words."""
        alike = f"whose lengths differ by at most {self.tolerance}" if self.tolerance else "of equal length"
        return f"the {self.requests} of {self.of} requests {alike}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `comparison["j_per_output_token"]` is one Ratio; `verdict` a sentence; `differences` what stands
    against it; `matched` the requests of equal length, where lengths differ; `a` and `b` the measurements themselves, whose
    second one is called "A 2"."""

    names: tuple[str, str]
    ratios: tuple[Ratio, ...]
    differences: tuple[Difference, ...]
    matched: Matched | None = None
    a: tuple[Measurement, ...] = field(default=(), repr=False)
    b: tuple[Measurement, ...] = field(default=(), repr=False)

    def __getitem__(self, metric: str) -> Ratio:
        known = {ratio.metric: ratio for ratio in self.ratios}
        if metric not in known:
            raise LemError(f"This comparison has no metric '{metric}': {nearest(str(metric), known)}")
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
        if any(d.code == "input_unknown" for d in self.differences):
            before += "If both did the same, which the records do not tell: "
        if main.low is None or main.high is None:
            return f"{before}{b} / {a}, {main.told}: {main.shown}, with no interval: {main.why}."
        interval = f"ratio {b} / {a} {main.shown}, from {main.from_}"
        here = " in this one pair" if len(self.a) == 1 else ""  # which does not tell what another would show
        if main.low <= 1 <= main.high:
            most = max(main.high - 1, 1 - main.low)
            unlikely = f", and none above {_percent(most, up=True)} is likely" if most < 0.99 else LARGE
            return f"{before}No difference in {main.told} was shown{unlikely}{here}: {interval}."
        change = f"{_percent(abs(main.ratio - 1))} {'less' if main.ratio < 1 else 'more'}"
        verb = "gave" if main.metric.endswith("_per_s") else "drew" if main.metric == "mean_power_w" else "took"
        return f"{before}{b} {verb} {change} {main.told} than {a}{here}: {interval}."

    def __repr__(self) -> str:
        from .jupyter import compared

        return compared.text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        from .jupyter import compared

        return compared.mimebundle(self)


LARGE = ", but a large one may be there"


def _percent(share: float, up: bool = False) -> str:
    """Two digits of a share in percent; rounded up where it is a bound."""
    if share >= 0.995:
        return f"{100 * share:.0f} %" if share >= 1 else "more than 99 %"
    digits = max(1 - math.floor(math.log10(100 * share)), 0) if share > 0 else 0
    shown = math.ceil(100 * share * 10**digits - 1e-6) / 10**digits if up else 100 * share
    told = f"{shown:.{digits}f}"
    return (told.rstrip("0").rstrip(".") if digits else told) + " %"


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
    may differ and still be matched. LemError where nothing can be compared: other prompts, a failed measurement, one that is
    there twice, and the like; energies that cannot be are left out, with the reason in their place.
    """
    first, second = _names(names)
    permitted = _permitted(allow)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int) or tolerance < 0:
        raise LemError(f"tolerance= takes a whole number of output tokens, 0 or more: got {shown(tolerance)}.")
    sides = [_side(given) for given in (a, b)]
    if not sides[0] or len(sides[0]) != len(sides[1]):
        raise LemError(
            f"compare() takes as many measurements of each: got {len(sides[0])} and {len(sides[1])}. They are pairs in "
            "their order: leave out those that have no partner."
        )
    _each_once(sides, (first, second))
    found = comparable.differences(sides[0], sides[1], (first, second))
    found = [d._replace(forbids="nothing") if d.code in permitted else d for d in found]
    if against := [d for d in found if d.forbids == "all"]:
        told = "; ".join(d.told for d in against)
        never = [d for d in against if d.code in comparable.NEVER]
        codes = ", ".join(repr(d.code) for d in against)
        remedy = "Leave it out, with its partner" if never else f"If that is meant, say allow=[{codes}]"
        raise LemError(f"These cannot be compared: {told}. {remedy}.")
    no_energy = "; ".join(d.told for d in found if d.forbids == "energy")
    pairs = list(zip(*sides))
    idle = all(m.kind == "idle" for side in sides for m in side)  # for as long as someone chose: what counts is the power
    ratios = [of_energy(name, pairs, no_energy) for name in ENERGY if not idle or name == "mean_power_w"]
    ratios += [of_rate(name, pairs) for name in RATES if not idle]
    everything = [comparable.first_repeat(m) for side in sides for m in side[:1]]
    requests = all(everything)
    if requests:
        ratios += [of_latency(name, pairs) for name in LATENCIES]
    matched = None
    if requests and any(d.code == "other_output_lengths" for d in found):
        matched = _matched(pairs, tolerance, not no_energy)
        if any(r.metric in ENERGY for r in matched.ratios):
            here = f": that of {matched.told} is given, too"
            found = [d._replace(told=d.told + here) if d.code == "other_output_lengths" else d for d in found]
    known = tuple(r for r in ratios if r.ratio is not None or r.why)
    return Comparison((first, second), known, tuple(found), matched, tuple(sides[0]), tuple(sides[1]))


def _side(given: Any) -> list[Measurement]:
    """The measurements of one side. LemError where there is anything else."""
    alone = isinstance(given, Measurement | str | Mapping) or not isinstance(given, Iterable)
    side: list[Any] = [given] if alone else list(given)
    for m in side:
        if not isinstance(m, Measurement):
            hint = "its .measurement is one" if hasattr(type(m), "measurement") else "lem.load() reads one that was saved"
            raise LemError(f"compare() compares measurements: got {shown(m)}; {hint}.")
    return side


def _identity(m: Measurement) -> tuple[str, str, int]:
    """One measurement's own, though loaded twice. The run_id alone is not: people give the same one in two folders."""
    return m.run_id, m.started_at, m.t0_ns


def _each_once(sides: list[list[Measurement]], names: tuple[str, str]) -> None:
    """LemError where one measurement stands for several: it would agree with itself, and that says nothing."""
    seen: dict[tuple[str, str, int], str] = {}
    for called, side in zip(names, sides):
        for name, m in zip(comparable.call(called, side), side):
            if (before := seen.setdefault(_identity(m), name)) != name:
                raise LemError(f"{before} and {name} are one and the same measurement, {m.run_id}: give each once.")


def _names(names: Any) -> tuple[str, str]:
    """LemError where there are not two names that can be told apart."""
    known = isinstance(names, tuple | list) and len(names) == 2 and all(isinstance(n, str) and n.strip() for n in names)
    if not known or names[0] == names[1]:
        raise LemError(f"names= takes two names that differ, as ('eager', 'compiled'): got {shown(names)}.")
    return names[0], names[1]


def _permitted(allow: Any) -> set[str]:
    """The codes that are allowed. LemError for others."""
    codes = [allow] if isinstance(allow, str) or not isinstance(allow, Iterable) else list(allow)
    for code in codes:
        if not isinstance(code, str):
            raise LemError(f"allow= takes codes of what shall forbid nothing, as ['other_prompts']: got {shown(allow)}.")
        if code not in comparable.DIFFERENCES:
            raise LemError(f"There is no difference '{code}' to allow: {nearest(code, comparable.DIFFERENCES)}")
        if code in comparable.NEVER:
            raise LemError(
                f"'{code}' cannot be allowed: the energy and the time of what was cut off are those of as much as was done. "
                "Leave the measurement out, with its partner."
            )
    return set(codes)


def _matched(pairs: Pairs, tolerance: int, allow_energy: bool) -> Matched:
    """Of the requests that were answered at the same length in every measurement."""
    runs = [m for pair in pairs for m in pair]
    lengths = [comparable.lengths(m) for m in runs]
    failed = {i % len(its) for m, its in zip(runs, lengths) for i, c in enumerate(m.completions) if c.error is not None}
    spans = [[n for told in row for n in told] for row in zip(*lengths)]
    alike = {i for i, span in enumerate(spans) if i not in failed and max(span) - min(span) <= tolerance}
    ratios = [of_latency(name, pairs, alike) for name in LATENCIES]
    if allow_energy and alike:
        ratios.insert(0, of_shares(pairs, alike))
    return Matched(len(alike), max(map(len, lengths)), tuple(r for r in ratios if r.ratio is not None), tolerance)


# --- in turns ---------------------------------------------------------------------------------------------------------


def in_turns(
    calls: tuple[Callable[[], Measurement], Callable[[], Measurement]],
    tell: Callable[[dict[str, Any]], None],
    until: RepeatUntil,
    names: tuple[str, str],
    allow: Iterable[str],
) -> Comparison:
    """Make pairs, a b and then b a, so that whatever drifts meets both alike, until the ratio is known well enough.

    `tell` takes what the record of the next call shall say of its turn; nothing when the call is over. LemError, before
    anything is called, for what cannot be meant.
    """
    names, allow = _names(names), _permitted(allow)
    _callable(calls, names)
    if not isinstance(until, RepeatUntil):
        raise LemError(f"until= takes lem.repeat_until(interval=0.02), say: got {shown(until)}.")
    sides: tuple[list[Measurement], list[Measurement]] = ([], [])
    mark = uuid.uuid4().hex[:8]
    while True:
        number, other = len(sides[0]) + 1, None
        for place, side in enumerate((0, 1) if number % 2 else (1, 0)):
            facts = {"id": mark, "name": names[side], "pair": number, "turn": 2 * number - 1 + place, "after": other}
            try:
                tell({f"compare_{name}": value for name, value in facts.items()})
                made = calls[side]()
            finally:
                tell({})
            if not isinstance(made, Measurement):
                hint = ", whose .measurement is one" if hasattr(type(made), "measurement") else ""
                told = f"{type(made).__name__}{hint}"
                raise LemError(f"{names[side]} is a function that returns a Measurement: it returned {told}.")
            if any(_identity(made) == _identity(earlier) for known in sides for earlier in known):
                raise LemError(f"{names[side]} is a function that measures anew each time: it returned {made.run_id} again.")
            sides[side].append(made)
            other = made.run_id
        found = compare(*sides, names=names, allow=allow)
        if number < until.min_repeats or (number < until.max_repeats and number % 2):  # drift drops out of whole a b b a
            continue
        main = next((r for r in found.ratios if r.ratio is not None), None)
        if main and main.low and main.high and math.log(main.high / main.low) / 2 <= until.interval:
            return found
        hopeless = _hopeless(list(zip(*sides)), until) if main and main.metric in ENERGY else ""
        if not hopeless and number < until.max_repeats:
            continue
        wide = f"after {number} pairs the interval is not known to be within ± {100 * until.interval:g} %{hopeless}"
        return replace(found, differences=(*found.differences, Difference("interval_not_reached", "nothing", wide)))


def _hopeless(pairs: Pairs, until: RepeatUntil) -> str:
    """Why no number of further pairs would make the interval narrow enough; empty where they may."""
    if reaches_0(pairs):
        return ", since the interval of one energy alone reaches 0: more pairs change nothing, longer runs may"
    if math.hypot(common(pairs), gains(pairs)) > until.interval:
        return ", which what the method or two boards may be off by alone exceeds: more pairs change nothing"
    return ""


def _callable(calls: tuple[Any, Any], names: tuple[str, str]) -> None:
    """LemError where there are not two functions to call."""
    for name, given in zip(names, calls):
        if any(isinstance(m, Measurement) for m in (given if isinstance(given, tuple | list) else (given,))):
            raise LemError(
                f"session.compare() measures anew, by two functions that return a Measurement, and {name} is measured "
                "already: lem.compare(a, b) compares measurements that are there."
            )
        if not callable(given):
            raise LemError(
                f"{name} is to be a function that returns a Measurement, as lambda: session.run(engine, requests): "
                f"got {shown(given)}."
            )
