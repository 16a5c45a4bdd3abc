"""Several measurements in one figure: exact values, models hatched, unknowns named, an axis for what can be compared."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT
from test_report import SECOND, run

import lem_kit as lem
from lem_kit import plots, store
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Measurement


def caption(figure: Any) -> str:
    return str(figure.layout.title.text).replace("<br>", " ")


def labels(figure: Any) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_bars_with_their_intervals_and_the_unknown_named() -> None:
    figure = lem.plot_compare([run(1, 20.0), run(4, None), run(8, 5.0, "model")])
    bars = {bar.name: bar for bar in figure.data}
    measured, model = bars["measured by a counter"], bars["MODELLED, not measured"]
    assert (list(measured.x), list(measured.y), list(measured.error_x.array)) == ([2.0], [0], [0.05])
    assert (list(model.x), list(model.y), list(model.error_x.array)) == ([0.5], [1], [0.05])
    assert model.marker.pattern.shape == "/" and measured.marker.pattern.shape is None
    assert labels(figure) == ["size=1", "size=8"]
    assert "Not known: size=4 (source_failed)" in caption(figure)
    assert "2.000 ± 0.050<br>measured by a counter: meter:gpu0<br>covers gpu" in measured.hovertext[0]


def other_scope(m: Measurement) -> Measurement:
    energy = {key: dataclasses.replace(e, scope="cpu") for key, e in m.energy.items()}
    return dataclasses.replace(m, energy=energy)


def test_what_covers_other_hardware_has_an_axis_of_its_own() -> None:
    figure = lem.plot_compare([run(1, 20.0), other_scope(run(4, 10.0)), run(8, 4.0)])
    axes = [figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text]
    assert axes == ["J per output token; covers gpu", "J per output token; covers cpu"]
    assert [(bar.xaxis, list(bar.x)) for bar in figure.data] == [("x", [2.0, 0.4]), ("x2", [1.0])]
    assert "What is covered differs" in caption(figure)
    assert "differs" not in caption(lem.plot_compare([run(1, 20.0), run(4, 10.0)]))


def test_an_invalid_measurement_is_marked() -> None:
    against = dataclasses.replace(run(1, 20.0), reasons=("foreign_process",))
    (bar,) = lem.plot_compare([against, run(4, 2.0)]).data
    assert list(bar.text) == ["NOT VALID", ""] and "NOT VALID: foreign_process" in bar.hovertext[0]


def test_any_column_of_the_frame_can_be_shown() -> None:
    figure = lem.plot_compare([run(1, 1.0), run(4, 1.0)], "output_tokens_per_s")
    assert [list(bar.x) for bar in figure.data] == [[10.0, 10.0]] and "No interval is known" in caption(figure)
    assert figure.layout.xaxis.title.text == "tokens/s" and not figure.layout.showlegend
    (energy,) = lem.plot_compare([run(1, 20.0)], "energy_j").data
    assert list(energy.x) == [20.0] and list(energy.error_x.array) == [0.5]


def test_what_cannot_be_shown_is_one_sentence() -> None:
    with pytest.raises(LemError, match=r"no metric 'j_per_output_tokens'.*j_per_output_token"):
        lem.plot_compare([run(1, 1.0)], "j_per_output_tokens")
    with pytest.raises(LemError, match="'energy_method' is no number: 'counter'"):
        lem.plot_compare([run(1, 1.0)], "energy_method")
    for wrong in ([], "data/example", [1], None):
        with pytest.raises(LemError, match="takes a list of measurements"):
            lem.plot_compare(wrong)  # type: ignore[arg-type]


def test_names_of_users_cannot_be_read_as_markup() -> None:
    evil = dataclasses.replace(run(1, 1.0), label="<b>%{x}</b> $a$", config={})
    figure = lem.plot_compare([evil])
    assert labels(figure) == ["&lt;b>%{x}&lt;/b> &#36;a&#36;"]
    assert figure.data[0].hovertext[0].startswith("&lt;b>") and figure.data[0].hovertemplate == "%{hovertext}<extra></extra>"


def test_a_comparison_is_drawn_as_ratios() -> None:
    a, b = run(1, 20.0), dataclasses.replace(run(1, 10.0), run_id="other")
    found = lem.compare(a, b, names=("eager", "compiled"))
    figure = lem.plot_compare(found)
    points = {told: (x, down, up, symbol) for t in figure.data for told, x, down, up, symbol in zip(
        t.y, t.x, t.error_x.arrayminus, t.error_x.array, t.marker.symbol)}  # fmt: skip
    ratio = found["j_per_output_token"]
    assert ratio.ratio is not None and ratio.low is not None and ratio.high is not None
    expected = (0.5, ratio.ratio - ratio.low, ratio.high - ratio.ratio)
    assert points["energy per output token"][:3] == pytest.approx(expected)
    assert points["energy per output token"][3] == "circle"
    assert (
        points["output tokens/s"][0] == 1.0 and points["output tokens/s"][3] == "diamond-open"
    )  # one run each: no interval
    assert figure.layout.xaxis.title.text == "ratio compiled / eager"
    assert " ".join(found.verdict.split()) in " ".join(caption(figure).split()) and "Hollow: no interval" in caption(figure)


def test_a_comparison_of_models_says_so() -> None:
    found = lem.compare(run(1, 20.0, "model"), dataclasses.replace(run(1, 10.0, "model"), run_id="other"))
    (energy, *_) = lem.plot_compare(found).data
    assert energy.name == "energy, MODELLED" and set(energy.marker.symbol) <= {"diamond", "diamond-open"}


def test_latencies_of_every_request() -> None:
    figure = plots.plot_latency([run(1, 1.0), run(4, 1.0)])
    assert [(list(box.x), list(box.y)) for box in figure.data] == [([100.0], [0]), ([100.0], [1])] * 2
    silent = dataclasses.replace(run(8, 1.0), completions=())
    assert "No latency is known of: size=8." in caption(plots.plot_latency([run(1, 1.0), silent]))


def test_latencies_of_many_requests_keep_their_ends_and_median() -> None:
    done = tuple(Completion(0, 0, SECOND, ((1_000_000 * k, 1),), 1) for k in range(1, 2002))
    figure = plots.plot_latency([dataclasses.replace(run(1, 1.0), completions=done)])
    shown = sorted(figure.data[0].x)
    assert len(shown) == 200 and (shown[0], shown[-1]) == (1, 2001) and abs(shown[100] - 1001) <= 10
    assert "200 in even steps" in caption(figure)


def test_figures_of_recordings_are_plain_lists() -> None:
    runs = [m for m in store.runs(ROOT / "data/example/h100") if m.kind == "run"]
    for figure in (lem.plot_compare(runs), plots.plot_latency(runs)):
        assert "bdata" not in figure.to_json() and len(figure.to_json()) < 30_000


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, lem_kit.timeline; print([m for m in ('pandas', 'plotly', 'IPython', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
