"""One run as a BoAmps energy report (Boavizta's open format, its schemas of 2026-04, https://github.com/Boavizta/BoAmps).

The one idea: the format has one figure in kWh and no place for its interval, so the total is given as one measure and the
remarks (`task.taskDescription`) say how it was found, within what, and what it covers. Two sources that saw the same
hardware are never two measures, for a reader might add them. What only the user knows (where the machine stands, a licence)
is asked for and not made up.

    powerConsumption     energy_j / 3.6e6, gross, over all requests of all repeats
    dataQuantity         tokens of one request, the mean: the schema asks for the size of a single inference
    quality              high, medium or low where half-width and the sensor's gain error together stay within 10, 25 or 50 %

Not covered: emissions, accuracy, a calibration measure (the idle baseline is in the remarks, as watts).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from .. import __version__, baseline, metrics
from ..errors import LemError, nearest
from ..measurement import Measurement

J_PER_KWH = 3.6e6
# What only the user can know, and where it stands in a report.
FACTS = {
    "licensing": ("header",), "reportStatus": ("header",), "publisher": ("header",),
    "taskStage": ("task",), "taskFamily": ("task",), "measuredAccuracy": ("task",), "estimatedAccuracy": ("task",),
    "infraType": ("infrastructure",), "cloudProvider": ("infrastructure",), "cloudInstance": ("infrastructure",),
    "cloudService": ("infrastructure",),
    "country": ("environment",), "location": ("environment",), "latitude": ("environment",), "longitude": ("environment",),
    "powerSupplierType": ("environment",), "powerSource": ("environment",), "powerSourceCarbonIntensity": ("environment",),
}  # fmt: skip
_ALLOWED = {
    "reportStatus": ("draft", "final", "corrective", "other"),
    "estimatedAccuracy": ("veryPoor", "poor", "average", "good", "veryGood"),
    "infraType": ("publicCloud", "privateCloud", "onPremise", "other"),
    "powerSupplierType": ("public", "private", "internal", "other"),
    "powerSource": ("solar", "wind", "nuclear", "hydroelectric", "gas", "coal", "other"),
}
_NUMBERS = ("measuredAccuracy", "latitude", "longitude", "powerSourceCarbonIntensity")
_PUBLISHER = ("name", "division", "projectName", "confidentialityLevel", "publicKey")


def report(m: Measurement, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The report as strict JSON.

    `facts`: values of `FACTS`; the keys are BoAmps's own names. Unless given, `infraType`, which the format wants, is
    "other", and the remarks say that it is not known. LemError where the energy is not known, for what is no run of requests
    unless its `taskStage` and `taskFamily` are given, and for a fact that the format does not have.
    """
    known = _checked(facts or {})
    total = metrics.energy_j(m)
    if total is None:
        codes = ", ".join(metrics.verdict(m))
        raise LemError(f"The energy of {m.run_id} is not known ({codes}), and a BoAmps report is about nothing else.")
    if m.kind != "run" and not {"taskStage", "taskFamily"} <= known.keys():
        raise LemError(
            f"{m.run_id} is a {m.kind} and says not what was computed: give taskStage and taskFamily "
            "(-p taskStage=inference -p taskFamily=textGeneration)."
        )
    sections: dict[str, dict[str, Any]] = {
        "header": {
            "formatVersion": "1.1.0",
            "formatVersionSpecificationUri": "https://github.com/Boavizta/BoAmps/tree/main/model",
            "reportId": str(uuid.uuid5(uuid.NAMESPACE_OID, f"lem_kit {m.run_id} {m.started_at}")),
            "reportDatetime": _datetime(datetime.now(timezone.utc).isoformat()),
            "reportStatus": "draft",
        },
        "task": {"taskStage": "inference", "taskFamily": "textGeneration", **_task(m)},
        "infrastructure": {"infraType": "other", "components": _components(m)},
        "environment": {},
    }
    for name, value in known.items():
        sections[FACTS[name][0]][name] = value
    sections["task"]["taskDescription"] = _remarks(m, total, "infraType" in known)
    whole = {
        **sections,
        "measures": [_measure(m, total)],
        "system": {"os": str(m.environment.get("os") or "").partition("-")[0] or None},
        "software": {"language": "python", "version": m.environment.get("python")},
        "quality": _quality(m, total),
    }
    found: dict[str, Any] = _without_unknown(whole)
    return found


