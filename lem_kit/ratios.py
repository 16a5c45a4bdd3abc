"""The ratio of two configurations in one metric, with its interval and what that is made of.

The one idea: what makes a ratio uncertain is what differed from one pair to the next, so from several pairs its interval is
Student's of the mean logarithm of their ratios (paired t), which whatever drifts slowly leaves alone. Pairs that agree by
luck know no more than their meters, so the doubt of these is added. From one pair it is what each measurement knows of
itself, and each interval says which.

    pairs       exp(mean d ± t s / sqrt(n)),  d = ln(b_i / a_i)
    of energy   exp(mean d ± hypot(t s / sqrt(n), sqrt(sum own^2) / n, alike_a, alike_b)),  `Doubt` of all 2 n runs
    one pair    ratio * exp(± hypot(u_a / a, u_b / b)),  u: half-widths of the two figures
    latencies of one pair    bootstrap over requests or static batches, with all their repeats, alike on both sides

The gain of two boards is added, too; on one board it cancels. There is no interval where an energy's own reaches 0, and none
where nothing scatters at all: no two runs are alike to the last digit, so that scatter was not seen.

Not covered: whether the two may be compared at all (`comparable`), and the whole of it (`comparison`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import attribution, comparable, latency, metrics, statistics, totals
from .measurement import Completion, Measurement

Pairs = Sequence[tuple[Measurement, Measurement]]

# What is compared, and in which words. The first that is known is the one of the verdict.
ENERGY: dict[str, tuple[Callable[[Measurement], Any], str]] = {
    "j_per_output_token": (metrics.j_per_output_token, "energy per output token"),
    "j_per_request": (metrics.j_per_request, "energy per request"),
    "energy_j_per_repeat": (metrics.energy_j_per_repeat, "energy"),
    "mean_power_w": (metrics.mean_power_w, "mean power"),
}
RATES: dict[str, tuple[Callable[[Measurement], Any], str]] = {
    "output_tokens_per_s": (metrics.output_tokens_per_s, "output tokens/s"),
    "requests_per_s": (metrics.requests_per_s, "requests/s"),
    "seconds_per_repeat": (lambda m: metrics.measured_s(m) / max(len(m.repeats), 1), "time"),
}
LATENCIES: dict[str, tuple[Callable[[Completion], Any], str]] = {
    "ttft_s_p50": (latency.ttft_s, "median TTFT"),
    "tpot_s_p50": (latency.tpot_s, "median TPOT"),
    "e2e_s_p50": (latency.e2e_s, "median end-to-end latency"),
}
WIDEST = math.log(20)  # an interval that reaches further than to 20 times the ratio says nothing
LEAST = 1e-9  # one that is narrower than a nanosecond in a second is rounding
REACHES_0 = "an energy's interval reaches 0"
NO_SCATTER = "they do not scatter in any digit, so how much they may is not known"


class Doubt(NamedTuple):
    """What the meters leave in doubt of a run's total, as half-widths and shares of it. `own` is another in each run: where
    between a counter's updates the edges of its repeats lay. `alike` may be one and the same in every run of a side: a
    model's error, and what the samples of integrated power miss of a load that always takes the same course."""

    own: float
    alike: float


class Ratio(NamedTuple):
    """b / a of one metric, with its 95 % interval; None where it is not known, and then `why` says so. `from_` says what the
    interval is made of."""

    metric: str
    told: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    from_: str
    why: str = ""

    @property
    def shown(self) -> str:
        """ "0.881 [0.862, 0.899]": as many digits as the interval leaves meaning, which are two of its own half-width."""
        if self.ratio is None:
            return "–"
        half = (self.high - self.low) / 2 if self.low is not None and self.high is not None else 0.0
        digits = min(max(1 - math.floor(math.log10(half)), 0), 12) if half > 0 else None
        told = [f"{x:.4g}" if digits is None else f"{x:.{digits}f}" for x in self[4:7] if x is not None]
        return told[0] + (f" [{', '.join(told[1:])}]" if told[1:] else "")


def of_energy(name: str, pairs: Pairs, forbidden: str) -> Ratio:
    metric, told = ENERGY[name]
    figures = [(metric(x), metric(y)) for x, y in pairs]
    if any(f is None for pair in figures for f in pair):
        known = any(totals.energy_j(m) is not None for pair in pairs for m in pair)
        why = forbidden or ("" if known else "an energy is not known")
        return Ratio(name, told, None, None, None, None, None, "", why)
    a, b = (_geometric([pair[side].value for pair in figures]) for side in (0, 1))
    if forbidden:
        return Ratio(name, told, a, b, None, None, None, "", forbidden)
    meters, beyond, two_boards = [of_meters(m) for pair in pairs for m in pair], common(pairs), gains(pairs)
    if len(pairs) > 1:
        reach = [math.hypot(*doubt) for doubt in meters]
        half = math.hypot(_paired([(x.value, y.value) for x, y in figures]), _mean([m.own for m in meters]), beyond)
        from_ = f"{len(pairs)} pairs" + (" and their meters' intervals" if any(m.own for m in meters) else "")
    else:
        reach = [f.half_width / f.value for f in figures[0]]
        half = math.hypot(*reach)
        repeats = [len(m.repeats) for m in pairs[0]]
        from_ = (
            f"{repeats[0]} and {repeats[1]} repeats of one run each"
            if min(repeats) > 1
            else "the meters' intervals alone, without what differs from run to run"
        )
    if max(reach) >= 1:
        return Ratio(name, told, a, b, b / a, None, None, "", REACHES_0)
    if beyond:
        from_ += ", and what their method may be off by"
    if two_boards:
        half, from_ = math.hypot(half, two_boards), from_ + ", and the gain of two boards' sensors"
    return _with(name, told, a, b, half, from_)


