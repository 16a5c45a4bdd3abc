"""The process that Jupyter takes for the kernel when the kernel is in a container: it starts, watches and removes it.

The one idea: a container lives as long as the pipe to its standard input, whose other end only this process holds. `_inside`
ends the container with the pipe, so whatever is killed (this process, its client, the runtime's own command), nobody has to
be left to clean up. Where this process is left, because its client is gone or asked it to end, it removes the container by
name too.

Started as a file and not with -m, which would look for modules in the notebook's folder first. Linux only: the kernel's
ports are those of the host. Not covered: how a kernel comes to be installed (`kernels`).
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lem_kit.models import cache_folder, hub_home

LABEL = "lem_kit.kernel"
PACKAGE = Path(__file__).resolve().parent.parent
SOURCE = "/opt/lem_kit"  # where the container finds the folder `lem_kit`
GRACE_S = 1.5  # between the end of the pipe and force; a client that sent SIGTERM sends SIGKILL 2.5 s later

# What a kernel in a container shares with its client, where it is set; the rest of the environment is the image's.
ENVIRONMENT = (
    *("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "JPY_SESSION_NAME", "OMP_NUM_THREADS", "PLOTLY_RENDERER", "TZ"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_TRUSTED_HOST"),
)
ENVIRONMENT_PREFIXES = ("HF_", "LEM_KIT_")
CACHES = ("LEM_KIT_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def main(kernel_json: str, connection_file: str, *kernel_arguments: str) -> int:
    """Run the kernel that the `metadata.lem_kit` of a kernel.json describes, until it or its client ends; an exit status."""
    parent = os.getppid()
    spec = json.loads(Path(kernel_json).read_text(encoding="utf-8"))["metadata"]["lem_kit"]
    if shutil.which(spec["runtime"]) is None:
        print(f"lem_kit: there is no {spec['runtime']} on PATH here, and this kernel runs in one.", file=sys.stderr)
        return 127
    name = f"lem-kernel-{secrets.token_hex(6)}"
    environment = kernel_environment(os.environ)
    command = run_command(spec, name, Path(connection_file), kernel_arguments, Path.cwd(), environment)
    status = supervise(command, name, environment, parent)
    if status in (125, 126, 127):  # of the runtime's own: it did not get as far as the kernel
        runtime, image = spec["runtime"], spec["image"]
        print(f"lem_kit: {runtime} could not start {image}; if it is not here yet: {runtime} pull {image}", file=sys.stderr)
    return status


def kernel_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the runtime's command: the client's, with the caches by absolute names, for `~` differs inside."""
    ours = {"HF_HOME": str(hub_home(given)), "LEM_KIT_CACHE": str(cache_folder())}
    caches = {"HF_HUB_CACHE": "", "HF_DATASETS_CACHE": "", **given, **ours}
    return {**given, **{name: os.path.abspath(os.path.expanduser(caches[name])) for name in CACHES if caches[name]}}


def run_command(
    spec: Mapping[str, Any],
    name: str,
    connection_file: Path,
    kernel_arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    sys_root: Path = Path("/"),
) -> list[str]:
    """The runtime's command. Folders have the same path inside as outside; a value of the environment is not on it.

    There is no --init: `_inside` reaps what an init would. There is --pull=never: a client waits a minute for its kernel,
    and an image takes longer.
    """
    runtime = spec["runtime"]
    caches = [environment[name] for name in CACHES if environment.get(name)]
    shared = list(dict.fromkeys([str(connection_file.parent), str(folder), *caches]))
    for path in shared:
        os.makedirs(path, exist_ok=True)
    mounts = [_mount(str(PACKAGE), f"{SOURCE}/lem_kit", "readonly")]
    mounts += [_mount(path, path) for path in shared if path != "/"]
    gpus = gpu_options(runtime, spec["gpus"], sys_root)
    return [
        *(runtime, "run", "--rm", "--interactive", "--pull=never", f"--name={name}", f"--label={LABEL}={name}"),
        *("--network=host", f"--shm-size={spec['shm_size']}" if spec["shm_size"] else "--ipc=host"),
        "--security-opt=label=disable",  # or SELinux would hide what is mounted
        *("--entrypoint=python3", f"--workdir={folder}"),
        *(f"--mount={mount}" for mount in mounts),
        *(f"--env={n}" for n in sorted(environment) if _is_passed(n, spec)),
        *gpus,
        *spec["options"],
        spec["image"],
        *(f"{SOURCE}/lem_kit/jupyter/_inside.py", environment["LEM_KIT_CACHE"]),
        *("-f", str(connection_file), "--ext", "lem_kit", *kernel_arguments),
    ]


