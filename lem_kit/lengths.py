"""Lengths of prompts and answers: one for all requests, or one for each from a distribution.

The one idea: a length is drawn before the run, from a seed, so that two engines get the same requests. A whole number is a
fixed length; everything else here gives whole numbers of tokens of at least 1.

    lem.prompts.synthetic(100, lem.lengths.normal(512, 128, low=16), lem.lengths.uniform(32, 256), seed=0)

How others draw theirs stands in docs/workloads.md. Not covered: lengths of texts, which only a tokenizer can tell.
"""

from __future__ import annotations

import math
import numbers
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import traces
from .errors import LemError


class Lengths(Protocol):
    """A distribution of lengths: `draw` gives `count` of them, the same for the same seed and `name` of what is drawn."""

    def draw(self, count: int, seed: int, name: str) -> list[int]: ...


@dataclass(frozen=True)
class Uniform:
    """Every whole number from `low` to `high`, both included, equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        whole("uniform(low=)", self.low)
        whole("uniform(high=)", self.high)
        if self.low > self.high:
            raise LemError(f"uniform() takes the shorter length first: got {self.low}, {self.high}.")

    def draw(self, count: int, seed: int, name: str = "") -> list[int]:
        random_ = random.Random(f"{seed} {name}")
        return [random_.randint(self.low, self.high) for _ in range(count)]


@dataclass(frozen=True)
class Normal:
    """A normal distribution of this mean and standard deviation, rounded, given that the result lies in [low, high].

    Truncated, not clamped: no length piles up at a bound, and the mean moves inward where a bound cuts off much. LemError
    where less than a thousandth of the distribution lies between the bounds.
    """

    mean: float
    sd: float
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        _positive("normal(mean=)", self.mean)
        _positive("normal(sd=)", self.sd)
        whole("normal(low=)", self.low)
        if self.high is not None:
            whole("normal(high=)", self.high)
        below, above = self._shares()
        if above - below < 1e-3:
            until = "" if self.high is None else f" and {self.high}"
            raise LemError(
                f"Hardly any length of normal(mean={self.mean:g}, sd={self.sd:g}) lies {'between' if until else 'above'} "
                f"{self.low}{until}: move the bounds."
            )

    def _shares(self) -> tuple[float, float]:
        """Of the distribution, what lies below what is rounded to `low`, and below the end of what is rounded to `high`."""
        shape = statistics.NormalDist(self.mean, self.sd)
        return shape.cdf(self.low - 0.5), 1.0 if self.high is None else shape.cdf(self.high + 0.5)

    def draw(self, count: int, seed: int, name: str = "") -> list[int]:
        random_ = random.Random(f"{seed} {name}")
        shape, (below, above) = statistics.NormalDist(self.mean, self.sd), self._shares()
        drawn = (below + (above - below) * random_.random() for _ in range(count))
        # A share of 0 or 1 has no length; doubles come that close only beyond eight standard deviations.
        rounded = (round(shape.inv_cdf(min(max(share, 1e-15), 1 - 1e-15))) for share in drawn)
        return [min(max(n, self.low), self.high or n) for n in rounded]


@dataclass(frozen=True)
class Empirical:
    """Each length is one of `values`, drawn with replacement.

    Two distributions with the same `paired` and as many values are drawn at the same places, so that what belongs together
    in the data (a prompt's length and its answer's) stays together.
    """

    values: Sequence[int] = field(repr=False)
    paired: str | None = None

    def __post_init__(self) -> None:
        values = tuple(self.values)
        if not values:
            raise LemError("empirical() takes at least one length: the list is empty.")
        for i, value in enumerate(values):
            whole(f"empirical(), value {i},", value)
        object.__setattr__(self, "values", values)

    def draw(self, count: int, seed: int, name: str = "") -> list[int]:
        return random.Random(f"{seed} {self.paired or name}").choices(self.values, k=count)


uniform, normal, empirical = Uniform, Normal, Empirical


def around(length: int, ratio: float) -> Uniform:
    """Uniform from floor(length × (1 − ratio)) to ceil(length × (1 + ratio)), at least 1: the `--random-range-ratio` of
    vLLM's benchmark, which takes the tokenizer's special tokens off a prompt's length before."""
    whole("around() takes a length that", length)
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 <= ratio < 1:
        raise LemError(f"around() takes a ratio from 0 to less than 1: got {ratio!r}.")
    return Uniform(max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio)))


def of_trace(
    path: str | Path, count: int | None = None, format: str | None = None, at_least: int | None = None
) -> tuple[Empirical, Empirical]:
    """The lengths of prompts and of answers in the first `count` rows of a trace (all, unless given), drawn as pairs.

    LemError, with the number of the line, for a row without a length or with one of 0, unless `at_least` raises it.
    """
    rows = traces.whole_rows(path, count, format, at_least)
    inputs, outputs = zip(*((row.input_tokens, row.output_tokens) for row in rows))
    return Empirical(inputs, paired="trace"), Empirical(outputs, paired="trace")


def drawn(asked: int | Lengths, count: int, seed: int, name: str) -> list[int]:
    """`count` lengths as a caller's argument `name` asks for them. LemError for what is neither a length nor a distribution,
    and for a distribution that gives no whole numbers of at least 1."""
    if not hasattr(asked, "draw"):
        whole(f"{name}=", asked)
        return [asked] * count  # type: ignore[list-item]
    lengths = asked.draw(count, seed, name)
    if len(lengths) != count:
        raise LemError(
            f"{name}= gave {len(lengths)} lengths where {count} were needed: its draw(count, seed, name) is wrong."
        )
    for length in lengths:
        whole(f"{name}=", length)
    return lengths


def whole(who: str, value: Any) -> None:
    """LemError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LemError(f"{who} must be a whole number, at least one: got {value!r}. (Distributions: lem.lengths.)")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise LemError(f"{name} takes a finite number above 0: got {value!r}.")
