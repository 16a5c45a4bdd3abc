"""Facts about the machine: strict JSON, unknown is None, no names of people or hosts. And the table of reason codes."""

from __future__ import annotations

import getpass
import json
import platform
import re
from pathlib import Path

import pytest
from conftest import ROOT

from lem_kit import environment
from lem_kit.measurement import REASONS, jsonable


def test_it_is_strict_json_without_user_or_host() -> None:
    text = json.dumps(environment.describe(), allow_nan=False)
    assert platform.node() not in text and f"/{getpass.getuser()}/" not in text


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    facts = environment.describe(tmp_path)
    assert facts["cpu_governor"] is None and facts["container"] in (None, "kubernetes", "podman", "docker", "systemd-nspawn")


def test_what_a_machine_says_is_kept(tmp_path: Path) -> None:
    for name, text in (
        ("proc/cpuinfo", "processor: 0\nmodel name\t: Fast CPU 3000\n"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n"),
        (".dockerenv", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    facts = environment.describe(tmp_path)
    assert (facts["cpu"], facts["cpu_governor"], facts["container"]) == ("Fast CPU 3000", "performance", "docker")


def test_versions_are_those_of_loaded_modules() -> None:
    versions = environment.loaded_versions()
    assert versions["pytest"] == pytest.__version__ and "json.decoder" not in versions


def test_every_reason_is_used_and_every_used_one_is_explained() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "lem_kit").rglob("*.py"))
    used = set(re.findall(r'(?:_unknown\(|reasons\.append\(|reasons=\(|return _unknown\()"(\w+)"', source))
    used |= set(re.findall(r'_unknown\("\w+" if failed else "(\w+)"\)', source))
    assert used <= set(REASONS), used - set(REASONS)
    for code in REASONS:
        assert len(re.findall(rf'"{code}"', source)) >= 2, f"{code} is explained but never given"


def test_jsonable_leaves_nothing_that_json_lacks() -> None:
    value = {1: (1, 2.5), "nan": float("nan"), "path": Path("a"), "none": None, "set": {3}, "deep": [{"x": float("inf")}]}
    found = jsonable(value)
    expected = {"1": [1, 2.5], "nan": "nan", "path": "a", "none": None, "set": [3], "deep": [{"x": "inf"}]}
    assert found == expected and json.dumps(found, allow_nan=False)
