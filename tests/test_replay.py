"""The replay source on a clock of our own: staircase, laps, names, gauges, and the files it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import FakeClock
from simulation import WAVES, Board, recorded

from lem_kit.energy import open_source
from lem_kit.energy.replay import ReplaySource, load
from lem_kit.errors import LemError, Unavailable
from lem_kit.store import _columns
from lem_kit.trace import Domain

SECOND = 1_000_000_000


class Clock:
    now_ns = 77 * SECOND

    def __call__(self) -> int:
        return self.now_ns


def played(path: Path, clock: Clock) -> ReplaySource:
    return ReplaySource(load(path), clock)


def csv_file(folder: Path, text: str = "t_s,gpu0,cpu\n5.0,1500,20\n5.1,1520,\n5.2,1540,30.5\n") -> Path:
    file = folder / "power.csv"
    file.write_text(text)
    return file


def run_folder(folder: Path, columns: dict[str, list[Any]], domains: dict[str, Domain] | None, told: Any = None) -> Path:
    pa.parquet.write_table(pa.table(columns), folder / "trace.parquet")
    if domains is not None:
        fields = {key: domain._asdict() for key, domain in domains.items()}
        (folder / "run.json").write_text(json.dumps({"run_id": "r1", "trace": {"domains": fields, **(told or {})}}))
    return folder


def joules(source: ReplaySource) -> dict[str, float]:
    return {domain: reading.joules for domain, reading in source.read().items()}


def test_the_staircase_comes_back(tmp_path: Path) -> None:
    clock = Clock()
    source = played(csv_file(tmp_path), clock)
    assert source.read() == {"gpu0": (77 * SECOND, 1500.0, 0), "cpu": (77 * SECOND, 20.0, 0)}
    clock.now_ns += 99_999_999
    assert joules(source) == {"gpu0": 1500.0, "cpu": 20.0}
    clock.now_ns += 1
    assert joules(source) == {"gpu0": 1520.0, "cpu": 20.0}


def test_it_begins_again_on_top_of_what_was_reached(tmp_path: Path) -> None:
    clock = Clock()
    source = played(csv_file(tmp_path), clock)
    clock.now_ns += 200_000_000
    assert joules(source) == {"gpu0": 1540.0, "cpu": 30.5}
    clock.now_ns += 100_000_000
    assert joules(source) == {"gpu0": 1560.0, "cpu": 30.5}
    clock.now_ns += 10 * 200_000_000
    assert joules(source) == {"gpu0": 1960.0, "cpu": 135.5}


def test_csv_domains(tmp_path: Path) -> None:
    source = played(csv_file(tmp_path, "t_s,gpu0,dram-0\n0,1,1\n1,2,2\n"), Clock())
    assert [d[:3] for d in source.domains.values()] == [("gpu", "counter", None), ("dram", "counter", None)]
    assert all(d.reasons == ("replayed",) for d in source.domains.values())


def test_a_run_folder_keeps_what_its_domains_were(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "t_ns": [100, 100_000_100, 200_000_100, 300_000_100],
        "nvml:gpu0": [10.0, None, 12.0, 14.0],
        "codecarbon:cpu": [None, 5.0, 5.5, 6.0],
        "nvml:gpu0.power_w": [200.0, 210.0, None, 220.0],
    }
    recorded = {
        "nvml:gpu0": Domain("gpu", "counter", None, 0.001, label="H100"),
        "codecarbon:cpu": Domain("cpu", "model", 0.0, 0.0, 1.0, ("modelled",), "8 W TDP"),
    }
    clock = Clock()
    source = played(run_folder(tmp_path, columns, recorded), clock)
    assert source.domains["gpu0"] == Domain("gpu", "counter", None, 0.001, 0.0, ("replayed",), "nvml:gpu0 H100")
    # What is played back is no fresher than the recording: 100 ms.
    label = "codecarbon:cpu 8 W TDP"
    assert source.domains["cpu"] == Domain("cpu", "model", 0.1, 0.0, 1.0, ("modelled", "replayed"), label)
    assert joules(source) == {"gpu0": 10.0}
    assert source.gauges() == {"gpu0.power_w": 200.0}
    assert math.isfinite(source.gauges_interval_s) and math.isinf(source.samples_interval_s), "none were recorded"
    clock.now_ns += 250_000_000
    assert joules(source) == {"gpu0": 12.0, "cpu": 5.5}
    assert source.gauges() == {"gpu0.power_w": 210.0}
    clock.now_ns += 50_000_000  # a new lap: the late counter waits where the last lap left it
    assert joules(source) == {"gpu0": 14.0, "cpu": 6.0}
    assert source.describe() == {"recording": str(tmp_path / "trace.parquet"), "length_s": 0.3, "recorded_run_id": "r1"}


def test_kept_samples_come_back_with_their_instants(tmp_path: Path) -> None:
    """And how long calls took is neither a counter nor a gauge."""
    columns: dict[str, list[Any]] = {
        "t_ns": [0, 20_000_000, 40_000_000, 100_000_000],
        "nvml:gpu0": [10.0, None, None, 12.0],
        "nvml:gpu0#took_ns": [2_000_000.0, None, None, 3_000_000.0],
        "nvml:gpu0.power_w": [None, 200.0, 210.0, 220.0],
        "nvml:gpu0.temperature_c": [30.0, None, None, 31.0],
    }
    recorded = {
        "nvml:gpu0": Domain("gpu", "counter", label="H100"),
        "nvml_power:gpu0": Domain("gpu", "integral", None, 0.001, 0.1, gauge="nvml:gpu0.power_w", means=True),
    }
    for domains in (recorded, None):
        source = played(run_folder(tmp_path, columns, domains), Clock())
        assert list(source.domains) == ["gpu0"]
    (tmp_path / "run.json").unlink(missing_ok=True)
    clock = Clock()
    source = played(run_folder(tmp_path, columns, recorded), clock)
    integral = source.integrals["replay_power:gpu0"]
    assert (integral.gauge, integral.means, integral.reasons) == ("replay:gpu0.power_w", True, ("replayed",))
    assert source.samples() == {"gpu0.power_w": []}
    clock.now_ns += 30_000_000
    assert source.samples() == {"gpu0.power_w": [(77_020_000_000, 200.0)]}
    assert source.gauges() == {"gpu0.temperature_c": 30.0}
    clock.now_ns += 100_000_000  # into the second lap
    assert source.samples() == {"gpu0.power_w": [(77_040_000_000, 210.0), (77_100_000_000, 220.0), (77_120_000_000, 200.0)]}


@pytest.mark.parametrize("offset_w", [0.0, 10.0])
def test_a_counter_that_was_read_seldom_shows_each_of_its_updates(tmp_path: Path, offset_w: float) -> None:
    """Its readings are a second apart and up to a period later than what they show. What a calibration takes off is still
    in what is shown, for the domain takes it off."""
    recorder = FakeClock()
    board = Board(WAVES["square"], recorder, seed=3, offset_w=offset_w)
    trace = recorded(board, recorder, 20)
    read = trace.counters["sim:gpu0"].t_ns
    columns = {key: array.to_pylist() for key, array in _columns(trace).items()}
    told = {"period_s": trace.period_s, "updates": trace.updates}
    clock = Clock()
    source = played(run_folder(tmp_path, columns, trace.domains, told), clock)
    shown = source._recording.counters["gpu0"]
    steps = {round((b - a) / 1e6) for a, b in zip(shown.t_ns, shown.t_ns[1:])}
    later = [i for i, t_ns in enumerate(shown.t_ns) if t_ns > read[0] + 5 * SECOND]
    assert steps == {100} and len(later) > 2 * sum(t_ns > read[0] + 5 * SECOND for t_ns in read)
    start_ns, start_j = shown.t_ns[later[0]], shown.value[later[0]]
    assert source.domains["gpu0"].offset_w == offset_w
    passed = [(shown.value[i] - start_j, board.true_j(start_ns, shown.t_ns[i]), shown.t_ns[i] - start_ns) for i in later]
    off_j = [true_j + offset_w * ns / 1e9 - counted_j for counted_j, true_j, ns in passed]
    assert max(map(abs, off_j)) < 3.0, "of the 20 to 30 J of a period"
    clock.now_ns += shown.t_ns[later[0]] + 60_000_000 - source._first_ns
    assert joules(source) == {"gpu0": shown.value[later[0]]}


def test_domains_of_one_name_are_told_apart(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"t_ns": [0, 1], "a:cpu": [0.0, 1.0], "b:cpu": [0.0, 2.0], "b:cpu.power_w": [3.0, 3.0]}
    source = played(run_folder(tmp_path, columns, None), Clock())
    assert list(source.domains) == ["a-cpu", "b-cpu"]
    assert source.gauges() == {"b-cpu.power_w": 3.0}


def test_without_a_recording_it_says_how_to_give_one() -> None:
    with pytest.raises(Unavailable, match="LEM_KIT_SOURCES=replay=PATH"):
        open_source("replay")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its header is ''"),
        ("time,gpu0\n0,1\n", "its header is 'time,gpu0'"),
        ("t_s,gpu0\n0,many\n", "could not convert string to float"),
        ("t_s,gpu0\n0\n", "a row has 1 fields"),
        ("t_s,gpu0\n", "no readings"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = csv_file(tmp_path, text)
    with pytest.raises(LemError) as caught:
        open_source(f"replay={file}")
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_absent_and_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LemError, match="there is no file"):
        open_source(f"replay={tmp_path / 'nothing.csv'}")
    with pytest.raises(LemError, match=r"holds no trace\.parquet"):
        open_source(f"replay={tmp_path}")
    (tmp_path / "trace.parquet").write_text("not parquet")
    with pytest.raises(LemError, match="cannot be read as a recording"):
        open_source(f"replay={tmp_path}")


def test_a_single_reading_stands_still(tmp_path: Path) -> None:
    clock = Clock()
    source = played(csv_file(tmp_path, "t_s,gpu0\n3,7\n"), clock)
    clock.now_ns += SECOND
    assert joules(source) == {"gpu0": 7.0}
