"""The transformers backend against `model.generate` itself: same tokens, same counts, options that arrive."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lem_kit import models
from lem_kit.backends.transformers import Transformers, load
from lem_kit.errors import LemError
from lem_kit.measurement import Request, TokenEvent

PROMPTS = [tuple(range(300, 300 + n)) for n in (4, 11, 7, 2)]


@pytest.fixture(scope="module")
def backend() -> Iterator[Transformers]:
    loaded = load("tiny-llama")
    yield loaded
    loaded.close()


def events(backend: Transformers, requests: list[Request]) -> list[TokenEvent]:
    async def all_of_it() -> list[TokenEvent]:
        return [event async for event in backend.generate(requests)]

    return asyncio.run(all_of_it())


def per_request(found: list[TokenEvent], count: int) -> list[int]:
    return [sum(e.n_tokens for e in found if e.index == i) for i in range(count)]


def bare_model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama")).eval()


def bare(prompts: list[tuple[int, ...]], **options: Any) -> list[list[int]]:
    """What generate gives, padded on the left by hand, prompts cut off."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = bare_model().generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
    return [row[longest:] for row in out.tolist()]


@pytest.mark.parametrize("count", [1, 4])
def test_every_step_is_an_event_of_every_row(backend: Transformers, count: int) -> None:
    requests = [Request(prompt_token_ids=p, max_new_tokens=12, fixed_length=True) for p in PROMPTS[:count]]
    found = events(backend, requests)
    assert per_request(found, count) == [12] * count
    assert len(found) == 12 * count
    assert [e.prompt_tokens for e in found[:count]] == [len(p) for p in PROMPTS[:count]]
    # The rows of one step share an instant; steps follow one another.
    steps = [found[i : i + count] for i in range(0, len(found), count)]
    assert all(len({e.t_ns for e in step}) == 1 for step in steps)
    assert all(a[0].t_ns < b[0].t_ns for a, b in itertools.pairwise(steps))


def test_a_row_ends_at_its_end_of_sequence_not_at_the_padding(backend: Transformers) -> None:
    rows = bare(PROMPTS, max_new_tokens=10, min_new_tokens=10)
    stop = rows[1][3]  # a token that row 1 gives as its fourth at the latest; where others give it, they end too
    expected = [next((k + 1 for k, token in enumerate(row) if token == stop), 10) for row in rows]
    assert min(expected) < max(expected), "this test needs rows of different lengths"
    requests = [Request(prompt_token_ids=p, max_new_tokens=10, options={"eos_token_id": stop}) for p in PROMPTS]
    found = events(backend, requests)
    assert per_request(found, 4) == expected
    last = [[e for e in found if e.index == i][-1].finish_reason for i in range(4)]
    assert last == ["stop" if n < 10 or row[9] == stop else "length" for n, row in zip(expected, rows)]


@pytest.mark.parametrize("count", [1, 4])
def test_text_prompts_give_what_generate_gives(backend: Transformers, count: int) -> None:
    """The counts of `tokenizer(padding=True)` and `generate`, for the end-of-sequence token that parts the rows most."""
    texts = ["A joule", "The energy of one token is", "Watt", "How long does it take to answer?"][:count]
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve("tiny-llama"), padding_side="left")
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    width = inputs.input_ids.shape[1]
    known = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # release 4 gives token_type_ids, too
    free = bare_model().generate(**known, max_new_tokens=10, min_new_tokens=10, do_sample=False)[:, width:].tolist()
    stop = max({token for row in free for token in row[:6]}, key=lambda t: len({(*row, t).index(t) for row in free}))
    rows = bare_model().generate(**known, max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=0)
    expected = [next((k + 1 for k, t in enumerate(row) if t == stop), 10) for row in rows[:, width:].tolist()]
    assert min(expected) < 10 and (count == 1 or len(set(expected)) > 1)
    requests = [Request(prompt=text, max_new_tokens=10, options={"eos_token_id": stop}) for text in texts]
    found = events(backend, requests)
    assert per_request(found, count) == expected
    assert [e.prompt_tokens for e in found[:count]] == inputs.attention_mask.sum(1).tolist()
    fixed = [Request(prompt=text, max_new_tokens=10, fixed_length=True, options={"eos_token_id": stop}) for text in texts]
    assert per_request(events(backend, fixed), count) == [10] * count


