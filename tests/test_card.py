"""The card: escaped, made of what an untrusted notebook keeps, small, and never 0 for what is unknown."""

from __future__ import annotations

import dataclasses
import json
import re
from array import array

import pytest

from lem_kit import metrics
from lem_kit.jupyter import card
from lem_kit.measurement import Completion, Energy, Measurement
from lem_kit.trace import Domain, Series, Trace

SECOND = 1_000_000_000


def shown(joules: float | None, label: str = "work", method: str = "counter") -> Measurement:
    reasons = () if joules is not None else ("source_failed",)
    half = None if joules is None else 0.4
    energy = Energy("nvml", "gpu0", method, "gpu", joules, half, reasons)  # type: ignore[arg-type]
    stamps = array("q", [SECOND * k // 10 for k in range(21)])
    counter = Series(stamps, array("d", [2.0 * k * k for k in range(21)]))
    trace = Trace({"nvml:gpu0": counter}, {}, {"nvml:gpu0": Domain("gpu", "counter", 0.0)})
    return Measurement("r1", "window", label, "ok", "now", 0, 2 * SECOND, {"nvml:gpu0": energy}, output_tokens=10,
                       unavailable={"rapl": "<no> permission"}, trace=trace)  # fmt: skip


def test_the_text_says_joules_method_and_scope() -> None:
    lines = card.text(shown(12.345)).splitlines()
    assert lines[0] == "work (window, ok)"
    assert "12.35 ± 0.40 J (measured by a counter: nvml:gpu0; covers gpu)" in lines[1]
    assert any("1.235 ± 0.040 J" in line and "per output token" in line for line in lines)
    assert any("6.17 ± 0.20 W" in line for line in lines)
    assert any("▁" in line and "█" in line for line in lines)


def test_the_model_and_what_it_got_out_of_the_hardware_are_shown_where_they_are_known() -> None:
    model = {"name": "m", "dtype": "bfloat16", "quantization": None, "parameters": 8000}
    facts = {"engine": "e", "model": model, "effective": {"weight_bytes": {"cuda:0": 16000}}}
    m = dataclasses.replace(
        shown(12.3),
        backend=facts,
        completions=(Completion(0, 0, SECOND, ((SECOND // 2, 1), (SECOND, 4)), 6),),
        sources={"driver": {"gpus": {"gpu0": {"name": "NVIDIA H100 80GB HBM3"}}}},
        config={"counted_flop": 2 * 989.4e10},
        counters={"peak_memory_bytes": 12.34e9, "kv_cache_used_max": 0.25, "batch_requests_mean": 3.5},
    )
    text = card.text(m)
    assert re.search(r"^  model +m, bfloat16$", text, re.M)
    line = r"^  MFU +1 % \(9\.89 of 989\.4 TFLOP/s, 1 x NVIDIA H100 80GB HBM3; found from: counted\)$"
    assert re.search(line, text, re.M), text
    assert re.search(r"^  peak memory +12\.34 GB$", text, re.M) and re.search(
        r"^  KV cache +25 % in use at most$", text, re.M
    )
    assert re.search(r"^  running batch +3\.5 requests on average$", text, re.M)
    other = dataclasses.replace(m, sources={}, counters={}, backend={**facts, "model": {"name": "m", "dtype": None}})
    assert not re.search(r"model|MFU|bandwidth|memory|cache|batch", card.text(other))


def test_an_unknown_energy_is_words_and_the_reasons_follow() -> None:
    m = shown(None)
    text = card.text(m)
    assert "not known" in text and "source_failed: the source stopped answering" in text and "rapl: <no> permission" in text
    assert not re.search(r"\b0(\.0+)? J", text) and "per output token" not in text and "mean power" not in text
    assert card.record(m)["energy"]["nvml:gpu0"]["joules"] is None
    page = card.html(m)
    assert page.index("rapl: &lt;no&gt; permission") < page.index("<details>"), "what is missing is not folded away"
    page = card.html(shown(5.0))
    assert page.index("rapl: &lt;no&gt; permission") > page.index("<details>")


def test_a_model_is_called_one() -> None:
    assert "MODELLED, not measured" in card.text(shown(5.0, method="model"))
    assert "MODELLED, not measured" in card.html(shown(5.0, method="model"))


def test_the_html_survives_an_untrusted_notebook_and_escapes_what_users_write() -> None:
    page = card.html(shown(12.3, label="<script>alert(1)</script>"))
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "&lt;no&gt; permission" in page
    assert set(re.findall(r"<(\w+)", page)) <= {
        "table", "caption", "b", "tr", "th", "td", "ul", "li", "details", "summary", "p", "img"
    }  # fmt: skip
    assert not re.search(r"\s(style|id|on\w+)=", page)
    assert len(page) < 6000


def test_the_record_travels_as_strict_json() -> None:
    data, metadata = card.mimebundle(shown(12.3))
    assert set(data) == {"text/plain", "text/html"}
    record = json.loads(json.dumps(metadata["lem_kit"], allow_nan=False))
    assert record["energy"]["nvml:gpu0"] == {"joules": 12.3, "uncertainty_j": 0.4, "method": "counter"}


@pytest.mark.parametrize(
    ("value", "half", "words"),
    [
        (12.345, 0.4, "12.35 ± 0.40 J"),
        (12345.6, 99.0, "12346 ± 99 J"),
        (0.0012, 0.00031, "0.00120 ± 0.00031 J"),
        (0.000012, 0.000003, "0.0000120 ± 0.0000030 J"),
        (1.2e-7, 3e-8, "1.200e-07 ± 3.0e-08 J"),
        (1.2e-9, 3e-10, "1.200e-09 ± 3.0e-10 J"),
        (5.0, 0.0, "5 J"),
        (5.0, None, "5 J"),
        (123456.0, 54321.0, "123456 ± 54321 J"),
    ],
)
def test_a_quantity_has_the_digits_that_its_interval_leaves(value: float, half: float | None, words: str) -> None:
    assert metrics.quantity(value, half, "J") == words
