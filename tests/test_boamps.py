"""BoAmps reports: what the format asks for is there, what is not known is not, and the doubt stands in the remarks."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import ROOT
from test_report import SECOND, run

import lem_kit as lem
from lem_kit.errors import LemError
from lem_kit.export import boamps
from lem_kit.measurement import Measurement, Repeat

TEXT, NUMBER, WHOLE = str, (int, float), int
# The format as its schemas have it: fields by type or allowed words, "!" marks what must be there.
ALGORITHM = {
    "trainingType": TEXT, "algorithmType": TEXT, "algorithmName": TEXT, "algorithmUri": TEXT, "foundationModelName": TEXT,
    "foundationModelUri": TEXT, "parametersNumber": NUMBER, "framework": TEXT, "frameworkVersion": TEXT, "classPath": TEXT,
    "layersNumber": NUMBER, "epochsNumber": NUMBER, "optimizer": TEXT, "quantization": TEXT,
}  # fmt: skip
DATASET = {
    "dataUsage!": {"input", "output"}, "dataQuantity": NUMBER, "dataSize": NUMBER, "shape": TEXT,
    "dataType!": {"tabular", "audio", "boolean", "image", "video", "object", "text", "token", "word", "other"},
}  # fmt: skip
MEASURE = {
    "measurementMethod!": TEXT, "manufacturer": TEXT, "version": TEXT, "cpuTrackingMode": TEXT, "gpuTrackingMode": TEXT,
    "averageUtilizationCpu": NUMBER, "averageUtilizationGpu": NUMBER, "powerConsumption!": NUMBER,
    "measurementDuration": NUMBER, "measurementDateTime": TEXT,
}  # fmt: skip
COMPONENT = {
    "componentName": TEXT, "componentType!": TEXT, "nbComponent!": WHOLE, "memorySize": NUMBER, "manufacturer": TEXT,
    "family": TEXT, "series": TEXT, "share": NUMBER,
}  # fmt: skip
REPORT = {
    "header": {
        "licensing": TEXT, "formatVersion": TEXT, "formatVersionSpecificationUri": TEXT, "reportId": TEXT,
        "reportDatetime!": TEXT, "reportStatus": {"draft", "final", "corrective", "other"},
        "publisher": {
            "name": TEXT, "division": TEXT, "projectName": TEXT, "publicKey": TEXT,
            "confidentialityLevel!": {"public", "internal", "confidential", "secret"},
        },
    },
    "task!": {
        "taskStage!": TEXT, "taskFamily!": TEXT, "nbRequest": NUMBER, "algorithms!": [ALGORITHM], "dataset!": [DATASET],
        "measuredAccuracy": NUMBER, "taskDescription": TEXT,
        "estimatedAccuracy": {"veryPoor", "poor", "average", "good", "veryGood"},
    },
    "measures!": [MEASURE],
    "system": {"os!": TEXT, "distribution": TEXT, "distributionVersion": TEXT},
    "software": {"language!": TEXT, "version": TEXT},
    "infrastructure!": {
        "infraType!": {"publicCloud", "privateCloud", "onPremise", "other"}, "cloudProvider": TEXT, "cloudInstance": TEXT,
        "cloudService": TEXT, "components!": [COMPONENT],
    },
    "environment": {
        "country!": TEXT, "latitude": NUMBER, "longitude": NUMBER, "location": TEXT,
        "powerSupplierType": {"public", "private", "internal", "other"}, "powerSourceCarbonIntensity": NUMBER,
        "powerSource": {"solar", "wind", "nuclear", "hydroelectric", "gas", "coal", "other"},
    },
    "quality": {"high", "medium", "low"},
}  # fmt: skip


def check(value: Any, form: Any, where: str = "report") -> None:
    if isinstance(form, Mapping):
        assert isinstance(value, Mapping), where
        names = {name.rstrip("!"): part for name, part in form.items()}
        assert {name.rstrip("!") for name in form if name.endswith("!")} <= value.keys() <= names.keys(), where
        for name, item in value.items():
            check(item, names[name], f"{where}.{name}")
    elif isinstance(form, list):
        assert isinstance(value, list) and value, where
        for item in value:
            check(item, form[0], where)
    elif isinstance(form, set):
        assert value in form, where
    else:
        assert isinstance(value, form) and not isinstance(value, bool), where


def known(joules: float = 20.0, method: str = "counter", gain: float | None = 0.05) -> Measurement:
    model = {"name": "m", "dtype": "bfloat16", "quantization": None, "layers": 3, "parameters": 1_500_000_000}
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_520_809_984}
    return dataclasses.replace(
        run(1, joules, method),
        label="a\nlabel",
        started_at="2026-11-24T20:27:57.480+02:00",
        backend={"engine": "transformers", "version": "5.1", "model": model},
        environment={
            "os": "Linux-6.1-x",
            "python": "3.11.7",
            "lem_kit": "0.1.0",
            "cpu": "C",
            "cpu_count": 8,
            "memory_bytes": 64e9,
        },
        sources={"meter": {"gpus": {"gpu0": gpu, "gpu7": gpu}} | ({"gain_error": gain} if gain is not None else {})},
    )


def test_a_run_becomes_what_the_format_asks_for() -> None:
    found = boamps.report(known())
    check(found, REPORT)
    (measure,) = found["measures"]
    assert measure == {
        "measurementMethod": "lem_kit (meter; counter)", "version": "0.1.0", "gpuTrackingMode": "meter (counter)",
        "powerConsumption": 20 / 3.6e6, "measurementDuration": 1.0, "measurementDateTime": "2026-11-24 18:27:57",
    }  # fmt: skip
    (algorithm,) = found["task"]["algorithms"]
    assert algorithm == {
        "algorithmType": "llm", "foundationModelName": "m", "parametersNumber": 1.5, "framework": "transformers",
        "frameworkVersion": "5.1", "layersNumber": 3, "quantization": "bfloat16",
    }  # fmt: skip
    assert found["task"]["nbRequest"] == 1 and [d["dataQuantity"] for d in found["task"]["dataset"]] == [4, 10]
    gpu, cpu, ram = found["infrastructure"]["components"]
    assert (gpu["nbComponent"], gpu["memorySize"], gpu["manufacturer"]) == (1, 85.521, "NVIDIA")  # not the one beside it
    assert (cpu["componentName"], cpu["nbComponent"], ram["memorySize"]) == ("C, logical CPUs", 8, 64.0)
    assert found["system"] == {"os": "Linux"} and found["quality"] == "high" and "environment" not in found
    assert str(uuid.UUID(found["header"]["reportId"])) == boamps.report(known())["header"]["reportId"]


def test_interval_method_and_coverage_stand_in_the_remarks() -> None:
    told = boamps.report(known())["task"]["taskDescription"]
    assert told.startswith("a label. 20.00 ± 0.50 J (half-width of a 95 % interval), measured by a counter: meter:gpu0.")
    assert "It covers gpu and nothing else" in told and "2.000 ± 0.050 J per output token" in told
    assert "infraType is not known to lem_kit" in told and "MODELLED" not in told


def test_a_model_is_marked_and_has_no_quality() -> None:
    found = boamps.report(known(5.0, "model"))
    check(found, REPORT)
    assert found["measures"][0]["measurementMethod"] == "lem_kit (meter; MODELLED, not measured)"
    assert found["measures"][0]["gpuTrackingMode"] == "meter (MODELLED)"
    assert "MODELLED: computed from assumptions" in found["task"]["taskDescription"] and "quality" not in found


@pytest.mark.parametrize(
    ("joules", "gain", "quality"),
    [(20.0, 0.05, "high"), (20.0, 0.08, "medium"), (1.5, 0.05, "low"), (0.8, 0.05, None), (20, None, None)],
)
def test_quality_is_of_interval_and_gain_error_together(joules: float, gain: float | None, quality: str | None) -> None:
    assert boamps.report(known(joules, gain=gain)).get("quality") == quality


def test_two_sources_of_one_device_are_one_measure() -> None:
    m = lem.load(next((ROOT / "data/example/h100").glob("*batch-8*")))
    found = boamps.report(m)
    check(found, REPORT)
    total = lem.metrics.energy_j(m)
    assert total is not None and len(m.energy) == 2 and len(found["measures"]) == 1
    assert found["measures"][0]["powerConsumption"] == total.value / 3.6e6
    assert 0 < found["measures"][0]["averageUtilizationGpu"] < 1
    assert found["task"]["nbRequest"] == 40 and "5 repeats are summed" in found["task"]["taskDescription"]


@pytest.mark.parametrize("path", sorted((ROOT / "data/example").glob("batch*")), ids=lambda path: path.name[:12])
def test_recorded_runs_pass(path: Any) -> None:
    check(boamps.report(lem.load(path)), REPORT)


def test_what_only_the_user_knows_is_taken_from_the_user() -> None:
    facts = {
        "infraType": "onPremise", "country": "france", "powerSourceCarbonIntensity": 56, "licensing": "CC BY 4.0",
        "publisher": {"name": "ACME", "confidentialityLevel": "public"}, "taskFamily": "chatbot", "reportStatus": "final",
    }  # fmt: skip
    found = boamps.report(known(), facts)
    check(found, REPORT)
    assert found["environment"] == {"country": "france", "powerSourceCarbonIntensity": 56}
    assert found["infrastructure"]["infraType"] == "onPremise" and "infraType" not in found["task"]["taskDescription"]
    assert found["task"]["taskFamily"] == "chatbot" and found["header"]["publisher"]["name"] == "ACME"


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"contry": "x"}, "did you mean 'country'"),
        ({"infraType": "cloud"}, "infraType is one of publicCloud, privateCloud, onPremise, other: got 'cloud'"),
        ({"latitude": "48", "country": "x"}, "latitude is a number"),
        ({"taskFamily": 3}, "taskFamily is a text"),
        ({"location": "Paris"}, "names the country"),
        ({"publisher": {"name": "ACME"}}, "confidentialityLevel must be among them"),
    ],
)
def test_a_wrong_fact_is_one_sentence(facts: dict[str, Any], told: str) -> None:
    with pytest.raises(LemError, match=told):
        boamps.report(known(), facts)


def test_an_unknown_energy_is_no_report() -> None:
    with pytest.raises(LemError, match=r"not known \(source_failed\)"):
        boamps.report(dataclasses.replace(known(), energy=run(1, None).energy))


def test_a_window_must_say_what_was_computed() -> None:
    window = dataclasses.replace(known(), kind="window", completions=(), backend=None, output_tokens=7)
    with pytest.raises(LemError, match="give taskStage and taskFamily"):
        boamps.report(window)
    found = boamps.report(window, {"taskStage": "inference", "taskFamily": "textGeneration"})
    check(found, REPORT)
    assert found["task"]["algorithms"] == [{}] and "nbRequest" not in found["task"]
    assert found["task"]["dataset"] == [{"dataUsage": "output", "dataType": "token", "dataQuantity": 7}]


def test_repeats_are_summed() -> None:
    once = known()
    repeats = tuple(Repeat(k * SECOND, (k + 1) * SECOND, once.energy) for k in range(2))
    found = boamps.report(dataclasses.replace(once, repeats=repeats, t1_ns=2 * SECOND))
    assert found["measures"][0]["powerConsumption"] == 40 / 3.6e6 and found["measures"][0]["measurementDuration"] == 2.0
