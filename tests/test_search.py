"""Searches: what may be asked, what is tried, what counts as tried, and what is said about it. Points are measured by a
callable whose joules and latencies are known; the last tests run a notebook for real."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
import signal
import subprocess
import sys
import textwrap
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import lem_kit as lem
from lem_kit import cli, export, metrics, study
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Energy, Measurement
from lem_kit.study import found, limits, search, space
from lem_kit.study.work import by_notebook
from lem_kit.trace import Domain, Series, Trace

Measure = Callable[[dict[str, Any]], Measurement]
SPACE = {
    "concurrency": [1, 2, 4, 8, 16, 32, 64, 128],
    "engine_args": [{"slots": n} for n in (4, 8, 16, 32, 64)],
    "kind": "abc",
}
SPACE["kind"] = list("abc")


def run_of(
    j_per_token: float, ttft_s: float = 0.1, half_width: float = 0.01, requests: int = 4, failed: int = 0, key: str = "gpu0"
) -> Measurement:
    """`requests` of 10 tokens each with these figures. Half-width in J per token."""
    tokens = 10 * requests
    first = 1_000_000_000 + round(ttft_s * 1e9)
    events = tuple((first + k * 20_000_000, 1) for k in range(10))
    done = [Completion(10**9, 10**9, events[-1][0], events, 8) for _ in range(requests)]
    counted = Series(
        array("q", range(10**9, 3 * 10**9 + 1, 10**8)), array("d", [j_per_token * tokens * k / 20 for k in range(21)])
    )
    done = [dataclasses.replace(c, error="RuntimeError: out" if i < failed else None) for i, c in enumerate(done)]
    return Measurement(
        "any", "run", "a run", "ok", datetime.datetime.now(datetime.timezone.utc).isoformat(), 10**9, 3 * 10**9,
        {f"sim:{key}": Energy("sim", key, "counter", "gpu", j_per_token * tokens, half_width * tokens)},
        completions=tuple(done), output_tokens=tokens, config={"prompts_sha256": "same"},
        trace=Trace({f"sim:{key}": counted}, {}, {f"sim:{key}": Domain("gpu", "counter", 0.0)}),
    )  # fmt: skip


def served(parameters: dict[str, Any]) -> tuple[float, float, bool]:
    """J per token, TTFT and whether the engine starts at all. Cheapest within 0.4 s: 32, 32, b at exactly 1 J."""
    together, slots, kind = parameters["concurrency"], parameters["engine_args"]["slots"], parameters["kind"]
    joules = (1 + 8 / min(together, slots)) * (1 + 0.1 * abs([4, 8, 16, 32, 64].index(slots) - 3))
    ttft_s = 0.01 * together + (0.3 if together > slots else 0)
    return joules * {"a": 1, "b": 0.8, "c": 1.3}[kind], ttft_s, not (slots == 64 and kind == "c")


def measure(parameters: dict[str, Any]) -> Measurement:
    joules, ttft_s, starts = served(parameters)
    if not starts:
        raise MemoryError("out of memory")
    return run_of(joules, ttft_s)


def points_of(result: found.SearchResult) -> list[str]:
    return [space.key(t.point) for t in result.history]


# --- looking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_cheapest_point_that_meets_the_limit(tmp_path: Path, seed: int) -> None:
    """Of 120 points, a third infeasible and some without a figure; drawing at random takes 60 on average."""
    truth = {space.key(p): served(p) for p in space.read(SPACE).points() if served(p)[1] <= 0.4 and served(p)[2]}
    best = min(truth, key=lambda key: truth[key][0])
    result = lem.search(SPACE, {"ttft_s_p50": 0.4}, measure=measure, folder=tmp_path, trials=40, seed=seed)
    assert result.best is not None and space.key(result.best.point) == best
    assert len(result.history) == len(set(points_of(result))) == 40 and result.stopped == "40 points were tried"
    assert result.best.figure is not None and result.best.figure.value == pytest.approx(1.0)


def test_what_is_tried_follows_from_the_seed_and_the_folder(tmp_path: Path) -> None:
    def tried(name: str, seed: int, trials: tuple[int, ...]) -> list[str]:
        for n in trials:
            result = lem.search(SPACE, {"ttft_s_p50": 0.4}, measure=measure, folder=tmp_path / name, trials=n, seed=seed)
        return points_of(result)

    whole = tried("whole", 3, (12,))
    assert tried("in pieces", 3, (2, 7, 12)) == whole and tried("other", 4, (12,)) != whole


def test_a_small_space_is_tried_whole_and_no_point_twice(tmp_path: Path) -> None:
    asked: list[str] = []

    def counted(parameters: dict[str, Any]) -> Measurement:
        asked.append(json.dumps(parameters))
        return run_of(parameters["n"] + 1 + (parameters["on"] is True))

    lines: list[str] = []
    small = {"n": {"low": 0, "high": 2}, "on": [True, 1]}
    result = lem.search(small, measure=counted, folder=tmp_path, trials=50, say=lines.append)
    assert result.stopped == "every point of the space was tried" and len(result.history) == 6
    assert len(asked) == len(set(asked)) == 6 and result.best is not None and result.best.point == {"n": 0, "on": 1}
    assert result.best.point["on"] is not True and lines[5].startswith("[6/6] ")
    again = lem.search(small, measure=counted, folder=tmp_path, trials=50, say=lines.append)
    assert len(asked) == 6 and again == result and lines[6:] == ["6 points were tried before."]


def test_numbers_without_steps_are_searched_too(tmp_path: Path) -> None:
    def bowl(parameters: dict[str, Any]) -> Measurement:
        return run_of(1 + abs(parameters["share"] - 0.7) + abs(parameters["rate"] - 8) / 8)

    ranges = {"share": {"low": 0.1, "high": 0.95}, "rate": {"low": 1, "high": 64, "log": True}}
    result = lem.search(ranges, measure=bowl, folder=tmp_path, trials=30)
    assert result.best is not None and result.best.figure is not None and result.best.figure.value < 1.35
    assert all(type(t.point["rate"]) is int and 1 <= t.point["rate"] <= 64 for t in result.history)


def test_it_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 40))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(now))
    result = lem.search(SPACE, measure=measure, folder=tmp_path, timeout_s=100)
    assert result.stopped == "100 s have passed" and len(result.history) == 2


# --- what was tried before --------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import test_search as t
    import lem_kit as lem

    calls = []

    def dies(parameters):
        calls.append(parameters)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return t.measure(parameters)

    lem.search(t.SPACE, {{"ttft_s_p50": 0.4}}, measure=dies, folder={folder!r}, trials=9)
"""


