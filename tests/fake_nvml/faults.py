"""What can be wrong with a simulated GPU; `Board.fail` switches it on, `Board.mend` off."""

from __future__ import annotations

from dataclasses import dataclass

ALWAYS_NS, NEVER_NS = -(2**62), 2**62
UNSUPPORTED, DENIED, FUNCTION_NOT_FOUND, LOST = 3, 4, 13, 15
COUNTER = ("nvmlDeviceGetTotalEnergyConsumption", "field:83", "field:191")


@dataclass
class Fault:
    """A line of `nvml.c`: what is wrong, of which function, and from when to when."""

    kind: str
    function: str
    value: int = 0
    from_ns: int = ALWAYS_NS
    to_ns: int = NEVER_NS


def error(code: int, *functions: str) -> list[Fault]:
    """These NVML functions ("*" for all, "field:186" for one field) return `code`."""
    return [Fault("error", name, code) for name in functions]


def lost() -> list[Fault]:
    return error(LOST, "*")


def denied(*functions: str) -> list[Fault]:
    return error(DENIED, *(functions or COUNTER))


def unsupported(*functions: str) -> list[Fault]:
    return error(UNSUPPORTED, *(functions or COUNTER))


def reset() -> list[Fault]:
    """The counter restarts at 0, as when the driver is loaded again."""
    return [Fault("reset", "-")]


def back(joules: float) -> list[Fault]:
    """The counter falls by this much and goes on from there."""
    return [Fault("back", "-", round(joules * 1000))]


def frozen(what: str = "counter") -> list[Fault]:
    """ "counter" or "power" keeps its value; when mended, it shows again what it would have shown."""
    return [Fault(f"frozen_{what}", "-")]


def wrap32(at_ns: int) -> list[Fault]:
    """The counter has 32 bits and passes 2^32 mJ at that instant."""
    return [Fault("wrap32", "-", at_ns)]


def says(what: str, value: int) -> list[Fault]:
    """The "counter" (mJ) or every "power" reading (mW) is this number."""
    return [Fault("says", what, value)]


def spike() -> list[Fault]:
    return says("power", 1_000_000_000)


def zero(what: str = "power") -> list[Fault]:
    return says(what, 0)


def garbage(what: str) -> list[Fault]:
    """The largest number that the type holds."""
    return says(what, 2**64 - 1 if what == "counter" else 2**32 - 1)


def slow(function: str, seconds: float) -> list[Fault]:
    return [Fault("slow", function, round(seconds * 1e9))]
