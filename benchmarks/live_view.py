"""What the live view costs a decode loop, in a real kernel that a client listens to.

    python benchmarks/live_view.py [--model NAME] [--pairs N] [--seconds S] [--threads N] [--faster F] [--json FILE.json]

The one idea: windows with and without a view are made in pairs, in random order within each pair, on one loaded model; only
ratios within pairs are averaged. In each window `model.generate` is called again and again for some seconds. What the view
costs is less than a shared machine lets see, so here it is drawn `--faster` times as often as for a user, from the start of
its window and always over the longest time; its cost is in its drawings, so a user's is that much smaller.

`ratio` is tokens per second with such a view / without, with Student's 95 % interval, on the logarithms; `cost` is what
follows for a user's. "own" is the CPU time of the view's thread for each drawing. "late" is how late the sampler's
readings were, at the 99th percentile, with such a view and without.

Not covered: the browser, which may be on the same machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

NEW, PROMPT = 32, 32


def measure(model_name: str, pairs: int, seconds: float, threads: int | None, faster: float) -> dict[str, Any]:
    """Runs inside the kernel."""
    import os
    import threading

    import torch

    import lem_kit as lem
    from lem_kit.backends import load_backend
    from lem_kit.jupyter import live
    from lem_kit.statistics import stdev, student_t

    if threads:
        torch.set_num_threads(threads)
    live.AFTER_S, live.EVERY_S, live.SHORTEST_S = 0.02, live.EVERY_S / faster, live.LONGEST_S
    backend: Any = load_backend("transformers", model_name)
    model = backend._model
    ids = torch.randint(5, 100, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW}
    session = lem.Session()
    cpu_s: list[float] = []
    drawings = 0
    live._names_cell = lambda parent: True  # as JupyterLab does: then the view is a panel
    draw, run = live.View._draw, live.View.run

    def counted(self: Any, *given: Any) -> None:
        nonlocal drawings
        draw(self, *given)
        drawings += 1

    def timed(self: Any) -> None:
        run(self)
        cpu_s.append(time.thread_time())

    live.View._draw, live.View.run = counted, timed  # type: ignore[method-assign]

    def window(shown: bool) -> tuple[float, list[float]]:
        os.environ["LEM_KIT_LIVE"] = "1" if shown else "0"
        with session.window("decode") as w:
            calls, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                model.generate(**given, do_sample=False, pad_token_id=0)
                calls += 1
            rate = calls * NEW / (time.perf_counter() - began)
        views = [thread for thread in threading.enumerate() if thread.name == "lem-live"]
        assert not views, "a view is left"
        t = next(iter(w.measurement.trace.counters.values())).t_ns
        inside = [a for a in t if w.span.t0_ns <= a <= w.measurement.t1_ns]
        return rate, [(b - a) / 1e6 - 50.0 for a, b in itertools.pairwise(inside)]

    chance = random.Random(0)
    for shown in (True, False):
        window(shown)
    cpu_s.clear()
    drawings = 0
    logs, late, rates = [], {True: [], False: []}, []
    for _ in range(pairs):
        rate = {}
        for shown in chance.sample((True, False), 2):
            rate[shown], gaps = window(shown)
            late[shown] += gaps
        logs.append(math.log(rate[True] / rate[False]))
        rates.append(rate[False])
    mean, half = sum(logs) / pairs, student_t(pairs - 1) * stdev(logs) / math.sqrt(pairs)
    session.close()
    backend.close()
    ratio = [math.exp(mean), math.exp(mean - half), math.exp(mean + half)]
    cost = [(1 - r) / faster for r in (ratio[0], ratio[2], ratio[1])]
    p99 = {shown: statistics.quantiles(gaps, n=100)[-1] for shown, gaps in late.items()}
    own_ms = 1e3 * sum(cpu_s) / drawings
    rate_hz = drawings / (pairs * seconds)
    return dict(
        ratio=ratio, cost=cost, own_ms=own_ms, drawings_per_s=rate_hz, tokens_per_s=statistics.median(rates), late_p99_ms=p99
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice unless given")
    parser.add_argument("--faster", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=40"])
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport live_view, json\n"
    given = (options.model, options.pairs, options.seconds, options.threads, options.faster)
    code += f"print(json.dumps(live_view.measure(*{given!r})))"
    said: list[str] = []

    def seen(message: Any) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])
        elif message["msg_type"] == "error":
            print("\n".join(message["content"]["traceback"]), file=sys.stderr)

    try:
        client.execute_interactive(code, output_hook=seen, timeout=3600)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    found = json.loads("".join(said).splitlines()[-1])
    mean, low, high = found["ratio"]
    cost, least, most = (100 * value for value in found["cost"])
    late = found["late_p99_ms"]
    rates = f"{found['drawings_per_s']:.0f} drawings/s / none: {mean:.4f} [{low:.4f}, {high:.4f}]"
    print(f"{rates} of {found['tokens_per_s']:.0f} tokens/s, {options.pairs} pairs")
    print(f"so a user's view costs {cost:.2f} % [{least:.2f}, {most:.2f}] of the tokens per second")
    lates = f"readings late by {late['true']:.1f} ms with, {late['false']:.1f} ms without (99th percentile)"
    print(f"own {found['own_ms']:.2f} ms of CPU for each drawing; {lates}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
