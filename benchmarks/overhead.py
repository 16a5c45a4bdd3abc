"""What it costs to run transformers through lem_kit instead of calling it: `make bench-overhead`.

    python benchmarks/overhead.py [--model NAME] [--static] [--pairs N] [--processes N] [--threads N] [--json FILE.json]

The one idea: machines drift, so bare calls and calls through lem_kit are made in pairs, in random order within each pair, on
one loaded model, and only ratios within pairs are averaged. `ratio` is tokens per second through lem_kit / bare: 1 costs
nothing. Its interval is Student's, 95 %, on the logarithms. The same is given of the process's CPU time, which other work on
the machine disturbs less; `--threads 1` makes both steadier where the machine is shared. "own" is the share of that time
which lem_kit's own threads took: steadier still, but blind to what they cost the engine's thread.

Processes may differ by more than their pairs tell. With `--processes N` the whole is done in N, one after the other, and
each counts as one value, so that this would be in the interval, too.

Continuous batching is compared with bare calls of the engine's manager, and, for information, with static batches of the
same requests: other work is done there, so that one is no overhead.

Not covered: energy sources and their sampler, which cost what they cost whatever runs (`make bench-energy`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lem_kit as lem
from lem_kit import traffic
from lem_kit.backends import load_backend
from lem_kit.statistics import stdev, student_t

NEW, PROMPT = 64, 32
WARM_UPS = 3
OWN_THREADS = ("lem-loop", "lem_kit-continuous")


class Cost(NamedTuple):
    seconds: float
    cpu_s: float
    own_s: float


def own_cpu_s() -> float:
    """CPU time so far of the threads that only lem_kit needs; what generates has a thread without it, too."""
    own = [thread.ident for thread in threading.enumerate() if thread.name in OWN_THREADS]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in own if ident)


def timed(work: Callable[[], int], tokens: int) -> Cost:
    start, cpu, own = time.perf_counter(), time.process_time(), own_cpu_s()
    produced = work()
    cost = Cost(time.perf_counter() - start, time.process_time() - cpu, own_cpu_s() - own)
    assert produced == tokens, f"{produced} tokens instead of {tokens}"
    return cost


def paired(ours: Callable[[], int], bare: Callable[[], int], tokens: int, pairs: int) -> list[tuple[Cost, Cost]]:
    chance = random.Random(0)
    for _ in range(WARM_UPS):
        timed(ours, tokens), timed(bare, tokens)
    costs = []
    for _ in range(pairs):
        both = {}
        for work in chance.sample((ours, bare), 2):
            both[work] = timed(work, tokens)
        costs.append((both[ours], both[bare]))
    return costs


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean, and the ends of its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = sum(logs) / len(logs)
    half = student_t(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def requests(count: int, new: int = NEW) -> list[Any]:
    return lem.prompts.synthetic(count, input_tokens=PROMPT, output_tokens=new, seed=count)


def through_lem_kit(backend: Any, asked: list[Any], arrivals: Any) -> Callable[[], int]:
    def work() -> int:
        done = traffic.run_blocking(traffic.send(backend, asked, arrivals))
        return sum(completion.output_tokens for completion in done)

    return work


def bare_generate(model: Any, asked: list[Any]) -> Callable[[], int]:
    ids = [list(request.prompt_token_ids) for request in asked]

    def work() -> int:
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), PROMPT, dtype=torch.long)}
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        out = model.generate(**tensors, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return out[:, PROMPT:].numel()

    return work


def bare_manager(model: Any, batching: dict[str, Any], asked: list[Any]) -> tuple[Any, Callable[[], int]]:
    """A manager of its own on the same model, and one burst through it."""
    import transformers

    config = transformers.ContinuousBatchingConfig(**batching)
    manager = model.init_continuous_batching(model.generation_config, config)
    manager.warmup()
    manager.start()
    names = itertools.count()

    def work() -> int:
        for request in asked:
            ids, name = list(request.prompt_token_ids), f"bare-{next(names)}"
            manager.add_request(ids, request_id=name, max_new_tokens=request.max_new_tokens, eos_token_id=-1)
        return sum(len(manager.get_result(timeout=60).generated_tokens) for _ in asked)

    return manager, work


def row(name: str, tokens: int, costs: list[tuple[Cost, Cost]]) -> dict[str, Any]:
    rate, cpu = interval([b.seconds / a.seconds for a, b in costs]), interval([b.cpu_s / a.cpu_s for a, b in costs])
    bare_s = sorted(b.seconds for _, b in costs)[len(costs) // 2]
    own = sum(a.own_s for a, _ in costs) / sum(a.cpu_s for a, _ in costs)
    return shown(
        {
            "name": name,
            "bare_tokens_per_s": tokens / bare_s,
            "ratio": rate,
            "cpu_ratio": cpu,
            "own_share": own,
            "pairs": len(costs),
        }
    )


def shown(found: dict[str, Any]) -> dict[str, Any]:
    rate, cpu = found["ratio"], found["cpu_ratio"]
    print(
        f"{found['name']:<42} {found['bare_tokens_per_s']:9.0f} tokens/s bare;"
        f"  ratio {rate[0]:.4f} [{rate[1]:.4f}, {rate[2]:.4f}];"
        f"  of CPU time {cpu[0]:.4f} [{cpu[1]:.4f}, {cpu[2]:.4f}];  own {100 * found['own_share']:.2f} %",
        flush=True,
    )
    return found


def in_processes(count: int, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of `count` processes as one: each process counts as one value, so their spread is in the interval."""
    each = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        for _ in range(count):
            subprocess.run([sys.executable, __file__, *arguments, "--processes", "1", "--json", str(out)], check=True)
            each.append(json.loads(out.read_text()))
    print(f"\nmeans of {count} processes:")
    return [
        shown(
            {
                "name": rows[0]["name"],
                "bare_tokens_per_s": sorted(row["bare_tokens_per_s"] for row in rows)[count // 2],
                "ratio": interval([row["ratio"][0] for row in rows]),
                "cpu_ratio": interval([row["cpu_ratio"][0] for row in rows]),
                "own_share": sum(row["own_share"] for row in rows) / count,
                "pairs": rows[0]["pairs"],
                "processes": [row["ratio"] for row in rows],
            }
        )
        for rows in zip(*each, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1, help="in which all of it is done, one after the other")
    parser.add_argument("--static", action="store_true", help="static batches only")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice unless given")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = in_processes(options.processes, sys.argv[1:]) if options.processes > 1 else measured(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.threads:
        torch.set_num_threads(options.threads)
    static = load_backend("transformers", options.model)
    model: Any = static._model  # type: ignore[attr-defined]
    rows = []
    for size in random.sample((1, 8), 2):
        asked = requests(size)
        ours = through_lem_kit(static, asked, lem.traffic.batches(size))
        costs = paired(ours, bare_generate(model, asked), size * NEW, options.pairs)
        rows.append(row(f"static batch of {size} / model.generate", size * NEW, costs))
    rows.sort(key=lambda row: str(row["name"]))
    if options.static:
        static.close()
        return rows

    # Lengths that differ are what continuous batching is for; the engine's defaults, but a cache that suits the work.
    batching = {"num_blocks": 64, "max_batch_tokens": 512}
    continuous: Any = load_backend("transformers", options.model, continuous_batching=batching)
    asked = [request for i in range(16) for request in requests(1, new=16 + 8 * (i % 4))]
    tokens = sum(request.max_new_tokens for request in asked)
    same = {**batching, "allow_block_sharing": False, "auto_switch_to_flash": False}
    manager, work = bare_manager(continuous._model, same, asked)
    ours = through_lem_kit(continuous, asked, lem.traffic.burst())
    rows.append(row("continuous batching / bare manager", tokens, paired(ours, work, tokens, options.pairs)))
    manager.stop(hard_stop=True)

    in_order = sorted(asked, key=lambda request: request.max_new_tokens)  # a static batch shares its length
    batches = through_lem_kit(static, in_order, lem.traffic.batches(4))
    costs = paired(ours, batches, tokens, max(options.pairs // 4, 5))
    rows.append(row("continuous batching / static batches of 4", tokens, costs))
    continuous.close()
    static.close()
    return rows


if __name__ == "__main__":
    main()
