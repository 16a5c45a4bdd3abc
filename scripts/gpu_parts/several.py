"""Where there are several GPUs: whether those that lem_kit reads are those that CUDA uses, and the load is on the right one.

The one idea: a new process for each way to choose GPUs. It asks CUDA for the UUIDs of what it got, lets the last of them
work in a window, and tells which boards lem_kit measured and what they drew.

Not covered: work on several GPUs at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .check import Check, Skip
from .facts import handle

ROOT = Path(__file__).resolve().parents[2]
CASE_S = 20.0

CHILD = """
import json, sys, time
import torch
import lem_kit as lem

told = {"cuda": [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]}
try:
    with lem.Session(sources=["nvml"]) as session:
        if told["cuda"]:
            device = torch.device("cuda", len(told["cuda"]) - 1)
            a = torch.ones(4096, 4096, device=device)
        session.wait_for_sources()
        time.sleep(3)
        with session.window("the last GPU works") as window:
            until = time.monotonic() + 2
            while time.monotonic() < until:
                if told["cuda"]:
                    for _ in range(10):
                        a @ a
                    torch.cuda.synchronize(device)
        m = window.measurement
    if "nvml" not in m.sources:
        raise lem.LemError(m.unavailable["nvml"])
    facts = m.sources["nvml"]
    told["cpu_share"], told["bystanders"] = m.meter["cpu_share"], facts["bystanders"]
    told["boards"] = {
        board["uuid"]: {
            "domain": f"nvml:{key}",
            "watts": None if (e := m.energy[f"nvml:{key}"]).joules is None else e.joules / m.duration_s,
            "half_w": None if e.uncertainty_j is None else e.uncertainty_j / m.duration_s,
        }
        for key, board in facts["gpus"].items()
    }
except lem.LemError as error:
    told["error"] = str(error)
print("told:" + json.dumps(told))
"""


def look(check: Check) -> None:
    """Every way to name GPUs, by number and by UUID, in both of CUDA's orders."""
    nvml, _ = handle()
    uuids = [nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(k)) for k in range(nvml.nvmlDeviceGetCount())]
    if len(uuids) < 2:
        raise Skip("there is one GPU here")
    last = uuids[-1]
    cases: list[tuple[str | None, str | None]] = [
        (None, None), ("0", None), ("1", None), ("1,0", None), ("1,0", "PCI_BUS_ID"), (last, None), (last[:12], None),
        (f"{last},{uuids[0]}", None), ("0,7", None), ("", None), ("7", None),
    ]  # fmt: skip
    rows = []
    for visible, order in cases:
        named = "not set" if visible is None else repr(visible)
        if check.allow(f"CUDA_VISIBLE_DEVICES {named}", CASE_S):
            rows.append(row(named, order, told(visible, order)))
            check.table("GPUs chosen", rows[-1:])
    right = sum(bool(r["right"]) for r in rows)
    check.headline("GPUs chosen: lem_kit reads those of CUDA, and the one that works draws most", f"{right} of {len(rows)}")


def told(visible: str | None, order: str | None) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=120)
    for line in done.stdout.splitlines():
        if line.startswith("told:"):
            return dict(json.loads(line.removeprefix("told:")))
    return {"cuda": [], "error": f"the process failed: {done.stderr[-400:]}", "failed": True}


def row(named: str, order: str | None, found: dict[str, Any]) -> dict[str, Any]:
    boards = found.get("boards", {})
    watts = {uuid: board["watts"] for uuid, board in boards.items()}
    if found.get("failed"):
        right = False
    elif not found["cuda"]:  # CUDA gets none: nothing is measured then, with a reason
        right = not boards and bool(found.get("error"))
    else:
        known = {uuid: w for uuid, w in watts.items() if w is not None}
        right = set(watts) == set(found["cuda"]) and bool(known) and max(known, key=known.__getitem__) == found["cuda"][-1]
    shown = [
        f"{b['domain']} {uuid[:12]}: {'unknown' if b['watts'] is None else format(b['watts'], '.1f')} W"
        + ("" if b["half_w"] is None else f" ± {b['half_w']:.1f}")
        for uuid, b in boards.items()
    ]
    share = found.get("cpu_share")
    return {
        "CUDA_VISIBLE_DEVICES": named,
        "CUDA_DEVICE_ORDER": order or "not set",
        "CUDA has": ", ".join(uuid[:12] for uuid in found["cuda"]),
        "lem_kit": "; ".join(shown) or found.get("error", ""),
        "bystanders": len(found.get("bystanders", [])),
        "sampler, % of a core": None if share is None else round(100 * share, 2),
        "right": right,
    }
