"""CPU packages and memory: the RAPL counters that Linux shows under /sys/class/powercap, Intel and AMD alike.

The one idea: a zone's `energy_uj` counts microjoules and wraps at `max_energy_range_uj` (minutes to hours at full load), so
the wraps are counted here. Only packages and their DRAM are read: cores and uncore are part of a package, and `psys`
contains it, so adding either would count twice. Some multi-die AMD parts show one counter once per die; such mirrors are
found on opening and read once.

`open_source("/folder")` reads another folder, for containers that mount it elsewhere.

Not covered: two wraps between two readings (a session reads every 50 ms), AMD's missing DRAM zone, and the noise that some
processors add to the counter against side-channel attacks.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..check import Check
from ..errors import LemError, Unavailable
from ..trace import Domain
from . import EnergySource, Reading

ROOT = "/sys/class/powercap"

# The counter advances about every millisecond (Intel SDM vol. 3, "Package RAPL Domain").
REFRESH_S = 0.001
# Its usual unit is 2^-14 J, which /sys converts to microjoules without saying so; some DRAM zones are finer.
RESOLUTION_J = 2.0**-14
# A fall that would need more power than this to be a wrap is a reset (suspend, hot-plug); no socket draws that much.
MOST_POWER_W = 10_000.0


@dataclass
class _Zone:
    """One counter. `wrapped_j` is what earlier wraps took from it."""

    domain: str
    path: Path
    file: int
    range_j: float
    last_j: float = 0.0
    last_ns: int = 0
    wrapped_j: float = 0.0

    def raw_j(self) -> float:
        return int(os.pread(self.file, 32, 0)) / 1e6

    def read(self, clock: Callable[[], int]) -> Reading:
        joules, t_ns = self.raw_j(), clock()
        if joules < self.last_j:
            needed_j = self.range_j - self.last_j + joules
            # A reset is left to show as a fall, which a trace reports as "counter_went_back".
            if needed_j <= MOST_POWER_W * ((t_ns - self.last_ns) / 1e9 + REFRESH_S):
                self.wrapped_j += self.range_j
        self.last_j, self.last_ns = joules, t_ns
        return Reading(t_ns, self.wrapped_j + joules)


def open_source(argument: str | None = None) -> EnergySource:
    """Open the zones under `argument`, or else under /sys/class/powercap."""
    root = Path(argument or ROOT)
    folders = _zone_folders(root)
    if not folders:
        raise Unavailable(
            f"RAPL: no counters under {root}",
            "a virtual machine has none; on bare metal try `sudo modprobe intel_rapl_msr`; a container masks them, so start "
            "it with -v /sys/devices/virtual/powercap:/powercap:ro and set LEM_KIT_SOURCES=rapl=/powercap",
        )
    names = {folder.name: (folder / "name").read_text().strip() for folder in folders}
    zones: list[_Zone] = []
    skipped: dict[str, str] = {}
    denied = False
    for folder in folders:
        domain = _domain_name(folder.name, names)
        if domain is None:
            skipped[folder.name] = f"{names[folder.name]} is part of a package or contains one"
            continue
        try:
            zones.append(_open_zone(domain, folder))
        except (OSError, ValueError) as error:
            denied = denied or isinstance(error, PermissionError)
            skipped[folder.name] = f"{folder / 'energy_uj'}: {getattr(error, 'strerror', None) or error}"
    if not zones:
        tree = root / "intel-rapl" if (root / "intel-rapl").exists() else root
        if denied:
            raise Unavailable("RAPL: only root may read the counters", f"sudo chmod -R a+r {tree}")
        raise Unavailable(f"RAPL: no zone can be read ({'; '.join(skipped.values())})", f"look at them with `ls -lR {tree}`")
    return RaplSource(zones, skipped)


def preflight(argument: str | None, sys_root: Path, least: tuple[int, int] | None) -> list[Check]:
    """Whether the counters can be read."""
    try:
        source = open_source(argument or str(sys_root / ROOT.lstrip("/")))
    except Unavailable as error:
        finding = error.finding.removeprefix("RAPL: ")
        return [Check("RAPL", "warning", f"{finding[0].upper()}{finding[1:]}.", error.remedy)]
    source.close()
    return [Check("RAPL", "ok", f"The counters of {', '.join(source.domains)} can be read.")]


def _zone_folders(root: Path) -> list[Path]:
    """Zone folders, each once. /sys/class/powercap lists packages and their parts side by side, the device tree nested."""
    patterns = (
        "intel-rapl:*",
        "intel-rapl:*/intel-rapl:*",
        "intel-rapl/intel-rapl:*",
        "intel-rapl/intel-rapl:*/intel-rapl:*",
    )
    found = {path.resolve() for pattern in patterns for path in root.glob(pattern) if (path / "name").is_file()}
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _domain_name(zone: str, names: dict[str, str]) -> str | None:
    """ "package-0", or "dram-0" after the package it belongs to; None for a zone that overlaps a package."""
    name = names[zone]
    if name.startswith("package-"):
        return name
    if name == "dram":
        parent, _, number = zone.rpartition(":")
        return names.get(parent, f"package-{number}").replace("package", "dram")
    return None


def _open_zone(domain: str, folder: Path) -> _Zone:
    file = os.open(folder / "energy_uj", os.O_RDONLY)
    try:
        zone = _Zone(domain, folder, file, int((folder / "max_energy_range_uj").read_text()) / 1e6)
        zone.raw_j()
    except BaseException:
        os.close(file)
        raise
    return zone


class RaplSource:
    """Counters of the zones. `failures` holds a sentence for each zone that the last read missed."""

    name = "rapl"

    def __init__(
        self, zones: Iterable[_Zone], skipped: dict[str, str] | None = None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.failures: dict[str, str] = {}
        domains: dict[str, Domain] = {}
        self.domains: Mapping[str, Domain] = domains
        self._clock = clock
        self._zones: list[_Zone] = []
        self._skipped = dict(skipped or {})
        zones = list(zones)
        mirrors = _mirrors(zones)
        for zone in zones:
            if zone.path.name in mirrors:
                self._skipped[zone.path.name] = f"{zone.domain} mirrors the counter of {mirrors[zone.path.name]}"
                os.close(zone.file)
                continue
            if zone.domain in domains:  # two counters under one name stay two domains
                zone.domain = f"{zone.domain}-zone-{zone.path.name.partition(':')[2].replace(':', '-')}"
            scope = "dram" if zone.domain.startswith("dram") else "cpu"
            domains[zone.domain] = Domain(scope, "counter", REFRESH_S, RESOLUTION_J, label=f"{zone.domain} {zone.path.name}")
            self._zones.append(zone)

    def read(self) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        self.failures = {}
        for zone in self._zones:
            try:
                readings[zone.domain] = zone.read(self._clock)
            except (OSError, ValueError) as error:
                self.failures[zone.domain] = f"RAPL: {zone.domain} ({zone.path / 'energy_uj'}) gave no reading: {error}"
        if not readings:
            raise LemError("; ".join(self.failures.values()) or "RAPL: this source is closed")
        return readings

    def describe(self) -> dict[str, Any]:
        zones = {zone.domain: {"path": str(zone.path), "wraps_at_j": zone.range_j} for zone in self._zones}
        return {"zones": zones, "skipped": self._skipped}

    def close(self) -> None:
        while self._zones:
            os.close(self._zones.pop().file)


def _mirrors(zones: list[_Zone]) -> dict[str, str]:
    """Zone folder -> the domain that it repeats, for dies of one socket.

    Separate counters of 32 bits practically never agree to the microjoule; mirrored ones do, unless the counter was
    refreshed between the two readings. So two agreements in five looks, a refresh apart, decide.
    """
    pairs = [(a, b) for i, a in enumerate(zones) for b in zones[i + 1 :] if _socket(a) == _socket(b)]
    agreed = [0] * len(pairs)
    for _ in range(5 if pairs else 0):
        for i, (a, b) in enumerate(pairs):
            joules = a.raw_j()
            agreed[i] += joules == b.raw_j() and joules > 0.0
        time.sleep(REFRESH_S)
    found: dict[str, str] = {}
    for (a, b), times in zip(pairs, agreed):
        if times >= 2 and a.path.name not in found:
            found[b.path.name] = a.domain
    return found


def _socket(zone: _Zone) -> str:
    """ "package-0" of "package-0-die-1", "dram-0" of "dram-0-die-1"."""
    return "-".join(zone.domain.split("-")[:2])
