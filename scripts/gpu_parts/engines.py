"""Ways to run the same model: number formats, continuous batching under Poisson arrivals, a static cache with compilation.

Not covered: their quality; weights are random.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from typing import Any

import lem_kit as lem
from lem_kit import metrics

from . import figures
from .check import Check
from .inference import load, one_batch, optional, row_of, timed
from .stopwatch import bare

BATCH = 8


def precision(check: Check) -> None:
    """bfloat16, float16, float32 and whatever 8-bit format has its library here."""
    torch = check.engine()
    model = check.models[-1]
    formats: dict[str, Callable[[], dict[str, Any]]] = {
        "bfloat16": lambda: {"dtype": torch.bfloat16},
        "float16": lambda: {"dtype": torch.float16},
        "float32": lambda: {"dtype": torch.float32},
    }
    formats |= eight_bit(check)
    rows: list[dict[str, Any]] = []
    for name, arguments in formats.items():
        if not check.allow(f"{model} in {name}", check.seconds(18, 10)):
            continue
        try:
            backend = lem.load_backend("transformers", model, **arguments())
        except Exception as error:
            check.left_out(f"{model} in {name}", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        try:
            with check.session() as session:
                row = one_batch(check, session, backend, f"{model} {name}", BATCH, 1, {}, check.seconds(2.5, 1.5))
                rows.append({"format": name, **row})
        except Exception as error:  # a format that does not run must not cost the others
            check.left_out(f"{model} in {name}", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        finally:
            backend.close()
    check.table("number formats", rows)
    for row in rows:
        if row["pass"] == 1:
            energy = f"{row['J/output token']:.4g} J/token" if row["J/output token"] else "no energy"
            check.headline(f"{row['format']}, batch {BATCH}", f"{energy}, {row['output tokens/s']:.4g} tokens/s")


def eight_bit(check: Check) -> dict[str, Callable[[], dict[str, Any]]]:
    """Ways to 8 bits whose library is installed; the others are named."""
    import transformers

    def torchao() -> dict[str, Any]:
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig()), "dtype": "bfloat16"}

    ways: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "8-bit (bitsandbytes)": (
            "bitsandbytes",
            lambda: {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True), "dtype": "float16"},
        ),
        "8-bit (torchao)": ("torchao", torchao),
        "8-bit (optimum-quanto)": (
            "optimum.quanto",
            lambda: {"quantization_config": transformers.QuantoConfig(weights="int8"), "dtype": "bfloat16"},
        ),
        "8-bit floats (fine-grained FP8)": (
            "kernels",
            lambda: {"quantization_config": transformers.FineGrainedFP8Config(), "dtype": "bfloat16"},
        ),
    }
    found = {}
    for name, (library, arguments) in ways.items():
        if installed(library):
            found[name] = arguments
        else:
            check.left_out(name, f"the package {library} is not installed")
    return found


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def continuous(check: Check) -> None:
    """The engine's own scheduler under Poisson arrivals: light load, heavy load, and everything at once."""
    check.engine()
    model = check.models[0]
    if not check.allow(f"{model} with continuous batching", check.seconds(20, 12)):
        return
    try:
        backend = load(check, model, continuous_batching=True)
    except lem.LemError as error:
        check.left_out("continuous batching", str(error))
        return
    rows = []
    try:
        with check.session() as session:
            count = int(check.seconds(96, 24))
            requests = lem.prompts.synthetic(count, check.input_tokens, check.output_tokens)
            m = session.run(backend, requests, lem.traffic.burst(), label=f"{model} burst", warmup=1)
            rows.append(traffic_row(m, "burst", None))
            most = metrics.requests_per_s(m) or 1.0
            for share in (0.3, 0.7):
                rate = share * most
                for number in range(1, check.repeats + 1):
                    here = max(8, min(count, int(rate * check.seconds(6, 3))))
                    if check.allow(f"Poisson at {share:.0%} of the burst's rate, pass {number}", here / rate + 4):
                        plan = lem.traffic.poisson(rate, seed=number)
                        m = session.run(backend, requests[:here], plan, label=f"{model} poisson {share}", warmup=0)
                        rows.append(traffic_row(m, f"Poisson, {share:.0%} of the burst's rate", number))
    finally:
        backend.close()
        check.table("continuous batching", rows)
    for row in rows:
        if row["pass"] in (None, 1):
            energy = f"{row['J/output token']:.4g} J/token" if row["J/output token"] else "no energy"
            ttft = row["TTFT p50 ms"]
            check.headline(
                f"continuous, {row['arrivals']}",
                f"{energy}, {row['output tokens/s']:.4g} tokens/s, TTFT {f'{ttft:.1f} ms' if ttft else 'unknown'}",
            )


