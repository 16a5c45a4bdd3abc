"""Goodput: failures are misses, and what was not seen is not called good."""

from __future__ import annotations

import dataclasses
import math

import pytest
from test_metrics import SECOND, completion, energy, measured

from lem_kit import goodput
from lem_kit.errors import LemError
from lem_kit.measurement import Repeat

QUICK = completion((300, 1), (340, 1), (420, 2))  # TTFT 0.2 s, TPOT 0.04 s, inter-token 0.04 s, end to end 0.32 s
SLOW = completion((600, 1), (700, 1))  # TTFT 0.5 s, TPOT 0.1 s
ONE_TOKEN = completion((300, 1))
BUNDLE = completion((300, 4))
FAILED = completion((150, 1), (151, 1), error="oh")


def test_a_request_is_good_when_it_meets_every_limit() -> None:
    assert goodput.meets(QUICK, ttft_s=0.2, tpot_s=0.05) is True
    assert goodput.meets(QUICK, ttft_s=0.19, tpot_s=0.05) is False
    assert goodput.meets(QUICK, ttft_s=0.2, tpot_s=0.03) is False
    assert goodput.meets(QUICK, itl_s=0.0401) is True and goodput.meets(QUICK, itl_s=0.0399) is False
    assert goodput.meets(completion((300, 1), (310, 1), (400, 1)), itl_s=0.05) is False, "one gap too long is a miss"
    assert goodput.meets(QUICK, e2e_s=0.33, ntpot_s=0.081, ttft_sched_s=0.301, e2e_sched_s=0.421) is True
    assert goodput.meets(QUICK, ttft_sched_s=0.299) is False, "from the schedule, at 0"
    assert goodput.meets(FAILED, ttft_s=9) is False


def test_gaps_that_were_not_seen_are_not_called_good() -> None:
    assert goodput.meets(ONE_TOKEN, ttft_s=1, tpot_s=0.001) is True and goodput.meets(ONE_TOKEN, itl_s=0.001) is True
    assert goodput.meets(BUNDLE, tpot_s=1) is None and goodput.meets(BUNDLE, itl_s=1) is None
    assert goodput.meets(BUNDLE, tpot_s=1, ttft_s=0.1) is False, "a miss is a miss whatever the rest was"
    m = measured([energy("a:g", 4.0)], [QUICK, BUNDLE])
    found = [f(m, tpot_s=1) for f in (goodput.good_requests, goodput.attainment, goodput.per_s, goodput.per_j)]
    assert found == [None] * 4
    assert goodput.good_requests(m, ttft_s=1) == 2


def test_failures_are_misses() -> None:
    m = measured([energy("a:g", 48.0, 2.4)], [QUICK, QUICK, SLOW, FAILED])
    limits = {"ttft_s": 0.3, "tpot_s": 0.05}
    assert goodput.good_requests(m, **limits) == 2 and goodput.attainment(m, **limits) == 0.5
    assert goodput.per_s(m, **limits) == pytest.approx(2 / 4)
    figure = goodput.per_j(m, **limits)
    assert figure is not None and figure.value == pytest.approx(2 / 48)
    assert figure.half_width == pytest.approx(2 / 48 * 0.05) and figure.method == "counter"
    per_watt = goodput.per_s_per_w(m, **limits)
    assert per_watt is not None and per_watt[:2] == pytest.approx(figure[:2]), "(1/s) / W = 1/J"
    assert goodput.per_s_per_w(measured(completions=[QUICK]), **limits) is None
    assert goodput.per_s(m, ttft_s=0.01) == 0.0 and goodput.per_j(m, ttft_s=0.01)[:2] == (0.0, 0.0)  # type: ignore[index]
    assert goodput.per_s(measured(), **limits) is None and goodput.per_j(measured(completions=[QUICK]), **limits) is None


def test_goodput_per_watt_does_not_doubt_a_repeat_that_takes_longer() -> None:
    spans = tuple(Repeat(0, t * SECOND, {"a:g": energy("a:g", 50.0 * t, 0.3)}) for t in (1, 2, 4))
    m = dataclasses.replace(measured(completions=[QUICK] * 6), repeats=spans)
    per_watt, per_joule = goodput.per_s_per_w(m, ttft_s=1), goodput.per_j(m, ttft_s=1)
    assert per_watt is not None and per_joule is not None
    assert per_watt.value == pytest.approx(6 / 7 / 50) == per_joule.value
    assert per_watt.half_width < per_joule.half_width / 100


def test_limits_that_mean_nothing_are_refused() -> None:
    with pytest.raises(LemError, match="at least one limit"):
        goodput.meets(QUICK)
    with pytest.raises(LemError, match="did you mean 'ttft_s'"):
        goodput.meets(QUICK, ttft=1)
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(LemError, match="above 0"):
            goodput.meets(FAILED, ttft_s=bad)
