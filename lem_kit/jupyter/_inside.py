"""The first process of a kernel's container: it starts the kernel, and ends the container when its standard input ends.

The one idea: when the first process of a container exits, the system kills all others in it, an engine's workers included.
So `container`, which holds the other end of the stream, need not be alive to end the kernel; it is enough that it is gone.

Run by the image's own Python, which has no lem_kit: standard library only, and nothing newer than Python 3.9.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path

# What the kernel imports, by the requirement that brings it. The last is for the boards' meters, where there are boards.
NEEDED = {"ipykernel": "ipykernel", "numpy": "numpy>=1.26", "pandas": "pandas>=2", "pyarrow": "pyarrow>=14"}
NEEDED_WITH_GPU = {"pynvml": "nvidia-ml-py>=12.535"}

_WITH_FOLDER = (
    "import runpy, site, sys; site.addsitedir(sys.argv.pop(1)); "
    "runpy.run_module('ipykernel_launcher', run_name='__main__', alter_sys=True)"
)


def main(cache: str, *kernel_arguments: str) -> int:
    """Start the kernel and wait for it; its exit status. `cache` is a folder that stays when the container has gone."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    requirements = missing(Path("/"))
    command = [sys.executable, "-m", "ipykernel_launcher"]
    if requirements:
        folder = provide(requirements, Path(cache))
        if folder is None:
            return 1
        command = [sys.executable, "-c", _WITH_FOLDER, str(folder)]
    package = Path(__file__).resolve().parent.parent
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A kernel that knows its parent ends with it, and does not explain to the log how to connect to it by hand.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JPY_PARENT_PID": str(os.getpid())}
    # Not in a session of its own: a kernel that leads a process group interrupts the whole group, and with it an engine's
    # workers, which take that for the end.
    kernel = subprocess.Popen([*command, *kernel_arguments], stdin=subprocess.DEVNULL, env=environment)
    while True:  # the first process is also the one that orphans are handed to
        pid, status = os.wait()
        if pid == kernel.pid:
            kernel.returncode = os.waitstatus_to_exitcode(status)
            return kernel.returncode if kernel.returncode >= 0 else 128 - kernel.returncode


def missing(sys_root: Path) -> list[str]:
    """Requirements of the kernel that this Python does not meet."""
    needed = {**NEEDED, **(NEEDED_WITH_GPU if any(sys_root.glob("dev/nvidia[0-9]*")) else {})}
    return [requirement for module, requirement in needed.items() if importlib.util.find_spec(module) is None]


def provide(requirements: list[str], cache: Path) -> Path | None:
    """A folder with these packages, filled by pip the first time; None (and a sentence on stderr) where pip cannot.

    What the image has stays in force: its versions bind pip, and the folder comes last on the path.
    """
    present = _present()
    facts = [sys.version, platform.machine(), *requirements, *present]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder = cache / "container-packages" / key
    if folder.is_dir():
        return folder
    names = ", ".join(requirements)
    print(f"lem_kit: this image lacks {names}: pip installs them into {folder}, once.", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as scratch:
        constraints, made = Path(scratch) / "constraints.txt", Path(scratch) / key
        constraints.write_text("\n".join(present) + "\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        pip += ["--cache-dir", str(cache / "pip"), "--target", str(made), "--constraint", str(constraints)]
        environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}  # its advice is for systems that stay
        done = subprocess.run([*pip, *requirements], stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
        if done.returncode != 0:
            packages = " ".join(f"'{requirement}'" for requirement in requirements)
            print(
                f"lem_kit: this image lacks {names}, and pip could not install them (its reason is above): build an image "
                f"that has them, FROM this one with RUN python3 -m pip install {packages}",
                file=sys.stderr,
            )
            return None
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another kernel was quicker, and installed the same
                raise
    return folder


def _present() -> list[str]:
    """What is installed here, as pip's constraints; versions that no index could have are left out."""
    found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    return sorted(f"{n}=={v}" for n, v in found.items() if re.fullmatch(r"[\w.-]+", n) and re.fullmatch(r"\d[\w.]*", v))


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
