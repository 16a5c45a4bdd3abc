"""How often the intervals of lem_kit hold what they should, with long windows as the reference for short ones.

    adjacent   many short windows that touch, and the long one that they make up
    inside     windows at random instants of a long one against its mean power: of any length under the steady load, and of
               two whole periods of the square wave, whose edges cut it anywhere
    repeated   one and the same work again and again, each in a window of its own, against their mean

    apart      the same windows again: counter against samples, brought to one gain by the long window less its ends, and the
               half-widths of both, and of that gain, without what is allowed for the samples at large. No power need be
               steady for this.

The reference is not the truth: what the sensor's gain hides is in both. A straight line is taken out of repeated work, since
a board that warms up is no error of the meter; what the work itself varies by is left in, and so the load is one that keeps
below the power limit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

from lem_kit.session import energy

from . import figures, loads
from .check import Check, Skip
from .facts import by_method, handle

SHORT_S, LONG_S = 0.23, 1.0
SQUARE_S = 0.37
METHODS = ("counter", "integral")
RANDOM_WINDOWS = 60
INNER_NS = 300_000_000


def measure(check: Check) -> None:
    handle()
    try:
        load: Any = loads.Sums(check.cuda())
    except Skip as reason:
        load = loads.Nothing()
        check.note(f"No load was put on the GPU, so all windows are idle ones: {reason}")
    check.fact("load", load.name)
    seconds = check.seconds(6, 1.5)
    shapes: dict[str, Callable[[float], Any]] = {
        "steady": lambda s: load.until(loads.now() + int(s * 1e9)),
        f"square, {1000 * SQUARE_S:g} ms": lambda s: square_on(load, s),
    }
    for name, work in shapes.items():
        if check.allow(f"adjacent windows, {name}", seconds + 2):
            adjacent(check, name, work, seconds)
    plans = [
        ("back to back, 230 ms", SHORT_S, check.seconds(30, 6), False),
        ("with pauses, 230 ms", SHORT_S, check.seconds(30, 6), True),
        ("with pauses, 1 s", LONG_S, check.seconds(10, 0), True),
    ]
    for name, length_s, count, pauses in plans:
        if count and check.allow(f"repeated work, {name}", count * (length_s + 0.1 * pauses) + 2):
            repeated(check, load, name, length_s, int(count), pauses)


def square_on(load: Any, seconds: float) -> None:
    """A square wave in step with the clock, so that windows cut it anywhere."""
    end = loads.now() + int(seconds * 1e9)
    period, half = int(SQUARE_S * 1e9), int(SQUARE_S * 5e8)
    while (t := loads.now()) < end:
        into = t % period
        until = min(end, t - into + (half if into < half else period))
        if into < half:
            load.until(until)
        else:
            loads.sleep_until(until)


def adjacent(check: Check, name: str, work: Callable[[float], Any], seconds: float) -> None:
    """The sum of short windows against the long one, and each against the long one's mean power."""
    work(0.5)
    with check.session() as session, session.window(f"coverage adjacent {name}") as window:
        edges = [session.instant()]
        end = edges[0] + int(seconds * 1e9)
        while edges[-1] < end:
            work(SHORT_S)
            edges.append(session.instant())
    trace = window.measurement.trace
    whole = by_method(energy(trace, edges[0], edges[-1]))
    parts = [by_method(energy(trace, a, b)) for a, b in itertools.pairwise(edges)]
    for length_s in (0.05, SHORT_S, LONG_S):
        if length_s < seconds / 3:
            apart(check, name, trace, (edges[0], edges[-1]), length_s)
    for method in METHODS:
        long = whole.get(method)
        short = [part[method] for part in parts if method in part]
        if long is None or long.joules is None or any(e.joules is None for e in short):
            check.left_out(f"adjacent windows, {name}, {method}", "no energy: " + reasons([long, *short]))
            continue
        total = sum(e.joules for e in short)
        row = {
            "load": name, "source": method, "short windows": len(short),
            "long J": long.joules, "long ± J": long.uncertainty_j,
            "sum/long": total / long.joules, "difference/±": abs(total - long.joules) / long.uncertainty_j,
        }  # fmt: skip
        check.table("adjacent windows", [row])
        for length_s in (0.05, SHORT_S, LONG_S) if name == "steady" else (2 * SQUARE_S,):
            if length_s < seconds / 3:
                inside(
                    check,
                    f"{name}, inside, {1000 * length_s:g} ms",
                    method,
                    trace,
                    (edges[0], edges[-1]),
                    long.joules,
                    length_s,
                )


