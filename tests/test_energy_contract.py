"""Every file of lem_kit/energy keeps what `EnergySource` promises, on simulated hardware and on this machine.

The files are discovered. A new one needs an entry in `tests/machines`, or hardware here, to pass.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import MACHINES

from lem_kit.energy import EnergySource, describe, open_source, source_names
from lem_kit.errors import LemError, Unavailable
from lem_kit.measurement import REASONS

HEAVY = ("pynvml", "codecarbon", "pyarrow", "pandas", "numpy", "torch", "IPython")


@pytest.fixture(params=source_names())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EnergySource]:
    """Each source, opened on its simulated machine, or on this one if it has none."""
    name = request.param
    if name in MACHINES:
        with MACHINES[name](tmp_path) as argument:
            opened = open_source(name if argument is None else f"{name}={argument}")
            yield opened
            opened.close()
        return
    try:
        opened = open_source(name)
    except Unavailable as error:
        pytest.fail(
            f"'{name}' has no simulated machine: add one to tests/machines/__init__.py. It does not open here: {error}"
        )
    yield opened
    opened.close()


def first_reading(source: EnergySource) -> None:
    """Wait for a source that is slow to start."""
    deadline = time.monotonic() + 60
    while not source.read():
        assert time.monotonic() < deadline, f"{source.name} gave no reading within a minute"
        time.sleep(0.02)


@pytest.mark.parametrize("name", source_names())
def test_opens_here_or_says_why_not(name: str) -> None:
    try:
        opened = open_source(name)
    except Unavailable as reason:
        assert len(str(reason).split()) >= 5, f"{name}: {str(reason)!r} is not a sentence that helps"
    else:
        opened.close()


def test_is_an_energy_source_of_its_files_name(source: EnergySource, request: pytest.FixtureRequest) -> None:
    assert isinstance(source, EnergySource)
    assert source.name == request.node.callspec.params["source"]


def test_counters_never_fall_and_are_described(source: EnergySource) -> None:
    first_reading(source)
    seen: dict[str, tuple[int, float]] = {}
    for _ in range(5):
        before = time.monotonic_ns()
        readings = source.read()
        after = time.monotonic_ns()
        assert readings and set(readings) <= set(source.domains)
        for domain, (t_ns, joules, took_ns) in readings.items():
            last_ns, last_joules = seen.get(domain, (0, 0.0))
            assert last_ns <= t_ns and last_joules <= joules
            assert 0 <= took_ns <= after - before
            assert before - 1e9 * (source.domains[domain].refresh_s or 0.1) <= t_ns <= after
            seen[domain] = (t_ns, joules)
        time.sleep(0.011)


def test_domains_are_complete(source: EnergySource) -> None:
    first_reading(source)
    for name, domain in source.domains.items():
        assert name and ":" not in name and "." not in name  # both separate names in a trace's keys
        assert domain.scope and domain.label
        assert domain.method in ("counter", "integral", "model")
        assert domain.method != "model" or (domain.relative_error > 0 and "modelled" in domain.reasons)
    assert set(describe(source)["domains"]) == set(source.domains)


def test_gauges_belong_to_domains(source: EnergySource) -> None:
    first_reading(source)
    for name, value in getattr(source, "gauges", dict)().items():
        domain, _, quantity = name.partition(".")
        assert domain in source.domains and quantity
        assert isinstance(value, float)


def test_a_domain_may_be_read_alone(source: EnergySource) -> None:
    first_reading(source)
    for domain in source.domains if hasattr(source, "read_one") else []:
        before = time.monotonic_ns()
        reading = source.read_one(domain)  # type: ignore[attr-defined]
        assert before <= reading.t_ns - reading.took_ns <= reading.t_ns <= time.monotonic_ns() and reading.joules > 0


def test_an_integral_is_of_a_gauge_that_the_source_has(source: EnergySource) -> None:
    """Of its gauges or its samples, by the full key, and beside no counter of the same name."""
    first_reading(source)
    time.sleep(0.1 if hasattr(source, "samples") else 0.0)
    known = {*getattr(source, "gauges", dict)(), *getattr(source, "samples", dict)()}
    for key, domain in getattr(source, "integrals", {}).items():
        assert domain.method == "integral" and domain.relative_error > 0
        assert domain.gauge is not None and domain.gauge.removeprefix(f"{source.name}:") in known
        name, _, of = key.partition(":")
        assert name == f"{source.name}_power" and domain.gauge.startswith(f"{source.name}:{of}.")


def test_samples_are_in_order_and_not_of_the_future(source: EnergySource) -> None:
    first_reading(source)
    seen: dict[str, list[int]] = {}
    for _ in range(3 if hasattr(source, "samples") else 0):
        time.sleep(0.05)
        for name, points in source.samples().items():  # type: ignore[attr-defined]
            seen.setdefault(name, []).extend(t for t, _ in points)
        assert all(t <= time.monotonic_ns() + 1e6 for points in seen.values() for t in points)
    assert all(t == sorted(set(t)) and t for t in seen.values())


def test_remarks_are_reason_codes_by_domain(source: EnergySource) -> None:
    first_reading(source)
    for domain, codes in getattr(source, "remarks", dict)().items():
        assert domain in source.domains and codes and set(codes) <= set(REASONS)


def test_close_may_be_called_twice(source: EnergySource) -> None:
    source.close()
    source.close()


def test_after_close_read_raises_or_gives_nothing(source: EnergySource) -> None:
    first_reading(source)
    source.close()
    with pytest.raises(LemError):
        assert source.read()


def test_says_nothing(source: EnergySource, capfd: pytest.CaptureFixture[str]) -> None:
    first_reading(source)
    getattr(source, "gauges", dict)()
    describe(source)
    source.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", source_names())
def test_importing_the_file_imports_nothing_heavy(name: str) -> None:
    code = f"import sys, lem_kit.energy.{name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_simulated_machine_is_of_a_source() -> None:
    assert set(MACHINES) <= set(source_names())
