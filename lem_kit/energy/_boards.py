"""The NVIDIA boards of this machine: which there are, which of them this process may see, and who works on them.

The one idea: CUDA_VISIBLE_DEVICES is read as CUDA reads it, without starting CUDA. `library` is the module of nvidia-ml-py,
initialised. Not covered: what the boards draw (the source that this is a part of).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import environment
from ..errors import Unavailable


class Board(NamedTuple):
    number: int  # in the driver's order, that of the PCI bus, which need not be CUDA's
    handle: Any
    name: str
    uuid: str
    gain: float = 1.0
    offset_w: float = 0.0

    def __str__(self) -> str:
        return f"GPU {self.number} ({self.name}, {self.uuid})"


def no_driver(library: Any, error: Exception, sys_root: Path = Path("/")) -> tuple[str, str]:
    """What it means that the library could not be initialised, and the remedy."""
    contained = environment.container(sys_root) is not None
    give = "start the container with --gpus all (Kubernetes: nvidia.com/gpu: 1 under resources: limits:)"
    code = getattr(error, "value", None)
    if code == library.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no NVIDIA driver here (libnvidia-ml.so.1 is not found)", (
            give if contained else "if `lspci | grep -i nvidia` shows a GPU, install its driver"
        )
    if code == library.NVML_ERROR_DRIVER_NOT_LOADED:
        return f"the NVIDIA driver does not answer ({error})", give if contained else "sudo modprobe nvidia"
    if code == library.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        modules = "nvidia_uvm nvidia_drm nvidia_modeset nvidia"
        return (
            "the NVIDIA driver does not answer: its library is of another version than the kernel module that is loaded",
            "start the container anew, or reboot its host"
            if contained
            else f"sudo reboot, or sudo rmmod {modules} && sudo modprobe nvidia",
        )
    if code == library.NVML_ERROR_NO_PERMISSION:
        return f"this process may not open the NVIDIA driver ({error})", (
            give if contained else "`ls -l /dev/nvidia*` shows the group that may: sudo usermod -aG GROUP $USER"
        )
    return f"the NVIDIA driver does not answer ({error})", "look at what `nvidia-smi` says"


def all_boards(library: Any, calibrations: Mapping[str, tuple[float, float]]) -> tuple[list[Board], dict[str, str]]:
    """Every board that answers, and why the others do not: one dead GPU must not hide its neighbours."""
    boards: list[Board] = []
    silent: dict[str, str] = {}
    for number in range(library.nvmlDeviceGetCount()):
        try:
            handle = library.nvmlDeviceGetHandleByIndex(number)
            uuid = library.nvmlDeviceGetUUID(handle)
            boards.append(Board(number, handle, library.nvmlDeviceGetName(handle), uuid, *calibrations.get(uuid, ())))
        except library.NVMLError as error:
            silent[f"gpu{number}"] = f"GPU {number} does not answer: {error}"
    return boards, silent


def chosen(
    library: Any, boards: Sequence[Board], wanted: str | None, strict: bool = False
) -> tuple[list[tuple[Board, str]], str]:
    """The boards that a CUDA_VISIBLE_DEVICES of `wanted` leaves visible, each with a note for its label; and what cuts it
    short, as `visible` tells it. Unavailable where none is left, and when `strict` where anything cuts it short."""
    if wanted is None:
        return [(board, "") for board in boards], ""
    found, fault = visible(library, boards, wanted)
    asked = repr(wanted) if strict else f"CUDA_VISIBLE_DEVICES={wanted!r}"
    if fault and (strict or not found):
        raise Unavailable(f"NVML: {asked}: {fault}", "`nvidia-smi -L` lists the GPUs")
    if not found:
        raise Unavailable(f"NVML: {asked} hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    return found, fault


def visible(library: Any, boards: Sequence[Board], wanted: str) -> tuple[list[tuple[Board, str]], str]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES: each board once, with a note for its label; and what is wrong with the first
    entry that is of no use, or "". It stops there, also at a number among UUIDs; shows no GPU at all when one stands there
    twice; and takes "0x" for 0 (all seen with driver 580)."""
    found: dict[str, tuple[Board, str]] = {}
    seen: set[str] = set()  # UUIDs of boards, and names of MIG instances, of which a board has several
    fault = ""
    given = list(entries(wanted))
    for entry in given:
        fitting, note = _fitting(library, boards, entry)
        if kind_of(entry) != kind_of(given[0]):
            fault = f"{entry!r} stands among entries of another kind"
        elif len(fitting) != 1:
            fault = f"{entry!r} " + (f"fits {len(fitting)} GPUs" if fitting else "names no GPU that answers")
        elif (key := entry if note else fitting[0].uuid) in seen:
            return [], f"GPU {fitting[0].number} stands there twice"
        if fault:
            break
        seen.add(key)
        found[fitting[0].uuid] = fitting[0], note
    return list(found.values()), fault