def test_options_of_a_request_reach_generate(backend: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    generate = backend._model.generate
    monkeypatch.setattr(backend._model, "generate", lambda **options: (seen.update(options), generate(**options))[1])
    options = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    events(backend, [Request(prompt="one two", max_new_tokens=3, fixed_length=True, options=options)])
    assert options.items() <= seen.items() and seen["min_new_tokens"] == seen["max_new_tokens"] == 3
    seen.clear()
    events(backend, [Request(prompt="one two", max_new_tokens=3)])
    assert seen["do_sample"] is False and "min_new_tokens" not in seen


class Third(transformers.StoppingCriteria):  # type: ignore[misc]
    """A criterion of the user's: the third token is the last."""

    asked = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.asked += 1
        return torch.full((input_ids.shape[0],), self.asked == 3, device=input_ids.device)


@pytest.mark.parametrize("given", [list, tuple, transformers.StoppingCriteriaList])
def test_criteria_of_the_users_are_asked_beside_the_one_that_observes(backend: Transformers, given: Any) -> None:
    theirs = Third()
    found = events(backend, [Request(prompt="a", max_new_tokens=9, options={"stopping_criteria": given([theirs])})])
    assert theirs.asked == 3 and per_request(found, 1) == [3] and found[-1].finish_reason == "stop"
    kept = given([theirs])
    events(backend, [Request(prompt="a", max_new_tokens=2, fixed_length=True, options={"stopping_criteria": kept})])
    assert list(kept) == [theirs], "what the user gave is not changed"


def test_what_stops_within_a_text_or_a_time_counts_what_came(backend: Transformers) -> None:
    (text,) = bare([PROMPTS[0]], max_new_tokens=6, min_new_tokens=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve("tiny-llama"))
    word = tokenizer.decode(text[2:4])
    expected = next(n for n in range(1, 7) if word in tokenizer.decode(text[:n]))
    asked = Request(prompt_token_ids=PROMPTS[0], max_new_tokens=6, options={"stop_strings": [word]})
    found = events(backend, [asked])
    assert per_request(found, 1) == [expected] and found[-1].finish_reason == "stop"
    found = events(backend, [Request(prompt="a", max_new_tokens=2000, options={"max_time": 0.05, "eos_token_id": []})])
    assert 1 <= per_request(found, 1)[0] < 2000 and found[-1].finish_reason == "stop"


def test_a_prompt_that_the_engine_changes_is_not_counted_as_output(backend: Transformers) -> None:
    """token_healing writes the prompt's end anew, which may make it longer or shorter."""
    options = {"token_healing": True, "tokenizer": backend._tokenizer}
    asked = Request(prompt=" The energy of one tok  ", max_new_tokens=5, fixed_length=True, options=options)
    assert per_request(events(backend, [asked]), 1) == [5]


def test_an_unknown_engine_argument_names_the_nearest() -> None:
    with pytest.raises(LemError, match="'atn_implementation': did you mean 'attn_implementation'"):
        load("tiny-llama", atn_implementation="eager")


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([Request(prompt="a", options={"temprature": 1})], "did you mean 'temperature'"),
        ([Request(prompt="a", options={"max_new_tokens": 3})], "fields of Request"),
        ([Request(prompt="a", options={"num_beams": 2})], "num_beams must be 1"),
        ([Request(prompt="a", max_new_tokens=1), Request(prompt="b", max_new_tokens=2)], "share max_new_tokens"),
        ([Request(prompt_token_ids=(999_999,))], "outside the model's vocabulary of 4096"),
        ([Request(prompt_token_ids=(300,) * 90, max_new_tokens=4007)], "90 prompt tokens and 4007 new ones.*of 4096 tokens"),
    ],
)
def test_what_cannot_run_is_one_sentence(backend: Transformers, requests: list[Request], words: str) -> None:
    with pytest.raises(LemError, match=words):
        events(backend, requests)
    assert per_request(events(backend, [Request(prompt="a", max_new_tokens=2, fixed_length=True)]), 1) == [2]


def test_a_model_that_is_not_there_is_one_sentence_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a route, the Hub's client alone takes 23 s."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")  # nobody listens there, with or without a route
    started = time.monotonic()
    for name, words in ((str(tmp_path / "nowhere"), "no such folder"), ("tiny-lama", "did you mean 'tiny-llama'")):
        with pytest.raises(LemError, match=words) as caught:
            load(name)
        assert "\n" not in str(caught.value) and "cannot be loaded" in str(caught.value)
    assert time.monotonic() - started < 10


def test_a_closed_backend_says_so() -> None:
    backend = load("tiny-llama")
    backend.close()
    with pytest.raises(LemError, match="closed"):
        events(backend, [Request(prompt="a")])


def test_leaving_early_stops_within_a_token_and_the_next_call_is_whole(
    backend: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = backend._model.forward, 0

    @functools.wraps(forward)  # generate reads its signature
    def counted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(*args, **options)

    monkeypatch.setattr(backend._model, "forward", counted)

    async def leave() -> tuple[int, int]:
        stream = backend.generate([Request(prompt="a", max_new_tokens=2000, fixed_length=True)])
        await anext(stream)
        before = steps
        await stream.aclose()  # type: ignore[attr-defined]
        return before, steps

    before, after = asyncio.run(leave())
    assert after - before <= 2, "one may begin before the flag is set, and one while this thread waits for its turn"
    time.sleep(0.1)
    assert steps == after
    assert per_request(events(backend, [Request(prompt="a", max_new_tokens=5, fixed_length=True)]), 1) == [5]


def test_closing_while_it_generates_ends_the_call_with_a_sentence() -> None:
    backend = load("tiny-llama")

    async def closed_half_way() -> None:
        async for _ in backend.generate([Request(prompt="a", max_new_tokens=2000, fixed_length=True)]):
            await asyncio.to_thread(backend.close)

    with pytest.raises(LemError, match="closed while"):
        asyncio.run(closed_half_way())
    backend.close()
