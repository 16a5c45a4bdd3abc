"""Energy and latency of static batches: J per output token gross and net, TTFT, TPOT, MFU, bandwidth, prefill and decode.

The one idea: the batch sizes are gone through once, and then all of them again, so that the two figures of each lie as far
apart in time as the run allows; their ratio is the repeatability.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import lem_kit as lem
from lem_kit import metrics

from . import figures
from .check import Check
from .facts import idle_row

BATCHES = (1, 8, 64)
LEAST_REPEATS = 5
KINDS = ("engine", "context", "bare")


def measure(check: Check) -> None:
    check.engine()
    for number, model in enumerate(check.models, start=1):
        if not check.allow(f"{model}: loading, idle and one batch size", check.seconds(25, 12)):
            continue
        keep_s = check.left_s() * (1 - number / len(check.models))
        backend = load(check, model)
        try:
            one_model(check, model, backend, keep_s if number == 1 else 0.0)
        finally:
            backend.close()


def load(check: Check, model: str, **engine_args: Any) -> Any:
    """The backend; in bfloat16 on a GPU unless told otherwise."""
    if not check.anywhere:
        engine_args = {"dtype": "bfloat16", **engine_args}
    check.say(f"loading {model} {engine_args}")
    return lem.load_backend("transformers", model, **engine_args)


def one_model(check: Check, model: str, backend: Any, keep_s: float) -> None:
    """`keep_s` is left to the models after this one."""
    rows = []
    with check.session() as session:
        m = session.idle(check.seconds(4, 2), label=f"idle {model}")  # this process decides which kind it is
        check.table("idle with a model", [{"model": model, **idle_row(m, m.config["baseline"], 1)}])
        turns: dict[int, tuple[int, float]] = {}
        batches = BATCHES[: 2 if check.quick else None]
        for number, batch in itertools.product(range(1, check.repeats + 1), batches):
            needed_s = turns[batch][0] * turns[batch][1] + 3 if batch in turns else check.seconds(12, 5)
            if check.allow(f"{model}, batch {batch}, pass {number}", needed_s, keep_s):
                rows += [one_batch(check, session, backend, model, batch, number, turns, check.seconds(3.5, 1.5))]
        for batch in batches:
            if check.allow(f"{model}, batch {batch}, prefill alone", check.seconds(5, 3), keep_s):
                prefill_alone(check, session, backend, model, batch)
        if check.allow(f"{model}: FLOPs counted against the formula", 2):
            check_flops(check, session, backend, model)
    check.table("inference", rows)
    repeatability(check, rows)
    for row in rows:
        if row["pass"] == 1:
            gross, net = row["J/output token"], row["net (engine)"]
            said = f"{gross:.4g} ± {row['± gross']:.2g} J" if gross else "no energy"
            check.headline(
                f"{model}, batch {row['batch']}: J/output token",
                f"{said}, net {f'{net:.4g}' if net else 'unknown'}, {row['output tokens/s']:.4g} tokens/s",
            )


def one_batch(
    check: Check,
    session: Any,
    backend: Any,
    model: str,
    batch: int,
    number: int,
    turns: dict[int, tuple[int, float]],
    seconds: float,
) -> dict[str, Any]:
    """One row. How often the batch is sent is decided once, so that both passes do the same: five times at the least, for
    Student's factor is 12.7 with two and 2.8 with five. Three rounds warm up; waiting until latency settles would take up to
    half a minute where the host is not steady."""
    requests = lem.prompts.synthetic(batch, check.input_tokens, check.output_tokens, seed=number)
    plan = lem.traffic.batches(batch)
    if batch not in turns:
        sent = [timed(lambda: lem.traffic.run_blocking(lem.traffic.send(backend, requests, plan, -1))) for _ in range(2)]
        turns[batch] = max(LEAST_REPEATS, min(20, round(seconds / min(sent)))), min(sent)
    m = session.run(
        backend, requests, plan, label=f"{model} batch {batch}", repeats=turns[batch][0], warmup=1, config={"pass": number}
    )
    check.say(f"{model}, batch {batch}, pass {number}: {metrics.output_tokens_per_s(m):.4g} tokens/s")
    return row_of(m, model=model, batch=batch, **{"pass": number})


def timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return max(time.monotonic() - began, 1e-3)


def row_of(m: Any, **first: Any) -> dict[str, Any]:
    """What a table shows of a run; None is "not available", for the reasons in the run's record."""
    tokens = metrics.output_tokens(m) or 0
    gross = metrics.j_per_output_token(m)
    row: dict[str, Any] = {
        **first,
        "repeats": len(m.repeats),
        "output tokens/s": metrics.output_tokens_per_s(m),
        "J/output token": gross.value if gross else None,
        "± gross": gross.half_width if gross else None,
    }
    for kind in KINDS:
        net = metrics.net_energy_j(m, kind) if kind in m.baselines else None
        row[f"net ({kind})"] = net.value / tokens if net and tokens else None
        row[f"± net ({kind})"] = net.half_width / tokens if net and tokens else None
    power = metrics.mean_power_w(m)
    row["mean W"] = power.value if power else None
    for name, of in (("TTFT", metrics.ttft_s), ("TPOT", metrics.tpot_s)):
        p50 = metrics.percentile(metrics.values(m, of), 50)
        row[f"{name} p50 ms"] = 1000 * p50 if p50 is not None else None
    found = optional("flops", "summary", m) or {}
    row["MFU"], row["bandwidth share"] = found.get("mfu"), found.get("bandwidth_share")
    row |= split(m)
    codes = metrics.reasons(m) + metrics.net_energy_doubts(m)
    return row | {"verdict": ", ".join(metrics.verdict(m)) or "valid", "reasons": ", ".join(codes)}


