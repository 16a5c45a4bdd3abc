"""The RAPL source on a fake /sys: which zones, wraps, resets, mirrors, permissions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from machines.powercap import RANGE_UJ, zone

from lem_kit.energy import open_source
from lem_kit.energy import rapl as module
from lem_kit.errors import LemError, Unavailable

SECOND = 1_000_000_000


class Clock:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def opened(root: Path, clock: Clock | None = None) -> Any:
    source = open_source(f"rapl={root}")
    if clock is not None:
        source._clock = clock  # type: ignore[attr-defined]
    return source


def joules(source: Any) -> dict[str, float]:
    return {domain: reading.joules for domain, reading in source.read().items()}


def test_packages_and_dram_only(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-1", 5_000_000)  # zone numbers need not be socket numbers
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "uncore", 2)
    zone(tmp_path, "intel-rapl:0:2", "dram", 3_000_000)
    zone(tmp_path, "intel-rapl:1", "package-0", 7_250_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7_250_000)
    source = opened(tmp_path)
    assert joules(source) == {"package-1": 5.0, "dram-1": 3.0, "package-0": 7.25}
    assert [domain.scope for domain in source.domains.values()] == ["cpu", "dram", "cpu"]
    assert all(d.method == "counter" and d.refresh_s == 0.001 for d in source.domains.values())
    assert sorted(source.describe()["skipped"]) == ["intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:2"]
    source.close()


@pytest.mark.parametrize("root", ["class", "virtual", "virtual/intel-rapl"])
def test_the_class_folder_and_the_device_tree_are_the_same_zones(tmp_path: Path, root: str) -> None:
    tree = tmp_path / "virtual" / "intel-rapl"
    zone(tree, "intel-rapl:0", "package-0", 5_000_000)
    zone(tree / "intel-rapl:0", "intel-rapl:0:0", "dram", 3_000_000)
    (tmp_path / "class").mkdir()
    for link in ("intel-rapl", "intel-rapl/intel-rapl:0", "intel-rapl/intel-rapl:0/intel-rapl:0:0"):
        (tmp_path / "class" / Path(link).name).symlink_to(tmp_path / "virtual" / link)
    source = opened(tmp_path / root)
    assert joules(source) == {"package-0": 5.0, "dram-0": 3.0}
    source.close()


def test_a_wrap_is_counted(tmp_path: Path) -> None:
    clock = Clock()
    counter = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    source = opened(tmp_path, clock)
    before = joules(source)["package-0"]
    for lap in range(3):
        clock.now_ns += SECOND
        counter.write_text("3000000\n")
        assert joules(source)["package-0"] - before == pytest.approx(5.0 + lap * (RANGE_UJ / 1e6), abs=1e-6)
        clock.now_ns += 600 * SECOND
        counter.write_text(f"{RANGE_UJ - 2_000_000}\n")
        source.read()
    source.close()


def test_a_reset_is_not_taken_for_a_wrap(tmp_path: Path) -> None:
    clock = Clock()
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 90_000_000_000)
    source = opened(tmp_path, clock)
    source.read()
    clock.now_ns += SECOND
    counter.write_text("1000000\n")  # as a wrap this would be 172 kW
    assert joules(source) == {"package-0": 1.0}
    source.close()


def test_a_mirrored_die_is_read_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0-die-0", 123_456_789)
    zone(tmp_path, "intel-rapl:1", "package-0-die-1", 123_456_789)
    zone(tmp_path, "intel-rapl:2", "package-1-die-0", 123_456_789)  # another socket is never a mirror
    source = opened(tmp_path)
    assert list(source.read()) == ["package-0-die-0", "package-1-die-0"]
    assert source.describe()["skipped"]["intel-rapl:1"] == "package-0-die-1 mirrors the counter of package-0-die-0"
    source.close()


def test_dies_of_their_own_are_separate_domains(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0-die-0", 123_456_789)
    zone(tmp_path, "intel-rapl:1", "package-0-die-1", 120_000_000)
    source = opened(tmp_path)
    assert list(source.read()) == ["package-0-die-0", "package-0-die-1"]
    source.close()


def test_two_zones_of_one_name_stay_apart(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "package-0", 2_000_000)
    source = opened(tmp_path)
    assert joules(source) == {"package-0": 1.0, "package-0-zone-1": 2.0}
    source.close()


def test_no_powercap(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"a virtual machine has none.*LEM_KIT_SOURCES=rapl=/powercap"):
        opened(tmp_path / "absent")


def test_no_permission_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    (tmp_path / "intel-rapl").mkdir()

    def denied(path: object, flags: int) -> int:  # root, who may run the tests, is never refused
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module.os, "open", denied)
    with pytest.raises(Unavailable, match=f"sudo chmod -R a\\+r {tmp_path}/intel-rapl"):
        opened(tmp_path)


def test_one_broken_zone_keeps_the_others_and_all_broken_raises(tmp_path: Path) -> None:
    counters = [zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 1_000_000) for i in range(2)]
    source = opened(tmp_path)
    counters[0].write_text("")
    assert list(source.read()) == ["package-1"]
    assert source.failures["package-0"].startswith(f"RAPL: package-0 ({counters[0]}) gave no reading")
    counters[1].write_text("")
    with pytest.raises(LemError, match=r"package-0.*package-1"):
        source.read()
    source.close()


def test_close_gives_the_files_back(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "package-0-die-1", 1_000_000)
    before = os.listdir("/proc/self/fd")
    source = opened(tmp_path)
    source.close()
    source.close()
    assert os.listdir("/proc/self/fd") == before
