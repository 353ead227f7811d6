"""Checks of the arguments of `accumax.testing.coefficients`."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._types import PyTree
from .evidence import check_trees, holes
from .faults import Finding


def non_finite(
    accumulated: PyTree,
    gradients: Sequence[PyTree],
    others: Mapping[str, Sequence[PyTree]],
) -> Finding | None:
    each = {f"microbatch_gradients[{i}]": tree for i, tree in enumerate(gradients)}
    for name, trees in others.items():
        each |= {f"alternatives[{name!r}][{i}]": tree for i, tree in enumerate(trees)}
    of_sum, of_each = holes({"accumulated": accumulated}), holes(each)
    if not of_sum and not of_each:
        return None
    places = ", ".join([*of_sum, *of_each][:6])
    if not of_each:
        what = "The microbatches are finite, so the step made it: look for an overflow."
    elif of_sum:
        what = "It comes from a microbatch: look at its loss."
    else:
        what = "The step left that microbatch out, or computes it in another way."
    return Finding(
        "non-finite",
        f"There is a NaN or an infinity in {places}. {what} Nothing else can be told.",
    )


def check_gradients(accumulated: PyTree, gradients: Any) -> Sequence[PyTree]:
    if not isinstance(gradients, Sequence):
        raise TypeError(
            f"microbatch_gradients is a {type(gradients).__name__}; expected a list of "
            "k trees. Of one tree with an axis over microbatches, pass "
            "[jax.tree.map(lambda x: x[i], tree) for i in range(k)]."
        )
    if not gradients:
        raise ValueError(
            "microbatch_gradients is empty; expected the gradient of each microbatch."
        )
    each = {f"microbatch_gradients[{i}]": tree for i, tree in enumerate(gradients)}
    leaves = check_trees("accumulated", accumulated, each)
    count = sum(x.size * (2 if np.iscomplexobj(x) else 1) for x in leaves.values())
    if count < len(gradients):
        raise ValueError(
            f"accumulated has {count} numbers, too few for the coefficients of "
            f"{len(gradients)} microbatches. Pass a gradient with more parameters, or "
            "fewer microbatches."
        )
    return gradients


def check_weights(weights: Any, k: int) -> np.ndarray:
    counts = np.ones(k) if weights is None else np.asarray(weights, np.float64)
    if counts.shape != (k,):
        raise ValueError(
            f"weights has shape {counts.shape}, but there are {k} microbatches. Pass "
            "one number for each: its items."
        )
    if not np.all(np.isfinite(counts)) or np.any(counts < 0) or not np.any(counts):
        raise ValueError(
            f"{weights=} must be finite and not negative, and not all 0: the items of "
            "each microbatch."
        )
    return counts


def check_alternatives(
    accumulated: PyTree, alternatives: Mapping[str, Sequence[PyTree]], k: int
) -> Mapping[str, Sequence[PyTree]]:
    for name, trees in alternatives.items():
        if not isinstance(trees, Sequence) or len(trees) != k:
            what = f"{len(trees)}" if isinstance(trees, Sequence) else "no list"
            raise ValueError(
                f"alternatives[{name!r}] has {what}; expected a list of {k} trees, one "
                "for each of microbatch_gradients."
            )
        each = {f"alternatives[{name!r}][{i}]": tree for i, tree in enumerate(trees)}
        check_trees("accumulated", accumulated, each)
    return alternatives


def check_count(name: str, value: int | None, least: int) -> int | None:
    if value is None:
        return None
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer or None.") from None
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}, or None.")
    return value
