"""Runs recorded on an H100 (`data/example/h100`): their traces give the energies again, and play back as hardware."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from conftest import ROOT

import lem_kit as lem
from lem_kit import metrics, store
from lem_kit.energy.replay import ReplaySource, load
from lem_kit.measurement import Measurement
from lem_kit.session import energy

FOLDER = ROOT / "data" / "example" / "h100"
EVERY = list(store.runs(FOLDER))
RUNS = {m.label: m for m in EVERY}
SQUARE = "sensor square, 1000 ms"


def place(label: str) -> Path:
    return FOLDER / RUNS[label].run_id


@pytest.mark.parametrize("m", EVERY, ids=lambda m: m.run_id[16:])
def test_the_stored_trace_gives_the_stored_energies(m: Measurement) -> None:
    """Of the window and of each repeat. How a window's energy is found may have become better since: then it moves, but not
    out of the interval."""
    for window in (m, *m.repeats):
        again = energy(m.trace, window.t0_ns, window.t1_ns)
        assert again.keys() == window.energy.keys() == {"nvml:gpu0", "nvml_power:gpu0"}
        for key, stored in window.energy.items():
            assert stored.joules is not None and stored.uncertainty_j is not None
            assert again[key].joules == pytest.approx(stored.joules, abs=stored.uncertainty_j)


def test_a_folder_of_runs_beside_runs_is_no_incomplete_run(recwarn: pytest.WarningsRecorder) -> None:
    assert not {m.run_id for m in store.runs(FOLDER.parent)} & {m.run_id for m in EVERY}
    assert not [str(w.message) for w in recwarn if "h100" in str(w.message)]


def test_idle_is_what_the_counter_says_it_is() -> None:
    """Without CUDA 70 W, with it 119 W, by both figures."""
    for label, watts in (("idle bare", 70.4), ("idle context", 119.1)):
        m = RUNS[label]
        for found in m.energy.values():
            assert found.joules is not None
            assert found.joules / m.duration_s == pytest.approx(watts, abs=0.2)


def test_samples_in_step_with_the_load_disagree_and_it_is_said() -> None:
    assert metrics.agreement(RUNS["sensor square, 20 ms"].energy)["nvml:gpu0"] > 0.15
    found = {label for label, m in RUNS.items() if "sources_disagree" in metrics.reasons(m)}
    assert found == {"sensor square, 20 ms"}


def test_net_energy_repeats_where_gross_energy_follows_the_host() -> None:
    """The same work twice within a minute: the host was 1.7 times slower the first time, and the GPU idled longer."""
    first, second = (m for m in EVERY if m.label == "random-llama-160m batch 1")
    assert (first.config["pass"], second.config["pass"]) == (1, 2)
    gross = [metrics.energy_j(m) for m in (first, second)]
    net = [metrics.net_energy_j(m) for m in (first, second)]
    tokens = metrics.output_tokens(first)
    assert tokens == metrics.output_tokens(second) == 320
    assert [round(f.value / tokens, 3) for f in gross if f] == pytest.approx([2.227, 1.338], abs=0.002)
    assert [round(f.value / tokens, 4) for f in net if f] == pytest.approx([0.0635, 0.0644], abs=0.0005)
    assert all(f and f.half_width / tokens < 0.008 for f in net)


def steady_w(m: Measurement, key: str) -> tuple[float, float]:
    found = m.energy[key]
    assert found.joules is not None and found.uncertainty_j is not None
    return found.joules / m.duration_s, found.uncertainty_j / m.duration_s


def test_a_recording_is_measured_like_hardware(tmp_path: Path) -> None:
    """Played through a session: both figures come back within their intervals and 3 % for the readings' distance, the record
    says that they are played, and what is saved gives the same energies when it is loaded."""
    recorded = RUNS["idle context"]
    source = ReplaySource(load(place("idle context")))
    with lem.Session(tmp_path, sources=[source], interval_s=0.02) as session:
        threading.Event().wait(0.7)
        with session.window("played") as window:
            threading.Event().wait(0.7)
        m = window.measurement
    assert m.energy.keys() == {"replay:gpu0", "replay_power:gpu0"}
    assert all("replayed" in e.reasons for e in m.energy.values())
    for mine, theirs in (("replay:gpu0", "nvml:gpu0"), ("replay_power:gpu0", "nvml_power:gpu0")):
        (watts, half), (reference, _) = steady_w(m, mine), steady_w(recorded, theirs)
        assert watts == pytest.approx(reference, abs=half + 0.03 * reference)
    saved = store.load(tmp_path / m.run_id)
    assert energy(saved.trace, saved.t0_ns, saved.t1_ns) == saved.energy == m.energy


def test_a_square_wave_comes_back() -> None:
    """The samples are handed over one by one as they were recorded, from idle to more than the limit of 700 W."""
    now_ns = 0
    source = ReplaySource(load(place(SQUARE)), lambda: now_ns)
    first_ns, last_ns = load(place(SQUARE)).bounds_ns()
    seen = []
    while now_ns < last_ns - first_ns - 100_000_000:
        now_ns += 70_000_000
        seen += source.samples()["gpu0.power_w"]
    gauge = RUNS[SQUARE].trace.gauges["nvml:gpu0.power_w"].between(first_ns + 1, first_ns + now_ns)
    assert seen == [(t_ns - first_ns, watts) for t_ns, watts in zip(gauge.t_ns, gauge.value)]
    assert min(gauge.value) < 130 and max(gauge.value) > 700
