"""What speaks for or against a window's figures, seen from the trace and the machine around it.

The one idea: each check gives a code of `measurement.REASONS` and changes no figure. `metrics.verdict` decides which codes
make a measurement invalid.

Not covered: codes of single energies, which `curve` gives with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from .measurement import Energy, both_figures
from .trace import Trace

LARGEST_DRIFT_C = 3.0
LEAST_DRIFT_S = 4.0
LARGEST_JUMP_NS = 50_000_000
LARGEST_SHARE = 0.2  # of the machine's CPUs that others may keep busy


class Surroundings(NamedTuple):
    """Taken where a window opens and closes. `wall_ns`: wall clock minus CLOCK_MONOTONIC; CPU times in seconds, None where
    they cannot be told."""

    wall_ns: int
    busy_s: float | None
    own_s: float | None


def surroundings(proc: str | None = "/proc") -> Surroundings:
    """Taken in the user's time, so with as few calls as there can be: with `proc` None only the clocks are looked at."""
    wall_ns = time.time_ns() - time.monotonic_ns()
    if proc is None:
        return Surroundings(wall_ns, None, None)
    try:
        ticks = [int(word) for word in _begin(f"{proc}/stat").split(b"\n", 1)[0].split()[1:9]]
        busy_s = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting for a disk
        children = _begin(f"{proc}/self/task/{os.getpid()}/children")
    except (OSError, ValueError, IndexError):  # no /proc, or one that is not Linux's
        return Surroundings(wall_ns, None, None)
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return Surroundings(wall_ns, busy_s, None if children else own_s)  # what living children used cannot be seen here


def _begin(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 512)
    finally:
        os.close(file)


def between(before: Surroundings, after: Surroundings, seconds: float) -> list[str]:
    """Codes for what changed around the process while the window was open."""
    codes = []
    if abs(after.wall_ns - before.wall_ns) > LARGEST_JUMP_NS:
        codes.append("clock_jump")
    if None not in (before.busy_s, before.own_s, after.busy_s, after.own_s) and seconds > 0.1:
        others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)  # type: ignore[operator]
        if others_s > LARGEST_SHARE * seconds * (os.cpu_count() or 1):
            codes.append("host_shared")
    return codes


def of_gauges(trace: Trace, t0_ns: int, t1_ns: int) -> list[str]:
    """Codes for what the gauges showed inside the window."""
    codes = []
    for key, series in trace.gauges.items():
        values = series.between(t0_ns, t1_ns).value
        if not values:
            continue
        if key.endswith(".throttled") and max(values) > 0:
            codes.append("throttled")
        if key.endswith(".power_capped") and sum(values) > len(values) / 2:
            codes.append("power_capped")
        if key.endswith(".temperature_c") and (t1_ns - t0_ns) / 1e9 > LEAST_DRIFT_S:
            quarter = max(len(values) // 4, 1)
            drift_c = sum(values[-quarter:]) / quarter - sum(values[:quarter]) / quarter
            if abs(drift_c) > LARGEST_DRIFT_C:
                codes.append("thermal_drift")
    return list(dict.fromkeys(codes))


def compared(energy: Mapping[str, Energy]) -> dict[str, Energy]:
    """The energies with "sources_disagree" where counter and integrated power of one device do not fit within intervals."""
    found = dict(energy)
    for counter, integral, counter_j, integral_j in both_figures(energy):
        allowed = (integral.uncertainty_j or 0.0) + (counter.uncertainty_j or 0.0)
        if abs(integral_j - counter_j) > allowed:
            for one in (integral, counter):
                found[one.key] = replace(one, reasons=(*one.reasons, "sources_disagree"))
    return found
