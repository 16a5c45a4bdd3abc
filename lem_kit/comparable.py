"""Whether two measurements may be compared, and what stands against it.

The one idea: a ratio answers a question only where all but one thing was alike. What was not is found from the two records
and named; some of it forbids any comparison, some of it that of energies, and the rest is told beside the figures.

Not covered: the ratios themselves (`comparison`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from . import totals
from .measurement import Completion, Measurement

Forbids = Literal["all", "energy", "nothing"]

# What two records can differ in, and what that forbids. Codes are stable: `compare(..., allow=[code])` takes them, but for
# those of `NEVER`.
DIFFERENCES: Mapping[str, tuple[Forbids, str]] = {
    "other_kind": ("all", "they are not of one kind: a run of requests, a window of code, a time of doing nothing"),
    "failed": ("all", "a measurement that failed or was interrupted"),
    "other_prompts": ("all", "they were not given the same prompts"),
    "other_prompt_ids": ("all", "their engines made other tokens of the same texts"),
    "prompts_half_known": (
        "all",
        "the prompts of the one are known and those of the other are not, so nothing shows that they were the same",
    ),
    "other_scopes": ("energy", "their energies cover different things"),
    "other_method": ("energy", "the one energy is measured and the other modelled"),
    "no_energy": ("energy", "an energy is not known"),
    "other_output_lengths": (
        "nothing",
        "requests were not answered at the same length, so their energy per output token is that of other work",
    ),
    "not_valid": ("nothing", "a measurement is not valid"),
    "requests_failed": ("nothing", "requests failed"),
    "other_model": ("nothing", "they ran other models, and a token of the one is not a token of the other"),
    "other_gpu": ("nothing", "they ran on other GPUs, whose sensors are off by a gain of their own: it is in the interval"),
    "other_machine": ("nothing", "they ran on other machines"),
    "other_power_limit": ("nothing", "the GPUs' power limits differ"),
    "other_arrivals": ("nothing", "requests arrived by another plan"),
    "other_timing": ("nothing", "the one engine stamps its tokens itself, those of the other are stamped where they arrive"),
    "modelled": ("nothing", "both energies are modelled, so their ratio is the model's"),
    "input_unknown": ("nothing", "the records do not say what was worked on, so nothing shows that both did the same"),
}

# What was cut off has no figure of what was asked for: its energy is that of as much as was done.
NEVER = ("failed",)

# What a record keeps of its plan (`traffic.plan`).
PLAN = (
    "arrivals", "size", "token_budget", "concurrency", "rate_per_s", "burstiness", "normalize", "start_per_s", "end_per_s",
    "over_s", "shape", "trace", "format", "time_scale", "think_s", "schedule_s", "schedule_sha256",
)  # fmt: skip


class Difference(NamedTuple):
    """A code of `DIFFERENCES`, what it forbids, and a sentence. Measurements are called by side and place, as "B 2"."""

    code: str
    forbids: Forbids
    told: str


def differences(a: Sequence[Measurement], b: Sequence[Measurement], names: tuple[str, str] = ("A", "B")) -> list[Difference]:
    """What stands against comparing these measurements with those, what forbids most first. Empty: nothing known does."""
    found: dict[str, str] = {}
    runs, called = [*a, *b], [*call(names[0], a), *call(names[1], b)]
    if len({m.kind for m in runs}) > 1:
        found["other_kind"] = ", ".join(sorted({m.kind for m in runs}))
    if broken := [name for name, m in zip(called, runs) if m.status != "ok"]:
        found["failed"] = some(broken)
    for key, code in (("prompts_sha256", "other_prompts"), ("prompt_ids_sha256", "other_prompt_ids")):
        if any(key in x.config and key in y.config and x.config[key] != y.config[key] for x, y in zip(a, b)):
            found[code] = ""
    if [*map(_model, a)] != [*map(_model, b)]:  # whose tokens differ by right
        found.pop("other_prompt_ids", None)
    unknown = [["prompts_sha256" not in m.config and m.kind != "idle" for m in pair] for pair in zip(a, b)]
    if any(x != y for x, y in unknown):
        found["prompts_half_known"] = some(name for name, m in zip(called, runs) if "prompts_sha256" not in m.config)
    if any(x and y for x, y in unknown):
        found["input_unknown"] = ""
    found |= _of_energy(runs, called)
    if apart := [places for x, y in zip(a, b) if (places := other_lengths(x, y))]:
        found["other_output_lengths"] = f"{max(map(len, apart))} of {max(len(first_repeat(m)) for m in runs)} requests"
    invalid: dict[str, list[str]] = {}
    for name, m in zip(called, runs):
        for code in totals.verdict(m):
            invalid.setdefault(code, []).append(name)
    if invalid:
        found["not_valid"] = "; ".join(f"{code}: {some(those)}" for code, those in invalid.items())
    if failures := sum(c.error is not None for m in runs for c in m.completions):
        found["requests_failed"] = f"{failures} of {sum(len(m.completions) for m in runs)}"
    for code, asked in (
        ("other_model", _model),
        ("other_gpu", _gpus),
        ("other_machine", _machine),
        ("other_power_limit", _limits),
        ("other_arrivals", _plan),
        ("other_timing", _timing),
    ):
        if pair := next((pair for pair in zip(a, b) if asked(pair[0]) != asked(pair[1])), None):
            told = [_short(asked(m)) for m in pair]
            found[code] = " / ".join(told) if told[0] != told[1] else ""
    order = list(DIFFERENCES)
    return [
        Difference(code, DIFFERENCES[code][0], DIFFERENCES[code][1] + (f" ({more})" if more else ""))
        for code, more in sorted(found.items(), key=lambda item: order.index(item[0]))
    ]


def call(name: str, side: Sequence[Measurement]) -> list[str]:
    """What the measurements of a side are called: by its name, and their places where there are several."""
    return [f"{name} {place}" for place in range(1, len(side) + 1)] if len(side) > 1 else [name]


def some(called: Iterable[str]) -> str:
    """The first few of these names, and how many more there are."""
    names = list(called)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_energy(runs: Sequence[Measurement], called: Sequence[str]) -> dict[str, str]:
    known = [totals.energy_j(m) for m in runs]
    if unknown := [name for name, total in zip(called, known) if total is None]:
        return {"no_energy": some(unknown) if len(unknown) < len(runs) else ""}
    # Of every run, pairs and sides alike: a mean over pairs of which some cover more is that of nothing.
    scopes = dict.fromkeys(", ".join(total.scopes) for total in known if total)
    methods = {total.method == "model" for total in known if total}
    found = {}
    if len(scopes) > 1:
        found["other_scopes"] = " / ".join(scopes)
    if len(methods) > 1:
        found["other_method"] = ""
    elif True in methods:
        found["modelled"] = ""
    return found


def other_lengths(a: Measurement, b: Measurement) -> list[int]:
    """The places of the requests at which the two did not give as many output tokens, in a repeat that both have."""
    rows = zip_longest(lengths(a), lengths(b), fillvalue=())
    return [i for i, (x, y) in enumerate(rows) if not x or not y or any(m != n for m, n in zip(x, y))]


def lengths(m: Measurement) -> list[tuple[int, ...]]:
    """The output tokens of each request, in the order of the prompts, one for each repeat."""
    count = len(first_repeat(m))
    return [tuple(c.output_tokens for c in m.completions[i::count]) for i in range(count)]


def first_repeat(m: Measurement) -> list[Completion]:
    """The requests of the first repeat, in the order of the prompts."""
    return [c for c in m.completions if c.repeat == m.completions[0].repeat] if m.completions else []


def gain_error(m: Measurement) -> float:
    """How far the sensors behind the total may be off alike in every run on this board, as a share."""
    total = totals.energy_j(m)
    used = {key.partition(":")[0].removesuffix("_power") for key in total.keys} if total else set()
    return max((facts.get("gain_error") or 0.0 for name, facts in m.sources.items() if name in used), default=0.0)


def boards(m: Measurement) -> list[Any]:
    """Which GPUs were read, by their own ids."""
    return [gpu.get("uuid") for gpu in _each(m)]


def _each(m: Measurement) -> list[Mapping[str, Any]]:
    """What is known of each GPU that was read, in an order of their own: their numbers are another process's choice."""
    found = [gpu for facts in m.sources.values() for gpu in (facts.get("gpus") or {}).values()]
    return sorted(found, key=lambda gpu: str(gpu.get("uuid")))


def _gpus(m: Measurement) -> list[Any]:
    return [f"{gpu.get('name')} {gpu.get('uuid')}" for gpu in _each(m)]


def _model(m: Measurement) -> str:
    return str(((m.backend or {}).get("model") or {}).get("name"))


def _limits(m: Measurement) -> list[Any]:
    return [gpu.get("power_limit_w") for gpu in _each(m)]


def _machine(m: Measurement) -> Any:
    return m.environment.get("cpu") or m.environment.get("machine")


def _plan(m: Measurement) -> Any:
    return {name: m.config[name] for name in PLAN if name in m.config}


def _timing(m: Measurement) -> list[str]:
    return sorted({c.timing_source for c in m.completions})


def _short(value: Any) -> str:
    if isinstance(value, Mapping):  # a schedule is too long to be told
        return " ".join(f"{v}" for name, v in value.items() if not name.startswith("schedule")) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
