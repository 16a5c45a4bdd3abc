"""How far lem_kit, Zeus and CodeCarbon are from the truth, side by side on simulated boards: `make bench-energy`.

    python benchmarks/energy.py [--quick] [--out FILE.md] [--json FILE.json]

The one idea: the boards' true power is a formula, so the truth of any interval is exact; and it depends on the machine's
clock only, so tools in several processes measure the same hardware at the same instants. Each tool has a process of its own,
for three reasons: its CPU time can be told, it does not wait for the others' interpreter lock or driver calls, and a load
that begins when a window opens can follow its own window.

Not covered: what real boards do differently from the model (gain and offset of the sensor), several GPUs in one window.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tables

HERE = Path(__file__).parent
TOOLS = ("lem_kit", "Zeus", "CodeCarbon", "CodeCarbon task")
FAULTS = {
    "wrap32": "counter wraps at 32 bits",
    "restart": "counter restarts at 0",
    "frozen": "counter frozen",
    "lost": "GPU lost",
    "uuid": "CUDA_VISIBLE_DEVICES=GPU-<uuid>",
}
FAULT_WINDOW_S = 3.03
# Lengths are no multiples of a refresh period, with which a constant load looks exact.
FULL = {"const": {}, "square": {10.03: 3}, "sine": {}, "llm": {10.03: 3}, "in step": {}, "aligned": {}}
FULL_LENGTHS = {0.05: 50, 0.23: 32, 1.07: 12}
QUICK = {"square": {}, "llm": {}, "aligned": {}}
QUICK_LENGTHS = {0.05: 10, 0.23: 10, 1.07: 4}
# Between windows: longer than a tool needs to finish one, plus a random part of several refresh periods.
PAUSE_S, PHASE_S = 0.35, 0.3


def plan(waves: dict[str, dict[float, int]], lengths: dict[float, int], seed: int) -> list[list[tuple[str, float, float]]]:
    """Per wave its windows: (wave, seconds after the start, length)."""
    chance = random.Random(seed)
    planned = []
    for wave, more in waves.items():
        at_s, windows = 2.0, []
        for length_s, number in {**lengths, **more}.items():
            for _ in range(number):
                windows.append((wave, at_s, length_s))
                at_s += length_s + PAUSE_S + PHASE_S * chance.random()
        planned.append(windows)
    return planned


def environment(folder: Path) -> dict[str, str]:
    """Variables for the tools' processes. CodeCarbon looks for nvidia-smi before it believes in a GPU."""
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 0\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    return {**kept, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}


def start(tool: str, what: str, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), tool, what, "1", *more],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
    )  # fmt: skip


def answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    line = worker.stdout.readline() if worker.stdout else ""
    if not line:
        raise SystemExit(f"{' '.join(map(str, worker.args[2:]))} died: run it by hand to see why")  # type: ignore[index]
    return dict(json.loads(line))


def run_board(board: str, planned: list[list[tuple[str, float, float]]], env: dict[str, str]) -> tuple[list[Any], list[Any]]:
    """All tools over all windows of one board, each tool in its process, at the same instants."""
    workers = {tool: start(tool, board, env) for tool in TOOLS}
    for worker in workers.values():
        answer(worker)
    rows, background = [], []
    for windows in planned:
        now = time.monotonic_ns()
        command = json.dumps([(wave, now + round(at_s * 1e9), length_s) for wave, at_s, length_s in windows])
        for worker in workers.values():
            print(command, file=worker.stdin, flush=True)
        for tool, worker in workers.items():
            told = answer(worker)
            rows += [{"board": board, "tool": tool, **row} for row in told["rows"]]
            background.append({"board": board, "tool": tool, "wave": windows[0][0], "share": told["background_share"]})
    for worker in workers.values():
        worker.communicate()
    return rows, background


