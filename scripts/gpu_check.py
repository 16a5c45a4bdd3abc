"""Everything lem_kit promises, tried on the NVIDIA GPU of this machine in one call of less than nine minutes.

    python scripts/gpu_check.py --out FOLDER                 everything, twice where time allows
    python scripts/gpu_check.py --out FOLDER --quick         the same in outline, about 90 s
    python scripts/gpu_check.py --out FOLDER --part sensor   one part (repeat the option for more)
    python scripts/gpu_check.py --out FOLDER --against EARLIER/results.json      everything, and how well it repeats

FOLDER gets results.md, results.json, log.txt and runs.tar.gz (every run folder, and what was polled). The last thing printed
is a short table. The card's settings are read and never changed; nothing is downloaded. What a part could not do stands in
the results with its reason, and a part that fails costs the others nothing.

Not covered: work on more than one GPU. The first that this process may see is checked; where there are
several, that the right ones are read.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # this checkout's lem_kit, whether installed or not
# torch then asks NVML, and not CUDA, whether there is a GPU: the bare baseline must be taken before CUDA runs.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from gpu_parts import MODEL_PARTS, PARTS, tables  # noqa: E402
from gpu_parts.check import Check  # noqa: E402

GRACE_S = 20  # beyond the deadline, after which what there is is written and the process ends


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="about 90 s instead of 505")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; may be given more than once")
    parser.add_argument("--repeat", type=int, metavar="N", help="how often each thing is measured (2; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="the time for all of it; parts that need more are left out by name")
    parser.add_argument("--model", action="append", metavar="NAME", help="models to run, small ones first")
    parser.add_argument("--against", type=Path, metavar="RESULTS.json", help="an earlier run, to show repeatability")
    parser.add_argument("--anywhere", action="store_true", help="run models without CUDA too, to try this script")
    parser.add_argument("--pack", action=argparse.BooleanOptionalAction, default=True, help="run folders in one archive")
    return parser.parse_args(arguments)


def choose_gpu() -> None:
    """One GPU for NVML and CUDA alike, by its UUID, before either has started."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return
    try:
        import pynvml

        pynvml.nvmlInit()
        os.environ["CUDA_VISIBLE_DEVICES"] = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
        pynvml.nvmlShutdown()
    except Exception as error:  # the parts say it better
        print(f"no GPU was chosen: {error}", file=sys.stderr)


def models_run(check: Check) -> bool:
    """Whether the parts that run models can do so here."""
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return check.anywhere or torch.cuda.is_available()


def build_models(check: Check) -> Callable[[], None]:
    """Start building the models in another process, off the GPU, while sensors are looked at; returns what waits for it."""
    code = "import sys; from lem_kit import models\nfor name in sys.argv[1:]: print(models.resolve(name), flush=True)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", code, *check.models]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    atexit.register(process.kill)

    def wait() -> None:
        said, _ = process.communicate(timeout=max(check.left_s(), 30))
        check.models_ready = lambda: None
        check.say(f"models: {' '.join(said.split()[-len(check.models) :])}")
        if process.returncode:
            raise RuntimeError(f"the models could not be built: {said.strip()[-800:]}")

    return wait


def compare(check: Check, earlier: Path) -> None:
    rows = tables.against(check.results, json.loads(earlier.read_text(encoding="utf-8")))
    check.table(f"against {earlier}", rows)
    ratios = sorted(row["J/token, this/earlier"] for row in rows if row["J/token, this/earlier"] is not None)
    if ratios:
        said = f"{ratios[0]:.4f} to {ratios[-1]:.4f}, median {ratios[len(ratios) // 2]:.4f}, of {len(ratios)}"
        check.headline("J/token, this run over the earlier one", said)


def finish(check: Check, packing: bool) -> None:
    from lem_kit import environment

    check.results["agreement"] = tables.agreement(m for session in check.sessions for m in session.measurements)
    check.results["seconds"] = round(time.monotonic() - check.began, 1)
    check.results["packages"] = environment.loaded_versions()
    if packing:
        archive = tables.pack(check.out)
        check.results["archive_bytes"] = archive.stat().st_size
    tables.write(check.out, check.results)
    check.say(f"done in {check.results['seconds']} s")
    print("\n" + tables.short(check.results), flush=True)


def watch(check: Check, packing: bool) -> threading.Timer:
    """What hangs must not cost what was measured: past the deadline the results are written and the process ends."""

    def end() -> None:
        check.results["cut_off"] = True
        check.say("past the deadline: what was measured is written, and the process ends")
        try:
            finish(check, packing)
        finally:
            os._exit(3)

    timer = threading.Timer(check.deadline - time.monotonic() + GRACE_S, end)
    timer.daemon = True
    timer.start()
    return timer


def main(arguments: list[str] | None = None) -> int:
    """0 when every part was done or skipped, 1 when one failed."""
    asked = options(arguments)
    check = Check(asked)
    parts = [name for name in PARTS if not asked.part or name in asked.part]
    choose_gpu()
    timer = watch(check, asked.pack)
    with_models = models_run(check)
    if with_models and MODEL_PARTS & set(parts):
        check.models_ready = build_models(check)
    for number, name in enumerate(parts):
        later = [part for part in parts[number + 1 :] if with_models or part not in MODEL_PARTS]
        if check.quick and not asked.part:
            later = [part for part in later if part != "compile"]  # it never fits
        check.keep_for_later(sum(PARTS[part][1] for part in later))
        with check.part(name):
            PARTS[name][0](check)
        tables.write(check.out, check.results)
    if asked.against is not None:
        with check.part("against"):
            compare(check, asked.against)
    timer.cancel()
    finish(check, asked.pack)
    return int(any(part["status"] == "failed" for part in check.results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
