"""How often the intervals of window energies hold the truth, on boards whose true energy is known in closed form.

Windows at random phases of a session of half a minute, read by a real Sampler on a clock that is turned by hand
(`tests/simulation.py`); so no machine's speed plays a part, and the same figures come out everywhere.

Not covered: real sensors (`scripts/gpu_check.py`), what measuring costs and other tools (`energy.py`).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import FakeClock
from simulation import WAVES, Board, recorded_windows, steps
from tables import table

from lem_kit.curve import energy_between
from lem_kit.trace import Trace

AT_ONCE = 3  # windows of each session
SECONDS = (0.05, 0.23, 1.07, 5.03)
KEY = "sim:gpu0"
LOADS = {
    "constant": "constant 200 W",
    "square": "square wave 70/300 W, 0.83 s",
    "sine": "sine 50 to 350 W, 0.83 s",
    "bursts": "bursts 350/220/70 W",
    "decode": "alternating every 10 ms, 150/400 W",
    "locked": "30 of every 100 ms, in step with the sensor",
}
BOARDS: dict[str, dict[str, Any]] = {
    "samples every 20 ms": {},
    "samples every 20 ms, out of time as a real H100's": {"jitter_s": 0.0024, "own_look": True, "stamp_s": 0.01},
    "no samples": {"sample_s": None},
}
Windows = Iterator[tuple[float | None, float, float, tuple[str, ...]]]  # figure, half-width, truth, reasons


def at_random(load: str, seconds: float, count: int, board: str, told_edges: bool = True) -> Windows:
    """Windows that know nothing of the load, three of each session: errors that all windows of a session share, as those of
    the phase of its sensor, are to be seen in as many values as possible. Of `told_edges` the sampler knows, as of those of
    measured windows; it knows nothing of the edges of a part of one that is looked up later."""
    for seed in range(-(-count // AT_ONCE)):
        clock = FakeClock()
        simulated = Board(WAVES[load], clock, seed=seed, **BOARDS[board])
        starts = [int(1e9 * (1004 + 20 * random.Random(k).random())) for k in range(AT_ONCE * seed, AT_ONCE * (seed + 1))]
        windows = [(t0, t0 + int(seconds * 1e9)) for t0 in starts]
        whole, kept = recorded_windows(simulated, clock, 34, windows if told_edges else ())
        for (t0, t1), trace in list(zip(windows, kept or [whole] * AT_ONCE))[: count - AT_ONCE * seed]:
            yield told(simulated, trace, t0, t1)


def with_the_work(seconds: float, count: int, board: str) -> Windows:
    """Windows that the load waits for: 300 W inside, 70 W between them, half a millisecond of delay."""
    found = 0
    for seed in range(count):
        draw, parts, starts, now = random.Random(seed), [], [], 3.0
        pause = now + 100  # Board's time when a session begins is 100 s
        while now < 28:
            parts += [(pause, 70.0), (seconds, 300.0)]
            starts.append(now)
            pause = draw.uniform(0.6, 1.3)
            now += seconds + pause
        clock = FakeClock()
        simulated = Board(steps(*parts, (20.0, 70.0)), clock, seed=seed, **BOARDS[board])
        windows = [(t0, t0 + int(seconds * 1e9)) for t0 in (int(1e9 * (1000 + start + 0.0005)) for start in starts)]
        _, kept = recorded_windows(simulated, clock, 34, windows)
        for (t0, t1), trace in list(zip(windows, kept))[:AT_ONCE]:
            if found == count:
                return
            found += 1
            yield told(simulated, trace, t0, t1)


def told(board: Board, trace: Trace, t0: int, t1: int) -> tuple[float | None, float, float, tuple[str, ...]]:
    found = energy_between(trace, KEY, t0, t1)
    return found.joules, found.uncertainty_j or 0.0, board.true_j(t0, t1), tuple(found.reasons)


def cell(windows: Windows) -> str:
    """How many of the intervals hold the truth; bias and sd of the relative error; median half-width in median errors; and
    by how much all intervals could be narrower and still hold 95 %, which also says something where most errors are nothing.
    """
    every = list(windows)
    known = [(j, u, truth) for j, u, truth, _ in every if j is not None]
    if not known:
        return f"none ({', '.join(Counter(code for *_, codes in every for code in codes))})"
    joules, half, truth = np.array(known).T
    error = joules - truth
    percent = 100 * error / truth
    text = f"{100 * np.mean(abs(error) <= half):.0f} %, {np.mean(percent):+.2f} ± {np.std(percent):.2f} %"
    text += f", × {np.median(half) / max(np.median(abs(error)), 1e-6):.0f}"
    text += f", ÷ {1 / np.percentile(abs(error) / half, 95):.1f}"
    return text + (f", {len(every) - len(known)} absent" if len(known) < len(every) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=300, help="windows per cell")
    parser.add_argument("--out", type=Path, default=Path("data/bench-coverage.md"))
    args = parser.parse_args()
    pages = [
        "Intervals that hold the truth; mean error ± sd, % of the truth; × median half-width in median errors; "
        "÷ how much narrower all could be and hold 95 %."
    ]
    for name in BOARDS:
        lines = [[text, *(cell(at_random(load, s, args.windows, name)) for s in SECONDS)] for load, text in LOADS.items()]
        ends = [cell(with_the_work(s, args.windows, name)) for s in SECONDS]
        lines.append(["work that begins and ends with the window, 70 to 300 W", *ends])
        pages.append(table([name, *(f"{1000 * s:.0f} ms" if s < 1 else f"{s} s" for s in SECONDS)], lines))
        print(pages[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n\n".join(pages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
