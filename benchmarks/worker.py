"""One tool in a process of its own, with simulated boards of its own: reads commands from stdin, answers on stdout, in JSON.

The boards are computed from CLOCK_MONOTONIC, so those of one description are the same hardware in every process; only an
"aligned" load differs, which follows this process's own windows. A window's truth is the exact energy from the instant at
which `begin` returned to the one at which `end` was called.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fake_nvml import (  # noqa: E402
    Board,
    Const,
    Sine,
    Square,
    Wave,
    alias,
    boards,
    frozen,
    h100,
    llm_bursts,
    lost,
    reset,
    v100,
    wrap32,
)
from tools import TOOLS  # noqa: E402

BOARDS = {"h100": h100, "v100": v100}
LOW, HIGH = Const(70.0), Const(300.0)
WAVES: dict[str, Wave] = {
    "const": Const(200.0),
    "square": Square(70.0, 300.0, 0.83),
    "sine": Sine(185.0, 115.0, 0.83),
    "llm": llm_bursts(),
    "in step": alias(70.0, 300.0),
    "aligned": LOW,
}
FAULTS = {"restart": reset, "lost": lost, "frozen": frozen}
# The counter of 32 bits wraps this long after the boards are made: by then the tool has been opened.
WRAP_AFTER_S = 16.0


def sleep_until(t_ns: int) -> None:
    while (rest_s := (t_ns - time.monotonic_ns()) / 1e9) > 0:
        time.sleep(rest_s)


def background_s() -> dict[str, float]:
    """CPU seconds of each thread of this process but the main one, by its Python name."""
    spent: dict[str, float] = {}
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            try:
                nanoseconds = int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
            except OSError:
                continue
            spent[thread.name] = spent.get(thread.name, 0.0) + nanoseconds / 1e9
    return spent


def measure(name: str, tool: Any, board: Board, length_s: float, wave: str = "", fault: str = "") -> list[dict[str, Any]]:
    """One window, and what the tool says of it."""
    row: dict[str, Any] = {"length_s": length_s, "wave": wave, "figure": name}
    cpu_s = time.thread_time()
    try:
        called = time.monotonic_ns()
        tool.begin()
        t0 = time.monotonic_ns()
        if wave == "aligned":
            t0 = board.draw(HIGH)
        if fault in FAULTS:
            board.fail(FAULTS[fault](), from_ns=t0 + round(0.5e9 * length_s))
        sleep_until(t0 + round(length_s * 1e9))
        if wave == "aligned":
            board.draw(LOW)
        t1 = time.monotonic_ns()
        tool.end()
        row |= {"begin_s": (t0 - called) / 1e9, "end_s": (time.monotonic_ns() - t1) / 1e9}
        row |= {"t0_ns": t0, "t1_ns": t1, "truth_j": board.energy_j(t0, t1), "cpu_s": time.thread_time() - cpu_s}
        figures = tool.figures()
        t0, t1 = getattr(tool, "stated", (t0, t1))
        row |= {"stated_j": board.energy_j(t0, t1), "longer_s": (t1 - t0 - row["t1_ns"] + row["t0_ns"]) / 1e9}
    except Exception as error:
        return [row | {"joules": None, "uncertainty_j": None, "reasons": [f"{type(error).__name__}: {error}"]}]
    return [
        row | {"figure": figure, "joules": joules, "uncertainty_j": u, "reasons": reasons}
        for figure, (joules, u, reasons) in figures.items()
    ]


def run_grid(name: str, tool: Any, board: Board, windows: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Windows of (wave, instant to open, length); the CPU time of everything but the windows' own thread beside them."""
    rows: list[dict[str, Any]] = []
    now = ""
    began, process_s, own_s = time.monotonic(), time.process_time(), time.thread_time()
    for wave, open_ns, length_s in windows:
        if wave != now:
            board.draw(WAVES[wave])
            now = wave
        sleep_until(open_ns)
        rows += measure(name, tool, board, length_s, wave)
    others_s = (time.process_time() - process_s) - (time.thread_time() - own_s)
    return {"rows": rows, "background_share": others_s / (time.monotonic() - began)}


