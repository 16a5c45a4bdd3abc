"""Our metrics beside those of other tools on the same events, and what they cost on a large run: `make bench-metrics`.

    python benchmarks/metrics.py [--run FOLDER] [--json FILE.json]

The one idea: one set of recorded events goes into lem_kit and into the other tools' own published code (`metrics_peers.py`,
each in its environment). Figures that claim the same definition must agree to 1e-9, or the exit status is 1. Those that
differ are listed with the reason, and must differ, so that the list stays true.

Events are those of `metrics_runs.py`: a plain run, which leaves nothing to differ about, and a mixed one with all that a run
may have. `--run`: a stored run of yours instead of these; what must differ is not asked then.

Scale: a stored run of 1,000 requests and 500,000 token events is loaded and every metric of it computed, in a process of
its own, within 1 s of CPU time and 500 MB.

Not covered: how tools stamp what they receive, and energy, which none of these has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metrics_runs import large, mixed, plain

from lem_kit import flops, goodput, metrics, phases, steady, store
from lem_kit.measurement import Completion, Measurement

ROOT = Path(__file__).parent.parent
TOOLS = {"vllm": ".venv-vllm", "sglang": ".venv-bench-metrics", "guidellm": ".venv-bench-metrics"}
TOOLS["aiperf"] = ".venv-bench-metrics"
AGREE = 1e-9
LIMITS = {"ttft_s": 0.12, "tpot_s": 0.02, "e2e_s": 2.0}
TWO_LIMITS = {name: LIMITS[name] for name in ("ttft_s", "tpot_s")}
SHARE = 0.9
MOST_CPU_S, MOST_MB = 1.0, 500


class Claim(NamedTuple):
    """A figure of theirs and ours, and where the definitions differ, why. `always`: not only in a mixed run."""

    tool: str
    theirs: str
    name: str
    ours: Callable[[Measurement], Any]
    differs: str = ""
    always: bool = False


def of_each(metric: Callable[[Completion], Any]) -> Callable[[Measurement], list[float]]:
    return lambda m: metrics.values(m, metric)


def of_all(metric: Callable[[Completion], Any], q: int | None) -> Callable[[Measurement], float | None]:
    if q is None:
        return lambda m: metrics.mean(metrics.values(m, metric))
    return lambda m: metrics.percentile(metrics.values(m, metric), q)


def distribution(tool: str, theirs: str, name: str, metric: Any, differs: str = "") -> list[Claim]:
    """Mean and percentiles. `theirs` has a place for "mean" or "p50"."""
    kinds = [("mean", None), *((f"p{q}", q) for q in metrics.PERCENTILES)]
    return [Claim(tool, theirs.format(kind), f"{name}_{kind}", of_all(metric, q), differs) for kind, q in kinds]


BY_REST = "theirs divides by tokens - 1, whatever the first event held"
FAILED = "theirs leaves out what failed requests took and gave"
LAST_WORD = "theirs ends when the response is closed, ours with the last token"
DURATION = "theirs is over the time from the first request to the last response, without failed ones; ours over the window"
RANK = "theirs is the sample at that rank, ours lies between two samples (NumPy's linear)"
STEADY = f"{FAILED}, ends with the last token, and spreads a request's tokens evenly over its chunks"


def steady_window_s(m: Measurement) -> list[float] | None:
    window = steady.steady_window(m.completions, SHARE, bridge_s=0)
    return [t_ns / 1e9 for t_ns in window] if window else None


CLAIMS: list[Claim] = [
    Claim("vllm", "completed", "completed_requests", metrics.completed_requests),
    Claim("vllm", "request_throughput", "requests_per_s", metrics.requests_per_s),
    Claim("vllm", "total_input", "input_tokens", metrics.input_tokens, FAILED),
    Claim("vllm", "total_output", "output_tokens", metrics.output_tokens, FAILED),
    Claim("vllm", "output_throughput", "output_tokens_per_s", metrics.output_tokens_per_s, FAILED),
    Claim("vllm", "total_token_throughput", "total_tokens_per_s", metrics.total_tokens_per_s, FAILED),
    *distribution("vllm", "{}_ttft", "ttft_s", metrics.ttft_s),
    *distribution("vllm", "{}_itl", "icl_s", metrics.icl_s),
    *distribution("vllm", "{}_e2el", "e2e_s", metrics.e2e_s),
    *distribution("vllm", "{}_tpot", "tpot_s", metrics.tpot_s, BY_REST),
    Claim("vllm", "request_goodput", "goodput.per_s", lambda m: goodput.per_s(m, **LIMITS), f"TPOT: {BY_REST}"),
    Claim("sglang", "request_goodput", "goodput.per_s", lambda m: goodput.per_s(m, **LIMITS), f"TPOT: {BY_REST}"),
    Claim("sglang", "slo_attainment", "goodput.attainment", lambda m: goodput.attainment(m, **LIMITS), f"TPOT: {BY_REST}"),
    Claim("sglang", "steady.window", "steady.steady_window", steady_window_s, f"{FAILED}, and ends with the last token"),
    Claim(
        "sglang",
        "steady.output_throughput",
        "steady.output_tokens_per_s",
        lambda m: steady.output_tokens_per_s(m.completions, SHARE, bridge_s=0),
        STEADY,
    ),
    Claim("guidellm", "time_to_first_token", "ttft_s", of_each(metrics.ttft_s)),
    Claim("guidellm", "time_per_output_token", "ntpot_s", of_each(metrics.ntpot_s)),
    Claim("guidellm", "request_dispatch_delay", "schedule_delay_s", of_each(metrics.schedule_delay_s)),
    Claim("guidellm", "inter_token_latency", "tpot_s", of_each(metrics.tpot_s), BY_REST),
    Claim("guidellm", "request_latency", "e2e_s", of_each(metrics.e2e_s), LAST_WORD),
    Claim("guidellm", "request_scheduled_latency", "e2e_sched_s", of_each(metrics.e2e_sched_s), LAST_WORD),
    Claim("guidellm", "cached_tokens", "cached_tokens", metrics.cached_tokens, FAILED),
    Claim("guidellm", "time_to_first_token.mean", "ttft_s_mean", of_all(metrics.ttft_s, None)),
    *(
        Claim("guidellm", f"time_to_first_token.p{q}", f"ttft_s_p{q}", of_all(metrics.ttft_s, q), RANK, always=True)
        for q in metrics.PERCENTILES
    ),
    Claim(
        "guidellm",
        "conforming",
        "goodput.good_requests",
        lambda m: goodput.good_requests(m, **TWO_LIMITS),
        f"TPOT: {BY_REST}; a response of one token is undetermined",
    ),
    Claim("aiperf", "time_to_first_token", "ttft_s", of_each(metrics.ttft_s)),
    Claim("aiperf", "request_latency", "e2e_s", of_each(metrics.e2e_s)),
    Claim("aiperf", "inter_token_latency", "tpot_s", of_each(metrics.tpot_s)),
    Claim("aiperf", "inter_chunk_latency", "icl_s", of_each(metrics.icl_s)),
    *(
        claim._replace(theirs=claim.theirs.replace(".mean", ".avg"))
        for claim in (
            *distribution("aiperf", "time_to_first_token.{}", "ttft_s", metrics.ttft_s),
            *distribution("aiperf", "inter_token_latency.{}", "tpot_s", metrics.tpot_s),
        )
    ),
    Claim("aiperf", "benchmark_duration", "measured_s", metrics.measured_s, DURATION),
    Claim("aiperf", "request_throughput", "requests_per_s", metrics.requests_per_s, DURATION),
    Claim("aiperf", "output_token_throughput", "output_tokens_per_s", metrics.output_tokens_per_s, DURATION),
    Claim(
        "aiperf",
        "goodput",
        "goodput.per_s",
        lambda m: goodput.per_s(m, **TWO_LIMITS),
        f"{DURATION}; a response of one token is a miss",
    ),
]


# --- what others make of the same ---------------------------------------------------------------------------------------


def handed_over(m: Measurement) -> dict[str, Any]:
    """What the other tools are given."""
    requests = [
        {
            **{name: getattr(c, name) for name in ("sched_ns", "dispatch_ns", "done_ns", "events", "prompt_tokens")},
            **{name: getattr(c, name) for name in ("cached_tokens", "output_tokens", "error")},
        }
        for c in m.completions
    ]
    return {"seconds": metrics.measured_s(m), "requests": requests, "limits": LIMITS, "share": SHARE}


def figures_of(tool: str, runs: Mapping[str, Measurement]) -> dict[str, Any]:
    python = ROOT / TOOLS[tool] / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{tool} needs the environment {TOOLS[tool]}: run this with `make bench-metrics`, which makes it.")
    given = json.dumps({name: handed_over(m) for name, m in runs.items()})
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}  # the files beside this one are no modules of theirs
    command = [str(python), str(ROOT / "benchmarks" / "metrics_peers.py"), tool]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=safe, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout))


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the figure, or to 10 ms where that is more: some tools keep instants as floats of
    seconds, and a difference of two has the rounding of both. Infinite where one is absent or they are not equally many."""
    a, b = ([x for x in (v if isinstance(v, list) else [v]) if x is not None] for v in (ours, theirs))
    if not a or len(a) != len(b):
        return float("inf")
    return max(abs(x - y) / max(abs(x), abs(y), 0.01) for x, y in zip(a, b))


