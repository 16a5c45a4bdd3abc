"""The parts of `scripts/gpu_check.py`, in the order in which they must run: a bare idle baseline exists only before CUDA
has been started in the process, one with CUDA alone only before a model is loaded.

The one idea: a part is a function that takes the `Check` and leaves tables, notes and headlines in it; what it had no time
or no library for it says by name. Its second figure is the least time that the parts before leave it.
"""

from __future__ import annotations

from collections.abc import Callable

from . import coverage, engines, facts, inference, sampling, sensor, several, stopwatch
from .check import Check

MODEL_PARTS = {"inference", "stopwatch", "sampler", "precision", "continuous", "compile"}
PARTS: dict[str, tuple[Callable[[Check], None], float]] = {
    "facts": (facts.record, 5.0),
    "idle": (facts.idle, 5.0),
    "sensor": (sensor.characterise, 20.0),
    "coverage": (coverage.measure, 15.0),
    "inference": (inference.measure, 150.0),
    "stopwatch": (stopwatch.measure, 90.0),
    "sampler": (sampling.measure, 30.0),
    "continuous": (engines.continuous, 45.0),
    "precision": (engines.precision, 36.0),
    "compile": (engines.compiled, 70.0),
    "several": (several.look, 0.0),
}