def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED).format(tests=str(ROOT / "tests"), folder=str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    calls: list[dict[str, Any]] = []

    def counted(parameters: dict[str, Any]) -> Measurement:
        calls.append(parameters)
        return measure(parameters)

    whole = lem.search(SPACE, {"ttft_s_p50": 0.4}, measure=measure, folder=tmp_path / "whole", trials=9)
    result = lem.search(SPACE, {"ttft_s_p50": 0.4}, measure=counted, folder=tmp_path / "killed", trials=9)
    assert len(calls) == 6 and points_of(result) == points_of(whole)


def test_failed_points_are_recorded_and_not_tried_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def odd_ones_fail(parameters: dict[str, Any]) -> Measurement:
        calls.append(parameters["n"])
        if parameters["n"] % 2:
            raise ValueError("odd\nones fail")
        return run_of(1 + parameters["n"])

    for _ in range(2):
        result = lem.search({"n": [0, 1, 2, 3]}, measure=odd_ones_fail, folder=tmp_path)
        assert sorted(calls) == [0, 1, 2, 3] and result.best is not None and result.best.point == {"n": 0}
        assert {t.point["n"]: t.problem for t in result.history if t.problem} == dict.fromkeys(
            (1, 3), "failed: odd ones fail"
        )
    rows = lem.frame(tmp_path)
    assert sorted(rows["status"]) == ["failed", "failed", "ok", "ok"] and sorted(rows["config.n"]) == [0, 1, 2, 3]
    failed = lem.load(tmp_path / next(t.run_id for t in result.history if t.problem))
    assert failed.error == {"type": "ValueError", "message": "odd\nones fail"} and failed.energy == {}


@pytest.mark.parametrize("other", [None, metrics.Figure(0.01, 0.001, ("part",), "counter", ())])
def test_neighbours_of_points_without_a_figure_to_compare_are_left_alone(other: metrics.Figure | None) -> None:
    """The sampler forgets what it is told as failed; told as infinitely infeasible, it keeps away."""
    import optuna

    asked = space.read({"slots": list(range(40))})
    problem = None if other else "failed: out of memory"
    trials = [
        found.Trial(str(n), {"slots": n}, f"{n:02}", other, problem=problem)
        if n >= 24
        else found.Trial(str(n), {"slots": n}, f"{n:02}", metrics.Figure(2 - n / 24, 0.1, ("whole",), "counter", ()))
        for n in range(0, 40, 2)
    ]
    proposed = [search._next(optuna, trials, asked, (), seed) for seed in range(40)]
    assert sum(p is not None and p["slots"] > 24 for p in proposed) <= 4


def test_a_search_in_which_nothing_works_gives_up(tmp_path: Path) -> None:
    def broken(parameters: dict[str, Any]) -> Measurement:
        raise RuntimeError("no such engine")

    result = lem.search({"n": list(range(100))}, measure=broken, folder=tmp_path)
    assert len(result.history) == 5 and result.best is None and result.nearest is None
    assert "No point of 5 could be measured. The last: n=" in repr(result) and "failed: no such engine" in repr(result)
    assert "remove its folder" in result.stopped


def test_runs_of_other_parameters_are_not_taken_for_points(tmp_path: Path) -> None:
    def sized(parameters: dict[str, Any]) -> Measurement:
        return run_of(parameters["n"] * parameters["size"])

    for size in (1, 10):
        result = lem.search({"n": [1, 2]}, measure=sized, folder=tmp_path, parameters={"size": size})
        assert sorted(t.figure.value for t in result.history if t.figure) == [size, 2 * size]
    wider = lem.search({"n": [1, 2, 3], "size": [10]}, measure=sized, folder=tmp_path, trials=2)
    assert {t.run_id for t in wider.history} == {t.run_id for t in result.history}


# --- limits -----------------------------------------------------------------------------------------------------------


@given(st.floats(0.1, 99.99) | st.just(50.0))
def test_as_many_requests_are_asked_for_as_the_percentile_needs(q: float) -> None:
    needed = limits.Limit("", "ttft_s", q, 1).needed
    assert metrics.percentile([1.0] * needed, q) == 1.0
    assert q == 50 or metrics.percentile([1.0] * (needed - 1), q) is None


@pytest.mark.parametrize(
    ("asked", "parameters", "words"),
    [
        ({"ttft_s_p99": 0.5}, {"requests": 300, "repeats": 3}, "ttft_s_p99 needs 1,000 requests"),
        ({"ttft_s_p99": 0.5}, {"requests": 300, "repeats": 3}, "a run has 300 requests × 3 repeats"),
        ({"tpot_s_p90": 0.5}, {"requests": 99}, "tpot_s_p90 needs 100 requests"),
        ({"itl_s_p99": 0.5}, {"requests": 99, "output_tokens": 11}, "itl_s_p99 needs 100 requests"),
        ({"ttft_p99": 0.5}, {}, "did you mean 'ttft_s'"),
        ({"ttft_s": 0.5}, {}, "no percentile of a latency"),
        ({"ttft_s_p100": 0.5}, {}, "no percentile of a latency"),
        ({"ttft_s_p50": 0}, {}, "a number of seconds above 0"),
        ({"ttft_s_p50": "0.5"}, {}, "a number of seconds above 0"),
        ([], {}, None),
        (["ttft_s_p50"], {}, "Limits map"),
    ],
)
def test_limits_that_cannot_be_told_are_refused_before_anything_runs(
    tmp_path: Path, asked: Any, parameters: dict[str, Any], words: str | None
) -> None:
    def never(parameters: dict[str, Any]) -> Measurement:
        raise AssertionError("a point was measured")

    if words is None:
        assert limits.read(asked or {}) == ()
        return
    with pytest.raises(LemError) as caught:
        lem.search({"n": [1]}, asked, measure=never, folder=tmp_path / "none", parameters=parameters)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "none").exists()


