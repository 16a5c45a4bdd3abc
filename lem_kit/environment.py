"""What machine and which software a measurement was taken on.

The one idea: versions are read from the modules that are loaded, so nothing is imported in order to be described. GPUs are
described by the energy source that reads them. Not covered: host and user names, which a shared report should not carry.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe(sys_root: Path = Path("/")) -> dict[str, Any]:
    """Facts about this process and machine as strict JSON; what cannot be read is None."""
    from . import __version__

    return {
        "lem_kit": __version__,
        "python": platform.python_version(),
        "interpreter": Path(sys.executable).name,
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(sys_root) or platform.processor() or None,
        "cpu_count": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_governor": _text(sys_root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory_bytes(),
        "container": container(sys_root),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain", "--untracked-files=no")) is None else bool(status),
        "versions": loaded_versions(),
    }


def loaded_versions() -> dict[str, str]:
    """Version of every loaded top-level module that states one."""
    return dict(_versions(len(sys.modules)))


@functools.lru_cache(maxsize=1)
def _versions(loaded: int) -> dict[str, str]:
    """Looked up again when modules were `loaded` since: there are thousands, and a measured cell waits for this."""
    versions = {}
    for name, module in sorted(sys.modules.items()):
        version = getattr(module, "__dict__", {}).get("__version__")  # a module's own __getattr__ may import or warn
        if "." not in name and not name.startswith("_") and isinstance(version, str):
            versions[name] = version
    return versions


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cpu_name(sys_root: Path) -> str | None:
    for line in (_text(sys_root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def container(sys_root: Path) -> str | None:
    """A hint of what contains this process; None where there is none."""
    if (sys_root / ".dockerenv").exists():
        return "docker"
    if (sys_root / "run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return os.environ.get("container")  # noqa: SIM112, the name that systemd-nspawn and podman give it


def _git(*args: str) -> str | None:
    try:
        answer = subprocess.run(["git", *args], capture_output=True, text=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
