"""What a run was doing when, and the course of its energy inside the pieces that the meter resolves.

The one idea: a meter gives the energy of pieces of 20 to 100 ms, but the instants at which prefill and decode begin and end
are known far better. The power of each state is fitted to all pieces; a piece that holds several states is divided in
proportion to those powers. What the meter counted in a piece is kept.

    states   nothing (no request at work), prefill, decode, mixed (both, or a request that gave no event), before and after
    fit      C_j = sum_s P_s * t_js + noise       C_j: energy of piece j; t_js: how long state s lasted in it
             least squares, with a weak prior: every power is the mean power, give or take the highest of any piece
    shaped   E_js = C_j * P_s * t_js / sum_s (P_s * t_js)

Straight interpolation would give a short prefill the power of the decode beside it, every time alike, so that no number of
repeats averages that out. What is left here, the noise of the pieces and of the fit, does average.

Not covered: power that changes within a state, beyond what it adds to the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import polyline
from .measurement import Completion, Measurement
from .polyline import Polyline
from .statistics import student_t

NOTHING, PREFILL, DECODE, MIXED, BEFORE, AFTER = range(6)
BESIDE = 4  # pieces before and after the window that tell what was there


class States(NamedTuple):
    """Arrays: state `code[i]` holds from `t_ns[i]` until the next. `prefill_share[i]` is the part that prefill has in the
    tokens/s then at work, of mixed states only."""

    t_ns: Any
    code: Any
    prefill_share: Any


class Shaped(NamedTuple):
    """A course of energy with a point more wherever the state changes, and how well it is known.

    `pieces` are the instants between which the meter resolves energy, `seconds` how long each state (column) lasted in each
    piece (row). `power_w` and `covariance` are those of the states, `noise_j` is what a piece misses of the fit, `t` times a
    standard error is a half-width.
    """

    line: Polyline
    pieces: Any
    seconds: Any
    power_w: Any
    covariance: Any
    noise_j: float
    t: float

    @property
    def several(self) -> Any:
        """Which pieces hold more than one state."""
        return (self.seconds > 0).sum(axis=1) > 1

    @property
    def joules(self) -> Any:
        """What the meter counted in each piece."""
        import numpy as np

        return np.diff(np.interp(self.pieces, self.line.t_ns, self.line.joules))

    def doubt_j(self, instants_ns: Any) -> Any:
        """Half-width of the energy at each instant, J, for given energies of the pieces:

            hypot(t * noise * sqrt(f (1 - f)), (P / 10 + t * se) * f (1 - f) * T, P * shift)

        T: length of the piece, f: how far in it the instant lies, P: its mean power, se: of the powers of its states.
        """
        import numpy as np

        x = np.asarray(instants_ns) - self.line.origin_ns
        j = np.clip(np.searchsorted(self.pieces, x) - 1, 0, len(self.pieces) - 2)
        long_ns = np.diff(self.pieces)[j]
        f = np.clip((x - self.pieces[j]) / long_ns, 0.0, 1.0)
        variances = ((self.seconds > 0) * np.diag(self.covariance)).sum(axis=1) * self.several
        inside = self.joules[j] / 10 + self.t * np.sqrt(variances)[j] * long_ns * 1e-9
        shift = self.joules[j] / long_ns * self.line.shift_ns
        return np.sqrt((self.t * self.noise_j) ** 2 * f * (1 - f) + (inside * f * (1 - f)) ** 2 + shift**2)


def edges(completions: Sequence[Completion]) -> tuple[Any, Any, Any]:
    """Begin of prefill (`Completion.prefill_ns`), first event and end of work of each request (ns). A request without an
    event has the last two at its end."""
    import numpy as np

    first = [c.events[0][0] if c.events else c.done_ns for c in completions]
    last = [c.events[-1][0] if c.events and not c.error else c.done_ns for c in completions]
    begin = [c.prefill_ns for c in completions]
    return np.array(begin, dtype=np.int64), np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)


def states(completions: Sequence[Completion], t0_ns: int, t1_ns: int) -> States:
    """The state at every instant, and how the tokens/s of the two phases compare in mixed ones.

    Rates are means: the prompt's uncached tokens over its prefill, from begin to first event (`edges`), those of later
    events over first to last.
    While a prompt of unknown length is at work, requests are counted in their place. A request without an event, and one
    that failed after its last, may be in either phase: mixed, half and half.
    """
    import numpy as np

    begin, first, last = edges(completions)
    ended = np.array([c.events[-1][0] if c.events else c.prefill_ns for c in completions], dtype=np.int64)
    silent = np.array([not c.events for c in completions], dtype=bool)
    prompt = np.array([np.nan if c.prompt_tokens is None else c.prompt_tokens - (c.cached_tokens or 0) for c in completions])
    later = np.array([sum(n for _, n in c.events[1:]) for c in completions], dtype=float)
    cuts = np.unique(np.concatenate([begin, first, last, ended, [t0_ns, t1_ns]]))

    def at_work(start: Any, end: Any, weight: Any = None) -> Any:
        i, j = np.searchsorted(cuts, start), np.searchsorted(cuts, np.maximum(end, start))
        return np.cumsum(np.bincount(i, weight, len(cuts)) - np.bincount(j, weight, len(cuts)))

    def rate(tokens: Any, start: Any, end: Any) -> Any:
        return np.divide(np.nan_to_num(np.maximum(tokens, 1.0)), end - start, out=np.zeros(len(tokens)), where=end > start)

    heard = np.where(silent, begin, first)
    unknown = at_work(ended, last)  # of requests that failed, or gave no event
    prefills, decodes = at_work(begin, heard), at_work(first, ended)
    countable = at_work(begin, heard, np.isnan(prompt).astype(float)) < 0.5
    parts = (at_work(begin, heard, rate(prompt, begin, heard)), at_work(first, ended, rate(later, first, ended)))
    parts = tuple(np.where(countable, part, count) for part, count in zip(parts, (prefills, decodes)))
    code = np.where(prefills > 0, PREFILL, np.where(decodes > 0, DECODE, NOTHING))
    code = np.where(((prefills > 0) & (decodes > 0)) | (unknown > 0), MIXED, code)
    code = np.where(cuts < t0_ns, BEFORE, np.where(cuts >= t1_ns, AFTER, code))
    whole = parts[0] + parts[1]
    prefill_share = np.divide(
        parts[0], whole, out=np.full(len(cuts), 0.5), where=(code == MIXED) & (unknown == 0) & (whole > 0)
    )
    return States(cuts, code, prefill_share)


def courses(m: Measurement, keys: Sequence[str], found: States) -> list[Shaped] | None:
    """The shaped course of each domain over the whole measurement; None where one is not known."""
    lines = [polyline.between(m.trace, key, m.t0_ns, m.t1_ns) for key in keys]
    known = [shaped(line, found, m.t0_ns, m.t1_ns) for line in lines if line is not None]
    return known if len(known) == len(lines) else None


def shaped(line: Polyline, found: States, t0_ns: int, t1_ns: int) -> Shaped:
    """The course of energy with the states' powers inside its pieces."""
    import numpy as np

    x0, x1 = t0_ns - line.origin_ns, t1_ns - line.origin_ns
    first = max(np.searchsorted(line.t_ns, x0, "right") - 1 - BESIDE, 0)
    end = np.searchsorted(line.t_ns, x1) + 1 + BESIDE
    edge, joules = line.t_ns[first:end], line.joules[first:end]
    changes = found.t_ns - line.origin_ns
    cuts = np.unique(np.concatenate([edge, changes[(changes > edge[0]) & (changes < edge[-1])]]))
    seconds = np.diff(cuts) * 1e-9
    middle = (cuts[:-1] + cuts[1:]) / 2
    piece = np.searchsorted(edge, middle) - 1
    at = np.searchsorted(changes, middle, "right") - 1
    code = np.where(at < 0, BEFORE, found.code[np.maximum(at, 0)])
    n = len(edge) - 1
    each = np.bincount(piece * 6 + code, seconds, n * 6).reshape(n, 6)
    counted = np.diff(joules)
    power_w, covariance, noise_j, t = _fit(each, counted)
    weight = np.maximum(power_w, 1e-9)[code] * seconds  # a state whose fitted power is not above 0 gets next to nothing
    part = weight / np.bincount(piece, weight, n)[piece]
    course = joules[0] + np.concatenate([[0.0], np.cumsum(counted[piece] * part)])
    return Shaped(line._replace(t_ns=cuts, joules=course), edge, each, power_w, covariance, noise_j, t)


def _fit(seconds: Any, joules: Any) -> tuple[Any, Any, float, float]:
    """Power of each state (W) with its covariance, the noise of a piece (J), Student's t."""
    import numpy as np

    there = seconds.sum(axis=0) > 0
    a = seconds[:, there]
    mean = joules.sum() / seconds.sum()
    prior = max(float((joules / seconds.sum(axis=1)).max()), mean)
    least = (0.005 * joules.mean()) ** 2
    dof = max(len(joules) - int(there.sum()), 1)
    power = np.full(a.shape[1], mean)
    for _ in range(4):
        variance = max(float(((joules - a @ power) ** 2).sum()) / dof, least)
        inner = np.linalg.inv(a.T @ a / variance + np.eye(a.shape[1]) / prior**2)
        power = inner @ (a.T @ joules / variance + mean / prior**2)
    power_w, covariance = np.zeros(6), np.zeros((6, 6))
    power_w[there] = power
    covariance[np.ix_(there, there)] = inner
    return power_w, covariance, float(variance**0.5), student_t(dof)
