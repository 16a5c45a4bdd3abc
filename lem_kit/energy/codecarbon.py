"""CodeCarbon's figures as one more source, so that they can be looked at beside measured ones.

The one idea: an output handler, CodeCarbon's own hook, receives its running totals at every `flush()`; those are cumulative
energies, which is all a source needs. A task begun and ended at once starts the tracker without its timer threads, so
nothing runs between two reads. Starting takes over a second, hence a thread: `read()` returns {} until it is done.

Without access to hardware counters CodeCarbon computes: CPU power from a looked-up TDP and the load of the whole machine,
memory power from a number of DIMMs guessed from its size. Such domains are `method="model"` with a relative error of 1.0:
published comparisons found factors of two against measurements (Jay et al., "An experimental comparison of software-based
power meters", CCGrid 2023). That is the size of published disagreements, not a confidence interval.

Kept out: the network (no geo look-up, no API, no Electricity Maps), files, locks, the console. The user's own settings of
the hardware (`force_cpu_power`, `force_ram_power` in .codecarbon.config) count, since they are better than a guess.
Not covered: carbon. CodeCarbon picks its GPUs itself; its known faults in that are visible as a GPU that uses nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..errors import LemError, Unavailable
from ..trace import Domain
from . import EnergySource, Reading

JOULES_PER_KWH = 3.6e6

# CodeCarbon computes anew on flush() unless its last figure is younger than this.
REFRESH_S = 0.05
# A GPU's own counter may lie behind by another 100 ms.
GPU_REFRESH_S = REFRESH_S + 0.1
# Its CPU model cubes the load since the last reading, and the kernel counts load in ticks of 10 ms per core. A second of two
# cores holds 200 ticks, half a percent of load each; 50 ms would hold 10, and the cube would turn that noise into a bias. It
# also loses the duration of each reading (0.3 to 1 ms), which is 0.1 % here.
INTERVAL_S = 1.0

# Published comparisons found factors of two; see the module's text.
MODEL_ERROR = 1.0
COUNTER_MODES = ("intel_rapl", "windows_emi", "intel_power_gadget")


def open_source(argument: str | None = None) -> EnergySource:
    """Begin to start a tracker in a thread. Takes no argument."""
    if argument is not None:
        raise Unavailable(f"codecarbon takes no argument, not {argument!r}: LEM_KIT_SOURCES=codecarbon")
    quiet = _Quiet()
    # A dependency of its import prints to stdout on machines with AMD's library.
    with quiet, contextlib.redirect_stdout(io.StringIO()):
        try:
            import codecarbon
        except ModuleNotFoundError as error:
            if error.name != "codecarbon":
                raise
            raise Unavailable("codecarbon is not installed: pip install 'lem_kit[codecarbon]'") from None
    return CodeCarbonSource(codecarbon.OfflineEmissionsTracker, quiet)


class _Quiet(logging.Filter):
    """While entered, keeps CodeCarbon's log from the console and remembers its last warning, which is how it reports errors.

    Only then: the user may run a tracker of their own, and its log is theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.getLogger("codecarbon")
        self.level = logging.NOTSET
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            self.last = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        elif record.levelno >= logging.ERROR:
            self.last = record.getMessage()
        return False

    def __enter__(self) -> _Quiet:
        self.last = ""
        self.level = self.logger.level
        self.logger.setLevel(logging.WARNING)
        self.logger.addFilter(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.logger.removeFilter(self)
        self.logger.setLevel(self.level)


class _Totals:
    """The output handler: keeps the running totals of the last flush and the instant at which they came."""

    def __init__(self) -> None:
        self.t_ns = 0
        self.latest: Any = None

    def out(self, total: Any, delta: Any) -> None:
        self.latest, self.t_ns = total, time.monotonic_ns()

    def live_out(self, total: Any, delta: Any) -> None: ...

    def task_out(self, data: Any, experiment_name: str) -> None: ...

    def exit(self) -> None: ...


class CodeCarbonSource:
    """One tracker, driven by `read`. It is used once: CodeCarbon's trackers do not start again."""

    name = "codecarbon"
    interval_s = INTERVAL_S

    def __init__(self, make_tracker: Any, quiet: _Quiet) -> None:
        self.domains: Mapping[str, Domain] = {}
        self._make_tracker = make_tracker
        self._quiet = quiet
        self._totals = _Totals()
        self._tracker: Any = None
        self._facts: dict[str, Any] = {}
        self._failure = ""
        self._closed = False
        self._thread = threading.Thread(target=self._start, name="lem-codecarbon-start", daemon=True)
        self._thread.start()

    def _start(self) -> None:
        with self._quiet:
            try:
                self._tracker = self._make_tracker(**_settings(self._totals))
                self._tracker.start_task("lem_kit")
                self._tracker.stop_task("lem_kit")
                self._tracker.flush()
                if self._totals.latest is None:
                    raise LemError(self._quiet.last or "it gave no figures")
                self._facts = dict(self._tracker.get_detected_hardware())
                self.domains = _domains(self._tracker, self._totals.latest)  # last: from here on it is ready
            except Exception as error:  # the reason belongs to whoever reads; a traceback on the console helps nobody
                self._failure = f"CodeCarbon could not be started: {self._quiet.last or error}"

    def read(self) -> dict[str, Reading]:
        if self._thread.is_alive():
            return {}
        if self._failure or self._closed:
            raise LemError(self._failure or "CodeCarbon: this source is closed")
        before = self._totals.latest
        with self._quiet:
            self._tracker.flush()
        total = self._totals.latest
        if total is before:
            raise LemError(f"CodeCarbon gave no figures: {self._quiet.last or 'it does not say why'}")
        kwh = {"cpu": total.cpu_energy, "ram": total.ram_energy, "gpu": total.gpu_energy}
        return {name: Reading(self._totals.t_ns, kwh[name] * JOULES_PER_KWH) for name in self.domains}

    def describe(self) -> dict[str, Any]:
        if self._totals.latest is None:
            return {"starting": not self._failure}
        return {"version": self._totals.latest.codecarbon_version, **self._facts}

    def close(self) -> None:
        """Wait for the start, if it is under way (about a second), and stop the tracker."""
        self._thread.join()
        if self._tracker is not None and not self._closed and not self._failure:
            with self._quiet:
                self._tracker.stop()
        self._closed = True


def _settings(totals: _Totals) -> dict[str, Any]:
    """Arguments that keep CodeCarbon to itself, whatever the user's .codecarbon.config says."""
    return {
        "output_handlers": [totals],
        "output_methods": [],
        "output_dir": tempfile.gettempdir(),  # must exist; nothing is written there
        "emissions_endpoint": None,
        "electricitymaps_api_token": "",
        "force_carbon_intensity_g_co2e_kwh": 0.0,  # spares the look-up of a country's energy mix
        "cloud_provider": None,
        "cloud_region": None,
        "country_iso_code": None,
        "country_2letter_iso_code": None,
        "region": None,
        "allow_multiple_runs": True,
        "api_call_interval": -1,
        "tracking_mode": "machine",
        "pue": 1.0,  # joules of the machine, not of the building
        "wue": 0.0,
        "rapl_include_dram": False,  # else the CPU's figure would hold memory too, which has its own
        "rapl_prefer_psys": False,
        "log_level": logging.WARNING,  # within `_Quiet`, which sees them and gives the user's level back
        "logger_preamble": "",
    }


def _domains(tracker: Any, total: Any) -> dict[str, Domain]:
    """What CodeCarbon found, and whether it measures or computes it.

    It says so nowhere in its public results, so its hardware objects are asked; what they do not say counts as computed.
    """
    hardware = {type(part).__name__: part for part in getattr(tracker, "_hardware", ())}
    cpu = hardware.get("CPU")
    if getattr(cpu, "_mode", None) in COUNTER_MODES:
        domains = {"cpu": _measured("cpu", f"hardware counter: {total.cpu_model}")}
    elif cpu is None:
        domains = {"cpu": _model("cpu", f"computed by CodeCarbon: {total.cpu_model}")}
    else:
        domains = {"cpu": _model("cpu", f"TDP model: {total.cpu_model}, {getattr(cpu, '_tdp', 'unknown')} W TDP")}
    ram = f"{total.ram_power:.1f} W constant, guessed from {total.ram_total_size:.0f} GB of memory"
    domains["ram"] = _model("dram", ram)
    # gpu_count only echoes CUDA_VISIBLE_DEVICES when there is no GPU; the model's name is filled by a GPU that was found.
    if total.gpu_model:
        boards = getattr(getattr(hardware.get("GPU"), "devices", None), "devices", [])
        counted = bool(boards) and all(getattr(board, "_has_counter", False) for board in boards)
        label = f"{total.gpu_model}, all in one figure"
        gpu = _measured("gpu", label) if counted else _model("gpu", f"{label}, from sampled power")
        domains["gpu"] = gpu._replace(refresh_s=GPU_REFRESH_S)
    return domains


def _measured(scope: str, label: str) -> Domain:
    return Domain(scope, "counter", REFRESH_S, label=label)


def _model(scope: str, label: str) -> Domain:
    return Domain(scope, "model", REFRESH_S, relative_error=MODEL_ERROR, reasons=("modelled",), label=label)
