"""Where requests come from: exact lengths, seeds, shared beginnings, and digests that tell inputs apart."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lem_kit import lengths, prompts, traces, traffic
from lem_kit.errors import LemError
from lem_kit.measurement import Request


def test_synthetic_prompts_have_exact_lengths_and_a_seed() -> None:
    made = prompts.synthetic(5, input_tokens=17, output_tokens=9, seed=3, temperature=0.5)
    assert [len(r.prompt_token_ids or ()) for r in made] == [17] * 5
    assert all(r.max_new_tokens == 9 and r.fixed_length and r.options == {"temperature": 0.5} for r in made)
    assert (
        made == prompts.synthetic(5, 17, 9, seed=3, temperature=0.5) != prompts.synthetic(5, 17, 9, seed=4, temperature=0.5)
    )
    assert all(256 <= i < 4096 for r in made for i in r.prompt_token_ids or ())
    for count, tokens in ((0, 1), (1, 0)):
        with pytest.raises(LemError, match="at least one"):
            prompts.synthetic(count, tokens, 1)


def test_disguised_prompts_have_the_same_shape_and_other_contents() -> None:
    asked = [*prompts.synthetic(2, 50, 5), *prompts.texts(["a few words of plain text to shuffle about"])]
    other = prompts.disguised(asked)
    assert other == prompts.disguised(asked) != prompts.disguised(asked, seed=1)
    for a, b in zip(asked, other):
        assert sorted(a.prompt_token_ids or ()) == sorted(b.prompt_token_ids or ()) and a != b
        assert sorted((a.prompt or "").split()) == sorted((b.prompt or "").split())
        assert (a.max_new_tokens, a.fixed_length, a.options) == (b.max_new_tokens, b.fixed_length, b.options)


def test_a_prompt_of_one_word_stays() -> None:
    for prompt in ("word", "   "):
        assert prompts.disguised(prompts.texts([prompt]))[0].prompt == prompt


def test_equal_digests_are_equal_inputs() -> None:
    base = prompts.texts(["a", "b"], 4)
    others = [prompts.texts(["b", "a"], 4), prompts.texts(["a", "b"], 5), prompts.texts(["a", "b"], 4, top_k=1), base[:1]]
    assert prompts.digest(base) == prompts.digest(prompts.texts(["a", "b"], 4))
    assert len({prompts.digest(found) for found in (base, *others)}) == 5


def test_options_are_a_mapping() -> None:
    for requests, options in ((None, {}), (prompts.synthetic(1, 2, 3), None), (prompts.synthetic(1, 2, 3), ["seed"])):
        with pytest.raises(LemError, match=r"asking\(\) takes requests and a mapping of options"):
            prompts.asking(requests, options)  # type: ignore[arg-type]


def test_options_may_have_the_name_of_a_parameter() -> None:
    made = prompts.asking(prompts.synthetic(2, 4, 3, seed=1, top_k=1), {"seed": 7, "ids": [1]})
    assert [r.options for r in made] == [{"top_k": 1, "seed": 7, "ids": [1]}] * 2
    assert [r.prompt_token_ids for r in made] == [r.prompt_token_ids for r in prompts.synthetic(2, 4, 3, seed=1)]


def ids(request: Request) -> tuple[int, ...]:
    return request.prompt_token_ids or ()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two prompts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_fixed_lengths_draw_what_they_always_drew() -> None:
    """Digests in old records are compared with new ones."""
    draw = random.Random(3)
    assert [ids(r) for r in prompts.synthetic(4, 17, 9, seed=3)] == [
        tuple(draw.choices(range(256, 4096), k=17)) for _ in range(4)
    ]


def test_lengths_may_be_drawn_for_each_request() -> None:
    made = prompts.synthetic(300, lengths.uniform(2, 9), lengths.normal(50, 10), seed=1)
    assert {len(ids(r)) for r in made} == set(range(2, 10)) and len({r.max_new_tokens for r in made}) > 20
    assert prompts.digest(made) == prompts.digest(
        prompts.synthetic(300, lengths.uniform(2, 9), lengths.normal(50, 10), seed=1)
    )


def test_counts_and_seeds_that_mean_nothing_are_refused() -> None:
    for bad in (0, -1, 1.5, True, "3", math.nan):
        with pytest.raises(LemError, match=r"whole number of at least one: got"):
            prompts.synthetic(bad, 4, 4)  # type: ignore[arg-type]
        with pytest.raises(LemError, match=r"groups=\) makes a whole number"):
            prompts.shared_prefix(bad, 2, 4, 4, 4)  # type: ignore[arg-type]
    for bad in (None, 1.5, "a"):
        with pytest.raises(LemError, match="seed= takes a whole number"):
            prompts.synthetic(1, 4, 4, seed=bad)  # type: ignore[arg-type]
    with pytest.raises(LemError, match="no token id"):
        prompts.synthetic(1, 4, 4, ids=range(5, 5))
    for bad in (None, 5, "abc", {1, 2}):
        with pytest.raises(LemError, match="ids= takes a range or a list of token ids: got"):
            prompts.synthetic(1, 4, 4, ids=bad)  # type: ignore[arg-type]
    with pytest.raises(LemError, match="system_tokens= must be a whole number"):
        prompts.conversations(1, 2, 4, 4, system_tokens=lengths.uniform(1, 3))  # type: ignore[arg-type]


def test_requests_of_a_group_begin_alike_and_others_do_not() -> None:
    made = prompts.shared_prefix(3, 4, prefix_tokens=40, suffix_tokens=lengths.uniform(5, 9), output_tokens=7, shuffle=False)
    assert len(made) == 12 and all(r.max_new_tokens == 7 and r.fixed_length for r in made)
    for i, a in enumerate(made):
        for j, b in enumerate(made[:i]):
            alike = common(ids(a), ids(b))
            assert 40 <= alike <= 42 if i // 4 == j // 4 else alike <= 2, "and not much further by chance"
    assert {len(ids(r)) - 40 for r in made} <= set(range(5, 10))
    mixed = prompts.shared_prefix(3, 4, 40, lengths.uniform(5, 9), 7)
    assert mixed != made and sorted(map(ids, mixed)) == sorted(map(ids, made)), "the same ones in another order"
    assert mixed == prompts.shared_prefix(3, 4, 40, lengths.uniform(5, 9), 7)


def test_prefixes_may_differ_in_length() -> None:
    made = prompts.shared_prefix(5, 2, lengths.uniform(10, 90), 3, 4, shuffle=False)
    shared = [common(ids(a), ids(b)) for a, b in zip(made[::2], made[1::2])]
    assert [len(ids(r)) - 3 for r in made[::2]] == [len(ids(r)) - 3 for r in made[1::2]]
    assert all(0 <= s - (len(ids(r)) - 3) <= 1 for s, r in zip(shared, made[::2])) and len(set(shared)) > 2


def test_a_turn_goes_on_from_all_that_was_said() -> None:
    made = prompts.conversations(3, 4, input_tokens=11, output_tokens=5, seed=2, system_tokens=20, top_k=1)
    assert [(r.conversation, r.turn) for r in made] == [(f"conversation-{c}", t) for c in range(3) for t in range(4)]
    for before, after in itertools.pairwise(made):
        if after.turn:
            assert ids(after)[: len(ids(before))] == ids(before), "all ids of the turn before"
            assert len(ids(after)) == len(ids(before)) + 5 + 11, "an answer as long as was asked for, and what is new"
    assert [len(ids(r)) for r in made[:4]] == [31, 47, 63, 79] and all(r.options == {"top_k": 1} for r in made)
    firsts = [r for r in made if r.turn == 0]
    assert all(20 <= common(ids(a), ids(b)) <= 22 for a, b in itertools.pairwise(firsts)), "the system prompt is everyone's"


def test_conversations_may_differ_in_every_length() -> None:
    shapes = (lengths.uniform(1, 5), lengths.uniform(3, 30), lengths.normal(20, 5))
    made = prompts.conversations(40, *shapes, seed=6)
    assert {sum(r.conversation == f"conversation-{c}" for r in made) for c in range(40)} == {1, 2, 3, 4, 5}
    for before, after in itertools.pairwise(made):
        if after.turn:
            assert 3 <= len(ids(after)) - len(ids(before)) - before.max_new_tokens <= 30
    assert prompts.digest(made) == prompts.digest(prompts.conversations(40, *shapes, seed=6))


MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]},
    {"timestamp": 10, "input_length": 1300, "output_length": 8, "hash_ids": [1, 2, 4]},
    {"timestamp": 20, "input_length": 1536, "output_length": 9, "hash_ids": [1, 2, 3]},
    {"timestamp": 30, "input_length": 600, "output_length": 3, "hash_ids": [9, 2]},
    {"timestamp": 40, "input_length": 40, "output_length": 3},
    {"timestamp": 50, "input_length": 40, "output_length": 3, "hash_ids": []},
]


def trace_of(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_blocks_of_equal_names_are_equal_tokens(tmp_path: Path) -> None:
    path = trace_of(MOONCAKE, tmp_path / "t.jsonl")
    a, b, c, d, e, f = made = prompts.of_trace(path, seed=4, top_k=1)
    assert [(len(ids(r)), r.max_new_tokens) for r in made] == [
        (row["input_length"], row["output_length"]) for row in MOONCAKE
    ], "exactly the lengths of the file"
    assert 1024 <= common(ids(a), ids(b)) <= 1026, "two blocks alike, the third another"
    assert ids(c)[:1100] == ids(a), "a block that is cut short is the beginning of that block"
    assert ids(d)[512:] == ids(a)[512:600] and common(ids(d), ids(a)) < 3, "a block is the same wherever it stands"
    assert common(ids(e), ids(f)) < 3, "what has no name is a request's own"
    assert all(r.fixed_length and r.options == {"top_k": 1} for r in made)
    assert made == prompts.of_trace(path, seed=4, top_k=1) and made[:2] == prompts.of_trace(path, 2, seed=4, top_k=1)
    assert ids(prompts.of_trace(path, seed=5)[0]) != ids(a)
    assert len(traffic.trace(path).schedule(len(made))) == 6, "sent at the times of the same file"


def test_a_block_is_the_same_in_every_file_of_a_seed(tmp_path: Path) -> None:
    turned = [{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [3, 1]}]
    (there,) = prompts.of_trace(trace_of(turned, tmp_path / "other.jsonl"), seed=4)
    here = prompts.of_trace(trace_of(MOONCAKE, tmp_path / "t.jsonl"), seed=4)[2]
    assert ids(there) == ids(here)[1024:] + ids(here)[:512]


def test_bailians_blocks_have_16_tokens(tmp_path: Path) -> None:
    rows = [
        {"chat_id": 1, "timestamp": 0.5, "input_length": 40, "output_length": 2, "hash_ids": [7, 8, 9]},
        {"chat_id": 2, "timestamp": 0.9, "input_length": 50, "output_length": 2, "hash_ids": [7, 8, 9]},  # without the rest
    ]
    a, b = prompts.of_trace(trace_of(rows, tmp_path / "t.jsonl"))
    assert (len(ids(a)), len(ids(b))) == (40, 50) and ids(b)[:40] == ids(a)


def test_a_trace_without_blocks_has_prompts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46,374,44\r\n2023-11-16 18:15:50,374,9\r\n")
    a, b = prompts.of_trace(path)
    assert (len(ids(a)), a.max_new_tokens, len(ids(b)), b.max_new_tokens) == (374, 44, 374, 9) and common(ids(a), ids(b)) < 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"timestamp": 1, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2]}, None),  # of whole blocks alone
        (
            {"timestamp": 1, "input_length": 1100, "output_length": 7, "hash_ids": [1]},
            "line 2: 1 blocks of 512 tokens do not",
        ),
        (
            {"timestamp": 1, "input_length": 1100, "output_length": 7, "hash_ids": [1] * 4},
            "line 2: 4 blocks of 512 .* say block",
        ),
        ({"timestamp": 1, "input_length": 11, "output_length": 7, "hash_ids": "x"}, "line 2: hash_ids is no list"),
        ({"timestamp": 1, "input_length": 11, "output_length": 7, "hash_ids": [1.5]}, "line 2: hash_ids is no list"),
        ({"timestamp": 1, "input_length": 11, "output_length": 0}, "line 2: output_length is 0.*at_least=1"),
        ({"timestamp": 1, "input_length": 0, "output_length": 4}, "line 2: input_length is 0"),
        ({"timestamp": 1, "output_length": 4}, "line 2: there is no input_length"),
        (
            {"timestamp": 1, "input_length": 4, "output_length": math.nan},
            "line 2: output_length is no number of tokens: nan",
        ),
        ({"timestamp": 1, "input_length": math.inf, "output_length": 4}, "line 2: input_length is no number of tokens: inf"),
        ({"timestamp": 1, "input_length": 4.5, "output_length": 4}, "line 2: input_length is no number of tokens: 4.5"),
    ],
)
def test_a_row_that_makes_no_request_is_named(row: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    path = trace_of([{"timestamp": 0, "input_length": 5, "output_length": 5}, row], tmp_path / "t.jsonl")
    if words is None:
        assert len(ids(prompts.of_trace(path)[1])) == row["input_length"]
        return
    with pytest.raises(LemError, match=words):
        prompts.of_trace(path)


def test_lengths_of_0_can_be_raised_and_the_rows_stay_in_step(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": t, "output_length": 2 * t} for t in range(3)]
    path = trace_of(rows, tmp_path / "t.jsonl")
    made = prompts.of_trace(path, at_least=1)
    assert [(len(ids(r)), r.max_new_tokens) for r in made] == [(1, 1), (1, 2), (2, 4)]
    with pytest.raises(LemError, match="at_least= takes a whole number of at least 1: got 0"):
        prompts.of_trace(path, at_least=0)
    with pytest.raises(LemError, match="holds 3 requests, and 4 were asked for: ask for 3 or fewer"):
        prompts.of_trace(path, 4, at_least=1)
    with pytest.raises(LemError, match="count= takes a whole number of at least 1"):
        traces.whole_rows(path, 0)
    with pytest.raises(LemError, match="Cannot read the trace"):
        prompts.of_trace(tmp_path / "none.jsonl")


def test_the_digest_of_ids_tells_what_the_engine_made_of_a_text() -> None:
    given = prompts.synthetic(3, 5, 4)
    spoken = prompts.texts(["one two", "three"])

    def engine(request: Request, bos: int = 1) -> list[int]:
        return [bos, *(len(word) for word in (request.prompt or "").split())]

    assert prompts.ids_digest(given) == prompts.ids_digest(given, engine), "ids that are given need no engine"
    assert prompts.ids_digest(spoken) is None and prompts.ids_digest([*given, *spoken]) is None
    assert prompts.ids_digest(spoken, engine) == prompts.ids_digest(
        [Request(prompt_token_ids=(1, 3, 3)), Request(prompt_token_ids=(1, 5))]
    ), "it is of the ids, however they came to be"
    doubled = prompts.ids_digest(spoken, lambda request: [1, *engine(request)])
    assert len({doubled, prompts.ids_digest(spoken, engine), prompts.ids_digest(spoken[::-1], engine)}) == 3
    # The border between two prompts counts.
    one, other = ([Request(prompt_token_ids=x) for x in pair] for pair in (((1, 2), (3,)), ((1,), (2, 3))))
    assert prompts.ids_digest(one) != prompts.ids_digest(other)
