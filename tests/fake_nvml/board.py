"""One simulated GPU: what it is, what it draws, how its sensors look at that, and what is wrong with it.

The defaults are an H100 80GB HBM3 under driver 580 as measured: its counter is refreshed every 100 ms and covers all the
time; the instantaneous power is the mean of the last 25 ms, the averaged one of the last second, both updated every 100 ms;
the buffer holds 119 means of 20 ms each; reading the counter takes milliseconds, everything else microseconds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .faults import ALWAYS_NS, COUNTER, NEVER_NS, Fault
from .waves import Const, Wave


class Latency(NamedTuple):
    """What a call costs: at least, median and at most, on an idle board and on a busy one. `spins`: it burns the CPU."""

    function: str
    least_s: float
    idle_s: float
    idle_most_s: float
    busy_s: float
    busy_most_s: float
    spins: bool = False


class Mig(NamedTuple):
    uuid: str
    gpu_instance: int = 1
    compute_instance: int = 0
    slices: int = 1
    memory_bytes: int = 10 * 2**30


class Process(NamedTuple):
    pid: int
    memory_bytes: int = 0
    graphics: bool = False


H100_LATENCIES = (
    Latency(COUNTER[0], 2.4e-3, 3.1e-3, 20e-3, 6.5e-3, 20e-3),
    Latency("nvmlDeviceGetMemoryInfo", 15e-6, 20e-6, 30e-6, 1e-3, 8e-3),  # the median when busy is assumed
    Latency("nvmlDeviceGetSamples", 0.3e-3, 0.35e-3, 0.5e-3, 0.35e-3, 0.5e-3),
    Latency("*", 6e-6, 10e-6, 20e-6, 10e-6, 20e-6, spins=True),
)
# Dataclass field -> key of nvml.c and the factor to its unit.
_TIMES = {
    "counter_refresh_s": "counter_ns",
    "counter_phase_s": "counter_phase_ns",
    "counter_jitter_s": "counter_jitter_ns",
    "instant_window_s": "instant_window_ns",
    "instant_update_s": "instant_ns",
    "instant_phase_s": "instant_phase_ns",
    "average_window_s": "average_window_ns",
    "average_update_s": "average_ns",
    "average_phase_s": "average_phase_ns",
    "sample_spacing_s": "sample_ns",
    "sample_window_s": "sample_window_ns",
    "sample_phase_s": "sample_phase_ns",
    "sample_delay_s": "sample_delay_ns",
}
_MILLI = {"power_limit_w": "limit_mw", "default_limit_w": "default_limit_mw", "min_limit_w": "min_limit_mw",
          "max_limit_w": "max_limit_mw", "enforced_limit_w": "enforced_limit_mw", "start_j": "start_mj",
          "busy_w": "busy_mw"}  # fmt: skip
_NOT_LINES = {"wave", "latencies", "migs", "processes", "faults"}


@dataclass
class Board:
    """Change it with `draw`, `fail` and `mend`; after setting any other attribute call the machine's `apply`."""

    uuid: str = ""  # by its number, unless given
    wave: Wave = field(default_factory=lambda: Const(200.0))
    name: str = "NVIDIA H100 80GB HBM3"
    pci: str = ""
    serial: str = "1650000000001"
    arch: int = 9
    cc_major: int = 9
    cc_minor: int = 0
    brand: int = 14
    persistence: int = 1
    compute_mode: int = 0
    virtualization: int = 1  # passed through to a virtual machine
    power_limit_w: float = 700.0
    default_limit_w: float = 700.0
    min_limit_w: float = 200.0
    max_limit_w: float = 700.0
    enforced_limit_w: float = 700.0
    temperature_c: int = 40
    memory_temperature_c: int = 45
    utilization: int = -1  # -1: 100 while the board is busy, else 0
    memory_utilization: int = -1
    graphics_mhz: int = 1980
    sm_mhz: int = 1980
    memory_mhz: int = 2619
    video_mhz: int = 1545
    max_sm_mhz: int = 1980
    max_memory_mhz: int = 2619
    memory_total: int = 85_520_809_984
    memory_used: int = 3 * 2**30
    memory_reserved: int = 500 * 2**20
    reasons: int = 0  # of clocks that are held back
    pcie_gen: int = 5
    pcie_width: int = 16
    nvlinks: int = 18
    fan: int = -1  # none
    pstate: int = 0
    c2c: int = 0
    mig_mode: int = 0
    max_migs: int = 7
    has_counter: int = 1
    counter_refresh_s: float = 0.1
    counter_phase_s: float = 0.0
    counter_jitter_s: float = 0.0  # each refresh comes at most this much earlier or later
    counter_gain: float = 1.0
    resolution_mj: int = 1
    start_j: float = 1000.0  # the counter at the clock's zero
    instant_window_s: float = 0.025  # field 186; 0: not supported
    instant_update_s: float = 0.1
    instant_phase_s: float = 0.0
    average_window_s: float = 1.0  # field 185; 0: not supported
    average_update_s: float = 0.1
    average_phase_s: float = 0.0
    usage: int = 185  # which of them nvmlDeviceGetPowerUsage gives; 0: not supported
    module_scope: int = 0  # 1: the fields answer for the module too
    memory_share: float = 0.2  # of the averaged power, for its memory scope; assumed
    power_gain: float = 1.0
    power_offset_w: float = 0.0
    sample_spacing_s: float = 0.02
    sample_window_s: float = 0.02
    sample_phase_s: float = 0.0
    sample_count: int = 119  # 0: not supported
    sample_delay_s: float = 0.0025
    busy_w: float = 100.0  # above this power the board is busy
    seed: int = 1
    latencies: Sequence[Latency] = H100_LATENCIES
    migs: Sequence[Mig] = ()
    processes: Sequence[Process] = ()
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history: list[tuple[int, Wave]] = [(ALWAYS_NS, self.wave)]
        self.now_ns: Callable[[], int] | None = None  # while a machine has it
        self.changed: Callable[[], None] = lambda: None
        self.added: Callable[[str], None] = lambda line: None

    def energy_j(self, t0_ns: int, t1_ns: int) -> float:
        """The true energy between two instants of the clock."""
        ends = [begin for begin, _ in self.history[1:]] + [NEVER_NS]
        parts = ((wave, max(t0_ns, begin), min(t1_ns, end)) for (begin, wave), end in zip(self.history, ends))
        return sum(wave.energy_j(begin, end) for wave, begin, end in parts if end > begin)

    def power_w(self, t_ns: int) -> float:
        return next(wave for begin, wave in reversed(self.history) if begin <= t_ns).power_w(t_ns)

    def draw(self, wave: Wave, from_ns: int | None = None) -> int:
        """Draw `wave` from now, or from an instant after the last change, on. Returns that instant."""
        begin = self._now() if from_ns is None else from_ns
        self.history.append((begin, wave))
        self.added(f"wave {begin} {wave.spec()}")
        return begin

    def fail(self, faults: list[Fault], from_ns: int | None = None, to_ns: int = NEVER_NS) -> list[Fault]:
        """Switch a fault on, from now on unless told otherwise; on a board without machine, for all the time."""
        begin = self._now() if from_ns is None else from_ns
        added = [dataclasses.replace(fault, from_ns=begin, to_ns=to_ns) for fault in faults]
        self.faults += added
        self.changed()
        return added

    def mend(self, faults: list[Fault] | None = None) -> None:
        """End these faults, or all of them, now."""
        for fault in self.faults if faults is None else faults:
            fault.to_ns = min(fault.to_ns, self._now())
        self.changed()

    def _now(self) -> int:
        return ALWAYS_NS if self.now_ns is None else self.now_ns()

    def lines(self, number: int) -> list[str]:
        """This board in the language of nvml.c."""
        said = {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_LINES},
            "uuid": self.uuid or f"GPU-{number:08x}-0000-4000-8000-000000000000",
            "pci": self.pci or f"00000000:{number + 1:02X}:00.0",
        }
        lines = ["board"]
        for key, value in said.items():
            if key in _TIMES:
                lines.append(f"{_TIMES[key]} {round(value * 1e9)}")
            else:
                lines.append(f"{_MILLI[key]} {round(value * 1000)}" if key in _MILLI else f"{key} {value}")
        lists = itertools.chain(
            (f"wave {begin} {wave.spec()}" for begin, wave in self.history),
            (f"fault {f.kind} {f.function} {f.from_ns} {f.to_ns} {f.value}" for f in self.faults),
            (f"mig {' '.join(map(str, mig))}" for mig in self.migs),
            (f"process {'G' if p.graphics else 'C'} {p.pid} {p.memory_bytes}" for p in self.processes),
            (f"latency {c[0]} {'spin' if c.spins else 'sleep'} {' '.join(map(repr, c[1:6]))}" for c in self.latencies),
        )
        return [*lines, *lists]


