"""The energy seam: a source is a cumulative counter of joules that is read, never started or stopped.

A source is one file in this folder, found by its name. It has a function

    open_source(argument: str | None = None) -> EnergySource

that raises `Unavailable` with the reason, and the command that mends it, when there is nothing to read here. Subtracting
two readings gives windows, nested windows and idle baselines; wrap-around, units and missing counters are the source's own
business. A source never sums what overlaps (a package and its cores) and never invents a reading: it leaves a domain out.

It may also have a function, quick and without side effects, that looks at its hardware before anything is measured:

    preflight(argument: str | None, sys_root: Path, least: tuple[int, int] | None) -> list[Check]

and one that tells how much memory of each of its devices is in use, by anybody, by the device's lasting name:

    memory_used_bytes() -> dict[str, int]

Not covered here: when to read (`sampler`), energy between two instants (`trace`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..check import Check
from ..errors import LemError, Unavailable, nearest
from ..trace import Domain


class Reading(NamedTuple):
    """A cumulative energy in joules since a fixed origin, and the instant (CLOCK_MONOTONIC, ns) at which the call that read
    it had ended, and began `took_ns` before."""

    t_ns: int
    joules: float
    took_ns: int = 0


class SourceError(LemError):
    """A device that gave no reading. `code` is one of `measurement.REASONS`."""

    def __init__(self, sentence: str, code: str = "source_failed") -> None:
        super().__init__(sentence)
        self.code = code


def failure_code(error: Exception) -> str:
    """The reason code of whatever a source raised."""
    return error.code if isinstance(error, SourceError) else "source_failed"


@runtime_checkable
class EnergySource(Protocol):
    """What a source promises. `tests/test_energy_contract.py` holds every file of this folder to it.

    `domains` describes each domain that `read` may return; it may grow while a slow source starts, and is filled for a
    domain before that domain is first returned. `read` is quick (well under a millisecond where the hardware allows),
    returns `{}` while the source is still starting, and raises when the device stops answering. `close` may be called
    twice. Optional:

    * `interval_s`: do not read more often than this.
    * `read_one(domain) -> Reading`: where calls are slow, so that each counter is read when it is due (`pace`).
    * `gauges() -> dict[str, float]` with names "domain.quantity_unit" ("gpu0.power_w", "gpu0.temperature_c"), and
      `samples() -> dict[str, list[tuple[int, float]]]`, the (t_ns, value) of such gauges that the device kept since the last
      call; every `gauges_interval_s` and `samples_interval_s`, never where that is infinite.
    * `integrals`: domains that are the integral of a gauge, by their full key ("source_power:gpu0"); see `Domain.gauge`.
    * `failures: dict[str, str]`: a sentence for each domain that gave nothing at the last `read`.
    * `describe() -> dict` of facts worth keeping, and `remarks() -> dict[str, list[str]]`: reason codes by domain that hold
      now (another process on the device, ...); asked once per window, after it.
    """

    name: str

    @property
    def domains(self) -> Mapping[str, Domain]: ...

    def read(self) -> dict[str, Reading]: ...

    def close(self) -> None: ...


def source_names() -> list[str]:
    """Names of the source files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def open_source(spec: str) -> EnergySource:
    """Open one source by "name" or "name=argument".

    Raises LemError for an unknown name, Unavailable (with the reason) when it cannot be opened here.
    """
    name, _, argument = spec.strip().partition("=")
    if name not in source_names():
        raise LemError(f"There is no energy source '{name}': {nearest(name, source_names())}")
    source: EnergySource = importlib.import_module(f"{__name__}.{name}").open_source(argument or None)
    return source


def open_sources(specs: Iterable[str] | None = None) -> tuple[list[EnergySource], dict[str, str]]:
    """Open every source that can be opened; return them with the reason for each that cannot.

    `specs` defaults to LEM_KIT_SOURCES (comma separated), or else to every source in this folder that opens without an
    argument. "none" opens nothing, and what is named twice is opened once. An unknown name is an error; a source that is
    merely unavailable is a reason. After an error nothing is left open.
    """
    if specs is None and os.environ.get("LEM_KIT_SOURCES"):
        specs = os.environ["LEM_KIT_SOURCES"].split(",")
    asked = source_names() if specs is None else [spec.strip() for spec in specs]
    opened: list[EnergySource] = []
    unavailable: dict[str, str] = {}
    try:
        for spec in dict.fromkeys(asked):
            if spec in ("", "none"):
                continue
            try:
                opened.append(open_source(spec))
            except Unavailable as error:
                unavailable[spec.partition("=")[0]] = str(error)
            except Exception as error:
                if specs is not None:
                    raise
                # Nobody asked for this one, so its broken library must not cost the others.
                unavailable[spec] = f"{type(error).__name__}: {error}"
    except BaseException:
        for source in opened:
            source.close()
        raise
    return opened, unavailable


def memory_used_bytes() -> dict[str, int]:
    """Memory in use on each device that a source can ask, by the device's lasting name; devices that do not answer, and
    sources whose library is not here, are left out."""
    found: dict[str, int] = {}
    for name in source_names():
        with contextlib.suppress(Exception):
            found |= getattr(importlib.import_module(f"{__name__}.{name}"), "memory_used_bytes", dict)()
    return found


def checks(sys_root: Path = Path("/"), least: tuple[int, int] | None = None) -> list[Check]:
    """What the sources say of their hardware before anything is measured: the `preflight` of each that has one.

    `least` is the oldest compute capability that an engine runs on. A source's argument is that of LEM_KIT_SOURCES.
    """
    asked = (spec.strip().partition("=") for spec in os.environ.get("LEM_KIT_SOURCES", "").split(","))
    arguments = {name: argument for name, _, argument in asked}
    found: list[Check] = []
    for name in source_names():
        try:
            look = getattr(importlib.import_module(f"{__name__}.{name}"), "preflight", None)
            found += look(arguments.get(name) or None, sys_root, least) if look else []
        except Exception as error:  # a library that is broken must not cost what the others say
            sentence = f"It cannot be asked: {type(error).__name__}: {error}."
            found.append(Check(name, "warning", sentence, f"pip install --force-reinstall 'lem_kit[{name}]'"))
    return found


def remarks(source: EnergySource) -> list[str]:
    """Reason codes about the source's devices that hold now, each once."""
    try:
        found: Mapping[str, list[str]] = getattr(source, "remarks", dict)()
    except Exception:  # as for `describe`; what it would have said is lost, the figures have their own reasons
        return []
    return list(dict.fromkeys(code for codes in found.values() for code in codes))


def describe(source: EnergySource) -> dict[str, Any]:
    """Facts about an open source for the record: its domains, and what the source itself adds."""
    try:
        facts: dict[str, Any] = getattr(source, "describe", dict)()
    except Exception as error:  # a device that died must not cost the record of what was measured before
        facts = {"error": f"{type(error).__name__}: {error}"}
    return {"domains": {name: domain._asdict() for name, domain in source.domains.items()}, **facts}
