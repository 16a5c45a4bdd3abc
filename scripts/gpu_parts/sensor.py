"""The sensor: how often each figure is refreshed, what asking costs, and how far the figures agree on loads of known shape.

The one idea: refresh periods come from a process that polls as fast as it can, with lem_kit's own sampler out of the way;
agreement comes from Session windows, while another process polls only the cheap power fields.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import figures, loads
from .check import Check, Skip
from .facts import by_method, handle

SQUARES_S = (0.02, 0.05, 0.1, 0.2, 1.0)
PART_TIME_S = (0.1, 0.097)
DUTY = 0.3
SETTLE_S = 0.4  # after a change of load, before its power is looked at
LEAST_SWING_W = 20.0  # of a load above idle, for the part-time test to mean something
AVERAGE_S = 1.1  # field 185 is a mean of a second


def characterise(check: Check) -> None:
    nvml, board = handle()
    uuid = nvml.nvmlDeviceGetUUID(board)
    idle_costs = costs(nvml, board, int(check.seconds(100, 30)))
    load = the_load(check)
    refreshes(check, uuid, load)
    calls(check, nvml, board, idle_costs, load)
    agreement(check, uuid, load)


def the_load(check: Check) -> Any:
    """The products on the GPU, or nothing, with a note."""
    try:
        load: Any = loads.Products(check.cuda())
    except Skip as reason:
        load = loads.Nothing()
        check.note(f"No load was put on the GPU, so busy figures are idle ones: {reason}")
    check.fact("load", load.name)
    return load


# --- what asking costs ------------------------------------------------------------------------------------------------


def questions(nvml: Any, board: Any) -> dict[str, Callable[[], Any]]:
    return {
        "total energy": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(board),
        "power samples": lambda: nvml.nvmlDeviceGetSamples(board, nvml.NVML_TOTAL_POWER_SAMPLES, 0),
        "power field, instant": lambda: nvml.nvmlDeviceGetFieldValues(board, [(186, 0)]),
        "both power fields": lambda: nvml.nvmlDeviceGetFieldValues(board, [(186, 0), (185, 0)]),
        "power usage": lambda: nvml.nvmlDeviceGetPowerUsage(board),
        "temperature": lambda: nvml.nvmlDeviceGetTemperatureV(board, 0),
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(board),
        "SM clock": lambda: nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM),
        "reasons for low clocks": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(board),
        "memory in use": lambda: nvml.nvmlDeviceGetMemoryInfo(board),
        "processes": lambda: nvml.nvmlDeviceGetComputeRunningProcesses(board),
    }


def costs(nvml: Any, board: Any, count: int) -> dict[str, Any]:
    """Call times in seconds of every question, or what the driver said instead."""
    found: dict[str, Any] = {}
    for name, ask in questions(nvml, board).items():
        took = []
        try:
            for _ in range(count):
                began = time.perf_counter_ns()
                ask()
                took.append((time.perf_counter_ns() - began) / 1e9)
                time.sleep(0.0005)
            found[name] = took
        except (nvml.NVMLError, AttributeError) as error:
            found[name] = str(error)
    return found


def calls(check: Check, nvml: Any, board: Any, idle_costs: dict[str, Any], load: Any) -> None:
    """The table of call times, idle and while the load runs in another thread."""
    if not check.allow("cost of NVML calls on a busy board", check.seconds(6, 3)):
        return
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            load.work(20)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(SETTLE_S)
    try:
        busy_costs = costs(nvml, board, int(check.seconds(100, 20)))
    finally:
        stop.set()
        thread.join()
    rows = []
    for name, idle in idle_costs.items():
        row: dict[str, Any] = {"call": name}
        for state, took in (("idle", idle), ("busy", busy_costs[name])):
            if isinstance(took, str):
                row[f"{state} p50_us"] = took
            else:
                row |= {f"{state} {key}": value for key, value in figures.spread(took).items()}
        rows.append(row)
    check.table("cost of calls", rows)
    energy = rows[0]
    check.headline("energy call, idle / busy (median)", f"{energy['idle p50_us']} / {energy['busy p50_us']} us")


# --- how often each figure is refreshed -------------------------------------------------------------------------------


class Poller:
    """The other process (`poll`): started, and read when it has stopped."""

    def __init__(self, check: Check, uuid: str, name: str, what: str) -> None:
        folder = check.out / "polls"
        folder.mkdir(exist_ok=True)
        self.file = folder / f"{name}.npz"
        self._stop = folder / f"{name}.stop"
        self._stop.unlink(missing_ok=True)
        poll = Path(__file__).with_name("poll.py")
        command = [sys.executable, str(poll), uuid, str(self.file), str(self._stop), what]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(0.5)

    def read(self) -> dict[str, Any]:
        """End it; the arrays that it wrote."""
        self._stop.touch()
        try:
            _, said = self._process.communicate(timeout=20)
        finally:
            self._process.kill()
            self._stop.unlink(missing_ok=True)
        if self._process.returncode:
            raise RuntimeError(f"the polling process failed: {said.strip()[-500:]}")
        with np.load(self.file) as arrays:
            return dict(arrays)


@contextlib.contextmanager
def polling(check: Check, uuid: str, name: str, what: str) -> Iterator[dict[str, Any]]:
    """Poll during the block; the arrays are in what it was given when it has ended."""
    found: dict[str, Any] = {}
    poller = Poller(check, uuid, name, what)
    try:
        yield found
    finally:
        found.update(poller.read())


def refreshes(check: Check, uuid: str, load: Any) -> None:
    """Update periods of counter, power fields and samples, idle and under the steady load."""
    seconds = check.seconds(3, 1.5)
    spans = {}
    with polling(check, uuid, "refresh", "counter") as found:
        began = loads.now()
        time.sleep(seconds)
        spans["idle"] = (began, loads.now())
        load.until(loads.now() + int(SETTLE_S * 1e9))
        began = loads.now()
        load.until(began + int(seconds * 1e9))
        spans["steady load"] = (began, loads.now())
    rows = []
    for state, (began, ended) in spans.items():
        for name, row in refresh_rows(found, began, ended).items():
            rows.append({"figure": name, "state": state, **row})
    check.table("refresh", rows)
    step = figures.smallest_step(found["counter"][:, 2]) if len(found["counter"]) else None
    check.fact("counter_smallest_step_mj", step)
    counter = next((row for row in reversed(rows) if row["figure"] == "counter" and row["grid_ms"]), None)
    samples = next((row for row in rows if row["figure"] == "samples" and row["p50_ms"]), None)
    check.headline("counter refreshed every", f"{counter['grid_ms']:.3f} ms" if counter else "no grid seen")
    check.headline("counter counts in", f"{step} mJ" if step else "not seen to count")
    check.headline("power samples every", f"{samples['p50_ms']:.1f} ms" if samples else "none kept")


def refresh_rows(found: dict[str, Any], began_ns: int, ended_ns: int) -> dict[str, dict[str, Any]]:
    """`figures.refresh` of each polled figure between two instants; for samples, the distances of their stamps."""
    rows: dict[str, dict[str, Any]] = {}
    for name, array, column in (("counter", "counter", 2), ("instant power", "fields", 2), ("average power", "fields", 3)):
        part = found[array]
        part = part[(part[:, 0] >= began_ns) & (part[:, 1] < ended_ns)]
        if len(part) and (part[:, column] >= 0).all():
            rows[name] = {"polls": len(part), **figures.refresh(*part.T[:2].tolist(), part[:, column].tolist())}
    calls = found["calls"]
    if len(calls):
        stamps = found["samples"][:, 0] * 1000 - calls[-1, 3]
        stamps = stamps[(stamps >= began_ns) & (stamps < ended_ns)]
        if len(stamps) > 3:
            p5, p50, p95 = np.percentile(np.diff(stamps) / 1e6, [5, 50, 95]).round(3).tolist()
            last = [found["samples"][found["samples"][:, 2] == call[1], 0] for call in calls]
            ages = [(call[1] - (newest.max() * 1000 - call[3])) / 1e6 for call, newest in zip(calls, last) if len(newest)]
            rows["samples"] = {
                "polls": len(calls), "changes": len(stamps), "p5_ms": p5, "p50_ms": p50, "p95_ms": p95,
                "grid_ms": None, "grid_phase_half_ms": None,
                "newest_age_ms": f"{min(ages):.1f} to {max(ages):.1f}", "kept": int(calls[0, 2]),
            }  # fmt: skip
    return rows


# --- whether they agree -----------------------------------------------------------------------------------------------


def agreement(check: Check, uuid: str, load: Any) -> None:
    """Counter, integral of samples and both power fields side by side on idle, steady and square loads."""
    seconds = check.seconds(2.5, 1)
    plans: list[tuple[str, Callable[[], float]]] = [
        ("idle", lambda: time.sleep(seconds) or 0.0),
        ("steady", lambda: load.until(loads.now() + int(seconds * 1e9)) or 1.0),
    ]
    plans += [
        (name, functools.partial(loads.square, load, period, duty, max(seconds, period)))
        for name, period, duty in (
            *((f"square, {1000 * period:g} ms", period, 0.5) for period in SQUARES_S),
            *((part_time_name(period), period, DUTY) for period in PART_TIME_S),
        )
    ]
    windows = []
    with polling(check, uuid, "agreement", "fields") as found, check.session() as session:
        for number in range(1, check.repeats + 1):
            if not check.allow(f"agreement of figures, pass {number}", len(plans) * (seconds + SETTLE_S)):
                break
            for name, work in plans:
                time.sleep(check.seconds(SETTLE_S, 0.1))
                with session.window(f"sensor {name}") as window:
                    busy = work()
                windows.append((name, number, busy, window.measurement))
    rows = [agreement_row(*window, found["fields"]) for window in windows]
    check.table("agreement", rows)
    part_time(check, rows)
    for name in ("idle", "steady", "square, 20 ms", "square, 100 ms", part_time_name(0.1)):
        here = [row for row in rows if row["load"] == name]
        for column in ("integral/counter", "instant/counter"):
            said = [f"{row[column]:.3f}" for row in here if row[column] is not None]
            check.headline(f"{name}: {column}", " / ".join(said) or "not available")


def part_time_name(period_s: float) -> str:
    return f"{100 * DUTY:.0f} % of {1000 * period_s:g} ms"


def agreement_row(name: str, number: int, busy: float, m: Any, fields: Any) -> dict[str, Any]:
    counter, integral = (by_method(m.energy).get(method) for method in ("counter", "integral"))
    row: dict[str, Any] = {"load": name, "pass": number, "s": m.duration_s, "busy share": busy}
    for of, energy in (("counter", counter), ("integral", integral)):
        known = energy is not None and energy.joules is not None
        row[f"{of} W"] = energy.joules / m.duration_s if known else None
        row[f"{of} ± W"] = energy.uncertainty_j / m.duration_s if known else None
    for of, column, lag_s in (("instant", 2, 0.15), ("average", 3, AVERAGE_S)):
        here = fields[(fields[:, 0] >= m.t0_ns + lag_s * 1e9) & (fields[:, 1] <= m.t1_ns)][:, column]
        row[f"{of} field W"] = float(here.mean()) / 1000 if len(here) > 20 and (here >= 0).all() else None
    for of, column in (("integral", "integral W"), ("instant", "instant field W"), ("average", "average field W")):
        known = row[column] is not None and row["counter W"]
        row[f"{of}/counter"] = row[column] / row["counter W"] if known else None
    codes = [code for e in (counter, integral) if e is not None for code in e.reasons]
    return row | {"reasons": ", ".join(dict.fromkeys([*m.reasons, *codes]))}


def part_time(check: Check, rows: list[dict[str, Any]]) -> None:
    """The test for a sensor that looks part of the time: in step with 100 ms against out of step, per figure.

    Power above idle per share of time that the load really ran; a sensor that sees everything shows a ratio of 1.
    """
    found = []
    idle = [row for row in rows if row["load"] == "idle"]
    for column in ("counter W", "integral W", "instant field W", "average field W"):
        floor = [row[column] for row in idle if row[column] is not None]
        for number in range(1, check.repeats + 1):
            at = {}
            for period in PART_TIME_S:
                row = next((r for r in rows if r["load"] == part_time_name(period) and r["pass"] == number), None)
                if row is not None and row[column] is not None and row["busy share"] and floor:
                    at[period] = (row[column] - sum(floor) / len(floor)) / row["busy share"]
            if len(at) == len(PART_TIME_S) and at[PART_TIME_S[1]] > LEAST_SWING_W:
                found.append({
                    "figure": column.removesuffix(" W"), "pass": number, "W per share of load, 100 ms": at[0.1],
                    "97 ms": at[0.097], "ratio": at[0.1] / at[0.097],
                })  # fmt: skip
    check.table("part-time test", found)
    for figure in ("counter", "instant field"):
        said = " / ".join(f"{row['ratio']:.3f}" for row in found if row["figure"] == figure)
        check.headline(f"100 ms against 97 ms, {figure}", said or "not available")
