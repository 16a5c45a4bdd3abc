"""Run folders: one folder per Measurement, which holds everything and can be read again as it was.

    <folder>/<run_id>/events.parquet   request, repeat, t_ns, n_tokens: one row per token event, repeat -1 is the warm-up
    <folder>/<run_id>/trace.parquet    t_ns and one column per counter (J) and gauge; empty where it was not read
    <folder>/<run_id>/run.json         the rest, strict JSON, put in place last: without it the run is incomplete

The one idea: save raw, derive on load. No metric is stored, so a corrected definition needs no new run. Not covered:
notebooks and reports that stand in the same folders (`study`, `report`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import IncompleteRun, LemError
from .measurement import SCHEMA_VERSION, Completion, Energy, Measurement, Repeat
from .trace import TOOK, Domain, Series, Trace

if TYPE_CHECKING:
    import pandas as pd

RECORD = "run.json"
# Record versions that `load` can read besides the present one.
READABLE: tuple[int, ...] = (2, 3, 4)


def check_run_id(run_id: str) -> None:
    """LemError unless `run_id` is a plain folder name: it must not lead out of the study's folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,199}", run_id):
        raise LemError(f"run_id {run_id!r} cannot name a folder: use letters, digits and . _ = , + - (200 at most).")


def save(m: Measurement, folder: str | Path) -> Path:
    """Write `m` to `folder`/<run_id>/ and return that path. LemError if it holds a run already, or cannot be written."""
    check_run_id(m.run_id)
    place = Path(folder) / m.run_id
    if (place / RECORD).exists():
        raise LemError(f"{place} already holds a measurement, and measurements are not overwritten: remove it first.")
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write_table(place / "events.parquet", _events(m))
        _write_table(place / "trace.parquet", _columns(m.trace))
        text = json.dumps(_record(m), indent=1, allow_nan=False)
        _put(place / RECORD, text.encode())
    except OSError as error:
        raise LemError(f"Cannot write the measurement to {place}: {error.strerror or error}. It is not saved.") from error
    return place


