"""The card: escaped, made of what an untrusted notebook keeps, small, and never 0 for what is unknown."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from array import array

import pytest

from lem_kit import metrics
from lem_kit.jupyter import auto, card
from lem_kit.measurement import Completion, Energy, Measurement, Repeat
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


def test_what_the_figures_of_an_interrupted_measurement_are_of_is_said() -> None:
    m = shown(12.3)
    whole = Repeat(0, SECOND, m.energy)
    done, cut = Completion(0, 0, 9, ((5, 1),), 1), Completion(0, 0, 9, (), 1, error="interrupted", repeat=1)
    m = dataclasses.replace(m, status="interrupted", repeats=(whole,), completions=(done,), broken_off=(cut,))
    text = card.text(dataclasses.replace(m, config={"repeats": 4}))
    assert re.search(r"^  repeats +1 of 4 ended; the figures are of it$", text, re.M)
    assert re.search(r"^  requests +1 completed of 2 that were sent$", text, re.M)
    assert re.search(r"^  repeats +2 of 3 ended; the figures are of them$", card.text(
        dataclasses.replace(m, repeats=(whole, whole), config={"repeat": 3})), re.M)  # fmt: skip
    assert "ended;" not in card.text(dataclasses.replace(m, status="ok"))


@pytest.mark.parametrize(("idle_w", "told"), [(5.0, False), (6.5, False), (8.0, True)])
def test_below_idle_is_said_where_the_interval_is(idle_w: float, told: bool) -> None:
    """12.3 ± 0.4 J in 2 s are 6.15 W; the baseline is known to 0.3 W."""
    known = {"kind": "bare", "started_at": "now", "temperature_c": {}, "labels": {}}
    power = {"power_w": {"nvml:gpu0": {"watts": idle_w, "half_width": 0.3}}}
    text = card.text(dataclasses.replace(shown(12.3), baselines={"bare": {**known, **power}}))
    assert ("below idle" in text) is told and "net of idle" in text


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
    ("value", "half", "model", "words"),
    [
        (12.345, 0.4, 0.0, "12.35 ± 0.40 J"),
        (0.0123, 1.9, 0.0, "not resolved (below 1.9 J)"),
        (19.0, 1437.0, 0.0, "not resolved (below 1456 J)"),
        (5.0, 5.0, 0.0, "not resolved (below 10 J)"),
        (5.0, 4.9, 0.0, "5.0 ± 4.9 J"),
        (-0.5, 2.0, 0.0, "not resolved (between -2.5 and 1.5 J)"),
        (-3.0, 1.0, 0.0, "-3.0 ± 1.0 J"),
        # A model may be off by all that it says, which is no matter of resolution; what else is open of it may be.
        (5.0, 5.2, 5.0, "5.0 ± 5.2 J"),
        (5.0, 8.0, 5.0, "not resolved (below 13 J)"),
    ],
)
def test_a_figure_that_cannot_be_told_from_none_is_not_told(value: float, half: float, model: float, words: str) -> None:
    figure = metrics.Figure(value, half, ("nvml:gpu0",), "counter", ("gpu",), model)
    assert figure.told("J") == words
    assert figure.scaled(3).resolved == figure.resolved == metrics.inverse(figure).resolved


@pytest.mark.parametrize("relative_error", [0.0, 1.0])
@pytest.mark.parametrize("noise", [0.2, 10.0])
def test_line_and_card_say_that_a_figure_is_not_resolved(relative_error: float, noise: float) -> None:
    half = math.hypot(noise, 2.0 * relative_error)
    found = Energy("nvml", "gpu0", "model" if relative_error else "counter", "gpu", 2.0, half, ("unresolved",) * (noise > 2))
    domains = {"nvml:gpu0": Domain("gpu", found.method, 0.0, relative_error=relative_error)}
    m = dataclasses.replace(shown(2.0), energy={"nvml:gpu0": found}, trace=Trace({}, {}, domains))
    for told in (card.text(m), card.html(m), auto.line(m)):
        assert ("not resolved (below 12 J)" in told) is (noise > 2)
        assert "±" in told or noise > 2
    for told in (card.text(m), card.html(m)):
        assert ("not resolved (below 1.2 J)" in told) is (noise > 2), "per output token"
    for told in (card.text(m), auto.line(m)):
        assert (" W" in told) is (noise < 2), "a power that is not resolved says no more"
    assert card.html(m).count("not resolved (below 12 J)") == 2 * (noise > 2), "the total and its source"


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
