"""`lem`: statuses, sentences, and that it passes on what it is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lem_kit import backends, energy
from lem_kit.cli import main


def test_doctor_names_every_source_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor"])
    shown = capsys.readouterr().out
    assert status == ("\n  failure  " in shown)
    for name in (*energy.source_names(), *backends.backend_names()):
        assert re.search(rf"^  {name} +(yes|no )", shown, re.M), f"{name} is not in\n{shown}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "run", "nowhere.yaml"], "Cannot read nowhere.yaml: No such file or directory"),
        (["search", "nowhere.yaml"], "Cannot read nowhere.yaml: No such file or directory"),
        (["study", "run", "nowhere.yaml", "-p", "x"], "NAME=VALUE"),
        (["report", "nowhere"], "no folder nowhere"),
        (["export", "nowhere.ipynb"], "There is no notebook and no run folder nowhere.ipynb: check the path."),
        (["export", "nowhere", "--csv", "x.csv"], "There is no notebook and no run folder nowhere: check the path."),
    ],
)
def test_a_mistake_is_one_line_and_status_1(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and shown.startswith("lem: ")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_argparses_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["measure"])
    assert stopped.value.code == 2