def traffic_row(m: Any, arrivals: str, number: int | None) -> dict[str, Any]:
    delay = metrics.percentile(metrics.values(m, metrics.schedule_delay_s), 50)
    return {
        "arrivals": arrivals,
        "planned 1/s": metrics.planned_requests_per_s(m),
        "achieved 1/s": metrics.achieved_requests_per_s(m),
        "requests": len(m.completions),
        "schedule delay p50 ms": 1000 * delay if delay is not None else None,
        "steady tokens/s": optional("metrics", "steady_output_tokens_per_s", m),
        **row_of(m, **{"pass": number}),
        "counters": str((m.backend or {}).get("counters") or ""),
    }


CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "static, not compiled": {"cache_implementation": "static", "disable_compile": True},
    "static, compiled": {"cache_implementation": "static"},
}


def compiled(check: Check) -> None:
    """A static key-value cache, which transformers compiles on CUDA, against the cache that grows.

    lem_kit runs `generate` in a thread of its own. Where compilation fails there, `generate` is called from the main thread
    as well, to tell whether it is the thread.
    """
    torch = check.engine()
    model = check.models[0]
    if not check.allow(f"{model} with a compiled static cache", 40):
        return
    backend = load(check, model)
    rows: list[dict[str, Any]] = []
    try:
        with check.session() as session:
            for cache, options in CACHES.items():
                passes = 1 if "not compiled" in cache else check.repeats
                try:
                    for number in range(1, passes + 1):
                        if number > 1 and not check.allow(f"cache {cache}, pass {number}", 12):
                            break
                        rows += [one_cache(check, session, backend, model, cache, options, number)]
                except Exception as error:
                    check.left_out(f"cache {cache}", f"{type(error).__name__}: {error}")
                    check.fact(f"cache {cache}", traceback.format_exc())
                    if cache == "static, compiled":
                        rows.append(in_main_thread(check, torch, session, backend, model, options))
    finally:
        backend.close()
        check.table("static cache", rows)
    a, b = (next((row for row in rows if row["cache"].startswith(cache)), None) for cache in ("static, compiled", "growing"))
    if a is not None and b is not None:
        energy = "no energy"
        if a["J/output token"] and b["J/output token"]:
            energy = str(figures.ratio(a["J/output token"], a["± gross"], b["J/output token"], b["± gross"]))
        check.headline(f"cache {a['cache']} / growing: J/token", energy)
        check.headline(f"cache {a['cache']} / growing: tokens/s", f"{a['output tokens/s'] / b['output tokens/s']:.3f}")


def one_cache(
    check: Check, session: Any, backend: Any, model: str, cache: str, options: dict[str, Any], number: int
) -> dict[str, Any]:
    requests = lem.prompts.synthetic(BATCH, check.input_tokens, check.output_tokens, **options)
    plan, warmup = lem.traffic.batches(BATCH), 3 if number == 1 else 1
    m = session.run(backend, requests, plan, label=f"{model} cache {cache}", repeats=5, warmup=warmup)
    first = metrics.e2e_s(m.warmup[0])
    check.say(f"cache {cache}, pass {number}: first warm-up {first} s, {metrics.output_tokens_per_s(m)} tokens/s")
    return {"cache": cache, **row_of(m, batch=BATCH, **{"pass": number}), "first warm-up s": first}


def in_main_thread(
    check: Check, torch: Any, session: Any, backend: Any, model: str, options: dict[str, Any]
) -> dict[str, Any]:
    requests = lem.prompts.synthetic(BATCH, check.input_tokens, check.output_tokens)
    generate = bare(torch, backend._model, requests)
    took = [timed(lambda: generate(**options)) for _ in range(3)]
    with session.window(f"{model} static cache, main thread") as window:
        for _ in range(5):
            with window.repeat() as span:
                generate(**options)
            span.output_tokens = BATCH * check.output_tokens
    row = row_of(window.measurement, batch=BATCH, **{"pass": 1})
    return {"cache": "static, compiled, in the main thread", **row, "first warm-up s": took[0]}
