"""What observing costs: lem_kit's stopwatch against bare `generate`, and the sampler against none.

The one idea: short runs of the same work in turn, in an order drawn anew each round, so that whatever drifts meets all of
them alike; figures are ratios of tokens/s within a round, with Student's interval of their mean logarithm. Sampler on and
off alternate in blocks of a few rounds; the sampler's first second, in which it looks for the counter's period and calls
more often, is waited for and not counted, and without it the GPU rests as long.

Steps of an eager model are as long as the host makes them, and where the host is not steady such ratios are known to ten
percent only. Compiled steps (a static cache, CUDA graphs) are several times shorter and come evenly: there the same cost is
a larger share, and seen. The parts are also taken one by one, as shares of a decoding step: what the host computes in the
criterion by which lem_kit sees the tokens (while the device is at work, so that the step need not be longer by it), what the
event loop computes meanwhile, and how much longer a step takes that meets a reading of the counter than the steps beside it.

Finest of all, the steps of one and the same run are observed in turn: a few of them as lem_kit does, a few by nothing, a few
as a streamer does, in an order drawn anew each time. Only what the event loop's thread takes is not in that.

The stamps themselves are held against the host's: of each step, how much later than its stamp it is on the host when a wait
for the device, right after the stamp's event was recorded, is over.

Every arm runs in the thread that lem_kit generates in, for compiled code belongs to a thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lem_kit as lem
from lem_kit import metrics

from . import figures
from .check import Check, until_settled
from .inference import load

ROUNDS_PER_BLOCK = 6
STEPS_IN_TURN = 6  # the first of them still meets what the ones before have left
REST_S = 1.0
# How the model decodes: options of `generate`, and the share of the output tokens that a short run has.
Way = tuple[str, dict[str, Any], int]
Arm = Callable[[], Any]
EAGER: Way = ("", {}, 4)
COMPILED: Way = (", compiled", {"cache_implementation": "static"}, 1)


def measure(check: Check) -> None:
    torch = check.engine()
    model = check.models[0]
    if not check.allow(f"{model}: loading and a round", check.seconds(15, 8)):
        return
    backend = load(check, model)
    try:
        if check.allow(f"{model}: the stamps", check.seconds(15, 4)):
            stamps(check, torch, backend, model)
        for batch, way in itertools.product((1, 8)[: 1 if check.quick else 2], (EAGER, COMPILED)):
            if check.allow(f"{model}, batch {batch}{way[0]}: the parts of the cost", check.seconds(10, 4)):
                parts_of_it(check, torch, backend, model, batch, way)
            if check.allow(f"{model}, batch {batch}{way[0]}: steps in turn", check.seconds(25, 4)):
                in_turn(check, torch, backend, model, batch, way)
        turns = list(itertools.product((8, 1)[1 if check.quick else 0 :], (COMPILED, EAGER)))
        for number, (batch, way) in enumerate(turns):
            seconds = (check.left_s() - 5) / (len(turns) - number) - check.seconds(25 if way is COMPILED else 1, 1)
            if check.allow(f"{model}, batch {batch}{way[0]}: pairs", check.seconds(30 if way is COMPILED else 8, 4)):
                compare(
                    check, torch, backend, model, batch, way, seconds if check.alone else min(seconds, check.seconds(12, 2))
                )
    finally:
        backend.close()


def parts_of_it(check: Check, torch: Any, backend: Any, model: str, batch: int, way: Way) -> None:
    """Shares of a decoding step, each from its own clock."""

    async def loop_s() -> float:
        return time.thread_time()  # of the thread that collects what the generating one has left

    sequences = torch.zeros((batch, 2000), dtype=torch.int64, device=backend._model.device)
    observe = observer(backend, batch)
    observed = []
    for length in range(1, 2001):
        observed.append(timed_s(functools.partial(observe, sequences[:, :length])))
        wait(torch)
    name, options, _ = way
    requests = lem.prompts.synthetic(batch, check.input_tokens, check.output_tokens, **options)
    with check.session() as session:
        before = lem.traffic.run_blocking(loop_s())
        m = session.run(
            backend, requests, lem.traffic.batches(batch), label=f"{model} stopwatch batch {batch}{name}",
            repeats=int(check.seconds(30 if name else 6, 2)), warmup=3 if name else 1,
        )  # fmt: skip
        computed_s = lem.traffic.run_blocking(loop_s()) - before
        calls = [
            (t - took, t)
            for key, series in session.trace.counters.items()
            for t, took in zip(series.t_ns, series.took_ns)
            if key.startswith("nvml:")
        ]
    sent = [*m.warmup[::batch], *m.completions[::batch]]
    delay = figures.call_delay_s(([t for t, _ in c.events] for c in sent), calls)
    generated_s = sum((c.done_ns - c.dispatch_ns) / 1e9 for c in sent)
    step_s = metrics.percentile(metrics.values(m, metrics.tpot_s), 50)
    if step_s is None:
        return
    inside = sum(m.t0_ns <= end <= m.t1_ns for _, end in calls) / m.duration_s
    row = {
        "model": f"{model}{name}", "batch": batch, "step ms": 1000 * step_s,
        "criterion %": 100 * statistics.median(observed) / step_s, "event loop %": 100 * computed_s / generated_s,
        "calls per s": inside if calls else None, "steps that met one": delay.n if delay else None,
        "delay by a call ms": 1000 * delay.value if delay else None,
        "sampler %": 100 * delay.value * inside if delay else None,
        "low": 100 * delay.low * inside if delay else None, "high": 100 * delay.high * inside if delay else None,
    }  # fmt: skip
    check.table("parts of the cost", [row])
    sampler_said = f"{row['sampler %']:.2f} [{row['low']:.2f}, {row['high']:.2f}] %" if delay else "unknown"
    stopwatch = row["criterion %"] + row["event loop %"]
    check.headline(f"{model}, batch {batch}{name}: of a step, stopwatch / sampler", f"{stopwatch:.2f} % / {sampler_said}")


def observer(backend: Any, batch: int) -> Callable[[Any], None]:
    """What lem_kit does at a step, for sequences that end with the step's tokens."""
    from lem_kit.backends._static import Steps

    steps = Steps()
    keywords = backend._observing(steps, batch, {})[0]
    if "stopping_criteria" not in keywords:  # on a CPU
        return lambda sequences: steps.put(sequences[:, -1].cpu())
    criterion = keywords["stopping_criteria"][0]

    def observe(sequences: Any) -> None:
        criterion._length = sequences.shape[1] - 1  # the steps before were perhaps not its own
        criterion(sequences, None)

    return observe