def _with(name: str, told: str, a: float, b: float, half: float, from_: str) -> Ratio:
    """The ratio within exp(± half); without an interval where that would say nothing, or more than can be known."""
    if not half < WIDEST:
        why = "they scatter, or are in doubt, by more than the figures themselves"
        return Ratio(name, told, a, b, b / a, None, None, "", why)
    if half <= LEAST:
        return Ratio(name, told, a, b, b / a, None, None, "", NO_SCATTER)
    return Ratio(name, told, a, b, b / a, b / a * math.exp(-half), b / a * math.exp(half), from_)


def of_meters(m: Measurement) -> Doubt:
    """What the meters alone leave in doubt, without the spread between repeats; it adds up as `totals.energy_j` has it."""
    total = totals.energy_j(m)
    if total is None:
        return Doubt(0.0, 0.0)
    own, missed, model = 0.0, 0.0, 0.0
    for window in m.repeats or (m,):
        for e in (window.energy[key] for key in total.keys):
            off = m.trace.domains[e.key].relative_error * (e.joules or 0.0) if e.key in m.trace.domains else 0.0
            noise = max((e.uncertainty_j or 0.0) ** 2 - off**2, 0.0)
            own, missed = (own, missed + noise) if e.method == "integral" else (own + noise, missed)
            model += off
    return Doubt(math.sqrt(own) / total.value, math.hypot(math.sqrt(missed), model) / total.value)


def common(pairs: Pairs) -> float:
    """What is alike in every run of a side, but need not be in those of the other, so that pairs do not make it smaller."""
    return math.hypot(*(max(of_meters(pair[side]).alike for pair in pairs) for side in (0, 1)))


def reaches_0(pairs: Pairs) -> bool:
    """Whether the meters of one run cannot tell its energy from none."""
    return any(math.hypot(*of_meters(m)) >= 1 for pair in pairs for m in pair)


def _mean(own: Sequence[float]) -> float:
    """What independent doubts about both runs of each pair make of the mean of the pairs: root of their squares / pairs."""
    return math.hypot(*own) / (len(own) / 2)


def gains(pairs: Pairs) -> float:
    """What the gains of two boards' sensors do to a ratio: nothing where both are one board."""
    apart = [pair for pair in pairs if comparable.boards(pair[0]) != comparable.boards(pair[1])]
    return max((math.hypot(*map(comparable.gain_error, pair)) for pair in apart), default=0.0)


def of_rate(name: str, pairs: Pairs) -> Ratio:
    metric, told = RATES[name]
    values = [(metric(x), metric(y)) for x, y in pairs]
    if any(not value for pair in values for value in pair):
        return Ratio(name, told, None, None, None, None, None, "")
    a, b = (_geometric([pair[side] for pair in values]) for side in (0, 1))
    if len(pairs) > 1:
        half, from_ = _paired(values), f"{len(pairs)} pairs"
    elif name == "output_tokens_per_s" and any(r.output_tokens is None for m in pairs[0] for r in m.repeats):
        return Ratio(name, told, a, b, b / a, None, None, "", "the tokens of each repeat are not known")
    elif min(len(m.repeats) for m in pairs[0]) > 1:
        half = math.hypot(*(statistics.relative_half_width(_rates(m, name)) for m in pairs[0]))
        from_ = f"{len(pairs[0][0].repeats)} and {len(pairs[0][1].repeats)} repeats of one run each"
    else:
        return Ratio(name, told, a, b, b / a, None, None, "", "one run each does not show what differs from run to run")
    return _with(name, told, a, b, half, from_)


def _rates(m: Measurement, name: str) -> list[float]:
    """The figure of each repeat, up to a factor that is the same for all."""
    if name == "output_tokens_per_s":
        return [(r.output_tokens or 0) / r.duration_s for r in m.repeats]
    return [1 / r.duration_s for r in m.repeats]


