"""Waveforms of true power, each with its exact energy between two instants.

The one idea: instants and durations are whole nanoseconds, so that the phase of a wave is exact however long the clock has
run. `nvml.c` has the same integrals, written independently; `spec` says a wave in its language.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


class Wave:
    """Power in watts at every instant of a clock (ns), its energy in joules, and its line for the library."""

    def power_w(self, t_ns: int) -> float:
        raise NotImplementedError

    def energy_j(self, t0_ns: int, t1_ns: int) -> float:
        raise NotImplementedError

    def spec(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Const(Wave):
    watts: float

    def power_w(self, t_ns: int) -> float:
        return self.watts

    def energy_j(self, t0_ns: int, t1_ns: int) -> float:
        return self.watts * (t1_ns - t0_ns) / 1e9

    def spec(self) -> str:
        return f"const {self.watts!r}"


@dataclass(frozen=True)
class Sine(Wave):
    """mean_w + amplitude_w sin(2 pi (t - phase_s) / period_s)."""

    mean_w: float
    amplitude_w: float
    period_s: float
    phase_s: float = 0.0

    def _angle(self, t_ns: int) -> float:
        period_ns = _ns(self.period_s)
        return 2 * math.pi * ((t_ns - _ns(self.phase_s)) % period_ns) / period_ns

    def power_w(self, t_ns: int) -> float:
        return self.mean_w + self.amplitude_w * math.sin(self._angle(t_ns))

    def energy_j(self, t0_ns: int, t1_ns: int) -> float:
        swing = math.cos(self._angle(t0_ns)) - math.cos(self._angle(t1_ns))
        return self.mean_w * (t1_ns - t0_ns) / 1e9 + self.amplitude_w * self.period_s / (2 * math.pi) * swing

    def spec(self) -> str:
        return f"sine {self.mean_w!r} {self.amplitude_w!r} {_ns(self.period_s)} {_ns(self.phase_s)}"


@dataclass(frozen=True)
class Steps(Wave):
    """(seconds, watts) one after the other, over and over; a turn begins at `phase_s`."""

    steps: tuple[tuple[float, float], ...]
    phase_s: float = 0.0

    def _steps_ns(self) -> list[tuple[int, float]]:
        return [(_ns(seconds), watts) for seconds, watts in self.steps]

    def power_w(self, t_ns: int) -> float:
        rest = (t_ns - _ns(self.phase_s)) % sum(ns for ns, _ in self._steps_ns())
        for ns, watts in self._steps_ns():
            if rest < ns:
                return watts
            rest -= ns
        raise AssertionError

    def energy_j(self, t0_ns: int, t1_ns: int) -> float:
        """Per step: how long the interval overlaps its turns, in whole nanoseconds."""
        steps = self._steps_ns()
        period_ns = sum(ns for ns, _ in steps)
        begins_ns, joules = _ns(self.phase_s), 0.0
        for ns, watts in steps:

            def spent(t_ns: int, begins_ns: int = begins_ns, ns: int = ns) -> int:
                turns, rest = divmod(t_ns - begins_ns, period_ns)
                return turns * ns + min(rest, ns)

            joules += watts * (spent(t1_ns) - spent(t0_ns)) / 1e9
            begins_ns += ns
        return joules

    def spec(self) -> str:
        return f"steps {_ns(self.phase_s)} " + " ".join(f"{ns} {watts!r}" for ns, watts in self._steps_ns())


@dataclass(frozen=True)
class Square(Wave):
    """`high_w` for `duty` of each period, which begins at `phase_s`; `low_w` for the rest."""

    low_w: float
    high_w: float
    period_s: float
    duty: float = 0.5
    phase_s: float = 0.0

    def _steps(self) -> Steps:
        high_s = _ns(self.duty * self.period_s) / 1e9
        return Steps(((high_s, self.high_w), (self.period_s - high_s, self.low_w)), self.phase_s)

    def power_w(self, t_ns: int) -> float:
        return self._steps().power_w(t_ns)

    def energy_j(self, t0_ns: int, t1_ns: int) -> float:
        return self._steps().energy_j(t0_ns, t1_ns)

    def spec(self) -> str:
        high_ns = _ns(self.duty * self.period_s)
        return f"square {self.low_w!r} {self.high_w!r} {_ns(self.period_s)} {high_ns} {_ns(self.phase_s)}"


def llm_bursts(phase_s: float = 0.0) -> Steps:
    """Prefill, decode, pause: 80 ms at 350 W, 600 ms at 220 W, 290 ms at 70 W."""
    return Steps(((0.08, 350.0), (0.6, 220.0), (0.29, 70.0)), phase_s)


def alias(low_w: float = 70.0, high_w: float = 300.0, period_s: float = 0.1, duty: float = 0.3) -> Square:
    """A load in step with a sensor that is updated every `period_s`: it begins where an update ends.

    A sensor that looks at the last quarter of each period never sees it.
    """
    return Square(low_w, high_w, period_s, duty)