def test_enough_requests_are_enough(tmp_path: Path) -> None:
    for parameters in ({"requests": 50, "repeats": 2}, {"requests": 100}):
        limits.check(limits.read({"ttft_s_p90": 1}), {k: [v] for k, v in parameters.items()})
    limits.check(limits.read({"itl_s_p99": 1}), {"requests": [100], "output_tokens": [11]})
    limits.check(limits.read({"ttft_s_p99": 1}), {"requests": []})
    with pytest.raises(LemError, match="a run has 8 requests"):
        lem.search({"requests": [64, 8, 256]}, {"ttft_s_p90": 1}, measure=measure, folder=tmp_path)


def test_a_percentile_that_a_run_turns_out_not_to_have_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(LemError, match=r"has 4 values of ttft_s, and ttft_s_p90 needs 100.*The run is kept"):
        lem.search(SPACE, {"ttft_s_p90": 0.4}, measure=lambda p: run_of(1), folder=tmp_path)
    assert len(lem.frame(tmp_path)) == 1


def test_a_limit_is_missed_by_a_share_of_it_and_by_failed_requests() -> None:
    asked = limits.read({"ttft_s_p50": 0.2, "tpot_s_p50": 0.04})
    trial = found.judged(run_of(1, ttft_s=0.3, failed=1), {"n": 1}, asked)
    assert trial.violated == pytest.approx({"failed_requests": 0.25, "ttft_s_p50": 0.5, "tpot_s_p50": -0.5})
    assert trial.missed(asked) == ["ttft_s_p50 is 0.3 s, 50 % above its limit of 0.2 s", "25 % of the requests failed"]
    assert not trial.feasible and found.judged(run_of(1, ttft_s=0.2), {"n": 1}, asked).feasible
    (p90,) = limits.read({"ttft_s_p90": 0.2})
    few = found.judged(run_of(1, requests=100, failed=1), {"n": 1}, (p90,))
    assert few.violated == {"failed_requests": 0.01, "ttft_s_p90": 1.0} and "is not known" in few.missed([p90])[0]


