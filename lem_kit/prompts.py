"""Where requests come from.

The one idea: a workload is a plain list of `Request`, made before anything runs, and `digest` names it, so that two runs
can be shown to have had the same input. Not covered: when they are sent (`traffic`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import LemError
from .measurement import Request

# Ids from here on are ordinary tokens in every vocabulary we know; below lie control tokens. The upper end is the
# smallest vocabulary that lem_kit itself builds.
SYNTHETIC_IDS = range(256, 4096)


def synthetic(
    count: int, input_tokens: int, output_tokens: int, seed: int = 0, ids: range = SYNTHETIC_IDS, **options: Any
) -> list[Request]:
    """`count` requests of exactly `input_tokens` random token ids and exactly `output_tokens` to generate.

    The text means nothing; its cost is that of any text of this length. `options` go to the engine's sampling call.
    """
    if count < 1 or input_tokens < 1:
        raise LemError(f"synthetic() makes at least one request of at least one token: got {count} of {input_tokens}.")
    draw = random.Random(seed)
    return [
        Request(
            prompt_token_ids=tuple(draw.choices(ids, k=input_tokens)),
            max_new_tokens=output_tokens,
            fixed_length=True,
            options=options,
        )
        for _ in range(count)
    ]


def asking(requests: Iterable[Request], options: Mapping[str, Any]) -> list[Request]:
    """The same requests with further options of the engine's sampling call, whatever their names: an option may be called
    as a parameter of the functions here is, `seed` for one."""
    return [dataclasses.replace(r, options={**r.options, **options}) for r in requests]


def texts(prompts: Iterable[str], max_new_tokens: int = 64, fixed_length: bool = False, **options: Any) -> list[Request]:
    """One request per text."""
    if isinstance(prompts, str):
        raise LemError("texts() takes a list of texts, and this is one text: write [text].")
    return [Request(prompt=p, max_new_tokens=max_new_tokens, fixed_length=fixed_length, options=options) for p in prompts]


def jsonl(path: str | Path, max_new_tokens: int = 64, field: str = "prompt", **options: Any) -> list[Request]:
    """One request per line of a JSON Lines file whose objects hold the text under `field`. Blank lines are passed over."""
    made: list[Request] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 inside a text
    except OSError as error:
        raise LemError(f"Cannot read the prompts file {path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise LemError(f"Cannot read the prompts file {path}: it is not UTF-8 text. Convert it.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            made += texts([json.loads(line)[field]], max_new_tokens, **options)
        except (ValueError, KeyError, TypeError) as error:
            raise LemError(f'{path}, line {number}: expected a JSON object with the text under "{field}".') from error
        except LemError as error:
            raise LemError(f"{path}, line {number}: {error}") from error
    return made


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
