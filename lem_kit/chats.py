"""Conversations of text: what was said by whom, and the prompt of each turn.

The one idea: a turn's prompt is all that was said before it, answers included as they stand in the file, never the engine's
own: so the prompts are known before the run and are the same for every engine.

Not covered: where the conversations come from (`texts`, `hub`), when their turns are sent (`turns`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import models
from .errors import LemError
from .measurement import Request

ROLES: Mapping[str, str] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
}  # fmt: skip


class Said(NamedTuple):
    """One message: "system", "user" or "assistant", and what it says."""

    role: str
    text: str


def said(messages: Any) -> list[Said]:
    """The messages of a list of {"role", "content"} or {"from", "value"}; those without a text are left out. ValueError for
    anything else."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError("expected a list of messages")
    found = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError("expected messages with a role and a text")
        role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            raise ValueError(f"expected messages of {', '.join(ROLES)}, and one is of {role!r}")
        if not isinstance(text, str):
            raise ValueError(f"expected messages of text, and one holds {type(text).__name__}")
        if text.strip():
            found.append(Said(ROLES[role], text))
    return found


def as_text(history: Sequence[Said]) -> str:
    """What was said, speaker by speaker, up to the place where the assistant is to answer. The prompt of a turn begins with
    that of the turn before."""
    parts = [message.text if message.role == "system" else f"{message.role.title()}: {message.text}" for message in history]
    return "\n\n".join([*parts, "Assistant:"])


@dataclass(frozen=True)
class Form:
    """How requests are made of conversations: of the first turn of the user, or, with `whole`, of every turn.

    `max_new_tokens` None asks for as many tokens as the answer in the conversation has, by `tokenizer` (one that is loaded,
    or the name of a model), and leaves out turns without an answer. A tokenizer that has a chat template also makes whole
    conversations into ids by it; else they are plain text (`as_text`).
    """

    whole: bool = False
    max_new_tokens: int | None = 64
    tokenizer: Any = None
    fixed_length: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, (str, Path)):
            object.__setattr__(self, "tokenizer", models.tokenizer(str(self.tokenizer)))
        if self.max_new_tokens is None and self.tokenizer is None:
            raise LemError(
                "max_new_tokens=None takes the length of the answer in the file, and needs tokenizer= to tell it."
            )

    def requests(self, messages: Sequence[Said], name: str) -> list[Request]:
        """None of a conversation in which the user says nothing, or gets no answer where one is needed."""
        return self._every_turn(messages, name) if self.whole else self._first_turn(messages)

    def _first_turn(self, messages: Sequence[Said]) -> list[Request]:
        for place, message in enumerate(messages):
            if message.role == "user":
                answers = (later.text for later in messages[place:] if later.role == "assistant")
                return self._request(message.text, next(answers, None))
        return []

    def _every_turn(self, messages: Sequence[Said], name: str) -> list[Request]:
        """What an assistant says before any user is left out; who says two things in a row is answered once."""
        began = next((place for place, message in enumerate(messages) if message.role == "user"), len(messages))
        spoken = [message for place, message in enumerate(messages) if place >= began or message.role == "system"]
        made: list[Request] = []
        for place, (message, after) in enumerate(zip(spoken, [*spoken[1:], Said("nobody", "")])):
            if message.role == "user" and after.role != "user":
                history, answer = spoken[: place + 1], after.text if after.role == "assistant" else None
                turns = self._request(as_text(history), answer, conversation=name, turn=len(made))
                made += [self._templated(turn, history) for turn in turns]
        return made

    def _request(self, prompt: str, answer: str | None, **identity: Any) -> list[Request]:
        new = self.max_new_tokens
        if new is None:
            if answer is None:
                return []
            new = max(1, len(self.tokenizer(answer).input_ids) - len(self.tokenizer("").input_ids))  # without BOS
        return [Request(prompt, None, new, self.fixed_length, self.options, **identity)]

    def _templated(self, turn: Request, history: Sequence[Said]) -> Request:
        """The same turn as ids: as a text, the engine's tokenizer would put a second BOS before the template's own."""
        if not getattr(self.tokenizer, "chat_template", None):
            return turn
        spoken = [{"role": message.role, "content": message.text} for message in history]
        try:
            ids = self.tokenizer.apply_chat_template(spoken, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # a template raises what it likes: some refuse a system message
            raise LemError(
                f"The tokenizer's chat template refuses a conversation ({error}): leave tokenizer= out to have it as plain "
                "text."
            ) from error
        return dataclasses.replace(turn, prompt=None, prompt_token_ids=tuple(ids))