def test_where_nothing_meets_the_limits_the_nearest_point_says_by_how_much(tmp_path: Path) -> None:
    result = lem.search({"n": [1, 2, 4]}, {"ttft_s_p50": 0.08}, measure=lambda p: run_of(1, 0.1 * p["n"]), folder=tmp_path)
    assert result.best is None and result.tied == () and result.nearest is not None
    assert result.nearest.point == {"n": 1}
    said = "No point of 3 met the limits. Nearest: n=1: ttft_s_p50 is 0.1 s, 25 % above its limit of 0.08 s."
    assert said in repr(result) and "ttft_s_p50 over by 400 %" in repr(result)


# --- what is found ----------------------------------------------------------------------------------------------------


def outcome(
    tmp_path: Path, runs: list[Measurement], asked: dict[str, float] | None = None, **options: Any
) -> found.SearchResult:
    return lem.search({"n": list(range(len(runs)))}, asked, measure=lambda p: runs[p["n"]], folder=tmp_path, **options)


def test_points_whose_intervals_overlap_the_best_are_named(tmp_path: Path) -> None:
    result = outcome(tmp_path, [run_of(1.05, half_width=0.03), run_of(1.0, half_width=0.03), run_of(1.2, half_width=0.03)])
    assert result.best is not None and result.best.point == {"n": 1}
    assert [t.point for t in result.tied] == [{"n": 0}]
    assert "Cheapest of 3 points: n=1: 1.000 ± 0.030 J per output token." in repr(result)
    assert "Cannot be told apart from it by these measurements: n=0 (1.050 ± 0.030 J)." in repr(result)
    assert [row["verdict"] for row in result.table()] == ["best", "not told apart from the best", "dearer"]


def test_a_measurement_that_is_not_valid_does_not_win_while_there_is_another(tmp_path: Path) -> None:
    doubtful = dataclasses.replace(run_of(0.5), reasons=("foreign_process",))
    result = outcome(tmp_path / "one", [run_of(1.0), doubtful, run_of(2.0)])
    assert result.best is not None and result.best.point == {"n": 0}
    assert "Passed over with a lower figure, since the measurement is not valid (foreign_process): n=1." in repr(result)
    alone = outcome(tmp_path / "all", [doubtful])
    assert alone.best is not None and "against this one speaks: foreign_process." in repr(alone)


def test_energies_made_of_other_parts_are_not_compared(tmp_path: Path) -> None:
    result = outcome(tmp_path, [run_of(1.0), run_of(0.1, key="cpu0"), run_of(2.0)])
    assert result.best is not None and result.best.point == {"n": 0}
    assert "its energy is made of sim:cpu0, and that of most of sim:gpu0" in repr(result)


