"""Trace files: every format is known by its first line, and a bad line is named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from lem_kit import prompts, traces, traffic
from lem_kit.errors import LemError

FILES = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n"
        "2023-11-16 18:16:46.6805900,879,55\r\n",
        [0.0, 4.314579, 60.0],
        [(374, 44), (396, 109), (879, 55)],
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45.5,ChatGPT,1087,0,1087,Conversation log\n"
        "45.5,GPT-4,417,276,693,API log\n",
        [0.0, 40.5, 40.5],
        [(472, 18), (1087, 0), (417, 276)],
    ),
    "mooncake": (
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 2366]}\n',
        [0.0, 3.053],
        [(6955, 52), (6472, 26)],
    ),
    "bailian": (
        '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 521, "output_length": 132, '
        '"type": "text", "turn": 1, "hash_ids": [1089]}\n'
        '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 61.614, "input_length": 9, "output_length": 1, "turn": 2}\n',
        [0.0, 0.5],
        [(521, 132), (9, 1)],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_format_is_known_by_its_first_line(name: str, tmp_path: Path) -> None:
    text, offsets, lengths = FILES[name]
    path = tmp_path / "trace"
    path.write_text(text, newline="")
    assert traces.detect(path) == name
    rows = list(traces.read(path))
    assert [row.at_s - rows[0].at_s for row in rows] == pytest.approx(offsets, abs=1e-6)
    assert [(row.input_tokens, row.output_tokens) for row in rows] == lengths
    assert traffic.trace(path).schedule(len(rows)) == pytest.approx(offsets, abs=1e-6)
    assert set(FILES) == set(traces.FORMATS)


def test_azures_later_trace_names_its_time_zone(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_text(f"{header}2024-05-12 00:00:00+00:00,1,2\n2024-05-12 00:00:00.251+00:00,1,2\n")
    first, second = traces.read(path)
    assert second.at_s - first.at_s == pytest.approx(0.251)
    path.write_text(f"{header}2024-05-12 01:00:00,1,2\n2024-05-12 02:00:00+01:00,1,2\n")
    first, second = traces.read(path)
    assert second.at_s == first.at_s, "without a zone it is UTC, whatever the machine's zone is"


HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("burstgpt", f"{HEADER}3,m,1,1,2,l\n2,m,1,1,2,l\n", "line 3: this request came before the one above it; sort"),
        ("burstgpt", f"{HEADER}3,m,1,1,2,l\n,m,1,1,2,l\n", "line 3: there is no Timestamp"),
        ("burstgpt", f"{HEADER}-1,m,1,1,2,l\n", "line 2: Timestamp is negative: -1"),
        ("burstgpt", f"{HEADER}nan,m,1,1,2,l\n", "line 2: Timestamp is no time: 'nan'"),
        ("burstgpt", f"{HEADER}soon,m,1,1,2,l\n", "line 2: Timestamp is no time: 'soon'"),
        ("burstgpt", f"{HEADER}1,m,many,1,2,l\n", "line 2: Request tokens is no number of tokens: 'many'"),
        ("burstgpt", f"{HEADER}1,m,1,-1,2,l\n", "line 2: Response tokens is no number of tokens: '-1'"),
        ("burstgpt", HEADER, "holds no request"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: TIMESTAMP is no time"),
        ("azure", "Time,ContextTokens,GeneratedTokens\n1,1,2\n", "line 2: there is no TIMESTAMP"),
        ("mooncake", '{"timestamp": 5}\n\n{"timestamp": 4}\n', "line 3: this request came before"),
        ("mooncake", '{"timestamp": null}\n', "line 1: there is no timestamp"),
        ("mooncake", '{"input_length": 4}\n', "line 1: there is no timestamp"),
        ("mooncake", '{"timestamp": true}\n', "line 1: there is no timestamp"),
        ("mooncake", '{"timestamp": -5}\n', "line 1: timestamp is negative"),
        ("mooncake", '{"timestamp": [1]}\n', "line 1: timestamp is no time"),
        ("mooncake", '{"timestamp": 5}\n{"timestamp"\n', "line 2: expected a JSON object"),
        ("mooncake", '{"timestamp": 5}\n7\n', "line 2: expected a JSON object"),
        ("mooncake", "", "holds no request"),
        (["azure"], HEADER, r"There is no trace format '\['azure'\]'"),
        ("nonsense", HEADER, "There is no trace format 'nonsense'"),
    ],
)
def test_a_bad_line_is_named(name: Any, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(LemError, match=words):
        list(traces.read(path, name))


def test_what_cannot_be_read_says_so_when_the_plan_is_made(tmp_path: Path) -> None:
    with pytest.raises(LemError, match=r"Cannot read the trace .*missing\.csv: No such file"):
        traffic.trace(tmp_path / "missing.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(LemError, match=r"no trace that lem_kit knows.*azure, burstgpt, mooncake, bailian"):
        traffic.trace(other)
    for nothing in ("", "\n\n", "\ufeff"):
        other.write_text(nothing, "utf-8")
        with pytest.raises(LemError, match=r"other\.csv is empty: it holds no request"):
            traffic.trace(other)
    for no_path in (None, 3, 3.5, ["a"]):
        with pytest.raises(LemError, match="The path of a trace is a text: got"):
            traffic.trace(no_path)  # type: ignore[arg-type]
    other.write_bytes(b"\x1f\x8b\x08\xff\xff")
    with pytest.raises(LemError, match="Is it unpacked"):
        traffic.trace(other)
    with pytest.raises(LemError, match="Is it unpacked"):
        traffic.trace(other, "azure")


def test_no_more_is_read_than_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEADER}1,m,3,2,5,l\n2,m,4,1,5,l\nrubbish\n")
    rows = list(itertools.islice(traces.read(path), 2))
    assert traffic.trace(path).schedule(2) == (0.0, 1.0)
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [(3, 2), (4, 1)]
    made = prompts.of_trace(path, 2)
    shapes: list[Any] = [(len(r.prompt_token_ids or ()), r.max_new_tokens) for r in made]
    assert shapes == [(3, 2), (4, 1)], "as the module's docstring shows"
