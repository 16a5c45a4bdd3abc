"""What is saved comes back equal; what is not whole is never read as a result."""

from __future__ import annotations

import dataclasses
import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lem_kit as lem
from lem_kit import store
from lem_kit.errors import IncompleteRun, LemError
from lem_kit.measurement import Completion, Energy, Measurement, Repeat
from lem_kit.trace import Domain, Series, Trace

SECOND = 1_000_000_000


def measurement(run_id: str = "r1", joules: float | None = 12.5) -> Measurement:
    reasons = () if joules is not None else ("source_failed",)
    energy = {"nvml:gpu0": Energy("nvml", "gpu0", "counter", "gpu", joules, None if joules is None else 0.5, reasons)}
    trace = Trace(
        {
            "nvml:gpu0": Series(array("q", [0, SECOND]), array("d", [0.0, 12.5]), array("q", [3_000_000, 2_400_001])),
            "rapl:dram": Series(),
        },
        {"nvml:gpu0.power_w": Series(array("q", [5]), array("d", [12.5]))},
        {"nvml:gpu0": Domain("gpu", "counter", None, 0.001, label="H100"), "rapl:dram": Domain("dram", "counter")},
        [(7, "rapl", "source_failed", "gone")],
        {"nvml:gpu0": 0.1},
        0.05,
    )
    return Measurement(
        run_id=run_id, kind="run", label="<b>", status="ok", started_at="2026-11-23T00:00:00.000+00:00",
        t0_ns=0, t1_ns=SECOND, energy=energy, repeats=(Repeat(0, SECOND, energy, 2),),
        warmup=(Completion(0, 1, 2, ((1, 1),), 3, repeat=-1),),
        completions=(
            Completion(0, 1, 9, ((4, 1), (9, 1)), 3, "engine", preemptions=1, preempted_ns=((5, 7),)),
            Completion(0, 1, 9, (), None, error="oh", preempted_ns=()),
        ),
        broken_off=(Completion(0, 11, 15, ((12, 1), (13, 2)), 3, error="interrupted", repeat=1),),
        config={"batch_size": 1, "list": [1, None, "x"]}, backend={"engine": "fake", "model": {"name": "fake"}},
        unavailable={"rapl": "no"}, environment={"lem_kit": "0"}, reasons=("few_requests",), trace=trace,
        baselines={"bare": {
            "kind": "bare", "run_id": "r0", "started_at": "2026-11-20T10:00:00+00:00", "temperature_c": {}, "labels": {},
            "power_w": {"nvml:gpu0": {"watts": 50.5, "half_width": 0.5}},
        }},
        meter={"call_share": 0.03, "cpu_share": 0.01}, counters={"peak_memory_bytes": 2.5e9},
    )  # fmt: skip


@pytest.mark.parametrize("joules", [12.5, None])
def test_load_gives_back_what_was_saved(tmp_path: Path, joules: float | None) -> None:
    m = measurement(joules=joules)
    place = store.save(m, tmp_path)
    assert store.load(place) == m
    assert store.load(place / "run.json") == m
    assert sorted(p.name for p in place.iterdir()) == ["events.parquet", "run.json", "trace.parquet"]


@given(
    st.lists(st.tuples(st.integers(0, 2**62), st.floats(allow_nan=False, allow_infinity=False)), unique_by=lambda r: r[0]),
    st.lists(st.lists(st.integers(1, 2**60), min_size=1, max_size=5), max_size=4),
)
def test_any_trace_and_events_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float]], events: list[list[int]]
) -> None:
    rows = sorted(rows)
    series = Series(array("q", [t for t, _ in rows]), array("d", [v for _, v in rows]))
    trace = Trace({"a:b": series, "a:c": series.between(0, 2**61)}, {}, {"a:b": Domain("x", "counter")})
    done = tuple(Completion(0, 0, 0, tuple((t, 1) for t in times), None) for times in events)
    m = Measurement("r", "run", "l", "ok", "", 0, 1, {}, completions=done, trace=trace)
    assert store.load(store.save(m, tmp_path_factory.mktemp("runs"))) == m


def test_the_record_is_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((store.save(measurement(), tmp_path) / "run.json").read_text(), parse_constant=refuse)
    assert record["schema_version"] == 5 and "trace" in record
    assert record["trace"]["failures"] == [[7, "rapl", "source_failed", "gone"]]
    assert record["trace"]["period_s"] == {"nvml:gpu0": 0.1}


