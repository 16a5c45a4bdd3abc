"""What speaks against measuring on the NVIDIA boards of this machine, told before anything runs.

The one idea: one look, one `Check`, about all the boards that CUDA will show. `library` is the module of nvidia-ml-py,
initialised where nothing else is said. Not covered: what only shows under load (the source that this is a part of).
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from .. import environment
from ..check import Check
from ._boards import (
    Board,
    all_boards,
    entries,
    foreign_processes,
    kind_of,
    no_driver,
    or_none,
    order_remark,
    own_devices,
    visible,
)


def checks(library: Any, sys_root: Path, least: tuple[int, int] | None) -> list[Check]:
    """What is to be said of driver and GPUs before an engine is started that needs the compute capability `least`. The
    library is initialised for it, and shut down again."""
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        finding, remedy = no_driver(library, error, sys_root)
        absent = error.value in (library.NVML_ERROR_LIBRARY_NOT_FOUND, library.NVML_ERROR_DRIVER_NOT_LOADED)
        state: Literal["warning", "failure"] = "warning" if absent and not _has_gpu(sys_root) else "failure"
        return [Check("GPU", state, f"{finding[0].upper()}{finding[1:]}.", remedy)]
    try:
        boards, silent = all_boards(library, {})
        found = [_present(library, boards), *(_silent(number, sentence) for number, sentence in silent.items())]
        if boards:
            visibility, visible = _visibility(library, boards, os.environ.get("CUDA_VISIBLE_DEVICES"))
            found += [visibility, *_cuda_of_torch(library)]
            for look in (_architecture, _others, _mig, _persistence) if visible else ():
                found += look(library, visible, least)
    except library.NVMLError as error:
        found = [Check("GPU", "failure", f"The driver does not list its GPUs ({error}).", "look at what `nvidia-smi` says")]
    finally:
        library.nvmlShutdown()
    return found


def _has_gpu(sys_root: Path) -> bool:
    """Whether the machine shows a board of NVIDIA's; a container shows those of its host, so there a device file counts."""
    if [*sys_root.glob("dev/nvidia[0-9]*")]:
        return True
    vendors = [] if environment.container(sys_root) else sys_root.glob("sys/bus/pci/devices/*/vendor")
    return any(path.read_text().strip() == "0x10de" for path in vendors)


def _present(library: Any, boards: Sequence[Board]) -> Check:
    driver = library.nvmlSystemGetDriverVersion()
    if not boards:
        return Check("GPU", "warning", f"Driver {driver} is here, but no GPU.", "look at what `nvidia-smi -L` says")
    return Check("GPU", "ok", f"Driver {driver}: {', '.join(f'GPU {b.number} ({b.name})' for b in boards)}.")


def _silent(key: str, sentence: str) -> Check:
    remedy = f"sudo nvidia-smi --gpu-reset -i {key.removeprefix('gpu')}, or sudo reboot"
    return Check("GPU", "warning", f"{sentence}.", remedy)


