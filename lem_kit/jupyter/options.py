"""The options of `%%measure_energy`: what they are, what they may be, and one clear sentence where they are not.

The one idea: everything that can be wrong is found before the cell runs, for what has run is not undone. Help and tab
completion come from the same list. Not covered: what the options do (`magics`).
"""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from IPython.core.magic_arguments import argument, magic_arguments
from IPython.utils.text import DollarFormatter

from ..errors import nearest
from ..statistics import repeat_until

DEFAULT_BASELINE_S = 5.0
UNTIL = repeat_until()  # how --interval repeats where nothing else is said

_VALUE = r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+"""
_WORD = re.compile(rf"\s*({_VALUE})")
_TOKENS = re.compile(rf"(?<!\S)--tokens(?:=|\s+){_VALUE}")

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    argument("-o", "--output", metavar="NAME", help="assign the Measurement to this variable"),
    argument("--repeat", type=int, metavar="N", help="run the cell N times; figures get a between-repeat interval"),
    argument("--warmup", type=int, default=0, metavar="N", help="run the cell N times before, outside the window"),
    argument("--tokens", metavar="EXPR", help="output tokens of one run, evaluated after each run: 'out.shape[1] - 7'"),
    argument("--label", default="cell", help="a name for the measurement"),
    argument(
        "--baseline",
        type=float,
        nargs="?",
        const=DEFAULT_BASELINE_S,
        metavar="SECONDS",
        help=f"before the cell, measure what the machine draws when idle for SECONDS ({DEFAULT_BASELINE_S:g}), unless that "
        "was done in the last half hour; the card then shows net energy, too",
    ),
    argument(
        "--interval",
        type=float,
        metavar="SHARE",
        help="repeat until the 95 %% interval's half-width is at most this share of the energy, 0.02 for 2 %%; "
        f"--repeat is then the most ({UNTIL.max_repeats})",
    ),
    argument("--save", metavar="FOLDER", help="write the record to FOLDER/<run_id>/ (read it with lem_kit.load)"),
    argument("--quiet", action="store_true", help="show no card; the record is in -o and in the session's measurements"),
)


class MeasureUsageError(ValueError):
    """Wrong use of a magic of lem_kit. Not IPython's UsageError, which leaves no error in a notebook's outputs."""

    def __init__(self, sentence: str, magic: str = "measure_energy") -> None:
        super().__init__(sentence)
        self.magic = magic

    def _render_traceback_(self) -> list[str]:
        return [f"MeasureUsageError: {self} (help: %{self.magic}?)"]  # one line: test runners show the last


def with_options(magic: F) -> F:
    """Decorates a magic with the parser of these options, which is its help, too."""
    for option in reversed(_OPTIONS):
        magic = option(magic)
    magic = magic_arguments()(magic)
    magic.parser.allow_abbrev = False  # type: ignore[attr-defined]  # else --re is an error of another kind than --bo
    return magic


def parsed(parser: argparse.ArgumentParser, line: str) -> argparse.Namespace:
    """The options in `line`. MeasureUsageError for the first thing that is wrong."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        where = (
            "the options end in a backslash" if "escaped" in str(error) else "a quotation mark in the options is not closed"
        )
        raise MeasureUsageError(f"{where}: {line}") from None
    try:
        options, rest = parser.parse_known_args(words)
    except Exception as error:  # IPython's UsageError, which is no ValueError
        raise MeasureUsageError(_plainly(str(error))) from None
    _check_once(parser, words)
    for word in rest:
        if word.startswith("-") and word != "--":
            raise MeasureUsageError(f"there is no option {word}: {nearest(word.partition('=')[0], _names(parser))}")
    if rest:
        raise MeasureUsageError(f"{' '.join(rest)!r} belongs to no option; the code to measure begins on the next line")
    _check(options)
    return options


def _plainly(told: str) -> str:
    """What argparse tells, in words of the options'."""
    for pattern, words in _TOLD:
        if found := re.fullmatch(pattern, told):
            return words.format(*found.groups())
    return told


_TOLD = (
    (
        r"argument (--baseline): invalid float value: (.*)",
        "{} takes a number: got {}; the code to measure begins on the next line",
    ),
    (r"argument (\S+): invalid int value: (.*)", "{} takes a whole number: got {}"),
    (r"argument (\S+): invalid float value: (.*)", "{} takes a number: got {}"),
    (r"argument (\S+): expected one argument", "{} needs a value behind it"),
    (r"argument (\S+): ignored explicit argument (.*)", "{} takes no value: got {}"),
)


def _check_once(parser: argparse.ArgumentParser, words: list[str]) -> None:
    names = _names(parser)
    given = [names.get(word.partition("=")[0]) or (names["-o"] if word.startswith("-o") else None) for word in words]
    if twice := [action for action in given if action is not None and given.count(action) > 1]:
        raise MeasureUsageError(f"{twice[0].option_strings[0]} is given twice")


