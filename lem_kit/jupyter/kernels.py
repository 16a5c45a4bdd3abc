"""Kernels of one backend each: an engine in a Python environment or a container of its own, chosen in Jupyter by name.

The one idea: engines that cannot share an environment share a Jupyter. A kernel is a folder with a kernel.json, which
records under `metadata.lem_kit` what it was made of; only folders with that record are listed or removed.

Not covered: what happens when a container's kernel is started (`container`); making environments or images.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends import needs
from ..errors import LemError, nearest

RUNTIMES = ("docker", "podman")

# What a kernel's interpreter must be able to import, tried from a folder that holds no lem_kit of its own.
_PROBE = """
import importlib, importlib.util, json, sys
found = {"missing": [], "engine": sys.argv[1] == "" or importlib.util.find_spec(sys.argv[1]) is not None}
for name in ("ipykernel", "lem_kit"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        if getattr(error, "name", None) != name:
            raise
        found["missing"].append(name)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Kernel:
    """A kernel that lem_kit installed. `where` is its interpreter or image, `state` "ok" or why it cannot start."""

    name: str
    backend: str
    where: str
    state: str
    folder: Path


def install(
    backend: str,
    *,
    python: str | Path | None = None,
    container: str | bool | None = None,
    runtime: str | None = None,
    name: str | None = None,
    env: Mapping[str, str | None] | None = None,
    gpus: str | None = None,
    shm_size: str | None = None,
    options: Sequence[str] = (),
    prefix: str | Path | None = None,
) -> Path:
    """Install a kernel for a backend and return its folder. A kernel of that name that lem_kit installed is replaced.

    `python` is the interpreter of an environment that has the engine, ipykernel and lem_kit, by default this one.
    `container` is an image instead, or True for the engine's official one; it needs Python, and is fetched neither here nor
    at the start. `runtime` is docker or podman, by default the first that is there. `gpus` is "all" (default), "none", or
    numbers or UUIDs with commas between. `shm_size` ("16g") gives the container a /dev/shm of its own, not the host's.
    `options` are further ones of the runtime's `run`; they come last, so that they win where lem_kit's say something else.

    `env` is set in the kernel; Jupyter fills `${NAME}` in at the start. None instead of a value lets the client's own value
    into a container, where else few are (`container.ENVIRONMENT`). `name` is by default lem-<backend>, `prefix` the
    environment whose Jupyter is to find the kernel, this one. LemError if any of this cannot be.
    """
    need = needs(backend)
    name = name or f"lem-{backend.replace('_', '-')}"
    folder = _folder(name, prefix)
    if folder.exists() and _record(folder) is None:
        raise LemError(f"There is a kernel '{name}' already that is not lem_kit's ({folder}): choose another with --name.")
    if wrong := [key for key in env or {} if not re.fullmatch(r"[A-Za-z_]\w*", key)]:
        raise LemError(f"A variable of the environment has letters, digits and '_' in its name: got {wrong[0]!r}.")
    settings = {key: value for key, value in (env or {}).items() if value is not None}
    kernel: dict[str, Any] = {"display_name": f"{backend} (lem_kit)", "language": "python"}
    record: dict[str, Any] = {"version": __version__, "backend": backend}
    if container:
        if python is not None:
            raise LemError("A kernel is in a Python environment or in a container: give --python or --container, not both.")
        image = need.image if container is True else container
        if image is None:
            raise LemError(f"Backend '{backend}' has no official image: name one, --container IMAGE.")
        record |= {"image": image, "runtime": _runtime(runtime, backend), "gpus": gpus or "all", "shm_size": shm_size}
        record |= {"options": [*need.container, *options], "environment": sorted(env or {})}
        launcher = Path(__file__).with_name("container.py")
        kernel |= {"display_name": f"{backend} in {image} (lem_kit)", "interrupt_mode": "message"}
        kernel["argv"] = [_absolute(sys.executable), str(launcher), str(folder / "kernel.json"), "{connection_file}"]
    else:
        if runtime or gpus or shm_size or options:
            raise LemError("A runtime, GPUs, a shm-size and run-options are of a container: give --container, too.")
        interpreter = _interpreter(python or sys.executable, backend, need.package, settings)
        record["python"] = interpreter
        # An engine that compiles looks for its tools beside the interpreter, as in an environment that is activated.
        settings = {"PATH": f"{Path(interpreter).parent}{os.pathsep}${{PATH}}", **settings}
        kernel["argv"] = [interpreter, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--ext", "lem_kit"]
    kernel |= {"env": settings, "metadata": {"debugger": True, "lem_kit": record}}
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".kernel.json"
    scratch.write_text(json.dumps(kernel, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(folder / "kernel.json")  # a half-written one would be nobody's
    return folder


def installed(prefix: str | Path | None = None) -> list[Kernel]:
    """The kernels that `install` made in this prefix, by name."""
    found = []
    for folder in sorted(_kernels(prefix).glob("*")):
        if (record := _record(folder)) is not None:
            where = record.get("python") or f"{record.get('runtime')} {record.get('image')}"
            found.append(Kernel(folder.name, str(record.get("backend")), where, _state(folder, record), folder))
    return found


def remove(name: str, prefix: str | Path | None = None) -> Path:
    """Remove a kernel that `install` made; its folder, which is gone. LemError if it is not there or not lem_kit's."""
    folder = _folder(name, prefix)
    if not folder.exists():
        raise LemError(
            f"There is no kernel '{name}' in {folder.parent}: {nearest(name, [k.name for k in installed(prefix)])}"
        )
    if _record(folder) is None:
        raise LemError(f"Kernel '{name}' was not installed by lem_kit: jupyter kernelspec remove {name}")
    shutil.rmtree(folder)
    return folder


def _kernels(prefix: str | Path | None) -> Path:
    return Path(_absolute(prefix or sys.prefix)) / "share" / "jupyter" / "kernels"


def _folder(name: str, prefix: str | Path | None) -> Path:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise LemError(f"A kernel's name has lower-case letters, digits, '.', '_' and '-' only: got {name!r}.")
    return _kernels(prefix) / name


def _record(folder: Path) -> dict[str, Any] | None:
    """What `install` noted in the kernel.json, None where somebody else wrote it."""
    try:
        record = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))["metadata"]["lem_kit"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def _state(folder: Path, record: Mapping[str, Any]) -> str:
    argv = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))["argv"]
    if not os.access(argv[0], os.X_OK):
        return "interpreter gone"
    if "image" not in record:
        return "ok"
    runtime, image = record["runtime"], record["image"]
    if shutil.which(runtime) is None:
        return f"no {runtime} here"
    here = subprocess.run([runtime, "image", "inspect", image], capture_output=True).returncode == 0
    return "ok" if here else f"image not here: {runtime} pull {image}"


def _absolute(path: str | Path) -> str:
    """Absolute, but with its links: an environment's interpreter is one, and what it leads to is not the environment's."""
    return os.path.abspath(Path(path).expanduser())


def _runtime(wanted: str | None, backend: str) -> str:
    for candidate in [wanted] if wanted else RUNTIMES:
        if shutil.which(candidate):
            return candidate
    raise LemError(
        f"There is no {wanted or ' or '.join(RUNTIMES)} on PATH: install {wanted or 'one of them'}, or give a Python "
        f"environment that has the engine: lem kernels install {backend} --python PATH"
    )


def _interpreter(python: str | Path, backend: str, package: str | None, env: Mapping[str, str]) -> str:
    """The absolute path of an interpreter that has what a kernel needs."""
    given = str(python)
    path = _absolute(given if os.sep in given else shutil.which(given) or given)
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        example = os.path.join(path, "bin", "python") if os.path.isdir(path) else "/path/to/environment/bin/python"
        raise LemError(f"There is no Python interpreter {path}: give one as in --python {example}")
    command = [path, "-c", _PROBE, package or ""]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=os.sep, env={**os.environ, **env})
        found = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LemError(f"{path} could not be run: {error}") from error
    except (IndexError, ValueError) as error:
        last = (answer.stderr.strip() or f"status {answer.returncode}").splitlines()[-1]
        raise LemError(f"{path} cannot import what a kernel needs: {last}") from error
    lem_kit = f"'lem_kit[{backend}]'" if package else "lem_kit"
    pip = f"{shlex.quote(path)} -m pip install"
    if found["missing"]:
        raise LemError(f"{path} has no {' and no '.join(found['missing'])}: {pip} ipykernel {lem_kit}")
    if not found["engine"]:
        raise LemError(f"{path} has no {package}, the engine of backend '{backend}': {pip} {lem_kit}, or give --python PATH")
    return path