def _checked(facts: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in facts.items():
        if name not in FACTS:
            raise LemError(f"A BoAmps report has no '{name}' that could be given: {nearest(name, FACTS)}")
        if name in _ALLOWED and value not in _ALLOWED[name]:
            raise LemError(f"{name} is one of {', '.join(_ALLOWED[name])}: got {value!r}.")
        if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise LemError(f"{name} is a number: got {value!r}.")
        if name == "publisher":
            _check_publisher(value)
        elif name not in _NUMBERS and not (isinstance(value, str) and value):
            raise LemError(f"{name} is a text: got {value!r}.")
    if facts.keys() & {n for n, place in FACTS.items() if place == ("environment",)} and "country" not in facts:
        raise LemError("A BoAmps report that says where it was measured names the country: -p country=NAME.")
    return dict(facts)


def _check_publisher(value: Any) -> None:
    if not isinstance(value, Mapping) or "confidentialityLevel" not in value or not set(value) <= set(_PUBLISHER):
        raise LemError(
            f"publisher is a mapping of {', '.join(_PUBLISHER)}, and confidentialityLevel must be among them: "
            "-p 'publisher={name: ACME, confidentialityLevel: public}'."
        )


def _datetime(moment: str) -> str:
    """BoAmps's YYYY-MM-DD HH:MM:SS, in UTC; as it is if it is no ISO time."""
    try:
        return datetime.fromisoformat(moment).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return moment


def _task(m: Measurement) -> dict[str, Any]:
    backend = m.backend or {}
    model = backend.get("model") or {}
    parameters = model.get("parameters")
    algorithm = {
        "algorithmType": "llm" if m.kind == "run" else None,
        "foundationModelName": model.get("name"),
        "parametersNumber": parameters / 1e9 if parameters else None,
        "framework": backend.get("engine"),
        "frameworkVersion": backend.get("version"),
        "layersNumber": model.get("layers"),
        "quantization": metrics.precision(m),
    }
    n = len(m.completions) or None
    tokens = (("input", metrics.input_tokens(m)), ("output", metrics.output_tokens(m)))
    dataset = [
        {"dataUsage": usage, "dataType": "token", "dataQuantity": _mean(count, n)}
        for usage, count in tokens
        if m.kind == "run" or count is not None
    ]
    return {"nbRequest": n, "algorithms": [algorithm], "dataset": dataset or [{"dataUsage": "input", "dataType": "other"}]}


def _mean(count: int | None, n: int | None) -> float | None:
    return None if count is None else count / (n or 1)


def _measure(m: Measurement, total: metrics.Figure) -> dict[str, Any]:
    of = {scope: [e for key in total.keys if (e := _energy(m, key)) and e.scope == scope] for scope in total.scopes}
    modes = {
        scope: ", ".join(dict.fromkeys(f"{e.source} ({'MODELLED' if e.method == 'model' else e.method})" for e in parts))
        for scope, parts in of.items()
    }
    shares = metrics.gpu_utilization(m)
    gpus = [shares[key] for key in (k.replace("_power:", ":") for k in total.keys) if key in shares]
    word = "MODELLED, not measured" if total.method == "model" else total.method
    return {
        "measurementMethod": f"lem_kit ({', '.join(sorted({key.partition(':')[0] for key in total.keys}))}; {word})",
        "version": m.environment.get("lem_kit") or __version__,
        "cpuTrackingMode": modes.get("cpu"),
        "gpuTrackingMode": modes.get("gpu"),
        "averageUtilizationGpu": sum(gpus) / len(gpus) if gpus else None,
        "powerConsumption": total.value / J_PER_KWH,
        "measurementDuration": metrics.measured_s(m),
        "measurementDateTime": _datetime(m.started_at),
    }


def _energy(m: Measurement, key: str) -> Any:
    return (m.repeats[0] if m.repeats else m).energy.get(key)


def _components(m: Measurement) -> list[dict[str, Any]]:
    """GPUs that were read, the CPU as so many logical ones, memory: as far as the record knows them."""
    read = {key.partition(":")[2] for key in m.trace.domains}
    boards: dict[tuple[Any, Any], int] = {}
    for facts in m.sources.values():
        for domain, gpu in (facts.get("gpus") or {}).items():
            if domain in read:
                which = (gpu.get("name"), gpu.get("memory_bytes"))
                boards[which] = boards.get(which, 0) + 1
    found: list[dict[str, Any]] = [
        {
            "componentName": name, "componentType": "gpu", "nbComponent": count,
            "memorySize": round(memory / 1e9, 3) if memory else None,
            "manufacturer": "NVIDIA" if str(name).startswith("NVIDIA") else None,
        }
        for (name, memory), count in boards.items()
    ]  # fmt: skip
    cpus, memory = m.environment.get("cpu_count"), m.environment.get("memory_bytes")
    name = m.environment.get("cpu") or m.environment.get("machine")
    if cpus:
        found.append({"componentName": f"{name}, logical CPUs", "componentType": "cpu", "nbComponent": cpus})
    if memory:
        found.append({"componentType": "ram", "nbComponent": 1, "memorySize": round(memory / 1e9, 3)})
    if not found:
        raise LemError(f"{m.run_id} does not say on what machine it was measured, which a BoAmps report must.")
    return found


def _remarks(m: Measurement, total: metrics.Figure, placed: bool) -> str:
    """What the format has no field for."""
    doubts, idle = metrics.reasons(m), baseline.chosen(m)
    sentences = [
        m.label,
        f"{total.told('J')} (half-width of a 95 % interval), "
        f"{metrics.METHODS[total.method]}: {', '.join(total.keys)}. It covers {', '.join(total.scopes)} and nothing else",
    ]
    if total.method == "model":
        sentences.append("MODELLED: computed from assumptions about the hardware; the error on this machine is not known")
    if len(m.repeats) > 1:
        sentences.append(f"{len(m.repeats)} repeats are summed: energy, seconds and requests")
    if per_token := metrics.j_per_output_token(m):
        sentences.append(f"{per_token.told('J per output token')}, gross")
    if metrics.net_energy_j(m) and idle is not None:
        watts = ", ".join(f"{key} {idle['power_w'][key]['watts']:.4g} W" for key in total.keys)
        sentences.append(f"Idle baseline ({idle['kind']}): {watts}; it is not subtracted")
    if not m.valid:
        sentences.append(f"NOT VALID by lem_kit's rules: {', '.join(metrics.verdict(m))}")
    if doubts:
        sentences.append(f"Reason codes: {', '.join(doubts)}")
    if not placed:
        sentences.append("infraType is not known to lem_kit and stands as other")
    return ". ".join(re.sub(r"\s+", " ", sentence) for sentence in sentences) + "."


def _quality(m: Measurement, total: metrics.Figure) -> str | None:
    """None where the sensor's own error is not known, and so for every model."""
    sources = {key.partition(":")[0].removesuffix("_power") for key in total.keys}
    gains = [(m.sources.get(name) or {}).get("gain_error") for name in sources]
    if total.method == "model" or any(gain is None for gain in gains):
        return None
    error = total.half_width / total.value + max(gain for gain in gains if gain is not None)
    return next((word for word, most in (("high", 0.1), ("medium", 0.25), ("low", 0.5)) if error <= most), None)


def _without_unknown(value: Any) -> Any:
    """Without what is None, and without sections that are empty then; an empty member of a list stays."""
    if isinstance(value, Mapping):
        kept = {key: _without_unknown(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item != {}}
    return [_without_unknown(item) for item in value] if isinstance(value, list) else value