def run_fault(fault: str, env: dict[str, str]) -> list[Any]:
    """One fault, all tools at once."""
    rows = []
    workers = {tool: start(tool, fault, env, str(FAULT_WINDOW_S)) for tool in TOOLS}
    for tool, worker in workers.items():
        rows += [{"tool": tool, "fault": FAULTS[fault], **row} for row in answer(worker)["rows"]]
        worker.communicate()
    return rows


def run_costs(env: dict[str, str], folder: Path) -> list[Any]:
    """The sampler alone: one board, eight, and these with three more sources."""
    sys.path.insert(0, str(HERE.parent / "tests" / "machines"))
    from powercap import zone

    zone(folder / "powercap", "intel-rapl:0", "package-0", 5_000_000)
    recording = folder / "recording.csv"
    recording.write_text("t_s,cpu\n0,0\n3600,3600\n")
    others = [f"rapl={folder / 'powercap'}", f"replay={recording}", "codecarbon"]
    found = []
    for number, more in ((1, []), (8, []), (8, others)):
        worker = start("lem_kit", "cost", env, str(number), "8", *more)
        found.append({"boards": number, **answer(worker)})
        worker.communicate()
    return found


def report(result: dict[str, Any]) -> str:
    rows = result["rows"]
    parts = [
        "# Energy of simulated GPUs: lem_kit, Zeus, CodeCarbon",
        ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + f"; {result['cpus']} CPUs, load {result['load'][0]:.1f} before and {result['load'][1]:.1f} after; "
        f"{result['seconds']:.0f} s.",
        "Each cell: mean error ± standard deviation in % of the true energy, over windows at random phases; then the share "
        "of windows with 0 J, and of those for which the tool gave no figure.",
    ]
    for board in dict.fromkeys(row["board"] for row in rows):
        parts += [f"## {board}", tables.accuracy(rows, board)]
    parts += [
        "## lem_kit's intervals",
        "Share of the 95 % intervals that hold the truth; median half-width over median error; median half-width in % of "
        "the truth. The truth is here that of the window as its record states it, which is "
        f"{tables.longer_us(rows)} us longer (median) than the block that all tools are held against above.",
        tables.honesty(rows),
        "## No figure, and why",
        tables.absences(rows),
        "## Cost",
        "Median (95th percentile) of the time that a window's begin and end take the user's thread, including the simulated "
        "driver's own time; and the CPU time of all other threads as a share of one core.",
        tables.costs(rows, result["background"]),
        tables.sampler(result["sampler"]),
        f"## Faults, half-way through a window of {FAULT_WINDOW_S:g} s at 200 W",
        tables.faults(result["faults"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer loads and windows: about two minutes")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--json", type=Path, help="write the raw rows here")
    parser.add_argument("--seed", type=int, default=1, help="of the windows' phases")
    asked = parser.parse_args()
    waves, lengths = (QUICK, QUICK_LENGTHS) if asked.quick else (FULL, FULL_LENGTHS)
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:  # two of each at a time: few CPUs suffice
        env = environment(Path(name))
        sampler = run_costs(env, Path(name))
        planned = plan(waves, lengths, asked.seed)
        parts = list(pool.map(run_board, ("h100", "v100"), [planned] * 2, [env] * 2))
        faults = [row for rows in pool.map(run_fault, FAULTS, [env] * len(FAULTS)) for row in rows]
    packages = {"lem_kit": "lem-kit", "Zeus": "zeus", "CodeCarbon": "codecarbon", "nvidia-ml-py": "nvidia-ml-py"}
    result = {
        "versions": {name: version(package) for name, package in packages.items()},
        "cpus": os.cpu_count(),
        "load": [load, os.getloadavg()[0]],
        "seconds": time.monotonic() - began,
        "rows": [row for rows, _ in parts for row in rows],
        "background": [row for _, rows in parts for row in rows],
        "sampler": sampler,
        "faults": faults,
    }
    text = report(result)
    print(text)
    if asked.out:
        asked.out.write_text(text)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
