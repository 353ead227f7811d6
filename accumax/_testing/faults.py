"""Which fault the coefficients show: one hypothesis after the other."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from . import leaves
from .evidence import Evidence

# Microbatches up to which each is tried if the coefficients are not determined.
MOST_TRIED = 64


class Finding(NamedTuple):
    """A name from the list of `accumax.testing.coefficients`, and sentences."""

    fault: str
    diagnosis: str


class Hypothesis(NamedTuple):
    """A fault and the coefficients, (k,) float64, that it would have."""

    fault: str
    coefficients: np.ndarray
    diagnosis: str


@dataclasses.dataclass(frozen=True)
class Context:
    """What the caller said about the window.

    Attributes:
      weights: (k,) float64.
      devices: the number over which gradients are reduced, None if unknown.
      window: the calls in a full window, None if unknown.
      alternatives: other gradients of the same microbatches, by the fault that they
        would show.
    """

    weights: np.ndarray
    devices: int | None
    window: int | None
    alternatives: Mapping[str, Evidence]


def diagnose(seen: Evidence, context: Context) -> Finding:
    """Names the fault of finite gradients."""
    rounded = leaves.half_sums(seen)
    if rounded:
        return Finding("half-precision accumulation", rounded)
    if seen.explains(seen.expected):
        return Finding("none", _none(seen))
    for name, other in context.alternatives.items():
        if other.explains(other.expected):
            left = np.max(seen.unexplained(seen.expected))
            return Finding(
                name,
                f"The gradients in alternatives[{name!r}] explain the accumulated one "
                f"with the expected coefficients; microbatch_gradients leave "
                f"{left:.3g} of it. The step computes the former: {name}.",
            )
    found = _fitting(seen, context)
    if found is not None:
        return found
    values, determined = seen.solution
    if seen.explains(values):
        if not np.all(determined):
            return _too_alike(seen, [])
        return Finding(
            "unknown",
            f"The coefficients are {_numbers(values)} instead of "
            f"{_numbers(seen.expected)} and explain all of the gradient. No fault on "
            "the list has these. Compare them with the weights that the step uses.",
        )
    return Finding(*leaves.compare(seen))


def _none(seen: Evidence) -> str:
    if not np.any(seen.norms):
        return "All gradients are 0, so every coefficient would do. Pass others."
    text = "The gradient is the weighted mean of its microbatches, to rounding."
    if not np.all(seen.solution[1]):
        text += (
            " But some microbatches are too alike, or too small, to tell their "
            "coefficients: a fault that only moves weight between them would not show."
        )
    return text


def _fitting(seen: Evidence, context: Context) -> Finding | None:
    """The hypothesis that explains all leaves, if one does, or none of several."""
    fitting = [x for x in _hypotheses(seen, context) if seen.explains(x.coefficients)]
    if not fitting:
        return None
    # A name that says more first: a factor is fitted, so it is never far off.
    fitting.sort(key=lambda x: x.fault == "wrong scale")
    names = [x.fault for x in fitting if x.fault != "wrong scale"]
    names = list(dict.fromkeys(names))
    if len(names) > 1 and not np.all(seen.solution[1]):
        return _too_alike(seen, names)
    return Finding(fitting[0].fault, fitting[0].diagnosis)


def _too_alike(seen: Evidence, names: list[str]) -> Finding:
    total = np.sum(seen.solution[0])
    could = f" Each of these would explain it: {', '.join(names)}." if names else ""
    return Finding(
        "too alike",
        f"The gradient is not the expected mean, but the microbatches are too alike, "
        f"or too small, to tell which coefficients are wrong; their sum is near "
        f"{total:.3g} instead of {np.sum(seen.expected):.3g}.{could} Use microbatches "
        "that differ more, such as random data.",
    )


def _hypotheses(seen: Evidence, context: Context) -> Iterator[Hypothesis]:
    k, uniform = len(seen.expected), np.full(len(seen.expected), 1 / len(seen.expected))
    uneven = not np.allclose(seen.expected, uniform, rtol=1e-6)
    if uneven:
        yield Hypothesis(
            "mean of means",
            uniform,
            f"Each microbatch counts {1 / k:.3g}, although their weights are "
            f"{_numbers(context.weights)}. Multiply each mean by its weight, add, and "
            "divide once by the sum of the weights.",
        )
        yield Hypothesis(
            "sum for a mean",
            np.ones(k),
            "Each microbatch counts 1: their means were added and not divided. "
            "Multiply each by its weight and divide by the sum of the weights.",
        )
    yield _scaled(seen, context, seen.expected)
    if uneven:
        yield _scaled(seen, context, uniform)
    yield from _clipped(seen)
    for base in (seen.expected, uniform) if uneven else (seen.expected,):
        yield from _tail(seen, base)
        yield from _patterns(seen, base)


def _scaled(seen: Evidence, context: Context, base: np.ndarray) -> Hypothesis:
    f = seen.factor(base)
    fault, what = _factor_name(f, len(base), context, 2 * seen.noise)
    text = f"The gradient is {f:.6g} times the mean of its microbatches. {what}"
    return Hypothesis(fault, f * base, text)


def _factor_name(f: float, k: int, context: Context, noise: float) -> tuple[str, str]:
    devices, window, weight = context.devices, context.window, np.sum(context.weights)
    rows = weight / k  # of a microbatch, if all are equal

    def near(x: float | None) -> bool:
        return x is not None and abs(f / x - 1) <= noise

    whole = f >= 1.5 and near(round(f))
    again = (
        f"As if each of {round(f)} devices had added what was reduced already: reduce "
        "once, a sum of sums over a sum of weights"
    )
    if f == 0:
        return "left out", (
            "No microbatch counts: the window did not close, or nothing was added."
        )
    if near(k) and k > 1:
        also = "" if devices not in (None, k) else f" On {k} devices, it may also be: "
        text = f"It is the sum of the {k} microbatches: divide by {k}."
        return "sum for a mean", text + (f"{also}{again.lower()}." if also else "")
    if near(weight) and weight != 1:
        return "sum for a mean", (
            f"It is the sum over all items: divide by their number, {weight:.6g}."
        )
    if devices is None and rows > 1 and near(rows):
        also = f" On {round(f)} devices, it may also be: {again.lower()}."
        return "sum for a mean", (
            f"As if each microbatch gave the sum over its {rows:.6g} rows, not their "
            f"mean: divide by the items.{also if whole else ''}"
        )
    if devices and whole and devices % round(f) == 0:
        return "reduced twice over devices", f"{again}."
    if whole and devices is None and not (f >= 256 and np.log2(round(f)) % 1 == 0):
        return "reduced twice over devices", f"{again}. Pass devices= to be sure."
    if window and near(k / window):
        return "partial window", (
            f"The {k} microbatches that were seen were divided by the {window} of a "
            f"full window: divide by {k}."
        )
    if devices and near(1 / devices):
        return "divided twice", (
            f"As if a mean over {devices} devices were divided by their number again."
        )
    if k > 1 and near(1 / k):
        return "divided twice", (
            f"As if a mean over the {k} microbatches were divided by {k} again."
        )
    if rows > 1 and near(1 / rows):
        return "divided twice", (
            f"As if a mean over the {rows:.6g} rows of a microbatch were divided by "
            "them again: with weighted=True a loss returns the sum over its items."
        )
    full = round(k / f) if 0 < f < 1 else 0
    if full > k and near(k / full) and full * noise < 0.05 and window is None:
        return "partial window", (
            f"As if a window of {full} had seen {k} microbatches and divided by "
            f"{full}: divide by what was seen. Pass window= to be sure."
        )
    return "wrong scale", (
        "A factor like this is left by a loss scale, by clipping of the whole "
        "gradient, by a learning rate or (if it is negative) by comparing an update."
    )


def _tail(seen: Evidence, base: np.ndarray) -> Iterator[Hypothesis]:
    """The last microbatch weighs more than it should, the others are right."""
    k = len(base)
    if k < 2:
        return
    values, _ = seen.solution
    head = np.append(base[:-1], 0.0)
    for f in (1.0, (1 - values[-1]) / np.sum(head)):
        if f <= 5 * seen.noise:
            continue  # then the others do not count at all
        ratio = values[-1] / (f * base[-1])
        full = abs(values[-1] / (f * base[0]) - 1) <= 5 * seen.noise
        twice = abs(ratio - 2) <= 5 * seen.noise and not full
        if ratio > 1 + 5 * seen.noise and not twice:
            as_full = ", as much as the first" if full else ""
            yield Hypothesis(
                "over-weighted tail",
                np.append(f * base[:-1], values[-1]),
                f"The last microbatch counts {ratio:.3g} times what its weight says"
                f"{as_full}; the others are right to each other. Give it the weight of "
                "the items that it has, without padding.",
            )


def _patterns(seen: Evidence, base: np.ndarray) -> Iterator[Hypothesis]:
    """Microbatches that count 0 or 2 times; the sum of the others may be rescaled."""
    k = len(base)
    if k < 2:
        return
    values, determined = seen.solution
    ratio = values / np.maximum(base, 1e-300)
    masks = []
    if not np.all(determined) and k <= MOST_TRIED:  # then try what the values hide
        each = np.eye(k, dtype=int)
        masks = [*(1 - each), *(1 + each)]
        masks += [np.where(np.arange(k) >= i, 0, 1) for i in range(k - 1, 0, -1)]
    kept = ratio[np.abs(ratio) > 0.1]
    for unit in (1.0, np.median(kept), np.min(kept)) if kept.size else ():
        near = np.round(np.clip(ratio / unit, 0, 2)) if unit > 0 else np.ones(k)
        masks.append(near.astype(int))
    for times in masks:
        if 1 not in times and np.any(times == 2):
            times = times // 2
        if not np.any(times) or np.all(times == times[0]):
            continue
        for f in (1.0, 1 / np.sum(base * times)):
            yield Hypothesis(*_pattern(times, f * base * times, f == 1.0))


def _pattern(
    times: np.ndarray, coefficients: np.ndarray, plain: bool
) -> tuple[str, np.ndarray, str]:
    zero, two = np.flatnonzero(times == 0), np.flatnonzero(times == 2)
    divided = (
        "divided by the weights of all of them"
        if plain
        else "divided by the weights that were counted"
    )
    if two.size:
        more = f", and {_which(zero)} not at all" if zero.size else ""
        return (
            "counted twice",
            coefficients,
            f"{_which(two).capitalize()} counts twice{more}; the sum was {divided}. "
            "Look for an index or a call that repeats.",
        )
    if np.all(times[: len(times) - len(zero)]):
        return (
            "lost tail",
            coefficients,
            f"{_which(zero).capitalize()}, the last, does not count; the sum was "
            f"{divided}. Close the window with what it has, or flush it.",
        )
    only = "Only the last one counts: was the accumulator overwritten? "
    overwritten = only if len(zero) == len(times) - 1 and times[-1] else ""
    return (
        "left out",
        coefficients,
        f"{_which(zero).capitalize()} does not count; the sum was {divided}. "
        f"{overwritten}Look for a skipped call or for an index that starts too late.",
    )


def _clipped(seen: Evidence) -> Iterator[Hypothesis]:
    """Each gradient was clipped to one norm before the mean."""
    if len(seen.expected) < 2 or not np.all(seen.expected) or not np.all(seen.norms):
        return
    values, determined = seen.solution
    ratio = values / seen.expected
    below = determined & (ratio < 1 - 5 * seen.noise) & (ratio > 0)
    if not np.any(below):
        return
    most = float(np.median((ratio * seen.norms)[below]))
    factors = np.minimum(1.0, most / seen.norms)
    count = np.sum(factors < 1)
    if np.ptp(factors) <= 5 * seen.noise:
        return  # one factor for all
    likely = " Only one was clipped, so this is likely, not sure." if count == 1 else ""
    yield Hypothesis(
        "clipped each",
        seen.expected * factors,
        f"{count} of {len(factors)} microbatches count as if their gradients were "
        f"clipped to the norm {most:.4g} each, before the mean.{likely} Clip inside "
        "the accumulation instead: accumulate(optax.chain(clip, optimizer), ...).",
    )


def _numbers(values: np.ndarray, most: int = 8) -> str:
    more = ", ..." if len(values) > most else ""
    return f"({', '.join(f'{x:.4g}' for x in values[:most])}{more})"


def _which(indices: np.ndarray) -> str:
    if len(indices) == 1:
        return f"microbatch {indices[0]}"
    return f"each of microbatches {', '.join(map(str, indices))}"
