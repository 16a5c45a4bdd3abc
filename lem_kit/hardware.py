"""What a run took of its GPUs, as their drivers told it, and the precision of its model, as its engine told it.

The one idea: a reading outside the window says nothing of it, and what was not told is left out. Not covered: what was
reached of what the hardware can do (`flops`), energy (`metrics`, which has these functions too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .measurement import Measurement


def peak_power_w(m: Measurement) -> dict[str, float]:
    """Highest sampled power of each domain that has a power gauge, W, keyed "source:domain"; empty without gauges.

    Never summed: peaks of several domains are of different instants. Only as fine as the sampling interval, and as the
    sensor's own averaging window.
    """
    return {key: max(watts) for key, watts in _gauge(m, "power_w").items()}


def _gauge(m: Measurement, quantity: str) -> dict[str, Sequence[float]]:
    """What the gauges of that quantity showed in the window, keyed "source:domain"; without those that showed nothing."""
    gauges = {key.removesuffix(f".{quantity}"): s for key, s in m.trace.gauges.items() if key.endswith(f".{quantity}")}
    inside = {key: series.between(m.t0_ns, m.t1_ns).value for key, series in gauges.items()}
    return {key: found for key, found in inside.items() if found}


def gpu_utilization(m: Measurement) -> dict[str, float]:
    """Share of the time in which a kernel ran on each GPU, mean of what its driver told in the window, keyed "source:domain"
    (NVML: utilization.gpu). It says nothing of how much of the GPU the kernels used: that is `flops.mfu`."""
    return {key: sum(shares) / len(shares) for key, shares in _gauge(m, "sm_utilization").items()}


def peak_memory_used_bytes(m: Measurement) -> dict[str, float]:
    """Most memory of each GPU that was in use at a reading in the window, of all processes together, keyed "source:domain".
    Engines that fill a GPU with their cache show its size here; what they needed of it is `kv_cache_used_max`."""
    return {key: max(used) for key, used in _gauge(m, "memory_used_bytes").items()}


def kv_cache_used_mean(m: Measurement) -> float | None:
    """Share of the engine's cache for keys and values that was taken, mean over the steps that it logged in the window. None
    where it logs none; the most seen is in `counters`, where it tells."""
    steps = [share for shares in _gauge(m, "kv_cache_used").values() for share in shares]
    return sum(steps) / len(steps) if steps else None


def precision(m: Measurement) -> str | None:
    """The number format of the model as loaded, with its quantisation: "bfloat16", "float16, bitsandbytes 4 bit". None where
    the engine does not tell."""
    model = (m.backend or {}).get("model") or {}
    parts = [str(part) for part in (model.get("dtype"), quantization(m)) if part]
    return ", ".join(parts) or None


def quantization(m: Measurement) -> str | None:
    """The quantisation in force in a few words, its method and the bits where they are told: that of the model as loaded, or
    else one that the engine was asked to make of it. None where there is none, or the engine does not tell."""
    model, effective = ((m.backend or {}).get(part) or {} for part in ("model", "effective"))
    parts = [effective, *(part for part in effective.values() if isinstance(part, Mapping))]
    asked = [part.get(name) for name in ("quantization", "quant_config") for part in parts]
    told = model.get("quantization")
    unnamed = "quantised" if told and not any(name in told for name in _QUANTIZERS) else None
    return _quantization(told) or unnamed or next((words for words in map(_quantization, asked) if words), None)


_QUANTIZERS = ("quant_method", "quant_algo", "quant_type")  # may be there and None, for weights that are not quantised


def _quantization(told: Any) -> str | None:
    if not isinstance(told, Mapping):
        return str(told) if told else None
    method = next((told[key] for key in _QUANTIZERS if told.get(key)), None)
    bits = next((told[key] for key in ("bits", "num_bits", "weight_bits") if told.get(key)), None)
    bits = bits or next((n for n in (4, 8) if told.get(f"load_in_{n}bit")), None)
    words = [str(getattr(method, "value", method)) if method else "", f"{bits} bit" if bits else ""]
    return " ".join(word for word in words if word) or None