def compare(
    runs: Mapping[str, Measurement], theirs: Mapping[str, Any], built: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each claim, and what is not as claimed. `built`: the runs are ours, so that what differs must."""
    rows, wrong = [], []
    for claim in CLAIMS:
        found = {}
        for name, m in runs.items():
            ours, figure = claim.ours(m), theirs[claim.tool]["figures"][name][claim.theirs]
            found[name] = apart(ours, figure)
            withheld = ours is None and not built  # a percentile of too few requests
            if claim.differs and name != "plain":
                if built and found[name] <= AGREE:
                    wrong.append(f"{claim.tool} {claim.theirs} is said to differ from {claim.name}, and agrees ({name}).")
            elif found[name] > AGREE and not claim.always and not withheld:
                wrong.append(f"{claim.tool} {claim.theirs} and {claim.name} differ by {found[name]:.1e} ({name}).")
        rows.append({**claim._asdict(), "ours": claim.name, "apart": found})
    return rows, wrong


def table(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> str:
    def cell(value: float) -> str:
        return "exact" if value == 0 else "not both known" if value == float("inf") else f"{value:.0e}"

    lines = ["| tool | theirs | lem_kit | " + " | ".join(names) + " | why |", "|---" * (4 + len(names)) + "|"]
    for row in rows:
        cells = [cell(row["apart"][name]) for name in names]
        lines.append(
            f"| {row['tool']} | {row['theirs']} | {row['ours']} | {' | '.join(cells)} | {row['differs'] or 'same'} |"
        )
    return "\n".join(lines)


# --- scale --------------------------------------------------------------------------------------------------------------


def measure_large(folder: Path) -> dict[str, Any]:
    """In a process of its own: CPU seconds of each step, and the most memory it had."""
    import pandas  # noqa: F401 (libraries are loaded before; they cost what they cost once)
    import pyarrow.parquet  # noqa: F401

    def peak_mb() -> float:
        """Of this program alone: what `resource` tells begins with the memory of the one that started it."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    libraries_mb = peak_mb()
    taken: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began, found = time.process_time(), work()
        taken[name] = time.process_time() - began
        return found

    began = time.perf_counter()
    m = timed("store.load", lambda: store.load(folder))
    timed("metrics.summary, every percentile", lambda: metrics.summary(m))
    timed("steady.output_tokens_per_s", lambda: steady.output_tokens_per_s(m.completions))
    timed("goodput.per_s and per_j", lambda: (goodput.per_s(m, **LIMITS), goodput.per_j(m, **LIMITS, itl_s=0.1)))
    timed("phases.summary", lambda: phases.summary(m))
    timed("flops.summary", lambda: flops.summary(m))
    wall_s = time.perf_counter() - began
    total_s, most_mb = sum(taken.values()), peak_mb()
    timed("interval on ttft_s_p90 (apart)", lambda: metrics.percentile_interval(m, metrics.ttft_s, 90))
    timed("interval on itl_s_p99 (apart)", lambda: metrics.percentile_interval(m, metrics.itl_s, 99))
    events = sum(len(c.events) for c in m.completions)
    facts = {"requests": len(m.completions), "events": events, "cpu_s": total_s, "wall_s": wall_s, "peak_mb": most_mb}
    return {**facts, "libraries_mb": libraries_mb, "steps_cpu_s": taken, "load_average": os.getloadavg()[0]}


def scale() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        place = store.save(large(), scratch)
        command = [sys.executable, __file__, "--large", str(place)]
        return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a stored run to compare on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--large", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.large:
        print(json.dumps(measure_large(options.large)))
        return
    runs = {"given": store.load(options.run)} if options.run else {"plain": plain(), "mixed": mixed()}
    theirs = {tool: figures_of(tool, runs) for tool in TOOLS}
    rows, wrong = compare(runs, theirs, built=not options.run)
    versions = {tool: found["version"] for tool, found in theirs.items()}
    print(", ".join(f"{tool} {version}" for tool, version in versions.items()))
    print(table(rows, list(runs)))
    large_run = scale()
    print(
        "\n{requests:,} requests, {events:,} token events: {cpu_s:.2f} s of CPU time ({wall_s:.2f} s by the clock, load "
        "{load_average:.1f}), {peak_mb:.0f} MB at most, of which {libraries_mb:.0f} MB are libraries".format(**large_run)
    )
    for name, seconds in large_run["steps_cpu_s"].items():
        print(f"    {name:<36} {1e3 * seconds:6.0f} ms")
    if large_run["cpu_s"] > MOST_CPU_S or large_run["peak_mb"] > MOST_MB:
        wrong.append(f"The large run took more than {MOST_CPU_S:g} s or {MOST_MB} MB.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        kept = [{**row, "apart": {k: v if v < float("inf") else None for k, v in row["apart"].items()}} for row in rows]
        facts = {"versions": versions, "agree_to": AGREE, "rows": kept, "large_run": large_run, "wrong": wrong}
        options.json.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    same = sum(not row["differs"] for row in rows)
    print(f"\n{same} figures claim the same definition, {len(rows) - same} do not; {len(wrong)} are not as claimed.")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
