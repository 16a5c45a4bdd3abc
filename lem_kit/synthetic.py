"""Requests that are made up: random token ids, of exact lengths, alone, behind shared prefixes, in conversations, or as a
trace has them. `lem_kit.prompts` has them for users.

The one idea: the cost of a prompt depends on its length and on what an engine has seen before, and hardly on its meaning; so
both are exact here, and drawn from a seed. Ids go to the engine as they are: no tokenizer, no template, no doubled BOS.

Not covered: synthetic text (`wording`), for engines that take nothing else.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import traces
from .errors import LemError, shown
from .lengths import Lengths, drawn, whole
from .measurement import Request

# Ids from here on are ordinary tokens in every vocabulary we know; below lie control tokens. The upper end is the
# smallest vocabulary that lem_kit itself builds.
SYNTHETIC_IDS = range(256, 4096)


def synthetic(
    count: int,
    input_tokens: int | Lengths,
    output_tokens: int | Lengths,
    seed: int = 0,
    ids: range = SYNTHETIC_IDS,
    **options: Any,
) -> list[Request]:
    """`count` requests of exactly `input_tokens` random token ids and exactly `output_tokens` to generate: the same for all,
    or one from a distribution for each (`lengths`).

    The text means nothing; its cost is that of any text of this length. `options` go to the engine's sampling call.
    """
    counted("synthetic() makes", count)
    inputs = drawn(input_tokens, count, seed, "input_tokens")
    outputs = drawn(output_tokens, count, seed, "output_tokens")
    source = Ids(seed, ids)
    return [request(source.next(n), new, options) for n, new in zip(inputs, outputs)]


def shared_prefix(
    groups: int,
    per_group: int,
    prefix_tokens: int | Lengths,
    suffix_tokens: int | Lengths,
    output_tokens: int | Lengths,
    seed: int = 0,
    shuffle: bool = True,
    ids: range = SYNTHETIC_IDS,
    **options: Any,
) -> list[Request]:
    """`groups` × `per_group` requests; those of a group begin with the same `prefix_tokens` ids, and each ends in
    `suffix_tokens` of its own. What a prefix cache can save is then known: all prefixes but one of each group.

    They come in an order drawn from the seed, or, without `shuffle`, one group after the other.
    """
    for who, value in (("groups=", groups), ("per_group=", per_group)):
        counted(f"shared_prefix({who}) makes", value)
    count = groups * per_group
    prefixes = drawn(prefix_tokens, groups, seed, "prefix_tokens")
    suffixes = drawn(suffix_tokens, count, seed, "suffix_tokens")
    outputs = drawn(output_tokens, count, seed, "output_tokens")
    source = Ids(seed, ids)
    made: list[Request] = []
    for group, prefix_length in enumerate(prefixes):
        prefix = source.next(prefix_length)
        own = slice(group * per_group, (group + 1) * per_group)
        made += [request(prefix + source.next(n), new, options) for n, new in zip(suffixes[own], outputs[own])]
    if shuffle:
        random.Random(f"{seed} order").shuffle(made)
    return made


def conversations(
    count: int,
    turns: int | Lengths,
    input_tokens: int | Lengths,
    output_tokens: int | Lengths,
    seed: int = 0,
    system_tokens: int = 0,
    ids: range = SYNTHETIC_IDS,
    **options: Any,
) -> list[Request]:
    """`count` conversations of `turns` requests each, one conversation after the other; send them with `traffic.turns`.

    In each turn the user says `input_tokens` new ids, and `output_tokens` come out. A turn's prompt is all that went before:

        ids of the turn before, + as many ids as that turn generated, + the new ones

    The answers in it are made up, not the engine's: so prompts are known before the run and equal for all engines. An engine
    with a prefix cache finds the prompt of the turn before in it, and not what it generated itself. All conversations begin
    with the same `system_tokens` ids.
    """
    counted("conversations() makes", count)
    if system_tokens != 0:
        whole("system_tokens=", system_tokens)
    lasting = drawn(turns, count, seed, "turns")
    inputs = iter(drawn(input_tokens, sum(lasting), seed, "input_tokens"))
    outputs = iter(drawn(output_tokens, sum(lasting), seed, "output_tokens"))
    source = Ids(seed, ids)
    system = source.next(system_tokens)
    made: list[Request] = []
    for number, last in enumerate(lasting):
        history = system
        for turn in range(last):
            history, new = history + source.next(next(inputs)), next(outputs)
            made.append(request(history, new, options, conversation=f"conversation-{number}", turn=turn))
            history = history + source.next(new)
    return made


def of_trace(
    path: str | Path,
    count: int | None = None,
    format: str | None = None,
    seed: int = 0,
    at_least: int | None = None,
    block_tokens: int | None = None,
    ids: range = SYNTHETIC_IDS,
    **options: Any,
) -> list[Request]:
    """A request for each of the first `count` rows of a trace (all, unless given), of exactly its lengths and in its order:
    `traffic.trace` of the same file sends each at its time.

    Where the rows name the blocks of their prompts (`traces`), blocks of equal names are equal tokens, so that a prefix
    cache finds what it found in the service; with one seed also among several files. A last block that the prompt does not
    fill is the beginning of that block. What no block covers is the request's own. `block_tokens`: how long a block is, if
    not as the format says. LemError, with the number of the line, where a row is not of that many blocks, and for lengths
    of 0 (see `traces.whole_rows`, also for `at_least`).
    """
    form = traces.format_of(path, format)
    if block_tokens is not None:
        drawn(block_tokens, 1, seed, "block_tokens")
    size = block_tokens or form.block_tokens
    source = Ids(seed, ids)
    known: dict[int | str, tuple[int, ...]] = {}
    made: list[Request] = []
    for row in traces.whole_rows(path, count, format, at_least):
        length, new = row.input_tokens or 0, row.output_tokens or 0
        if row.blocks and len(row.blocks) not in (length // size, math.ceil(length / size)):
            raise LemError(
                f"{path}, line {row.line}: {len(row.blocks)} blocks of {size} tokens do not make a prompt of {length}: say "
                "block_tokens=, or repair the line."
            )
        for name in row.blocks:
            if name not in known:
                known[name] = source.of(f"block {name}", size)
        prompt = [token for name in row.blocks for token in known[name]][:length]
        made.append(request((*prompt, *source.of(f"line {row.line}", length - len(prompt))), new, options))
    return made


class Ids:
    """A stream of random ids. The ids themselves are shared: a million of them costs the memory of its references."""

    def __init__(self, seed: int, ids: range) -> None:
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
            raise LemError(f"ids= takes a range or a list of token ids: got {shown(ids)}.")
        if not len(ids):
            raise LemError(f"ids= holds no token id to draw from: {ids}.")
        self._pool = list(ids)
        self._seed = seeded(seed)
        self._random = random.Random(seed)

    def next(self, count: int) -> tuple[int, ...]:
        """The next `count` of the stream."""
        return tuple(self._random.choices(self._pool, k=count))

    def of(self, name: str, count: int) -> tuple[int, ...]:
        """`count` ids that are always the same for this name, wherever in the stream it is asked for."""
        return tuple(random.Random(f"{self._seed} {name}").choices(self._pool, k=count))


def request(prompt: tuple[int, ...], new: int, options: dict[str, Any], **identity: Any) -> Request:
    return Request(prompt_token_ids=prompt, max_new_tokens=new, fixed_length=True, options=options, **identity)


def seeded(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise LemError(f"seed= takes a whole number, so that the same prompts can be drawn again: got {shown(seed)}.")
    return seed


def counted(who: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise LemError(f"{who} a whole number of at least one: got {shown(count)}.")
