"""The nouns: what was asked (Request), what came back (TokenEvent, Completion), what it cost (Energy), and the one record
that is saved (Measurement).

Everything here is frozen and raw. A number that can be computed from these fields is computed by `metrics`, on load, and
is never stored in its place. All instants are nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns`), which one host shares
among its processes; only `started_at` is wall clock. What was not observed is None, never 0.

Not covered here: how energy is found between two instants (`trace`), files (`store`), display (`jupyter.card`).
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .trace import Trace

# History of the record's schema. A reader accepts its own version and those listed as readable below it.
#   1  first version
#   2  calls are timed, failures have a code, periods of counters, baselines, the meter's own share
#   3  the engine's own instants of a request and its preemptions; what the engine counted. 2 can be read
#   4  completions of a repeat that was broken off. 2 and 3 can be read
#   5  when counters were updated, as the sampler knew it; when requests were preempted. 2 to 4 can be read
SCHEMA_VERSION = 5

Method = Literal["counter", "integral", "model"]
Kind = Literal["window", "idle", "run"]
Status = Literal["ok", "failed", "interrupted"]

# Why a figure is absent or doubtful. Codes are stable: they are stored in records. `docs/method.md` shows this table.
REASONS: Mapping[str, str] = {
    "no_source": "no energy source could be opened; `lem doctor`, or `%lem_status` in a notebook, says why",
    "source_starting": "the source was still starting when the window opened; measure again",
    "source_failed": "the source stopped answering before the window was over",
    "gpu_lost": "the GPU fell off the bus; what it used since its last reading is not known",
    "no_permission": "this process may not read the source; `lem doctor` says what opens it",
    "no_reading": "the source gave no reading on both sides of the window",
    "not_advancing": "the counter was never seen to advance, so it may not be counting at all",
    "too_short": "the window is too short for this source to see any energy in it",
    "unresolved": "the interval is wider than the figure: the window is too short for this source; make it longer",
    "counter_went_back": "the counter went backwards inside the window (reset, driver reload, wrap)",
    "counter_stuck": "the counter stood still inside the window for more than five of its periods",
    "implausible": "the readings claim more power than the device can draw",
    "sources_disagree": "counter and integrated power of one device differ by more than both intervals allow",
    "mig_parent_scope": "power is only known for the whole board: the figure holds its other MIG instances, too",
    "other_gpu_in_use": "CUDA in this process uses a GPU that is not among those read",
    "foreign_process": "another process works on this GPU: its energy is in the figure",
    "host_shared": "other processes kept the CPU busy: their energy is in the figure",
    "throttled": "the GPU lowered its clocks for heat or a hardware limit",
    "power_capped": "the GPU ran at its power limit for more than half of the window",
    "thermal_drift": "the temperature moved by more than 3 C from the first to the last quarter of the window",
    "clock_jump": "the wall clock was set during the window; time stamps of power samples may be off",
    "baseline_stale": "the idle baseline was measured on another device or another day",
    "baseline_temperature": "the idle baseline was measured at a temperature that differs by more than 10 C",
    "baseline_unsteady": "the idle baseline is not known to better than 10 %",
    "warmup_not_settled": "the warm-up reached its cap before latency, power and temperature had settled",
    "latency_scatters": "step latency scattered by more than 5 % in the warm-up and went nowhere: the host is not steady",
    "sampling_gap": "readings are missing inside the window for longer than ten sampling intervals",
    "edge_extrapolated": "no counter update was seen after the window; its last part is extrapolated at the last power",
    "shorter_than_refresh": "the window is shorter than the counter's refresh period, so its energy is mostly interpolated",
    "modelled": "a model of the hardware, not a measurement; its error is not known on this machine",
    "replayed": "played back from a recording; it says nothing about this machine",
    "simulated": "computed from the power that the user chose; it says nothing about this machine",
    "failed": "the measured code raised an exception",
    "interrupted": "the measured code was interrupted",
    "requests_failed": "some requests did not complete",
    "few_requests": "fewer than 30 requests: percentiles and means of latency are weak",
    "dispatch_late": "requests were handed over late: the 99th percentile of the lag exceeds a tenth of the median TTFT",
    "phases_mixed": "prefill and decode were at work at the same instants for too much of the energy to be told apart",
    "phase_too_short": "the phase is too short for this source: its error exceeds half of its energy; repeat it more often",
    "interval_not_reached": "repeating ended with an interval that is wider than was asked for, or not known",
    "tokens_unknown": "the number of output tokens could not be evaluated",
}


@dataclass(frozen=True)
class Request:
    """One prompt and how much to generate from it.

    Exactly one of `prompt` (text, tokenised by the engine) and `prompt_token_ids` (any sequence of ids; kept as a tuple of
    int) is given. `max_new_tokens` bounds the
    output; with `fixed_length` the engine is told to ignore end-of-sequence so that exactly that many come out.
    `options` go to the engine's sampling call untouched. A prompt that goes on from others is turn number `turn`, from 0,
    of `conversation`; the prompt holds all that was said before (`traffic.turns` sends such).
    """

    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    max_new_tokens: int = 64
    fixed_length: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    conversation: str | None = None
    turn: int | None = None

    def __post_init__(self) -> None:
        from .errors import LemError

        if (self.prompt is None) == (self.prompt_token_ids is None):
            raise LemError("A Request takes either prompt= (text) or prompt_token_ids= (a sequence of ids), one of the two.")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise LemError(f"A Request's prompt= is a text: got {self.prompt!r}.")
        if self.prompt_token_ids is not None:
            try:
                ids = tuple(operator.index(i) for i in self.prompt_token_ids)
            except TypeError:
                raise LemError("A Request's prompt_token_ids= is a sequence of whole numbers, and not of batches.") from None
            if min(ids, default=0) < 0:
                raise LemError(f"A Request's prompt_token_ids= cannot be negative: got {min(ids)}.")
            object.__setattr__(self, "prompt_token_ids", ids)
        if not (self.prompt or self.prompt_token_ids):
            raise LemError("A Request needs a prompt of at least one token: this one is empty.")
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise LemError(f"max_new_tokens= is a whole number of tokens: got {self.max_new_tokens!r}.")
        if self.max_new_tokens < 1:
            raise LemError(f"A Request must generate at least one token: max_new_tokens={self.max_new_tokens}.")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """`n_tokens` output tokens of request `index` became available at `t_ns`.

    Stamps itself on creation, in whatever thread that happens, unless the engine or its device has a clock of its own: then
    `t_ns` is passed, told on this host's clock, with `timing_source="engine"`. `index` counts within the sequence given to
    one `Backend.generate` call. The first event of a request may carry `prompt_tokens` (and `cached_tokens`), its last one
    `finish_reason`. An engine that tells when it took a request into its queue and when it first gave it a place in its
    batch passes `queued_ns` and `scheduled_ns`; `preemptions` is how often it took that place away again, and
    `preempted_ns` from when until when it was without one, both with the last event.
    `n_tokens` may be 0 for an event that only carries such facts.
    """

    index: int
    n_tokens: int
    t_ns: int = field(default_factory=time.monotonic_ns)
    timing_source: Literal["engine", "client"] = "client"
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    queued_ns: int | None = None
    scheduled_ns: int | None = None
    preemptions: int | None = None
    preempted_ns: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """What happened to one request. `events` are its (t_ns, n_tokens) in order; n_tokens > 0 in each.

    `sched_ns` is when the arrival plan wanted it sent, `dispatch_ns` when it was handed to the engine, `done_ns` when the
    engine had nothing more for it. `queued_ns`, `scheduled_ns`, `preemptions` and `preempted_ns`, each time without a place
    in the batch as (from, to), are the engine's own (`TokenEvent`), None where it does not tell. `error` is a sentence, and
    then the completion is a miss in every metric that counts.
    """

    sched_ns: int
    dispatch_ns: int
    done_ns: int
    events: tuple[tuple[int, int], ...]
    prompt_tokens: int | None
    timing_source: Literal["engine", "client"] = "client"
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    repeat: int = 0
    queued_ns: int | None = None
    scheduled_ns: int | None = None
    preemptions: int | None = None
    preempted_ns: tuple[tuple[int, int], ...] | None = None

    @property
    def prefill_ns(self) -> int:
        """When prefill began, as far as is known: when the engine scheduled the request, else when it was handed over."""
        return self.dispatch_ns if self.scheduled_ns is None else self.scheduled_ns

    @functools.cached_property
    def output_tokens(self) -> int:
        """Output tokens observed, counted from the events."""
        return sum(n for _, n in self.events)


@dataclass(frozen=True)
class Energy:
    """Energy of one window as one source saw one domain.

    `joules` is None when it is unknown, and `reasons` then says why; it is never 0.0 for "unknown". `uncertainty_j` is the
    half-width of a 95 % interval (see `trace.energy_between` for what it covers), None when `joules` is None.
    `method`: "counter" (hardware counter), "integral" (of sampled power), "model" (computed from assumptions).
    `scope` is what the figure includes ("gpu", "cpu", "dram", "module", ...): only figures of different scopes add up.
    """

    source: str
    domain: str
    method: Method
    scope: str
    joules: float | None
    uncertainty_j: float | None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.joules is None and not self.reasons:
            raise ValueError(f"{self.key}: an unknown energy needs a reason")
        if (self.joules is None) != (self.uncertainty_j is None):
            raise ValueError(f"{self.key}: joules and uncertainty_j are known together or not at all")
        if self.joules is not None and not (math.isfinite(self.joules) and self.joules > 0.0):
            raise ValueError(f"{self.key}: {self.joules} is no energy that hardware uses; unknown is None")
        if self.uncertainty_j is not None and not (math.isfinite(self.uncertainty_j) and self.uncertainty_j >= 0.0):
            raise ValueError(f"{self.key}: {self.uncertainty_j} is not the half-width of an interval")

    @property
    def key(self) -> str:
        return f"{self.source}:{self.domain}"


def both_figures(energy: Mapping[str, Energy]) -> Iterator[tuple[Energy, Energy, float, float]]:
    """Counter and integral of power of each device that knows both, and their joules. A source names its integrals
    "<its name>_power"."""
    for integral in energy.values():
        counter = energy.get(f"{integral.source.removesuffix('_power')}:{integral.domain}")
        if integral.method != "integral" or counter is None or counter is integral:
            continue
        if integral.joules is not None and counter.joules is not None:
            yield counter, integral, counter.joules, integral.joules


@dataclass(frozen=True)
class Repeat:
    """One repetition inside a Measurement: its own window, energy and token count."""

    t0_ns: int
    t1_ns: int
    energy: Mapping[str, Energy]
    output_tokens: int | None = None

    @property
    def duration_s(self) -> float:
        return (self.t1_ns - self.t0_ns) / 1e9


@dataclass(frozen=True)
class Measurement:
    """One measurement window and all that was seen in it. The only thing lem_kit saves.

    `energy` is keyed "source:domain" and covers the whole window, gaps between `repeats` included; figures per repeat come
    from `repeats`. `sources` says what each opened source is; `unavailable` maps every source that did not open to its
    reason. `config` is what the user asked for, `backend` what the engine says it runs (None outside `Session.run`).
    `counters` is what the engine counted in the window (`backends.COUNTERS`).
    `completions` are those of the repeats, or, where none ended, all that the window saw; `broken_off` are those of a repeat
    that did not end while others had. What was handed over and did not end has the error "interrupted".
    `warmup` keeps the completions of the warm-up, whose `repeat` is -1. `loop_lag_s` is the longest that the loop that sends
    requests was seen held up. `reasons` are codes of `REASONS` that touch the whole record. `baselines` holds the idle
    baselines of the session by kind (`baseline.of`), `meter` what reading cost: "call_share" and "cpu_share" of the window.
    """

    run_id: str
    kind: Kind
    label: str
    status: Status
    started_at: str
    t0_ns: int
    t1_ns: int
    energy: Mapping[str, Energy]
    repeats: tuple[Repeat, ...] = ()
    completions: tuple[Completion, ...] = ()
    warmup: tuple[Completion, ...] = ()
    broken_off: tuple[Completion, ...] = ()
    output_tokens: int | None = None
    loop_lag_s: float | None = None
    error: Mapping[str, str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    backend: Mapping[str, Any] | None = None
    counters: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, Any] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    baselines: Mapping[str, Any] = field(default_factory=dict)
    meter: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None
    schema_version: int = SCHEMA_VERSION
    trace: Trace = field(default_factory=Trace, repr=False)

    @property
    def duration_s(self) -> float:
        """Length of the window in seconds."""
        return (self.t1_ns - self.t0_ns) / 1e9

    @property
    def valid(self) -> bool:
        """Whether the total energy is known and no reason code speaks against it; `metrics.verdict` names those that do."""
        from .metrics import verdict

        return not verdict(self)

    def plot(self, title: str | None = None) -> Any:
        """A plotly figure of power over time with phases, temperatures and a lane for each request (`timeline`)."""
        from .timeline import plot

        return plot(self, title)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        from .jupyter.card import mimebundle

        return mimebundle(self)


def jsonable(value: Any) -> Any:
    """`value` as strict JSON has it: tuples become lists, scalars of NumPy and torch become numbers, and what JSON lacks
    (NaN, dtypes, paths) becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if getattr(value, "shape", None) == () and isinstance(plain := value.item(), (bool, int, float, str)):
        return jsonable(plain)
    return str(value)
