"""The line of options: where a statement begins in it, and what Tab may make of it. What is refused is in `test_magics`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem_kit.jupyter import completion
from lem_kit.jupyter.magics import MeasureMagics
from lem_kit.jupyter.options import MeasureUsageError, completions, parsed, split_statement

PARSER = MeasureMagics.measure_energy.parser
NAMES = ["-o", "--output", "--repeat", "--warmup", "--tokens", "--label", "--baseline", "--interval", "--save", "--quiet"]


@pytest.mark.parametrize(
    ("line", "options", "statement"),
    [
        ("f(x)", "", "f(x)"),
        ("--repeat 3 f( x )", "--repeat 3", "f( x )"),
        ("--repeat=3 -o m print('a  b')", "--repeat=3 -o m", "print('a  b')"),
        ("--label 'a b' --tokens \"len(x) + 1\" x", "--label 'a b' --tokens \"len(x) + 1\"", "x"),
        ("--baseline f(x)", "--baseline", "f(x)"),
        ("--baseline 5 f(x)", "--baseline 5", "f(x)"),
        ("--quiet -- -x", "--quiet", "-x"),
        ("--bogus f(x)", "--bogus", "f(x)"),
        ('x = {"--repeat": 3}', "", 'x = {"--repeat": 3}'),
    ],
)
def test_a_statement_begins_behind_the_options(line: str, options: str, statement: str) -> None:
    assert split_statement(PARSER, line) == (options, statement)


@pytest.mark.parametrize("line", ["", "  ", "--repeat 3", "--quiet --"])
def test_a_line_without_a_statement_measures_nothing(line: str) -> None:
    with pytest.raises(MeasureUsageError, match="nothing to measure"):
        split_statement(PARSER, line)


def test_what_is_not_given_has_its_default() -> None:
    options = parsed(PARSER, "")
    assert vars(options) == {
        "output": None, "repeat": None, "warmup": 0, "tokens": None, "label": "cell", "baseline": None, "interval": None,
        "save": None, "quiet": False,
    }  # fmt: skip
    assert parsed(PARSER, "--baseline").baseline == 5 and parsed(PARSER, "--baseline 2.5").baseline == 2.5


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("", NAMES),
        ("-", NAMES),
        ("--re", ["--repeat"]),
        ("--repeat 3 --", [name for name in NAMES if name.startswith("--") and name != "--repeat"]),
        ("-o m --out", []),
        ("--repeat ", None),
        ("--label my", None),
        ("f(x", None),
    ],
)
def test_tab_offers_the_options_that_are_left(before: str, found: list[str] | None) -> None:
    assert completions(PARSER, before) == found


def test_tab_offers_folders_to_save_in(tmp_path: Path) -> None:
    for name in ("runs", "rates", ".hidden", "other"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert completions(PARSER, f"--save {tmp_path}/r") == [f"{tmp_path}/rates/", f"{tmp_path}/runs/"]
    assert completions(PARSER, f"--save {tmp_path}/") == [f"{tmp_path}/{name}/" for name in ("other", "rates", "runs")]
    assert completions(PARSER, f"--save {tmp_path}/.h") == [f"{tmp_path}/.hidden/"]
    assert completions(PARSER, f"--save {tmp_path}/runs/") == [f"{tmp_path}/runs/inner/"]
    assert completions(PARSER, f"--save {tmp_path}/nowhere/x") == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%%measure_energy --rep", ["--repeat"]),
        ("v = %measure_energy --rep", ["--repeat"]),
        ("%lem_auto ", ["on", "off"]),
        ("%lem_auto of", ["off"]),
        ("measure_energy --rep", None),
        ("%%measure_energyx --rep", None),
        ("%%time --rep", None),
        ("x.__re", None),
    ],
)
def test_only_our_magics_are_completed(line: str, found: list[str] | None) -> None:
    assert completion.matches(PARSER, line) == found