def of_latency(name: str, pairs: Pairs, kept: set[int] | None = None) -> Ratio:
    metric, told = LATENCIES[name]
    each = [_of_both(_by_request(x, metric, kept), _by_request(y, metric, kept), _alike(x, y)) for x, y in pairs]
    if any(not found for pair in each for found in pair):
        return Ratio(name, told, None, None, None, None, None, "")
    medians = [(_median(x), _median(y)) for x, y in each]
    if any(value <= 0 for pair in medians for value in pair):
        return Ratio(name, told, None, None, None, None, None, "")
    a, b = (_geometric([pair[side] for pair in medians]) for side in (0, 1))
    if len(pairs) > 1:
        return _with(name, told, a, b, _paired(medians), f"{len(pairs)} pairs")
    (x, y), groups = each[0], [latency.together(m) for m in pairs[0]]
    found = _drawn_ratio(_grouped(x, groups[0]), _grouped(y, groups[1]), x.keys() == y.keys() and groups[0] == groups[1])
    if found is None:
        why = f"fewer than {statistics.LEAST_SAMPLES} requests or batches"
        return Ratio(name, told, a, b, b / a, None, None, "", why)
    if found[1] - found[0] <= LEAST * b / a:
        return Ratio(name, told, a, b, b / a, None, None, "", NO_SCATTER)
    from_ = f"{len(each[0][0])} requests of one run each, without what differs from run to run"
    return Ratio(name, told, a, b, b / a, *found, from_)


def _median(found: dict[int, list[float]]) -> float:
    return latency.percentile([value for values in found.values() for value in values], 50) or 0.0


def _alike(a: Measurement, b: Measurement) -> bool:
    """Whether request by request the two were asked the same, as far as their number tells."""
    return len(comparable.first_repeat(a)) == len(comparable.first_repeat(b))


def _by_request(m: Measurement, metric: Callable[[Completion], Any], kept: set[int] | None) -> dict[int, list[float]]:
    """The metric in all repeats, by the place of the request in the plan: the same request again is no new request."""
    count = max(len(comparable.first_repeat(m)), 1)
    found: dict[int, list[float]] = {}
    for i, c in enumerate(m.completions):
        value = metric(c) if c.error is None and (kept is None or i % count in kept) else None
        if value is not None:
            found.setdefault(i % count, []).append(value)
    return found


def _of_both(
    a: dict[int, list[float]], b: dict[int, list[float]], alike: bool
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Without the requests that only one of two equal plans has an answer to: those may be the slow ones."""
    both = a.keys() & b.keys() if alike else ()
    return ({i: a[i] for i in sorted(both)}, {i: b[i] for i in sorted(both)}) if both else (a, b)


def _grouped(found: dict[int, list[float]], groups: Sequence[int]) -> list[list[float]]:
    """What each group of requests (`latency.together`) gave."""
    of: dict[int, list[float]] = {}
    for place, values in found.items():
        of.setdefault(groups[place], []).extend(values)
    return list(of.values())


def _drawn_ratio(a: list[list[float]], b: list[list[float]], alike: bool) -> tuple[float, float] | None:
    """Interval on the ratio of medians by the bootstrap over requests, with all their repeats and those of a static batch
    together; where the groups of the two are alike, the same are drawn on both sides."""
    import numpy as np

    if min(len(a), len(b)) < statistics.LEAST_SAMPLES:
        return None
    seeds = (0, 0) if alike else (0, 1)
    drawn = [statistics.drawn_percentiles(side, 50, seed) for side, seed in zip((a, b), seeds)]
    known = drawn[0] > 0
    low, high = np.quantile(drawn[1][known] / drawn[0][known], [0.025, 0.975])
    return float(low), float(high)


def of_shares(pairs: Pairs, kept: set[int]) -> Ratio:
    """Energy per output token of these requests, by the shares of the total that fell to each."""
    name, told = "j_per_output_token", "energy per output token, shared by tokens"
    values, halves, own = [], [], []
    for m in (m for pair in pairs for m in pair):
        shares, count = attribution.per_request(m), max(len(comparable.first_repeat(m)), 1)
        mine = [i for i in range(len(m.completions)) if i % count in kept]
        joules = sum(shares.joules[i] for i in mine) if shares else 0.0
        tokens = sum(m.completions[i].output_tokens for i in mine)
        if shares is None or not joules > 0 or not tokens:
            return Ratio(name, told, None, None, None, None, None, "")
        values.append(joules / tokens)
        halves.append(sum(shares.half_width[i] for i in mine) / joules)  # they may all err to one side
        own.append(math.sqrt(max(halves[-1] ** 2 - of_meters(m).alike ** 2, 0.0)))
    each = list(zip(values[::2], values[1::2]))
    a, b = (_geometric([pair[side] for pair in each]) for side in (0, 1))
    if max(halves) >= 1:
        return Ratio(name, told, a, b, b / a, None, None, "", REACHES_0)
    half, from_ = math.hypot(*halves), "the shares' intervals"
    if len(each) > 1:
        half = math.hypot(_paired(each), _mean(own), common(pairs))
        from_ = f"{len(each)} pairs and {from_}"
    return _with(name, told, a, b, math.hypot(half, gains(pairs)), from_)


def _paired(values: Sequence[tuple[float, float]]) -> float:
    """Half-width of the interval on the mean logarithm of the pairs' ratios."""
    logs = [math.log(b / a) for a, b in values]
    return statistics.student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
