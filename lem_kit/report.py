"""Stored runs as tables: what `notebooks/report.ipynb` shows, and what a notebook of your own may use.

The one idea: a modelled figure says so wherever it appears, and an unknown one is a dash and never a zero. Not covered:
figures (`plots`, `timeline`), files (`store`, `export`), the numbers themselves (`metrics`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import flops, metrics
from .measurement import REASONS, Measurement

if TYPE_CHECKING:
    import pandas as pd

ABSENT = "–"


def names(runs: Sequence[Measurement]) -> list[str]:
    """A short name for each run: the settings in which they differ, or else the label; made unique by the run_id. A setting
    that is a mapping, as "engine_args" is, gives one for each plain value in it: "engine_args.max_num_seqs"."""
    facts = [
        {"model": ((m.backend or {}).get("model") or {}).get("name"), "backend": (m.backend or {}).get("engine"), **m.config}
        for m in runs
    ]
    plain = [
        {k: v for k, v in _flat(f).items() if isinstance(v, str | int | float) and not k.endswith("_sha256")} for f in facts
    ]
    differing = [k for k in dict.fromkeys(k for f in plain for k in f) if len({f.get(k) for f in plain}) > 1]
    if "batch_size" in differing and "size" in differing:  # the notebook's word and the arrival plan's for the same thing
        differing.remove("size")
    found = [", ".join(f"{k}={_short(f[k])}" for k in differing if k in f) or m.label for f, m in zip(plain, runs)]
    count = Counter(found)
    return [name if count[name] == 1 else f"{name} ({m.run_id})" for name, m in zip(found, runs)]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the entries of mappings in their place, one level deep."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """One readable row per run, units in the column names. Numbers are text here; `lem_kit.frame` has them as numbers."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        per_token, power = metrics.j_per_output_token(m), metrics.mean_power_w(m)
        rows.append(
            {
                "run": name,
                "status": m.status,
                "J per output token": ABSENT if per_token is None else per_token.told(""),
                "method": ABSENT if per_token is None else per_token.method,
                "covers": ABSENT if per_token is None else ", ".join(per_token.scopes),
                "mean power, W": ABSENT if power is None else power.told(""),
                "TTFT median, ms": _ms(m, metrics.ttft_s),
                "TPOT median, ms": _ms(m, metrics.tpot_s),
                "output tokens/s": _number(metrics.output_tokens_per_s(m)),
                "output tokens": _number(metrics.output_tokens(m)),
            }
        )
    return pd.DataFrame(rows)


def _ms(m: Measurement, metric: Any) -> str:
    middle = metrics.percentile(metrics.values(m, metric), 50)
    return _number(None if middle is None else middle * 1e3)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def latency_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """One row per run and latency, in ms: mean and percentiles, each percentile with its 95 % interval over requests where
    there are enough of them. One that is withheld is a dash."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        for title, metric in LATENCIES.items():
            samples = metrics.values(m, metric)
            if samples:
                cells = {_title(q): _percentile(m, metric, samples, q) for q in metrics.PERCENTILES}
                rows.append({"run": name, "latency, ms": title, "mean": _scaled(metrics.mean(samples), 1e3), **cells})
    return pd.DataFrame(rows)


# Latencies of the table, by the names that people know.
LATENCIES = {
    "TTFT": metrics.ttft_s,
    "TPOT": metrics.tpot_s,
    "inter-token": metrics.itl_s,
    "end to end": metrics.e2e_s,
}


def _title(q: int) -> str:
    return "median" if q == 50 else f"p{q}"


def _percentile(m: Measurement, metric: Any, samples: Sequence[float], q: int) -> str:
    value = metrics.percentile(samples, q)
    if value is None:
        return ABSENT
    # Many gaps take long to draw from again; a fifth of the rounds moves the ends little.
    interval = metrics.percentile_interval(m, metric, q, rounds=1000 if metric is not metrics.itl_s else 200)
    return _scaled(value, 1e3) + (f" [{_scaled(interval[0], 1e3)}, {_scaled(interval[1], 1e3)}]" if interval else "")


def hardware_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """What each run got out of the hardware: FLOP/s and bytes/s beside the ceilings that they are shares of, and memory."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        found, counters = flops.summary(m), m.counters
        rows.append(
            {
                "run": name,
                "precision": metrics.precision(m) or ABSENT,
                "TFLOP/s": _scaled(found["flop_per_s"], 1e-12),
                "FLOPs from": found["flop_method"] or ABSENT,
                "peak TFLOP/s": _scaled(found["peak_flop_per_s"], 1e-12),
                "MFU, %": _scaled(found["mfu"], 100),
                "decode GB/s": _scaled(found["decode_bytes_per_s"], 1e-9),
                "peak GB/s": _scaled(found["peak_bytes_per_s"], 1e-9),
                "bandwidth, %": _scaled(found["bandwidth_share"], 100),
                "peaks from": found["peak_source"] or ABSENT,
                "weights, GB": _scaled(found["weight_bytes"], 1e-9),
                "peak memory, GB": _scaled(counters.get("peak_memory_bytes"), 1e-9),
                "KV cache used, %": _scaled(counters.get("kv_cache_used_max"), 100),
                "running batch": _number(counters.get("batch_requests_mean")),
            }
        )
    return pd.DataFrame(rows)


def _scaled(value: float | None, factor: float) -> str:
    return _number(None if value is None else value * factor)


def energy_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """Every source and domain of every run: energy, how it was found, what it covers, why it is absent or doubtful."""
    import pandas as pd

    rows = []
    for name, m in zip(names(runs), runs):
        for key, e in m.energy.items():
            known = e.joules is not None
            rows.append(
                {
                    "run": name,
                    "source": key,
                    "energy, J": metrics.quantity(e.joules, e.uncertainty_j, "") if e.joules is not None else ABSENT,
                    "method": metrics.METHODS[e.method] if known else ABSENT,
                    "covers": e.scope,
                    "reasons": ", ".join(e.reasons) or ABSENT,
                }
            )
    for source, reason in {pair: None for m in runs for pair in m.unavailable.items()}:
        missing = [name for name, m in zip(names(runs), runs) if m.unavailable.get(source) == reason]
        who = "every run" if len(missing) == len(runs) else ", ".join(missing)
        rows.append(
            {"run": who, "source": source} | dict.fromkeys(("energy, J", "method", "covers"), ABSENT) | {"reasons": reason}
        )
    return pd.DataFrame(rows)


def reasons_table(runs: Sequence[Measurement]) -> pd.DataFrame:
    """The reason codes that occur, and what they mean."""
    import pandas as pd

    codes = dict.fromkeys(code for m in runs for code in metrics.reasons(m))
    return pd.DataFrame([{"code": code, "meaning": REASONS.get(code, ABSENT)} for code in codes])


def as_html(rows: pd.DataFrame) -> Any:
    """A table to display whole and without row numbers, to be read from the left; every text is escaped."""
    import pandas as pd
    from IPython.display import HTML

    with pd.option_context("display.max_colwidth", None):
        table = rows.to_html(index=False, justify="left", border=0).replace(" ± ", "\u00a0±\u00a0")
    return HTML(re.sub("<(t[hd])>", r'<\1 style="text-align: left">', table))  # Jupyter aligns them to the right
