"""Tables: exact values, models marked, unknowns absent."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from array import array
from typing import Any

from lem_kit import report
from lem_kit.measurement import Completion, Energy, Measurement
from lem_kit.trace import Domain, Series, Trace

SECOND = 1_000_000_000


def run(size: int, joules: float | None, method: str = "counter") -> Measurement:
    reasons = ("modelled",) if method == "model" else () if joules is not None else ("source_failed",)
    half = None if joules is None else 0.5
    energy = Energy("meter", "gpu0", method, "gpu", joules, half, reasons)  # type: ignore[arg-type]
    events = tuple((SECOND // 10 * k, 1) for k in range(1, 11))
    series = Series(array("q", [0, SECOND // 2, SECOND]), array("d", [0.0, 4.0, 10.0]))
    trace = Trace({"meter:gpu0": series}, {}, {"meter:gpu0": Domain("gpu", method, 0.0)})  # type: ignore[arg-type]
    return Measurement(
        f"r{size}", "run", "<i>label</i>", "ok", "", 0, SECOND, {"meter:gpu0": energy},
        completions=(Completion(0, 0, SECOND, events, 4),), config={"size": size, "same": 1}, trace=trace,
        unavailable={"rapl": "no <permission>"},
    )  # fmt: skip


def test_names_are_the_settings_that_differ() -> None:
    assert report.names([run(1, 1.0), run(4, 1.0)]) == ["size=1", "size=4"]
    assert report.names([run(1, 1.0)]) == ["<i>label</i>"]
    rates = [dataclasses.replace(run(1, 1.0), config={"rate_per_s": rate}) for rate in (4.775769535494515, 8.0)]
    assert report.names(rates) == ["rate_per_s=4.7758", "rate_per_s=8"]
    assert report.names([run(1, 1.0), run(1, 2.0)]) == ["<i>label</i> (r1)", "<i>label</i> (r1)"]


def test_names_look_one_level_into_settings_that_are_mappings() -> None:
    args: list[dict[str, Any]] = [{"slots": 8, "cache": {"share": 1}}, {"slots": 16, "kind": "<b>"}, {}]
    runs = [dataclasses.replace(run(1, 1.0), config={"size": 1, "engine_args": each}) for each in args]
    assert report.names(runs) == ["engine_args.slots=8", "engine_args.slots=16, engine_args.kind=<b>", "<i>label</i>"]
    shown = report.as_html(report.table(runs)).data
    assert "engine_args.kind=&lt;b&gt;" in shown and "<b>" not in shown


def test_the_table_has_intervals_methods_and_no_zero_for_unknown() -> None:
    rows = report.table([run(1, 20.0), run(4, None), run(8, 5.0, "model")])
    assert rows["J per output token"].tolist() == ["2.000 ± 0.050", "–", "0.500 ± 0.050"]
    assert rows["method"].tolist() == ["counter", "–", "model"]
    assert rows["TTFT median, ms"].tolist() == ["100"] * 3 and rows["TPOT median, ms"].tolist() == ["100"] * 3
    assert rows["output tokens/s"].tolist() == ["10"] * 3


def test_the_energy_table_gives_every_source_and_every_reason() -> None:
    rows = report.energy_table([run(1, 20.0), run(4, None)])
    assert rows["energy, J"].tolist() == ["20.00 ± 0.50", "–", "–"]
    assert rows["reasons"].tolist() == ["–", "source_failed", "no <permission>"]
    assert rows["run"].tolist() == ["size=1", "size=4", "every run"]
    page = report.as_html(rows).data
    assert "&lt;permission&gt;" in page and "<permission>" not in page
    assert "20.00\u00a0±\u00a00.50</td>" in page  # a figure and its interval stay in one line


def test_the_latency_table_has_intervals_and_withholds_weak_percentiles() -> None:
    def answered(ttft_ms: int) -> Completion:
        first = ttft_ms * 10**6
        return Completion(0, 0, SECOND, tuple((first + gap * 10**6, 1) for gap in (0, 10, 30)), 4)

    many = dataclasses.replace(run(1, 1.0), completions=tuple(answered(100 + k) for k in range(101)))
    rows = {
        row["latency, ms"]: row
        for row in report.latency_table([many, run(4, 1.0)]).to_dict("records")
        if row["run"] == "size=1"
    }
    assert list(rows) == ["TTFT", "TPOT", "inter-token", "end to end"]
    assert rows["TTFT"]["mean"] == "150" and rows["TTFT"]["p95"] == rows["TTFT"]["p99"] == "–"
    middle, low, high = (float(part.strip("[],")) for part in rows["TTFT"]["median"].split())
    assert middle == 150 and 140 <= low < 148 and 152 < high <= 160, "binomial: 150 ± 10"
    assert rows["TPOT"]["median"] == "15 [15, 15]" and rows["inter-token"]["p90"].startswith("20 [")
    one = report.latency_table([run(4, 1.0)]).to_dict("records")
    assert one[0]["median"] == "100" and one[0]["p90"] == "–", "one request has no interval"
    assert report.latency_table([dataclasses.replace(many, completions=())]).empty


def test_the_hardware_table_has_the_ceiling_beside_what_was_reached_and_no_zero_for_unknown() -> None:
    shape = {"layers": 1, "hidden_size": 8, "heads": 2, "parameters": 10**9}
    model = {"name": "m", "dtype": "bfloat16", "quantization": None, **shape}
    known = dataclasses.replace(
        run(1, 1.0),
        backend={"engine": "e", "model": model, "effective": {"weight_bytes": {"cuda:0": 2 * 10**9}}},
        sources={"driver": {"gpus": {"gpu0": {"name": "NVIDIA H200"}}}},
        counters={"peak_memory_bytes": 3.5e9, "batch_requests_mean": 1.5},
    )
    row, unknown = report.hardware_table([known, run(4, 1.0)]).to_dict("records")
    assert row == {
        "run": "model=m, backend=e, size=1", "precision": "bfloat16", "TFLOP/s": "0.026", "FLOPs from": "parameters",
        "peak TFLOP/s": "989.4", "MFU, %": "0.002628", "decode GB/s": "20", "peak GB/s": "4800", "bandwidth, %": "0.4167",
        "peaks from": "NVIDIA H200 datasheet", "weights, GB": "2", "peak memory, GB": "3.5", "KV cache used, %": "–",
        "running batch": "1.5",
    }  # fmt: skip
    assert set(unknown.values()) == {"size=4", "–"}


def test_reasons_are_explained() -> None:
    rows = report.reasons_table([run(1, None), run(2, 1.0, "model")])
    assert rows["code"].tolist() == ["source_failed", "modelled"] and rows["meaning"].str.len().min() > 20


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, lem_kit.report; print([m for m in ('pandas', 'plotly', 'IPython', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
