"""The nouns: what they refuse, and that every reason code is explained and given."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from lem_kit.errors import LemError
from lem_kit.measurement import REASONS, Completion, Energy, Measurement, Repeat, Request, TokenEvent, jsonable


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either"), ({"prompt": "a", "prompt_token_ids": (1,)}, "either"), ({"prompt": ""}, "empty"),
        ({"prompt_token_ids": ()}, "empty"), ({"prompt": 5}, "is a text: got 5"), ({"prompt": ["a"]}, "is a text"),
        ({"prompt_token_ids": ("a",)}, "whole numbers"), ({"prompt_token_ids": (1.5,)}, "whole numbers"),
        ({"prompt_token_ids": 7}, "whole numbers"), ({"prompt_token_ids": ((1, 2),)}, "not of batches"),
        ({"prompt_token_ids": (3, -1)}, "negative: got -1"),
        *(({"prompt": "a", "max_new_tokens": n}, "at least one token") for n in (0, -3)),
        *(({"prompt": "a", "max_new_tokens": n}, "whole number") for n in (True, 1.5, "8", None)),
    ],
)  # fmt: skip
def test_a_request_without_a_meaning_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LemError, match=words):
        Request(**fields)


def test_ids_of_any_sequence_are_kept_as_plain_numbers() -> None:
    for ids in ([1, 2, 3], np.array([1, 2, 3]), range(1, 4), (1, 2, 3)):
        kept = Request(prompt_token_ids=ids).prompt_token_ids  # type: ignore[arg-type]
        assert kept == (1, 2, 3) and [type(i) for i in kept or ()] == [int] * 3


@pytest.mark.parametrize(
    ("joules", "half", "reasons", "words"),
    [
        (None, None, (), "needs a reason"), (1.0, None, (), "together"), (None, 1.0, ("no_reading",), "together"),
        (0.0, 1.0, (), "no energy"), (-2.0, 1.0, (), "no energy"), (float("nan"), 1.0, (), "no energy"),
        (float("inf"), 1.0, (), "no energy"), (1.0, float("nan"), (), "half-width"), (1.0, -1.0, (), "half-width"),
    ],
)  # fmt: skip
def test_an_energy_is_known_with_its_doubt_or_unknown_with_its_reason(
    joules: float | None, half: float | None, reasons: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=f"nvml:gpu0.*{words}"):
        Energy("nvml", "gpu0", "counter", "gpu", joules, half, reasons)


def test_an_energy_has_the_key_of_its_source_and_domain() -> None:
    assert Energy("nvml", "gpu0", "counter", "gpu", 1.0, 0.0).key == "nvml:gpu0"
    assert Energy("nvml", "gpu0", "counter", "gpu", None, None, ("no_reading",)).joules is None


def test_an_event_stamps_itself_when_it_is_made_unless_the_engine_did() -> None:
    before = time.monotonic_ns()
    event = TokenEvent(0, 1)
    assert before <= event.t_ns <= time.monotonic_ns() and event.timing_source == "client"
    assert TokenEvent(0, 1, 5, "engine").t_ns == 5


def test_lengths_and_counts_are_derived() -> None:
    assert Completion(0, 0, 9, ((3, 1), (5, 4)), None).output_tokens == 5
    assert Repeat(500_000_000, 2_000_000_000, {}).duration_s == 1.5
    assert Measurement("r", "window", "l", "ok", "", 10, 250_000_010, {}).duration_s == 0.25


def given_reasons(tree: ast.AST) -> Iterator[str]:
    """Texts where a reason is given: `_unknown(...)`, `reasons.append(...)` and `reasons=(...)`."""
    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "_unknown" or called.endswith("reasons.append"):
                found += [
                    part for arg in node.args for part in ([arg.body, arg.orelse] if isinstance(arg, ast.IfExp) else [arg])
                ]
            found += [part for k in node.keywords if k.arg == "reasons" for part in getattr(k.value, "elts", [])]
        yield from (part.value for part in found if isinstance(part, ast.Constant) and isinstance(part.value, str))


def test_every_reason_that_is_given_is_explained_and_every_explained_one_is_given() -> None:
    sources = {path: path.read_text() for path in (ROOT / "lem_kit").rglob("*.py")}
    given = {code for text in sources.values() for code in given_reasons(ast.parse(text))}
    assert len(given) > 10 and given <= set(REASONS), given - set(REASONS)
    everything = "\n".join(sources.values())
    for code in set(REASONS) - given:  # given by a variable, then
        assert everything.count(f'"{code}"') >= 2, f"{code} is explained but never given"


def test_reasons_are_sentences_without_an_end() -> None:
    for code, sentence in REASONS.items():
        assert code.isidentifier() and len(sentence.split()) >= 4 and not sentence.endswith(".") and "|" not in sentence


def test_jsonable_leaves_nothing_that_json_lacks() -> None:
    value = {1: (1, 2.5), "nan": float("nan"), "path": Path("a"), "none": None, "set": {3}, "deep": [{"x": float("inf")}]}
    found = jsonable(value)
    expected = {"1": [1, 2.5], "nan": "nan", "path": "a", "none": None, "set": [3], "deep": [{"x": "inf"}]}
    assert found == expected and json.dumps(found, allow_nan=False)


def test_jsonable_keeps_numbers_of_numpy_numbers() -> None:
    found = jsonable([np.int64(4), np.float32(0.5), np.bool_(True), np.float64("nan"), np.array(3), np.longdouble(1.5)])
    assert found == [4, 0.5, True, "nan", 3, "1.5"] and json.dumps(found, allow_nan=False)
