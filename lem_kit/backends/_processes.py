"""The processes that an engine starts, and the file that they log to.

The one idea: an engine in processes of its own dies out of sight; its log says why, and the GPUs' drivers say whether the
memory that its processes held has come back.

Not covered: the log of an engine whose logging the user has set up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..energy import memory_used_bytes

_FREED_S = 5.0  # a driver takes a moment to free what a process held that has ended
_SMALL_BYTES = 64 * 2**20  # what a driver itself may take meanwhile
_ENDS_S = 20.0  # how long the processes of a closed engine may take to end before they are killed


class Log:
    """The file that the engine's processes log to; None where the user has set up their logging."""

    SETTINGS = ".logging.json"  # the end of the name of the file that tells them so

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @property
    def settings(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(self.SETTINGS)

    def settle(self, logger: str, level: str) -> str:
        """Write settings (of `logging.config.dictConfig`) that send what `logger` says to this file; returns their path."""
        settings = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"}},
            "handlers": {"file": {"class": "logging.FileHandler", "filename": str(self.path), "formatter": "plain"}},
            "loggers": {logger: {"handlers": ["file"], "level": level, "propagate": False}},
        }
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(json.dumps(settings))
        atexit.register(self.remove_empty)
        return str(self.settings)

    def size(self) -> int:
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def cause(self, since: int = 0) -> str | None:
        """The first exception that the engine logged since a size of the file: what follows is of its consequences."""
        if self.path is None or not self.path.exists():
            return None
        text = self.path.read_bytes()[since:].decode(errors="replace")
        found = re.findall(r"^(?:.*?: )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", text, re.MULTILINE)
        return found[0] if found else None

    def hint(self) -> str:
        return f" Its log: {self.path}" if self.path is not None else " Its log says more."

    def clear(self) -> None:
        """The engine has ended as it should: empty the file, which this process keeps open."""
        if self.path is not None and self.path.exists():
            os.truncate(self.path, 0)

    def remove_empty(self) -> None:
        """This process ends: leave a log that tells of an error, and nothing else."""
        self.settings.unlink(missing_ok=True)
        if self.path is not None and not self.size():
            self.path.unlink(missing_ok=True)


class Process(NamedTuple):
    pid: int
    started: float


def processes(marks: Sequence[str]) -> set[Process]:
    """Those that this one has started, and theirs, whose command line has one of the marks."""
    import psutil

    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(mark in " ".join(process.cmdline()) for mark in marks):
                found.add(Process(process.pid, process.create_time()))
    return found


def ended(processes: Iterable[Process]) -> list[int]:
    """Wait for processes to end; those that do not are killed, and their numbers returned."""
    import psutil

    alive = []
    for pid, started in processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == started:
                alive.append(process)
    _, left = psutil.wait_procs(alive, timeout=_ENDS_S)
    kill(Process(process.pid, process.create_time()) for process in left)
    return [process.pid for process in left]


def memory_left(before: Mapping[str, int], patience_s: float = _FREED_S) -> dict[str, int]:
    """Bytes that are still in use on each GPU beyond what was `before`, once that has stopped; {} where it has come back."""
    end = time.monotonic() + patience_s
    while True:
        now = memory_used_bytes()
        left = {gpu: now[gpu] - used for gpu, used in before.items() if now.get(gpu, 0) - used > _SMALL_BYTES}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def kill(processes: Iterable[Process]) -> None:
    import psutil

    for pid, started in processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == started:
                process.kill()
