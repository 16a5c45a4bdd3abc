"""Lengths: the distributions that they say, the same for the same seed, and nothing that is no length."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lem_kit import lengths, prompts
from lem_kit.errors import LemError

DRAWS: dict[str, lengths.Lengths] = {
    "uniform": lengths.uniform(3, 90),
    "around": lengths.around(100, 0.3),
    "normal": lengths.normal(64, 20, low=8, high=99),
    "empirical": lengths.empirical([5, 7, 7, 60]),
}


@pytest.mark.parametrize("kind", DRAWS)
@given(seed=st.integers(0, 2**40), count=st.integers(1, 50))
def test_a_draw_is_the_same_for_its_seed_and_name_alone(kind: str, seed: int, count: int) -> None:
    found = DRAWS[kind].draw(count, seed, "input_tokens")
    assert len(found) == count and all(type(n) is int and n >= 1 for n in found)
    assert found == DRAWS[kind].draw(count, seed, "input_tokens")
    if count == 50:
        assert found != DRAWS[kind].draw(count, seed, "output_tokens"), "prompt and answer are drawn apart"
        assert found != DRAWS[kind].draw(count, seed + 1, "input_tokens")


def test_uniform_lengths_are_uniform_with_both_ends() -> None:
    found = lengths.uniform(3, 12).draw(10_000, 1)
    assert set(found) == set(range(3, 13))
    assert stats.chisquare(np.bincount(found)[3:]).pvalue > 0.05
    assert stats.chisquare(np.bincount(found)[3:], np.full(10, 1000) + np.arange(-90, 91, 20)).pvalue < 1e-3, "it can tell"
    assert set(lengths.uniform(7, 7).draw(5, 0)) == {7}


@pytest.mark.parametrize(("low", "high"), [(1, None), (50, 80), (40, 60), (90, None)])
def test_normal_lengths_are_truncated_and_not_clamped(low: int, high: int | None) -> None:
    mean, sd, count = 64.0, 16.0, 20_000
    found = np.array(lengths.normal(mean, sd, low, high).draw(count, 4))
    assert found.min() >= low and (high is None or found.max() <= high)
    # A length n has the probability of [n - 1/2, n + 1/2) under the truncated normal.
    shape = statistics.NormalDist(mean, sd)
    top = high or 200
    share = np.array([shape.cdf(n + 0.5) - shape.cdf(n - 0.5) for n in range(low, top + 1)])
    expected, seen = share / share.sum() * count, np.bincount(found, minlength=top + 1)[low:]
    often = expected >= 8
    expected, seen = np.append(expected[often], expected[~often].sum() + 1e-9), np.append(seen[often], seen[~often].sum())
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 0.01


def test_empirical_lengths_are_drawn_as_often_as_they_stand_there() -> None:
    found = lengths.empirical([10, 20, 20, 20]).draw(8000, 2)
    assert set(found) == {10, 20} and stats.binomtest(found.count(20), 8000, 0.75).pvalue > 0.05


def test_the_range_around_a_length_is_that_of_vllms_benchmark() -> None:
    assert lengths.around(100, 0.25) == lengths.uniform(75, 125)
    assert lengths.around(11, 0.3) == lengths.uniform(7, 15), "floor of 7.7, ceiling of 14.3"
    assert lengths.around(1, 0.9) == lengths.uniform(1, 2) and lengths.around(5, 0) == lengths.uniform(5, 5)


def test_pairs_of_a_trace_stay_pairs(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = "".join(f"2023-11-16 18:15:{n:02},{n + 1},{1000 + n}\r\n" for n in range(40))
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\r\n{rows}")
    made = prompts.synthetic(200, *lengths.of_trace(path), seed=5)
    shapes = [(len(r.prompt_token_ids or ()), r.max_new_tokens) for r in made]
    assert all(new == 999 + prompt for prompt, new in shapes) and len(set(shapes)) > 30
    few = prompts.synthetic(200, *lengths.of_trace(path, 3), seed=5)
    assert {r.max_new_tokens for r in few} == {1000, 1001, 1002}


@pytest.mark.parametrize("bad", [0, -3, math.nan, math.inf, 2.5, "12", True, None])
def test_what_is_no_length_is_refused_in_one_sentence(bad: Any) -> None:
    for make in (
        lambda: prompts.synthetic(1, bad, 4), lambda: prompts.synthetic(1, 4, bad), lambda: lengths.uniform(bad, 9),
        lambda: lengths.uniform(1, bad), lambda: lengths.empirical([4, bad]), lambda: lengths.around(bad, 0.1),
        lambda: lengths.normal(8, 2, low=bad), lambda: prompts.conversations(1, bad, 4, 4),
        lambda: prompts.shared_prefix(2, 2, bad, 4, 4), lambda: prompts.synthetic_words(1, bad, 4),
    ):  # fmt: skip
        with pytest.raises(LemError, match=r"must be a whole number, at least one: got"):
            make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lengths.uniform(9, 3), "the shorter length first"),
        (lambda: lengths.empirical([]), "the list is empty"),
        (lambda: lengths.empirical([3, 0]), "value 1, must be a whole number"),
        (lambda: lengths.normal(math.nan, 3), r"normal\(mean=\) takes a finite number above 0: got nan"),
        (lambda: lengths.normal(10, 0), r"normal\(sd=\) takes a finite number above 0: got 0"),
        (lambda: lengths.normal(10, 2, low=60), "Hardly any length .* lies above 60"),
        (lambda: lengths.normal(10, 2, 1, 3), "Hardly any length .* lies between 1 and 3"),
        (lambda: lengths.around(10, 1.0), "a ratio from 0 to less than 1: got 1.0"),
        (lambda: lengths.around(10, math.nan), "a ratio from 0 to less than 1: got nan"),
    ],
)
def test_distributions_that_mean_nothing_are_refused(make: Any, words: str) -> None:
    with pytest.raises(LemError, match=words):
        make()


def test_a_distribution_of_the_users_own_is_checked() -> None:
    class Odd:
        def draw(self, count: int, seed: int, name: str) -> list[Any]:
            return [5] * (count - 1) if name == "input_tokens" else [0.5] * count

    with pytest.raises(LemError, match="gave 2 lengths where 3 were needed"):
        prompts.synthetic(3, Odd(), 4)
    with pytest.raises(LemError, match="output_tokens= must be a whole number"):
        prompts.synthetic(3, 4, Odd())