def gpu_options(runtime: str, gpus: str, sys_root: Path = Path("/")) -> list[str]:
    """Options that hand GPUs to a container: `gpus` is "all" (that this process may use), "none", or numbers or UUIDs.

    Podman knows GPUs by the container device interface, Docker by an option of its own. Docker's containers are started by a
    daemon, which also sees the GPUs that a scheduler hides from this process: then those that it may use are named.
    """
    if gpus == "none":
        return []
    names = gpus.split(",")
    if gpus == "all":
        usable = _usable_gpus(sys_root)
        if not any(usable.values()):
            return []
        if all(usable.values()) or _is_podman(runtime):
            return [f"--device=nvidia.com/gpu={gpus}" if _is_podman(runtime) else "--gpus=all"]
        names = [uuid for uuid, is_usable in usable.items() if is_usable]
    if _is_podman(runtime):
        return [f"--device=nvidia.com/gpu={name}" for name in names]
    return [f'--gpus="device={",".join(names)}"']  # the quotes are Docker's, whose option is a line of CSV


def supervise(command: Sequence[str], name: str, environment: Mapping[str, str], parent: int) -> int:
    """Run the runtime's command until it ends, a signal comes, or the client is gone, and return its status.

    The client is `parent`, and what Jupyter says it is. On return there is no container of this name.
    """
    # In a session of its own: a client kills the whole process group, and the command is to see the end of the pipe.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(environment), start_new_session=True)
    assert process.stdin is not None
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupts are messages; a client that signals too ends nothing
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)
        client = int(os.environ.get("JPY_PARENT_PID") or parent)
        threading.Thread(target=_watch, args=(parent, client), daemon=True).start()
        status = process.wait()
    except _Ended:
        status = 128 + signal.SIGTERM
        process.stdin.close()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        removal = [command[0], "rm", "--force", name]
        subprocess.run(removal, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return status if status >= 0 else 128 - status


class _Ended(Exception):
    """The client is gone, or wants the kernel to end."""


def _end(number: int, _: Any) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise _Ended


def _watch(parent: int, client: int) -> None:
    # The system's own notice of a parent's death is of the thread that started this process, which may end before it. The
    # client is looked for too: it may not be the parent, or be gone before the parent was first asked for.
    while os.getppid() == parent and _is_there(client):
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _mount(source: str, target: str, *options: str) -> str:
    """A bind mount as the runtimes read it: a line of CSV, in which a path may hold anything."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={source}", f"target={target}", *options])
    return line.getvalue()


def _is_passed(name: str, spec: Mapping[str, Any]) -> bool:
    if name in spec["environment"]:
        return True
    if name == "CUDA_VISIBLE_DEVICES" and spec["gpus"] not in ("all", "none"):
        return False  # it counts the client's GPUs; those that were chosen have other numbers inside
    return name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)


def _usable_gpus(sys_root: Path) -> dict[str, bool]:
    """UUIDs of the NVIDIA GPUs here, and whether this process may use each, in the order of their bus addresses."""
    found = {}
    for file in sorted(sys_root.glob("proc/driver/nvidia/gpus/*/information")):
        facts = dict(line.partition(":")[::2] for line in file.read_text().splitlines())
        device = sys_root / f"dev/nvidia{facts.get('Device Minor', '').strip()}"
        found[facts.get("GPU UUID", "").strip()] = os.access(device, os.R_OK | os.W_OK)
    return found or {device.name: True for device in sys_root.glob("dev/nvidia[0-9]*")}


def _is_podman(runtime: str) -> bool:
    """Asked of the program, for podman also goes by the name of docker."""
    try:
        answer = subprocess.run([runtime, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = runtime
    return "podman" in answer.lower()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