def test_an_unknown_energy_is_no_figure_and_no_meter_at_all_ends_the_search(tmp_path: Path) -> None:
    unread = {"sim:gpu0": Energy("sim", "gpu0", "counter", "gpu", None, None, ("too_short",))}
    short = dataclasses.replace(run_of(1.0), energy=unread)
    result = outcome(tmp_path / "short", [run_of(1.0), short])
    assert [t.problem for t in result.history if t.problem] == ["its energy per output token is not known: too_short"]
    with pytest.raises(LemError, match=r"No meter was open in run .* see `lem doctor`"):
        outcome(tmp_path / "none", [dataclasses.replace(run_of(1.0), energy={}, reasons=("no_source",))])


def test_modelled_energy_and_unlike_requests_are_said(tmp_path: Path) -> None:
    model = {"sim:cpu": Energy("sim", "cpu", "model", "cpu", 40.0, 1.0)}
    runs = [dataclasses.replace(run_of(1.0), energy=model, config={"prompts_sha256": s}) for s in "ab"]
    assert "All of this energy is MODELLED, not measured." in repr(outcome(tmp_path, runs))
    assert "The points were not sent the same requests" in repr(outcome(tmp_path, runs))


def test_the_two_cheapest_are_measured_again_in_turn(tmp_path: Path) -> None:
    order: list[int] = []
    figures = {
        0: itertools.chain([1.0], itertools.cycle([1.21, 1.20])),
        1: itertools.cycle([1.1, 1.09]),
        2: itertools.cycle([3]),
    }

    def noisy(parameters: dict[str, Any]) -> Measurement:
        order.append(parameters["n"])
        return run_of(next(figures[parameters["n"]]))

    for _ in range(2):  # the second time from the folder alone
        result = lem.search({"n": [0, 1, 2]}, measure=noisy, folder=tmp_path, confirm=4)
        assert order[3:] == [0, 1, 1, 0, 0, 1, 1, 0]
        again = result.confirmed
        assert again is not None and again.told_apart and again.cheaper == again.second
        assert again.ratio is not None and again.ratio.ratio == pytest.approx(1 / 1.1, rel=0.01)
        assert result.best is not None and result.best.point == {"n": 1} and result.tied == ()
        assert "Measured again in 4 pairs: n=1 took 9.1 % less energy per output token than n=0" in repr(result)
    assert len(lem.frame(tmp_path)) == 11 and len(result.history) == 3


def test_confirmation_decides_what_is_tied_and_says_when_it_fails() -> None:
    def trial(run_id: str, value: float, half_width: float = 0.001) -> found.Trial:
        return found.Trial(run_id, {"n": run_id}, "", metrics.Figure(value, half_width, ("k",), "counter", ("gpu",)))

    def pairs(*values: tuple[float, float]) -> list[tuple[Measurement, Measurement]]:
        return [(run_of(x), run_of(y)) for x, y in values]

    a, b = trial("a", 1.0), trial("b", 1.1)
    apart = found.confirmed(a, b, pairs((1.0, 1.1), (1.01, 1.11)))
    assert apart.ratio is not None and apart.ratio.ratio == pytest.approx(1.0995, abs=1e-4)
    assert apart.told_apart and apart.cheaper == "a"
    alike = found.confirmed(a, b, pairs((1.0, 1.1), (1.1, 1.0)))
    assert alike.ratio is not None and alike.ratio.ratio == pytest.approx(1)
    assert not alike.told_apart and alike.cheaper is None
    for again, tied in ((apart, ()), (alike, (b,)), (None, ())):
        result = found.SearchResult(Path(), (), (a, b), "", again)
        assert result.best is a and result.tied == tied
    lost = dataclasses.replace(run_of(1.1), status="failed")
    broken = found.confirmed(a, b, [(run_of(1.0), lost), *pairs((1.0, 1.1))])
    assert broken.ratio is None and "n=a and n=b, measured again, cannot be compared" in repr(
        found.SearchResult(Path(), (), (a, b), "", broken)
    )


def test_points_may_differ_in_plan_and_prompts_and_their_pairs_say_so() -> None:
    def sent(value: float, **config: Any) -> Measurement:
        return dataclasses.replace(run_of(value), config=config)

    a, b = (found.judged(run_of(v), {"n": v}, ()) for v in (1.0, 1.1))
    first, second = {"prompts_sha256": "p", "arrivals": "batches", "size": 1}, {"prompts_sha256": "q", "size": 4}
    again = found.confirmed(a, b, [(sent(1.0, **first), sent(1.1, **second)), (sent(1.01, **first), sent(1.11, **second))])
    assert again.told_apart and again.comparison is not None
    assert [d.code for d in again.comparison.differences] == ["other_prompts", "other_arrivals"]
    said = repr(found.SearchResult(Path(), (), (a, b), "", again))
    assert "To be noted: they were not given the same prompts; requests arrived by another plan" in said


