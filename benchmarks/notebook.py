"""What lem_kit costs a notebook's user in time and in the size of files: `make bench-notebook`.

    python benchmarks/notebook.py [--quick] [--starts N] [--pairs N] [--view-pairs N] [--json FILE.json]

The one idea: what a user waits for is timed where the user sits, at a client of a real kernel, from the request until the
kernel is idle again; what must be left out of it is timed inside and subtracted pair by pair, never assumed.

1. `%load_ext lem_kit`, the second cell of a fresh kernel, with every source that opens here. The first start is dropped: it
   fills the caches of files.
2. A cell with `pass` below `%%measure_energy`, minus the same cell without the magic, in pairs and in random order. Of the
   difference the wait for the counter is subtracted, which is the time that this very cell spent in `Sampler.settle`. The
   live view's thread is started and ended as it is in JupyterLab. A pause of random length before each cell, or else it
   would begin at the step of the counter at which the one before it ended. With an interval of the median.
3. A notebook with ten cards of five repeats each, tokens and a baseline, executed by nbclient, live views left on.
4. `lem report` on a copy of data/example, and of the 13 runs in its folder h100.
5. The live view in a decode loop, with the replayed counter: `benchmarks/live_view.py`, see there.

Settings of the machine's user (LEM_KIT_*, Jupyter's, IPython's) are left out. Not covered: the browser.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "data" / "example"
REPLAY = f"replay={EXAMPLE / 'power.csv'}"
CARDS, WARM_UPS, PERIOD_S = 10, 5, 0.1  # what the recording's counter needs for a step
USERS = re.compile(r"LEM_KIT_(?!CACHE)|JUPYTER|IPYTHON|JPY_|PLOTLY|PYTHON(STARTUP|PATH)")


class Row(NamedTuple):
    what: str
    found: float
    limit: float
    unit: str
    beside: str


class Kernel:
    """A real kernel, started in the repository as a notebook in a clone is, and what its cells take."""

    def __init__(self, sources: str | None = None) -> None:
        from jupyter_client.manager import start_new_kernel

        added = {"LEM_KIT_SOURCES": sources, "LEM_KIT_LIVE": "1"} if sources else {}
        quiet = ["--IPKernelApp.log_level=40"]
        self._manager, self._client = start_new_kernel(
            kernel_name="python3", env={**os.environ, **added}, cwd=str(ROOT), extra_arguments=quiet
        )

    def run(self, cell: str) -> tuple[float, str]:
        """Seconds until the kernel was idle again, and what the cell printed. RuntimeError where it raised."""
        shown: list[dict[str, Any]] = []
        began = time.perf_counter()
        reply = self._client.execute_interactive(cell, output_hook=shown.append, timeout=600, allow_stdin=False)
        seconds = time.perf_counter() - began
        if reply["content"]["status"] != "ok":
            raise RuntimeError("\n".join(reply["content"]["traceback"]))
        return seconds, "".join(m["content"]["text"] for m in shown if m["msg_type"] == "stream")

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def loading(starts: int) -> tuple[list[Row], dict[str, Any]]:
    bare, found = [], []
    opened = ""
    for _ in range(starts + 1):
        with Kernel() as kernel:
            bare.append(kernel.run("pass")[0])
            found.append(kernel.run("%load_ext lem_kit")[0])
            opened = kernel.run("print(*__import__('lem_kit').jupyter.session().sources, end='')")[1]
    bare, seconds = bare[1:], found[1:]
    middle, worst = statistics.median(seconds), max(seconds)
    told = f"median of {starts} starts; opens: {opened or 'no source'}; a kernel's first cell {statistics.median(bare):.3f}"
    rows = [Row("%load_ext lem_kit", middle, 0.3, "s", told), Row("  the slowest start", worst, 0.3, "s", "")]
    return rows, {"seconds": seconds, "first_start_s": found[0], "empty_cell_s": bare, "sources": opened.split()}


def empty_cells(name: str, sources: str, pairs: int) -> tuple[list[Row], dict[str, Any]]:
    setup = (
        "%load_ext lem_kit\nimport time\nfrom lem_kit.sampler import Sampler\nwaits, settle = [], Sampler.settle\n"
        "def timed(self, t_ns):\n    began = time.perf_counter()\n    settle(self, t_ns)\n"
        "    waits.append(time.perf_counter() - began)\nSampler.settle = timed"
    )
    cells = {True: "%%measure_energy\npass", False: "pass"}
    chance = random.Random(0)
    taken: dict[bool, list[float]] = {True: [], False: []}
    with Kernel(sources) as kernel:
        kernel.run(setup)
        time.sleep(2)  # the counter's period is known by then
        for _ in range(pairs + WARM_UPS):
            for measured in chance.sample((True, False), 2):
                time.sleep(chance.uniform(0, PERIOD_S))
                taken[measured].append(kernel.run(cells[measured])[0])
        waits = json.loads(kernel.run("print(waits)")[1])
    assert len(waits) == pairs + WARM_UPS, "a cell waited more than once, or not at all"
    costs = [1e3 * (with_it - wait - bare) for with_it, wait, bare in zip(taken[True], waits, taken[False])]
    first, costs, waits = costs[0], sorted(costs[WARM_UPS:]), waits[WARM_UPS:]
    half = math.ceil(0.98 * math.sqrt(pairs))
    low, high = costs[max(pairs // 2 - half, 0)], costs[min(pairs // 2 + half, pairs - 1)]
    middle, p95 = statistics.median(costs), costs[math.ceil(0.95 * pairs) - 1]
    bare_ms, wait_ms = 1e3 * statistics.median(taken[False]), 1e3 * statistics.median(waits)
    told = f"[{low:.2f}, {high:.2f}], 95th percentile {p95:.2f}, the first one {first:.0f}; {pairs} pairs; "
    told += f"without the magic {bare_ms:.1f}; waits subtracted {wait_ms:.1f}, {1e3 * max(waits):.1f} at most"
    facts = {"cost_ms": [middle, low, high], "p95_ms": p95, "first_ms": first, "pairs": pairs, "without_ms": bare_ms}
    facts |= {"wait_median_ms": wait_ms, "wait_worst_ms": 1e3 * max(waits), "differences_ms": costs}
    return [Row(f"an empty measured cell, {name}", middle, 5, "ms", told)], facts


def ten_cards(folder: Path, seconds: float) -> tuple[list[Row], dict[str, Any]]:
    import nbformat
    from nbclient import NotebookClient

    cell = (
        "%%measure_energy -o m{n} --repeat 5 --warmup 1 --tokens 32 --baseline --label 'the cell with number {n}'\n"
        f"time.sleep({seconds})"
    )
    document = nbformat.v4.new_notebook()
    sources = ["%load_ext lem_kit\nimport time", *(cell.replace("{n}", str(n)) for n in range(CARDS))]
    document.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    quiet = ["--IPKernelApp.log_level=40"]
    client = NotebookClient(
        document, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}, extra_arguments=quiet
    )
    client.execute(env={**os.environ, "LEM_KIT_SOURCES": REPLAY, "LEM_KIT_LIVE": "1"})
    outputs = [output for cell in document.cells for output in cell.outputs]
    cards = [output for output in outputs if "lem_kit" in output.get("metadata", {})]
    assert len(cards) == CARDS and all("data:image" in card["data"]["text/html"] for card in cards), "a card is missing"
    path = folder / "cards.ipynb"
    nbformat.write(document, str(path))
    size, each = path.stat().st_size / 1e3, [len(json.dumps(card)) / 1e3 for card in cards]
    told = f"a card is {statistics.median(each):.1f} kB; {len(outputs) - CARDS} other outputs"
    return [Row(f"a notebook with {CARDS} cards", size, 200, "kB", told)], {"size_kb": size, "card_kb": each}


def reports(folder: Path, which: list[str]) -> tuple[list[Row], dict[str, Any]]:
    shutil.copytree(EXAMPLE, folder / "example")
    lem = str(Path(sys.executable).with_name("lem"))
    rows, facts = [], {}
    for name in which:
        place = folder / "example" / name
        began = time.perf_counter()
        subprocess.run([lem, "report", str(place)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds, size = time.perf_counter() - began, (place / "report.html").stat().st_size / 1e6
        runs = len(list(place.glob("*/run.json")))
        rows.append(
            Row(f"report of data/example/{name}".rstrip("/"), size, 6, "MB", f"{runs} runs; made in {seconds:.0f} s")
        )
        facts[name or "example"] = {"size_mb": size, "runs": runs, "seconds": seconds}
    return rows, facts


def view(folder: Path, pairs: int, seconds: float) -> tuple[list[Row], dict[str, Any]]:
    path = folder / "view.json"
    script = str(Path(__file__).with_name("live_view.py"))
    asked = ["--pairs", str(pairs), "--seconds", str(seconds), "--json", str(path)]
    replayed = {**os.environ, "LEM_KIT_SOURCES": REPLAY}  # a meter that reads from the first window on
    subprocess.run([sys.executable, script, *asked], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=replayed)
    found = json.loads(path.read_text(encoding="utf-8"))
    cost, low, high = (100 * share for share in found["cost"])
    told = f"[{low:.2f}, {high:.2f}]; {pairs} pairs, {found['tokens_per_s']:.0f} tokens/s"
    return [Row("the live view, of tokens/s", cost, 1, "%", told)], {**found, "pairs": pairs, "seconds": seconds}


def alone(folder: Path) -> None:
    """Leave out what the user of this machine has set."""
    for name in [name for name in os.environ if USERS.match(name)]:
        del os.environ[name]
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        os.environ[name] = str(folder / name.lower())
        (folder / name.lower()).mkdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything, under a minute")
    parser.add_argument("--starts", type=int, help="of a kernel (20)")
    parser.add_argument("--pairs", type=int, help="of empty cells (200)")
    parser.add_argument("--view-pairs", type=int, help="of windows with and without a view (60)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    starts, pairs, view_pairs, seconds = (3, 20, 8, 0.5) if options.quick else (20, 200, 60, 1.5)
    with tempfile.TemporaryDirectory(prefix="bench-notebook-") as scratch:
        folder = Path(scratch)
        alone(folder)
        load_before = os.getloadavg()
        parts = [
            ("load_ext", lambda: loading(options.starts or starts)),
            ("empty_cell_no_source", lambda: empty_cells("no source", "none", options.pairs or pairs)),
            ("empty_cell_replay", lambda: empty_cells("a replayed counter", REPLAY, options.pairs or pairs)),
            ("ten_cards", lambda: ten_cards(folder, 0.1 if options.quick else 0.4)),
            ("report", lambda: reports(folder, [""] if options.quick else ["", "h100"])),
            ("live_view", lambda: view(folder, options.view_pairs or view_pairs, seconds)),
        ]
        facts: dict[str, Any] = {}
        print(f"{'':<44} {'found':>9}  {'wanted':<9}", flush=True)
        for name, part in parts:
            rows, facts[name] = part()
            for row in rows:
                limit = f"< {row.limit:g} {row.unit}"
                missed = "" if row.found < row.limit else "MISSED  "
                print(f"{row.what:<44} {row.found:9.3g}  {limit:<9} {missed}{row.beside}", flush=True)
    versions = {name: version(name) for name in ("ipython", "ipykernel", "jupyter-client")}
    load = {"before": load_before, "after": os.getloadavg(), "cpus": os.cpu_count()}
    loads = f"{load_before[0]:.2f} before, {load['after'][0]:.2f} after"
    print(f"load of the last minute {loads}, on {load['cpus']} CPUs; {versions}")
    if options.json:
        found = {"python": sys.version.split()[0], "versions": versions, "load": load, "quick": options.quick, **facts}
        options.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