def load(path: str | Path) -> Measurement:
    """The Measurement of a run folder (or of its run.json), equal to the one that was saved.

    IncompleteRun where there is no run.json; LemError where there is nothing, or nothing that can be read.
    """
    place = Path(path)
    if place.name == RECORD:
        place = place.parent
    if not place.is_dir():
        raise LemError(f"There is no run folder {place}: check the path.")
    if not (place / RECORD).exists():
        inside = [run.name for run in _folders(place) if (run / RECORD).exists()]
        if inside:
            raise LemError(f"{place} holds {len(inside)} runs: read them with lem_kit.frame, or load one ({inside[0]}).")
        raise IncompleteRun(f"{place} is an incomplete run: it holds no {RECORD}. Nothing in it is a result; run it again.")
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        version = record["schema_version"]
        if version != SCHEMA_VERSION and version not in READABLE:
            raise LemError(f"{place} has record version {version}; this lem_kit reads {SCHEMA_VERSION}. Update lem_kit.")
        return _measurement(record, _read_table(place / "events.parquet"), _read_table(place / "trace.parquet"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pyarrow's errors are among these
        raise LemError(f"{place} cannot be read as a run: {type(error).__name__}: {error}") from error


def runs(folder: str | Path) -> Iterator[Measurement]:
    """Every complete run in `folder`, by name. Incomplete and unreadable ones are passed over with a warning, folders of
    runs without one."""
    if not Path(folder).is_dir():
        raise LemError(f"There is no folder {folder}: check the path, or make it with `lem study run`.")
    for place in _folders(Path(folder)):
        if not (place / RECORD).exists() and any((inner / RECORD).exists() for inner in _folders(place)):
            continue  # a folder of runs, of its own
        try:
            yield load(place)
        except LemError as error:
            warnings.warn(str(error), stacklevel=2)


def frame(measurements: str | Path | Iterable[Measurement]) -> pd.DataFrame:
    """One row per measurement, in a folder of runs or given as they are, with every metric recomputed from the raw facts.
    Columns: those of `metrics.summary`, `phases.summary` and `flops.summary`.

    Incomplete runs of a folder are named in a warning, never read as results.
    """
    import pandas as pd

    from . import flops, metrics, phases

    found = runs(measurements) if isinstance(measurements, str | Path) else measurements
    return pd.DataFrame([{**metrics.summary(m), **phases.summary(m), **flops.summary(m)} for m in found])


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _put(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(dict(columns)), sink, compression="zstd")
    _put(path, sink.getvalue().to_pybytes())


def _read_table(path: Path) -> dict[str, Any]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    return {name: table.column(name) for name in table.column_names}


def _events(m: Measurement) -> dict[str, Any]:
    """Token events as columns; `request` counts the completions of the warm-up first, then the measured ones, then those of
    a repeat that was broken off."""
    import pyarrow as pa

    rows = [(i, c.repeat, *e) for i, c in enumerate((*m.warmup, *m.completions, *m.broken_off)) for e in c.events]
    columns = list(zip(*rows)) if rows else [()] * 4
    return {name: pa.array(column, pa.int64()) for name, column in zip(("request", "repeat", "t_ns", "n_tokens"), columns)}


def _columns(trace: Trace) -> dict[str, Any]:
    """The trace as one wide table: rows are all instants at which anything was read."""
    import numpy as np
    import pyarrow as pa

    timed = {f"{key}{TOOK}": Series(s.t_ns, array("d", s.took_ns)) for key, s in trace.counters.items() if s.took_ns}
    series = {**trace.counters, **timed, **trace.gauges}
    stamps = {key: np.frombuffer(s.t_ns, dtype=np.int64) if s.t_ns else np.empty(0, np.int64) for key, s in series.items()}
    t_ns = np.unique(np.concatenate([*stamps.values(), np.empty(0, np.int64)]))
    columns: dict[str, Any] = {"t_ns": pa.array(t_ns)}
    for key, s in series.items():
        value, missing = np.zeros(len(t_ns)), np.ones(len(t_ns), dtype=bool)
        rows = np.searchsorted(t_ns, stamps[key])
        value[rows], missing[rows] = s.value, False
        columns[key] = pa.array(value, mask=missing)
    return columns


def _record(m: Measurement) -> dict[str, Any]:
    """Everything but events and readings, as strict JSON."""
    record = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name != "trace"}
    for name in ("warmup", "completions", "broken_off"):
        record[name] = [{k: v for k, v in dataclasses.asdict(c).items() if k != "events"} for c in record[name]]
    record["energy"] = {key: dataclasses.asdict(e) for key, e in m.energy.items()}
    record["repeats"] = [dataclasses.asdict(r) for r in m.repeats]
    record["trace"] = {
        "interval_s": m.trace.interval_s,
        "domains": {key: domain._asdict() for key, domain in m.trace.domains.items()},
        "counters": list(m.trace.counters),
        "gauges": list(m.trace.gauges),
        "failures": m.trace.failures,
        "period_s": m.trace.period_s,
        "period_half_s": m.trace.period_half_s,
        "updates": m.trace.updates,
    }
    return record


def _measurement(record: dict[str, Any], events: Mapping[str, Any], readings: Mapping[str, Any]) -> Measurement:
    rows: dict[int, list[tuple[int, int]]] = {}
    for request, t_ns, n_tokens in zip(*(events[name].to_numpy().tolist() for name in ("request", "t_ns", "n_tokens"))):
        rows.setdefault(request, []).append((t_ns, n_tokens))
    warm = len(record["warmup"])
    ended = warm + len(record["completions"])
    asked = record["warmup"] + record["completions"] + record.get("broken_off", [])
    done = [Completion(**_completion(fields), events=tuple(rows.get(i, ()))) for i, fields in enumerate(asked)]
    return Measurement(
        **{
            **record,
            "energy": _energies(record["energy"]),
            "repeats": tuple(Repeat(**{**r, "energy": _energies(r["energy"])}) for r in record["repeats"]),
            "warmup": tuple(done[:warm]),
            "completions": tuple(done[warm:ended]),
            "broken_off": tuple(done[ended:]),
            "reasons": tuple(record["reasons"]),
            "trace": _trace(record["trace"], readings),
        }
    )


def _completion(fields: Mapping[str, Any]) -> dict[str, Any]:
    out = fields.get("preempted_ns")
    return {**fields, "preempted_ns": out if out is None else tuple((start, end) for start, end in out)}


def _energies(record: Mapping[str, Any]) -> dict[str, Energy]:
    return {key: Energy(**{**fields, "reasons": tuple(fields["reasons"])}) for key, fields in record.items()}


def _trace(record: Mapping[str, Any], readings: Mapping[str, Any]) -> Trace:
    import numpy as np

    t_ns = readings["t_ns"].to_numpy().astype(np.int64)

    def series(key: str) -> Series:
        read = np.asarray(readings[key].is_valid())
        values = readings[key].drop_null().to_numpy()
        return Series(array("q", t_ns[read].tobytes()), array("d", values.astype(np.float64).tobytes()))

    def counter(key: str) -> Series:
        found = series(key)
        if f"{key}{TOOK}" in readings:
            found.took_ns = array("q", [int(took) for took in series(f"{key}{TOOK}").value])
        return found

    return Trace(
        {key: counter(key) for key in record["counters"]},
        {key: series(key) for key in record["gauges"]},
        {key: Domain(**{**fields, "reasons": tuple(fields["reasons"])}) for key, fields in record["domains"].items()},
        [(t, name, code, sentence) for t, name, code, sentence in record["failures"]],
        dict(record["period_s"]),
        record["interval_s"],
        dict(record["period_half_s"]),
        {key: (t_ns, half_ns) for key, (t_ns, half_ns) in record.get("updates", {}).items()},
    )
