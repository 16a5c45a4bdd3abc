"""The errors a user can meet. One base class, so that `except LemError` catches what lem_kit says and nothing else.

A message says what happened, to which thing, and what to type next. Subclasses exist only where a caller handles them
differently. Not covered: errors raised by the engine or by the user's own cell, which pass through as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LemError(Exception):
    """Something lem_kit was asked for cannot be done; the message says what to do instead."""


class Unavailable(LemError):
    """An energy source or a backend cannot be opened here; the message is the reason and its remedy, kept apart where both
    are given."""

    def __init__(self, finding: str, remedy: str | None = None) -> None:
        super().__init__(finding if remedy is None else f"{finding}: {remedy}")
        self.finding = finding
        self.remedy = remedy


class IncompleteRun(LemError):
    """A run folder holds no `run.json`: the run was cut off, and nothing in the folder is a result."""


def shown(value: object) -> str:
    """A value as a message tells it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # a class of the user's own, or a number of more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name, or the names there are.

    >>> nearest("batchsize", ["batch_size", "seed"])
    "did you mean 'batch_size'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"there are: {', '.join(names) or 'none'}."
