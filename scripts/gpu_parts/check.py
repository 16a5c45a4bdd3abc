"""What the parts share: options, time, results, baselines, and where runs are kept.

Not covered: writing the results (`tables`).
"""

from __future__ import annotations

import argparse
import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lem_kit as lem
from lem_kit.measurement import jsonable

FULL_S = 505.0
MODELS = ("random-llama-160m", "random-llama-1b")


def until_settled(session: lem.Session) -> None:
    """Wait, for three seconds at most, until the sampler has found the periods of its counters: before, it calls often and
    windows are known less well."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        counters = [key for key in session.trace.counters if key.startswith("nvml:")]
        if session.unavailable or (counters and all(key in session.trace.period_s for key in counters)):
            return
        time.sleep(0.03)


class Skip(Exception):
    """A part that cannot run here; the sentence says why."""


class Check:
    """`results` is strict JSON: headlines, and for each part its status, tables, facts, notes and what was left out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.quick: bool = options.quick
        self.repeats: int = options.repeat or (1 if options.quick else 2)
        self.models: list[str] = options.model or list(MODELS[: 1 if options.quick else 2])
        self.anywhere: bool = options.anywhere
        self.alone = len(options.part or ()) == 1  # a part that nothing comes after may take all the time there is
        self.input_tokens, self.output_tokens = (16, 8) if options.anywhere else (256, 64)
        self.began = time.monotonic()
        self._whole_s = options.seconds or (90 if options.quick else FULL_S)
        self.deadline = self.began + self._whole_s
        self._kept_for_later_s = 0.0
        self.baselines: dict[str, Any] = {}  # kind -> as `Session.baselines` has it
        self.models_ready: Callable[[], None] = lambda: None
        self.results: dict[str, Any] = {"quick": self.quick, "repeats": self.repeats, "parts": {}, "headlines": []}
        self._part: dict[str, Any] = {}
        self.sessions: list[lem.Session] = []
        self.out.mkdir(parents=True, exist_ok=True)
        self._log = (self.out / "log.txt").open("a", encoding="utf-8")

    # --- time -----------------------------------------------------------------------------------------------------------

    def seconds(self, full: float, quick: float) -> float:
        """How long something is to take."""
        return quick if self.quick else full

    def left_s(self) -> float:
        return self.deadline - time.monotonic() - self._kept_for_later_s

    def keep_for_later(self, seconds: float) -> None:
        """What the parts to come need at the least, in a run of full length; less is kept in a shorter one."""
        self._kept_for_later_s = seconds * min(1.0, self._whole_s / FULL_S)

    def allow(self, what: str, seconds: float, keep_s: float = 0.0) -> bool:
        """Whether there is time for it, and for `keep_s` more; if not, it is named among what was left out."""
        left_s = max(self.left_s() - keep_s, 0)
        if left_s >= seconds:
            return True
        self.left_out(what, f"needs about {seconds:.0f} s, and {left_s:.0f} s are left")
        return False

    # --- results --------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:6.1f} s] {text}"
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._part["tables"].setdefault(name, []).extend(rows)

    def fact(self, name: str, value: Any) -> None:
        self._part["facts"][name] = jsonable(value)

    def note(self, text: str) -> None:
        self.say(text)
        self._part["notes"].append(text)

    def left_out(self, what: str, why: str) -> None:
        why = " ".join(why.split())
        why = why if len(why) < 240 else f"{why[:240]} ..."
        self.say(f"left out: {what}: {why}")
        self._part["left_out"].append({"what": what, "why": why})

    def headline(self, name: str, value: str) -> None:
        """A line of the short table at the end."""
        self.results["headlines"].append({"what": name, "value": value})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Keep what happens inside under this name; an exception is written down and goes no further."""
        self.say(f"--- {name}")
        began = time.monotonic()
        self._part = {"status": "running", "tables": {}, "facts": {}, "notes": [], "left_out": []}
        self.results["parts"][name] = self._part
        try:
            yield
            self._part["status"] = "done"
        except Skip as reason:
            self._part.update(status="skipped", why=str(reason))
            self.say(f"skipped: {reason}")
        except Exception as error:
            self._part.update(status="failed", why=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            self.say(f"FAILED: {self._part['traceback']}")
        finally:
            self._part["seconds"] = round(time.monotonic() - began, 1)

    # --- measuring ------------------------------------------------------------------------------------------------------

    def session(self) -> lem.Session:
        """A session of the GPU's own sources whose runs are kept, with the baselines of those before it. Close it."""
        opened = lem.Session(self.out / "runs", sources=["nvml"])
        self.sessions.append(opened)
        opened.baselines.update(self.baselines)
        until_settled(opened)
        return opened

    def cuda(self) -> Any:
        """torch, with CUDA running; Skip where there is none."""
        try:
            import torch
        except ModuleNotFoundError:
            raise Skip("torch is not installed") from None
        if not torch.cuda.is_available():
            raise Skip("torch.cuda is not available on this machine")
        return torch

    def engine(self) -> Any:
        """torch for the parts that run a model: on CUDA, or without it where that was asked for."""
        if not self.anywhere:
            torch = self.cuda()
        else:
            import torch
        self.models_ready()
        return torch