def optional(module: str, name: str, *args: Any) -> Any:
    """What `lem_kit.<module>.<name>` says; None where this lem_kit has no such thing."""
    try:
        function = getattr(importlib.import_module(f"lem_kit.{module}"), name)
    except (ModuleNotFoundError, AttributeError):
        return None
    return function(*args)


def split(m: Any) -> dict[str, Any]:
    """Energy of prefill and decode for each repeat, if this lem_kit and the window can tell them apart."""
    found = optional("phases", "split", m)
    row: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        phase = getattr(found, name, None)
        figure = phase.figure if phase is not None else None
        row[f"{name} J"] = figure.value / len(m.repeats) if figure else None
        row[f"± {name} J"] = figure.half_width / len(m.repeats) if figure else None
    return row


def prefill_alone(check: Check, session: Any, backend: Any, model: str, batch: int) -> None:
    """Prompts of the same length with one output token each: an independent figure for what prefill costs."""
    plan = lem.traffic.batches(batch)
    pilot = lem.prompts.synthetic(batch, check.input_tokens, 1, seed=7)
    for _ in range(2):
        took = timed(lambda: lem.traffic.run_blocking(lem.traffic.send(backend, pilot, plan, -1)))
    rounds = max(1, min(100, round(check.seconds(0.6, 0.3) / took)))
    requests = lem.prompts.synthetic(batch * rounds, check.input_tokens, 1, seed=8)
    m = session.run(backend, requests, plan, label=f"{model} prefill batch {batch}", repeats=LEAST_REPEATS, warmup=0)
    energy = metrics.energy_j(m)
    batches = rounds * len(m.repeats)
    check.table(
        "prefill alone",
        [
            {
                "model": model, "batch": batch, "batches": batches,
                "J per batch": energy.value / batches if energy else None,
                "± J": energy.half_width / batches if energy else None,
                "ms per batch": 1000 * metrics.measured_s(m) / batches,
                "MFU": (optional("flops", "summary", m) or {}).get("mfu"),
            }
        ],
    )  # fmt: skip


def check_flops(check: Check, session: Any, backend: Any, model: str) -> None:
    """What torch counts against what the model's shape says; torch counts the whole square of a prompt's attention."""
    batch, prompt, output = 2, 64, 8
    counted = optional(
        "flops", "counted", backend.model if hasattr(backend, "model") else backend._model, prompt, output, batch
    )
    m = session.run(
        backend, lem.prompts.synthetic(batch, prompt, output), lem.traffic.batches(batch), label=f"{model} flops", warmup=0
    )
    said = optional("flops", "of_run", m)
    if counted is not None and said is not None:
        row = {"model": model, "counted": counted.flop, said.method: said.flop, "counted/formula": counted.flop / said.flop}
        check.table("FLOPs", [row])


def repeatability(check: Check, rows: list[dict[str, Any]]) -> None:
    """First pass over second, for energy per token and throughput."""
    found = []
    for a in rows:
        b = next((r for r in rows if r["batch"] == a["batch"] and r["pass"] == a["pass"] + 1), None)
        if b is None or a["pass"] != 1:
            continue
        energy = None
        if a["J/output token"] and b["J/output token"]:
            energy = figures.ratio(a["J/output token"], a["± gross"], b["J/output token"], b["± gross"])
            check.headline(f"{a['model']}, batch {a['batch']}: first/second pass, J/token", str(energy))
        found.append(
            {
                "model": a["model"], "batch": a["batch"],
                "J/token, first/second": energy.value if energy else None,
                "low": energy.low if energy else None, "high": energy.high if energy else None,
                "tokens/s, first/second": a["output tokens/s"] / b["output tokens/s"],
            }
        )  # fmt: skip
    check.table("repeatability", found)
