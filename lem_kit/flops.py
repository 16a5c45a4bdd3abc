"""FLOPs, model FLOPs utilisation (MFU) and decode bandwidth, beside the ceilings of the GPU that they are shares of.

The one idea: what the model needs (matrix products, weights, keys and values) is known from its shape; what it got done per
second is that over measured time, whatever the engine did besides. How the FLOPs were found goes with them:

    counted       by torch's FlopCounterMode, on the loaded model (`counted`), and given to the run as config["counted_flop"]
    architecture  from the shape of a Llama-like decoder: grouped-query attention and a gated MLP of three matrices
    parameters    2 x parameters x tokens: no attention, and every parameter is taken to work on every token

A shape is believed when it accounts for the model's parameters; mixtures of experts and other blocks do not, and fall
through to "parameters". A ceiling is a vendor's figure or None; those here were checked against pages that quote the vendor,
or come from memory of its sheets, which were not at hand.

Not covered: quantised weights (None), sliding windows (their attention is counted whole), GPUs split by MIG (None).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from . import metrics
from .backends import backend_names, needs
from .errors import LemError, nearest
from .measurement import Completion, Measurement

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHAPE = ("layers", "hidden_size", "heads", "intermediate_size", "vocabulary", "parameters")
TOLERANCE = 0.02  # of the parameters: norms, biases and position tables are not in the shape


class Peak(NamedTuple):
    """Dense TFLOP/s by dtype and GB/s of memory. `float32` without TF32, as torch multiplies unless told otherwise; GeForce
    with float32 accumulation, as torch asks for. None where the hardware lacks it or the vendor does not say."""

    float32: float | None
    float16: float
    bfloat16: float | None
    float8: float | None
    gigabytes_per_s: float
    source: str


DTYPES = ("float32", "float16", "bfloat16", "float8")
_H100, _H200, _A100 = "NVIDIA H100 datasheet", "NVIDIA H200 datasheet", "NVIDIA A100 datasheet"
# By the driver's name of the board, without "NVIDIA", "Tesla" or "GeForce" before it. Figures with sparsity are halved.
PEAKS: Mapping[str, Peak] = {
    "B200": Peak(None, 2250, 2250, 4500, 8000, "NVIDIA DGX B200 datasheet, per GPU"),
    "H200": Peak(66.9, 989.4, 989.4, 1978.9, 4800, _H200),
    "H200 NVL": Peak(60, 835.5, 835.5, 1670.5, 4800, _H200),
    "H100 80GB HBM3": Peak(66.9, 989.4, 989.4, 1978.9, 3350, _H100),
    "H100 NVL": Peak(60, 835.5, 835.5, 1670.5, 3900, _H100),
    "H100 PCIe": Peak(51.2, 756.5, 756.5, 1513, 2000, _H100),
    "A100-SXM4-80GB": Peak(19.5, 312, 312, None, 2039, _A100),
    "A100 80GB PCIe": Peak(19.5, 312, 312, None, 1935, _A100),
    "A100-SXM4-40GB": Peak(19.5, 312, 312, None, 1555, _A100),
    "A100-PCIE-40GB": Peak(19.5, 312, 312, None, 1555, _A100),
    "A30": Peak(10.3, 165, 165, None, 933, "NVIDIA A30 datasheet"),
    "A10": Peak(31.2, 125, 125, None, 600, "NVIDIA A10 datasheet"),
    "L40S": Peak(91.6, 362.05, 362.05, 733, 864, "NVIDIA L40S datasheet"),
    "L4": Peak(30.3, 121, 121, 242.5, 300, "NVIDIA L4 datasheet"),
    "V100-SXM2-16GB": Peak(15.7, 125, None, None, 900, "NVIDIA V100 datasheet"),
    "V100-SXM2-32GB": Peak(15.7, 125, None, None, 900, "NVIDIA V100 datasheet"),
    "V100-PCIE-16GB": Peak(14, 112, None, None, 900, "NVIDIA V100 datasheet"),
    "V100-PCIE-32GB": Peak(14, 112, None, None, 900, "NVIDIA V100 datasheet"),
    "V100S-PCIE-32GB": Peak(16.4, 130, None, None, 1134, "NVIDIA V100 datasheet"),
    "T4": Peak(8.1, 65, None, None, 320, "NVIDIA T4 product brief"),
    "RTX 5090": Peak(104.8, 209.5, 209.5, 419, 1792, "NVIDIA RTX Blackwell whitepaper"),
    "RTX 4090": Peak(82.6, 165.2, 165.2, 330.3, 1008, "NVIDIA Ada whitepaper"),
    "RTX 3090": Peak(35.6, 71, 71, None, 936, "NVIDIA GA102 whitepaper"),
}


def peak(name: str) -> Peak | None:
    """The ceilings of a board by the driver's name of it ("NVIDIA H100 80GB HBM3"); None for one that is not in `PEAKS`."""
    for maker in ("NVIDIA ", "Tesla ", "GeForce "):
        name = name.removeprefix(maker)
    return PEAKS.get(name)


