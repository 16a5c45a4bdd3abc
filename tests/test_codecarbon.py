"""The CodeCarbon source with a real tracker on this machine: quiet, offline, repeatable, and honest about what it models."""

from __future__ import annotations

import builtins
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lem_kit.energy import Reading, open_source
from lem_kit.energy import codecarbon as module
from lem_kit.errors import LemError, Unavailable

codecarbon = pytest.importorskip("codecarbon")


def ready(source: Any) -> Any:
    source._thread.join(60)
    return source


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **named: object) -> None:
        raise AssertionError(f"CodeCarbon reached for the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.usefixtures("offline")
def test_a_real_tracker_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # CodeCarbon then counts a GPU, be there one or not
    threads = set(threading.enumerate())
    for _ in range(2):
        source: Any = ready(open_source("codecarbon"))
        first = source.read()
        assert {"cpu", "ram"} <= set(first) == set(source.domains)
        if not source.describe()["gpu_model"]:
            assert "gpu" not in first
        time.sleep(0.12)
        second = source.read()
        for domain in ("cpu", "ram"):
            seconds = (second[domain].t_ns - first[domain].t_ns) / 1e9
            watts = (second[domain].joules - first[domain].joules) / seconds
            assert 0.01 < watts < 5000, (domain, watts)  # joules, not kWh and not millijoules
        assert set(threading.enumerate()) <= threads, "CodeCarbon's timers run"
        source.close()
        source.close()
        with pytest.raises(LemError, match="closed"):
            source.read()
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_what_is_computed_is_called_a_model() -> None:
    source: Any = ready(open_source("codecarbon"))
    ram = source.domains["ram"]
    assert (ram.scope, ram.method, ram.relative_error, ram.reasons) == ("dram", "model", 1.0, ("modelled",))
    assert "W constant, guessed from" in ram.label
    cpu = source.domains["cpu"]
    assert cpu.method == "counter" or ("W TDP" in cpu.label and cpu.reasons == ("modelled",))
    assert source.describe()["version"] == codecarbon.__version__
    source.close()


def test_the_users_settings_of_the_hardware_count_and_those_of_the_network_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nforce_cpu_power=120\nforce_ram_power=33\npue=2\noutput_methods=csv,api\n"
        "emissions_endpoint=http://localhost:1\nelectricitymaps_api_token=secret\n"
    )
    source: Any = ready(open_source("codecarbon"))
    assert "120.0 W TDP" in source.domains["cpu"].label
    assert source.domains["ram"].label.startswith("33.0 W constant")
    source.read()
    source.close()
    assert os.listdir(tmp_path) == [".codecarbon.config"]


def test_the_users_own_log_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("codecarbon")
    monkeypatch.setattr(logger, "level", logging.ERROR)
    ready(open_source("codecarbon")).close()
    assert logger.level == logging.ERROR
    assert not any(isinstance(filter_, module._Quiet) for filter_ in logger.filters)


class Tracker:
    """CodeCarbon as the source sees it, with chosen figures, held back until `go` is set."""

    go = threading.Event()
    fail = ""

    def __init__(self, output_handlers: list[Any], **settings: object) -> None:
        self.handler = output_handlers[0]
        self.kwh = 0.0

    def start_task(self, name: str) -> None:
        assert self.go.wait(30)
        if self.fail:
            raise RuntimeError(self.fail)

    def stop_task(self, name: str) -> None: ...

    def stop(self) -> None: ...

    def flush(self) -> None:
        if self.fail:  # as CodeCarbon does it: logged, not raised
            logging.getLogger("codecarbon").warning("graceful shutdown", exc_info=RuntimeError(self.fail))
            return
        self.kwh += 1e-6
        figures = {
            "cpu_energy": self.kwh,
            "ram_energy": 2 * self.kwh,
            "gpu_energy": 0.0,
            "cpu_model": "CPU X",
            "gpu_model": "",
        }
        facts = {"ram_power": 20.0, "ram_total_size": 16.0, "codecarbon_version": "0"}
        self.handler.out(SimpleNamespace(**figures, **facts), None)

    def get_detected_hardware(self) -> dict[str, Any]:
        return {"gpu_count": 1}


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    """With the user's log level above that at which CodeCarbon reports its errors."""
    monkeypatch.setattr(logging.getLogger("codecarbon"), "level", logging.CRITICAL)
    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", Tracker)
    monkeypatch.setattr(Tracker, "go", threading.Event())
    monkeypatch.setattr(Tracker, "fail", "")
    return Tracker


def joules(readings: dict[str, Reading]) -> dict[str, float]:
    return {domain: round(reading.joules, 9) for domain, reading in readings.items()}


def test_it_gives_nothing_until_it_is_ready(tracker: type[Tracker]) -> None:
    source = open_source("codecarbon")
    assert source.read() == {} == source.domains
    assert source.describe() == {"starting": True}  # type: ignore[attr-defined]
    tracker.go.set()
    ready(source)
    assert joules(source.read()) == {"cpu": 7.2, "ram": 14.4}  # the second flush: 2e-6 kWh
    assert joules(source.read()) == {"cpu": 10.8, "ram": 21.6}
    source.close()


def test_a_failed_start_is_told_to_whoever_reads(tracker: type[Tracker]) -> None:
    tracker.fail = "no psutil"
    tracker.go.set()
    source = ready(open_source("codecarbon"))
    with pytest.raises(LemError, match="could not be started: no psutil"):
        source.read()
    source.close()


def test_a_failing_read_says_what_codecarbon_only_logs(
    tracker: type[Tracker], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker.go.set()
    source = ready(open_source("codecarbon"))
    monkeypatch.setattr(Tracker, "fail", "GPU is lost")
    with pytest.raises(LemError, match="gave no figures: RuntimeError: GPU is lost"):
        source.read()
    source.close()
    assert capfd.readouterr() == ("", "")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "codecarbon":
            raise ModuleNotFoundError("No module named 'codecarbon'", name="codecarbon")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unavailable, match=r"pip install 'lem_kit\[codecarbon\]'"):
        module.open_source()


def domains_of(gpu_model: str = "", **parts: object) -> dict[str, Any]:
    """The domains for a tracker whose hardware objects are `parts`, by the names of their classes."""
    hardware = [type(name, (), dict(vars(part)))() for name, part in parts.items()]
    total = SimpleNamespace(cpu_model="CPU X", gpu_model=gpu_model, ram_power=20.0, ram_total_size=16.0)
    return module._domains(SimpleNamespace(_hardware=hardware), total)


def test_what_reads_a_counter_is_called_a_counter() -> None:
    boards = SimpleNamespace(devices=[SimpleNamespace(_has_counter=True), SimpleNamespace(_has_counter=True)])
    found = domains_of("2 x H100", CPU=SimpleNamespace(_mode="intel_rapl"), GPU=SimpleNamespace(devices=boards))
    assert [(d.scope, d.method, d.relative_error) for d in (found["cpu"], found["gpu"])] == [
        ("cpu", "counter", 0.0),
        ("gpu", "counter", 0.0),
    ]
    boards.devices[1]._has_counter = False
    assert domains_of("2 x H100", GPU=SimpleNamespace(devices=boards))["gpu"].method == "model"


def test_hardware_that_it_does_not_know_counts_as_computed() -> None:
    found = domains_of("1 x Other", NewChip=SimpleNamespace())
    assert {domain.method for domain in found.values()} == {"model"}
