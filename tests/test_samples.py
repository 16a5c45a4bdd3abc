"""The course of power between samples: steps inside a piece, and stamps that come late."""

from __future__ import annotations

import random
from array import array

import pytest
from test_recordings import FOLDER

from lem_kit import store
from lem_kit.samples import Samples, on_time, step
from lem_kit.trace import Series

MS = 1_000_000
GRID = array("q", [7_000_000_123 + 20 * MS * k for k in range(120)])


def late(every: int, most_ms: float, seed: int = 0) -> array[int]:
    """The stamps of GRID, one in `every` of them up to `most_ms` late."""
    draw = random.Random(seed)
    return array("q", [t + (round(draw.uniform(3, most_ms) * MS) if k % every == 2 else 0) for k, t in enumerate(GRID)])


@pytest.mark.parametrize("missing", [(), (40,), (40, 41, 90)])
def test_stamps_that_come_late_are_put_where_they_were_due(missing: tuple[int, ...]) -> None:
    kept = [k for k in range(len(GRID)) if k not in missing]
    stamps = late(5, 11)
    found = on_time(array("q", [stamps[k] for k in kept]))
    assert list(found) == pytest.approx([GRID[k] for k in kept], abs=MS // 1000)


def test_a_stamp_that_is_nearly_a_period_late_is_left_as_it_is() -> None:
    stamps = array("q", GRID)
    stamps[50] += 18 * MS
    found = on_time(stamps)
    assert found[50] == pytest.approx(GRID[50] + 18 * MS, abs=1000) and found[49] == pytest.approx(GRID[49], abs=1000)


def test_stamps_of_no_grid_are_left_alone() -> None:
    draw = random.Random(1)
    wild = array("q", sorted(draw.randrange(0, 3_000 * MS) for _ in range(120)))
    assert on_time(wild) == wild
    few = late(5, 11)[:19]
    assert on_time(few) == few and on_time(array("q")) == array("q")


def test_samples_of_a_real_board_are_on_a_grid_of_20_ms_but_for_one_in_five() -> None:
    for m in store.runs(FOLDER):
        stamps = m.trace.gauges["nvml:gpu0.power_w"].t_ns
        found = on_time(stamps)
        late_ms = [(stamp - due) / 1e6 for stamp, due in zip(stamps, found)]
        assert found != stamps and min(late_ms) > -0.4 and max(late_ms) < 14
        if "square" not in m.label:  # there up to half of them are late
            assert 0.1 < sum(ms > 1 for ms in late_ms) / len(late_ms) < 0.25, m.label


def test_a_step_inside_the_last_sample_is_doubted_as_far_as_it_may_go() -> None:
    """From 100 W: a last mean of 240 W may be of a step to 380 W half-way."""
    samples = Samples(Series(GRID[:50], array("d", [100.0] * 49 + [240.0])))
    middle = GRID[48] + 10 * MS
    power, steps_j, _ = samples.around(middle)
    assert power == pytest.approx(240e-9) and steps_j == pytest.approx((280 + 0.05 * 240) * 0.25 * 0.02)
    followed = Samples(Series(GRID[:51], array("d", [100.0] * 49 + [240.0, 380.0])))
    assert followed.around(middle)[1] == pytest.approx(steps_j)


def test_energy_up_to_a_late_sample_is_that_of_its_own_time() -> None:
    """100 W, and 300 W from sample 62 on, whose stamp is late."""
    watts = array("d", [100.0] * 62 + [300.0] * 58)
    stamps = array("q", GRID)
    for k in range(2, 120, 5):
        stamps[k] += 9 * MS
    samples = Samples(Series(stamps, watts))
    assert samples.sum_to(GRID[62]) - samples.sum_to(GRID[61]) == pytest.approx(300 * 0.02, rel=1e-3)
    assert samples.sum_to(GRID[61]) - samples.sum_to(GRID[60]) == pytest.approx(100 * 0.02, rel=1e-3)


def test_a_step_inside_a_piece_keeps_its_energy() -> None:
    assert step(100, 100, 150, 300, 300) == pytest.approx(0.75)
    assert step(100, 200, 250, 300, 400) is None, "a slope"
    assert step(100, 100, 350, 300, 300) is None, "a peak"


def test_only_where_power_is_not_steady_a_sample_is_doubted_by_its_neighbours() -> None:
    samples = Samples(Series(array("q", GRID[:10]), array("d", [100.0] * 5 + [300.0] * 5)))
    steady, jump = samples.around(GRID[2] - 10 * MS), samples.around(GRID[5] - 10 * MS)
    assert steady == pytest.approx((100e-9, 0.0, 0.05 * 100 * 0.25 * 0.02))
    assert jump == pytest.approx((300e-9, (200 + 0.05 * 300) * 0.25 * 0.02, 0.05 * 300 * 0.25 * 0.02))
