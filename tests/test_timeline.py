"""One measurement over time: what was read is drawn, what was not is named, and a long run stays small."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import lem_kit as lem
from lem_kit import bands, timeline
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Energy, Measurement, Repeat
from lem_kit.trace import Domain, Series, Trace

SECOND = 1_000_000_000
EVIL = "<b>x</b></script> %{y} $a$ <a href='javascript:alert(1)'>k</a> &lt;"


def series(points: list[tuple[float, float]]) -> Series:
    return Series(array("q", [round(t * SECOND) for t, _ in points]), array("d", [v for _, v in points]))


def request(start: float, first: float, end: float, tokens: int = 11, **facts: Any) -> Completion:
    step = (end - first) / (tokens - 1)
    events = tuple((round((first + k * step) * SECOND), 1) for k in range(tokens))
    return Completion(round(start * SECOND), round(start * SECOND), events[-1][0], events, 32, **facts)


def measurement(**changes: Any) -> Measurement:
    """A second at 10 W by a counter, 12 W by a model; a request that waits for 0.2 s and decodes until 1.0."""
    trace = Trace(
        {
            "meter:gpu0": series([(0.1 * k - 0.5, k) for k in range(21)]),
            "guess:cpu": series([(-1, 0), (0, 12), (1, 24), (2, 36)]),
        },
        {},
        {"meter:gpu0": Domain("gpu", "counter", 0.0), "guess:cpu": Domain("cpu", "model", 0.0, relative_error=1.0)},
    )
    energy = {
        "meter:gpu0": Energy("meter", "gpu0", "counter", "gpu", 10.0, 0.25),
        "guess:cpu": Energy("guess", "cpu", "model", "cpu", 12.0, 12.0, ("modelled",)),
    }
    given: dict[str, Any] = {"completions": (request(0, 0.2, 1.0),), "trace": trace} | changes
    return Measurement("r", "run", "a label", "ok", "", 0, SECOND, energy, **given)


def named(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def test_lanes_of_an_interrupted_run_say_what_is_missing() -> None:
    cut = request(0.3, 0.5, 0.7, tokens=4, error="interrupted", repeat=1)
    m = dataclasses.replace(
        measurement(config={"requests": 5, "repeats": 2}), status="interrupted", reasons=("interrupted",), broken_off=(cut,)
    )
    figure = m.plot()
    assert list(named(figure)["interrupted"].x) == [0.7] and list(named(figure)["interrupted"].y) == [1]
    assert "request 1 interrupted" in named(figure)["interrupted"].text[0] and "failed" not in named(figure)
    title = figure.layout.title.text.replace("<br>", " ")
    assert "1 of 2 requests was interrupted." in title and "8 of 10 requests were never handed over: no lanes." in title
    nothing = dataclasses.replace(m, completions=(), broken_off=())
    assert "10 of 10 requests were never handed over: no lanes." in nothing.plot().layout.title.text.replace("<br>", " ")
    ended = dataclasses.replace(m, status="ok", reasons=(), broken_off=())  # `repeats` was the most, and fewer were enough
    assert "handed over" not in ended.plot().layout.title.text


def test_a_title_is_a_text() -> None:
    with pytest.raises(LemError, match=r"plot\(title=\) takes a text: got 7"):
        measurement().plot(7)  # type: ignore[arg-type]


def test_every_source_is_drawn_and_a_model_looks_different() -> None:
    drawn = named(measurement().plot())
    counter, model = drawn["meter:gpu0, counter"], drawn["guess:cpu, MODELLED"]
    assert set(counter.y) == {10.0} and set(model.y) == {12.0}
    assert (counter.line.dash, model.line.dash) == ("solid", "dot")
    assert "W<extra>meter:gpu0, counter</extra>" in counter.hovertemplate


def test_the_caption_has_the_energy_with_its_interval_method_and_coverage() -> None:
    title = measurement().plot().layout.title.text
    assert title.startswith("a label<br>") and "10.00 ± 0.25 J, measured by a counter; covers gpu." in title.replace(
        "<br>", " "
    )


def test_lanes_tell_waiting_from_decoding() -> None:
    drawn = named(measurement().plot())
    assert list(drawn["until first token"].x) == [0.0, 0.2, None] and list(drawn["decoding"].x) == [0.2, 1.0, None]
    assert drawn["until first token"].text[0] == "request 0<br>TTFT 200 ms<br>prompt 32 tokens"
    assert drawn["decoding"].text[0] == "request 0<br>11 output tokens<br>TPOT 80 ms"
    assert "failed" not in drawn


def test_failed_requests_are_marked_and_counted_wherever_they_are() -> None:
    lost = Completion(0, 0, SECOND // 2, (), None, error=EVIL)
    many = (*[request(0.001 * k, 0.2, 0.9) for k in range(200)], lost)
    figure = measurement(completions=many).plot()
    drawn = named(figure)
    assert (list(drawn["failed"].x), list(drawn["failed"].y)) == ([0.5], [200])
    assert drawn["failed"].text[0].startswith("request 200 failed: &lt;b>x")
    told = figure.layout.title.text.replace("<br>", " ")
    assert "1 of 201 requests failed." in told and "Lanes: 64 of 201 requests, in even steps." in told
    assert len(set(drawn["decoding"].y) - {None}) == 64


def test_phases_that_take_turns_are_bands_with_their_spans() -> None:
    drawn = named(measurement().plot())
    (prefill,) = [trace for name, trace in drawn.items() if name.startswith("prefill")]
    assert list(prefill.x) == [0.0, 0.0, 0.2, 0.2, None] and prefill.fill == "toself" and prefill.y[0] == 0
    assert any(name.startswith("decode: ") and name.endswith(" J") for name in drawn)
    assert [name for name, _, _ in bands.of(measurement())] == ["prefill", "decode"]


def test_phases_that_mix_give_way_to_the_load() -> None:
    mixed = tuple(request(0.05 * k, 0.05 * k + 0.2, 0.8) for k in range(8))
    found = {name: spans for name, _, spans in bands.of(measurement(completions=mixed))}
    ms = 1_000_000
    assert found == {"idle": [(800 * ms, 1000 * ms)], "ramp": [(0, 350 * ms)], "steady": [(350 * ms, 800 * ms)]}


def test_repeats_are_shaded_and_too_many_are_thinned_and_counted() -> None:
    def repeats(n: int) -> tuple[Repeat, ...]:
        return tuple(Repeat(k * SECOND // n, (k * SECOND + SECOND // 2) // n, {}) for k in range(n))

    assert len(named(measurement(repeats=repeats(4), completions=()).plot())["4 repeats"].x) == 4 * 5
    drawn = named(measurement(repeats=repeats(1000), completions=()).plot())
    assert len(drawn["1,000 repeats, 200 shaded"].x) == 200 * 5
    assert not any("repeat" in name for name in named(measurement(repeats=repeats(1), completions=()).plot()))


def test_temperature_and_utilisation_have_units_where_they_are_known() -> None:
    gauges = {
        "meter:gpu0.temperature_c": series([(0.2, 40.0), (0.7, 41.0)]),
        "meter:gpu0.sm_utilization": series([(0.2, 0.5)]),
        "meter:gpu0.sm_clock_hz": series([(0.2, 1e9)]),
    }
    known = measurement()
    figure = dataclasses.replace(known, trace=dataclasses.replace(known.trace, gauges=gauges)).plot()
    drawn = named(figure)
    assert list(drawn["meter:gpu0 temperature"].y) == [40.0, 41.0] and list(drawn["meter:gpu0 utilisation"].y) == [50.0]
    assert drawn["meter:gpu0 temperature"].yaxis != drawn["meter:gpu0 utilisation"].yaxis
    assert "Not read" not in figure.layout.title.text and not any("clock" in name for name in drawn)
    assert "Not read: temperature, utilisation." in known.plot().layout.title.text.replace("<br>", " ")


def test_a_measurement_without_any_source_says_so() -> None:
    m = Measurement("r", "window", "w", "ok", "", 0, SECOND, {}, unavailable={"nvml": "no driver"})
    figure = m.plot()
    told = figure.layout.title.text.replace("<br>", " ")
    assert not figure.data and figure.layout.annotations[0].text == "no power was seen"
    assert "Energy: not known." in told and "NOT VALID: no_source." in told and "Not open: nvml." in told


def test_an_energy_that_is_unknown_is_named_with_its_reason() -> None:
    energy = {"meter:gpu0": Energy("meter", "gpu0", "counter", "gpu", None, None, ("source_failed",))}
    told = Measurement("r", "window", "w", "ok", "", 0, SECOND, energy).plot().layout.title.text.replace("<br>", " ")
    assert "No power of: meter:gpu0 (source_failed)." in told


def test_texts_of_users_cannot_be_read_as_markup() -> None:
    known = measurement()
    trace = Trace({EVIL: known.trace.counters["meter:gpu0"]}, {}, {EVIL: Domain("gpu", "counter", 0.0)})
    text = json.loads(measurement(trace=trace, completions=()).plot(title=EVIL).to_json())
    shown = json.dumps([text["layout"]["title"]["text"], [t.get("name") for t in text["data"]]])
    templates = json.dumps([t.get("hovertemplate") for t in text["data"]])
    assert "<a " not in shown + templates and "<b>" not in shown + templates and "</script" not in shown + templates
    assert "$" not in shown and "%{y} " not in templates  # neither TeX nor a value that is filled in


def test_thinning_keeps_the_extremes_of_every_stretch() -> None:
    draw = random.Random(0)
    points = [(k * 1_000_000, draw.uniform(100, 200)) for k in range(10_000)]
    points[1234], points[7777] = (1_234_000_000, 999.0), (7_777_000_000, 1.0)
    found = timeline.curve(measurement(), points, 100)
    assert found.thinned and len(found.x) <= 100 and found.x == sorted(found.x)
    assert (found.x[found.y.index(999.0)], found.x[found.y.index(1.0)]) == (1.234, 7.777)
    assert not timeline.curve(measurement(), points[:100], 100).thinned


def test_a_reading_that_is_no_number_is_not_drawn() -> None:
    known = measurement()
    gauges = {"meter:gpu0.temperature_c": series([(0.2, 40.0), (0.4, math.nan)])}
    figure = dataclasses.replace(known, trace=dataclasses.replace(known.trace, gauges=gauges)).plot()
    assert list(named(figure)["meter:gpu0 temperature"].y) == [40.0]


def test_a_large_run_stays_small() -> None:
    stamps = [0.05 * k - 1 for k in range(12_000)]
    traces: dict[str, Any] = {"counters": {}, "gauges": {}, "domains": {}}
    for gpu in range(8):
        key = f"nvml:gpu{gpu}"
        traces["counters"][key] = series([(t, 10.0 * k) for k, t in enumerate(stamps)])
        traces["gauges"][f"{key}.temperature_c"] = series([(t, 50.0 + k % 7) for k, t in enumerate(stamps)])
        traces["domains"][key] = Domain("gpu", "counter", 0.0)
    done = tuple(request(0.5 * k, 0.5 * k + 0.1, 0.5 * k + 10, tokens=500) for k in range(1000))
    figure = Measurement("r", "run", "", "ok", "", 0, 510 * SECOND, {}, completions=done, trace=Trace(**traces)).plot()
    assert len(figure.to_json()) < 300_000
    told = figure.layout.title.text.replace("<br>", " ")
    assert "Curves are thinned: the least and the most of each stretch are kept." in told
    assert sum(t.showlegend is not False for t in figure.data if "temperature" in t.name) == 1  # of eight


@pytest.mark.parametrize("run", sorted((ROOT / "data/example/h100").glob("2*")), ids=lambda path: path.name[16:])
def test_recorded_runs_are_plain_lists_and_strict_json(run: Path) -> None:
    text = lem.load(run).plot().to_json()
    assert "bdata" not in text and len(text) < 60_000

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["data"]
