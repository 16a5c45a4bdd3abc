"""Recorded traffic: files that say when requests came to a service, and how long they were. (Readings of energy: `trace`.)

The one idea: a format is four names: the column of the time and its unit, and those of the two lengths. Rows are read one by
one, so that the first thousand of a trace of millions cost a thousand.

    azure      CSV    TIMESTAMP (date and time), ContextTokens, GeneratedTokens       Azure LLM inference traces 2023, 2024
    burstgpt   CSV    Timestamp (s), Request tokens, Response tokens                  BurstGPT
    mooncake   JSONL  timestamp (ms), input_length, output_length                     Mooncake
    bailian    JSONL  timestamp (s), input_length, output_length; has chat_id         Qwen-Bailian

A trace gives times and lengths, never contents:

    [r for row in itertools.islice(traces.read(path), 100)
     for r in prompts.synthetic(1, row.input_tokens, row.output_tokens, seed=row.line)]

Not covered: shared prefixes (`hash_ids`), turns of one conversation.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LemError, nearest


class Row(NamedTuple):
    """One request: its line in the file, when it came in seconds (from an origin of the file's own), and its lengths, None
    where the file does not say."""

    line: int
    at_s: float
    input_tokens: int | None
    output_tokens: int | None


class Format(NamedTuple):
    """How a file is read: the names of its fields, and what turns the text of a time into seconds."""

    rows: Callable[[Any], Iterator[tuple[int, Mapping[str, Any]]]]
    time: str
    seconds: Callable[[Any], float]
    input_tokens: str
    output_tokens: str


def detect(path: str | Path) -> str:
    """The name of the file's format, from its first line. LemError if it is none of them."""
    with _opened(path) as file:
        first = file.readline(100_000).strip()
    if first.startswith("{"):
        return "bailian" if '"chat_id"' in first else "mooncake"
    for name in ("azure", "burstgpt"):
        if FORMATS[name].output_tokens in first:
            return name
    raise LemError(f"{path} is no trace that lem_kit knows by its first line: say format=, one of {', '.join(FORMATS)}.")


def read(path: str | Path, format: str | None = None) -> Iterator[Row]:
    """The rows of a trace, in order; reads no further than it is asked.

    LemError, with the number of the line, for a time that is missing, negative or before the one above it.
    """
    name = detect(path) if format is None else format
    if name not in FORMATS:
        raise LemError(f"There is no trace format '{name}': {nearest(name, FORMATS)}")
    form = FORMATS[name]
    before_s = 0.0
    empty = True
    with _opened(path) as file:
        for line, fields in form.rows(file):
            where = f"{path}, line {line}"
            at_s = _time(fields, form, where)
            if at_s < before_s:
                raise LemError(f"{where}: this request came before the one above it; sort the trace by {form.time}.")
            before_s, empty = at_s, False
            lengths = (_length(fields.get(key), f"{where}: {key}") for key in (form.input_tokens, form.output_tokens))
            yield Row(line, at_s, *lengths)
    if empty:
        raise LemError(f"{path} holds no request: check the path.")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise LemError(f"Cannot read the trace {path}: {error.strerror}. Check the path.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LemError(f"Cannot read the trace {path}: {error}. Is it unpacked, and text?") from error


def _csv(file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file)
    for fields in reader:
        yield reader.line_num, fields


def _jsonl(file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                fields = json.loads(text)
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                raise LemError(f"{file.name}, line {line}: expected a JSON object; repair or remove the line.")
            yield line, fields


def _time(fields: Mapping[str, Any], form: Format, where: str) -> float:
    value = fields.get(form.time)
    if value is None or value == "" or isinstance(value, bool):
        raise LemError(f"{where}: there is no {form.time}; repair or remove the line.")
    try:
        at_s = form.seconds(value)
    except (ValueError, TypeError, OverflowError):
        at_s = math.nan
    if not math.isfinite(at_s):
        raise LemError(f"{where}: {form.time} is no time: {value!r}; repair or remove the line.")
    if at_s < 0:
        raise LemError(f"{where}: {form.time} is negative: {value}; repair or remove the line.")
    return at_s


def _length(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        tokens = int(value)
    except (ValueError, TypeError):
        tokens = -1
    if tokens < 0:
        raise LemError(f"{where} is no number of tokens: {value!r}; repair or remove the line.")
    return tokens


def _date(text: str) -> float:
    """Seconds since 1970, UTC unless the text says otherwise. Digits beyond the microsecond, which Azure's first trace has,
    are cut off: Python 3.10 does not read them."""
    when = datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    return (when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)).timestamp()


FORMATS: Mapping[str, Format] = {
    "azure": Format(_csv, "TIMESTAMP", _date, "ContextTokens", "GeneratedTokens"),
    "burstgpt": Format(_csv, "Timestamp", float, "Request tokens", "Response tokens"),
    "mooncake": Format(_jsonl, "timestamp", lambda ms: float(ms) / 1000, "input_length", "output_length"),
    "bailian": Format(_jsonl, "timestamp", float, "input_length", "output_length"),
}