def run_fault(name: str, fault: str, length_s: float) -> dict[str, Any]:
    """One window on a new board at 200 W with something going wrong in its middle. A neighbour draws 100 W."""
    board = h100(uuid="GPU-bbbbbbbb-0000-4000-8000-000000000000", wave=Const(200.0))
    others = [h100(wave=Const(100.0))] if fault == "uuid" else []
    if fault == "uuid":
        os.environ["CUDA_VISIBLE_DEVICES"] = board.uuid
    with boards([*others, board]):
        if fault == "wrap32":
            wraps_ns = time.monotonic_ns() + round(WRAP_AFTER_S * 1e9)
            board.fail(wrap32(wraps_ns), from_ns=0)
        try:
            tool = TOOLS[name]()
        except Exception as error:
            return {"rows": [{"figure": name, "joules": None, "reasons": [f"{type(error).__name__}: {error}"]}]}
        time.sleep(2)
        if fault == "wrap32":
            opens_ns = wraps_ns - round(0.5e9 * length_s)
            if time.monotonic_ns() > opens_ns:
                raise SystemExit(f"this machine took more than {WRAP_AFTER_S} s to open {name}: make WRAP_AFTER_S longer")
            sleep_until(opens_ns)
        rows = measure(name, tool, board, length_s, fault=fault)
        tool.close()
    return {"rows": rows}


def run_cost(number: int, others: list[str], seconds: float) -> dict[str, Any]:
    """CPU share of each background thread of a lem_kit session that reads `number` boards and other sources, at first and
    once it knows its counters; and what windows that do not wait take of the user's time."""
    phases = [0.037 * k % 0.1 for k in range(number)]  # each counter is refreshed at instants of its own
    with boards([h100(wave=Square(70.0, 300.0, 0.83, phase_s=0.1 * k), counter_phase_s=phases[k]) for k in range(number)]):
        tool = TOOLS["lem_kit"](["nvml", *others])  # type: ignore[call-arg]
        spent = [background_s()]
        for _ in range(2):
            time.sleep(seconds)
            spent.append(background_s())
        took = [not_waiting(tool.session) for _ in range(50)]
        sources = tool.session.sources
        tool.close()
    first, later = (
        {name: (s - before.get(name, 0.0)) / seconds for name, s in after.items()}
        for before, after in itertools.pairwise(spent)
    )
    return {"seconds": seconds, "first": first, "share": later, "sources": sources, "not_waiting_s": took}


def not_waiting(session: Any) -> tuple[float, float]:
    """Begin and end of a window of 50 ms that does not wait for its counters."""
    context = session.window("benchmark", wait=False)
    began = time.perf_counter()
    context.__enter__()
    begin_s = time.perf_counter() - began
    time.sleep(0.05)
    began = time.perf_counter()
    context.__exit__(None, None, None)
    end_s = time.perf_counter() - began
    time.sleep(0.2)
    return begin_s, end_s


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tools print is no answer
    name, preset, seed = sys.argv[1:4]
    random.seed(int(seed))
    if preset in BOARDS:
        board = BOARDS[preset](wave=WAVES["const"])
        with boards([board]):
            tool = TOOLS[name]()
            print(json.dumps({"ready": True}), file=answers, flush=True)
            for line in sys.stdin:
                print(json.dumps(run_grid(name, tool, board, json.loads(line))), file=answers, flush=True)
            tool.close()
    elif preset == "cost":
        number, seconds, *others = sys.argv[4:]
        print(json.dumps(run_cost(int(number), others, float(seconds))), file=answers, flush=True)
    else:
        print(json.dumps(run_fault(name, preset, float(sys.argv[4]))), file=answers, flush=True)


if __name__ == "__main__":
    main()
