"""What a test wants the stand-in to do. No part of the real library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Behaviour:
    """`tokens_per_step`: how many tokens the steps of a request give, the last for all later ones (speculation).
    `eos_after`: a request that does not ignore the end of sequence gives so many. `fail_after`: the engine answers a request
    that has given so many with the text `failure`. `die_after`: the worker ends at that step, and wakes who waits or not.
    `load_failure`: the worker's error while loading. `builds` counts the engines compiled, `aborted` holds ids of requests.
    """

    step_s: float = 0.001
    tokens_per_step: tuple[int, ...] = (1,)
    eos_after: int | None = None
    fail_after: int | None = None
    failure: str = "the kernel failed"
    die_after: int | None = None
    death: Literal["told", "silent"] = "told"
    load_failure: Exception | None = None
    clock_offset_s: float = 0.0
    cached_tokens: int = 0
    last_response_is_empty: bool = False
    builds: int = 0
    aborted: list[int] = field(default_factory=list)


BEHAVIOUR = Behaviour()
