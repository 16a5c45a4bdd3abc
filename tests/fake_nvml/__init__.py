"""Our own libnvidia-ml.so.1 under the real nvidia-ml-py: simulated boards whose every joule is known.

    with boards([h100(wave=Square(70, 300, 0.83))], clock) as machine:
        ...  # whatever reads NVML in this process
        machine.boards[0].energy_j(t0_ns, t1_ns)  # the truth

The one idea: nothing above the C call is replaced. The library is compiled here once and loaded under NVIDIA's name before
nvidia-ml-py asks for it. Other processes use it through `Machine.environment`.

Not covered: two machines at a time in one process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .board import Board, Latency, Mig, Process, a100, ada, h100, v100
from .faults import (
    ALWAYS_NS,
    DENIED,
    FUNCTION_NOT_FOUND,
    LOST,
    NEVER_NS,
    UNSUPPORTED,
    Fault,
    back,
    denied,
    error,
    frozen,
    garbage,
    lost,
    reset,
    says,
    slow,
    spike,
    unsupported,
    wrap32,
    zero,
)
from .waves import Const, Sine, Square, Steps, Wave, alias, llm_bursts

__all__ = [
    "Board", "Latency", "Machine", "Mig", "Process", "a100", "ada", "boards", "built", "h100", "library", "v100",
    "ALWAYS_NS", "DENIED", "FUNCTION_NOT_FOUND", "LOST", "NEVER_NS", "UNSUPPORTED", "Fault", "back", "denied", "error",
    "frozen", "garbage", "lost", "reset", "says", "slow", "spike", "unsupported", "wrap32", "zero",
    "Const", "Sine", "Square", "Steps", "Wave", "alias", "llm_bursts",
]  # fmt: skip

SOURCE = Path(__file__).with_name("nvml.c")
SONAME = "libnvidia-ml.so.1"
_NOW = ctypes.CFUNCTYPE(ctypes.c_longlong)
_SLEEP = ctypes.CFUNCTYPE(None, ctypes.c_double)


@functools.cache
def built() -> Path:
    """The compiled library, in a temporary folder of its own. Skips the test if there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise unittest.SkipTest("the simulated NVML is written in C, and there is no compiler `cc` here")
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lem_kit-fake-nvml-{os.getuid()}-{version}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to someone else")
    made = folder / SONAME
    if not made.exists():  # several processes may build at a time: each its own, the last one stays
        own = folder / f"{os.getpid()}.so"
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread", f"-Wl,-soname,{SONAME}"]
        done = subprocess.run([compiler, *flags, "-o", str(own), str(SOURCE), "-lm"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr}")
        own.replace(made)
    return made


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded into this process under NVIDIA's name, with the types of its control functions."""
    loaded = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
    loaded.fake_nvml_configure.argtypes = [ctypes.c_char_p]
    loaded.fake_nvml_add.argtypes = [ctypes.c_int, ctypes.c_char_p]
    loaded.fake_nvml_set_now_ns.argtypes = [ctypes.c_longlong]
    loaded.fake_nvml_set_clock.argtypes = [_NOW, _SLEEP]
    loaded.fake_nvml_calls.argtypes = [ctypes.c_char_p, ctypes.c_int]
    for name in ("fake_nvml_now_ns", "fake_nvml_wall_offset_ns"):
        getattr(loaded, name).restype = ctypes.c_longlong
    loaded.fake_nvml_energy_j.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    loaded.fake_nvml_power_w.argtypes = [ctypes.c_int, ctypes.c_longlong]
    loaded.fake_nvml_energy_j.restype = loaded.fake_nvml_power_w.restype = ctypes.c_double
    loaded.fake_nvml_layout.restype = ctypes.c_char_p
    return loaded


class Machine:
    """The boards, the driver and the library's own account of its calls. After changing an attribute call `apply`."""

    def __init__(self, boards: list[Board]) -> None:
        self.boards = boards
        self.driver = "580.95.05"
        self.nvml = "13.580.95.05"
        self.cuda = 13000
        self.init_error = 0  # what nvmlInit returns
        self.topology = 40  # common ancestor of any two boards: a NUMA node
        self.read_at = 0.5  # a sensor is read when this part of a call's time has passed
        self.wall_ns = 1_700_000_000_000_000_000  # wall clock at the zero of a fake clock
        self._sessions_left: int | None = None

    def text(self) -> str:
        """The description that the library reads."""
        keys = ("driver", "nvml", "cuda", "init_error", "topology", "wall_ns")
        lines = [f"{key} {getattr(self, key)}" for key in keys] + [f"read_at_permille {round(1000 * self.read_at)}"]
        for number, board in enumerate(self.boards):
            lines += board.lines(number)
        return "\n".join(lines) + "\n"

    def apply(self) -> None:
        text = self.text()
        if line := library().fake_nvml_configure(text.encode()):
            raise ValueError(f"nvml.c does not understand {text.splitlines()[line - 1]!r}")

    def add(self, number: int, line: str) -> None:
        """A further line for one board, without a new description of everything."""
        if library().fake_nvml_add(number, line.encode()):
            raise ValueError(f"nvml.c does not understand {line!r}")

    def write(self, path: Path) -> None:
        """Write the description for FAKE_NVML; a process that uses it takes each new version at its next NVML call."""
        new = path.with_name(f"{path.name}.new")
        new.write_text(self.text())
        new.replace(path)

    def environment(self, path: Path) -> dict[str, str]:
        """Variables with which another process sees these boards, once `path` is written."""
        before = os.environ.get("LD_LIBRARY_PATH")
        folders = [str(built().parent), *([before] if before else [])]
        return {"LD_LIBRARY_PATH": os.pathsep.join(folders), "FAKE_NVML": str(path)}

    def now_ns(self) -> int:
        return int(library().fake_nvml_now_ns())

    @property
    def wall_offset_ns(self) -> int:
        """Wall clock minus the boards' clock: what the stamps of power samples are ahead."""
        return int(library().fake_nvml_wall_offset_ns())

    @property
    def calls(self) -> dict[str, int]:
        """How often each function was called since `forget_calls`."""
        text = ctypes.create_string_buffer(32768)
        assert library().fake_nvml_calls(text, len(text))
        return {name: int(count) for name, count in (line.split() for line in text.value.decode().splitlines())}

    def forget_calls(self) -> None:
        library().fake_nvml_clear_calls()

    @property
    def sessions(self) -> int:
        """How many nvmlInit have no nvmlShutdown yet; after the end of `boards`, as it was then."""
        return int(library().fake_nvml_sessions()) if self._sessions_left is None else self._sessions_left


@contextmanager
def boards(which: list[Board], clock: Callable[[], int] | None = None) -> Iterator[Machine]:
    """Put these boards under nvidia-ml-py in this process, and afterwards back what was there.

    `clock` gives the boards' time in ns; the real CLOCK_MONOTONIC unless given. On a clock of one's own calls cost nothing,
    save those that a fault makes slow: these let time pass with `clock.advance(seconds)`, if there is such a method.
    """
    import pynvml

    loaded = library()
    machine = Machine(which)
    callbacks = (
        (_NOW(), _SLEEP()) if clock is None else (_NOW(clock), _SLEEP(getattr(clock, "advance", lambda seconds: None)))
    )
    before, cached = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        loaded.fake_nvml_clear()
        loaded.fake_nvml_set_clock(*callbacks)
        machine.apply()
        for number, board in enumerate(which):
            board.now_ns, board.changed = machine.now_ns, machine.apply
            board.added = functools.partial(machine.add, number)
        pynvml._LoadNvmlLibrary()
        if not hasattr(pynvml.nvmlLib, "fake_nvml_configure"):
            pynvml.nvmlLib = loaded  # something else had loaded NVIDIA's own before
        yield machine
    finally:
        machine._sessions_left = machine.sessions
        loaded.fake_nvml_clear()
        for board in which:
            board.now_ns, board.changed, board.added = None, lambda: None, lambda line: None
        pynvml.nvmlLib = before
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(cached)
