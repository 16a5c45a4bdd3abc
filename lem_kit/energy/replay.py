"""A recording played back as if it were hardware: for demonstrations, tests and notebooks on machines without a meter.

The one idea: time since opening walks through the recording, and each counter shows its latest recorded value, so its
staircase comes back as it was. When the recording is over it begins again on top of what was reached; a counter never
falls, unless it fell in the recording. One that was read seldom, since samples of its power told what was between, shows
what they tell of it at each of its updates. Samples of power that a device had kept are handed over as they were, too, and
so power can be integrated beside the counter: `replay_power:gpu0`.

    open_source("data/study/run")               a run folder: its trace.parquet, and its run.json for what the columns are
    open_source("data/study/run/trace.parquet") the same
    open_source("power.csv")                    see below

The CSV has a header and one row per reading. `t_s` is seconds from any origin, every other column a counter in joules;
an empty field was not read. A column's name is its domain, and without its number its scope (gpu0: gpu, dram-0: dram):

    t_s,gpu0,cpu
    0.0,1500.0,20.0
    0.1,1520.5,

Every figure carries the reason "replayed". Not covered: the machine, the prompts and the latencies of the recording.
"""

from __future__ import annotations

import csv
import json
import math
import re
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import LemError, Unavailable
from ..polyline import between
from ..staircase import knots
from ..trace import TOOK, Domain, Series, Trace
from . import EnergySource, Reading


@dataclass
class Recording:
    """Columns of a recording by the name they are played under; instants are as recorded."""

    path: Path
    counters: dict[str, Series] = field(default_factory=dict)
    gauges: dict[str, Series] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)
    integrals: dict[str, Domain] = field(default_factory=dict)
    run_id: str | None = None

    def bounds_ns(self) -> tuple[int, int]:
        columns = [*self.counters.values(), *self.gauges.values()]
        return min(column.t_ns[0] for column in columns), max(column.t_ns[-1] for column in columns)


def open_source(argument: str | None = None) -> EnergySource:
    """Play the recording at `argument` from now on. LemError if there is none that can be read."""
    if argument is None:
        raise Unavailable("it plays a recording only when given one: LEM_KIT_SOURCES=replay=PATH")
    return ReplaySource(load(Path(argument)))


