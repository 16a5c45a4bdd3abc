"""Prompts that somebody wrote: every line of a file is a request, or is named; conversations carry what was said before."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lem_kit import models, prompts, texts, traffic
from lem_kit.errors import LemError


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


@pytest.mark.parametrize("source", [prompts.jsonl, prompts.sharegpt])
@pytest.mark.parametrize("bad", [None, 3, ["a"], b"a"])
def test_a_path_is_one(source: Any, bad: Any) -> None:
    with pytest.raises(LemError, match="The path of a prompts file is a text: got"):
        source(bad)


@pytest.mark.parametrize("bad", [None, 3, b"abc", {"prompt": "a"}])
def test_texts_are_a_list_of_texts(bad: Any) -> None:
    with pytest.raises(LemError, match=r"texts\(\) takes a list of texts"):
        prompts.texts(bad)


def test_one_text_is_not_a_list_of_letters() -> None:
    with pytest.raises(LemError, match="list of texts"):
        prompts.texts("hello")


def test_a_number_of_the_lines_may_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(20)))
    assert [r.prompt for r in prompts.jsonl(file, count=3)] == ["0", "1", "2"]
    drawn = [r.prompt for r in prompts.jsonl(file, count=8, seed=1)]
    assert len(set(drawn)) == 8 and drawn != sorted(drawn, key=lambda p: int(p or 0)), "drawn, none of them twice"
    assert drawn == [r.prompt for r in prompts.jsonl(file, count=8, seed=1)]
    assert sorted(r.prompt or "" for r in prompts.jsonl(file, seed=2)) == sorted(map(str, range(20)))
    with pytest.raises(LemError, match=r"p\.jsonl holds 20 prompts, and 21 were asked for: ask for 20 or fewer"):
        prompts.jsonl(file, count=21)
    for bad in (0, -1, 2.0, True, float("nan")):
        with pytest.raises(LemError, match="count= takes a whole number"):
            prompts.jsonl(file, count=bad)  # type: ignore[arg-type]
    file.write_text("\n\n")
    with pytest.raises(LemError, match=r"p\.jsonl holds no prompts"):
        prompts.jsonl(file)


def test_json_that_is_broken_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"\n')
    with pytest.raises(LemError, match=r"line 2: this is no JSON \(.*: repair or remove the line"):
        prompts.jsonl(file)
    file.write_text('[\n{"conversations": []},\n{"conversations" []}\n]')
    with pytest.raises(LemError, match=r"line 3: this is no JSON"):
        prompts.sharegpt(file)


TALK = [
    {"from": "gpt", "value": "A greeting that nobody asked for."},
    {"from": "human", "value": "One?"},
    {"from": "gpt", "value": "First answer."},
    {"from": "human", "value": "Two?"},
    {"from": "human", "value": "And three?"},
    {"from": "gpt", "value": "Second, and third."},
    {"from": "human", "value": "Four?"},
]
SYSTEM = {"from": "system", "value": "Be brief."}


def sharegpt(tmp_path: Path, *talks: Any, **more: Any) -> list[Any]:
    file = tmp_path / "share.json"
    file.write_text(json.dumps([{"id": f"t{n}", "conversations": talk} for n, talk in enumerate(talks)]))
    return prompts.sharegpt(file, **more)


def test_the_first_turn_of_a_conversation_is_a_request(tmp_path: Path) -> None:
    made = sharegpt(tmp_path, TALK, [SYSTEM, {"role": "user", "content": "Hello"}], max_new_tokens=9, top_k=1)
    assert [(r.prompt, r.max_new_tokens, r.options, r.conversation) for r in made] == [
        ("One?", 9, {"top_k": 1}, None), ("Hello", 9, {"top_k": 1}, None),
    ]  # fmt: skip


def test_every_turn_holds_what_was_said_before_as_it_stands_in_the_file(tmp_path: Path) -> None:
    one, two, three = made = sharegpt(tmp_path, [SYSTEM, *TALK], whole=True)
    assert one.prompt == "Be brief.\n\nUser: One?\n\nAssistant:"
    assert two.prompt == f"{one.prompt} First answer.\n\nUser: Two?\n\nUser: And three?\n\nAssistant:"
    assert three.prompt == f"{two.prompt} Second, and third.\n\nUser: Four?\n\nAssistant:"
    assert [(r.conversation, r.turn) for r in made] == [("t0", 0), ("t0", 1), ("t0", 2)]


def test_names_that_come_twice_are_two_conversations(tmp_path: Path) -> None:
    file = tmp_path / "share.jsonl"
    row = json.dumps({"id": "same", "conversations": TALK})
    file.write_text(f"{row}\n\n{row}\n")
    made = prompts.sharegpt(file, whole=True)
    assert Counter(r.conversation for r in made) == {"same": 3, "same #1": 3}
    assert len(traffic.turns(made).describe()["turn"]) == 6


def test_conversations_without_a_user_are_left_out_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 of 3 conversations hold no turn of a user"):
        made = sharegpt(tmp_path, [], TALK, [{"from": "gpt", "value": "Anyone?"}, {"from": "human", "value": "  "}])
    assert [r.prompt for r in made] == ["One?"]
    with pytest.warns(UserWarning), pytest.raises(LemError, match="holds 1 conversations, and 2 were asked for"):
        sharegpt(tmp_path, [], TALK, count=2)
    with pytest.warns(UserWarning), pytest.raises(LemError, match="holds no conversations"):
        sharegpt(tmp_path, [])
    with pytest.raises(LemError, match="holds no conversations"):
        sharegpt(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[5]", 'entry 0: expected an object with a list of "conversations"'),
        ('[{"conversations": []}, {"id": 4}]', 'entry 1: expected an object with a list of "conversations"'),
        ('{"conversations": [{"from": "human", "value": "a"}]}\n{"text": 1}', "line 2: expected an object"),
        ('[{"conversations": "text"}]', "entry 0: expected a list of messages"),
        ('[{"conversations": ["text"]}]', "entry 0: expected messages with a role and a text"),
        (
            '[{"conversations": [{"from": "narrator", "value": "a"}]}]',
            "entry 0: expected messages of .*one is of 'narrator'",
        ),
        ('[{"conversations": [{"from": "human", "value": 5}]}]', "entry 0: expected messages of text, and one holds int"),
    ],
)
def test_what_is_no_conversation_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "share.json"
    file.write_text(text)
    with pytest.raises(LemError, match=words):
        prompts.sharegpt(file)


def test_answers_may_be_as_long_as_those_of_the_file(tmp_path: Path) -> None:
    encoder = models.tokenizer("tiny-llama")
    made = sharegpt(tmp_path, [SYSTEM, *TALK], whole=True, max_new_tokens=None, tokenizer=encoder)
    wanted = [len(encoder(answer, add_special_tokens=False).input_ids) for answer in ("First answer.", "Second, and third.")]
    assert [r.max_new_tokens for r in made] == wanted, "the last turn has no answer, and is left out"
    (first,) = sharegpt(tmp_path, TALK, max_new_tokens=None, tokenizer=encoder)
    assert (first.prompt, first.max_new_tokens) == ("One?", wanted[0])
    with pytest.raises(LemError, match=r"max_new_tokens=None .* needs tokenizer="):
        sharegpt(tmp_path, TALK, max_new_tokens=None)
    with pytest.raises(LemError, match="holds no answer to take a length from"):
        sharegpt(tmp_path, TALK[-1:], max_new_tokens=None, tokenizer=encoder)


def test_a_chat_template_makes_ids_with_one_bos(tmp_path: Path) -> None:
    encoder = models.tokenizer("tiny-llama")
    encoder.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    one, two, _ = sharegpt(tmp_path, [SYSTEM, *TALK], whole=True, tokenizer=encoder)
    assert one.prompt is None and (one.prompt_token_ids or ()).count(encoder.bos_token_id) == 1
    assert encoder.decode(one.prompt_token_ids or (), skip_special_tokens=True) == (
        "[system] Be brief.\n[user] One?\n[assistant] "
    )
    assert len(two.prompt_token_ids or ()) > len(one.prompt_token_ids or ()) and two.turn == 1
    encoder.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(LemError, match=r"refuses a conversation \(no system here\): leave tokenizer= out"):
        sharegpt(tmp_path, TALK, whole=True, tokenizer=encoder)


def test_a_tokenizer_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(LemError, match=r"no tokenizer of '.*nowhere'"):
        sharegpt(tmp_path, TALK, tokenizer=str(tmp_path / "nowhere"))


# --- the prompts that come with lem_kit ------------------------------------------------------------------------------

KINDS = {"chat", "code", "creative", "extract", "reasoning", "rewrite", "short", "summarise"}


def lines() -> list[dict[str, Any]]:
    files = sorted((ROOT / "data" / "prompts").glob("*.jsonl"))
    return [json.loads(line) | {"file": path.stem} for path in files for line in path.read_text("utf-8").split("\n") if line]


def test_the_written_prompts_are_many_and_each_is_one_of_a_kind() -> None:
    found = lines()
    assert len(found) >= 60 and {line["kind"] for line in found} == KINDS
    assert all(line["kind"] == line["file"] for line in found)
    for name in ("id", "prompt"):
        assert len({line[name] for line in found}) == len(found), f"no {name} twice"
    assert all(line["id"].startswith(f"{line['kind']}-") for line in found)
    assert min(Counter(line["kind"] for line in found).values()) >= 8


def test_the_written_prompts_share_no_beginning() -> None:
    """Or a prefix cache would find some of them. Tasks may begin alike for a few words."""
    starts = Counter(" ".join(line["prompt"].split()[:12]) for line in lines() if len(line["prompt"].split()) >= 12)
    assert starts.most_common(1)[0][1] == 1


def test_the_written_prompts_have_lengths_from_five_to_about_fifteen_hundred_words() -> None:
    words = sorted(len(line["prompt"].split()) for line in lines())
    assert words[0] == 5 and 1400 <= words[-1] <= 1600
    for low, high, least in ((5, 20, 12), (20, 80, 20), (80, 300, 12), (300, 800, 5), (800, 1600, 3)):
        assert sum(low <= n < high for n in words) >= least, (low, high)


def test_the_written_prompts_hold_no_address_and_no_control_character() -> None:
    for line in lines():
        text = line["prompt"] + line.get("answer", "")
        assert not re.search(r"https?://|@\w+\.\w|\b\d{3}-\d{2}-\d{4}\b", text), line["id"]
        assert all(c == "\n" or c.isprintable() for c in text), line["id"]


def test_written_gives_them_by_kind() -> None:
    everything = prompts.written()
    assert len(everything) == len(lines()) and len({r.prompt for r in everything}) == len(everything)
    code = prompts.written("code", 200, fixed_length=True, top_k=1)
    assert len(code) == sum(line["kind"] == "code" for line in lines())
    assert all(r.max_new_tokens == 200 and r.fixed_length and r.options == {"top_k": 1} for r in code)
    with pytest.raises(LemError, match="no prompts of the kind 'cod': did you mean 'code'"):
        prompts.written("cod")
    assert {r.prompt for r in prompts.jsonl(ROOT / "data" / "prompts" / "code.jsonl")} == {r.prompt for r in code}


@pytest.mark.parametrize("bad", [["code"], ("code",), 3, {"code"}])
def test_written_takes_the_name_of_one_kind(bad: Any) -> None:
    with pytest.raises(LemError, match=r"kind= takes the name of one kind, not .*: there are: chat, code"):
        prompts.written(bad)


def test_some_of_the_written_prompts_are_of_every_kind() -> None:
    """The first five of the files would all be turns of one conversation."""
    everything = prompts.written()
    kind_of = {r.prompt: kind for kind in KINDS for r in prompts.written(kind)}
    some = prompts.written(count=16)
    assert [kind_of[r.prompt] for r in some] == 2 * sorted(KINDS)
    assert [r.turn for r in some if r.conversation] == [0, 1], "a conversation is begun where it begins"
    assert sorted(prompts.written(count=90), key=everything.index) == everything
    assert [kind_of[r.prompt] for r in prompts.written("code", count=3)] == ["code"] * 3
    drawn = prompts.written(count=40, seed=1)
    assert drawn == prompts.written(count=40, seed=1) != prompts.written(count=40, seed=2)
    assert len({kind_of[r.prompt] for r in prompts.written(count=12, seed=1)}) > 3
    assert traffic.turns(drawn).describe()["conversations"] > 10, "turns that were drawn stay in their order"
    assert drawn[0].options == {}
    with pytest.raises(LemError, match=r"hold 90 prompts, and 91 were asked for"):
        prompts.written(count=91)
    with pytest.raises(LemError, match="seed= takes a whole number"):
        prompts.written(count=3, seed="a")  # type: ignore[arg-type]


def test_written_conversations_go_on() -> None:
    made = prompts.written("chat")
    assert len({r.conversation for r in made}) == 6
    for before, after in itertools.pairwise(made):
        if after.turn:
            assert after.conversation == before.conversation and after.turn == (before.turn or 0) + 1
            assert (after.prompt or "").startswith(f"{before.prompt} "), "with the answer of the file"
            assert (after.prompt or "").count("\n\nUser: ") + 1 == after.turn + 1
    assert traffic.turns(made, concurrency=2).describe()["conversations"] == 6


def test_the_installed_package_finds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "odd.jsonl").write_text('{"id": "odd-1", "kind": "odd", "prompt": "As in a wheel."}\n')
    monkeypatch.setattr(texts, "__file__", str(tmp_path / "texts.py"))
    assert [r.prompt for r in prompts.written()] == ["As in a wheel."]


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharegpt(tmp_path, TALK)
