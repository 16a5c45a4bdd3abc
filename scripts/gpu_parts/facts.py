"""What machine this is, what its driver answers, and what it draws when idle."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from lem_kit import environment
from lem_kit.energy import describe, open_source
from lem_kit.errors import LemError

from .check import Check, Skip

# Fields of interest, with the scopes 0 GPU, 1 module, 2 memory.
FIELDS = {83: "total energy", 191: "energy", 185: "power, average", 186: "power, instant"}
SCOPES = {0: "GPU", 1: "module", 2: "memory"}


def record(check: Check) -> None:
    """`lem doctor`, the environment record, every board, and which NVML fields answer."""
    doctor = subprocess.run(
        [sys.executable, "-c", "import sys; from lem_kit.cli import main; sys.exit(main(['doctor']))"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    check.fact("doctor", doctor.stdout.splitlines())
    check.fact("doctor_status", doctor.returncode)
    if doctor.returncode:
        check.fact("doctor_stderr", doctor.stderr.splitlines()[-20:])
    check.fact("environment", environment.describe())
    nvml, board = handle()
    every = ",".join(str(number) for number in range(nvml.nvmlDeviceGetCount()))
    source = open_source(f"nvml={every}")
    try:
        facts = describe(source)
    finally:
        source.close()
    check.fact("nvml", facts)
    check.fact("limits_w", limits(nvml, board))
    check.table("fields", fields(nvml, board))
    seen = list(facts["gpus"].values())
    check.headline("GPU", f"{len(seen)} x {seen[0]['name']}, driver {facts['driver_version']}")
    check.headline("power limit, MIG", f"{seen[0]['power_limit_w']} W, MIG {'on' if seen[0]['mig_mode'] else 'off'}")


def handle() -> tuple[Any, Any]:
    """pynvml, initialised, and the board that is checked: the first that this process may see."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise Skip("nvidia-ml-py is not installed") from None
    try:
        source = open_source("nvml")
    except LemError as error:
        raise Skip(str(error)) from None
    try:
        uuid = next(iter(source.describe()["gpus"].values()))["uuid"]  # type: ignore[attr-defined]
    finally:
        source.close()
    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)


def limits(nvml: Any, board: Any) -> dict[str, Any]:
    """What bounds the board's power and clocks. Read, never set."""
    questions = {
        "power_enforced_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(board) / 1000,
        "power_default_w": lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(board) / 1000,
        "power_range_w": lambda: [w / 1000 for w in nvml.nvmlDeviceGetPowerManagementLimitConstraints(board)],
        "sm_clock_most_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(board, nvml.NVML_CLOCK_SM),
        "memory_clock_most_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(board, nvml.NVML_CLOCK_MEM),
        "applications_clock_mhz": lambda: nvml.nvmlDeviceGetApplicationsClock(board, nvml.NVML_CLOCK_SM),
        "virtualization": lambda: nvml.nvmlDeviceGetVirtualizationMode(board),
        "compute_mode": lambda: nvml.nvmlDeviceGetComputeMode(board),
    }
    return {name: answer(nvml, ask) for name, ask in questions.items()}


def answer(nvml: Any, ask: Any) -> Any:
    try:
        return ask()
    except (nvml.NVMLError, AttributeError) as error:
        return f"no: {error}"


def fields(nvml: Any, board: Any) -> list[dict[str, Any]]:
    """One row for each field and scope: its value or why there is none."""
    rows = []
    for number, name in FIELDS.items():
        for scope, of in SCOPES.items():
            try:
                found = nvml.nvmlDeviceGetFieldValues(board, [(number, scope)])[0]
                good = found.nvmlReturn == 0
                value = found.value.ullVal if number in (83, 191) else found.value.uiVal
                said = value if good else str(nvml.NVMLError(found.nvmlReturn))
            except nvml.NVMLError as error:
                said = str(error)
            rows.append({"field": number, "name": name, "scope": of, "answer": said})
    return rows


def idle(check: Check) -> None:
    """Power of this process without CUDA, and with CUDA and no model. The third baseline is taken with each model."""
    handle()
    seconds = check.seconds(4, 2)
    rows = []
    for kind in ("bare", "context"):
        if kind == "context":
            check.cuda()
        with check.session() as session:
            for number in range(check.repeats):
                m = session.idle(seconds, kind=kind, label=f"idle {kind}")
                rows.append(idle_row(m, kind, number + 1))
            check.baselines.update(session.baselines)
    check.table("idle", rows)
    for kind in ("bare", "context"):
        watts = [f"{row['counter W']:.1f}" for row in rows if row["baseline"] == kind and row["counter W"]]
        check.headline(f"idle, {kind}", " / ".join(watts) + " W" if watts else "not available")


def idle_row(m: Any, kind: str, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"baseline": kind, "pass": number, "s": m.duration_s}
    for name, energy in by_method(m.energy).items():
        row[f"{name} W"] = energy.joules / m.duration_s if energy.joules else None
        row[f"{name} ± W"] = energy.uncertainty_j / m.duration_s if energy.joules else None
    return row | {"reasons": ", ".join(m.reasons)}


def by_method(energy: Any) -> dict[str, Any]:
    """The board's two figures: "counter" and "integral"."""
    return {e.method: e for e in energy.values() if e.source in ("nvml", "nvml_power")}