class ReplaySource:
    """A recording on a clock."""

    name = "replay"

    def __init__(self, recording: Recording, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.domains: Mapping[str, Domain] = recording.domains
        self.integrals: Mapping[str, Domain] = recording.integrals
        self._recording = recording
        self._clock = clock
        self._closed = False
        self._first_ns, self._last_ns = recording.bounds_ns()
        self._opened_ns = self._told_ns = clock()
        kept = {domain.gauge.partition(":")[2] for domain in recording.integrals.values() if domain.gauge}
        self._sampled = recording.gauges.keys() & kept
        # What was not recorded need not be asked for.
        self.gauges_interval_s = 0.0 if recording.gauges.keys() - self._sampled else math.inf
        self.samples_interval_s = 0.0 if self._sampled else math.inf

    def _position(self, now_ns: int) -> tuple[int, int]:
        """How often the recording was over, and the instant in it that is played now."""
        length_ns = self._last_ns - self._first_ns
        laps, elapsed_ns = divmod(now_ns - self._opened_ns, length_ns) if length_ns else (0, 0)
        return laps, self._first_ns + elapsed_ns

    def read(self) -> dict[str, Reading]:
        if self._closed:
            raise LemError("replay: this source is closed")
        now_ns = self._clock()
        laps, at_ns = self._position(now_ns)
        readings = {}
        for domain, series in self._recording.counters.items():
            i = bisect_right(series.t_ns, at_ns) - 1
            if i >= 0 or laps:  # before its first reading a counter is unknown, or stands where the last lap left it
                gained_j = laps * max(series.value[-1] - series.value[0], 0.0)
                readings[domain] = Reading(now_ns, series.value[max(i, 0)] + gained_j)
        return readings

    def gauges(self) -> dict[str, float]:
        _, at_ns = self._position(self._clock())
        shown = self._recording.gauges.items()
        found = {name: bisect_right(series.t_ns, at_ns) - 1 for name, series in shown if name not in self._sampled}
        return {name: self._recording.gauges[name].value[i] for name, i in found.items() if i >= 0}

    def samples(self) -> dict[str, list[tuple[int, float]]]:
        """What a device had kept of its power since the last call, at the instants at which it is played."""
        since_ns, self._told_ns = self._told_ns, self._clock()
        laps = range(self._position(since_ns)[0], self._position(self._told_ns)[0] + 1)
        found: dict[str, list[tuple[int, float]]] = {name: [] for name in self._sampled}
        for name, points in found.items():
            series = self._recording.gauges[name]
            for lap in laps:
                shift_ns = self._opened_ns + lap * (self._last_ns - self._first_ns) - self._first_ns
                part = series.between(since_ns - shift_ns + 1, self._told_ns - shift_ns)
                points += ((t + shift_ns, value) for t, value in zip(part.t_ns, part.value))
        return found

    def describe(self) -> dict[str, Any]:
        length_s = (self._last_ns - self._first_ns) / 1e9
        return {"recording": str(self._recording.path), "length_s": length_s, "recorded_run_id": self._recording.run_id}

    def close(self) -> None:
        self._closed = True


def load(path: Path) -> Recording:
    """Read a run folder, a trace.parquet or a CSV. LemError, with the path, if that fails."""
    file = path / "trace.parquet" if path.is_dir() else path
    if not file.is_file():
        holds = f"{path} holds no trace.parquet" if path.is_dir() else f"there is no file {path}"
        raise LemError(f"replay: {holds}; give it a run folder, a trace.parquet or a .csv file.")
    try:
        recording = _from_csv(file) if file.suffix == ".csv" else _from_parquet(file)
    except (OSError, ValueError, TypeError, LookupError) as error:  # pyarrow's errors are among these
        raise LemError(f"replay: {file} cannot be read as a recording: {error}") from None
    if not recording.counters:
        raise LemError(f"replay: {file} holds no readings of a counter.")
    return recording


def _from_csv(file: Path) -> Recording:
    with file.open(newline="", encoding="utf-8") as lines:
        header, *rows = [row for row in csv.reader(lines) if row] or [[""]]
    if header[0].strip() != "t_s" or len(header) < 2:
        raise ValueError(f"its header is {','.join(header)!r}, not 't_s,' and names of counters")
    if ragged := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"a row has {len(ragged[0])} fields, the header {len(header)}: {','.join(ragged[0])!r}")
    t_ns = [round(float(row[0]) * 1e9) for row in rows]
    recording = Recording(file)
    for column, name in enumerate((title.strip() for title in header[1:]), start=1):
        series = _series(t_ns, [float(row[column]) if row[column].strip() else None for row in rows])
        if series.t_ns:
            recording.counters[name] = series
            recording.domains[name] = Domain(
                re.sub(r"[-_]?\d+$", "", name), "counter", reasons=("replayed",), label=str(file)
            )
    return recording