def test_one_run_of_each_point_is_said_to_hold_no_start_of_the_engine(tmp_path: Path) -> None:
    far = outcome(tmp_path / "far", [run_of(1.0), run_of(2.0)])
    assert far.tied == () and "of one run and does not hold what differs from one start of the engine" in repr(far)
    assert "another point may be as cheap all the same: confirm= measures the two cheapest again." in repr(far)
    near = outcome(tmp_path / "near", [run_of(1.0, half_width=0.1), run_of(1.05, half_width=0.1)])
    assert "so points further away may be as cheap: confirm=" in repr(near)
    assert "one run" not in repr(outcome(tmp_path / "alone", [run_of(1.0)]))


def spread(ttft_s: float, requests: int = 40) -> Measurement:
    """A run whose TTFTs lie evenly within ± 50 % around this."""
    m = run_of(1.0, requests=requests)
    shift = [round(ttft_s * (0.5 + (i + 0.5) / requests) * 1e9) - 100_000_000 for i in range(requests)]
    done = (dataclasses.replace(c, events=tuple((t + by, n) for t, n in c.events)) for c, by in zip(m.completions, shift))
    return dataclasses.replace(m, completions=tuple(done))


def test_a_limit_inside_the_interval_of_the_percentile_is_met_or_missed_but_not_surely(tmp_path: Path) -> None:
    asked = limits.read({"ttft_s_p50": 0.2})
    near = {ttft_s: found.judged(spread(ttft_s), {"n": ttft_s}, asked) for ttft_s in (0.1, 0.19, 0.21, 0.4)}
    assert {k: (t.feasible, t.unsure) for k, t in near.items()} == {
        0.1: (True, ()),
        0.19: (True, ("ttft_s_p50",)),
        0.21: (False, ("ttft_s_p50",)),
        0.4: (False, ()),
    }
    few = found.judged(spread(0.2, requests=9), {"n": 0}, asked)
    assert few.feasible and few.unsure == (), "there is no interval"
    result = found.SearchResult(tmp_path, asked, tuple(dataclasses.replace(t, run_id=str(k)) for k, t in near.items()), "")
    verdicts = {row["n"]: row["verdict"] for row in result.table()}
    assert verdicts["0.19"] == "not told apart from the best, within ttft_s_p50, but not surely"
    assert verdicts["0.21"] == "ttft_s_p50 over by 5 %, but not surely" and verdicts["0.4"] == "ttft_s_p50 over by 100 %"
    alone = found.SearchResult(tmp_path, asked, (near[0.19],), "")
    assert "It is within ttft_s_p50, but not surely: the limit lies inside the interval." in repr(alone)