def test_a_record_of_the_version_before_can_be_read(tmp_path: Path) -> None:
    place = store.save(measurement(), tmp_path)
    record = json.loads((place / "run.json").read_text())
    del record["counters"], record["broken_off"]
    (place / "events.parquet").unlink()
    store._write_table(place / "events.parquet", store._events(dataclasses.replace(measurement(), broken_off=())))
    for c in record["warmup"] + record["completions"]:
        del c["queued_ns"], c["scheduled_ns"], c["preemptions"], c["preempted_ns"]
    (place / "run.json").write_text(json.dumps({**record, "schema_version": 2}))
    told = (dataclasses.replace(c, preemptions=None, preempted_ns=None) for c in measurement().completions)
    old = dataclasses.replace(measurement(), counters={}, broken_off=(), schema_version=2, completions=tuple(told))
    assert store.load(place) == old


@pytest.mark.parametrize("version", [3, 4])
def test_a_record_that_does_not_tell_when_a_request_was_preempted_can_be_read(tmp_path: Path, version: int) -> None:
    place = store.save(measurement(), tmp_path)
    record = json.loads((place / "run.json").read_text())
    for c in record["warmup"] + record["completions"] + record["broken_off"]:
        del c["preempted_ns"]
    (place / "run.json").write_text(json.dumps({**record, "schema_version": version}))
    assert {c.preempted_ns for c in store.load(place).completions} == {None}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    store.save(measurement(), tmp_path)
    with pytest.raises(LemError, match="already holds a measurement"):
        store.save(measurement(joules=1.0), tmp_path)
    assert store.load(tmp_path / "r1") == measurement()


def test_a_run_cut_off_while_writing_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = store._put

    def full_disk(path: Path, content: bytes) -> None:
        if path.name == "run.json":
            raise OSError(28, "No space left on device")
        put(path, content)

    monkeypatch.setattr(store, "_put", full_disk)
    with pytest.raises(LemError, match="No space left on device"):
        store.save(measurement(), tmp_path)
    with pytest.raises(IncompleteRun, match="incomplete"):
        store.load(tmp_path / "r1")
    monkeypatch.undo()
    store.save(measurement(), tmp_path)  # a second try is welcome
    assert store.load(tmp_path / "r1") == measurement()


def test_frame_reads_whole_runs_and_names_the_others(tmp_path: Path) -> None:
    store.save(measurement("a"), tmp_path)
    store.save(measurement("b", joules=None), tmp_path)
    (tmp_path / "c").mkdir()
    store.save(measurement("d"), tmp_path)
    (tmp_path / "d" / "trace.parquet").write_bytes(b"not parquet")
    with pytest.warns(UserWarning) as warned:
        rows = lem.frame(tmp_path)
    assert sorted(str(w.message).split()[0] for w in warned) == [str(tmp_path / "c"), str(tmp_path / "d")]
    assert list(rows["run_id"]) == ["a", "b"]
    assert rows["energy_j"][0] == 12.5 and rows["energy_j"].isna()[1]
    assert rows["config.batch_size"].tolist() == [1, 1]
    assert rows["mfu"].isna().all() and rows["flop_method"].isna().all()
    as_they_are = lem.frame(store.load(tmp_path / name) for name in "ab")
    assert as_they_are.equals(rows)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: (p / "run.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "run.json").write_text("[]"), "cannot be read"),
        (lambda p: (p / "events.parquet").unlink(), "cannot be read"),
        (lambda p: (p / "run.json").write_text('{"schema_version": 99}'), "record version 99"),
    ],
    ids=["json", "list", "events", "version"],
)
def test_a_damaged_run_is_one_sentence(tmp_path: Path, break_it: object, words: str) -> None:
    place = store.save(measurement(), tmp_path)
    break_it(place)  # type: ignore[operator]
    with pytest.raises(LemError, match=words) as caught:
        store.load(place)
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_runs_and_no_folder_say_what_to_do(tmp_path: Path) -> None:
    store.save(measurement(), tmp_path)
    with pytest.raises(LemError, match=r"lem_kit\.frame"):
        store.load(tmp_path)
    with pytest.raises(LemError, match="no run folder"):
        store.load(tmp_path / "nowhere")
    with pytest.raises(LemError, match="no folder"):
        lem.frame(tmp_path / "nowhere")


@pytest.mark.parametrize("run_id", ["", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 201, "new\nline"])
def test_a_run_id_cannot_leave_the_folder(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(LemError, match="cannot name a folder"):
        store.save(measurement(run_id), tmp_path)
    assert list(tmp_path.iterdir()) == []
