"""`scripts/gpu_check.py`: its figures, how it goes on when a part fails, and its sensor part on a simulated board."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from fake_nvml import Machine, alias, h100

sys.path.insert(0, str(ROOT / "scripts"))

from gpu_parts import figures, sampling, sensor, several, tables
from gpu_parts.check import Check, Skip

from lem_kit.energy import Reading
from lem_kit.sampler import Sampler
from lem_kit.trace import Domain

MS = 1_000_000


def options(out: Path) -> argparse.Namespace:
    return argparse.Namespace(part=None, out=out, quick=True, repeat=None, model=None, anywhere=False, seconds=100)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_period_of_a_polled_figure_is_found() -> None:
    began = [7 * MS * k for k in range(300)]
    found = figures.refresh(began, [t + 3 * MS for t in began], [float(t // (100 * MS)) for t in began])
    assert found["changes"] == 20
    assert found["p50_ms"] == pytest.approx(98, abs=3.6)  # a multiple of the polls' distance
    assert found["grid_ms"] == pytest.approx(100, abs=0.5)
    assert found["grid_phase_half_ms"] < 5


def test_a_figure_that_stands_still_has_no_period() -> None:
    found = figures.refresh([0, 10, 20], [1, 11, 21], [5.0, 5.0, 5.0])
    assert found == dict.fromkeys(("p5_ms", "p50_ms", "p95_ms", "grid_ms", "grid_phase_half_ms")) | {"changes": 0}


def test_the_smallest_step_of_a_counter() -> None:
    assert figures.smallest_step([100, 100, 112, 130, 130, 148]) == 6
    assert figures.smallest_step([100, 100]) is None


def test_a_paired_ratio_is_that_of_the_pairs() -> None:
    found = figures.paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found == (pytest.approx(2), pytest.approx(2), pytest.approx(2), 3)
    logs = (math.log(1.1), math.log(0.9))
    found = figures.paired_ratio([1.1, 0.9], [1.0, 1.0])
    half = 12.706 * abs(logs[0] - logs[1]) / 2  # t * (spread / sqrt(2)) / sqrt(2)
    assert found is not None and found.value == pytest.approx(math.sqrt(0.99))
    assert found.high / found.value == pytest.approx(math.exp(half))
    assert figures.paired_ratio([1.0], [1.0]) is None


def test_a_ratio_of_two_figures() -> None:
    found = figures.ratio(6.0, 0.3, 3.0, 0.2)
    half = 2 * math.hypot(0.05, 0.2 / 3)
    assert found == (2.0, pytest.approx(2 - half), pytest.approx(2 + half), 2)


def test_a_step_that_meets_a_call_is_held_against_its_neighbours() -> None:
    """Steps of 10 ms, the fourth and the fifth 13 and 16 ms; what a neighbour met as well tells nothing."""
    tokens = [0, 10 * MS, 20 * MS, 30 * MS, 43 * MS, 53 * MS, 63 * MS, 79 * MS, 89 * MS, 99 * MS]
    assert figures.delays_s(tokens, [(32 * MS, 36 * MS), (64 * MS, 66 * MS)]) == pytest.approx([0.003, 0.006])
    assert figures.delays_s(tokens, [(40 * MS, 46 * MS)]) == pytest.approx([0.003])  # of both steps that it met
    assert figures.delays_s(tokens, [(32 * MS, 36 * MS), (44 * MS, 46 * MS)]) == []
    assert figures.delays_s(tokens, [(2 * MS, 6 * MS), (94 * MS, 200 * MS), (-5, -2)]) == []
    assert figures.delays_s(tokens, [(32 * MS, 36 * MS)], beside=2) == pytest.approx([0.003])
    assert figures.delays_s(tokens, [(32 * MS, 36 * MS)], [(14 * MS, 15 * MS)], beside=2) == []
    assert figures.delays_s(tokens, []) == []
    assert figures.delays_s(tokens, [(32 * MS, 36 * MS), (64 * MS, 66 * MS)], [(45 * MS, 46 * MS)]) == pytest.approx([0.006])


def test_the_delay_by_a_call_is_not_that_of_long_steps() -> None:
    """Steps of 4 to 24 ms; every 101 ms a call of 4 ms, which lengthens the step that it begins in by 1 ms."""
    draw, tokens, calls, now = random.Random(3), [0], [], 0
    for _ in range(20_000):
        end = now + draw.randrange(4 * MS, 24 * MS)
        while len(calls) * 101 * MS < end:
            calls.append((len(calls) * 101 * MS, len(calls) * 101 * MS + 4 * MS))
            end += MS
        tokens.append(now := end)
    found = figures.call_delay_s([tokens], calls)
    assert found is not None and found.n > 1000
    naive = figures.delays_s(tokens, calls)
    assert sum(naive) / len(naive) > 0.002  # that of long steps
    assert found.value == pytest.approx(0.001, abs=0.0005)


def test_calls_that_follow_at_once_are_one_visit() -> None:
    assert sampling.visits([(0, 2 * MS), (3 * MS, 4 * MS), (9 * MS, 10 * MS)]) == [(0, 4 * MS), (9 * MS, 10 * MS)]


def test_stretches_with_the_sampler_are_held_against_their_neighbours() -> None:
    """Steps of 10 ms, and of 11 and 12 ms where it is let go; a step over the end of a stretch counts for neither."""
    tokens = [[0, 10 * MS, 20 * MS, 31 * MS, 42 * MS], [50 * MS, 62 * MS, 74 * MS, 84 * MS]]
    stretches = [(0, 25 * MS, False), (25 * MS, 45 * MS, True), (50 * MS, 75 * MS, True), (74 * MS, 90 * MS, False)]
    found = sampling.on_over_off(tokens, stretches)
    assert found is not None and found.n == 2
    assert found.value == pytest.approx(math.sqrt(10 / 11 * 10 / 12))
    assert sampling.on_over_off(tokens, stretches[:3]) is None  # one pair and a stretch alone
    assert sampling.on_over_off([[0]], stretches) is None


class Meter:
    name, interval_s, domains = "meter", 0.0, {"gpu0": Domain("gpu", "counter", refresh_s=0.0)}

    def read(self) -> dict[str, Reading]:
        return {"gpu0": Reading(time.monotonic_ns(), time.monotonic())}

    def close(self) -> None: ...


def test_a_gate_holds_the_sampler_and_lets_it_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "STRETCH_S", 0.3)
    sampler = Sampler([Meter()], interval_s=0.001)
    gate = sampling.Gate(sampler)
    sampler.start()
    with sampling.in_turn(gate, 0.05, random.Random(1)) as stretches:
        while len(stretches) < 2:
            time.sleep(0.01)
    sampler.stop()
    assert not sampler.running
    (held,), (let_go,) = ([s for s in stretches[:2] if s[2] is through] for through in (False, True))
    on_its_way = 50 * MS
    assert not [t for t, _ in gate.calls if held[0] + on_its_way < t < held[1]]
    assert len([t for t, _ in gate.calls if let_go[0] < t < let_go[1]]) > 10
    assert len(gate.counter_calls) == len(gate.calls) == len(sampler.trace.counters["meter:gpu0"].t_ns)


def test_a_drift_is_taken_out_and_the_mean_kept() -> None:
    assert figures.detrended([1.0, 2.0, 3.0, 4.0]) == pytest.approx([2.5] * 4)
    assert figures.detrended([1.0, 3.0]) == [1.0, 3.0]


def test_coverage_counts_what_lies_inside() -> None:
    found = figures.covered([9.0, 10.0, 11.0, 14.0], [1.0, 1.0, 2.0, 3.0], 10.0)
    assert (found["windows"], found["inside"], found["share"]) == (4, 3, 0.75)
    assert 0.3 < found["share_low"] < 0.75 < found["share_high"] < 0.96
    assert found["worst_percent"] == 40 and found["half_width_percent"] == 15
    assert found["rms_error_over_sigma"] == pytest.approx(1.96 * math.sqrt((1 + 0 + 1 / 4 + 16 / 9) / 4))


def test_the_part_time_test_divides_by_the_load_that_ran(tmp_path: Path) -> None:
    check = Check(options(tmp_path))
    row = {"pass": 1, "integral W": None, "average field W": None}
    rows = [
        {**row, "load": "idle", "busy share": 0.0, "counter W": 100.0, "instant field W": 100.0},
        {**row, "load": "30 % of 100 ms", "busy share": 0.3, "counter W": 280.0, "instant field W": 190.0},
        {**row, "load": "30 % of 97 ms", "busy share": 0.25, "counter W": 250.0, "instant field W": 250.0},
    ]
    with check.part("sensor"):
        sensor.part_time(check, rows)
    found = check.results["parts"]["sensor"]["tables"]["part-time test"]
    assert {r["figure"]: r["ratio"] for r in found} == {"counter": pytest.approx(1), "instant field": pytest.approx(0.5)}


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(tmp_path: Path) -> None:
    check = Check(options(tmp_path))
    with check.part("first"):
        check.table("numbers", [{"a": 1.23456, "b": None}])
        raise ValueError("no such board")
    with check.part("second"):
        raise Skip("there is no GPU")
    with check.part("third"):
        assert not check.allow("a long measurement", 1000)
    tables.write(tmp_path, check.results)
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["failed", "skipped", "done"]
    assert "ValueError: no such board" in parts["first"]["traceback"]
    assert parts["third"]["left_out"][0]["what"] == "a long measurement"
    text = (tmp_path / "results.md").read_text()
    assert "| 1.235 | – |" in text and "| part second | skipped: there is no GPU |" in text


def test_runs_are_packed_into_one_file(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text("{}")
    with tarfile.open(tables.pack(tmp_path)) as archive:
        assert "runs/one/run.json" in archive.getnames()
    assert [path.name for path in tmp_path.iterdir()] == ["runs.tar.gz"]


def test_two_runs_are_held_against_each_other() -> None:
    def run(joules: float | None) -> dict[str, object]:
        row = {"model": "m", "batch": 8, "pass": 1, "J/output token": joules, "± gross": 0.01, "output tokens/s": 100.0}
        return {"parts": {"inference": {"tables": {"inference": [row]}}}}

    (row,) = tables.against(run(1.02), run(1.0))
    assert row["what"] == "model m, batch 8, pass 1" and row["J/token, this/earlier"] == pytest.approx(1.02)
    assert row["low"] < 1.02 < row["high"] and row["tokens/s, this/earlier"] == 1.0
    assert tables.against(run(None), run(1.0))[0]["J/token, this/earlier"] is None
    assert tables.against(run(1.0), {"parts": {}}) == []


# --- as a whole -------------------------------------------------------------------------------------------------------

BRIEFLY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu_check
from gpu_parts import sensor
sensor.SQUARES_S = (0.02,)
gpu_check.Check.seconds = lambda self, full, quick: quick / 2.5
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def run(out: Path, *more: str, **environment: str) -> dict[str, object]:
    command = [sys.executable, "-c", BRIEFLY, str(ROOT / "scripts"), "--out", str(out), "--quick", *more]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json", "results.md", "runs.tar.gz"]
    result: dict[str, object] = json.loads((out / "results.json").read_text())
    return result


def test_without_a_gpu_every_part_says_why_it_did_not_run(tmp_path: Path) -> None:
    parts = ("idle", "sensor", "coverage", "inference", "stopwatch", "sampler", "continuous", "precision", "compile")
    asked = [word for part in parts for word in ("--part", part)]
    result = run(tmp_path / "out", *asked, CUDA_VISIBLE_DEVICES="")
    assert list(result["parts"]) == list(parts)  # type: ignore[call-overload]
    for part in result["parts"].values():  # type: ignore[attr-defined]
        assert part["status"] == "skipped" and part["why"].startswith(("NVML: ", "torch.cuda is not available"))


def test_the_sensor_part_sees_what_a_simulated_board_is(tmp_path: Path) -> None:
    """A load in step with the refresh, which the instant field never sees."""
    machine = Machine([h100(wave=alias())])
    machine.write(tmp_path / "board.txt")
    result = run(
        tmp_path / "out", "--part", "sensor", CUDA_VISIBLE_DEVICES="0", **machine.environment(tmp_path / "board.txt")
    )
    part = result["parts"]["sensor"]  # type: ignore[index]
    assert part["status"] == "done" and "No load was put on the GPU" in part["notes"][0]
    refresh = {row["figure"]: row for row in part["tables"]["refresh"]}
    assert refresh["counter"]["p50_ms"] == pytest.approx(100, rel=0.15)
    assert refresh["samples"]["p50_ms"] == pytest.approx(20, rel=0.05)
    (steady,) = [row for row in part["tables"]["agreement"] if row["load"] == "steady"]
    assert steady["counter W"] == pytest.approx(139, rel=0.15)  # 30 % of 300 W and 70 % of 70 W
    assert steady["integral/counter"] == pytest.approx(1, abs=0.15)
    assert steady["instant field W"] == pytest.approx(70, abs=1)
    costs = {row["call"]: row for row in part["tables"]["cost of calls"]}
    assert costs["total energy"]["idle p50_us"] > 2000


# --- several GPUs -----------------------------------------------------------------------------------------------------


def board(watts: float | None) -> dict[str, object]:
    return {"domain": "nvml:gpu0", "watts": watts, "half_w": None}


@pytest.mark.parametrize(
    ("right", "found"),
    [
        (True, {"cuda": ["A", "B"], "boards": {"A": board(120.0), "B": board(400.0)}}),
        (False, {"cuda": ["A", "B"], "boards": {"A": board(400.0), "B": board(120.0)}}),  # the load is on the wrong one
        (False, {"cuda": ["A"], "boards": {"A": board(400.0), "B": board(120.0)}}),  # one that CUDA has not
        (False, {"cuda": ["A"], "boards": {"B": board(400.0)}}),
        (False, {"cuda": ["A"], "boards": {"A": board(None)}}),
        (False, {"cuda": ["A"], "error": "names no GPU"}),
        (True, {"cuda": [], "error": "hides every GPU"}),
        (False, {"cuda": [], "boards": {"A": board(400.0)}}),
        (False, {"cuda": [], "error": "it crashed", "failed": True}),
    ],
)
def test_of_several_gpus_the_right_ones_are_read(right: bool, found: dict[str, object]) -> None:
    assert several.row("not set", None, found)["right"] is right