def _names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options by their names."""
    return {name: action for action in parser._actions for name in action.option_strings}


def _check(options: argparse.Namespace) -> None:
    if options.repeat is not None and options.repeat < 1:
        raise MeasureUsageError(f"--repeat must be at least 1: got {options.repeat}")
    if options.warmup < 0:
        raise MeasureUsageError(f"--warmup must not be negative: got {options.warmup}")
    if options.output is not None and (not options.output.isidentifier() or keyword.iskeyword(options.output)):
        raise MeasureUsageError(f"-o takes the name of a variable: got {options.output!r}")
    if not options.label.strip():
        raise MeasureUsageError("--label must not be empty")
    if options.baseline is not None and not 0 < options.baseline <= 86_400:
        raise MeasureUsageError(f"--baseline takes a number of seconds above 0: got {options.baseline:g}")
    if options.interval is not None and not 0 < options.interval < 1:
        raise MeasureUsageError(f"--interval is a share of the energy, 0.02 for 2 %: got {options.interval:g}")
    if options.interval is not None and options.repeat is not None and options.repeat < 2:
        raise MeasureUsageError("--interval judges by repeats: --repeat must be at least 2 with it")
    if options.save is not None and not options.save.strip():
        raise MeasureUsageError("--save must not be empty: it takes a folder")


def folder(text: str | None) -> Path | None:
    """The folder of `--save` from the root, so that a cell may go elsewhere; None without one. MeasureUsageError where
    nothing can be written: folder and file are tried, for permissions do not tell all, and nothing of it stays."""
    if text is None:
        return None
    try:
        place = Path(text).expanduser().absolute()
        missing = [part for part in (place, *place.parents) if not part.exists()]
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
        for made in missing:
            made.rmdir()
        return place
    except (OSError, ValueError, RuntimeError) as error:  # a name with a NUL; a user who is not known
        raise MeasureUsageError(f"--save {text} cannot be written to: {getattr(error, 'strerror', None) or error}") from None


def expanded(line: str, variables: Mapping[str, Any]) -> str:
    """The line with {name} and $name replaced by variables, as IPython does it for magics; not in --tokens, whose braces are
    Python's. Where one cannot be replaced, all stay."""
    kept = _TOKENS.search(line)
    parts = [line] if kept is None else [line[: kept.start()], line[kept.end() :]]
    try:
        parts = [DollarFormatter().vformat(part, args=[], kwargs=variables) for part in parts]
    except Exception:  # an expression of the user's own may raise anything
        return line
    return (kept[0] if kept else "").join(parts)


def expression(text: str | None) -> Any:
    """The code of `--tokens`, None without one."""
    if text is None:
        return None
    try:
        return compile(text, "--tokens", "eval")
    except (SyntaxError, ValueError) as error:
        told = error.msg if isinstance(error, SyntaxError) else error
        raise MeasureUsageError(f"--tokens {text!r} is not a Python expression: {told}") from None


# --- a line with options and a statement --------------------------------------------------------------------------------


def split_statement(parser: argparse.ArgumentParser, line: str) -> tuple[str, str]:
    """The options at the beginning of `line`, and the statement behind them (or behind `--`) as it was written.
    MeasureUsageError where no statement is left."""
    at = 0
    while (word := _WORD.match(line, at)) and word[1].startswith("-"):
        if word[1] == "--":
            return line[:at], _some(line[word.end() :])
        at = word.end()
        action = _names(parser).get(word[1])
        value = _WORD.match(line, at)
        if action is not None and value and (action.nargs is None or (action.nargs == "?" and _is_number(value[1]))):
            at = value.end()
    return line[:at], _some(line[at:])


def _some(statement: str) -> str:
    if not statement.strip():
        raise MeasureUsageError("nothing to measure: %measure_energy [options] statement, or %%measure_energy above a cell")
    return statement.strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- completion -------------------------------------------------------------------------------------------------------


def completions(parser: argparse.ArgumentParser, before: str) -> list[str] | None:
    """What the last word of an options' line may become, `before` being all of the line up to the cursor; None where that
    is Python (an expression, a statement) or a text of the user's own."""
    words = before.split(" ")
    word, previous = words[-1], words[-2] if len(words) > 1 else ""
    if previous == "--save":
        return _folders(word)
    action = _names(parser).get(previous)
    if action is not None and action.nargs is None:
        return None
    if word and not word.startswith("-"):
        return None
    used = {name for said in words[:-1] if said in _names(parser) for name in _names(parser)[said].option_strings}
    return [name for name in _names(parser) if name.startswith(word) and name not in used]


def _folders(beginning: str) -> list[str]:
    head, slash, name = beginning.rpartition("/")
    place = Path(head + slash).expanduser()
    try:
        found = sorted(p.name for p in place.iterdir() if p.is_dir() and p.name.startswith(name))
    except OSError:
        return []
    return [f"{head}{slash}{folder}/" for folder in found if name.startswith(".") or not folder.startswith(".")]
