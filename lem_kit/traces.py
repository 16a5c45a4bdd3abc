"""Recorded traffic: files that say when requests came to a service, and how long they were. (Readings of energy: `trace`.)

The one idea: a format is a few names: the column of the time and its unit, those of the two lengths, and that of the
blocks of the prompt. Rows are read one by one, so that the first thousand of a trace of millions cost a thousand.

    azure      CSV    TIMESTAMP (date and time), ContextTokens, GeneratedTokens       Azure LLM inference traces 2023, 2024
    burstgpt   CSV    Timestamp (s), Request tokens, Response tokens                  BurstGPT
    mooncake   JSONL  timestamp (ms), input_length, output_length, hash_ids           Mooncake
    bailian    JSONL  timestamp (s), input_length, output_length, hash_ids; chat_id   Qwen-Bailian

A trace gives times and lengths, never contents; `hash_ids` say which blocks of which prompts were equal (512 tokens each in
Mooncake's traces, 16 in Bailian's; the last block may be cut short). Requests of these shapes, and their arrivals:

    session.run(backend, lem.prompts.of_trace(path, 100), lem.traffic.trace(path))

Not covered: which chat a request belongs to (`chat_id`, `turn`); each is sent at its own time.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LemError, nearest, shown


class Row(NamedTuple):
    """One request: its line in the file, when it came in seconds (from an origin of the file's own), and its lengths, None
    where the file does not say. `blocks` names the blocks of its prompt in order: those of equal names were equal."""

    line: int
    at_s: float
    input_tokens: int | None
    output_tokens: int | None
    blocks: tuple[int | str, ...] = ()


class Format(NamedTuple):
    """How a file is read: the names of its fields, and what turns the text of a time into seconds. `block_tokens` is how
    long a block of a prompt is, where there are blocks."""

    rows: Callable[[Any], Iterator[tuple[int, Mapping[str, Any]]]]
    time: str
    seconds: Callable[[Any], float]
    input_tokens: str
    output_tokens: str
    blocks: str = "hash_ids"
    block_tokens: int = 0


def detect(path: str | Path) -> str:
    """The name of the file's format, from its first line that is not blank. LemError if it is none of them."""
    with _opened(path) as file:
        first = next((text for line in iter(lambda: file.readline(100_000), "") if (text := line.strip())), "")
    if not first:
        raise LemError(f"{path} is empty: it holds no request. Check the path.")
    if first.startswith("{"):
        return "bailian" if '"chat_id"' in first else "mooncake"
    for name in ("azure", "burstgpt"):
        if FORMATS[name].output_tokens in first:
            return name
    raise LemError(f"{path} is no trace that lem_kit knows by its first line: say format=, one of {', '.join(FORMATS)}.")


def format_of(path: str | Path, format: str | None = None) -> Format:
    """The format of that name, or the file's own. LemError if there is none."""
    name = detect(path) if format is None else format
    if name not in tuple(FORMATS):
        raise LemError(f"There is no trace format '{name}': {nearest(str(name), FORMATS)}")
    return FORMATS[name]


def read(path: str | Path, format: str | None = None) -> Iterator[Row]:
    """The rows of a trace, in order; reads no further than it is asked.

    LemError, with the number of the line, for a time that is missing, negative or before the one above it.
    """
    form = format_of(path, format)
    before_s = 0.0
    empty = True
    with _opened(path) as file:
        for line, fields in form.rows(file):
            where = f"{path}, line {line}"
            at_s = _time(fields, form, where)
            if at_s < before_s:
                raise LemError(f"{where}: this request came before the one above it; sort the trace by {form.time}.")
            before_s, empty = at_s, False
            inputs, outputs = (
                _length(fields.get(key), f"{where}: {key}") for key in (form.input_tokens, form.output_tokens)
            )
            blocks = _blocks(fields.get(form.blocks), f"{where}: {form.blocks}") if form.block_tokens else ()
            yield Row(line, at_s, inputs, outputs, blocks)
    if empty:
        raise LemError(f"{path} holds no request: check the path.")


def whole_rows(
    path: str | Path, count: int | None = None, format: str | None = None, at_least: int | None = None
) -> list[Row]:
    """The first `count` rows (all, unless given), each with both lengths, and those at least 1.

    LemError where the trace has fewer rows, and, with the number of the line, for a length that is missing or 0: BurstGPT
    writes 0 for an answer that failed. With `at_least` shorter ones become so long instead.
    """
    for name, value in (("count", count), ("at_least", at_least)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise LemError(f"{name}= takes a whole number of at least 1: got {value!r}.")
    form = format_of(path, format)
    rows: list[Row] = []
    for row in itertools.islice(read(path, format), count):
        lengths = []
        for name, tokens in ((form.input_tokens, row.input_tokens), (form.output_tokens, row.output_tokens)):
            if tokens is None:
                raise LemError(f"{path}, line {row.line}: there is no {name}; repair or remove the line.")
            if tokens < 1 and at_least is None:
                raise LemError(
                    f"{path}, line {row.line}: {name} is 0, and an engine takes and makes at least one token: remove the "
                    "line, or say at_least=1 to have one."
                )
            lengths.append(max(tokens, at_least or 1))
        rows.append(row._replace(input_tokens=lengths[0], output_tokens=lengths[1]))
    if count is not None and len(rows) < count:
        raise LemError(f"{path} holds {len(rows)} requests, and {count} were asked for: ask for {len(rows)} or fewer.")
    return rows


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not isinstance(path, (str, os.PathLike)):  # `open` would take a number for a file that is open
        raise LemError(f"The path of a trace is a text: got {shown(path)}.")
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
        tokens = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        tokens = math.nan
    if not (tokens.is_integer() and tokens >= 0):
        raise LemError(f"{where} is no number of tokens: {value!r}; repair or remove the line.")
    return int(tokens)


def _blocks(value: Any, where: str) -> tuple[int | str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, (int, str)) and not isinstance(name, bool) for name in value):
        raise LemError(f"{where} is no list of the names of blocks: {str(value)[:60]}; repair or remove the line.")
    return tuple(value)


def _date(text: str) -> float:
    """Seconds since 1970, UTC unless the text says otherwise. Digits beyond the microsecond, which Azure's first trace has,
    are cut off: Python 3.10 does not read them."""
    when = datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    return (when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)).timestamp()


FORMATS: Mapping[str, Format] = {
    "azure": Format(_csv, "TIMESTAMP", _date, "ContextTokens", "GeneratedTokens"),
    "burstgpt": Format(_csv, "Timestamp", float, "Request tokens", "Response tokens"),
    "mooncake": Format(_jsonl, "timestamp", lambda ms: float(ms) / 1000, "input_length", "output_length", block_tokens=512),
    "bailian": Format(_jsonl, "timestamp", float, "input_length", "output_length", block_tokens=16),
}
