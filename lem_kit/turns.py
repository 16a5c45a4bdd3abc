"""Conversations sent turn by turn. `lem_kit.traffic` has the plan for users.

The one idea: a user answers what was said, so a turn goes out only after the one before it is done: a closed loop over
conversations. What a turn says is fixed before the run all the same (`prompts`), so every engine gets the same prompts.

Not covered: conversations that begin at times of their own (an open loop over conversations).
"""

from __future__ import annotations

import asyncio
import numbers
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .arrivals import MOST, Submit, _requests, _seed, _whole, all_of
from .errors import LemError, shown
from .measurement import Request


@dataclass(frozen=True)
class Turns:
    """`concurrency` conversations at any time; in each, a turn `think_s` seconds after the one before it was done, and when
    its last one is done, the next conversation.

    `requests` are those that will be run: those of one `conversation` belong together and stand in the order of their turns;
    one without is a conversation of its own. With a `seed`, the pauses are drawn before the run from an exponential
    distribution of mean `think_s`. A turn that failed is a miss, and the conversation goes on. `sched_ns` of a turn is the
    end of the one before it and its pause.
    """

    requests: Sequence[Request] = field(repr=False)
    concurrency: int = 1
    think_s: float = 0.0
    seed: int | None = None
    _lines: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _pauses_s: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _requests("turns()", self.requests)
        _whole("turns(concurrency=) takes", self.concurrency)
        think_s = self.think_s
        if isinstance(think_s, bool) or not isinstance(think_s, numbers.Real) or not 0 <= think_s <= MOST:
            raise LemError(f"turns(think_s=) takes seconds from 0 to {MOST:g}: got {shown(think_s)}.")
        lines: dict[str | int, list[int]] = {}
        for i, request in enumerate(self.requests):
            line = lines.setdefault(i if request.conversation is None else request.conversation, [])
            before = self.requests[line[-1]].turn if line else None
            if line and (before is None or request.turn is None or request.turn <= before):
                raise LemError(
                    f"Request {i} is turn {request.turn} of '{request.conversation}', after turn {before}: give turns() the "
                    "requests of a conversation in the order of their turns."
                )
            line.append(i)
        if self.seed is None:
            pauses_s = (float(think_s),) * len(self.requests)
        else:
            draw = random.Random(_seed(self.seed))
            pauses_s = tuple(draw.expovariate(1.0) * float(think_s) for _ in self.requests)
        object.__setattr__(self, "_lines", tuple(tuple(line) for line in lines.values()))
        object.__setattr__(self, "_pauses_s", pauses_s)

    @property
    def overlapping(self) -> bool:
        return self.concurrency > 1

    def describe(self) -> dict[str, Any]:
        """`turn` is that of each request, in the order of the completions."""
        return {
            "arrivals": "turns", "concurrency": self.concurrency, "think_s": float(self.think_s), "seed": self.seed,
            "conversations": len(self._lines), "turn": [request.turn or 0 for request in self.requests],
        }  # fmt: skip

    def schedule(self, count: int) -> None:
        if count != len(self.requests):
            raise LemError(f"turns() was made for {len(self.requests)} requests and is to send {count}: give it those.")

    async def drive(self, count: int, submit: Submit) -> None:
        waiting = iter(self._lines)

        async def one_after_the_other() -> None:
            for line in waiting:
                await submit([line[0]])
                for i in line[1:]:
                    wanted_ns = time.monotonic_ns() + round(self._pauses_s[i] * 1e9)
                    while (left_ns := wanted_ns - time.monotonic_ns()) > 0:
                        await asyncio.sleep(left_ns / 1e9)
                    await submit([i], wanted_ns)

        await all_of(one_after_the_other() for _ in range(min(self.concurrency, len(self._lines))))


turns = Turns