def test_the_result_is_a_table_for_people_and_a_frame_for_programs(tmp_path: Path) -> None:
    runs = [run_of(1.0), run_of(2.0, ttft_s=0.6)]
    wrong = "<script>alert(1)</script>"
    result = lem.search(
        {"kind": ["plain", wrong]}, {"ttft_s_p50": 0.5}, measure=lambda p: runs[p["kind"] == wrong], folder=tmp_path
    )
    shown = result._repr_mimebundle_()
    assert wrong in shown["text/plain"] and "<script" not in shown["text/html"] and "&lt;script&gt;" in shown["text/html"]
    assert shown["text/html"].count("<tr>") == 3 and "style" not in shown["text/html"]
    rows = result.trials
    assert list(rows["feasible"]) == [t.feasible for t in result.history] and "j_per_output_token" in rows
    assert sorted(rows["over.ttft_s_p50"]) == pytest.approx([-0.8, 0.2])
    assert set(rows["run_id"]) == set(lem.frame(tmp_path)["run_id"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.stopped = "no"  # type: ignore[misc]


# --- what may be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ([1, 4, 2], [1, 4, 2]),
        ({"low": 1, "high": 4}, [1, 2, 3, 4]),
        ({"low": 16, "high": 64, "step": 16}, [16, 32, 48, 64]),
        ({"low": 1, "high": 8, "step": 3}, [1, 4, 7]),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"low": 1, "high": 3, "log": True}, [1, 2, 3]),
        ([None, True, {"a": [1]}], [None, True, {"a": [1]}]),
    ],
)
def test_what_a_dimension_may_be(entry: Any, values: list[Any]) -> None:
    asked = space.read({"n": entry})
    assert [p["n"] for p in asked.points()] == values and asked.size == len(values)
    (dimension,) = asked.dimensions
    for value in values:
        told = dimension.told(value)
        assert space.key({"n": dimension.value(told)}) == space.key({"n": value})
        assert dimension.distribution()._contains(dimension.distribution().to_internal_repr(told))
    assert dimension.told("nothing of it") is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "needs a space"),
        ({"n": 3}, "needs a list"),
        ({"n": "abc"}, "needs a list"),
        ({"n": []}, "needs a list"),
        ({"n": [1, float("nan")]}, "plain JSON"),
        ({"n": [1, 2, 1]}, "same value twice"),
        ({"n": {"low": 1, "hihg": 2}}, "did you mean 'high'"),
        ({"n": {"low": 1}}, "needs a number as its high"),
        ({"n": {"low": "1e-3", "high": 1}}, "needs a number as its low"),
        ({"n": {"low": 2, "high": 1}}, "is not below"),
        ({"n": {"low": 0, "high": 1, "log": True}}, "only above 0"),
        ({"n": {"low": 1, "high": 9, "step": 2, "log": True}}, "without a step"),
        ({"n": {"low": 1, "high": 9, "step": 0}}, "must lie above 0"),
        ({"n": {"low": 1, "high": 9, "log": "yes"}}, "log is true or false"),
        ({"n": {"low": 0, "high": 1, "step": 1e-9}}, "give it a larger step"),
        ({"n.a": [1], "n": [2]}, "'n.a' is a part of 'n'"),
    ],
)
def test_a_space_that_is_none_is_one_sentence(tmp_path: Path, entry: Any, words: str) -> None:
    with pytest.raises(LemError) as caught:
        lem.search(entry, measure=measure, folder=tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "trials must be a whole number of at least 1"),
        ({"confirm": 1}, "confirm must be 0, or a whole number of at least 2"),
        ({"seed": 0.5}, "seed must be"),
        ({"timeout_s": float("nan")}, "timeout_s must be"),
        ({"notebook": "experiment_transformers"}, "give one of the two"),
        ({"measure": 3}, "cannot be called"),
        ({"measure": lambda p: None}, "must return a Measurement"),
        ({"parameters": {"n": 1}}, "'n' stands in parameters and in the space"),
        ({"parameters": {"x": object()}}, "plain JSON"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LemError) as caught:
        lem.search(**{"space": {"n": [1]}, "measure": measure, "folder": tmp_path, **options})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_measurement_is_not_saved_twice(tmp_path: Path) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.001, tokens_per_s=2000)

    def saves(parameters: dict[str, Any]) -> Measurement:
        with lem.Session(tmp_path, sources=[engine.source]) as session:
            return session.run(engine, lem.prompts.synthetic(2, 8, 3), warmup=0)

    with pytest.raises(LemError, match="open a Session without it"):
        lem.search({"n": [1]}, measure=saves, folder=tmp_path)


def test_names_lead_into_nested_parameters() -> None:
    point = {"engine_args.max_num_seqs": 16, "engine_args.cache.share": 0.5, "n": 1}
    fixed = {"engine_args": {"dtype": "auto"}, "m": 2}
    made = space.filled(fixed, point)
    assert made == {"engine_args": {"dtype": "auto", "max_num_seqs": 16, "cache": {"share": 0.5}}, "m": 2, "n": 1}
    assert fixed == {"engine_args": {"dtype": "auto"}, "m": 2}
    assert space.taken(made, list(point)) == point and space.taken(fixed, list(point)) is None


# --- notebooks --------------------------------------------------------------------------------------------------------

