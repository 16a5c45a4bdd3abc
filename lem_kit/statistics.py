"""Spread and its intervals.

The one idea: what is drawn again is what was independent. Requests are; the gaps between the tokens of one request are not,
since a slow step is slow for all of its neighbours, so an interval over pooled gaps would be far too narrow.

Not covered: what an interval of energy holds besides (`totals`), whether two runs may be compared (`comparison`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .errors import LemError

# Student's t, two-sided 95 %, for 1, 2, 3, ... degrees of freedom.
_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

ROUNDS = 1000
LEAST_SAMPLES = 10  # of fewer, a bootstrap says less than it claims


def student_t(degrees: float) -> float:
    """Two-sided 95 % quantile of Student's t; beyond 30 degrees of freedom the value for 30, which is a little wide. Part of
    a degree is left out, which is a little wide, too."""
    return _STUDENT_T[max(min(int(degrees), len(_STUDENT_T)), 1) - 1]


def stdev(samples: Sequence[float]) -> float:
    """Sample standard deviation (n - 1)."""
    centre = sum(samples) / len(samples)
    return math.sqrt(sum((x - centre) ** 2 for x in samples) / (len(samples) - 1))


def relative_half_width(samples: Sequence[float]) -> float:
    """Half-width of Student's 95 % interval of their mean, as a share of it; infinite for fewer than two, and where the mean
    is not above 0."""
    centre = sum(samples) / len(samples) if samples else 0.0
    if len(samples) < 2 or centre <= 0:
        return math.inf
    return student_t(len(samples) - 1) * stdev(samples) / math.sqrt(len(samples)) / centre


@dataclass(frozen=True)
class RepeatUntil:
    """How long to repeat (`repeat_until`)."""

    interval: float
    max_repeats: int
    min_repeats: int

    def __post_init__(self) -> None:
        known = isinstance(self.interval, numbers.Real) and not isinstance(self.interval, bool)
        if not (known and 0 < self.interval < 1):
            raise LemError(f"interval= is a share of the figure, above 0 and below 1, as 0.02: got {self.interval!r}.")
        for name, value, least in (
            ("min_repeats", self.min_repeats, 2),
            ("max_repeats", self.max_repeats, self.min_repeats),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LemError(f"{name}= takes a whole number of at least {least}: got {value!r}.")


def repeat_until(interval: float = 0.02, max_repeats: int = 30, min_repeats: int = 5) -> RepeatUntil:
    """Repeat until the half-width of the 95 % interval is at most `interval` of the figure, or `max_repeats` is reached.

    To stop at the first narrow interval is to prefer lucky ones. From three repeats on an interval of 95 % would hold the
    truth in about 90 of 100, from five on in about 93 (`tests/test_statistics.py`), so that is the least unless
    said otherwise. LemError for numbers that mean nothing.
    """
    return RepeatUntil(interval, max_repeats, min_repeats)


def bootstrap(
    samples: Sequence[Any],
    statistic: Callable[[Sequence[float]], float],
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap (Efron 1979) of a statistic over requests: the interval of `level`.

    Each of `samples` is what one request gave: a number, or a list of them (its gaps). Requests are drawn again, with all
    that they gave; `statistic` gets the values of those drawn. None with fewer than ten requests.
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    import numpy as np

    draw = np.random.default_rng(seed)
    lists = any(isinstance(sample, list | tuple) for sample in samples)
    found = []
    for _ in range(rounds):
        drawn = [samples[i] for i in draw.integers(0, len(samples), len(samples))]
        values = list(chain.from_iterable(drawn)) if lists else drawn
        if values:
            found.append(statistic(values))
    return _middle(found, level)


def bootstrap_percentile(
    samples: Sequence[Any], q: float, *, seed: int = 0, rounds: int = ROUNDS, level: float = 0.95
) -> tuple[float, float] | None:
    """`bootstrap` of the q-th percentile (0-100, NumPy's linear method), fast enough for half a million gaps."""
    if len(samples) < LEAST_SAMPLES:
        return None
    return _middle(drawn_percentiles(samples, q, seed, rounds), level)


def bootstrap_mean(
    samples: Sequence[Any], *, seed: int = 0, rounds: int = ROUNDS, level: float = 0.95
) -> tuple[float, float] | None:
    """`bootstrap` of the mean of all values, fast enough for half a million gaps."""
    if len(samples) < LEAST_SAMPLES:
        return None
    import numpy as np

    draw, n = np.random.default_rng(seed), len(samples)
    each = [sample if isinstance(sample, list | tuple) else (sample,) for sample in samples]
    sums, counts = np.array([sum(values) for values in each]), np.array([len(values) for values in each])
    drawn = [draw.integers(0, n, n) for _ in range(rounds)]
    return _middle([sums[i].sum() / counts[i].sum() for i in drawn if counts[i].any()], level)


def drawn_percentiles(samples: Sequence[Any], q: float, seed: int, rounds: int = ROUNDS) -> Any:
    """The q-th percentile of each of `rounds` draws of requests, as an array. The same seed and number of requests draw the
    same requests, so that two runs of the same requests may be set against each other draw by draw."""
    import numpy as np

    draw, n = np.random.default_rng(seed), len(samples)
    if not any(isinstance(sample, list | tuple) for sample in samples):
        values = np.asarray(samples, dtype=float)
        return np.array([np.percentile(values[draw.integers(0, n, n)], q) for _ in range(rounds)])
    # Sorted once: a draw is then a weight for each value, and a percentile a place in their running sum.
    pooled = np.fromiter(chain.from_iterable(samples), dtype=float)
    owner = np.repeat(np.arange(n), [len(sample) for sample in samples])
    order = np.argsort(pooled, kind="stable")
    pooled, owner = pooled[order], owner[order]
    found = []
    for _ in range(rounds):
        reached = np.cumsum(np.bincount(draw.integers(0, n, n), minlength=n)[owner])
        if not len(reached) or reached[-1] == 0:
            continue
        place = (reached[-1] - 1) * q / 100
        low, high = (pooled[np.searchsorted(reached, k, side="right")] for k in (math.floor(place), math.ceil(place)))
        found.append(low + (high - low) * (place - math.floor(place)))
    return np.array(found)


def _middle(found: Sequence[float], level: float) -> tuple[float, float] | None:
    import numpy as np

    if not len(found):
        return None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