# --- what was done ----------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """Floating-point operations, a multiply-add being two, and how they were found."""

    flop: float
    method: str


def counted(model: Any, prompt_tokens: int, output_tokens: int, batch: int = 1) -> Count:
    """FLOPs of `model.generate` for a batch of prompts of `prompt_tokens` and exactly `output_tokens` each, counted by torch
    as it runs. Attention is computed by plain products for that, the whole square of a prompt's; kernels that torch cannot
    look into (of other packages, of quantised layers) are missed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.ones((batch, prompt_tokens), dtype=torch.long, device=model.device)
    lengths = {"max_new_tokens": output_tokens, "min_new_tokens": output_tokens, "do_sample": False}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **lengths)
    return Count(float(counter.get_total_flops()), "counted")


def of_run(m: Measurement) -> Count | None:
    """FLOPs that the model needed for every request that gave tokens; None if model or prompt lengths are unknown. A count
    that went with the run, as config={"counted_flop": ...} of all its repeats, comes first.

        n          = prompt - cached + output - 1       tokens put through the layers (the last one is not)
        request    = 2 n W + 2 output V + 4 L H d (S(prompt + output - 1) - S(cached))        S(k) = k (k + 1) / 2
        W, V       = matrix entries of all layers, and of the head
        parameters = 2 parameters n                     where the shape is not known

    Causal: a token attends to itself and to those before it. Tokens that the engine took from a cache cost nothing.
    """
    if m.config.get("counted_flop"):
        return Count(float(m.config["counted_flop"]), "counted")
    model, done = _model(m), _worked(m)
    if done is None:
        return None
    matrices = _matrices(model)
    if matrices is None:
        parameters = model.get("parameters")
        return Count(2.0 * parameters * sum(_processed(c) for c in done), "parameters") if parameters else None
    attention = 4.0 * model["layers"] * model["heads"] * _head_size(model)
    total = 0.0
    for c in done:
        prompt, cached = c.prompt_tokens or 0, c.cached_tokens or 0
        total += 2.0 * matrices[0] * _processed(c) + 2.0 * matrices[1] * c.output_tokens
        total += attention * (_triangle(prompt + c.output_tokens - 1) - _triangle(cached))
    return Count(total, "architecture")


def _processed(c: Completion) -> int:
    return (c.prompt_tokens or 0) - (c.cached_tokens or 0) + c.output_tokens - 1


def _triangle(k: int) -> float:
    return k * (k + 1) / 2


def _model(m: Measurement) -> Mapping[str, Any]:
    return (m.backend or {}).get("model") or {}


def _worked(m: Measurement) -> list[Completion] | None:
    """The requests that gave tokens; None if there is none, or one whose prompt's length is unknown."""
    done = [c for c in m.completions if c.events]
    return done if done and all(c.prompt_tokens is not None for c in done) else None