def wait(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stamps(check: Check, torch: Any, backend: Any, model: str) -> None:
    """Of one request, whose steps are waited for by a criterion of the user's: it is asked after lem_kit's."""
    after_ns: list[int] = []

    def waited(sequences: Any, scores: Any, **_: Any) -> Any:
        wait(torch)
        after_ns.append(time.monotonic_ns())
        return torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)

    tokens = int(check.seconds(400, 100))
    requests = lem.prompts.synthetic(1, check.input_tokens, tokens, stopping_criteria=[waited])
    for _ in range(2):  # the first is a warm-up
        after_ns.clear()
        (done,) = lem.traffic.run_blocking(lem.traffic.send(backend, requests, lem.traffic.batches(1)))
    assert len(done.events) == len(after_ns) == tokens, done.error
    late_us = sorted((after - t) / 1e3 for after, (t, _) in zip(after_ns, done.events))
    row = {"model": model, "clock": done.timing_source, "tokens": tokens, "decode s": lem.latency.decode_s(done)}
    for name, share in (("least", 0), ("p5", 0.05), ("p50", 0.5), ("p95", 0.95), ("most", 1)):
        row[f"host - stamp, {name} us"] = late_us[round(share * (tokens - 1))]
    check.table("stamps", [row])
    check.headline(f"{model}: host after a wait - stamp, us", " / ".join(f"{late_us[i]:.0f}" for i in (0, tokens // 2, -1)))


class InTurn:
    """One of generate's stopping criteria, which has `ways` look at a few steps each and keeps how long these took."""

    def __init__(self, ways: dict[str, Callable[[Any], Any]], never: Any) -> None:
        self.took: dict[str, list[float]] = {name: [] for name in ways}
        self._ways, self._never = ways, never
        self._draw = random.Random(5)
        self._left: list[str] = []
        self._steps, self._began, self._found = 0, 0.0, dict.fromkeys(ways, 0.0)

    def __call__(self, sequences: Any, scores: Any, **_: Any) -> Any:
        now = time.perf_counter()
        if self._left and self._steps == STEPS_IN_TURN:
            self._found[self._left.pop()] = now - self._began
            self._steps = 0
            if not self._left:
                for name, seconds in self._found.items():
                    self.took[name].append(seconds)
        if not self._left:
            self._left = self._draw.sample(list(self._ways), len(self._ways))
        if self._steps == 1:
            self._began = now
        self._steps += 1
        self._ways[self._left[-1]](sequences)
        return self._never

    def forget(self) -> None:
        self._left, self._steps = [], 0


def in_turn(check: Check, torch: Any, backend: Any, model: str, batch: int, way: Way) -> None:
    named, options, _ = way
    requests = lem.prompts.synthetic(batch, check.input_tokens, int(check.seconds(600, 60)))
    generate = functools.partial(bare(torch, backend._model, requests), **options)

    def run() -> InTurn:
        ways = {
            "nothing": lambda sequences: None,
            "streamer": lambda sequences: sequences[:, -1].cpu(),
            "lem_kit": observer(backend, batch),
        }
        found = InTurn(ways, torch.zeros(batch, dtype=torch.bool, device=backend._model.device))
        ends = time.monotonic() + check.seconds(15, 2)
        while time.monotonic() < ends:
            generate(stopping_criteria=[found])
            found.forget()
        return found

    took = backend._static._worker.submit(run).result().took
    for name in ("streamer", "lem_kit"):
        ratio = figures.paired_ratio(took[name], took["nothing"])
        if ratio is not None:
            step_ms = 1000 * sum(took["nothing"]) / len(took["nothing"]) / (STEPS_IN_TURN - 1)
            row = {"model": f"{model}{named}", "batch": batch, "step ms": step_ms, "a step of": f"{name} / nothing"}
            check.table("steps in turn", [{**row, "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "n": ratio.n}])
            if name == "lem_kit":
                check.headline(f"{model}, batch {batch}{named}: a step, observed / not", str(ratio))


def timed_s(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def arms(torch: Any, backend: Any, batch: int, lengths: tuple[int, int], options: dict[str, Any]) -> dict[str, Arm]:
    """The same work three ways."""
    requests = lem.prompts.synthetic(batch, *lengths, **options)
    model = backend._model  # the very same weights must be run with lem_kit around them and without
    from transformers.generation.streamers import BaseStreamer

    class Silent(BaseStreamer):
        def put(self, value: Any) -> None: ...

        def end(self) -> None: ...

    generate = functools.partial(bare(torch, model, requests), **options)

    def there(work: Arm) -> Arm:
        return lambda: backend._static._worker.submit(work).result()

    def full() -> None:
        done = lem.traffic.run_blocking(lem.traffic.send(backend, requests, lem.traffic.batches(batch)))
        assert sum(c.output_tokens for c in done) == batch * lengths[1], done[0].error

    return {"bare": there(generate), "streamer alone": there(lambda: generate(streamer=Silent())), "lem_kit": full}


def bare(torch: Any, model: Any, requests: Sequence[Any]) -> Callable[..., None]:
    """`generate` as a user would write it, for requests of one length; it takes further options."""
    tokens = requests[0].max_new_tokens
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def generate(**options: Any) -> None:
        ids = torch.tensor([r.prompt_token_ids for r in requests], device=model.device)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed, **options)
        wait(torch)

    return generate


@contextlib.contextmanager
def sampler(on: bool) -> Iterator[None]:
    """A session that has found its counters' periods, or none."""
    rested = time.monotonic() + REST_S
    with lem.Session(sources=["nvml"]) if on else contextlib.nullcontext() as session:
        if session is not None:
            until_settled(session)
        time.sleep(max(rested - time.monotonic(), 0))
        yield


def compare(check: Check, torch: Any, backend: Any, model: str, batch: int, way: Way, seconds: float) -> None:
    draw = random.Random(batch)
    named, options, shorter = way
    tokens = max(4, check.output_tokens // shorter)
    work = arms(torch, backend, batch, (check.input_tokens, tokens), options)
    for run in [*work.values()] * (3 if options else 2):
        run()
    took: dict[tuple[str, bool], list[float]] = {(arm, on): [] for arm in work for on in (False, True)}
    began = time.monotonic()
    while not took["bare", True] or time.monotonic() - began < seconds:
        for on in draw.sample((False, True), 2):
            with sampler(on):
                for _ in range(ROUNDS_PER_BLOCK):
                    for arm in draw.sample(list(work), len(work)):
                        started = time.perf_counter()
                        work[arm]()
                        took[arm, on].append(time.perf_counter() - started)
    rows = []
    for name, a, b in (
        ("streamer alone / bare, sampler off", ("streamer alone", False), ("bare", False)),
        ("lem_kit / bare, sampler off", ("lem_kit", False), ("bare", False)),
        ("lem_kit / bare, sampler on", ("lem_kit", True), ("bare", True)),
        ("sampler on / off, bare", ("bare", True), ("bare", False)),
        ("sampler on / off, lem_kit", ("lem_kit", True), ("lem_kit", False)),
        ("lem_kit with sampler / bare without", ("lem_kit", True), ("bare", False)),
    ):
        found = figures.paired_ratio(took[b], took[a])  # of tokens/s, so times the other way round
        if found is not None:
            rows.append(
                {
                    "model": f"{model}{named}", "batch": batch, "tokens/s of": name, "ratio": found.value, "low": found.low,
                    "high": found.high, "pairs": found.n, "tokens/s, second": batch * tokens * len(took[b]) / sum(took[b]),
                }
            )  # fmt: skip
            if name in ("lem_kit / bare, sampler off", "sampler on / off, bare"):
                check.headline(f"{model}, batch {batch}{named}: tokens/s, {name}", str(found))
    check.table("stopwatch", rows)
    seen = {f"{arm}, sampler {'on' if on else 'off'}": s for (arm, on), s in took.items()}
    check.fact(f"seconds, batch {batch}{named}", seen)
