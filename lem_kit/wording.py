"""Synthetic text: English words in no order that means anything, for engines and servers that take nothing but text.

The one idea: a text has so many tokens only for one tokenizer, and only when that says so. `synthetic_text` encodes what it
made again and goes on until the count is right; where it cannot be, it says so. Where a backend takes ids, `synthetic` is
exact for every tokenizer at once.

Words and how often they come are those of the text that lem_kit ships. They are drawn one by one, so that two prompts share
no beginning that a prefix cache could use. Not covered: chat templates, which add tokens of their own.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import models
from .errors import LemError, shown
from .lengths import Lengths, drawn
from .measurement import Request
from .synthetic import counted, seeded

ATTEMPTS = 8  # other words, before a length is given up
CANDIDATES = 48  # words that are tried for the last tokens of a text


def synthetic_words(
    count: int, words: int | Lengths, output_tokens: int | Lengths, seed: int = 0, **options: Any
) -> list[Request]:
    """`count` texts of exactly so many English words, and exactly `output_tokens` to generate. How many tokens they are,
    only the engine knows."""
    counted("synthetic_words() makes", count)
    lengths = zip(drawn(words, count, seed, "words"), drawn(output_tokens, count, seed, "output_tokens"))
    random_ = random.Random(seeded(seed))
    return [_request(" ".join(itertools.islice(_prose(random_), n)), new, options) for n, new in lengths]


def synthetic_text(
    count: int,
    input_tokens: int | Lengths,
    output_tokens: int | Lengths,
    tokenizer: Any,
    seed: int = 0,
    **options: Any,
) -> list[Request]:
    """`count` texts that are exactly `input_tokens` ids when `tokenizer` encodes them; exactly `output_tokens` to generate.

    `tokenizer`: one that is loaded, the name of a model, or a function from a text to its ids. What it adds to every text
    (BOS, as a rule) counts, for the engine pays for it. Every text was encoded again and has that number; LemError where no
    text of that length was found. For another tokenizer, or behind a chat template, the number is another.
    """
    counted("synthetic_text() makes", count)
    given = models.tokenizer(str(tokenizer)) if isinstance(tokenizer, (str, Path)) else tokenizer
    if not callable(given):
        raise LemError(
            f"tokenizer= takes a tokenizer, the name of a model or a function from a text to its ids: got {shown(given)}."
        )
    lengths = zip(drawn(input_tokens, count, seed, "input_tokens"), drawn(output_tokens, count, seed, "output_tokens"))
    random_ = random.Random(seeded(seed))
    return [_request(_of_tokens(n, random_, given), new, options) for n, new in lengths]


def _of_tokens(tokens: int, random_: random.Random, tokenizer: Any) -> str:
    def size(text: str) -> int:
        ids = tokenizer(text)
        ids = getattr(ids, "input_ids", ids)
        if not hasattr(ids, "__len__"):
            raise LemError(f"tokenizer= gave {shown(ids)} for a text, and not its ids: give a function that returns a list.")
        return len(ids)

    for _ in range(ATTEMPTS):
        text = _grown(_cut(tokens, random_, size), tokens, random_, size)
        if text and size(text) == tokens:
            return text
    raise LemError(
        f"No text of exactly {tokens} tokens was found for this tokenizer, which makes {size('')} of an empty one: ask for "
        "another length, or give ids, prompts.synthetic()."
    )


def _cut(tokens: int, random_: random.Random, size: Callable[[str], int]) -> str:
    """As many words as fit, if more words are never fewer tokens."""
    words = list(itertools.islice(_prose(random_), tokens))
    fitting = bisect.bisect_right(range(1, tokens + 1), tokens, key=lambda k: size(" ".join(words[:k])))
    return " ".join(words[:fitting])


def _grown(text: str, tokens: int, random_: random.Random, size: Callable[[str], int]) -> str:
    """The text with words added as long as any fits, and at last whatever is one token."""
    while (so_far := size(text)) < tokens:
        few = random_.choices(_words(), k=CANDIDATES)
        trials = (f"{text} {word}".strip() for word in (*few, "a", "I"))
        ends = (f"{text}{mark}" for mark in ".,!?;" if text)
        longer = next((trial for trial in itertools.chain(trials, ends) if so_far < size(trial) <= tokens), None)
        if longer is None:
            return text
        text = longer
    return text


def _prose(random_: random.Random) -> Iterator[str]:
    """Words without end, with a capital and a full stop around every few of them."""
    while True:
        sentence = random_.choices(_words(), k=random_.randint(6, 16))
        yield sentence[0].capitalize()
        yield from sentence[1:-1]
        yield f"{sentence[-1]}."


@functools.cache
def _words() -> list[str]:
    return [w for w in re.findall(r"[a-z]+(?:'[a-z]+)?", models.corpus().lower()) if len(w) > 1 or w == "a"]


def _request(prompt: str, new: int, options: dict[str, Any]) -> Request:
    return Request(prompt=prompt, max_new_tokens=new, fixed_length=True, options=options)