def _head_size(model: Mapping[str, Any]) -> int:
    return int(model.get("head_size") or model["hidden_size"] // model["heads"])


def _matrices(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """Matrix entries of all layers, and of the output head; None if the shape is not known or does not account for the
    parameters, the embedding being either the head itself or a second one."""
    if not all(model.get(fact) for fact in SHAPE):
        return None
    hidden, heads = model["hidden_size"], model["heads"]
    attention = hidden * _head_size(model) * 2 * (heads + (model.get("kv_heads") or heads))
    layers = model["layers"] * (attention + 3 * hidden * model["intermediate_size"])
    head = hidden * model["vocabulary"]
    fits = any(abs(layers + n * head - model["parameters"]) <= TOLERANCE * model["parameters"] for n in (1, 2))
    return (layers, head) if fits else None


class Traffic(NamedTuple):
    """What decoding read from memory, at the least, and how long it took. `method`: how the weights were found."""

    read_bytes: float
    seconds: float
    method: str


def of_decode(m: Measurement) -> Traffic | None:
    """Bytes that decoding has to read: all weights once per step, and for each event the keys and values of its request.

        steps = the most gaps between successive events of a request of which no two overlap
        bytes = steps * weights + sum over events of 2 L H_kv d * (prompt + output tokens before it) * bytes per entry
        seconds = those in which some request is between its first and its last event

    Requests that are decoded together share a step, and their gaps overlap; so the engine's batches need not be known. The
    weights are those of layers and head ("architecture"), or else all parameters; keys and values are taken to be of the
    model's dtype. None if model or prompt lengths are unknown, weights are quantised, or nothing was decoded.
    """
    model, done = _model(m), _worked(m)
    size = BYTES.get(str(model.get("dtype")))
    if done is None or size is None or metrics.quantization(m) or not all(model.get(f) for f in SHAPE[:3]):
        return None
    matrices = _matrices(model)
    weights = sum(matrices) if matrices else model.get("parameters")
    gaps = [(a[0], b[0]) for c in done for a, b in zip(c.events, c.events[1:])]
    if not gaps or not weights:
        return None
    entries = _entries_per_token(model)
    read = _disjoint(gaps) * weights + entries * sum(_contexts(done))
    return Traffic(float(read * size), _covered_ns(gaps) / 1e9, "architecture" if matrices else "parameters")


def kv_bytes_per_token(m: Measurement) -> int | None:
    """Bytes of keys and values that each token of context takes, 2 L H_kv d * bytes per entry, in the model's dtype; None if
    the shape or its dtype is unknown. An engine that keeps them in another dtype takes other bytes."""
    model = _model(m)
    size = BYTES.get(str(model.get("dtype")))
    return _entries_per_token(model) * size if size and all(model.get(f) for f in SHAPE[:3]) else None


def _entries_per_token(model: Mapping[str, Any]) -> int:
    return int(2 * model["layers"] * (model.get("kv_heads") or model["heads"]) * _head_size(model))


def _contexts(done: Iterable[Completion]) -> Iterable[int]:
    """For each event but the first of each request: the tokens before it."""
    for c in done:
        tokens = c.prompt_tokens or 0
        for (_, new), _ in zip(c.events, c.events[1:]):
            tokens += new
            yield tokens


def _disjoint(spans: Iterable[tuple[int, int]]) -> int:
    """The largest number of spans of which no two overlap: take the one that ends first, again and again."""
    count, end = 0, None
    for start, stop in sorted(spans, key=lambda span: span[1]):
        if end is None or start >= end:
            count, end = count + 1, stop
    return count


def _covered_ns(spans: Iterable[tuple[int, int]]) -> int:
    total, end = 0, None
    for start, stop in sorted(spans):
        total += max(0, stop - (start if end is None else max(start, end)))
        end = stop if end is None else max(end, stop)
    return total


# --- beside the ceiling -----------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """`value` = `achieved` / `ceiling`, both per second, of the `gpus` named; `method` is that of what was achieved."""

    value: float
    achieved: float
    ceiling: float
    method: str
    gpus: tuple[str, ...]


def mfu(m: Measurement, count: Count | None = None, dtype: str | None = None) -> Share | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM): FLOPs / measured seconds / peak FLOP/s of the GPUs in use.

    `count`: FLOPs of the whole run, if they were counted; else `of_run`. `dtype`: that of the products, a column of `Peak`;
    else the model's, unless its weights are quantised. None for a GPU that is not in `PEAKS`, for a dtype that it lacks, and
    where it cannot be told which GPUs held the model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise LemError(f"There is no peak for dtype '{dtype}': {nearest(dtype, DTYPES)}")
    count, boards = count or of_run(m), _boards(m)
    dtype = dtype or (None if metrics.quantization(m) else str(_model(m).get("dtype")))
    peaks = [getattr(p, dtype) if p and dtype in DTYPES else None for p in map(peak, boards)]
    if count is None or not peaks or None in peaks or metrics.measured_s(m) <= 0:
        return None
    return _share(count.flop / metrics.measured_s(m), 1e12 * sum(p for p in peaks if p), count.method, boards)


def bandwidth_share(m: Measurement) -> Share | None:
    """Share of the memory bandwidth that decoding used: bytes / s of `of_decode` over the peak of the GPUs in use. At small
    batches this, and not the MFU, says how near to its limit a GPU is. None as for `mfu`."""
    traffic, boards = of_decode(m), _boards(m)
    peaks = [p.gigabytes_per_s if p else None for p in map(peak, boards)]
    if traffic is None or traffic.seconds <= 0 or not peaks or None in peaks:
        return None
    return _share(traffic.read_bytes / traffic.seconds, 1e9 * sum(p for p in peaks if p), traffic.method, boards)


def _share(achieved: float, ceiling: float, method: str, boards: list[str]) -> Share:
    return Share(achieved / ceiling, achieved, ceiling, method, tuple(boards))


def _boards(m: Measurement) -> list[str]:
    """Names of the GPUs that hold the model; empty where that is not certain, for the share would be of the wrong whole.

    An engine that says where its weights lie must have them on GPUs alone. One that does not, must say over how many it
    spread the model, or have a single GPU.
    """
    effective = (m.backend or {}).get("effective") or {}
    gpus: Mapping[str, Any] = {}
    for source, facts in m.sources.items():
        if isinstance(facts, Mapping) and facts.get("gpus"):
            gpus = {f"{source}:{key}": gpu.get("name") for key, gpu in facts["gpus"].items()}
            break
    if any("MIG" in m.trace.domains[key].label for key in gpus if key in m.trace.domains):
        return []
    names = [str(name) for name in gpus.values()]
    places = effective.get("weight_bytes")
    parts = [effective, *(part for part in effective.values() if isinstance(part, Mapping))]
    device = next((part[key] for part in parts for key in ("device", "device_type") if part.get(key)), None)
    if not all(str(place).startswith("cuda") for place in places or [device or "cuda"]):
        return []
    count = len(places) if places else _spread(m) or (1 if len(names) == 1 else 0)
    if count > len(names):
        return []
    return names[:count] if count == len(names) or len(set(names)) == 1 else []


def _spread(m: Measurement) -> int | None:
    """Over how many GPUs the engine says that it spread the model, by the arguments that do (`backends.Needs.parallel`).
    None where it does not, or has further ways of its own in use."""
    name = (m.backend or {}).get("engine")
    ways = needs(name).parallel if name in backend_names() else ()
    effective = (m.backend or {}).get("effective") or {}
    parts = [part for part in effective.values() if isinstance(part, Mapping)]
    told = {key: value for part in (*parts, effective) for key, value in part.items() if isinstance(value, int)}
    other = any(value > 1 for key, value in told.items() if key.endswith("_parallel_size") and key not in ways)
    sizes = [told[way] for way in ways if way in told]
    return None if other or not sizes else math.prod(sizes)


def summary(m: Measurement) -> dict[str, Any]:
    """What this module says of a run, flat, for a row of `lem_kit.frame`. Unknown is None."""
    count, traffic, compute, memory = of_run(m), of_decode(m), mfu(m), bandwidth_share(m)
    weights = ((m.backend or {}).get("effective") or {}).get("weight_bytes")
    return {
        "flop": count.flop if count else None,
        "flop_method": count.method if count else None,
        "flop_per_s": count.flop / metrics.measured_s(m) if count and metrics.measured_s(m) > 0 else None,
        "peak_flop_per_s": compute.ceiling if compute else None,
        "mfu": compute.value if compute else None,
        "peak_source": _sources(compute or memory),
        "decode_bytes_per_s": traffic.read_bytes / traffic.seconds if traffic and traffic.seconds > 0 else None,
        "peak_bytes_per_s": memory.ceiling if memory else None,
        "bandwidth_share": memory.value if memory else None,
        "weight_bytes": sum(weights.values()) if weights else None,
        "kv_bytes_per_token": kv_bytes_per_token(m),
    }


def _sources(share: Share | None) -> str | None:
    """Where the ceilings of these GPUs come from."""
    peaks = map(peak, share.gpus) if share else ()
    return ", ".join(dict.fromkeys(p.source for p in peaks if p)) or None
