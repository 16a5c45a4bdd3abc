"""Facts about the machine: strict JSON, unknown is None, no names of people or hosts."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from lem_kit import environment


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


def test_what_contains_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    assert environment.describe(tmp_path)["container"] is None
    monkeypatch.setenv("container", "systemd-nspawn")
    assert environment.describe(tmp_path)["container"] == "systemd-nspawn"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert environment.describe(tmp_path)["container"] == "kubernetes"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    assert environment.describe(tmp_path)["container"] == "podman"


@pytest.mark.parametrize("problem", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 2)])
def test_without_git_the_commit_is_none(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise problem

    monkeypatch.setattr(subprocess, "run", run)
    facts = environment.describe()
    assert facts["git_commit"] is None and facts["git_dirty"] is None


def test_outside_a_repository_the_commit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    facts = environment.describe()
    assert facts["git_commit"] is None and facts["git_dirty"] is None


def test_where_the_memory_is_not_told_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", sysconf)
    assert environment.describe()["memory_bytes"] is None