def h100(**changes: object) -> Board:
    """As measured; see the top of this file."""
    return Board(**changes)  # type: ignore[arg-type]


def a100(**changes: object) -> Board:
    """Windows of the power readings after Yang et al. (SC24). Assumed: counter every 100 ms, call costs, no samples."""
    facts = {"name": "NVIDIA A100-SXM4-80GB", "arch": 7, "cc_major": 8, "cc_minor": 0, "usage": 186, "average_window_s": 0.0,
             "sample_count": 0, "nvlinks": 12, "pcie_gen": 4, "sm_mhz": 1410, "graphics_mhz": 1410, "max_sm_mhz": 1410,
             "memory_mhz": 1593, "max_memory_mhz": 1593}  # fmt: skip
    return _limited(400.0, 100.0, facts, changes)


def v100(**changes: object) -> Board:
    """Windows after Yang et al.; counter every 20 ms (reports of users). Assumed: call costs, no samples, no MIG."""
    facts = {"name": "Tesla V100-SXM2-32GB", "arch": 5, "cc_major": 7, "cc_minor": 0, "usage": 186, "average_window_s": 0.0,
             "sample_count": 0, "nvlinks": 6, "pcie_gen": 3, "max_migs": 0, "counter_refresh_s": 0.02,
             "instant_window_s": 0.01, "instant_update_s": 0.02, "memory_total": 34_359_738_368, "sm_mhz": 1530,
             "graphics_mhz": 1530, "max_sm_mhz": 1530, "memory_mhz": 877, "max_memory_mhz": 877}  # fmt: skip
    return _limited(300.0, 150.0, facts, changes)


def ada(**changes: object) -> Board:
    """An RTX 4090. Windows after Yang et al. Assumed: counter every 100 ms, call costs, samples as on the H100."""
    facts = {"name": "NVIDIA GeForce RTX 4090", "arch": 8, "cc_major": 8, "cc_minor": 9, "instant_window_s": 0.1,
             "nvlinks": 0, "pcie_gen": 4, "max_migs": 0, "fan": 30, "memory_total": 25_757_220_864, "sm_mhz": 2520,
             "graphics_mhz": 2520, "max_sm_mhz": 3105, "memory_mhz": 10501, "max_memory_mhz": 10501}  # fmt: skip
    return _limited(450.0, 150.0, facts, changes)


def _limited(limit_w: float, least_w: float, facts: dict[str, object], changes: dict[str, object]) -> Board:
    limits = dict.fromkeys(("power_limit_w", "default_limit_w", "max_limit_w", "enforced_limit_w"), limit_w)
    return Board(**{**limits, "min_limit_w": least_w, **facts, **changes})  # type: ignore[arg-type]