def _from_parquet(file: Path) -> Recording:
    from pyarrow import parquet

    table = parquet.read_table(file)
    if "t_ns" not in table.column_names:
        raise ValueError(f"it has no column t_ns; its columns are {', '.join(table.column_names)}")
    t_ns = table.column("t_ns").to_pylist()
    run = _run_beside(file)
    recorded: Mapping[str, Any] = run.get("trace", {}).get("domains", {})
    keys = [key for key in table.column_names if key != "t_ns" and not key.endswith(TOOK)]
    # Without a run.json, a dot after the colon marks a gauge.
    counters = [key for key in keys if (key in recorded if recorded else "." not in key.partition(":")[2])]
    names = _names(counters)
    recording = Recording(file, run_id=run.get("run_id"))
    read = {key: _series(t_ns, table.column(key).to_pylist()) for key in keys}
    for key, series in read.items():
        if not series.t_ns:
            continue
        if key in names:
            if f"{key}{TOOK}" in table.column_names:
                series.took_ns.extend(int(took) for took in _series(t_ns, table.column(f"{key}{TOOK}").to_pylist()).value)
            recording.counters[names[key]] = _at_updates(run, key, read)
            recording.domains[names[key]] = _domain(key, recorded.get(key), series)
        else:
            domain, _, quantity = key.partition(":")[2].partition(".")
            owner = key.rpartition(f".{quantity}")[0]
            recording.gauges[f"{names.get(owner, domain)}.{quantity}"] = series
    for key, fields in recorded.items():
        owner = (fields.get("gauge") or "").removesuffix(".power_w")
        if fields.get("means") and owner in names and f"{names[owner]}.power_w" in recording.gauges:
            found = _domain(key, fields, Series())._replace(gauge=f"replay:{names[owner]}.power_w")
            recording.integrals[f"replay_power:{names[owner]}"] = found
    return recording


def _at_updates(run: Mapping[str, Any], key: str, read: dict[str, Series]) -> Series:
    """A counter as it was read; where that was seldom, what it showed at each of its updates in between."""
    series, told = read[key], run.get("trace", {})
    if key not in told.get("updates", {}):
        return series
    domain, period_s, (t_ns, half_ns) = Domain(**told["domains"][key]), told["period_s"][key], told["updates"][key]
    trace = Trace({key: series}, read, {key: domain}, period_s={key: period_s}, updates={key: (t_ns, half_ns)})
    course = between(trace, key, series.t_ns[0], series.t_ns[-1])
    known, grid = knots(series, domain.refresh_s, period_s, (t_ns, half_ns))
    sampled_ns = read.get(f"{key}.power_w", Series()).t_ns[-1:]
    known = [knot for knot in known if sampled_ns and knot.t_ns <= sampled_ns[0]]  # later, nothing tells the course between
    if course is None or grid is None or not known:
        return series
    first, last = (round((known[i].t_ns - grid.phase_ns) / grid.period_ns) for i in (0, -1))
    updates_ns = [round(grid.at(k)) for k in range(first, last + 1)]
    counted = (joules + domain.offset_w * t_ns / 1e9 for t_ns, joules in zip(updates_ns, course.at(updates_ns)))
    return Series(array("q", updates_ns), array("d", map(float, counted)))


def _run_beside(file: Path) -> Mapping[str, Any]:
    run = file.parent / "run.json"
    loaded = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{run} is not a run's record")
    return loaded


def _names(keys: Iterable[str]) -> dict[str, str]:
    """ "source:domain" -> the domain, or source-domain where two sources recorded domains of one name."""
    domains = {key: key.partition(":")[2] or key for key in keys}
    count = Counter(domains.values())
    return {key: domain if count[domain] == 1 else key.replace(":", "-", 1) for key, domain in domains.items()}


def _domain(key: str, fields: Mapping[str, Any] | None, series: Series) -> Domain:
    scope = re.sub(r"[-_]?\d+$", "", key.partition(":")[2])
    found = Domain(**fields) if fields else Domain(scope, "counter")
    refresh_s = found.refresh_s
    if refresh_s is not None:  # what is played back is as old as the hardware's value and the recording's sampling
        steps = [b - a for a, b in zip(series.t_ns, series.t_ns[1:])]
        refresh_s = max(refresh_s, median(steps) / 1e9 if steps else 0.0)
    reasons = tuple(dict.fromkeys([*found.reasons, "replayed"]))
    return found._replace(refresh_s=refresh_s, reasons=reasons, label=f"{key} {found.label}".strip())


def _series(t_ns: Iterable[int], values: Iterable[float | None]) -> Series:
    """The rows in which a column was read. Rows may stand in any order."""
    read = sorted((t, v) for t, v in zip(t_ns, values) if v is not None and math.isfinite(v))
    series = Series()
    for t, v in read:
        series.append(t, v)
    return series
