"""Where requests come from: exact lengths, seeds, files, and digests that tell inputs apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem_kit import prompts
from lem_kit.errors import LemError


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


def test_lines_of_a_file_are_requests(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert [r.prompt for r in prompts.jsonl(file, 5)] == ["one", "two"]
    file.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(LemError, match="line 2"):
        prompts.jsonl(file)
    with pytest.raises(LemError, match="Cannot read"):
        prompts.jsonl(tmp_path / "none")
    file.write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(LemError, match="not UTF-8"):
        prompts.jsonl(file)


def test_a_line_ends_at_a_newline_only_and_blank_ones_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"text": "a\u2028b"}\r\n\n  \n{"text": "c\x85d"}\n'.encode())
    made = prompts.jsonl(file, 5, field="text", fixed_length=True, top_k=1)
    assert [r.prompt for r in made] == ["a\u2028b", "c\x85d"]
    assert all(r.fixed_length and r.max_new_tokens == 5 and r.options == {"top_k": 1} for r in made)


@pytest.mark.parametrize("line", ["nonsense", "[1]", '"text"', '{"prompt": 5}', '{"prompt": ""}', '{"prompt": null}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "one"}}\n\n{line}\n')
    with pytest.raises(LemError, match="line 3"):
        prompts.jsonl(file)


def test_one_text_is_not_a_list_of_letters() -> None:
    with pytest.raises(LemError, match="list of texts"):
        prompts.texts("hello")


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


def test_options_may_have_the_name_of_a_parameter() -> None:
    made = prompts.asking(prompts.synthetic(2, 4, 3, seed=1, top_k=1), {"seed": 7, "ids": [1]})
    assert [r.options for r in made] == [{"top_k": 1, "seed": 7, "ids": [1]}] * 2
    assert [r.prompt_token_ids for r in made] == [r.prompt_token_ids for r in prompts.synthetic(2, 4, 3, seed=1)]
