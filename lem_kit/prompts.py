"""Where requests come from.

The one idea: a workload is a plain list of `Request`, made before anything runs, and `digest` names it, so that two runs
can be shown to have had the same input. docs/workloads.md lists every source in one table.

    synthetic, shared_prefix, conversations, of_trace     token ids, of exact lengths (`lem_kit.synthetic`)
    synthetic_text, synthetic_words                       made-up text (`wording`)
    texts, jsonl, sharegpt, written                       text of people (`texts`)
    dataset                                               of data sets (`hub`)

Not covered: when they are sent (`traffic`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import LemError, shown
from .hub import dataset  # noqa: F401 (users find all of these here)
from .measurement import Request
from .synthetic import SYNTHETIC_IDS, conversations, of_trace, shared_prefix, synthetic  # noqa: F401
from .texts import jsonl, sharegpt, texts, written  # noqa: F401
from .wording import synthetic_text, synthetic_words  # noqa: F401


def asking(requests: Iterable[Request], options: Mapping[str, Any]) -> list[Request]:
    """The same requests with further options of the engine's sampling call, whatever their names: an option may be called
    as a parameter of the functions here is, `seed` for one."""
    if not isinstance(options, Mapping) or not isinstance(requests, Iterable):
        raise LemError(f"asking() takes requests and a mapping of options: got {shown(requests)} and {shown(options)}.")
    return [dataclasses.replace(r, options={**r.options, **options}) for r in requests]


def disguised(requests: Sequence[Request], seed: int = 0) -> list[Request]:
    """The same shapes with other contents: each prompt's ids (or words) in another order. For warm-up, where the engine
    must meet the same sizes but must not have the answers cached."""
    draw = random.Random(seed)
    changed = []
    for request in requests:
        if request.prompt_token_ids is not None:
            ids = request.prompt_token_ids
            changed.append(dataclasses.replace(request, prompt_token_ids=tuple(draw.sample(ids, len(ids)))))
        else:
            words = (request.prompt or "").split()
            changed.append(dataclasses.replace(request, prompt=" ".join(draw.sample(words, len(words))) or request.prompt))
    return changed


def digest(requests: Iterable[Request]) -> str:
    """SHA-256 over prompts, lengths and options, in order: equal digests mean equal input."""
    rows = [[r.prompt, r.prompt_token_ids, r.max_new_tokens, r.fixed_length, sorted(r.options.items())] for r in requests]
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def ids_digest(requests: Iterable[Request], token_ids: Callable[[Request], Sequence[int]] | None = None) -> str | None:
    """SHA-256 over the token ids of the prompts, in order: two engines that make other ids of one text differ in it.

    `token_ids` is how the engine encodes a request (`Backend.token_ids`). None where a text needs it and it is not given.
    """
    digest = hashlib.sha256()
    for request in requests:
        ids = request.prompt_token_ids
        if ids is None:
            if token_ids is None:
                return None
            ids = tuple(map(int, token_ids(request)))
        digest.update(f"{','.join(map(str, ids))}\n".encode())
    return digest.hexdigest()