def entries(wanted: str) -> Iterable[str]:
    """CUDA sees nothing from the first invalid entry on; an empty one and -1 are used for that on purpose."""
    for name in (part.strip() for part in wanted.split(",")):
        if name in ("", "-1"):
            return
        yield name


def kind_of(entry: str) -> str:
    return entry[:4] if entry.startswith(("GPU-", "MIG-")) else "number"


def _fitting(library: Any, boards: Sequence[Board], entry: str) -> tuple[list[Board], str]:
    """The boards that an entry of CUDA_VISIBLE_DEVICES may mean, and a note for their label."""
    if digits := re.match(r"[0-9]{1,9}", entry):
        return [board for board in boards if board.number == int(digits[0])], ""
    is_mig = entry.startswith("MIG-")
    uuid = _parent_uuid(library, entry) if is_mig else entry
    found = [board for board in boards if uuid.startswith("GPU-") and board.uuid.startswith(uuid)]
    return found, "parent GPU, not this instance" if is_mig else ""


def _parent_uuid(library: Any, name: str) -> str:
    """The board of a MIG instance: "MIG-<uuid>", or "MIG-GPU-<uuid>/<instance>/<instance>" with drivers before 470."""
    if name.startswith("MIG-GPU-"):
        return name.removeprefix("MIG-").partition("/")[0]
    try:
        instance = library.nvmlDeviceGetHandleByUUID(name)
        return str(library.nvmlDeviceGetUUID(library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)))
    except library.NVMLError:
        return ""


def order_remark(boards: Sequence[Board], wanted: str | None) -> str:
    """The order in which GPUs are numbered, and what may be wrong with it."""
    order = os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    by_number = wanted is not None and wanted.strip()[:1].isdecimal()
    if by_number and order != "PCI_BUS_ID" and len({board.name for board in boards}) > 1:
        return (
            "GPU numbers were taken in PCI bus order, but CUDA numbers the fastest first: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return "PCI bus"


def foreign_processes(library: Any, handle: Any, own_may_run: bool = True) -> list[Any]:
    """Processes that work on the board and are not of this process's session. Containers show other numbers, or none: of
    those that cannot be found here a single one is taken for this process, unless it cannot be (`own_may_run`)."""
    running = or_none(library, library.nvmlDeviceGetComputeRunningProcesses, handle) or []
    own = os.getsid(0) if hasattr(os, "getsid") else None
    found = []
    for process in running:
        try:
            if os.getsid(process.pid) != own:
                found.append(process)
        except (OSError, OverflowError):
            if len(running) > 1 or not own_may_run:
                found.append(process)
    return found


def own_devices() -> dict[str, str]:
    """CUDA's number of each device -> its UUID, where torch runs CUDA in this process; it is not started for this."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return {}
    properties = [cuda.get_device_properties(number) for number in range(cuda.device_count())]
    return {f"cuda:{n}": f"GPU-{p.uuid}" for n, p in enumerate(properties) if getattr(p, "uuid", None)}


def or_none(library: Any, ask: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return ask(handle)
    except (library.NVMLError, AttributeError):  # the driver, or the package, does not know the question
        return None
