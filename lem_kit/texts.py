"""Prompts that somebody wrote: texts at hand, files, and those that come with lem_kit. `lem_kit.prompts` has them for users.

The one idea: a text goes to the engine as it stands, and the engine's own tokenizer decides what it costs; so the number of
tokens is known from the record, not from here.

Not covered: data sets (`hub`), chats with images or tools.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .chats import Form, Said, as_text, said
from .errors import LemError, nearest, shown
from .measurement import Request
from .synthetic import counted, seeded

Item = TypeVar("Item")


def texts(prompts: Iterable[str], max_new_tokens: int = 64, fixed_length: bool = False, **options: Any) -> list[Request]:
    """One request per text."""
    if isinstance(prompts, str):
        raise LemError("texts() takes a list of texts, and this is one text: write [text].")
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise LemError(f"texts() takes a list of texts: got {shown(prompts)}.")
    return [Request(prompt=p, max_new_tokens=max_new_tokens, fixed_length=fixed_length, options=options) for p in prompts]


def jsonl(
    path: str | Path,
    max_new_tokens: int = 64,
    field: str = "prompt",
    count: int | None = None,
    seed: int | None = None,
    fixed_length: bool = False,
    **options: Any,
) -> list[Request]:
    """One request per line of a JSON Lines file whose objects hold the text under `field`. Blank lines are passed over.

    `count` of them: the first, or, with a `seed`, drawn without replacement. LemError where there are fewer, and, with the
    number of the line, for a line that holds no text.
    """
    made: list[Request] = []
    for number, fields in _lines(path):
        try:
            made += texts([fields[field]], max_new_tokens, fixed_length, **options)
        except (KeyError, TypeError) as error:
            raise LemError(f'{path}, line {number}: expected a JSON object with the text under "{field}".') from error
        except LemError as error:
            raise LemError(f"{path}, line {number}: {error}") from error
    return chosen(made, count, seed, f"{path} holds {{}} prompts")


def sharegpt(
    path: str | Path,
    count: int | None = None,
    max_new_tokens: int | None = 64,
    whole: bool = False,
    tokenizer: Any = None,
    seed: int | None = None,
    fixed_length: bool = False,
    **options: Any,
) -> list[Request]:
    """Conversations of a ShareGPT file: a JSON list of {"conversations": [{"from": "human", "value": ...}, ...]}, or one
    such object to a line.

    One request of what the user says first, or, with `whole`, one for each turn with all that was said before; send those
    with `traffic.turns`. `max_new_tokens=None` asks for as many as the file's answer has; this and `tokenizer`: see
    `chats.Form`. `count` and `seed` choose conversations, as in `jsonl`. Those in which no user says anything are left out,
    with a warning. LemError for what is not of this form, with its place in the file.
    """
    form = Form(whole, max_new_tokens, tokenizer, fixed_length, options)
    spoken: list[tuple[str, list[Said]]] = []
    for number, (where, entry) in enumerate(_entries(path)):
        try:
            spoken.append((str(entry.get("id", f"conversation-{number}")), said(entry["conversations"])))
        except (AttributeError, KeyError, TypeError):
            raise LemError(f'{path}, {where}: expected an object with a list of "conversations".') from None
        except ValueError as error:
            raise LemError(f"{path}, {where}: {error}.") from error
    return of_conversations(spoken, form, str(path), count, seed)


def written(
    kind: str | None = None,
    max_new_tokens: int = 64,
    fixed_length: bool = False,
    count: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[Request]:
    """The prompts that come with lem_kit, of one kind or all: the files of data/prompts, one for each kind.

    `count` of them: the first of each kind, the second of each kind and so on, or, with a `seed`, drawn. Turns of a
    conversation stay in their order. A line holds "id", "kind" and "prompt". In a conversation it also has "conversation",
    "turn" and the "answer" with which the next turn goes on; its request carries all that was said before. LemError names
    the kinds there are.
    """
    kinds = {path.stem: path for path in sorted(_written_folder().glob("*.jsonl"))}
    if kind is not None and not isinstance(kind, str):
        raise LemError(f"kind= takes the name of one kind, not {shown(kind)}: there are: {', '.join(kinds)}.")
    if kind is not None and kind not in kinds:
        raise LemError(f"There are no prompts of the kind '{kind}': {nearest(kind, kinds)}")
    of_kind = [
        _of_file(path, max_new_tokens, fixed_length, options) for path in (kinds.values() if kind is None else [kinds[kind]])
    ]
    if count is None and seed is None:
        return [request for requests in of_kind for request in requests]
    by_turns = [request for row in itertools.zip_longest(*of_kind) for request in row if request is not None]
    some = chosen(by_turns, count, seed, "The files of lem_kit hold {} prompts")
    in_order = {r.conversation: iter(sorted(_turns(some, r.conversation), key=lambda r: r.turn or 0)) for r in some}
    return [r if r.conversation is None else next(in_order[r.conversation]) for r in some]


def _turns(requests: Iterable[Request], conversation: str | None) -> list[Request]:
    return [r for r in requests if r.conversation == conversation]


def _of_file(path: Path, max_new_tokens: int, fixed_length: bool, options: dict[str, Any]) -> list[Request]:
    made: list[Request] = []
    history: list[Said] = []
    for _, line in _lines(path):
        if "conversation" not in line:
            made += texts([line["prompt"]], max_new_tokens, fixed_length, **options)
            continue
        history = [*(history if line["turn"] else ()), Said("user", line["prompt"])]
        identity = {"conversation": line["conversation"], "turn": line["turn"]}
        made.append(Request(as_text(history), None, max_new_tokens, fixed_length, options, **identity))
        history.append(Said("assistant", line.get("answer", "")))
    return made


def chosen(items: Sequence[Item], count: int | None, seed: int | None, holds: str) -> list[Item]:
    """`count` of the items: the first, or drawn with `seed`; all unless it is given. `holds` begins the sentence of the
    error for too few, with {} for how many there are."""
    if not items:
        raise LemError(f"{holds.format('no')}: check that it is the one you mean.")
    if count is not None:
        counted("count= takes", count)
        if count > len(items):
            raise LemError(f"{holds.format(len(items))}, and {count} were asked for: ask for {len(items)} or fewer.")
    if seed is not None:
        return random.Random(seeded(seed)).sample(list(items), len(items) if count is None else count)
    return list(items[:count])


def of_conversations(
    spoken: Sequence[tuple[str, list[Said]]], form: Form, where: str, count: int | None, seed: int | None
) -> list[Request]:
    """Requests of `count` of these conversations, each with its name. A name that comes again is told apart by a number."""
    asking = [(name, messages) for name, messages in spoken if any(message.role == "user" for message in messages)]
    if len(asking) < len(spoken):
        left = f"{len(spoken) - len(asking)} of {len(spoken)} conversations hold no turn of a user"
        warnings.warn(f"{where}: {left} and were left out.", stacklevel=3)
    known: set[str] = set()
    made: list[Request] = []
    for place, (name, messages) in enumerate(chosen(asking, count, seed, f"{where} holds {{}} conversations")):
        made += form.requests(messages, f"{name} #{place}" if name in known else name)
        known.add(name)
    if not made:
        raise LemError(f"{where} holds no answer to take a length from: say how many tokens, max_new_tokens=64.")
    return made


def _written_folder() -> Path:
    """In the package, or beside it in a clone."""
    package = Path(__file__).parent
    return next((f for f in (package / "written", package.parent / "data" / "prompts") if f.is_dir()), package / "written")


def _text_of(path: str | Path) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise LemError(f"The path of a prompts file is a text: got {shown(path)}.")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LemError(f"Cannot read the prompts file {path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise LemError(f"Cannot read the prompts file {path}: it is not UTF-8 text. Convert it.") from error


def _lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """What each line of a JSON Lines file holds, and its number. Blank lines are passed over."""
    for number, line in enumerate(_text_of(path).split("\n"), 1):  # splitlines() would cut at U+2028 inside a text
        if line.strip():
            try:
                fields = json.loads(line)
            except ValueError as error:
                said_so = getattr(error, "msg", str(error))
                raise LemError(f"{path}, line {number}: this is no JSON ({said_so}): repair or remove the line.") from error
            yield number, fields


def _entries(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON list, or of a JSON Lines file, and where each is."""
    text = _text_of(path)
    if not text.lstrip().startswith("["):
        yield from ((f"line {number}", entry) for number, entry in _lines(path))
        return
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise LemError(f"{path}, line {error.lineno}: this is no JSON ({error.msg}): repair the file.") from error
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries))