CELLS = (
    "import lem_kit as lem\n"
    "if args.get('slots') == 3:\n    import os; os._exit(1)\n"
    "wait_s = 0.001 * args.get('slots', 1)\n"
    "engine = lem.load_backend('fake', 'fake', ttft_s=wait_s, tokens_per_s=2000, power_w=100.0 * size)\n"
    "with lem.Session(folder, sources=[engine.source]) as session:\n"
    "    session.run(engine, lem.prompts.synthetic(requests, 8, 3), lem.traffic.batches(2), run_id=run_id, warmup=0)"
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a notebook on the fake engine: the energy goes with `size`, the TTFT with `args.slots`."""
    parameters = 'size: int = 1\nrequests: int = 4\nargs: dict = {}\nfolder: str = ""\nrun_id: str = ""'
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(CELLS)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "small.ipynb")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"space": {"siez": [1]}}, "did you mean 'size'"),
        ({"space": {"arg.slots": [1]}}, "did you mean 'args'"),
        ({"space": {"size.slots": [1]}}, "leads into parameter 'size', which is no mapping but 1"),
        ({"space": {"run_id": ["x"]}}, "set by the search"),
        ({"space": {"args.slots": [1]}, "parameters": {"args": {"slots": 2}}}, "stands in parameters and in the space"),
        ({"space": {"size": [1]}, "parameters": {"request": 8}}, "did you mean 'requests'"),
        ({"space": {"size": [1]}, "limits": {"ttft_s_p90": 1}}, "a run has 4 requests:"),
        ({"space": {"size": [1]}, "kernel": "pyhton3"}, "did you mean 'python3'"),
        ({"space": {"size": [1]}, "notebook": Path("none.ipynb")}, "There is no notebook none.ipynb"),
        ({"space": {"size": [1]}, "notebook": "experiment_transfomers"}, "did you mean 'experiment_transformers'"),
    ],
)
def test_what_a_notebook_does_not_know_is_refused_before_anything_runs(
    here: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(LemError) as caught:
        lem.search(**{"notebook": here / "small.ipynb", "folder": here / "out", **options})
    assert words in str(caught.value) and not (here / "out").exists()


def test_points_are_runs_of_a_notebook_and_runs_of_a_study_are_points(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study makes two runs, one of them by a kernel that dies; the search makes the other two, from the command line."""
    monkeypatch.chdir(here)
    (here / "grid.yaml").write_text("notebook: small\nparameters: {size: 2}\ngrid: {args: [{slots: 1}, {slots: 3}]}")
    study.run(study.read(here / "grid.yaml"), here / "out")
    (here / "find.yaml").write_text(
        "notebook: small\nspace: {size: [1, 2], args.slots: [1, 3]}\nlimits: {ttft_s_p50: 0.5}\ntrials: 9"
    )
    assert cli.main(["search", "find.yaml", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("2 points were tried before.") and re.search(
        r"Cheapest of 4 points: size=[12], args.slots=1: ", told
    )
    assert "failed: Notebook 'small' was cut off: DeadKernelError" in told
    rows = lem.frame("out")
    assert len(rows) == 4 and sorted(rows["status"]) == ["failed", "failed", "ok", "ok"]
    assert export.report("out").read_text().count("Plotly.newPlot") >= 3
    again = search.search(**search.read("find.yaml"), folder="out")
    assert len(again.history) == 4 and sorted(again.trials["point.args.slots"]) == [1, 1, 3, 3]
    assert cli.main(["search", "find.yaml", "--out", "none", "-p", "sise=1"]) == 1
    assert "did you mean 'size'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notebook: small\nspaces: {}", "did you mean 'space'"),
        ("space: {size: [1]}", "notebook: NAME"),
        ("notebook: small\nspace: [1]", "space must map names"),
        ("notebook: smal\nspace: {size: [1]}", "did you mean 'small'"),
    ],
)
def test_a_malformed_search_file_is_one_sentence(here: Path, text: str, words: str) -> None:
    (here / "find.yaml").write_text(text)
    with pytest.raises(LemError) as caught:
        search.read(here / "find.yaml")
    assert words in str(caught.value)


def test_the_example_asks_for_what_its_notebook_can_give(tmp_path: Path) -> None:
    asked = search.read(ROOT / "data/studies/search.yaml", {"batch_size": 4})
    assert set(asked["space"]) == {"engine_args.dtype"} and asked["parameters"]["batch_size"] == 4
    work, defaults = by_notebook(asked["notebook"], space.read(asked["space"]), asked["parameters"], tmp_path, None)
    limits.check(limits.read(asked["limits"]), {**defaults, **{k: [v] for k, v in work.fixed.items()}})
    assert work.planned({"engine_args.dtype": "float32"}).parameters["engine_args"] == {"dtype": "float32"}
