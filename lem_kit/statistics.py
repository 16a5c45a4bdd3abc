"""Spread and its intervals.

Not covered: intervals on the ratio of two configurations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Student's t, two-sided 95 %, for 1, 2, 3, ... degrees of freedom.
_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student_t(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; beyond 30 degrees of freedom the value for 30, which is a little wide."""
    return _STUDENT_T[min(degrees, len(_STUDENT_T)) - 1]


def stdev(samples: Sequence[float]) -> float:
    """Sample standard deviation (n - 1)."""
    centre = sum(samples) / len(samples)
    return math.sqrt(sum((x - centre) ** 2 for x in samples) / (len(samples) - 1))
