"""What the sampler costs in a long window, where it reads seldom: the case that the runs of a study are.

The one idea: one window, in which requests follow one another; first the sampler reads as it always does, then it is held
and let go in turn, in an order drawn anew for each pair of stretches. Two figures come from that. How much longer the steps
are that meet a visit of the sampler than the steps beside them, times visits a second as it always reads: the finer one, for
a host's drift is in both. And tokens/s with the sampler over without, in neighbouring stretches: the coarser one, which
holds whatever a visit costs later. A sampler that is let go reads at once what was due, so stretches hold more visits than
the same time in an ordinary window, and their ratio is on the safe side.

Not covered: the look for the counter's period and until it is trusted (some 6 s, once a session), and the readings around
each edge of a window, which `stopwatch` has.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lem_kit as lem

from . import figures
from .check import Check
from .inference import load
from .stopwatch import COMPILED, EAGER, Way

STRETCH_S = 1.0
UNDISTURBED = 0.3  # share of the time in which the sampler is left alone
EDGE_S = 8.0  # after a window's beginning the sampler reads as it does around edges, and until it trusts what it found
TOGETHER_NS = 5_000_000  # calls no further apart are one visit
BESIDE = 4  # steps on each side that a visit's are held against

Stretch = tuple[int, int, bool]  # began, ended, whether the sampler was let go


def measure(check: Check) -> None:
    check.engine()
    model = check.models[0]
    if not check.allow(f"{model}: loading and one stretch", check.seconds(15, 8)):
        return
    backend = load(check, model)
    try:
        turns = list(itertools.product((1, 8)[: 1 if check.quick else 2], (EAGER, COMPILED)))
        for number, (batch, way) in enumerate(turns):
            compiling_s = check.seconds(25 if way is COMPILED else 2, 1)
            if check.allow(f"{model}, batch {batch}{way[0]}: the sampler", compiling_s + check.seconds(12, 5)):
                seconds = (check.left_s() - 10) / (len(turns) - number) - compiling_s
                one(check, backend, model, batch, way, max(seconds if check.alone else 0.0, check.seconds(12, 5)))
    finally:
        backend.close()


class Gate:
    """Before a session's sampler: notes each of its calls, and while it is shut lets none through."""

    def __init__(self, sampler: Any) -> None:
        self.calls: list[tuple[int, int]] = []
        self.counter_calls: list[int] = []
        self._open = threading.Event()
        self._open.set()
        self._do, self._sample = sampler._do, sampler.sample
        sampler._do, sampler.sample = self.do, self.sample

    def do(self, job: Any) -> None:
        began = time.monotonic_ns()
        self._do(job)
        self.calls.append((began, time.monotonic_ns()))
        if not job.side:
            self.counter_calls.append(began)

    def sample(self) -> int:
        self._open.wait()
        return self._sample()

    def let(self, through: bool) -> None:
        (self._open.set if through else self._open.clear)()


@contextlib.contextmanager
def in_turn(gate: Gate, after_s: float, draw: random.Random) -> Iterator[list[Stretch]]:
    """From `after_s` on, until the block ends, the gate is shut and open in turn; what was so far is in the list."""
    stretches: list[Stretch] = []
    ended = threading.Event()

    def turn() -> None:
        if ended.wait(after_s):
            return
        while not ended.is_set():
            for through in draw.sample((False, True), 2):
                gate.let(through)
                began = time.monotonic_ns()
                if ended.wait(STRETCH_S):
                    return
                stretches.append((began, time.monotonic_ns(), through))

    thread = threading.Thread(target=turn, name="gate", daemon=True)
    thread.start()
    try:
        yield stretches
    finally:
        ended.set()
        thread.join()
        gate.let(True)