def inside(check: Check, name: str, method: str, trace: Any, edges: tuple[int, int], joules: float, length_s: float) -> None:
    """Windows at random instants of a long one against its mean power."""
    length_ns = int(length_s * 1e9)
    draw = random.Random(2)
    starts = [draw.randrange(edges[0], edges[1] - length_ns) for _ in range(RANDOM_WINDOWS)]
    found = [by_method(energy(trace, t, t + length_ns))[method] for t in starts]
    known = [e for e in found if e.joules is not None]
    if len(known) < len(found):
        check.left_out(f"{len(found) - len(known)} windows {name}, {method}", "no energy: " + reasons(found))
    if known:
        reference = joules * length_ns / (edges[1] - edges[0])
        add(check, name, method, [e.joules for e in known], [e.uncertainty_j for e in known], reference)


def apart(check: Check, name: str, trace: Any, edges: tuple[int, int], length_s: float) -> None:
    """Counter against samples in windows at random instants."""
    plain = {key: domain._replace(relative_error=0.0) for key, domain in trace.domains.items()}
    trace = dataclasses.replace(trace, domains=plain)
    inner = (edges[0] + INNER_NS, edges[1] - INNER_NS)
    whole = by_method(energy(trace, *inner))
    length_ns = int(length_s * 1e9)
    draw = random.Random(3)
    starts = [draw.randrange(edges[0], edges[1] - length_ns) for _ in range(RANDOM_WINDOWS)]
    pairs = [by_method(energy(trace, t, t + length_ns)) for t in starts]
    pairs = [pair for pair in pairs if all(m in pair and pair[m].joules is not None for m in METHODS)]
    if not pairs or any(m not in whole or whole[m].joules is None for m in METHODS):
        check.left_out(f"counter against samples, {name}, {1000 * length_s:g} ms", "one of them has no energy")
        return
    gain = whole["counter"].joules / whole["integral"].joules
    doubt = math.hypot(*(whole[m].uncertainty_j / whole[m].joules for m in METHODS))
    mean = whole["counter"].joules * length_ns / (inner[1] - inner[0])
    apart_j = [mean + p["counter"].joules - gain * p["integral"].joules for p in pairs]
    halves = [math.hypot(*(p[m].uncertainty_j for m in METHODS), doubt * p["counter"].joules) for p in pairs]
    found = figures.covered(apart_j, halves, mean)
    row = {"load": name, "length ms": 1000 * length_s, "mean J": mean, "gain": gain, **found}
    check.table("counter against samples", [row])
    check.headline(
        f"counter - samples within both ±: {name}, {1000 * length_s:g} ms",
        f"{found['inside']} of {found['windows']} (± {found['half_width_percent']:.2f} %, sd {found['sd_percent']:.2f} %)",
    )


def repeated(check: Check, load: Any, name: str, length_s: float, count: int, pauses: bool) -> None:
    """The same number of products in every window."""
    products = load.count_for(length_s)
    draw = random.Random(1)
    with check.session() as session, session.window(f"coverage repeated {name}", config={"products": products}) as window:
        for _ in range(count):
            if pauses:
                loads.pause(draw)
            with window.repeat():
                load.work(products)
    repeats = [by_method(r.energy) for r in window.measurement.repeats]
    for method in METHODS:
        found = [r[method] for r in repeats if method in r]
        if not found or any(e.joules is None for e in found):
            check.left_out(f"repeated work, {name}, {method}", "no energy: " + reasons(found))
            continue
        values = figures.detrended([e.joules for e in found])
        add(check, name, method, values, [e.uncertainty_j for e in found], sum(values) / len(values))


def add(check: Check, name: str, method: str, values: list[float], halves: list[float], reference: float) -> None:
    found = figures.covered(values, halves, reference)
    check.table("coverage", [{"windows of": name, "source": method, "mean J": reference, **found}])
    if method == "integral":
        return
    check.headline(
        f"inside ±: {name}",
        f"{found['inside']} of {found['windows']} (± {found['half_width_percent']:.2f} %, sd {found['sd_percent']:.2f} %)",
    )


def reasons(energies: list[Any]) -> str:
    return ", ".join(dict.fromkeys(code for e in energies if e is not None for code in e.reasons)) or "no source"
