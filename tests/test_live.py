"""The live view: what it shows, who gets it, and that it never is in the way."""

from __future__ import annotations

import base64
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from conftest import FakeClock
from jupyter_client.manager import start_new_kernel

import lem_kit as lem
from lem_kit import notebooks, session, traffic
from lem_kit.jupyter import live
from lem_kit.measurement import Request
from lem_kit.session import Span
from lem_kit.trace import Domain, Series, Trace

S = 1_000_000_000
NOW = 1_000 * S
GPU = Domain("gpu", "counter")


def staircase(watts: float, until_ns: int = NOW, offset_j: float = 0.0) -> Series:
    """Two minutes of a counter that steps every 100 ms and is read every 50 ms."""
    series = Series()
    for t_ns in range(until_ns - 120 * S, until_ns + 1, S // 20):
        series.append(t_ns, offset_j + watts * (t_ns // (S // 10)) / 10)
    return series


def power(trace: Trace, domains: dict[str, Domain], elapsed_s: float = 30.0) -> str | None:
    found = live.power_now(trace, domains, NOW, elapsed_s)
    return found and found.words


# --- power and temperature --------------------------------------------------------------------------------------------


def test_power_is_the_mean_of_the_last_second() -> None:
    trace = Trace({"nvml:gpu0": staircase(313.0)})
    assert power(trace, {"nvml:gpu0": GPU}) == "310 W, mean of the last second (covers gpu)"
    series = trace.counters["nvml:gpu0"]
    for t_ns in range(NOW + S // 20, NOW + S + 1, S // 20):
        series.append(t_ns, series.value[-1] + 10.0 * (t_ns % (S // 10) == 0))
    found = live.power_now(trace, {"nvml:gpu0": GPU}, NOW + S, 30.0)
    assert found and found.words.startswith("100 W")


def test_what_a_calibration_takes_off_is_not_shown() -> None:
    trace, calibrated = Trace({"nvml:gpu0": staircase(313.0)}), GPU._replace(offset_w=13.0)
    assert power(trace, {"nvml:gpu0": calibrated}) == "300 W, mean of the last second (covers gpu)"


def test_the_total_is_made_as_a_cards_is() -> None:
    """The counter before the integral of the same device, by the samples beside it, since it may be read seldom; scopes
    added; a model only where nothing is measured."""
    samples = Series()
    for t_ns in range(NOW - 5 * S, NOW + 1, S // 10):
        samples.append(t_ns, 300.0)
    integral = Domain("gpu", "integral", gauge="nvml:gpu0.power_w", means=True)
    model = Domain("cpu", "model", refresh_s=1.0)
    trace = Trace({"nvml:gpu0": staircase(200.0), "rapl:package-0": staircase(50.0), "codecarbon:cpu": staircase(7.0)})
    trace.gauges["nvml:gpu0.power_w"] = samples
    domains = {
        "nvml:gpu0": GPU,
        "nvml_power:gpu0": integral,
        "rapl:package-0": Domain("cpu", "counter"),
        "codecarbon:cpu": model,
    }
    assert power(trace, domains) == "350 W, mean of the last second (covers cpu, gpu)"
    alone = {key: domain for key, domain in domains.items() if key != "nvml_power:gpu0"}
    assert power(trace, alone) == "250 W, mean of the last second (covers cpu, gpu)"
    assert (
        power(trace, {"nvml_power:gpu0": integral, "codecarbon:cpu": model}) == "300 W, mean of the last second (covers gpu)"
    )
    assert power(trace, {"codecarbon:cpu": model}) == "7 W, mean of the last second (covers cpu; MODELLED, not measured)"


def test_instants_of_power_are_joined_by_lines() -> None:
    ramp = Series()
    for i in range(21):
        ramp.append(NOW - 2 * S + i * S // 10, 100.0 + 10 * i)
    trace, domain = Trace(gauges={"nvml:gpu0.power_w": ramp}), Domain("gpu", "integral", gauge="nvml:gpu0.power_w")
    assert (power(trace, {"nvml_power:gpu0": domain}) or "").startswith("250 W"), "from 200 W to 300 W"


def test_what_says_nothing_about_now_is_not_shown() -> None:
    old, stuck, back = staircase(200.0, NOW - 11 * S), staircase(0.0), staircase(200.0, NOW - S, offset_j=1e6)
    assert power(Trace({"nvml:gpu0": old}), {"nvml:gpu0": GPU}) is None
    assert power(Trace({"nvml:gpu0": stuck}), {"nvml:gpu0": GPU}) is None
    assert power(Trace(), {"nvml:gpu0": GPU}) is None and power(Trace(), {}) is None
    for t_ns in range(NOW - S + S // 20, NOW + 1, S // 20):  # a counter that was reset: what came after counts alone
        back.append(t_ns, 5.0 * (t_ns // (S // 20)))
    assert (power(Trace({"nvml:gpu0": back}), {"nvml:gpu0": GPU}) or "").startswith("100 W")


def test_half_of_the_gpus_is_not_their_power() -> None:
    trace = Trace({"nvml:gpu0": staircase(200.0), "nvml:gpu1": staircase(200.0, NOW - 60 * S)})
    assert power(trace, {"nvml:gpu0": GPU, "nvml:gpu1": GPU}) is None


def test_a_value_that_the_sampler_has_not_finished_is_left_for_the_next_time() -> None:
    series = staircase(200.0)
    series.t_ns.append(NOW + S)  # and its value is not there yet
    assert (power(Trace({"nvml:gpu0": series}), {"nvml:gpu0": GPU}) or "").startswith("200 W")


def test_the_picture_shows_the_window_in_colour_and_what_was_before_in_grey() -> None:
    found = live.power_now(Trace({"nvml:gpu0": staircase(200.0)}), {"nvml:gpu0": GPU}, NOW, 20.0)
    assert found and "0 to 200 W, last 30 s" in found.picture
    svg = base64.b64decode(found.picture.split("base64,")[1].split('"')[0]).decode()
    edge = re.search(r'<rect x="(\d+)"', svg)
    assert edge and int(edge[1]) == 100, "10 s before, 20 s of the window"
    assert svg.count("<polyline") == 2 and set(re.findall(r",(\d+\.\d)", svg)) == {"2.0"}, "flat at its maximum"


def test_readings_that_come_late_draw_no_peaks() -> None:
    """Each 10 J step is noticed up to 50 ms late; between neighbours that looks like 67 to 200 W."""
    series = Series()
    for i in range(40):
        series.append(NOW - 4 * S + i * S // 10 + (i % 2) * S // 20, 10.0 * i)
    found = live.power_now(Trace({"nvml:gpu0": series}), {"nvml:gpu0": GPU}, NOW, 3.0)
    assert found and int(re.findall(r"0 to (\d+) W", found.picture)[0]) <= 110


def test_temperatures_are_those_of_now() -> None:
    gauges = {f"nvml:gpu{i}.temperature_c": Series() for i in range(3)} | {"nvml:gpu0.power_w": Series()}
    for name, t_ns, value in (("gpu0", NOW, 54.4), ("gpu1", NOW - 60 * S, 70.0)):
        gauges[f"nvml:{name}.temperature_c"].append(t_ns, value)
    assert live.temperatures(Trace(gauges=gauges), NOW) == "gpu0 54 °C"


# --- progress ---------------------------------------------------------------------------------------------------------


def window(kind: str = "window", progress: traffic.Progress | None = None, **config: Any) -> Any:
    return SimpleNamespace(kind=kind, config=config, progress=progress, repeats=[], label="w", span=Span(NOW))


def test_an_idle_window_knows_its_end() -> None:
    rows = live.progress_rows(window("idle", seconds=200.0), 50.4, NOW)
    assert rows == [("progress", "50 s of 3 min 20 s"), ("time left", "2 min 30 s")]


def test_repeats_tell_the_time_left_from_those_that_are_over() -> None:
    w = window(repeat=5)
    assert live.progress_rows(w, 3.0, NOW) == [("progress", "0 of 5 repeats")]
    w.repeats += [Span(NOW - 24 * S, NOW - 14 * S), Span(NOW - 14 * S, NOW - 4 * S)]
    assert live.progress_rows(w, 24.0, NOW)[1] == ("time left", "about 26 s, as the repeats before")
    assert live.progress_rows(window(), 3.0, NOW) == [], "a cell that runs once can tell nothing"
    assert live.bar(w, 24.0) == '<progress max="1" value="0.400"></progress>' and live.bar(window(), 3.0) == ""


def test_a_bar_shows_the_share_that_is_over() -> None:
    run = traffic.Progress(requests=10, output_tokens_at_most=1000, requests_done=2, output_tokens=250)
    assert 'value="0.250"' in live.bar(window("run", run), 5.0)
    assert 'value="0.252"' in live.bar(window("idle", seconds=200.0), 50.4)
    assert 'value="1.000"' in live.bar(window("idle", seconds=1.0), 1.4)


def test_a_run_tells_its_rate_and_what_may_still_come() -> None:
    run = traffic.Progress(requests=10, output_tokens_at_most=1000, requests_done=2, output_tokens=250)
    rows = dict(live.progress_rows(window("run", run), 5.0, NOW))
    assert rows["output tokens"] == "250 (50 tokens/s so far)" and rows["progress"] == "2 of 10 requests"
    assert rows["time left"] == "about 15 s at this pace"
    run.schedule_s = 60.0
    assert dict(live.progress_rows(window("run", run), 5.0, NOW))["time left"] == "about 55 s at this pace"
    run.output_tokens = 10
    assert dict(live.progress_rows(window("run", run), 5.0, NOW))["time left"] == "at least 55 s, by the schedule"
    run.schedule_s = 0.0
    assert "time left" not in dict(live.progress_rows(window("run", run), 5.0, NOW)), "too early to say"


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (119.4, "119 s"), (120, "2 min 0 s"), (3725, "62 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert live.duration(seconds) == words


def test_labels_are_escaped_and_absence_is_said(clock: FakeClock) -> None:
    w = window()
    w.label = "<script>alert(1)</script>"
    of = SimpleNamespace(trace=Trace(), domains={}, sources=[])
    shown = live.bundle(of, w, NOW + 3 * S)  # type: ignore[arg-type]
    assert "<script" not in shown["text/html"] and "&lt;script&gt;" in shown["text/html"]
    assert "not known: no source is open" in shown["text/html"] and "measuring: 3 s at " in shown["text/plain"]


# --- who gets it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "kind", "metadata", "shown"),
    [
        ({}, "execute_request", {"cellId": "a1"}, True),
        ({}, "execute_request", {}, False),
        ({}, "execute_request", {"trusted": True}, False),
        ({}, "comm_msg", {"cellId": "a1"}, False),
        ({"LEM_KIT_NONINTERACTIVE": "1"}, "execute_request", {"cellId": "a1"}, False),
        ({"LEM_KIT_LIVE": "0"}, "execute_request", {"cellId": "a1"}, False),
        ({"LEM_KIT_LIVE": "1"}, "execute_request", {}, True),
        ({"LEM_KIT_LIVE": "1", "LEM_KIT_NONINTERACTIVE": "1"}, "execute_request", {}, True),
        ({"LEM_KIT_LIVE": "perhaps"}, "execute_request", {}, False),
    ],
)
def test_a_view_is_for_somebody_who_looks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kind: str, metadata: dict[str, Any], shown: bool
) -> None:
    for name in ("LEM_KIT_LIVE", "LEM_KIT_NONINTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert live.wanted({"header": {"msg_type": kind}, "metadata": metadata}) is shown
    assert not live.wanted({}) or "LEM_KIT_LIVE" in environment


class Kernel:
    """A real kernel, asked as JupyterLab asks (`cell`) or as nbclient does."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, code: str, cell: str | None = None) -> list[dict[str, Any]]:
        """Messages of the cell, and those that came with no cell of ours."""
        client = self.client
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        asked = client.session.msg("execute_request", content, metadata={"cellId": cell} if cell else {})
        client.shell_channel.send(asked)
        messages = []
        while True:
            message = client.get_iopub_msg(timeout=30)
            assert message["msg_type"] != "error", message["content"]["traceback"]
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return messages
            assert message["parent_header"]["msg_id"] == asked["header"]["msg_id"]
            messages.append(message)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    manager, client = start_new_kernel(kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=40"])
    yield Kernel(client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


OPEN = """
import os, time
os.environ["LEM_KIT_SOURCES"] = "none"
import lem_kit as lem
session = lem.Session()
from lem_kit.jupyter import live
live.AFTER_S, live.EVERY_S = 0.2, 0.1
"""
LONG = "with session.window('long'):\n    time.sleep(0.5)"


def shown(messages: list[dict[str, Any]]) -> list[tuple[str, str, set[str]]]:
    """Of each output: the message, the display that it belongs to, and the last words of its kinds of data."""
    return [
        (
            m["msg_type"],
            m["content"]["transient"]["display_id"],
            {re.split(r"[./]", kind)[-1] for kind in m["content"]["data"]},
        )
        for m in messages
        if m["msg_type"].endswith("display_data")
    ]


def test_in_a_kernel_a_long_window_has_a_panel_that_leaves_nothing(kernel: Kernel) -> None:
    kernel.run(OPEN)
    messages = kernel.run(LONG.replace("0.5", "1.2"), cell="a1")
    assert [(kind, data) for kind, _, data in shown(messages)] == [
        ("display_data", {"plain", "html", "widget-view+json"}),
        ("update_display_data", set()),
    ]
    kinds = [m["msg_type"] for m in messages if m["msg_type"] not in ("status", "execute_input")]
    opened = [m["content"]["comm_id"] for m in messages if m["msg_type"] == "comm_open"]
    closed = [m["content"]["comm_id"] for m in messages if m["msg_type"] == "comm_close"]
    assert len(opened) == 3 and sorted(opened) == sorted(closed), "a widget, its layout and its style"
    assert kinds.index("update_display_data") < kinds.index("comm_close"), "emptied first, so that no broken view is seen"
    values = [
        m["content"]["data"]["state"]["value"]
        for m in messages
        if m["msg_type"] in ("comm_open", "comm_msg") and "value" in m["content"]["data"]["state"]
    ]
    assert 2 <= len(set(values)) <= 12 and all("measuring:" in value for value in values)
    [first] = [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"]
    model = first["application/vnd.jupyter.widget-view+json"]
    assert model["model_id"] in opened and live.STILL in first["text/html"] and live.STILL not in values[0]
    state = kernel.run("import ipywidgets\nprint(ipywidgets.Widget.get_manager_state()['state'])")
    assert state[-1]["content"]["text"] == "{}\n", "nothing that a notebook could save"


def test_in_a_kernel_only_long_windows_that_somebody_looks_at_are_shown(kernel: Kernel) -> None:
    kernel.run(OPEN)
    assert not shown(kernel.run("with session.window('short'):\n    pass", cell="a1"))
    assert not shown(kernel.run(LONG)), "whoever runs notebooks by itself gets none"
    assert not shown(kernel.run(f"os.environ['LEM_KIT_NONINTERACTIVE'] = '1'\n{LONG}", cell="a1"))
    told = kernel.run(f"os.environ['LEM_KIT_LIVE'] = '1'\n{LONG}")
    assert [data for *_, data in shown(told)][-1:] == [set()]
    assert not any(m["msg_type"].startswith("comm") for m in told), "nbclient keeps the state of a widget that is closed"


def test_in_a_kernel_without_widgets_the_output_is_sent_again(kernel: Kernel) -> None:
    kernel.run(OPEN + "import sys\nkept, sys.modules['ipywidgets'] = sys.modules.get('ipywidgets'), None")
    messages = kernel.run(LONG, cell="a1")
    kernel.run("sys.modules['ipywidgets'] = kept\nif kept is None:\n    del sys.modules['ipywidgets']")
    seen = shown(messages)
    assert [kind for kind, _, _ in seen] == ["display_data", *["update_display_data"] * (len(seen) - 1)]
    assert [data for *_, data in seen] == [{"plain", "html"}] * (len(seen) - 1) + [set()] and 3 <= len(seen) <= 5
    assert len({name for _, name, _ in seen}) == 1 and not any(m["msg_type"].startswith("comm") for m in messages)


def test_in_a_kernel_a_view_that_cannot_be_sent_is_silent(kernel: Kernel) -> None:
    kernel.run(OPEN + "os.environ['LEM_KIT_LIVE'] = '1'")
    broken = "import lem_kit.jupyter.live as live\nkept = live.bundle\nlive.bundle = lambda *_: 1 / 0\n"
    messages = kernel.run(f"{broken}{LONG}\nlive.bundle = kept\nprint(session.measurements[-1].status)")
    kinds = [m["msg_type"] for m in messages if m["msg_type"] not in ("status", "execute_input")]
    assert kinds == ["stream"] and messages[-1]["content"]["text"] == "ok\n"


def test_notebooks_that_we_execute_know_that_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEM_KIT_NONINTERACTIVE", raising=False)
    cells = [nbformat.v4.new_code_cell("import os\nos.environ['LEM_KIT_NONINTERACTIVE']")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    notebooks.execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {})
    assert nbformat.read(tmp_path / "b.ipynb", as_version=4).cells[0].outputs[0].data["text/plain"] == "'1'"
    assert "LEM_KIT_NONINTERACTIVE" not in os.environ


# --- that it is in nobody's way ---------------------------------------------------------------------------------------


def a_view(publish: live.Publish, after_s: float = 0.0) -> live.View:
    of = SimpleNamespace(trace=Trace(), domains={}, sources=[])
    return live.View(of, window(), publish, after_s, 0.005)  # type: ignore[arg-type]


def test_a_closed_channel_ends_nothing() -> None:
    tried = []

    def closed(kind: str, content: dict[str, Any]) -> None:
        tried.append(kind)
        raise OSError("the socket is closed")

    view = a_view(closed)
    view.start()
    while len(tried) < 3:
        time.sleep(0.001)
    view.end()
    assert not view.is_alive() and set(tried) == {"display_data"}


def test_a_channel_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, there = threading.Event(), threading.Event()

    def hangs(kind: str, content: dict[str, Any]) -> None:
        there.set()
        stuck.wait(10)

    monkeypatch.setattr(live, "LEAVE_AFTER_S", 0.05)
    view = a_view(hangs)
    view.start()
    there.wait(5)
    began = time.monotonic()
    view.end()
    assert time.monotonic() - began < 1 and view.is_alive()
    stuck.set()
    view.join(5)


def test_a_view_ends_by_itself_when_its_window_has() -> None:
    sent: list[bool] = []
    view = a_view(lambda kind, content: sent.append(bool(content["data"])))
    view.start()
    while not sent:
        time.sleep(0.001)
    view._window.span.t1_ns = NOW  # and nobody calls `end`
    view.join(5)
    assert not view.is_alive() and sent[-1] is False


def test_watchers_see_outermost_windows_and_cannot_break_them(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    seen: list[Any] = []

    def watch(of: lem.Session, window: Any) -> Any:
        seen.append((window.label, window.span.t1_ns))
        return lambda: (seen.append(window.span.t1_ns is not None), 1 / 0)

    monkeypatch.setattr(session, "watchers", [lambda *_: 1 / 0, watch])
    with lem.Session(sources=[], clock=clock) as s:
        with s.window("outer") as outer, s.window("inner"):
            pass
        with pytest.raises(KeyError), s.window("broken"):
            raise KeyError("mine")
    assert seen == [("outer", None), True, ("broken", None), True]
    assert outer.measurement.status == "ok"


def test_progress_counts_what_send_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lem.load_backend("fake", "fake", ttft_s=0.0, tokens_per_s=1e5, eos_after=3)
    requests = [Request("a", max_new_tokens=8, fixed_length=True), Request("b", max_new_tokens=8)]
    plan = lem.traffic.constant(rate_per_s=100)
    windows: list[Any] = []
    monkeypatch.setattr(session, "watchers", [lambda _, window: windows.append(window)])
    with lem.Session(sources=[]) as s:
        s.run(engine, requests, plan, repeats=2, warmup=0)
    planned = traffic.Progress.of(requests, plan, 2)
    assert planned == traffic.Progress(4, 32, 2 * max(plan.schedule(2) or ()))
    seen = windows[0].progress
    assert (seen.requests, seen.requests_done, seen.output_tokens) == (4, 4, 22)
    assert seen.output_tokens_at_most == 22, "what an early end leaves out will not come"
