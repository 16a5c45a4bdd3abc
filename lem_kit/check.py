"""What was found about one thing that a measurement needs, before it begins.

The one idea: a finding that is not well comes with what to type next. Not covered: who looks (`preflight`, and each source
of energy at its own hardware).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """`name` of what was looked at, and the `finding` in one sentence. "failure": what is wrong there leaves nothing to
    measure, or nowhere to keep it; "warning": figures will be missing or doubtful. Both have a `remedy`, a command or a
    setting to type; "ok" has none."""

    name: str
    state: Literal["ok", "warning", "failure"]
    finding: str
    remedy: str | None = None

    def __post_init__(self) -> None:
        if (self.state == "ok") != (self.remedy is None):
            raise ValueError(f"{self.name}: a check has a remedy exactly where it is not ok")
