"""Tab completion of lem_kit's magics: exactly their options, and folders behind `--save`.

The one idea: IPython since 8.6 asks matchers, which may keep others from answering; before, its hooks are asked, and Jedi's
guesses stand between the options. Both are given the same list (`options.completions`).
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from .options import completions

_MEASURE = re.compile(r"(?:%%measure_energy|.*?(?<!%)%measure_energy)\s")
_AUTO = re.compile(r"%lem_auto\s+(\w*)$")
_KEYS = ("%%measure_energy", "%measure_energy", "%lem_auto")


def matches(parser: ArgumentParser, before: str) -> list[str] | None:
    """What the last word of a line may become, `before` being the line up to the cursor; None where that is not ours."""
    if found := _AUTO.match(before):
        return [word for word in ("on", "off") if word.startswith(found[1])]
    found = _MEASURE.match(before)
    return completions(parser, before[found.end() :]) if found else None


def install(shell: Any, parser: ArgumentParser) -> Callable[[], None]:
    """Let `shell` complete our magics; the function returned undoes it."""
    try:
        from IPython.core.completer import SimpleCompletion, context_matcher
    except ImportError:
        return _hook(shell, parser)

    @context_matcher(identifier="lem_kit_options", priority=200)
    def lem_kit_options(context: Any) -> dict[str, Any]:
        before = context.line_with_cursor[: context.cursor_position]
        found = matches(parser, before)
        options = [SimpleCompletion(text=text, type="param") for text in found or []]
        return {"completions": options, "matched_fragment": before.split(" ")[-1], "suppress": bool(options)}

    matchers = shell.Completer.custom_matchers
    matchers.append(lem_kit_options)
    return lambda: matchers.remove(lem_kit_options)


def _hook(shell: Any, parser: ArgumentParser) -> Callable[[], None]:
    def complete(_: Any, event: Any) -> list[str]:
        return matches(parser, event.text_until_cursor) or []

    for key in _KEYS:
        shell.set_hook("complete_command", complete, str_key=key)

    def undo() -> None:
        for key in _KEYS:
            shell.strdispatchers["complete_command"].strs.pop(key, None)

    return undo