def visits(calls: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Calls that follow one another at once, as one."""
    found: list[tuple[int, int]] = []
    for began, ended in calls:
        if found and began - found[-1][1] < TOGETHER_NS:
            found[-1] = (found[-1][0], ended)
        else:
            found.append((began, ended))
    return found


def step_s(tokens: Sequence[Sequence[int]], stretch: Stretch) -> float | None:
    """Mean of the steps that lie wholly in a stretch; None where none does."""
    inside = [b - a for times in tokens for a, b in itertools.pairwise(times) if stretch[0] <= a and b <= stretch[1]]
    return sum(inside) / len(inside) / 1e9 if inside else None


def on_over_off(tokens: Sequence[Sequence[int]], stretches: Sequence[Stretch]) -> figures.Interval | None:
    """Tokens/s with the sampler let go over held, in pairs of stretches."""
    off, on = [], []
    for pair in zip(stretches[::2], stretches[1::2]):
        took = {stretch[2]: step_s(tokens, stretch) for stretch in pair}
        if took[False] is not None and took[True] is not None:
            off.append(took[False])
            on.append(took[True])
    return figures.paired_ratio(off, on)


def one(check: Check, backend: Any, model: str, batch: int, way: Way, seconds: float) -> None:
    named, options, _ = way
    tokens = int(check.seconds(600, 60))
    requests = lem.prompts.synthetic(batch, check.input_tokens, tokens, **options)

    def send() -> Any:
        return lem.traffic.run_blocking(lem.traffic.send(backend, requests, lem.traffic.batches(batch)))

    for _ in range(2 if options else 1):
        send()
    seen: list[list[int]] = []
    with check.session() as session:
        gate = Gate(session._sampler)
        with session.window(f"{model} sampler batch {batch}{named}"):
            began = time.monotonic_ns()
            ends = time.monotonic() + seconds
            edge_s = check.seconds(EDGE_S, 3)
            alone_s = max(UNDISTURBED * seconds, edge_s + 1)
            with in_turn(gate, alone_s, random.Random(batch)) as stretches:
                while time.monotonic() < ends:
                    seen.append([t for t, _ in send()[0].events])
    made = visits(gate.calls)

    def per_s(instants: Iterable[int], stretches: Sequence[tuple[int, int]]) -> float | None:
        seconds = sum(b - a for a, b in stretches) / 1e9
        return sum(a <= t < b for t in instants for a, b in stretches) / seconds if made and seconds else None

    undisturbed = [(began + int(edge_s * 1e9), began + int(alone_s * 1e9))]
    visited = [t for t, _ in made]
    delay, ratio = figures.call_delay_s(seen, made, beside=BESIDE), on_over_off(seen, stretches)
    visits_per_s = per_s(visited, undisturbed)
    share = [100 * x * visits_per_s for x in delay[:3]] if delay and visits_per_s is not None else [None] * 3
    steps = [b - a for times in seen for a, b in itertools.pairwise(times)]
    row = {
        "model": f"{model}{named}", "batch": batch, "step ms": sum(steps) / len(steps) / 1e6 if steps else None,
        "visits per s": visits_per_s, "counter read per s": per_s(gate.counter_calls, undisturbed),
        "visit ms": sum(b - a for a, b in made) / len(made) / 1e6 if made else None,
        "visits looked at": delay.n if delay else None, "delay by a visit ms": 1000 * delay.value if delay else None,
        "sampler %": share[0], "low": share[1], "high": share[2],
        "tokens/s, let go / held": ratio.value if ratio else None, "ratio low": ratio.low if ratio else None,
        "ratio high": ratio.high if ratio else None, "pairs": ratio.n if ratio else 0,
        "visits per s, let go": per_s(visited, [(a, b) for a, b, through in stretches if through]),
    }  # fmt: skip
    check.table("sampler in a long window", [row])
    check.fact(f"visits, batch {batch}{named}", made)
    check.fact(f"stretches, batch {batch}{named}", stretches)
    check.fact(f"tokens, batch {batch}{named}", seen)
    said = "unknown" if share[0] is None else "{:.2f} [{:.2f}, {:.2f}] % of a step".format(*share)
    check.headline(f"{model}, batch {batch}{named}: sampler in a long window", f"{said}; tokens/s {ratio or 'unknown'}")
