"""What would spoil a measurement, found before a model is loaded, each with its remedy: `lem doctor`, and `load_backend`.

The one idea: everything is looked at from outside. No engine and no torch is imported, CUDA is not started, nothing is
written; it takes a tenth of a second. What hardware says of itself comes from the sources of energy that read it
(`energy.checks`).

Not covered: whether a model fits into memory, and what only shows when it runs (`validity`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from . import energy, environment, models
from .backends import Needs, needs
from .check import Check
from .errors import LemError

LEAST_SHARED_BYTES = 2**30  # processes of one engine exchange a few hundred MiB there, and the libraries below them more
LEAST_RESULTS_BYTES = 2**30
LEAST_MODEL_BYTES = 10 * 2**30  # five billion parameters of 16 bits
# With these loading is pointless; whatever else is a failure is told by whoever meets it.
STOPS = ("CUDA_VISIBLE_DEVICES", "architecture", "shared memory")


def run(
    backend: str | None = None,
    engine_args: Mapping[str, Any] = {},
    folder: Path | None = None,
    sys_root: Path = Path("/"),
) -> list[Check]:
    """Everything there is to check for `backend` with these engine arguments, or for the machine alone; `folder` is where
    results are to go (the current one unless given). LemError if there is no such backend."""
    wanted = Needs() if backend is None else needs(backend)
    checks = [] if backend is None else [engine(backend)]
    checks += _machine(wanted, engine_args, sys_root)
    return [*checks, results(folder or Path()), *model_caches(), clocks()]


def refuse(backend: str, engine_args: Mapping[str, Any]) -> None:
    """LemError for what makes it pointless to load `backend` with these arguments (`STOPS`), with its remedy."""
    wanted = needs(backend)
    if wanted.package is None:  # it runs anywhere
        return
    for check in _machine(wanted, engine_args, Path("/")):
        if check.state == "failure" and check.name in STOPS:
            raise LemError(f"Backend '{backend}' was not loaded. {check.name}: {check.finding} Remedy: {check.remedy}")


def _machine(wanted: Needs, engine_args: Mapping[str, Any], sys_root: Path) -> list[Check]:
    return [*energy.checks(sys_root, wanted.compute_capability), *shared_memory(wanted, engine_args, sys_root)]


def engine(backend: str) -> Check:
    """Whether the engine is installed, and which version; it is not imported. LemError if there is no such backend."""
    wanted = needs(backend)
    if wanted.package is None:
        return Check("engine", "ok", f"{backend} is a part of lem_kit.")
    package = wanted.package.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # loaded already, by something that did not say from where
        return Check("engine", "ok", f"{wanted.package} is loaded.")
    if spec is None or spec.origin is None:  # the latter is a folder of that name, and no package
        remedy = f"pip install 'lem_kit[{backend}]'" + (f", or use the image {wanted.image}" if wanted.image else "")
        return Check("engine", "failure", f"{wanted.package} is not installed.", remedy)
    return Check("engine", "ok", f"{wanted.package} {_version(package) or 'of unknown version'} is installed.")


def _version(package: str) -> str | None:
    """The version of what provides `package`, which need not be called so."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(package)
        return metadata.version(owners[0]) if owners else None


def shared_memory(wanted: Needs, engine_args: Mapping[str, Any], sys_root: Path = Path("/")) -> list[Check]:
    """Room in /dev/shm, if the engine is to be spread over processes, which meet there; nothing if it is not."""
    sizes = [engine_args.get(name) for name in wanted.parallel]
    processes = math.prod(size for size in sizes if isinstance(size, int) and size > 1)
    if processes <= 1:
        return []
    place = sys_root / "dev/shm"
    remedy = "sudo mount -o remount,size=8G /dev/shm"
    if environment.container(sys_root) is not None:
        remedy = "start the container with --ipc=host or --shm-size=8g"
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        sentence = f"/dev/shm, where {processes} processes are to meet, cannot be used: {error.strerror}."
        return [Check("shared memory", "failure", sentence, remedy)]
    told = f"/dev/shm, where {processes} processes are to meet, has {_gib(free)} free"
    if free < LEAST_SHARED_BYTES:
        return [Check("shared memory", "failure", f"{told}, less than {_gib(LEAST_SHARED_BYTES)}.", remedy)]
    return [Check("shared memory", "ok", f"{told}.")]


def results(folder: Path) -> Check:
    """Whether results can be kept in `folder`, which need not be there yet."""
    name, elsewhere = "results", "choose another folder: lem.Session(FOLDER), or lem study run --out FOLDER"
    place, free = _free_bytes(folder)
    if free is None or not os.access(place, os.W_OK):
        return Check(name, "failure", f"{place} cannot be written to.", elsewhere)
    if free < LEAST_RESULTS_BYTES:
        return Check(name, "warning", f"{place} has {_gib(free)} free.", f"make room there, or {elsewhere}")
    return Check(name, "ok", f"{place} has {_gib(free)} free.")


def model_caches() -> list[Check]:
    """Room where the Hugging Face Hub's client keeps what it downloads, and where lem_kit keeps the models that it builds;
    one line where both are on one disk."""
    hub = os.environ.get("HF_HUB_CACHE") or models.hub_home() / "hub"
    found: dict[int, Check] = {}
    for folder, setting in ((Path(hub).expanduser(), "HF_HOME"), (models.cache_folder(), "LEM_KIT_CACHE")):
        place, free = _free_bytes(folder)
        if free is None:
            sentence, remedy = f"{place} cannot be looked at.", f"export {setting}=/a/folder/of/yours"
            found.setdefault(-1, Check("model cache", "warning", sentence, remedy))
        elif free < LEAST_MODEL_BYTES:
            remedy = f"make room there, or export {setting}=/a/folder/on/a/larger/disk"
            found.setdefault(place.stat().st_dev, Check("model cache", "warning", f"{place} has {_gib(free)} free.", remedy))
        else:
            found.setdefault(place.stat().st_dev, Check("model cache", "ok", f"{place} has {_gib(free)} free."))
    return list(found.values())


def _free_bytes(folder: Path) -> tuple[Path, int | None]:
    """The folder, or the one that it would be made in, and what is free there; None where that cannot be told."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        try:
            return place, shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return place, None
    return folder, None


def clocks() -> Check:
    """Whether the two clocks with which engines and lem_kit stamp are one: their stamps are compared with each other."""
    ours, theirs = (time.get_clock_info(name).implementation for name in ("monotonic", "perf_counter"))
    if ours == theirs:
        return Check("clocks", "ok", f"time.monotonic and time.perf_counter are one clock: {ours}.")
    sentence = f"time.monotonic ({ours}) and time.perf_counter ({theirs}) are two clocks, so an engine's stamps may be off."
    return Check("clocks", "warning", sentence, "run on Linux, where both are CLOCK_MONOTONIC")


def lines(checks: Iterable[Check]) -> list[str]:
    """The checks for a terminal: one line each, in columns, with the remedy where there is one."""
    found = list(checks)
    width = max((len(check.name) for check in found), default=0)
    return [
        f"  {check.state:<7}  {check.name:<{width}}  {check.finding}" + (f" Remedy: {check.remedy}" if check.remedy else "")
        for check in found
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
