"""What is done around a measured cell: baseline, repeats, token counts, and what becomes of the record.

The one idea: this holds all that a cell that awaits and one that does not have in common; the two differ only in who waits
(`magics`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from IPython.display import display

from .. import baseline, metrics, store
from ..errors import LemError
from ..session import LONGEST_START_S, Session, Window
from .options import UNTIL, MeasureUsageError

# A baseline is measured again after this time: rooms and machines warm up.
FRESH_S = 1800.0


def waited_for(names: list[str]) -> None:
    """Say which sources are waited for."""
    who = f"{', '.join(names)}, which {'is' if len(names) == 1 else 'are'} still starting"
    print(f"lem_kit: waiting for {who}; {LONGEST_START_S:g} s at most.", file=sys.stderr)


class Measured:
    """One use of the magic: `window` opens it, `keep` does with the record what the options say."""

    def __init__(
        self, session: Session, shell: Any, options: argparse.Namespace, tokens: Any, names: dict[str, Any]
    ) -> None:
        self.session = session
        self.options = options
        self.most = options.repeat or (UNTIL.max_repeats if options.interval else 1)
        self.opened: Window | None = None
        self.problem: str | None = None  # with counting tokens
        self._shell = shell
        self._tokens = tokens
        self._names = (shell.user_global_ns, names)

    @property
    def baseline_s(self) -> float | None:
        """Seconds of idling to be measured before the cell; None where none is asked for, or a fresh one is there."""
        asked: float | None = self.options.baseline
        if asked is None or not self.session.sources:
            return None
        found = self.session.baselines.get(baseline.kind_now(None))
        if found is None or not found["power_w"] or self._starting_then(found):
            return asked
        now = datetime.datetime.now(datetime.timezone.utc)
        age_s = (now - datetime.datetime.fromisoformat(found["started_at"])).total_seconds()
        length_s = next((m.duration_s for m in self.session.measurements if m.run_id == found["run_id"]), 0.0)
        return None if age_s < FRESH_S and length_s > 0.9 * asked else asked

    def _starting_then(self, found: dict[str, Any]) -> bool:
        """Whether a source gives readings now that was still starting when this baseline was measured."""
        why = {key: found.get("unknown", {}).get(key, ["source_starting"]) for key in self.session.domains}
        return any("source_starting" in codes and key not in found["power_w"] for key, codes in why.items())

    @contextlib.contextmanager
    def window(self, wait: bool = True) -> Iterator[Iterator[AbstractContextManager[None]]]:
        """The measurement window; gives the turns in which the cell is to run."""
        asked = ("repeat", "warmup", "tokens", "baseline", "interval")
        config = {name: value for name in asked if (value := getattr(self.options, name)) is not None}
        config["repeat"] = self.most
        with self.session.window(self.options.label, config=config, wait=wait) as window:
            self.opened = window
            yield self._turns(window)
            if self.problem:
                window.reasons.append("tokens_unknown")

    def _turns(self, window: Window) -> Iterator[AbstractContextManager[None]]:
        narrow = None
        for number in range(1, self.most + 1):
            yield self._turn(window)
            if self.options.interval and (narrow := self._narrow(window, number == self.most)) is not None:
                break
        if self.options.interval and not narrow:
            window.reasons.append("interval_not_reached")

    @contextlib.contextmanager
    def _turn(self, window: Window) -> Iterator[None]:
        # What counts the tokens is no part of what is measured.
        with window.repeat() if self.most > 1 or self._tokens else contextlib.nullcontext(window) as span:
            yield
        if self._tokens and not self.problem:
            span.output_tokens, self.problem = self._count()
            window.output_tokens = span.output_tokens if self.most == 1 else None

    def _count(self) -> tuple[int | None, str | None]:
        """The number of output tokens, or what is wrong with the expression."""
        try:
            value = eval(self._tokens, *self._names)
            number = int(value)
        except Exception as error:
            return None, f"could not be evaluated: {type(error).__name__}: {error}"
        if number != value or number < 0 or isinstance(value, bool):
            return None, f"is not a number of tokens: {value!r}"
        return number, None

    def _narrow(self, window: Window, last: bool) -> bool | None:
        """Whether the interval is narrow enough, or, where it is not, will never be; None: more repeats may tell."""
        if not self.session.sources:
            return False
        known = window.so_far(wait=last)
        if len(known.repeats) < min(UNTIL.min_repeats, self.most):
            return None
        total = metrics.energy_j(known)
        if total is None:
            return False
        if total.half_width <= self.options.interval * total.value:
            return True
        gain = max(known.trace.domains[key].relative_error for key in total.keys)  # which no repetition makes smaller
        return False if gain > self.options.interval else None

    def keep(self) -> None:
        """Assign, show and save the record, as far as there is one and the options say so."""
        __tracebackhide__ = True
        window = self.opened
        if window is None or window.abandoned:
            return
        m = window.measurement
        if self.options.output:
            self._shell.user_ns[self.options.output] = m
        if not self.options.quiet:
            display(m)
        if self.options.save:
            try:
                store.save(m, self.options.save)
            except LemError as error:
                if m.status == "ok":
                    raise MeasureUsageError(f"--save: {error}") from None
                warnings.warn(str(error), stacklevel=4)  # the cell's own exception is the one to see

    def complain(self) -> None:
        """MeasureUsageError for tokens that could not be counted, once everything is kept."""
        __tracebackhide__ = True
        if self.problem:
            raise MeasureUsageError(f"--tokens {self.options.tokens!r} {self.problem}. The energy was measured and is kept.")