def _visibility(library: Any, boards: Sequence[Board], wanted: str | None) -> tuple[Check, list[Board]]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES, and the boards that it then shows."""
    name = "CUDA_VISIBLE_DEVICES"
    every = f"unset {name}, or export {name}={','.join(str(board.number) for board in boards)}"
    if wanted is None:
        return Check(name, "ok", "Not set: every GPU is visible."), list(boards)
    shown, fault = visible(library, boards, wanted)
    found = [board for board, _ in shown]
    if fault:
        left = f"no more than {_listed(found)}" if found else "no GPU"
        return Check(name, "failure", f"{wanted!r}: {fault}, and so CUDA sees {left}.", every), found
    if odd := [entry for entry in entries(wanted) if kind_of(entry) == "number" and not entry.isdecimal()]:
        return Check(name, "warning", f"{wanted!r}: CUDA takes {odd[0]!r} for the number it begins with.", every), found
    if not found:
        return Check(name, "warning", f"{wanted!r} hides every GPU.", every), []
    if (remark := order_remark(boards, wanted)) != "PCI bus":
        sentence, _, remedy = remark.partition(": set ")
        return Check(name, "warning", f"{wanted!r}: {sentence}.", f"export {remedy}"), found
    return Check(name, "ok", f"{wanted!r} shows {_listed(found)}."), found


def _listed(boards: Iterable[Board]) -> str:
    return ", ".join(f"GPU {board.number}" for board in boards)


def _cuda_of_torch(library: Any) -> list[Check]:
    """Whether torch, if there is one, can use this driver: its files say what it was built for. A driver of an older minor
    version of CUDA serves a newer one, one of an older major does not (NVIDIA, "CUDA Compatibility")."""
    try:
        spec = importlib.util.find_spec("torch")
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
        served = divmod(library.nvmlSystemGetCudaDriverVersion() // 10, 100)
    except (OSError, ValueError, library.NVMLError):  # one that says not where it is, or no such question
        return []
    found = re.search(r"^cuda\b[^=\n]*= *(?:'(\d+)\.(\d+)'|None)", text, re.MULTILINE)
    if not found:
        return []
    if found[1] is None:
        sentence = "torch is built without CUDA: an engine that uses it here runs on the CPU."
        return [Check("torch", "warning", sentence, "pip uninstall torch, then pip install a torch that is built for CUDA")]
    built, serves = f"torch is built for CUDA {found[1]}.{found[2]}", f"the driver serves CUDA {served[0]}.{served[1]}"
    if int(found[1]) > served[0]:
        remedy = f"update the driver, or pip install a torch that is built for CUDA {served[0]}"
        return [Check("torch", "failure", f"{built}, but {serves}.", remedy)]
    return [Check("torch", "ok", f"{built}, {serves}.")]


def _architecture(library: Any, visible: Sequence[Board], least: tuple[int, int] | None) -> list[Check]:
    """A failure where no visible board is new enough, a warning where only some are: the engine may be put on those."""
    if least is None:
        return []
    asked = [(b, or_none(library, library.nvmlDeviceGetCudaComputeCapability, b.handle)) for b in visible]
    old = [(b, capability) for b, capability in asked if capability is not None and tuple(capability) < least]
    wanted = f"{least[0]}.{least[1]}"
    if not old:
        told = ", ".join(f"GPU {b.number} has {c[0]}.{c[1]}" for b, c in asked if c is not None)
        return [Check("architecture", "ok", f"Compute capability {wanted} is needed: {told}.")] if told else []
    told = ", ".join(f"GPU {b.number} ({b.name}) has {c[0]}.{c[1]}" for b, c in old)
    sentence = f"Compute capability {wanted} is needed, but {told}."
    if len(old) < len(visible):
        rest = _uuids(b for b in visible if b.uuid not in {of_old.uuid for of_old, _ in old})
        return [Check("architecture", "warning", sentence, f"export CUDA_VISIBLE_DEVICES={rest}")]
    remedy = f"use a GPU of compute capability {wanted} or newer, or another backend (`lem doctor` lists them)"
    return [Check("architecture", "failure", sentence, remedy)]


def _others(library: Any, visible: Sequence[Board], _: object) -> list[Check]:
    # None of them can be this process while torch has not started CUDA here; an engine of ours may be one once it has.
    own_may_run = bool(own_devices())
    busy = [(board, foreign_processes(library, board.handle, own_may_run)) for board in visible]
    told = [
        f"{process.pid} on GPU {board.number} with "
        + ("memory of unknown size" if process.usedGpuMemory is None else f"{process.usedGpuMemory / 2**30:.1f} GiB")
        for board, processes in busy
        for process in processes
    ]
    if not told:
        return [Check("other processes", "ok", f"None is seen on {_listed(visible)}.")]
    free = _uuids(board for board, processes in busy if not processes)
    pids = ",".join(dict.fromkeys(str(process.pid) for _, processes in busy for process in processes))
    remedy = f"export CUDA_VISIBLE_DEVICES={free}, or end" if free else "end"
    return [Check("other processes", "warning", f"At work are {'; '.join(told)}.", f"{remedy} what `ps -fp {pids}` shows")]


def _mig(library: Any, visible: Sequence[Board], _: object) -> list[Check]:
    modes = [or_none(library, library.nvmlDeviceGetMigMode, board.handle) for board in visible]
    split = [board for board, mode in zip(visible, modes) if mode is not None and mode[0]]
    if not split:
        return [Check("MIG", "ok", "Off.")] if any(mode is not None for mode in modes) else []
    sentence = f"{_listed(split)}: split by MIG, so that energy is known for the whole board only."
    return [Check("MIG", "warning", sentence, f"sudo nvidia-smi -mig 0 -i {_numbers(split)}")]


def _persistence(library: Any, visible: Sequence[Board], _: object) -> list[Check]:
    modes = [or_none(library, library.nvmlDeviceGetPersistenceMode, board.handle) for board in visible]
    off = [board for board, mode in zip(visible, modes) if mode == 0]
    if not off:
        return [Check("persistence mode", "ok", "On.")] if any(modes) else []
    sentence = f"Off on {_listed(off)}: the driver unloads when nobody uses it, and its energy counter may start again."
    return [Check("persistence mode", "warning", sentence, f"sudo nvidia-smi -pm 1 -i {_numbers(off)}")]


def _uuids(boards: Iterable[Board]) -> str:
    """For CUDA_VISIBLE_DEVICES: numbers depend on the order in which CUDA counts."""
    return ",".join(board.uuid for board in boards)


def _numbers(boards: Iterable[Board]) -> str:
    return ",".join(str(board.number) for board in boards)
