"""Synthetic text: English words, and exactly so many tokens when the tokenizer is asked again, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lem_kit import lengths, models, prompts
from lem_kit.errors import LemError

Encoder = Callable[[str], list[int]]


def trained(kind: str) -> Encoder:
    """A tokenizer of each family, trained here on our text, with few entries: words of many tokens are the hard case."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
    from tokenizers import models as families

    if kind == "byte pairs":
        encoder = Tokenizer(families.BPE())
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: Any = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "byte pairs across words":  # no borders: a token may span words, so tokens do not add up
        encoder = Tokenizer(families.BPE())
        trainer = trainers.BpeTrainer(vocab_size=700)
    elif kind == "word pieces":
        encoder = Tokenizer(families.WordPiece(unk_token="[UNK]"))
        encoder.normalizer = normalizers.Lowercase()
        encoder.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"])
    else:
        encoder = Tokenizer(families.Unigram())
        encoder.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>"], unk_token="<unk>")
    trainer.show_progress = False
    encoder.train_from_iterator(models.corpus()[:12_000].split("\n"), trainer)
    return lambda text: list(encoder.encode(text).ids)


@pytest.fixture(scope="module", params=["byte pairs", "byte pairs across words", "word pieces", "unigrams"])
def encode(request: pytest.FixtureRequest) -> Encoder:
    return trained(request.param)


def test_a_text_has_exactly_so_many_tokens_when_encoded_again(encode: Encoder) -> None:
    made = prompts.synthetic_text(40, lengths.uniform(1, 300), 5, tokenizer=encode, seed=2, top_k=1)
    wanted = lengths.uniform(1, 300).draw(40, 2, "input_tokens")
    assert [len(encode(r.prompt or "")) for r in made] == wanted
    assert all(r.max_new_tokens == 5 and r.fixed_length and r.options == {"top_k": 1} for r in made)
    assert made == prompts.synthetic_text(40, lengths.uniform(1, 300), 5, tokenizer=encode, seed=2, top_k=1)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(2, 900), seed=st.integers(0, 1000))
def test_what_the_tokenizer_adds_is_counted(tokens: int, seed: int) -> None:
    tokenizer = models.tokenizer("tiny-llama")
    (made,) = prompts.synthetic_text(1, tokens, 3, tokenizer, seed=seed)
    ids = tokenizer(made.prompt).input_ids
    assert len(ids) == tokens and ids[0] == tokenizer.bos_token_id


def test_a_model_may_be_named(tmp_path: Path) -> None:
    (made,) = prompts.synthetic_text(1, 33, 3, "tiny-llama")
    assert len(models.tokenizer("tiny-llama")(made.prompt).input_ids) == 33
    with pytest.raises(LemError, match=r"no tokenizer of '.*nowhere'"):
        prompts.synthetic_text(1, 33, 3, tmp_path / "nowhere")


def test_a_length_that_no_text_has_is_an_error_and_never_nearly_right() -> None:
    with pytest.raises(LemError, match=r"No text of exactly 7 tokens was found .* makes 0 of an empty one"):
        prompts.synthetic_text(1, 7, 3, tokenizer=lambda text: [0] * (2 * len(text.split())))
    (made,) = prompts.synthetic_text(1, 8, 3, tokenizer=lambda text: [0] * (2 * len(text.split())))
    assert len((made.prompt or "").split()) == 4
    with pytest.raises(LemError, match=r"No text of exactly 1 tokens .* makes 1 of an empty one"):
        prompts.synthetic_text(1, 1, 3, "tiny-llama")  # BOS alone is no prompt


@pytest.mark.parametrize("bad", [None, 3, ["tiny-llama"]])
def test_what_is_no_tokenizer_is_told(bad: Any) -> None:
    with pytest.raises(LemError, match=r"tokenizer= takes a tokenizer, the name of a model .*: got"):
        prompts.synthetic_text(1, 7, 3, tokenizer=bad)


@pytest.mark.parametrize("gives", [None, 7])
def test_a_function_that_gives_no_ids_is_told(gives: Any) -> None:
    with pytest.raises(LemError, match=r"tokenizer= gave (None|7) for a text, and not its ids"):
        prompts.synthetic_text(1, 7, 3, tokenizer=lambda text: gives)


def test_words_are_english_and_exactly_so_many() -> None:
    made = prompts.synthetic_words(30, lengths.uniform(1, 60), 5, seed=7)
    assert [len((r.prompt or "").split()) for r in made] == lengths.uniform(1, 60).draw(30, 7, "words")
    known = set(re.findall(r"[a-z]+(?:'[a-z]+)?", models.corpus().lower()))
    assert {word for r in made for word in re.findall(r"[a-z']+", (r.prompt or "").lower())} <= known
    assert (
        made == prompts.synthetic_words(30, lengths.uniform(1, 60), 5, seed=7) != prompts.synthetic_words(30, 20, 5, seed=7)
    )


def test_texts_share_no_beginning() -> None:
    """Sixteen tokens and more are what a prefix cache keeps together."""
    made = prompts.synthetic_words(400, 40, 5)
    assert len({" ".join((r.prompt or "").split()[:4]) for r in made}) == 400
